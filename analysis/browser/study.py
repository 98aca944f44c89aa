"""The file of a blinded study: which features are shown, as what, in which order, to whom.

Claye 3.3, 4.3 and appendix D: an expert sees attribution and top cells of a mix of concepts and
neurons without knowing which is which, says what they suggest, and meets some of them again. A
study is a folder: `study.json` (the design), `panels.json` (what is shown, and nothing else, fixed
when the study is made: neither a later run nor a later version changes it under a rater's eyes),
`answers.sqlite`.

Every rater has an order of their own. In a common order the same items would meet everybody fresh
or tired, after the same neighbour, and what raters learn on the way would pass for agreement.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.browser import answers
from sae_jax import InputError, files
from sae_jax.errors import brief
from sae_jax.reading import check_file, read_object, reading

if TYPE_CHECKING:
    from analysis.browser.run import Run

SCHEMA = 1
KINDS = ("concept", "neuron")
MOST_TEXT = 5000  # characters of an answer in words
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

# The form of appendix D, figure 9.
QUESTIONS: tuple[dict[str, Any], ...] = (
    {
        "id": "cell_type", "title": "Cell type specificity",
        "asks": "Do these genes suggest a specific cell type?",
        "options": ["no", "yes"], "words": "Which cell type?",
        "example": "e.g., B cell, classical monocyte …",
    },
    {
        "id": "tissue", "title": "Tissue specificity",
        "asks": "Do these genes suggest a specific tissue?",
        "options": ["no", "yes"], "words": "Which tissue?",
        "example": "e.g., liver, brain, immune system …",
    },
    {
        "id": "process", "title": "Biological process specificity",
        "asks": "Do these genes suggest a specific biological process?",
        "options": ["no", "unclear", "yes"],
        "words": "Please explain the biological process or signal:", "example": "",
    },
)  # fmt: skip
OPTIONS = {"no": "No", "unclear": "Signal but unclear", "yes": "Yes"}


@dataclass(frozen=True)
class Item:
    """One showing of a feature.

    number: opaque, six digits; all that a rater's browser is told. repeat_of: the number of the
    first showing, for a second one.
    """

    number: str
    feature: int
    name: str
    kind: str
    repeat_of: str | None = None

    @property
    def shown(self) -> str:
        """The number under which its panels are kept: a repeat shows the very same."""
        return self.repeat_of or self.number


@dataclass(frozen=True)
class Rater:
    """token: SHA-256 of the secret in the rater's link. order: numbers of all items."""

    name: str
    token: str
    order: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A design, as its file holds it; see `study_draw.make` for what fields mean."""

    name: str
    title: str
    made: str
    run: str
    seed: int
    panels: tuple[str, ...]
    metadata: tuple[str, ...]
    n_genes: int
    n_samples: int
    passed_over: Mapping[str, int]
    items: tuple[Item, ...]
    raters: tuple[Rater, ...]
    questions: tuple[Mapping[str, Any], ...]
    panels_sha256: str
    schema: int = SCHEMA

    @functools.cached_property
    def item(self) -> Mapping[str, Item]:
        """Items by number."""
        return {each.number: each for each in self.items}

    @functools.cached_property
    def rater(self) -> Mapping[str, Rater]:
        """Raters by name."""
        return {each.name: each for each in self.raters}

    def check_answer(self, given: Any) -> dict[str, str | None]:
        """An answer as it is stored: every question's option (None: not answered) and words.

        Raises:
            InputError: if it is not one that the form can send.
        """
        fields = {q["id"]: q["options"] for q in self.questions}
        if not isinstance(given, dict) or given.keys() - fields - {f"{f}_words" for f in fields}:
            raise InputError("this is no answer to the questions of this study: reload the page.")
        found: dict[str, str | None] = {}
        for field, options in fields.items():
            option, words = given.get(field), given.get(f"{field}_words", "")
            if option is not None and option not in options:
                raise InputError(f"{field} is answered by one of {options}: reload the page.")
            if not isinstance(words, str) or len(words) > MOST_TEXT:
                raise InputError(f"the words on {field} are over {MOST_TEXT} characters: shorten.")
            try:
                words.encode()
            except UnicodeEncodeError:
                raise InputError(f"the words on {field} hold half a character: retype.") from None
            found |= {field: option, f"{field}_words": words}
        return found

    def is_complete(self, answer: Mapping[str, Any]) -> bool:
        """Whether every question has an option chosen; words are never required."""
        return all(answer.get(q["id"]) for q in self.questions)


def create(state: Path, run: Run, name: str, **settings: Any) -> list[tuple[str, str]]:
    """Draws a study of a run and writes it; `settings` as in `study_draw.make`.

    Returns:
        Each rater's name and token. Only hashes are kept, so this is the one time they are told.

    Raises:
        InputError: as `study_draw.make` and `write`.
    """
    from analysis.browser import documents, study_draw  # of which answering makes no use

    drawn = study_draw.make(functools.partial(documents.document, run), name=name, **settings)
    return write(state, *drawn)


def write(
    state: Path, study: Study, content: Mapping[str, Any], tokens: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Writes what `study_draw.make` drew; returns the tokens.

    Raises:
        InputError: if there is a study of that name.
    """
    home = _home(state) / study.name
    with _making(home.parent):
        files.remove_leftovers(home.parent)
        if home.exists():
            raise InputError(f"there is a study {study.name!r} in {state}: take another name.")
        with files.write_aside(home) as fresh:
            fresh.mkdir(mode=0o700)
            (fresh / "study.json").write_text(json.dumps(dataclasses.asdict(study), indent=1))
            (fresh / "panels.json").write_text(_text(content))
            answers.create(fresh / "answers.sqlite", study.rater, study.item)
    return tokens


def new_token(state: Path, name: str, rater: str) -> str:
    """A new link for a rater who lost theirs; the old one opens nothing any more.

    Raises:
        InputError: if there is no such study or rater.
    """
    study = load(state, name)
    if rater not in study.rater:
        raise InputError(f"{rater!r} is no rater of study {name!r}: {', '.join(study.rater)} are.")
    token = secrets.token_urlsafe(24)
    changed = [
        dataclasses.replace(each, token=hashed(token)) if each.name == rater else each
        for each in study.raters
    ]
    design = dataclasses.asdict(study) | {"raters": [dataclasses.asdict(each) for each in changed]}
    files.write_json(_home(state) / name / "study.json", design)
    return token


def load(state: Path, name: str) -> Study:
    """The design of a study.

    Raises:
        InputError: if there is none of that name, or its files are damaged.
    """
    if name not in (names := list(_names(state))):
        known = f"there are {', '.join(names)}" if names else "there is none yet: --new_study=NAME"
        raise InputError(f"no study {name!r} in {state}: {known}.")
    path = check_file(_home(state) / name / "study.json")
    return _read(path, path.stat().st_mtime_ns)


def load_all(state: Path) -> list[Study]:
    """Every study of the state folder, by name."""
    return [load(state, name) for name in _names(state)]


def content(state: Path, study: Study) -> Mapping[str, Any]:
    """What is shown, by the number of an item's first showing.

    Raises:
        InputError: if the file is not the one that the study was made with.
    """
    return _content(_home(state) / study.name / "panels.json", study.panels_sha256)


def open_answers(state: Path, study: Study) -> answers.Answers:
    """The answers of a study; opened and checked once, then shared.

    Raises:
        InputError: as `answers.Answers`.
    """
    path = _home(state) / study.name / "answers.sqlite"
    # By the file itself: one that was restored is not answered for by what it replaced.
    return _answers(path, path.stat().st_ino if path.exists() else 0)


def progress(study: Study, held: answers.Answers) -> list[dict[str, Any]]:
    """How far each rater is: `rater`, `n` (items answered completely), `begun`, `last` (when)."""
    found, rows = [], held.current()
    for rater in study.raters:
        mine = [row for row in rows if row["rater"] == rater.name]
        n = sum(study.is_complete(row["answer"]) for row in mine)
        begun = sum(any(row["answer"].values()) for row in mine) - n
        last = max((row["at"] for row in mine), default=None)
        found.append({"rater": rater.name, "n": n, "begun": begun, "last": last})
    return found


def rater_of_token(state: Path, token: str) -> tuple[Study, Rater] | None:
    """Whose token it is; None if nobody's."""
    digest = hashed(token)
    for study in load_all(state) if token else ():
        for rater in study.raters:
            if hmac.compare_digest(rater.token, digest):
                return study, rater
    return None


def hashed(token: str) -> str:
    """What is kept of a token. It has 192 random bits, so a plain hash cannot be searched."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _home(state: Path) -> Path:
    return Path(state) / "studies"


@contextmanager
def _making(studies: Path) -> Iterator[None]:
    """While no other process makes a study here; the system gives the lock of a killed one back."""
    studies.mkdir(parents=True, exist_ok=True)
    with (studies / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _names(state: Path) -> Iterator[str]:
    return (path.parent.name for path in sorted(_home(state).glob("[!.]*/study.json")))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, sort_keys=True)


def digest(content: Mapping[str, Any]) -> str:
    """What tells whether the panels on the disk are those that were drawn."""
    return hashlib.sha256(_text(content).encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> Study:
    with reading(path, "is no study's file", ": restore it."):
        given = read_object(path)
        if given["schema"] != SCHEMA:
            raise InputError(
                f"{path} has version {given['schema']} of a study's form, and this program reads "
                f"{SCHEMA}: use the version of sae-jax that wrote it."
            )
        given["items"] = tuple(Item(**each) for each in given["items"])
        given["raters"] = tuple(
            Rater(each["name"], each["token"], tuple(each["order"])) for each in given["raters"]
        )
        for field in ("panels", "metadata", "questions"):
            given[field] = tuple(given[field])
        study = Study(**given)
        if study.name != path.parent.name:
            raise ValueError(f"it is of another study, {brief(study.name)}")
        if odd := [q for q in study.questions if not set(QUESTIONS[0]) <= dict(q).keys()]:
            raise ValueError(f"{brief(odd[0])} is no question")
        for rater in study.raters:
            if sorted(rater.order) != sorted(study.item):
                raise InputError(
                    f"{path}: the order of {rater.name!r} is not of its items: restore it."
                )
    return study


@functools.lru_cache(maxsize=8)
def _content(path: Path, sha256: str) -> Mapping[str, Any]:
    found = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(found).hexdigest() != sha256:
        raise InputError(f"{path} is not what this study was made with: restore it.")
    return json.loads(found)


@functools.cache
def _answers(path: Path, inode: int) -> answers.Answers:
    return answers.Answers(path)

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
import functools
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.browser import answers, study_panels
from analysis.browser.study_panels import Documents
from sae_jax import InputError, files

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
    """A design, as its file holds it; see `make` for what the fields mean."""

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


def make(
    documents: Documents,
    *,
    name: str,
    title: str | None = None,
    concepts: int = 20,
    neurons: int = 20,
    repeats: int = 0,
    raters: Sequence[str] = ("rater",),
    seed: int = 0,
    panels: Sequence[str] | None = None,
    metadata: Sequence[str] | None = None,
    n_genes: int = 25,
) -> tuple[Study, dict[str, Any], list[tuple[str, str]]]:
    """Draws a study; nothing is written.

    Features are drawn uniformly among those of their kind that can fill the panels as full as every
    other item: a shorter list would tell what it is of. How many were passed over is kept. Repeats
    are drawn in the proportion of the kinds, and come after at least a third of the items.

    Args:
        documents: key -> document of the run's explorer, as `documents.document` with its run.
        name: of the folder: letters, digits, _ and -.
        title: what raters read; it must not betray what is studied. None for the name.
        concepts, neurons: features of each kind.
        repeats: how many of them are shown a second time.
        raters: their names, each once.
        seed: of the draw and of the orders. Tokens are random whatever it is.
        panels: of `study_panels.PANELS`; None for all that this run can fill.
        metadata: columns of the top cells; None for every column of categories that is not an
            identifier (at most one value for every second cell).
        n_genes: genes of an attribution that are shown.

    Returns:
        The design, what is shown by an item's number, and each rater's token.

    Raises:
        InputError: if the run lacks what a panel needs, or has too few features, or if an argument
            makes no sense.
    """
    raters = _check(name, raters, {"concepts": concepts, "neurons": neurons}, repeats)
    about = documents("about")
    panels = study_panels.available(documents, panels)
    metadata = study_panels.columns(about, metadata) if "cells" in panels else ()
    rng = np.random.default_rng(seed)
    kinds = _kinds(documents)
    links = functools.cache(lambda gene: documents(f"gene/{gene}")["links"])
    drawn: list[tuple[int, str, str]] = []
    shown: dict[int, Any] = {}
    passed_over = {}
    for kind, n in zip(KINDS, (concepts, neurons), strict=True):
        candidates = [feature for feature, (_, k) in kinds.items() if k == kind] if n else []
        found: list[int] = []
        reasons: list[str] = []
        for feature in rng.permutation(candidates).tolist():
            if len(found) == n:
                break
            try:
                shown[feature] = study_panels.project(
                    documents, feature, panels, metadata, n_genes=n_genes, links=links
                )
                found.append(feature)
            except study_panels.CannotShowError as error:
                reasons.append(str(error))
        if len(found) < n:
            why = f" ({reasons[0]})" if reasons else ""
            raise InputError(
                f"{n} {kind}s are asked for, and {len(found)} of the run's {len(candidates)} can "
                f"fill the panels {', '.join(panels)}{why}. Ask for fewer or for other panels, or "
                "attribute more with `sae-jax concepts`."
            )
        passed_over[kind] = len(reasons)
        drawn += [(feature, kinds[feature][0], kind) for feature in found]
    n_samples = study_panels.level(shown.values())

    numbers = _numbers(len(drawn) + repeats, rng)
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    first = [Item(number, *each) for number, each in zip(numbers, drawn, strict=False)]
    again = [
        Item(number, each.feature, each.name, each.kind, each.number)
        for number, each in zip(numbers[len(first) :], _to_repeat(first, repeats, rng), strict=True)
    ]
    items = (*first, *again)
    content = {each.number: shown[each.feature] for each in first}
    tokens = [(rater, secrets.token_urlsafe(24)) for rater in raters]
    study = Study(
        name=name,
        title=title or name,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        run=str(about.get("fingerprint", "")),
        seed=seed,
        panels=panels,
        metadata=metadata,
        n_genes=n_genes,
        n_samples=n_samples,
        passed_over=passed_over,
        items=items,
        raters=tuple(Rater(r, hashed(token), order(items, rng)) for r, token in tokens),
        questions=QUESTIONS,
        panels_sha256=_digest(content),
    )
    return study, content, tokens


def create(state: Path, run: Run, name: str, **settings: Any) -> list[tuple[str, str]]:
    """Draws a study of a run and writes it; `settings` as in `make`.

    Returns:
        Each rater's name and token. Only hashes are kept, so this is the one time they are told.

    Raises:
        InputError: as `make` and `write`.
    """
    from analysis.browser import documents  # which servers of a study alone have no use for

    drawn = make(functools.partial(documents.document, run), name=name, **settings)
    return write(state, *drawn)


def write(
    state: Path, study: Study, content: Mapping[str, Any], tokens: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Writes what `make` drew; returns the tokens.

    Raises:
        InputError: if there is a study of that name.
    """
    home = _home(state) / study.name
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
    path = _home(state) / name / "study.json"
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
    return _answers(_home(state) / study.name / "answers.sqlite")


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


def order(items: Sequence[Item], rng: np.random.Generator) -> tuple[str, ...]:
    """A random order in which a repeat comes a third of the items or more after the first showing.

    Positions of the repeated are drawn until those in the earlier half pair with those in the later
    half at that distance (half the items lie between, on average); then partners are exchanged at
    random as far as the distance allows, so that repeats do not follow the order of the first.
    """
    n, again = len(items), [each for each in items if each.repeat_of]
    r, least = len(again), n // 3
    while True:
        places = np.sort(rng.choice(n, 2 * r, replace=False))
        early, late = places[:r], places[r:]
        if np.all(late - early >= least):
            break
    for _ in range(20 * r):
        i, j = rng.integers(r, size=2)
        if min(late[j] - early[i], late[i] - early[j]) >= least:
            late[[i, j]] = late[[j, i]]
    placed: dict[int, str] = {}
    for pair, k in zip(again, rng.permutation(r), strict=True):
        placed |= {int(early[k]): str(pair.repeat_of), int(late[k]): pair.number}
    taken = set(placed.values())
    others = iter(rng.permutation([each.number for each in items if each.number not in taken]))
    return tuple(placed.get(place) or str(next(others)) for place in range(n))


def _check(
    name: str, raters: Sequence[str], counts: Mapping[str, int], repeats: int
) -> tuple[str, ...]:
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a study: use letters, digits, _ and -, 64 at most, the first a "
            "letter or a digit."
        )
    raters = tuple(each.strip() for each in raters)
    if not raters or len(set(raters)) < len(raters):
        raise InputError(f"raters={','.join(raters)!r}: give at least one, and each name once.")
    for rater in raters:
        if not 0 < len(rater) <= 40 or not rater.isprintable():
            raise InputError(f"{rater!r} cannot name a rater: give 1 to 40 printable characters.")
    for what, n in (counts | {"repeats": repeats}).items():
        if n < 0:
            raise InputError(f"{what}={n}: give 0 or more.")
    total = sum(counts.values())
    if not 0 < total <= 100_000:
        raise InputError(f"{total} features: give concepts, neurons or both, 100,000 at most.")
    if repeats > total or (repeats and total + repeats < 6):
        raise InputError(
            f"{repeats} repeats of {total} features: at most one of each, and in a study of six or "
            "more items, or a repeat would follow what it repeats."
        )
    return raters


def _kinds(documents: Documents) -> dict[int, tuple[str, str]]:
    """Name and kind of every feature; without a kind it is a concept, as in the run's file."""
    table = documents("features")
    names, kind = table["names"], table["columns"].get("kind")
    if kind is None:
        return {i: (str(name), "concept") for i, name in enumerate(names)}
    if isinstance(kind, Mapping):
        named = dict(enumerate(kind["categories"])) | {kind["missing"]: None}
        kind = [named[code] for code in np.asarray(kind["codes"]).tolist()]
    pairs = zip(map(str, names), (each or "concept" for each in kind), strict=True)
    return dict(enumerate(pairs))


def _numbers(n: int, rng: np.random.Generator) -> list[str]:
    """Different numbers of six digits, in no order."""
    return [str(100_000 + i) for i in rng.choice(900_000, n, replace=False).tolist()]


def _to_repeat(first: Sequence[Item], repeats: int, rng: np.random.Generator) -> list[Item]:
    """Items to show again: of each kind its share, rounded; which are drawn at random."""
    of = {kind: [each for each in first if each.kind == kind] for kind in KINDS}
    n_concepts = round(repeats * len(of["concept"]) / len(first))
    wanted = {"concept": n_concepts, "neuron": repeats - n_concepts}
    return [of[kind][i] for kind in KINDS for i in rng.permutation(len(of[kind]))[: wanted[kind]]]


def _home(state: Path) -> Path:
    return Path(state) / "studies"


def _names(state: Path) -> Iterator[str]:
    return (path.parent.name for path in sorted(_home(state).glob("[!.]*/study.json")))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False, sort_keys=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


@functools.lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> Study:
    try:
        given = json.loads(path.read_text())
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
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no study's file ({error}): restore it.") from error
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


_answers: Callable[[Path], answers.Answers] = functools.lru_cache(maxsize=None)(answers.Answers)

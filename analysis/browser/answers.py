"""What raters answered: a dated history in SQLite that only grows, and what holds now.

A change is never overwritten: every save and every undo adds a row, and triggers refuse anything
else. What holds is the last row of a rater and an item. Each commit is on the disk before it is
acknowledged (write-ahead log, synchronous FULL), so neither a killed server nor a power cut takes
back what a page called saved; SQLite's own locks serve several servers on one file.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sae_jax import InputError

MOST = 2**63 - 1  # the largest integer that SQLite keeps
SCHEMA = 1  # PRAGMA user_version of files that this code writes
_MAGIC = b"SQLite format 3\0"
_WAIT = 10_000  # milliseconds for another process' write to end
_TABLES = """
CREATE TABLE rater (name TEXT PRIMARY KEY) STRICT;
CREATE TABLE item (number TEXT PRIMARY KEY) STRICT;
CREATE TABLE change (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,           -- when, in UTC
    rater TEXT NOT NULL REFERENCES rater,
    item TEXT NOT NULL REFERENCES item,
    version INTEGER NOT NULL,   -- counts the changes of a rater and an item from 1
    base INTEGER NOT NULL,      -- the version that the page showed when it was made
    source INTEGER NOT NULL,    -- the version that was typed and holds from now on; 0: none
    before INTEGER NOT NULL,    -- the source that held before `source` was typed: where undo leads
    answer TEXT NOT NULL,       -- JSON
    save TEXT NOT NULL,         -- the page's name for it: a repeated request adds nothing
    UNIQUE (rater, item, version),
    UNIQUE (rater, item, save)
) STRICT;
CREATE TRIGGER change_is_kept BEFORE DELETE ON change
    BEGIN SELECT RAISE(ABORT, 'the history only grows'); END;
CREATE TRIGGER change_is_fixed BEFORE UPDATE ON change
    BEGIN SELECT RAISE(ABORT, 'the history only grows'); END;
CREATE VIEW current AS SELECT * FROM change AS last WHERE version =
    (SELECT max(version) FROM change WHERE rater = last.rater AND item = last.item);
"""


class NotSavedError(Exception):
    """The disk took no change: nothing was added, and what was saved before can still be read."""


@dataclass(frozen=True)
class Saved:
    """What holds for a rater and an item, or what a change made of it.

    version: 0 before the first change. at: when, ISO 8601 in UTC; None before it.
    answer: what was typed, by field; empty before it.
    can_undo: whether something typed holds that an undo would take back.
    other: what another page had saved meanwhile, which this one had not seen, and when; else None.
    """

    version: int = 0
    at: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)
    can_undo: bool = False
    other: dict[str, Any] | None = None


def create(path: str | Path, raters: Iterable[str], items: Iterable[str]) -> None:
    """Makes an empty file; only these raters may answer, and these items."""
    connection = _connect(Path(path), must_exist=False)
    try:
        with _writing(connection):
            for statement in _statements(_TABLES):
                connection.execute(statement)
            connection.executemany("INSERT INTO rater VALUES (?)", [(name,) for name in raters])
            connection.executemany("INSERT INTO item VALUES (?)", [(each,) for each in items])
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
    finally:
        connection.close()


class Answers:
    """An open file of answers; threads may share it.

    Raises:
        InputError: if the file is missing, damaged or of another version of this program.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"there is no file of answers {self.path}: restore it from a backup.")
        try:
            with self.path.open("rb") as file:  # SQLite would take an empty file and fill it
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise sqlite3.DatabaseError("file is not a database")
            self._connection = _connect(self.path)
            try:
                self._check()
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.DatabaseError as error:
            if _is_of_the_disk(error):
                raise InputError(
                    f"{self.path} cannot be opened ({error}): its disk is full, fails "
                    "or may not be written; mend that, and start again."
                ) from error
            raise InputError(
                f"{self.path} is damaged ({error}): restore it from a backup; "
                "`sqlite3 FILE .recover` may read what is left."
            ) from error
        self._lock = threading.Lock()

    def close(self) -> None:
        """Gives the file back; SQLite then folds its log into it."""
        self._connection.close()

    def of(self, rater: str) -> RaterAnswers:
        """The part of one rater, which reaches no row of another.

        Raises:
            InputError: if the file knows no such rater.
        """
        if not self.rows("SELECT 1 FROM rater WHERE name = ?", rater):
            raise InputError(f"{rater!r} is no rater of {self.path}.")
        return RaterAnswers(self, rater)

    def current(self) -> list[dict[str, Any]]:
        """What holds now, of all raters: `rater`, `item`, `version`, `at`, `answer`."""
        return self._told("SELECT rater, item, version, at, answer FROM current ORDER BY id")

    def history(self) -> list[dict[str, Any]]:
        """Every change, the oldest first: also `base`, and `source` (below `version`: an undo)."""
        return self._told(
            "SELECT id, at, rater, item, version, base, source, answer FROM change ORDER BY id"
        )

    def _told(self, query: str) -> list[dict[str, Any]]:
        return [{**row, "answer": json.loads(row["answer"])} for row in self.rows(query)]

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """What a query reads."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer shares; it is on the disk when this ends.

        Raises:
            NotSavedError: if the disk is full.
        """
        try:
            with self._lock, _writing(self._connection):
                yield self._connection
        except sqlite3.OperationalError as error:
            if _is_of_the_disk(error):
                raise NotSavedError(str(error)) from error
            raise

    def _check(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA:
            raise InputError(
                f"{self.path} has version {version} of the answers' form, and this program reads "
                f"{SCHEMA}: use the version of sae-jax that wrote it."
            )
        told = [row[0] for row in self._connection.execute("PRAGMA integrity_check")]
        strays = self._connection.execute("PRAGMA foreign_key_check").fetchall()
        if told != ["ok"] or strays:
            raise sqlite3.DatabaseError("; ".join(told[:3]) if told != ["ok"] else "strayed rows")


class RaterAnswers:
    """The answers of one rater: every statement names the rater."""

    def __init__(self, answers: Answers, rater: str) -> None:
        self._answers, self.rater = answers, rater

    def get(self, item: str) -> Saved:
        """What holds for an item."""
        query = "SELECT * FROM current WHERE rater = ? AND item = ?"
        return _saved(*self._answers.rows(query, self.rater, item) or [_NOTHING])

    def all(self) -> dict[str, dict[str, Any]]:
        """The answers that hold, by item."""
        rows = self._answers.rows("SELECT item, answer FROM current WHERE rater = ?", self.rater)
        return {row["item"]: json.loads(row["answer"]) for row in rows}

    def save(self, item: str, answer: dict[str, Any], base: int, save: str) -> Saved:
        """Adds an answer, whatever was saved meanwhile; `other` then tells what that was.

        Args:
            item: its number.
            answer: by field, as typed.
            base: the version that the page showed.
            save: the page's own name for this change. A change of that name is only added once.

        Raises:
            InputError: if the study has no such item.
            NotSavedError: if the disk is full.
        """
        with self._changes(item) as changes:
            if changes.named(save) is None:
                now = changes.last()
                changes.add(base, now["version"] + 1, now["source"], json.dumps(answer), save)
            return changes.outcome(save)

    def undo(self, item: str, base: int, save: str) -> Saved:
        """Adds what held before the last answer that holds; where none does, nothing is added.

        Arguments and errors as in `save`.
        """
        with self._changes(item) as changes:
            if changes.named(save) is None:
                now = changes.last()
                if not now["source"]:
                    return _saved(now)
                earlier = changes.version(now["before"])
                changes.add(base, now["before"], earlier["before"], earlier["answer"], save)
            return changes.outcome(save)

    @contextmanager
    def _changes(self, item: str) -> Iterator[_Changes]:
        with self._answers.writing() as connection:
            yield _Changes(connection, self.rater, item)


Change = Mapping[str, Any]
_NOTHING: Change = dict.fromkeys(("version", "source", "before"), 0) | {"at": None, "answer": "{}"}


@dataclass(frozen=True)
class _Changes:
    """The changes of a rater and an item, inside a transaction."""

    connection: sqlite3.Connection
    rater: str
    item: str

    def last(self) -> Change:
        return self._one("1 ORDER BY version DESC LIMIT 1") or _NOTHING

    def version(self, version: int) -> Change:
        return self._one("version = ?", version) or _NOTHING

    def named(self, save: str) -> Change | None:
        return self._one("save = ?", save)

    def add(self, base: int, source: int, before: int, answer: str, save: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        version = self.last()["version"] + 1
        try:
            self.connection.execute(
                "INSERT INTO change (at, rater, item, version, base, source, before, answer, save)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (now, self.rater, self.item, version, base, source, before, answer, save),
            )
        except sqlite3.IntegrityError as error:
            raise InputError(f"this study has no item {self.item!r}.") from error

    def outcome(self, save: str) -> Saved:
        """Of a change that was added, now or by an earlier request."""
        change = self.named(save)
        previous = self.version(change["version"] - 1)
        unseen = previous["version"] > change["base"] and previous["answer"] != change["answer"]
        return _saved(change, previous if unseen else None)

    def _one(self, where: str, *values: Any) -> Change | None:
        query = f"SELECT * FROM change WHERE rater = ? AND item = ? AND {where}"
        return self.connection.execute(query, (self.rater, self.item, *values)).fetchone()


def _saved(change: Change, unseen: Change | None = None) -> Saved:
    other = unseen and {"at": unseen["at"], "answer": json.loads(unseen["answer"])}
    return Saved(
        change["version"], change["at"], json.loads(change["answer"]), bool(change["source"]), other
    )


def _connect(path: Path, must_exist: bool = True) -> sqlite3.Connection:
    """A connection without Python's implicit transactions."""
    mode = "rw" if must_exist else "rwc"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None,
        check_same_thread=False,
    )  # fmt: skip
    connection.row_factory = sqlite3.Row
    for setting in (f"busy_timeout = {_WAIT}", "journal_mode = WAL", "synchronous = FULL",
                    "foreign_keys = ON"):  # fmt: skip
        connection.execute(f"PRAGMA {setting}")
    return connection


@contextmanager
def _writing(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_of_the_disk(error: sqlite3.DatabaseError) -> bool:
    """Whether it is full. A log that cannot grow is told as an I/O error of some kind, or as a
    file that cannot be opened; the low byte is the family of a code."""
    families = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in families


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one: executescript would commit between them."""
    begun = ""
    for line in script.strip().splitlines(keepends=True):
        begun += line
        if sqlite3.complete_statement(begun):
            yield begun
            begun = ""

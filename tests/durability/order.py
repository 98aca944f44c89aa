"""Whether what is written survives a power cut: no kill tests that, the order of fsyncs does.

A file that takes its final name must have been fsynced after its last write, and its folder after
it was renamed; of a folder that is renamed whole, every file and folder in it. What is being
written aside has no final name yet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path, PurePath

from tests.durability.tracing import Event

ASIDE = (
    ".writing-",
    ".extracting",
    ".exporting",
    ".writable.",
    "checkpoints",
)  # begin names of what is unfinished
SQLITE = (".sqlite", ".sqlite-wal", ".sqlite-shm", ".sqlite-journal")  # keeps an order of its own


@dataclasses.dataclass(frozen=True)
class Order:
    """What a run did.

    Attributes:
      renamed: into their final place: files, those in folders renamed whole too.
      violations: what was not on the disk by when it should be.
      last: the last file that took its final name.
    """

    renamed: int
    violations: list[str]
    last: str | None


def checked(events: Sequence[Event], out: Path) -> Order:
    """Goes through the events of a whole run."""
    dirty: set[str] = set()  # files written since their last fsync, folders with new names in them
    known: set[str] = set()  # files
    violations, renamed, last = [], 0, None
    for event in events:
        path = event.path
        if event.kind in ("create", "write", "resize"):
            if path not in known:
                known.add(path)
                dirty.add(_parent(path))
            dirty.add(path)
            if event.kind == "create" and is_final(path, out):
                violations.append(f"{_short(path, out)} is written in its final place")
        elif event.kind == "mkdir":
            dirty |= {path, _parent(path)}
        elif event.kind == "fsync":
            dirty.discard(path)
        elif event.kind == "remove":
            gone = _below(path, known | dirty)
            known -= gone
            dirty -= gone
        elif moved := event.onto:
            if is_final(moved, out):
                unsafe = _below(path, dirty)
                violations += [
                    f"{_short(each, out)} is renamed before its fsync" for each in sorted(unsafe)
                ]
                dirty -= unsafe  # told
                if arrived := _below(path, known):
                    renamed += len(arrived)
                    last = _short(moved, out)
            known = {_moved(each, path, moved) for each in known}
            dirty = {_moved(each, path, moved) for each in dirty}
            dirty.add(_parent(moved))
    holds = {_parent(file) for file in known}
    left = [each for each in dirty & (known | holds) if _inside(each, out) and is_final(each, out)]
    violations += [f"{_short(each, out)} is not fsynced at the end" for each in sorted(left)]
    violations += _written_after_manifest(events, out)
    return Order(renamed, list(dict.fromkeys(violations)), last)


def _written_after_manifest(events: Sequence[Event], out: Path) -> list[str]:
    """What a manifest lists and was touched once it was there."""
    found = []
    for path in out.rglob("manifest.json"):
        listed = {str(path.parent / name) for name in json.loads(path.read_text())["files"]}
        at = max(i for i, event in enumerate(events) if event.onto == str(path))
        late = [event for event in events[at:] if (event.onto or event.path) in listed]
        found += [f"{_short(each.onto or each.path, out)} after its manifest" for each in late
                  if each.kind in ("write", "create", "resize", "rename")]  # fmt: skip
    return found


def is_final(path: str, out: Path) -> bool:
    """Whether it is where it stays."""
    parts = PurePath(path).relative_to(out).parts
    return not any(part.startswith(ASIDE) or part.endswith((*SQLITE, ".lock")) for part in parts)


def _parent(path: str) -> str:
    return str(PurePath(path).parent)


def _inside(path: str, out: Path) -> bool:
    return path == str(out) or path.startswith(f"{out}/")


def _below(path: str, among: set[str]) -> set[str]:
    return {each for each in among if each == path or each.startswith(f"{path}/")}


def _moved(each: str, path: str, onto: str) -> str:
    return onto + each[len(path) :] if each == path or each.startswith(f"{path}/") else each


def _short(path: str, out: Path) -> str:
    return str(PurePath(path).relative_to(out))

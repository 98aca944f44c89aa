"""What the study of a stage finds once and keeps, so that the same command goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_jax import files
from tests.durability import kills
from tests.durability.kills import Unbroken
from tests.durability.stages import OUT, Stage
from tests.durability.tracing import Event

NAME = "begun.json"
REPOSITORY = Path(__file__).parents[2]
TRIED = ("sae_jax", "extract", "analysis", "experiments", "tests/durability")


@dataclasses.dataclass(frozen=True)
class Begun:
    """The unbroken run, and the states to go on from.

    Attributes:
      asked: flags and a hash of the code; with others a stage begins anew.
      stopped: after how many calls the process was stopped.
      some: those of them, by number, after which processes are to be killed.
      frozen: by number of a call what it was and the folder with what it left.
    """

    asked: Mapping[str, Any]
    run: Unbroken
    stopped: int = 0
    some: Sequence[int] = ()
    frozen: Mapping[int, tuple[str, str]] = dataclasses.field(default_factory=dict)


def begin(stage: Stage, base: Path, asked: Mapping[str, Any]) -> Begun:
    """What was found in `base` before, if the same was asked of the same code, or is found now.

    Args:
      asked: the flags checks, most, states, real, random and seed of main.py.
    """
    asked = {**asked, "code": _code()}
    if (base / NAME).exists() and (before := _read(base)).asked == asked:
        kills.warm(base)
        return before
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    kills.prepare(stage, base)
    begun = Begun(asked, kills.unbroken(stage, base))
    if "kills" in asked["checks"]:
        events, chance = begun.run.events, random.Random(asked["seed"])
        most = asked["most"] or len(events)
        numbers = kills.points(events, base / "traced" / OUT, most, asked["seed"])
        frozen = kills.freeze(stage, base, numbers)
        states = chance.sample(sorted(frozen), min(asked["states"] or len(frozen), len(frozen)))
        begun = dataclasses.replace(
            begun,
            stopped=len(numbers),
            some=chance.sample(numbers, min(asked["real"], len(numbers))),
            frozen={number: frozen[number] for number in states},
        )
    with files.write_aside(base / NAME) as fresh:
        fresh.write_text(json.dumps(dataclasses.asdict(begun)))
    return begun


def _read(base: Path) -> Begun:
    held = json.loads((base / NAME).read_text())
    held["run"]["events"] = [Event(**each) for each in held["run"]["events"]]
    held["run"] = Unbroken(**held["run"])
    held["frozen"] = {int(number): tuple(each) for number, each in held["frozen"].items()}
    return Begun(**held)


def _code() -> str:
    """A hash of all that is tried, and of what tries it."""
    told = hashlib.sha256()
    for package in TRIED:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            told.update(path.read_bytes())
    return told.hexdigest()

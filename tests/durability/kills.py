"""A command that was killed, given again, ends as one that was let be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.durability import children, order, tracing
from tests.durability.stages import OUT, Stage
from tests.durability.tracing import Event

EMPTY = "an empty folder"
# tempfile's, zarr's and mktemp's
RANDOM = re.compile(r"(?<=\.)[a-z0-9_]{8}(?=/|\.whole|$)|[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Unbroken:
    """A run that was let be: what it left, how long it took, what it did to its folder."""

    outcome: dict[str, str]
    seconds: float
    events: list[Event]


@dataclasses.dataclass(frozen=True)
class Killed:
    """A run that was killed (`at`: after which event, or seconds), and the one after it.

    wrong: what is not as it should be, nothing if all is well. husks: empty folders that nothing
    removed.
    """

    at: str
    wrong: list[str]
    husks: list[str]
    seconds: float


def prepare(stage: Stage, base: Path) -> None:
    """Writes what the stage reads."""
    children.ask(lambda: stage.prepare(base / "inputs"), base)


def place(base: Path, name: str) -> Path:
    """A new folder to run the stage in."""
    folder = base / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "inputs").symlink_to(base / "inputs")
    return folder


def outcome(stage: Stage, folder: Path) -> dict[str, str]:
    """Every file of a finished run by its contents, after all that can be verified is."""

    def found() -> dict[str, str]:
        stage.verify(OUT)
        return contents(stage)

    return children.ask(found, folder)


def contents(stage: Stage) -> dict[str, str]:
    """Every file, and every empty folder, in `OUT` here, by what it holds."""
    return {
        str(path.relative_to(OUT)): _digest(stage, path)
        for path in sorted(OUT.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def _digest(stage: Stage, path: Path) -> str:
    if path.is_dir():
        return EMPTY
    read: Callable[[Path], Any] = next(
        (read for pattern, read in stage.contents.items() if path.match(pattern)), Path.read_bytes
    )
    try:
        content = read(path)
    except Exception as error:  # damaged
        return f"unreadable: {error}"
    return hashlib.sha256(
        content if isinstance(content, bytes) else repr(content).encode()
    ).hexdigest()


def unbroken(stage: Stage, base: Path) -> Unbroken:
    """The stage three times: to fill caches of compilers and see what it imports on its way (the
    file `modules` of `base`), to be timed, to be traced.

    Raises:
      RuntimeError: a run fails, or two of them differ.
    """
    seen = base / "modules"

    def listing() -> None:
        try:
            stage.run(False)
        finally:
            seen.write_text("\n".join(sys.modules))

    _must(children.run(listing, place(base, "warm")), base / "warm")
    warm(base)
    folder, began = place(base, "timed"), time.monotonic()
    _must(children.run(lambda: stage.run(False), folder), folder)
    seconds = time.monotonic() - began
    first, again = (outcome(stage, base / name) for name in ("warm", "timed"))
    if wrong := differences(first, again):
        raise RuntimeError(f"two unbroken runs differ: {wrong}")
    folder = place(base, "traced")
    child = children.start(lambda: stage.run(False), folder)
    events = tracing.watch(child, folder / OUT)
    _must(child.wait(), folder)
    return Unbroken(first, seconds, events)


def warm(base: Path) -> None:
    """Import what the unbroken run did."""
    for name in (base / "modules").read_text().splitlines():
        with contextlib.suppress(Exception):  # some are not to be imported by their names
            importlib.import_module(name)
    gc.freeze()  # or collecting would copy all memory into every child


def _must(status: int, folder: Path) -> None:
    if status:
        told = "".join(path.read_text(errors="replace") for path in folder.glob("said*"))
        raise RuntimeError(f"status {status} in {folder}: {told}")


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is missing, left over, or other."""
    return (
        [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
        + [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
        + [
            f"{name} differs"
            for name in sorted(expected)
            if found.get(name, "") not in ("", expected[name])
        ]
    )


def points(events: Sequence[Event], out: Path, most: int, seed: int) -> list[int]:
    """Numbers of events, from 1: before and after every change of what has its final place, and of
    what is being written aside so many of each kind, drawn at random."""
    chosen, aside = set(), {}
    for number, event in enumerate(events, 1):
        if order.is_final(event.onto or event.path, out):
            chosen |= {number - 1, number}
        else:
            aside.setdefault(event.kind, []).append(number)
    for numbers in aside.values():
        chosen |= set(random.Random(seed).sample(numbers, min(most, len(numbers))))
    return sorted(chosen - {0})


def freeze(stage: Stage, base: Path, numbers: Sequence[int]) -> dict[int, tuple[str, str]]:
    """What a kill after the events of these numbers would leave, copied while the process stands
    still: by number the event and the copy. States that repeat are copied once."""
    folder, wanted = place(base, "frozen"), sorted(numbers, reverse=True)
    found: dict[int, tuple[str, str]] = {}
    seen = set()

    def copied(events: list[Event]) -> bool:
        if wanted and len(events) >= wanted[-1]:
            while wanted and len(events) >= wanted[-1]:
                number = wanted.pop()
            if (now := state(folder / OUT)) not in seen:
                seen.add(now)
                copy = place(base, f"after-{number}")
                shutil.copytree(folder / OUT, copy / OUT, symlinks=True)
                shutil.copy(folder / "said", copy)
                found[number] = str(events[-1]), str(copy)
        return False

    child = children.start(lambda: stage.run(False), folder)
    tracing.follow(child, folder / OUT, copied)
    _must(child.wait(), folder)
    return found


def state(out: Path) -> str:
    """A hash of all that a folder holds, but for the random parts of names."""
    told = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        name = RANDOM.sub("*", str(path.relative_to(out)))
        content = path.read_bytes() if path.is_file() else b"folder"
        told.update(f"{name}\0{len(content)}\0".encode() + content)
    return told.hexdigest()


def resume(stage: Stage, frozen: Path, expected: dict[str, str], at: str) -> Killed:
    """Give the command again in a copy of what a killed one would have left, so that what is
    frozen stays as it was if this check is killed itself."""
    began = time.monotonic()
    folder = place(frozen.parent, f"again-{frozen.name}")
    shutil.copytree(frozen / OUT, folder / OUT, symlinks=True)
    shutil.copy(frozen / "said", folder)
    return _again(stage, folder, expected, at, began)


def kill_after_event(stage: Stage, base: Path, expected: dict[str, str], number: int) -> Killed:
    """Kill after the event of this number, then give the command again. If it has ended by then
    (threads make more events in one run than in another), an earlier one is taken."""
    began = time.monotonic()
    while True:
        folder = place(base, f"event-{number}")
        child = children.start(lambda: stage.run(False), folder)
        events = tracing.follow(child, folder / OUT, lambda events, n=number: len(events) >= n)
        if child.wait() == -signal.SIGKILL:
            return _again(stage, folder, expected, str(events[-1]), began)
        shutil.rmtree(folder)
        number = number * 9 // 10


def share(tasks: Sequence[Callable[[], Killed]], base: Path, jobs: int) -> list[Killed]:
    """Do tasks in so many processes; their results in order. They are kept in `base`/done as they
    come: those that are there are not done again."""
    done = base / "done"
    left = sorted(set(range(len(tasks))) - _results(done).keys())

    def work(first: int) -> None:
        for i in left[first::jobs]:
            result = tasks[i]()
            with done.open("a") as file:  # a line is one write, whole or not there
                file.write(json.dumps([i, dataclasses.asdict(result)]) + "\n")

    workers = [children.start(functools.partial(work, i), base, f"worker-{i}") for i in range(jobs)]
    for worker in workers:
        worker.release()
    tqdm.monitor_interval = 0  # a thread, of which children would have half
    with tqdm(total=len(tasks), initial=len(tasks) - len(left), desc=base.name) as bar:
        while workers:
            for worker in list(workers):
                if (status := worker.ended()) is not None:
                    _must(status, base)
                    workers.remove(worker)
            time.sleep(0.2)
            bar.update(len(_results(done)) - bar.n)
    found = _results(done)
    return [found[i] for i in range(len(tasks))]


def _results(done: Path) -> dict[int, Killed]:
    """By the number of the task."""
    lines = done.read_text().splitlines() if done.exists() else []
    return {i: Killed(**each) for i, each in map(json.loads, lines)}


def kill_after_seconds(
    stage: Stage, base: Path, expected: dict[str, str], seconds: float, number: int
) -> Killed:
    """Kill so long after the beginning, then give the command again. If it has ended by then, the
    time is halved."""
    began = time.monotonic()
    while True:
        folder = place(base, f"random-{number}")
        child = children.start(lambda: stage.run(False), folder)
        child.release()
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
        if child.wait() == -signal.SIGKILL:
            return _again(stage, folder, expected, f"{seconds:.2f} s", began)
        seconds /= 2


def _again(stage: Stage, folder: Path, expected: dict[str, str], at: str, began: float) -> Killed:
    """Goes on in the folder; it is kept if anything is wrong."""
    husks: list[str] = []
    unkept = stage.unkept(folder)
    try:
        status = children.run(lambda: stage.run(True), folder, "said_again")
        if status:
            last = (folder / "said_again").read_text().strip().splitlines()[-1:]
            wrong = [f"status {status}: {' '.join(last)}"]
        else:
            found = outcome(stage, folder)
            husks = [name for name in found.keys() - expected.keys() if found[name] == EMPTY]
            for name in husks:
                del found[name]
            wrong = differences(expected, found)
    except (RuntimeError, TimeoutError) as error:
        wrong = [str(error)]
    wrong += unkept
    if not wrong:
        shutil.rmtree(folder)
    return Killed(at, wrong, husks, time.monotonic() - began)


def counted(events: Sequence[Event]) -> dict[str, int]:
    """How many there are of each kind."""
    found = Counter(event.kind for event in events)
    return {kind: found[kind] for kind in tracing.KINDS}

"""What launchers on several machines tell each other: a folder on the file system that they share.

<run>/<process>.json   one process: host, pid, its last beat, whether it runs, how it ended

Several runs may have the folder in common, as an array's have their --workdir. Each launcher keeps
the record of its own process and writes it anew every RENEWED seconds. Times are those of the file
system, so machines need not agree on what time it is.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path

from experiments.lost import REFUSED, Process

RENEWED = 5.0  # seconds between two records of a process that runs
SILENT = 15.0  # ... without one, after which it is not heard of: JAX ends the others after 20
EARLIER = 60.0  # ... by which a record is older than our first if it is of an earlier run
# What tells one start of a job from another; none of them where processes are started by hand.
RUN = (
    "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "PMIX_NAMESPACE",
    "JAX_COORDINATOR_ADDRESS",
)  # fmt: skip


class Registry:
    """One run's records, as one of its launchers sees them.

    folder: in which runs have theirs. run: what tells this one from others. renewed: seconds
    between two records of a process that runs. silent: after how many one without a new record is
    not heard of.

    Raises:
      OSError: the folder cannot be made.
    """

    def __init__(
        self, folder: Path, run: str, renewed: float = RENEWED, silent: float = SILENT
    ) -> None:
        self.folder = folder / hashlib.sha256(run.encode()).hexdigest()[:16]
        self.renewed = renewed
        self.silent = silent
        self.patience = 2 * renewed  # for others to tell of an end
        self.ended: set[int] = set()  # of ours, whose last record is written
        self.written: float | None = None  # by our clock, our last records
        self.began = self.now = 0.0  # by the file system's, our first and our last record
        self.failed = False
        self.read = -float("inf")  # when, by our clock
        self.found: list[Process] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # another run, that has ended, took the folder away meanwhile
            self.folder.mkdir(parents=True, exist_ok=True)

    def exchange(self, ours: Collection[Process], look: bool, missing: bool) -> list[Process]:
        """Write our records where they are due, and tell of ours or, to `look`, of all processes.

        It is for who has reason to: a thousand launchers that read each other's are a burden.

        missing: those that have not been heard of are lost.
        """
        now = time.monotonic()
        due = self.written is None or now - self.written > self.renewed
        for process in ours:
            news = process.status is not None or bool(process.note)
            if (due or news) and process.number not in self.ended:
                self._write(process)
                if process.status is not None:
                    self.ended.add(process.number)
        if not look:
            return list(ours)
        if now - self.read > self.renewed / 5:
            self.read = now
            self.found = self._read_all(missing)
        return self.found or list(ours)

    def _write(self, process: Process) -> None:
        """A file system that fails is told of once, and training goes on."""
        path = self.folder / f"{process.number}.json"
        aside = self.folder / f".{process.number}.json"
        self.written = time.monotonic()
        try:
            aside.write_text(json.dumps(dataclasses.asdict(process), indent=1))
            aside.replace(path)
            self.now = path.stat().st_mtime
        except OSError as error:
            if not self.failed:
                print(
                    f"{path} cannot be written ({error.strerror}): a process that is lost may not "
                    "be named",
                    file=sys.stderr,
                )
            self.failed = True
        self.began = self.began or self.now

    def _read_all(self, missing: bool) -> list[Process]:
        found = []
        for path in self.folder.glob("[0-9]*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if (process := self._read(path, missing)) is not None:
                    found.append(process)
        return sorted(found, key=lambda process: process.number)

    def _read(self, path: Path, missing: bool) -> Process | None:
        with path.open() as opened:  # a shared file system looks for what is new when one opens
            written = os.fstat(opened.fileno()).st_mtime
            record = json.load(opened)
        if written < self.began - EARLIER:
            return None
        process = Process(**record | {"sent": tuple(record["sent"])})
        if process.status is not None:
            return dataclasses.replace(process, ended=written)
        now = self.now + time.monotonic() - (self.written or 0)
        age = max(0.0, now - written)
        process = dataclasses.replace(process, idle=process.idle + age, ended=written)
        if missing and age > self.silent:
            since = time.strftime("%H:%M:%S", time.localtime(written))
            note = f"its machine has not been heard of since {since}"
            process = dataclasses.replace(process, note=note)
        return process

    def leave(self) -> None:
        """Remove the records, if all have ended and none of them was lost, and what held them if
        no other run has any there."""
        found = self._read_all(missing=False)
        ended = [process for process in found if process.status is not None]
        well = not any(process.lost for process in ended)
        refused = all(process.status == REFUSED for process in ended)
        if ended and len(ended) == ended[0].processes and (well or refused):
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()


def this_run() -> str:
    """What the launchers of one run have in common, and those of another have not."""
    return " ".join(f"{name}={os.environ[name]}" for name in RUN if name in os.environ)

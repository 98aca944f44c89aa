"""Commands in forked children: what they import is loaded once, and a run takes what it computes.

The parent must start no thread and touch no device of JAX: a child would have them half.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 600.0  # seconds, after which a child is taken to hang


@dataclasses.dataclass(frozen=True)
class Child:
    """A child that waits to be released.

    said: the file of its stdout and stderr.
    """

    pid: int
    said: Path
    _gate: int

    def release(self) -> None:
        """Let it run."""
        os.write(self._gate, b"x")
        os.close(self._gate)

    def ended(self) -> int | None:
        """Its exit status; of one that was killed the signal's number, negative. None while it
        works."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, limit: float = LIMIT) -> int:
        """What `ended` says, at its end.

        Raises:
          TimeoutError: it takes more than `limit` seconds; it is killed then.
        """
        began = time.monotonic()
        while time.monotonic() < began + limit:
            if (status := self.ended()) is not None:
                return status
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"a run hangs; what it said is in {self.said}")


def start(work: Callable[[], Any], folder: Path, name: str = "said") -> Child:
    """A child that will do the work in a folder, whose status is that of a program doing it."""
    said = folder / name
    wait_here, gate = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(wait_here)
        return Child(pid, said, gate)
    os.close(gate)
    status = 1
    try:
        os.read(wait_here, 1)
        os.close(wait_here)
        os.chdir(folder)
        output = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(output)
        status = _status(work)
    finally:
        os._exit(status)


def _status(work: Callable[[], Any]) -> int:
    status: Any = 0
    try:
        work()
    except SystemExit as ended:
        status = ended.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else 1


def run(work: Callable[[], Any], folder: Path, name: str = "said") -> int:
    """`start`, from beginning to end."""
    child = start(work, folder, name)
    child.release()
    return child.wait()


def ask(work: Callable[[], Any], folder: Path) -> Any:
    """What the work returns, in JSON's types, computed in a child.

    Raises:
      RuntimeError: it failed; with what it said.
    """
    answer = folder / "answer"

    def tell() -> None:
        answer.write_text(json.dumps(work()))

    if status := run(tell, folder, "asked"):
        raise RuntimeError(f"status {status}: {(folder / 'asked').read_text()}")
    return json.loads(answer.read_text())

"""Stands for a training process: does what its arguments say, one after the other.

beat:PHASE  out:TEXT  err:TEXT  sleep:SECONDS  exit:STATUS  signal:NUMBER (to itself)
deaf (to SIGTERM)  obey:TEXT (at SIGTERM: says so, takes a while, exits 143)
hold:FILE (locks it until this process is gone)  await:FILE (until one has held it, and is gone)
"""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

from sae_jax import pulse

kept = []


def obey(text: str) -> None:
    """Ends as a program does that checkpoints first."""

    def end(*_: object) -> None:
        print(text, file=sys.stderr, flush=True)
        time.sleep(0.5)
        os._exit(143)

    signal.signal(signal.SIGTERM, end)


def hold(path: str) -> None:
    """Locks a file, and then writes to it."""
    kept.append(Path(path).open("w"))  # noqa: SIM115
    fcntl.flock(kept[-1], fcntl.LOCK_EX)
    print("held", file=kept[-1], flush=True)


def wait(path: str) -> None:
    """Until it has been written to, and can be locked."""
    while not (Path(path).exists() and Path(path).stat().st_size):
        time.sleep(0.02)
    kept.append(Path(path).open("a"))  # noqa: SIM115
    fcntl.flock(kept[-1], fcntl.LOCK_EX)


DO = {
    "beat": pulse.beat,
    "out": lambda text: sys.stdout.buffer.write(text.encode().decode("unicode_escape").encode()),
    "err": lambda text: sys.stderr.buffer.write(text.encode().decode("unicode_escape").encode()),
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "exit": lambda status: sys.exit(int(status)),
    "signal": lambda number: os.kill(os.getpid(), int(number)),
    "deaf": lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "obey": obey,
    "hold": hold,
    "await": wait,
}

if __name__ == "__main__":
    for word in sys.argv[1:]:
        verb, _, value = word.partition(":")
        DO[verb](value)
        sys.stdout.flush()
        sys.stderr.flush()

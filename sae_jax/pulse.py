"""A sign of life: how far a process has come, for the one that started it to see.

`sae-jax launch` names a file in SAE_JAX_PULSE and watches it. The file is one record of fixed size,
there from the start, which `beat` writes over: so a full disk cannot stop it, and nothing must be
cleaned up.
"""

import contextlib
import dataclasses
import json
import os
import time

VARIABLE = "SAE_JAX_PULSE"
WAITING = "waiting"  # begins the phase of who waits for other processes and is not to blame
SIZE = 512  # bytes of the record

_count = 0


@dataclasses.dataclass(frozen=True)
class Pulse:
    """The last beat: which it was, from 1 (0: none yet), at what, and when by two clocks.

    monotonic: seconds of `time.monotonic`, which all processes of a machine share.
    """

    count: int
    phase: str
    time: float
    monotonic: float


def beat(phase: str, alone: bool = False) -> None:
    """Say that this process has come further, to `phase`: "chunk 12", "saved", or "waiting".

    Where every process of a run beats at the same places, the counts tell who is behind; what one
    does alone is not counted. Costs some microseconds, and nothing where nobody watches; never
    raises.
    """
    global _count
    path = os.environ.get(VARIABLE)
    if not path:
        return
    _count += not alone
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(handle, record(_count, phase), 0)
        finally:
            os.close(handle)


def record(count: int, phase: str) -> bytes:
    """What is written: JSON, filled up with spaces to SIZE."""
    phase = str(phase)[:64].encode("ascii", "replace").decode()  # as JSON at most 384 bytes
    now = Pulse(count, phase, time.time(), time.monotonic())
    return json.dumps(vars(now)).encode().ljust(SIZE)


def read(handle: int) -> Pulse | None:
    """The last beat in an open file; None in the moment in which it is being written."""
    try:
        return Pulse(**json.loads(os.pread(handle, SIZE, 0)))
    except (OSError, ValueError, TypeError):
        return None

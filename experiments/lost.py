"""Which of several processes was lost, and which is stuck: from what is known of each.

When one dies, the others' next exchange fails, or JAX aborts them after its heartbeat: of those
that ended, the first to do so is the one to name. When one is stuck, all others come to wait for
it: of those that stand still, one that does not wait, or is behind, is the one to name.
"""

import dataclasses
import signal
from collections.abc import Collection

from sae_jax import pulse

TOGETHER = 1.0  # seconds within which the order of two ends says little
# Seconds without a sign of life that explain JAX's abort of another, which comes after 10 (of the
# first process, whose answer to a heartbeat it awaits so long) to 20 (the heartbeat's own).
UNANSWERED = 9.0
REFUSED = 2  # exit status of a program whose input is refused
AGAIN = "the same command goes on from the last checkpoint"
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # ... that was asked to end, and did


@dataclasses.dataclass(frozen=True)
class Process:
    """What is known of one.

    number: from 0, of `processes`. phase, count: of its last beat (`sae_jax.pulse`), `idle` seconds
    ago. status: None while it runs, then its exit status, or minus the signal that ended it.
    ended: seconds, when it did, by any clock that all share. sent: signals that it was given by who
    started it. stopped: whether it is, by SIGSTOP say. note: why this is no good end, where that is
    known otherwise than by the status.
    """

    number: int
    processes: int
    host: str
    pid: int
    phase: str = "starting"
    count: int = 0
    idle: float = 0.0
    status: int | None = None
    ended: float = 0.0
    sent: tuple[int, ...] = ()
    stopped: bool = False
    note: str = ""

    @property
    def lost(self) -> bool:
        """Whether it ended otherwise than by finishing or by doing as it was asked."""
        if self.note:
            return True
        as_asked = self.status in (0, *STOPPED, *(-each for each in self.sent))
        return self.status is not None and not as_asked

    @property
    def waits(self) -> bool:
        """Whether it waits for others, and would go on with them, as far as is known."""
        return self.phase.startswith(pulse.WAITING) and not self.stopped

    @property
    def from_outside(self) -> bool:
        """Whether its end is no exception and no abort: these may follow from another's end."""
        killed = self.status is not None and self.status < 0
        return bool(self.note) or (killed and self.status != -signal.SIGABRT)

    def __str__(self) -> str:
        return f"process {self.number} of {self.processes} ({self.host}, pid {self.pid})"


def first_lost(processes: Collection[Process]) -> Process | None:
    """The one whose end is not the consequence of another's; None if none is lost.

    JAX aborts those who need one that is alive and does not answer (stopped, its machine hung or
    cut off): then it is this one, and gets a note of it.
    """
    lost = [process for process in processes if process.lost]
    if not lost:
        return None
    earliest = min(process.ended for process in lost)
    together = [process for process in lost if process.ended <= earliest + TOGETHER]
    found = min(together, key=lambda p: (not p.from_outside, p.ended, p.number))
    if found.status == -signal.SIGABRT and not found.note:
        silent = [
            process for process in processes
            if process.status is None
            and (process.stopped or found.waits)
            and not process.waits
            and process.idle > UNANSWERED
        ]  # fmt: skip
        if silent:
            longest = max(silent, key=lambda process: (process.stopped, process.idle))
            how = "stopped (SIGSTOP?), " * longest.stopped
            return dataclasses.replace(longest, note=f"{how}it did not answer the others")
    return found


def stuck(processes: Collection[Process], seconds: float) -> list[Process]:
    """Those of which one keeps all from going on, longest idle first; none while work goes on.

    A process that waits is not to blame as long as another moves, however long that takes, or may
    move unseen.
    """
    running = [process for process in processes if process.status is None]
    working = [process for process in running if not process.waits]
    if not working and any(len(processes) < process.processes for process in running):
        return []
    late = [process.idle > seconds for process in working or running]
    if not any(late) or not (working or all(late)):
        return []
    # Of those that came to a stop at about the same time, one that has not come as far.
    still = [process for process in working or running if process.idle > 0.9 * seconds]
    behind = min(process.count for process in still)
    named = [process for process in still if process.count == behind]
    return sorted(named, key=lambda process: -process.idle)


def told(process: Process) -> str:
    """One line: which was lost, how, and what becomes of the run."""
    others = "; the others are ended" if process.processes > 1 else ""
    if process.status == REFUSED and not process.note:
        return f"{process} refused its input, see above{others}"
    how = process.note or _how(process.status or 0)
    return f"{process} was lost: {how}, {_last_seen(process)}{others}; {AGAIN}"


def told_stuck(named: Collection[Process], seconds: float) -> str:
    """One line: which has stopped coming further, or which may have."""
    each = "; ".join(f"{process}, {_last_seen(process)}" for process in named)
    which = "" if len(named) == 1 else "one of these, and it cannot be told which: "
    return f"no progress for {span(seconds)} of {which}{each}; all are ended; {AGAIN}"


def _last_seen(process: Process) -> str:
    return f"last seen at '{process.phase}' {span(process.idle)} ago"


def span(seconds: float) -> str:
    """Of time, for people."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}" + " (out of memory?)" * (status == -signal.SIGKILL)

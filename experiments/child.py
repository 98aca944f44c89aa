"""A process that was started by another, which sees how far it is and how it ends.

It gives signs of life in a file that it is told of (`sae_jax.pulse`); its stderr and stdout come
through pipes. It is in a process group of its own, so that Ctrl-C reaches only who started it. If
that one dies, the kernel kills it (Linux: PR_SET_PDEATHSIG, which holds whatever its threads do).
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from experiments.lost import Process
from experiments.prefixed import Lines, Screen, Tail
from sae_jax import pulse

TICK = 0.2  # seconds between two looks
PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Command:
    """What to start: its words, what to add to the environment, and the cores that are its own
    (None: those of this process)."""

    words: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: Collection[int] | None = None


class Child:
    """One that runs, or has ended; `about` it, what was seen at the last look.

    `streams`: pairs of a pipe of its and what is to `hear` it: `lines`, shown as they come, of its
    stderr; `tail`, shown at need, of its stdout. That of process 0 is our own.

    Raises:
      OSError: it cannot be started.
    """

    def __init__(self, command: Command, number: int, processes: int, screen: Screen) -> None:
        self.about = Process(number, processes, socket.gethostname(), 0)
        prefix = f"[{number}] " if processes > 1 else ""
        self.lines = Lines(screen, prefix, bars=number == 0)
        self.tail = Tail(screen, prefix)
        # Full from the start, so that no full disk stops a beat; without a name, so that nothing is
        # left. The process finds it under the same number.
        self.pulse = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self.pulse.write(pulse.record(0, self.about.phase))
        handle = self.pulse.fileno()
        self.beaten = self.since = time.monotonic()
        self.silent: float | None = None  # when its stderr ended
        self.popen = subprocess.Popen(
            list(command.words),
            env={**os.environ, **command.environment, pulse.VARIABLE: f"/dev/fd/{handle}"},
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(handle,),
            process_group=0,
            preexec_fn=_before(os.getpid(), command.cores),  # safe: we have no other thread
        )
        self.about = dataclasses.replace(self.about, pid=self.popen.pid)
        pairs = (self.popen.stderr, self.lines), (self.popen.stdout, self.tail)
        self.streams = [(stream, shown) for stream, shown in pairs if stream is not None]

    def hear(self, shown: Lines | Tail, data: bytes) -> None:
        """What one of its streams has brought; nothing when it has ended."""
        shown.feed(data)
        if not data and shown is self.lines:
            self.lines.close()
            self.silent = time.monotonic()

    def look(self) -> None:
        """How far it is, and whether it has ended."""
        if self.about.status is not None:
            return
        if (found := pulse.read(self.pulse.fileno())) is not None:
            self.beaten = found.monotonic
            self.about = dataclasses.replace(self.about, phase=found.phase, count=found.count)
        now = time.monotonic()
        status = self.popen.poll()
        # Of two that end within a tick, the one whose stderr ended first.
        ended = 0.0 if status is None else max(self.silent or now, now - 2 * TICK)
        self.about = dataclasses.replace(
            self.about, idle=now - max(self.beaten, self.since), status=status, ended=ended,
            stopped=status is None and self._is_stopped(),
        )  # fmt: skip

    def forgive(self) -> None:
        """Count its silence from now on: what was before it is not to blame for."""
        self.since = time.monotonic()

    def _is_stopped(self) -> bool:
        found = os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        return found is not None

    def send(self, number: int) -> None:
        """A signal, if it runs; SIGKILL to all that it has started, too."""
        if self.about.status is not None or self.popen.poll() is not None:
            return
        self.about = dataclasses.replace(self.about, sent=(*self.about.sent, int(number)))
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.popen.pid, number)
            else:
                os.kill(self.popen.pid, number)

    def close(self) -> None:
        """Wait for its end, and let go of what we had of it."""
        self.popen.wait()
        self.pulse.close()


def _before(parent: int, cores: Collection[int] | None) -> Callable[[], None]:
    """What the child does before it becomes the command."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def prepare() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it has died meanwhile
                os._exit(1)
        if cores is not None:
            os.sched_setaffinity(0, cores)

    return prepare

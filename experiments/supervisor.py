"""Starts processes that belong together, and says which of them was lost, or is stuck.

One thread and no JAX: what it starts may hang in any way and it does not. What it does:

- One that ends otherwise than well is named, in one line that is also the last. The others get
  `grace_seconds` to end by themselves (JAX aborts them after its heartbeat), then SIGTERM, and as
  long after it SIGKILL.
- One without a sign of life (`sae_jax.pulse`) for `stall_seconds` is named and killed, and so the
  run ends with it.
- SIGTERM, SIGINT or SIGHUP is passed on to all as one SIGTERM, at which they agree on a checkpoint
  and end; a further SIGINT kills them.
- If it dies itself, however, the kernel kills what it has started (Linux: PR_SET_PDEATHSIG, which
  holds whatever their threads do).
"""

import contextlib
import ctypes
import dataclasses
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from experiments import lost
from experiments.lost import Process
from experiments.prefixed import Lines, Screen, Tail
from experiments.registry import Registry
from sae_jax import pulse

TICK = 0.2  # seconds between two looks at everything
LOOK = 10.0  # seconds without a sign of life after which it is asked how the others are
TAKEN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Command:
    """What to start: its words, what to add to the environment, and the cores that are its own
    (None: those of this process)."""

    words: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cores: Collection[int] | None = None


def launch(
    commands: Sequence[Command],
    *,
    number: int = 0,
    processes: int | None = None,
    grace_seconds: float = 30,
    stall_seconds: float = 1800,
    registry: Registry | None = None,
) -> int:
    """Run commands side by side to their end.

    The stdout of process 0 is this process's own, that of the others is shown if they are lost; all
    write to stderr, with their number before each line where there are several.

    Args:
      commands: one a process, of this machine.
      number: of the first of them, among all processes of the run.
      processes: of the run, on all machines; default: those of this one.
      grace_seconds: for the others to end by themselves.
      stall_seconds: without a sign of life; 0: without limit.
      registry: what is known of processes on other machines.

    Returns:
      The exit status: 0, or that of the process that was lost (128 + its signal), or 143 where all
      have ended because they were asked to.

    Raises:
      OSError: a command cannot be started; nothing runs then.
    """
    return _Launch(commands, number, processes, grace_seconds, stall_seconds, registry).run()


class _Child:
    """A process, and what it writes."""

    def __init__(self, command: Command, number: int, processes: int, screen: Screen) -> None:
        self.about = Process(number, processes, socket.gethostname(), 0)
        prefix = f"[{number}] " if processes > 1 else ""
        self.lines = Lines(screen, prefix, bars=number == 0)
        self.tail = Tail(screen, prefix)
        # Full from the start, so that no full disk stops a beat; without a name, so that nothing
        # is left. The child finds it under the same number.
        self.pulse = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self.pulse.write(pulse.record(0, self.about.phase))
        handle = self.pulse.fileno()
        self.beaten = time.monotonic()
        self.silent: float | None = None  # when its stderr ended
        self.popen = subprocess.Popen(
            list(command.words),
            env={**os.environ, **command.environment, pulse.VARIABLE: f"/dev/fd/{handle}"},
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(handle,),
            process_group=0,  # Ctrl-C is of the launcher alone
            preexec_fn=_before(os.getpid(), command.cores),  # safe: we have no other thread
        )
        self.about = dataclasses.replace(self.about, pid=self.popen.pid)

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
            self.about, idle=max(0.0, now - self.beaten), status=status, ended=ended
        )

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


def _before(parent: int, cores: Collection[int] | None) -> Any:
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


class _Launch:
    """The loop, and where it stands."""

    def __init__(
        self,
        commands: Sequence[Command],
        number: int,
        processes: int | None,
        grace_seconds: float,
        stall_seconds: float,
        registry: Registry | None,
    ) -> None:
        self.commands = commands
        self.number = number
        self.processes = processes or len(commands)
        self.grace = grace_seconds
        self.stall = stall_seconds
        self.registry = registry
        self.patience = 2 * TICK if registry is None else registry.patience
        self.screen = Screen()
        self.selector = selectors.DefaultSelector()
        self.children: list[_Child] = []
        self.signals: list[int] = []  # that have come, and were not obeyed yet
        self.asked = False  # to end
        self.noticed: float | None = None  # when a loss was first seen
        self.lost: Process | None = None  # the one that has been named
        self.said = b""  # the line that names it

    def run(self) -> int:
        """To the end."""
        with self._taking_signals(), self._leaving_none():
            for place, command in enumerate(self.commands):
                child = _Child(command, self.number + place, self.processes, self.screen)
                self.children.append(child)
                for stream, shown in (
                    (child.popen.stderr, child.lines), (child.popen.stdout, child.tail)
                ):  # fmt: skip
                    if stream is not None:
                        self.selector.register(stream, selectors.EVENT_READ, (child, shown))
            while self._running() or (self.lost is None and self._any_lost()):
                self._step()
            deadline = time.monotonic() + 1  # a process that a child has left may hold its pipes
            while self.selector.get_map() and time.monotonic() < deadline:
                self._read()
        for child in self.children:
            if self.lost is not None and self.lost.number == child.about.number:
                child.tail.show()
        if self.said and self.screen.last != self.said:  # JAX's aborts write pages after it
            self.screen.write(self.said)
        if self.registry is not None:
            self.registry.leave()
        return self._status()

    def _running(self) -> bool:
        return any(child.about.status is None for child in self.children)

    def _any_lost(self) -> bool:
        return any(child.about.lost for child in self.children)

    def _step(self) -> None:
        self._read()
        for child in self.children:
            child.look()
        self._obey()
        known = [child.about for child in self.children]
        if self.registry is not None:
            idle = max(process.idle for process in known)
            look = self._any_lost() or idle > min(LOOK, self.stall / 2 or LOOK)
            known = self.registry.exchange(known, look, missing=self._any_lost())
        if self.lost is None:
            self._name_lost(known)
        if self.lost is None and self.stall:
            self._name_stuck(known)
        self._end_others()

    def _read(self) -> None:
        for key, _ in self.selector.select(TICK):
            child, shown = key.data
            data = os.read(key.fd, 65536)
            shown.feed(data)
            if not data:
                self.selector.unregister(key.fileobj)
                if shown is child.lines:
                    child.lines.close()
                    child.silent = time.monotonic()

    def _obey(self) -> None:
        while self.signals:
            number = self.signals.pop(0)
            if self.asked and number == signal.SIGINT:
                self._send_all(signal.SIGKILL)
            elif not self.asked:
                self.asked = True
                self._send_all(signal.SIGTERM)

    def _send_all(self, number: int) -> None:
        for child in self.children:
            child.send(number)

    def _name_lost(self, known: Collection[Process]) -> None:
        found = lost.first_lost(known)
        if found is None:
            return
        if self.noticed is None:
            self.noticed = time.monotonic()
        # The end of ours may follow from another's, of which we have still to hear.
        if self._is_ours(found) and not found.from_outside:
            if time.monotonic() < self.noticed + self.patience:
                return
            if absent := set(range(self.processes)) - {process.number for process in known}:
                which = ", ".join(map(str, sorted(absent)))
                self._tell(f"nothing is known of process {which}: not started, or not heard of")
        self.lost = found
        self._tell(lost.told(found))
        for child in self.children:
            if found.status is None and child.about.number == found.number:
                self._kill(child, found.note)

    def _name_stuck(self, known: Collection[Process]) -> None:
        named = lost.stuck(known, self.stall)
        if not named:
            return
        note = f"no progress for {lost.span(self.stall)}"
        ours = [child for child in self.children if child.about.number in {p.number for p in named}]
        if ours:  # else their own launcher does the same
            self.noticed, self.lost = time.monotonic(), named[0]
            self._tell(lost.told_stuck(named, self.stall))
        for child in ours:
            self._kill(child, note)

    def _kill(self, child: _Child, note: str) -> None:
        child.send(signal.SIGKILL)  # who is stuck or stopped obeys no other
        child.about = dataclasses.replace(child.about, note=note)

    def _is_ours(self, process: Process) -> bool:
        return process.number in {child.about.number for child in self.children}

    def _end_others(self) -> None:
        if self.lost is None or self.noticed is None:
            return
        since = time.monotonic() - self.noticed
        for child in self.children:
            for number, after in ((signal.SIGTERM, self.grace), (signal.SIGKILL, 2 * self.grace)):
                if since > after and number not in child.about.sent:
                    child.send(number)

    def _tell(self, line: str) -> None:
        self.said = f"{line}\n".encode()
        self.screen.write(self.said)

    def _status(self) -> int:
        ended = [child.about for child in self.children]
        if self.lost is not None:
            now = [process for process in ended if process.number == self.lost.number]
            ended = [*now, self.lost, *ended]
        statuses = [process.status for process in ended if process.status]
        if not statuses:
            return 0 if self.lost is None else 1
        return statuses[0] if statuses[0] > 0 else 128 - statuses[0]

    @contextlib.contextmanager
    def _taking_signals(self) -> Iterator[None]:
        """Notes them; those that are ignored (nohup) stay so."""
        before = {number: signal.getsignal(number) for number in TAKEN}
        taken = [number for number in TAKEN if before[number] != signal.SIG_IGN]
        for number in taken:
            signal.signal(number, lambda found, _: self.signals.append(found))
        try:
            yield
        finally:
            for number in taken:
                signal.signal(number, before[number])

    @contextlib.contextmanager
    def _leaving_none(self) -> Iterator[None]:
        """Whatever happens here, nothing that was started goes on."""
        try:
            yield
        finally:
            self._send_all(signal.SIGKILL)
            for child in self.children:
                child.popen.wait()
                child.pulse.close()

"""Starts processes that belong together, and says which of them was lost, or is stuck.

One thread and no JAX: what it starts may hang in any way and it does not. What it does:

- One that ends otherwise than well is named, in one line that is also the last. The others get
  `grace_seconds` to end by themselves (JAX aborts them after its heartbeat), then SIGTERM, and as
  long after it SIGKILL.
- One without a sign of life (`sae_jax.pulse`) for `stall_seconds` is named and killed, and so the
  run ends with it.
- SIGTERM, SIGINT or SIGHUP is passed on to all as one SIGTERM, at which they agree on a checkpoint
  and end; a further SIGINT kills them.
- If it dies itself, however that is, what it has started dies with it (see `child`).
"""

import contextlib
import dataclasses
import os
import selectors
import signal
import time
from collections.abc import Collection, Iterator, Sequence

from experiments import lost
from experiments.child import TICK, Child, Command
from experiments.lost import Process
from experiments.prefixed import Screen
from experiments.registry import Registry

LOOK = 10.0  # seconds without a sign of life after which it is asked how the others are
TAKEN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
        self.children: list[Child] = []
        self.stepped = time.monotonic()
        self.signals: list[int] = []  # that have come, and were not obeyed yet
        self.asked = False  # to end
        self.noticed: float | None = None  # when a loss was first seen
        self.lost: Process | None = None  # the one that has been named
        self.said = b""  # the line that names it

    def run(self) -> int:
        """To the end."""
        with self._taking_signals(), self._leaving_none():
            for place, command in enumerate(self.commands):
                child = Child(command, self.number + place, self.processes, self.screen)
                self.children.append(child)
                for stream, shown in child.streams:
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
        before, self.stepped = self.stepped, time.monotonic()
        for child in self.children:
            if 0 < self.stall / 2 < self.stepped - before:  # we were stopped, and all, perhaps
                child.forgive()
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
            child.hear(shown, data)
            if not data:
                self.selector.unregister(key.fileobj)

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

    def _kill(self, child: Child, note: str) -> None:
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
                child.close()

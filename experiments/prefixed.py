"""What several processes write to stderr, on one: each line whole, with the process's number."""

import contextlib
import os
import re
import sys

KEPT = 8192  # bytes of what is not shown


class Screen:
    """The stderr of this process. What it does not take (a full disk, a closed pipe) is dropped:
    training goes on without its log."""

    def __init__(self) -> None:
        self.inside: bytes | None = None  # the prefix of the line that the cursor is within
        self.last = b""  # what was written

    def write(self, data: bytes, prefix: bytes = b"") -> None:
        """Shows data; what begins a line gets the prefix. Another's unfinished line ends first."""
        if not data:
            return
        self.last = data
        text = re.sub(rb"(?<=[\r\n])(?=[^\r\n])", lambda _: prefix, data)
        if self.inside is not None and self.inside != prefix:
            text = b"\n" + prefix + text
        elif self.inside is None and data[:1] not in b"\r\n":
            text = prefix + text
        self.inside = None if data.endswith((b"\r", b"\n")) else prefix
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(sys.stderr.fileno(), text) :]


class Lines:
    """The stderr of one process, shown line by line.

    prefix: of each line. bars: what rewrites its line, as a progress bar does, is shown as it
    comes; else only as it was last written.
    """

    def __init__(self, screen: Screen, prefix: str, bars: bool) -> None:
        self.screen = screen
        self.prefix = prefix.encode()
        self.bars = bars
        self.rest = b""  # of a line, not shown yet

    def feed(self, data: bytes) -> None:
        """Shows what has become whole."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self._show(line)
        if b"\r" in self.rest and self.bars:
            self.screen.write(self.rest, self.prefix)
            self.rest = b""
        elif b"\r" in self.rest:
            self.rest = self.rest[self.rest.rfind(b"\r", 0, -1) + 1 :]

    def _show(self, line: bytes) -> None:
        last = line.rstrip(b"\r").rpartition(b"\r")[2]
        if self.bars:
            last = line
        elif line and not last.strip():  # a bar, wiped out
            return
        self.screen.write(last + b"\n", self.prefix)

    def close(self) -> None:
        """Shows what is left."""
        if self.rest:
            self.feed(b"\n")


class Tail:
    """The stdout of a process that is not the first: its end, to be shown if it fails."""

    def __init__(self, screen: Screen, prefix: str) -> None:
        self.screen = screen
        self.prefix = prefix.encode()
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Keeps it."""
        self.rest = (self.rest + data)[-KEPT:]

    def show(self) -> None:
        """Shows it, if there is any."""
        for line in self.rest.splitlines():
            self.screen.write(line + b"\n", self.prefix)
        self.rest = b""

"""System calls that change a folder, as strace tells them, one by one.

strace stops the whole process, by a SIGSTOP that it injects right after each of them. Then it can
be killed there, whatever threads it has (a count by `inject=...:when=N` is of each thread alone),
or what lies on the disk can be copied: just what a kill there would leave, since written pages are
the kernel's, and locks end with the process. The state after one is that before the next; so before
the first and after each is before and after each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.durability.children import Child

KINDS = {
    "write": ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range"),
    "create": ("openat", "open", "creat"),  # or cut to nothing
    "resize": ("ftruncate", "truncate", "fallocate"),
    "fsync": ("fsync", "fdatasync"),
    "rename": ("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    "remove": ("unlink", "unlinkat", "rmdir"),
    "mkdir": ("mkdir", "mkdirat"),
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}
SILENT = 2.0  # seconds
_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)")
_FILE = re.compile(r"\d+<([^>]*)>")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Event:
    """A call that was made: `path` (and `onto`, of renames) absolute."""

    call: str
    path: str
    onto: str | None = None

    def below(self, root: Path) -> bool:
        """Whether it is of a folder or what is in it."""
        paths = (self.path, self.onto or "")
        return any(path == str(root) or path.startswith(f"{root}/") for path in paths)

    @property
    def kind(self) -> str:
        """Of `KINDS`."""
        return KIND[self.call]

    def __str__(self) -> str:
        return f"{self.call} {self.path}" + (f" -> {self.onto}" if self.onto else "")


def available() -> bool:
    """Whether strace is there and may trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], check=False,
                          capture_output=True).returncode == 0  # fmt: skip


def parse(line: str, cwd: str) -> Event | None:
    """The event that a line tells; None for a call that failed, or that changes nothing."""
    if not (match := _LINE.match(line)) or match[2] not in KIND:
        return None
    call, arguments = match[2], match[3]
    if " = -1 " in arguments or "= ?" in arguments:
        return None
    if KIND[call] == "create" and not re.search(r"O_CREAT|O_TRUNC", arguments):
        return None
    if (first := _FILE.match(arguments)) and not call.endswith("at"):
        return Event(call, first[1])
    paths = [str(Path(folder or cwd, name)) for folder, name in _PATH.findall(arguments)]
    return Event(call, paths[0], paths[1] if len(paths) > 1 else None) if paths else None


def watch(child: Child, root: Path) -> list[Event]:
    """Release a child, and tell what it did below `root`, in order."""
    events = []
    with _traced(child, stop=False) as lines:
        for line in lines:
            event = parse(line, str(child.said.parent))
            if event and event.below(root):
                events.append(event)
    return events


def follow(child: Child, root: Path, at: Callable[[list[Event]], bool]) -> list[Event]:
    """`watch`, and stand still after each event.

    at: called while all threads stand still, with the events so far; if true the child is killed.
    """
    events: list[Event] = []
    told, called = 0, set()  # events that `at` knows, threads whose stop is to come
    with _traced(child, stop=True) as lines:
        for line in lines:
            thread = line.split(maxsplit=1)[0]
            if "--- stopped by SIGSTOP ---" in line:
                if thread not in called:
                    continue  # all others are stopped with it
                _wait_until_still(child.pid)
                if len(events) > told and at(events):
                    os.kill(child.pid, signal.SIGKILL)
                    return events
                told = len(events)
                called.clear()
                os.kill(child.pid, signal.SIGCONT)
            elif match := _LINE.match(line):
                called.add(match[1])
                event = parse(line, str(child.said.parent))
                if event and event.below(root):
                    events.append(event)
    return events


@contextlib.contextmanager
def _traced(child: Child, stop: bool) -> Iterator[Iterator[str]]:
    """What strace says of a child, from its release to its end, line by line."""
    calls = ",".join(KIND)
    command = ["strace", "-f", "-y", "-s", "0", "-p", str(child.pid), "-o", "/dev/fd/2",
               "-e", f"trace={calls}"]  # fmt: skip
    if stop:
        command += ["-e", f"inject={calls}:signal=SIGSTOP"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    os.set_blocking(tracer.stderr.fileno(), False)
    try:
        lines = _lines(tracer.stderr.fileno(), child.pid)
        for line in lines:
            if line.endswith(" attached"):
                break
        child.release()
        yield lines
    finally:
        try:
            tracer.wait(SILENT)
        except subprocess.TimeoutExpired:  # it can miss the end of threads killed while they stood
            tracer.kill()
            tracer.wait()
        tracer.stderr.close()


def _lines(pipe: int, pid: int) -> Iterator[str]:
    """Its lines; where it is silent since two stops fell together, the process is let go on."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], SILENT)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            continue
        more = os.read(pipe, 1 << 16)
        *lines, rest = (rest + more).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
        if not more:
            return


def _wait_until_still(pid: int) -> None:
    """A process that was stopped by one of its threads: until the others have stopped, too."""
    for _ in range(1000):
        try:
            states = [(task / "stat").read_text().rpartition(") ")[2][0]
                      for task in Path(f"/proc/{pid}/task").iterdir()]  # fmt: skip
        except OSError:  # a thread that ended
            continue
        if set(states) <= set("tTXZ"):
            return
        time.sleep(0.0005)

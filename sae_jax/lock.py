"""One process fills a folder at a time, and another is told which it is."""

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from sae_jax.errors import InputError

NAME = ".lock"  # in the folder, while it is filled: who does it
_held: set[Path] = set()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """No other process holds the folder, which is there; it ends with the process, however it ends.

    A process may hold a folder within itself again. Where the file system has no such locks, the
    file alone keeps others out. One that a killed process left is taken over on the same machine,
    until that is started again; elsewhere it has to be deleted by hand, since whether a process of
    another machine (or container) still runs cannot be told from here.

    Raises:
      InputError: another process holds it, which is named.
    """
    key = folder.resolve()
    if key in _held:
        yield
        return
    handle = _taken(folder)
    try:
        _held.add(key)
        _describe(handle)
        yield
    finally:
        _held.discard(key)
        with contextlib.suppress(OSError):  # before it is given up: what is there is always held
            if _is(handle, folder / NAME):
                (folder / NAME).unlink()
        os.close(handle)


def _taken(folder: Path) -> int:
    """A descriptor of the lock's file, which is ours.

    Raises:
      InputError: it is another's.
    """
    path = folder / NAME
    while True:
        handle, made = _opened(path)
        runs: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError:  # there are no locks here
            if made:
                return handle
            runs = _runs(handle)
            if runs is False and _removed(handle, path):
                os.close(handle)
                continue
        else:
            if _is(handle, path):
                return handle
            os.close(handle)  # of one who gave it up, and deleted it, meanwhile
            continue
        holder = _told(handle)
        os.close(handle)
        if runs:
            raise InputError(
                f"{folder} is being filled by another process{holder}; wait for it, or end it"
            )
        raise InputError(
            f"{path} says that {folder} is being filled by another process{holder}. This file "
            "system has no locks, so whether it still runs cannot be told from here: if it does "
            "not, delete that file"
        )


def _opened(path: Path) -> tuple[int, bool]:
    """A descriptor of the lock's file, and whether we have made it."""
    while True:
        with contextlib.suppress(FileExistsError):
            # To write: NFS gives no exclusive lock on what is only read.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), True
        try:
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW), False
        except FileNotFoundError:
            continue  # given up meanwhile
        except PermissionError:  # another user's
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW), False
        except OSError as error:
            raise InputError(f"{path} is no lock ({error.strerror}): delete it") from None


def _is(handle: int, path: Path) -> bool:
    """Whether an open file is the one that lies there."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _removed(handle: int, path: Path) -> bool:
    """Whether a dead process's file, open in `handle`, is out of the way.

    Several may find it dead at once. The one whose file beside it is the first deletes it, unless
    another has been quicker and what lies there is another's. If that one is killed in between, its
    file stays, and of what is left here a person decides.
    """
    beside = path.with_name(f"{path.name}.taken")
    try:
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
    except OSError:
        return False
    try:
        if _is(handle, path):
            path.unlink()
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _runs(handle: int) -> bool | None:
    """Whether the process that the file names runs; None where that cannot be told."""
    try:
        found = json.loads(os.pread(handle, 1 << 20, 0))
        pid, machine, began = found["pid"], found["machine"], found["began"]
        if machine is None or machine != _machine():
            return None
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    except (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        return None
    return _began(pid) in (began, None)


def _machine() -> str | None:
    """What processes share whose numbers are of one count: the machine, its container, since the
    last start. None where the system does not tell (Linux does)."""
    try:
        if Path("/proc/self").readlink().name != str(os.getpid()):  # it is of another container
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _began(pid: int) -> str | None:
    """When a process was started, in the kernel's count, and "ended" of one that its parent has not
    buried; None where the system does not tell."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
        return "ended" if fields[0] in ("Z", "X") else fields[19]
    except (OSError, ValueError, IndexError):
        return None


def _describe(handle: int) -> None:
    """Say in the file who we are. A disk too full for that is no reason to stop."""
    words = [Path(sys.argv[0] or "python").name, *sys.argv[1:]]
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "began": _began(os.getpid()),
        "command": shlex.join(words),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(content).encode(), 0)


def _told(handle: int) -> str:
    """Who the file says it is, as far as it can be read."""
    try:
        found = json.loads(os.pread(handle, 1 << 20, 0))
        text = "{pid} on {host}, since {since}: {command}".format(**found)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return ""
    text = "".join(c if c.isprintable() else " " for c in text)
    return f" ({text if len(text) < 400 else text[:400] + '...'})"

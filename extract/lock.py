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

from extract.errors import InputError

NAME = ".lock"  # in the folder, while it is filled: host, pid, command, since
_held: set[Path] = set()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """No other process holds the folder, which is there; it ends with the process, however it ends.

    A process may hold a folder within itself again. Where the file system has no such locks, the
    file alone keeps others out, and one that a killed process left has to be deleted by hand:
    whether a process of another machine (or container) still runs cannot be told from here.

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
            if os.path.samestat(os.fstat(handle), (folder / NAME).stat()):
                (folder / NAME).unlink()
        os.close(handle)


def _taken(folder: Path) -> int:
    """A descriptor of the lock's file, which is ours.

    Raises:
      InputError: it is another's.
    """
    path = folder / NAME
    while True:
        try:  # to write: NFS gives no exclusive lock on what is only read
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
            made = True
        except FileExistsError:
            made = False
            try:
                handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue  # given up meanwhile
            except PermissionError:  # another user's
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            except OSError as error:
                raise InputError(f"{path} is no lock ({error.strerror}): delete it") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _told(handle)
            os.close(handle)
            raise InputError(
                f"{folder} is being filled by another process{holder}; wait for it, or end it"
            ) from None
        except OSError:  # there are no locks here
            if made:
                return handle
            holder = _told(handle)
            os.close(handle)
            raise InputError(
                f"{path} says that {folder} is being filled by another process{holder}. This file "
                "system has no locks, so whether it still runs cannot be told from here: if it does"
                " not, delete that file"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # of one who gave it up, and deleted it, meanwhile


def _describe(handle: int) -> None:
    """Say in the file who we are. A disk too full for that is no reason to stop."""
    words = [Path(sys.argv[0] or "python").name, *sys.argv[1:]]
    content = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
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

"""What a disk refused, as one message, whatever the writer made of it.

Of a full disk HDF5 makes a RuntimeError, safetensors an error of its own, SQLite another, NumPy an
OSError without a number: what they agree in is the number of the system's error, or its text.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO)
_ADVICE = {FULL: "Make room", CLOSED: "Allow writing there", GONE: "See that this disk is there"}
_NUMBER = re.compile(r"\b(?:[Ee]rrno:? ?=? ?|Os \{ code: |os error )(\d+)\b")
_TEXTS = {os.strerror(number): number for number in (*FULL, errno.EROFS, errno.EIO, errno.ESTALE)}
_OF_NUMPY = re.compile(r"\d+ requested and \d+ written")
_OF_SQLITE = {13: errno.ENOSPC, 10: errno.EIO, 8: errno.EROFS, 14: errno.EIO}  # primary codes


class DiskError(OSError):
    """A disk took no more; str() is a message that a program can print as it is.

    Attributes:
      errno: of the system, ENOSPC say. strerror: its text. filename: what could not be written.
    """

    def __init__(
        self,
        number: int,
        path: str | os.PathLike[str],
        *,
        written: int | None = None,
        wanted: int | None = None,
    ) -> None:
        super().__init__(number, os.strerror(number), os.fspath(path))
        self._told = told(number, Path(path), written=written, wanted=wanted)

    def __str__(self) -> str:
        return self._told


@contextlib.contextmanager
def named(path: Path, wanted: int | None = None) -> Iterator[None]:
    """What a disk refuses of the body is told as of this path, to which so many bytes are written.

    Raises:
      DiskError: see above.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if (number := refused(error)) is None:
            raise
        raise DiskError(number, path, wanted=wanted) from error


def told(
    number: int,
    path: Path,
    *,
    written: int | None = None,
    wanted: int | None = None,
    what: str = "cannot be written",
) -> str:
    """One line: the path, the reason, the bytes wanted as far as they are known, what to do.

    written: how many bytes of it had been written when no more were taken. wanted: how many there
    are to write.
    """
    parts = []
    if written is not None:
        parts.append(f"{written:,} bytes of it were written, more are wanted")
    if wanted is not None:
        parts.append(f"{wanted:,} bytes are wanted")
    parts += [left] if (left := room(path)) else []
    advice = next((say for numbers, say in _ADVICE.items() if number in numbers), "See to that")
    known = f"; {'; '.join(parts)}" if parts else ""
    return (
        f"{path} {what}: {os.strerror(number)}{known}. {advice} and give the same command again "
        "(with --resume, where there is one)"
    )


def room(path: Path) -> str:
    """What is left on the disk of a path, to be told; nothing where the disk is gone."""
    try:
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        left = os.statvfs(there)
    except OSError:
        return ""
    if left.f_files and not left.f_favail:  # some file systems count none
        return "no inodes are left on its disk, which has too many files"
    return f"{left.f_bavail * left.f_frsize:,} bytes are free on its disk"


def message(error: BaseException, folder: Path) -> str | None:
    """What to tell of an error that nobody caught; None if it is not of a disk.

    folder: that was being filled, for errors that name no path.
    """
    number = refused(error)
    if number is None:
        return None
    path = folder
    for each in _causes(error):
        if isinstance(each, DiskError):
            return str(each)
        if isinstance(each, OSError) and isinstance(each.filename, str) and each.errno == number:
            path = Path(each.filename)
    return told(number, path, what="cannot be read or written")


def refused(error: BaseException) -> int | None:
    """The number of the system's error, if it or what it came from is of the disk; None if not."""
    return next(filter(None, map(_number, _causes(error))), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and so on."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def _number(error: BaseException) -> int | None:
    known = FULL + CLOSED + GONE
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in known else None
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None:
        return _OF_SQLITE.get(code & 0xFF)
    text = str(error)
    if isinstance(error, OSError) and _OF_NUMPY.search(text):
        return errno.ENOSPC
    numbers = (int(found[1]) for found in _NUMBER.finditer(text))
    named = (number for words, number in _TEXTS.items() if words in text)
    return next((number for number in (*numbers, *named) if number in known), None)

"""Writing so that a file or folder is there whole or not at all."""

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_jax import disk
from sae_jax.disk import DiskError
from sae_jax.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


ASIDE = ".writing-"  # begins the name of what is not finished
_REPLACED = f"{ASIDE}replaced"  # beside a new folder, the old one while it makes way
_WHOLE = ".whole"
_TRIAL = 64 << 10  # bytes
_pinned: dict[Path, tuple[int, int]] = {}


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write a file or a folder at; on success it takes the place of `path`.

    What is written is flushed to the disk before it is renamed, and the rename after it. If the
    body raises, nothing is left and what `path` held before is untouched.

    Raises:
      DiskError: the disk takes no more, has become read-only or is gone, whatever the body raised
        because of it.
    """
    path = Path(path)
    aside = None
    try:
        check_pinned(path)
        make_folder(path.parent)
        aside = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{path.name}.", dir=path.parent))
        fresh = aside / path.name
        yield fresh
        for each in [fresh, *fresh.rglob("*")]:
            sync(each)
        check_pinned(path)
        if path.is_dir():  # a folder cannot be replaced in one call: move the old one out first
            path.rename(aside / _REPLACED)
            fresh.rename(path)
        else:  # by the last of all calls, so that a kill after it leaves nothing
            whole = fresh.rename(_whole(aside))
            shutil.rmtree(aside)
            whole.rename(path)
        sync(path.parent)
    except (InputError, DiskError):
        raise
    except Exception as error:
        written = None if aside is None else _size(aside)
        number = disk.refused(error)
        if number is None and aside is not None:
            number = _refused_now(aside)  # PyTorch, say, tells nothing of the reason
        if number is None:
            raise
        raise DiskError(number, path, written=written) from error
    finally:
        if aside is not None:
            _clear(aside, path)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each on the disk when this returns."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file where a folder is wanted: move it away")
    missing = [each for each in (path, *path.absolute().parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


@contextlib.contextmanager
def pinned(folder: Path) -> Iterator[None]:
    """Nothing is written below the folder meanwhile if another one has taken its place.

    An unmounted disk leaves an empty folder of the same name, which would be filled instead.
    """
    key = folder.resolve()
    if key in _pinned:
        yield
        return
    there = folder.stat()
    _pinned[key] = (there.st_dev, there.st_ino)
    try:
        yield
    finally:
        del _pinned[key]


def check_pinned(path: Path) -> None:
    """Raises DiskError where a folder above is no longer the one that was `pinned`."""
    for parent in path.absolute().parents if _pinned else ():
        wanted = _pinned.get(parent) or _pinned.get(parent.resolve())
        if wanted is None:
            continue
        try:
            found = parent.stat()
        except FileNotFoundError:
            raise DiskError(errno.ENODEV, path) from None
        if (found.st_dev, found.st_ino) != wanted:
            raise DiskError(errno.ENODEV, path)


def check_writable(path: Path) -> None:
    """Raises InputError unless `path` is a folder we may write to, or can be made one."""
    try:
        parent = path
        while not (parent.exists() or parent.is_symlink()):
            if parent.name == "..":  # what is before it would be made on the way, and stay
                raise InputError(f"{path} leads over a folder that is not there; leave out its ..")
            parent = parent.parent
        if not parent.is_dir():
            raise InputError(f"{parent} is no folder; a folder is needed for {path}")
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name that is too long, say
        with tempfile.TemporaryFile(dir=parent):  # without a name (Linux): a kill leaves nothing
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written to ({reason}); choose another") from None


def remove_leftovers(*folders: str | os.PathLike[str]) -> None:
    """Delete what `write_aside` had begun in folders when its process was killed; a folder that was
    to be replaced, and is not yet, goes back to its place.

    Only for folders of ours that no other process writes to.
    """
    for folder in map(Path, folders):
        for leftover in folder.glob(f"{ASIDE}*"):
            name = leftover.name.removeprefix(ASIDE).rpartition(".")[0]
            _clear(leftover, folder / name)


def remove_leftovers_of(path: str | os.PathLike[str]) -> None:
    """The same of one file or folder alone, where others may write beside it."""
    path = Path(path)
    for leftover in path.parent.glob(f"{ASIDE}{glob.escape(path.name)}.*"):
        name = leftover.name.removeprefix(ASIDE).removesuffix(_WHOLE)
        if name.rpartition(".")[0] == path.name:
            _clear(leftover, path)


def remove(path: str | os.PathLike[str]) -> None:
    """Delete a file, a folder with all in it, or a link (not what it leads to), if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Indented JSON; NaN is refused."""
    with write_aside(path) as fresh:
        fresh.write_text(to_json(value))


def to_json(value: Any) -> str:
    """The text of `write_json`."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_parquet(path: str | os.PathLike[str], table: "pd.DataFrame") -> None:
    """Parquet with page checksums, without the index."""
    with write_aside(path) as fresh:  # absolute: a name like a:b is no address of anything else
        table.to_parquet(fresh.absolute(), index=False, write_page_checksum=True)


def read_parquet(path: str | os.PathLike[str], **options: Any) -> "pd.DataFrame":
    """`pandas.read_parquet`, every page compared with its checksum where it has one.

    Raises:
      OSError, ValueError: no such file, no parquet, or damage.
    """
    import pandas as pd

    return pd.read_parquet(Path(path).absolute(), page_checksum_verification=True, **options)


def sync(path: Path) -> None:
    """A file's contents, or a folder's names, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole(aside: Path) -> Path:
    """Where what is written lies when it is whole, until it takes its place."""
    return aside.with_name(f"{aside.name}{_WHOLE}")


def _clear(aside: Path, path: Path) -> None:
    """Delete what is written aside, but for the only copy of what `path` held: that is put back."""
    old = aside / _REPLACED
    if os.path.lexists(old) and not os.path.lexists(path):
        try:
            old.rename(path)
        except OSError:
            return
    for each in (aside, _whole(aside)):
        shutil.rmtree(each, ignore_errors=True)
        with contextlib.suppress(OSError):
            each.unlink()


def _refused_now(aside: Path) -> int | None:
    """The number of the system's error if what is written aside cannot grow; None if it can."""
    if not (aside.is_dir() or _whole(aside).exists()):
        return errno.ENODEV  # it went away from under the writer
    written = [path for path in aside.rglob("*") if path.is_file()]
    largest = max(written, key=lambda path: path.stat().st_size, default=aside / "trial")
    try:
        with largest.open("ab") as file:
            file.write(bytes(_TRIAL))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return disk.refused(error)
    return None


def _size(folder: Path) -> int:
    """Bytes in all its files, as far as they can be seen."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size * path.is_file()
    return total

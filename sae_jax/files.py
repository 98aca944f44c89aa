"""Writing so that a file or folder is there whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_jax.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


ASIDE = ".writing-"  # begins the name of what is not finished


@contextlib.contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write a file or a folder at; on success it takes the place of `path`.

    What is written is flushed to the disk before it is renamed. If the body raises, nothing is left
    and what `path` held before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{ASIDE}{path.name}.", dir=path.parent))
    try:
        fresh = aside / path.name
        yield fresh
        for written in [fresh, *fresh.rglob("*")]:
            _flush(written)
        if path.is_dir():  # a folder cannot be replaced in one call: move the old one out first
            path.rename(aside / "replaced")
        try:
            fresh.rename(path)
        except OSError:
            if (aside / "replaced").exists():
                (aside / "replaced").rename(path)
            raise
        _flush(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raises InputError unless `path` is a folder we may write to, or can be made one."""
    try:
        parent = path
        while not (parent.exists() or parent.is_symlink()):
            parent = parent.parent
        if not parent.is_dir():
            raise InputError(f"{parent} is no folder; a folder is needed for {path}")
        with tempfile.TemporaryDirectory(prefix=".writable.", dir=parent) as trial:
            (Path(trial) / path.name).touch()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written to ({reason}); choose another") from None


def remove_leftovers(*folders: str | os.PathLike[str]) -> None:
    """Delete what `write_aside` had begun in folders when its process was killed.

    Only for folders of ours that no other process writes to.
    """
    for folder in folders:
        for leftover in Path(folder).glob(f"{ASIDE}*"):
            shutil.rmtree(leftover, ignore_errors=True)


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
        fresh.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_parquet(path: str | os.PathLike[str], table: "pd.DataFrame") -> None:
    """Parquet with page checksums, without the index."""
    with write_aside(path) as fresh:
        table.to_parquet(fresh, index=False, write_page_checksum=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

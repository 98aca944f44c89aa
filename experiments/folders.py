"""What a program finds in its --workdir, and how it makes the folder its own.

The program defines --workdir and --overwrite, and --resume if it can continue. The file of its
settings is written first: it tells a folder of the program from anybody's.
"""

import collections
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from extract import hashing
from extract.errors import InputError as ExtractionError
from extract.errors import listed
from sae_jax import InputError, files, manifest, workdir
from sae_jax.reading import check_file

FLAGS = flags.FLAGS
IGNORED = dict.fromkeys(("workdir", "overwrite", "resume"))  # in comparing settings


def check_workdir(settings_file: str) -> Path:
    """The folder of --workdir. Writes nothing.

    Raises:
      InputError: none is named, it cannot be written, it holds other files, or an earlier run that
        the flags say neither to replace nor to continue.
    """
    if not FLAGS.workdir:
        raise InputError("--workdir is needed: the folder to fill")
    if FLAGS.overwrite and _resume():
        raise InputError("--overwrite and --resume exclude each other")
    out = Path(FLAGS.workdir)
    workdir.check_writable(out)
    if out.is_dir() and visible(out):
        if not (out / settings_file).is_file():
            raise InputError(f"{out} holds other files; choose an empty or a new folder")
        if not (FLAGS.overwrite or _resume()):
            ways = "--overwrite replaces it" + ", --resume continues it" * ("resume" in FLAGS)
            raise InputError(f"{out} holds an earlier run: {ways}")
    return out


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, but for hidden files: the lock, what is being written."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def contents(paths: Iterable[str | None]) -> dict[str, str]:
    """SHA-256 of what inputs hold, by path: of a file's bytes, of a folder's names and files.

    Names of online collections and keys of obsm, which are no paths, are left out.
    """
    return {str(path): _hash(Path(path)) for path in paths if path and Path(path).exists()}


def _hash(path: Path) -> str:
    if path.is_file():
        return hashing.sha256(path)
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    names = [f"{file.relative_to(path)} {hashing.sha256(file)}" for file in inside]
    return hashing.names_hash(names)


@contextlib.contextmanager
def filled(
    out: Path,
    settings_file: str,
    settings: dict[str, Any],
    leaves: Iterable[str],
    shown: Iterable[str] = (),
) -> Iterator[None]:
    """The body fills the folder, of which `claim` says what was there before; nobody else does.

    The manifest of `leaves` is written when it has. Of a body that refuses its input before it has
    left anything, nothing stays.

    Raises:
      InputError: as `claim`; another process fills it; or --resume, and a finished run's files
        within folders are not as they were left.
    """
    leaves = tuple(leaves)
    made, new = not out.exists(), not (out / settings_file).exists()
    try:
        with workdir.locked(out):
            claim(out, settings_file, settings, leaves, shown)
            try:
                with changed(out, settings_file, leaves):
                    yield
            except (InputError, ExtractionError):
                if new and [path.name for path in visible(out)] == [settings_file]:
                    files.remove(out / settings_file)
                raise
    except (InputError, ExtractionError):
        if made:
            with contextlib.suppress(OSError):  # what was made stays, with its folder
                out.rmdir()
        raise


@contextlib.contextmanager
def changed(out: Path, settings_file: str, leaves: Iterable[str]) -> Iterator[None]:
    """The body changes a run's folder: it has no manifest meanwhile, and one of `leaves` after it.

    Raises:
      InputError: a finished run's files within folders are not as they were left.
    """
    removed = _remove_damaged(out, [name for name in leaves if name != settings_file])
    with manifest.renewed(out, (settings_file, *leaves)):
        yield
    for name in removed:
        if not (out / name).exists():
            logging.warning("%s/%s was not made again: --overwrite makes it", out, name)


def _remove_damaged(out: Path, leaves: Sequence[str]) -> list[str]:
    """Of a finished run, the files that are not as they were left: what makes them does it again.

    Raises:
      InputError: what is damaged lies within a folder.
    """
    if not (out / manifest.NAME).exists():
        return []
    try:
        _, wrong = manifest.look(out, "full")
    except InputError as error:
        raise InputError(f"{error}. Delete it: then each file is looked at on its own") from None
    there = {name: told for name, told in wrong.items() if (out / name).exists()}
    if within := [told for name, told in there.items() if name not in leaves]:
        raise InputError(
            f"{out} is not as its run left it: {listed(within)}. Delete the folders in {out} that "
            "these are in, and they are made again; or give --overwrite"
        )
    for name, told in wrong.items():
        logging.warning("%s: %s; it is made again", out, told)
        files.remove(out / name)
    return list(there)


def claim(
    out: Path,
    settings_file: str,
    settings: dict[str, Any],
    leaves: Iterable[str],
    shown: Iterable[str] = (),
) -> None:
    """Make the folder ours: clear what --overwrite replaces (`leaves`), and note the settings.

    What a killed run had begun to write goes, too. `shown` are settings that only say what is
    shown of results: a run goes on with others.

    Raises:
      InputError: --resume, and the folder holds a run of other settings, or damaged ones.
    """
    ours = [out / name for name in leaves if (out / name).is_dir()]
    inside = [path for folder in ours for path in folder.rglob("*") if path.is_dir()]
    files.remove_leftovers(out, *ours, *inside)
    path = out / settings_file
    if _resume() and path.exists():
        try:
            earlier = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged: {error}; use --overwrite") from None
        ignored = IGNORED | dict.fromkeys(shown)
        if differences := workdir.difference(earlier | ignored, settings | ignored):
            raise InputError(f"{out} holds a run of other settings:\n  {differences}")
        return
    if FLAGS.overwrite:
        # What tells that the folder is ours goes last: a kill leaves one that can be overwritten.
        for name in (manifest.NAME, *(n for n in leaves if n != settings_file), settings_file):
            files.remove(out / name)
    files.write_json(path, settings)


def readable(path: Path) -> bool:
    """Whether a file of ours is there and whole; a damaged one is made again.

    All of it is read, a part at a time: pages and members have checksums.
    """
    import pandas as pd  # heavy, for programs that only want a folder
    from pyarrow import parquet

    try:
        check_file(path)
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                collections.deque(file.iter_batches(), maxlen=0)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                collections.deque(arrays.values(), maxlen=0)
        else:
            return path.read_text().endswith("\n") and len(pd.read_csv(path).columns) > 1
    except Exception:  # libraries raise dozens of kinds at what they did not write
        if path.exists():
            logging.warning("%s cannot be read and is made again", path)
        return False
    return True


def _resume() -> bool:
    return "resume" in FLAGS and FLAGS.resume

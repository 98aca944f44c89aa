"""What a program finds in its --workdir, and how it makes the folder its own.

The program defines --workdir and --overwrite, and --resume if it can continue. The file of its
settings is written first: it tells a folder of the program from anybody's.
"""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging
from pyarrow import parquet

from extract import hashing
from sae_jax import InputError, files, workdir

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
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        if not (out / settings_file).is_file():
            raise InputError(f"{out} holds other files; choose an empty or a new folder")
        if not (FLAGS.overwrite or _resume()):
            ways = "--overwrite replaces it" + ", --resume continues it" * ("resume" in FLAGS)
            raise InputError(f"{out} holds an earlier run: {ways}")
    return out


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
    files.remove_leftovers(out, out / "figures")
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
        for name in (*leaves, settings_file):
            files.remove(out / name)
    files.write_json(path, settings)


def readable(path: Path) -> bool:
    """Whether a file of ours is there and whole; a damaged one is made again."""
    try:
        if path.suffix == ".parquet":
            parquet.read_metadata(path)
        elif path.suffix == ".npz":
            np.load(path)
        else:
            return path.read_text().endswith("\n") and len(pd.read_csv(path).columns) > 1
    except (OSError, ValueError, zipfile.BadZipFile):  # pyarrow's errors are ValueErrors
        if path.exists():
            logging.warning("%s cannot be read and is made again", path)
        return False
    return True


def _resume() -> bool:
    return "resume" in FLAGS and FLAGS.resume

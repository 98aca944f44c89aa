"""The folder of a program of this study: whose it is, and what it was asked for."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments import folders
from sae_jax import InputError, files, manifest, workdir


def check(
    folder: str | None,
    name: str,
    settings: dict[str, Any],
    overwrite: bool,
    growing: Iterable[str] = (),
) -> Path:
    """The folder, if it may be filled: new, empty, or of a run of the same settings.

    name: of the file of settings, which tells a folder of ours from anybody's. growing: settings
    that may differ, as they only say how many of independent results are asked for.

    Raises:
      InputError: no folder, one that cannot be written, or one that holds anything else.
    """
    if not folder:
        raise InputError("--workdir is needed: the folder to fill")
    out = Path(folder)
    workdir.check_writable(out)
    there = list(out.iterdir()) if out.is_dir() else []
    if any(not path.name.startswith(".") for path in there) and not (out / name).is_file():
        raise InputError(f"{out} holds other files; choose an empty or a new folder")
    if (out / name).is_file() and not overwrite:
        try:
            found = json.loads((out / name).read_text())
        except ValueError as error:
            raise InputError(f"{out / name} is damaged: {error}") from None
        free = dict.fromkeys(growing)
        if difference := workdir.difference(found | free, settings | free):
            raise InputError(
                f"{out} holds a run of other settings:\n  {difference}\n"
                "Give another folder, or --overwrite."
            )
    return out


@contextlib.contextmanager
def filled(
    out: Path, name: str, settings: dict[str, Any], produced: Iterable[str], overwrite: bool
) -> Iterator[None]:
    """The body fills the folder, once it is ours (see `claim`); its manifest is written last.

    Raises:
      InputError: another process fills it, or a finished run's files are not as they were left.
    """
    with workdir.locked(out):
        claim(out, name, settings, produced, overwrite)
        with folders.changed(out, name, produced):
            yield


def claim(
    out: Path, name: str, settings: dict[str, Any], produced: Iterable[str], overwrite: bool
) -> None:
    """Make the folder ours; with `overwrite` without what an earlier run left there."""
    if overwrite:
        # What tells that the folder is ours goes last: a kill leaves one that can be overwritten.
        for other in (manifest.NAME, *(other for other in produced if other != name), name):
            files.remove(out / other)
    files.remove_leftovers(out, *(out / other for other in produced))
    files.write_json(out / name, settings)

"""Files of which nothing is taken for granted: whatever is wrong with one is told in a line."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_jax import disk
from sae_jax.errors import InputError, brief

LARGEST_JSON = 2**28  # bytes


def check_file(path: str | os.PathLike[str]) -> Path:
    """The path, of a file: not of a folder, nor of a pipe, which would be waited for.

    Raises:
      InputError: there is none, or it is something else.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(f"{path} cannot be read: {brief(error)}") from None
    if not there:
        raise InputError(f"there is no file {path}")
    kind = "a folder" if path.is_dir() else "a link that leads nowhere, a pipe or a device"
    raise InputError(f"{path} is {kind}, not a file")


@contextlib.contextmanager
def reading(what: str | os.PathLike[str], why: str = "", advice: str = "") -> Iterator[None]:
    """Whatever a broken file raises, as an InputError of one line: WHAT WHY: reason ADVICE.

    why: by itself "cannot be read" of what the system refuses, else "is damaged".
    """
    try:
        yield
    except InputError as error:
        if os.fspath(what) in str(error):
            raise
        raise InputError(f"{what}: {error}") from None
    except Exception as error:  # libraries raise dozens of kinds at what they did not write
        if disk.refused(error) in disk.FULL:
            raise  # of what is written meanwhile: no fault of this file
        told = why or ("cannot be read" if isinstance(error, OSError) else "is damaged")
        raise InputError(f"{what} {told}: {brief(error)}{advice}") from error


def read_json(path: str | os.PathLike[str], advice: str = "", **options: Any) -> Any:
    """What a JSON file holds; `options` are those of `json.loads`.

    Raises:
      InputError: no such file, more than 256 MiB, not UTF-8, not JSON, or nested too deeply.
    """
    path = check_file(path)
    with reading(path, "is damaged, no JSON", advice):
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"its {size / 2**20:.3g} MiB are too much for JSON of ours")
        return json.loads(path.read_bytes().decode(), **options)


def read_object(path: str | os.PathLike[str], advice: str = "", **options: Any) -> dict[str, Any]:
    """`read_json` of an object.

    Raises:
      InputError: as `read_json`, or it is no object.
    """
    found = read_json(path, advice, **options)
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: no JSON object, but a {type(found).__name__}{advice}")
    return found

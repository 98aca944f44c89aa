"""Whether a finished folder is still as it was finished: size and SHA-256 of every file.

Most formats tell nothing of a flipped bit, and some take what is missing for zeros. The manifest is
written last and taken away first: a folder that has none is not finished.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from sae_jax import files
from sae_jax.errors import InputError

NAME = "manifest.json"
Level = Literal["size", "full"]
_FORMAT = 1


@contextlib.contextmanager
def renewed(folder: Path, without: tuple[str, ...] = ()) -> Iterator[None]:
    """The folder has no manifest while the body changes it, and a new one if all went well.

    without: names, directly in the folder, of what is not part of the result.
    """
    files.remove(folder / NAME)
    yield
    write(folder, without)


def write(folder: Path, without: tuple[str, ...] = ()) -> None:
    """Note all that the folder holds now, but for `without` and hidden files."""
    listed = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and relative.parts[0] not in (NAME, *without):
            listed[relative.as_posix()] = [path.stat().st_size, _sha256(path)]
    files.write_json(folder / NAME, {"format": _FORMAT, "files": listed})


def check(folder: Path, level: Level = "size") -> int:
    """How many files are as the manifest says: of their size, or ("full") byte for byte.

    What it does not list may be there as well: it is not of the run.

    Raises:
      InputError: no manifest, a damaged one, files that are missing or differ (five are named).
    """
    listed = _read(folder / NAME)
    wrong = [told for name, noted in listed.items() if (told := _wrong(folder, name, noted, level))]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{folder} is not as its run left it: {'; '.join(wrong[:5])}{more}. Copy it again, or "
            "make it again"
        )
    return len(listed)


def _wrong(folder: Path, name: str, noted: tuple[int, str], level: Level) -> str | None:
    """What is wrong with a file, if anything."""
    size, digest = noted
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    try:
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes of {size:,}"
        if level == "full" and _sha256(path) != digest:
            return f"{name} has other contents"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _read(path: Path) -> dict[str, tuple[int, str]]:
    """The files that a manifest lists.

    Raises:
      InputError: there is none, or it is damaged.
    """
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != _FORMAT:
            raise InputError(f"{path} is of format {found['format']!r}, of a newer sae-jax")
        listed = {}
        for name, (size, digest) in found["files"].items():
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts or "\0" in name:
                raise ValueError(f"{name!r} is outside of the folder")
            listed[name] = (int(size), str(digest))
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} has no {NAME}: its run was not finished; give its command again"
        ) from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    return listed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

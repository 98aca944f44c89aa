"""Whether a finished folder is still as it was finished: size and SHA-256 of every file.

Most formats tell nothing of a flipped bit, and some take what is missing for zeros. The manifest is
written last and taken away first: a folder that has none is not finished.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from sae_jax import files, pulse
from sae_jax.errors import InputError
from sae_jax.reading import LARGEST_JSON, check_file

NAME = "manifest.json"
Level = Literal["size", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)
_FORMAT = 1


@contextlib.contextmanager
def renewed(folder: Path, names: Iterable[str] | None = None) -> Iterator[None]:
    """The folder has no manifest while the body changes it, and a new one if all went well."""
    remove(folder)
    yield
    write(folder, names)


def remove(folder: Path) -> None:
    """Say that the folder is being changed, before it is."""
    if (folder / NAME).exists():
        files.remove(folder / NAME)
        files.sync(folder)


def write(folder: Path, names: Iterable[str] | None = None) -> None:
    """Note all files that the folder holds now, but for hidden ones.

    names: of what lies directly in the folder and is of the result; None: all of it.
    """
    names = [path.name for path in folder.iterdir()] if names is None else names
    _store(folder, dict(sorted(_listed(folder, names).items())))


def add(folder: Path, *names: str) -> None:
    """Note more of what lies in a folder, or note it anew; the rest is not read again."""
    known = _read(folder / NAME) if (folder / NAME).exists() else {}
    _store(folder, dict(sorted({**known, **_listed(folder, names)}.items())))


def _listed(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Size and hash of the files of these names, and of all in the folders of these names."""
    listed = {}
    for top in (folder / name for name in names if name != NAME):
        for path in (top, *top.rglob("*")):
            parts = path.relative_to(folder).parts
            hidden = any(part.startswith(".") for part in parts)
            if path.is_file() and not hidden:
                listed["/".join(parts)] = (path.stat().st_size, sha256(path))
    return listed


def check(folder: Path, level: Level = "size") -> int:
    """How many files are as the manifest says: of their size, or ("full") byte for byte.

    What it does not list may be there as well: it is not of the run.

    Raises:
      InputError: no manifest, a damaged one, files that are missing or differ (five are named).
    """
    listed, wrong = look(folder, level)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{folder} is not as its run left it: {'; '.join([*wrong.values()][:5])}{more}. Copy it"
            " again, or make it again"
        )
    return listed


def look(folder: Path, level: Level = "size") -> tuple[int, dict[str, str]]:
    """How many files are listed, and of each that is not as it was, by name, what is wrong.

    Raises:
      InputError: no manifest, or a damaged one.
    """
    listed = _read(folder / NAME)
    told = {name: _wrong(folder, name, noted, level) for name, noted in listed.items()}
    return len(listed), {name: wrong for name, wrong in told.items() if wrong is not None}


def names(folder: Path) -> list[str]:
    """The files that are listed; none without a manifest.

    Raises:
      InputError: a damaged manifest.
    """
    return list(_read(folder / NAME)) if (folder / NAME).exists() else []


def differs(folder: Path, name: str) -> str | None:
    """What is wrong with one file, byte for byte: it differs, is missing or is not listed.

    Raises:
      InputError: a damaged manifest.
    """
    listed = _read(folder / NAME) if (folder / NAME).exists() else {}
    if name not in listed:
        return f"{name} is not in the manifest"
    return _wrong(folder, name, listed[name], "full")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    pulse.beat(f"reading {path.name}", alone=True)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _store(folder: Path, listed: dict[str, tuple[int, str]]) -> None:
    files.write_json(folder / NAME, {"format": _FORMAT, "files": listed})


def _wrong(folder: Path, name: str, noted: tuple[int, str], level: Level) -> str | None:
    """What is wrong with a file, if anything."""
    size, digest = noted
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    try:
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes of {size:,}"
        if level == "full" and sha256(path) != digest:
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
        path = check_file(path) if path.exists() else path
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("it is too large to be ours")
        content = path.read_bytes()
        found = json.loads(content)
        if found["format"] != _FORMAT:
            raise InputError(f"{path} is of format {found['format']!r}, of a newer sae-jax")
        if content != files.to_json(found).encode():  # no byte of it is without meaning
            raise ValueError("it is not as it was written")
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

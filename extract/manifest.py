"""Whether a store is still as it was written: size and SHA-256 of every file of it.

The manifest lies in the attributes of the root, where zarr lets nobody's files be. The root's
zarr.json is in it too, by the hash of its text with zeros in the place of that hash.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import zarr

from extract.errors import InputError, listed
from extract.hashing import sha256

Level = Literal["size", "full"]
_KEY = "extraction-manifest"
_FORMAT = 2  # the first had neither a format nor zarr.json itself
_ZEROS = "0" * 64


def check(path: Path, level: Level = "size") -> int:
    """How many files of a store are as they were written: of their size, or ("full") in every byte.

    The root's zarr.json is compared in every byte in any case.

    Raises:
      InputError: no finished store; files that are missing or not what was written.
    """
    try:
        content = (path / "zarr.json").read_bytes()
        noted = json.loads(content)["attributes"].get(_KEY)
        if noted is None:
            raise InputError(f"{path} was not finished: run the same command again")
        if "format" in noted:
            noted = _checked(content, noted)
        wrong = [f"{name} {fault}" for name, each in noted.items() if (fault := _wrong(path / name,
                 each, level))]  # fmt: skip
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if wrong:
        raise InputError(f"{path} is damaged: {listed(wrong)}; extract it again")
    return len(noted) + 1


def _checked(content: bytes, noted: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The files of a manifest, if zarr.json itself is what was written."""
    if noted["format"] != _FORMAT:
        raise ValueError(f"its manifest has format {noted['format']!r}, of a newer version?")
    blank = content.replace(json.dumps(noted["zarr.json"]).encode(), json.dumps(_ZEROS).encode())
    if hashlib.sha256(blank).hexdigest() != noted["zarr.json"]:
        raise ValueError("zarr.json has other contents; extract it again")
    return noted["files"]


def _wrong(file: Path, noted: tuple[int, str], level: Level) -> str | None:
    size, digest = noted
    if not file.is_file():
        return "is missing"
    if (found := file.stat().st_size) != size:
        return f"has {found:,} bytes of {size:,}"
    return "has other contents" if level == "full" and sha256(file) != digest else None


def write(path: Path) -> None:
    """Note all files of a store that is whole; every one is on the disk when this returns."""
    inside = [each for each in sorted(path.rglob("*")) if each != path / "zarr.json"]
    noted = {
        each.relative_to(path).as_posix(): [each.stat().st_size, sha256(each)]
        for each in inside if each.is_file()
    }  # fmt: skip
    root = zarr.open_group(path, mode="r+")
    root.attrs[_KEY] = {"format": _FORMAT, "zarr.json": _ZEROS, "files": noted}
    file, fresh = path / "zarr.json", path / "zarr.json.partial"
    blank = file.read_bytes()
    digest = hashlib.sha256(blank).hexdigest()
    fresh.write_bytes(blank.replace(json.dumps(_ZEROS).encode(), json.dumps(digest).encode()))
    fresh.replace(file)
    for each in (*inside, file, path):
        sync(each)


def sync(path: Path) -> None:
    """A file's contents, or a folder's names, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

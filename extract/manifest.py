"""Whether a store is still as it was written: size and SHA-256 of every file of it.

The manifest lies in the attributes of the root, where zarr lets nobody's files be. The root's
zarr.json is in it too, by the hash of its text with zeros in the place of that hash.

What lies beside stores (`export`) is in a manifest.json of the folder, as all our runs have one.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import zarr

from extract import disk
from extract.errors import InputError, listed, reading
from extract.hashing import sha256

NAME = "manifest.json"
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
    file, fresh = path / "zarr.json", path / "zarr.json.partial"
    with disk.named(file, len(json.dumps(noted))):
        root = zarr.open_group(path, mode="r+")
        root.attrs[_KEY] = {"format": _FORMAT, "zarr.json": _ZEROS, "files": noted}
        blank = file.read_bytes()
        digest = hashlib.sha256(blank).hexdigest()
        fresh.write_bytes(blank.replace(json.dumps(_ZEROS).encode(), json.dumps(digest).encode()))
        fresh.replace(file)
        for each in (*inside, file, path):
            sync(each)


def entries(folder: Path) -> dict[str, Any]:
    """The files that the manifest.json of a folder lists, if it has one.

    Raises:
      InputError: a damaged one.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    with reading(path, "is damaged (delete it, if it is not of a run in this folder)"):
        found = json.loads(path.read_bytes())
        if found["format"] != 1 or not isinstance(found["files"], dict):
            raise ValueError("it is of another format")
    return found["files"]


def note(folder: Path, names: Iterable[str], aside: Path) -> None:
    """Files of a folder as they are now, or are no more, in its manifest.json, which is written in
    `aside` and then renamed; one that would list nothing goes.

    Raises:
      InputError: a damaged one. DiskError: the disk takes no more, is read-only or gone.
    """
    names = set(names)
    paths = {name: folder / name for name in names if (folder / name).exists()}
    now = {name: [path.stat().st_size, sha256(path)] for name, path in paths.items()}
    others = {name: each for name, each in entries(folder).items() if name not in names}
    listing = dict(sorted((others | now).items()))
    if not listing:
        (folder / NAME).unlink(missing_ok=True)
        return
    content = json.dumps({"format": 1, "files": listing}, indent=1) + "\n"
    with disk.named(folder / NAME, len(content)):
        fresh = aside / NAME
        fresh.write_text(content)
        sync(fresh)
        fresh.rename(folder / NAME)
        sync(folder)


def sync(path: Path) -> None:
    """A file's contents, or a folder's names, are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

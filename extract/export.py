"""Stores as plain arrays: NAME.npy beside NAME.names.txt, both in the manifest of their folder."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from extract import disk, manifest, store
from extract.errors import InputError, listed


def check_names(names: Iterable[str]) -> None:
    """Refuse names of cells or genes that a line of a text file cannot hold.

    Raises:
      InputError: a tab, the end of a line, or what is no Unicode in a name.
    """
    if odd := [name for name in names if not _is_line(name)]:
        raise InputError(
            f"--export: {len(odd)} names ({listed(odd)}) hold a tab, the end of a line or what is "
            "no Unicode, so that the names beside the rows could not be told apart: rename them, "
            "or leave --export out"
        )


def export_npy(path: Path) -> list[Path]:
    """Of a store NAME.zarr: NAME.npy, and NAME.names.txt in UTF-8, a name a line (of tokens: cell,
    tab, gene); and manifest.json beside them, as `sae-jax verify` reads it.

    Raises:
      InputError: no whole store, names that `check_names` refuses, or a manifest.json that is none.
      DiskError: the disk takes no more, is read-only or gone; nothing is left of it.
    """
    found = store.open(path)
    tokens = found.extraction["pooling"] == "tokens"
    columns = [found.obs[name].cat.categories for name in ("cell", "gene")] if tokens else []
    check_names(str(name) for names in columns or [found.obs.index] for name in names)
    folder, aside = path.parent, path.parent / store.EXPORTING
    manifest.entries(folder)  # damage is told before the work
    targets = [path.with_suffix(end) for end in store.EXPORTED]
    size = found.shape[0] * found.shape[1] * found.X.dtype.itemsize
    try:
        with disk.named(targets[0], size):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            fresh = [aside / target.name for target in targets]
            _write(found, *fresh, tokens=tokens)
            for each, target in zip(fresh, targets, strict=True):
                manifest.sync(each)
                each.rename(target)
            manifest.sync(folder)
        manifest.note(folder, [target.name for target in targets], aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return targets


def _write(found: store.Store, array: Path, text: Path, *, tokens: bool) -> None:
    """Both files, a chunk of rows at a time."""
    with array.open("wb") as out, text.open("w", encoding="utf-8", newline="\n") as names:
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, 0), found.X.dtype))
        np.lib.format.write_array_header_1_0(out, header | {"shape": found.shape})
        for start in range(0, found.shape[0], found.X.chunks[0]):
            rows = slice(start, start + found.X.chunks[0])
            out.write(np.ascontiguousarray(found.X[rows]).tobytes())
            obs = found.obs.iloc[rows]
            lines = obs.index
            if tokens:
                lines = obs["cell"].astype(str) + "\t" + obs["gene"].astype(str)
            names.writelines(f"{line}\n" for line in lines)


def _is_line(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\t" not in name and name.splitlines() in ([name], [])  # the name may be empty

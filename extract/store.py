"""The extraction store: one layer of a model for all cells, an AnnData on zarr.

NAME.zarr   X [rows, d_model]; obs: the file's rows, order and names (under pooling "tokens": the
            columns cell and gene); uns["extraction"]: where it comes from. `anndata.read_zarr`
            reads it, and so does sae_jax.

Chunks carry crc32c. A deleted or cut chunk would still go unnoticed, so the root's attributes hold
a manifest, written last: size and SHA-256 of every file. While it grows a store lies in
`.extracting`.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
import zarr.codecs

from extract.errors import InputError, listed

DTYPES = ("float32", "bfloat16", "float16")
_MANIFEST = "extraction-manifest"
_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished store, unread: `X` is a zarr array [rows, d_model] to be sliced.

    Attributes:
      path: of the store.
      X: float32 or float16; rows of cells without any gene of the model are NaN.
      obs: one row per row of X; its index are the cells' names (of tokens: numbers).
      extraction: model, checkpoint, layer, pooling, preprocessing, coverage, hashes, versions.
    """

    path: Path
    X: zarr.Array
    obs: pd.DataFrame
    extraction: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and dimensions."""
        return self.X.shape

    def to_anndata(self) -> anndata.AnnData:
        """All of it in memory."""
        return anndata.read_zarr(self.path)

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest's.

        Raises:
          InputError: a file that is not what was written.
        """
        for name, (_, expected) in _manifest(zarr.open_group(self.path, mode="r"), self.path):
            if _sha256(self.path / name) != expected:
                raise InputError(f"{self.path}: {name} is not what was written: extract it again")


def open(path: str | os.PathLike[str]) -> Store:  # `extract.store.open(path)` is meant
    """Open a store lazily, after a quick check: its files are there and whole, its names are those
    that were written, and the ends of X are finite (but for cells that are named as empty).

    Raises:
      InputError: no store, one that is unfinished or damaged.
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise InputError(f"{path} is no extraction store (there is no zarr.json in it)")
    try:
        root = zarr.open_group(path, mode="r")
        for name, (size, _) in _manifest(root, path):
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                raise InputError(f"{path}: {name} is missing or cut; extract it again")
        x, obs = root["X"], anndata.io.read_elem(root["obs"])
        extraction = anndata.io.read_elem(root["uns/extraction"])
        if len(obs) != x.shape[0] or names_hash(obs.index) != extraction["obs_names_sha256"]:
            raise InputError(f"{path}: obs does not belong to X: extract it again")
        for rows in (slice(0, x.chunks[0]), slice(max(0, len(obs) - x.chunks[0]), None)):
            empty = np.isin(obs.index[rows], list(extraction["empty_cells"]))
            if not np.isfinite(x[rows][~empty]).all():
                raise InputError(f"{path}: X holds NaN or infinite values: extract it again")
    except InputError:
        raise
    except Exception as error:  # zarr's and anndata's kinds are many
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged: {reason}") from None
    return Store(path, x, obs, extraction)


def _manifest(root: zarr.Group, path: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    manifest = root.attrs.get(_MANIFEST)
    if manifest is None:
        raise InputError(f"{path} was not finished: run the same command again")
    return iter(manifest.items())


def names_hash(names: Sequence[str]) -> str:
    """SHA-256 of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(str(name).encode() + b"\0")
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 (nearest, ties to even) and kept as float32, which every reader
    knows: its two low bytes are zero and compress to nothing."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


class Writer:
    """Several stores of the same rows, filled a block of rows at a time; continues after a kill.

    Args:
      folder: where the stores will lie.
      layers: their names, and which layer each is.
      obs: of the rows.
      width: of a row.
      extraction: of all layers, in JSON's types; another than an unfinished one's is refused.
      dtype: one of `DTYPES`.
    """

    def __init__(
        self,
        folder: Path,
        layers: dict[str, int | str],
        obs: pd.DataFrame,
        width: int,
        extraction: dict[str, Any],
        dtype: str,
    ) -> None:
        self.folder, self.aside = folder, folder / ".extracting"
        self.layers, self.dtype = layers, dtype
        settings = {"layers": layers, "dtype": dtype, "width": width, "extraction": extraction}
        self._progress = self.aside / "progress.json"
        self.done: set[int] = set()
        if self._progress.is_file():
            found = self._read_progress()
            there = found["settings"]["layers"]  # killed in `finish`, some have been moved
            left = {k: v for k, v in there.items() if (self.aside / f"{k}.zarr").exists()}
            found["settings"]["layers"] = left
            if found["settings"] != json.loads(json.dumps(settings)):
                raise InputError(
                    f"{folder} holds an unfinished extraction of other settings "
                    f"({_first_difference(found['settings'], settings)}): finish it, give another "
                    "folder, or --overwrite"
                )
            self.done = set(found["done"])
        else:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
            for name, layer in layers.items():
                self._create(name, obs, width, {**extraction, "layer": layer})
            self._settings = settings
            self._save_progress()
        self._settings = settings
        self._arrays = {
            name: zarr.open_group(self.aside / f"{name}.zarr", mode="r+")["X"] for name in layers
        }

    def _read_progress(self) -> dict[str, Any]:
        try:
            return json.loads(self._progress.read_text())
        except ValueError:
            raise InputError(f"{self._progress} is damaged: give --overwrite") from None

    def _create(self, name: str, obs: pd.DataFrame, width: int, extraction: dict[str, Any]) -> None:
        root = zarr.open_group(self.aside / f"{name}.zarr", mode="w", zarr_format=3)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        kind = np.dtype("float16" if self.dtype == "float16" else "float32")
        rows = max(1, min(len(obs), _CHUNK_BYTES // (width * kind.itemsize)))
        shuffle = zarr.codecs.BloscCodec(
            cname="zstd", clevel=1, shuffle="shuffle", typesize=kind.itemsize
        )
        x = root.create_array(
            "X",
            shape=(len(obs), width),
            chunks=(rows, width),
            dtype=kind,
            compressors=[shuffle, zarr.codecs.Crc32cCodec()],
        )
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        var = pd.DataFrame(index=[f"d{i}" for i in range(width)])
        parts = {"obs": obs, "var": var, "uns": {"extraction": extraction}}
        parts |= {key: {} for key in ("layers", "obsm", "varm", "obsp", "varp")}
        with warnings.catch_warnings():  # of anndata about a default to come
            warnings.filterwarnings("ignore", message=".*autosharding")
            for key, part in parts.items():
                anndata.io.write_elem(root, key, part)

    def write(self, block: int, rows: slice, values: dict[str, np.ndarray]) -> None:
        """Rows of every layer, by its name; `block` is remembered as done."""
        for name, array in self._arrays.items():
            part = values[name]
            array[rows] = to_bfloat16(part) if self.dtype == "bfloat16" else part
        self.done.add(block)
        self._save_progress()

    def _save_progress(self) -> None:
        fresh = self._progress.with_suffix(".new")
        text = json.dumps({"settings": self._settings, "done": sorted(self.done)})
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._progress)

    def finish(self) -> list[Path]:
        """Put the stores in their place, each with its manifest."""
        for name in self.layers:
            path = self.aside / f"{name}.zarr"
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.parent != path)
            manifest = {str(p.relative_to(path)): [p.stat().st_size, _sha256(p)] for p in files}
            zarr.open_group(path, mode="r+").attrs[_MANIFEST] = manifest
            for file in (*files, path / "zarr.json"):
                _sync(file)
            path.rename(self.folder / path.name)
        shutil.rmtree(self.aside)
        return [self.folder / f"{name}.zarr" for name in self.layers]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_difference(found: Any, asked: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in {**found, **asked}:
            if found.get(key) != json.loads(json.dumps(asked.get(key))):
                return _first_difference(
                    found.get(key), asked.get(key), f"{where}.{key}".strip(".")
                )
    return f"{where}: {found!r} there, {asked!r} asked for"


def finished(folder: Path, name: str, extraction: dict[str, Any]) -> bool:
    """Whether the store `name` is there already, whole and of this extraction.

    Raises:
      InputError: there is one of another extraction, or a damaged one.
    """
    path = folder / f"{name}.zarr"
    if not path.exists():
        return False
    found = open(path).extraction["identity"]
    if found != extraction["identity"]:
        raise InputError(
            f"{path} is of another extraction (model, input, preprocessing, pooling or dtype "
            "differ; see uns['extraction'] in it): give another --output, or --overwrite"
        )
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else fills the folder meanwhile; ends with the process. No lock where there are none.

    Raises:
      InputError: another process fills it, or it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is being filled by another process") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def export_npy(path: Path) -> list[Path]:
    """NAME.npy beside NAME.names.txt, one name a line (of tokens: cell, tab, gene)."""
    store = open(path)
    target, names = path.with_suffix(".npy"), path.with_suffix(".names.txt")
    aside = target.with_suffix(".npy.writing")
    out = np.lib.format.open_memmap(aside, mode="w+", dtype=store.X.dtype, shape=store.shape)
    for start in range(0, store.shape[0], store.X.chunks[0]):
        rows = slice(start, start + store.X.chunks[0])
        out[rows] = store.X[rows]
    out.flush()
    aside.replace(target)
    if store.extraction["pooling"] == "tokens":
        lines = [f"{c}\t{g}" for c, g in zip(store.obs["cell"], store.obs["gene"], strict=True)]
    else:
        lines = [str(name) for name in store.obs.index]
    names.write_text("\n".join(lines) + "\n")
    return [target, names]


def layer_name(layer: int | str) -> str:
    """layer_03, embedding or latent: what a store is called."""
    return f"layer_{layer:02d}" if isinstance(layer, int) else layer


def describe_files(paths: Sequence[Path]) -> str:
    """One line a store, for the end of the program."""
    sizes = [sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in paths]
    lines = [f"  {path}  {size / 2**20:.1f} MiB" for path, size in zip(paths, sizes, strict=True)]
    return "\n".join(lines) or listed([])

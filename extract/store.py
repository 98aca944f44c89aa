"""The extraction store: one layer of a model for all cells, an AnnData on zarr.

NAME.zarr   X [rows, d_model]; obs: the file's rows, order and names (under pooling "tokens": the
            columns cell and gene); uns["extraction"]: where it comes from. `anndata.read_zarr`
            reads it, and so does sae_jax.

Chunks carry crc32c, and one that is missing reads as NaN. A deleted or cut chunk would still go
unnoticed, so there is a manifest of every file, written last. While it grows a store lies in
`.extracting`, beside the list of blocks that are done.
"""

import contextlib
import dataclasses
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

from extract import disk, lock, manifest
from extract.errors import InputError, counted, listed, reading
from extract.hashing import rows_hash
from extract.progress import Progress
from extract.provenance import differences

DTYPES = ("float32", "bfloat16", "float16")
_CHUNK_BYTES = 4 << 20
BLOCK_BYTES = 512 << 20  # of output, all layers together: what is in memory at a time
BLOCK_CELLS = 4096  # at most; their expression is in memory too
EXPORTING = ".exporting"  # where `export` writes aside
EXPORTED = (".npy", ".names.txt")  # what it leaves beside a store


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
        manifest.check(self.path, "full")


def open(path: str | os.PathLike[str], level: manifest.Level = "size") -> Store:
    """Open a store lazily, after a check: its files are there and whole, its names are those that
    were written, and the ends of X are finite (but for cells that are named as empty).

    level: "size": of every file; "full": every byte.

    Raises:
      InputError: no store, one that is unfinished or damaged.
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise InputError(f"{path} is no extraction store (there is no zarr.json in it)")
    try:
        manifest.check(path, level)
        root = zarr.open_group(path, mode="r")
        x, obs = root["X"], anndata.io.read_elem(root["obs"])
        extraction = anndata.io.read_elem(root["uns/extraction"])
        if (
            len(obs) != x.shape[0]
            or rows_hash(obs, extraction["pooling"]) != extraction["obs_names_sha256"]
        ):
            raise InputError(f"{path}: obs does not belong to X: extract it again")
        for rows in (slice(0, x.chunks[0]), slice(max(0, len(obs) - x.chunks[0]), None)):
            if _not_finite(x[rows], obs.iloc[rows], extraction):
                raise InputError(f"{path}: X holds NaN or infinite values: extract it again")
    except InputError:
        raise
    except Exception as error:  # zarr's and anndata's kinds are many
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged: {reason}") from None
    return Store(path, x, obs, extraction)


def _not_finite(values: np.ndarray, obs: pd.DataFrame, extraction: dict[str, Any]) -> list[str]:
    """Cells with values that are not finite, but for those that are named as empty."""
    bad = obs.iloc[np.flatnonzero(~np.isfinite(values).all(axis=1))]
    names = bad["cell"] if extraction["pooling"] == "tokens" else bad.index
    empty = set(extraction["empty_cells"])
    return [name for name in dict.fromkeys(map(str, names)) if name not in empty]


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 (nearest, ties to even) and kept as float32, which every reader
    knows: its two low bytes are zero and compress to nothing."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


@dataclasses.dataclass(frozen=True)
class Block:
    """What is computed and written together: positions of its cells, and of their rows."""

    number: int
    cells: slice
    rows: slice


class Writer:
    """Several stores of the same rows, filled a block at a time; continues after a kill.

    An unfinished extraction in the folder goes on, with its own layers and blocks, if it is of the
    same identity.

    Args:
      folder: where the stores will lie.
      layers: their names, and which layer each is.
      obs: of the rows.
      width: of a row.
      extraction: of all layers, in JSON's types, with its `identity`.
      dtype: one of `DTYPES`.
      rows: how many rows each cell has, int64 [cells]; None: one.
      overwrite: whether an extraction of another identity is replaced.

    Raises:
      InputError: the folder holds an extraction of another identity, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        layers: dict[str, int | str],
        obs: pd.DataFrame,
        width: int,
        extraction: dict[str, Any],
        dtype: str,
        *,
        rows: np.ndarray | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.aside = folder, folder / ".extracting"
        self.layers, self.dtype = layers, dtype
        self._obs, self._extraction, self._width = obs, extraction, width
        self._rows = np.ones(len(obs), np.int64) if rows is None else rows
        self._progress = self.aside / "progress.json"
        self._chunk_rows, self._bounds = self._cut(len(layers))
        self.done: set[int] = set()
        goes_on = self._progress.is_file() and self._goes_on(overwrite)
        for name in self.layers:  # also those that an earlier command asked for
            finished(folder, name, extraction, overwrite=overwrite)
        if not goes_on:
            self._begin()
        ends = np.concatenate([[0], np.cumsum(self._rows)])[self._bounds].tolist()
        self.blocks = [
            Block(i, slice(*self._bounds[i : i + 2]), slice(*ends[i : i + 2]))
            for i in range(len(ends) - 1)
        ]
        with (
            zarr.config.set({"array.write_empty_chunks": True}),  # of empty cells: all NaN
            reading(self.aside, "is damaged, give --overwrite"),
        ):
            self._arrays = {
                name: zarr.open_group(self.aside / f"{name}.zarr", mode="r+")["X"]
                for name in self.layers
            }
        self._take_stock()

    def _cut(self, n_layers: int) -> tuple[int, list[int]]:
        """Rows of a chunk, and where blocks of cells begin and end.

        Where cells have a row each, blocks are whole chunks: none is written to again once it is
        remembered, so that losing power costs no block that was done.
        """
        itemsize = 2 if self.dtype == "float16" else 4
        most = BLOCK_BYTES // (self._width * 4 * n_layers)
        chunk = max(1, min(len(self._obs), _CHUNK_BYTES // (self._width * itemsize)))
        if (self._rows == 1).all():
            chunk = max(1, min(chunk, most, BLOCK_CELLS))
            most = max(chunk, min(most, BLOCK_CELLS) // chunk * chunk)
        return chunk, _bounds(self._rows, most)

    def _goes_on(self, overwrite: bool) -> bool:
        """Take up what is there, unless it is to be replaced."""
        try:
            found = Progress.load(self._progress)
        except InputError as error:
            if overwrite:
                return False
            raise InputError(f"{error}; give --overwrite to begin anew") from None
        if found.extraction.get("identity") != self._extraction["identity"]:
            if overwrite:
                return False
            raise InputError(
                f"{self.folder} holds an unfinished extraction of other settings "
                f"({differences(found.extraction, self._extraction)}): finish it, give another "
                "--output, or --overwrite"
            )
        chunk, bounds = self._cut(len(found.layers))
        if bounds != found.bounds:
            if overwrite:
                return False
            raise InputError(
                f"{self.aside} was begun by another version, in other blocks: finish it with that, "
                "or give --overwrite to begin anew"
            )
        # Killed in `finish`, some have been moved.
        there = {k: v for k, v in found.layers.items() if (self.aside / f"{k}.zarr").exists()}
        self.layers, self.done = there, set(found.done)
        self._chunk_rows, self._bounds = chunk, bounds
        for partial in self.aside.rglob("*.partial"):  # of zarr, killed while it wrote
            partial.unlink()
        return True

    def _begin(self) -> None:
        """Stores without values, on the disk, and the list of no block; or nothing at all."""
        shutil.rmtree(self.aside, ignore_errors=True)
        size = len(self._obs) * self._width * (2 if self.dtype == "float16" else 4)
        try:
            for name, layer in self.layers.items():
                with disk.named(self.folder / f"{name}.zarr", size):
                    self._create(name, {**self._extraction, "layer": layer})
                    root = self.aside / f"{name}.zarr"
                    for path in (*root.rglob("*"), root):
                        manifest.sync(path)
            self._save_progress()
        except BaseException:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise

    def _create(self, name: str, extraction: dict[str, Any]) -> None:
        root = zarr.open_group(self.aside / f"{name}.zarr", mode="w", zarr_format=3)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        kind = np.dtype("float16" if self.dtype == "float16" else "float32")
        shuffle = zarr.codecs.BloscCodec(
            cname="zstd", clevel=1, shuffle="shuffle", typesize=kind.itemsize
        )
        x = root.create_array(
            "X",
            shape=(len(self._obs), self._width),
            chunks=(self._chunk_rows, self._width),
            dtype=kind,
            fill_value=np.nan,  # never zeros, which could be taken for values
            compressors=[shuffle, zarr.codecs.Crc32cCodec()],
        )
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        var = pd.DataFrame(index=[f"d{i}" for i in range(self._width)])
        parts = {"obs": self._obs, "var": var, "uns": {"extraction": extraction}}
        parts |= {key: {} for key in ("layers", "obsm", "varm", "obsp", "varp")}
        checked = {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]}
        with warnings.catch_warnings():  # of anndata about a default to come
            warnings.filterwarnings("ignore", message=".*autosharding")
            for key, part in parts.items():
                anndata.io.write_elem(root, key, part, dataset_kwargs=checked)

    def write(self, block: int, rows: slice, values: dict[str, np.ndarray]) -> None:
        """Rows of every layer, by its name; on disk before `block` is remembered as done.

        Raises:
          InputError: values that are not finite, of a cell that is not empty.
        """
        for name, array in self._arrays.items():
            part = self._narrow(values[name])
            if cells := _not_finite(part, self._obs.iloc[rows], self._extraction):
                some = counted(len(cells), "cell")
                raise InputError(
                    f"{name}: the rows of {some} hold NaN or infinite values as {self.dtype} "
                    f"({listed(cells)}); leave these cells out, or give wider --dtype and "
                    "--store_dtype if it is for them"
                )
            with disk.named(self.folder / f"{name}.zarr", part.nbytes):
                array[rows] = part
                for number in self._chunks(name, rows):
                    file = self._chunk(name, number)
                    for path in (file, file.parent, file.parent.parent):
                        manifest.sync(path)
        self.done.add(block)
        self._save_progress()

    def _narrow(self, values: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            return to_bfloat16(values)
        with np.errstate(over="ignore"):  # refused as infinite
            return values.astype(self.dtype, copy=False)

    def _chunk(self, name: str, number: int) -> Path:
        key = self._arrays[name].metadata.encode_chunk_key((number, 0))
        return self.aside / f"{name}.zarr" / "X" / key

    def _chunks(self, name: str, rows: slice) -> range:
        step = self._arrays[name].chunks[0]
        return range(rows.start // step, -(-rows.stop // step))

    def _take_stock(self) -> None:
        """Blocks of which a chunk is gone are to be done again. A damaged chunk that one of these
        would go on with is deleted: what other blocks had in it is gone, too."""
        self.done -= self._missing()
        while damaged := self._damaged():
            for file in damaged:
                file.unlink()
            self.done -= self._missing()

    def _missing(self) -> set[int]:
        """Blocks of which a chunk is not there."""
        missing = set()
        for name, array in self._arrays.items():
            every = self._chunks(name, slice(0, array.shape[0]))
            gone = [not self._chunk(name, number).is_file() for number in every]
            missing |= {
                block.number
                for block in self.blocks
                if any(gone[number] for number in self._chunks(name, block.rows))
            }
        return missing

    def _damaged(self) -> list[Path]:
        """Chunks with rows of blocks that are to be done which are there and cannot be read."""
        todo = [block.rows for block in self.blocks if block.number not in self.done]
        return [
            self._chunk(name, number)
            for name in self._arrays
            for number in sorted({n for rows in todo for n in self._chunks(name, rows)})
            if self._chunk(name, number).is_file() and not self._readable(name, number)
        ]

    def _readable(self, name: str, number: int) -> bool:
        array = self._arrays[name]
        begin = number * array.chunks[0]
        try:
            with reading(self._chunk(name, number)):  # codecs have exceptions of their own
                array[begin : begin + array.chunks[0]]
        except InputError:
            return False
        return True

    def _save_progress(self) -> None:
        Progress(self._extraction, self.layers, self._bounds, sorted(self.done)).save(
            self._progress
        )

    def finish(self) -> list[Path]:
        """Put the stores in their place, each with its manifest.

        Raises:
          InputError: a chunk is not there; its block is no longer remembered as done.
        """
        self.done -= self._missing()
        if undone := len(self.blocks) - len(self.done):
            self._save_progress()
            raise InputError(
                f"{self.aside}: {undone} of {len(self.blocks)} blocks are missing, though they "
                "were written (were files deleted?); give the same command again"
            )
        self._remove_exports()
        for name in self.layers:
            path, target = self.aside / f"{name}.zarr", self.folder / f"{name}.zarr"
            with disk.named(target):
                manifest.write(path)
            if target.exists():  # to be overwritten, or `finished` had refused it
                target.rename(self.aside / f"{name}.replaced")
            path.rename(target)
        manifest.sync(self.folder)
        shutil.rmtree(self.aside)
        return [self.folder / f"{name}.zarr" for name in self.layers]

    def _remove_exports(self) -> None:
        """Arrays exported of the stores that were here before: they would be of other cells."""
        ours = {f"{name}{end}" for name in self.layers for end in EXPORTED}
        if names := ours & set(manifest.entries(self.folder)):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            manifest.note(self.folder, names, self.aside)


def _bounds(rows: np.ndarray, most: int) -> list[int]:
    """Where blocks of cells begin and end: `most` rows and BLOCK_CELLS cells, or one cell."""
    ends = np.cumsum(rows)
    bounds = [0]
    while bounds[-1] < len(rows):
        begin = bounds[-1]
        before = ends[begin - 1] if begin else 0
        fit = int(np.searchsorted(ends, before + most, side="right"))
        bounds.append(min(max(fit, begin + 1), begin + BLOCK_CELLS, len(rows)))
    return bounds


def finished(
    folder: Path, name: str, extraction: dict[str, Any], *, overwrite: bool = False
) -> bool:
    """Whether the store `name` is there already, whole and of this extraction.

    Raises:
      InputError: there is one of another extraction, or a damaged one, that is not to be
        overwritten; or something that is no store at all.
    """
    path = folder / f"{name}.zarr"
    if not path.exists():
        return False
    if not (path / "uns/extraction").is_dir():
        raise InputError(
            f"{path} is in the way and no extraction store: move it, or give another --output"
        )
    try:
        found = open(path).extraction
    except InputError as error:
        if overwrite:
            return False
        raise InputError(f"{error} (--overwrite replaces it)") from None
    if found["identity"] == extraction["identity"]:
        return True
    if overwrite:
        return False
    raise InputError(
        f"{path} is of another extraction ({differences(found, extraction)}): give another "
        "--output, or --overwrite"
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made yet.

    Raises:
      InputError: see above.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{folder} cannot be written to ({there} is no folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to (permission denied for {there})")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else fills the folder meanwhile: see `lock.held`.

    What a kill left that is of no use is deleted.

    Raises:
      InputError: another process fills it, which is named, or it cannot be made or written to.
    """
    check_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror})") from None
    with contextlib.ExitStack() as stack:
        with disk.named(folder / lock.NAME):
            stack.enter_context(lock.held(folder))
        aside = folder / ".extracting"
        if aside.is_dir() and not (
            (aside / "progress.json").is_file() and any(aside.glob("*.zarr"))
        ):
            shutil.rmtree(aside)  # killed when it had just begun, or was done but for this
        shutil.rmtree(folder / EXPORTING, ignore_errors=True)
        yield


def layer_name(layer: int | str) -> str:
    """layer_03, embedding or latent: what a store is called."""
    return f"layer_{layer:02d}" if isinstance(layer, int) else layer


def describe_files(paths: Sequence[Path]) -> str:
    """One line a store, for the end of the program."""
    sizes = [sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in paths]
    lines = [f"  {path}  {size / 2**20:.1f} MiB" for path, size in zip(paths, sizes, strict=True)]
    return "\n".join(lines) or listed([])

"""Arrays of a run on disk, made once: activations by feature and by cell, metadata, AUROCs, maps.

A folder with meta.json and one raw file an array, which is mapped into memory for as long as it is
used, so that what was read once does not stay. It is known by a key, a hash of what it was made of,
and called by its first 16 digits: another run gets a folder of its own. The three that were opened
last stay, and any that some process has open.

    by_cell.*, by_feature.*   activations: indptr, and features or cells and values of the entries
    sum, square, maximum      of each feature's activations
    cells.*                   names of the cells; metadata.<i>.* and map.<i>: their columns and maps
    auroc, of_label           [features, labels]: of every label of every column, and active cells
    decoder                   unit rows [features, d]
    (inverted.py)             which features a gene drives, a term names, and so on
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from scipy import sparse

from analysis import features
from analysis.browser.folder import BLOCK, Folder
from sae_jax import InputError, files

VERSION = 5  # of what lies in the folder
MOST_VALUES = 1000  # a column of text with more values names cells rather than groups of them
RANGE = 65535  # of coordinates on the wire
KEPT = 3  # indices of other runs, or of this run as it was
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Index:
    """The arrays of a folder, by name.

    The folder is held: whatever then lies at its path, these are its arrays, and `opened` does not
    remove it.

    Raises:
      OSError, ValueError, KeyError: there is no whole index at the path.
    """

    def __init__(self, path: Path) -> None:
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self._folder)
        with contextlib.suppress(OSError):  # file systems without locks: see `_remove_oldest`
            fcntl.flock(self._folder, fcntl.LOCK_SH)
        with self._open("meta.json") as file:
            self.meta = json.load(file)
        self._arrays = self.meta["arrays"]
        for name, (dtype, shape) in self._arrays.items():
            size = os.stat(name, dir_fd=self._folder).st_size
            if size != np.dtype(dtype).itemsize * int(np.prod(shape)):
                raise ValueError(f"{path / name} has another size than it was written with")

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape = self._arrays[name]
        if 0 in shape:
            return np.empty(shape, dtype)
        with self._open(name) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype).reshape(shape)

    def _open(self, name: str) -> IO[bytes]:
        return open(
            name, "rb", opener=lambda name, flags: os.open(name, flags, dir_fd=self._folder)
        )

    def texts(self, name: str) -> Texts:
        """Texts that `Writer.texts` wrote."""
        return Texts(self[f"{name}.text"], self[f"{name}.start"])

    def entries(self, side: str, which: int) -> tuple[np.ndarray, np.ndarray]:
        """The active cells of a feature (side "by_feature"), rising, or the features of a cell
        ("by_cell"), and their activations."""
        first, last = self[f"{side}.indptr"][which : which + 2].tolist()
        return self[f"{side}.indices"][first:last], self[f"{side}.values"][first:last]

    def matrix(self, side: str, first: int, last: int) -> sparse.csr_array:
        """Some features by cells, or some cells by features; float64."""
        indptr = self[f"{side}.indptr"][first : last + 1]
        some = slice(int(indptr[0]), int(indptr[-1]))
        n = {"by_feature": self.meta["n_cells"], "by_cell": self.meta["n_features"]}[side]
        values = self[f"{side}.values"][some].astype(np.float64)
        parts = (values, self[f"{side}.indices"][some].astype(np.int32), indptr - indptr[0])
        return sparse.csr_array(parts, shape=(last - first, n))


class Texts:
    """Texts that stay on disk."""

    def __init__(self, text: np.ndarray, start: np.ndarray) -> None:
        self._text, self._start = text, start

    def __len__(self) -> int:
        return len(self._start) - 1

    def __getitem__(self, i: int) -> str:
        return self._text[self._start[i] : self._start[i + 1]].tobytes().decode(errors="replace")

    def find(self, part: str, most: int) -> list[int]:
        """The first texts that hold a part, as it is written."""
        found: list[int] = []
        wanted = part.encode(errors="replace")
        if not wanted or not len(self._text):
            return found
        content = memoryview(self._text)
        step = 1 << 24
        for first in range(0, len(content), step):
            # Whatever begins in this step; a text longer than the overlap is cut there.
            piece = bytes(content[first : first + step + len(wanted) - 1])
            at = piece.find(wanted)
            while at >= 0 and len(found) < most:
                which = int(np.searchsorted(self._start, first + at, "right")) - 1
                within = first + at + len(wanted) <= self._start[which + 1]
                if within and which not in found[-1:]:
                    found.append(which)
                at = piece.find(wanted, at + 1)
        return found


class UnwrittenError(Exception):
    """What was not written, and why: no OSError, so that it is not taken for one of reading.

    wanted: bytes of the whole index, about; None: not known.
    """

    def __init__(self, cause: OSError, wanted: int | None) -> None:
        super().__init__(str(cause))
        self.cause, self.wanted = cause, wanted


class Writer:
    """A folder of arrays in the making.

    wanted: how many bytes it will have, about, where known.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._arrays = path, {}
        self.wanted: int | None = None
        with self.writing():
            path.mkdir()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Whatever else writes to the folder; raises UnwrittenError."""
        try:
            yield
        except OSError as error:
            raise UnwrittenError(error, self.wanted) from None

    def save(self, name: str, array: np.ndarray) -> None:
        """A whole array."""
        self._write(name, array, "wb")
        self._arrays[name] = (array.dtype.str, array.shape)

    def append(self, name: str, array: np.ndarray) -> None:
        """More rows of an array."""
        self._write(name, array, "ab")
        rows = self._arrays[name][1][0] if name in self._arrays else 0
        self._arrays[name] = (array.dtype.str, (rows + len(array), *array.shape[1:]))

    def _write(self, name: str, array: np.ndarray, mode: str) -> None:
        # Not tofile, which is silent about a disk that is full when the file is closed.
        with self.writing(), (self.path / name).open(mode) as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        """Some rows of an array of one dimension."""
        dtype = np.dtype(self._arrays[name][0])
        with (self.path / name).open("rb") as file:
            return np.fromfile(file, dtype, last - first, offset=first * dtype.itemsize)

    def texts(self, name: str, texts: Sequence[str]) -> None:
        """Texts, to be read one by one."""
        encoded = [str(text).encode(errors="replace") for text in texts]
        start = np.concatenate([[0], np.cumsum([len(text) for text in encoded], dtype=np.int64)])
        self.save(f"{name}.text", np.frombuffer(b"".join(encoded), np.uint8))
        self.save(f"{name}.start", start.astype(np.int64))

    def finish(self, **meta: Any) -> None:
        """Writes meta.json, last."""
        text = json.dumps({**meta, "arrays": self._arrays})
        with self.writing():
            (self.path / "meta.json").write_text(text)


def opened(folder: Path, key: str, make: Callable[[Path], None]) -> Index:
    """The index of a key, in a folder of its own within `folder`; where there is none, `make`
    writes it to a path given.

    Of processes that want one at the same time the first makes it and the others wait. What is left
    of earlier ones, killed or of other keys, is then removed; see above.

    Raises:
      InputError: it cannot be made, or not be written.
    """
    path = folder / key[:16]
    if found := _read(path, key):
        return found
    try:
        with _alone(folder):
            if found := _read(path, key):  # made meanwhile
                return found
            files.remove_leftovers(folder)
            _remove_oldest(folder, besides=path)
            with files.write_aside(path) as fresh:
                make(fresh)
        return Index(path)
    except UnwrittenError as error:
        raise _unwritten(folder, error.cause, error.wanted) from None
    except OSError as error:  # as `write_aside` tells it, perhaps
        wanted = error.__cause__.wanted if isinstance(error.__cause__, UnwrittenError) else None
        raise _unwritten(folder, error, wanted) from None


def _read(path: Path, key: str) -> Index | None:
    """A whole index of this very key."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = Index(path)
        if found.meta["key"] == key:
            with contextlib.suppress(OSError):
                os.utime(path)  # opened last
            return found
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is here, and keeps others out; it ends with the process. Where
    the file system has no such locks, nothing is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_oldest(folder: Path, besides: Path) -> None:
    """All indices of other keys but those opened last, and those that some process holds."""
    others = [path for path in folder.iterdir()
              if re.fullmatch("[0-9a-f]{16}", path.name) and path != besides]  # fmt: skip
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in others[KEPT - 1 :]:
        handle = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # held, or not to be locked
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                files.remove(path)
        finally:
            os.close(handle)


def _unwritten(folder: Path, error: OSError, wanted: int | None) -> InputError:
    """What to say of an index that cannot be written."""
    if error.errno not in NO_ROOM:
        return InputError(
            f"the browser's index cannot be written to {folder} ({error}): give another folder for "
            "its state, --state=DIR."
        )
    needs = "" if wanted is None else f" needs about {wanted / 1e6:,.1f} MB and"
    return InputError(
        f"there is no room in {folder.parent}: the browser's index{needs} does not fit "
        f"({shutil.disk_usage(folder.parent).free / 1e6:,.1f} MB are free; {error.strerror}). Free "
        "some, or give another folder for its state, --state=DIR."
    )


def write_cells(
    writer: Writer, opened: Sequence[Folder], taken: Sequence[np.ndarray], n_features: int
) -> dict[str, Any]:
    """All that is known cell by cell: activations, names, metadata, maps, AUROCs.

    Args:
      opened: folders of the same cells.
      taken: of each the number in the run of each of its features, -1 for those not to be taken.

    Returns:
      For meta.json: n_cells, columns, maps, skipped (what was no map, and why).
    """
    cells = opened[0].cells
    n_cells = 0 if cells is None else len(cells)
    if n_cells:
        _write_by_cell(writer, opened, taken, n_features)
        writer.texts("cells", cells)
    labels = {label for folder in opened for label in folder.labels()}
    columns = [
        {"name": name} | _write_column(writer, f"metadata.{i}", column, name in labels)
        for i, (name, column) in enumerate(_metadata(opened).items())
    ]
    maps, skipped = [], {}
    found = {name: held for folder in reversed(opened) for name, held in folder.maps()}
    for name, coordinates in found.items():
        if not np.isfinite(coordinates).all():
            skipped[name] = f"{name} has cells without coordinates, so it is not shown."
            continue
        codes, ranges = scaled(coordinates)
        writer.save(f"map.{len(maps)}", codes)
        maps.append({"name": name, "ranges": ranges})
    if n_cells:
        labels = [(i, column) for i, column in enumerate(columns) if column["kind"] == "category"]
        _write_by_feature(writer, n_cells, n_features, labels)
    return {"n_cells": n_cells, "columns": columns, "maps": maps, "skipped": skipped}


def scaled(coordinates: np.ndarray) -> tuple[np.ndarray, list[list[float]]]:
    """Finite coordinates [points, 2] as uint16 [2, points] over their ranges, and these."""
    if not len(coordinates):
        return np.empty((2, 0), np.uint16), [[0.0, 1.0], [0.0, 1.0]]
    values = coordinates.astype(np.float64).T
    low, high = values.min(axis=1), values.max(axis=1)
    high = np.where(high > low, high, low + 1)
    share = (values - low[:, None]) / (high - low)[:, None]
    return np.rint(share * RANGE).astype(np.uint16), np.stack([low, high], axis=1).tolist()


def _metadata(opened: Sequence[Folder]) -> dict[str, pd.Series]:
    """The columns of obs of all folders; of those of one name the first."""
    found: dict[str, pd.Series] = {}
    for folder in opened:
        for name, column in folder.obs().items():
            found.setdefault(str(name), column)
    return found


def _write_column(
    writer: Writer, name: str, column: pd.Series, is_label: bool = False
) -> dict[str, Any]:
    """A column of obs: "number" (unless a program took it for labels), "category" or, where most
    cells have their own text, "name"."""
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if numeric and not is_label:
        writer.save(name, column.to_numpy(np.float64, na_value=np.nan))
        return {"kind": "number"}
    known = pd.Categorical(column).categories
    texts = column.astype(object).map(str, na_action="ignore")
    order = list(dict.fromkeys(map(str, known)))
    label = pd.Categorical(texts, categories=order).remove_unused_categories()
    values = label.categories.astype(str).tolist()
    most = MOST_VALUES if is_label else min(MOST_VALUES, max(2, len(column) // 2))
    if len(values) > most:
        writer.texts(name, texts.fillna("").tolist())
        return {"kind": "name"}
    missing = len(values) if (label.codes < 0).any() else None
    codes = np.where(label.codes < 0, len(values), label.codes)
    writer.save(name, codes.astype(smallest(len(values) + 1)))
    return {"kind": "category", "categories": values, "missing": missing}


def smallest(n: int) -> type[np.unsignedinteger]:
    """The smallest type of codes below n."""
    return np.uint8 if n <= 1 << 8 else np.uint16 if n <= 1 << 16 else np.uint32


def _write_by_cell(
    writer: Writer, opened: Sequence[Folder], taken: Sequence[np.ndarray], n_features: int
) -> None:
    """Activations row by row, in parts; of a feature in several folders the first one's."""
    starts = [0]
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(folder.activations()) for folder in opened]
        bounds = sum(source.indptr for source in sources)
        writer.wanted = 16 * int(bounds[-1])  # number and value of every entry, twice
        first, n_cells = 0, len(bounds) - 1
        while first < n_cells:
            last = int(np.searchsorted(bounds, bounds[first] + BLOCK, "right")) - 1
            last = max(first + 1, min(last, n_cells))
            block = sparse.csr_array((last - first, n_features), dtype=np.float32)
            for source, numbers in zip(sources, taken, strict=True):
                rows = source.rows(first, last).tocoo()
                feature = numbers[rows.col]
                ours = feature >= 0
                entries = (rows.data[ours], (rows.row[ours], feature[ours]))
                block = block + sparse.csr_array(entries, shape=block.shape)
            block.sort_indices()
            writer.append("by_cell.indices", block.indices.astype(np.uint32))
            writer.append("by_cell.values", block.data.astype(np.float32))
            starts += (starts[-1] + block.indptr[1:].astype(np.int64)).tolist()
            first = last
    writer.save("by_cell.indptr", np.asarray(starts, np.int64))


def _write_by_feature(
    writer: Writer, n_cells: int, n_features: int, labels: list[tuple[int, dict[str, Any]]]
) -> None:
    """The same feature by feature: some at a time, gathered from all cells; and their AUROCs."""
    indptr = writer.read("by_cell.indptr", 0, n_cells + 1)
    total = int(indptr[-1])
    count = np.zeros(n_features, np.int64)
    for first in range(0, total, BLOCK):
        some = writer.read("by_cell.indices", first, min(first + BLOCK, total))
        count += np.bincount(some, minlength=n_features)
    starts = np.concatenate([[0], np.cumsum(count)])
    writer.save("by_feature.indptr", starts)
    one_hot = [
        OneHot(writer.read(f"metadata.{i}", 0, n_cells), len(column["categories"]))
        for i, column in labels
    ]
    sums = np.zeros((2, n_features))
    maximum = np.zeros(n_features, np.float32)
    low = 0
    while low < n_features:
        high = int(np.searchsorted(starts, starts[low] + 2 * BLOCK, "right")) - 1
        high = max(low + 1, min(high, n_features))
        cell, feature, value = _gather(writer, indptr, low, high)
        order = np.argsort(feature.astype(np.min_scalar_type(n_features)), kind="stable")
        writer.append("by_feature.indices", cell[order].astype(np.uint32))
        writer.append("by_feature.values", value[order])
        for power, held in enumerate(sums, start=1):
            held[low:high] = np.bincount(feature, value.astype(np.float64) ** power, high - low)
        np.maximum.at(maximum[low:high], feature, value)
        for part in _parts(starts, low, high):
            some = slice(starts[part.start] - starts[low], starts[part.stop] - starts[low])
            own = starts[part.start : part.stop + 1] - starts[part.start]
            parts = (value[order[some]].astype(np.float64), cell[order[some]], own)
            columns = sparse.csc_array(parts, shape=(n_cells, part.stop - part.start))
            areas, active = label_areas(columns, one_hot)
            writer.append("auroc", areas.astype(np.float32))
            writer.append("of_label", active.astype(np.uint32))
        low = high
    for name, held in {"sum": sums[0], "square": sums[1], "maximum": maximum}.items():
        writer.save(name, held)


def _parts(starts: np.ndarray, low: int, high: int) -> Iterator[slice]:
    """Features low to high, so many at a time as have few entries and make a small table."""
    while low < high:
        end = int(np.searchsorted(starts, starts[low] + BLOCK // 2, "right")) - 1
        end = max(low + 1, min(end, high, low + 1024))
        yield slice(low, end)
        low = end


def _gather(
    writer: Writer, indptr: np.ndarray, low: int, high: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, features less `low`, and values of all entries of features low to high; cells rise."""
    found = []
    for first in range(0, int(indptr[-1]), BLOCK):
        last = min(first + BLOCK, int(indptr[-1]))
        feature = writer.read("by_cell.indices", first, last)
        ours = np.flatnonzero((feature >= low) & (feature < high))
        cell = np.searchsorted(indptr, first + ours, "right") - 1
        value = writer.read("by_cell.values", first, last)[ours]
        found.append((cell.astype(np.int32), (feature[ours] - low).astype(np.int32), value))
    if not found:
        return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
    cells, numbers, values = (np.concatenate(part) for part in zip(*found, strict=True))
    return cells, numbers, values


class OneHot:
    """Labels of cells as a matrix [labelled cells, labels]; codes from n on are missing."""

    def __init__(self, codes: np.ndarray, n: int) -> None:
        labelled = codes < n
        self.labelled = None if labelled.all() else np.flatnonzero(labelled)
        own = codes[labelled]
        ones = (np.ones(len(own)), own.astype(np.int32), np.arange(len(own) + 1))
        self.matrix = sparse.csr_array(ones, shape=(len(own), n))
        self.size = np.bincount(own, minlength=n).astype(np.float64)


def label_areas(
    columns: sparse.csc_array, labels: Sequence[OneHot]
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of every feature for every label against the other labels of its column, and how many
    cells of the label are active; both [features, labels of all columns].

    As `features.auroc`, but all columns of labels share the ranks. NaN for the only label of a
    column.
    """
    shared = None
    areas, active = [], []
    for label in labels:
        own = columns
        if label.labelled is None:
            shared = shared or features.ranks(columns)
            above, zero = shared
        else:
            own = columns[label.labelled]
            above, zero = features.ranks(own)
        n, size = own.shape[0], label.size
        rank_sum = (above.T @ label.matrix).toarray() + zero[:, None] * size
        pairs = size * (n - size)
        u = rank_sum - size * (size + 1) / 2
        areas.append(np.divide(u, pairs, out=np.full(u.shape, np.nan), where=pairs > 0))
        ones = sparse.csc_array((np.ones(own.nnz), own.indices, own.indptr), shape=own.shape)
        active.append((ones.T @ label.matrix).toarray())
    if not labels:
        return np.empty((columns.shape[1], 0)), np.empty((columns.shape[1], 0))
    return np.hstack(areas), np.hstack(active)

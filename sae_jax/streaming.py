"""Rows that need not fit in memory: read by slices, in a shuffled order, one buffer ahead."""

import copy
import dataclasses
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from sae_jax.errors import InputError
from sae_jax.reading import reading

BLOCK = 256  # rows that stay together when blocks are permuted
_GAP = 8  # chosen rows that are this near each other are read at once, with those between them
_READ_BYTES = 2**24  # read at once


def float_dtype(dtype: np.dtype) -> np.dtype:
    """What numbers are trained on as: float32, or float64 if they are that already."""
    return np.dtype(np.float64 if dtype.kind == "f" and dtype.itemsize == 8 else np.float32)


def check_matrix(x: Any, name: str, d_in: int | None = None) -> None:
    """Refuses by shape and dtype what is no dense matrix [rows, d_in] of real numbers."""
    if scipy.sparse.issparse(x):
        raise InputError(f"{name} is sparse; give a dense array, {name}.toarray() say")
    shape = tuple(x.shape)
    if len(shape) != 2:
        raise InputError(f"{name} has shape {shape}; it must be [rows, dimensions]")
    if x.dtype.kind not in "iuf" and x.dtype.name != "bfloat16":
        raise InputError(f"{name} has dtype {x.dtype}; it must hold real numbers")
    if d_in is not None and shape[1] != d_in:
        raise InputError(f"{name} has {shape[1]} dimensions, the dictionary has d_in={d_in}")
    if 0 in shape:
        raise InputError(f"{name} is empty: shape {shape}")


def encoding(node: Any) -> str:
    """What anndata calls the node of an h5 or zarr file; "" where it does not say."""
    return str(getattr(node, "attrs", {}).get("encoding-type", ""))


class Csr:
    """A sparse matrix stored by rows in anndata's encoding; indptr, 8 bytes a row, is in memory."""

    def __init__(self, group: Any, shape: Iterable[int]) -> None:
        self.shape = tuple(map(int, shape))
        self.data, self.indices = group["data"], group["indices"]
        self.dtype = self.data.dtype
        self.indptr = np.asarray(group["indptr"][:], np.int64)
        sizes = {self.indptr[-1], self.data.shape[0], self.indices.shape[0]}
        rising = self.indptr[0] == 0 and (np.diff(self.indptr) >= 0).all()
        if len(self.indptr) != self.shape[0] + 1 or len(sizes) > 1 or not rising:
            raise ValueError("indptr, indices, data and shape do not fit each other")

    def __getitem__(self, key: slice) -> np.ndarray:
        first, last = int(self.indptr[key.start]), int(self.indptr[key.stop])
        values = self.data[first:last].astype(float_dtype(self.dtype))  # SciPy has no float16
        parts = values, self.indices[first:last], self.indptr[key.start : key.stop + 1] - first
        matrix = scipy.sparse.csr_matrix(parts, shape=(key.stop - key.start, self.shape[1]))
        matrix.check_format(full_check=True)  # SciPy would follow a wild index out of memory
        return matrix.toarray()


class Npy:
    """An .npy file of which only the slices asked for are read.

    A memory map would end the process (SIGBUS) where the file is cut while it is read.

    Attributes:
      span_rows: the most that a slice may have.
      gap_rows: chosen rows that are this near each other are read at once.
    """

    def __init__(self, path: Path) -> None:
        # NumPy's own refusals. No page of the map is touched.
        header = np.lib.format.open_memmap(path, mode="r")
        self.shape, self.dtype, self._begin = header.shape, header.dtype, header.offset
        self._by_columns = not header.flags.c_contiguous
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        stored, gap = (_READ_BYTES, 2**12) if self._by_columns else (2**20, 2**15)  # measured
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self.span_rows = max(stored // max(row_bytes, 1), 1)
        self.gap_rows = gap // max(self.dtype.itemsize if self._by_columns else row_bytes, 1)

    def __getitem__(self, key: slice) -> np.ndarray:
        rows, d_in = self.shape
        count = key.stop - key.start
        raw = np.empty(count * d_in * self.dtype.itemsize, np.uint8)
        if not self._by_columns:
            self._read(raw, key.start * d_in)
            return raw.view(self.dtype).reshape(count, d_in)
        for column, part in enumerate(raw.reshape(d_in, -1)):
            self._read(part, column * rows + key.start)
        return raw.view(self.dtype).reshape(d_in, count).T

    def read_into(self, out: np.ndarray, first: int) -> None:
        """The rows from `first` on, as many as `out` has."""
        if self._by_columns or out.dtype != self.dtype:
            out[:] = self[first : first + len(out)]
        else:
            self._read(out.reshape(-1).view(np.uint8), first * self.shape[1])

    def _read(self, out: np.ndarray, first: int) -> None:
        """Bytes from the `first` value on."""
        at = self._begin + first * self.dtype.itemsize
        while len(out):
            read = os.preadv(self._file, [out], at)
            if not read:
                size = os.fstat(self._file).st_size
                raise EOFError(f"the file has been cut, it ends after {size:,} bytes")
            out, at = out[read:], at + read


class Rows:
    """A matrix [rows, d_in] of which only the slices asked for are read.

    `rows[a:b]` is a new C-ordered array, float32, or float64 if the file's is; `np.asarray(rows)`
    reads all. Any thread may read; one does at a time.

    Attributes:
      name: what messages call it.
      shape: rows and d_in, as of an array.
      dtype: of what is read.
      chunk_rows: rows that are stored, so decompressed, together; 1 where that is not known.
      block_rows: rows that are read at once, about 16 MiB: whole chunks.
      positions: the rows of the file that are these rows, rising; None: all of them.
      summary: what `data.scan` found out; None before.
    """

    def __init__(self, source: Any, name: str = "rows", positions: Any = None) -> None:
        """Of a NumPy, h5py or zarr array, an `Npy`, or a group that is a CSR matrix.

        Raises:
          InputError: no matrix of real numbers, one stored by columns, or positions that do not
            rise or lie outside.
        """
        with reading(name):
            kind = encoding(source)
        if kind == "csc_matrix":
            raise InputError(
                f"{name} is stored by columns (csc_matrix), so rows cannot be read alone; "
                "store it with tocsr(), or load it into memory"
            )
        if kind == "csr_matrix":
            with reading(name):
                source = Csr(source, source.attrs["shape"])
        elif not hasattr(source, "shape"):
            raise InputError(f"{name} is {kind or 'a group'}, not a matrix")
        with reading(name):
            check_matrix(source, name)
        rows, d_in = source.shape
        self.positions = None if positions is None else _rising(positions, rows, name)
        self.shape = (rows if positions is None else len(self.positions), d_in)
        self.name, self.summary = name, None
        self._source, self._reading = source, threading.Lock()
        self.dtype = float_dtype(source.dtype)
        self.chunk_rows = int((getattr(source, "chunks", None) or (1,))[0])
        chunk_bytes = self.chunk_rows * d_in * self.dtype.itemsize
        self.block_rows = max(_READ_BYTES // chunk_bytes, 1) * self.chunk_rows

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows once they are read."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def take(self, positions: Any) -> "Rows":
        """The rows at rising positions among these, of the same file."""
        within = _rising(positions, len(self), self.name)
        chosen = copy.copy(self)
        chosen.positions = within if self.positions is None else self.positions[within]
        chosen.shape, chosen.summary = (len(within), self.shape[1]), None
        return chosen

    def __getitem__(self, key: slice) -> np.ndarray:
        if not isinstance(key, slice) or key.step not in (None, 1):
            raise TypeError(f"{self.name} is read by slices [first:last], not {key!r}")
        start, stop, _ = key.indices(len(self))
        return self.read([(start, max(start, stop))])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)  # a copy in any case

    def read(self, ranges: Iterable[tuple[int, int]]) -> np.ndarray:
        """The rows of ranges (first, after the last), one below another, [rows, d_in].

        Raises:
          InputError: the file is damaged there, or no longer finite.
        """
        ranges = list(ranges)
        begins = np.cumsum([0] + [stop - start for start, stop in ranges]).tolist()
        read = np.empty((begins[-1], self.shape[1]), self.dtype)
        for begin, (start, stop) in zip(begins, ranges, strict=False):
            with self._reading, reading(f"{self.name}, rows {start} to {stop - 1},"):
                self._fill(read[begin : begin + stop - start], start, stop)
        if self.summary is not None and not np.isfinite(read).all():
            raise InputError(f"{self.name} holds NaN or infinite values since it was scanned")
        return read

    def _fill(self, out: np.ndarray, start: int, stop: int) -> None:
        everywhere = self.positions is None
        chosen = np.arange(start, stop) if everywhere else self.positions[start:stop]
        gap = getattr(self._source, "gap_rows", _GAP)
        span = getattr(self._source, "span_rows", self.block_rows)
        cuts = np.flatnonzero((np.diff(chosen) > gap) | np.diff(chosen // span).astype(bool)) + 1
        for i, j in itertools.pairwise([0, *cuts.tolist(), len(chosen)] if len(chosen) else []):
            first, last = int(chosen[i]), int(chosen[j - 1])
            if last + 1 - first > j - i:
                out[i:j] = self._source[first : last + 1][chosen[i:j] - first]
            elif isinstance(self._source, Npy):
                self._source.read_into(out[i:j], first)
            else:
                out[i:j] = self._source[first : last + 1]


def _rising(positions: Any, rows: int, name: str) -> np.ndarray:
    positions = np.asarray(positions)
    if positions.ndim != 1 or positions.dtype.kind not in "iu" or not positions.size:
        raise InputError(f"positions of {name} must be integers, one at least")
    positions = positions.astype(np.int64)
    if positions[0] < 0 or positions[-1] >= rows or (np.diff(positions) <= 0).any():
        raise InputError(f"positions of {name} must rise and lie in 0 to {rows - 1}")
    return positions


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order of training on rows of which `buffer_rows` are in memory at a time.

    Of an epoch, contiguous blocks of rows are permuted, their sequence is cut into buffers, and the
    rows of a buffer are shuffled. The fewer than `batch_size` rows beyond the last whole batch are
    left out; the sequence begins inside its first block, so that they change with the epoch. The
    fields and the epoch decide, nothing else.

    Attributes:
      rows, batch_size, data_seed: of the run.
      block: rows kept together; max(BLOCK, `Rows.chunk_rows`) decompresses each chunk once.
      buffer_rows: a multiple of batch_size; an epoch's last buffer is shorter. None: all rows.
    """

    rows: int
    batch_size: int
    block: int = BLOCK
    buffer_rows: int | None = None
    data_seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.block < 1 or self.data_seed < 0:
            raise InputError(f"batch_size and block must be positive, data_seed not less: {self}")
        if self.rows < self.batch_size:
            raise InputError(f"batch_size={self.batch_size} is more than the {self.rows} rows")
        size = self.batch_size if self.buffer_rows is None else self.buffer_rows
        if size < 1 or size % self.batch_size:
            raise InputError(
                f"buffer_rows={size} must be a multiple of batch_size={self.batch_size}"
            )

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.rows // self.batch_size

    def buffers(self, epoch: int) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
        """Yields for each buffer the ranges to read and the order of its rows.

        Ranges (first row, after the last) rise; the order is int32 [steps, batch_size], indices
        into the rows as these ranges are read.
        """
        seed = np.random.SeedSequence([self.data_seed, epoch])
        random = np.random.Generator(np.random.Philox(seed))  # default_rng's kind may change
        starts = random.permutation(-(-self.rows // self.block)) * self.block
        stops = np.minimum(starts + self.block, self.rows)
        head, cut = starts[:1].copy(), random.integers(starts[0], stops[0])
        starts[0] = cut
        starts, stops = np.append(starts, head), np.append(stops, cut)
        ends = np.cumsum(stops - starts)
        begins = ends - (stops - starts)
        used = self.steps * self.batch_size
        size = self.buffer_rows or used
        for low in range(0, used, size):
            high = min(low + size, used)
            inside = slice(np.searchsorted(ends, low, "right"), np.searchsorted(begins, high))
            first = np.sort(starts[inside] + np.maximum(low - begins[inside], 0))
            last = np.sort(stops[inside] - np.maximum(ends[inside] - high, 0))
            apart = first[1:] != last[:-1]
            ranges = zip(first[np.r_[True, apart]], last[np.r_[apart, True]], strict=True)
            order = random.permutation(high - low).astype(np.int32).reshape(-1, self.batch_size)
            yield [(int(start), int(stop)) for start, stop in ranges], order

    def positions(self, epoch: int) -> np.ndarray:
        """Rows in the order of training, [steps, batch_size]."""
        parts = [
            np.r_[tuple(slice(*r) for r in read)][order] for read, order in self.buffers(epoch)
        ]
        return np.concatenate(parts)


def buffer_rows(resident_bytes: int, row_bytes: int, batch_size: int) -> int:
    """Rows of a buffer, whole batches, such that two buffers take `resident_bytes` at most."""
    rows = resident_bytes // (2 * row_bytes * batch_size) * batch_size
    if rows < 1:
        raise InputError(
            f"{resident_bytes} bytes do not hold two batches of {batch_size} rows of {row_bytes} "
            f"bytes; allow {2 * row_bytes * batch_size} or take a smaller batch_size"
        )
    return rows


def prefetched(
    rows: Rows,
    plan: Plan,
    epochs: Iterable[int],
    put: Callable[[np.ndarray], Any] = lambda array: array,
    skip: int = 0,
    read: Callable[[list[tuple[int, int]]], np.ndarray] | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields (buffer, order) of one epoch after another; the next is read while one is used.

    One thread reads, one buffer ahead: two exist at a time. An iterator that is left early must be
    closed (`contextlib.closing`), which waits for the thread.

    Args:
      rows, plan: [rows, d_in], and a plan for that many.
      epochs: which, range(first, last) say.
      put: what the thread does to each buffer [its rows, d_in]: normalise, move to a device.
      skip: buffers at the start that are passed over unread, on resuming.
      read: what reads the ranges of a buffer; None: `rows.read`.

    Raises:
      InputError: a plan for another number of rows; what reading raises, at that buffer.
    """
    if plan.rows != len(rows):
        raise InputError(f"the plan is for {plan.rows} rows, {rows.name} has {len(rows)}")
    buffers = itertools.chain.from_iterable(map(plan.buffers, epochs))
    read = read or rows.read
    return _ahead((put(read(r)), order) for r, order in itertools.islice(buffers, skip, None))


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(1, "prefetch") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item

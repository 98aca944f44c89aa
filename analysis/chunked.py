"""A matrix that no memory need hold: its rows a block at a time, wherever it lies.

In memory (NumPy, SciPy), in a file (h5py, zarr, a backed sparse matrix of anndata) or as a dask
array, which is how `anndata.experimental.read_lazy` has it. Blocks follow one another in the order
of the rows, and what is added up over them is added in that order, so it does not depend on them.
Where a `dask.distributed` client is at hand, blocks of a dask array are added up by its workers,
and only sums travel.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from absl import logging
from scipy import sparse

from sae_jax.errors import InputError, counted

BLOCK_BYTES = 256 << 20
ENTRY = 64  # bytes of a stored entry, with all copies of it that are made on its way into sums
RUNS = 64  # into which a cluster's work is cut, whatever its size, so that this changes no result
TASK = 4  # chunks of a task: as they are read, those of two tasks take less than two blocks do

S = TypeVar("S", bound="State")


class State(Protocol):
    """Sums over some rows."""

    def plus(self: S, other: S) -> S:
        """Over both, which share no row."""


class Work(Protocol[S]):
    """What is added up over the rows."""

    def part(self, rows: slice) -> Work[S]:
        """The same for some rows alone: what is sent to where they are."""

    def start(self) -> S:
        """Of no row."""

    def add(self, state: S, block: sparse.csr_matrix) -> S:
        """With the rows of this part, in order; the state may be written into."""


class Held(NamedTuple):
    """What one process holds while it adds up: so many blocks, and so many times the sums, added to
    by so many threads; and where, for messages."""

    blocks: int = 1
    sums: int = 1
    threads: int = 1
    where: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Chunked:
    """Rows of a matrix in blocks; `chunked` makes it.

    Attributes:
      shape: [rows, columns], of what blocks become.
      cuts: the first row of each block and, last, the number of rows, int64.
      block_bytes: that a block takes, with all that is made of it; kept by refusing larger ones.
      transform: what is done to a block as it is read.
    """

    shape: tuple[int, int]
    cuts: np.ndarray
    block_bytes: int
    transform: Callable[[Any], sparse.csr_matrix]
    _read: Callable[[int, int], Any]
    _delayed: list[Any] | None = None  # dask's, of each block

    @property
    def rows(self) -> int:
        """Of the largest block."""
        return int(np.diff(self.cuts).max(initial=0))

    def slices(self) -> Iterator[slice]:
        """The rows of each block."""
        for start, stop in zip(self.cuts[:-1], self.cuts[1:], strict=True):
            yield slice(int(start), int(stop))

    def block(self, number: int) -> sparse.csr_matrix:
        """Rows of one block.

        Raises:
          InputError: a chunk of an array that holds more than it may; whatever `transform` refuses.
        """
        if self._delayed is not None:
            raw = self._delayed[number].compute(scheduler="synchronous")
        else:
            raw = self._read(int(self.cuts[number]), int(self.cuts[number + 1]))
        return _made(self.transform, raw, self.block_bytes, self._shape_of(number))

    def __iter__(self) -> Iterator[sparse.csr_matrix]:
        """All blocks, in order."""
        return (self.block(number) for number in range(len(self.cuts) - 1))

    def __getitem__(self, which: np.ndarray) -> sparse.csr_matrix:
        """Some rows, by position in rising order, one at least; they are in memory then.

        Beside them is one block at a time, of those alone that have some of them.
        """
        which = np.asarray(which)
        n_rows = self.shape[0]
        if not which.size or (np.diff(which) < 0).any() or which[0] < 0 or which[-1] >= n_rows:
            raise InputError(f"rows must rise, one at least, within 0 .. {n_rows - 1}")
        ends = np.searchsorted(which, self.cuts)
        parts = [
            self.block(number)[which[start:stop] - self.cuts[number]]
            for number, (start, stop) in enumerate(itertools.pairwise(ends))
            if start < stop
        ]
        return sparse.vstack(parts, "csr")

    def then(self, transform: Callable[[Any], sparse.csr_matrix], columns: int) -> Chunked:
        """The same matrix with something else done to its blocks, which may drop columns."""
        return dataclasses.replace(self, shape=(self.shape[0], columns), transform=transform)

    def held(self) -> Held:
        """By a process that `fold` runs in: one block, and the sums once.

        Of a dask array with a client, each thread of a worker has sums of its own, a copy of them
        while it adds to them, a block, and the chunks of two tasks; and one adds up all sums.
        """
        if (client := self._client()) is None:
            return Held()
        threads = max(client.nthreads().values(), default=1)
        where = f" in each worker, of {counted(threads, 'thread')}"
        return Held(3 * threads, 2 * threads + 2, threads, where)

    def fold(self, work: Work[S]) -> S:
        """What the work adds up over all rows.

        Here one block after another; of a dask array with a client, on its workers, in runs whose
        sums are added in order. The number of workers changes nothing.
        """
        if (client := self._client()) is not None:
            return self._fold_on(client, work)
        state = work.start()
        for number, rows in enumerate(self.slices()):
            state = work.part(rows).add(state, self.block(number))
        return state

    def _fold_on(self, client: Any, work: Work[S]) -> S:
        """As many runs at once as there are threads; see `held`."""
        slices, total = list(self.slices()), None
        runs = [r for r in np.array_split(np.arange(len(slices)), RUNS) if r.size]
        workers = max(1, sum(client.nthreads().values()))
        for first in range(0, len(runs), workers):
            window = [
                [run[start : start + TASK] for start in range(0, len(run), TASK)]
                for run in runs[first : first + workers]
            ]
            states: list[Any] = [None] * len(window)
            for step in range(max(map(len, window))):
                before = [state for state in states if state is not None]
                for i, tasks in enumerate(window):
                    if step < len(tasks):
                        some = tasks[step]
                        states[i] = client.submit(
                            _added, [work.part(slices[number]) for number in some], states[i],
                            client.compute([self._delayed[number] for number in some]),
                            self.transform, self.block_bytes, [*map(self._shape_of, some)],
                            pure=False,
                        )  # fmt: skip
                _await(before)
            _await(states)
            for state in states:
                total = state if total is None else client.submit(_plus, total, state, pure=False)
        return work.start() if total is None else total.result()

    def _shape_of(self, number: int) -> tuple[int, int]:
        return int(self.cuts[number + 1] - self.cuts[number]), self.shape[1]

    def _client(self) -> Any:
        """The client of dask.distributed that is in use, if any, of a dask array."""
        distributed = None if self._delayed is None else sys.modules.get("distributed")
        try:
            return None if distributed is None else distributed.default_client()
        except ValueError:
            return None


def chunked(
    matrix: Any, name: str = "X", *, memory_bytes: int = BLOCK_BYTES, rows: int | None = None
) -> Chunked:
    """A matrix [rows, columns] in blocks of rows.

    Args:
      matrix: NumPy or SciPy; an h5py or zarr array; anndata's backed sparse matrix, of rows (CSR);
        a dask array of dense or CSR chunks, whose chunks of rows are the blocks.
      name: for messages.
      memory_bytes: for a block and what is made of it. Sparse matrices say what their rows hold,
        dense ones are taken to be full; a chunk of dask's is looked at when it is there. Of a dense
        matrix stored in chunks, blocks are whole chunks of rows; where memory is less, each block
        reads all chunks that its rows lie in, which are counted.
      rows: the most of a block; None: as many as memory allows.

    Raises:
      InputError: something else, no numbers, columns that cannot be read by rows, a damaged sparse
        matrix, or a memory in which not even one row has a place.
    """
    if rows is not None and rows < 1:
        raise InputError(f"rows={rows}: a block has at least one.")
    shape, dtype = getattr(matrix, "shape", ()), getattr(matrix, "dtype", None)
    if len(shape) != 2 or dtype is None or dtype.kind not in "biuf":
        raise InputError(f"{name} holds {dtype} of shape {shape}: give a matrix of real numbers.")
    shape = (int(shape[0]), int(shape[1]))
    if is_dask(matrix):
        return _of_dask(matrix, shape, name, memory_bytes)
    if sparse.issparse(matrix):
        matrix = sparse.csr_matrix(sound(matrix, name))
        indptr = matrix.indptr
    elif (form := getattr(matrix, "format", None)) == "csr":
        indptr = matrix.group["indptr"][:]
        if len(indptr) != shape[0] + 1 or np.diff(indptr).min(initial=0) < 0:
            raise InputError(f"{name} is damaged: its indptr does not rise, once for each row")
    elif form is not None:
        raise _by_genes(name, form)
    else:
        indptr = None
    if indptr is None:
        stored = int((getattr(matrix, "chunks", None) or (1,))[0])
        cuts, largest = _dense_cuts(shape, dtype.itemsize, stored, memory_bytes, rows, name)
    else:
        per_row = np.diff(indptr).astype(np.int64) * ENTRY
        cuts, largest = _cuts(per_row, memory_bytes, rows, name)
    transform = functools.partial(as_csr, name=name)
    return Chunked(shape, cuts, largest, transform, lambda start, stop: matrix[start:stop])


def is_dask(matrix: Any) -> bool:
    """Whether it is a dask array, without importing dask."""
    array = sys.modules.get("dask.array")
    return array is not None and isinstance(matrix, array.Array)


def as_csr(block: Any, name: str = "X") -> sparse.csr_matrix:
    """Rows as they were read, CSR of their own type (float16, which SciPy lacks: float32); raises
    InputError as `sound`."""
    if block.dtype == np.float16:
        block = block.astype(np.float32)
    return sparse.csr_matrix(sound(block, name))


def sound(matrix: Any, name: str = "expression") -> Any:
    """The same, if no index of a sparse matrix points outside of it: SciPy and compiled loops would
    follow it out of memory.

    Raises:
      InputError: one does.
    """
    if hasattr(matrix, "check_format"):  # CSR, CSC, BSR
        try:
            matrix.check_format(full_check=True)
            if np.diff(matrix.indptr).min(initial=0) < 0:  # which SciPy looks for in entries alone
                raise ValueError("indptr must be a non-decreasing sequence")
        except ValueError as error:
            raise InputError(f"{name} is damaged: {error}") from None
    return matrix


def _cuts(
    per_row: np.ndarray, memory_bytes: int, rows: int | None, name: str
) -> tuple[np.ndarray, int]:
    """Where blocks begin and end, and the bytes of the largest."""
    if (most := int(per_row.max(initial=0))) > memory_bytes:
        raise InputError(
            f"a row of {name} takes up to {size(most)} while it is worked on: give it more than "
            f"{size(memory_bytes)} of memory."
        )
    ends = np.concatenate([[0], np.cumsum(per_row)])
    cuts = [0]
    while cuts[-1] < len(per_row):
        stop = int(np.searchsorted(ends, ends[cuts[-1]] + memory_bytes, side="right")) - 1
        cuts.append(stop if rows is None else min(stop, cuts[-1] + rows))
    found = np.asarray(cuts, np.int64)
    return found, int(np.diff(ends[found]).max(initial=0))


def _dense_cuts(
    shape: tuple[int, int], itemsize: int, stored: int, memory_bytes: int, rows: int | None,
    name: str,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """As `_cuts`, of a dense matrix in chunks of `stored` rows, none of which is read in part.

    Blocks are of whole bands of chunks, whose decoded copies are gone before a block becomes more
    than its numbers; or, where that is too much, parts of one band, which is then decoded for each.
    """
    count, columns = shape
    row = max(1, columns * (itemsize + ENTRY))
    stored = max(1, min(stored, count))
    fitting = min(memory_bytes // row, count if rows is None else rows)
    if fitting >= stored:
        cuts = np.arange(0, count, fitting // stored * stored)
        band = 0
    else:
        band = stored * columns * itemsize
        fitting = min((memory_bytes - band) // row, stored if rows is None else rows)
        if fitting < 1 and stored == 1:
            raise InputError(
                f"a row of {name} takes up to {size(row)} while it is worked on: give it more than "
                f"{size(memory_bytes)} of memory."
            )
        if fitting < 1:
            raise InputError(
                f"{name} is stored in chunks of {stored:,} rows, of which all columns take "
                f"{size(band + row)} while one row is worked on: give it more than "
                f"{size(memory_bytes)} of memory, or write it in chunks of fewer rows."
            )
        logging.warning(
            "%s is stored in chunks of %d rows, read %d times in each pass: more memory, or chunks "
            "of fewer rows, would save that", name, stored, -(-stored // fitting),
        )  # fmt: skip
        parts = [np.arange(first, min(first + stored, count), fitting)
                 for first in range(0, count, stored)]  # fmt: skip
        cuts = np.concatenate([np.empty(0, np.int64), *parts])
    found = np.append(cuts, count).astype(np.int64)
    return found, int(np.diff(found).max(initial=0)) * row + band


def _by_genes(name: str, form: str) -> InputError:
    return InputError(
        f"{name} is stored by genes ({form.upper()}) and cannot be read by cells; write it as CSR."
    )


def _of_dask(matrix: Any, shape: tuple[int, int], name: str, memory_bytes: int) -> Chunked:
    form = getattr(matrix._meta, "format", "csr")
    # A column store in a file: chunks of some columns, or of all, have the rows of all cells.
    if form == "csc" and (matrix.numblocks[1] > 1 or matrix.numblocks[0] == 1):
        raise _by_genes(name, form)
    matrix = matrix.rechunk({1: shape[1]})
    lengths = matrix.chunks[0]
    if np.isnan(lengths).any():
        raise InputError(f"{name} has chunks of unknown length: call compute_chunk_sizes() on it.")
    cuts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if isinstance(matrix._meta, np.ndarray):
        full = int(max(lengths)) * shape[1] * (matrix.dtype.itemsize + ENTRY)
        if full > memory_bytes:
            raise InputError(
                f"a chunk of {name} has {max(lengths)} rows, which take up to {size(full)} while "
                f"they are worked on: rechunk it, or give it more than {size(memory_bytes)}."
            )
        memory_bytes = full
    delayed = list(matrix.to_delayed().ravel())
    transform = functools.partial(as_csr, name=name)
    return Chunked(shape, cuts, memory_bytes, transform, lambda *_: None, delayed)


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} GiB" if count < 1000 else f"{count:,.0f} GiB"


def _made(
    transform: Callable[[Any], sparse.csr_matrix], raw: Any, most: int, shape: tuple[int, int]
) -> sparse.csr_matrix:
    """What a block becomes, if it is no larger than it may be."""
    if sparse.issparse(raw) and raw.nnz * ENTRY > most:
        raise InputError(
            f"a chunk of {raw.shape[0]} rows holds {raw.nnz} values, which take "
            f"{size(raw.nnz * ENTRY)} while they are worked on, of {size(most)}: rechunk the array "
            "to fewer rows, or give more memory."
        )
    if (found := transform(raw)).shape != shape:  # which loops over both would follow
        raise InputError(f"a chunk came as {found.shape}, where the array has {shape}")
    return found


def _added(
    parts: list[Any], state: Any, raws: list[Any], transform: Any, most: int,
    shapes: list[tuple[int, int]],
) -> Any:  # fmt: skip
    """On a worker. What dask holds is never written into: a lost worker's part is done again."""
    state = parts[0].start() if state is None else copy.deepcopy(state)
    for part, raw, shape in zip(parts, raws, shapes, strict=True):
        state = part.add(state, _made(transform, raw, most, shape))
    return state


def _plus(first: Any, second: Any) -> Any:
    return first.plus(second)


def _await(states: list[Any]) -> None:
    """Until all are there; raises what a worker raised."""
    import distributed

    for state in distributed.wait(states).done if states else ():
        if state.status == "error":
            state.result()

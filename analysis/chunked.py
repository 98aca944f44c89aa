"""A matrix that no memory need hold: its rows a block at a time, wherever it lies.

In memory (NumPy, SciPy), in a file (h5py, zarr, a backed sparse matrix of anndata) or as a dask
array, which is how `anndata.experimental.read_lazy` has it. Blocks follow one another in the order
of the rows, and what is added up over them is added in that order, so it does not depend on them.
Where a `dask.distributed` client is at hand, blocks of a dask array are added up where its workers
have them, and only sums travel.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
from scipy import sparse

from sae_jax.errors import InputError

BLOCK_BYTES = 256 << 20
ENTRY = 64  # bytes of a stored entry, with all copies of it that are made on its way into sums
RUNS = 64  # into which a cluster's work is cut, whatever its size, so that this changes no result

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
        return _made(self.transform, raw, self.block_bytes)

    def __iter__(self) -> Iterator[sparse.csr_matrix]:
        """All blocks, in order."""
        return (self.block(number) for number in range(len(self.cuts) - 1))

    def then(self, transform: Callable[[Any], sparse.csr_matrix], columns: int) -> Chunked:
        """The same matrix with something else done to its blocks, which may drop columns."""
        return dataclasses.replace(self, shape=(self.shape[0], columns), transform=transform)

    def fold(self, work: Work[S]) -> S:
        """What the work adds up over all rows.

        Here one block after another; of a dask array with a client, on its workers, in runs whose
        sums are added in order. The number of workers changes nothing.
        """
        client = None if self._delayed is None else _client()
        if client is not None:
            return self._fold_on(client, work)
        state = work.start()
        for number, rows in enumerate(self.slices()):
            state = work.part(rows).add(state, self.block(number))
        return state

    def _fold_on(self, client: Any, work: Work[S]) -> S:
        """A worker holds a run's sums twice, two blocks of it, and nothing of other runs."""
        import distributed

        slices, total = list(self.slices()), None
        runs = [r for r in np.array_split(np.arange(len(slices)), RUNS) if r.size]
        workers = max(1, sum(client.nthreads().values()))
        for first in range(0, len(runs), workers):
            window = runs[first : first + workers]
            states: list[Any] = [None] * len(window)
            for step in range(max(map(len, window))):
                before = [state for state in states if state is not None]
                for i, run in enumerate(window):
                    if step < len(run):
                        number = run[step]
                        states[i] = client.submit(
                            _added, work.part(slices[number]), states[i],
                            client.compute(self._delayed[number]), self.transform,
                            self.block_bytes, pure=False,
                        )  # fmt: skip
                distributed.wait(before)
            for state in states:
                total = state if total is None else client.submit(_plus, total, state, pure=False)
        return work.start() if total is None else total.result()


def chunked(
    matrix: Any, name: str = "X", *, memory_bytes: int = BLOCK_BYTES, rows: int | None = None
) -> Chunked:
    """A matrix [rows, columns] in blocks of rows.

    Args:
      matrix: NumPy or SciPy; an h5py or zarr array; anndata's backed sparse matrix, of rows (CSR);
        a dask array of dense or CSR chunks, whose chunks of rows are the blocks.
      name: for messages.
      memory_bytes: for a block and what is made of it. Sparse matrices say what their rows hold,
        dense ones are taken to be full; a chunk of dask's is looked at when it is there.
      rows: the most of a block; None: as many as memory allows.

    Raises:
      InputError: something else, no numbers, columns that cannot be read by rows, or a memory in
        which not even one row has a place.
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
        matrix = sparse.csr_matrix(matrix)
        indptr = matrix.indptr
    elif (form := getattr(matrix, "format", None)) == "csr":
        indptr = matrix.group["indptr"][:]
    elif form is not None:
        raise InputError(
            f"{name} is stored by genes ({form.upper()}) and cannot be read by cells; write it as "
            "CSR."
        )
    else:
        indptr = None
    if indptr is None:
        per_row = np.full(shape[0], shape[1] * (dtype.itemsize + ENTRY), np.int64)
    else:
        per_row = np.diff(indptr).astype(np.int64) * ENTRY
    cuts, largest = _cuts(per_row, memory_bytes, rows, name)
    return Chunked(shape, cuts, largest, as_csr, lambda start, stop: matrix[start:stop])


def is_dask(matrix: Any) -> bool:
    """Whether it is a dask array, without importing dask."""
    array = sys.modules.get("dask.array")
    return array is not None and isinstance(matrix, array.Array)


def as_csr(block: Any) -> sparse.csr_matrix:
    """Rows as they were read, CSR of their own type (float16, which SciPy lacks: float32)."""
    if block.dtype == np.float16:
        block = block.astype(np.float32)
    return sparse.csr_matrix(block)


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


def _of_dask(matrix: Any, shape: tuple[int, int], name: str, memory_bytes: int) -> Chunked:
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
    return Chunked(shape, cuts, memory_bytes, as_csr, lambda *_: None, delayed)


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} GiB" if count < 1000 else f"{count:,.0f} GiB"


def _made(transform: Callable[[Any], sparse.csr_matrix], raw: Any, most: int) -> sparse.csr_matrix:
    """What a block becomes, if it is no larger than it may be."""
    if sparse.issparse(raw) and raw.nnz * ENTRY > most:
        raise InputError(
            f"a chunk of {raw.shape[0]} rows holds {raw.nnz} values, which take "
            f"{size(raw.nnz * ENTRY)} while they are worked on, of {size(most)}: rechunk the array "
            "to fewer rows, or give more memory."
        )
    return transform(raw)


def _added(part: Any, state: Any, raw: Any, transform: Any, most: int) -> Any:
    """On a worker. What dask holds is never written into: a lost worker's part is done again."""
    state = part.start() if state is None else copy.deepcopy(state)
    return part.add(state, _made(transform, raw, most))


def _plus(first: Any, second: Any) -> Any:
    return first.plus(second)


def _client() -> Any:
    """The client of dask.distributed that is in use, if any."""
    distributed = sys.modules.get("distributed")
    try:
        return None if distributed is None else distributed.default_client()
    except ValueError:
        return None

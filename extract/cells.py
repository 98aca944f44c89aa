"""Expression of some cells out of an AnnData, in memory, on disk or lazy, and what it must be."""

import dataclasses
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse
import zarr

from extract.errors import InputError, listed, reading

_BLOCK = 4096  # cells read at once


class Expression:
    """Rows of X, of a layer or of raw as CSR, read when asked for.

    They may be in memory, in a file (`anndata.read_h5ad(backed="r")`, `open_backed`) or in a dask
    array (`anndata.experimental.read_lazy`): values are the same.

    Attributes:
      where: which of these, for messages.
      names: of the cells.
      var: what the columns are; raw has its own.

    Args:
      layer: None for X, "raw" for `adata.raw`, else the name of a layer.

    Raises:
      InputError: no such layer, no X, values that are no numbers, cell names that occur twice.
    """

    def __init__(self, adata: anndata.AnnData, layer: str | None) -> None:
        self.where, matrix, self.var = _source(adata, layer)
        if matrix is None:
            raise InputError("the file has no X; name the layer that holds the counts with counts=")
        with reading(self.where):
            dtype = matrix.dtype
        if dtype.kind not in "biuf":
            raise InputError(f"{self.where} holds {dtype}, not numbers")
        self.names = [str(name) for name in adata.obs_names]
        if not adata.obs_names.is_unique:
            twice = adata.obs_names[adata.obs_names.duplicated()].unique()
            raise InputError(
                f"{len(twice)} cell names occur more than once ({listed(twice)}): rows could not "
                "be told apart; call adata.obs_names_make_unique() first"
            )
        if isinstance(matrix, scipy.sparse.spmatrix | scipy.sparse.sparray):
            with reading(self.where):
                matrix.check_format()  # as of rows
            matrix = scipy.sparse.csr_matrix(_computable(matrix))
        self._matrix: Any = matrix
        self._dask = _is_dask(matrix)
        self._chosen: np.ndarray | None = getattr(adata, "chosen", None)

    def rows(self, which: slice | np.ndarray) -> scipy.sparse.csr_matrix:
        """Values [cells, columns], explicit zeros dropped.

        Raises:
          InputError: NaN, infinite or negative values.
        """
        if _by_columns(self._matrix):
            self._matrix, self._dask = _by_rows(self._matrix, self.where), False
        at = which if self._chosen is None else self._chosen[which]
        if isinstance(at, np.ndarray) and len(at) and np.all(np.diff(at) == 1):
            at = slice(int(at[0]), int(at[-1]) + 1)  # which files read faster
        dense = isinstance(self._matrix, zarr.Array) and not isinstance(at, slice)
        with reading(self.where):  # codecs of files have exceptions of their own
            found = self._matrix.oindex[at] if dense else self._matrix[at]
            block = scipy.sparse.csr_matrix(_computable(found.compute() if self._dask else found))
            block.check_format()  # SciPy would follow a wild index out of memory
        block.sum_duplicates()
        block.eliminate_zeros()
        bad = ~np.isfinite(block.data) | (block.data < 0)
        if bad.any():
            row = int(np.searchsorted(block.indptr, np.flatnonzero(bad)[0], side="right")) - 1
            cell = np.asarray(self.names, object)[which][row]
            kind = "negative" if np.isfinite(block.data[bad][0]) else "NaN or infinite"
            raise InputError(
                f"{self.where} holds {int(bad.sum())} NaN, infinite or negative values (first: a "
                f"{kind} one in cell '{cell}'); expression is wanted, not scaled values: name "
                "another layer with counts="
            )
        return block

    def all_rows(self) -> Iterator[scipy.sparse.csr_matrix]:
        """Every cell's values, some thousands of cells at a time."""
        for start in range(0, len(self.names), _BLOCK):
            yield self.rows(slice(start, start + _BLOCK))


def _source(adata: anndata.AnnData, layer: str | None) -> tuple[str, Any, pd.DataFrame]:
    """How it is called, the matrix, and what its columns are."""
    if layer is None:
        return "X", adata.X, in_memory(adata.var)
    where = f"layers['{layer}']"
    raw = adata.raw if layer == "raw" else None
    if raw is not None and layer in adata.layers:
        raise InputError(f"counts='raw' may be adata.raw or {where}: rename the layer")
    if raw is not None:
        return "raw", raw.X, in_memory(raw.var)
    if layer not in adata.layers:
        neither = "raw, and no " if layer == "raw" else ""
        there = listed(adata.layers, 20) or "none"
        raise InputError(f"there is no {neither}{where}; layers: {there}")
    return where, adata.layers[layer], in_memory(adata.var)


def in_memory(table: Any) -> pd.DataFrame:
    """obs or var of an AnnData; `read_lazy` leaves them in the file."""
    return table if isinstance(table, pd.DataFrame) else table.to_memory()


def _is_dask(matrix: Any) -> bool:
    """Whether it is a dask array, without importing dask."""
    array = sys.modules.get("dask.array")
    return array is not None and isinstance(matrix, array.Array)


def _by_columns(matrix: Any) -> bool:
    """Whether it lies in a file or in dask as columns (CSC), of which each holds all cells."""
    of = matrix._meta if _is_dask(matrix) else matrix
    return getattr(of, "format", None) == "csc"


def _by_rows(matrix: Any, where: str) -> scipy.sparse.csr_matrix:
    """All of what lies as columns: to read some cells of it is to read the whole."""
    whole = f"{matrix.shape[0]} x {matrix.shape[1]}"
    logging.warning(
        "%s (%s) is stored by columns (CSC), of which no cells can be read alone: all of it is "
        "read into memory. A file with it as CSR is read some cells at a time", where, whole,
    )  # fmt: skip
    with reading(where):
        found = matrix.compute() if _is_dask(matrix) else matrix.to_memory()
        found.check_format()  # SciPy would follow a wild index out of memory
        found = scipy.sparse.csr_matrix(_computable(found))
    size = sum(part.nbytes for part in (found.data, found.indices, found.indptr))
    logging.warning("%s: %.3g MiB in memory, twice that for a moment", where, size / 2**20)
    return found


def _computable(matrix: Any) -> Any:
    """Float16, which SciPy does not know, as float32."""
    return matrix.astype(np.float32) if matrix.dtype == np.float16 else matrix


def check_values(block: scipy.sparse.csr_matrix, wanted: str, where: str, what: str) -> None:
    """`check_counts` or `check_log1p`, as `wanted` says: "counts", "log1p", or "any", no check."""
    if wanted != "any":
        {"counts": check_counts, "log1p": check_log1p}[wanted](block, where, what)


def check_counts(block: scipy.sparse.csr_matrix, where: str, what: str) -> None:
    """Refuse values that are not whole numbers; `what` says who wants counts."""
    off = block.data != np.rint(block.data)
    if off.any():
        raise InputError(
            f"{where} must be raw counts for {what}, but {off.mean():.0%} of its non-zero values "
            f"are not whole numbers (the largest is {block.data.max():.4g}, an example "
            f"{block.data[off][0]:.4g}): it looks normalised. Name the layer with the counts by "
            "counts="
        )


def check_log1p(block: scipy.sparse.csr_matrix, where: str, what: str) -> None:
    """Refuse values that cannot be log1p of normalised counts: whole numbers, or above 20."""
    if not block.nnz:
        return
    top = block.data.max()
    if (block.data == np.rint(block.data)).all() or top > 20:
        raise InputError(
            f"{where} must be log1p-normalised for {what}, but it looks like counts (largest value "
            f"{top:.4g}); let the values be computed from counts instead, or name the layer that "
            "holds log1p values by counts="
        )


def open_backed(path: str, layer: str | None) -> anndata.AnnData:
    """obs and var of an h5ad or zarr file in memory, X (or the one layer) left on disk.

    Args:
      layer: as `Expression` takes it, "raw" included.

    Raises:
      InputError: not such a file, or a damaged one.
    """
    try:
        store = _opened(Path(path))
        obs, var = _table(store["obs"]), _table(store["var"])
        raw = store.get("raw") if layer == "raw" else None
        if raw is not None:
            raw = types.SimpleNamespace(X=raw["X"], var=_table(raw["var"]))
        lazy = _Lazy(obs, var, store.get("X"), store.get("layers", {}), raw)
        where, node, var = _source(lazy, layer)
        if node is None:
            raise InputError("it has no X; name the layer with the counts by --counts")
        kind = node.attrs.get("encoding-type", "array")
        sparse = kind in ("csr_matrix", "csc_matrix")
        matrix = anndata.io.sparse_dataset(node) if sparse else node
        if _by_columns(matrix):
            matrix = _by_rows(matrix, where)
        if matrix.shape != (len(obs), len(var)):
            raise InputError(
                f"{where} is {matrix.shape}, for {len(obs)} rows of obs and {len(var)} of var"
            )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # h5py, zarr and anndata raise a dozen kinds for a bad file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as an AnnData file: {reason}") from None
    if where == "raw":
        raw.X = matrix
        return _Lazy(obs, lazy.var, None, {}, raw)
    return _Lazy(obs, var, *((matrix, {}) if layer is None else (None, {layer: matrix})))


def _opened(path: Path) -> Any:
    """The root of a zarr store, which is a folder, or of an HDF5 file."""
    if not path.exists():
        raise InputError("there is no such file")
    if path.is_dir():
        try:
            return zarr.open_group(path, mode="r")
        except FileNotFoundError:
            raise InputError("a folder, but no zarr store; name the .h5ad file in it") from None
    if not h5py.is_hdf5(path):
        raise InputError("no HDF5 file, or a truncated one; an .h5ad or .zarr is wanted")
    return h5py.File(path, "r")


def _table(node: Any) -> pd.DataFrame:
    table = anndata.io.read_elem(node)
    return table.set_index(table.index.astype(str))


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """An AnnData's obs and var beside matrices on disk (an AnnData itself refuses zarr arrays).

    Attributes:
      chosen: the rows of the matrices that obs has, int64 [cells]; None: all of them.
      whole: the AnnData that this is of, if it is of one.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    X: Any
    layers: Mapping[str, Any]
    raw: Any = None
    chosen: np.ndarray | None = None
    whole: anndata.AnnData | None = None

    @property
    def obs_names(self) -> pd.Index:
        return self.obs.index

    @property
    def var_names(self) -> pd.Index:
        return self.var.index

    @property
    def n_obs(self) -> int:
        return len(self.obs)

    @property
    def n_vars(self) -> int:
        return len(self.var)


def restrict(adata: anndata.AnnData, rows: np.ndarray) -> anndata.AnnData:
    """Some cells of an AnnData, or of what `open_backed` gave, whose matrices stay on disk.

    What a plan computes over cells (variable genes) it then computes over these alone.

    Args:
      rows: positions, int64 [cells], ascending: files read in no other order.
    """
    if getattr(adata, "isbacked", False) and not adata.is_view:  # of a view X would be read whole
        adata = _Lazy(adata.obs, adata.var, adata.X, adata.layers, adata.raw, whole=adata)
    if not isinstance(adata, _Lazy):
        return adata[rows]
    chosen = rows if adata.chosen is None else adata.chosen[rows]
    return dataclasses.replace(adata, obs=adata.obs.iloc[rows], chosen=chosen)


def loader(adata: anndata.AnnData) -> Callable[[slice | np.ndarray], anndata.AnnData]:
    """A function of rows that gives these cells with all they have: an AnnData in memory.

    Args:
      adata: in memory, in a file, of dask arrays, or some cells of these by `restrict`.

    Raises:
      InputError: what anndata cannot give some cells of.
    """
    whole, chosen = (adata.whole, adata.chosen) if isinstance(adata, _Lazy) else (adata, None)
    if whole is None:
        raise InputError(
            "this model reads an AnnData: open the file by anndata.read_h5ad(path, backed='r') or "
            "anndata.experimental.read_lazy, not by open_backed"
        )
    if whole.isbacked and whole.is_view:
        raise InputError(
            "this is a part of an AnnData in a file, of which anndata gives no further parts: take "
            "extract.cells.restrict(adata, rows) instead of adata[rows]"
        )

    def load(rows: slice | np.ndarray) -> anndata.AnnData:
        some = whole[rows if chosen is None else chosen[rows]]
        return _detached(some) if whole.isbacked else some.to_memory()

    return load


def _detached(some: anndata.AnnData) -> anndata.AnnData:
    """A view of an AnnData in a file, in memory (its own `to_memory` closes the file)."""
    aligned = ("obsm", "varm", "obsp", "varp", "layers")
    raw = some.raw
    return anndata.AnnData(
        some.X, some.obs.copy(), some.var.copy(), dict(some.uns),
        raw=None if raw is None else {"X": raw.X, "var": raw.var, "varm": dict(raw.varm)},
        **{name: dict(getattr(some, name)) for name in aligned},
    )  # fmt: skip


def log1p_per_10k(block: scipy.sparse.csr_matrix, totals: np.ndarray) -> scipy.sparse.csr_matrix:
    """log(1 + count / total * 1e4), the total that of the cell in `totals` [cells]."""
    block = block.astype(np.float64)
    block.data *= np.repeat(1e4 / np.where(totals > 0, totals, 1), np.diff(block.indptr))
    np.log1p(block.data, out=block.data)
    return block


def totals_of(block: scipy.sparse.csr_matrix) -> np.ndarray:
    """Sums over all columns of each cell, float64 [cells]."""
    return np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()

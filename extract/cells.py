"""Expression of some cells out of an AnnData, in memory or on disk, and what it must be."""

from typing import Any

import anndata
import h5py
import numpy as np
import scipy.sparse
import zarr

from extract.errors import InputError, listed


class Expression:
    """Rows of X or of a layer as CSR, read when asked for.

    Raises:
      InputError: no such layer, no X, cell names that occur twice.
    """

    def __init__(self, adata: anndata.AnnData, layer: str | None) -> None:
        self.where = "X" if layer is None else f"layers['{layer}']"
        if layer is not None and layer not in adata.layers:
            raise InputError(f"there is no {self.where}; layers: {listed(adata.layers, 20) or '-'}")
        matrix = adata.X if layer is None else adata.layers[layer]
        if matrix is None:
            raise InputError("the file has no X; name the layer that holds the counts with counts=")
        self.names = [str(name) for name in adata.obs_names]
        if not adata.obs_names.is_unique:
            twice = adata.obs_names[adata.obs_names.duplicated()].unique()
            raise InputError(
                f"{len(twice)} cell names occur more than once ({listed(twice)}): rows could not "
                "be told apart; call adata.obs_names_make_unique() first"
            )
        if isinstance(matrix, scipy.sparse.spmatrix | scipy.sparse.sparray):
            matrix = scipy.sparse.csr_matrix(matrix)
        self._matrix: Any = matrix

    def rows(self, which: slice | np.ndarray) -> scipy.sparse.csr_matrix:
        """Values [cells, columns], explicit zeros dropped.

        Raises:
          InputError: NaN, infinite or negative values.
        """
        if isinstance(which, np.ndarray) and len(which) and np.all(np.diff(which) == 1):
            which = slice(int(which[0]), int(which[-1]) + 1)  # which files read faster
        dense = isinstance(self._matrix, zarr.Array) and not isinstance(which, slice)
        block = scipy.sparse.csr_matrix(
            self._matrix.oindex[which] if dense else self._matrix[which]
        )
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

    Raises:
      InputError: not such a file, or a damaged one.
    """
    try:
        store = zarr.open_group(path, mode="r") if ".zarr" in path else h5py.File(path, "r")
        obs, var = anndata.io.read_elem(store["obs"]), anndata.io.read_elem(store["var"])
        if layer is not None and layer not in store.get("layers", {}):
            there = listed(store.get("layers", {}), 20) or "none"
            raise InputError(f"{path} has no layers['{layer}']; layers: {there}")
        node = store.get("X") if layer is None else store["layers"][layer]
        if node is None:
            raise InputError(f"{path} has no X; name the layer with the counts by --counts")
        kind = node.attrs.get("encoding-type", "array")
        if kind == "csc_matrix":
            matrix = anndata.io.read_elem(node)  # rows of a column store cannot be read alone
        else:
            matrix = anndata.io.sparse_dataset(node) if kind == "csr_matrix" else node
        if matrix.shape != (len(obs), len(var)):
            raise InputError(
                f"{path}: {'X' if layer is None else layer} is {matrix.shape}, obs has {len(obs)} "
                f"rows and var {len(var)}"
            )
    except InputError:
        raise
    except Exception as error:  # h5py, zarr and anndata raise a dozen kinds for a bad file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as an AnnData file: {reason}") from None
    here = anndata.AnnData(obs=obs, var=var)
    if layer is None:
        return _Lazy(here, matrix, {})
    return _Lazy(here, None, {layer: matrix})


class _Lazy:
    """An AnnData's obs and var beside matrices on disk (an AnnData itself refuses zarr arrays)."""

    def __init__(self, frame: anndata.AnnData, x: Any, layers: dict[str, Any]) -> None:
        self.obs, self.var = frame.obs, frame.var
        self.obs_names, self.var_names = frame.obs_names, frame.var_names
        self.n_obs, self.n_vars = frame.n_obs, frame.n_vars
        self.X, self.layers = x, layers


def log1p_per_10k(block: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """log(1 + count / total * 1e4), the total over all columns of the cell."""
    totals = np.asarray(block.sum(axis=1), np.float64).ravel()
    block = block.astype(np.float64)
    block.data *= np.repeat(1e4 / np.where(totals > 0, totals, 1), np.diff(block.indptr))
    np.log1p(block.data, out=block.data)
    return block


def highly_variable(log_values: scipy.sparse.csr_matrix, n: int) -> np.ndarray:
    """Ascending positions of the n genes that vary most, by scanpy (flavor seurat)."""
    try:
        import scanpy
    except ImportError:
        raise InputError("hvg needs scanpy: pip install 'sae-jax[single-cell]'") from None
    if not 0 < n <= log_values.shape[1]:
        raise InputError(f"hvg must be in 1 .. {log_values.shape[1]} genes, not {n}")
    found = scanpy.pp.highly_variable_genes(
        anndata.AnnData(log_values.astype(np.float32)), n_top_genes=n, inplace=False
    )
    return np.flatnonzero(found["highly_variable"].to_numpy())

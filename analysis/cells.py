"""An AnnData file to what analyses need: log expression, gene symbols, an embedding, labels.

Everything a file can be wrong in is refused here, in one message, before any work. Of what is in a
file or a dask array (`anndata.read_h5ad(backed="r")`, `anndata.experimental.read_lazy`) the matrix
stays where it is and is read a block of cells at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from absl import logging
from scipy import sparse
from sklearn.decomposition import PCA

from analysis import chunked
from analysis.cell_sums import LARGEST_LOG_VALUE
from analysis.chunked import Chunked
from sae_jax.data import check_rows
from sae_jax.errors import InputError
from sae_jax.reading import check_file

EXPRESSION_KINDS = ("counts", "log1p")
TARGET_SUM = 1e4


@dataclasses.dataclass(frozen=True, eq=False)
class Expression:
    """x = ln(1 + normalised count), CSR float32 [cells, genes] or, of `parts`, in blocks of cells;
    and the genes' unique symbols."""

    x: sparse.csr_matrix | Chunked
    genes: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Of each gene over all cells, float64."""
        return _Survey.of(self.x.shape[1]).plus_rows(self.x).totals / self.x.shape[0]

    def of_genes(self, which: np.ndarray, names: np.ndarray) -> Expression:
        """Some genes alone, by position, under these names."""
        return Expression(self.x[:, which], names)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts(Expression):
    """Expression that stays where it is: x comes in blocks of cells. Called, it yields them, CSR
    [some cells, genes], from the first cell on.

    cells: their names. totals: of each gene over all of them, float64.
    """

    x: Chunked
    cells: pd.Index
    totals: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """As of `Expression`."""
        return self.totals / self.x.shape[0]

    def of_genes(self, which: np.ndarray, names: np.ndarray) -> Parts:
        """As of `Expression`."""
        some = functools.partial(_columns, of=self.x.transform, which=which)
        return Parts(self.x.then(some, len(which)), names, self.cells, self.totals[which])

    def __call__(self) -> Iterator[sparse.csr_matrix]:
        """All cells, in order."""
        return iter(self.x)


def read(path: str | Path) -> anndata.AnnData:
    """An h5ad file, or a zarr store of anndata. Dense matrices of an h5ad become sparse on the way.

    Raises:
      InputError: no such file, not one of these, no cells, or cells that share a name.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}")
    with _readable(path):
        if path.is_dir():
            adata = anndata.read_zarr(path)
        else:
            with h5py.File(path) as file:
                dense = [
                    name for name in ("X", "raw/X") if isinstance(file.get(name), h5py.Dataset)
                ]
            adata = anndata.read_h5ad(path, as_sparse=dense)
    if 0 in adata.shape:
        raise InputError(f"{path} holds {adata.n_obs} cells and {adata.n_vars} genes")
    _refuse_duplicates(adata.obs_names, "cell names", "obs_names_make_unique()")
    return adata


def annotations(path: str | Path, obsm: Sequence[str] = ()) -> anndata.AnnData:
    """obs, var and some of obsm of an h5ad file or zarr store; its matrices stay there (`parts`).

    Raises:
      InputError: as `read`, or no such key of obsm.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}")
    with _readable(path), contextlib.ExitStack() as stack:
        if path.is_dir():
            root = zarr.open_group(path, mode="r")
        else:
            root = stack.enter_context(h5py.File(path))
        obs, var = (_table(root, name) for name in ("obs", "var"))
        there = root.get("obsm", {})
        for key in obsm:
            _refuse_missing(key, there)
        read = {key: anndata.io.read_elem(there[key]) for key in obsm}
        adata = anndata.AnnData(obs=obs, var=var, obsm=read)
    if 0 in adata.shape:
        raise InputError(f"{path} holds {adata.n_obs} cells and {adata.n_vars} genes")
    _refuse_duplicates(adata.obs_names, "cell names", "obs_names_make_unique()")
    return adata


def expression(
    adata: anndata.AnnData,
    source: str,
    kind: str,
    symbols: str | None = None,
    *,
    memory_bytes: int = chunked.BLOCK_BYTES,
) -> Expression:
    """Expression as ln(1 + count per ten thousand).

    Args:
      source: `X`, `raw` or the name of a layer. In a file or as a dask array it stays that: what
        comes back is `Parts`.
      kind: what it holds: `counts` (integers; normalised here to 10,000 a cell, then log1p) or
        `log1p` (taken as it is). Never guessed: values that contradict it are refused.
      symbols: column of var with the genes' symbols; None for the var names. Genes without one are
        left out. Where a symbol occurs twice, its most expressed column stands for it.
      memory_bytes: of `Parts`, for a block of cells.

    Genes without a count in any cell are left out: they were not measured here.

    Raises:
      InputError: no such source or column, values that are not what `kind` says, var names that
        repeat and no `symbols`, or a part (a view) of an AnnData in a file.
    """
    _refuse_view_of_file(adata, source)
    x, var = _source(adata, source)
    if not isinstance(x, np.ndarray) and not sparse.issparse(x):
        return parts(adata, source, kind, symbols, memory_bytes=memory_bytes)
    x = _csr(x, source)
    _check_values(x.data, source, kind)
    x = _log1p(x, kind)
    if empty := int((x.sum(axis=1) == 0).sum()):
        logging.info("%d cells have no counts in %s", empty, source)
    genes, keep = _genes(var, symbols, _Survey.of(x.shape[1]).plus_rows(x).totals)
    return Expression(x[:, keep], genes)


def parts(
    where: str | Path | anndata.AnnData,
    source: str,
    kind: str,
    symbols: str | None = None,
    rows: int | None = None,
    *,
    memory_bytes: int = chunked.BLOCK_BYTES,
) -> Parts:
    """The expression of an h5ad file, a zarr store or an AnnData in blocks of cells, never all.

    One pass over the cells checks the values and finds the measured genes; of a dask array with a
    `dask.distributed` client its workers make it.

    Args:
      where: a path, or an AnnData whose matrix is in memory, in a file, or a dask array.
      source, kind, symbols: as in `expression`.
      rows: cells of a block at most; None: as many as `memory_bytes` has place for.
      memory_bytes: for a block and what is made of it.

    Raises:
      InputError: as `read` and `expression`; a matrix stored by genes (CSC), or memory for not even
        one cell.
    """
    blocks, var, cells = stored(where, source, rows, memory_bytes=memory_bytes)
    blocks = blocks.then(functools.partial(_block, source=source, kind=kind), blocks.shape[1])
    totals, fractional = survey(blocks)
    if not totals.any():
        raise InputError(f"{source} holds nothing but zeros")
    if kind == "log1p" and not fractional:
        raise InputError(f"{source} is said to hold log1p values, but all are integers; counts?")
    genes, keep = _genes(var, symbols, totals)
    kept = functools.partial(_block, source=source, kind=kind, keep=keep)
    return Parts(blocks.then(kept, len(keep)), genes, cells, totals[keep])


def stored(
    where: str | Path | anndata.AnnData,
    source: str,
    rows: int | None = None,
    *,
    memory_bytes: int = chunked.BLOCK_BYTES,
) -> tuple[Chunked, pd.DataFrame, pd.Index]:
    """A matrix of cells as it is, in blocks; what its columns are; the cells' names. No value of
    it has been read. Arguments and errors as of `parts`."""
    if isinstance(where, anndata.AnnData):
        _refuse_view_of_file(where, source)
        matrix, var = _source(where, source)
        cells, name = where.obs_names, source
    else:
        matrix, var, cells = _opened(Path(where), source)
        name = f"{where}: {source}"
    _refuse_duplicates(cells, "cell names", "obs_names_make_unique()")
    blocks = chunked.chunked(matrix, name, memory_bytes=memory_bytes, rows=rows)
    if not isinstance(where, anndata.AnnData):
        blocks = dataclasses.replace(blocks, _read=functools.partial(_read, Path(where), matrix))
    return blocks, var, cells


def survey(blocks: Chunked) -> tuple[np.ndarray, bool]:
    """Each column's total, float64, added in the order of the rows; and whether any value is no
    integer. One pass over the rows."""
    found = blocks.fold(_Surveying(blocks.shape[1]))
    return found.totals, found.fractional


@dataclasses.dataclass(frozen=True, eq=False)
class _Survey:
    """Of some cells: the genes' totals, float64, added in the order of the cells; and whether any
    value is no integer."""

    totals: np.ndarray
    fractional: bool

    @classmethod
    def of(cls, genes: int) -> _Survey:
        return cls(np.zeros(genes), False)

    def plus_rows(self, x: sparse.csr_matrix) -> _Survey:
        np.add.at(self.totals, x.indices, x.data.astype(np.float64))
        return _Survey(self.totals, self.fractional or bool((x.data % 1 != 0).any()))

    def plus(self, other: _Survey) -> _Survey:
        return _Survey(self.totals + other.totals, self.fractional or other.fractional)


@dataclasses.dataclass(frozen=True)
class _Surveying:
    """The `chunked.Work` that makes it."""

    genes: int

    def part(self, rows: slice) -> _Surveying:
        return self

    def start(self) -> _Survey:
        return _Survey.of(self.genes)

    def add(self, state: _Survey, block: sparse.csr_matrix) -> _Survey:
        return state.plus_rows(block)


def _opened(path: Path, source: str) -> tuple[Any, pd.DataFrame, pd.Index]:
    """A matrix that stays in its file, its columns, and the cells' names."""
    if not path.exists():
        raise InputError(f"there is no file {path}")
    with _readable(path):
        root = zarr.open_group(path, mode="r") if path.is_dir() else h5py.File(path)
        place = {"X": "X", "raw": "raw/X"}.get(source, f"layers/{source}")
        if place not in root:
            raise InputError(f"{path} has no {place}")
        node = root[place]
        var = _table(root, "raw/var" if source == "raw" else "var")
        cells = _table(root, "obs").index
        matrix = anndata.io.sparse_dataset(node) if hasattr(node, "keys") else node
    return matrix, var, cells


def _table(root: Any, name: str) -> pd.DataFrame:
    """obs or var of an open file."""
    if isinstance(root[name], h5py.Dataset):
        raise InputError(
            f"{root.filename} is of an anndata before 0.7, whose {name} is no table of columns: "
            "anndata.read_h5ad(OLD).write_h5ad(NEW) writes it anew"
        )
    return anndata.io.read_elem(root[name])


def _read(path: Path, matrix: Any, start: int, stop: int) -> Any:
    with _readable(path):
        return matrix[start:stop]


def _block(
    raw: Any, source: str, kind: str, keep: np.ndarray | slice = slice(None)
) -> sparse.csr_matrix:
    """Cells as they were read, checked, as log1p of some genes."""
    block = _csr(raw, source)
    if block.nnz:
        _check_values(block.data, source, kind, of_all=False)
    return _log1p(block, kind)[:, keep]


def _columns(
    raw: Any, of: Callable[[Any], sparse.csr_matrix], which: np.ndarray
) -> sparse.csr_matrix:
    """Some columns of what `of` makes of cells."""
    return of(raw)[:, which]


def embedding(adata: anndata.AnnData, key: str) -> np.ndarray:
    """obsm[key] as float32 [cells, dimensions].

    Raises:
      InputError: no such key, or values that are not finite numbers.
    """
    _refuse_missing(key, adata.obsm)
    x = adata.obsm[key]
    x = x.compute() if chunked.is_dask(x) else x
    x = x.toarray() if sparse.issparse(x) else np.asarray(x)
    name = f"obsm[{key!r}]"
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        return check_rows(check_rows(x, name).astype(np.float32, copy=False), name)


def pca(x: sparse.csr_matrix, dimensions: int = 50) -> np.ndarray:
    """Principal components of the cells of x [cells, genes], float32; centred, not scaled.

    Fewer than `dimensions` where there are not so many cells or genes.
    """
    dimensions = min(dimensions, min(x.shape) - 1)
    if dimensions < 1:
        raise InputError(f"{x.shape[0]} cells × {x.shape[1]} genes have no principal components")
    model = PCA(dimensions, svd_solver="arpack", random_state=0)
    return model.fit_transform(x.astype(np.float64)).astype(np.float32)


def labels(adata: anndata.AnnData, column: str) -> pd.Series:
    """obs[column] as text categories; cells without a label stay NaN.

    Raises:
      InputError: no such column, numbers that are not integers, or not at least two labels and at
        most half as many as cells.
    """
    obs = in_memory(adata.obs)
    if column not in obs:
        raise InputError(f"obs has no column {column!r}; it has {_listing(obs.columns)}")
    values = obs[column]
    if pd.api.types.is_float_dtype(values):  # integers with gaps, or not labels at all
        if not np.isfinite(values.dropna()).all() or (values.dropna() % 1).any():
            raise InputError(f"obs[{column!r}] holds numbers, not labels of cells")
        values = values.astype("Int64")
    values = values.astype(str).where(values.notna()).astype("category")
    count = len(values.cat.categories)
    if not 2 <= count <= max(2, len(values) // 2):
        raise InputError(
            f"obs[{column!r}] holds {count} different labels for {len(values)} cells; "
            "a label is shared by cells, and there are at least two"
        )
    columns = values.cat.categories.str.replace("/", "|")
    if columns.has_duplicates:
        twice = values.cat.categories[columns.duplicated(keep=False)]
        raise InputError(
            f"obs[{column!r}] has labels that differ in a slash and a bar only, which one column "
            f"name would stand for: {_listing(twice)}"
        )
    return values


def _log1p(x: sparse.csr_matrix, kind: str) -> sparse.csr_matrix:
    """ln(1 + count per ten thousand of the cell), float32; log1p values as they are."""
    if kind == "counts":
        totals = np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()
        scale = TARGET_SUM / np.where(totals > 0, totals, 1)
        x = sparse.csr_matrix(sparse.diags_array(scale) @ x)
        x.data = np.log1p(x.data)
    return x.astype(np.float32)


def _genes(
    var: pd.DataFrame, symbols: str | None, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unique symbols of the measured genes, and their columns, rising."""
    if symbols is None:
        _refuse_duplicates(var.index, "gene names", "var_names_make_unique(), or --gene_symbols")
        genes, keep = var.index.astype(str), np.arange(len(var))
    elif symbols not in var:
        raise InputError(f"var has no column {symbols!r}; it has {_listing(var.columns)}")
    else:
        genes, keep = var[symbols].astype(str), _representatives(var[symbols], totals)
    keep = keep[totals[keep] > 0]
    return genes.to_numpy(dtype=str)[keep], keep


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What anndata, h5py and zarr raise of a bad file, as one message."""
    if not path.is_dir():
        check_file(path)
    try:
        with warnings.catch_warnings():  # of old layouts, which anndata reads all the same
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except InputError:
        raise
    except Exception as error:  # anndata's IORegistryError and codecs' own among them
        kind = "a zarr store of anndata" if path.is_dir() else "an h5ad file"
        raise InputError(f"{path} cannot be read as {kind}: {_first_line(error)}") from error


def _source(adata: anndata.AnnData, source: str) -> tuple[Any, pd.DataFrame]:
    """A matrix of cells, and what its columns are."""
    if source == "X":
        if adata.X is None:
            raise InputError(f"the file has no X; there are layers {_listing(adata.layers)}")
        return adata.X, in_memory(adata.var)
    if source == "raw":
        if adata.raw is None:
            raise InputError(
                f"the file has no raw; there are X and layers {_listing(adata.layers)}"
            )
        return adata.raw.X, in_memory(adata.raw.var)
    if source not in adata.layers:
        raise InputError(
            f"there is no layer {source!r}; there are X, raw and {_listing(adata.layers)}"
        )
    return adata.layers[source], in_memory(adata.var)


def in_memory(table: Any) -> pd.DataFrame:
    """obs or var; `read_lazy` has them in a file."""
    return table if isinstance(table, pd.DataFrame) else table.to_memory()


def _csr(x: sparse.spmatrix | np.ndarray, source: str) -> sparse.csr_matrix:
    """CSR of real numbers; refuses indices that point outside, which SciPy would follow."""
    if x.dtype.kind not in "biuf":
        raise InputError(f"{source} holds {x.dtype} values; expression is made of real numbers")
    if x.dtype == np.float16:
        x = x.astype(np.float32)
    return sparse.csr_matrix(chunked.sound(x, source))


def _check_values(values: np.ndarray, source: str, kind: str, of_all: bool = True) -> None:
    """Refuse stored values that are not what `kind` says they are.

    A part alone (not `of_all`) may be zeros, or integers that are log1p of something.
    """
    if kind not in EXPRESSION_KINDS:
        raise InputError(f"expression_is={kind!r} is not one of {', '.join(EXPRESSION_KINDS)}")
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise InputError(f"{source} holds {bad} NaN or infinite values")
    if of_all and (values.size == 0 or not values.any()):
        raise InputError(f"{source} holds nothing but zeros")
    if values.min() < 0:
        raise InputError(
            f"{source} holds negative values (down to {values.min():.4g}): scaled or corrected "
            "expression is neither counts nor log1p; give raw or a layer that is"
        )
    fractional = values % 1 != 0
    if kind == "counts" and fractional.any():
        raise InputError(
            f"{source} is said to hold counts, but {fractional.mean():.0%} of its non-zero values "
            f"are not integers ({values[fractional][0]:.4g}, for instance); log1p, perhaps?"
        )
    if kind == "log1p" and of_all and not fractional.any():
        raise InputError(f"{source} is said to hold log1p values, but all are integers; counts?")
    if kind == "log1p" and values.max() > LARGEST_LOG_VALUE:
        raise InputError(
            f"{source} is said to hold log1p values, but goes up to {values.max():.4g}; "
            "it was normalised and not logarithmised, perhaps?"
        )


def _representatives(symbols: pd.Series, totals: np.ndarray) -> np.ndarray:
    """Sorted positions of one column per symbol: the most expressed, the first among equals."""
    named = symbols.notna() & (symbols.astype(str).str.strip() != "")
    table = pd.DataFrame({"symbol": symbols.astype(str).to_numpy(), "total": totals})[
        named.to_numpy()
    ]
    if table.empty:
        raise InputError(f"var[{symbols.name!r}] names no gene")
    best = table.groupby("symbol", sort=False)["total"].idxmax().to_numpy()
    repeated = sorted(table.loc[table["symbol"].duplicated(), "symbol"].unique())
    if repeated:
        logging.info(
            "%d symbols occur more than once; the most expressed column stands for each: %s",
            len(repeated),
            _listing(repeated),
        )
    if not named.all():
        logging.info("%d genes have no symbol and are left out", (~named).sum())
    return np.sort(best)


def _refuse_view_of_file(adata: anndata.AnnData, source: str) -> None:
    if adata.isbacked and adata.is_view and source not in adata.layers:  # which are in memory
        raise InputError(
            "this is a part of an AnnData in a file, which anndata reads as a whole: give the "
            "AnnData itself, or open it by anndata.experimental.read_lazy"
        )


def _refuse_missing(key: str, obsm: Any) -> None:
    if key not in obsm:
        raise InputError(f"obsm has no {key!r}; it has {_listing(obsm)}")


def _refuse_duplicates(names: pd.Index, what: str, remedy: str) -> None:
    repeated = names[names.duplicated()].unique()
    if len(repeated):
        raise InputError(f"{len(repeated)} {what} occur twice ({_listing(repeated)}): use {remedy}")


def _listing(names: object, most: int = 10) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") or "none"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""The genes that vary most, by scanpy's `pp.highly_variable_genes`, over blocks of cells.

    seurat_v3   Stuart et al. 2019: variance of counts, standardised by the variance that a local
                regression expects at their mean and clipped at sqrt(cells)
    seurat      Satija et al. 2015: ln(variance / mean), standardised within 20 bins of ln(1 + mean)

scanpy wants all cells at once. Here sums go on from block to block in the order of the cells, in
the types that scanpy uses: of whole counts scores are scanpy's to the bit, however cells are cut;
of others they are those of scanpy on one thread.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import scipy.sparse

from extract.errors import InputError, one_line

FLAVORS = ("seurat_v3", "seurat")
_BINS, _SPAN = 20, 0.3  # scanpy's
Blocks = Callable[[], Iterable[scipy.sparse.csr_matrix]]


def highly_variable(blocks: Blocks, n_genes: int, n: int, flavor: str) -> np.ndarray:
    """Ascending positions of exactly the n genes that vary most.

    Args:
      blocks: gives all cells anew at each call, float32 [some cells, genes] at a time.
      n_genes: columns of a block.
      flavor: "seurat_v3" of raw counts, "seurat" of log1p values. Equal genes go by position.

    Raises:
      InputError: a library that is missing, too few cells for the fit.
    """
    score = (_seurat_v3 if flavor == "seurat_v3" else _seurat)(blocks, n_genes)
    score = np.where(np.isnan(score), -np.inf, score)
    return np.sort(np.argsort(-score, kind="stable")[:n])


def _seurat_v3(blocks: Blocks, n_genes: int) -> np.ndarray:
    """Clipped, standardised variance, float64 [genes]."""
    try:
        from skmisc.loess import loess
    except ImportError:
        raise InputError(
            "hvg_flavor='seurat_v3' needs scikit-misc: pip install 'sae-jax[single-cell]'"
        ) from None
    cells, mean, variance = _moments(blocks(), n_genes)
    varies = variance > 0
    try:
        fit = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=_SPAN, degree=2)
        fit.fit()
    except Exception as error:  # of its own, for too few values
        raise InputError(
            f"hvg: the regression of seurat_v3 fails on these {cells} cells x {n_genes} genes "
            f"({one_line(error)}); take more cells, or name the genes by gene_list="
        ) from None
    expected = np.zeros(n_genes)
    expected[varies] = fit.outputs.fitted_values
    deviation = np.sqrt(10**expected)
    highest = deviation * np.sqrt(cells) + mean
    sums, squares = np.zeros(n_genes), np.zeros(n_genes)
    for block in blocks():
        clipped = np.minimum(block.data.astype(np.float64), highest[block.indices])
        np.add.at(sums, block.indices, clipped)
        np.add.at(squares, block.indices, clipped**2)
    spread = cells * np.square(mean) + squares - 2 * sums * mean
    return 1 / ((cells - 1) * np.square(deviation)) * spread


def _seurat(blocks: Blocks, n_genes: int) -> np.ndarray:
    """Dispersion, standardised among genes of like mean, float64 [genes]; NaN of constant ones."""
    _, mean, variance = _moments((np.expm1(block) for block in blocks()), n_genes)
    mean[mean == 0] = 1e-12
    ratio = variance / mean
    ratio[ratio <= 0] = np.nan
    dispersion = pd.Series(np.log(ratio))
    bins = pd.cut(np.log1p(mean), bins=_BINS)
    found = dispersion.groupby(bins, observed=True).agg(["mean", "std"]).loc[bins]
    centre, scale = (found[name].to_numpy(copy=True) for name in ("mean", "std"))
    alone = np.isnan(scale)  # in its bin: its score is 1
    scale[alone], centre[alone] = centre[alone], 0
    with np.errstate(divide="ignore", invalid="ignore"):  # in its bin all are equal: no score
        return (dispersion.to_numpy() - centre) / scale


def _moments(
    blocks: Iterable[scipy.sparse.csr_matrix], n_genes: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """How many cells there are; mean and unbiased variance, float64 [genes]."""
    cells, sums, squares = 0, np.zeros(n_genes), np.zeros(n_genes)
    for block in blocks:
        cells += block.shape[0]
        np.add.at(sums, block.indices, block.data)  # in order, whatever came in earlier blocks
        np.add.at(squares, block.indices, block.data * block.data)
    if not cells:
        raise InputError("hvg: there are no cells to choose genes by")
    mean = sums / cells
    variance = squares / cells - mean**2
    return cells, mean, variance * (cells / (cells - 1) if cells > 1 else 1)

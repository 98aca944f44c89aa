"""Which genes go along with a feature: Pearson correlations, all genes and features at once.

Kendiukhov, section 3.4: the genes most correlated with a feature describe it, and are tested for
markers of cell types (`markers`). The paper correlates with expression, its code with whether a
gene is expressed at all (`presence`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from analysis.blocks import slices
from analysis.features import Matrix
from sae_jax.errors import InputError

BLOCK = 256  # features that are dense at a time
DECIMALS = 12  # beyond them the order of correlations is rounding


@dataclass(frozen=True, eq=False)
class TopGenes:
    """The genes most correlated with each feature, the strongest first; all [features, n].

    genes: positions; -1 where there are fewer of that sign, or the feature is constant.
    r: their correlations; NaN at -1.
    r_held_out: the same genes' on other cells; NaN at -1, where either is constant there, and
        where no other cells were given.
    """

    genes: np.ndarray
    r: np.ndarray
    r_held_out: np.ndarray

    def selected(self, n_genes: int) -> sparse.csr_array:
        """Which genes are among them, boolean [features, genes]."""
        n_features, n = self.genes.shape
        there = self.genes >= 0
        feature = np.repeat(np.arange(n_features), n).reshape(self.genes.shape)
        ones = np.ones(int(there.sum()), bool)
        return sparse.csr_array(
            (ones, (feature[there], self.genes[there])), shape=(n_features, n_genes)
        )


def presence(expression: Matrix) -> sparse.csr_matrix:
    """1 where a gene is expressed [cells, genes]: what the authors' code correlates with."""
    found = sparse.csr_matrix(expression, copy=True)
    found.eliminate_zeros()
    found.data = np.ones(found.nnz, found.dtype)
    return found


def expressed(expression: Matrix, cells: int) -> np.ndarray:
    """Positions of the genes that at least so many cells express."""
    return np.flatnonzero(sparse.csr_array(expression).count_nonzero(axis=0) >= cells)


def correlations(
    z: Matrix, expression: Matrix, block: int = BLOCK
) -> Iterator[tuple[slice, np.ndarray]]:
    """Pearson's r of every feature with every gene, some features at a time.

        r = sum (z - mean z) x / (|z - mean z| |x - mean x|)

    With z centred the mean of x falls out of the product, which is then over its non-zero entries.

    Args:
        z: [cells, features], dense or sparse; negative values are allowed (components).
        expression: x [cells, genes], dense or sparse.
        block: features at a time; it changes no result.

    Yields:
        Which features, and their r [features, genes], float64, from -1 to 1; NaN where the feature
        or the gene is constant.

    Raises:
        InputError: unequal numbers of cells, fewer than three, or values that are not finite.
    """
    x = sparse.csr_array(expression, dtype=np.float64)
    columns = sparse.csc_array(z, dtype=np.float64) if sparse.issparse(z) else np.asarray(z)
    if np.ndim(columns) != 2 or columns.shape[0] != x.shape[0] or x.shape[0] < 3:
        raise InputError(
            f"activations have shape {np.shape(z)} and expression {x.shape}: give the same cells, "
            "three at least."
        )
    for name, values in {"activations": columns, "expression": x}.items():
        stored = values.data if sparse.issparse(values) else values
        if not np.isfinite(stored).all():
            raise InputError(f"{name} hold NaN or infinite values: drop such cells.")
    norm_x = _norms(x)
    transposed = x.T.tocsr()
    for part in slices(columns.shape[1], block):
        some = columns[:, part]
        some = np.asarray(some.toarray() if sparse.issparse(some) else some, np.float64)
        varies = some.max(axis=0) > some.min(axis=0)
        centred = some - some.mean(axis=0)
        scale = np.linalg.norm(centred, axis=0)[:, None] * norm_x
        r = np.full((some.shape[1], x.shape[1]), np.nan)
        defined = varies[:, None] & (scale > 0)
        np.divide((transposed @ centred).T, scale, out=r, where=defined)
        yield part, np.clip(r, -1, 1, out=r)


def top_genes(
    z: Matrix,
    expression: Matrix,
    n: int = 50,
    *,
    held_out: tuple[Matrix, Matrix] | None = None,
    block: int = BLOCK,
) -> dict[str, TopGenes]:
    """The n genes of highest ("up") and of lowest ("down") correlation with each feature.

    Equal correlations (to 12 decimals) keep the order of the genes. A gene counts for one side
    only: up if its r is above 0, down if it is below.

    Args:
        z, expression, block: as in `correlations`.
        n: genes of each side, at most.
        held_out: the same of other cells, whose correlations of the chosen genes are given beside.

    Raises:
        InputError: as `correlations`; n below 1; held-out cells of other features or genes.
    """
    if n < 1:
        raise InputError(f"n={n}: give at least one gene.")
    shape = (np.shape(z)[1], min(n, np.shape(expression)[1]))
    others = iter(()) if held_out is None else correlations(*held_out, block)
    if held_out is not None and (
        held_out[0].shape[1] != shape[0] or held_out[1].shape[1] != np.shape(expression)[1]
    ):
        raise InputError("the held-out cells have other features or genes than the first.")
    found = {
        side: TopGenes(np.full(shape, -1), np.full(shape, np.nan), np.full(shape, np.nan))
        for side in ("up", "down")
    }
    for part, r in correlations(z, expression, block):
        _, beside = next(others, (part, None))
        rounded = np.round(r, DECIMALS)
        for side, sign in {"up": 1, "down": -1}.items():
            signed = np.where(sign * rounded > 0, sign * rounded, -np.inf)  # NaN never counts
            for row, at in enumerate(_largest(signed, shape[1]), start=part.start):
                here, k = row - part.start, slice(len(at))
                found[side].genes[row, k] = at
                found[side].r[row, k] = r[here, at]
                if beside is not None:
                    found[side].r_held_out[row, k] = beside[here, at]
    return found


def _largest(values: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Of each row the positions of its n largest values above -inf, descending, ties in order."""
    least = np.partition(values, values.shape[1] - n, axis=1)[:, values.shape[1] - n]
    for row, bound in zip(values, least, strict=True):
        at = np.flatnonzero((row >= bound) & (row > -np.inf))
        yield at[np.argsort(-row[at], kind="stable")][:n]


def _norms(x: sparse.csr_array) -> np.ndarray:
    """|x - mean x| of every column; exactly 0 where a column is constant."""
    n_cells = x.shape[0]
    mean = x.sum(axis=0) / n_cells
    entry = mean[x.indices]
    squares = np.bincount(x.indices, (x.data - entry) ** 2, minlength=x.shape[1])
    squares += (n_cells - np.bincount(x.indices, minlength=x.shape[1])) * mean**2
    varies = x.max(axis=0).toarray() > x.min(axis=0).toarray()
    return np.where(varies, np.sqrt(squares), 0)

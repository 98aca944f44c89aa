"""Sums over the cells of every feature's groups, from which means, variances and tests follow.

All of them float64, over the non-zero entries of the expression alone. Sums add up over blocks of
cells, so expression that no memory holds is read a block at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from analysis import kernels
from analysis.features import Matrix
from sae_jax.errors import InputError

# exp(30) is a thousand times the largest library there is: values beyond it are not logarithms.
LARGEST_LOG_VALUE = 30.0
EPSILON = np.finfo(np.float64).eps

# x, its square, exp(x) - 1, x != 0; of a sparse x the second and fourth are None.
Moments = tuple[Matrix, Matrix | None, Matrix, Matrix | None]


class Sums(NamedTuple):
    """Sums over the cells of a group, for every feature and gene."""

    n: np.ndarray  # cells [features, 1]
    x: np.ndarray  # sums [features, genes] of the expression,
    square: np.ndarray  # of its square,
    count: np.ndarray  # and of exp(x) - 1,
    detected: np.ndarray  # and the number of cells with any
    rounding: np.ndarray  # what rounding can have added to a sum of squares [features, genes]

    @property
    def variance(self) -> np.ndarray:
        """Unbiased, exactly zero where the sums cannot tell it from zero [features, genes]."""
        deviation = self.square - self.x**2 / self.n
        # Rounding enters once with the squares and twice with the square of the sum.
        deviation[deviation <= 4 * self.rounding] = 0
        return deviation / (self.n - 1)

    def plus(self, other: Sums) -> Sums:
        """Over the cells of both, which share none."""
        n = self.n + other.n
        square = self.square + other.square
        sums = (self.x + other.x, square, self.count + other.count, self.detected + other.detected)
        return Sums(n, *sums, rounding=n * EPSILON * square)

    def less(self, part: Sums) -> Sums:
        """Over the cells that are not of `part`.

        Both were added up by the same product in the order of the cells, so a gene that occurs in
        no cell of the rest gets sums of exactly zero.
        """
        sums = (a - b for a, b in zip(self[:5], part[:5], strict=True))
        return Sums(*sums, rounding=self.rounding)


def moments_of(expression: Matrix) -> Moments:
    """x, its square, its count exp(x) - 1 and whether there is any, in the expression's format.

    Of a sparse one the second and the fourth follow from x as it is read, and float32 stays: sums
    are float64 all the same.
    """
    if np.ndim(expression) != 2:
        raise InputError(
            f"expression has {np.ndim(expression)} dimensions: give a matrix of cells by genes."
        )
    if not sparse.issparse(expression):
        x = np.asarray(expression, dtype=np.float64)
        _check(x)
        return x, x**2, np.expm1(x), (x != 0).astype(np.float64)
    single = expression.dtype == np.float32
    x = sparse.csr_array(expression, dtype=np.float32 if single else np.float64)
    if not x.has_canonical_format or not x.data.all():
        x = x.copy()
        x.sum_duplicates()
        x.eliminate_zeros()
    _check(x.data)
    return x, None, sparse.csr_array((np.expm1(x.data), x.indices, x.indptr), shape=x.shape), None


def over_all(moments: Moments) -> Sums:
    """Over all cells [1, genes]."""
    everything = np.ones((1, moments[0].shape[0]), dtype=bool)
    return over(sparse.csr_array(everything), moments)


def over(mask: sparse.csr_array, moments: Moments) -> Sums:
    """Sums over the cells of each feature's group."""
    return over_both(sparse.csr_array(mask.shape, dtype=bool), mask, moments)[1]


def over_both(
    part: sparse.csr_array, mask: sparse.csr_array, moments: Moments
) -> tuple[Sums, Sums]:
    """Sums over the cells of `part`, which lie in `mask`, and over those of `mask`."""
    features, (x, _, count, *_) = mask.shape[0], moments
    inside = _inside(part, mask)
    if sparse.issparse(x):
        whole, smaller = np.zeros((2, features, 4, x.shape[1]))
        kernels.group_sums(
            mask.indptr, mask.indices, inside, x.indptr, x.indices, x.data, count.data, whole,
            smaller,
        )  # fmt: skip
        sums = [[table[:, i] for i in range(4)] for table in (smaller, whole)]
    else:
        weights = [table.astype(np.float64) for table in (part, mask)]
        sums = [[weight @ moment for moment in moments] for weight in weights]
    # n terms added one after another are off by at most n eps of their sum.
    return tuple(
        Sums(n, *four, rounding=n * EPSILON * four[1])
        for n, four in zip(
            (np.diff(part.indptr)[:, None], np.diff(mask.indptr)[:, None]), sums, strict=True
        )
    )


def _inside(part: sparse.csr_array, mask: sparse.csr_array) -> np.ndarray:
    """Which entries of `mask` are entries of `part`; cells rise within a feature in both."""

    def keys(table: sparse.csr_array) -> np.ndarray:
        feature = np.repeat(np.arange(table.shape[0], dtype=np.int64), np.diff(table.indptr))
        return feature * table.shape[1] + table.indices

    found = np.zeros(mask.nnz, dtype=bool)
    found[np.searchsorted(keys(mask), keys(part))] = True
    return found


def _check(x: np.ndarray) -> None:
    smallest, largest = np.min(x, initial=0.0), np.max(x, initial=0.0)
    if not (smallest >= 0 and largest <= LARGEST_LOG_VALUE):
        raise InputError(
            f"expression ranges from {smallest:g} to {largest:g}: it must be ln(1 + normalised "
            f"count), from 0 to {LARGEST_LOG_VALUE:g} and never NaN. Normalise raw counts (scanpy: "
            "normalize_total, then log1p); do not scale or centre genes."
        )

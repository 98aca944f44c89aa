"""Sums over the cells of every feature's groups, from which means, variances and tests follow.

All of them float64, over the non-zero entries of the expression alone, in the order of the cells.
Expression that no memory holds comes a block of cells at a time (`GroupWork`): sparse blocks are
added entry by entry to what there is, so the sums are the same to the last bit whatever the blocks.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import sparse

from analysis import chunked, kernels
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

    def less(self, part: Sums) -> Sums:
        """Over the cells that are not of `part`.

        Both were added up in the order of the cells, so a gene that occurs in no cell of the rest
        gets sums of exactly zero.
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
    chunked.sound(expression)
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
    smaller, whole = np.zeros((2, mask.shape[0], 4, moments[0].shape[1]))
    _add(part, mask, moments, smaller, whole)
    return _sums(np.diff(part.indptr), smaller), _sums(np.diff(mask.indptr), whole)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupWork:
    """What `chunked.Chunked.fold` adds up: sums over two groups of every feature.

    Attributes:
      first, second: their cells, boolean CSC [features, cells]; the first lie in the second, or the
        two share none.
      within: which of these it is.
      genes: how many.
    """

    first: sparse.csc_array
    second: sparse.csc_array
    within: bool
    genes: int

    def and_all(self) -> GroupWork:
        """One feature more, the last, whose second group is all cells; of the first it has none."""
        one = (1, self.first.shape[1])
        return dataclasses.replace(
            self,
            first=sparse.vstack([self.first, sparse.csc_array(one, dtype=bool)], "csc"),
            second=sparse.vstack([self.second, sparse.csc_array(np.ones(one, bool))], "csc"),
        )

    def part(self, rows: slice) -> GroupWork:
        """Of some cells."""
        return dataclasses.replace(self, first=self.first[:, rows], second=self.second[:, rows])

    def start(self) -> GroupSums:
        """Of no cell."""
        features = self.first.shape[0]
        return GroupSums(np.zeros((2, features), np.int64), np.zeros((2, features, 4, self.genes)))

    def add(self, state: GroupSums, block: Matrix) -> GroupSums:
        """With the cells of this part, log expression [cells, genes] dense or sparse, written into
        the state."""
        moments = moments_of(block)
        first, second = self.first.tocsr(), self.second.tocsr()
        if self.within:
            _add(first, second, moments, *state.tables)
        else:
            for mask, table in zip((first, second), state.tables, strict=True):
                _add(sparse.csr_array(mask.shape, dtype=bool), mask, moments, None, table)
        state.n[:] += np.diff(first.indptr), np.diff(second.indptr)
        return state


@dataclasses.dataclass(frozen=True, eq=False)
class GroupSums:
    """Of two groups the cells [2, features], and the sums of x, of its square, of exp(x) - 1, and
    the number of cells with any [2, features, 4, genes]."""

    n: np.ndarray
    tables: np.ndarray

    def plus(self, other: GroupSums) -> GroupSums:
        """Over the cells of both, which share none."""
        return GroupSums(self.n + other.n, self.tables + other.tables)

    def without_all(self) -> tuple[GroupSums, Sums]:
        """Without the feature of `GroupWork.and_all`, and its sums: those over all cells."""
        _, everything = self.of(slice(-1, None))
        # Copies, which do not hold all the tables.
        everything = Sums(*(part.copy() for part in everything))
        return GroupSums(self.n[:, :-1], self.tables[:, :-1]), everything

    def of(self, rows: slice) -> tuple[Sums, Sums]:
        """Sums over either group, of some features."""
        first, second = (
            _sums(n[rows], table[rows]) for n, table in zip(self.n, self.tables, strict=True)
        )
        return first, second


def _sums(n: np.ndarray, table: np.ndarray) -> Sums:
    # n terms added one after another are off by at most n eps of their sum.
    n = n[:, None]
    return Sums(n, *(table[:, i] for i in range(4)), rounding=n * EPSILON * table[:, 1])


def _add(
    part: sparse.csr_array, mask: sparse.csr_array, moments: Moments,
    smaller: np.ndarray | None, whole: np.ndarray,
) -> None:  # fmt: skip
    """Adds sums over the cells of `part`, which lie in `mask`, and over those of `mask`, to tables
    [features, 4, genes]; without `smaller` the first has no cells."""
    x, _, count, *_ = moments
    if sparse.issparse(x):
        kernels.group_sums(
            mask.indptr, mask.indices, _inside(part, mask), x.indptr, x.indices, x.data,
            count.data, whole, whole if smaller is None else smaller,
        )  # fmt: skip
        return
    for table, some in ((smaller, part), (whole, mask)):
        if table is not None:
            weight = some.astype(np.float64)
            for i, moment in enumerate(moments):
                table[:, i] += weight @ moment


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

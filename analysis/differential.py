"""Which genes differ between the cells where a feature is high and the cells where it is silent.

Schuster A.3.4 (unpaired): Welch's t-test and the fold change of means, for every feature and gene
at once. The groups are sparse masks; all sums are float64, over the non-zero entries alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from scipy import sparse, special

from analysis import kernels
from analysis.features import Matrix, as_columns, feature_of_entry
from sae_jax.errors import InputError

# exp(30) is a thousand times the largest library there is: values beyond it are not logarithms.
LARGEST_LOG_VALUE = 30.0
EPSILON = np.finfo(np.float64).eps


# x, its square, exp(x) - 1, x != 0; of a sparse x the second and fourth are None.
Moments = tuple[Matrix, Matrix | None, Matrix, Matrix | None]


class Groups(NamedTuple):
    """Cells of every feature, as boolean CSR masks [features, cells]: `high` lies in `active`."""

    high: sparse.csr_array
    active: sparse.csr_array


@dataclass(frozen=True, eq=False)
class Welch:
    """Welch's t-test of the high against the low group, float64.

    t, df, p: statistic (positive: higher in the high group), degrees of freedom and two-sided
        p-value [features, genes]. NaN where a gene is constant in both groups, and for a feature
        with fewer than two cells in a group: nothing can be tested, and nothing is dropped.
    log2_fold_change: log2 of the ratio of mean counts, pseudocount added [features, genes].
    mean_high, mean_low: means of the expression as given [features, genes]; NaN for no cells.
    var_high, var_low: unbiased variances [features, genes].
    detected_high, detected_low: share of the group's cells with any count [features, genes].
    n_high, n_low: cells in each group [features].
    """

    t: np.ndarray
    df: np.ndarray
    p: np.ndarray
    log2_fold_change: np.ndarray
    mean_high: np.ndarray
    mean_low: np.ndarray
    var_high: np.ndarray
    var_low: np.ndarray
    detected_high: np.ndarray
    detected_low: np.ndarray
    n_high: np.ndarray
    n_low: np.ndarray

    @property
    def cohens_d(self) -> np.ndarray:
        """Difference of the means over the pooled standard deviation [features, genes]; NaN where
        that is zero."""
        n, m = self.n_high[:, None], self.n_low[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            pooled = ((n - 1) * self.var_high + (m - 1) * self.var_low) / (n + m - 2)
            d = (self.mean_high - self.mean_low) / np.sqrt(pooled)
        d[pooled == 0] = np.nan
        return d


def top_cells(activations: Matrix, percentile: float = 99.0) -> Groups:
    """The cells above a percentile of a feature's activation, zeros counted (Schuster, section 5).

    The percentile is NumPy's linear one over ALL cells, and "above" is strict. If a feature is
    active in fewer cells than lie above the percentile, the percentile is 0 and all active cells
    are high.

    Args:
        activations: non-negative [cells, features], dense or sparse.
        percentile: from 0 up to, not including, 100.

    Returns:
        The high and the active cells of every feature.

    Raises:
        InputError: as `features.as_columns`; if there are no cells, or for another percentile.
    """
    if not 0 <= percentile < 100:
        raise InputError(f"percentile={percentile}: give a number of at least 0 and below 100.")
    columns = as_columns(activations)
    n_cells = columns.shape[0]
    if n_cells == 0:
        raise InputError("activations hold no cells: there is no percentile to take.")
    feature = feature_of_entry(columns)
    ascending = columns.data[np.lexsort((columns.data, feature))]
    n_zeros = n_cells - np.diff(columns.indptr)

    def sorted_value(rank: int) -> np.ndarray:
        """The value at this rank (from 0) of each feature's cells in ascending order."""
        value = np.zeros(columns.shape[1])
        active = np.flatnonzero(rank >= n_zeros)
        value[active] = ascending[columns.indptr[active] + rank - n_zeros[active]]
        return value

    below, fraction = divmod((n_cells - 1) * (percentile / 100), 1)
    lower, upper = sorted_value(int(below)), sorted_value(min(int(below) + 1, n_cells - 1))
    threshold = lower + (upper - lower) * fraction
    return _groups(columns, columns.data > threshold[feature])


def top_n(activations: Matrix, n: int) -> Groups:
    """The n most active cells of every feature; all active ones if there are fewer than n.

    Never more than n: among cells of equal activation the earlier one goes first.

    Args:
        activations: non-negative [cells, features], dense or sparse.
        n: at least 1.

    Returns:
        The high and the active cells of every feature.

    Raises:
        InputError: as `features.as_columns`, or for n below 1.
    """
    if n < 1:
        raise InputError(f"n={n}: give at least 1 cell.")
    columns = as_columns(activations)
    feature = feature_of_entry(columns)
    descending = np.lexsort((columns.indices, -columns.data, feature))
    high = np.empty(columns.nnz, dtype=bool)
    high[descending] = np.arange(columns.nnz) - columns.indptr[feature] < n
    return _groups(columns, high)


def _groups(columns: sparse.csc_array, high: np.ndarray) -> Groups:
    """Masks [features, cells]: a transposed CSC matrix is a CSR matrix of the same three arrays."""
    shape = columns.shape[::-1]
    active = (np.ones(columns.nnz, dtype=bool), columns.indices, columns.indptr)
    top = sparse.csr_array((high, columns.indices, columns.indptr), shape=shape, copy=True)
    top.eliminate_zeros()
    return Groups(high=top, active=sparse.csr_array(active, shape=shape))


def welch(
    expression: Matrix,
    high: Matrix,
    low: Matrix | None = None,
    active: Matrix | None = None,
    *,
    pseudocount: float = 1.0,
    block: int = 256,
) -> Welch:
    """Welch's t-test and fold change of every gene between two groups of cells of every feature.

        t = (mean_high - mean_low) / sqrt(var_high / n_high + var_low / n_low)
        log2 fold change = log2((mean of exp(x) - 1 in high + pseudocount) / (same in low + ...))

    Give either `low`, or `active`: then the low group is every cell that is not active, and its
    sums are those of all cells less those of the active ones, which costs no more than the few
    active cells do and takes no sample of the silent ones.

    A variance is a difference of two sums. Where it is below what rounding can add to them (cells ×
    1e-15 of the sum of squares) it is taken as exactly zero, so a constant gene has no variance;
    the price is that a standard deviation below about 1e-5 of the mean counts as none.

    Args:
        expression: x = ln(1 + normalised count) [cells, genes], dense or CSR, non-negative. Three
            float64 copies are held while it runs.
        high: boolean mask [features, cells], dense or sparse.
        low: boolean mask [features, cells]; shares no cell with `high`.
        active: boolean mask [features, cells]; contains `high`.
        pseudocount: added to the mean counts of both groups.
        block: features worked on at once; bounds the memory beyond the result. To keep no more
            than a block of results, see `welch_blocks`.

    Returns:
        The tests, features in the order of the masks.

    Raises:
        InputError: if not exactly one of `low` and `active` is given, if shapes or types disagree,
            if the groups overlap, or if the expression is not finite log values.
    """
    parts = list(welch_blocks(expression, high, low, active, pseudocount=pseudocount, block=block))
    return Welch(
        **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Welch)}
    )


def welch_blocks(
    expression: Matrix,
    high: Matrix,
    low: Matrix | None = None,
    active: Matrix | None = None,
    *,
    pseudocount: float = 1.0,
    block: int = 256,
) -> Iterator[Welch]:
    """As `welch`, but yields the features `block` at a time: a whole dictionary in little memory.

    The input is checked, and the expression prepared, once, before the first block.
    """
    if (low is None) == (active is None):
        raise InputError(
            "give exactly one of low (a mask) and active (the low group is then every other cell)."
        )
    if block < 1 or pseudocount <= 0:
        raise InputError(f"block={block}, pseudocount={pseudocount}: both must be positive.")
    moments = _moments(expression)
    n_cells = expression.shape[0]
    high = _mask("high", high, n_cells)
    other = _mask("low", low, n_cells) if active is None else _mask("active", active, n_cells)
    _check_groups(high, other, within=active is not None)
    everything = None
    if active is not None:
        everything = _group(sparse.csr_array(np.ones((1, n_cells), dtype=bool)), moments)
    return _blocks(moments, high, other, everything, pseudocount, block)


class _Group(NamedTuple):
    """Sums over the cells of a group, from which everything follows."""

    n: np.ndarray  # cells [features, 1]
    x: np.ndarray  # sums [features, genes] of the expression,
    square: np.ndarray  # of its square,
    count: np.ndarray  # and of exp(x) - 1,
    detected: np.ndarray  # and the number of cells with any
    rounding: np.ndarray  # what rounding can have added to a sum of squares [features, genes]


@dataclass(frozen=True, eq=False)
class Prepared:
    """An expression matrix checked and made ready once, for features in any order or thread."""

    moments: Moments
    everything: _Group

    @classmethod
    def of(cls, expression: Matrix) -> Prepared:
        """Raises InputError as `welch`."""
        moments = _moments(expression)
        n_cells = expression.shape[0]
        everything = _group(sparse.csr_array(np.ones((1, n_cells), dtype=bool)), moments)
        return cls(moments, everything)

    def welch(self, groups: Groups, pseudocount: float = 1.0) -> Welch:
        """The test of some features, whose groups were made by the functions of this module."""
        high, active = _both(groups.high, groups.active, self.moments)
        return _test(high, _rest(self.everything, active), pseudocount)


def _blocks(
    moments: Moments,
    high: sparse.csr_array,
    other: sparse.csr_array,
    everything: _Group | None,
    pseudocount: float,
    block: int,
) -> Iterator[Welch]:
    for begin in range(0, high.shape[0], block):
        rows = slice(begin, begin + block)
        if everything is None:
            top, low = _group(high[rows], moments), _group(other[rows], moments)
        else:
            top, active = _both(high[rows], other[rows], moments)
            low = _rest(everything, active)
        yield _test(top, low, pseudocount)


def _group(mask: sparse.csr_array, moments: Moments) -> _Group:
    """Sums over the cells of each feature's group."""
    return _both(sparse.csr_array(mask.shape, dtype=bool), mask, moments)[1]


def _both(
    part: sparse.csr_array, mask: sparse.csr_array, moments: Moments
) -> tuple[_Group, _Group]:
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
        _Group(n, *four, rounding=n * EPSILON * four[1])
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


def _rest(everything: _Group, part: _Group) -> _Group:
    """All cells but those of `part`.

    Both were added up by the same product in the order of the cells, so a gene that occurs in no
    cell of the rest gets sums of exactly zero.
    """
    return _Group(
        n=everything.n - part.n,
        x=everything.x - part.x,
        square=everything.square - part.square,
        count=everything.count - part.count,
        detected=everything.detected - part.detected,
        rounding=everything.rounding,
    )


def _test(high: _Group, low: _Group, pseudocount: float) -> Welch:
    """Welch's equations; A.3.4's fold change of means."""
    # A group without cells divides 0 by 0, and so does the variance of one cell: NaN is the answer.
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_high, mean_low = high.x / high.n, low.x / low.n
        var_high, var_low = _variance(high), _variance(low)
        share_high, share_low = var_high / high.n, var_low / low.n
        squared_error = share_high + share_low
        t = (mean_high - mean_low) / np.sqrt(squared_error)
        t[squared_error == 0] = np.nan
        df = squared_error**2 / (share_high**2 / (high.n - 1) + share_low**2 / (low.n - 1))
        detected_high, detected_low = high.detected / high.n, low.detected / low.n
        fold = (high.count / high.n + pseudocount) / (low.count / low.n + pseudocount)
    return Welch(
        t=t,
        df=df,
        p=2 * special.stdtr(df, -np.abs(t)),
        log2_fold_change=np.log2(fold),
        mean_high=mean_high,
        mean_low=mean_low,
        var_high=var_high,
        var_low=var_low,
        detected_high=detected_high,
        detected_low=detected_low,
        n_high=high.n[:, 0],
        n_low=low.n[:, 0],
    )


def _variance(group: _Group) -> np.ndarray:
    """Unbiased variance [features, genes], exactly zero where the sums cannot tell it from zero."""
    deviation = group.square - group.x**2 / group.n
    # Rounding enters once with the squares and twice with the square of the sum.
    deviation[deviation <= 4 * group.rounding] = 0
    return deviation / (group.n - 1)


def _moments(expression: Matrix) -> Moments:
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
        _check_log_values(x)
        return x, x**2, np.expm1(x), (x != 0).astype(np.float64)
    single = expression.dtype == np.float32
    x = sparse.csr_array(expression, dtype=np.float32 if single else np.float64)
    if not x.has_canonical_format or not x.data.all():
        x = x.copy()
        x.sum_duplicates()
        x.eliminate_zeros()
    _check_log_values(x.data)
    return x, None, sparse.csr_array((np.expm1(x.data), x.indices, x.indptr), shape=x.shape), None


def _check_log_values(x: np.ndarray) -> None:
    smallest, largest = np.min(x, initial=0.0), np.max(x, initial=0.0)
    if not (smallest >= 0 and largest <= LARGEST_LOG_VALUE):
        raise InputError(
            f"expression ranges from {smallest:g} to {largest:g}: it must be ln(1 + normalised "
            f"count), from 0 to {LARGEST_LOG_VALUE:g} and never NaN. Normalise raw counts (scanpy: "
            "normalize_total, then log1p); do not scale or centre genes."
        )


def _mask(name: str, mask: Matrix, n_cells: int) -> sparse.csr_array:
    """A checked boolean mask [features, cells] that stores True only."""
    if np.ndim(mask) != 2 or mask.shape[1] != n_cells or mask.shape[0] == 0:
        raise InputError(
            f"{name} has shape {np.shape(mask)}: give a mask of features by the {n_cells} cells "
            "of the expression."
        )
    if mask.dtype != bool:
        raise InputError(f"{name} is {mask.dtype}: give booleans, for example activations > 0.")
    mask = sparse.csr_array(mask, copy=True)
    mask.sum_duplicates()
    mask.eliminate_zeros()
    return mask


def _check_groups(high: sparse.csr_array, other: sparse.csr_array, within: bool) -> None:
    if other.shape != high.shape:
        raise InputError(
            f"high has {high.shape[0]} features and the other mask {other.shape[0]}: give the same."
        )
    shared = np.diff(high.multiply(other).tocsr().indptr)
    wrong = shared != np.diff(high.indptr) if within else shared > 0
    if wrong.any():
        what = "has high cells that are not active" if within else "has cells both high and low"
        raise InputError(
            f"feature {int(np.argmax(wrong))} {what} ({int(wrong.sum())} such features): "
            "the two groups of a test must share no cell."
        )

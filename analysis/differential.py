"""Which genes differ between the cells where a feature is high and the cells where it is silent.

Schuster A.3.4 (unpaired): Welch's t-test and the fold change of means, for every feature and gene
at once. The groups are sparse masks (`groups` makes them); see `cell_sums` for the sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
from absl import logging
from scipy import sparse, special

from analysis import cell_sums
from analysis.cell_sums import Moments, Sums
from analysis.features import Matrix
from analysis.groups import Groups, as_mask
from sae_jax.errors import InputError


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
    log2_fold_change: np.ndarray
    mean_high: np.ndarray
    mean_low: np.ndarray
    var_high: np.ndarray
    var_low: np.ndarray
    detected_high: np.ndarray
    detected_low: np.ndarray
    n_high: np.ndarray
    n_low: np.ndarray

    @functools.cached_property
    def p(self) -> np.ndarray:
        """Two-sided p-value; made when it is asked for, which permuted features never do."""
        return 2 * special.stdtr(self.df, -np.abs(self.t))

    @property
    def cohens_d(self) -> np.ndarray:
        """Difference of the means over the pooled standard deviation [features, genes]; NaN where
        that is zero."""
        sd = self._pooled_sd()
        with np.errstate(divide="ignore", invalid="ignore"):
            d = (self.mean_high - self.mean_low) / sd
        d[sd == 0] = np.nan
        return d

    def moderated_d(self, typical_sd: float) -> np.ndarray:
        """Cohen's d with `typical_sd` added to the standard deviation [features, genes].

        As in SAM (Tusher 2001): genes that hardly vary do not get large changes out of noise.
        """
        with np.errstate(invalid="ignore"):
            return (self.mean_high - self.mean_low) / (self._pooled_sd() + typical_sd)

    def scores(self) -> np.ndarray:
        """t for a ranking of genes [features, genes]: 0 where nothing could be tested, and rounded,
        or equal statistics that differ in their last bits would be ranked by noise."""
        return np.nan_to_num(np.round(self.t, 9), nan=0.0)

    def _pooled_sd(self) -> np.ndarray:
        n, m = self.n_high[:, None], self.n_low[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(((n - 1) * self.var_high + (m - 1) * self.var_low) / (n + m - 2))


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
    if block < 1:
        raise InputError(f"block={block}: give at least 1 feature.")
    high, other = _masks(high, low, active, pseudocount, np.shape(expression)[0])
    moments = cell_sums.moments_of(expression)
    everything = None if active is None else cell_sums.over_all(moments)
    for begin in range(0, high.shape[0], block):
        rows = slice(begin, begin + block)
        if everything is None:
            top, rest = (cell_sums.over(mask[rows], moments) for mask in (high, other))
        else:
            top, whole = cell_sums.over_both(high[rows], other[rows], moments)
            rest = everything.less(whole)
        yield _test(top, rest, pseudocount)


def welch_streamed(
    parts: Callable[[], Iterable[Matrix]],
    high: Matrix,
    low: Matrix | None = None,
    active: Matrix | None = None,
    *,
    pseudocount: float = 1.0,
    memory_bytes: int = 1 << 30,
) -> Iterator[Welch]:
    """As `welch_blocks`, of expression that is read a part at a time, or predicted by a model.

    Args:
        parts: starts from the first cell at every call: yields x [some cells, genes], dense or CSR,
            until all cells of the masks have come, in their order. `cells.parts` reads a file so;
            a decoder's predictions are `(np.log1p(1e4 * model.decode(rows)) for rows in ...)`.
        high, low, active, pseudocount: as in `welch`.
        memory_bytes: for the sums. As many features as fit are done in one pass over the parts; the
            number of passes is logged.

    Raises:
        InputError: as `welch`; or parts of another number of cells than the masks have, or of
            different numbers of genes.
    """
    n_cells = np.shape(high)[-1]
    high, other = _masks(high, low, active, pseudocount, n_cells)
    block, begin = 0, 0
    while begin < high.shape[0]:
        sums: list[Sums] | None = None
        seen = 0
        for x in parts():
            if not block:  # 2 groups, 4 sums, and as much again for those of the part
                block = max(1, memory_bytes // (2 * 2 * 4 * 8 * x.shape[1]))
                passes = math.ceil(high.shape[0] / block)
                logging.info("%d features: %d passes over the cells", high.shape[0], passes)
            cells, rows = slice(seen, seen + x.shape[0]), slice(begin, begin + block)
            moments = cell_sums.moments_of(x)
            seen += x.shape[0]
            if seen > n_cells:
                break
            masks = high[rows, cells], other[rows, cells]
            if active is None:
                found = [cell_sums.over(mask, moments) for mask in masks]
            else:
                found = [*cell_sums.over_both(*masks, moments), cell_sums.over_all(moments)]
            if sums is not None and sums[0].x.shape != found[0].x.shape:
                raise InputError(
                    f"the parts have {sums[0].x.shape[1]} and {found[0].x.shape[1]} genes: give "
                    "the same ones."
                )
            sums = found if sums is None else [a.plus(b) for a, b in zip(sums, found, strict=True)]
        if seen != n_cells or sums is None:
            raise InputError(
                f"the masks have {n_cells} cells and the parts {'more' if seen > n_cells else seen}"
            )
        yield _test(sums[0], sums[1] if active is None else sums[2].less(sums[1]), pseudocount)
        begin += block


@dataclass(frozen=True, eq=False)
class Prepared:
    """An expression matrix checked and made ready once, for features in any order or thread."""

    moments: Moments
    everything: Sums

    @classmethod
    def of(cls, expression: Matrix) -> Prepared:
        """Raises InputError as `welch`."""
        moments = cell_sums.moments_of(expression)
        return cls(moments, cell_sums.over_all(moments))

    @functools.cached_property
    def typical_sd(self) -> float:
        """Median, over the more expressed half of the genes, of the sd over all cells."""
        mean, variance = self.everything.x[0], self.everything.variance[0]
        return float(np.sqrt(np.median(variance[mean >= np.median(mean)])))

    def welch(self, groups: Groups, pseudocount: float = 1.0) -> Welch:
        """The test of some features, whose groups were made by the functions of `groups`."""
        high, active = cell_sums.over_both(groups.high, groups.active, self.moments)
        return _test(high, self.everything.less(active), pseudocount)


def _test(high: Sums, low: Sums, pseudocount: float) -> Welch:
    """Welch's equations; A.3.4's fold change of means."""
    # A group without cells divides 0 by 0, and so does the variance of one cell: NaN is the answer.
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_high, mean_low = high.x / high.n, low.x / low.n
        var_high, var_low = high.variance, low.variance
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


def _masks(
    high: Matrix, low: Matrix | None, active: Matrix | None, pseudocount: float, n_cells: int
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """High, and low or active, checked."""
    if (low is None) == (active is None):
        raise InputError(
            "give exactly one of low (a mask) and active (the low group is then every other cell)."
        )
    if pseudocount <= 0:
        raise InputError(f"pseudocount={pseudocount}: it must be positive.")
    high = as_mask("high", high, n_cells)
    other = as_mask("low", low, n_cells) if active is None else as_mask("active", active, n_cells)
    _check_groups(high, other, within=active is not None)
    return high, other


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

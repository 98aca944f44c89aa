"""Which genes differ between the cells where a feature is high and the cells where it is silent.

Schuster A.3.4 (unpaired): Welch's t-test and the fold change of means, for every feature and gene
at once. The groups are sparse masks (`groups` makes them); see `cell_sums` for the sums, which are
taken over cells in memory, or over blocks of cells of a matrix that no memory holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from absl import logging
from scipy import sparse, special

from analysis import cell_sums, chunked
from analysis.blocks import slices
from analysis.cell_sums import GroupSums, GroupWork, Moments, Sums
from analysis.chunked import Chunked, Held
from analysis.features import Matrix
from analysis.groups import Groups, as_mask
from sae_jax.errors import InputError, counted

TEST = 40 * 8  # bytes of a feature and gene while it is tested, and what is made of the test


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


Test = Callable[[], Welch]


def welch(
    expression: Matrix | Chunked,
    high: Matrix,
    low: Matrix | None = None,
    active: Matrix | None = None,
    *,
    pseudocount: float = 1.0,
    block: int = 256,
    memory_bytes: int = 1 << 30,
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
            float64 copies are held while it runs. Or in blocks, of which one is held.
        high: boolean mask [features, cells], dense or sparse.
        low: boolean mask [features, cells]; shares no cell with `high`.
        active: boolean mask [features, cells]; contains `high`.
        pseudocount: added to the mean counts of both groups.
        block: features worked on at once; bounds the memory beyond the result. To keep no more
            than a block of results, see `welch_blocks`.
        memory_bytes: of expression in blocks instead, beside masks and result: `welch_streamed`.

    Returns:
        The tests, features in the order of the masks.

    Raises:
        InputError: if not exactly one of `low` and `active` is given, if shapes or types disagree,
            if the groups overlap, or if the expression is not finite log values.
    """
    given: dict[str, Any] = {"low": low, "active": active, "pseudocount": pseudocount}
    if isinstance(expression, Chunked):
        parts = list(welch_streamed(expression, high, **given, memory_bytes=memory_bytes))
    else:
        parts = list(welch_blocks(expression, high, **given, block=block))
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
    parts: Chunked | Callable[[], Iterable[Matrix]],
    high: Matrix,
    low: Matrix | None = None,
    active: Matrix | None = None,
    *,
    pseudocount: float = 1.0,
    memory_bytes: int = 1 << 30,
) -> Iterator[Welch]:
    """As `welch_blocks`, of expression that is read a block at a time, or predicted by a model.

    Sparse blocks give the tests of the whole to the last bit, whatever the blocks; dense ones, and
    those that a cluster adds up, to rounding (1e-12 of each sum).

    Args:
        parts: a matrix in blocks: of `cells.parts(...).x`, or any (`chunked.chunked`). Or what
            starts from the first cell at every call and yields x [some cells, genes], dense or CSR,
            until all cells of the masks have come, in their order: a decoder's predictions are
            `(np.log1p(1e4 * model.decode(rows)) for rows in ...)`.
        high, low, active, pseudocount: as in `welch`.
        memory_bytes: for all but the masks: the block of cells, the sums of as many features as fit
            (they are done in one pass over the cells), their tests. Stated in the log, with the
            number of passes, before the first one.

    Raises:
        InputError: as `welch`; memory for not even one feature; or parts of another number of cells
            than the masks have, or of different numbers of genes.
    """
    source = getattr(parts, "x", parts)
    if isinstance(source, Chunked):
        n_cells = source.shape[0]
    else:
        source, n_cells = _Calls(source, np.shape(high)[-1]), np.shape(high)[-1]
    high, other = _masks(high, low, active, pseudocount, n_cells)
    within, everything = active is not None, None
    plan = Passes.of(source, high.shape[0], memory_bytes)
    logging.info("%s", plan.told)

    def one_pass(rows: slice) -> Iterator[Welch]:  # whose sums go before the next one's come
        nonlocal everything
        work = GroupWork(high[rows].tocsc(), other[rows].tocsc(), within, source.shape[1])
        if within and everything is None:
            sums, everything = source.fold(work.and_all()).without_all()
        else:
            sums = source.fold(work)
        for some in slices(rows.stop - rows.start, plan.tested):
            top, rest = sums.of(some)
            yield _test(top, rest if everything is None else everything.less(rest), pseudocount)

    for rows in slices(high.shape[0], plan.features):
        yield from one_pass(rows)


@dataclass(frozen=True, eq=False)
class _Calls:
    """Blocks that a function yields, as `Chunked` has them; the first one says how many genes."""

    parts: Callable[[], Iterable[Matrix]]
    n_cells: int
    block_bytes: int = 0  # not known: whoever yields them has them
    rows: int = 0

    def held(self) -> Held:
        return Held()

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        return self.n_cells, next(iter(self.parts())).shape[1]

    def fold(self, work: GroupWork) -> GroupSums:
        state, seen = work.start(), 0
        for x in self.parts():
            if x.shape[1] != work.genes:
                raise InputError(
                    f"the parts have {work.genes} and {x.shape[1]} genes: give the same ones."
                )
            cells = slice(seen, seen + x.shape[0])
            seen = cells.stop
            if seen > self.n_cells:
                break
            state = work.part(cells).add(state, x)
        if seen != self.n_cells:
            raise InputError(
                f"the masks have {self.n_cells} cells and the parts "
                f"{'more' if seen > self.n_cells else seen}"
            )
        return state


@dataclass(frozen=True)
class Passes:
    """How tests of expression in blocks are done in a given memory.

    Attributes:
      features: whose sums are taken in one pass over the cells.
      tested: of these at once.
      bytes: that everything takes, at most, beside the masks; of a dask array with a client, in
        each of its workers.
      told: the same in words, for the log.
    """

    features: int
    tested: int
    bytes: int
    told: str

    @classmethod
    def of(
        cls, source: Chunked | _Calls, features: int, memory_bytes: int, *, tested: int = 16,
        threads: int = 1, beside: int = 0,
    ) -> Passes:  # fmt: skip
        """As many features in a pass as fit.

        Args:
            features: of all passes.
            tested, threads: features that are tested at once by each of so many threads, or fewer
                where memory is short. With more than one thread the sums of a pass may still be
                there while the next is begun.
            beside: bytes of what else is held.

        Raises:
            InputError: not one feature fits.
        """
        n_cells, genes = source.shape
        tested = max(1, min(tested, features, memory_bytes // (4 * TEST * genes * threads)))
        held = source.held()
        sums = 2 * 4 * 8 * genes * (held.sums + (threads > 1))  # of a feature
        fixed = held.blocks * source.block_bytes + beside
        fixed += 8 * 8 * genes + threads * tested * TEST * genes
        at_once = min(features, (memory_bytes - fixed) // sums)
        if at_once < 1:
            raise InputError(
                f"expression of {n_cells:,} cells x {genes:,} genes needs "
                f"{chunked.size(fixed + sums)} of memory for one feature in blocks of "
                f"{source.rows:,} cells{held.where}, and may take {chunked.size(memory_bytes)}: "
                "give more, or smaller blocks."
            )
        most = int(fixed + sums * at_once)
        blocks = f"blocks of {counted(source.rows, 'cell')}" if source.rows else "their own blocks"
        passes = counted(math.ceil(features / at_once), "pass", "passes")
        told = (
            f"DGE: {counted(n_cells, 'cell')} x {counted(genes, 'gene')} in {blocks}, "
            f"{counted(features, 'feature')} in {passes}, at most {chunked.size(most)}{held.where}"
            + (f", {chunked.size(beside)} of it for tables" if beside else "")
        )
        return cls(int(at_once), int(min(tested, at_once)), most, told)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An expression matrix checked and made ready once, for features in any order or thread."""

    moments: Moments
    everything: Sums
    tested: int | None = None  # features at once: as many as are wanted

    @classmethod
    def of(cls, expression: Matrix) -> Prepared:
        """Raises InputError as `welch`."""
        moments = cell_sums.moments_of(expression)
        return cls(moments, cell_sums.over_all(moments))

    @functools.cached_property
    def typical_sd(self) -> float:
        """Median, over the more expressed half of the genes, of the sd over all cells."""
        return _typical_sd(self.everything)

    def welch(self, groups: Groups, pseudocount: float = 1.0) -> Welch:
        """The test of some features, whose groups were made by the functions of `groups`."""
        high, active = cell_sums.over_both(groups.high, groups.active, self.moments)
        return _test(high, self.everything.less(active), pseudocount)

    def tests(self, blocks: Iterable[Groups], pseudocount: float = 1.0) -> Iterator[Test]:
        """For every block of features what makes its test when it is called, in any thread."""
        return (functools.partial(self.welch, groups, pseudocount) for groups in blocks)


@dataclass(frozen=True, eq=False)
class Streamed:
    """As `Prepared`, of expression in blocks: the sums of many features are taken in a pass over
    the cells, as many as a given memory holds."""

    source: Chunked
    everything: Sums
    features: int
    tested: int  # at once, by a thread
    typical_sd: float

    @classmethod
    def of(
        cls, source: Chunked, features: int, memory_bytes: int, *, tested: int, threads: int,
        beside: int, tell: bool,
    ) -> Streamed:  # fmt: skip
        """One pass over the cells; the rest is as for `Passes.of`. tell: in the log, before it."""
        plan = Passes.of(
            source, features, memory_bytes, tested=tested, threads=threads, beside=beside
        )
        if tell:
            logging.info("%s", plan.told)
        nothing = sparse.csc_array((0, source.shape[0]), dtype=bool)
        work = GroupWork(nothing, nothing, True, source.shape[1])
        _, everything = source.fold(work.and_all()).without_all()
        return cls(source, everything, plan.features, plan.tested, _typical_sd(everything))

    def tests(self, blocks: Iterable[Groups], pseudocount: float = 1.0) -> Iterator[Test]:
        """As `Prepared.tests`; a pass is made when its first test is asked for."""
        some: list[Groups] = []
        for groups in blocks:
            if some and sum(each.high.shape[0] for each in [*some, groups]) > self.features:
                yield from self._pass(some, pseudocount)
                some = []
            some.append(groups)
        yield from self._pass(some, pseudocount)

    def _pass(self, some: list[Groups], pseudocount: float) -> Iterator[Test]:
        if not some:
            return
        high, active = (sparse.vstack(masks, "csc") for masks in zip(*some, strict=True))
        sums = self.source.fold(GroupWork(high, active, True, self.source.shape[1]))
        start = 0
        for groups in some:
            rows = slice(start, start + groups.high.shape[0])
            start = rows.stop
            yield functools.partial(self._welch, sums, rows, pseudocount)

    def _welch(self, sums: GroupSums, rows: slice, pseudocount: float) -> Welch:
        high, active = sums.of(rows)
        return _test(high, self.everything.less(active), pseudocount)


def prepare(
    expression: Matrix | Chunked, features: int, memory_bytes: int, *, tested: int,
    threads: int = 1, beside: int = 0, tell: bool = True,
) -> Prepared | Streamed:  # fmt: skip
    """The one for expression in memory, the other for blocks of it; arguments as of `Streamed`."""
    if not isinstance(expression, Chunked):
        return Prepared.of(expression)
    return Streamed.of(
        expression, features, memory_bytes, tested=tested, threads=threads, beside=beside, tell=tell
    )


def _typical_sd(everything: Sums) -> float:
    mean, variance = everything.x[0], everything.variance[0]
    return float(np.sqrt(np.median(variance[mean >= np.median(mean)])))


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

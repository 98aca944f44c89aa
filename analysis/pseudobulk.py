"""High against low cells with donors, not cells, as the independent observations.

Cells of one donor resemble one another, so a test over cells finds the donors in which a feature
happens to be high. Here each donor gives one difference, of its own high and low cells, and the
test is the paired t-test over donors. Expression may be in blocks of cells (`analysis.chunked`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
from absl import logging
from numpy.typing import ArrayLike
from scipy import sparse, special

from analysis import chunked
from analysis.blocks import slices
from analysis.cell_sums import EPSILON, LARGEST_LOG_VALUE
from analysis.chunked import Chunked
from analysis.features import Matrix
from analysis.groups import as_mask
from sae_jax.errors import InputError, counted

COUNTS_PER_PROFILE = 1e4
MIN_DONORS = 3
# What may be given, and what is summed of it.
SCALES = {"log1p": ("x", "exp(x) - 1"), "counts": ("x",)}


@dataclass(frozen=True, eq=False)
class DonorTest:
    """Paired t-test over donors, float64.

    t, p: statistic (positive: higher in the high group) and two-sided p-value, with n_donors - 1
        degrees of freedom [features, genes]. NaN where all donors differ by the same amount, which
        leaves no variance to test against, and for a feature with fewer than 3 donors.
    mean_difference: mean over donors of the difference that is tested [features, genes].
    log2_fold_change: mean over donors of log2 of the ratio of mean counts, pseudocount added to
        both [features, genes].
    n_donors: donors that count [features]. Without any, everything is NaN.
    """

    t: np.ndarray
    p: np.ndarray
    mean_difference: np.ndarray
    log2_fold_change: np.ndarray
    n_donors: np.ndarray


WIDE = tuple(field.name for field in fields(DonorTest))[:-1]  # [features, genes]


def donor_test(
    expression: Matrix | Chunked,
    high: Matrix,
    low: Matrix,
    donors: ArrayLike | pd.Series,
    *,
    scale: str,
    min_cells: int = 10,
    pseudocount: float = 1.0,
    block: int = 16,
    memory_bytes: int = 1 << 30,
) -> DonorTest:
    """Paired t-test over donors of every gene, between two groups of cells of every feature.

    A donor counts for a feature if it has at least `min_cells` cells in both groups. What is tested
    depends on what is given, which must be said:

        scale="log1p": x = ln(1 + normalised count); a donor's value is the mean of x in the group
        scale="counts": raw counts of ALL measured genes; a donor's value is ln(1 + count per 10,000
            counts) of the sums over the group (a pseudobulk)

    Args:
        expression: [cells, genes], dense or CSR, non-negative; or in blocks of cells, as
            `chunked.chunked` makes them of counts, and `cells.parts(...).x` has log values.
        high: boolean mask [features, cells], dense or sparse.
        low: boolean mask [features, cells]; shares no cell with `high`.
        donors: one label per cell. Cells without one (None, NaN) are left out.
        scale: "log1p" or "counts".
        min_cells: at least 1.
        pseudocount: added for the fold change to the mean counts (or counts per 10,000).
        block: features worked on at once; some ten arrays [block, donors, genes] are held.
        memory_bytes: of expression in blocks, for the block, these arrays, the tests of all
            features, and the sums of as many as fit: they are done in one pass over the cells.
            Stated in the log before.

    Returns:
        The tests, features in the order of the masks.

    Raises:
        InputError: if shapes or types disagree, if the groups overlap, if the expression is not of
            the scale, for another option, or memory that the tests have no place in.
    """
    if min_cells < 1 or block < 1 or pseudocount <= 0:
        raise InputError(
            f"min_cells={min_cells}, block={block}, pseudocount={pseudocount}: give positive ones."
        )
    if scale not in SCALES:
        raise InputError(f'scale={scale!r}: say whether expression is "log1p" or "counts".')
    values = None if isinstance(expression, Chunked) else _values(expression, scale)
    n_cells, n_genes = expression.shape if values is None else values[0].shape
    high, low = as_mask("high", high, n_cells), as_mask("low", low, n_cells)
    if high.shape != low.shape or high.multiply(low).nnz:
        raise InputError("high and low must hold the same features and share no cell.")
    labels = np.asarray(donors, dtype=object)
    if labels.shape != (n_cells,) or pd.isna(labels).all():
        raise InputError(
            f"donors has shape {labels.shape}: give one label for each of the {n_cells} cells, "
            "not all of them missing."
        )
    donor = pd.factorize(labels)[0]
    work = _Work(high.tocsc(), low.tocsc(), donor, int(donor.max()) + 1, n_genes, scale)
    at_once = block
    if values is None:
        at_once, block = _at_once(expression, work, block, memory_bytes)

    def one_pass(some: _Work) -> Iterator[DonorTest]:  # whose sums go before the next one's come
        sums = expression.fold(some) if values is None else some.add_values(some.start(), values)
        for rows in slices(some.high.shape[0], block):
            high, low = ([table[rows] for table in group] for group in sums.groups)
            yield _test(high, low, scale, min_cells, pseudocount, rounding=n_cells * EPSILON)

    wide = {name: np.empty((high.shape[0], n_genes)) for name in WIDE}
    found, start = DonorTest(**wide, n_donors=np.empty(high.shape[0], np.int64)), 0
    for rows in slices(high.shape[0], at_once):
        for part in one_pass(work.features(rows)):
            there = slice(start, start + len(part.n_donors))
            for field in fields(DonorTest):
                getattr(found, field.name)[there] = getattr(part, field.name)
            start = there.stop
    return found


def _at_once(expression: Chunked, work: _Work, block: int, memory_bytes: int) -> tuple[int, int]:
    """Features whose sums are taken in one pass over the cells, and of these tested at once.

    Raises:
        InputError: not one feature fits.
    """
    features, held = work.high.shape[0], expression.held()
    table = 8 * work.n_donors * work.n_genes
    # Of a feature; what is added to one of its tables is made sparse, then dense.
    sums = (2 * len(SCALES[work.scale]) * held.sums + 3 * held.threads) * table
    result = features * (len(WIDE) * 8 * work.n_genes + 8)
    block = max(1, min(block, memory_bytes // (4 * 10 * table)))
    fixed = held.blocks * expression.block_bytes + block * 10 * table + result
    at_once = min(features, (memory_bytes - fixed) // sums)
    if at_once < 1:
        raise InputError(
            f"{work.n_donors} donors x {work.n_genes:,} genes need {chunked.size(fixed + sums)} of "
            f"memory for one feature at a time{held.where}, {chunked.size(result)} of it for the "
            f"tests of all {features:,}, and may take {chunked.size(memory_bytes)}: give more, or "
            "fewer features."
        )
    logging.info(
        "pseudobulk: %s x %s in blocks of %s, %s, %s in %s, at most %s%s",
        counted(expression.shape[0], "cell"), counted(work.n_genes, "gene"),
        counted(expression.rows, "cell"), counted(work.n_donors, "donor"),
        counted(features, "feature"), counted(-(-features // at_once), "pass", "passes"),
        chunked.size(fixed + sums * at_once), held.where,
    )  # fmt: skip
    return int(at_once), block


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of the high and the low group the cells [features, donors, 1], then sums of each of the
    values [features, donors, genes]."""

    groups: tuple[list[np.ndarray], list[np.ndarray]]

    def plus(self, other: _Sums) -> _Sums:
        """Over the cells of both, which share none."""
        high, low = (
            [a + b for a, b in zip(*tables, strict=True)]
            for tables in zip(self.groups, other.groups, strict=True)
        )
        return _Sums((high, low))


@dataclass(frozen=True, eq=False)
class _Work:
    """The `chunked.Work` that makes them; masks are CSC [features, cells]."""

    high: sparse.csc_array
    low: sparse.csc_array
    donor: np.ndarray
    n_donors: int
    n_genes: int
    scale: str

    def features(self, rows: slice) -> _Work:
        """Of some features."""
        return replace(self, high=self.high[rows], low=self.low[rows])

    def part(self, rows: slice) -> _Work:
        """Of some cells."""
        return replace(self, high=self.high[:, rows], low=self.low[:, rows], donor=self.donor[rows])

    def start(self) -> _Sums:
        """Of no cell."""
        n = self.high.shape[0], self.n_donors
        wide = [np.zeros((2, *n, self.n_genes)) for _ in SCALES[self.scale]]
        cells = np.zeros((2, *n, 1), np.int64)
        high, low = ([cells[i], *(table[i] for table in wide)] for i in range(2))
        return _Sums((high, low))

    def add(self, state: _Sums, block: Matrix) -> _Sums:
        """With the cells of this part, written into the state."""
        return self.add_values(state, _values(block, self.scale))

    def add_values(self, state: _Sums, values: list[Matrix]) -> _Sums:
        """The same of what `_values` makes of them."""
        for mask, tables in zip((self.high, self.low), state.groups, strict=True):
            split = self._split(mask.tocsr())
            tables[0] += np.diff(split.indptr).reshape(tables[0].shape)
            for table, value in zip(tables[1:], values, strict=True):
                found = split @ value
                table += (found.toarray() if sparse.issparse(found) else found).reshape(table.shape)
                del found  # before the next is made
        return state

    def _split(self, mask: sparse.csr_array) -> sparse.csr_array:
        """A row of the mask becomes one row for each donor."""
        feature, cell = mask.nonzero()
        labelled = self.donor[cell] >= 0
        feature, cell = feature[labelled].astype(np.int64), cell[labelled]
        return sparse.csr_array(
            (np.ones(cell.size), (feature * self.n_donors + self.donor[cell], cell)),
            shape=(mask.shape[0] * self.n_donors, mask.shape[1]),
        )


def _test(
    high: list[np.ndarray],
    low: list[np.ndarray],
    scale: str,
    min_cells: int,
    pseudocount: float,
    rounding: float,
) -> DonorTest:
    """The t-test of one block. rounding: relative error that sums over cells can have."""
    counted = (high[0] >= min_cells) & (low[0] >= min_cells)
    n = counted.sum(axis=1)
    (x_high, count_high), (x_low, count_low) = _profiles(high, scale), _profiles(low, scale)

    def mean(values: np.ndarray) -> np.ndarray:
        """Over the donors that count."""
        return np.where(counted, values, 0).sum(axis=1) / n

    difference = x_high - x_low
    # No donor at all divides 0 by 0, and so does the variance of one: NaN is the answer.
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_difference = mean(difference)
        error = mean((difference - mean_difference[:, None]) ** 2) / (n - 1)
        # Differences that are equal but for rounding have no variance.
        largest = np.where(counted, np.maximum(x_high, x_low), 0).max(axis=1)
        error[error <= (4 * rounding * largest) ** 2] = np.nan
        t = mean_difference / np.sqrt(error)
        fold = mean(np.log2((count_high + pseudocount) / (count_low + pseudocount)))
    t[n[:, 0] < MIN_DONORS] = np.nan
    return DonorTest(
        t=t,
        p=2 * special.stdtr(np.maximum(n - 1, 1), -np.abs(t)),
        mean_difference=mean_difference,
        log2_fold_change=fold,
        n_donors=n[:, 0],
    )


def _profiles(sums: list[np.ndarray], scale: str) -> tuple[np.ndarray, np.ndarray]:
    """What is tested and the mean counts, each [features, donors, genes]; 0 without cells."""
    if scale == "log1p":
        n, x, count = sums
        return x / np.maximum(n, 1), count / np.maximum(n, 1)
    total = sums[1].sum(axis=2, keepdims=True)
    share = sums[1] / np.where(total > 0, total, 1)
    return np.log1p(share * COUNTS_PER_PROFILE), share * COUNTS_PER_PROFILE


def _values(expression: Matrix, scale: str) -> list[Matrix]:
    """The matrices to be summed, float64: counts, or log values and their counts exp(x) - 1."""
    if np.ndim(expression) != 2:
        raise InputError(
            f"expression has {np.ndim(expression)} dimensions: give a matrix of cells by genes."
        )
    if sparse.issparse(expression):
        x = sparse.csr_array(chunked.sound(expression), dtype=np.float64, copy=True)
        x.sum_duplicates()
        stored = x.data
    else:
        x = stored = np.asarray(expression, dtype=np.float64)
    smallest, largest = np.min(stored, initial=0.0), np.max(stored, initial=0.0)
    limit = LARGEST_LOG_VALUE if scale == "log1p" else np.finfo(np.float64).max
    if not (smallest >= 0 and largest <= limit):
        raise InputError(
            f"expression ranges from {smallest:g} to {largest:g}, which {scale} values cannot: "
            f"they lie from 0 to {limit:g} and are never NaN. Do not scale or centre genes."
        )
    if scale == "counts":
        return [x]
    return [x, x.expm1() if sparse.issparse(x) else np.expm1(x)]

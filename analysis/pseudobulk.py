"""High against low cells with donors, not cells, as the independent observations.

Cells of one donor resemble one another, so a test over cells finds the donors in which a feature
happens to be high. Here each donor gives one difference, of its own high and low cells, and the
test is the paired t-test over donors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse, special

from analysis.cell_sums import EPSILON, LARGEST_LOG_VALUE
from analysis.features import Matrix
from analysis.groups import as_mask
from sae_jax.errors import InputError

COUNTS_PER_PROFILE = 1e4
MIN_DONORS = 3


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


def donor_test(
    expression: Matrix,
    high: Matrix,
    low: Matrix,
    donors: ArrayLike | pd.Series,
    *,
    scale: str,
    min_cells: int = 10,
    pseudocount: float = 1.0,
    block: int = 16,
) -> DonorTest:
    """Paired t-test over donors of every gene, between two groups of cells of every feature.

    A donor counts for a feature if it has at least `min_cells` cells in both groups. What is tested
    depends on what is given, which must be said:

        scale="log1p": x = ln(1 + normalised count); a donor's value is the mean of x in the group
        scale="counts": raw counts of ALL measured genes; a donor's value is ln(1 + count per 10,000
            counts) of the sums over the group (a pseudobulk)

    Args:
        expression: [cells, genes], dense or CSR, non-negative.
        high: boolean mask [features, cells], dense or sparse.
        low: boolean mask [features, cells]; shares no cell with `high`.
        donors: one label per cell. Cells without one (None, NaN) are left out.
        scale: "log1p" or "counts".
        min_cells: at least 1.
        pseudocount: added for the fold change to the mean counts (or counts per 10,000).
        block: features worked on at once; some ten arrays [block, donors, genes] are held.

    Returns:
        The tests, features in the order of the masks.

    Raises:
        InputError: if shapes or types disagree, if the groups overlap, if the expression is not of
            the scale, or for another option.
    """
    if min_cells < 1 or block < 1 or pseudocount <= 0:
        raise InputError(
            f"min_cells={min_cells}, block={block}, pseudocount={pseudocount}: give positive ones."
        )
    values = _values(expression, scale)
    n_cells = values[0].shape[0]
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
    parts = []
    for begin in range(0, high.shape[0], block):
        rows = slice(begin, begin + block)
        sums = (_sums(mask[rows], donor, values) for mask in (high, low))
        parts.append(_test(*sums, scale, min_cells, pseudocount, rounding=n_cells * EPSILON))
    return DonorTest(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(DonorTest)
        }
    )


def _sums(mask: sparse.csr_array, donor: np.ndarray, values: list[Matrix]) -> list[np.ndarray]:
    """Cells [features, donors, 1], then the sum of each of `values` [features, donors, genes].

    One sparse product: a row of the mask becomes one row for each donor.
    """
    n_donors = int(donor.max()) + 1
    feature, cell = mask.nonzero()
    labelled = donor[cell] >= 0
    feature, cell = feature[labelled].astype(np.int64), cell[labelled]
    split = sparse.csr_array(
        (np.ones(cell.size), (feature * n_donors + donor[cell], cell)),
        shape=(mask.shape[0] * n_donors, mask.shape[1]),
    )
    sums = [np.diff(split.indptr), *(split @ value for value in values)]
    return [
        (m.toarray() if sparse.issparse(m) else m).reshape(mask.shape[0], n_donors, -1)
        for m in sums
    ]


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
    if scale not in ("log1p", "counts"):
        raise InputError(f'scale={scale!r}: say whether expression is "log1p" or "counts".')
    if np.ndim(expression) != 2:
        raise InputError(
            f"expression has {np.ndim(expression)} dimensions: give a matrix of cells by genes."
        )
    if sparse.issparse(expression):
        x = sparse.csr_array(expression, dtype=np.float64, copy=True)
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

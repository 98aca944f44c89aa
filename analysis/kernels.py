"""The inner loops of analyses, compiled by numba."""

from __future__ import annotations

import math

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def group_sums(
    mask_indptr: np.ndarray,
    mask_cells: np.ndarray,
    also: np.ndarray,
    indptr: np.ndarray,
    genes: np.ndarray,
    values: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
    part: np.ndarray,
) -> None:
    """Sums of every gene over the cells of each feature, and over those also in a smaller group.

    Cells are added in their order, so sums over the same non-zero entries are equal to the last bit
    whatever other cells the groups hold.

    Args:
      mask_indptr, mask_cells: CSR of the groups, cells rising.
      also: bool, one for each entry of `mask_cells`: whether it is in the smaller group too.
      indptr, genes, values: CSR of the expression x [cells, genes].
      counts: exp(x) - 1 of its entries.
      sums, part: float64 [features, 4, genes]; added to them are the sums of x, of its square, of
        the counts, and the number of cells where x is not zero.
    """
    for feature in range(len(mask_indptr) - 1):
        for entry in range(mask_indptr[feature], mask_indptr[feature + 1]):
            cell = mask_cells[entry]
            for i in range(indptr[cell], indptr[cell + 1]):
                gene, x, count = genes[i], np.float64(values[i]), np.float64(counts[i])
                sums[feature, 0, gene] += x
                sums[feature, 1, gene] += x * x
                sums[feature, 2, gene] += count
                sums[feature, 3, gene] += 1.0
            if also[entry]:
                for i in range(indptr[cell], indptr[cell + 1]):
                    gene, x, count = genes[i], np.float64(values[i]), np.float64(counts[i])
                    part[feature, 0, gene] += x
                    part[feature, 1, gene] += x * x
                    part[feature, 2, gene] += count
                    part[feature, 3, gene] += 1.0


@numba.njit(nogil=True, cache=True)
def average_ranks(scores: np.ndarray, order: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties their average; the sum of squared deviations from the mean rank [rows].

    Args:
      scores: [rows, n].
      order: argsort of each row.
      ranks: float64 [rows, n], filled.
    """
    rows, n = scores.shape
    spread = np.zeros(rows)
    middle = (n + 1) / 2
    for row in range(rows):
        start = 0
        while start < n:
            stop = start + 1
            value = scores[row, order[row, start]]
            while stop < n and scores[row, order[row, stop]] == value:
                stop += 1
            rank = (start + 1 + stop) / 2
            for i in range(start, stop):
                ranks[row, order[row, i]] = rank
            spread[row] += (stop - start) * (rank - middle) ** 2
            start = stop
    return spread


@numba.njit(nogil=True, cache=True)
def _add(high: float, low: float, value: float) -> tuple[float, float]:
    """high + low + value, and what rounding took of it (Knuth's two-sum)."""
    total = high + value
    back = total - high
    return total, low + ((high - (total - back)) + (value - back))


@numba.njit(nogil=True, cache=True)
def log_factorials(n: int) -> np.ndarray:
    """ln k! for k of 0 .. n as sums of two doubles [n + 1, 2]: the logarithm of a small probability
    is a small difference of large ones."""
    table = np.zeros((n + 1, 2))
    for k in range(1, n + 1):
        table[k] = _add(table[k - 1, 0], table[k - 1, 1], math.log(k))
    return table


@numba.njit(nogil=True, cache=True)
def hypergeometric_upper(
    hits: np.ndarray, selected: np.ndarray, sizes: np.ndarray, total: int, p: np.ndarray
) -> None:
    """P(X >= hits) of the hypergeometric distribution, [features, terms], relative error 1e-12.

    The tail on the side of `hits` that is away from the mode is summed term by term, each from the
    one before; the other is 1 less that.

    Args:
      hits: int64 [features, terms].
      selected: genes selected, int64 [features]; sizes: genes of each term, int64 [terms].
      total: genes.
      p: float64 [features, terms], filled.
    """
    factorial = log_factorials(total)
    for feature in range(hits.shape[0]):
        n = selected[feature]
        for term in range(hits.shape[1]):
            size, k = sizes[term], hits[feature, term]
            low, high = max(0, n + size - total), min(n, size)
            if k <= low:
                p[feature, term] = 1.0
                continue
            upward = k > n * size / total
            first = k if upward else k - 1
            high_part, low_part = 0.0, 0.0
            for sign, number in (
                (1.0, size), (1.0, total - size), (1.0, n), (1.0, total - n), (-1.0, total),
                (-1.0, first), (-1.0, size - first), (-1.0, n - first),
                (-1.0, total - size - n + first),
            ):  # fmt: skip
                high_part, low_part = _add(high_part, low_part, sign * factorial[number, 0])
                low_part += sign * factorial[number, 1]
            log_mass = high_part + low_part
            ratio, tail, at = 1.0, 1.0, first
            while (at < high) if upward else (at > low):
                if upward:
                    ratio *= (size - at) * (n - at) / ((at + 1.0) * (total - size - n + at + 1.0))
                    at += 1
                else:
                    ratio *= (
                        at * (total - size - n + at * 1.0) / ((size - at + 1.0) * (n - at + 1.0))
                    )
                    at -= 1
                tail += ratio
                if ratio < 1e-17 * tail:
                    break
            mass = math.exp(log_mass) * tail
            p[feature, term] = min(1.0, mass) if upward else max(0.0, 1.0 - mass)

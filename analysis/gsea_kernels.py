"""The inner loops of prerank GSEA, compiled by numba."""

from __future__ import annotations

import math

import numba
import numpy as np

# The place of the only bit that is set, by multiplication with a de Bruijn sequence.
_SEQUENCE = 0x03F79D71B4CB0A89
_PLACE = np.zeros(64, np.int64)
_PLACE[[(_SEQUENCE << place) % 2**64 >> 58 for place in range(64)]] = np.arange(64)


@numba.njit(nogil=True, cache=True)
def observed(
    order: np.ndarray,
    weight: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    indptr: np.ndarray,
    terms: np.ndarray,
    size: np.ndarray,
    total: np.ndarray,
    high: np.ndarray,
    low: np.ndarray,
    high_at: np.ndarray,
    low_at: np.ndarray,
) -> None:
    """Extremes of the running sums of all terms along one ranking.

    The ranking is gone through once; each gene adds to the sums of the terms it belongs to.

    Args:
      order: genes from the highest score down [genes].
      weight, start, end: by rank; `start` and `end` bound the block of equal scores.
      indptr, terms: CSR of the terms of each gene.
      size: genes of each term [terms].
      total: summed weight of each term [terms], zeros: filled, as are the others.
      high, low: largest and smallest value at the end of a block [terms].
      high_at, low_at: the first rank after the block where it is reached.
    """
    n_genes, n_terms = len(order), len(size)
    for rank in range(n_genes):
        for i in range(indptr[order[rank]], indptr[order[rank] + 1]):
            total[terms[i]] += weight[rank]
    summed = np.zeros(n_terms)
    seen = np.zeros(n_terms, np.int64)
    high[:] = -np.inf
    low[:] = np.inf
    for rank in range(n_genes):
        for i in range(indptr[order[rank]], indptr[order[rank] + 1]):
            term = terms[i]
            if total[term] <= 0 or size[term] == n_genes:
                continue
            miss = 1.0 / (n_genes - size[term])
            before = summed[term] / total[term] - (start[rank] - seen[term]) * miss
            if before < low[term]:
                low[term], low_at[term] = before, start[rank]
            summed[term] += weight[rank]
            seen[term] += 1
            after = summed[term] / total[term] - (end[rank] - seen[term]) * miss
            if after > high[term]:
                high[term], high_at[term] = after, end[rank]


@numba.njit(nogil=True, cache=True)
def extremes(
    positions: np.ndarray,
    weight: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    high: np.ndarray,
    low: np.ndarray,
) -> None:
    """As `observed`, to the last bit, for drawn sets: ranks of their genes, rising [draws, size].

    A set without weight gets NaN.
    """
    draws, size = positions.shape
    miss = 1.0 / (len(weight) - size)
    for draw in range(draws):
        total = 0.0
        for i in range(size):
            total += weight[positions[draw, i]]
        if total <= 0:
            high[draw] = low[draw] = np.nan
            continue
        # Of a block of equal scores its last gene gives the highest and its first the lowest value.
        share, summed, top, bottom = 0.0, 0.0, -np.inf, np.inf
        for i in range(size):
            rank = positions[draw, i]
            bottom = min(bottom, share - (start[rank] - i) * miss)
            summed += weight[rank]
            share = summed / total
            top = max(top, share - (end[rank] - i - 1) * miss)
        high[draw], low[draw] = top, bottom


@numba.njit(nogil=True, cache=True)
def place(counts: np.ndarray, edges: np.ndarray, random: np.ndarray, positions: np.ndarray) -> None:
    """Random subsets with given numbers of genes in each stratum of ranks, rising [draws, size].

    Floyd's algorithm (Bentley and Floyd 1987, CACM 30:754) in each stratum, in a set of bits.

    Args:
      counts: genes to draw [draws, strata].
      edges: first rank of each stratum, and the number of ranks.
      random: uint32 [draws, size].
      positions: [draws, size], filled.
    """
    bits = np.zeros((edges[-1] + 63) // 64, np.uint64)
    one = np.uint64(1)
    for draw in range(len(counts)):
        used = 0
        for stratum in range(counts.shape[1]):
            first, width = edges[stratum], edges[stratum + 1] - edges[stratum]
            for last in range(width - counts[draw, stratum], width):
                scaled = np.uint64(random[draw, used]) * np.uint64(last + 1)
                at = np.uint64(first) + (scaled >> np.uint64(32))
                used += 1
                if bits[at >> np.uint64(6)] >> (at & np.uint64(63)) & one:
                    at = np.uint64(first + last)
                bits[at >> np.uint64(6)] |= one << (at & np.uint64(63))
        found = 0
        for word in range(len(bits)):
            left = bits[word]
            while left:
                lowest = left & (~left + one)
                where = (lowest * np.uint64(_SEQUENCE)) >> np.uint64(58)
                positions[draw, found] = word * 64 + _PLACE[where]
                found += 1
                left ^= lowest
            bits[word] = 0


@numba.njit(nogil=True, cache=True)
def tilted_counts(
    chance: np.ndarray, width: np.ndarray, size: int, uniform: np.ndarray, counts: np.ndarray
) -> float:
    """Numbers of genes in each stratum, independent binomial ones given that they sum to `size`.

    Args:
      chance: probability of each gene of a stratum [strata].
      width: genes of each stratum.
      uniform: from 0 to 1 [draws, strata].
      counts: [draws, strata], filled.

    Returns:
      ln of the probability that the sum is `size`.
    """
    strata = len(chance)
    mass = np.zeros((strata, size + 1))
    first = np.zeros(strata, np.int64)
    stop = np.zeros(strata, np.int64)
    for b in range(strata):
        # From the mode outwards, as long as a double can tell.
        most = min(width[b], size)
        mode = min(most, int((width[b] + 1) * chance[b]))
        odds = chance[b] / (1 - chance[b])
        mass[b, mode] = math.exp(
            math.lgamma(width[b] + 1) - math.lgamma(mode + 1) - math.lgamma(width[b] - mode + 1)
            + mode * math.log(chance[b]) + (width[b] - mode) * math.log1p(-chance[b])
        )  # fmt: skip
        least = mass[b, mode] * 1e-18
        n = mode
        while n < most and mass[b, n] > least:
            mass[b, n + 1] = mass[b, n] * odds * (width[b] - n) / (n + 1)
            n += 1
        stop[b] = n + 1
        n = mode
        while n > 0 and mass[b, n] > least:
            mass[b, n - 1] = mass[b, n] * n / ((width[b] - n + 1) * odds)
            n -= 1
        first[b] = n
    # Probability that the strata from b on hold so many.
    rest = np.zeros((strata + 1, size + 1))
    rest[strata, 0] = 1.0
    for b in range(strata - 1, -1, -1):
        for n in range(first[b], stop[b]):
            for left in range(n, size + 1):
                rest[b, left] += mass[b, n] * rest[b + 1, left - n]
    for draw in range(len(uniform)):
        left = size
        for b in range(strata):
            remaining = uniform[draw, b] * rest[b, left]
            chosen = -1
            for n in range(first[b], min(stop[b], left + 1)):
                likely = mass[b, n] * rest[b + 1, left - n]
                if likely > 0:
                    chosen = n
                    remaining -= likely
                    if remaining < 0:
                        break
            counts[draw, b] = chosen
            left -= chosen
    return math.log(rest[0, size])


@numba.njit(nogil=True, cache=True)
def stratum_counts(positions: np.ndarray, stratum: np.ndarray, counts: np.ndarray) -> None:
    """How many of each drawn set are in each stratum, added to `counts` [draws, strata]."""
    for draw in range(len(positions)):
        for i in range(positions.shape[1]):
            counts[draw, stratum[positions[draw, i]]] += 1


@numba.njit(nogil=True, cache=True)
def rates(
    mean_weight: np.ndarray,
    width: np.ndarray,
    levels: np.ndarray,
    rate: np.ndarray,
    tilt: np.ndarray,
) -> None:
    """How unlikely a running sum of some level is, per gene of the set, and how it comes about.

    That the sum reaches x after rank r says, for a set much smaller than the N genes, that the mean
    of h(i) = w(i) ([i < r] - x - r / N) over its genes is 0 or more. That has about the probability
    exp(-size * rate), rate = -min over theta of ln E exp(theta h) (Cramer); of all r the likeliest
    counts, and it happens by drawing genes with odds exp(theta h).

    Args:
      mean_weight, width: of each stratum of ranks.
      levels: x [levels], rising.
      rate: [levels], filled.
      tilt: theta h by stratum [levels, strata], filled.
    """
    strata = len(width)
    n_genes = width.sum()
    scale = (mean_weight * width).sum() / n_genes
    h = np.empty(strata)
    for level in range(len(levels)):
        rate[level] = np.inf
        top = 0
        for r in range(1, strata):
            top += width[r - 1]
            bar = levels[level] + top / n_genes
            if bar >= 1:
                break
            for b in range(strata):
                h[b] = mean_weight[b] / scale * ((1.0 if b < r else 0.0) - bar)
            theta = 0.0
            lower, upper = 0.0, np.inf
            value = 0.0
            for _ in range(30):
                largest = 0.0
                for b in range(strata):
                    largest = max(largest, theta * h[b])
                zeroth = first = second = 0.0
                for b in range(strata):
                    part = width[b] * math.exp(theta * h[b] - largest)
                    zeroth += part
                    first += part * h[b]
                    second += part * h[b] * h[b]
                value = math.log(zeroth / n_genes) + largest
                slope = first / zeroth
                if theta == 0 and slope >= 0:  # likely as it is
                    break
                if slope < 0:
                    lower = theta
                else:
                    upper = theta
                curvature = second / zeroth - slope * slope
                step = theta - slope / curvature if curvature > 0 else np.inf
                if not lower < step < upper or step > 4 * lower + 1:
                    step = 2 * lower + 0.5 if upper == np.inf else (lower + upper) / 2
                if abs(step - theta) < 1e-3 * (1 + theta) or step > 200:
                    break
                theta = step
            if -value < rate[level]:
                rate[level] = -value
                for b in range(strata):
                    tilt[level, b] = theta * h[b]

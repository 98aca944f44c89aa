"""Enrichment scores of random gene sets, as far out as p-values are wanted.

The null of a set is that of all random sets of its size, so it is drawn once a size. Equally likely
sets tell p down to about 10 / n. Further out, sets are drawn that lie high (or low) in the ranking
more often than chance, and weighted by how much more often: importance sampling, which is unbiased
wherever its draws come from, and whose error is known from the weights.

Where to draw from, large deviations say (Bucklew 2004, Introduction to Rare Event Simulation): for
a level of the running sum they give the odds of each gene with which that level is typical
(`gsea_kernels.rates`). Four levels a side, whose chances are about exp(-5) to exp(-26), are mixed
with the equally likely draws, so that no weight is above 1 (the balance heuristic: Veach and Guibas
1995, SIGGRAPH, p. 419).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from analysis import gsea_kernels as kernels

RATIO = 1.2  # of the sizes that are drawn, where they are not successive
DEPTHS = (5.0, 10.0, 17.0, 26.0)  # -ln of about the chance of the levels that tilted draws aim at
TILTED = 0.1  # draws for each of them, as a share of the equally likely ones
LEVELS = special.expit(np.linspace(-5, 6, 67))
GROWTH = 0.3  # width of a stratum of ranks, as a share of its distance from the nearer end
NEIGHBOURS = 16  # draws on either side that tell the weight at a score
LEAST = 10.0  # draws of a sign, counted by their weights, that a mean and a p need


def drawn_sizes(largest: int, n_genes: int) -> np.ndarray:
    """Sizes of random sets, rising: 1, 2, 3, ..., then each 1.2 times the one before.

    The last is `largest` or more, but leaves a gene out. The sizes do not depend on which other
    sets are tested.
    """
    found = [1]
    while found[-1] < min(largest, n_genes - 1):
        found.append(min(n_genes - 1, max(found[-1] + 1, round(found[-1] * RATIO))))
    return np.asarray(found)


def strata(n_genes: int) -> np.ndarray:
    """Edges of strata of ranks, narrow at both ends, the same from either."""
    edges, middle = [0], n_genes // 2
    while edges[-1] < middle:
        edges.append(min(middle, edges[-1] + max(1, int(GROWTH * edges[-1]))))
    left = np.asarray(edges)
    return np.unique(np.concatenate([left, n_genes - left]))


@dataclass(frozen=True, eq=False)
class Ranking:
    """Genes of a list from the highest score down; all [genes].

    order: gene at each rank.
    weight: |score| to the power of the weight, by rank.
    start, end: bounds of the ranks that share the score of a rank.
    """

    order: np.ndarray
    weight: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, weight: float) -> Ranking:
        """The ranking of scores [genes]."""
        order = np.argsort(-scores, kind="stable")
        falling = -scores[order]
        # Only ratios of weights count: in units of the largest, none over- or underflows.
        size = np.abs(falling)
        size = np.ldexp(size, -int(np.frexp(size.max())[1]))
        return cls(
            order=order,
            weight=size**weight,
            start=np.searchsorted(falling, falling, "left"),
            end=np.searchsorted(falling, falling, "right"),
        )


@dataclass(frozen=True, eq=False)
class RandomSets:
    """Equally likely sets of one size, for every list the same.

    positions: ranks of their genes, rising [draws, size].
    counts: how many are in each stratum of ranks [draws, strata].
    edges: of the strata.
    """

    positions: np.ndarray
    counts: np.ndarray
    edges: np.ndarray
    seed: int

    @classmethod
    def draw(cls, n_genes: int, size: int, n: int, seed: int) -> RandomSets:
        """Draws n sets; more of them begin with the same ones."""
        rng = np.random.default_rng([seed, size, 0])
        positions = np.empty((n, size), np.int32)
        step = max(1, (1 << 20) // size)
        everywhere = np.array([0, n_genes])
        for first in range(0, n, step):
            part = positions[first : first + step]
            random = rng.integers(2**32, size=part.shape, dtype=np.uint32)
            kernels.place(np.full((len(part), 1), size, np.int32), everywhere, random, part)
        edges = strata(n_genes)
        counts = np.zeros((n, len(edges) - 1), np.int32)
        stratum = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        kernels.stratum_counts(positions, stratum, counts)
        return cls(positions, counts, edges, seed)

    @property
    def size(self) -> int:
        """Genes of a set."""
        return self.positions.shape[1]

    def tilted(self, tilts: list[Tilt]) -> tuple[np.ndarray, np.ndarray]:
        """More sets, those of each tilt where genes have its odds, and the weights of all.

        Returns:
          Positions [tilted draws, size]; weights [draws + tilted draws], at most 1: the mean over
          all draws of weight times f, per equally likely draw, is the mean of f under the null.
        """
        depths = [(tilt, depth) for depth in DEPTHS for tilt in tilts]
        depths = [(tilt, depth) for tilt, depth in depths if tilt.reaches(depth / self.size)]
        n = max(1, int(TILTED * len(self.positions)))
        width = np.diff(self.edges)
        n_genes = self.edges[-1]
        # ln of the number of sets
        every = -special.betaln(n_genes - self.size + 1, self.size + 1) - np.log1p(n_genes)
        rng = np.random.default_rng([self.seed, self.size, 1])
        positions, counts = [np.empty((0, self.size), np.int32)], [self.counts]
        odds, constant = np.empty((len(width), len(depths))), np.empty(len(depths))
        for i, (tilt, depth) in enumerate(depths):
            chance = tilt.chance(depth / self.size, width, self.size)
            drawn = np.empty((n, len(width)), np.int32)
            at = np.empty((n, self.size), np.int32)
            sum_is_size = kernels.tilted_counts(
                chance, width, self.size, rng.random(drawn.shape), drawn
            )
            random = rng.integers(2**32, size=at.shape, dtype=np.uint32)
            kernels.place(drawn, self.edges, random, at)
            positions.append(at)
            counts.append(drawn)
            odds[:, i] = special.logit(chance)
            constant[i] = width @ np.log1p(-chance) - sum_is_size + every
        # How much likelier each tilt makes a set than chance does.
        ratio = np.concatenate([part @ odds for part in counts]) + constant
        together = special.logsumexp(ratio, axis=1) if depths else np.full(len(ratio), -np.inf)
        return np.concatenate(positions), special.expit(-together - np.log(n / len(self.counts)))


@dataclass(frozen=True, eq=False)
class Tilt:
    """Odds that raise the running sum of a list, or with `down` lower it; see `kernels.rates`.

    rate: -ln of the chance of each of `LEVELS`, per gene of a set.
    tilt: ln of the odds of the genes of each stratum [levels, strata].
    """

    rate: np.ndarray
    tilt: np.ndarray

    @classmethod
    def of(cls, ranking: Ranking, down: bool = False) -> Tilt:
        """For one list."""
        edges = strata(len(ranking.weight))
        width = np.diff(edges)
        mean = np.add.reduceat(ranking.weight, edges[:-1]) / width
        side = slice(None, None, -1 if down else 1)
        rate, tilt = np.empty(len(LEVELS)), np.zeros((len(LEVELS), len(width)))
        if ranking.weight.any():
            kernels.rates(mean[side].copy(), width[side].copy(), LEVELS, rate, tilt)
        else:
            rate[:] = -np.inf
        return cls(rate, tilt[:, side])

    def reaches(self, rate: float) -> bool:
        """Whether a level is so unlikely."""
        return bool(np.isfinite(self.rate[self.rate >= rate]).any())

    def chance(self, rate: float, width: np.ndarray, size: int) -> np.ndarray:
        """Probability of the genes of each stratum [strata], their sum over all genes is `size`."""
        tilt = self.tilt[np.argmax(self.rate >= rate)]
        lower, upper = -tilt.max() - 50.0, -tilt.min() + 50.0
        for _ in range(60):
            middle = (lower + upper) / 2
            if width @ special.expit(tilt + middle) < size:
                lower = middle
            else:
                upper = middle
        return np.clip(special.expit(tilt + lower), 1e-12, 1 - 1e-12)


@dataclass(frozen=True, eq=False)
class Side:
    """Enrichment scores of one sign under the null, their absolute values.

    value: rising [n]; weight, square: sums of weights and of their squares from each on [n + 1].
    share: how much of the null has this sign.
    mean: of the value; NaN where too few are known.
    """

    value: np.ndarray
    weight: np.ndarray
    square: np.ndarray
    share: float
    mean: float

    @classmethod
    def of(cls, value: np.ndarray, weight: np.ndarray, total: float) -> Side:
        """Of scores and weights in any order; `total` is the weight of both signs."""
        order = np.argsort(value, kind="stable")
        value, weight = value[order], weight[order]
        sums = [np.append(np.cumsum(w[::-1])[::-1], 0.0) for w in (weight, weight**2)]
        known = sums[0][0] ** 2 >= LEAST * sums[1][0] > 0
        mean = value @ weight / sums[0][0] if known and value[-1] > 0 else np.nan
        return cls(value, *sums, share=sums[0][0] / total if total else np.nan, mean=mean)

    def tail(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p of scores, and its standard error; any shape.

            p = (W + w) / (D + w)

        with W the weight of draws that score as much or more, D that of all draws of the sign, and
        w the weight at the score itself: the observed set is one of the draws (Harrison 2012,
        Biometrika 99:57). Of equally likely draws it is (b + 1) / (m + 1).
        """
        if np.isnan(self.mean):
            return np.full(score.shape, np.nan), np.full(score.shape, np.nan)
        # The same set may score differently in the last bits.
        at = np.searchsorted(self.value, score * (1 - 1e-9))
        first = np.maximum(at - NEIGHBOURS, 0)
        last = np.minimum(at + NEIGHBOURS, len(self.value))
        own = (self.weight[first] - self.weight[last]) / (last - first)
        p = (self.weight[at] + own) / (self.weight[0] + own)
        spread = self.square[at] * (1 - 2 * p) + p**2 * self.square[0] + own**2 * (1 - p) ** 2
        return p, np.sqrt(np.maximum(spread, 0)) / (self.weight[0] + own)


def null(ranking: Ranking, sets: RandomSets, tilts: list[Tilt], score_type: str) -> dict[int, Side]:
    """The null of one list and one size, by sign: 1, -1, or both for "std".

    Sets whose genes all have weight 0 have no score; they are left out.
    """
    extra, weight = sets.tilted(tilts)
    high, low = np.empty((2, len(weight)))
    split = len(sets.positions)
    for positions, part in ((sets.positions, slice(split)), (extra, slice(split, None))):
        kernels.extremes(
            positions, ranking.weight, ranking.start, ranking.end, high[part], low[part]
        )
    with_signal = ~np.isnan(high)
    high, low, weight = high[with_signal], low[with_signal], weight[with_signal]
    total = weight.sum()
    up = {"std": high > -low, "pos": np.ones_like(high, bool), "neg": np.zeros_like(high, bool)}
    up = up[score_type]
    sides = {}
    if score_type != "neg":
        sides[1] = Side.of(high[up], weight[up], total)
    if score_type != "pos":
        sides[-1] = Side.of(-low[~up], weight[~up], total)
    return sides

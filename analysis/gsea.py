"""Prerank gene set enrichment analysis for whole dictionaries: many lists times many sets at once.

The statistic is that of Subramanian et al. 2005 (PNAS 102:15545), as gseapy computes it: a running
sum over the genes from the highest score down rises by |score|^weight at genes of the set and
falls evenly at the others; the enrichment score ES is where it is farthest from 0. Random sets of
its size tell what ES is worth; they are drawn once a size, for all sets and all lists: `gsea_null`.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse
from tqdm import tqdm

from analysis import enrichment, gsea_null
from analysis import gsea_kernels as kernels
from analysis.blocks import in_order
from analysis.features import Matrix, as_booleans
from sae_jax.errors import InputError

SCORE_TYPES = ("std", "pos", "neg")
FIELDS = ("es", "nes", "p", "p_error", "fdr", "same_sign")


@dataclass(frozen=True, eq=False)
class Prerank:
    """Enrichment of every term in every list; all [lists, terms], NaN where there is none to tell.

    es: enrichment score, -1 to 1. NaN: no gene of the term has weight, the term holds all genes or
        none, or all scores of the list are equal.
    nes: es over the mean absolute value of the null's scores of its sign. As p, NaN where chance
        hardly ever has that sign (fewer than 10 draws of it; a skewed list): score types "pos" and
        "neg" do not depend on it.
    p: chance of such a score or a farther one, among the null's scores of its sign.
    p_error: its Monte Carlo standard error.
    q: p corrected for the terms of the list by Benjamini and Hochberg.
    fdr: gseapy's and the Broad's: share of the null of all terms whose nes is as far out, over the
        share of the terms, at most 1. It need not rise with p.
    same_sign: share of the null that has the sign.
    leading: of a positive es, the genes down to its peak; of a negative one, those before it.

    `scores`, `membership`, `weight` and `score_type` are what was asked.
    """

    es: np.ndarray
    nes: np.ndarray
    p: np.ndarray
    p_error: np.ndarray
    q: np.ndarray
    fdr: np.ndarray
    same_sign: np.ndarray
    leading: np.ndarray
    scores: np.ndarray
    membership: sparse.csr_array
    weight: float
    score_type: str

    def leading_edge(self, row: int, term: int) -> np.ndarray:
        """Genes of the term that make its es in list `row`, from the outermost score inwards.

        They are those up to the peak, or for a negative es from the trough on; all genes of a block
        of equal scores or none. Empty where es is NaN.
        """
        order = np.argsort(-self.scores[row], kind="stable")
        return order[self._leading_ranks(np.argsort(order), row, term)]

    def _leading_ranks(self, rank: np.ndarray, row: int, term: int) -> np.ndarray:
        ranks = np.sort(rank[self._members(term)])
        if np.isnan(self.es[row, term]):
            return ranks[:0]
        if self._up(row, term):
            return ranks[ranks < self.leading[row, term]]
        return ranks[ranks >= self.leading[row, term]][::-1]

    def running_sum(self, row: int, term: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of genes gone through, from 0 on, and the running sum there.

        Within genes of equal score the sum is not defined: one point for each score.

        Raises:
          InputError: if the term has no es in the list.
        """
        if np.isnan(self.es[row, term]):
            raise InputError(f"term {term} has no running sum in list {row}: its es is NaN.")
        ranking = gsea_null.Ranking.of(self.scores[row], self.weight)
        inside = np.zeros(self.scores.shape[1])
        inside[self._members(term)] = 1
        inside = inside[ranking.order]
        hits, misses = np.cumsum(inside * ranking.weight), np.cumsum(1 - inside)
        at = np.unique(ranking.end)
        value = hits[at - 1] / hits[-1] - misses[at - 1] / misses[-1]
        return np.append(0, at), np.append(0.0, value)

    def table(
        self, row: int, terms: Sequence[str], genes: Sequence[str], name: str = "prerank"
    ) -> pd.DataFrame:
        """A list's results under gseapy's column names, terms with the largest |NES| first.

        Args:
          terms, genes: names, in the order of the membership.
          name: of the list.

        Returns:
          Name, Term, ES, NES, "NOM p-val", "FDR q-val" (`fdr`), "Tag %", "Gene %" and Lead_genes as
          gseapy gives them, then "p error" and "BH q-val" (`q`). Terms without es come last.
        """
        if len(terms) != self.es.shape[1] or len(genes) != self.scores.shape[1]:
            raise InputError(
                f"{len(terms)} terms and {len(genes)} genes are named, but the results are of "
                f"{self.es.shape[1]} terms and {self.scores.shape[1]} genes."
            )
        # Of equal scores by name, so that the order of the columns shows nowhere.
        by_name = np.argsort(np.asarray(genes, dtype=object), kind="stable")
        order = by_name[np.argsort(-self.scores[row, by_name], kind="stable")]
        rank, named = np.argsort(order), np.asarray(genes, dtype=object)[order]
        tags, shares, leads = [], [], []
        for term in range(len(terms)):
            ranks, at = self._leading_ranks(rank, row, term), self.leading[row, term]
            # gseapy counts a trough's own place too.
            passed = at if self._up(row, term) else len(order) - at + 1
            untold = np.isnan(self.es[row, term])
            shares.append("" if untold else f"{passed / len(order):.2%}")
            tags.append("" if untold else f"{len(ranks)}/{len(self._members(term))}")
            leads.append(";".join(map(str, named[ranks])))
        found = pd.DataFrame(
            {
                "Name": name,
                "Term": list(terms),
                "ES": self.es[row],
                "NES": self.nes[row],
                "NOM p-val": self.p[row],
                "FDR q-val": self.fdr[row],
                "Tag %": tags,
                "Gene %": shares,
                "Lead_genes": leads,
                "p error": self.p_error[row],
                "BH q-val": self.q[row],
            }
        )
        return found.sort_values(
            "NES", key=lambda nes: -nes.abs(), kind="stable", ignore_index=True
        )

    def _up(self, row: int, term: int) -> bool:
        return self.score_type == "pos" or (self.score_type == "std" and self.es[row, term] >= 0)

    def _members(self, term: int) -> np.ndarray:
        indptr = self.membership.indptr
        return self.membership.indices[indptr[term] : indptr[term + 1]]


def prerank(
    scores: ArrayLike,
    membership: Matrix,
    *,
    n_permutations: int = 1000,
    weight: float = 1.0,
    score_type: str = "std",
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> Prerank:
    """Prerank GSEA of every term in every list.

    Genes of equal score have no order: the running sum is taken where a block of equal scores ends,
    so the order of the columns changes nothing. Without ties, es is gseapy's. Nothing of a list
    depends on the other lists, and nothing of a term but q and fdr on the other terms.

    The null is drawn for sizes 1.2 apart (and all up to 8). Between them ln p at equal es, and the
    mean to the power -2, are taken to be linear in the size, as those of sums of so many draws are.
    Of each size there are `n_permutations` equally likely sets, the same for all lists, and for
    each list a tenth of that at each of four depths a side, down to a chance of about exp(-26): the
    relative error of p is much the same for .01 and 1e-10. Much farther out p stays too large.

    Args:
      scores: finite [lists, genes]. Scores that should be equal but differ in their last bits are
        not ties: round computed ones.
      membership: 0 or 1 [terms, genes], dense or sparse, genes in the same order.
      n_permutations: random sets of each size.
      weight: power of |score|, 0 or more; 0 gives the Kolmogorov-Smirnov statistic.
      score_type: "std": es is the farther of peak and trough, compared with a null of its sign.
        "pos": the peak, for scores that are never negative, such as attributions. "neg": the
        trough.
      seed: of the random sets.
      workers: threads, each with a list (default: the cores).
      progress: whether to show a bar.

    Raises:
      InputError: for scores that are not finite, other score types, a negative weight or seed,
        fewer than 10 permutations, or if shapes or the membership's values do not fit.
    """
    scores = np.asarray(scores, dtype=np.float64)
    members = sparse.csr_array(as_booleans("membership", membership))
    _check(scores, members, n_permutations, weight, score_type, seed)
    members.sort_indices()
    n_genes, size = scores.shape[1], np.diff(members.indptr)
    of_gene = sparse.csr_array(members.T)
    testable = (size > 0) & (size < n_genes)
    drawn, between = _between(size * testable, n_genes)
    sets = [gsea_null.RandomSets.draw(n_genes, int(s), n_permutations, seed) for s in drawn]
    found = np.full((len(FIELDS), len(scores), len(size)), np.nan)
    leading = np.zeros(found.shape[1:], np.int32)

    def one(row: int) -> None:
        ranking = gsea_null.Ranking.of(scores[row], weight)
        total, high, low = np.zeros((3, len(size)))
        high_at, low_at = np.zeros((2, len(size)), np.int64)
        kernels.observed(
            ranking.order, ranking.weight, ranking.start, ranking.end, of_gene.indptr,
            of_gene.indices, size, total, high, low, high_at, low_at,
        )  # fmt: skip
        up = {"std": high > -low, "pos": True, "neg": False}[score_type]
        told = testable & (total > 0) & (ranking.end[0] < n_genes)
        es = np.where(told, np.where(up, high, low), np.nan)
        leading[row] = np.where(told, np.where(up, high_at, low_at), 0)
        found[0, row] = es
        if not told.any():
            return
        tilts = [
            gsea_null.Tilt.of(ranking, down=down)
            for down, other in ((False, "neg"), (True, "pos"))
            if score_type != other
        ]
        nulls = [gsea_null.null(ranking, each, tilts, score_type) for each in sets]
        count = between[:, told].sum(axis=1)
        for sign in nulls[0]:
            of_sign = np.flatnonzero(told & (up == (sign > 0)))
            sides = [sides[sign] for sides in nulls]
            found[1:, row, of_sign] = _compare(es[of_sign], sides, between[:, of_sign], count)

    workers = workers or len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        done = in_order(pool, one, range(len(scores)), workers)
        for _ in tqdm(done, total=len(scores), unit=" lists", disable=not progress):
            pass
    named = dict(zip(FIELDS, found, strict=True))
    return Prerank(
        **named, q=enrichment.benjamini_hochberg(named["p"], axis=1), leading=leading,
        scores=scores, membership=members, weight=weight, score_type=score_type,
    )  # fmt: skip


def _between(size: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """The sizes to draw, and how much of each a term takes [drawn, terms]; of size 0 nothing."""
    ladder = gsea_null.drawn_sizes(int(size.max()), n_genes)
    term = np.flatnonzero(size)
    above = np.searchsorted(ladder, size[term])
    below = np.maximum(above - 1, 0)
    way = (size[term] - ladder[below]) / np.maximum(ladder[above] - ladder[below], 1)
    way[above == 0] = 1
    shares = np.zeros((len(ladder), len(size)))
    shares[below, term] = 1 - way
    shares[above, term] = way
    used = shares.any(axis=1)
    return ladder[used], shares[used]


def _compare(
    es: np.ndarray, sides: list[gsea_null.Side], between: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """nes, p, its error, fdr and share of the sign, of terms of one sign [5, terms].

    Args:
      between: how much of each size's null a term takes [sizes, terms].
      count: how many terms of either sign each null stands for [sizes].
    """
    mean, share = (np.array([getattr(side, name) for side in sides]) for name in ("mean", "share"))
    used = between > 0
    nes = es * np.sqrt(np.where(used, between / mean[:, None] ** 2, 0).sum(axis=0))
    tails = [side.tail(np.abs(es)) for side in sides]
    p_at, error_at = (np.stack(part) for part in zip(*tails, strict=True))
    p = np.exp(np.where(used, between * np.log(p_at), 0).sum(axis=0))
    error = p * np.sqrt(np.where(used, (between * error_at / p_at) ** 2, 0).sum(axis=0))
    # Of all terms' nulls, and of all terms, those of this sign that are as far out.
    known, far = ~np.isnan(nes), np.abs(nes)
    pooled = np.where(np.isnan(mean), 0, count * share)
    out = np.nan_to_num([side.tail(far * side.mean)[0] for side in sides])
    chance = pooled @ out / pooled.sum() if pooled.any() else np.full(len(es), np.nan)
    rising = np.sort(far[known])
    seen = (len(rising) - np.searchsorted(rising, far)) / max(len(rising), 1)
    fdr = np.full(len(es), np.nan)
    np.divide(chance, seen, out=fdr, where=known)
    return np.stack([nes, p, error, np.minimum(fdr, 1), share @ between])


def _check(
    scores: np.ndarray,
    members: sparse.csr_array,
    n_permutations: int,
    weight: float,
    score_type: str,
    seed: int,
) -> None:
    if (
        scores.ndim != 2
        or members.shape[1] != scores.shape[1]
        or 0 in (*scores.shape, members.shape[0])
    ):
        raise InputError(
            f"scores have shape {scores.shape} and membership {members.shape}: give lists by genes "
            "and terms by the same genes, one or more of each."
        )
    bad = ~np.isfinite(scores)
    if bad.any():
        row, gene = np.argwhere(bad)[0]
        raise InputError(
            f"scores hold {int(bad.sum())} values that are NaN or infinite, the first for list "
            f"{row} at gene {gene}: drop these genes from scores and membership, or give them a "
            "score on purpose."
        )
    if score_type not in SCORE_TYPES:
        raise InputError(f"score_type={score_type!r}: give one of {', '.join(SCORE_TYPES)}.")
    if n_permutations < 10 or not 0 <= weight < np.inf or seed < 0:
        raise InputError(
            f"n_permutations={n_permutations}, weight={weight}, seed={seed}: give 10 or more, and "
            "neither weight nor seed below 0."
        )

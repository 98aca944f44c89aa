"""Which gene sets a ranking or a selection of genes favours: every feature times every set at once.

Schuster A.3.7, with what the paper lacks: tie correction, two-sided p-values, and a correction for
the number of sets. Everything takes plain arrays; [features, genes] and [terms, genes] must have
their genes in one order (`gene_sets.read` sees to it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse, special, stats

from analysis import kernels
from analysis.blocks import slices
from analysis.features import Matrix, as_booleans
from sae_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class MannWhitney:
    """Rank test of a term's genes against all others; all [features, terms], float64.

    statistic: U of the term's genes, from 0 to n1 n2.
    z: signed normal deviate, continuity-corrected if asked for; positive: the term ranks high.
    p: two-sided, asymptotic, tie-corrected.
    effect: U / (n1 n2), the area under the ROC curve: 0.5 for no enrichment, 1 for all on top.
    """

    statistic: np.ndarray
    z: np.ndarray
    p: np.ndarray
    effect: np.ndarray


@dataclass(frozen=True, eq=False)
class Hypergeometric:
    """Overlap test (Fisher's exact, one-sided) of selected genes and terms; all [features, terms].

    hits: selected genes in the term (int64).
    expected: hits expected by chance.
    effect: fold enrichment, hits / expected; NaN where none can be expected.
    statistic: sample odds ratio of the 2 × 2 table, as `scipy.stats.fisher_exact` gives it: inf
        for a zero in the denominator, NaN if nothing or everything is selected or in the term.
    p: exact tail probability.
    """

    hits: np.ndarray
    expected: np.ndarray
    effect: np.ndarray
    statistic: np.ndarray
    p: np.ndarray


def mann_whitney(scores: ArrayLike, membership: Matrix, continuity: bool = True) -> MannWhitney:
    """Mann-Whitney U test of every term under every feature's ranking (Schuster A.3.7, eq. 9).

        U = R - n1 (n1 + 1) / 2

    with R the sum of the term's ranks (smallest score rank 1, ties their average). Eq. 9 gives the
    U of the other side, n1 n2 + n1 (n1 + 1) / 2 - R; as printed it lost the plus sign. The variance
    of R is that of a sum drawn without replacement from the ranks actually given, which is the
    tie-corrected one. Equal to `scipy.stats.mannwhitneyu(method="asymptotic")`.

    Scores that should be equal but differ in their last bits are not ties: round computed scores
    (t to 9 decimals, say) or their order is noise.

    Args:
        scores: [features, genes], any scale, infinity allowed.
        membership: 0 or 1 [terms, genes], dense or sparse.
        continuity: whether |U - n1 n2 / 2| is lowered by a half (never below 0).

    Returns:
        The tests. A term that is empty or holds all genes has nothing to compare: NaN. Where
        all scores of a feature are equal, p is 1.

    Raises:
        InputError: if a score is NaN, or if shapes or the membership's values do not fit.
    """
    scores = np.asarray(scores, dtype=np.float64)
    membership = _membership(membership, "scores", scores)
    missing = np.isnan(scores)
    if missing.any():
        feature, gene = np.argwhere(missing)[0]
        raise InputError(
            f"scores hold {int(missing.sum())} NaN, the first for feature {feature} at gene {gene}:"
            " drop these genes from scores and membership, or give them a score on purpose."
        )
    n_genes = scores.shape[1]
    ranks = np.empty_like(scores)
    spread = kernels.average_ranks(scores, np.argsort(scores, axis=1), ranks)
    n_in = membership.sum(axis=1)
    pairs = n_in * (n_genes - n_in)
    u = (membership @ ranks.T).T - n_in * (n_in + 1) / 2
    u[:, pairs == 0] = np.nan

    distance = u - pairs / 2
    excess = np.maximum(np.abs(distance) - (0.5 if continuity else 0.0), 0.0)
    sd = np.sqrt(spread[:, None] * (pairs / (n_genes * max(n_genes - 1, 1))))
    z = np.where(pairs > 0, 0.0, u)  # 0 also where all scores are equal, so sd is 0
    np.divide(np.copysign(excess, distance), sd, out=z, where=sd > 0)
    return MannWhitney(
        statistic=u,
        z=z,
        p=2 * special.ndtr(-np.abs(z)),
        effect=np.divide(u, pairs, out=u.copy(), where=pairs > 0),
    )


def hypergeometric(
    selected: Matrix, membership: Matrix, alternative: str = "greater"
) -> Hypergeometric:
    """Fisher's exact test of every term in every feature's selected genes.

    All genes given are the universe: N of them, n selected, K in the term, k in both. The p-value
    is the tail of the hypergeometric distribution, P(X >= k) or P(X <= k), equal to
    `scipy.stats.fisher_exact` and accurate as long as it does not underflow (about 1e-300).

    Args:
        selected: boolean [features, genes], dense or sparse.
        membership: 0 or 1 [terms, genes], dense or sparse.
        alternative: "greater" (more hits than by chance) or "less".

    Returns:
        The tests. If nothing is selected, or a term is empty, p is 1.

    Raises:
        InputError: for another alternative, or if shapes or types do not fit.
    """
    if alternative not in ("greater", "less"):
        raise InputError(f'alternative={alternative!r}: give "greater" or "less".')
    selected, membership = _selection(selected, membership)
    n_genes = selected.shape[1]
    n_selected = selected.sum(axis=1)[:, None]
    n_in = membership.sum(axis=1)
    hits = (selected @ membership.T).toarray()

    expected = n_selected * n_in / n_genes
    missed, others = n_in - hits, n_selected - hits
    rest = n_genes - n_in - others
    effect = np.full_like(hits, np.nan)
    np.divide(hits, expected, out=effect, where=expected > 0)
    odds = np.full_like(hits, np.inf)
    np.divide(hits * rest, missed * others, out=odds, where=missed * others > 0)
    odds[expected == 0] = np.nan
    odds[(n_selected == n_genes) | (n_in == n_genes)] = np.nan

    hits, sizes = hits.astype(np.int64), n_in.astype(np.int64)
    n_selected, p = n_selected[:, 0].astype(np.int64), np.empty_like(expected)
    if alternative == "greater":
        kernels.hypergeometric_upper(hits, n_selected, sizes, n_genes, p)
    else:  # at most k of the selected are in the term: at least n - k are among the others
        others = n_selected[:, None] - hits
        kernels.hypergeometric_upper(others, n_selected, n_genes - sizes, n_genes, p)
    return Hypergeometric(hits=hits, expected=expected, effect=effect, statistic=odds, p=p)


@dataclass(frozen=True, eq=False)
class Binomial:
    """Overlap test with replacement; all [features, terms].

    statistic, hits: selected genes in the term (int64), the same array.
    expected: hits expected by chance.
    effect: fold enrichment, hits / expected; NaN where none can be expected.
    p: exact tail probability; two-sided: the sum over all numbers of hits that are not likelier.
    """

    hits: np.ndarray
    expected: np.ndarray
    effect: np.ndarray
    p: np.ndarray

    @property
    def statistic(self) -> np.ndarray:
        """The number of hits, as `scipy.stats.binomtest` calls it."""
        return self.hits


def binomial(selected: Matrix, membership: Matrix, alternative: str = "greater") -> Binomial:
    """Binomial test of every term in every feature's selected genes (Schuster A.3.7).

    Each of the n selected genes hits a term of K of the N genes with probability K / N. Genes are
    drawn without replacement, so that `hypergeometric` is the exact test and this one, for large
    shares, conservative.

    Args:
        selected: boolean [features, genes], dense or sparse.
        membership: 0 or 1 [terms, genes], dense or sparse.
        alternative: "greater" (more hits than by chance), "less" or "two-sided".

    Returns:
        The tests. If nothing is selected, p is 1. Equal to `scipy.stats.binomtest`.

    Raises:
        InputError: for another alternative, or if shapes or types do not fit.
    """
    if alternative not in ("greater", "less", "two-sided"):
        raise InputError(f'alternative={alternative!r}: give "greater", "less" or "two-sided".')
    selected, membership = _selection(selected, membership)
    n_genes = selected.shape[1]
    n = selected.sum(axis=1)[:, None]
    share = np.broadcast_to(membership.sum(axis=1) / n_genes, (len(n), membership.shape[0]))
    hits = (selected @ membership.T).toarray()
    expected = n * share
    effect = np.full_like(hits, np.nan)
    np.divide(hits, expected, out=effect, where=expected > 0)
    # P(X >= k) is an incomplete beta function, accurate to the last digits of small tails.
    with np.errstate(invalid="ignore"):
        if alternative == "greater":
            p = np.where(hits > 0, special.betainc(hits, n - hits + 1, share), 1.0)
        elif alternative == "less":
            p = np.where(hits < n, special.betaincc(hits + 1, n - hits, share), 1.0)
        else:
            p = _two_sided(hits, np.broadcast_to(n, hits.shape), share)
    return Binomial(hits=hits.astype(np.int64), expected=expected, effect=effect, p=p)


def _two_sided(hits: np.ndarray, n: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Of the same distribution the same p: each triple (hits, n, share) is tested once."""
    triples, where = np.unique(
        np.stack([hits, n, share], axis=-1).reshape(-1, 3), axis=0, return_inverse=True
    )
    p = [
        stats.binomtest(int(k), int(trials), rate).pvalue if trials else 1.0
        for k, trials, rate in triples
    ]
    return np.asarray(p)[where].reshape(hits.shape)


@dataclass(frozen=True, eq=False)
class Matched:
    """Overlap test with genes compared within strata only; all [features, terms].

    hits: selected genes in the term (int64).
    expected: hits expected if, within every stratum, the selected genes were drawn at random.
    effect: hits / expected; NaN where none can be expected.
    p: upper bound of the tail probability P(X >= hits).
    """

    hits: np.ndarray
    expected: np.ndarray
    effect: np.ndarray
    p: np.ndarray


def matched_overlap(selected: Matrix, membership: Matrix, strata: ArrayLike) -> Matched:
    """Over-representation of every term in every feature's selected genes, given strata of genes.

    A highly expressed gene is more easily found different than a rare one, and gene sets differ in
    how highly expressed they are, so Fisher's test finds sets of highly expressed genes in any
    selection (for RNA-seq: Young et al. 2010, Genome Biology 11:R14). Given strata of like genes,
    the hits are a sum of independent hypergeometric numbers, with mean

        mu = sum over strata of (selected in it) (term's genes in it) / (genes in it)

    Each of these is distributed as a sum of independent Bernoulli variables, so by Hoeffding (1956,
    Ann. Math. Stat. 27:713) the upper tail from mu + 1 on is at most that of the binomial of the
    same mean with as many trials, min(selected, size of the term): the p-value here. Where fewer
    than mu + 1 were hit, nothing is enriched, and p is 1.

    Args:
        selected: boolean [features, genes], dense or sparse.
        membership: 0 or 1 [terms, genes], dense or sparse.
        strata: integer [genes]; genes of one stratum are taken for exchangeable.

    Raises:
        InputError: if shapes or types do not fit.
    """
    selected, membership = _selection(selected, membership)
    strata = np.asarray(strata)
    if strata.shape != (selected.shape[1],) or not np.issubdtype(strata.dtype, np.integer):
        raise InputError(f"strata have shape {strata.shape}: give one integer per gene.")
    strata = np.unique(strata, return_inverse=True)[1]
    one_hot = sparse.csr_array(
        (np.ones(strata.size), strata, np.arange(strata.size + 1)),
        shape=(strata.size, int(strata.max()) + 1),
    )
    share = (selected @ one_hot) / np.maximum(one_hot.sum(axis=0), 1)
    hits = (selected @ membership.T).toarray()
    expected = (sparse.csr_array(share) @ (membership @ one_hot).T.tocsr()).toarray()
    trials = np.minimum(selected.sum(axis=1)[:, None], membership.sum(axis=1))
    p = np.ones_like(expected)
    tested = (hits >= expected + 1) & (trials > 0)
    rate = np.minimum(expected[tested] / trials[tested], 1.0)
    p[tested] = special.bdtrc(hits[tested] - 1, trials[tested].astype(np.int64), rate)
    effect = np.full_like(hits, np.nan)
    np.divide(hits, expected, out=effect, where=expected > 0)
    return Matched(hits=hits.astype(np.int64), expected=expected, effect=effect, p=p)


def strata_of_rank(values: ArrayLike, size: int = 100) -> np.ndarray:
    """Strata of about `size` genes that lie side by side when sorted by `values` [genes].

    Raises:
        InputError: if a value is NaN, or the size below 1.
    """
    if size < 1 or np.isnan(values).any():
        raise InputError(f"size={size} must be at least 1, and no value NaN.")
    order = np.argsort(values, kind="stable")
    strata = np.empty(order.size, dtype=np.int64)
    strata[order] = np.arange(order.size) * max(1, order.size // size) // max(1, order.size)
    return strata


def _selection(selected: Matrix, membership: Matrix) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Selected genes and membership as float64 CSR, checked."""
    selected = as_booleans("selected", selected)
    membership = _membership(membership, "selected", selected)
    return sparse.csr_array(selected).astype(np.float64), membership


def benjamini_hochberg(p: ArrayLike, axis: int | None = -1) -> np.ndarray:
    """False discovery rates (q-values) by Benjamini and Hochberg.

    Args:
        p: p-values of any shape, also a single one. A NaN is a test that could not be made: it
            stays NaN, and counts as a test with p = 1, so that the correction is the same whatever
            could be tested.
        axis: one correction along this axis for each of the others; None for one over all values,
            as for a whole dictionary.

    Returns:
        q-values of the same shape, float64, at most 1.

    Raises:
        InputError: if a p-value is below 0 or above 1.
    """
    p = np.asarray(p, dtype=np.float64)
    missing = np.isnan(p)
    filled = np.where(missing, 1.0, p)
    if filled.size == 0:
        return filled
    if filled.min() < 0 or filled.max() > 1:
        raise InputError(
            f"p-values range from {filled.min():g} to {filled.max():g}: they must lie from 0 to 1."
        )
    q = stats.false_discovery_control(filled, axis=axis if p.ndim else None).reshape(p.shape)
    return np.where(missing, np.nan, q)


def benjamini_hochberg_log(log_p: np.ndarray) -> np.ndarray:
    """`benjamini_hochberg` over the last axis for -log10 p, giving -log10 q.

    p-values that no double holds are told apart all the same. NaN stays NaN and counts as p = 1.
    """
    filled = np.nan_to_num(np.asarray(log_p, np.float64), nan=0.0, posinf=np.inf)
    order = np.argsort(-filled, axis=-1)
    n = filled.shape[-1]
    raised = np.take_along_axis(filled, order, -1) - np.log10(n / np.arange(1, n + 1))
    smallest = np.maximum.accumulate(raised[..., ::-1], axis=-1)[..., ::-1]
    found = np.empty_like(filled)
    np.put_along_axis(found, order, np.maximum(smallest, 0.0), -1)
    found[np.isnan(log_p)] = np.nan
    return found


@dataclass(frozen=True, eq=False)
class LogQ:
    """-log10 q as a function of -log10 p, over a table too large to sort twice."""

    log_p: np.ndarray
    log_q: np.ndarray

    @classmethod
    def over(
        cls, table: np.ndarray, rows: np.ndarray | None = None,
        room: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> LogQ:  # fmt: skip
        """The correction over all values of a table [features, terms]; NaN counts as p = 1.

        Args:
            rows: of these features alone.
            room: two arrays like the table that are written over, to hold the values and their q;
                nothing else as large is made.
        """
        rows, width = np.arange(len(table)) if rows is None else rows, table[:1].size
        values, corrected = (
            each.reshape(-1)[: len(rows) * width]
            for each in (room or (np.empty_like(table), np.empty_like(table)))
        )
        for some in slices(len(rows), 256):
            part = np.nan_to_num(table[rows[some]], nan=0.0, posinf=np.inf)
            values[some.start * width : some.stop * width] = part.ravel()
        values.sort()
        # In rising order the value at position i has rank n - i among the p; q is the least of
        # p n / rank over all ranks from its own on, so over all positions up to its own.
        for some in slices(len(values), 1 << 20):
            part = values[some].astype(np.float64)
            part += np.log10((len(values) - some.start - np.arange(len(part))) / len(values))
            corrected[some] = part
        np.maximum.accumulate(corrected, out=corrected)
        return cls(values, np.maximum(corrected, 0, out=corrected))

    def __call__(self, log_p: np.ndarray) -> np.ndarray:
        """-log10 q of some of the table's values, float32 in their shape."""
        filled = np.nan_to_num(log_p, nan=0.0, posinf=np.inf).ravel()
        order = np.argsort(filled)  # rising keys find their neighbours in the cache
        found = np.empty(len(filled), np.float32)
        found[order] = self.log_q[np.searchsorted(self.log_p, filled[order], side="left")]
        return np.where(np.isnan(log_p), np.float32(np.nan), found.reshape(log_p.shape))


def _membership(membership: Matrix, name: str, table: Matrix) -> sparse.csr_array:
    """Membership as float64 CSR, checked against the table [features, genes] called `name`."""
    membership = membership if sparse.issparse(membership) else np.asarray(membership)
    if np.ndim(table) != 2 or np.ndim(membership) != 2 or table.shape[1] != membership.shape[1]:
        raise InputError(
            f"{name} has shape {np.shape(table)} and membership {np.shape(membership)}: give "
            "features by genes and terms by the same genes."
        )
    if 0 in table.shape or membership.shape[0] == 0:
        raise InputError(
            f"{name} has shape {table.shape} and membership {membership.shape}: nothing to test."
        )
    membership = sparse.csr_array(membership, dtype=np.float64, copy=True)
    membership.sum_duplicates()
    if not np.isin(membership.data, (0, 1)).all():
        raise InputError(
            "membership holds values other than 0 and 1: weights have no meaning in these tests."
        )
    return membership

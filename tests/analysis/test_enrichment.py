import os
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse, stats
from statsmodels.stats.multitest import multipletests

from analysis import enrichment, gene_sets
from sae_jax.errors import InputError

DATA = os.environ.get("SAE_JAX_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SAE_JAX_DATA does not name the test data")

MEMBERSHIP = hnp.arrays(bool, st.tuples(st.integers(1, 4), st.just(9)))


@given(hnp.arrays(np.float64, (2, 9), elements=st.integers(-2, 3)), MEMBERSHIP, st.booleans())
def test_mann_whitney_equals_scipy(
    scores: np.ndarray, membership: np.ndarray, continuity: bool
) -> None:
    result = enrichment.mann_whitney(scores, membership, continuity)
    same = enrichment.mann_whitney(scores, sparse.csr_matrix(membership.astype(int)), continuity)
    np.testing.assert_array_equal(result.p, same.p)
    for feature, term in np.ndindex(result.p.shape):
        inside, ours = (
            membership[term],
            [getattr(result, f)[feature, term] for f in ("statistic", "p")],
        )
        if inside.all() or not inside.any():
            everything = (result.statistic, result.z, result.p, result.effect)
            assert all(np.isnan(values[feature, term]) for values in everything)
            continue
        row = scores[feature]
        if np.ptp(row) == 0:
            assert ours == [inside.sum() * (~inside).sum() / 2, 1]
            continue
        expected = stats.mannwhitneyu(
            row[inside], row[~inside], method="asymptotic", use_continuity=continuity
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-12)
        effect = expected.statistic / (inside.sum() * (~inside).sum())
        np.testing.assert_allclose(result.effect[feature, term], effect)
        assert np.sign(result.z[feature, term]) in (0, np.sign(effect - 0.5))


def test_mann_whitney_reaches_the_far_tail() -> None:
    scores = np.arange(3000.0)[None]
    membership = np.zeros((2, 3000))
    membership[0, -400:] = membership[1, :400] = 1
    result = enrichment.mann_whitney(scores, membership)
    expected = stats.mannwhitneyu(scores[0, -400:], scores[0, :-400], method="asymptotic")
    assert expected.pvalue < 1e-200
    np.testing.assert_allclose(result.p, expected.pvalue, rtol=1e-10)
    np.testing.assert_allclose(result.effect, [[1, 0]])
    assert result.z[0, 0] == -result.z[0, 1] > 0


def test_mann_whitney_refuses_missing_scores() -> None:
    scores = np.zeros((2, 3))
    scores[1, 2] = np.nan
    with pytest.raises(InputError, match="1 NaN, the first for feature 1 at gene 2"):
        enrichment.mann_whitney(scores, np.eye(3))


@given(hnp.arrays(bool, (2, 9)), MEMBERSHIP)
def test_hypergeometric_equals_scipy(selected: np.ndarray, membership: np.ndarray) -> None:
    for alternative in ("greater", "less"):
        result = enrichment.hypergeometric(selected, membership, alternative)
        same = enrichment.hypergeometric(
            sparse.csr_array(selected), sparse.csr_array(membership), alternative
        )
        np.testing.assert_array_equal(result.p, same.p)
        for feature, term in np.ndindex(result.p.shape):
            chosen, inside = selected[feature], membership[term]
            k, n, size = (chosen & inside).sum(), chosen.sum(), inside.sum()
            table = [[k, n - k], [size - k, 9 - size - n + k]]
            expected = stats.fisher_exact(table, alternative)
            np.testing.assert_allclose(result.p[feature, term], expected.pvalue, rtol=1e-12)
            np.testing.assert_allclose(result.statistic[feature, term], expected.statistic)
            assert result.hits[feature, term] == k
            assert result.expected[feature, term] == pytest.approx(n * size / 9)
            fold = k / (n * size / 9) if n * size else np.nan
            np.testing.assert_allclose(result.effect[feature, term], fold)


@pytest.mark.parametrize(
    ("n_genes", "size", "n_selected", "hits"),
    [
        (13431, 200, 300, 150),  # p = 2e-220
        (13431, 500, 600, 24),
        (13431, 20, 13000, 20),
        (13431, 500, 6000, 2),  # lower tail 1e-127
        (40, 30, 30, 20),  # the fewest hits possible
        (40, 30, 30, 30),
    ],
)
def test_hypergeometric_tails_equal_exact_fractions(
    n_genes: int, size: int, n_selected: int, hits: int
) -> None:
    selected = (np.arange(n_genes) < n_selected)[None]
    membership = np.zeros((1, n_genes))
    membership[0, :hits] = 1
    membership[0, n_selected : n_selected + size - hits] = 1

    def tail(numbers: range) -> float:
        ways = sum(comb(size, k) * comb(n_genes - size, n_selected - k) for k in numbers)
        return float(Fraction(ways, comb(n_genes, n_selected)))

    most, fewest = min(size, n_selected), max(0, size + n_selected - n_genes)
    for alternative, numbers in (
        ("greater", range(hits, most + 1)),
        ("less", range(fewest, hits + 1)),
    ):
        p = enrichment.hypergeometric(selected, membership, alternative).p[0, 0]
        assert p == pytest.approx(tail(numbers), rel=1e-11, abs=0)


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 12)),
        elements=st.one_of(st.floats(0, 1), st.sampled_from([0, 0.01, 1, np.nan])),
    )
)
def test_benjamini_hochberg_equals_statsmodels(p: np.ndarray) -> None:
    q = enrichment.benjamini_hochberg(p)
    filled = np.where(np.isnan(p), 1, p)
    expected = [multipletests(row, method="fdr_bh")[1] for row in filled]
    np.testing.assert_allclose(q, np.where(np.isnan(p), np.nan, expected), rtol=1e-12)
    np.testing.assert_array_equal(q.T, enrichment.benjamini_hochberg(p.T, axis=0))
    together = enrichment.benjamini_hochberg(p, axis=None)
    expected = multipletests(filled.ravel(), method="fdr_bh")[1].reshape(p.shape)
    np.testing.assert_allclose(together, np.where(np.isnan(p), np.nan, expected), rtol=1e-12)


def test_bad_input_is_refused() -> None:
    scores, selected, membership = np.zeros((2, 5)), np.zeros((2, 5), dtype=bool), np.eye(5)
    with pytest.raises(InputError, match=r"scores has shape \(2, 5\) and membership \(5, 4\)"):
        enrichment.mann_whitney(scores, membership[:, :4])
    with pytest.raises(InputError, match="selected has shape"):
        enrichment.hypergeometric(selected[0], membership)
    with pytest.raises(InputError, match="nothing to test"):
        enrichment.mann_whitney(scores, membership[:0])
    with pytest.raises(InputError, match="other than 0 and 1"):
        enrichment.mann_whitney(scores, 2 * membership)
    with pytest.raises(InputError, match="give booleans"):
        enrichment.hypergeometric(scores + 0.5, membership)
    with pytest.raises(InputError, match="alternative='two-sided'"):
        enrichment.hypergeometric(selected, membership, "two-sided")
    with pytest.raises(InputError, match=r"from 0 to 1\.5"):
        enrichment.benjamini_hochberg([0, 1.5])


@needs_data
def test_every_term_on_real_rankings_equals_the_golden_tests() -> None:
    golden = Path(DATA) / "golden/enrichment"
    genes = pd.read_parquet(golden / "gene_tests.parquet")
    symbols = genes.loc[genes["feature"] == 0, "symbol"]
    column = np.flatnonzero(~symbols.duplicated())

    def matrix(name: str) -> np.ndarray:
        return genes[name].to_numpy().reshape(6, -1)[:, column]

    names, membership = gene_sets.read(golden / "go_terms.gmt.gz", symbols.iloc[column])
    table = pd.read_parquet(golden / "go_tests.parquet")
    assert table["term"].tolist() == names * 6
    expected = {name: table[name].to_numpy().reshape(6, -1) for name in table.columns}

    ratio = matrix("mean_ratio")
    digits = 10 - 1 - np.floor(np.log10(np.where(ratio > 0, ratio, 1)))
    rounded = np.round(ratio * 10.0**digits) / 10.0**digits
    for name, scores in (
        ("t", np.nan_to_num(np.round(matrix("welch_t"), 9))),
        ("ratio", rounded),
    ):
        ranks = enrichment.mann_whitney(scores, membership)
        np.testing.assert_array_equal(ranks.statistic, expected[f"mwu_{name}_U"])
        assert_same_p(ranks.p, expected[f"mwu_{name}_p"])
        q = enrichment.benjamini_hochberg(ranks.p)
        np.testing.assert_allclose(q, expected[f"mwu_{name}_bh_q"], rtol=1e-10)

    overlap = enrichment.hypergeometric(matrix("selected"), membership)
    np.testing.assert_array_equal(overlap.hits, expected["n_hits"])
    np.testing.assert_allclose(overlap.statistic, expected["odds_ratio"], rtol=1e-12)
    np.testing.assert_allclose(overlap.p, expected["fisher_greater_p"], rtol=1e-9)
    assert_same_p(overlap.p, expected["fisher_greater_p"])
    q = enrichment.benjamini_hochberg(overlap.p)
    np.testing.assert_allclose(q, expected["fisher_greater_bh_q"], rtol=1e-9)

    p = genes["welch_p"].to_numpy().reshape(6, -1)
    q = np.nan_to_num(enrichment.benjamini_hochberg(p), nan=1.0)
    np.testing.assert_allclose(q, genes["bh_q"].to_numpy().reshape(6, -1), rtol=1e-10)


def assert_same_p(p: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.log10(p), np.log10(expected), rtol=0, atol=1e-9)


def test_matched_overlap_bounds_the_exact_tail_of_stratified_draws() -> None:
    """The exact distribution of the hits is a convolution of one hypergeometric a stratum."""
    rng = np.random.default_rng(5)
    strata = np.repeat(np.arange(4), [30, 20, 40, 10])
    selected = rng.random((12, 100)) < np.array([0.1, 0.3, 0.2, 0.9])[strata]
    membership = (rng.random((9, 100)) < np.array([0.3, 0.1, 0.2, 0.5])[strata]).astype(float)
    found = enrichment.matched_overlap(selected, membership, strata)
    checked = 0
    for i, j in np.ndindex(12, 9):
        distribution, mean = np.ones(1), 0.0
        for stratum in range(4):
            inside = strata == stratum
            size, n, k = inside.sum(), selected[i, inside].sum(), int(membership[j, inside].sum())
            draw = stats.hypergeom(size, k, n)
            distribution = np.convolve(distribution, draw.pmf(np.arange(size + 1)))
            mean += draw.mean()
        hits = int((selected[i] & (membership[j] > 0)).sum())
        assert found.hits[i, j] == hits
        assert found.expected[i, j] == pytest.approx(mean)
        exact = distribution[hits:].sum()
        if hits >= mean + 1:
            checked += 1
            assert exact <= found.p[i, j] * (1 + 1e-9)
            assert found.p[i, j] <= max(20 * exact, 0.5)  # a bound, and not an empty one
        else:
            assert found.p[i, j] == 1
    assert checked > 10


def test_strata_hold_neighbours_in_rank() -> None:
    values = np.random.default_rng(0).permutation(1050)
    strata = enrichment.strata_of_rank(values, 100)
    assert strata.max() == 9
    assert set(np.bincount(strata)) == {105}
    for stratum in range(9):
        assert values[strata == stratum].max() < values[strata == stratum + 1].min()
    assert set(enrichment.strata_of_rank(np.arange(7), 100)) == {0}


@given(hnp.arrays(bool, (2, 9)), MEMBERSHIP, st.sampled_from(["greater", "less", "two-sided"]))
def test_binomial_equals_scipy(
    selected: np.ndarray, membership: np.ndarray, alternative: str
) -> None:
    found = enrichment.binomial(selected, membership, alternative)
    for feature, term in np.ndindex(found.p.shape):
        n, share = selected[feature].sum(), membership[term].sum() / 9
        hits = (selected[feature] & membership[term]).sum()
        expected = stats.binomtest(int(hits), int(n), share, alternative).pvalue if n else 1.0
        assert found.p[feature, term] == pytest.approx(expected, rel=1e-10, abs=1e-300)
        assert found.hits[feature, term] == found.statistic[feature, term] == hits
        assert found.expected[feature, term] == pytest.approx(n * share)


def test_binomial_refuses_other_alternatives() -> None:
    with pytest.raises(InputError, match="alternative='more'"):
        enrichment.binomial(np.ones((1, 3), bool), np.ones((1, 3)), "more")

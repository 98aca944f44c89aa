"""Tests of enrichment at the ends of what they are given."""

import numpy as np
import pytest
from scipy import stats

from analysis import calibration, differential, enrichment, gsea, lens
from analysis.attribution import attribute
from analysis.counterfactuals import Pairs
from sae_jax.errors import InputError
from tests.analysis.attribution_cases import GENES, Planted, Threshold, brute_force, some_cells

RNG = np.random.default_rng(0)


def test_one_p_value_is_its_own_correction() -> None:
    for p in (0.3, np.float32(0.25), 0, 1):
        for axis in (-1, 0, None):
            q = enrichment.benjamini_hochberg(p, axis=axis)
            assert q.shape == ()
            assert q == p
    assert np.isnan(enrichment.benjamini_hochberg(np.nan))


@pytest.mark.parametrize("p", [[], np.zeros((3, 0)), [np.nan] * 3, [1.0] * 3, [0.0] * 3])
def test_corrections_of_nothing_of_ones_and_of_zeros_change_nothing(p: list) -> None:
    for axis in (-1, None):
        np.testing.assert_array_equal(enrichment.benjamini_hochberg(p, axis=axis), p)
    with np.errstate(divide="ignore"):
        log_p = -np.log10(p)
    np.testing.assert_array_equal(enrichment.benjamini_hochberg_log(log_p), log_p)


def test_logarithms_of_p_values_that_no_double_holds() -> None:
    """q = p n / rank, made monotone: exact in logarithms."""
    log_p = np.array([400.0, 2.0, 1e6, np.inf, np.nan, 399.0])
    exact = [
        400 - np.log10(6 / 3), 2 - np.log10(6 / 5), 1e6 - np.log10(6 / 2), np.inf, np.nan,
        399 - np.log10(6 / 4),
    ]  # fmt: skip
    np.testing.assert_allclose(enrichment.benjamini_hochberg_log(log_p), exact, rtol=1e-14)
    table = log_p.astype(np.float32)
    np.testing.assert_allclose(enrichment.LogQ.over(table)(table), exact, rtol=1e-6)
    z = np.array([42.9, 1e5])  # 1e-400 and less
    assert stats.norm.sf(z).tolist() == [0, 0]
    found = lens.two_sided(z)
    np.testing.assert_allclose(found, -(stats.norm.logsf(z) + np.log(2)) / np.log(10), rtol=1e-12)
    assert 400 < found[0] < 403


MEMBERSHIP = np.array([[0] * 8, [1] * 8, [1] + [0] * 7, [0, 1, 1, 0, 0, 1, 0, 0]])


@pytest.mark.parametrize("scale", [2.0**-1060, 2.0**-600, 2.0**900])
def test_ranks_and_running_sums_know_no_scale(scale: float) -> None:
    scores = np.array([[9.0, 3, -2, 5, 5, 1, 0, -7], [4.0, 4, 4, 4, 4, 4, 4, 4]])
    plain = enrichment.mann_whitney(scores, MEMBERSHIP)
    scaled = enrichment.mann_whitney(scores * scale, MEMBERSHIP)
    np.testing.assert_array_equal(plain.z, scaled.z)
    assert np.isnan(plain.z[:, :2]).all()  # a term that is empty, and one that is all
    assert plain.p[1, 2:].tolist() == [1, 1]  # all ties
    for weight in (1.0, 2.0, 0.5):
        given = {"n_permutations": 100, "weight": weight, "workers": 1}
        plain = gsea.prerank(scores, MEMBERSHIP, **given)
        scaled = gsea.prerank(scores * scale, MEMBERSHIP, **given)
        for name in (*gsea.FIELDS, "leading"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(scaled, name))
        assert np.isfinite(plain.es[0, 2:]).all()
        assert np.isnan(plain.es[:, :2]).all()


def test_one_gene_tells_nothing() -> None:
    terms = np.array([[1], [0]])
    assert np.isnan(enrichment.mann_whitney([[3.0]], terms).p).all()
    assert np.isnan(gsea.prerank([[3.0]], terms, n_permutations=20).es).all()
    for selected in ([[True]], [[False]]):
        for test in (enrichment.hypergeometric, enrichment.binomial):
            assert test(selected, terms).p.tolist() == [[1, 1]]
        assert enrichment.matched_overlap(selected, terms, [0]).p.tolist() == [[1, 1]]


def test_duplicated_genes_are_ties() -> None:
    scores = RNG.normal(size=(2, 12))
    membership = np.array([[1] * 4 + [0] * 8, [0, 1] * 6])
    twice, terms = np.repeat(scores, 2, axis=1), np.repeat(membership, 2, axis=1)
    ours = enrichment.mann_whitney(twice, terms)
    for row, term in np.ndindex(2, 2):
        inside = terms[term].astype(bool)
        theirs = stats.mannwhitneyu(
            twice[row, inside], twice[row, ~inside], method="asymptotic", use_continuity=True
        )
        np.testing.assert_allclose(ours.p[row, term], theirs.pvalue, rtol=1e-12)
        effect = enrichment.mann_whitney(scores, membership).effect[row, term]
        np.testing.assert_allclose(ours.effect[row, term], effect, rtol=1e-12)
    given = {"n_permutations": 50, "workers": 1}
    es = [gsea.prerank(s, m, **given).es for s, m in ((scores, membership), (twice, terms))]
    np.testing.assert_allclose(*es, rtol=1e-12)


def test_groups_without_cells_and_genes_without_variance_are_not_tested() -> None:
    x = np.log1p(RNG.poisson(2, size=(12, 4)).astype(np.float64))
    x[:, 2] = np.log1p(3)
    always, never = np.ones(12, bool), np.zeros(12, bool)
    one, some = np.arange(12) == 3, np.arange(12) < 5
    active = np.stack([always, never, one, some])
    high = np.stack([some, never, one, some])
    found = differential.welch(x, high, active=active)
    assert found.n_low.tolist() == [0, 12, 11, 7]
    assert np.isnan(found.t[:3]).all()  # no silent cell, no active one, one alone
    assert np.isnan(found.p[:3]).all()
    expected = stats.ttest_ind(x[some], x[~some], equal_var=False)
    np.testing.assert_allclose(found.p[3, [0, 1, 3]], expected.pvalue[[0, 1, 3]], rtol=1e-9)
    assert np.isnan(found.p[3, 2])
    assert np.isfinite(found.scores()).all()
    q = enrichment.benjamini_hochberg(found.p)
    np.testing.assert_array_equal(np.isnan(q), np.isnan(found.p))


def test_blocks_and_permutations_of_none_are_refused() -> None:
    n_high, n_active = np.array([2]), np.array([3])
    for wrong in ({"block": 0}, {"bins": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}=0"):
            calibration.permuted(10, n_high, n_active, lambda _: np.zeros((1, 1)), **wrong)
    with pytest.raises(InputError, match="size=0 must be at least 1"):
        enrichment.strata_of_rank([1.0, 2.0], 0)
    with pytest.raises(InputError, match="no value NaN"):
        enrichment.strata_of_rank([1.0, np.nan])
    assert enrichment.strata_of_rank(np.zeros(5), 2).tolist() == [0, 0, 0, 1, 1]
    for wrong in ({"block": 0}, {"bins": 0}, {"null_features": 7}, {"null_features": -1}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            lens.annotate(None, None, None, **wrong)


def test_a_cell_without_counts_is_a_cell_like_others() -> None:
    cells = some_cells(12)
    counts = cells.X.toarray()
    counts[4] = 0
    cells.X = type(cells.X)(counts)
    assert cells.X[[4]].nnz == 0
    pairs = Pairs(
        concepts=np.array([0, 2]), concept=np.array([0, 0, 1]), prototype=np.array([1, 4, 4]),
        counterfactual=np.array([4, 2, 4]), distance=np.ones(3),
    )  # fmt: skip
    found = attribute(Planted(), Threshold(-0.1), cells, pairs=pairs, progress=False)
    for i, concept in enumerate((0, 2)):
        exact = brute_force(Planted(), Threshold(-0.1), cells, pairs.of([i]), GENES, concept)
        np.testing.assert_allclose(found.scores[i], exact.mean(axis=0), atol=1e-12)
    assert np.abs(found.scores[0]).max() > 0
    assert not found.scores[1].any()  # for itself

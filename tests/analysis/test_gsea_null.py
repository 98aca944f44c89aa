"""The null of gene set enrichment: its draws, their weights, and p-values from them."""

import itertools

import numpy as np
import pytest
from scipy import stats

from analysis import gsea, gsea_null
from analysis import gsea_kernels as kernels


def test_random_sets_are_equally_likely() -> None:
    sets = gsea_null.RandomSets.draw(7, 3, 7000, 0)
    assert (np.diff(sets.positions, axis=1) > 0).all()
    found = np.unique(sets.positions, axis=0, return_counts=True)
    assert len(found[0]) == 35
    assert stats.chisquare(found[1]).pvalue > 1e-3
    np.testing.assert_array_equal(
        gsea_null.RandomSets.draw(7, 3, 50, 0).positions, sets.positions[:50]
    )
    many = gsea_null.RandomSets.draw(300, 200, 40, 0)
    assert (np.diff(many.positions, axis=1) > 0).all()
    assert (many.counts.sum(axis=1) == 200).all()
    assert many.positions.max() < 300


def test_drawn_sizes_and_strata() -> None:
    sizes = gsea_null.drawn_sizes(500, 12_000)
    assert sizes[:8].tolist() == list(range(1, 9))
    assert (sizes[8:] / sizes[7:-1] < 1.26).all()
    assert sizes[-2] < 500 <= sizes[-1]
    assert gsea_null.drawn_sizes(499, 500)[-1] == 499
    for n_genes in (2, 3, 9, 12_345):
        edges = gsea_null.strata(n_genes)
        assert edges[0] == 0
        assert edges[-1] == n_genes
        np.testing.assert_array_equal(edges, n_genes - edges[::-1])


def test_tilted_counts_are_binomial_given_their_sum() -> None:
    chance, width, size = np.array([0.6, 0.1, 0.02]), np.array([3, 5, 40]), 4
    counts = np.empty((20_000, 3), np.int64)
    uniform = np.random.default_rng(0).random(counts.shape)
    ln_total = kernels.tilted_counts(chance, width, size, uniform, counts)
    assert (counts.sum(axis=1) == size).all()
    law = {}
    for first, second in itertools.product(range(4), range(5)):
        if first + second <= size:
            each = (first, second, size - first - second)
            law[each] = np.prod(stats.binom.pmf(each, width, chance))
    assert ln_total == pytest.approx(np.log(sum(law.values())), rel=1e-10)
    for each, mass in law.items():
        expected = mass / sum(law.values())
        seen = (counts == each).all(axis=1).mean()
        assert abs(seen - expected) < 5 * np.sqrt(expected / 20_000) + 1e-4


def test_weights_undo_the_tilt() -> None:
    """The weighted share of every single set is that of chance, and no weight is above 1."""
    ranking = gsea_null.Ranking.of(np.array([9.0, 4, 2, 1, -1, -2, -5]), 1.0)
    sets = gsea_null.RandomSets.draw(7, 3, 20_000, 1)
    tilt = gsea_null.Tilt.of(ranking)
    # So few genes reach no depth: as if levels from .16 to .84 were as unlikely as is asked for.
    tilt = gsea_null.Tilt(1.6 + (np.arange(67) - 20) * 0.355, tilt.tilt)
    extra, weight = sets.tilted([tilt])
    assert len(extra) == 4 * 2000
    assert weight.max() <= 1
    assert weight.min() < 0.9
    positions = np.concatenate([sets.positions, extra])
    _, which = np.unique(positions, axis=0, return_inverse=True)
    share = np.bincount(which, weight) / 20_000
    error = np.sqrt(np.bincount(which, weight**2)) / 20_000
    assert share.shape == (35,)
    assert np.abs((share - 1 / 35) / error).max() < 4
    raw = np.bincount(which[20_000:], minlength=35) / len(extra)
    assert raw.max() > 2 / 35  # the tilted ones are not


def test_p_of_equally_likely_draws_counts_the_observed_one() -> None:
    rng = np.random.default_rng(0)
    value = rng.integers(1, 30, 200) / 30
    side = gsea_null.Side.of(value, np.ones(200), total=400.0)
    score = np.array([0.1, 0.5, 0.9, 2.0])
    b = (value[:, None] >= score).sum(axis=0)
    p, error = side.tail(score)
    np.testing.assert_allclose(p, (b + 1) / 201, rtol=1e-12)
    assert (error >= 0.95 * np.sqrt(p * (1 - p) / 201)).all()
    assert error[3] == pytest.approx(p[3], rel=0.01)  # 0 of 200: as large as p itself
    assert side.share == 0.5
    assert side.mean == pytest.approx(value.mean())
    few = gsea_null.Side.of(value[:9], np.ones(9), total=400.0)
    assert np.isnan(few.tail(score)).all()


def test_far_p_equals_the_exact_two_sample_kolmogorov_smirnov() -> None:
    """With weight 0 the peak is its one-sided statistic, whose distribution is known."""
    n_genes, rng = 1500, np.random.default_rng(1)
    sizes = np.repeat([12, 27, 66], 6)  # drawn, and between sizes that are drawn
    membership = np.zeros((len(sizes), n_genes), bool)
    for row, size, shift in zip(membership, sizes, np.tile(np.arange(6), 3), strict=True):
        odds = np.exp(-shift * 2 / np.sqrt(size) * np.linspace(0, 4, n_genes))
        row[rng.choice(n_genes, size, replace=False, p=odds / odds.sum())] = True
    scores = np.linspace(3, -3, n_genes)[None]
    place = np.arange(n_genes)
    exact = np.array([
        stats.ks_2samp(place[row], place[~row], alternative="greater", method="exact").pvalue
        for row in membership
    ])  # fmt: skip
    assert exact.min() < 1e-8
    assert ((exact < 5e-3) & (exact > 1e-7)).sum() >= 5
    found = gsea.prerank(scores, membership, weight=0, score_type="pos", n_permutations=3000)
    relative = found.p_error[0] / found.p[0]
    reached = exact > 1e-11
    assert relative[reached].max() < 0.4
    away = np.log(found.p[0] / exact)[reached] / relative[reached]
    assert np.abs(away).max() < 4
    assert np.sqrt(np.mean(away**2)) < 1.7  # the error told is the error made
    assert (found.p[0][~reached] > exact[~reached] / 5).all()
    mirrored = gsea.prerank(
        -scores, membership, weight=0, score_type="neg", n_permutations=3000, seed=1
    )
    assert np.abs(np.log(mirrored.p[0] / exact)[reached] / relative[reached]).max() < 6


def test_p_of_random_sets_is_uniform() -> None:
    rng = np.random.default_rng(4)
    scores = np.stack([rng.standard_t(3, 600), np.maximum(rng.normal(size=600), 0)])
    membership = np.zeros((1500, 600), bool)
    for row in membership:
        row[rng.choice(600, rng.integers(15, 60), replace=False)] = True
    for row, score_type in ((0, "std"), (1, "pos")):
        p = gsea.prerank(
            scores[[row]], membership, score_type=score_type, n_permutations=4000
        ).p[0]  # fmt: skip
        assert stats.kstest(p, "uniform").pvalue > 1e-3
        assert 0 < (p < 0.01).sum() < 35

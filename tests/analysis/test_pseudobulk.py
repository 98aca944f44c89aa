import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats

from analysis import pseudobulk
from sae_jax.errors import InputError

Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def case(seed: int = 0, n_cells: int = 300, n_genes: int = 12, n_donors: int = 6) -> Case:
    """Counts, two masks of 5 features, and donors that differ."""
    rng = np.random.default_rng(seed)
    donors = rng.integers(0, n_donors, n_cells)
    means = rng.gamma(0.7, 2, n_genes) * rng.gamma(5, 0.2, (n_donors, n_genes))[donors]
    counts = rng.poisson(means * rng.gamma(3, 0.3, (n_cells, 1))).astype(float)
    z = rng.normal(size=(5, n_cells))
    return counts, z > 0.5, z < -0.2, donors


def expected(
    counts: np.ndarray,
    high: np.ndarray,
    low: np.ndarray,
    donors: np.ndarray,
    scale: str,
    min_cells: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """t, p, log2 fold change [genes] and donors, of one feature by a loop over donors."""
    profiles, means = [], []
    for donor in np.unique(donors):
        cells = [counts[group & (donors == donor)] for group in (high, low)]
        if min(map(len, cells)) >= min_cells:
            if scale == "counts":
                mean = [1e4 * c.sum(axis=0) / c.sum() for c in cells]
                profiles.append(np.log1p(mean))
            else:
                mean = [c.mean(axis=0) for c in cells]
                profiles.append([np.log1p(c).mean(axis=0) for c in cells])
            means.append(mean)
    pairs, means = np.array(profiles), np.array(means) + 1
    test = stats.ttest_rel(pairs[:, 0], pairs[:, 1])
    fold = np.log2(means[:, 0] / means[:, 1]).mean(axis=0)
    return test.statistic, test.pvalue, fold, len(pairs)


@pytest.mark.parametrize("scale", ["log1p", "counts"])
@pytest.mark.parametrize("as_sparse", [False, True])
def test_equals_scipy(scale: str, as_sparse: bool) -> None:
    counts, high, low, donors = case()
    x = np.log1p(counts) if scale == "log1p" else counts
    form = sparse.csr_matrix if as_sparse else np.asarray
    result = pseudobulk.donor_test(
        form(x), form(high), form(low), donors, scale=scale, min_cells=13, block=2
    )
    for feature in range(5):
        t, p, fold, n = expected(counts, high[feature], low[feature], donors, scale, 13)
        np.testing.assert_allclose(result.t[feature], t, rtol=1e-9)
        np.testing.assert_allclose(result.p[feature], p, rtol=1e-9)
        np.testing.assert_allclose(result.log2_fold_change[feature], fold, atol=1e-11)
        assert result.n_donors[feature] == n
    assert len(np.unique(result.n_donors)) > 1  # some donor has too few cells for some feature


def test_donors_with_few_cells_and_features_with_few_donors() -> None:
    counts, high, low, donors = case()
    for feature in range(4):  # donors that count: 0, 1, 2, 3
        high[feature, donors >= feature] = False
    high[4] = False
    result = pseudobulk.donor_test(np.log1p(counts), high, low, donors, scale="log1p", min_cells=2)
    assert result.n_donors.tolist() == [0, 1, 2, 3, 0]
    assert np.isnan(result.t[[0, 1, 2, 4]]).all()
    assert np.isnan(result.p[[0, 1, 2, 4]]).all()
    assert np.isfinite(result.t[3]).all()
    assert np.isfinite(result.log2_fold_change[1:4]).all()
    assert np.isfinite(result.mean_difference[1:4]).all()
    assert np.isnan(result.log2_fold_change[[0, 4]]).all()
    assert np.isnan(result.mean_difference[[0, 4]]).all()


def test_differences_without_variance_cannot_be_tested() -> None:
    """A constant gene, one that every donor raises alike, and one that is absent."""
    _, high, low, donors = case()
    x = np.full((300, 3), 0.1)
    x[:, 2] = 0
    x[high[0], 1] += 0.7
    for given_x in (x, sparse.csr_array(x)):
        result = pseudobulk.donor_test(given_x, high[:1], low[:1], donors, scale="log1p")
        assert np.isnan(result.t).all()
        assert np.isnan(result.p).all()
        np.testing.assert_allclose(result.mean_difference, [[0, 0.7, 0]], atol=1e-12)


@given(st.integers(0, 1000), st.sampled_from(["log1p", "counts"]))
def test_order_and_names_do_not_matter(seed: int, scale: str) -> None:
    rng = np.random.default_rng(seed)
    counts, high, low, donors = case(seed, n_cells=120)
    x = np.log1p(counts) if scale == "log1p" else counts
    cells, genes, features = (rng.permutation(n) for n in (120, 12, 5))
    names = pd.Series(rng.permutation(list("uvwxyz"))[donors])
    options = {"scale": scale, "min_cells": 2}
    result = pseudobulk.donor_test(x, high, low, donors, **options)
    shuffled = pseudobulk.donor_test(
        x[cells][:, genes],
        high[features][:, cells],
        low[features][:, cells],
        names[cells],
        **options,
    )
    swapped = pseudobulk.donor_test(x, low, high, donors, **options)
    for name in ("t", "p", "mean_difference", "log2_fold_change"):
        ours = getattr(result, name)
        np.testing.assert_allclose(
            getattr(shuffled, name), ours[features][:, genes], rtol=1e-7, atol=1e-10
        )
        sign = 1 if name == "p" else -1
        np.testing.assert_allclose(sign * getattr(swapped, name), ours, rtol=1e-7, atol=1e-10)


def test_cells_without_a_donor_are_left_out() -> None:
    counts, high, low, donors = case()
    labels = donors.astype(object)
    labels[:40:2], labels[1:40:2] = None, np.nan
    whole = pseudobulk.donor_test(counts, high, low, labels, scale="counts")
    part = pseudobulk.donor_test(
        counts[40:], high[:, 40:], low[:, 40:], donors[40:], scale="counts"
    )
    np.testing.assert_allclose(whole.t, part.t, rtol=1e-9)


def test_one_cell_a_donor() -> None:
    x = np.array([[3.0, 1], [2, 2], [4, 5], [1, 1], [1, 0], [1, 1]])
    high = np.array([[True, True, True, False, False, False]])
    result = pseudobulk.donor_test(x, high, ~high, [*"abcabc"], scale="log1p", min_cells=1)
    test = stats.ttest_rel(x[:3], x[3:])
    np.testing.assert_allclose(result.t[0], test.statistic)
    np.testing.assert_allclose(result.p[0], test.pvalue)


def test_donors_that_differ_do_not_make_genes_differ() -> None:
    """A feature that is high in some donors: cells mislead, donors do not."""
    rng = np.random.default_rng(0)
    donors = np.repeat(np.arange(10), 100)
    x = rng.gamma(20, 0.1, (10, 400))[donors] + rng.gamma(20, 0.02, (1000, 400))
    high = (rng.random(1000) < np.linspace(0.15, 0.85, 10)[donors])[None]
    result = pseudobulk.donor_test(x, high, ~high, donors, scale="log1p")
    assert result.n_donors.tolist() == [10]
    assert 0.02 < (result.p < 0.05).mean() < 0.08
    over_cells = stats.ttest_ind(x[high[0]], x[~high[0]], equal_var=False)
    assert (over_cells.pvalue < 0.05).mean() > 0.5


def test_bad_input_is_refused() -> None:
    x = np.ones((4, 2))
    high = np.array([[True, True, False, False]])
    donors = ["a", "b", "a", "b"]
    test = pseudobulk.donor_test
    with pytest.raises(InputError, match="say whether"):
        test(x, high, ~high, donors, scale="log")
    for options in ({"min_cells": 0}, {"block": 0}, {"pseudocount": 0}):
        with pytest.raises(InputError, match="give positive ones"):
            test(x, high, ~high, donors, scale="log1p", **options)
    with pytest.raises(InputError, match="share no cell"):
        test(x, high, high, donors, scale="log1p")
    with pytest.raises(InputError, match="the same features"):
        test(x, high, np.vstack([~high, ~high]), donors, scale="log1p")
    with pytest.raises(InputError, match="the 4 cells"):
        test(x, high[:, :3], ~high, donors, scale="log1p")
    with pytest.raises(InputError, match="give booleans"):
        test(x, high, ~high * 1.5, donors, scale="log1p")
    for wrong in (donors[:3], [None] * 4, [donors]):
        with pytest.raises(InputError, match="one label for each of the 4 cells"):
            test(x, high, ~high, wrong, scale="log1p")
    with pytest.raises(InputError, match="1 dimensions"):
        test(x[0], high, ~high, donors, scale="log1p")
    for wrong in (-x, x * np.nan, sparse.csr_array(-x)):
        for scale in ("log1p", "counts"):
            with pytest.raises(InputError, match="never NaN"):
                test(wrong, high, ~high, donors, scale=scale)
    with pytest.raises(InputError, match="which log1p values cannot"):
        test(x * 100, high, ~high, donors, scale="log1p")

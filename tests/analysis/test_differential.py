import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse, stats

from analysis import differential
from analysis.groups import top_cells, top_n
from sae_jax.errors import InputError

DATA = os.environ.get("SAE_JAX_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SAE_JAX_DATA does not name the test data")


def log_counts(rng: np.random.Generator, n_cells: int = 120, n_genes: int = 40) -> np.ndarray:
    return np.log1p(rng.poisson(rng.gamma(0.5, 2, n_genes), (n_cells, n_genes)) * 1.7)


def masks(rng: np.random.Generator, n_cells: int = 120) -> tuple[np.ndarray, np.ndarray]:
    z = np.maximum(rng.normal(size=(5, n_cells)) - 0.3, 0)
    return z > 1, z > 0


@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("by", ["low", "active"])
def test_welch_equals_scipy(as_sparse: bool, by: str) -> None:
    rng = np.random.default_rng(0)
    x, (high, active) = log_counts(rng), masks(rng)
    other = ~active if by == "low" else active
    if as_sparse:
        given_x, given_high, given_other = map(sparse.csr_matrix, (x, high, other))
    else:
        given_x, given_high, given_other = x, high, other
    result = differential.welch(given_x, given_high, **{by: given_other}, block=2)
    for feature in range(5):
        groups = x[high[feature]], x[~active[feature]]
        expected = stats.ttest_ind(*groups, equal_var=False)
        df = np.where(np.isnan(expected.statistic), np.nan, expected.df)  # SciPy: 1 for no test
        np.testing.assert_allclose(result.t[feature], expected.statistic, rtol=1e-11)
        np.testing.assert_allclose(result.df[feature], df, rtol=1e-11)
        np.testing.assert_allclose(result.p[feature], expected.pvalue, rtol=1e-9)
        counts_high, counts_low = np.expm1(x[high[feature]]), np.expm1(x[~active[feature]])
        np.testing.assert_allclose(
            result.log2_fold_change[feature],
            np.log2((counts_high.mean(axis=0) + 1) / (counts_low.mean(axis=0) + 1)),
            atol=1e-12,
        )
        np.testing.assert_allclose(result.mean_high[feature], x[high[feature]].mean(axis=0))
        np.testing.assert_allclose(result.mean_low[feature], x[~active[feature]].mean(axis=0))
    assert result.n_high.tolist() == high.sum(axis=1).tolist()
    assert result.n_low.tolist() == (~active).sum(axis=1).tolist()


def test_the_pseudocount_is_that_of_the_counts() -> None:
    x = np.log1p(np.array([[6.0], [8.0], [0.0], [2.0]]))
    high = np.array([[True, True, False, False]])
    result = differential.welch(x, high, active=high, pseudocount=0.5)
    np.testing.assert_allclose(result.log2_fold_change, np.log2(7.5 / 1.5))


@given(
    hnp.arrays(np.float64, (14, 3), elements=st.sampled_from([0, 0, 0.1, 1.3, 2.2])),
    hnp.arrays(np.int8, (2, 14), elements=st.integers(0, 2)),
)
def test_constant_genes_have_no_variance_however_the_low_group_is_given(
    x: np.ndarray, level: np.ndarray
) -> None:
    """Against an exact account of which genes are constant in both groups."""
    high, low = level == 2, level == 0
    results = [
        differential.welch(x, high, low=low),
        differential.welch(sparse.csr_array(x), high, active=level > 0),
    ]
    for result in results:
        for feature in range(2):
            groups = x[high[feature]], x[low[feature]]
            testable = min(map(len, groups)) >= 2 and np.any(
                [np.ptp(group, axis=0) > 0 for group in groups], axis=0
            )
            np.testing.assert_array_equal(
                np.isfinite(result.t[feature]), testable & np.ones(3, bool)
            )
            np.testing.assert_array_equal(
                np.isnan(result.p[feature]), ~np.isfinite(result.t[feature])
            )
            if len(groups[1]):
                silent = ~groups[1].any(axis=0)
                assert (result.mean_low[feature][silent] == 0).all()


def test_a_constant_gene_among_many_cells_is_constant() -> None:
    """Sums of 0.1 drift by far more than the last bit."""
    n = 200_000
    x = np.full((n, 2), 0.1)
    x[: n // 2, 1] = 1.3
    high = np.zeros((1, n), dtype=bool)
    high[0, : n // 2] = True
    result = differential.welch(sparse.csr_array(x), high, active=high)
    assert np.isnan(result.t).all()
    np.testing.assert_allclose(result.mean_high, [[0.1, 1.3]])


def test_a_gene_seen_only_in_active_cells_is_exactly_absent_from_the_low_group() -> None:
    """All less active leaves rounding, which must not pass for expression."""
    rng = np.random.default_rng(0)
    x = np.zeros((1000, 50))
    x[:700] = log_counts(rng, n_cells=700, n_genes=50) / 3
    active = (np.arange(1000) < 700)[None]
    high = (np.arange(1000) < 10)[None]
    shuffled = rng.permutation(1000)
    for given_x in (x[shuffled], sparse.csr_array(x[shuffled])):
        result = differential.welch(given_x, high[:, shuffled], active=active[:, shuffled])
        assert (result.mean_low == 0).all()
        np.testing.assert_array_equal(np.isnan(result.t[0]), np.ptp(x[:10], axis=0) == 0)


def test_small_groups_give_nan_rows_and_stay_in_place() -> None:
    rng = np.random.default_rng(0)
    x = log_counts(rng, n_cells=10)
    high = np.zeros((4, 10), dtype=bool)
    high[1, 0] = high[2, :2] = high[3, :9] = True
    result = differential.welch(x, high, active=high)
    assert np.isnan(result.t[[0, 1, 3]]).all()
    assert np.isnan(result.p[[0, 1, 3]]).all()
    assert np.isfinite(result.t[2]).any()
    assert np.isnan(result.log2_fold_change[0]).all()
    assert np.isfinite(result.log2_fold_change[1:]).all()
    assert result.n_high.tolist() == [0, 1, 2, 9]


def test_blocks_are_the_whole() -> None:
    rng = np.random.default_rng(0)
    x, (high, active) = sparse.csr_array(log_counts(rng)), masks(rng)
    blocks = list(differential.welch_blocks(x, high, active=active, block=2))
    assert [len(block.t) for block in blocks] == [2, 2, 1]
    np.testing.assert_array_equal(
        np.concatenate([block.p for block in blocks]),
        differential.welch(x, high, active=active).p,
    )


def test_bad_input_is_refused() -> None:
    x = np.ones((4, 2))
    high = np.array([[True, True, False, False]])
    welch = differential.welch
    for groups in ({}, {"low": ~high, "active": high}):
        with pytest.raises(InputError, match="exactly one of low"):
            welch(x, high, **groups)
    with pytest.raises(InputError, match="feature 0 has cells both high and low"):
        welch(x, high, low=high)
    with pytest.raises(InputError, match="feature 0 has high cells that are not active"):
        welch(x, high, active=~high)
    with pytest.raises(InputError, match="by the 4 cells"):
        welch(x, high.T, active=high.T)
    with pytest.raises(InputError, match="high has 2 features and the other mask 1"):
        welch(x, np.vstack([high, high]), active=high)
    with pytest.raises(InputError, match="give booleans"):
        welch(x, high * 2.5, active=high)
    with pytest.raises(InputError, match="must be positive"):
        welch(x, high, active=high, pseudocount=0)
    with pytest.raises(InputError, match="at least 1 feature"):
        welch(x, high, active=high, block=0)
    for bad in (x * 1000, -x, x * np.nan, x * np.inf):
        for expression in (bad, sparse.csr_array(bad)):
            with pytest.raises(InputError, match=r"never NaN\. Normalise raw counts"):
                welch(expression, high, active=high)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 30), st.just(3)),
        elements=st.sampled_from([0, 0, 0, 1, 2, 3.3]),
    ),
    st.floats(0, 99.9),
)
def test_top_cells_equals_numpy(z: np.ndarray, percentile: float) -> None:
    groups = top_cells(sparse.csr_array(z), percentile)
    expected = z > np.percentile(z.astype(np.float64), percentile, axis=0)
    np.testing.assert_array_equal(groups.high.toarray(), expected.T)
    np.testing.assert_array_equal(groups.active.toarray(), z.T > 0)
    assert groups.high.nnz == expected.sum()


def test_top_cells_of_rare_and_dense_features() -> None:
    rng = np.random.default_rng(0)
    z = np.zeros((1000, 3))
    z[rng.choice(1000, 4, replace=False), 1] = [1, 2, 3, 4]
    z[:, 2] = rng.random(1000)
    groups = top_cells(z)
    assert groups.high.sum(axis=1).tolist() == [0, 4, 10]
    with pytest.raises(InputError, match="percentile=100"):
        top_cells(z, 100)
    with pytest.raises(InputError, match="is negative"):
        top_cells(-z)


def test_top_n_breaks_ties_by_the_order_of_the_cells() -> None:
    z = np.array([[1, 0], [2, 0], [1, 5], [3, 0], [1, 0]])
    groups = top_n(z, 3)
    assert groups.high.toarray().astype(int).tolist() == [[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    with pytest.raises(InputError, match="at least 1"):
        top_n(z, 0)


@needs_data
def test_welch_on_real_cells_equals_the_golden_tests() -> None:
    anndata = pytest.importorskip("anndata")
    golden = Path(DATA) / "golden/enrichment"
    adata = anndata.read_h5ad(golden / "counts.h5ad")
    counts = sparse.csr_array(adata.X, dtype=np.float64)
    x = (sparse.diags_array(1e4 / counts.sum(axis=1)) @ counts).tocsr()
    x.data = np.log1p(x.data)
    activations = pd.read_parquet(golden / "activations.parquet").set_index("obs_name")
    z = sparse.csr_array(activations.loc[adata.obs_names].to_numpy())

    groups = top_cells(z)
    result = differential.welch(x, groups.high, active=groups.active)

    table = pd.read_parquet(golden / "gene_tests.parquet")
    assert table["gene"].tolist() == adata.var_names.tolist() * 6
    expected = {name: table[name].to_numpy().reshape(6, -1) for name in table.columns}
    assert result.n_high.tolist() == [9, 15, 15, 15, 15, 15]
    assert result.n_low.tolist() == [1491, 1470, 1425, 1350, 1125, 750]
    np.testing.assert_array_equal(np.isnan(result.t), np.isnan(expected["welch_t"]))
    np.testing.assert_allclose(result.t, expected["welch_t"], rtol=1e-8)
    large = expected["welch_p"] > 1e-300
    np.testing.assert_allclose(
        np.log10(result.p[large]), np.log10(expected["welch_p"][large]), rtol=0, atol=1e-8
    )
    ratio = result.mean_high / (result.mean_low + 1e-8)
    np.testing.assert_allclose(ratio, expected["mean_ratio"], rtol=1e-8)
    for ours, theirs in (
        (result.df, "welch_df"),
        (result.mean_high, "mean_high"),
        (result.mean_low, "mean_low"),
        (result.log2_fold_change, "log2fc_mean_of_expm1_pc1"),
    ):
        tested = np.isfinite(expected["welch_t"]) | (theirs != "welch_df")
        np.testing.assert_allclose(ours[tested], expected[theirs][tested], rtol=3e-7, atol=1e-9)

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse, spatial, stats

from analysis import differential, groups
from sae_jax.errors import InputError

# Levels of cells × 3 features, of which 0 is silent.
codes = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 30), st.just(3)),
    elements=st.sampled_from([0, 0, 0, 1, 2, 3.3]),
)


def is_clean(mask: sparse.csr_array) -> bool:
    return mask.format == "csr" and mask.dtype == bool and mask.data.all()


@given(codes, st.integers(1, 12), st.integers(0, 5))
def test_low_sample_draws_n_silent_cells(z: np.ndarray, n: int, seed: int) -> None:
    active = (z > 0).T
    low = groups.low_sample(sparse.csr_array(active), n, seed)
    assert is_clean(low)
    assert low.has_canonical_format
    assert not (low.toarray() & active).any()
    np.testing.assert_array_equal(low.sum(axis=1), np.minimum((~active).sum(axis=1), n))
    np.testing.assert_array_equal(
        low.toarray(), groups.low_sample(np.vstack([active, active]), n, seed)[:3].toarray()
    )


def test_low_sample_is_uniform_and_differs_between_features_and_seeds() -> None:
    active = np.zeros((3000, 20), dtype=bool)
    active[:, [0, 3, 4, 19]] = True
    low = groups.low_sample(active, 5, seed=1).toarray()
    drawn = low.sum(axis=0)
    assert (drawn[active[0]] == 0).all()
    assert stats.chisquare(drawn[~active[0]]).pvalue > 0.01
    assert len(np.unique(low, axis=0)) > 1500
    assert (low != groups.low_sample(active, 5, seed=2).toarray()).any()


@given(codes, st.floats(0.1, 100))
def test_low_percentile_equals_numpy(z: np.ndarray, percentile: float) -> None:
    for code in (z, z - 1):
        low = groups.low_percentile(sparse.csr_array(code), percentile)
        expected = code <= np.percentile(code, percentile, axis=0)
        assert is_clean(low)
        np.testing.assert_array_equal(low.toarray(), expected.T)


@given(codes, st.floats(0.1, 99))
def test_percentiles_of_active_cells_equal_numpy(z: np.ndarray, percentile: float) -> None:
    low = groups.low_percentile(z, percentile, active_only=True)
    everywhere = np.ones(len(z), dtype=bool)
    high, active = groups.top_cells_within(z, everywhere, percentile, active_only=True)
    assert is_clean(low)
    assert is_clean(high)
    np.testing.assert_array_equal(active.toarray(), (z > 0).T)
    for feature in range(3):
        values = z[:, feature]
        if values.any():
            threshold = np.percentile(values[values > 0], percentile)
            expected_low = (values > 0) & (values <= threshold)
            np.testing.assert_array_equal(low.toarray()[feature], expected_low)
            np.testing.assert_array_equal(high.toarray()[feature], values > threshold)
        else:
            assert not low.toarray()[feature].any()
            assert not high.toarray()[feature].any()


@given(codes, st.data())
def test_one_cell_type_is_the_same_as_its_cells_alone(z: np.ndarray, data: st.DataObject) -> None:
    cells = data.draw(hnp.arrays(bool, len(z)).filter(np.any))
    expected = groups.top_cells(z[cells], 80)
    for given_z in (z, sparse.coo_array(z)):
        found = groups.top_cells_within(given_z, cells, 80)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours.toarray(), theirs.toarray())
    whole = groups.top_n(z, 4)
    for ours, theirs in zip(groups.within(whole, cells), whole, strict=True):
        assert is_clean(ours)
        np.testing.assert_array_equal(ours.toarray(), theirs.toarray()[:, cells])


def test_a_test_within_a_type_knows_no_other_cells() -> None:
    rng = np.random.default_rng(0)
    z = np.maximum(rng.normal(size=(60, 4)), 0)
    x = np.log1p(rng.poisson(2.0, (60, 7)))
    cells = rng.random(60) < 0.5
    high, active = groups.within(groups.top_n(z, 20), cells)
    result = differential.welch(x[cells], high, active=active)
    silent = cells & (z[:, 2] == 0)
    np.testing.assert_allclose(result.mean_low[2], x[silent].mean(axis=0))
    with pytest.raises(InputError, match="by the 60 cells"):
        differential.welch(x, high, active=active)


@pytest.mark.parametrize("to", ["centroid", "cell"])
@pytest.mark.parametrize("block", [1, 4, 256])
def test_nearest_silent_equals_brute_force(to: str, block: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)) + 20  # off the origin, as embeddings are
    z = np.maximum(rng.normal(size=(80, 9)) - 0.5, 0)
    z[:, 3] = 0
    z[:, 4] = 1
    high, active = groups.top_n(z, 7)
    low = groups.nearest_silent(x, high, active, 10, to=to, block=block)
    assert is_clean(low)
    assert low.has_canonical_format
    for feature in range(9):
        expected = np.zeros(80, dtype=bool)
        near = x[high.toarray()[feature]]
        if len(near):
            to_all = spatial.distance.cdist(near, x).min(axis=0)
            to_mean = spatial.distance.cdist([near.mean(axis=0)], x)[0]
            distance = to_mean if to == "centroid" else to_all
            silent = np.flatnonzero(z[:, feature] == 0)
            expected[silent[np.argsort(distance[silent])[:10]]] = True
        np.testing.assert_array_equal(low.toarray()[feature], expected)


@given(st.permutations(range(25)))
def test_nearest_silent_follows_the_cells(order: list[int]) -> None:
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(25, 3)), np.maximum(rng.normal(size=(25, 4)), 0)
    low, moved = (
        groups.nearest_silent(x[cells], *groups.top_n(z[cells], 5), 4).toarray()
        for cells in (np.arange(25), order)
    )
    np.testing.assert_array_equal(low[:, order], moved)


def test_of_equally_near_cells_the_earlier_ones_are_taken() -> None:
    x = np.array([[0.0], [1], [-1], [1], [-1], [9]])
    high = np.array([[True, False, False, False, False, False]])
    for n, expected in ((1, [1]), (3, [1, 2, 3]), (99, [1, 2, 3, 4, 5])):
        for to in ("centroid", "cell"):
            low = groups.nearest_silent(x, high, high, n, to=to)
            assert low.indices.tolist() == expected


def test_one_cell() -> None:
    active = np.array([[True], [False]])
    x = np.zeros((1, 2))
    assert groups.low_sample(active, 3).toarray().tolist() == [[False], [True]]
    assert groups.nearest_silent(x, active, active).nnz == 0
    assert groups.low_percentile(active.T * 1.0, 5).toarray().all()


def test_bad_input_is_refused() -> None:
    z, cells = np.ones((4, 2)), np.array([True, False, True, False])
    mask = np.array([[True, True, False, False]])
    x = np.zeros((4, 3))
    with pytest.raises(InputError, match="n=0, seed=0"):
        groups.low_sample(mask, 0)
    with pytest.raises(InputError, match="seed=-1"):
        groups.low_sample(mask, 1, -1)
    with pytest.raises(InputError, match="give booleans"):
        groups.low_sample(mask * 1.5)
    with pytest.raises(InputError, match="give a mask of features by cells"):
        groups.low_sample(mask[0])
    for percentile in (0, 101, np.nan):
        with pytest.raises(InputError, match="percentile="):
            groups.low_percentile(z, percentile)
    with pytest.raises(InputError, match="no cells"):
        groups.low_percentile(z[:0], 5)
    with pytest.raises(InputError, match="is negative"):
        groups.low_percentile(-z, 5, active_only=True)
    for wrong in (cells[:3], cells * 1, np.zeros(4, dtype=bool)):
        with pytest.raises(InputError, match="each of the 4 cells, at least one"):
            groups.top_cells_within(z, wrong)
        with pytest.raises(InputError, match="each of the 4 cells, at least one"):
            groups.within(groups.top_n(z, 1), wrong)
    with pytest.raises(InputError, match="1 dimensions"):
        groups.top_cells_within(z[0], cells)
    with pytest.raises(InputError, match="percentile=100"):
        groups.top_cells_within(z, cells, 100)
    for options in ({"n": 0}, {"to": "median"}, {"block": 0}):
        with pytest.raises(InputError, match="give positive numbers"):
            groups.nearest_silent(x, mask, mask, **options)
    for wrong in (x[0], x * np.nan):
        with pytest.raises(InputError, match="give finite numbers"):
            groups.nearest_silent(wrong, mask, mask)
    with pytest.raises(InputError, match="the 3 cells of the other input"):
        groups.nearest_silent(x[:3], mask, mask)
    for active in (~mask, np.vstack([mask, mask])):
        with pytest.raises(InputError, match="high cells be active"):
            groups.nearest_silent(x, mask, active)

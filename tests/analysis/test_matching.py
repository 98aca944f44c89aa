import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from analysis import feature_space, matching
from sae_jax.errors import InputError

NAMED = st.lists(st.sets(st.sampled_from("abcdef")), min_size=1, max_size=5).filter(any)


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


@given(NAMED, NAMED)
def test_match_annotations_equals_the_best_of_all_assignments(
    one: list[set[str]], other: list[set[str]]
) -> None:
    found = matching.match_annotations(
        feature_space.from_names(one), feature_space.from_names(other)
    )
    short, long = sorted([[s for s in one if s], [s for s in other if s]], key=len)
    best = max(
        np.mean([jaccard(a, b) for a, b in zip(short, chosen, strict=True)])
        for chosen in itertools.permutations(long, len(short))
    )
    assert found.mean == pytest.approx(best)
    assert (found.n_a, found.n_b) == (sum(map(bool, one)), sum(map(bool, other)))
    assert len(found.pairs) == len(short)
    assert found.pairs["a"].is_unique
    assert found.pairs["b"].is_unique
    for pair in found.pairs.itertuples():
        assert pair.similarity == pytest.approx(jaccard(one[pair.a], other[pair.b]))
    mine, theirs = set().union(*one), set().union(*other)
    assert found.n_shared == len(mine & theirs)
    assert (found.n_only_a, found.n_only_b) == (len(mine - theirs), len(theirs - mine))
    for term, row in found.terms.iterrows():
        assert row.tolist() == [sum(term in s for s in side) for side in (one, other)]


@given(NAMED)
def test_a_dictionary_matches_itself_whatever_the_order_of_its_terms(one: list[set[str]]) -> None:
    a = feature_space.from_names(one)
    order = np.argsort(a.terms)[::-1]
    shuffled = [a.terms[term] for term in order] + ["never used"]
    table = np.pad(a.matrix.toarray()[:, order], ((0, 0), (0, 1)))
    found = matching.match_annotations(a, feature_space.feature_terms(table, shuffled))
    assert found.mean == 1
    assert found.n_only_b == 0


def test_term_counts_correlate_over_shared_terms() -> None:
    rng = np.random.default_rng(0)
    tables = [rng.random((n, 40)) < rng.beta(1, 4, 40) for n in (90, 120)]
    a, b = (
        feature_space.feature_terms(table, [f"t{i + first}" for i in range(40)])
        for table, first in zip(tables, (0, 10), strict=True)
    )
    found = matching.match_annotations(a, b)
    x, y = tables[0].sum(axis=0)[10:], tables[1].sum(axis=0)[:30]
    x, y = x[(both := (x > 0) & (y > 0))], y[both]
    assert found.n_shared == len(x)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y)[0])
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])


def test_nothing_in_common_is_0_and_nothing_at_all_an_error() -> None:
    a, b = feature_space.from_names([["x"], ["x", "y"]]), feature_space.from_names([["z"]])
    found = matching.match_annotations(a, b)
    assert found.mean == 0
    assert np.isnan([found.pearson, found.spearman]).all()
    with pytest.raises(InputError, match="nothing to match"):
        matching.match_annotations(a, feature_space.from_names([[], []]))


@given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 5))
def test_match_directions_equals_the_best_of_all_assignments(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    cosine = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    cosine = cosine if n <= m else cosine.T
    best = max(
        cosine[np.arange(len(cosine)), list(chosen)].mean()
        for chosen in itertools.permutations(range(max(n, m)), min(n, m))
    )
    found = matching.match_directions(a, b)
    assert found.mean == pytest.approx(best)
    assert (np.diff(found.pairs["similarity"]) <= 0).all()
    assert (found.n_a, found.n_b) == (n, m)


def test_match_directions_finds_a_permutation_whatever_the_norms() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(30, 8)).astype(np.float32)
    order = rng.permutation(30)
    found = matching.match_directions(a, a[order] * rng.uniform(0.1, 9, (30, 1)))
    assert found.mean == pytest.approx(1)
    np.testing.assert_array_equal(order[found.pairs["b"]], found.pairs["a"])


def test_match_directions_refuses_what_has_no_direction() -> None:
    with pytest.raises(InputError, match=r"1 rows of decoder b have no direction.*first is 2"):
        matching.match_directions(np.eye(3), np.diag([1, 1, 0]))
    with pytest.raises(InputError, match="one embedding"):
        matching.match_directions(np.eye(3), np.eye(2))
    with pytest.raises(InputError, match="features by d"):
        matching.match_directions(np.eye(3), np.ones((0, 3)))


def test_directions_without_a_sign_match_by_the_absolute_cosine() -> None:
    a = np.eye(3)
    b = np.array([[0, -1, 0.1], [1, 0, 0.2], [0, 0.3, -1]])
    assert matching.match_directions(a, b, absolute=True).mean > 0.95
    signed = matching.match_directions(a, b)
    assert (signed.pairs["similarity"] > 0.9).sum() == 1


def activations(seed: int, n: int = 60) -> np.ndarray:
    """Of every kind: seldom, frequent, constant, dead, and far from 0 with little spread."""
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.normal(np.array([-2, -1, 0, 0.5, 1, 3, 0, 0]), size=(n, 8)), 0)
    z[:, 6], z[:, 7] = 0, 7.5
    far = 1e5 + rng.normal(size=(n, 2))
    return np.concatenate([z, far, -z[:, :2], rng.normal(size=(n, 1))], axis=1)


@settings(max_examples=25)
@given(st.integers(0, 20), st.booleans(), st.booleans())
def test_correlations_are_pearsons(seed: int, sparse_a: bool, sparse_b: bool) -> None:
    a, b = activations(seed), activations(seed + 100)[:, ::-1][:, :9]
    b[:, 1] += a[:, 2]
    found = matching.correlations(
        sparse.csr_matrix(a) if sparse_a else a, sparse.csc_array(b) if sparse_b else b
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.corrcoef(a, b, rowvar=False)[: a.shape[1], a.shape[1] :]
    wanted[:, b.std(axis=0) < 1e-9], wanted[a.std(axis=0) < 1e-9] = np.nan, np.nan
    np.testing.assert_allclose(found, wanted, atol=1e-10)
    order = np.random.default_rng(seed).permutation(len(a))
    np.testing.assert_allclose(matching.correlations(a[order], b[order]), found, atol=1e-12)


def test_blocks_of_cells_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = activations(1), activations(2)
    whole = matching.correlations(a, b)
    monkeypatch.setattr(matching, "ENTRIES", 40)  # 7 cells and fewer
    np.testing.assert_allclose(matching.correlations(a, b), whole, atol=1e-12)


def test_match_activations_finds_features_in_another_model() -> None:
    z = activations(3)
    order = np.array([9, 5, 0, 3, 1, 6, 7])
    other = z[:, order] * np.linspace(0.1, 9, 7)
    found = matching.match_activations(sparse.csr_matrix(z[:, :10]), other)
    assert found.pairs["similarity"].to_numpy() == pytest.approx(1)
    np.testing.assert_array_equal(order[found.pairs["b"]], found.pairs["a"])
    assert (found.n_a, found.n_b) == (8, 5)  # neither the dead nor the constant
    mirrored = matching.match_activations(z[:, :6], -z[:, :6], absolute=True)
    np.testing.assert_array_equal(mirrored.pairs["a"], mirrored.pairs["b"])
    assert mirrored.mean == pytest.approx(1)


def test_rounding_is_no_variation() -> None:
    z = activations(4)[:, :6].astype(np.float32)
    flat = np.float32(3) + np.float32(3e-7) * (np.arange(60) % 2).astype(np.float32)
    assert flat.std() > 0
    assert np.isnan(matching.correlations(z, flat[:, None])).all()


def test_match_activations_refuses() -> None:
    with pytest.raises(InputError, match="activations of 60 and 59 cells"):
        matching.match_activations(activations(0), activations(0)[:-1])
    with pytest.raises(InputError, match="no feature of one of the dictionaries varies"):
        matching.match_activations(activations(0), np.ones((60, 2)))
    with pytest.raises(InputError, match="NaN or infinite"):
        matching.match_activations(activations(0), np.full((60, 2), np.nan))


def test_the_null_of_best_matches_is_known_in_three_dimensions() -> None:
    """There a cosine of random directions is uniform, and the best of n the largest of n such."""
    found = matching.random_cosines(2, 7, 3, one_to_one=False, values=4000, seed=1)
    assert len(found) == 4000
    some = found[np.random.default_rng(0).permutation(4000)[:400]]
    assert stats.kstest(some, lambda c: ((1 + c) / 2) ** 7).pvalue > 0.01
    assert found.mean() == pytest.approx(1 - 2 / 8, abs=0.01)


def test_an_assignment_cannot_be_better_than_the_best_matches() -> None:
    best = matching.random_cosines(40, 40, 5, one_to_one=False, seed=2)
    assigned = matching.random_cosines(40, 40, 5, seed=2)
    assert assigned.mean() < best.mean()
    assert len(matching.random_cosines(40, 15, 5, values=15)) == 15  # 25 have no counterpart
    np.testing.assert_array_equal(assigned, matching.random_cosines(40, 40, 5, seed=2))


def test_the_shape_of_directions_is_that_of_the_normal_vectors_they_are_of() -> None:
    rng = np.random.default_rng(5)
    root = np.diag([3.0, 1, 1, 0.2]) @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    rows = rng.normal(size=(20000, 4)) @ root
    wanted = root.T @ root * 4 / np.trace(root.T @ root)
    found = matching.shape(rows)
    np.testing.assert_allclose(found, wanted, atol=0.06)
    lengths = rng.lognormal(size=(20000, 1))
    np.testing.assert_allclose(matching.shape(rows * lengths), found, atol=1e-9)
    few = matching.shape(rows[:3])  # fewer than dimensions
    assert np.trace(few) == pytest.approx(4)
    assert np.linalg.eigvalsh(few).min() == pytest.approx(0.001)


def test_directions_that_crowd_are_matched_against_directions_that_crowd() -> None:
    spread, found, like = np.r_[np.ones(3), np.full(7, 0.01)], [], []
    flat = matching.random_cosines(80, 80, 10)
    for seed in range(8):
        crowded = np.random.default_rng(seed).normal(size=(2, 80, 10)) * spread
        found.append(matching.match_directions(*crowded).mean)
        shapes = tuple(map(matching.shape, crowded))
        like.append(matching.random_cosines(80, 80, 10, like=shapes, values=400).mean())
    assert np.mean(found) > np.quantile(flat, 0.9)
    assert np.mean(found) == pytest.approx(np.mean(like), abs=0.03)
    assert np.mean(like) - np.mean(flat) > 0.1

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

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
def test_match_decoders_equals_the_best_of_all_assignments(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    cosine = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    cosine = cosine if n <= m else cosine.T
    best = max(
        cosine[np.arange(len(cosine)), list(chosen)].mean()
        for chosen in itertools.permutations(range(max(n, m)), min(n, m))
    )
    found = matching.match_decoders(a, b)
    assert found.mean == pytest.approx(best)
    assert (np.diff(found.pairs["similarity"]) <= 0).all()
    assert (found.n_a, found.n_b) == (n, m)


def test_match_decoders_finds_a_permutation_whatever_the_norms() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(30, 8)).astype(np.float32)
    order = rng.permutation(30)
    found = matching.match_decoders(a, a[order] * rng.uniform(0.1, 9, (30, 1)))
    assert found.mean == pytest.approx(1)
    np.testing.assert_array_equal(order[found.pairs["b"]], found.pairs["a"])


def test_match_decoders_refuses_what_has_no_direction() -> None:
    with pytest.raises(InputError, match=r"1 rows of decoder b have no direction.*first is 2"):
        matching.match_decoders(np.eye(3), np.diag([1, 1, 0]))
    with pytest.raises(InputError, match="one embedding"):
        matching.match_decoders(np.eye(3), np.eye(2))
    with pytest.raises(InputError, match="features by d"):
        matching.match_decoders(np.eye(3), np.ones((0, 3)))

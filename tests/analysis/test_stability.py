"""Replication: what is there in every seed is found in every seed, and nothing in noise."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from analysis import baselines, nulls, stability
from sae_jax.errors import InputError
from tests.analysis.stability_cases import D, N, X, alike, core_of, dictionary, directions


@pytest.mark.parametrize("one_to_one", [True, False])
@pytest.mark.parametrize("null", ["isotropic", "decoders"])
def test_random_directions_replicate_at_the_level_of_the_null(one_to_one: bool, null: str) -> None:
    found = stability.replication(
        [directions(seed, 120, 8) for seed in range(4)],
        one_to_one=one_to_one, null=null, quantile=0.9,
    )  # fmt: skip
    assert found.features["replicated_by_direction"].mean() == pytest.approx(0.1, abs=0.035)
    assert len(found.pairs) == 12
    assert found.features["live"].all()


def test_permuted_activations_replicate_at_the_level_of_the_null() -> None:
    rng = np.random.default_rng(0)
    z = [sparse.csr_matrix(np.maximum(rng.normal(size=(300, 60)) - 1, 0)) for _ in range(3)]
    found = stability.replication(
        [directions(seed, 60) for seed in range(3)], z, quantile=0.9
    ).features
    assert found["replicated_by_activation"].mean() == pytest.approx(0.1, abs=0.04)


def test_features_of_one_embedding_are_alike_whatever_they_are() -> None:
    """Random features pass a null of permuted cells and of random vectors, and not the others."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 8)) * np.array([5, 3, 1, 1, 0.5, 0.2, 0.1, 0.1])
    random = [directions(seed, 200, 8) * x.std(axis=0) for seed in range(3)]
    z = [nulls.random_directions(x, np.full(200, 0.1), seed) for seed in (11, 12, 13)]
    strong = stability.replication(random, z, embedding=x, quantile=0.9).features
    weak = stability.replication(random, z, null="isotropic", quantile=0.9).features
    for measure in ("direction", "activation"):
        assert strong[f"replicated_by_{measure}"].mean() == pytest.approx(0.1, abs=0.06)
        assert weak[f"replicated_by_{measure}"].mean() > 0.7


@pytest.fixture(scope="module")
def seeds() -> list[np.ndarray]:
    return alike()


def test_what_is_in_every_seed_is_replicated_in_every_seed(seeds: list[np.ndarray]) -> None:
    found = stability.replication(seeds)
    for position, decoder in enumerate(seeds):
        table, core = found.of(position), core_of(decoder) >= 0
        assert core.sum() == 10
        assert (table["replicated_by_direction"][core] == 1).all()
        assert table["replicated_by_direction"][~core].mean() < 0.15
        assert (table["best_cosine"][core] > table["cosine_threshold"][core]).all()
    own = found.matches[found.matches["replicated"]]
    same = [
        core_of(seeds[row.a])[row.feature_a] == core_of(seeds[row.b])[row.feature_b]
        for row in own.itertuples()
        if core_of(seeds[row.a])[row.feature_a] >= 0
    ]
    assert len(same) == 60
    assert all(same)


def test_an_assignment_parts_a_close_pair_for_the_sake_of_two_others() -> None:
    """Why it is not what replicates: 0.6 + 0.6 is more than 1 - 0.28."""
    a, b = np.array([[1, 0], [0.6, 0.8]]), np.array([[1, 0], [0.6, -0.8]])
    best, assigned = (
        stability.replication([a, b], one_to_one=one).of(0)["best_cosine"] for one in (False, True)
    )
    assert best.tolist() == pytest.approx([1, 0.6])
    assert assigned.tolist() == pytest.approx([0.6, 0.6])


def test_a_score_does_not_depend_on_the_order_of_features(seeds: list[np.ndarray]) -> None:
    order = np.random.default_rng(1).permutation(N)
    one = stability.replication(seeds).of(0)
    other = stability.replication([seeds[0][order], *seeds[1:]]).of(0)
    pd.testing.assert_frame_equal(
        one.loc[order].reset_index(drop=True), other.reset_index(drop=True)
    )


def test_the_same_codes_in_other_embeddings_replicate_by_activation_alone() -> None:
    rng = np.random.default_rng(4)
    z = np.maximum(rng.normal(size=(150, N)) - 1, 0)
    z[:, 7] = 0  # dead
    order = rng.permutation(N)
    found = stability.replication(
        [directions(0), directions(1)[order]], [sparse.csr_matrix(z), z[:, order] * 3]
    )
    table = found.of(0)
    assert (table["replicated_by_activation"].drop(7) == 1).all()
    assert table["best_correlation"].drop(7).to_numpy() == pytest.approx(1)
    assert table["replicated_by_direction"].mean() < 0.2
    assert not table.loc[7, "live"]
    assert table.loc[7].drop("live").isna().all()
    assert found.pairs["n_a"].tolist() == [N - 1] * 4


def test_a_feature_that_was_split_has_counterparts_only_without_an_assignment() -> None:
    split = np.stack([np.eye(6)[0], np.eye(6)[0] + 0.1 * np.eye(6)[1], np.eye(6)[5]])
    whole = np.eye(6)[[4, 0, 3]]
    found = [stability.replication([split, whole], one_to_one=one).of(0) for one in (True, False)]
    assert [(table["best_cosine"] > 0.9).sum() for table in found] == [1, 2]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dictionaries": [directions(0)]}, "1 dictionary replicates nothing"),
        ({"dictionaries": [directions(0), directions(1, d=5)]}, "cosines need one embedding"),
        ({"null": "none"}, "null='none': give one of isotropic, decoders"),
        ({"quantile": 1}, "quantile=1"),
        ({"activations": [np.ones((4, N)), np.ones((5, N))]}, "on the same cells"),
        ({"activations": [np.eye(9, N)] * 2, "embedding": X}, "for activations of 9 cells"),
        ({"live": [np.ones(N, bool), np.ones(N)]}, "booleans"),
        ({"live": [np.ones(N, bool), np.zeros(N, bool)]}, "dictionary 1 has no live feature"),
    ],
)
def test_what_replication_refuses(changed: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        stability.replication(**({"dictionaries": [directions(0), directions(1)]} | changed))


def test_directions_are_in_the_units_of_the_embedding() -> None:
    made = dictionary(directions(0), input_normalization="zscore")
    none = sparse.csr_matrix((1, N))
    wanted = made.decode(sparse.eye_array(N, format="csr")) - made.decode(none)
    np.testing.assert_allclose(stability.directions(made), wanted, atol=1e-5)


def test_cosines_are_taken_where_training_was() -> None:
    one, other = (dictionary(directions(i), i, input_normalization="zscore") for i in range(2))
    alike = dataclasses.replace(other, normalizer=one.normalizer)
    np.testing.assert_array_equal(
        stability.common_directions([one, alike]), [one.params.decoder, other.params.decoder]
    )
    for some in ([one, other], [one, stability.directions(other)]):
        np.testing.assert_array_equal(
            stability.common_directions(some), [stability.directions(each) for each in (one, other)]
        )


def test_shared_top_genes_by_hand() -> None:
    rng = np.random.default_rng(6)
    genes_a, genes_b = [f"g{i}" for i in range(40)], [f"g{i}" for i in range(60, 9, -1)]
    a, b = rng.normal(size=(5, 40)), rng.normal(size=(6, 51))
    a[0, :] = -1
    a[0, 11] = 1  # one gene above 0
    pairs = pd.DataFrame({"a": [4, 0, 2], "b": [1, 5, 3], "similarity": 0.5})
    found = stability.shared_top_genes(a, b, pairs, genes_a, genes_b, n=8)
    both = set(genes_a) & set(genes_b)

    def top(scores: np.ndarray, genes: list[str]) -> list[str]:
        best = sorted(((-s, g) for s, g in zip(scores, genes, strict=True) if g in both and s > 0))
        return [gene for _, gene in best[:8]]

    tops = [(top(a[p.a], genes_a), top(b[p.b], genes_b)) for p in pairs.itertuples()]
    for i, (one, other) in enumerate(tops):
        common = [gene for gene in one if gene in other]
        row = found.iloc[i]
        assert row["genes"] == common
        assert row["shared"] == len(common)
        assert row["expected"] == pytest.approx(len(one) * len(other) / 30)
        wanted = stats.fisher_exact(
            [[len(common), len(one) - len(common)],
             [len(other) - len(common), 30 - len(one) - len(other) + len(common)]],
            alternative="greater",
        )[1]  # fmt: skip
        assert row["p"] == pytest.approx(wanted)
        rest = [len(set(one) & set(tops[j][1])) for j in range(3) if j != i]
        assert row["others"] == pytest.approx(np.mean(rest))
    assert len(tops[1][0]) == 1
    with pytest.raises(InputError, match="finite"):
        stability.shared_top_genes(a * np.nan, b, pairs, genes_a, genes_b)
    with pytest.raises(InputError, match="0 genes on both sides"):
        stability.shared_top_genes(a, b, pairs, genes_a, [f"h{i}" for i in range(51)])


def test_transfer_measures_each_on_each() -> None:
    rng = np.random.default_rng(7)
    plane = rng.normal(size=(2, D))
    data = {"plane": rng.normal(size=(80, 2)) @ plane, "space": rng.normal(size=(90, D)) + 3}
    coders = {name: baselines.fit("PCA", x, n_components=2) for name, x in data.items()}
    found = stability.transfer(coders, data).set_index(["trained_on", "tested_on"])
    assert found.loc[("plane", "plane"), "r2"] == pytest.approx(1)
    x = data["space"]
    rebuilt = coders["plane"].decode(coders["plane"].encode(x))
    wanted = 1 - np.square(x - rebuilt).sum() / np.square(x - x.mean(axis=0)).sum()
    assert found.loc[("plane", "space"), "r2"] == pytest.approx(wanted)
    assert found.loc[("space", "space"), "r2"] > wanted
    assert len(found) == 4

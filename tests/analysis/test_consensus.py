"""A consensus has what all seeds have, with the codes of one of them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from analysis import stability
from analysis.consensus import Consensus, consensus
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError
from tests.analysis.stability_cases import D, N, X, alike, core_of, dictionary, directions


@pytest.fixture(scope="module")
def seeds() -> list[np.ndarray]:
    return alike()


CHOICES = {
    "relu": {"input_normalization": "zscore", "pre_bias": "tied"},
    "jump_relu": {"pre_bias": "free"},
    "batch_topk": {"k": 4, "pre_bias": "tied", "auxiliary": "auxk", "k_aux": 15},
    "gated": {"pre_bias": "tied", "sparsity_control": "target_l0", "target_l0": 19, "l1_weight": 1},
    "topk": {"k": 5, "decoder_bias": "none"},
}


@pytest.mark.parametrize("activation", CHOICES)
def test_a_consensus_has_what_all_seeds_have(seeds: list[np.ndarray], activation: str) -> None:
    choices = CHOICES[activation] | {"activation": activation}
    made = [
        dataclasses.replace(dictionary(decoder, seed=i, **choices), normalizer=normalizer)
        for i, decoder in enumerate(seeds)
        for normalizer in [dictionary(seeds[0], **choices).normalizer]
    ]
    agreed = consensus(made, stability.replication(made), share=1)
    own = agreed.members.groupby("consensus")
    assert len(agreed.directions) == 10
    assert (own.size() == 3).all()
    assert (own["dictionary"].nunique() == 3).all()
    for _, group in own:
        cores = {core_of(seeds[m.dictionary])[m.feature] for m in group.itertuples()}
        assert len(cores - {-1}) == 1
        units = [stability.directions(made[m.dictionary])[m.feature] for m in group.itertuples()]
        mean = sum(u / np.linalg.norm(u) for u in units)
        wanted = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(agreed.directions[group["consensus"].iloc[0]], wanted, atol=1e-6)
    # Its codes are those of the home, in units of a direction of norm 1.
    x = X
    z = agreed.encode(x)
    for number, row in (
        agreed.members.drop_duplicates("consensus").set_index("consensus").iterrows()
    ):
        home, feature = made[int(row["dictionary"])], int(row["feature"])
        norm = np.linalg.norm(stability.directions(home)[feature])
        np.testing.assert_allclose(z[:, number], home.encode(x)[:, feature] * norm, rtol=1e-5)
    assert (agreed.encode(x, sparse=True) != sparse.csr_matrix(z)).nnz == 0
    zero = [each.decode(np.zeros((1, N), np.float32)) for each in made]
    np.testing.assert_allclose(
        agreed.decode(z), z @ agreed.directions + np.mean(zero, axis=0), atol=1e-5
    )
    if activation == "topk":
        check_thresholds(agreed, made)
        return
    saved = agreed.dictionary()
    np.testing.assert_allclose(saved.encode(x), z, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(saved.decode(z.astype(np.float32)), agreed.decode(z), atol=1e-4)


def check_thresholds(agreed: Consensus, made: list[Dictionary]) -> None:
    """A topk becomes a jump_relu that is as often active, with the same codes where both are."""
    with pytest.raises(InputError, match="depends on the latents left out"):
        agreed.dictionary()
    rows = np.random.default_rng(1).normal(size=(500, D)).astype(np.float32)
    wanted, saved = agreed.encode(rows), agreed.dictionary(rows)
    found = saved.encode(rows)
    np.testing.assert_array_equal((found > 0).sum(axis=0), (wanted > 0).sum(axis=0))
    both = (found > 0) & (wanted > 0)
    np.testing.assert_allclose(found[both], wanted[both], rtol=1e-4)
    either = (found > 0) | (wanted > 0)
    assert saved.provenance["agreement"] == pytest.approx(both.sum() / either.sum())
    assert saved.provenance["agreement"] > 0.6
    np.testing.assert_allclose(saved.decode(wanted), agreed.decode(wanted), atol=1e-4)
    with pytest.raises(InputError, match="active in none of the 1 rows"):
        agreed.dictionary(rows[:1])


def test_a_consensus_of_one_dictionary_with_itself_is_that_dictionary(
    seeds: list[np.ndarray], tmp_path: Any
) -> None:
    made = dictionary(seeds[0])
    agreed = consensus([made] * 3, stability.replication([made] * 3))
    x = X
    np.testing.assert_allclose(
        agreed.decode(agreed.encode(x)), made.decode(made.encode(x)), atol=1e-4
    )
    agreed.dictionary().save(tmp_path / "consensus")
    again = Dictionary.load(tmp_path / "consensus")
    np.testing.assert_array_equal(again.encode(x), agreed.dictionary().encode(x))


def test_what_a_consensus_refuses(seeds: list[np.ndarray]) -> None:
    made = [dictionary(decoder) for decoder in seeds]
    found = stability.replication(made)
    with pytest.raises(InputError, match="share=0"):
        consensus(made, found, share=0)
    with pytest.raises(InputError, match=r"dictionaries of \[20, 20, 20\] features"):
        consensus(made[:2], found)
    noise = [dictionary(directions(seed, 4)) for seed in range(3)]
    with pytest.raises(InputError, match="no feature is replicated in 100%"):
        consensus(noise, stability.replication(noise, quantile=0.999), share=1)

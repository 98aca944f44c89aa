"""Nulls keep what they say they keep."""

import numpy as np
import pytest
from scipy import sparse

import sae_jax
from analysis import gene_sets, nulls

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 6)).astype(np.float32)


def test_permuted_features_keep_their_values() -> None:
    z = sparse.csr_matrix(np.maximum(RNG.normal(size=(50, 4)) - 1, 0))
    moved = nulls.permuted_cells(z, 0)
    for feature in range(4):
        before, after = (np.sort(m[:, [feature]].toarray().ravel()) for m in (z, moved))
        np.testing.assert_array_equal(before, after)
    assert (moved != z).nnz


def test_random_sets_keep_sizes_and_overlaps() -> None:
    genes = [f"g{i}" for i in range(40)]
    sets = gene_sets.from_sets({"a": genes[:9], "b": genes[5:20]}, genes, 2, 30)
    moved = nulls.random_sets(sets, 0)
    before, after = ((s.membership @ s.membership.T).toarray() for s in (sets, moved))
    np.testing.assert_array_equal(before, after)
    assert (moved.membership != sets.membership).nnz


def test_random_directions_have_the_density_asked_for() -> None:
    density = np.array([0.05, 0.5, 1.0])
    z = nulls.random_directions(X * 9 + 4, density, 1)
    np.testing.assert_allclose(z.getnnz(axis=0) / 200, density, atol=0.01)
    scaled = nulls.random_directions(X, density, 1)
    np.testing.assert_array_equal(z.getnnz(axis=0), scaled.getnnz(axis=0))
    assert (z.data > 0).all()


def test_neurons_are_both_sides_of_each_dimension() -> None:
    z = nulls.neurons(X).toarray()
    centred = X - np.median(X, axis=0)
    np.testing.assert_allclose(z[:, :6] - z[:, 6:], centred, atol=1e-6)
    assert not (z[:, :6] * z[:, 6:]).any()


@pytest.mark.parametrize("preset", ["vanilla", "topk"])
def test_untrained_is_where_training_starts(preset: str) -> None:
    (config,) = sae_jax.grid(
        preset, d_in=6, n_latents=9, l1_weight=1e-9, k=3, seed=3, input_normalization="zscore",
        learning_rate=1e-12, batch_size=100,
    )  # fmt: skip
    trained = sae_jax.train(config, X, epochs=1, progress=False).dictionaries[0]
    fresh = nulls.untrained(trained, seed=3)
    np.testing.assert_allclose(fresh.encode(X), trained.encode(X), atol=1e-4)
    assert np.abs(nulls.untrained(trained, seed=4).encode(X) - trained.encode(X)).max() > 0.01

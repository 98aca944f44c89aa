"""Dimensions cut at their medians: nothing is lost, a side is silent in half of the cells."""

import numpy as np
import pytest

from analysis.neurons import Neurons
from sae_jax import InputError


def test_sides_of_dimensions() -> None:
    x = np.random.default_rng(0).normal(3, 1, (101, 4)).astype(np.float32)
    neurons = Neurons.of(x)
    z = neurons.encode(x)
    assert z.shape == (101, 8) == (101, neurons.n_components)
    np.testing.assert_array_equal((z > 0).sum(axis=0), 50)
    np.testing.assert_array_equal(z[:, :4] > 0, x > np.median(x, axis=0))
    np.testing.assert_array_equal(z[:, 4:] > 0, x < np.median(x, axis=0))
    np.testing.assert_allclose(neurons.decode(z), x, rtol=1e-6)
    sparse = neurons.encode(x, sparse=True)
    np.testing.assert_array_equal(sparse.toarray(), z)
    np.testing.assert_allclose(neurons.decode(sparse), neurons.median + z @ neurons.decoder, 1e-6)
    assert neurons.names()[1] == "neuron_1+"
    assert neurons.names()[5] == "neuron_1-"


def test_other_rows_are_refused() -> None:
    neurons = Neurons.of(np.eye(3))
    with pytest.raises(InputError, match="3 dimensions"):
        neurons.encode(np.ones((2, 4)))
    with pytest.raises(InputError, match="finite"):
        neurons.encode(np.full((2, 3), np.nan))

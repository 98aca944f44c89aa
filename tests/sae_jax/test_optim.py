"""Adam of one dictionary: its first step, and a unit decoder's moments."""

import jax
import numpy as np

from sae_jax import SAEConfig, optim
from sae_jax.state import Params, hyperparams


def test_the_first_step_of_adam_has_the_size_of_the_learning_rate() -> None:
    """The bias correction of a first step: m / sqrt(v) is the sign of the gradient."""
    config = SAEConfig(d_in=2, n_latents=3, learning_rate=0.25)
    params = Params(
        encoder=np.zeros((2, 3), np.float32),
        encoder_bias=np.zeros(3, np.float32),
        decoder=np.zeros((3, 2), np.float32),
        decoder_bias=np.zeros(2, np.float32),
        pre_bias=None,
    )
    gradient = jax.tree.map(lambda p: np.full(p.shape, -3.0, p.dtype), params)
    hyper = hyperparams(config, np.float32)
    updated, state = optim.update(
        params, optim.ADAM.init(params), gradient, hyper, config.architecture
    )
    for leaf in jax.tree.leaves(updated):
        np.testing.assert_allclose(leaf, np.full(leaf.shape, 0.25), rtol=1e-4)
    assert int(state.count) == 1


def test_a_unit_decoder_keeps_the_radial_gradient_out_of_the_moments() -> None:
    config = SAEConfig(d_in=2, n_latents=2, decoder_norm="unit", learning_rate=0.1)
    decoder = np.asarray([[1, 0], [0.6, 0.8]], np.float32)
    params = Params(
        encoder=np.zeros((2, 2), np.float32),
        encoder_bias=np.zeros(2, np.float32),
        decoder=decoder,
        decoder_bias=np.zeros(2, np.float32),
        pre_bias=None,
    )
    zero = jax.tree.map(np.zeros_like, params)
    hyper = hyperparams(config, np.float32)
    radial = zero.replace(decoder=decoder * 7)
    updated, state = optim.update(
        params, optim.ADAM.init(params), radial, hyper, config.architecture
    )
    np.testing.assert_allclose(state.mu.decoder, np.zeros((2, 2)), atol=1e-6)
    tangent = zero.replace(decoder=np.asarray([[5, 2], [-1.6, 1.2]], np.float32))
    updated, state = optim.update(
        params, optim.ADAM.init(params), tangent, hyper, config.architecture
    )
    np.testing.assert_allclose(state.mu.decoder, 0.1 * np.asarray([[0, 2], [-1.6, 1.2]]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(updated.decoder, axis=1), [1, 1], rtol=1e-6)

"""The auxiliary loss, which teaches dead latents from what the others leave over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sae_jax import SAEConfig, models, objectives, steps
from sae_jax.state import Params, hyperparams

D, N = 5, 12
X = np.random.default_rng(0).normal(size=(32, D)).astype(np.float32)
DEAD = np.arange(N) >= 7


def setting(reduction: str = "sum") -> tuple[SAEConfig, Params]:
    config = SAEConfig.preset(
        "topk", d_in=D, n_latents=N, k=2, k_aux=3, aux_weight=0.5, reduction=reduction
    )
    return config, models.init(jnp.uint32(0), config.architecture, jnp.float32)


def gradients(config: SAEConfig, params: Params, dead: np.ndarray | None) -> Params:
    hyper = hyperparams(config, jnp.float32)
    flags = None if dead is None else jnp.asarray(dead)
    gradient = jax.grad(objectives.loss, has_aux=True)
    return gradient(params, hyper, jnp.asarray(X), config.architecture, flags)[0]


def test_dead_rows_learn_from_it_and_living_ones_do_not() -> None:
    config, params = setting()
    with_it, without = gradients(config, params, DEAD), gradients(config, params, None)
    encoder = np.asarray(with_it.encoder - without.encoder)
    decoder = np.asarray(with_it.decoder - without.decoder)
    assert np.all(np.abs(encoder[:, DEAD]).max(axis=0) > 0)
    assert np.all(np.abs(decoder[DEAD]).max(axis=1) > 0)
    np.testing.assert_array_equal(encoder[:, ~DEAD], 0)
    np.testing.assert_array_equal(decoder[~DEAD], 0)


def test_without_dead_latents_it_is_nothing() -> None:
    config, params = setting()
    found = gradients(config, params, np.zeros(N, bool))
    jax.tree.map(np.testing.assert_array_equal, found, gradients(config, params, None))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_it_equals_torch(reduction: str) -> None:
    config, params = setting(reduction)
    hyper = hyperparams(config, jnp.float32)
    value, _ = objectives.loss(
        params, hyper, jnp.asarray(X), config.architecture, jnp.asarray(DEAD)
    )
    found = gradients(config, params, DEAD)
    leaves = {name: torch.tensor(np.asarray(leaf), requires_grad=True)
              for name, leaf in vars(params).items() if leaf is not None}  # fmt: skip
    x = torch.tensor(X)
    pre = (x - leaves["decoder_bias"]) @ leaves["encoder"] + leaves["encoder_bias"]
    top = torch.topk(pre, 2)
    z = torch.zeros_like(pre).scatter(-1, top.indices, torch.relu(top.values))
    error = x - z @ leaves["decoder"] - leaves["decoder_bias"]
    lonely = torch.topk(torch.where(torch.tensor(DEAD), torch.relu(pre), 0.0), 3)
    aux = torch.zeros_like(pre).scatter(-1, lonely.indices, lonely.values)
    left = error.detach() - aux @ leaves["decoder"]
    scale = 1 if reduction == "sum" else D
    expected = (error**2).sum() / 32 / scale + 0.5 * (left**2).sum() / 32 / scale
    expected.backward()
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(getattr(found, name), leaf.grad, rtol=1e-4, atol=1e-5)


def test_a_latent_is_dead_after_so_many_idle_steps_and_not_when_it_fires() -> None:
    config, _ = setting()
    hyper = hyperparams(config, jnp.float32)
    state = steps.init_member(hyper, config.architecture, jnp.float32)
    expected = np.zeros(N, int)
    for _ in range(5):
        before = models.encode(state.params, hyper, jnp.asarray(X[:4]), config.architecture)
        state, _ = steps.step(state, hyper, jnp.asarray(X[:4]), config.architecture)
        fired = np.asarray(before > 0).any(axis=0)
        expected = np.where(fired, 0, expected + 1)
        np.testing.assert_array_equal(state.idle, expected)
    assert expected.any()

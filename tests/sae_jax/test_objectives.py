import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import SAEConfig, objectives
from sae_jax.config import Architecture
from sae_jax.state import Metrics, Params, hyperparams

TINY = Architecture(d_in=2, n_latents=3)
X = np.asarray([[1, 2], [3, 0]], np.float32)
# By hand. pre = x W_enc + b_enc: (1, 1, 1) and (3, -1, -3); z: (1, 1, 1) and (3, 0, 0);
# x': (2.5, 2) and (3.5, 0); squared errors 2.25 and 0.25; |z| 3 and 3; active 3 and 1.
PARAMS = Params(
    encoder=np.asarray([[1, 0, -1], [0, 1, 1]], np.float32),
    encoder_bias=np.asarray([0, -1, 0], np.float32),
    decoder=np.asarray([[1, 0], [0, 1], [1, 1]], np.float32),
    decoder_bias=np.asarray([0.5, 0], np.float32),
    pre_bias=None,
)


def loss(
    l1_weight: float, reduction: str, params: Params = PARAMS, x: np.ndarray = X
) -> tuple[jax.Array, Metrics]:
    config = SAEConfig(d_in=2, n_latents=3, l1_weight=l1_weight)
    hyper = hyperparams(config, jnp.float32)
    params = jax.tree.map(jnp.asarray, params)
    architecture = dataclasses.replace(TINY, reduction=reduction)
    value, (metrics, *_) = objectives.loss(params, hyper, jnp.asarray(x), architecture)
    return value, metrics


@pytest.mark.parametrize(
    ("reduction", "expected"), [("sum", 1.25 + 0.1 * 3), ("mean", 1.25 / 2 + 0.1 * 3 / 3)]
)
def test_loss_equals_the_hand_computed_one(reduction: str, expected: float) -> None:
    value, metrics = loss(0.1, reduction)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert float(metrics.loss) == float(value)
    assert float(metrics.mse) == 1.25 / 2
    assert float(metrics.l1) == 3
    assert float(metrics.l0) == 2


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rows_are_averaged(reduction: str) -> None:
    once, metrics = loss(0.3, reduction)
    twice, metrics_twice = loss(0.3, reduction, x=np.concatenate([X, X]))
    assert float(twice) == pytest.approx(float(once), rel=1e-6)
    for name, value in vars(metrics).items():
        assert float(getattr(metrics_twice, name)) == pytest.approx(float(value), rel=1e-6)


def test_the_same_l1_weight_differs_by_d_in_over_latents_between_reductions() -> None:
    """weight_sum = weight_mean d_in / n_latents makes one loss, and gradient, d_in the other."""
    d, n, weight = 2, 3, 0.1

    def value(params: Params, weight: float, reduction: str) -> jax.Array:
        return loss(weight, reduction, params)[0]

    gradient = functools.partial(jax.grad(value), PARAMS)
    assert float(loss(weight * d / n, "sum")[0]) == pytest.approx(
        d * float(loss(weight, "mean")[0])
    )
    scaled = jax.tree.map(lambda g: d * g, gradient(weight, "mean"))
    for summed, averaged in zip(
        jax.tree.leaves(gradient(weight * d / n, "sum")), jax.tree.leaves(scaled), strict=True
    ):
        np.testing.assert_allclose(summed, averaged, rtol=1e-6)
        assert np.any(np.asarray(summed) != 0)

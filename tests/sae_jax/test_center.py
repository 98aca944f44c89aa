"""The geometric median, and that pre-biases start there."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import sae_jax
from sae_jax import SAEConfig, center, models
from sae_jax.center import geometric_median
from sae_jax.state import Normalizer

X = np.random.default_rng(0).standard_t(2, size=(301, 4)) * [1, 2, 3, 4] + [5, 0, -5, 1]


def summed(x: np.ndarray, point: np.ndarray) -> float:
    return float(np.linalg.norm(x - point, axis=1).sum())


def test_it_has_the_least_summed_distance() -> None:
    found = geometric_median(X, None)
    best = scipy.optimize.minimize(lambda p: summed(X, p), X.mean(axis=0), method="BFGS", tol=1e-10)
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    assert summed(X, found) <= best.fun * (1 + 1e-10)
    assert np.linalg.norm(X.mean(axis=0) - found) > 0.05


def test_on_a_line_it_is_the_median() -> None:
    x = np.asarray([[0.0], [1.0], [2.0], [10.0], [1000.0]])
    np.testing.assert_allclose(geometric_median(x, None), [2.0], atol=1e-6)


def test_it_does_not_stop_on_a_row_that_is_not_it() -> None:
    """Weiszfeld's own iteration divides by zero here: the medians of the columns are a row."""
    x = np.asarray([[0.0, 0.0], [4.0, 1.0], [4.0, -1.0], [4.0, 0.1], [-1.0, 0.0], [0.0, 0.0]])
    found = geometric_median(x, None)
    best = scipy.optimize.minimize(lambda p: summed(x, p), [1.0, 0.5], method="Nelder-Mead")
    assert summed(x, found) <= best.fun * (1 + 1e-6)


def test_it_stays_on_a_row_that_is_it() -> None:
    x = np.asarray([[1.0, 1.0]] * 5 + [[4.0, 1.0], [3.0, -1.0], [9.0, 0.1], [7.0, 5.0]])
    np.testing.assert_array_equal(geometric_median(x, None), [1.0, 1.0])


def test_equal_rows_are_their_own_median() -> None:
    np.testing.assert_array_equal(geometric_median(np.full((9, 3), 7.0), None), [7, 7, 7])


def test_it_is_taken_in_the_normalised_space_and_of_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    normalizer = Normalizer(mean=X.mean(axis=0), scale=X.std(axis=0))
    normal = (X - normalizer.mean) / normalizer.scale
    np.testing.assert_allclose(
        geometric_median(X, normalizer), geometric_median(normal, None), atol=1e-6
    )
    monkeypatch.setattr(center, "SAMPLE", 101)
    monkeypatch.setattr(center, "BLOCK", 20)
    np.testing.assert_array_equal(geometric_median(X, None), geometric_median(X[::3], None))


@pytest.mark.parametrize(("kind", "name"), [("tied", "decoder_bias"), ("free", "pre_bias")])
@pytest.mark.parametrize("init", ["torch", "tied"])
def test_the_encoder_first_sees_rows_less_their_median(kind: str, name: str, init: str) -> None:
    config = SAEConfig(d_in=4, n_latents=9, pre_bias=kind, center="geometric_median", init=init)
    point = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    params = models.init(jnp.uint32(0), config.architecture, jnp.float32, point)
    seen = models.encoder_input(params, point[None, :], config.architecture)
    np.testing.assert_array_equal(seen, np.zeros((1, 4)))
    np.testing.assert_array_equal(params.decoder_bias, point)
    assert getattr(params, name) is not None


def test_training_starts_from_it() -> None:
    rows = (X + 100).astype(np.float32)
    fields = {"d_in": 4, "n_latents": 9, "pre_bias": "tied", "learning_rate": 1e-9}
    configs = [SAEConfig(**fields, center=kind) for kind in ("none", "geometric_median")]
    plain, centred = sae_jax.train(configs, rows, epochs=1, progress=False).dictionaries
    np.testing.assert_allclose(centred.params.decoder_bias, geometric_median(rows, None), rtol=1e-4)
    assert np.abs(plain.params.decoder_bias).max() < 1

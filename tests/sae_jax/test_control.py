"""A wanted L0 is reached, and batch_topk's codes do not depend on the rows beside a row."""

import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import control, steps
from sae_jax.state import hyperparams

D, N = 16, 64


def sparse_rows(rows: int) -> np.ndarray:
    """Sums of 2.4 of 48 directions in the mean."""
    random = np.random.default_rng(0)
    codes = random.exponential(size=(rows, 48)) * (random.random((rows, 48)) < 0.05)
    return (codes @ random.normal(size=(48, D))).astype(np.float32)


ROWS = sparse_rows(4096)


@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_members_reach_the_l0_they_are_asked_for(activation: str, reduction: str) -> None:
    """From the same weight, in either reduction, and whatever the scale of the rows."""
    wanted = [2.0, 5.0, 10.0]
    configs = sae_jax.grid(
        "target_l0", d_in=D, n_latents=N, target_l0=wanted, activation=activation,
        reduction=reduction, batch_size=64, l1_weight=0.05, learning_rate=3e-3,
    )  # fmt: skip
    run = sae_jax.train(configs, 100 * ROWS, epochs=40, progress=False)
    np.testing.assert_allclose(run.results["train_l0"], wanted, rtol=0.15)
    uncontrolled = sae_jax.grid(
        "vanilla", d_in=D, n_latents=N, activation=activation, reduction=reduction,
        batch_size=64, l1_weight=0.05, learning_rate=3e-3, input_normalization="scalar",
    )  # fmt: skip
    left = sae_jax.train(uncontrolled, 100 * ROWS, epochs=10, progress=False)
    assert not np.isclose(left.results["train_l0"], wanted, rtol=0.15).any()


def test_jump_relu_reaches_its_l0_by_its_thresholds() -> None:
    wanted = [3.0, 6.0]
    configs = sae_jax.grid(
        "jump_relu", d_in=D, n_latents=N, sparsity_control="target_l0", target_l0=wanted,
        l0_weight=10.0, batch_size=64, learning_rate=3e-3,
    )  # fmt: skip
    run = sae_jax.train(configs, ROWS, epochs=40, progress=False)
    np.testing.assert_allclose(run.results["train_l0"], wanted, rtol=0.15)


def test_the_controller_rests_at_the_target_and_its_steps_are_bounded() -> None:
    def after(l0: float) -> float:
        return float(control.wanted_l0(jnp.float32(0.5), jnp.float32(l0), jnp.float32(8.0)))

    assert after(8.0) == 0.5
    assert after(8.8) == pytest.approx(0.5 + control.GAIN * np.log(1.1), abs=1e-6)
    assert after(4000.0) == pytest.approx(0.5 + control.GAIN, abs=1e-6)
    assert after(0.0) == pytest.approx(0.5 - control.GAIN, abs=1e-6)


def trained_batch_topk() -> sae_jax.Dictionary:
    config = sae_jax.SAEConfig.preset("batch_topk", d_in=D, n_latents=N, k=4, batch_size=64)
    dictionary = sae_jax.train([config], ROWS, epochs=20, progress=False).dictionaries[0]
    assert dictionary is not None
    return dictionary


def test_batch_topk_encodes_a_row_alone_as_among_others() -> None:
    dictionary = trained_batch_topk()
    z = dictionary.encode(ROWS[:300])
    for rows in (ROWS[:1], ROWS[:7], np.concatenate([100 * ROWS[300:], ROWS[:1]])[-1:]):
        np.testing.assert_array_equal(dictionary.encode(rows), z[: len(rows)])
    loud = np.concatenate([ROWS[:10], 100 * ROWS[10:300]])
    np.testing.assert_array_equal(dictionary.encode(loud)[:10], z[:10])
    assert (z > 0).sum(axis=1).mean() == pytest.approx(4, rel=0.2)
    assert (z > 0).sum(axis=1).std() > 0.5  # k is a mean, not a count


def test_the_threshold_is_the_mean_of_the_smallest_code_and_then_forgets() -> None:
    config = sae_jax.SAEConfig.preset("batch_topk", d_in=D, n_latents=N, k=4)
    hyper = hyperparams(config, jnp.float32)
    params = steps.init_member(hyper, config.architecture, jnp.float32).params
    smallest = np.random.default_rng(0).uniform(1, 2, 300)
    expected = 0.0
    for step, value in enumerate(smallest):
        z = jnp.asarray([[0.0, value], [value + 1, 3.0]], jnp.float32)
        params = control.estimated_threshold(params, z, jnp.int32(step))
        expected += max(1 / (step + 1), 0.01) * (value - expected)
        assert float(jnp.exp(params.log_threshold[0])) == pytest.approx(expected, rel=1e-4)
        if step == 99:
            assert expected == pytest.approx(smallest[:100].mean())
    same = control.estimated_threshold(params, jnp.zeros((2, 2)), jnp.int32(300))
    assert float(same.log_threshold[0]) == float(params.log_threshold[0])


def test_patience_and_a_moving_weight_do_not_go_together() -> None:
    config = sae_jax.SAEConfig.preset("target_l0", d_in=D, n_latents=N, target_l0=3)
    with pytest.raises(sae_jax.InputError, match="patience compares losses"):
        sae_jax.train([config], ROWS, epochs=2, patience=1, progress=False)

"""Dead latents start anew where the dictionary is bad, and nobody else notices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import SAEConfig, models, resampling, steps
from sae_jax.state import Hyperparams, TrainState, hyperparams

D, N, B = 6, 10, 8
RANDOM = np.random.default_rng(0)
BATCH = jnp.asarray(RANDOM.normal(size=(B, D)), jnp.float32)
ERROR = jnp.asarray(RANDOM.normal(size=(B, D)), jnp.float32)
DEAD = np.asarray([1, 4, 7])


def setting(dead: np.ndarray = DEAD, **fields: object) -> tuple[TrainState, Hyperparams, SAEConfig]:
    """A state after some steps whose moments are no zeros."""
    size = {"d_in": D, "n_latents": N, "batch_size": B, "dead_steps": 5, "pre_bias": "free"}
    config = SAEConfig(**{**size, "resampling": "bricken", **fields})
    hyper = hyperparams(config, jnp.float32, steps=100)
    state = steps.init_member(hyper, config.architecture, jnp.float32)
    ones = jax.tree.map(jnp.ones_like, state.optimizer.mu)
    idle = jnp.zeros(N, jnp.int32).at[jnp.asarray(dead)].set(5)
    return (
        state.replace(
            idle=idle, step=jnp.int32(20), optimizer=state.optimizer._replace(mu=ones, nu=ones)
        ),
        hyper,
        config,
    )


@pytest.mark.parametrize("norm", ["free", "unit"])
@pytest.mark.parametrize("activation", ["relu", "gated", "jump_relu"])
def test_dead_latents_point_at_rows_and_the_living_stay(norm: str, activation: str) -> None:
    state, hyper, config = setting(decoder_norm=norm, activation=activation)
    after = resampling.resample(state, hyper, BATCH, ERROR, config.architecture)
    state, after = (jax.tree.map(np.asarray, tree) for tree in (state, after))
    living = np.setdiff1d(np.arange(N), DEAD)
    for name, axis in {"encoder": 1, "encoder_bias": 0, "decoder": 0}.items():
        for old, new in (
            (state.params, after.params),
            (state.optimizer.mu, after.optimizer.mu),
            (state.optimizer.nu, after.optimizer.nu),
        ):
            np.testing.assert_array_equal(
                np.take(getattr(new, name), living, axis), np.take(getattr(old, name), living, axis)
            )
        for moment in (after.optimizer.mu, after.optimizer.nu):
            assert not np.take(getattr(moment, name), DEAD, axis).any()
    np.testing.assert_array_equal(after.params.pre_bias, state.params.pre_bias)
    np.testing.assert_array_equal(after.params.decoder_bias, state.params.decoder_bias)
    np.testing.assert_array_equal(after.idle, np.zeros(N))

    inputs = np.asarray(BATCH) + state.params.pre_bias[None, :]
    units = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
    decoder, encoder = np.asarray(after.params.decoder), np.asarray(after.params.encoder)
    before = jax.tree.map(np.asarray, state.params)
    norms = np.linalg.norm(before.decoder[living], axis=1).mean()
    directions = decoder[DEAD] / (norms if norm == "free" else 1)
    chosen = (directions @ units.T).argmax(axis=1)
    assert len(set(chosen)) == len(DEAD), "a row was drawn twice"
    np.testing.assert_allclose(directions, units[chosen], atol=1e-5)
    fifth = 0.2 * np.linalg.norm(before.encoder[:, living], axis=0).mean()
    np.testing.assert_allclose(encoder[:, DEAD].T, fifth * units[chosen], atol=1e-6)
    assert not np.asarray(after.params.encoder_bias)[DEAD].any()


def test_rows_are_drawn_in_proportion_to_their_squared_loss() -> None:
    squared = np.asarray([0.0, 1.0, 2.0, 3.0])
    error = jnp.asarray(np.sqrt(squared)[:, None] * np.eye(1, D), jnp.float32)
    batch = jnp.asarray(np.eye(4, D), jnp.float32)
    state, hyper, config = setting(np.asarray([3]), pre_bias="none")
    seeds = jnp.arange(4000, dtype=jnp.uint32)
    drawn = jax.vmap(
        lambda seed: resampling.resample(
            state, hyper.replace(seed=seed), batch, error, config.architecture
        ).params.decoder[3]
    )(seeds)
    found = np.bincount(np.asarray(drawn)[:, :4].argmax(axis=1), minlength=4) / 4000
    np.testing.assert_allclose(found, squared**2 / (squared**2).sum(), atol=0.03)


def test_more_dead_latents_than_rows_wait_for_the_next_time() -> None:
    state, hyper, config = setting(np.arange(N))
    after = resampling.resample(state, hyper, BATCH, ERROR, config.architecture)
    changed = (np.asarray(after.params.decoder) != np.asarray(state.params.decoder)).any(axis=1)
    assert changed.sum() == B
    np.testing.assert_array_equal(np.asarray(after.idle) == 0, changed)
    assert np.isfinite(after.params.encoder).all()


@pytest.mark.parametrize(
    ("step", "every", "due"), [(20, 10, True), (21, 10, False), (50, 10, True), (60, 10, False)]
)
def test_it_happens_every_so_many_steps_of_the_first_half(step: int, every: int, due: bool) -> None:
    state, hyper, _ = setting(resample_every=every)
    assert bool(resampling.due(state.replace(step=jnp.int32(step)), hyper)) is due


def test_what_was_dead_fires_on_the_row_it_was_given() -> None:
    state, hyper, config = setting(l1_weight=1.0)
    silent = state.params.encoder_bias.at[DEAD].set(-100.0)
    state = state.replace(params=state.params.replace(encoder_bias=silent))
    before = models.encode(state.params, hyper, BATCH, config.architecture)
    assert not np.asarray(before)[:, DEAD].any()
    after = resampling.resample(state, hyper, BATCH, ERROR, config.architecture)
    codes = np.asarray(models.encode(after.params, hyper, BATCH, config.architecture))
    assert codes[:, DEAD].any(axis=0).all()


def test_a_sweep_resamples_and_keeps_unit_directions() -> None:
    rows = np.random.default_rng(0).normal(size=(512, D)).astype(np.float32)
    size = {"d_in": D, "n_latents": 64, "batch_size": 64, "decoder_norm": "unit"}
    fields = {**size, "l1_weight": 9.0, "learning_rate": 3e-2, "dead_steps": 8}
    configs = [
        SAEConfig(**fields, resample_every=10, resampling=kind) for kind in ("none", "bricken")
    ]
    run = sae_jax.train(configs, rows, epochs=12, progress=False)
    plain, resampled = (dictionary.params.decoder for dictionary in run.dictionaries)
    moved = np.abs(plain - resampled).max(axis=1) > 1e-3
    assert moved.any()
    np.testing.assert_allclose(np.linalg.norm(resampled, axis=1), 1, rtol=1e-5)


def test_directions_are_of_rows_less_a_tied_pre_bias() -> None:
    state, hyper, config = setting(pre_bias="tied", decoder_norm="unit")
    bias = RANDOM.normal(size=D).astype(np.float32)
    state = state.replace(params=state.params.replace(decoder_bias=jnp.asarray(bias)))
    after = resampling.resample(state, hyper, BATCH, ERROR, config.architecture)
    centred = np.asarray(BATCH) - bias
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = np.asarray(after.params.decoder)[DEAD] @ units.T
    np.testing.assert_allclose(cosines.max(axis=1), 1, rtol=1e-5)

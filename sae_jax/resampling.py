"""Dead latents of ONE dictionary start anew (Bricken et al. 2023, appendix on neuron resampling).

Every `resample_every` steps of the first half of training, each latent that has not fired for
`dead_steps` steps takes the direction of a row of the current batch, drawn with a chance in
proportion to its squared loss: its decoder row points there with the mean norm of the living, its
encoder column too with a fifth of the living's mean norm, its bias is zero and Adam's moments
forget it.

Two things differ from the text, for batches of cells instead of billions of tokens. The rows are
those of one batch, not of 819,200 inputs. And no row is drawn twice at a time, since two latents
that start equal stay equal for good: what dead latents there are beyond the rows of a batch wait
for the next time.

It is for codes that a latent earns by itself. Under a top-k the new ones, being short, are seldom
among the k: `auxiliary="auxk"` revives those.
"""

import jax
import jax.numpy as jnp

from sae_jax import models
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Params, TrainState

ENCODER_SHARE = 0.2


def due(state: TrainState, hyper: Hyperparams) -> jax.Array:
    """Whether dead latents are resampled after the step that made `state`."""
    early = 2 * state.step <= hyper.steps
    return (state.step % hyper.resample_every == 0) & early


def resample(
    state: TrainState,
    hyper: Hyperparams,
    batch: jax.Array,
    error: jax.Array,
    architecture: Architecture,
) -> TrainState:
    """The state after a step on batch [rows, d_in] that left errors [rows, d_in]."""
    rows = batch.shape[0]
    dead = state.idle >= hyper.dead_steps
    # Gumbel's trick: the largest of log-chances plus noise are draws without replacement.
    key = jax.random.fold_in(jax.random.key(hyper.seed), state.step)
    chance = 2 * jnp.log(jnp.sum(error**2, axis=1))  # the square of the loss
    drawn = jnp.argsort(-(chance + jax.random.gumbel(key, (rows,), batch.dtype)))
    rank = jnp.cumsum(dead) - 1  # of a dead latent among the dead
    inputs = models.encoder_input(state.params, batch, architecture)
    largest = jnp.max(jnp.abs(inputs), axis=1, keepdims=True)
    inputs = inputs / jnp.where(largest > 0, largest, 1)  # whose squares do not vanish
    directions = models.unit_rows(inputs)[drawn[jnp.clip(rank, 0, rows - 1)]]
    # A row of zeros has no direction: the latent that it would go to waits too.
    chosen = dead & (rank < rows) & jnp.any(directions != 0, axis=1)

    params, living = state.params, jnp.where(jnp.all(dead), True, ~dead)
    decoder_norm = 1.0
    if architecture.decoder_norm == "free":
        decoder_norm = _mean_norm(params.decoder, living)
    encoder_norm = ENCODER_SHARE * _mean_norm(params.encoder.T, living)
    fresh: dict[str, jax.Array | float] = {
        "encoder": encoder_norm * directions.T,
        "encoder_bias": 0.0,
        "decoder": decoder_norm * directions,
    }
    if architecture.activation == "gated":
        fresh |= {"magnitude_gain": 0.0, "magnitude_bias": 0.0}
    if architecture.activation == "jump_relu":
        fresh |= {"log_threshold": jnp.log(hyper.initial_threshold)}
    adam, nothing = state.optimizer, dict.fromkeys(fresh, 0.0)
    return state.replace(
        params=_exchanged(params, fresh, chosen),
        optimizer=adam._replace(
            mu=_exchanged(adam.mu, nothing, chosen), nu=_exchanged(adam.nu, nothing, chosen)
        ),
        idle=jnp.where(chosen, 0, state.idle),
    )


def _mean_norm(directions: jax.Array, living: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(directions, axis=1)
    return jnp.sum(jnp.where(living, norms, 0)) / jnp.sum(living)


def _exchanged(old: Params, new: dict[str, jax.Array | float], chosen: jax.Array) -> Params:
    """`old`, in which the chosen latents have the leaves of `new`."""
    where = {name: chosen[None, :] if name == "encoder" else chosen for name in new}
    where["decoder"] = chosen[:, None]
    return old.replace(
        **{name: jnp.where(where[name], value, getattr(old, name)) for name, value in new.items()}
    )

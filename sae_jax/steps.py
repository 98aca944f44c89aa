"""How ONE dictionary trains: a step, the steps of an epoch, what an epoch's end decides."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import control, models, objectives, optim, resampling
from sae_jax.config import Architecture
from sae_jax.state import Best, History, Hyperparams, Metrics, Params, TrainState


def init_member(
    hyper: Hyperparams,
    architecture: Architecture,
    dtype: Any,
    patient: bool = False,
    center: jax.Array | None = None,
) -> TrainState:
    """ONE member before its first step; `patient` members remember their best weights. For `center`
    [d_in] see `models.init`."""
    params = models.init(hyper.seed, architecture, dtype, center, hyper.initial_threshold)
    idle = jnp.zeros(architecture.n_latents, jnp.int32)
    watched = architecture.auxiliary == "auxk" or architecture.resampling != "none"
    weighted = architecture.activation in ("relu", "gated")
    controlled = weighted and architecture.sparsity_control == "target_l0"
    best = Best(params=params, loss=jnp.full((), jnp.inf, dtype), epoch=jnp.asarray(-1))
    nothing = jnp.full((), jnp.nan, dtype)
    return TrainState(
        params=params,
        optimizer=optim.ADAM.init(params),
        step=jnp.zeros((), jnp.int32),
        idle=idle if watched else None,
        log_factor=jnp.zeros((), dtype) if controlled else None,
        means=Metrics(loss=nothing, mse=nothing, l1=nothing, l0=nothing),
        diverged=jnp.asarray(False),
        active=jnp.asarray(True),
        best=best if patient else None,
    )


def step(
    state: TrainState, hyper: Hyperparams, batch: jax.Array, architecture: Architecture
) -> tuple[TrainState, Metrics]:
    """ONE member, one batch [rows, d_in]."""
    now = _moved(optim.scheduled(hyper, state.step, architecture), state)
    dead = state.idle >= hyper.dead_steps if architecture.auxiliary == "auxk" else None
    gradient = jax.grad(objectives.loss, has_aux=True)
    grads, (metrics, z, error) = gradient(state.params, now, batch, architecture, dead)
    params, optimizer = optim.update(state.params, state.optimizer, grads, now, architecture)
    if architecture.activation == "batch_topk":
        params = control.estimated_threshold(params, z, state.step)
    state = state.replace(params=params, optimizer=optimizer, step=state.step + 1)
    if state.log_factor is not None:
        wanted = control.wanted_l0(state.log_factor, metrics.l0, hyper.target_l0)
        state = state.replace(log_factor=wanted)
    if state.idle is not None:
        state = state.replace(idle=jnp.where(jnp.any(z > 0, axis=0), 0, state.idle + 1))
    if architecture.resampling == "bricken":
        state = lax.cond(
            resampling.due(state, hyper),
            lambda state: resampling.resample(state, hyper, batch, error, architecture),
            lambda state: state,
            state,
        )
    return state, metrics


def _moved(hyper: Hyperparams, state: TrainState) -> Hyperparams:
    """With the penalty where `sparsity_control` has moved it to."""
    if state.log_factor is None:
        return hyper
    return hyper.replace(l1_weight=hyper.l1_weight * jnp.exp(state.log_factor))


def take_steps(
    state: TrainState,
    hyper: Hyperparams,
    rows: jax.Array,
    order: jax.Array,
    architecture: Architecture,
    first: jax.Array | int = 0,
    last: jax.Array | int | None = None,
    before: jax.Array | int = 0,
) -> TrainState:
    """ONE member over the batches `rows[order[first:last]]`, order [steps, batch].

    The means go on after `before` batches of the epoch that are not in `order`; the same bits
    wherever an epoch is cut.
    """

    def one(i: jax.Array, state: TrainState) -> TrainState:
        means = state.means
        state, metrics = step(state, hyper, rows[order[i]], architecture)
        count = (before + i + 1).astype(rows.dtype)
        means = jax.tree.map(
            lambda mean, new: jnp.where(count == 1, new, mean + (new - mean) / count),
            means,
            metrics,
        )
        return state.replace(means=means)

    return lax.fori_loop(first, len(order) if last is None else last, one, state)


def close_epoch(
    state: TrainState,
    hyper: Hyperparams,
    validation: jax.Array | None,
    epoch: jax.Array,
    patience: jax.Array,
    architecture: Architecture,
) -> tuple[TrainState, History]:
    """ONE member after the last batch of an epoch.

    A member whose mean loss is not finite has diverged; so has one whose gradients' squares are
    not, since Adam would never move those weights again, and one whose monitored loss is not, if it
    remembers its best weights. One that remembers its best weights stops
    when `patience` epochs brought no lower loss, on the validation rows where there are any.
    """
    means = state.means
    held_out = jnp.full((), jnp.nan, means.loss.dtype)
    if validation is not None:
        held_out = validation_loss(state.params, _moved(hyper, state), validation, architecture)
    monitored = means.loss if validation is None else held_out
    moments = jax.tree.leaves(state.optimizer.nu)
    diverged = ~jnp.isfinite(means.loss + sum(jnp.max(leaf) for leaf in moments))
    if state.best is not None:
        diverged |= ~jnp.isfinite(monitored)
    state = state.replace(diverged=diverged, active=~diverged)
    if state.best is not None:
        better = monitored < state.best.loss
        fresh = Best(params=state.params, loss=monitored, epoch=epoch)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), fresh, state.best)
        waits = epoch - best.epoch < patience
        state = state.replace(best=best, active=state.active & waits)
    return state, History(**vars(means), validation_loss=held_out)


def validation_loss(
    params: Params, hyper: Hyperparams, rows: jax.Array, architecture: Architecture
) -> jax.Array:
    """ONE member's loss, without the auxiliary, over rows [rows, d_in]; a batch at a time."""
    size = min(architecture.batch_size, len(rows))
    whole = len(rows) // size * size

    def summed(batch: jax.Array) -> jax.Array:
        value, _ = objectives.loss(params, hyper, batch, architecture, training=False)
        return value * len(batch)

    total = jnp.sum(lax.map(summed, rows[:whole].reshape(-1, size, rows.shape[1])))
    if whole < len(rows):
        total = total + summed(rows[whole:])
    return total / len(rows)


def blank_history(shape: tuple[int, ...], dtype: Any) -> History:
    """NaN everywhere."""
    names = [field.name for field in dataclasses.fields(History)]
    return History(**{name: jnp.full(shape, jnp.nan, dtype) for name in names})


def row_order(
    data_seed: jax.Array, epoch: jax.Array, rows: int, architecture: Architecture
) -> jax.Array:
    """Positions of an epoch's rows, [steps, batch]; the same for every member and machine."""
    steps = rows // architecture.batch_size
    key = jax.random.fold_in(jax.random.key(data_seed), epoch)
    order = jax.random.permutation(key, rows)[: steps * architecture.batch_size]
    return order.reshape(steps, architecture.batch_size).astype(jnp.int32)

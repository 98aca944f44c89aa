"""What is compiled: initialisation, a chunk of epochs, a part of one, for all of a bucket.

Inside a chunk the data lie on the device, epochs and steps are loops of the program, and the state
is donated. The order of rows depends on (data_seed, epoch) alone: every member sees the same
batches. The rows left over after the last full batch of an epoch are not used in that epoch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from sae_jax import ensemble, steps
from sae_jax.config import Architecture
from sae_jax.state import History, Hyperparams, TrainState


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "dtype", "patient"))
def init_bucket(
    hyper: Hyperparams,
    center: jax.Array | None = None,
    *,
    architecture: Architecture,
    mesh: Mesh,
    dtype: Any,
    patient: bool = False,
) -> TrainState:
    """States [members, ...] before the first step; see `init_member`."""

    def member(hyper: Hyperparams, center: jax.Array | None) -> TrainState:
        return steps.init_member(hyper, architecture, dtype, patient, center)

    return ensemble.map_members(member, mesh)(hyper, center)


@functools.partial(
    jax.jit, static_argnames=("architecture", "mesh", "size"), donate_argnames="states"
)
def train_chunk(
    states: TrainState,
    hyper: Hyperparams,
    rows: jax.Array,
    validation: jax.Array | None,
    data_seed: jax.Array,
    start: jax.Array,
    count: jax.Array,
    patience: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
    size: int,
) -> tuple[TrainState, History]:
    """Epochs start .. start + count of every member; count <= size is traced, so it may vary.

    Returns states and history [members, size], of which the first `count` columns are filled.
    """
    batches = len(rows) // architecture.batch_size
    orders = lax.fori_loop(
        0,
        count,
        lambda i, orders: orders.at[i].set(
            steps.row_order(data_seed, start + i, len(rows), architecture)
        ),
        jnp.zeros((size, batches, architecture.batch_size), jnp.int32),
    )

    def member(
        member: tuple[TrainState, Hyperparams],
        rows: jax.Array,
        validation: jax.Array | None,
        orders: jax.Array,
        start: jax.Array,
        count: jax.Array,
        patience: jax.Array,
    ) -> tuple[TrainState, History]:
        state, hyper = member

        def epoch(state: TrainState, i: jax.Array) -> tuple[TrainState, History]:
            state = steps.take_steps(state, hyper, rows, orders[i], architecture)
            return steps.close_epoch(state, hyper, validation, start + i, patience, architecture)

        def epoch_if_active(
            i: jax.Array, carry: tuple[TrainState, History]
        ) -> tuple[TrainState, History]:
            state, history = carry
            blank = steps.blank_history((), rows.dtype)
            state, means = lax.cond(state.active, epoch, lambda state, _: (state, blank), state, i)
            return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, means)

        return lax.fori_loop(
            0, count, epoch_if_active, (state, steps.blank_history((size,), rows.dtype))
        )

    shared = (rows, validation, orders, jnp.asarray(start), count, patience)
    return ensemble.map_members(member, mesh)((states, hyper), *shared)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh"), donate_argnames="states")
def train_part(
    states: TrainState,
    hyper: Hyperparams,
    rows: jax.Array,
    order: jax.Array,
    first: jax.Array,
    last: jax.Array,
    before: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> TrainState:
    """Every member over the batches rows[order[first:last]], order [steps, batch], before which
    come `before` batches of their epoch. first and last are traced, so the part may vary."""

    def member(member: tuple[TrainState, Hyperparams], *part: jax.Array) -> TrainState:
        state, hyper = member

        def train(state: TrainState) -> TrainState:
            rows, order, *where = part
            return steps.take_steps(state, hyper, rows, order, architecture, *where)

        return lax.cond(state.active, train, lambda state: state, state)

    where = (jnp.asarray(at, jnp.int32) for at in (first, last, before))
    return ensemble.map_members(member, mesh)((states, hyper), rows, order, *where)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh"), donate_argnames="states")
def close_epoch(
    states: TrainState,
    hyper: Hyperparams,
    validation: jax.Array | None,
    epoch: jax.Array,
    patience: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> tuple[TrainState, History]:
    """Every member after an epoch that came in parts; states, and history [members]."""

    def member(
        member: tuple[TrainState, Hyperparams],
        validation: jax.Array | None,
        epoch: jax.Array,
        patience: jax.Array,
    ) -> tuple[TrainState, History]:
        state, hyper = member
        return lax.cond(
            state.active,
            lambda state: steps.close_epoch(
                state, hyper, validation, epoch, patience, architecture
            ),
            lambda state: (state, steps.blank_history((), state.means.loss.dtype)),
            state,
        )

    shared = (validation, jnp.asarray(epoch), patience)
    return ensemble.map_members(member, mesh)((states, hyper), *shared)


@functools.partial(jax.jit, static_argnames=("rows", "architecture"))
def row_order(
    data_seed: jax.Array, epoch: jax.Array, *, rows: int, architecture: Architecture
) -> jax.Array:
    """See `steps.row_order`."""
    return steps.row_order(data_seed, epoch, rows, architecture)


def forget() -> None:
    """Let go of everything compiled here so far."""
    for program in (init_bucket, train_chunk, train_part, close_epoch, row_order):
        program.clear_cache()

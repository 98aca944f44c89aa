"""The loop: chunks of epochs, each one call of a compiled program, for all members of a bucket.

Inside a chunk the data lie on the device, epochs and steps are loops of the program, and the state
is donated. The order of rows depends on (data_seed, epoch) alone: every member sees the same
batches. The rows left over after the last full batch of an epoch are not used in that epoch.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh

from sae_jax import ensemble, models, objectives, optim
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Metrics, Params, TrainState

MAX_CHUNK_EPOCHS = 64
CHUNK_SECONDS = 1.0  # how often the host hears of the program


@struct.dataclass
class Trained:
    """A trained bucket, members in front: weights and `active` on the devices, and the history
    [members, epochs] on the host."""

    params: Params
    active: jax.Array
    history: Metrics


def init_member(hyper: Hyperparams, architecture: Architecture, dtype: Any) -> TrainState:
    """ONE member before its first step."""
    params = models.init(hyper.seed, architecture, dtype)
    return TrainState(params=params, optimizer=optim.ADAM.init(params), active=jnp.asarray(True))


def step(
    state: TrainState, hyper: Hyperparams, batch: jax.Array, architecture: Architecture
) -> tuple[TrainState, Metrics]:
    """ONE member, one batch [rows, d_in]."""
    gradient = jax.grad(objectives.loss, has_aux=True)
    grads, metrics = gradient(state.params, hyper, batch, architecture)
    params, optimizer = optim.update(state.params, state.optimizer, grads, hyper, architecture)
    return state.replace(params=params, optimizer=optimizer), metrics


def train_epoch(
    state: TrainState,
    hyper: Hyperparams,
    rows: jax.Array,
    order: jax.Array,
    architecture: Architecture,
) -> tuple[TrainState, Metrics]:
    """ONE member, one epoch over `rows[order]`, order [steps, batch]. A frozen member stays as is.

    A member whose mean loss is not finite is frozen from then on; its metrics are NaN.
    """

    def run(state: TrainState) -> tuple[TrainState, Metrics]:
        state, metrics = lax.scan(
            lambda state, positions: step(state, hyper, rows[positions], architecture),
            state,
            order,
        )
        means = jax.tree.map(jnp.mean, metrics)
        return state.replace(active=jnp.isfinite(means.loss)), means

    def skip(state: TrainState) -> tuple[TrainState, Metrics]:
        nan = jnp.full((), jnp.nan, rows.dtype)
        return state, Metrics(loss=nan, mse=nan, l1=nan, l0=nan)

    return lax.cond(state.active, run, skip, state)


def row_order(
    data_seed: jax.Array, epoch: jax.Array, rows: int, architecture: Architecture
) -> jax.Array:
    """Positions of an epoch's rows, [steps, batch]; the same for every member and machine."""
    steps = rows // architecture.batch_size
    key = jax.random.fold_in(jax.random.key(data_seed), epoch)
    order = jax.random.permutation(key, rows)[: steps * architecture.batch_size]
    return order.reshape(steps, architecture.batch_size).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "dtype"))
def init_bucket(
    hyper: Hyperparams, *, architecture: Architecture, mesh: Mesh, dtype: Any
) -> TrainState:
    """States [members, ...] before the first step."""
    member = functools.partial(init_member, architecture=architecture, dtype=dtype)
    return ensemble.map_members(member, mesh)(hyper)


@functools.partial(
    jax.jit, static_argnames=("architecture", "mesh", "size"), donate_argnames="states"
)
def train_chunk(
    states: TrainState,
    hyper: Hyperparams,
    rows: jax.Array,
    data_seed: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
    size: int,
) -> tuple[TrainState, Metrics]:
    """Epochs start .. start + count of every member; count <= size is traced, so it may vary.

    Returns states and metrics [members, size], of which the first `count` columns are filled.
    """
    steps = len(rows) // architecture.batch_size
    orders = lax.fori_loop(
        0,
        count,
        lambda i, orders: orders.at[i].set(
            row_order(data_seed, start + i, len(rows), architecture)
        ),
        jnp.zeros((size, steps, architecture.batch_size), jnp.int32),
    )

    def member(
        member: tuple[TrainState, Hyperparams], rows: jax.Array, orders: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Metrics]:
        state, hyper = member
        blank = jnp.zeros(size, rows.dtype)

        def epoch(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, history = carry
            state, means = train_epoch(state, hyper, rows, orders[i], architecture)
            return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, means)

        history = Metrics(loss=blank, mse=blank, l1=blank, l0=blank)
        return lax.fori_loop(0, count, epoch, (state, history))

    return ensemble.map_members(member, mesh)((states, hyper), rows, orders, count)


def train_bucket(
    hyper: Hyperparams,
    rows: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
    epochs: int,
    data_seed: int,
    on_chunk: Callable[[int, float], None],
) -> Trained:
    """Train members that share an architecture, `epochs` passes over rows [rows, d_in].

    Args:
      hyper: [members, ...], members a multiple of the mesh.
      rows: on the device, normalised.
      on_chunk: told the epochs of each finished chunk and the mean loss of the members that live.
    """
    states = init_bucket(hyper, architecture=architecture, mesh=mesh, dtype=rows.dtype)
    size = min(epochs, MAX_CHUNK_EPOCHS)
    history, done, count = [], 0, 1
    while done < epochs:
        began = time.perf_counter()
        states, metrics = train_chunk(
            states, hyper, rows, data_seed, done, count,
            architecture=architecture, mesh=mesh, size=size,
        )  # fmt: skip
        metrics = jax.tree.map(lambda m, count=count: np.asarray(m)[:, :count], metrics)
        history.append(metrics)
        done += count
        last = metrics.loss[:, -1]
        alive = last[np.isfinite(last)]
        on_chunk(count, float(alive.mean()) if alive.size else float("nan"))
        per_epoch = (time.perf_counter() - began) / count
        count = int(np.clip(CHUNK_SECONDS / per_epoch, 1, min(size, max(1, epochs - done))))
    whole = jax.tree.map(lambda *chunks: np.concatenate(chunks, axis=1), *history)
    return Trained(params=states.params, active=states.active, history=whole)

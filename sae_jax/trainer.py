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
from sae_jax.state import Best, History, Hyperparams, Metrics, Params, TrainState

MAX_CHUNK_EPOCHS = 64
CHUNK_SECONDS = 1.0  # how often the host hears of the program


@struct.dataclass
class Trained:
    """A trained bucket on the host, members in front.

    params: of the last epoch, or with patience of the best. diverged: bool [members]. best_epoch:
    [members], or None without patience. history: [members, epochs], NaN where none was trained.
    """

    params: Params
    diverged: np.ndarray
    best_epoch: np.ndarray | None
    history: History


def init_member(
    hyper: Hyperparams, architecture: Architecture, dtype: Any, patient: bool = False
) -> TrainState:
    """ONE member before its first step; `patient` members remember their best weights."""
    params = models.init(hyper.seed, architecture, dtype)
    idle = jnp.zeros(architecture.n_latents, jnp.int32)
    best = Best(params=params, loss=jnp.full((), jnp.inf, dtype), epoch=jnp.asarray(-1))
    return TrainState(
        params=params,
        optimizer=optim.ADAM.init(params),
        step=jnp.zeros((), jnp.int32),
        idle=idle if architecture.auxiliary == "auxk" else None,
        diverged=jnp.asarray(False),
        active=jnp.asarray(True),
        best=best if patient else None,
    )


def step(
    state: TrainState, hyper: Hyperparams, batch: jax.Array, architecture: Architecture
) -> tuple[TrainState, Metrics]:
    """ONE member, one batch [rows, d_in]."""
    now = optim.scheduled(hyper, state.step, architecture)
    dead = None if state.idle is None else state.idle >= hyper.dead_steps
    gradient = jax.grad(objectives.loss, has_aux=True)
    grads, (metrics, z) = gradient(state.params, now, batch, architecture, dead)
    params, optimizer = optim.update(state.params, state.optimizer, grads, now, architecture)
    if state.idle is not None:
        state = state.replace(idle=jnp.where(jnp.any(z > 0, axis=0), 0, state.idle + 1))
    return state.replace(params=params, optimizer=optimizer, step=state.step + 1), metrics


def train_epoch(
    state: TrainState,
    hyper: Hyperparams,
    rows: jax.Array,
    order: jax.Array,
    validation: jax.Array | None,
    epoch: jax.Array,
    patience: jax.Array,
    architecture: Architecture,
) -> tuple[TrainState, History]:
    """ONE member, one epoch over `rows[order]`, order [steps, batch]; inactive ones stay as is.

    A member whose mean loss is not finite has diverged. One that remembers its best weights stops
    when `patience` epochs brought no lower loss, on the validation rows where there are any.
    """

    def run(state: TrainState) -> tuple[TrainState, History]:
        state, metrics = lax.scan(
            lambda state, positions: step(state, hyper, rows[positions], architecture),
            state,
            order,
        )
        means = jax.tree.map(jnp.mean, metrics)
        held_out = jnp.full((), jnp.nan, rows.dtype)
        if validation is not None:
            held_out = validation_loss(state.params, hyper, validation, architecture)
        diverged = ~jnp.isfinite(means.loss)
        state = state.replace(diverged=diverged, active=~diverged)
        if state.best is not None:
            monitored = means.loss if validation is None else held_out
            better = monitored < state.best.loss
            fresh = Best(params=state.params, loss=monitored, epoch=epoch)
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), fresh, state.best)
            waits = epoch - best.epoch < patience
            state = state.replace(best=best, active=state.active & waits)
        return state, History(**vars(means), validation_loss=held_out)

    def skip(state: TrainState) -> tuple[TrainState, History]:
        return state, blank_history((), rows.dtype)

    return lax.cond(state.active, run, skip, state)


def validation_loss(
    params: Params, hyper: Hyperparams, rows: jax.Array, architecture: Architecture
) -> jax.Array:
    """ONE member's loss, without the auxiliary, over rows [rows, d_in]; a batch at a time."""
    size = min(architecture.batch_size, len(rows))
    whole = len(rows) // size * size

    def summed(batch: jax.Array) -> jax.Array:
        return objectives.loss(params, hyper, batch, architecture)[0] * len(batch)

    total = jnp.sum(lax.map(summed, rows[:whole].reshape(-1, size, rows.shape[1])))
    if whole < len(rows):
        total = total + summed(rows[whole:])
    return total / len(rows)


def blank_history(shape: tuple[int, ...], dtype: Any) -> History:
    """NaN everywhere."""
    nan = jnp.full(shape, jnp.nan, dtype)
    return History(loss=nan, mse=nan, l1=nan, l0=nan, validation_loss=nan)


def row_order(
    data_seed: jax.Array, epoch: jax.Array, rows: int, architecture: Architecture
) -> jax.Array:
    """Positions of an epoch's rows, [steps, batch]; the same for every member and machine."""
    steps = rows // architecture.batch_size
    key = jax.random.fold_in(jax.random.key(data_seed), epoch)
    order = jax.random.permutation(key, rows)[: steps * architecture.batch_size]
    return order.reshape(steps, architecture.batch_size).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "dtype", "patient"))
def init_bucket(
    hyper: Hyperparams, *, architecture: Architecture, mesh: Mesh, dtype: Any, patient: bool = False
) -> TrainState:
    """States [members, ...] before the first step."""
    member = functools.partial(init_member, architecture=architecture, dtype=dtype, patient=patient)
    return ensemble.map_members(member, mesh)(hyper)


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
        member: tuple[TrainState, Hyperparams],
        rows: jax.Array,
        validation: jax.Array | None,
        orders: jax.Array,
        start: jax.Array,
        count: jax.Array,
        patience: jax.Array,
    ) -> tuple[TrainState, History]:
        state, hyper = member

        def epoch(i: jax.Array, carry: tuple[TrainState, History]) -> tuple[TrainState, History]:
            state, history = carry
            state, means = train_epoch(
                state, hyper, rows, orders[i], validation, start + i, patience, architecture
            )
            return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, means)

        return lax.fori_loop(0, count, epoch, (state, blank_history((size,), rows.dtype)))

    shared = (rows, validation, orders, jnp.asarray(start), count, patience)
    return ensemble.map_members(member, mesh)((states, hyper), *shared)


def train_bucket(
    hyper: Hyperparams,
    rows: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
    epochs: int,
    data_seed: int,
    on_chunk: Callable[[int, float], None],
    validation: jax.Array | None = None,
    patience: int | None = None,
) -> Trained:
    """Train members that share an architecture, at most `epochs` passes over rows [rows, d_in].

    Members that have stopped are taken out between chunks, as soon as no more than half are left.

    Args:
      hyper: [members, ...], members a multiple of the mesh.
      rows, validation: on the device, normalised.
      on_chunk: told the epochs of each finished chunk and the mean loss of the members that live.
      patience: epochs without a lower loss after which a member stops; None: never.
    """
    patient = patience is not None
    states = init_bucket(
        hyper, architecture=architecture, mesh=mesh, dtype=rows.dtype, patient=patient
    )
    members = np.arange(len(hyper.seed))  # which member each row of `states` is
    retired: dict[int, TrainState] = {}
    history = jax.tree.map(np.array, blank_history((len(members), epochs), rows.dtype))
    size = min(epochs, MAX_CHUNK_EPOCHS)
    done, count = 0, 1
    while done < epochs:
        began = time.perf_counter()
        states, metrics = train_chunk(
            states, hyper, rows, validation, data_seed, done, count, patience or 0,
            architecture=architecture, mesh=mesh, size=size,
        )  # fmt: skip
        for whole, part in zip(jax.tree.leaves(history), jax.tree.leaves(metrics), strict=True):
            whole[members, done : done + count] = np.asarray(part)[:, :count]
        done += count
        last = history.loss[members, done - 1]
        alive = last[np.isfinite(last)]
        on_chunk(count, float(alive.mean()) if alive.size else float("nan"))
        per_epoch = (time.perf_counter() - began) / count
        count = int(np.clip(CHUNK_SECONDS / per_epoch, 1, min(size, max(1, epochs - done))))
        active = np.asarray(states.active)
        if not active.any():
            break
        keep = ensemble.compacted(active, mesh)
        if keep is not None:
            retired |= _unstack(jax.device_get(states), members)
            states, hyper = (ensemble.take(tree, keep, mesh) for tree in (states, hyper))
            members = members[keep]
    retired |= _unstack(jax.device_get(states), members)
    final = jax.tree.map(lambda *leaves: np.stack(leaves), *(retired[m] for m in sorted(retired)))
    return Trained(
        params=final.best.params if patient else final.params,
        diverged=final.diverged,
        best_epoch=final.best.epoch if patient else None,
        history=history,
    )


def _unstack(states: TrainState, members: np.ndarray) -> dict[int, TrainState]:
    """States [rows, ...] on the host, by member."""
    return {
        int(member): jax.tree.map(lambda leaf, row=row: leaf[row], states)
        for row, member in enumerate(members)
    }

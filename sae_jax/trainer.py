"""The loop: chunks of epochs for all members of a bucket, by a few compiled programs.

Where the data fit the device, a chunk of epochs is one call: epochs and steps are loops of the
program, and the state is donated. Where they do not, each buffer of a stream is one call, and the
next is read meanwhile. Every member sees the same batches, in an order that depends on (data_seed,
epoch) alone, for a stream also on the size of its buffers. The rows left over after the last full
batch of an epoch are not used in that epoch.

Between chunks the state is all there is to know: members that have stopped are taken out there,
checkpoints are written there, and a run that is resumed goes on from there bit for bit.
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

from sae_jax import ensemble, steps
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import Architecture
from sae_jax.state import History, Hyperparams, Metrics, Params, TrainState


class Stream: ...  # TEMPORARY


MAX_CHUNK_EPOCHS = 64
CHUNK_SECONDS = 1.0  # how often the host hears of the program

Advance = Callable[[TrainState, Hyperparams, int, int], tuple[TrainState, History]]


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


@struct.dataclass
class Position:
    """Where a bucket stands between two chunks: all that a checkpoint holds.

    states: [rows, ...] of the members still in training. members: [rows], which each row is; spare
    rows repeat the last. done: scalar, epochs. trained: what has been found of all members so far.
    """

    states: TrainState
    members: np.ndarray
    done: np.ndarray
    trained: Trained


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
            state, means = steps.take_steps(state, hyper, rows, orders[i], architecture)
            return steps.close_epoch(
                state, hyper, means, validation, start + i, patience, architecture
            )

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
def train_buffer(
    states: TrainState,
    hyper: Hyperparams,
    buffer: jax.Array,
    order: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> tuple[TrainState, Metrics]:
    """Every member over the batches buffer[order], order [steps, batch], of a stream.

    Returns states and the steps' mean metrics [members], NaN of those that have stopped.
    """

    def member(
        member: tuple[TrainState, Hyperparams], buffer: jax.Array, order: jax.Array
    ) -> tuple[TrainState, Metrics]:
        state, hyper = member
        nan = jnp.full((), jnp.nan, buffer.dtype)
        return lax.cond(
            state.active,
            lambda state: steps.take_steps(state, hyper, buffer, order, architecture),
            lambda state: (state, Metrics(loss=nan, mse=nan, l1=nan, l0=nan)),
            state,
        )

    return ensemble.map_members(member, mesh)((states, hyper), buffer, order)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh"), donate_argnames="states")
def close_stream(
    states: TrainState,
    hyper: Hyperparams,
    means: Metrics,
    validation: jax.Array | None,
    epoch: jax.Array,
    patience: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> tuple[TrainState, History]:
    """Every member after an epoch of a stream that had these mean metrics [members]."""

    def member(
        member: tuple[TrainState, Hyperparams, Metrics],
        validation: jax.Array | None,
        epoch: jax.Array,
        patience: jax.Array,
    ) -> tuple[TrainState, History]:
        state, hyper, means = member
        return lax.cond(
            state.active,
            lambda state: steps.close_epoch(
                state, hyper, means, validation, epoch, patience, architecture
            ),
            lambda state: (state, steps.blank_history((), means.loss.dtype)),
            state,
        )

    shared = (validation, jnp.asarray(epoch), patience)
    return ensemble.map_members(member, mesh)((states, hyper, means), *shared)


def train_bucket(
    hyper: Hyperparams,
    rows: jax.Array | Stream,
    *,
    architecture: Architecture,
    mesh: Mesh,
    epochs: int,
    data_seed: int,
    on_chunk: Callable[[int, float], None],
    validation: jax.Array | None = None,
    patience: int | None = None,
    center: np.ndarray | None = None,
    checkpoints: Checkpoints | None = None,
) -> Trained:
    """Train members that share an architecture, at most `epochs` passes over rows [rows, d_in].

    Members that have stopped are taken out between chunks, as soon as no more than half are left.

    Args:
      hyper: [members, ...], members a multiple of the mesh.
      rows, validation: normalised; on the device, or rows as a stream.
      on_chunk: told the epochs of each finished chunk and the mean loss of the members that live;
        of a resumed run first those of the checkpoint.
      patience: epochs without a lower loss after which a member stops; None: never.
      center: [d_in], see `models.init`.
      checkpoints: where it resumes from and leaves them; see there for what it raises.
    """
    patient = patience is not None
    blank = functools.partial(_blank, hyper, architecture, mesh, rows.dtype, epochs, patient)
    found = None if checkpoints is None else checkpoints.latest(jax.eval_shape(blank))
    position = blank(center) if found is None else _padded(found, len(hyper.seed), mesh)
    members, trained, done = position.members, position.trained, int(position.done)
    states = position.states
    if found is not None:
        states, hyper = ensemble.put(states, mesh), ensemble.take(hyper, members, mesh)
        on_chunk(done, _mean_loss(trained.history.loss[members, done - 1]))
    size = min(epochs, MAX_CHUNK_EPOCHS)
    programs = {"architecture": architecture, "mesh": mesh}
    advance = (
        _streamed(rows, validation, patience or 0, range(done, epochs), **programs)
        if isinstance(rows, Stream)
        else _resident(rows, validation, data_seed, patience or 0, size, **programs)
    )
    count = 1
    while done < epochs and np.asarray(states.active).any():
        began = time.perf_counter()
        states, metrics = advance(states, hyper, done, count)
        for whole, part in zip(
            jax.tree.leaves(trained.history), jax.tree.leaves(metrics), strict=True
        ):
            whole[members, done : done + count] = np.asarray(part)[:, :count]
        done += count
        on_chunk(count, _mean_loss(trained.history.loss[members, done - 1]))
        per_epoch = (time.perf_counter() - began) / count
        count = int(np.clip(CHUNK_SECONDS / per_epoch, 1, min(size, max(1, epochs - done))))
        active = np.asarray(states.active)
        keep = ensemble.compacted(active, mesh) if active.any() else None
        if keep is not None:
            _settle(trained, states, members)
            states, hyper = (ensemble.take(tree, keep, mesh) for tree in (states, hyper))
            members = members[keep]
        if checkpoints is not None and checkpoints.due():
            checkpoints.save(done, _held(states, members, trained, done, checkpoints.members))
    _settle(trained, states, members)
    return trained


def _resident(
    rows: jax.Array,
    validation: jax.Array | None,
    data_seed: int,
    patience: int,
    size: int,
    **programs: Any,
) -> Advance:
    """Epochs of rows that lie on the device."""

    def advance(
        states: TrainState, hyper: Hyperparams, start: int, count: int
    ) -> tuple[TrainState, History]:
        return train_chunk(
            states, hyper, rows, validation, data_seed, start, count, patience,
            size=size, **programs,
        )  # fmt: skip

    return advance


def _streamed(
    rows: Stream, validation: jax.Array | None, patience: int, epochs: range, **programs: Any
) -> Advance:
    """Epochs of a stream, which it reads in this order and once."""
    buffers = rows.buffers(epochs)

    def epoch(states: TrainState, hyper: Hyperparams, number: int) -> tuple[TrainState, History]:
        means, weights = [], []
        for _ in range(rows.buffers_of_epoch):
            buffer, order = next(buffers)
            states, metrics = train_buffer(states, hyper, buffer, order, **programs)
            means.append(jax.device_get(metrics))  # waits, so that no more than two buffers exist
            weights.append(len(order))
        dtype = means[0].loss.dtype
        mean = jax.tree.map(
            lambda *parts: np.average(parts, axis=0, weights=weights).astype(dtype), *means
        )
        return close_stream(states, hyper, mean, validation, number, patience, **programs)

    def advance(
        states: TrainState, hyper: Hyperparams, start: int, count: int
    ) -> tuple[TrainState, History]:
        found = []
        for number in range(start, start + count):
            states, history = epoch(states, hyper, number)
            found.append(jax.device_get(history))
        return states, jax.tree.map(lambda *parts: np.stack(parts, axis=1), *found)

    return advance


def _blank(
    hyper: Hyperparams,
    architecture: Architecture,
    mesh: Mesh,
    dtype: Any,
    epochs: int,
    patient: bool,
    center: np.ndarray | None = None,
) -> Position:
    """Before the first step."""
    states = init_bucket(
        hyper, center, architecture=architecture, mesh=mesh, dtype=dtype, patient=patient
    )
    members = len(hyper.seed)
    history = steps.blank_history((members, epochs), dtype)
    trained = Trained(
        params=states.params,
        diverged=states.diverged,
        best_epoch=states.step if patient else None,
        history=history,
    )
    return Position(
        states=states,
        members=np.arange(members),
        done=np.asarray(0),
        trained=jax.tree.map(_blank_copy, trained),
    )


def _blank_copy(leaf: Any) -> Any:
    """On the host, to be filled: NaN, or zeros where there is none."""
    blank = np.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
    return np.full(leaf.shape, blank, leaf.dtype)


def _settle(trained: Trained, states: TrainState, members: np.ndarray) -> None:
    """Write into `trained` what `states` has of these members."""
    states = jax.device_get(states)
    patient = states.best is not None
    found = Trained(
        params=states.best.params if patient else states.params,
        diverged=states.diverged,
        best_epoch=states.best.epoch if patient else None,
        history=None,
    )
    for whole, part in zip(
        jax.tree.leaves(trained.replace(history=None)), jax.tree.leaves(found), strict=True
    ):
        whole[members] = part


def _held(
    states: TrainState, members: np.ndarray, trained: Trained, done: int, real: int
) -> Position:
    """A checkpoint's content: rows once each, and nothing of members that only fill the devices."""
    unique, rows = np.unique(members, return_index=True)
    rows = rows[unique < real]
    return Position(
        states=jax.tree.map(lambda leaf: np.asarray(leaf)[rows], states),
        members=members[rows],
        done=np.asarray(done),
        trained=jax.tree.map(lambda leaf: leaf[:real], trained),
    )


def _padded(held: Position, total: int, mesh: Mesh) -> Position:
    """`_held` undone, on as many devices as there are now."""
    rows = len(held.members)
    rows = np.pad(np.arange(rows), (0, -rows % mesh.size), mode="edge")
    every = np.arange(total).clip(max=len(held.trained.diverged) - 1)
    return Position(
        states=jax.tree.map(lambda leaf: leaf[rows], held.states),
        members=held.members[rows],
        done=held.done,
        trained=jax.tree.map(lambda leaf: leaf[every], held.trained),
    )


def _mean_loss(losses: np.ndarray) -> float:
    """Of the members that live; NaN if none does."""
    alive = losses[np.isfinite(losses)]
    return float(alive.mean()) if alive.size else float("nan")

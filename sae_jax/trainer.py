"""The loop: chunks of epochs for all members of a bucket, and what happens between them.

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
from jax.sharding import Mesh

from sae_jax import ensemble, feeds, programs, steps
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import Architecture
from sae_jax.state import History, Hyperparams, Params, TrainState

MAX_CHUNK_EPOCHS = 64
MAX_ORDER_ROWS = 2**24  # of the orders of a chunk's epochs, which lie on the device: 64 MiB
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


def train_bucket(
    hyper: Hyperparams,
    rows: jax.Array | feeds.Stream,
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
    on_history: Callable[[np.ndarray, int, History], None] | None = None,
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
      on_history: told after each chunk which members trained, its first epoch, and their history
        [members, epochs of the chunk].
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
    if not isinstance(rows, feeds.Stream):
        size = min(size, max(1, MAX_ORDER_ROWS // len(rows)))
    static = {"architecture": architecture, "mesh": mesh}
    advance = (
        feeds.streamed(rows, validation, patience or 0, range(done, epochs), **static)
        if isinstance(rows, feeds.Stream)
        else feeds.resident(rows, validation, data_seed, patience or 0, size, **static)
    )
    count = 1
    while done < epochs and np.asarray(states.active).any():
        began = time.perf_counter()
        states, metrics = advance(states, hyper, done, count)
        for whole, part in zip(
            jax.tree.leaves(trained.history), jax.tree.leaves(metrics), strict=True
        ):
            whole[members, done : done + count] = np.asarray(part)[:, :count]
        if on_history is not None:
            which = np.ix_(np.unique(members), np.arange(done, done + count))
            on_history(which[0].ravel(), done, _part(trained.history, which))
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
    states = programs.init_bucket(
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


def _part(history: History, which: Any) -> History:
    return jax.tree.map(lambda leaf: leaf[which], history)


def _mean_loss(losses: np.ndarray) -> float:
    """Of the members that live; NaN if none does."""
    alive = losses[np.isfinite(losses)]
    return float(alive.mean()) if alive.size else float("nan")

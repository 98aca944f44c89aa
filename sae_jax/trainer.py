"""The loop: chunks of epochs for all members of a bucket, and what happens between them.

Between chunks the state is all there is to know: members that have stopped are taken out there,
checkpoints are written there, and a run that is resumed goes on from there bit for bit.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from sae_jax import distributed, ensemble, feeds, programs, pulse, steps
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import Architecture
from sae_jax.state import History, Hyperparams, Params, TrainState

MAX_CHUNK_EPOCHS = 64
MAX_ORDER_ROWS = 2**24  # of the orders of a chunk's epochs, which lie on the device: 64 MiB
CHUNK_SECONDS = 1.0  # how often the host hears of the program


@struct.dataclass
class Trained:
    """A trained bucket on the host, members in front: those of this process.

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

    states: [rows, ...] of the members still in training. members: int32 [rows], which of the bucket
    each row is, -1 for spare rows that only fill the devices. trained: what has been found so far,
    [members, ...].
    """

    states: TrainState
    members: np.ndarray
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
    Several processes call this together; each returns what it has of the members.

    Args:
      hyper: [members, ...], members a multiple of the mesh.
      rows, validation: normalised; on the devices, or rows as a stream.
      on_chunk: told the epochs of each finished chunk and the mean loss of the members that live;
        of a resumed run first those of the checkpoint.
      patience: epochs without a lower loss after which a member stops; None: never.
      center: [d_in], see `models.init`.
      checkpoints: where it resumes from and leaves them; see there for what it raises.
      on_history: told after each chunk which members trained, its first epoch, and their history
        [members, epochs of the chunk].
    """
    own = ensemble.own(len(hyper.seed), mesh)
    if center is not None:
        center = ensemble.replicate(center, mesh)
    states = programs.init_bucket(
        hyper, center, architecture=architecture, mesh=mesh, dtype=rows.dtype,
        patient=patience is not None,
    )  # fmt: skip
    trained, members, done = _blank(states, len(own), epochs), np.asarray(own, np.int32), 0
    found = None if checkpoints is None else checkpoints.latest(Position(states, members, trained))
    if found is not None:
        done, held = found
        real = range(own.start, max(own.start, min(own.stop, checkpoints.members)))
        states, members = _resumed(held, real, states, trained, mesh)
        hyper = ensemble.take(hyper, np.where(members < 0, 0, members - own.start), mesh)
        on_chunk(done, _mean_loss(trained.history.loss[:, done - 1]))
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
    active = ensemble.local(states.active)
    while done < epochs and distributed.agree(active.any()).any():
        began = time.perf_counter()
        pulse.beat(f"epochs {done} to {done + count - 1}")
        states, metrics = advance(states, hyper, done, count)
        kept = np.flatnonzero(members >= 0)
        places = members[kept] - own.start
        for whole, part in zip(
            jax.tree.leaves(trained.history), jax.tree.leaves(ensemble.local(metrics)), strict=True
        ):
            whole[places, done : done + count] = part[kept, :count]
        if on_history is not None:
            which = np.ix_(places, np.arange(done, done + count))
            on_history(members[kept], done, _part(trained.history, which))
        done += count
        on_chunk(count, _mean_loss(trained.history.loss[places, done - 1]))
        active = ensemble.local(states.active)
        seconds = (time.perf_counter() - began) / count
        due = checkpoints is not None and checkpoints.due()
        alive, seconds, due = distributed.agree([active.sum(), seconds, due]).max(axis=0)
        count = int(np.clip(CHUNK_SECONDS / seconds, 1, min(size, max(1, epochs - done))))
        keep = ensemble.compacted(active, alive, ensemble.least(mesh)) if alive else None
        if keep is not None:
            _settle(trained, states, members, own)
            states = _chosen(states, keep, mesh)
            hyper = ensemble.take(hyper, keep, mesh)
            members = np.where(keep < 0, np.int32(-1), members[keep])
            active = ensemble.local(states.active)
        if due:
            held = Position(ensemble.local(states), members, trained)
            checkpoints.save(done, held, mesh)
    _settle(trained, states, members, own)
    return trained


def _blank(states: TrainState, members: int, epochs: int) -> Trained:
    """Of so many members, before the first step: to be filled."""
    patient = states.best is not None
    history = steps.blank_history((members, epochs), states.params.decoder.dtype)
    found = Trained(
        params=states.params,
        diverged=states.diverged,
        best_epoch=states.step if patient else None,
        history=history,
    )
    return jax.tree.map(lambda leaf: _blank_copy(leaf, members), found)


def _blank_copy(leaf: Any, members: int) -> np.ndarray:
    """On the host: NaN, or zeros where there is none."""
    blank = np.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
    return np.full((members, *leaf.shape[1:]), blank, leaf.dtype)


def _settle(trained: Trained, states: TrainState, members: np.ndarray, own: range) -> None:
    """Write into `trained` what `states` has of these members."""
    patient = states.best is not None
    found = Trained(
        params=states.best.params if patient else states.params,
        diverged=states.diverged,
        best_epoch=states.best.epoch if patient else None,
        history=None,
    )
    kept = members >= 0
    for whole, part in zip(
        jax.tree.leaves(trained.replace(history=None)),
        jax.tree.leaves(ensemble.local(found)),
        strict=True,
    ):
        whole[members[kept] - own.start] = part[kept]


def _chosen(states: TrainState, rows: np.ndarray, mesh: Mesh) -> TrainState:
    """These rows of this process; those of -1 are spare, and rest."""
    chosen = jax.tree.map(lambda leaf: leaf[rows], ensemble.local(states))
    return ensemble.put(chosen.replace(active=chosen.active & (rows >= 0)), mesh)


def _resumed(
    held: Position, own: range, fresh: TrainState, trained: Trained, mesh: Mesh
) -> tuple[TrainState, np.ndarray]:
    """A checkpoint on as many devices and processes as there are now: states and members.

    held: of all processes. own: the members of this one. fresh: their states, for spare rows.
    trained: is filled.
    """
    for whole, part in zip(jax.tree.leaves(trained), jax.tree.leaves(held.trained), strict=True):
        whole[: len(own)] = part[own.start : own.stop]
    rows = np.flatnonzero((held.members >= own.start) & (held.members < own.stop))
    size = max(1, distributed.agree(len(rows)).max())
    spare = size + -size % ensemble.least(mesh) - len(rows)
    states = jax.tree.map(
        lambda leaf, other: np.concatenate([leaf[rows], np.repeat(other[:1], spare, axis=0)]),
        held.states,
        ensemble.local(fresh),
    )
    members = np.pad(held.members[rows], (0, spare), constant_values=-1)
    states = states.replace(active=states.active & (members >= 0))
    return ensemble.put(states, mesh), members


def _part(history: History, which: Any) -> History:
    return jax.tree.map(lambda leaf: leaf[which], history)


def _mean_loss(losses: np.ndarray) -> float:
    """Of the members that live; NaN if none does."""
    alive = losses[np.isfinite(losses)]
    return float(alive.mean()) if alive.size else float("nan")

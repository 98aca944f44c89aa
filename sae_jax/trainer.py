"""The loop: calls of the compiled program for all members of a bucket, and what is between them.

Between calls the state is all there is to know: members that have stopped are taken out there,
checkpoints are written there, and a run that is resumed goes on from there bit for bit.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from sae_jax import distributed, ensemble, feeds, programs, steps
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import Architecture
from sae_jax.errors import InputError, counted
from sae_jax.state import History, Hyperparams, Params, TrainState

CALL_SECONDS = 1.0  # how often the host hears of the program
TABLES = 2  # of histories that exist at once: those of the members, and all together


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
    """Where a bucket stands between two calls: all that a checkpoint holds.

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
    on_steps: Callable[[int, float], None],
    validation: jax.Array | None = None,
    patience: int | None = None,
    split: bool = False,
    real: int | None = None,
    center: np.ndarray | None = None,
    checkpoints: Checkpoints | None = None,
    on_history: Callable[[np.ndarray, int, History], None] | None = None,
) -> Trained:
    """Train members that share an architecture, at most `epochs` passes over rows [rows, d_in].

    Members that have stopped are taken out between calls, as soon as no more than half are left.
    Several processes call this together; each returns what it has of the members.

    Args:
      hyper: [members, ...], members a multiple of the mesh.
      rows, validation: normalised; on the devices, or rows as a stream.
      on_steps: told the batches of each call of the program and the mean loss of the members that
        train on, in the epoch so far; of a resumed run first those of the checkpoint.
      patience: epochs without a lower loss after which a member stops; None: never.
      real: how many of the members there are; the rest only fill up the mesh. None: all.
      split: whether checkpoints may fall within an epoch; those of a stream always may.
      center: [d_in], see `models.init`.
      checkpoints: where it resumes from and leaves them; see there for what it raises.
      on_history: told when epochs have ended which members trained, the first of the epochs, and
        the members' history [members, epochs].
    """
    own = ensemble.own(len(hyper.seed), mesh)
    if center is not None:
        center = ensemble.replicate(center, mesh)
    states = programs.init_bucket(
        hyper, center, architecture=architecture, mesh=mesh, dtype=rows.dtype,
        patient=patience is not None,
    )  # fmt: skip
    members = np.asarray(own, np.int32)
    members[members >= (len(hyper.seed) if real is None else real)] = -1
    if (members < 0).any():
        states = _chosen(states, np.where(members < 0, -1, np.arange(len(own))), mesh)
    trained, at = _blank(states, len(own), epochs), 0
    found = None
    if checkpoints is not None:
        found = checkpoints.latest(Position(states, members, trained), own, ".trained.diverged")
    batches = len(rows) // architecture.batch_size
    if found is not None:
        at, held, first = found
        states, members = _resumed(held, first, own, states, trained, mesh)
        hyper = ensemble.take(hyper, np.where(members < 0, 0, members - own.start), mesh)
        on_steps(at, _mean_loss(states))
    given = (rows, validation, data_seed, patience or 0)
    static = {"architecture": architecture, "mesh": mesh}
    if split or isinstance(rows, feeds.Stream):
        advance = feeds.in_parts(*given, at, epochs, **static)
    else:
        advance = feeds.whole(*given, epochs, **static)
    count = 1
    active = ensemble.local(states.active)
    while at < epochs * batches and distributed.agree(active.any()).any():
        began, before = time.perf_counter(), at
        states, at, metrics = advance(states, hyper, at, count)
        kept = np.flatnonzero(members >= 0)
        if metrics is not None:
            ended = np.arange(before // batches, at // batches)
            which = np.ix_(members[kept] - own.start, ended)
            for whole, part in zip(
                jax.tree.leaves(trained.history), jax.tree.leaves(metrics), strict=True
            ):
                whole[which] = part[kept]
            if on_history is not None:
                on_history(members[kept], int(ended[0]), _part(trained.history, which))
        on_steps(at - before, _mean_loss(states))
        active = ensemble.local(states.active)
        seconds = (time.perf_counter() - began) / (at - before)
        due = checkpoints is not None and checkpoints.due()
        alive, seconds, due = distributed.agree([active.sum(), seconds, due]).max(axis=0)
        count = int(np.clip(CALL_SECONDS / seconds, 1, epochs * batches))
        keep = ensemble.compacted(active, alive, ensemble.least(mesh)) if alive else None
        if keep is not None:
            _settle(trained, states, members, own)
            states = _chosen(states, keep, mesh)
            hyper = ensemble.take(hyper, keep, mesh)
            members = np.where(keep < 0, np.int32(-1), members[keep])
            active = ensemble.local(states.active)
        if due:
            held = Position(ensemble.local(states), members, trained)
            checkpoints.save(at, held, mesh)
    _settle(trained, states, members, own)
    return trained


def _blank(states: TrainState, members: int, epochs: int) -> Trained:
    """Of so many members, before the first step: to be filled."""
    patient = states.best is not None
    shapes = functools.partial(steps.blank_history, (members, epochs), states.params.decoder.dtype)
    found = Trained(
        params=states.params,
        diverged=states.diverged,
        best_epoch=states.step if patient else None,
        history=jax.eval_shape(shapes),
    )
    return jax.tree.map(lambda leaf: _blank_copy(leaf, members), found)


def history_bytes(members: int, epochs: int, itemsize: int) -> int:
    """What the histories of so many members take on the host of each process in the end, none of it
    on devices: as trained, and as tables that are put together, with member and epoch in each row.
    """
    numbers = len(dataclasses.fields(History)) * itemsize
    return members * epochs * (numbers + TABLES * (numbers + 16))


def check_histories(members: int, epochs: int, itemsize: int) -> None:
    """Refuses so many epochs that the histories of a run take more than half of the host's memory;
    the other half is what training on CPUs takes.

    Raises:
      InputError: in every process.
    """
    room = int(distributed.agree(np.int64(distributed.host_memory())).min()) // 2
    size = history_bytes(members, epochs, itemsize)
    if size > room:
        raise InputError(
            f"epochs={epochs} of {counted(members, 'configuration')} leave a history of "
            f"{size / 2**30:,.1f} GiB, and this machine has {room / 2**30:,.1f} for it: give fewer "
            "epochs, or fewer configurations a run"
        )


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
    held: Position, first: int, own: range, fresh: TrainState, trained: Trained, mesh: Mesh
) -> tuple[TrainState, np.ndarray]:
    """A checkpoint on as many devices and processes as there are now: states and members.

    held: from the member `first` on. own: the members of this process. fresh: their states, for
    spare rows. trained: is filled.
    """
    for whole, part in zip(jax.tree.leaves(trained), jax.tree.leaves(held.trained), strict=True):
        there = part[own.start - first : own.stop - first]  # as many as filled up another mesh
        whole[: len(there)] = there
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


def _mean_loss(states: TrainState) -> float:
    """Of the members that train on; NaN if none does."""
    loss, active = ensemble.local((states.means.loss, states.active))
    alive = loss[active & np.isfinite(loss)]
    return float(alive.mean()) if alive.size else float("nan")

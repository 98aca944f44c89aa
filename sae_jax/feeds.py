"""Where the rows of an epoch come from: the device's memory, or a stream from disk."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sae_jax import ensemble, models, programs, pulse, streaming
from sae_jax.state import History, Hyperparams, Normalizer, TrainState

# States, hyperparameters, first epoch and how many -> states and history [members, epochs].
Advance = Callable[[TrainState, Hyperparams, int, int], tuple[TrainState, History]]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that are read while they are trained on, in the order of a plan."""

    rows: streaming.Rows
    plan: streaming.Plan
    normalizer: Normalizer | None
    mesh: Mesh | None = None  # None: of one process, whose programs place the rows

    @property
    def dtype(self) -> np.dtype:
        """Of the rows on the device."""
        return jax.dtypes.canonicalize_dtype(self.rows.dtype)

    @property
    def buffers_of_epoch(self) -> int:
        """How many an epoch has."""
        size = self.plan.buffer_rows or self.plan.rows
        return -(-self.plan.steps * self.plan.batch_size // size)

    def buffers(self, epochs: range) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """(rows on the device, order [steps, batch]) of these epochs, one read ahead."""

        def put(rows: np.ndarray) -> jax.Array:
            normal = models.normalize(jnp.asarray(rows), self.normalizer)
            return normal if self.mesh is None else ensemble.replicate(normal, self.mesh)

        return streaming.prefetched(self.rows, self.plan, epochs, put)


def resident(
    rows: jax.Array,
    validation: jax.Array | None,
    data_seed: int,
    patience: int,
    size: int,
    **static: Any,
) -> Advance:
    """Epochs of rows that lie on the device."""

    def advance(
        states: TrainState, hyper: Hyperparams, start: int, count: int
    ) -> tuple[TrainState, History]:
        return programs.train_chunk(
            states, hyper, rows, validation, data_seed, start, count, patience,
            size=size, **static,
        )  # fmt: skip

    return advance


def streamed(
    rows: Stream, validation: jax.Array | None, patience: int, epochs: range, **static: Any
) -> Advance:
    """Epochs of a stream, which it reads in this order and once."""
    buffers = rows.buffers(epochs)  # its thread ends with the last of them, or with this generator

    def epoch(states: TrainState, hyper: Hyperparams, number: int) -> tuple[TrainState, History]:
        means, weights = [], []
        for part in range(rows.buffers_of_epoch):
            buffer, order = next(buffers)
            pulse.beat(f"epoch {number}, buffer {part}")
            states, metrics = programs.train_buffer(states, hyper, buffer, order, **static)
            means.append(ensemble.local(metrics))  # waits, so that no more than two buffers exist
            weights.append(len(order))
        dtype = means[0].loss.dtype
        mean = jax.tree.map(
            lambda *parts: np.average(parts, axis=0, weights=weights).astype(dtype), *means
        )
        mean = ensemble.put(mean, static["mesh"])
        return programs.close_stream(states, hyper, mean, validation, number, patience, **static)

    def advance(
        states: TrainState, hyper: Hyperparams, start: int, count: int
    ) -> tuple[TrainState, History]:
        found = []
        for number in range(start, start + count):
            states, history = epoch(states, hyper, number)
            found.append(ensemble.local(history))
        return states, jax.tree.map(lambda *parts: np.stack(parts, axis=1), *found)

    return advance

"""Where the rows of an epoch come from, and how far a call of the compiled program goes.

Where epochs are short, a call trains several of them on rows in the device's memory. Where they are
long, or rows come from disk, it trains some batches of one, so that the host hears of it every
second or so, and a checkpoint may fall within an epoch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax import distributed, ensemble, models, programs, pulse, streaming
from sae_jax.errors import InputError
from sae_jax.state import History, Hyperparams, Normalizer, TrainState
from sae_jax.together import Together

MAX_CHUNK_EPOCHS = 64
MAX_ORDER_ROWS = 2**24  # of the orders of a chunk's epochs, which lie on the device: 64 MiB

# States, hyperparameters, batches done so far, and batches to go on by, about -> states, batches
# done, and in NumPy the history [members, epochs that have ended], which may be none.
Advance = Callable[[TrainState, Hyperparams, int, int], tuple[TrainState, int, History | None]]


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

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def buffer_steps(self) -> int:
        """Batches of a buffer; the last of an epoch may have fewer."""
        return (self.plan.buffer_rows or self.plan.rows) // self.plan.batch_size

    def buffers(self, at: int, epochs: int) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """(rows on the device, order [steps, batch]) from the one that holds the `at`-th batch to
        the end of so many epochs, one read ahead."""
        epoch, batch = divmod(at, self.plan.steps)
        coming = self.rows, self.plan, range(epoch, epochs)
        skip = batch // self.buffer_steps
        x64 = jax.config.jax_enable_x64  # of this thread: `jax.enable_x64` is of one alone

        def put(rows: np.ndarray) -> jax.Array:
            with jax.enable_x64(x64):
                normal = models.normalize(jax.device_put(rows), self.normalizer)
                return normal if self.mesh is None else ensemble.replicate(normal, self.mesh)

        if not isinstance(self.rows, Together):
            yield from streaming.prefetched(*coming, put, skip)
            return

        def read(ranges: list[tuple[int, int]]) -> np.ndarray | InputError:
            try:
                return self.rows.read_part(ranges)
            except InputError as error:
                return error

        # The thread reads; what the processes exchange must be in the order of the program.
        for part, order in streaming.prefetched(*coming, skip=skip, read=read):
            part = distributed.unless_refused(functools.partial(_unless_error, part))
            yield put(self.rows.gathered(part, order.size)), order


def _unless_error(part: np.ndarray | InputError) -> np.ndarray:
    if isinstance(part, InputError):
        raise part
    return part


def whole(
    rows: jax.Array,
    validation: jax.Array | None,
    data_seed: int,
    patience: int,
    epochs: int,
    **static: Any,
) -> Advance:
    """Whole epochs, of `epochs` in all, of rows that lie on the device."""
    batches = len(rows) // static["architecture"].batch_size
    size = min(epochs, MAX_CHUNK_EPOCHS, max(1, MAX_ORDER_ROWS // len(rows)))

    def advance(
        states: TrainState, hyper: Hyperparams, at: int, steps: int
    ) -> tuple[TrainState, int, History]:
        start = at // batches
        count = min(max(1, steps // batches), size, epochs - start)
        pulse.beat(f"epoch {start}" if count == 1 else f"epochs {start} to {start + count - 1}")
        states, history = programs.train_chunk(
            states, hyper, rows, validation, data_seed, start, count, patience,
            size=size, **static,
        )  # fmt: skip
        history = jax.tree.map(lambda leaf: leaf[:, :count], ensemble.local(history))
        return states, at + count * batches, history

    return advance


def in_parts(
    rows: jax.Array | Stream,
    validation: jax.Array | None,
    data_seed: int,
    patience: int,
    at: int,
    epochs: int,
    **static: Any,
) -> Advance:
    """Epochs, of `epochs` in all, in parts from the `at`-th batch on, in this order and once."""
    if isinstance(rows, Stream):
        batches, each = rows.plan.steps, rows.buffer_steps
        buffers = rows.buffers(at, epochs)  # its thread ends with it
    else:
        each = batches = len(rows) // static["architecture"].batch_size
        buffers = _orders(rows, data_seed, range(at // batches, epochs), static["architecture"])
    buffer, order = None, None

    def advance(
        states: TrainState, hyper: Hyperparams, at: int, steps: int
    ) -> tuple[TrainState, int, History | None]:
        nonlocal buffer, order
        epoch, batch = divmod(at, batches)
        first = batch % each
        pulse.beat(f"epoch {epoch}, batch {batch} of {batches}")
        if first == 0 or order is None:
            buffer = None  # let go of it, so that no more than two exist
            buffer, order = next(buffers)
        last = min(first + max(1, steps), len(order))
        reached = at + last - first
        states = programs.train_part(
            states, hyper, buffer, order, first, last, batch - first, **static
        )
        if reached % batches:
            return states, reached, None
        states, history = programs.close_epoch(states, hyper, validation, epoch, patience, **static)
        history = jax.tree.map(lambda leaf: leaf[:, None], ensemble.local(history))
        return states, reached, history

    return advance


def _orders(
    rows: jax.Array, data_seed: int, epochs: range, architecture: Any
) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """The rows, and the order of each epoch."""
    for epoch in epochs:
        order = programs.row_order(data_seed, epoch, rows=len(rows), architecture=architecture)
        yield rows, np.asarray(order)

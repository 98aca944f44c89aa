"""A bucket from configurations to finished members: normalise, train, measure."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from sae_jax import (
    data,
    distributed,
    ensemble,
    metrics,
    models,
    programs,
    steps,
    streaming,
    trainer,
)
from sae_jax.center import geometric_median
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import Architecture, SAEConfig
from sae_jax.dictionary import Dictionary
from sae_jax.feeds import Stream
from sae_jax.state import History, Normalizer
from sae_jax.streaming import Rows
from sae_jax.workdir import Member

KEPT_PROGRAMS = 32
_trained = itertools.count(1)


def train(
    configs: list[SAEConfig],
    rows: np.ndarray | Rows,
    held_out: dict[str, np.ndarray],
    provenance: dict[str, Any],
    bar: tqdm,
    checkpoints: Checkpoints | None = None,
    on_history: Callable[[np.ndarray, int, History], None] | None = None,
) -> list[Member]:
    """Train and measure configurations that share an architecture.

    Args:
      rows: [rows, d_in], as they come; `Rows` are streamed.
      held_out: further rows by name, measured too; those of `validation` after every epoch.
      provenance: of the dictionaries; `epochs`, `data_seed`, `patience` and, of a stream,
        `resident_bytes` in it are obeyed.
      bar: in steps of single configurations.
    """
    architecture = configs[0].architecture
    mesh = distributed.member_mesh(len(configs))
    normalizer = data.fit_normalizer(rows, architecture.input_normalization)
    batches = len(rows) // architecture.batch_size
    inputs = _inputs(rows, normalizer, architecture, provenance)
    validation = held_out.get("validation")
    if validation is not None:
        validation = models.normalize(jnp.asarray(validation), normalizer)
    epochs = provenance["epochs"]
    hyper = ensemble.stack_hyperparams(configs, mesh, inputs.dtype, epochs * batches)
    center = None
    if architecture.center == "geometric_median":
        center = geometric_median(rows, normalizer)
    begun = bar.n

    def on_chunk(done: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        bar.update(done * len(configs) * batches)

    trained = trainer.train_bucket(
        hyper, inputs, architecture=architecture, mesh=mesh, epochs=epochs,
        data_seed=provenance["data_seed"], on_chunk=on_chunk, validation=validation,
        patience=provenance["patience"], center=center, checkpoints=checkpoints,
        on_history=on_history,
    )  # fmt: skip
    bar.update(begun + epochs * batches * len(configs) - bar.n)  # all have stopped early, perhaps
    measured = {}
    for split, x in {"train": rows, **held_out}.items():
        values = metrics.evaluate(
            trained.params, hyper, x, normalizer, architecture=architecture, mesh=mesh
        )
        measured |= {f"{split}_{name}": value for name, value in values.items()}

    if next(_trained) % KEPT_PROGRAMS == 0:
        # A compiled program holds some 400 memory maps, of which Linux grants a process 65,530: the
        # compiler ends in a segmentation fault at about the 160th.
        programs.forget()
        metrics.forget()
    return [
        _member(i, config, trained, measured, normalizer, provenance)
        for i, config in enumerate(configs)
    ]


def _inputs(
    rows: np.ndarray | Rows,
    normalizer: Normalizer | None,
    architecture: Architecture,
    provenance: dict[str, Any],
) -> jax.Array | Stream:
    """Normalised, on the device if they were read into memory, else as a stream."""
    if not isinstance(rows, Rows):
        return models.normalize(jnp.asarray(rows), normalizer)
    size = buffer_rows(rows, provenance["resident_bytes"], architecture)
    plan = streaming.Plan(
        rows=len(rows),
        batch_size=architecture.batch_size,
        block=max(streaming.BLOCK, rows.chunk_rows),
        buffer_rows=size,
        data_seed=provenance["data_seed"],
    )
    return Stream(rows, plan, normalizer)


def buffer_rows(rows: Rows, resident_bytes: int, architecture: Architecture) -> int:
    """Rows of a stream's buffer. Raises InputError where not even two batches may be resident."""
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    return streaming.buffer_rows(resident_bytes, row_bytes, architecture.batch_size)


def _member(
    i: int,
    config: SAEConfig,
    trained: trainer.Trained,
    measured: dict[str, np.ndarray],
    normalizer: Normalizer | None,
    provenance: dict[str, Any],
) -> Member:
    """The i-th of a bucket."""
    weights = jax.tree.map(lambda leaf: leaf[i].copy(), trained.params)
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    alive = finite and not trained.diverged[i]
    done = int(np.count_nonzero(~np.isnan(trained.history.loss[i]))) or 1
    history = jax.tree.map(lambda leaf: leaf[i, :done], trained.history)
    row = {
        **config.to_dict(),
        "status": "trained" if alive else "diverged",
        "epochs": done,
        "best_epoch": done - 1 if trained.best_epoch is None else int(trained.best_epoch[i]),
        "train_loss": float(history.loss[-1]),
        **{name: value[i].item() if alive else np.nan for name, value in measured.items()},
    }
    if not alive:
        logging.warning("diverged: %s", config)
        return Member(None, row, history)
    return Member(Dictionary(config, weights, normalizer, provenance), row, history)


def failed(config: SAEConfig) -> Member:
    """What stands for a configuration whose program failed."""
    nothing = steps.blank_history((0,), np.float32)
    row = {**config.to_dict(), "status": "failed", "epochs": 0, "best_epoch": -1}
    return Member(None, row, nothing)

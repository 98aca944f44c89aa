"""A bucket from configurations to finished members: normalise, train, measure."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import struct
from jax.sharding import Mesh
from tqdm import tqdm

from sae_jax import (
    data,
    distributed,
    ensemble,
    metrics,
    models,
    programs,
    pulse,
    steps,
    streaming,
    trainer,
)
from sae_jax.center import geometric_median
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import Architecture, SAEConfig
from sae_jax.dictionary import Dictionary
from sae_jax.feeds import Stream
from sae_jax.state import History, Normalizer, Params
from sae_jax.streaming import Rows
from sae_jax.workdir import Member

KEPT_PROGRAMS = 32
# Multiply-adds of one pass over the rows, codes alone, of an epoch that may take a small CPU half a
# minute. By work and not by time, so that a run does the same when it is resumed.
LONG_EPOCH = 2**37
_trained = itertools.count(1)


def train(
    configs: list[SAEConfig],
    rows: np.ndarray | Rows,
    held_out: dict[str, np.ndarray],
    provenance: dict[str, Any],
    bar: tqdm,
    checkpoints: Checkpoints | None = None,
    on_history: Callable[[np.ndarray, int, History], None] | None = None,
    latent_devices: int = 1,
) -> list[Member]:
    """Train and measure configurations that share an architecture.

    Args:
      rows: [rows, d_in], as they come; `Rows` are streamed.
      held_out: further rows by name, measured too; those of `validation` after every epoch.
      provenance: of the dictionaries; `epochs`, `data_seed`, `patience` and, of a stream,
        `resident_bytes` in it are obeyed.
      bar: in steps of single configurations.
      latent_devices: how many share each dictionary.
    """
    architecture = configs[0].architecture
    mesh = distributed.member_mesh(len(configs), latent_devices)
    normalizer = data.fit_normalizer(rows, architecture.input_normalization)
    batches = len(rows) // architecture.batch_size
    inputs = _inputs(rows, normalizer, architecture, provenance, mesh)
    validation = held_out.get("validation")
    if validation is not None:
        validation = models.normalize(jax.device_put(validation), normalizer)
        validation = ensemble.replicate(validation, mesh)
    epochs = provenance["epochs"]
    hyper = ensemble.stack_hyperparams(configs, mesh, inputs.dtype, epochs * batches)
    center = None
    if architecture.center == "geometric_median":
        center = geometric_median(rows, normalizer)
    begun = bar.n

    def on_steps(done: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        bar.update(done * len(configs))

    trained = trainer.train_bucket(
        hyper, inputs, architecture=architecture, mesh=mesh, epochs=epochs,
        data_seed=provenance["data_seed"], on_steps=on_steps, validation=validation,
        patience=provenance["patience"], split=_long(architecture, len(configs), len(rows)),
        real=len(configs), center=center, checkpoints=checkpoints, on_history=on_history,
    )  # fmt: skip
    bar.update(begun + epochs * batches * len(configs) - bar.n)  # all have stopped early, perhaps
    measured = {}
    for split, x in {"train": rows, **held_out}.items():
        pulse.beat(f"evaluation of {split}")
        values = metrics.evaluate(
            trained.params, hyper, x, normalizer, architecture=architecture, mesh=mesh
        )
        measured |= {f"{split}_{name}": value for name, value in values.items()}

    if next(_trained) % KEPT_PROGRAMS == 0:
        # A compiled program holds some 400 memory maps, of which Linux grants a process 65,530: the
        # compiler ends in a segmentation fault at about the 160th.
        programs.forget()
        metrics.forget()
    own = ensemble.own(len(hyper.seed), mesh)
    finite = [
        np.isfinite(leaf).reshape(len(own), -1).all(1) for leaf in jax.tree.leaves(trained.params)
    ]
    outcome = Outcome(
        alive=np.all(finite, axis=0) & ~trained.diverged,
        best_epoch=trained.best_epoch,
        history=trained.history,
        measured=measured,
    )
    outcome = ensemble.gathered(outcome)
    return [
        _member(i, config, outcome, trained.params, own, normalizer, provenance)
        for i, config in enumerate(configs)
    ]


def _long(architecture: Architecture, members: int, rows: int) -> bool:
    """Whether an epoch is so long that a checkpoint must not wait for its end."""
    return members * rows * architecture.d_in * architecture.n_latents > LONG_EPOCH


@struct.dataclass
class Outcome:
    """What the rows of results tell of a bucket, members in front.

    alive: bool [members]. best_epoch: [members] or None. history: [members, epochs]. measured: by
    name, [members].
    """

    alive: np.ndarray
    best_epoch: np.ndarray | None
    history: History
    measured: dict[str, np.ndarray]


def _inputs(
    rows: np.ndarray | Rows,
    normalizer: Normalizer | None,
    architecture: Architecture,
    provenance: dict[str, Any],
    mesh: Mesh,
) -> jax.Array | Stream:
    """Normalised, on the devices if they were read into memory, else as a stream."""
    if not isinstance(rows, Rows):
        return ensemble.replicate(models.normalize(jax.device_put(rows), normalizer), mesh)
    size = buffer_rows(rows, provenance["resident_bytes"], architecture)
    plan = streaming.Plan(
        rows=len(rows),
        batch_size=architecture.batch_size,
        block=block_rows(rows),
        buffer_rows=size,
        data_seed=provenance["data_seed"],
    )
    return Stream(rows, plan, normalizer, mesh)


def block_rows(rows: Rows) -> int:
    """Rows that are read together: a chunk of the file, or more. The order depends on it."""
    return max(streaming.BLOCK, rows.chunk_rows)


def buffer_rows(rows: Rows, resident_bytes: int, architecture: Architecture) -> int:
    """Rows of a stream's buffer. Raises InputError where not even two batches may be resident."""
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    return streaming.buffer_rows(resident_bytes, row_bytes, architecture.batch_size)


def _member(
    i: int,
    config: SAEConfig,
    outcome: Outcome,
    params: Params,
    own: range,
    normalizer: Normalizer | None,
    provenance: dict[str, Any],
) -> Member:
    """The i-th of a bucket; without its dictionary if another process has it."""
    alive = bool(outcome.alive[i])
    done = int(np.count_nonzero(~np.isnan(outcome.history.loss[i]))) or 1
    history = jax.tree.map(lambda leaf: leaf[i, :done], outcome.history)
    row = {
        **config.to_dict(),
        "status": "trained" if alive else "diverged",
        "epochs": done,
        "best_epoch": done - 1 if outcome.best_epoch is None else int(outcome.best_epoch[i]),
        "train_loss": float(history.loss[-1]) if alive else np.nan,
        **{name: value[i].item() if alive else np.nan for name, value in outcome.measured.items()},
    }
    if not alive and distributed.is_first():
        logging.warning("diverged: %s", config)
    if not alive or i not in own:
        return Member(None, row, history)
    weights = jax.tree.map(lambda leaf: leaf[i - own.start].copy(), params)
    return Member(Dictionary(config, weights, normalizer, provenance), row, history)


def failed(config: SAEConfig) -> Member:
    """What stands for a configuration whose program failed."""
    nothing = steps.blank_history((0,), np.float32)
    row = {**config.to_dict(), "status": "failed", "epochs": 0, "best_epoch": -1}
    return Member(None, row, nothing)

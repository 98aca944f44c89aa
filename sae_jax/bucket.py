"""A bucket from configurations to finished members: normalise, train, measure."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from sae_jax import data, distributed, ensemble, metrics, models, steps, trainer
from sae_jax.center import geometric_median
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import SAEConfig
from sae_jax.dictionary import Dictionary
from sae_jax.state import Normalizer
from sae_jax.workdir import Member


def train(
    configs: list[SAEConfig],
    rows: np.ndarray,
    validation: np.ndarray | None,
    provenance: dict[str, Any],
    bar: tqdm,
    checkpoints: Checkpoints | None = None,
) -> list[Member]:
    """Train and measure configurations that share an architecture.

    Args:
      rows, validation: [rows, d_in], as they come.
      provenance: of the dictionaries; `epochs`, `data_seed` and `patience` in it are obeyed.
      bar: in steps of single configurations.
    """
    architecture = configs[0].architecture
    mesh = distributed.member_mesh(len(configs))
    normalizer = data.fit_normalizer(rows, architecture.input_normalization)
    inputs = models.normalize(jnp.asarray(rows), normalizer)
    held_out = None
    if validation is not None:
        held_out = models.normalize(jnp.asarray(validation), normalizer)
    epochs = provenance["epochs"]
    batches = len(rows) // architecture.batch_size
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
        data_seed=provenance["data_seed"], on_chunk=on_chunk, validation=held_out,
        patience=provenance["patience"], center=center, checkpoints=checkpoints,
    )  # fmt: skip
    bar.update(begun + epochs * batches * len(configs) - bar.n)  # all have stopped early, perhaps
    measured = {}
    for split, x in {"train": rows, "validation": validation}.items():
        if x is not None:
            values = metrics.evaluate(
                trained.params, hyper, x, normalizer, architecture=architecture, mesh=mesh
            )
            measured |= {f"{split}_{name}": value for name, value in values.items()}

    return [
        _member(i, config, trained, measured, normalizer, provenance)
        for i, config in enumerate(configs)
    ]


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

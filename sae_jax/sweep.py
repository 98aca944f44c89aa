"""Grid to configs to trained dictionaries and a table of results; the front door of training."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from tqdm import tqdm

import sae_jax
from sae_jax import data, distributed, ensemble, metrics, models, trainer
from sae_jax.config import MOST, Architecture, SAEConfig, unused_fields
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError
from sae_jax.workdir import Member, Workdir, tables

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Run:
    """What `train` returns.

    Attributes:
      dictionaries: one per configuration, in the order given; None where training diverged.
      results: a pandas DataFrame, one row per configuration in the same order: every field of the
        config, `status` (trained or diverged), `epochs` (trained), `best_epoch` (that of the
        weights, from 0), `train_loss` (mean of the last epoch), and each metric of
        `sae_jax.metrics.evaluate` with prefix `train_` and, where validation rows were given,
        `validation_`. A diverged member's metrics are NaN.
      history: a pandas DataFrame, one row per configuration and epoch: member, epoch; loss, mse,
        l1, l0 (means over the epoch's batches, in the normalised space); validation_loss.
    """

    dictionaries: list[Dictionary | None]
    results: "pd.DataFrame"
    history: "pd.DataFrame"


def grid(preset: str, **axes: Any) -> list[SAEConfig]:
    """Every combination of a preset with the given fields, in the order given, duplicates merged.

    A list, tuple or array is an axis, anything else is the same for all. An axis that the preset
    has no use for (k for vanilla, l1_weight for a TopK preset) is dropped, and said to be.

    Example:
      >>> configs = grid("vanilla", d_in=4, n_latents=[8, 40], l1_weight=[1e-3, 1e-4], seed=[0, 1])
      >>> len(configs)
      8
    """
    unused = unused_fields(preset)
    for name in sorted(unused & set(axes)):
        logging.info("preset %s has no use for %s: that axis is dropped", preset, name)
    used = {
        name: list(values) if isinstance(values, list | tuple | np.ndarray) else [values]
        for name, values in axes.items()
        if name not in unused
    }
    combinations = itertools.product(*used.values())
    configs = [
        SAEConfig.preset(preset, **dict(zip(used, values, strict=True))) for values in combinations
    ]
    return list(dict.fromkeys(configs))


def train(
    configs: Sequence[SAEConfig],
    train: np.ndarray,
    validation: np.ndarray | None = None,
    *,
    epochs: int,
    workdir: str | os.PathLike[str] | None = None,
    data_seed: int = 0,
    patience: int | None = None,
    progress: bool = True,
    provenance: dict[str, Any] | None = None,
) -> Run:
    """Train a dictionary per configuration, all that share an architecture in one program.

    Args:
      configs: any mixture; see `Architecture` for what shapes a program.
      train: rows [rows, d_in], float32 (float64 with jax's x64 mode).
      validation: further rows [rows, d_in]; measured, never trained on.
      epochs: passes over the rows; the rows after the last full batch of a pass are left out of it.
      workdir: a folder to fill: configs.json, dictionaries/<member>/, results.parquet,
        history.parquet. Members already finished there by the same call are not trained again.
      data_seed: the order of rows depends on it and on the epoch alone.
      patience: a member stops when so many epochs brought no lower loss (on the validation rows,
        where there are any), and its best weights are kept; None: all train all epochs, and the
        last weights are kept.
      progress: a bar on stderr.
      provenance: where the rows come from (file, key, model, layer, ...), in JSON's types; it
        travels with every dictionary.

    Raises:
      InputError: before any work: no configs, rows that are not finite, of another width or fewer
        than a batch, or a workdir that holds other settings.
    """
    configs = list(configs)
    rows, validation = _check(configs, train, validation, epochs, data_seed, patience)
    epochs, data_seed = int(epochs), int(data_seed)
    settings = {
        "configs": [config.to_dict() for config in configs],
        "epochs": epochs,
        "data_seed": data_seed,
        "patience": patience,
        "train": data.fingerprint(rows),
        "validation": None if validation is None else data.fingerprint(validation),
    }
    about = {
        **(provenance or {}),
        **{name: settings[name] for name in ("epochs", "data_seed", "patience", "train")},
        "versions": {module.__name__: module.__version__ for module in (sae_jax, jax, flax, optax)},
    }
    out = None if workdir is None else Workdir(Path(workdir), settings)
    members = {} if out is None else out.finished()

    todo = [position for position in range(len(configs)) if position not in members]
    buckets = ensemble.buckets([configs[position] for position in todo])
    programs = [
        (architecture, part)
        for architecture, chosen in buckets.items()
        for part in ensemble.split_to_fit(
            chosen, _member_bytes(architecture, rows), distributed.memory()
        )
    ]
    logging.info("%d configurations -> %d programs", len(todo), len(buckets))
    if len(programs) > len(buckets):
        logging.info("in %d parts, each of which fits the memory", len(programs))
    with tqdm(total=len(todo) * epochs, unit=" epochs", disable=not progress) as bar:
        for architecture, chosen in programs:
            positions = [todo[i] for i in chosen]
            bucket = [configs[position] for position in positions]
            bar.set_description(f"{bucket[0].name} {architecture.d_in} -> {architecture.n_latents}")
            trained = _train_bucket(bucket, rows, validation, about, bar)
            members |= dict(zip(positions, trained, strict=True))
            if out is not None:
                out.write(members)
    results, history = tables(members)
    return Run([members[i].dictionary for i in range(len(configs))], results, history)


def _check(
    configs: list[SAEConfig],
    train: np.ndarray,
    validation: np.ndarray | None,
    epochs: int,
    data_seed: int,
    patience: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    if not configs:
        raise InputError("no configurations to train")
    counts = [("epochs", epochs, 1), ("data_seed", data_seed, 0)]
    counts += [] if patience is None else [("patience", patience, 1)]
    for name, value, low in counts:
        integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (integer and low <= value <= MOST):
            raise InputError(f"{name}={value!r} must be an integer in {low} .. {MOST}")
    rows = data.check_rows(train, "train")
    if validation is not None:
        validation = data.check_rows(validation, "validation", d_in=rows.shape[1])
    for config in configs:
        if config.d_in != rows.shape[1]:
            raise InputError(
                f"a configuration has d_in={config.d_in}, train has {rows.shape[1]} dimensions"
            )
        if config.batch_size > len(rows):
            raise InputError(
                f"batch_size={config.batch_size} is more than the {len(rows)} rows of train"
            )
    for architecture in ensemble.buckets(configs):
        ensemble.split_to_fit([0], _member_bytes(architecture, rows), distributed.memory())
    return rows, validation


def _member_bytes(architecture: Architecture, rows: np.ndarray) -> int:
    return ensemble.member_bytes(architecture, rows.itemsize)


def _train_bucket(
    configs: list[SAEConfig],
    rows: np.ndarray,
    validation: np.ndarray | None,
    provenance: dict[str, Any],
    bar: tqdm,
) -> list[Member]:
    """Train and measure configurations that share an architecture."""
    architecture = configs[0].architecture
    mesh = distributed.member_mesh(len(configs))
    normalizer = data.fit_normalizer(rows, architecture.input_normalization)
    inputs = models.normalize(jnp.asarray(rows), normalizer)
    held_out = None
    if validation is not None:
        held_out = models.normalize(jnp.asarray(validation), normalizer)
    epochs = provenance["epochs"]
    steps = epochs * (len(rows) // architecture.batch_size)
    hyper = ensemble.stack_hyperparams(configs, mesh, inputs.dtype, steps)
    begun = bar.n

    def on_chunk(done: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        bar.update(done * len(configs))

    trained = trainer.train_bucket(
        hyper, inputs, architecture=architecture, mesh=mesh, epochs=epochs,
        data_seed=provenance["data_seed"], on_chunk=on_chunk, validation=held_out,
        patience=provenance["patience"],
    )  # fmt: skip
    bar.update(begun + epochs * len(configs) - bar.n)  # all have stopped early, perhaps
    measured = {}
    for split, x in {"train": rows, "validation": validation}.items():
        if x is not None:
            values = metrics.evaluate(
                trained.params, hyper, x, normalizer, architecture=architecture, mesh=mesh
            )
            measured |= {f"{split}_{name}": value for name, value in values.items()}

    members = []
    for i, config in enumerate(configs):
        weights = jax.tree.map(lambda leaf, i=i: leaf[i].copy(), trained.params)
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
        alive = finite and not trained.diverged[i]
        done = int(np.count_nonzero(~np.isnan(trained.history.loss[i]))) or 1
        history = jax.tree.map(lambda leaf, i=i, done=done: leaf[i, :done], trained.history)
        row = {
            **config.to_dict(),
            "status": "trained" if alive else "diverged",
            "epochs": done,
            "best_epoch": done - 1 if trained.best_epoch is None else int(trained.best_epoch[i]),
            "train_loss": float(history.loss[-1]),
            **{name: value[i].item() if alive else np.nan for name, value in measured.items()},
        }
        dictionary = Dictionary(config, weights, normalizer, provenance) if alive else None
        members.append(Member(dictionary, row, history))
        if not alive:
            logging.warning("diverged: %s", config)
    return members

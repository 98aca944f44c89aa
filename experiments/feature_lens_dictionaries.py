"""The dictionaries of the lens: saved ones that fit the embedding, or the paper's, trained here."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import sae_jax
from experiments import replicates
from experiments.inputs import Inputs
from sae_jax import InputError, data, files

FLAGS = flags.FLAGS


def saved(inputs: Inputs) -> list[sae_jax.Dictionary]:
    """Those of --dictionary and --replicates, checked; none where they are to be trained."""
    names = [name for name in [FLAGS.dictionary, *(FLAGS.replicates or ())] if name]
    if FLAGS.dictionary is None and names:
        raise InputError("--replicates are of a saved --dictionary: to train some give --seeds")
    if FLAGS.dictionary is not None and FLAGS.seeds > 1:
        raise InputError(
            "--seeds are trained: of a saved --dictionary name the others: --replicates"
        )
    if FLAGS.consensus and max(len(names), FLAGS.seeds) < 2:
        raise InputError("--consensus is of several dictionaries: give --seeds or --replicates")
    dictionaries = [sae_jax.Dictionary.load(name) for name in names]
    if dictionaries:
        d_in = dictionaries[0].config.d_in
        if d_in != inputs.embedding.shape[1]:
            raise InputError(
                f"{names[0]} is of {d_in} dimensions, the embedding of {inputs.embedding.shape[1]}"
            )
        replicates.check_alike(dictionaries, names)
    return dictionaries


def trained(inputs: Inputs, out: Path) -> list[sae_jax.Dictionary]:
    """The paper's dictionary of this embedding, and those of --seeds that did not diverge; in
    `out`/dictionary and `out`/replicates once they are trained."""
    others = out / "replicates"
    if (out / "dictionary").exists():  # written last
        paths = [out / "dictionary", *sorted(others.glob("[0-9]*"))]
        return [sae_jax.Dictionary.load(path) for path in paths]
    train, validation = data.split(len(inputs.embedding), 0.1, FLAGS.seed)
    config = sae_jax.SAEConfig.preset(
        "vanilla", d_in=inputs.embedding.shape[1], n_latents=FLAGS.n_latents,
        l1_weight=FLAGS.l1_weight, learning_rate=FLAGS.learning_rate, reduction=FLAGS.reduction,
        batch_size=min(128, len(train)), seed=FLAGS.seed,
    )  # fmt: skip
    configs = [dataclasses.replace(config, seed=FLAGS.seed + i) for i in range(FLAGS.seeds)]
    began = time.perf_counter()
    run = sae_jax.train(
        configs, inputs.embedding[train], inputs.embedding[validation], epochs=FLAGS.epochs,
        workdir=out / "training", data_seed=FLAGS.seed,
        provenance={"h5ad": inputs.settings["h5ad"], "embedding": FLAGS.embedding or "PCA"},
    )  # fmt: skip
    first, *rest = run.dictionaries
    if first is None:
        raise InputError("the dictionary diverged; lower --learning_rate")
    row = run.results.iloc[0]
    logging.info(
        "trained in %.0f s: validation R2 %.3f, L0 %.1f",
        time.perf_counter() - began, row["validation_r2"], row["validation_l0"],
    )  # fmt: skip
    rest = {i: dictionary for i, dictionary in enumerate(rest, 1) if dictionary is not None}
    files.remove(others)  # of a run that was killed here
    for i, dictionary in rest.items():
        dictionary.save(others / f"{i:04d}")
    files.write_parquet(out / "history.parquet", run.history)
    first.save(out / "dictionary")
    files.remove(out / "training")
    return [first, *rest.values()]


def activations(
    dictionary: sae_jax.Dictionary, inputs: Inputs
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Of the live features [cells, features], and their latents."""
    z = dictionary.encode(inputs.embedding, sparse=True)
    live = np.flatnonzero(z.getnnz(axis=0))
    if not live.size:
        raise InputError("the dictionary is dead on these cells: no feature is active in any")
    return z[:, live], live


def history(out: Path) -> pd.DataFrame | None:
    """The losses of the dictionary's training, if it was trained here."""
    path = out / "history.parquet"
    return files.read_parquet(path) if path.exists() else None

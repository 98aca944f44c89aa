"""What concepts are good for: other methods beside them, what can be learned, what they cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging

import sae_jax
from analysis import baselines, causal, probes, semi_nmf
from experiments import concepts_study as study
from experiments.concepts_explained import Explained
from experiments.concepts_study import Subject
from extract.cells import restrict
from sae_jax import InputError

FLAGS = flags.FLAGS

CAUSAL_CELLS, DRAWS = 300, 20  # cells, and random directions beside each concept
CYCLE = "cell cycle"
ENOUGH = 10  # cells of each class to be tested on, at least, among those no dictionary has seen


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """Which cells a probe learns from and is tested on.

    unseen: whether those tested are cells that no dictionary, and no method, was fitted to.
    """

    split: probes.Split
    unseen: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """What can be read off concepts, neurons and others: methods, and concepts that speak.

    methods: a row per task and method. confusion: by task and of concepts or neurons.
    coefficients: the concepts that speak most for each class. tested: by task.
    """

    methods: pd.DataFrame
    confusion: dict[tuple[str, str], pd.DataFrame]
    coefficients: pd.DataFrame
    tested: dict[str, Tested]


def learn(
    subject: Subject,
    dictionary: sae_jax.Dictionary,
    found: Explained,
    train: np.ndarray,
    held_out: np.ndarray,
    per_class: Sequence[int],
    out: Path,
) -> Learned:
    """Tables 4 and 5: other methods, and what logistic regression learns from each."""
    coders = methods(subject.x, dictionary, train, FLAGS.seed, 20 if FLAGS.quick else 500)
    tasks = {FLAGS.labels[0]: subject.labels[FLAGS.labels[0]]}
    tasks |= phases(subject, FLAGS.seed)
    coded = reconstructions(coders, subject.x[held_out])
    tables, confusion, tested, coefficients = [], {}, {}, []
    for task, labels in tasks.items():
        tested[task] = cells_of(labels, *per_class, held_out=held_out, seed=FLAGS.seed)
        table, learned = useful(
            subject, coders, labels, tested[task].split,
            max_iter=100 if task == CYCLE else 50,
        )  # fmt: skip
        table = coded.join(table[["accuracy", "probe_converged"]], how="right")
        tables.append(table.rename_axis("method").reset_index().assign(task=task))
        concepts = next(iter(coders))
        confusion |= {(task, name): learned[name].confusion for name in (concepts, "neurons")}
        coefficients.append(speaking(learned[concepts], found).assign(task=task))
    compared = pd.concat(tables, ignore_index=True)
    spoken = pd.concat(coefficients, ignore_index=True)
    study.write_csv(compared, out / "methods.csv")
    study.write_csv(spoken, out / "coefficients.csv")
    return Learned(compared, confusion, spoken, tested)


def test_in_model(
    subject: Subject, dictionary: sae_jax.Dictionary, found: Explained, out: Path
) -> dict[str, pd.DataFrame]:
    """Concepts ablated in the model, beside random directions; what a reconstruction keeps. Nothing
    without a model."""
    if subject.model is None:
        return {}
    strongest = found.features.loc[found.concepts, "mean_activation"].to_numpy()
    features = found.latents[np.argsort(-strongest, kind="stable")[: FLAGS.causal]]
    return {
        name: study.kept(out / f"{name}.parquet", make)
        for name, make in causal_tests(subject, dictionary, features, FLAGS.seed).items()
    }


def cells_of(
    labels: pd.Series, train: int, test: int, *, held_out: np.ndarray, seed: int
) -> Tested:
    """Balanced cells to learn from and to be tested on, as `probes.split` has them.

    Where every class has `ENOUGH` cells that the dictionary was not trained on, the test cells are
    of those, and what is learned from are cells that it was trained on. Otherwise, as in the paper,
    they are any cells, most of which it has seen, without their labels.

    Args:
      train, test: cells per class. held_out: positions of the cells that it was not trained on.
    """
    whole = probes.split(labels, train, test, seed=seed)
    unseen = np.isin(np.arange(len(labels)), held_out)
    names = labels.astype(object).to_numpy()
    n_unseen, n_seen = (
        min(int((among & (names == name)).sum()) for name in whole.classes)
        for among in (unseen, ~unseen)
    )
    if n_unseen < ENOUGH or n_seen < 2:
        return Tested(whole, unseen=False)
    n_test, n_train = min(test, n_unseen), min(train, n_seen)
    rng = np.random.default_rng(seed)
    tested, learnt = (
        np.sort(np.concatenate(
            [rng.permutation(np.flatnonzero(among & (names == name)))[:n] for name in whole.classes]
        ))
        for among, n in ((unseen, n_test), (~unseen, n_train))
    )  # fmt: skip
    split = dataclasses.replace(
        whole, train=learnt, test=tested, n_train=n_train, n_test=n_test,
        factor=min(n_train / train, n_test / test),
    )  # fmt: skip
    return Tested(split, unseen=True)


def methods(
    x: np.ndarray, dictionary: sae_jax.Dictionary, train: np.ndarray, seed: int, iterations: int
) -> dict[str, Any]:
    """What concepts are measured against: the same number by other means, and fewer of each."""
    rows, d = x[train], x.shape[1]
    c = dictionary.config.n_latents
    few = max(2, min(d - 1, round(0.4 * d)))
    found: dict[str, Any] = {f"TopK SAE ({c})": dictionary}
    for n in (min(c, len(rows)), few):
        logging.info("semi-NMF of %d components", n)
        found[f"semi-NMF ({n})"] = semi_nmf.fit(rows, n, iterations=iterations, seed=seed)
    n, k = min(c, len(rows)), dictionary.config.k
    logging.info("semi-NMF of %d components, %d of them a cell", n, k)
    found[f"semi-NMF ({n}), {k} a cell"] = semi_nmf.fit_sparse(rows, n, k, seed=seed)
    for each in baselines.fit_all(rows, seed=seed):
        found[f"{each.name} ({each.n_components})"] = each
    found[f"k-means ({min(c, len(rows) // 10)})"] = baselines.clusters(
        rows, min(c, len(rows) // 10), seed
    )
    z = dictionary.encode(rows, sparse=True)
    density = z.getnnz(axis=0) / z.shape[0]
    found[f"random directions ({int((density > 0).sum())})"] = baselines.random_directions(
        rows, density[density > 0], seed
    )
    return found


def reconstructions(coders: dict[str, Any], x: np.ndarray) -> pd.DataFrame:
    """R², L0 and so on of each method on rows x that none was fitted to."""
    found = {name: baselines.reconstruction(coder, x) for name, coder in coders.items()}
    return pd.DataFrame.from_dict(found, orient="index")


def phases(subject: Subject, seed: int) -> dict[str, pd.Series]:
    """Cell-cycle phases as labels; none where too few of their genes are measured to score them, or
    fewer than two phases have twenty cells."""
    try:
        found, genes = probes.cell_cycle(subject.expression.x, subject.expression.genes, seed)
    except InputError as error:
        logging.warning("no cell cycle: %s", error)
        return {}
    known = {phase: len(some) for phase, some in genes.items()}
    logging.info("genes of the cell cycle that are measured: %s", known)
    if min(known.values()) < 5 or (found["phase"].value_counts() >= 20).sum() < 2:
        return {}
    return {CYCLE: found["phase"].astype("category")}


def useful(
    subject: Subject,
    coders: dict[str, Any],
    labels: pd.Series,
    split: probes.Split,
    max_iter: int = 50,
) -> tuple[pd.DataFrame, dict[str, probes.Probe]]:
    """Logistic regression of labels on everything, balanced classes, tested on other cells."""
    learned, tested = split.train, split.test
    names = labels.astype(object).to_numpy()
    return baselines.compare(
        coders, subject.x[learned], subject.x[tested], names[learned], names[tested],
        subject.expression.x[learned], subject.expression.x[tested], max_iter=max_iter,
    )  # fmt: skip


def speaking(probe: probes.Probe, found: Explained) -> pd.DataFrame:
    """The concepts of the largest coefficients of each class, with the best genes of those that
    were studied."""
    table = probes.top_features(probe)
    table["feature"] = [f"concept_{latent}" for latent in table["feature"]]
    genes = found.features["top_genes"].reindex(table["feature"]).fillna("")
    return table.assign(top_genes=genes.to_numpy())


def causal_tests(
    subject: Subject, dictionary: sae_jax.Dictionary, concepts: np.ndarray, seed: int
) -> dict[str, Callable[[], pd.DataFrame]]:
    """Stages, to be made: `fidelity` of the reconstruction and `causal`, each concept ablated."""
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(subject.adata.n_obs)[:CAUSAL_CELLS])
    outputs = [name for name, of in subject.model.outputs.items() if of == "cell"]  # a row each
    site = causal.Site(
        subject.model, restrict(subject.adata, some), subject.layer, outputs=outputs,
        options=subject.options,
    )  # fmt: skip

    def ablated() -> pd.DataFrame:
        table = causal.effects(site, dictionary, concepts, set=0.0, draws=DRAWS, seed=seed)
        # Where it is edited a random direction moves as far by construction: no test.
        here = table["place"] == f"layer {subject.layer}"
        table.loc[here, ["random_norm", "random_sd", "ratio", "p"]] = np.nan
        return table

    return {
        "fidelity": lambda: causal.fidelity(site, dictionary).rename_axis("place").reset_index(),
        "causal": ablated,
    }

"""The stages of the study of concepts: one function each, arrays and tables in, a table out.

Concepts are the latents of a dictionary, neurons the sides of the embedding's own dimensions;
whatever is asked of the ones is asked of the others by the same function. See `concepts` for the
program, and for what lies on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from absl import logging
from scipy import sparse

import sae_jax
from analysis import (
    attribution,
    baselines,
    causal,
    cells,
    characterisation,
    concept_terms,
    deletion,
    differential,
    features,
    groups,
    gsea,
    probes,
    semi_nmf,
    stability,
)
from analysis.gene_sets import GeneSets
from experiments import folders
from sae_jax import InputError, data, files

VALIDATION = 0.1  # Claye: trained on nine tenths of the cells
GROUP = 1000  # cells on each side of differential expression, at most
IMPORTANT = 0.05  # attribution beyond which a gene counts
METHODS = ("attribution", "dge")
CAUSAL_CELLS, DRAWS = 300, 20  # cells, and random directions beside each concept
ENOUGH = 100  # active cells; with fewer the paper has "not enough data"
CYCLE = "cell cycle"


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """Cells, and what a model makes of them.

    Attributes:
      adata: the cells; the model's expression is there.
      model: a reader of `extract`; `layer`, `options` (of `model.embed`) say what is embedded.
      x: the embedding [cells, d].
      expression: ln(1 + counts per ten thousand) [cells, genes], of the genes that the model knows
        and that were measured, by symbol.
      genes: the same in the model's names.
      exchanged: all genes that attribution exchanges, in its order.
      labels: columns of obs that describe cells.
      sets: over the genes of `expression`.
    """

    adata: anndata.AnnData
    model: Any
    layer: Any
    options: dict[str, Any]
    x: np.ndarray
    expression: cells.Expression
    genes: np.ndarray
    exchanged: list[str]
    labels: pd.DataFrame
    sets: GeneSets


def kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table of a stage: read if an earlier run left it whole, else made and written."""
    if not folders.readable(path):
        files.write_parquet(path, make())
    return pd.read_parquet(path)


def configs(
    d_in: int,
    n_latents: Sequence[int],
    seeds: Sequence[int],
    rows: int,
    learning_rate: float,
    k_share: float,
) -> list[sae_jax.SAEConfig]:
    """TopK dictionaries as in the paper: auxiliary loss, no decoder bias, k a share of c.

    Batches are of 1,024 cells, or a sixteenth of them where cells are few.
    """
    return [
        sae_jax.SAEConfig.preset(
            "claye", d_in=d_in, n_latents=c, k=max(1, round(k_share * c)), seed=seed,
            learning_rate=learning_rate, batch_size=max(16, min(1024, rows // 16)),
            input_normalization="none",
        )
        for c in n_latents
        for seed in seeds
    ]  # fmt: skip


def trained(
    x: np.ndarray, chosen: list[sae_jax.SAEConfig], epochs: int, seed: int, out: Path
) -> tuple[sae_jax.Run, np.ndarray, np.ndarray]:
    """All dictionaries, in one program for each width, in `out`; and the cells trained and held out
    on."""
    train, held_out = data.split(len(x), VALIDATION, seed)
    run = sae_jax.train(chosen, x[train], x[held_out], epochs=epochs, workdir=out, data_seed=seed)
    if all(dictionary is None for dictionary in run.dictionaries):
        raise InputError("every dictionary diverged: is the embedding on a sane scale?")
    return run, train, held_out


def table_3(run: sae_jax.Run) -> pd.DataFrame:
    """The paper's Table 3: c, k, rate, epochs, both R² on held-out cells, active concepts."""
    columns = ["member", "n_latents", "k", "seed", "learning_rate", "batch_size", "epochs",
               "status", "validation_r2", "validation_r2_scalar_mean", "validation_l0",
               "train_live"]  # fmt: skip
    return run.results[[name for name in columns if name in run.results]]


def described(z: sparse.csr_matrix, labels: pd.DataFrame) -> pd.DataFrame:
    """One row a feature: activity, and of each column of labels the share and the AUROC."""
    table = features.activity(z)
    for name, column in labels.items():
        found = characterisation.metadata_specificity(z, column)
        table[f"{name}:label"], table[f"{name}:share"] = found["label"], found["share"]
        table[f"{name}:verdict"] = found["verdict"].astype(str)
        names, areas = features.auroc(z, column)
        best = areas.argmax(axis=1)
        table[f"{name}:best"] = np.asarray(names, object)[best]
        table[f"{name}:auroc"] = areas[np.arange(len(areas)), best]
    return table


def telling(described: pd.DataFrame) -> list[str]:
    """Of each label the feature (index) that tells it best; in the order of the labels."""
    found = []
    for column in [name for name in described if name.endswith(":auroc")]:
        label = column.removesuffix("auroc") + "best"
        first = described.sort_values(column, ascending=False, kind="stable")
        found += first.drop_duplicates(label).sort_values(label).index.tolist()
    return list(dict.fromkeys(found))


def replicated(
    run: sae_jax.Run, x: np.ndarray, members: Sequence[int], seed: int
) -> stability.Replication:
    """Replication scores over dictionaries that differ in their seeds."""
    some = [run.dictionaries[member] for member in members]
    codes = [dictionary.encode(x, sparse=True) for dictionary in some]
    return stability.replication(some, codes, embedding=x, seed=seed)


def attributed(
    subject: Subject, groups: dict[str, tuple[Any, np.ndarray, list[str]]], folder: Path,
    **samples: int,
) -> pd.DataFrame:  # fmt: skip
    """Counterfactual attribution: one row per feature and gene of the subject.

    Args:
      groups: coder, its latents and their names, of concepts and of neurons.
      folder: where finished blocks are kept.
      samples: `prototypes` and `counterfactuals`.
    """
    place = {gene: i for i, gene in enumerate(subject.exchanged)}
    columns = [place[gene] for gene in subject.genes]
    tables = []
    for kind, (coder, latents, names) in groups.items():
        found = attribution.attribute(
            subject.model, coder, subject.adata, latents, embedding=subject.x,
            options=_options(subject), folder=folder / kind, **samples,
        )  # fmt: skip
        logging.info("%s: %s", kind, found.forwards)
        tables.append(_long(names, subject, attribution=found.scores[:, columns]))
    return pd.concat(tables, ignore_index=True).astype({"feature": "category", "gene": "category"})


def deleted(
    subject: Subject, dictionary: sae_jax.Dictionary, latents: np.ndarray, scores: np.ndarray,
    fold: np.ndarray, log10_p: np.ndarray, seed: int, **samples: int,
) -> pd.DataFrame:  # fmt: skip
    """Figure 8: what is left of an activation as genes are exchanged, by attribution, by |log2 fold
    change| (of genes with p <= 5e-3), at random."""
    pairs = attribution.find_pairs(
        subject.model, dictionary, subject.adata, latents, embedding=subject.x,
        options=_options(subject), **samples,
    )  # fmt: skip
    place = {gene: i for i, gene in enumerate(subject.exchanged)}
    columns = [place[gene] for gene in subject.genes]

    def over_all(values: np.ndarray) -> np.ndarray:
        wide = np.full((len(values), len(place)), np.nan)
        wide[:, columns] = values
        return wide

    known = over_all(log10_p) >= -np.log10(concept_terms.WEAK)
    orders = {
        "attribution": deletion.ranked(over_all(scores)),
        "DGE": deletion.ranked(np.abs(over_all(fold)), known),
    }
    return deletion.curves(
        subject.model, dictionary, subject.adata, pairs, orders, seed=seed,
        options=_options(subject),
    )  # fmt: skip


def _options(subject: Subject) -> dict[str, Any]:
    return {"layers": subject.layer, **subject.options}


def _long(names: Sequence[str], subject: Subject, **tables: np.ndarray) -> pd.DataFrame:
    """One row per feature and gene from tables [features, genes]."""
    rows = {
        "feature": np.repeat(np.asarray(names, object), len(subject.genes)),
        "gene": np.tile(subject.expression.genes, len(names)),
    }
    return pd.DataFrame(rows | {name: table.ravel() for name, table in tables.items()})


def differences(
    subject: Subject, z: sparse.csr_matrix, names: Sequence[str], most: int = GROUP
) -> pd.DataFrame:
    """DGE of appendix C, of every column of z: at most 1000 top cells against as many silent ones
    nearest to them. One row per feature and gene; NaN without both groups."""
    high, active = groups.top_n(z, most)
    low = groups.nearest_silent(subject.x, high, active, most)
    found = differential.welch(subject.expression.x, high, low=low)
    table = _long(
        names, subject, t=found.t, log2_fold_change=found.log2_fold_change,
        log10_p=-np.log10(np.maximum(found.p, 1e-320)),
    )  # fmt: skip
    return table.astype({"feature": "category", "gene": "category"})


def enriched(
    scores: np.ndarray, subject: Subject, names: Sequence[str], *, score_type: str,
    permutations: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """Prerank GSEA of every feature's genes: one row per feature and term.

    Genes without a score (NaN) have a score of 0, at which they carry no weight.
    """
    found = gsea.prerank(
        np.nan_to_num(np.round(scores.astype(np.float64), 9)), subject.sets.membership,
        n_permutations=permutations, score_type=score_type, seed=seed, progress=True,
    )  # fmt: skip
    n_terms = len(subject.sets.names)
    return pd.DataFrame(
        {
            "feature": np.repeat(np.asarray(names, object), n_terms),
            "term": np.tile(np.asarray(subject.sets.names, object), len(names)),
            **{name: getattr(found, name).ravel() for name in ("es", "nes", "p", "q")},
        }
    ).astype({"feature": "category", "term": "category"})


def best_terms(table: pd.DataFrame) -> pd.DataFrame:
    """Of each feature (index) the term of the smallest p, then the largest NES; its strength."""
    size = table["nes"].abs()
    ordered = table.assign(size=size).sort_values(["p", "size"], ascending=[True, False])
    first = ordered.dropna(subset="p").groupby("feature", observed=False).first()
    first["strength"] = concept_terms.strengths(first["p"].to_numpy(np.float64)[:, None])
    first["least_q"] = table.groupby("feature", observed=False)["q"].min()
    return first[["term", "nes", "p", "q", "strength", "least_q"]]


def tested_terms(table: pd.DataFrame) -> int:
    """How many terms have a p in some list."""
    return int(table.loc[table["p"].notna(), "term"].nunique())


def strengths(groups: dict[str, tuple[pd.DataFrame, str]], n_terms: dict[str, int]) -> pd.DataFrame:
    """Shares of strong and weak annotations of groups of features, and what they are worth.

    The smallest of many p is small: `chance` is the share with one of p <= 5e-3 if every one of the
    terms were independent and nothing was there; `q` the share with a term of q <= .05 over the
    terms of the feature. Features without any p, since no cells could be compared, are left out.
    """
    rows = {}
    for name, (table, method) in groups.items():
        known = table[table[f"{method}:p"].notna()]
        if known.empty:
            continue
        rows[name] = concept_terms.shares({name: known[f"{method}:strength"]}).loc[name].to_dict()
        rows[name] |= {
            "terms": n_terms[method], "chance": 1 - (1 - concept_terms.WEAK) ** n_terms[method],
            "q": float((known[f"{method}:least_q"] <= 0.05).mean()),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("kind")


def wide(table: pd.DataFrame, value: str, names: Sequence[str]) -> np.ndarray:
    """A column of a long table, whose features are in order, as [features, terms or genes]."""
    return table[value].to_numpy(np.float64).reshape(len(names), -1)


def compared(
    tables: dict[str, pd.DataFrame], attribution: np.ndarray, fold: np.ndarray, subject: Subject,
    names: Sequence[str],
) -> pd.DataFrame:  # fmt: skip
    """Table 6's quantities of every concept, from the two GSEAs at p <= 5e-3."""
    found = {m: wide(tables[m], "p", names) <= concept_terms.WEAK for m in METHODS}
    table = concept_terms.compare(found, subject.sets.membership, fold, attribution)
    return table.assign(feature=list(names))


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
    adata = anndata.AnnData(subject.expression.x, obs=pd.DataFrame(index=subject.adata.obs_names))
    adata.var_names = subject.expression.genes.astype(str)
    try:
        found, genes = probes.cell_cycle(adata, seed=seed)
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
    *,
    per_class: tuple[int, int],
    seed: int,
    max_iter: int = 50,
) -> tuple[pd.DataFrame, dict[str, probes.Probe], probes.Split]:
    """Logistic regression of labels on everything, balanced classes, tested on other cells.

    As in the paper the cells tested may be among those that the dictionary was trained on, without
    their labels; so may those of every other method.
    """
    split = probes.split(labels, *per_class, seed=seed)
    learned, tested = split.train, split.test
    names = labels.astype(object).to_numpy()
    table, found = baselines.compare(
        coders, subject.x[learned], subject.x[tested], names[learned], names[tested],
        subject.expression.x[learned], subject.expression.x[tested], max_iter=max_iter,
    )  # fmt: skip
    return table, found, split


def speaking(probe: probes.Probe, found: Any, genes: Sequence[str]) -> pd.DataFrame:
    """The concepts of the largest coefficients of each class, with the genes attributed to them."""
    table = probes.top_features(probe)
    place = {latent: i for i, latent in enumerate(found.latents)}
    tops = [found.attribution[place[f]] if f in place else None for f in table["feature"]]
    table["top_genes"] = [
        "" if row is None else ", ".join(str(genes[g]) for g in np.argsort(-row)[:10] if row[g] > 0)
        for row in tops
    ]
    return table.assign(feature=[f"concept_{f}" for f in table["feature"]])


def causal_tests(
    subject: Subject, dictionary: sae_jax.Dictionary, concepts: np.ndarray, seed: int
) -> dict[str, Callable[[], pd.DataFrame]]:
    """Stages, to be made: `fidelity` of the reconstruction and `causal`, each concept ablated."""
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(subject.adata.n_obs)[:CAUSAL_CELLS])
    site = causal.Site(
        subject.model, subject.adata[some].copy(), subject.layer, outputs=_outputs(subject.model),
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


def _outputs(model: Any) -> list[str]:
    """Those that have one row a cell."""
    return [name for name, of in model.outputs.items() if of == "cell"]

"""The stages of explaining concepts: one function each, arrays and tables in, a table out.

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
    cells,
    characterisation,
    concept_terms,
    deletion,
    differential,
    features,
    groups,
    gsea,
)
from analysis.gene_sets import GeneSets
from experiments import folders, run_folder
from sae_jax import InputError, data, files
from sae_jax.errors import counted

VALIDATION = 0.1  # Claye: trained on nine tenths of the cells
FEWEST = 16  # cells of a batch
GROUP = 1000  # cells on each side of differential expression, at most
IMPORTANT = 0.05  # attribution beyond which a gene counts
METHODS = ("attribution", "dge")
ENOUGH = 100  # active cells; with fewer the paper has "not enough data"
FEW = 10  # active cells; with fewer, labels, genes and terms are of single cells
SIZES = {f"{ENOUGH} or more": (ENOUGH, np.inf), f"fewer than {FEW}": (0, FEW)}
SAMPLED = 1000  # genes of a feature whose single samples are kept, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """Cells, and what a model makes of them.

    Attributes:
      adata: the cells; the model's expression is there, in memory or in a file.
      model: a reader of `extract`, or None where its weights are not there; `layer`, `options` (of
        `model.embed`) say what is embedded. model_name: also known then.
      x: the embedding [cells, d].
      expression: ln(1 + counts per ten thousand) [cells, genes], of the genes that the model knows
        and that were measured, by symbol; in blocks where it stays in its file.
      genes: the same in the model's names.
      exchanged: all genes that attribution exchanges, in its order; without a model unused.
      labels: columns of obs that describe cells.
      sets: over the genes of `expression`.
    """

    adata: anndata.AnnData
    model: Any
    model_name: str
    layer: Any
    options: dict[str, Any]
    x: np.ndarray
    expression: cells.Expression
    genes: np.ndarray
    exchanged: list[str]
    labels: pd.DataFrame
    sets: GeneSets


def kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table of a stage: read if an earlier run left it whole, else made and written; one with
    rows of features lies in groups of them."""
    if not folders.readable(path):
        table = make()
        if "feature" in table and table["feature"].dtype == "category":
            run_folder.write_by_feature(path, table)
        else:
            files.write_parquet(path, table)
    return files.read_parquet(path)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    with files.write_aside(path) as fresh:
        table.to_csv(fresh, index=False)


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

    Raises:
      InputError: fewer cells than a batch, or a rate or share that cannot be.
    """
    if rows < FEWEST:
        raise InputError(f"{counted(rows, 'cell')} to train on: at least {FEWEST} are needed")
    return [
        sae_jax.SAEConfig.preset(
            "claye", d_in=d_in, n_latents=c, k=max(1, round(k_share * c)), seed=seed,
            learning_rate=learning_rate, batch_size=max(FEWEST, min(1024, rows // 16)),
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


def telling(z: sparse.csr_matrix, labels: pd.DataFrame) -> np.ndarray:
    """The features that tell a label of some column best, each once; in the order of the labels."""
    best = [features.telling(z, column)["feature"] for _, column in labels.items()]
    return pd.unique(np.concatenate(best))


def attributed(
    subject: Subject, groups: dict[str, tuple[Any, np.ndarray, list[str]]], folder: Path,
    **samples: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Counterfactual attribution: one row per feature and gene of the subject; and single samples.

    Args:
      groups: coder, its latents and their names, of concepts and of neurons.
      folder: where finished blocks are kept.
      samples: `prototypes` and `counterfactuals`.

    Returns:
      The means; and what they are means of, as `single_samples` has it.
    """
    columns = places(subject)
    tables, singles = [], []
    for kind, (coder, latents, names) in groups.items():
        found = attribution.attribute(
            subject.model, coder, subject.adata, latents, embedding=subject.x,
            options=_options(subject), folder=folder / kind, samples=True, **samples,
        )  # fmt: skip
        logging.info("attribution, %s: %s", kind, found.forwards)
        tables.append(_long(names, subject, attribution=found.scores[:, columns]))
        singles.append(single_samples(found, columns, names, subject.expression.genes))
    tables, singles = pd.concat(tables, ignore_index=True), pd.concat(singles, ignore_index=True)
    text = {"feature": "category", "gene": "category"}
    return tables.astype(text), singles.astype(text)


def places(subject: Subject) -> np.ndarray:
    """Where the subject's genes are among those that attribution exchanges."""
    place = {gene: i for i, gene in enumerate(subject.exchanged)}
    return np.array([place[gene] for gene in subject.genes])


def single_samples(
    found: attribution.Attribution, columns: np.ndarray, names: Sequence[str], genes: np.ndarray
) -> pd.DataFrame:
    """The attributions of single pairs of cells: feature, prototype, counterfactual (positions of
    cells), gene, attribution; those that are not 0, in the order of features and of pairs.

    Of a feature they are of the genes with the largest single ones, `SAMPLED` at most: another gene
    has none at all, though its mean may differ from 0.
    """
    samples = sparse.csr_array(found.samples[:, columns])
    samples.eliminate_zeros()
    parts = []
    for i in range(len(names)):
        rows = np.flatnonzero(found.pairs.concept == i)
        own = samples[rows].tocoo()
        largest = np.zeros(samples.shape[1])
        np.maximum.at(largest, own.col, np.abs(own.data))
        kept = np.isin(own.col, np.argsort(-largest, kind="stable")[:SAMPLED])
        pair, gene, value = rows[own.row[kept]], own.col[kept], own.data[kept]
        parts.append(
            pd.DataFrame(
                {
                    "feature": names[i],
                    "prototype": found.pairs.prototype[pair].astype(np.int32),
                    "counterfactual": found.pairs.counterfactual[pair].astype(np.int32),
                    "gene": genes[gene],
                    "attribution": value.astype(np.float32),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def deleted(
    subject: Subject, dictionary: sae_jax.Dictionary, latents: np.ndarray, scores: np.ndarray,
    fold: np.ndarray, log10_p: np.ndarray, seed: int, *, prototypes: int, counterfactuals: int,
    beyond: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Figure 8: what is left of an activation as genes are exchanged, by attribution, by |log2 fold
    change| (of genes with p <= 5e-3), at random.

    The cells are as many prototypes, after the first `beyond` of each concept: those are what the
    attribution was computed on. A concept of no more active cells is not in the table then.
    """
    pairs = attribution.find_pairs(
        subject.model, dictionary, subject.adata, latents, embedding=subject.x,
        options=_options(subject), prototypes=prototypes + beyond, counterfactuals=counterfactuals,
    )  # fmt: skip
    if beyond:
        pairs = deletion.held_out(pairs, beyond)
        if not pairs.cells.size:
            return pd.DataFrame(columns=["kind", "order", "concept", "n_genes", "activation"])
    columns = places(subject)

    def over_all(values: np.ndarray) -> np.ndarray:
        wide = np.full((len(values), len(subject.exchanged)), np.nan)
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
    subject: Subject, z: sparse.csr_matrix, names: Sequence[str], memory_bytes: int,
    most: int = GROUP,
) -> pd.DataFrame:  # fmt: skip
    """DGE of appendix C, of every column of z: at most 1000 top cells against as many silent ones
    nearest to them. One row per feature and gene; NaN without both groups. `memory_bytes`: as of
    `differential.welch`."""
    high, active = groups.top_n(z, most)
    low = groups.nearest_silent(subject.x, high, active, most)
    found = differential.welch(subject.expression.x, high, low=low, memory_bytes=memory_bytes)
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
    terms of the feature. Features without any p, since no cells could be compared, are left out and
    counted, `untested`; `few_cells` of the others are active in fewer than `FEW` cells.
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
            "few_cells": int((known["n_active"] < FEW).sum()),
            "untested": len(table) - len(known),
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

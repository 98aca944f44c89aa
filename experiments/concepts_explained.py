"""Every concept, and every neuron, one by one: cells, stability, genes, terms, deletion curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import sae_jax
from analysis import concept_terms, stability
from analysis.neurons import Neurons
from experiments import concepts_study as study
from experiments import folders, replicates, run_folder
from experiments import inputs as reading
from experiments.concepts_study import Subject
from sae_jax import files

FLAGS = flags.FLAGS

CURVES = {"deletion": 0, "deletion_held_out": 1}  # times the prototypes, those that come before
NAMED_Q = 0.05  # of a feature's best term by attribution, for it to count as named


@dataclasses.dataclass(frozen=True, eq=False)
class Explained:
    """Concepts and neurons, and what was found of each.

    Attributes:
      features: one row a concept or neuron (index: names): `kind`, cells, labels, genes, terms.
      z: activations of the same [cells, features], and `decoder` [features, d].
      latents: of the attributed concepts, in the order of the tables.
      concepts, neurons: names of the attributed ones.
      telling: names of the concepts that tell a label best, drawn or not.
      attribution: [concepts then neurons, genes of the subject]; None without a model.
      dge: the same of log2 fold changes, of the concepts alone.
      strengths, table_6, deletion, held_out: tables, of concepts drawn at random but for the last
        two, the curves of the prototypes that attribution took and of the next ones. Without a
        model the last three have no rows.
      stability: of all concepts of all seeds; None of one seed.
    """

    features: pd.DataFrame
    z: sparse.csr_matrix
    decoder: np.ndarray
    latents: np.ndarray
    concepts: list[str]
    neurons: list[str]
    telling: list[str]
    attribution: np.ndarray | None
    dge: np.ndarray
    strengths: pd.DataFrame
    table_6: pd.DataFrame
    deletion: pd.DataFrame
    held_out: pd.DataFrame
    stability: pd.DataFrame | None

    @property
    def method(self) -> str:
        """Whose genes and terms speak for a concept: "attribution", or "dge" without a model."""
        return "dge" if self.attribution is None else "attribution"


def explain(
    subject: Subject, run: sae_jax.Run, members: list[int], train: np.ndarray, out: Path
) -> Explained:
    """Cells, genes, terms, stability and deletion curves of concepts and of neurons."""
    dictionary, x = run.dictionaries[members[0]], subject.x
    z = dictionary.encode(x, sparse=True)
    live = np.flatnonzero(z[train].getnnz(axis=0))
    cells_of = study.described(z[:, live], subject.labels).assign(kind="concept", latent=live)
    cells_of.index = [f"concept_{i}" for i in live]
    rng = np.random.default_rng(FLAGS.seed)
    drawn = rng.permutation(live)[: FLAGS.most]
    best = live[study.telling(z[:, live], subject.labels)]
    latents, telling = np.union1d(drawn, best), [f"concept_{i}" for i in best]
    neurons = Neurons.of(x)
    sides = np.sort(rng.permutation(neurons.n_components)[: FLAGS.most])
    groups = {
        "concepts": (dictionary, latents, [f"concept_{i}" for i in latents]),
        "neurons": (neurons, sides, [neurons.names()[i] for i in sides]),
    }
    names = {kind: name for kind, (_, _, name) in groups.items()}
    every = [*names["concepts"], *names["neurons"]]
    logging.info("%d live concepts, %d of them attributed; %d neurons", len(live), len(latents),
                 len(sides))  # fmt: skip

    # Cells: all live concepts, and the neurons attributed.
    codes = neurons.encode(x, sparse=True)[:, sides]
    sides_of = study.described(codes, subject.labels).assign(kind="neuron", latent=sides)
    table = pd.concat([cells_of, sides_of.set_axis(names["neurons"])])
    table["drawn"] = table.index.isin([*(f"concept_{i}" for i in drawn), *names["neurons"]])
    again = None
    if len(members) > 1:
        some = [run.dictionaries[member] for member in members]
        again = replicates.replicated(some, x, out, FLAGS.seed, agreed=FLAGS.consensus)
        own = replicates.scores(again, live)
        table.loc[cells_of.index, list(own)] = own.to_numpy()

    # Genes.
    scores = None
    if subject.model is not None:
        attributed = attribution_kept(subject, groups, out)
        scores = study.wide(attributed, "attribution", every)
        describe_genes(table, every, scores, subject)
    dge = study.kept(
        out / "dge.parquet",
        lambda: study.differences(
            subject, z[:, latents], names["concepts"], reading.memory_bytes()
        ),
    )
    fold = study.wide(dge, "log2_fold_change", names["concepts"])
    if scores is None:
        describe_genes(table, names["concepts"], study.wide(dge, "t", names["concepts"]), subject)

    # Terms.
    terms = terms_kept(subject, scores, fold, every, names["concepts"], out)
    for method, found in terms.items():
        best = study.best_terms(found)
        for column in best:
            table.loc[best.index, f"{method}:{column}"] = best[column]
    at_random = table.loc[names["concepts"]].query("drawn")
    strengths = strengths_of(at_random, table.loc[names["neurons"]], terms)
    files.write_parquet(out / "features.parquet", table.rename_axis("feature").reset_index())
    study.write_csv(strengths.reset_index(), out / "strengths.csv")
    table_6, curves = pd.DataFrame(), {name: pd.DataFrame() for name in CURVES}
    if scores is not None:
        own = scores[: len(latents)]
        first = terms | {"attribution": terms["attribution"].iloc[: len(terms["dge"])]}
        compared = study.compared(first, own, fold, subject, names["concepts"])
        table_6 = concept_terms.table_6(compared[compared["feature"].isin(at_random.index)])
        study.write_csv(table_6.rename_axis("quantity").reset_index(), out / "table_6.csv")
        p = study.wide(dge, "log10_p", names["concepts"])
        curves = {
            name: study.kept(
                out / f"{name}.parquet",
                lambda beyond=beyond: study.deleted(
                    subject, dictionary, latents, own, fold, p, FLAGS.seed,
                    beyond=beyond * FLAGS.prototypes, **samples(),
                ),
            )
            for name, beyond in CURVES.items()
        }  # fmt: skip
    decoder = np.concatenate([stability.directions(dictionary)[live], neurons.decoder[sides]])
    return Explained(
        table, sparse.hstack([z[:, live], codes], "csr"), decoder, latents, names["concepts"],
        names["neurons"], telling, scores, fold, strengths, table_6, *curves.values(), again,
    )  # fmt: skip


def strengths_of(
    concepts: pd.DataFrame, neurons: pd.DataFrame, terms: dict[str, pd.DataFrame]
) -> pd.DataFrame:
    """Strong and weak annotations of concepts, of the frequent and the rare of them, of neurons;
    and by differential expression."""
    of = {}
    if "attribution" in terms:
        of["concepts, attribution"] = (concepts, "attribution")
        for told, (least, below) in study.SIZES.items():
            some = (concepts["n_active"] >= least) & (concepts["n_active"] < below)
            of[f"of these with {told} cells"] = (concepts[some], "attribution")
        of["neurons, attribution"] = (neurons, "attribution")
    of["concepts, DGE"] = (concepts, "dge")
    return study.strengths(of, {name: study.tested_terms(found) for name, found in terms.items()})


def attribution_kept(
    subject: Subject, groups: dict[str, tuple[Any, np.ndarray, list[str]]], out: Path
) -> pd.DataFrame:
    """The table of attributions; with it are written those of single pairs of cells."""
    paths = [out / "attribution.parquet", out / "samples.parquet"]
    if not all(map(folders.readable, paths)):
        tables = study.attributed(subject, groups, out / "attribution", **samples())
        for path, table in zip(paths, tables, strict=True):
            run_folder.write_by_feature(path, table)
    return files.read_parquet(paths[0])


def describe_genes(
    table: pd.DataFrame, names: list[str], scores: np.ndarray, subject: Subject
) -> None:
    """Add the ten best genes; and of attributions the number of important ones, and the share of
    these in no term."""
    symbols = subject.expression.genes
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    top = [", ".join(symbols[g] for g in row if scores[i, g] > 0) for i, row in enumerate(order)]
    table["top_genes"] = pd.Series(top, index=names, dtype=object)
    if subject.model is None:
        return
    without = np.isnan(scores).all(axis=1)  # no cell has the concept, or all have
    important = scores > study.IMPORTANT
    table.loc[names, "n_important"] = np.where(without, np.nan, important.sum(axis=1))
    table.loc[names, "in_no_term"] = concept_terms.share_in_no_term(
        important, subject.sets.membership
    )


def terms_kept(
    subject: Subject, scores: np.ndarray | None, fold: np.ndarray, every: list[str],
    concepts: list[str], out: Path,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """GSEA of attributed genes, of all that have some; and of fold changes, of concepts."""
    settings = {"permutations": FLAGS.permutations, "seed": FLAGS.seed}
    found = {}
    if scores is not None:
        found["attribution"] = study.kept(
            out / "gsea_attribution.parquet",
            lambda: study.enriched(scores, subject, every, score_type="pos", **settings),
        )
    found["dge"] = study.kept(
        out / "gsea_dge.parquet",
        lambda: study.enriched(fold, subject, concepts, score_type="std", **settings),
    )
    return found


def samples() -> dict[str, int]:
    """How many cells attribution takes of each kind."""
    return {"prototypes": FLAGS.prototypes, "counterfactuals": FLAGS.counterfactuals}


def write_for_browsing(
    subject: Subject, dictionary: sae_jax.Dictionary, found: Explained, settings: dict[str, Any],
    out: Path,
) -> np.ndarray:  # fmt: skip
    """features.h5ad and the gene sets; returns the map of the cells that figures are drawn on."""
    table = found.features
    concepts = table[table["kind"] == "concept"]
    by = found.method
    tested = concepts[f"{by}:p"].dropna().index
    named = (concepts.loc[tested, f"{by}:least_q"] <= NAMED_Q).sum()
    about = run_folder.about(
        "concepts", dictionary, subject.x, model=subject.model_name, layer=str(subject.layer),
        n_live=len(concepts), n_studied=len(found.concepts), n_testable=len(tested),
        n_named=int(named), share_named=float(named / len(tested)) if len(tested) else None,
        named_by=f"a term of q <= {NAMED_Q:g} by GSEA ({by}), of those tested",
    )  # fmt: skip
    own = run_folder.cell_maps(out, subject.x)
    theirs = run_folder.input_maps(settings["h5ad"], subject.adata.obs_names)
    obs = subject.adata.obs
    obs = obs[[*subject.labels, *obs.columns.difference(subject.labels.columns, sort=False)]]
    run_folder.write_features(
        out / "features.h5ad", "concepts", found.z, obs, table, decoder=found.decoder,
        maps=own | theirs, about=about, settings=settings,
    )  # fmt: skip
    run_folder.write_gene_sets(out / "gene_sets.parquet", subject.sets, subject.expression.genes)
    return next(iter(own.values()))

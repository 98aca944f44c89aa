"""What the lens writes of every feature: its row, its place on the map, all its genes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse
from tqdm import tqdm

import sae_jax
from analysis import (
    blocks,
    characterisation,
    differential,
    feature_space,
    groups,
    lens,
    stability,
)
from experiments import folders, run_folder
from experiments.inputs import Inputs, memory_bytes
from sae_jax import files
from sae_jax.errors import counted
from sae_jax.reading import check_file, reading

FLAGS = flags.FLAGS

COUNTS = ("n_high", "n_low", "n_relevant", "testable", "paper_annotated")  # in named.npz


def read_named(out: Path) -> tuple[sparse.csr_array, list[str]]:
    """Which term names which feature, bool [features, terms], and the terms."""
    with reading(out / "named.npz"), np.load(check_file(out / "named.npz")) as stored:
        found = dict(stored)
        ones = np.ones(len(found["indices"]), bool)
        matrix = sparse.csr_array((ones, found["indices"], found["indptr"]), shape=found["shape"])
        matrix.check_format(full_check=True)  # SciPy would follow a wild index out of memory
        return matrix, found["terms"].tolist()


def read_counts(out: Path) -> pd.DataFrame:
    """`COUNTS` of every feature: numbers, and two yes or no."""
    stored = np.load(out / "named.npz")["counts"]
    return pd.DataFrame(stored, columns=list(COUNTS)).astype(dict.fromkeys(COUNTS[3:], bool))


def describe(
    z: sparse.csr_matrix,
    live: np.ndarray,
    inputs: Inputs,
    technical: pd.DataFrame,
    numeric: pd.DataFrame,
    annotated: feature_space.FeatureTerms,
    again: pd.DataFrame | None,
    out: Path,
) -> pd.DataFrame:
    """One row a live feature, by name; written. `again` says how often each comes back."""
    names = lens.feature_names(live)
    table = characterisation.summary(z, inputs.labels, technical).set_index(names)
    table.insert(0, "latent", live)
    if again is not None:
        table[again.columns] = again.to_numpy()
    counts = read_counts(out)
    table = table.join(counts.set_index(names))
    if numeric.shape[1]:
        compare_numbers(z, numeric, table)
    table["n_terms"] = np.diff(annotated.matrix.indptr)
    best = files.read_parquet(out / "top_terms.parquet")
    for side, column in {"up": "best_term", "down": "best_term_down"}.items():
        first = best[best["named"] & (best["side"] == side)].drop_duplicates("feature")
        first = first.set_index("feature").reindex(names)
        table[column] = first["term"].to_numpy()
        table[f"{column}_auc"] = first["auc"].to_numpy()
        table[f"{column}_log10_q"] = first["log10_q"].to_numpy()
    genes = files.read_parquet(out / "genes.parquet")
    up = genes[genes["t"] > 0].groupby("feature", sort=False)["gene"]
    table["top_genes"] = up.agg(lambda some: ", ".join(some[:10])).reindex(names).to_numpy()
    table.index.name = "feature"
    for column in table.select_dtypes(object):
        table[column] = pd.Categorical(table[column])
    files.write_parquet(out / "features.parquet", table.reset_index())
    frequencies = feature_space.term_frequencies(annotated, table.get("kind_text"))
    write_csv(frequencies.reset_index(), out / "terms.csv")
    return table


def compare_numbers(z: sparse.csr_matrix, numeric: pd.DataFrame, table: pd.DataFrame) -> None:
    """Add, for each column of --numeric, its mean in high and in silent cells with eq. 8's alpha,
    and the feature's trend along it."""
    high, active = groups.top_cells(z, FLAGS.percentile)
    values = numeric.to_numpy(np.float64, na_value=np.nan)
    found = characterisation.compare(values, high, active=active)
    for i, name in enumerate(numeric):
        table[f"{name}_high"], table[f"{name}_low"] = found.mean_high[:, i], found.mean_low[:, i]
        table[f"{name}_alpha"] = found.alpha[:, i]
        along = characterisation.trend(z, values[:, i])
        table[f"{name}_rho"], table[f"{name}_q"] = along["rho"].to_numpy(), along["q"].to_numpy()


def space(
    annotated: feature_space.FeatureTerms, table: pd.DataFrame, out: Path
) -> np.ndarray | None:
    """The map of the features by their terms [features, 2], where enough have any."""
    if len(annotated.annotated()) <= 10:
        some = counted(len(annotated.annotated()), "feature")
        logging.info("%s with terms: too few for a map", some)
        return None
    stored = out / "feature_space.parquet"
    if folders.readable(stored):
        return files.read_parquet(stored)[["umap_1", "umap_2"]].to_numpy()
    coordinates = feature_space.plane(annotated, seed=FLAGS.seed)
    frame = pd.DataFrame(coordinates, columns=["umap_1", "umap_2"])
    frame.insert(0, "feature", table.index)
    files.write_parquet(stored, frame)
    return coordinates


def write_for_browsing(
    z: sparse.csr_matrix,
    dictionary: sae_jax.Dictionary,
    inputs: Inputs,
    table: pd.DataFrame,
    out: Path,
) -> None:
    """features.h5ad and the gene sets."""
    testable, named = table["testable"], table["n_terms"] > 0
    about = run_folder.about(
        "lens", dictionary, inputs.embedding, embedding=FLAGS.embedding or "PCA",
        n_live=len(table), n_testable=int(testable.sum()), n_named=int(named.sum()),
        share_named=float(named.sum() / testable.sum()) if testable.any() else None,
        named_by="a term of q < .05 by both tests of the lens, of the testable features",
    )  # fmt: skip
    path = inputs.settings["h5ad"]
    maps = run_folder.cell_maps(out, inputs.embedding)
    maps |= run_folder.input_maps(path, inputs.obs.index)
    run_folder.write_features(
        out / "features.h5ad", "lens", z, inputs.obs, table,
        decoder=stability.directions(dictionary)[table["latent"]],
        maps=maps, about=about, settings=inputs.settings,
    )  # fmt: skip
    run_folder.write_gene_sets(out / "gene_sets.parquet", inputs.sets, inputs.expression.genes)


def write_every_gene(
    z: sparse.csr_matrix, live: np.ndarray, inputs: Inputs, rule: lens.Rule, path: Path
) -> None:
    """The long table of all genes: feature, gene, t, log2_fold_change, log10_p (-log10), float32;
    NaN where a gene does not vary or a group has fewer than two cells."""
    found = groups.top_cells(z, rule.percentile)
    prepared = differential.prepare(inputs.expression.x, len(live), memory_bytes(), tested=64)
    names, genes = lens.feature_names(live), inputs.expression.genes

    def parts() -> Iterator[pd.DataFrame]:
        parts = list(blocks.slices(len(names), prepared.tested or 64))
        some = (groups.Groups(found.high[rows], found.active[rows]) for rows in parts)
        tests = prepared.tests(some, rule.pseudocount)
        for rows, test in zip(tqdm(parts, desc="every gene"), tests, strict=True):
            welch = test()
            codes = np.indices(welch.t.shape, np.int32).reshape(2, -1)
            with np.errstate(divide="ignore"):
                log10_p = -np.log10(np.maximum(welch.p, 1e-320))
            columns = {"t": welch.t, "log2_fold_change": welch.log2_fold_change, "log10_p": log10_p}
            part = pd.DataFrame(
                {
                    "feature": pd.Categorical.from_codes(codes[0], names[rows]),
                    "gene": pd.Categorical.from_codes(codes[1], genes),
                    **{name: each.ravel().astype(np.float32) for name, each in columns.items()},
                }
            )
            yield from run_folder.by_features(part)

    run_folder.write_by_feature(path, parts())


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    with files.write_aside(path) as fresh:
        table.to_csv(fresh, index=False)

r"""Feature lens: a dictionary, its cells and gene sets in; every feature annotated out.

    sae-jax lens --h5ad=cells.h5ad --expression_is=counts --embedding=X_scvi \
        --label=cell_type --gene_sets=GO_Biological_Process_2021.gmt --workdir=runs/lens

Schuster's section 5. The dictionary is a saved one (--dictionary), or trained here as in the paper:
vanilla, 10,000 latents, rate 1e-4, batch 128, 500 epochs. For every live feature: activity,
local or global (eq. 8), the label it tells best, technical associations (--technical), genes that
differ between its high cells (above the 99th percentile) and all silent ones, gene sets by six
tests. `change` is the mean change of a term's genes, standardised by what permuted features of like
size have; `matched` compares genes with genes of like expression. Both together name a feature.
Beside the share of features that are named stands what the same pipeline names when there is
nothing to find (nulls.csv).

Each stage leaves its files and is not done again with --resume. Zheng's 3,774 cells, 20 dimensions
-> 10,000 latents, 1,500 GO terms: about 6 minutes on two cores, half of it training.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import sae_jax
from analysis import (
    calibration,
    cells,
    characterisation,
    feature_space,
    gene_sets,
    groups,
    lens,
    nulls,
    ontology,
)
from experiments import cli, feature_lens_figures, feature_lens_page, folders
from experiments import inputs as reading
from experiments.inputs import Inputs
from sae_jax import InputError, data, files, workdir

FLAGS = flags.FLAGS

SETTINGS = "lens.json"  # written first: it tells a folder of ours from anybody's
FILES = {
    "report.html": "the page: everything below, to look at",
    "features.h5ad": "cells x live features; var names them",
    "features.parquet": "one row a live feature",
    "enrichment.parquet": "feature x term: hits, AUC, z, -log10 p and q of every test",
    "top_terms.parquet": "the ten best terms up and down of each feature",
    "genes.parquet": "the fifty genes of each feature that differ most",
    "terms.csv": "how many features each term names",
    "nulls.csv": "the share of features named where there is nothing to find",
    "feature_space.parquet": "a map of the features by their terms",
    "figures": "feature_space, nulls: PNG and PDF",
    "history.parquet": "losses, where the dictionary was trained here",
    "dictionary": "cfg.json, sae_weights.safetensors, where it was trained here",
}
COUNTS = ("n_high", "n_low", "n_relevant", "testable", "paper_annotated")  # in named.npz
ANNOTATION = (
    "enrichment.parquet", "genes.parquet", "top_terms.parquet", "calibration.npz", "named.npz"
)  # fmt: skip
SHOWN = ("top", "words", "highlight", "top_level", "memory_gib")
KEPT = ("training", "calibration.npz", "named.npz")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    reading.define_flags()
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_bool(
        "resume", False, "Continue an earlier run in --workdir, of the same settings."
    )
    flags.DEFINE_string("dictionary", None, "A saved dictionary's folder, instead of training one.")
    flags.DEFINE_integer("n_latents", 10_000, "Of the one trained here.", lower_bound=1)
    flags.DEFINE_float("l1_weight", 1e-3, "Of the same.", 0)
    flags.DEFINE_enum(
        "reduction", "sum", ["sum", "mean"], "Of the same: eq. 3 of the paper, or its code."
    )
    flags.DEFINE_float("learning_rate", 1e-4, "Of the same.", 0)
    flags.DEFINE_integer("epochs", 500, "Of the same.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of training and of everything drawn at random.", 0, 2**31 - 2)
    flags.DEFINE_float("percentile", 99.0, "A cell above it is high.", 0, 99.99)
    flags.DEFINE_string("within", None, "Compare cells of this label of --label only.")
    flags.DEFINE_enum("direction", "both", lens.DIRECTIONS, "Of relevant genes.")
    flags.DEFINE_integer("null_features", 300, "Permuted features for each of six sizes.", 30)
    flags.DEFINE_integer("null_sample", 300, "Features on which each null is run.", 10)
    flags.DEFINE_list("technical", None, "Columns of obs that count as technical: n_counts, batch.")
    flags.DEFINE_list(
        "numeric", None, "Columns of obs to compare between high and silent cells: dose, openness."
    )
    flags.DEFINE_list("words", None, "Words to look for in terms, for the map.")
    flags.DEFINE_list("highlight", None, "Features to mark in the figures: feature_12, ...")
    flags.DEFINE_string("top_level", None, "OBO file whose slim or first level colours the map.")
    flags.DEFINE_integer("top", 20, "Features with a section of their own on the page.", 0)
    flags.DEFINE_float("memory_gib", 4.0, "Tables beyond it go to files.", 0)


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    check_flags()
    out = folders.check_workdir(SETTINGS)
    inputs = reading.read("workdir", gene_sets.MIN_UNIVERSE)
    everything, inputs = inputs, within(inputs)
    rule = lens.Rule(percentile=FLAGS.percentile, direction=FLAGS.direction)
    check_cells(len(inputs.obs), rule)
    technical = columns_of(inputs.obs, "technical")
    numeric = columns_of(inputs.obs, "numeric", numeric=True)
    tops = None if FLAGS.top_level is None else ontology.read_obo(FLAGS.top_level)
    dictionary = None if FLAGS.dictionary is None else sae_jax.Dictionary.load(FLAGS.dictionary)
    if dictionary is not None and dictionary.config.d_in != inputs.embedding.shape[1]:
        raise InputError(
            f"{FLAGS.dictionary} is of {dictionary.config.d_in} dimensions, the embedding of "
            f"{inputs.embedding.shape[1]}"
        )
    z, live = (None, None) if dictionary is None else activations(dictionary, inputs)
    check_highlight(live)
    read = ("gene_sets", "obo", "gene_table", "embedding", "dictionary", "top_level")
    settings = inputs.settings | {
        "contents": folders.contents(
            [inputs.settings["h5ad"], *(FLAGS[name].value for name in read)]
        )
    }
    with workdir.locked(out):
        folders.claim(out, SETTINGS, settings, (*FILES, *KEPT), SHOWN)

        # 2. The dictionary and its features.
        if dictionary is None:
            dictionary = trained(everything, out)
            z, live = activations(dictionary, inputs)
            check_highlight(live)
        logging.info("%d of %d features are live", len(live), dictionary.config.n_latents)

        # 3. Genes and terms of every feature, and the rate of naming by chance.
        if not all(folders.readable(out / name) for name in ANNOTATION):
            annotate(z, live, inputs, rule, out)
        named, terms = read_named(out)
        if not folders.readable(out / "nulls.csv"):
            write_csv(null_rates(dictionary, z, inputs, rule, out), out / "nulls.csv")

        # 4. What each feature is, the map of all, the page.
        annotated = feature_space.feature_terms(named, terms)
        table = describe(z, live, inputs, technical, numeric, annotated, out)
        coordinates = space(annotated, table, out)
        pictures = feature_lens_figures.draw(
            out, x=inputs.embedding, z=z, table=table, labels=inputs.labels, annotated=annotated,
            coordinates=coordinates, history=history(out), words=FLAGS.words or (),
            highlight=FLAGS.highlight or (), top_terms=top_terms(inputs, terms, tops),
            seed=FLAGS.seed,
        )  # fmt: skip
        feature_lens_page.write(out, inputs, table, pictures, FLAGS.top)
    print(f"\n{out}/")
    for name, what in FILES.items():
        if (out / name).exists():
            print(f"  {name:<22} {what}")
    print(
        f"\n{pd.read_csv(out / 'nulls.csv').to_string(index=False, float_format='{:.3f}'.format)}"
    )


def within(inputs: Inputs) -> Inputs:
    """The cells of the label of --within: groups, tests and figures are of these alone, without
    labels; a dictionary is trained on all."""
    if FLAGS.within is None:
        return inputs
    if inputs.labels is None:
        raise InputError("--within names a label: say by --label which column of obs has it")
    chosen = np.flatnonzero(inputs.labels == FLAGS.within)
    if not chosen.size:
        there = ", ".join(inputs.labels.cat.categories[:10])
        raise InputError(f"no cell is labelled --within={FLAGS.within}; there are {there}")
    expression = cells.Expression(inputs.expression.x[chosen], inputs.expression.genes)
    return dataclasses.replace(
        inputs, obs=inputs.obs.iloc[chosen], expression=expression, labels=None,
        embedding=inputs.embedding[chosen],
    )  # fmt: skip


def check_flags() -> None:
    """Refuse numbers that are none."""
    for name in ("l1_weight", "learning_rate", "percentile", "memory_gib"):
        if not math.isfinite(FLAGS[name].value):
            raise InputError(f"--{name}={FLAGS[name].value} must be a finite number")


def check_highlight(live: np.ndarray | None) -> None:
    """Refuse features to mark that are not live (None: not known yet)."""
    names = set() if live is None else set(lens.feature_names(live))
    if names and (missing := [name for name in FLAGS.highlight or [] if name not in names]):
        raise InputError(
            f"--highlight: {', '.join(missing)} is no live feature; one is {min(names)}"
        )


def check_cells(n_cells: int, rule: lens.Rule) -> None:
    """Refuse a percentile above which too few cells lie to name any feature."""
    high = groups.cells_above(n_cells, rule.percentile)
    if high < rule.cells:
        enough = math.floor(100 * (1 - (rule.cells + 1) / n_cells))
        raise InputError(
            f"--percentile={rule.percentile:g} leaves {high} of {n_cells} cells high, and a "
            f"feature of fewer than {rule.cells} is not named: "
            + (f"give --percentile={enough}" if enough > 0 else "these are too few cells")
        )


def columns_of(obs: pd.DataFrame, flag: str, numeric: bool = False) -> pd.DataFrame:
    """The columns of obs that a flag lists."""
    names = FLAGS[flag].value or []
    if missing := [name for name in names if name not in obs]:
        raise InputError(f"--{flag}: obs has no {', '.join(missing)}")
    if numeric and (text := [n for n in names if not pd.api.types.is_numeric_dtype(obs[n])]):
        raise InputError(f"--{flag}: {', '.join(text)} of obs holds no numbers")
    many = [n for n in names if not numeric and obs[n].dtype.kind not in "biuf"
            and obs[n].nunique() > max(2, len(obs) / 2)]  # fmt: skip
    if many:
        raise InputError(f"--{flag}: {', '.join(many)} of obs names cells, not groups of them")
    return obs[names]


def trained(inputs: Inputs, out: Path) -> sae_jax.Dictionary:
    """The paper's dictionary of this embedding; in `out`/dictionary once it is trained."""
    if (out / "dictionary").exists():
        return sae_jax.Dictionary.load(out / "dictionary")
    config = sae_jax.SAEConfig.preset(
        "vanilla", d_in=inputs.embedding.shape[1], n_latents=FLAGS.n_latents,
        l1_weight=FLAGS.l1_weight, learning_rate=FLAGS.learning_rate, reduction=FLAGS.reduction,
        batch_size=min(128, len(inputs.embedding)), seed=FLAGS.seed,
    )  # fmt: skip
    train, validation = data.split(len(inputs.embedding), 0.1, FLAGS.seed)
    began = time.perf_counter()
    run = sae_jax.train(
        [config], inputs.embedding[train], inputs.embedding[validation], epochs=FLAGS.epochs,
        workdir=out / "training", data_seed=FLAGS.seed,
        provenance={"h5ad": inputs.settings["h5ad"], "embedding": FLAGS.embedding or "PCA"},
    )  # fmt: skip
    if run.dictionaries[0] is None:
        raise InputError("the dictionary diverged; lower --learning_rate")
    row = run.results.iloc[0]
    logging.info(
        "trained in %.0f s: validation R2 %.3f, L0 %.1f",
        time.perf_counter() - began, row["validation_r2"], row["validation_l0"],
    )  # fmt: skip
    files.write_parquet(out / "history.parquet", run.history)
    run.dictionaries[0].save(out / "dictionary")
    files.remove(out / "training")
    return run.dictionaries[0]


def activations(
    dictionary: sae_jax.Dictionary, inputs: Inputs
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Of the live features [cells, features], and their latents."""
    z = dictionary.encode(inputs.embedding, sparse=True)
    live = np.flatnonzero(z.getnnz(axis=0))
    if not live.size:
        raise InputError("the dictionary is dead on these cells: no feature is active in any")
    return z[:, live], live


def annotate(
    z: sparse.csr_matrix, live: np.ndarray, inputs: Inputs, rule: lens.Rule, out: Path
) -> None:
    """Every feature against every gene and term; the tables, what was named, the calibration."""
    found, known = lens.annotate(
        z, inputs.expression, inputs.sets, rule, null_features=FLAGS.null_features,
        seed=FLAGS.seed, memory_bytes=int(FLAGS.memory_gib * 2**30),
    )  # fmt: skip
    names = lens.feature_names(live)
    lens.write(found, names, out / "enrichment.parquet", memory_bytes=int(FLAGS.memory_gib * 2**30))
    for name, table in {"genes": found.top, "top_terms": found.best()}.items():
        table = table.assign(feature=names[table["feature"]])
        files.write_parquet(out / f"{name}.parquet", table)
    calibration.save(out / "calibration.npz", known)
    counts = [
        found.n_high, found.n_low, found.n_relevant, found.testable(), found.paper_annotated()
    ]  # fmt: skip
    shares = {"named": found.share_named()}
    shares |= {test: found.share_named(test) for test in found.log_p}
    with files.write_aside(out / "named.npz") as fresh:  # last: it says that all of these are there
        named = sparse.csr_matrix(found.named())
        np.savez(
            fresh, indptr=named.indptr, indices=named.indices, shape=named.shape,
            terms=np.asarray(found.terms, str), counts=np.stack(counts, axis=1).astype(np.int64),
            tests=np.asarray(list(shares)), shares=np.asarray(list(shares.values())),
        )  # fmt: skip


def read_named(out: Path) -> tuple[sparse.csr_array, list[str]]:
    """Which term names which feature, bool [features, terms], and the terms."""
    found = np.load(out / "named.npz")
    ones = np.ones(len(found["indices"]), bool)
    matrix = sparse.csr_array((ones, found["indices"], found["indptr"]), shape=found["shape"])
    return matrix, found["terms"].tolist()


def null_rates(
    dictionary: sae_jax.Dictionary,
    z: sparse.csr_matrix,
    inputs: Inputs,
    rule: lens.Rule,
    out: Path,
) -> pd.DataFrame:
    """Share of testable features that each test names: really, and where there is nothing, or no
    training, behind it. By the calibration of the real run; sets of other genes get their own."""
    known = calibration.load(out / "calibration.npz")
    found = np.load(out / "named.npz")
    rows = [
        {"features": feature_lens_page.REAL}
        | dict(zip(found["tests"], found["shares"], strict=True))
    ]
    rng = np.random.default_rng(FLAGS.seed + 1)
    testable = np.flatnonzero(found["counts"][:, COUNTS.index("testable")])
    some = np.sort(rng.permutation(testable)[: FLAGS.null_sample])
    if not some.size:
        return pd.DataFrame(rows)
    part, x, sets = z[:, some], inputs.embedding, inputs.sets
    density = part.getnnz(axis=0) / part.shape[0]
    fresh = nulls.untrained(dictionary, FLAGS.seed).encode(x, sparse=True)
    fresh = fresh[:, np.flatnonzero(fresh.getnnz(axis=0))[: FLAGS.null_sample]]
    means = np.asarray(inputs.expression.x.mean(axis=0)).ravel()
    cases = {
        feature_lens_page.PERMUTED: (nulls.permuted_cells(part, FLAGS.seed + 1), sets),
        "random gene sets": (part, nulls.random_sets(sets, FLAGS.seed)),
        "genes of like expression": (part, nulls.relabelled_genes(sets, means, FLAGS.seed)),
        "random directions": (nulls.random_directions(x, density, FLAGS.seed), sets),
        "untrained dictionary": (fresh, sets),
        "single dimensions": (nulls.neurons(x), sets),
    }
    for name, (activations, some_sets) in cases.items():
        logging.info("null: %s", name)
        if not activations.nnz:
            continue
        of_terms = {"known": known} if some_sets is sets else {}
        null, _ = lens.annotate(
            activations, inputs.expression, some_sets, rule, null_features=FLAGS.null_features,
            seed=FLAGS.seed + 2, memory_bytes=int(FLAGS.memory_gib * 2**30), progress=False,
            **of_terms,
        )  # fmt: skip
        shares = {test: null.share_named(test) for test in null.log_p}
        rows.append({"features": name, "named": null.share_named()} | shares)
    return pd.DataFrame(rows)


def describe(
    z: sparse.csr_matrix,
    live: np.ndarray,
    inputs: Inputs,
    technical: pd.DataFrame,
    numeric: pd.DataFrame,
    annotated: feature_space.FeatureTerms,
    out: Path,
) -> pd.DataFrame:
    """One row a live feature, by name; written, also as var of the cells' activations."""
    names = lens.feature_names(live)
    table = characterisation.summary(z, inputs.labels, technical).set_index(names)
    table.insert(0, "latent", live)
    stored = np.load(out / "named.npz")
    for i, column in enumerate(COUNTS):
        values = stored["counts"][:, i]
        table[column] = values.astype(bool) if i > 2 else values
    if numeric.shape[1]:
        compare_numbers(z, numeric, table)
    table["n_terms"] = np.diff(annotated.matrix.indptr)
    best = pd.read_parquet(out / "top_terms.parquet")
    for side, column in {"up": "best_term", "down": "best_term_down"}.items():
        first = best[best["named"] & (best["side"] == side)].drop_duplicates("feature")
        first = first.set_index("feature").reindex(names)
        table[column] = first["term"].to_numpy()
        table[f"{column}_auc"] = first["auc"].to_numpy()
        table[f"{column}_log10_q"] = first["log10_q"].to_numpy()
    genes = pd.read_parquet(out / "genes.parquet")
    up = genes[genes["t"] > 0].groupby("feature", sort=False)["gene"]
    table["top_genes"] = up.agg(lambda some: ", ".join(some[:10])).reindex(names).to_numpy()
    table.index.name = "feature"
    for column in table.select_dtypes(object):
        table[column] = pd.Categorical(table[column])
    files.write_parquet(out / "features.parquet", table.reset_index())
    frequencies = feature_space.term_frequencies(annotated, table.get("kind_text"))
    write_csv(frequencies.reset_index(), out / "terms.csv")
    adata = anndata.AnnData(z, obs=inputs.obs, var=table, uns={"lens": json.dumps(inputs.settings)})
    with files.write_aside(out / "features.h5ad") as fresh:
        adata.write_h5ad(fresh, compression="gzip")
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


def top_terms(
    inputs: Inputs, terms: list[str], tops: ontology.Ontology | None
) -> feature_space.FeatureTerms | None:
    """The top-level terms above each term, by the ontology of --top_level.

    A slim's file knows little but its own terms: the others are then placed by their genes, under
    those of the gene sets that are the slim's.
    """
    if tops is None:
        return None
    wanted = tops.slim() if "goslim_generic" in tops.subsets else tops.first_level()
    found = feature_space.top_level(terms, tops, wanted)
    if len(found.annotated()) >= len(terms) / 2:
        return found
    own = [i for i, name in enumerate(terms) if tops.identify(name) in wanted]
    rows = sparse.csr_array(inputs.sets.membership)
    return feature_space.top_level_by_genes(rows, rows[own], [terms[i] for i in own])


def history(out: Path) -> pd.DataFrame | None:
    """The losses of the dictionary's training, if it was trained here."""
    path = out / "history.parquet"
    return pd.read_parquet(path) if path.exists() else None


def space(
    annotated: feature_space.FeatureTerms, table: pd.DataFrame, out: Path
) -> np.ndarray | None:
    """The map of the features by their terms [features, 2], where enough have any."""
    if len(annotated.annotated()) <= 10:
        logging.info("%d features have terms: too few for a map", len(annotated.annotated()))
        return None
    stored = out / "feature_space.parquet"
    if folders.readable(stored):
        return pd.read_parquet(stored)[["umap_1", "umap_2"]].to_numpy()
    coordinates = feature_space.plane(annotated, seed=FLAGS.seed)
    frame = pd.DataFrame(coordinates, columns=["umap_1", "umap_2"])
    frame.insert(0, "feature", table.index)
    files.write_parquet(stored, frame)
    return coordinates


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    with files.write_aside(path) as fresh:
        table.to_csv(fresh, index=False)


if __name__ == "__main__":
    cli.launch(main, define_flags)

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

With --seeds=3 (or, of a saved dictionary, --replicates=B,C) every feature is told in how many other
dictionaries it comes back, and --consensus saves a dictionary of those that do.

With --out_of_core expression stays in its file and is read a block of cells at a time, in passes
over the cells, in --memory_gib, of which the log says what is used; results are the same. Held
beside it are the embedding and the activations (the non-zero ones), obs, and the gene sets. Tables
beyond a quarter of --memory_gib go to a file in TMPDIR.

Each stage leaves its files and is not done again with --resume. Zheng's 3,774 cells, 20 dimensions
-> 10,000 latents, 1,500 GO terms: about 6 minutes on two cores, half of it training.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

from analysis import (
    calibration,
    cells,
    feature_space,
    features,
    gene_sets,
    groups,
    lens,
    ontology,
)
from experiments import (
    cli,
    feature_lens_figures,
    feature_lens_nulls,
    feature_lens_page,
    folders,
    replicates,
    run_folder,
)
from experiments import feature_lens_tables as tables
from experiments import inputs as reading
from experiments.feature_lens_dictionaries import activations, history, saved, trained
from experiments.inputs import Inputs
from sae_jax import InputError, files
from sae_jax.errors import counted

FLAGS = flags.FLAGS

SETTINGS = "lens.json"  # written first: it tells a folder of ours from anybody's
FILES = {
    "report.html": "the page: everything below, to look at",
    "features.h5ad": "cells x live features; var names them",
    "features.parquet": "one row a live feature",
    "enrichment.parquet": "feature x term: hits, AUC, z, -log10 p and q of every test",
    "top_terms.parquet": "the ten best terms up and down of each feature",
    "genes.parquet": "the fifty genes of each feature that differ most",
    "dge.parquet": "all genes of each feature, if --every_gene",
    "gene_sets.parquet": "the terms and their genes, as tested",
    "terms.csv": "how many features each term names",
    "nulls.csv": "the share of features named where there is nothing to find",
    "feature_space.parquet": "a map of the features by their terms",
    "figures": "feature_space, nulls: PNG and PDF",
    "history.parquet": "losses, where the dictionary was trained here",
    "dictionary": "cfg.json, sae_weights.safetensors, where it was trained here",
    "replicates": "those of the other seeds, where they were trained here",
    replicates.FILE: "a row a feature of each dictionary: replication by direction, by activation",
    replicates.CONSENSUS: "the features that most of them have, as one dictionary, if --consensus",
    "manifest.json": "size and SHA-256 of every file",
}
MAYBE = ("feature_space.parquet", "dge.parquet", replicates.FILE, replicates.CONSENSUS,
         "replicates")  # of `FILES`  # fmt: skip
ANNOTATION = (
    "enrichment.parquet", "genes.parquet", "top_terms.parquet", "calibration.npz", "named.npz"
)  # fmt: skip
SHOWN = ("top", "words", "highlight", "top_level", "memory_gib", "out_of_core")
KEPT = ("training", "calibration.npz", "named.npz", run_folder.MAP)


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    reading.define_flags()
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_bool(
        "resume", False, "Continue an earlier run in --workdir, of the same settings."
    )
    flags.DEFINE_string("dictionary", None, "A saved dictionary's folder, instead of training one.")
    flags.DEFINE_list("replicates", None, "Of --dictionary: the folders of its other seeds.")
    flags.DEFINE_integer(
        "seeds",
        1,
        "Dictionaries trained here, of --seed and the next ones, in one program: the "
        "first is described, the others say which of its features come back.",
        1,
    )
    flags.DEFINE_bool("consensus", False, "Also save a dictionary of the features that come back.")
    flags.DEFINE_bool(
        "every_gene",
        False,
        "Also write all genes of each feature, dge.parquet: 20 bytes for "
        "each of them (3 GB of 10,000 features and 16,000 genes).",
    )
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
    reading.define_memory_flags()


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    check_flags()
    out = folders.check_workdir(SETTINGS)
    inputs = reading.read("workdir", gene_sets.MIN_UNIVERSE, reading.block_bytes())
    asked = {key: given for key, given in inputs.settings.items() if key not in folders.IGNORED}
    everything = dataclasses.replace(inputs, settings=asked)
    inputs = within(everything)
    rule = lens.Rule(percentile=FLAGS.percentile, direction=FLAGS.direction)
    check_cells(len(inputs.obs), rule)
    technical = columns_of(inputs.obs, "technical")
    numeric = columns_of(inputs.obs, "numeric", numeric=True)
    tops = None if FLAGS.top_level is None else ontology.read_obo(FLAGS.top_level)
    dictionaries = saved(inputs)
    z, live = activations(dictionaries[0], inputs) if dictionaries else (None, None)
    check_highlight(live)
    check_memory(inputs, FLAGS.n_latents if live is None else len(live))
    read = ("gene_sets", "obo", "gene_table", "embedding", "dictionary")
    paths = [inputs.settings["h5ad"], *(FLAGS[name].value for name in read)]
    settings = inputs.settings | {"contents": folders.contents([*paths, *(FLAGS.replicates or ())])}
    with folders.filled(out, SETTINGS, settings, (*FILES, *KEPT), SHOWN):
        # 2. The dictionary and its features.
        if not dictionaries:
            dictionaries = trained(everything, out)
            files.remove(out / "training")  # a killed run may have left some of it
            z, live = activations(dictionaries[0], inputs)
            check_highlight(live)
        dictionary = dictionaries[0]
        whole = counted(dictionary.config.n_latents, "feature")
        logging.info("live: %s of %s", f"{len(live):,}", whole)
        again = None
        if len(dictionaries) > 1:
            found = replicates.replicated(
                dictionaries, inputs.embedding, out, FLAGS.seed, agreed=FLAGS.consensus
            )
            again = replicates.scores(found, live)

        # 3. Genes and terms of every feature, and the rate of naming by chance.
        if not all(folders.readable(out / name) for name in ANNOTATION):
            annotate(z, live, inputs, rule, out)
        named, terms = tables.read_named(out)
        if not folders.readable(out / "nulls.csv"):
            testable = tables.read_counts(out)["testable"].to_numpy()
            rates = feature_lens_nulls.null_rates(dictionary, z, testable, inputs, rule, out)
            tables.write_csv(rates, out / "nulls.csv")
        if FLAGS.every_gene and not folders.readable(out / "dge.parquet"):
            tables.write_every_gene(z, live, inputs, rule, out / "dge.parquet")

        # 4. What each feature is, the map of all, the page.
        annotated = feature_space.feature_terms(named, terms)
        table = tables.describe(z, live, inputs, technical, numeric, annotated, again, out)
        tables.write_for_browsing(z, dictionary, inputs, table, out)
        coordinates = tables.space(annotated, table, out)
        telling = None if inputs.labels is None else features.telling(z, inputs.labels)
        pictures = feature_lens_figures.draw(
            out, x=inputs.embedding, z=z, table=table, labels=inputs.labels, annotated=annotated,
            coordinates=coordinates, telling=telling, history=history(out), words=FLAGS.words or (),
            highlight=FLAGS.highlight or (), top_terms=top_terms(inputs, terms, tops),
            seed=FLAGS.seed,
        )  # fmt: skip
        feature_lens_page.write(out, inputs, table, telling, pictures, FLAGS.top)
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
    if FLAGS.out_of_core:
        raise InputError("--within takes some cells' expression: give it without --out_of_core")
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
    for name in ("l1_weight", "learning_rate", "percentile"):
        if not math.isfinite(FLAGS[name].value):
            raise InputError(f"--{name}={FLAGS[name].value} must be a finite number")
    if FLAGS.learning_rate == 0:
        raise InputError("--learning_rate=0 must be above 0")
    reading.memory_bytes()


def check_highlight(live: np.ndarray | None) -> None:
    """Refuse features to mark that are not live (None: not known yet)."""
    names = set() if live is None else set(lens.feature_names(live))
    if names and (missing := [name for name in FLAGS.highlight or [] if name not in names]):
        raise InputError(
            f"--highlight: {', '.join(missing)} is no live feature; one is {min(names)}"
        )


def check_memory(inputs: Inputs, n_features: int) -> None:
    """Refuse memory in which so many features, or those of a null, cannot be tested."""
    most = max(n_features, FLAGS.null_sample, inputs.embedding.shape[1])
    try:
        lens.passes(
            inputs.expression, most, len(inputs.sets.names), null_features=FLAGS.null_features,
            memory_bytes=reading.memory_bytes(),
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"--memory_gib={FLAGS.memory_gib:g}: {error}") from None


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


def annotate(
    z: sparse.csr_matrix, live: np.ndarray, inputs: Inputs, rule: lens.Rule, out: Path
) -> None:
    """Every feature against every gene and term; the tables, what was named, the calibration."""
    found, known = lens.annotate(
        z, inputs.expression, inputs.sets, rule, null_features=FLAGS.null_features,
        seed=FLAGS.seed, memory_bytes=reading.memory_bytes(),
    )  # fmt: skip
    names = lens.feature_names(live)
    lens.write(found, names, out / "enrichment.parquet", memory_bytes=reading.memory_bytes())
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


if __name__ == "__main__":
    cli.launch(main, define_flags)

r"""Steering: features raised in cells, and what a model's decoder predicts of it.

    sae-jax steer --dictionary=runs/lens --h5ad=cells.h5ad --expression_is=counts \
        --embedding=X_scvi --decoder=scvi:models/marrow --label=cell_type \
        --stages=HSC,Proerythroblast,Erythroblast,Normoblast --cells=HSC,NK --genes=KLF1,HBB

Schuster 5.2. Candidates are the features that rise along --stages and are higher in the lineage
than elsewhere (A.3.2), the best those that move the first --cells farthest towards the last stage.
Each is raised in each of --cells, to its maximum (the text) or to its mean in the last stage (the
authors' code), and latents before and after go through the decoder in whose space they are. The
error of the dictionary stays in the cells unless --nokeep_error. With --out_of_core expression
stays in its file and is read a block of cells at a time, an eighth of --memory_gib each, beside the
expression of the --most_cells that predictions are compared with. How to read the tests:
`perturbation`. Gene sets are over the decoder's genes. Table S8 lists terms of at most 400 genes.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import extract
import sae_jax
from analysis import cells, chunked, lens, steering
from analysis.cells import Expression
from analysis.chunked import Chunked
from experiments import cli, folders, perturbation, steering_page, verify
from experiments import inputs as reading
from experiments.perturbation import Design, Subject
from sae_jax import InputError, files
from sae_jax.reading import read_object

FLAGS = flags.FLAGS

SETTINGS = "steering.json"
FILES = {
    "report.html": "the page: everything below, to look at",
    "candidates.csv": "features of the rule and those asked for, by their shift to the target",
    "shift.parquet": "one row per experiment and cell: how far it moved",
    "expression.parquet": "experiment x gene: predicted before and after, test, random features",
    "terms.parquet": "experiment x term: three tests of the changed genes",
    "controls.parquet": "experiment x random feature x asked gene: log2 fold change",
    "figures": "candidates, steered, volcano, genes: PNG and PDF",
    "manifest.json": "size and SHA-256 of every file",
}
MISFIT = 0.5  # a decoder whose prediction correlates less with the cells is probably not theirs


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    reading.define_flags()
    reading.define_memory_flags()
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_string("dictionary", None, "A saved dictionary's folder, or a lens run's workdir.")
    flags.DEFINE_string("decoder", None, "MODEL:FOLDER whose latents --embedding holds: scvi:...")
    flags.DEFINE_string(
        "decoder_genes", None, "Its genes' names in order, one a line, if it has none (multidgd)."
    )
    flags.DEFINE_string("batch", None, "Column of obs with the batches that a decoder asks for.")
    flags.DEFINE_string("library", None, "Column of obs with total counts; default: their sums.")
    flags.DEFINE_list("stages", None, "Labels in order, earliest first; the last is the target.")
    flags.DEFINE_list("lineage", None, "Labels compared with all others; default: the stages.")
    flags.DEFINE_list("cells", None, "Labels that are steered; default: the first stage.")
    flags.DEFINE_integer("most_cells", 2000, "Of a label with more, so many are drawn.", 2)
    flags.DEFINE_list("features", None, "Latents to raise; default: the best candidates.")
    flags.DEFINE_integer("top", 3, "How many of these.", lower_bound=1)
    flags.DEFINE_enum("raise", "maximum", steering.RULES, "To what level.")
    flags.DEFINE_float("factor", 1.0, "Multiplies the level.")
    flags.DEFINE_bool("keep_error", True, "Leave in the cells what the dictionary does not hold.")
    flags.DEFINE_integer("controls", 100, "Random features beside each experiment.", 0)
    flags.DEFINE_enum("direction", "both", lens.DIRECTIONS, "Of the changed genes.")
    flags.DEFINE_list("genes", None, "Genes to show, by the names that the gene sets use.")
    flags.DEFINE_integer("seed", 0, "Of the cells and features drawn.", 0, 2**31 - 2)


def main() -> None:
    """Runs the program by its flags."""
    out = folders.check_workdir(SETTINGS)
    design = design_of_flags()
    for name in ("dictionary", "decoder", "embedding", "label"):
        if not FLAGS[name].value:
            raise InputError(f"--{name} is needed")
    model = read_decoder(FLAGS.decoder)
    verify.inputs(FLAGS.dictionary)
    dictionary = sae_jax.Dictionary.load(dictionary_folder(FLAGS.dictionary))
    inputs = reading.read("workdir", block_bytes=reading.block_bytes())
    subject = subject_of(inputs, dictionary, model)
    asked = check_genes(FLAGS.genes or [], subject.genes)
    z = dictionary.encode(subject.x, sparse=True)
    ranked = perturbation.candidates(subject, z, design)
    subject.decode(subject.x[:1], np.arange(1))  # what it has against them is said now
    fit = agreement(subject, inputs.expression, subject.rows(design.cells[0]))
    with folders.filled(out, SETTINGS, inputs.settings, FILES):
        run(subject, design, z, ranked, asked, out, [fit, str(subject.sets.coverage)])
    print(f"\n{out}/")
    for name, what in FILES.items():
        if (out / name).exists():
            print(f"  {name:<22} {what}")


def run(
    subject: Subject, design: Design, z: sparse.csr_matrix, ranked: pd.DataFrame,
    asked: list[str], out: Path, about: list[str],
) -> pd.DataFrame:  # fmt: skip
    """Every experiment of a design; the files of `FILES`.

    Args:
      z: codes [cells, features]. ranked: of `perturbation.candidates`.
      asked: genes to show. about: lines for the page.

    Returns:
      The table of expression.parquet.
    """
    with files.write_aside(out / "candidates.csv") as fresh:
        ranked.to_csv(fresh, index=False)
    live = np.flatnonzero(z.getnnz(axis=0))
    results, others = {}, []
    for label in design.cells:
        for row in ranked[ranked["steered"]].itertuples():
            logging.info("%s: feature %d to %.3g", label, row.feature, row.level)
            found = perturbation.perturb(subject, design, live, row.feature, row.level, label)
            results[label, row.feature] = found
            others.append(
                found.controls[asked]
                .melt(var_name="gene", value_name="log2_fold_change", ignore_index=False)
                .reset_index()
                .assign(cells=label, feature=row.feature)
            )
    tables = {
        name: pd.concat([getattr(found, name) for found in results.values()], ignore_index=True)
        for name in ("shift", "expression", "terms")
    } | {"controls": pd.concat(others, ignore_index=True)}
    # Table S8 marks terms that more than one experiment finds.
    by_term = tables["terms"].groupby(["feature", "term"], observed=True)["specific"]
    tables["terms"]["experiments"] = by_term.transform("sum").astype(np.int64)
    for name, table in tables.items():
        files.write_parquet(out / f"{name}.parquet", table)
    steering_page.write(out, subject, design, z, ranked, tables, results, asked, about)
    return tables["expression"]


def design_of_flags() -> Design:
    """What the flags ask for, as far as flags alone can tell."""
    stages = FLAGS.stages or []
    if len(stages) < 2:
        raise InputError("--stages is needed: at least two labels in order, earliest first")
    if not (math.isfinite(FLAGS.factor) and FLAGS.factor > 0):
        raise InputError(f"--factor={FLAGS.factor} must be a finite number above 0")
    features = None
    if FLAGS.features:
        try:
            features = tuple(int(name.removeprefix("feature_")) for name in FLAGS.features)
        except ValueError:
            raise InputError(f"--features={','.join(FLAGS.features)}: give numbers") from None
    chosen = FLAGS.cells or stages[:1]
    for name, values in {"features": features or (), "cells": chosen}.items():
        if len(set(values)) < len(values):
            raise InputError(f"--{name} holds one twice")
    return Design(
        stages=tuple(stages), cells=tuple(chosen), features=features, top=FLAGS.top,
        lineage=tuple(FLAGS.lineage) if FLAGS.lineage else None, raise_to=FLAGS["raise"].value,
        factor=FLAGS.factor, keep_error=FLAGS.keep_error, most_cells=FLAGS.most_cells,
        controls=FLAGS.controls, direction=FLAGS.direction, seed=FLAGS.seed,
    )  # fmt: skip


def read_decoder(named: str) -> Any:
    """The model of "MODEL:FOLDER"; MODEL may itself be "package.module:Class"."""
    name, _, folder = named.rpartition(":")
    if not (name and folder):
        raise InputError(f"--decoder={named}: give MODEL:FOLDER, scvi:models/marrow for instance")
    options = {}
    if FLAGS.decoder_genes is not None:
        try:
            options["genes"] = Path(FLAGS.decoder_genes).read_text().split()
        except (OSError, ValueError) as error:
            raise InputError(f"--decoder_genes cannot be read: {error}") from None
    model = extract.load_model(name, folder, **options)
    if not hasattr(model, "decode"):
        raise InputError(f"--decoder: {name} has no decoder; scvi and multidgd have one")
    if not len(model.genes):
        raise InputError(f"{folder} does not name its genes: give --decoder_genes")
    return model


def dictionary_folder(path: str) -> Path:
    """Where a dictionary lies: here, or where the lens that ran here has it from."""
    folder = Path(path)
    if (folder / "dictionary").is_dir() or not (folder / "lens.json").is_file():
        return folder / "dictionary" if (folder / "dictionary").is_dir() else folder
    named = read_object(folder / "lens.json").get("dictionary")
    if not isinstance(named, str):
        raise InputError(f"{folder / 'lens.json'} is of a lens run that has no dictionary yet")
    return Path(named)


def subject_of(inputs: reading.Inputs, dictionary: sae_jax.Dictionary, model: Any) -> Subject:
    """Cells, dictionary and decoder, which must fit each other."""
    widths = {dictionary.config.d_in, inputs.embedding.shape[1], model.d_model}
    if len(widths) > 1:
        raise InputError(
            f"--dictionary is of {dictionary.config.d_in} dimensions, --embedding of "
            f"{inputs.embedding.shape[1]}, the decoder's latents of {model.d_model}"
        )
    # The file again: its genes' names and counts, which the log expression has not.
    path, source = (inputs.settings[name] for name in ("h5ad", "expression"))
    adata = cells.annotations(path) if FLAGS.out_of_core else cells.read(path)
    counts, var, _ = cells.stored(
        path if FLAGS.out_of_core else adata, source,
        memory_bytes=reading.block_bytes() or chunked.BLOCK_BYTES,
    )  # fmt: skip
    batch = FLAGS.batch or getattr(model, "batch_key", None)
    if batch is not None and batch not in adata.obs:
        raise InputError(f"obs has no column {batch!r}, the batches that the decoder asks for")
    genes = gene_names(model.genes, var, FLAGS.gene_symbols)
    return Subject(
        dictionary=dictionary, model=model, x=inputs.embedding, labels=inputs.labels,
        names=adata.obs_names.to_numpy(str), genes=genes, sets=reading.load_sets(genes),
        library=library(adata.obs, inputs.settings, counts, var.index, model.genes),
        batch=None if batch is None else adata.obs[batch].astype(str).to_numpy(),
        covariates=(
            model.covariate_latents(adata) if getattr(model, "covariates", None) else None
        ),
    )  # fmt: skip


def gene_names(genes: list[str], var: pd.DataFrame, column: str | None) -> list[str]:
    """Symbols of the decoder's genes, which are var names; its own name where there is none, and
    where another gene had the symbol first."""
    if column is None:
        return list(genes)
    symbols = dict(zip(var.index, var[column], strict=True))
    taken: set[str] = set()
    found = []
    for gene in genes:
        symbol = symbols.get(gene)
        free = isinstance(symbol, str) and symbol.strip() and symbol not in taken
        found.append(symbol if free else gene)
        taken.add(found[-1])
    return found


def library(
    obs: pd.DataFrame, settings: dict[str, Any], counts: Chunked, names: pd.Index, genes: list[str]
) -> np.ndarray:
    """Total counts of each cell [cells]: of --library, or over the decoder's genes; `names` are of
    the columns of the counts."""
    if FLAGS.library is not None:
        if FLAGS.library not in obs:
            raise InputError(f"--library: obs has no column {FLAGS.library!r}")
        totals = pd.to_numeric(obs[FLAGS.library], errors="coerce").to_numpy(np.float64)
    elif settings["expression_is"] != "counts":
        raise InputError(
            "--library is needed: a column of obs with total counts, which log1p values do not tell"
        )
    else:
        at = names.get_indexer(genes)
        at = at[at >= 0]
        sums = [block[:, at].sum(axis=1, dtype=np.float64) for block in counts]
        totals = np.asarray(np.concatenate(sums)).ravel()
    if bad := int((~(totals > 0) | ~np.isfinite(totals)).sum()):
        raise InputError(
            f"{bad} of {len(totals)} cells have no counts in the decoder's genes (their names are "
            f"{', '.join(genes[:3])}, ...): leave such cells out, or name --library"
        )
    return totals


def check_genes(asked: list[str], genes: list[str]) -> list[str]:
    """Genes of --genes, each one of the decoder's."""
    if unknown := [gene for gene in asked if gene not in set(genes)]:
        raise InputError(
            f"--genes: the decoder has no {', '.join(unknown)}; it has {', '.join(genes[:5])}, ..."
        )
    return list(dict.fromkeys(asked))


def agreement(subject: Subject, expression: Expression, rows: np.ndarray) -> str:
    """How well the decoder predicts the cells as they are: is the embedding its latents at all?"""
    _, ours, theirs = np.intersect1d(subject.genes, expression.genes, return_indices=True)
    rows = rows[: perturbation.Design.most_cells]
    predicted = subject.decode(subject.x[rows], rows)[:, ours].mean(axis=0) * cells.TARGET_SUM
    measured = np.expm1(expression.x[rows][:, theirs].toarray()).mean(axis=0)
    r = float(np.corrcoef(np.log1p(predicted), np.log1p(measured))[0, 1]) if len(ours) > 2 else 0.0
    if not r >= MISFIT:
        logging.warning("predictions hardly fit the cells (r = %.2f): the right --decoder?", r)
    return (
        f"decoder: mean predicted and measured expression of {len(ours)} genes in the cells before "
        f"steering correlate with r = {r:.3f} (log scale)"
    )


if __name__ == "__main__":
    cli.launch(main, define_flags)

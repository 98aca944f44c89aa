r"""Cell-type programs: layers of a model in; which cell types, genes and markers its features know.

    sae-jax programs --h5ad=cells.h5ad --expression_is=counts --gene_symbols=symbol \
        --label=cell_type --stores=runs/layers,runs/tokens --workdir=runs/programs
    sae-jax programs ... --checkpoint=scGPT_brain --layers=0,6,11 --limit=1000 --token_cells=500

Kendiukhov's study, all of its tables. Layers are the extraction stores in the folders of --stores
(of cells' vectors, of their gene tokens, or of both); or they are extracted here from --checkpoint,
as the authors' code does (log1p values unbinned, no <cls>, the 600 most expressed genes,
descending), once a dry run has tried the model and said what that takes; or a single one is
--embedding, a key of obsm. Dictionaries of every layer: penalties x reductions x widths, 40 epochs
of 50,000 rows, trained on tokens (whose codes' mean is a cell's) where there are any, on cells'
vectors where not. --cell_features=pooled is the authors' way, the token-trained dictionary on
cells' vectors, outside of what it was trained on; its R² is reported.

Cells are split once. Dictionaries, components, the best feature of a type and the genes of a
feature come from the cells to choose on; L0, R² and AUROC are of the others. AUROC and marker sets
of latents, of 50 principal components and of the layer's own dimensions come by the same functions,
with one side for all and with both sides for all; the authors' mixture (latents one side,
components both, chosen and measured on all cells) stands beside. Fisher's universe are the measured
genes, q is over all features and sets, and beside it stands what permuted cells, and sets of other
genes of like expression, would give. The authors' choices by flags: --correlate_with=presence
--universe=markers --cell_features=pooled --test_share=0.

Each stage leaves its files and is not done again with --resume. Minutes of CPU, of which two cores
take half: 50 components of Zheng's 3,774 cells, 8 dictionaries of 3,000 steps, 1.6; two layers of
scGPT at full size for 500 cells, 6 dictionaries each, 12 with --steps=100 --rows=10000 (4 of them
to extract) and some 120 with the paper's 3,880 steps. It must show tables 1 to 4 beside the paper's
numbers, the progression over layers, and that sums need about 1 / 4 of the mean's penalty for the
same L0 (figures/reduction). Run it on weights at random too (experiments/random_scgpt.py): that
proves the path, not biology, and says how much of a table is owed to the cells alone.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import sae_jax
from analysis import baselines
from analysis import token_features as pooling
from experiments import (
    cell_type_figures,
    cell_type_inputs,
    cell_type_layers,
    cell_type_page,
    cell_type_tables,
    cli,
    folders,
)
from experiments.cell_type_features import Cells, Study, study
from experiments.cell_type_inputs import Inputs
from experiments.cell_type_layers import Layer
from sae_jax import InputError, files
from sae_jax.errors import counted

FLAGS = flags.FLAGS

SETTINGS = "programs.json"  # written first: it tells a folder of ours from anybody's
FILES = {
    "report.html": "the page: everything below, to look at",
    "table_1.csv": "cells of each type",
    "table_2.csv": "L0, R², alive and dead of every dictionary, of tokens and of cells",
    "table_3.csv": "the same of penalties below 1, with the mean squared error",
    "table_4.csv": "latents, components and dimensions compared",
    "layers.csv": "AUROC, types told and marker sets of every dictionary, by layer",
    "features.parquet": "one row an alive feature: type, metadata, marker sets, genes",
    "labels.parquet": "the best feature of every type",
    "markers.parquet": "feature x marker set at q < .05",
    "sets.parquet": "features of each marker set, and by chance",
    "genes.parquet": "the ten genes of highest and lowest correlation with each feature",
    "tokens.parquet": "the ten gene tokens that each feature is most active on",
    "figures": "reduction, layers, types, marker_sets, cells, ...: PNG and PDF",
    "training": "of every layer and kind of rows what a sweep leaves: dictionaries, metrics",
    "extraction": "the stores, where they were extracted here",
    "manifest.json": "size and SHA-256 of every file",
}
STUDIED = ("features", "labels", "markers", "sets", "genes", "tokens", "summary")  # parquet files
WAYS = {"cells": "cells", "mean": "tokens", "pooled": "tokens"}  # and the rows trained on
OPTIONS = {  # the authors' code, of a model that has such options
    "scgpt": ["values=log1p", "cls=false", "order=descending", "select=top", "max_length=600",
              "duplicates=sum"],
}  # fmt: skip
COMPONENTS = 50
QUICK = {"steps": 40, "rows": 4000, "expansions": ["1"], "l1_weights": ["1", "10"]}
SHOWN = ("shown_layer", "shown_l1_weight")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    cell_type_inputs.define_flags()
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_bool(
        "resume", False, "Continue an earlier run in --workdir, of the same settings."
    )
    flags.DEFINE_bool("quick", False, "Few steps, narrow, to see it run; it means nothing.")
    flags.DEFINE_string("model", "scgpt", "What kind of model that is.")
    flags.DEFINE_multi_string(
        "option", None, "KEY=VALUE for its reader; default: the authors', for scgpt."
    )
    flags.DEFINE_string("device", "auto", "To extract on: cpu, cuda, auto.")
    flags.DEFINE_integer("token_cells", 500, "Tokens of the first of these; 0: none.", 0)
    flags.DEFINE_list(
        "cell_features", None,
        "Codes of a cell: cells (dictionary of cells' vectors), mean (of its tokens' codes), "
        "pooled (authors: dictionary of tokens on its vector); default: mean, else cells.",
    )  # fmt: skip
    flags.DEFINE_list("l1_weights", ["0.01", "0.1", "1", "3", "10"], "Penalties.")
    flags.DEFINE_list("reductions", ["mean", "sum"], "Of the loss: the code's mean, eq. 4's sum.")
    flags.DEFINE_list("expansions", ["4"], "Latents per dimension: 4,16,64.")
    flags.DEFINE_integer("rows", 50_000, "Tokens to train on, at most.", lower_bound=2)
    flags.DEFINE_integer("steps", 3880, "Of training: 40 epochs of 97 batches.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 512, "Rows a step, at most.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 3e-4, "Adam's.", 0)
    flags.DEFINE_integer("seed", 0, "Of splits, samples, training and nulls.", 0, 2**31 - 2)
    flags.DEFINE_string("shown_layer", None, "In detail on the page; default: the last.")
    flags.DEFINE_float("shown_l1_weight", 3.0, "Likewise, under the first reduction.", 0)


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    check_flags()
    out = folders.check_workdir(SETTINGS)
    inputs = cell_type_inputs.read()
    for layer in inputs.layers:
        check_types(inputs, layer)
    if FLAGS.checkpoint:
        if FLAGS.token_cells and "mean" in (FLAGS.cell_features or ["mean"]):
            some = np.arange(len(inputs.names))[: FLAGS.token_cells]
            cell_type_inputs.check_types(inputs.cells.of(some))
        arguments = extraction()
        n_cells = len(inputs.names)
        cell_type_layers.check(out / "extraction", arguments, n_cells, FLAGS.token_cells)
    else:
        check_shown(inputs.layers)
    with folders.filled(out, SETTINGS, inputs.settings, (*FILES, "studied"), SHOWN):
        # 2. The layers.
        found = inputs.layers
        if FLAGS.checkpoint:
            began = time.perf_counter()
            stores = cell_type_layers.extracted(
                out / "extraction", arguments, n_cells, FLAGS.token_cells
            )
            logging.info("extracted in %.0f s", time.perf_counter() - began)
            found = cell_type_layers.find(stores, None)
            check_shown(found)

        # 3. A layer at a time: train its dictionaries, study their features.
        results, ways = [], []
        for each in found:
            layer = each
            if isinstance(each, cell_type_layers.Found):
                layer = cell_type_layers.read(each, inputs.names)
            for way in ways_of(layer):
                rows = WAYS[way]
                run = train(layer, rows, inputs.cells, out)
                results.append(cell_type_tables.trained(run, layer.name, rows))
                study_layer(layer, way, run, inputs.cells, out)
                ways.append((layer.name, way))

        # 4. Tables, figures, the page.
        tables = gather(out, ways)
        trained = pd.concat(results, ignore_index=True).drop_duplicates(
            ["layer", "trained_on", "member"]
        )
        tables |= cell_type_tables.of_paper(inputs.cells, trained, tables["summary"])
        for name, table in tables.items():
            if name in STUDIED:
                files.write_parquet(out / f"{name}.parquet", table)
            elif len(table):  # there may be no penalties below 1
                write_csv(table, out / f"{name}.csv")
        files.remove(out / "summary.parquet")  # which layers.csv is
        shown = cell_type_tables.shown(
            tables["summary"], FLAGS.shown_layer, FLAGS.shown_l1_weight, FLAGS.reductions[0]
        )
        vectors, z, at = shown_cells(found, shown, inputs, out)
        pictures = cell_type_figures.draw(out, tables, shown, vectors, z, inputs.cells.of(at))
        cell_type_page.write(out, tables, shown, pictures, inputs.cells, inputs.settings)
    print(f"\n{out}/")
    for name, what in FILES.items():
        if (out / name).exists():
            print(f"  {name:<18} {what}")
    print(f"\n{tables['table_4'].to_string(index=False, float_format='{:.3f}'.format)}")


def check_flags() -> None:
    """Refuse what no run could be made of; --quick takes the place of what was not given."""
    if FLAGS.quick:
        for name, value in QUICK.items():
            if not FLAGS[name].present:
                setattr(FLAGS, name, value)
    if sum(bool(FLAGS[name].value) for name in ("stores", "checkpoint", "embedding")) > 1:
        raise InputError("give one of --stores, --checkpoint and --embedding")
    if FLAGS.layers and not (FLAGS.stores or FLAGS.checkpoint):
        raise InputError("--layers are of --stores or --checkpoint; there is neither")
    if FLAGS["limit"].present and not FLAGS.checkpoint:
        raise InputError("--limit is of what is extracted from --checkpoint; there is none")
    if FLAGS.checkpoint and not Path(FLAGS.checkpoint).is_dir():
        raise InputError(f"--checkpoint={FLAGS.checkpoint} is no folder of a model")
    for name in ("learning_rate", "shown_l1_weight"):
        if not math.isfinite(FLAGS[name].value):
            raise InputError(f"--{name}={FLAGS[name].value} must be a finite number")
    if FLAGS.learning_rate == 0:
        raise InputError("--learning_rate=0 must be above 0")
    for name, kind in {"l1_weights": float, "expansions": float}.items():
        numbers(name, kind)
    for reduction in FLAGS.reductions:
        if reduction not in ("mean", "sum"):
            raise InputError(f"--reductions: {reduction!r} is neither mean nor sum")
    if not FLAGS.reductions or FLAGS.test_share == 1 or FLAGS.metadata_share == 0.5:
        raise InputError(
            "--reductions has one at least, --test_share is below 1, --metadata_share above .5"
        )
    for way in FLAGS.cell_features or []:
        if way not in WAYS:
            raise InputError(f"--cell_features: {way!r} is not one of {', '.join(WAYS)}")
        if FLAGS.checkpoint and not FLAGS.token_cells and WAYS[way] == "tokens":
            raise InputError(f"--cell_features={way} needs tokens, and --token_cells=0 takes none")


def numbers(flag: str, kind: type) -> list[Any]:
    """A flag's comma list as numbers above 0.

    Raises:
      InputError: other text.
    """
    try:
        found = [kind(text) for text in FLAGS[flag].value]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(value) and value > 0 for value in found):
        raise InputError(f"--{flag}={','.join(FLAGS[flag].value)}: numbers above 0 are wanted")
    return found


def extraction() -> list[str]:
    """Arguments of `sae-jax-extract` for the layers of --checkpoint."""
    options = OPTIONS.get(FLAGS.model, []) if FLAGS.option is None else FLAGS.option
    arguments = [
        f"--model={FLAGS.model}", f"--checkpoint={FLAGS.checkpoint}", f"--h5ad={FLAGS.h5ad}",
        f"--device={FLAGS.device}", f"--layers={','.join(FLAGS.layers or ['all'])}",
        *(f"--option={option}" for option in options),
    ]  # fmt: skip
    arguments += [] if FLAGS.gene_symbols is None else [f"--genes={FLAGS.gene_symbols}"]
    source = FLAGS.expression
    return arguments + ([] if source in (None, "X") else [f"--counts={source}"])


def check_shown(layers: Sequence[cell_type_layers.Found | Layer]) -> None:
    """Refuse a --shown_layer that is none of these."""
    names = [layer.name for layer in layers]
    if FLAGS.shown_layer not in (None, *names):
        raise InputError(f"--shown_layer={FLAGS.shown_layer} is not one of {', '.join(names)}")


def ways_of(layer: cell_type_layers.Found | Layer) -> list[str]:
    """How codes of this layer's cells are made.

    Raises:
      InputError: ways that need tokens, where there are none.
    """
    ways = FLAGS.cell_features or (["mean"] if layer.tokens is not None else ["cells"])
    if layer.tokens is None and set(ways) != {"cells"}:
        raise InputError(f"{layer.name} has no tokens: --cell_features={','.join(ways)} needs some")
    return ways


def check_types(inputs: Inputs, layer: cell_type_layers.Found | Layer) -> None:
    """Refuse ways that the layer does not allow, and tokens of cells of fewer than two types."""
    if "mean" in ways_of(layer):
        at = inputs.names.get_indexer(cell_type_layers.token_cells(layer.tokens))
        cell_type_inputs.check_types(inputs.cells.of(np.unique(at[at >= 0])))


def train(layer: Layer, rows: str, inputs: Cells, out: Path) -> sae_jax.Run:
    """All dictionaries of a layer on its `rows`, "cells" or "tokens", of the cells to choose on."""
    folder = out / "training" / layer.name / rows
    held_out = not np.array_equal(inputs.choose, inputs.measure)
    if rows == "tokens":
        x = layer.tokens.sample(inputs.choose, FLAGS.rows, FLAGS.seed)
        validation = layer.tokens.sample(inputs.measure, FLAGS.rows, FLAGS.seed)
    else:
        x, validation = layer.cells[inputs.choose], layer.cells[inputs.measure]
    batch = min(FLAGS.batch_size, len(x))
    d = x.shape[1]
    configs = sae_jax.grid(
        "kendiukhov", d_in=d, reduction=list(FLAGS.reductions),
        n_latents=[max(1, round(d * factor)) for factor in numbers("expansions", float)],
        l1_weight=numbers("l1_weights", float), learning_rate=FLAGS.learning_rate,
        batch_size=batch, seed=FLAGS.seed,
    )  # fmt: skip
    began = time.perf_counter()
    run = sae_jax.train(
        configs, x, validation if held_out else None, workdir=folder, data_seed=FLAGS.seed,
        epochs=math.ceil(FLAGS.steps / (len(x) // batch)),
        provenance={**layer.provenance, "rows": rows},
    )  # fmt: skip
    logging.info(
        "%s: %s of %s in %.0f s", layer.name, counted(len(configs), "dictionary", "dictionaries"),
        rows, time.perf_counter() - began,
    )  # fmt: skip
    return run


def study_layer(layer: Layer, way: str, run: sae_jax.Run, inputs: Cells, out: Path) -> None:
    """Every dictionary's features, the components' and the dimensions', in `out`/studied."""
    folder = out / "studied" / layer.name / way
    if folder.exists():
        return
    positions = np.arange(len(inputs.labels))
    if way == "mean":
        positions = layer.with_tokens
        inputs = inputs.of(positions)
    x = layer.cells[positions]
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in STUDIED}
    began = time.perf_counter()

    def keep(about: dict[str, Any], found: Study, tokens: pd.DataFrame | None = None) -> None:
        about = {"layer": layer.name, "cell_features": way, **about}
        tables = {name: getattr(found, name) for name in STUDIED if hasattr(found, name)}
        tables["summary"] = pd.DataFrame([found.summary])
        tables["tokens"] = pd.DataFrame() if tokens is None else tokens
        for name, table in tables.items():
            if len(table):
                parts[name].append(table.assign(**about))

    for member, dictionary in enumerate(run.dictionaries):
        if dictionary is None:
            logging.warning("%s: dictionary %d diverged and is left out", layer.name, member)
            continue
        config = dictionary.config
        about = {
            "features": "latents", "trained_on": WAYS[way], "member": member,
            "reduction": config.reduction, "l1_weight": config.l1_weight,
            "n_latents": config.n_latents,
        }  # fmt: skip
        tokens = None
        if way == "mean":
            sums = pooling.pool(
                dictionary, layer.tokens.blocks(), int(positions[-1]) + 1, len(layer.tokens.genes)
            )
            z = sparse.csr_array(sums.cells[positions])
            tokens = pooling.top_tokens(sums, layer.tokens.genes)
            fit = {}
        else:
            z = sparse.csr_array(dictionary.encode(x, sparse=True))
            fit = {"r2_cells": r2(x[inputs.measure], dictionary.decode(z[inputs.measure]))}
        found = study(z, inputs)
        found.summary.update(fit)
        keep(about, found, tokens)
    components = min(COMPONENTS, len(inputs.choose) - 1, x.shape[1])
    pca = fitted(x[inputs.choose], components)
    keep({"features": "components"}, study(pca.encode(x), inputs, signed=True))
    keep({"features": "dimensions"}, study(x.astype(np.float64), inputs, signed=True))
    with files.write_aside(folder) as fresh:
        fresh.mkdir()
        for name, tables in parts.items():
            if tables:
                whole = pd.concat(tables, ignore_index=True)
                files.write_parquet(fresh / f"{name}.parquet", whole)
    logging.info("%s, %s: studied in %.0f s", layer.name, way, time.perf_counter() - began)


def fitted(x: np.ndarray, components: int) -> baselines.Baseline:
    """So many principal components, or as many as there are directions."""
    rank = int(np.linalg.matrix_rank(np.cov(x.astype(np.float64), rowvar=False)))
    return baselines.fit("PCA", x, min(components, rank), FLAGS.seed)


def r2(x: np.ndarray, reconstruction: np.ndarray) -> float:
    """1 - squared error / squared distance from the mean of each dimension, rows [cells, d]."""
    x = x.astype(np.float64)
    total = np.square(x - x.mean(axis=0)).sum()
    return float(1 - np.square(x - reconstruction).sum() / total) if total > 0 else np.nan


def gather(out: Path, ways: Sequence[tuple[str, str]]) -> dict[str, pd.DataFrame]:
    """The tables of all layers, one below another."""
    tables = {}
    for name in STUDIED:
        paths = [out / "studied" / layer / way / f"{name}.parquet" for layer, way in ways]
        there = [files.read_parquet(path) for path in paths if path.exists()]
        if there:
            tables[name] = pd.concat(there, ignore_index=True)
    return tables


def shown_cells(
    found: Sequence[cell_type_layers.Found | Layer],
    shown: dict[str, Any],
    inputs: Inputs,
    out: Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of the cells in the layer that is shown, the dictionary's codes, which cells."""
    layer = next(each for each in found if each.name == shown["layer"])
    if isinstance(layer, cell_type_layers.Found):
        layer = cell_type_layers.read(layer, inputs.names)
    folder = out / "training" / shown["layer"] / shown["trained_on"] / "dictionaries"
    dictionary = sae_jax.Dictionary.load(folder / f"{shown['member']:04d}")
    if shown["cell_features"] == "mean":
        at = layer.with_tokens
        sums = pooling.pool(dictionary, layer.tokens.blocks(), len(inputs.names),
                            len(layer.tokens.genes))  # fmt: skip
        return layer.cells[at], sums.cells[at], at
    return layer.cells, dictionary.encode(layer.cells), np.arange(len(layer.cells))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    with files.write_aside(path) as fresh:
        table.to_csv(fresh, index=False)


if __name__ == "__main__":
    cli.launch(main, define_flags)

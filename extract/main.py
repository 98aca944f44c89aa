r"""Hidden states of a foundation model for the cells of a file, to stores that training reads.

    python -m extract.main --model=scgpt --checkpoint=DIR --h5ad=FILE --layers=all --output=DIR

(also `sae-jax-extract`). Leaves DIR/layer_00.zarr, ... (or embedding.zarr, latent.zarr): an AnnData
each, with the rows and names of the input. Killed, the same command goes on. `--dry_run` says what
it would do: gene coverage, sequence lengths, size, time.
"""

import concurrent.futures
import json
import logging as python_logging
import re
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import app, flags, logging
from tqdm import tqdm

import extract
from extract import InputError, cells, disk, export, manifest, provenance, store
from extract.errors import counted
from extract.models.base import Layer, Model, Plan, refuse_empty
from extract.tokens import token_table

FLAGS = flags.FLAGS
# Not for --option: they have flags of their own, or are what the program itself gives.
OWN = ("checkpoint", "device", "dtype", "adata", "genes", "counts", "min_gene_coverage")


def define_flags() -> None:
    """Once a process: absl has one set of flags."""
    known = ", ".join(sorted(set(extract.MODELS) - {"callable"}))
    flags.DEFINE_string("model", None, f"{known}, or package.module:Class of your own.")
    flags.DEFINE_string("checkpoint", None, "The folder that the model's own code wrote.")
    flags.DEFINE_string("dictionaries", None, "Geneformer's token and gene dictionaries: a folder.")
    flags.DEFINE_string("h5ad", None, "The cells: an .h5ad or .zarr file of anndata.")
    flags.DEFINE_string("output", None, "Folder to fill.")
    flags.DEFINE_list(
        "layers", None, "all, or some of 0 .. n-1, -1, embedding; default: what the authors export."
    )
    flags.DEFINE_string("pooling", None, "Of a cell's tokens; default: the authors' own.")
    flags.DEFINE_string("genes", None, "Column of var with the model's gene names (var_names).")
    flags.DEFINE_string("counts", None, "Layer that holds the counts, or raw (X).")
    flags.DEFINE_multi_string(
        "option", [], "KEY=VALUE for the reader or its preprocessing: --option=max_length=600."
    )
    flags.DEFINE_string("device", "auto", "cpu, cuda, cuda:1 or auto.")
    flags.DEFINE_integer("batch_size", 64, "Cells that run together.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the computation (float32).")
    flags.DEFINE_enum("store_dtype", "float32", store.DTYPES, "Of the stores.")
    flags.DEFINE_integer("limit", None, "Only the first cells.", lower_bound=1)
    flags.DEFINE_string(
        "obs_filter", None, "Only cells for which this is true: 'celltype == \"B\"'."
    )
    flags.DEFINE_float("min_gene_coverage", 0.5, "Refuse below this share of genes found.", 0, 1)
    flags.DEFINE_enum("empty_cells", "refuse", ["refuse", "nan"], "Cells without a known gene.")
    flags.DEFINE_enum(
        "export", None, ["npy"], "Also plain arrays beside their names; in a manifest.json."
    )
    flags.DEFINE_bool("dry_run", False, "Say what it would do, and how long it would take.")
    flags.DEFINE_bool(
        "overwrite", False, "Replace what --output holds of other extractions, and its exports."
    )


def main() -> None:
    """See the module."""
    for name in ("model", "checkpoint", "h5ad", *(() if FLAGS.dry_run else ("output",))):
        if not getattr(FLAGS, name):
            raise InputError(f"--{name} is needed")
    reader = extract.find_reader(FLAGS.model)
    if not getattr(reader, "of_folder", True):
        raise InputError(
            f"--model={FLAGS.model} reads a Python object, which a program has none of: call "
            "extract.load_model in Python, or write a reader and give --model=package.module:Class"
        )
    layers = asked_layers(FLAGS.layers)
    options, preprocessing = split_options(FLAGS.option, extract.options_of(reader))
    if FLAGS.dictionaries is not None:
        options["dictionaries"] = FLAGS.dictionaries
    if not FLAGS.dry_run:
        store.check_writable(Path(FLAGS.output))
        if FLAGS.export or FLAGS.overwrite:
            manifest.entries(Path(FLAGS.output))  # it will be written anew
    adata = cells.open_backed(FLAGS.h5ad, FLAGS.counts)
    adata = cells.restrict(adata, chosen_rows(adata.obs))
    model = extract.load_model(
        FLAGS.model,
        FLAGS.checkpoint,
        device=FLAGS.device,
        dtype=FLAGS.dtype or "float32",
        **options,
    )
    layers, pooling = model.resolve(layers), model.pooling(FLAGS.pooling)
    plan = model.plan(
        adata, FLAGS.genes, FLAGS.counts, min_gene_coverage=FLAGS.min_gene_coverage,
        **preprocessing,
    )  # fmt: skip
    model.check(plan, pooling)
    if FLAGS.export:
        export.check_names(plan.names)
    if coverage := plan.settings.get("coverage"):
        logging.info("genes: %s", ", ".join(f"{k} {v}" for k, v in coverage.items()))

    rows, lengths, empty, tokens = survey(model, plan, pooling)
    refuse_empty(empty, plan.names, FLAGS.empty_cells)
    if FLAGS.export and tokens is not None:
        export.check_names(tokens["gene"].cat.categories)
    spread = np.percentile(lengths, [0, 50, 100]).astype(int)
    some = counted(len(rows), "cell")
    logging.info("%s; tokens a cell: %d .. %d, median %d", some, *spread[[0, 2, 1]])
    try_one(model, plan, layers, pooling, empty)
    if FLAGS.dry_run:
        return forecast(model, plan, layers, pooling, rows, empty)

    obs = adata.obs if tokens is None else tokens
    about = provenance.describe(model, plan, pooling, empty, obs)
    names = {store.layer_name(layer): layer for layer in layers}
    out = Path(FLAGS.output)
    with store.locked(out):
        while todo := {
            name: layer
            for name, layer in names.items()
            if not store.finished(out, name, about, overwrite=FLAGS.overwrite)
        }:  # an unfinished extraction goes on with its own layers first
            writer = store.Writer(
                out, todo, obs, model.d_model, about, FLAGS.store_dtype,
                rows=rows, overwrite=FLAGS.overwrite,
            )  # fmt: skip
            fill(model, plan, pooling, writer)
            writer.finish()
        paths = [out / f"{name}.zarr" for name in names]
        if FLAGS.export:
            for path in paths:
                export.export_npy(path)
    print(store.describe_files(paths))
    return None


def asked_layers(given: Sequence[str] | None) -> Any:
    """Flags' text as the keys of `embed`."""
    if not given or list(given) == ["all"]:
        return "all" if given else None
    return [int(text) if re.fullmatch(r"-?\d+", text) else text for text in given]


def split_options(
    given: Sequence[str], of_reader: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """KEY=VALUE for the reader's constructor, which takes `of_reader`, and for its preprocessing.

    A value is JSON where it can be read as that, else text.
    """
    reader, preprocessing = {}, {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--option={text}: KEY=VALUE is wanted")
        into = reader if key in of_reader else preprocessing
        if key in OWN and into is preprocessing:
            raise InputError(f"--option={text}: that is no option; see --help for the flags")
        if key in into:
            raise InputError(f"--option={text}: {key} is given twice")
        try:
            into[key] = json.loads(value)
        except ValueError:
            into[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return reader, preprocessing


def chosen_rows(obs: pd.DataFrame) -> np.ndarray:
    """Positions of the cells that --obs_filter and --limit leave, ascending."""
    chosen = np.arange(len(obs))
    if FLAGS.obs_filter:
        try:
            mask = obs.eval(FLAGS.obs_filter)
        except Exception as error:  # pandas lets through whatever the expression raised
            raise InputError(f"--obs_filter={FLAGS.obs_filter}: {error}") from None
        mask = np.asarray(mask)
        if mask.shape != (len(obs),) or mask.dtype != bool:
            raise InputError(f"--obs_filter={FLAGS.obs_filter} is not true or false of each cell")
        chosen = np.flatnonzero(mask)
    chosen = chosen[: FLAGS.limit]
    if not len(chosen):
        raise InputError("no cell is left")
    return chosen


def survey(
    model: Model, plan: Plan, pooling: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, pd.DataFrame | None]:
    """One pass over the cells before anything is computed: all values are checked.

    Returns:
      Rows of output a cell, tokens a cell, whether a cell is empty; and under "tokens" the table of
      rows.
    """
    rows, lengths, empty, ids = [], [], [], []
    starts = range(0, len(plan.names), store.BLOCK_CELLS)
    with tqdm(starts, desc="checking", unit=" blocks", leave=False) as bar:  # gone before an error
        for start in bar:
            inputs = plan.read(slice(start, start + store.BLOCK_CELLS))
            rows.append(inputs.rows(pooling))
            lengths.append(inputs.lengths)
            empty.append(inputs.empty)
            if pooling == "tokens":
                ids.append(inputs.gene_ids().astype(np.int32))
    counts, tokens = np.concatenate(rows), None
    if pooling == "tokens":
        tokens = token_table(plan.names, counts, np.concatenate(ids), model.gene_names)
    return counts, np.concatenate(lengths), np.concatenate(empty), tokens


def try_one(
    model: Model, plan: Plan, layers: Sequence[Layer], pooling: str, empty: np.ndarray
) -> None:
    """Run one cell, so that a model which cannot work fails before anything is written."""
    some = np.flatnonzero(~empty)[:1]
    if not len(some):
        return
    inputs = plan.read(some)
    found = model.evaluate(inputs, layers, pooling, batch_size=1).hidden
    wanted = (int(inputs.rows(pooling).sum()), model.d_model)
    for layer in layers:
        if found[layer].shape != wanted or not np.isfinite(found[layer]).all():
            raise InputError(
                f"{model.name} gives rows {found[layer].shape} of layer {layer!r} and pooling "
                f"'{pooling}' for the cell '{plan.names[some[0]]}', where {wanted} finite ones are "
                "wanted"
            )


def fill(model: Model, plan: Plan, pooling: str, writer: store.Writer) -> None:
    """Every block that is not done: read (one ahead), run, write."""
    todo = [block for block in writer.blocks if block.number not in writer.done]
    total = len(plan.names)
    done = total - sum(block.cells.stop - block.cells.start for block in todo)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        tqdm(total=total, initial=done, unit=" cells", unit_scale=True) as bar,
    ):
        ahead = reader.submit(plan.read, todo[0].cells) if todo else None
        for i, block in enumerate(todo):
            inputs = ahead.result()
            ahead = reader.submit(plan.read, todo[i + 1].cells) if i + 1 < len(todo) else None
            found = model.evaluate(
                inputs, list(writer.layers.values()), pooling, batch_size=FLAGS.batch_size
            ).hidden
            values = {name: found[layer] for name, layer in writer.layers.items()}
            writer.write(block.number, block.rows, values)
            bar.update(block.cells.stop - block.cells.start)


def forecast(
    model: Model,
    plan: Plan,
    layers: Sequence[Layer],
    pooling: str,
    rows: np.ndarray,
    empty: np.ndarray,
) -> None:
    """Time a batch of typical cells and print what the whole would take."""
    some = np.random.default_rng(0).permutation(np.flatnonzero(~empty))[: FLAGS.batch_size]
    inputs = plan.read(np.sort(some))
    seconds = []
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        model.evaluate(inputs, layers, pooling, batch_size=FLAGS.batch_size)
        seconds.append(time.perf_counter() - began)
    per_cell = seconds[-1] / max(1, len(some))
    width = 2 if FLAGS.store_dtype != "float32" else 4
    size = int(rows.sum()) * model.d_model * width * len(layers)
    print(f"layers      {', '.join(map(str, layers))} ({pooling})")
    print(f"rows        {int(rows.sum())} x {model.d_model} a layer")
    print(f"on disk     about {size / 2**30:.3g} GiB in {counted(len(layers), 'store')}")
    print(f"time        about {per_cell * len(rows):.0f} s at {1 / per_cell:.1f} cells/s")


def cli() -> None:
    """The console script `sae-jax-extract`."""
    sys.modules["__main__"].__doc__ = __doc__
    before = set(flags.FLAGS)
    define_flags()
    for name in set(flags.FLAGS) - before:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(arguments)
        except flags.Error as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except SystemExit:  # of --help, which absl ends with 1
            sys.exit(0)

    app.run(run, flags_parser=parse)


def run(arguments: Sequence[str]) -> None:
    """`main`, with bad input as one line and exit 2."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().setFormatter(None)
    python_logging.getLogger("anndata").setLevel(python_logging.WARNING)
    warnings.showwarning = lambda message, *_: logging.warning("%s", message)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # of a full disk each library makes another kind
        told = disk.message(error, Path(FLAGS.flag_values_dict().get("output") or "."))
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli()

r"""Hidden states of a foundation model for the cells of a file, to stores that training reads.

    python -m extract.main --model=scgpt --checkpoint=DIR --h5ad=FILE --layers=all --output=DIR

(also `sae-jax-extract`). Leaves DIR/layer_00.zarr, ... (or embedding.zarr, latent.zarr): an AnnData
each, with the rows and names of the input. Killed, the same command goes on. `--dry_run` says what
it would do: gene coverage, sequence lengths, size, time.
"""

import concurrent.futures
import errno
import hashlib
import importlib.metadata
import json
import logging as python_logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import app, flags, logging
from tqdm import tqdm

import extract
from extract import InputError, cells, checkpoints, store
from extract.models.base import Model, Plan, refuse_empty

FLAGS = flags.FLAGS
BLOCK = 1024  # cells read, run and written together; sequences of like length share batches in it


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
    flags.DEFINE_string("counts", None, "Layer that holds the counts (X).")
    flags.DEFINE_multi_string(
        "option", [], "KEY=VALUE of the reader's preprocessing, e.g. --option=max_length=600."
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
    flags.DEFINE_enum("export", None, ["npy"], "Also plain arrays beside their names.")
    flags.DEFINE_bool("dry_run", False, "Say what it would do, and how long it would take.")
    flags.DEFINE_bool("overwrite", False, "Replace stores of another extraction in --output.")


def main() -> None:
    """See the module."""
    for name in ("model", "checkpoint", "h5ad", *(() if FLAGS.dry_run else ("output",))):
        if not getattr(FLAGS, name):
            raise InputError(f"--{name} is needed")
    options = {} if FLAGS.dictionaries is None else {"dictionaries": FLAGS.dictionaries}
    model = extract.load_model(
        FLAGS.model,
        FLAGS.checkpoint,
        device=FLAGS.device,
        dtype=FLAGS.dtype or "float32",
        **options,
    )
    layers, pooling = model.resolve(asked_layers(FLAGS.layers)), model.pooling(FLAGS.pooling)
    adata = cells.open_backed(FLAGS.h5ad, FLAGS.counts)
    chosen = chosen_rows(adata.obs)
    plan = model.plan(
        adata, FLAGS.genes, FLAGS.counts, min_gene_coverage=FLAGS.min_gene_coverage,
        **parse_options(FLAGS.option),
    )  # fmt: skip
    if coverage := plan.settings.get("coverage"):
        logging.info("genes: %s", ", ".join(f"{k} {v}" for k, v in coverage.items()))

    rows, lengths, empty, tokens = survey(model, plan, chosen, pooling)
    refuse_empty(empty, [plan.names[i] for i in chosen], FLAGS.empty_cells)
    spread = np.percentile(lengths, [0, 50, 100]).astype(int)
    logging.info("%d cells; tokens a cell: %d .. %d, median %d", len(chosen), *spread[[0, 2, 1]])
    if FLAGS.dry_run:
        return forecast(model, plan, chosen, layers, pooling, rows, empty)

    out = Path(FLAGS.output)
    with store.locked(out):
        if FLAGS.overwrite:
            for layer in layers:
                shutil.rmtree(out / f"{store.layer_name(layer)}.zarr", ignore_errors=True)
            shutil.rmtree(out / ".extracting", ignore_errors=True)
        obs = pd.DataFrame(tokens) if tokens else adata.obs.iloc[chosen]
        about = provenance(model, plan, pooling, chosen, empty, obs)
        names = {store.layer_name(layer): layer for layer in layers}
        todo = {k: v for k, v in names.items() if not store.finished(out, k, about)}
        if todo:
            writer = store.Writer(out, todo, obs, model.d_model, about, FLAGS.store_dtype)
            fill(model, plan, chosen, pooling, rows, writer)
            writer.finish()
        paths = [out / f"{name}.zarr" for name in names]
        if FLAGS.export:
            for path in paths:
                store.export_npy(path)
    print(store.describe_files(paths))
    return None


def asked_layers(given: Sequence[str] | None) -> Any:
    """Flags' text as the keys of `embed`."""
    if not given or list(given) == ["all"]:
        return "all" if given else None
    return [int(text) if text.lstrip("-").isdigit() else text for text in given]


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, the value in JSON where it is that, else text."""
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--option={text}: KEY=VALUE is wanted")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
        if value in ("True", "False"):
            found[key] = value == "True"
    return found


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


def blocks(chosen: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Number and positions of the cells of each block."""
    for number, start in enumerate(range(0, len(chosen), BLOCK)):
        yield number, chosen[start : start + BLOCK]


def survey(
    model: Model, plan: Plan, chosen: np.ndarray, pooling: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """One pass over the cells before anything is computed: all values are checked.

    Returns:
      Rows of output a cell, tokens a cell, whether a cell is empty; and under "tokens" the columns
      cell and gene of each row (else nothing).
    """
    rows, lengths, empty = [], [], []
    cell_of, gene_of = [], []
    for _, some in tqdm(list(blocks(chosen)), desc="checking", unit=" blocks", leave=False):
        inputs = plan.read(some)
        rows.append(inputs.rows(pooling))
        lengths.append(inputs.lengths)
        empty.append(inputs.empty)
        if pooling == "tokens":
            cell_of.append(np.repeat(some, rows[-1]))
            gene_of.append(inputs.gene_ids())
    tokens = {}
    if pooling == "tokens":
        names = np.asarray(plan.names, object)
        tokens = {
            "cell": pd.Categorical.from_codes(np.concatenate(cell_of), names),
            "gene": pd.Categorical(model.gene_names(np.concatenate(gene_of))),
        }
    return np.concatenate(rows), np.concatenate(lengths), np.concatenate(empty), tokens


def fill(
    model: Model, plan: Plan, chosen: np.ndarray, pooling: str, rows: np.ndarray, writer: Any
) -> None:
    """Every block that is not done: read (one ahead), run, write."""
    ends = np.concatenate([[0], np.cumsum(rows)])
    todo = [(number, some) for number, some in blocks(chosen) if number not in writer.done]
    done = len(chosen) - sum(len(some) for _, some in todo)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        tqdm(total=len(chosen), initial=done, unit=" cells", unit_scale=True) as bar,
    ):
        ahead = reader.submit(plan.read, todo[0][1]) if todo else None
        for i, (number, some) in enumerate(todo):
            inputs = ahead.result()
            ahead = reader.submit(plan.read, todo[i + 1][1]) if i + 1 < len(todo) else None
            found = model.evaluate(
                inputs, list(writer.layers.values()), pooling, batch_size=FLAGS.batch_size
            ).hidden
            start = number * BLOCK
            where = slice(int(ends[start]), int(ends[start + len(some)]))
            writer.write(
                number, where, {name: found[layer] for name, layer in writer.layers.items()}
            )
            bar.update(len(some))


def forecast(
    model: Model,
    plan: Plan,
    chosen: np.ndarray,
    layers: list[Any],
    pooling: str,
    rows: np.ndarray,
    empty: np.ndarray,
) -> None:
    """Time a batch of typical cells and print what the whole would take."""
    some = np.random.default_rng(0).permutation(chosen[~empty])[: FLAGS.batch_size]
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
    print(f"on disk     about {size / 2**30:.3g} GiB in {len(layers)} stores")
    print(f"time        about {per_cell * len(chosen):.0f} s at {1 / per_cell:.1f} cells/s")


def provenance(
    model: Model,
    plan: Plan,
    pooling: str,
    chosen: np.ndarray,
    empty: np.ndarray,
    obs: pd.DataFrame,
) -> dict[str, Any]:
    """All that the rows depend on, and its hash `identity`."""
    index = obs.index.astype(str)
    about = {
        "model": model.name,
        "checkpoint": FLAGS.checkpoint,
        "checkpoint_sha256": model.checkpoint,
        "input": FLAGS.h5ad,
        "input_sha256": _input_hash(Path(FLAGS.h5ad)),
        "counts": FLAGS.counts or "X",
        "genes": FLAGS.genes or "var_names",
        "genes_sha256": store.names_hash(model.genes),
        "pooling": pooling,
        "preprocessing": {k: v for k, v in plan.settings.items() if k != "coverage"},
        "coverage": plan.settings.get("coverage", {}),
        "obs_filter": FLAGS.obs_filter or "",
        "cells": len(chosen),
        "cells_sha256": store.names_hash([plan.names[i] for i in chosen]),
        "obs_names_sha256": store.names_hash(index),
        "empty_cells": [plan.names[i] for i in chosen[empty]],
        "dtype": FLAGS.dtype or "float32",
        "store_dtype": FLAGS.store_dtype,
        "versions": {name: importlib.metadata.version(name) for name in ("sae-jax", "torch")},
    }
    free = ("checkpoint", "input", "versions")
    fixed = json.dumps({k: v for k, v in about.items() if k not in free}, sort_keys=True)
    return about | {"identity": hashlib.sha256(fixed.encode()).hexdigest()}


def _input_hash(path: Path) -> str:
    if path.is_file():
        return checkpoints.sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return store.names_hash([f"{p.relative_to(path)} {checkpoints.sha256(p)}" for p in files])


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"error: {FLAGS.output}: {error.strerror}; make room and give the same command again",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli()

"""Cells, an embedding of them, labels and gene sets out of flags: what the programs that name
features read, checked before any work."""

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging

from analysis import cells, gene_sets
from experiments import verify
from extract import store
from sae_jax import InputError, data
from sae_jax.errors import counted

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that is read, and checked."""

    settings: dict[str, Any]
    obs: pd.DataFrame
    expression: cells.Expression
    embedding: np.ndarray
    labels: pd.Series | None
    sets: gene_sets.GeneSets


def define_flags() -> None:
    """Of the cells and the gene sets."""
    verify.define_flag()
    flags.DEFINE_string(
        "h5ad",
        None,
        "AnnData file, .h5ad or .zarr; default: the PBMC data that ship with scanpy.",
    )
    flags.DEFINE_string(
        "embedding",
        None,
        "Key of obsm, extraction store (layer_02.zarr), or rows of the cells in the file's order "
        "(rows.npy); default: PCA of the expression.",
    )
    flags.DEFINE_integer("pca", 50, "Dimensions of that PCA.", lower_bound=1)
    flags.DEFINE_string("expression", None, "X, raw, or the name of a layer (default X).")
    flags.DEFINE_enum(
        "expression_is", None, cells.EXPRESSION_KINDS, "What that holds; checked, never guessed."
    )
    flags.DEFINE_string("gene_symbols", None, "Column of var with symbols; default: the var names.")
    flags.DEFINE_string("label", None, "Column of obs with labels of the cells, cell types say.")
    define_set_flags()


def define_set_flags() -> None:
    """Of the gene sets alone, for `load_sets`."""
    flags.DEFINE_string(
        "gene_sets",
        gene_sets.EMBEDDED,
        "GMT file; table of sets and genes; .gaf; name of an online library; or 'embedded'.",
    )
    flags.DEFINE_string("obo", None, "The ontology that a .gaf file's terms are of.")
    flags.DEFINE_string(
        "gene_table", None, "NCBI gene_info: genes and sets match by any of a gene's names."
    )
    flags.DEFINE_enum(
        "gene_case",
        "as_is",
        ["as_is", "upper"],
        "upper: mouse symbols match human sets in capitals (the globins have other names).",
    )
    flags.DEFINE_integer(
        "min_size", None, "Smallest set in measured genes; 2 if embedded, else 20."
    )
    flags.DEFINE_integer(
        "max_size", None, "Largest set in measured genes; 2000 if embedded, else 500."
    )


def define_memory_flags() -> None:
    """Of cells that no memory holds."""
    flags.DEFINE_float("memory_gib", 4.0, "Of the work beside its inputs.", 0)
    flags.DEFINE_bool(
        "out_of_core",
        False,
        "Leave expression in its file; --memory_gib has blocks of cells and their sums in it, too.",
    )


def memory_bytes() -> int:
    """Of --memory_gib."""
    if not math.isfinite(FLAGS.memory_gib):
        raise InputError(f"--memory_gib={FLAGS.memory_gib} must be a finite number")
    return int(FLAGS.memory_gib * 2**30)


def block_bytes() -> int | None:
    """Of these, for a block of cells whose expression stays in its file; None: it is read."""
    return memory_bytes() // 8 if FLAGS.out_of_core else None


def read(beside: str, min_universe: int = 0, block_bytes: int | None = None) -> Inputs:
    """Everything the flags name, checked before any work.

    Args:
      beside: a flag of the program's own: its settings are with those of the inputs.
      min_universe: fewer genes than this are refused.
      block_bytes: expression stays in its file (`cells.Parts`), and this is the memory for a block
        of cells; None: it is read.
    """
    source, kind, label = FLAGS.expression or "X", FLAGS.expression_is, FLAGS.label
    path = FLAGS.h5ad
    if path is None:
        path, label = default_cells(), label or "bulk_labels"
        if FLAGS.expression is None:  # X is scaled there; raw holds all 765 genes as log1p
            source, kind = "raw", "log1p"
    if kind is None:
        raise InputError(
            f"--expression_is is needed: does {source} of {path} hold counts or log1p values?"
        )
    if block_bytes is not None and FLAGS.embedding is None:
        raise InputError(
            "PCA needs the expression of all cells in memory: give --embedding, or no --out_of_core"
        )
    if block_bytes is None:
        adata = cells.read(path)
    else:
        stored = FLAGS.embedding.endswith((".zarr", ".npy"))
        adata = cells.annotations(path, () if stored else (FLAGS.embedding,))
    labels = None if label is None else cells.labels(adata, label)
    embedding = None
    if FLAGS.embedding is not None and FLAGS.embedding.endswith(".zarr"):
        embedding = stored_embedding(adata.obs_names)
    elif FLAGS.embedding is not None and FLAGS.embedding.endswith(".npy"):
        embedding = rows_of(FLAGS.embedding, adata.n_obs)
    elif FLAGS.embedding is not None:
        embedding = cells.embedding(adata, FLAGS.embedding)
    expression = expression_of(adata, path, source, kind, FLAGS.gene_symbols, block_bytes)
    sets = load_sets(expression.genes, min_universe)
    read_of = counted(adata.n_obs, "cell"), counted(len(expression.genes), "gene")
    logging.info("%s, %s; %s", *read_of, sets.coverage)
    if embedding is None:
        embedding = cells.pca(expression.x, FLAGS.pca)
    if not np.ptp(embedding, axis=0).any():
        raise InputError("the embedding is the same for all cells: there is nothing to learn")
    settings = {
        flag.name: flag.value
        for module in (FLAGS.find_module_defining_flag(name) for name in ("h5ad", beside))
        for flag in FLAGS.get_flags_for_module(module)
    }
    settings |= {"h5ad": str(path), "expression": source, "expression_is": kind, "label": label}
    return Inputs(
        settings=settings, obs=adata.obs, expression=expression, embedding=embedding,
        labels=labels, sets=sets,
    )  # fmt: skip


def expression_of(
    adata: Any, path: str | Path, source: str, kind: str, symbols: str | None,
    block_bytes: int | None,
) -> cells.Expression:  # fmt: skip
    """That of cells in memory, or (`block_bytes`) of the file they are of; see `cells`."""
    if block_bytes is None:
        return cells.expression(adata, source, kind, symbols)
    return cells.parts(path, source, kind, symbols, memory_bytes=block_bytes)


def load_sets(genes: Sequence[str], min_universe: int = 0) -> gene_sets.GeneSets:
    """The gene sets of the flags over these genes."""
    embedded = FLAGS.gene_sets == gene_sets.EMBEDDED
    if FLAGS.gene_case == "upper":
        genes = [gene.upper() for gene in genes]
    return gene_sets.load(
        FLAGS.gene_sets,
        genes,
        (2 if embedded else 20) if FLAGS.min_size is None else FLAGS.min_size,
        (2000 if embedded else 500) if FLAGS.max_size is None else FLAGS.max_size,
        gene_table=FLAGS.gene_table,
        min_universe=min_universe,
        **({} if FLAGS.obo is None else {"obo": FLAGS.obo}),
    )


def stored_embedding(names: pd.Index) -> np.ndarray:
    """Rows of an extraction store for the cells of these names, float32 [cells, dimensions]."""
    found = store.open(FLAGS.embedding, FLAGS.verify)
    at = found.obs.index.get_indexer(names)
    if (at < 0).any():
        raise InputError(
            f"{FLAGS.embedding} lacks {int((at < 0).sum())} of the {len(names)} cells "
            f"({names[at < 0][0]} first)"
        )
    return data.check_rows(np.asarray(found.X[:], np.float32)[at], FLAGS.embedding)


def rows_of(path: str, n_cells: int) -> np.ndarray:
    """Rows of a .npy file, which has no names: as many as there are cells, in their order."""
    rows = data.open_rows(path)
    if len(rows) != n_cells:
        raise InputError(f"--embedding={path} has {len(rows)} rows, of {n_cells} cells")
    return data.check_rows(np.asarray(rows), path)


def default_cells() -> Path:
    """The 700 PBMC that ship with scanpy (Zheng 2017, by way of 10x Genomics)."""
    package = importlib.util.find_spec("scanpy")
    if package is None:
        raise InputError(
            "without --h5ad the cells come from scanpy, which is not installed: "
            "pip install 'sae-jax[single-cell]'"
        )
    return Path(package.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"

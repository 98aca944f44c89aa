"""The cells of a study of concepts, their embedding, and the model that it is of.

The embedding is computed by a model: that of --checkpoint, or an scVI trained here. Or it lies in
an extraction store (--embedding), which says what it is of: then the rows are taken as they are,
and the model is only loaded to exchange genes in it; where its weights are gone, what needs none is
studied.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from absl import flags, logging

import extract
from analysis import cells, chunked
from analysis.gene_sets import GeneSets
from experiments import inputs as reading
from experiments import scvi_model
from experiments.concepts_study import Subject
from extract import cells as lazy
from extract import provenance, store
from extract.models.base import LATENT
from sae_jax import InputError, data, files

FLAGS = flags.FLAGS

SOME, APART = 8, 0.02  # cells embedded again, and how far their rows may be from the store's


def read() -> tuple[anndata.AnnData, pd.DataFrame, dict[str, str]]:
    """The cells, their labels, and the symbols of the genes of var that have one."""
    if not FLAGS.h5ad:
        raise InputError("--h5ad is needed: an AnnData file with counts")
    if not FLAGS.labels:
        raise InputError("--labels is needed: columns of obs that describe the cells")
    adata = opened()
    labels = pd.DataFrame({name: cells.labels(adata, name) for name in FLAGS.labels})
    if FLAGS.counts == "raw" and adata.raw is None:
        raise InputError(f"--counts=raw: {FLAGS.h5ad} has no raw")
    var = adata.raw.var if FLAGS.counts == "raw" else adata.var
    if FLAGS.gene_symbols is not None and FLAGS.gene_symbols not in var:
        raise InputError(f"--gene_symbols: var has no column {FLAGS.gene_symbols}")
    named = var.index if FLAGS.gene_symbols is None else var[FLAGS.gene_symbols]
    known = named.notna() & (named.astype(str).str.strip() != "")
    symbols = zip(var.index[known].astype(str), named[known].astype(str), strict=True)
    return adata, labels, dict(symbols)


def opened() -> anndata.AnnData:
    """The cells; with --out_of_core their counts stay in the file, and of matrices there are these
    alone."""
    if not FLAGS.out_of_core:
        return cells.read(FLAGS.h5ad)
    counts = FLAGS.counts
    if counts is None and FLAGS.embedding is not None:
        counts = _or_none(store.open(FLAGS.embedding).extraction["counts"], "X")
    cells.stored(FLAGS.h5ad, counts or "X", memory_bytes=reading.block_bytes())  # refuses
    return lazy.open_backed(FLAGS.h5ad, counts)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where the embedding comes from.

    Attributes:
      model: a reader of `extract`; None: an scVI that is still to be trained, or, of a store, one
        whose weights are not there.
      x: the store's rows of the cells [cells, d]; None: to be computed.
      name: of the model. layer: what is embedded.
      genes, counts: as of the model's `embed`; `options` are these.
    """

    model: Any
    x: np.ndarray | None
    name: str
    layer: int | str
    genes: str | None = None
    counts: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the model's `embed`, `plan` and the like."""
        return {"genes": self.genes, "counts": self.counts}


def source(adata: anndata.AnnData) -> Source:
    """By --model, --checkpoint and --embedding; everything is checked, nothing is computed but the
    rows of a few cells, to compare them with a store's.

    Raises:
      InputError: flags that do not fit each other; a store of other cells, of another checkpoint,
        or of other settings than the rows would be computed with.
    """
    if FLAGS.embedding is not None:
        return _of_store(adata)
    if FLAGS.checkpoint is None:
        if FLAGS.model not in (None, "scvi"):
            raise InputError(f"--checkpoint is needed: the folder of the {FLAGS.model}")
        if FLAGS.out_of_core:
            raise InputError(
                "an scVI is trained on cells in memory: with --out_of_core give a trained one by "
                "--checkpoint (of some of the cells, say), or rows by --embedding"
            )
        scvi_model.check_installed()
        if FLAGS.counts is not None:
            raise InputError("an scVI is trained on X: leave --counts out, or give a --checkpoint")
        if FLAGS.layer not in (None, LATENT):
            raise InputError(f"--layer={FLAGS.layer}: an scVI has {LATENT} alone")
        return Source(None, None, "scvi", LATENT)
    name = FLAGS.model or "scvi"
    model = _loaded(name, FLAGS.checkpoint)
    by_symbol = model.naming == "symbol" and FLAGS.gene_symbols is not None
    asked = FLAGS.layer
    layer = model.resolve(int(asked) if asked and asked.lstrip("-").isdigit() else asked)[0]
    return Source(model, None, name, layer, FLAGS.gene_symbols if by_symbol else None, FLAGS.counts)


def _loaded(name: str, folder: str) -> Any:
    more = {} if FLAGS.dictionaries is None else {"dictionaries": FLAGS.dictionaries}
    return extract.load_model(name, folder, device="auto", **more)


def _of_store(adata: anndata.AnnData) -> Source:
    """The rows that an extraction store has of the cells, and its model if that is there."""
    found = store.open(FLAGS.embedding, FLAGS.verify)
    about = found.extraction
    for flag, theirs in (("model", about["model"]), ("counts", about["counts"])):
        if (mine := FLAGS[flag].value) is not None and mine != theirs:
            raise InputError(f"--{flag}={mine}, but {found.path} was extracted with {theirs}")
    if FLAGS.layer is not None and FLAGS.layer != str(about["layer"]):
        raise InputError(f"--layer={FLAGS.layer}, but {found.path} holds layer {about['layer']}")
    if about["pooling"] == "tokens":
        raise InputError(
            f"{found.path} holds tokens, concepts are of cells: extract with a pooling"
        )
    at = found.obs.index.get_indexer(adata.obs_names)
    if (at < 0).any():
        raise InputError(
            f"{found.path} lacks {int((at < 0).sum())} of the {len(at)} cells of {FLAGS.h5ad} "
            f"({adata.obs_names[at < 0][0]} first): it is of other cells"
        )
    x = data.check_rows(np.asarray(found.X[:], np.float32)[at], str(found.path))
    genes, counts = _or_none(about["genes"], "var_names"), _or_none(about["counts"], "X")
    model, folder = None, FLAGS.checkpoint or about["checkpoint"]
    if FLAGS.checkpoint is None and not Path(folder).exists():
        logging.warning("%s, the model of %s, is not there: its genes cannot be exchanged", folder,
                        found.path)  # fmt: skip
    else:
        model = _loaded(about["model"], folder)
        _check(model, x, adata, found, genes, counts)
    return Source(model, x, about["model"], about["layer"], genes, counts)


def _check(
    model: Any, x: np.ndarray, adata: anndata.AnnData, found: store.Store, genes: str | None,
    counts: str | None,
) -> None:  # fmt: skip
    """Refuse a store whose rows are not what the model gives of these cells.

    Raises:
      InputError: weights of another SHA-256, another pooling or preprocessing than the model's own,
        or rows of a few cells that differ: the file has other counts of the same cells.
    """
    about = found.extraction
    if dict(model.checkpoint) != _plain(about["checkpoint_sha256"]):
        raise InputError(
            f"{found.path} was extracted with other weights than those in "
            f"{FLAGS.checkpoint or about['checkpoint']} (SHA-256): give their folder by "
            "--checkpoint, or extract again"
        )
    plan = model.plan(adata, genes, counts)
    own = {k: v for k, v in plan.settings.items() if k not in ("coverage", "min_gene_coverage")}
    asked = _plain({"pooling": model.pooling(None), "preprocessing": own})
    theirs = _plain({name: about[name] for name in asked})
    if theirs != asked:
        raise InputError(
            f"{found.path} was extracted with other settings than the model's own, by which genes "
            f"would be exchanged: {provenance.differences(theirs, asked)}"
        )
    some = np.unique(np.linspace(0, adata.n_obs - 1, SOME).astype(int))
    again = model.embed(lazy.restrict(adata, some), about["layer"], genes=genes, counts=counts)
    again = again[about["layer"]]
    off = np.abs(again - x[some]).mean() / np.abs(again).mean()
    if not off <= APART:
        raise InputError(
            f"{found.path} has other rows than the model gives of {FLAGS.h5ad} (they differ by "
            f"{off:.0%}): are these the counts that were extracted?"
        )


def check_memory(given: Source, n_cells: int) -> None:
    """Of --out_of_core: the genes of cells to learn from are in memory, all at once.

    Raises:
      InputError: --memory_gib has no place for those of so many cells.
    """
    counts = given.counts or "X"
    blocks, *_ = cells.stored(FLAGS.h5ad, counts, memory_bytes=reading.block_bytes())
    wanted = blocks.block_bytes * (len(blocks.cuts) - 1) * n_cells // blocks.shape[0]
    if wanted > reading.memory_bytes():
        raise InputError(
            f"labels are learned from the genes of up to {n_cells:,} cells, which take some "
            f"{chunked.size(wanted)}, of --memory_gib={FLAGS.memory_gib:g}: give more, or lower "
            f"--per_class={','.join(FLAGS.per_class)}"
        )


def _or_none(named: str, default: str) -> str | None:
    return None if named == default else named


def _plain(value: Any) -> Any:
    """What anndata made of JSON's types, as these again."""
    return json.loads(json.dumps(value, default=lambda held: held.tolist()))


@dataclasses.dataclass(frozen=True, eq=False)
class Genes:
    """What is known of genes before anything is computed; as the attributes of `Subject`."""

    expression: cells.Expression
    genes: np.ndarray
    exchanged: list[str]
    sets: GeneSets


def genes(adata: anndata.AnnData, symbols: dict[str, str], given: Source) -> Genes:
    """Those that model and file both know; without a model, all measured ones.

    Raises:
      InputError: expression that is no counts, too few genes, or too few of them in gene sets.
    """
    # Expression by the names that the model's genes have in the file, so that it is the same gene.
    expression = reading.expression_of(
        adata, FLAGS.h5ad, given.counts or "X", "counts", given.genes, reading.block_bytes()
    )
    measured = {gene: i for i, gene in enumerate(expression.genes)}
    means = expression.means
    if given.model is not None:
        exchanged = given.model.plan(adata, **given.options).genes
    elif given.x is None:  # an scVI that is still to be trained, on all of X
        exchanged = adata.var_names.astype(str).tolist()
    else:
        exchanged = list(expression.genes)
    known = [gene for gene in exchanged if gene in measured]
    # Of several genes with one symbol the most expressed; the order is the model's.
    named = given.genes is not None and given.genes == FLAGS.gene_symbols
    symbol_of = {gene: gene if named else symbols.get(gene, gene) for gene in known}
    best: dict[str, str] = {}
    for gene in sorted(known, key=lambda gene: -means[measured[gene]]):
        best.setdefault(symbol_of[gene], gene)
    chosen = [gene for gene in known if best[symbol_of[gene]] == gene]
    if len(chosen) < 100:
        raise InputError(
            f"{len(chosen)} genes of the model have measured expression: too few for enrichment"
        )
    columns = np.array([measured[gene] for gene in chosen])
    names = np.asarray([symbol_of[gene] for gene in chosen], object)
    return Genes(
        expression.of_genes(columns, names), np.asarray(chosen, object), exchanged,
        reading.load_sets(list(names)),
    )  # fmt: skip


def subject(
    adata: anndata.AnnData, labels: pd.DataFrame, given: Source, known: Genes, out: Path
) -> Subject:
    """The cells in the model, which is trained, and embeds them, if no earlier run has done it."""
    model, layer, x = given.model, given.layer, given.x
    if model is None and x is None:
        model = scvi_model.trained(
            adata, out / "scvi", n_latent=FLAGS.d_model, epochs=FLAGS.model_epochs, seed=FLAGS.seed
        )
    if x is None:
        path = out / "embedding.npy"
        if not path.exists():
            logging.info("embedding %d cells", adata.n_obs)
            with files.write_aside(path) as fresh, fresh.open("wb") as file:
                np.save(file, model.embed(adata, layer, **given.options)[layer])
        x = data.check_rows(np.load(path), "the embedding")
    return Subject(
        adata=adata, model=model, model_name=given.name, layer=layer, options=given.options, x=x,
        labels=labels, expression=known.expression, genes=known.genes, exchanged=known.exchanged,
        sets=known.sets,
    )  # fmt: skip

"""The cells that `cell_type_programs` looks at, out of flags: types, genes, marker sets, the split,
and where their layers are. Everything is checked before any work."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging

from analysis import cell_types, cells, gene_associations, gene_sets, markers
from experiments import cell_type_layers, folders
from experiments import inputs as reading
from experiments.cell_type_features import Cells
from experiments.cell_type_layers import Layer
from sae_jax import InputError

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """All that is read, and checked: cells, and where their layers are."""

    cells: Cells
    names: pd.Index
    settings: dict[str, Any]
    layers: list[cell_type_layers.Found] | list[Layer]


def define_flags() -> None:
    """Of the cells, the layers, and what features are described by."""
    reading.define_flags()
    flags.DEFINE_list("stores", None, "Folders of extraction stores: of cells, of tokens.")
    flags.DEFINE_string("checkpoint", None, "A model's folder, to extract the layers here.")
    flags.DEFINE_integer("limit", 1000, "Extract the first cells only.", lower_bound=1)
    flags.DEFINE_list("layers", None, "Of the stores or the model: 0,6,11; default: all.")
    flags.DEFINE_float("test_share", 0.3, "Of the cells, held out; 0: measure where chosen.", 0, 1)
    flags.DEFINE_integer("min_label_cells", 5, "Of a type, on either side of the split.", 2)
    flags.DEFINE_list("metadata", None, "Further columns of obs to describe features by: tissue.")
    flags.DEFINE_float("metadata_share", 0.7, "Of a feature's active cells: specific.", 0.5, 1)
    flags.DEFINE_integer("metadata_cells", 100, "With fewer active cells: not enough data.", 1)
    flags.DEFINE_integer("top_genes", 50, "Correlated genes that are tested for markers.", 1)
    flags.DEFINE_enum("correlate_with", "expression", ["expression", "presence"],
                      "What of the genes: the text, or the code.")  # fmt: skip
    flags.DEFINE_integer("min_gene_cells", 3, "Cells in which a gene is expressed, at least.", 1)
    flags.DEFINE_enum(
        "universe", "measured", markers.UNIVERSES,
        "Of Fisher's test: all measured genes, or (code) those of the sets.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "marker_sets", "paper", ["paper", "all"], "Of --gene_sets=embedded: the paper's 13, or all."
    )


def read() -> Inputs:
    """The cells and their split, and the layers as far as they are there already."""
    layers: list[Any] = []
    settings = {
        flag.name: flag.value
        for module in (FLAGS.find_module_defining_flag(name) for name in ("stores", "workdir"))
        for flag in FLAGS.get_flags_for_module(module)
    }
    if not (FLAGS.stores or FLAGS.checkpoint):
        given = reading.read("h5ad", gene_sets.MIN_UNIVERSE)
        settings |= given.settings
        names, obs, labels, expression = given.obs.index, given.obs, given.labels, given.expression
        name = Path(FLAGS.embedding or "PCA").stem
        layers = [Layer(name, given.embedding, None, {"h5ad": settings["h5ad"], "data": name})]
    else:
        if FLAGS.h5ad is None or FLAGS.expression_is is None:
            raise InputError("--stores and --checkpoint need --h5ad and --expression_is")
        adata = cells.read(FLAGS.h5ad)
        names = adata.obs_names[: FLAGS.limit]
        cell_flags = FLAGS.get_flags_for_module(FLAGS.find_module_defining_flag("h5ad"))
        settings |= {flag.name: flag.value for flag in cell_flags}
        if FLAGS.stores:
            layers = cell_type_layers.find(FLAGS.stores, FLAGS.layers, FLAGS.verify)
            names = cell_type_layers.cell_names(layers)
            settings["identities"] = {
                str(part.path): part.extraction["identity"]
                for layer in layers for part in (layer.cells, layer.tokens) if part is not None
            }  # fmt: skip
        at = adata.obs_names.get_indexer(names)
        if (at < 0).any():
            raise InputError(
                f"{FLAGS.h5ad} lacks {int((at < 0).sum())} of the {len(names)} cells of the "
                f"stores ({names[at < 0][0]} first)"
            )
        adata = adata[at].copy()
        labels = None if FLAGS.label is None else cells.labels(adata, FLAGS.label)
        expression = cells.expression(
            adata, FLAGS.expression or "X", FLAGS.expression_is, FLAGS.gene_symbols
        )
        obs = adata.obs
    if labels is None:
        raise InputError("--label is needed: the column of obs with the cells' types")
    paths = (FLAGS.gene_sets, FLAGS.gene_table, FLAGS.obo, FLAGS.checkpoint)
    settings["contents"] = folders.contents([settings["h5ad"], *paths])
    return Inputs(subject(obs, labels, expression), names, settings, layers)


def subject(obs: pd.DataFrame, labels: pd.Series, expression: cells.Expression) -> Cells:
    """The cells with everything that their features are described by."""
    if missing := [name for name in FLAGS.metadata or [] if name not in obs]:
        raise InputError(f"--metadata: obs has no {', '.join(missing)}")
    choose, measure = cell_types.split(labels, FLAGS.test_share, FLAGS.seed)
    # Of genes that hardly any cell expresses, correlations with a rare feature are noise.
    kept = gene_associations.expressed(expression.x[choose], FLAGS.min_gene_cells)
    genes, x = expression.genes[kept], expression.x[:, kept]
    sets = reading.load_sets(genes, gene_sets.MIN_UNIVERSE)
    if FLAGS.gene_sets == gene_sets.EMBEDDED and FLAGS.marker_sets == "paper":
        sets = markers.of_paper(sets)
    if FLAGS.correlate_with == "presence":
        x = gene_associations.presence(x)
    columns = [FLAGS.label or labels.name, *(FLAGS.metadata or [])]
    metadata = pd.DataFrame({columns[0]: labels}).join(obs[columns[1:]])
    logging.info(
        "%d cells, %d of them held out; %d genes, %d marker sets",
        len(labels), len(measure) * (FLAGS.test_share > 0), len(genes), len(sets.names),
    )  # fmt: skip
    found = Cells(
        labels=labels, metadata=metadata, expression=x, genes=genes, sets=sets, choose=choose,
        measure=measure, n_top=FLAGS.top_genes, universe=FLAGS.universe,
        least=FLAGS.min_label_cells, share=FLAGS.metadata_share, min_cells=FLAGS.metadata_cells,
        seed=FLAGS.seed,
    )  # fmt: skip
    check_types(found)
    return found


def check_types(of: Cells) -> None:
    """Raises InputError where fewer than two types have cells enough on either side."""
    nothing = np.zeros((len(of.labels), 1))
    cell_types.areas(nothing, of.labels, of.choose, of.measure, of.least)

"""What a run does not have, in one sentence, with the command that makes it."""

CONCEPTS = (
    "run `sae-jax concepts --h5ad=CELLS.h5ad --labels=COLUMN --workdir=CONCEPTS` with this "
    "dictionary, then `sae-jax browse` on both folders"
)
_LENS = (
    "run `sae-jax lens --h5ad=CELLS.h5ad --dictionary=FOLDER --workdir=LENS` with this dictionary, "
    "then `sae-jax browse` on both folders"
)
_AGAIN = "run the program that made the folder again with --resume: this version writes it"
MORE = "`sae-jax concepts --most=N` attributes more of them"

# Nothing of it in the run; and, of what is made for some features only, why not of this one.
RUN = {
    "cells": f"The cells' activations are not in this run: {_AGAIN}.",
    "maps": f"There is no map of the cells: {_AGAIN}.",
    "decoder": f"The dictionary's decoder is not in this run: {_AGAIN}.",
    "attribution": f"Genes were not attributed in this run: {CONCEPTS}.",
    "samples": f"Single samples of the attribution are not in this run: {_AGAIN}.",
    "dge": f"No differential expression is in this run: {_LENS}.",
    "terms": f"Gene sets were not tested by the lens in this run: {_LENS}.",
    "gsea/attribution": f"GSEA of attributed genes is not in this run: {CONCEPTS}.",
    "gsea/dge": f"GSEA of differential expression is not in this run: {CONCEPTS}.",
    "deletion": f"Deletion curves are not in this run: {CONCEPTS}.",
    "sets": f"The genes of the terms (gene_sets.parquet) are not in this run: {_AGAIN}.",
    "feature_map": (
        "There is no map of the features by their terms: "
        "`sae-jax lens` makes one where more than ten features have terms."
    ),
    "gene_info": (
        "Genes have no descriptions or other names: give NCBI's table, "
        "`sae-jax browse RUN --gene_info=Homo_sapiens.gene_info.gz`."
    ),
}
FEATURE = {
    "attribution": f"This feature was not among those that genes were attributed to: {MORE}.",
    "gsea/attribution": f"This feature was not among those that genes were attributed to: {MORE}.",
    "gsea/dge": f"This feature was not among those that genes were attributed to: {MORE}.",
    "deletion": f"No deletion curve was made of this feature: {MORE}.",
    "dge": "Too few of its cells are active, or silent, to compare their expression.",
    "terms": "Too few of its cells are active, or silent, to test gene sets.",
}

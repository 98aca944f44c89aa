"""What the same pipeline calls when there is nothing to find.

Each null breaks one step: permuted cells leave a feature without genes of its own, relabelled genes
leave the gene sets without a meaning.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from analysis import enrichment
from analysis.gene_sets import GeneSets


def permuted_cells(z: sparse.csr_matrix, seed: int) -> sparse.csr_matrix:
    """Activations [cells, features] with the cells of each feature permuted on their own.

    Every feature keeps its values and its density and loses its cells.
    """
    rng = np.random.default_rng(seed)
    columns = sparse.csc_matrix(z, copy=True)
    for feature in range(columns.shape[1]):
        entries = slice(columns.indptr[feature], columns.indptr[feature + 1])
        size = entries.stop - entries.start
        columns.indices[entries] = rng.choice(columns.shape[0], size, replace=False)
    columns.sort_indices()
    return columns.tocsr()


def relabelled_genes(sets: GeneSets, expression: np.ndarray, seed: int) -> GeneSets:
    """The sets with every gene exchanged for one of like mean expression [genes].

    Sizes and overlaps of the sets and the expression of their genes stay; what the genes have in
    common goes. Exchanged are genes within strata of about 40, finer than those that
    `annotation.annotate` tests within.
    """
    rng = np.random.default_rng(seed)
    strata = enrichment.strata_of_rank(expression, 40)
    shuffled = np.lexsort((rng.random(strata.size), strata))
    renamed = np.empty_like(shuffled)
    renamed[np.argsort(strata, kind="stable")] = shuffled
    return dataclasses.replace(sets, membership=sets.membership[:, renamed])

"""What the same pipeline calls when there is nothing to find.

Each null breaks one step: permuted cells leave a feature without genes of its own, relabelled genes
and random sets leave the gene sets without a meaning. The others keep the cells' structure and take
the training away: random directions, a dictionary before its training, single dimensions.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from scipy import sparse

from analysis import enrichment
from analysis.gene_sets import GeneSets
from sae_jax import models
from sae_jax.dictionary import Dictionary


def permuted_cells(z: sparse.csr_matrix, seed: int | np.random.Generator) -> sparse.csr_matrix:
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
    `lens.annotate` tests within.
    """
    rng = np.random.default_rng(seed)
    strata = enrichment.strata_of_rank(expression, 40)
    shuffled = np.lexsort((rng.random(strata.size), strata))
    renamed = np.empty_like(shuffled)
    renamed[np.argsort(strata, kind="stable")] = shuffled
    return dataclasses.replace(sets, membership=sets.membership[:, renamed])


def random_sets(sets: GeneSets, seed: int) -> GeneSets:
    """The sets with every gene exchanged for any other: sizes and overlaps stay."""
    renamed = np.random.default_rng(seed).permutation(sets.membership.shape[1])
    return dataclasses.replace(sets, membership=sets.membership[:, renamed])


def random_directions(x: np.ndarray, density: np.ndarray, seed: int) -> sparse.csr_matrix:
    """Features [cells, len(density)] that no training chose: random directions of x [cells, d].

    Each is positive in the share `density` of the cells that lie furthest along a random unit
    vector of the standardised embedding, by how far they lie beyond the last of the others.
    """
    rng = np.random.default_rng(seed)
    spread = x.std(axis=0)
    standard = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)
    columns = []
    for share in density:
        direction = rng.normal(size=x.shape[1])
        along = standard @ (direction / np.linalg.norm(direction))
        beyond = along - np.quantile(along, 1 - min(share, 1.0))
        columns.append(sparse.csc_matrix(np.maximum(beyond, 0)[:, None].astype(np.float32)))
    return sparse.hstack(columns, format="csr")


def neurons(x: np.ndarray) -> sparse.csr_matrix:
    """Either side of each dimension of an embedding as a feature [cells, 2 d], from its median."""
    centred = x - np.median(x, axis=0)
    sides = np.concatenate([np.maximum(centred, 0), np.maximum(-centred, 0)], axis=1)
    return sparse.csr_matrix(sides.astype(np.float32))


def untrained(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    """The same choices and normalisation with the weights that training starts from."""
    config = dataclasses.replace(dictionary.config, seed=seed)
    fresh = models.init(np.int32(seed), config.architecture, np.float32)
    weights = jax.tree.map(np.asarray, fresh)
    return Dictionary(config, weights, dictionary.normalizer, {"untrained": True})

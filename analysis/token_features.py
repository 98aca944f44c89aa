"""Features of tokens to features of cells, and the gene tokens that each feature is active on.

A dictionary trained on the hidden states of gene tokens (Kendiukhov, section 3.3) has a code for
every token. A cell's is their mean here, the codes in the space that the dictionary knows; the
authors' code encodes the mean of the cell's hidden states instead, which lies outside of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from sae_jax.errors import InputError


class Encoder(Protocol):
    """What encodes rows: a dictionary, components."""

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes [rows, features] of x [rows, d]."""
        ...


@dataclass(frozen=True, eq=False)
class Pooled:
    """Codes of tokens, summed up.

    cells: mean code of each cell's tokens [cells, features]; NaN for a cell without tokens.
    genes: mean code of each gene's tokens [genes, features]; NaN for a gene without tokens.
    n_cell, n_gene: tokens of each cell and gene.
    active: tokens that each feature is active on [features].
    """

    cells: np.ndarray
    genes: np.ndarray
    n_cell: np.ndarray
    n_gene: np.ndarray
    active: np.ndarray

    @property
    def density(self) -> np.ndarray:
        """Share of all tokens that each feature is active on."""
        return self.active / max(self.n_cell.sum(), 1)


def pool(
    encoder: Encoder,
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    n_cells: int,
    n_genes: int,
) -> Pooled:
    """Encode tokens block by block, and take means by cell and by gene.

    Args:
        encoder: of the tokens' rows.
        blocks: of each block x [tokens, d] and the positions of its tokens' cells and genes.
        n_cells, n_genes: that there are.

    Raises:
        InputError: no tokens.
    """
    cells = genes = active = None
    n_cell, n_gene = np.zeros(n_cells, np.int64), np.zeros(n_genes, np.int64)
    for x, cell, gene in blocks:
        z = np.asarray(encoder.encode(x), np.float64)
        if cells is None:
            cells, genes = (np.zeros((n, z.shape[1])) for n in (n_cells, n_genes))
            active = np.zeros(z.shape[1], np.int64)
        for sums, codes, counts in ((cells, cell, n_cell), (genes, gene, n_gene)):
            there, of = np.unique(codes, return_inverse=True)
            one_hot = sparse.csr_array(
                (np.ones(len(of)), (of, np.arange(len(of)))), shape=(len(there), len(of))
            )
            sums[there] += one_hot @ z
            counts += np.bincount(codes, minlength=len(counts))
        active += np.count_nonzero(z > 0, axis=0)
    if cells is None:
        raise InputError("there are no tokens: nothing can be pooled.")
    with np.errstate(invalid="ignore"):
        means = [sums / n[:, None] for sums, n in ((cells, n_cell), (genes, n_gene))]
    return Pooled(*means, n_cell, n_gene, active)


def top_tokens(pooled: Pooled, names: np.ndarray, n: int = 10, least: int = 10) -> pd.DataFrame:
    """The genes on whose tokens each feature is most active in the mean.

    Args:
        pooled: of `pool`.
        names: of its genes.
        n: genes of each feature, at most; those on which it is never active are left out.
        least: tokens that a gene must have.

    Returns:
        One row per feature and gene, strongest first: `feature`, `rank` (from 0), `gene`, `tokens`,
        `mean` (of the gene's tokens) and `share` (of all the feature's activation over tokens).
    """
    known = np.flatnonzero(pooled.n_gene >= max(least, 1))
    means = pooled.genes[known]
    total = np.nansum(pooled.genes * pooled.n_gene[:, None], axis=0)
    n = min(n, len(known))
    rows = []
    for feature in range(means.shape[1]):
        order = np.argsort(-means[:, feature], kind="stable")[:n]
        order = order[means[order, feature] > 0]
        at = known[order]
        rows.append(
            pd.DataFrame(
                {
                    "feature": feature,
                    "rank": np.arange(len(at)),
                    "gene": np.asarray(names, object)[at],
                    "tokens": pooled.n_gene[at],
                    "mean": means[order, feature],
                    "share": means[order, feature] * pooled.n_gene[at] / total[feature],
                }
            )
        )
    return pd.concat([rows[0], *(some for some in rows[1:] if len(some))], ignore_index=True)

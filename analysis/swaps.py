"""Which exchanges of single genes are needed: each distinct one of a prototype, once.

What a prototype's codes are after an exchange depends on the gene and on its new value, never on
the concept that asks, nor on the counterfactual that the value (most often 0) came from. Genes that
have the same value in both cells are no exchange, nor are those that the model sees the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import sparse

from analysis.blocks import slices

CELLS = 64  # counterfactuals compared at once

Seen = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Swaps:
    """The distinct exchanges of one prototype.

    Attributes:
      genes: positions, ascending, int64 [swaps].
      values: their new values, float64 [swaps].
      uses: 1 where a counterfactual asks for an exchange, CSR [swaps, counterfactuals].
    """

    genes: np.ndarray
    values: np.ndarray
    uses: sparse.csr_array


def distinct(
    values: sparse.csr_array, seen: Seen, prototype: int, counterfactuals: np.ndarray
) -> Swaps:
    """What a prototype's genes are exchanged for.

    Args:
        values: [cells, genes].
        seen: (cell, genes, values) -> numbers that are equal where the model sees no difference.
        prototype, counterfactuals: rows of `values`.
    """
    own = values[[prototype]].toarray()[0]
    of, genes, new = [], [], []
    for part in slices(len(counterfactuals), CELLS):
        others = values[counterfactuals[part]].toarray()
        row, gene = np.nonzero(others != own)
        of.append(row + part.start)
        genes.append(gene)
        new.append(others[row, gene])
    row, gene, value = np.concatenate(of), np.concatenate(genes), np.concatenate(new)
    number = seen(prototype, gene, value)
    changes = number != seen(prototype, gene, own[gene])
    row, gene, value, number = (part[changes] for part in (row, gene, value, number))
    order = np.lexsort((number, gene))
    row, gene, value, number = (part[order] for part in (row, gene, value, number))
    first = np.ones(len(gene), bool)
    first[1:] = (np.diff(gene) != 0) | (np.diff(number) != 0)
    shape = (int(first.sum()), len(counterfactuals))
    uses = sparse.csr_array((np.ones(len(gene)), (np.cumsum(first) - 1, row)), shape=shape)
    return Swaps(gene[first], value[first], uses)

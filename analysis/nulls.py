"""What the same pipeline calls when there is nothing to find."""

from __future__ import annotations

import numpy as np
from scipy import sparse


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

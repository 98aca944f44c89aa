"""What the rows of pooling "tokens" are: a cell and a gene each."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd


def token_table(
    cells: Sequence[str],
    rows: np.ndarray,
    ids: np.ndarray,
    gene_names: Callable[[np.ndarray], Sequence[str]],
) -> pd.DataFrame:
    """Columns `cell` and `gene`, categories of names, a row each: made of numbers, for 1e8 rows.

    Args:
      cells: names, unique.
      rows: tokens of each cell, int64 [cells].
      ids: vocabulary positions of the tokens, cell after cell, integers [tokens].
      gene_names: names of vocabulary positions.
    """
    known = np.flatnonzero(np.bincount(ids))
    code = np.zeros(known[-1] + 1 if len(known) else 0, np.int32)
    code[known] = np.arange(len(known))
    cell = np.repeat(np.arange(len(cells), dtype=np.int32), rows)
    return pd.DataFrame(
        {
            "cell": pd.Categorical.from_codes(cell, pd.Index(cells, dtype=object)),
            "gene": pd.Categorical.from_codes(code[ids], pd.Index(gene_names(known), dtype=object)),
        }
    )

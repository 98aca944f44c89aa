"""What each feature of a dictionary does: how often it fires, how strongly, and for which cells.

Activations come as a matrix of cells by features, as a dictionary's `encode` gives them: sparse
(any SciPy format) or dense. Everything is counted from the non-zero entries, all features at once.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from sae_jax.errors import InputError

Matrix = np.ndarray | sparse.sparray | sparse.spmatrix


def as_columns(z: Matrix, *, signed: bool = False) -> sparse.csc_array:
    """Brings activations [cells, features] into one form: float64 columns that store no zeros.

    Args:
        z: activations, dense or sparse. It is not changed.
        signed: whether negative values are allowed (principal components, neurons).

    Raises:
        InputError: if z is not a matrix, holds NaN or infinity, or is negative without `signed`.
    """
    if np.ndim(z) != 2:
        raise InputError(
            f"activations have {np.ndim(z)} dimensions: give a matrix of cells by features."
        )
    columns = sparse.csc_array(z, dtype=np.float64, copy=True)
    columns.sum_duplicates()
    columns.eliminate_zeros()
    if not np.isfinite(columns.data).all():
        row, feature = _first(columns, ~np.isfinite(columns.data))
        raise InputError(
            f"the activation of feature {feature} in cell {row} is NaN or infinite: "
            "drop such cells, or check the dictionary that made them."
        )
    if not signed and (columns.data < 0).any():
        row, feature = _first(columns, columns.data < 0)
        raise InputError(
            f"the activation of feature {feature} in cell {row} is negative, so 'active' is not "
            "defined: give the dictionary's activations, not pre-activations or components."
        )
    return columns


def _first(columns: sparse.csc_array, bad: np.ndarray) -> tuple[int, int]:
    """The cell and the feature of the first stored entry where `bad` holds."""
    entry = int(np.argmax(bad))
    return int(columns.indices[entry]), int(np.searchsorted(columns.indptr, entry, "right")) - 1


def as_booleans(name: str, values: Matrix) -> Matrix:
    """A checked copy, boolean: of a matrix dense, or CSR that stores True only.

    Args:
        name: what to call it in an error.
        values: booleans, or numbers that are 0 and 1 only; dense (an array, a list, a table) or
            sparse.

    Raises:
        InputError: for anything else.
    """
    dense = None if sparse.issparse(values) else np.asarray(values)
    stored = values.data if dense is None else dense
    if stored.dtype != bool and not (stored.dtype.kind in "iuf" and np.isin(stored, (0, 1)).all()):
        raise InputError(f"{name} is {stored.dtype}: give booleans, for example activations > 0.")
    if dense is not None:
        return dense.astype(bool)
    found = sparse.csr_array(values, dtype=bool, copy=True)
    found.sum_duplicates()
    found.eliminate_zeros()
    return found


def feature_of_entry(columns: sparse.csc_array) -> np.ndarray:
    """The feature of each stored entry of `columns`, in stored order."""
    return np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))


def activity(z: Matrix) -> pd.DataFrame:
    """How often and how strongly each feature is active. A cell is active if its value is above 0.

    Args:
        z: non-negative activations [cells, features], dense or sparse.

    Returns:
        One row per feature (index "feature"): `n_active` (cells), `density` (share of all cells, 0
        to 1), `mean_activation` (over all cells), `mean_active` (over the active cells; NaN for a
        dead feature) and `max_activation` (0 for a dead feature).

    Raises:
        InputError: as `as_columns`; or if there are no cells.
    """
    columns = as_columns(z)
    n_cells, n_features = columns.shape
    if n_cells == 0:
        raise InputError("activations hold no cells: nothing can be counted.")
    n_active = np.diff(columns.indptr)
    total = columns.sum(axis=0)
    mean_active = np.full(n_features, np.nan)
    return pd.DataFrame(
        {
            "n_active": n_active,
            "density": n_active / n_cells,
            "mean_activation": total / n_cells,
            "mean_active": np.divide(total, n_active, out=mean_active, where=n_active > 0),
            "max_activation": columns.max(axis=0).toarray(),
        },
        index=pd.RangeIndex(n_features, name="feature"),
    )


def auroc(z: Matrix, labels: ArrayLike | pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve of every feature for every label against all other labels.

    Kendiukhov scores features by it (specific above 0.8). One-sided: 1 if every cell of the label
    has a higher activation than every other cell, 0.5 for no association, below 0.5 if the label
    has the lower activations. Where the sign of a direction is arbitrary (principal components),
    max(a, 1 - a) is the fair number to compare.

    The area is the rank sum statistic U / (n1 n2), ties getting their average rank. Only non-zero
    entries are sorted: all zeros of a feature are one block of ties whose rank is known by counting
    what lies below it, and subtracting that rank from all keeps the rest sparse.

    Args:
        z: activations [cells, features], dense or sparse; negative values are allowed.
        labels: one label per cell. Cells without one (None, NaN) are left out of everything.

    Returns:
        The label names [labels], sorted (or in the order of the categories), and the areas
        [features, labels], float64.

    Raises:
        InputError: if z is not a finite matrix, if the labels are not one per cell, or if fewer
            than two different labels occur.
    """
    columns = as_columns(z, signed=True)
    if np.ndim(labels) != 1 or len(labels) != columns.shape[0]:
        raise InputError(
            f"labels have shape {np.shape(labels)} for {columns.shape[0]} cells: give one per cell."
        )
    label = pd.Categorical(labels).remove_unused_categories()
    if len(label.categories) < 2:
        raise InputError(
            f"labels hold only {list(label.categories)}: one-vs-rest needs two different labels."
        )
    labelled = label.codes >= 0
    if not labelled.all():
        columns, label = columns[labelled], label[labelled]
    n_cells, n_labels = columns.shape[0], len(label.categories)

    above, zero_rank = ranks(columns)
    one_hot = sparse.csr_array(
        (np.ones(n_cells), label.codes, np.arange(n_cells + 1)), shape=(n_cells, n_labels)
    )
    n_in = one_hot.sum(axis=0)
    rank_sum = (above.T @ one_hot).toarray() + zero_rank[:, None] * n_in
    u = rank_sum - n_in * (n_in + 1) / 2
    return np.asarray(label.categories), u / (n_in * (n_cells - n_in))


def ranks(columns: sparse.csc_array) -> tuple[sparse.csc_array, np.ndarray]:
    """Average ranks (from 1) within each column, less the rank of its zeros, and that rank.

    Returns:
        The differences [cells, features] at the non-zero entries, and the rank of zero [features].
    """
    n_cells, n_features = columns.shape
    feature = feature_of_entry(columns)
    order = np.lexsort((columns.data, feature))
    value = columns.data[order]
    first = np.ones(value.size, dtype=bool)  # of a block of equal values of one feature
    first[1:] = (value[1:] != value[:-1]) | (feature[1:] != feature[:-1])
    start = np.flatnonzero(first)
    size = np.diff(start, append=value.size)
    among_entries = start - columns.indptr[feature[start]] + (size + 1) / 2

    n_zeros = n_cells - np.diff(columns.indptr)
    n_below = np.bincount(feature, weights=value < 0, minlength=n_features)
    zero_rank = n_below + (n_zeros + 1) / 2
    rank = np.repeat(among_entries, size) + np.where(value > 0, n_zeros[feature], 0)
    shifted = (rank - zero_rank[feature], columns.indices[order], columns.indptr)
    return sparse.csc_array(shifted, shape=columns.shape), zero_rank


def telling(z: Matrix, labels: ArrayLike | pd.Series) -> pd.DataFrame:
    """Of every label the feature with its highest area, on the cells that it is chosen on.

    Another thing than the label that a feature tells best: one feature may be the best of several
    labels, which nest or are rare, and a label that is no feature's best has a best feature too.

    Args:
        z, labels: as in `auroc`.

    Returns:
        One row a label, in their order: `label`, `feature` (position, the first of equals),
        `auroc`.
    """
    names, areas = auroc(z, labels)
    feature = areas.argmax(axis=0)
    found = areas[feature, np.arange(len(names))]
    return pd.DataFrame({"label": names, "feature": feature, "auroc": found})


def best_for_labels(
    z: Matrix, embedding: np.ndarray, labels: pd.Series, choose: np.ndarray, measure: np.ndarray
) -> pd.DataFrame:
    """The best feature for every label, chosen on some cells and measured on others.

    Beside it, chosen and measured alike, the best dimension of the embedding itself. Its sign is
    arbitrary, so it gets the better side on the choosing cells and keeps it on the others.

    Args:
        z: activations [cells, features].
        embedding: [cells, dimensions].
        labels: categorical, one per cell.
        choose, measure: positions of cells, without one in common.

    Returns:
        One row a label that occurs on both sides: `label`, `cells` (all of them), `feature` and
        `dimension` (positions), `auroc_chosen`, `auroc` (on the measured cells),
        `dimension_auroc_chosen`, `dimension_auroc`.
    """
    sides = {}
    for name, values in {"feature": sparse.csr_array(z), "dimension": embedding}.items():
        for side, cells in {"choose": choose, "measure": measure}.items():
            names, areas = auroc(values[cells], labels.iloc[cells])
            sides[name, side] = pd.DataFrame(areas.T, index=names)
    shared = sides["feature", "choose"].index.intersection(sides["feature", "measure"].index)
    rows = []
    for label in shared:
        chosen, measured = (sides["feature", s].loc[label] for s in ("choose", "measure"))
        raw_chosen, raw_measured = (sides["dimension", s].loc[label] for s in ("choose", "measure"))
        feature, dimension = chosen.idxmax(), (raw_chosen - 0.5).abs().idxmax()
        up = raw_chosen[dimension] >= 0.5
        rows.append(
            {
                "label": label,
                "cells": int((labels == label).sum()),
                "feature": feature,
                "auroc_chosen": chosen[feature],
                "auroc": measured[feature],
                "dimension": dimension,
                "dimension_auroc_chosen": np.where(up, 1, -1) * (raw_chosen[dimension] - 0.5) + 0.5,
                "dimension_auroc": np.where(up, 1, -1) * (raw_measured[dimension] - 0.5) + 0.5,
            }
        )
    return pd.DataFrame(rows)

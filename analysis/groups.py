"""Choosing the cells that are compared: for every feature a high and a low group, as sparse masks.

A mask is boolean CSR [features, cells] that stores True only; the groups of thousands of features
never become a dense matrix. The low group that needs no mask is every silent cell: give `active` to
`differential.welch`, exact and free. The masks here are for the other low groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from analysis.features import Matrix, as_booleans, as_columns, feature_of_entry
from sae_jax.errors import InputError


class Groups(NamedTuple):
    """Cells of every feature, as boolean CSR masks [features, cells]: `high` lies in `active`."""

    high: sparse.csr_array
    active: sparse.csr_array


def top_cells(activations: Matrix, percentile: float = 99.0) -> Groups:
    """The cells above a percentile of a feature's activation, zeros counted (Schuster, section 5).

    The percentile is NumPy's linear one over ALL cells, and "above" is strict. If a feature is
    active in fewer cells than lie above the percentile, the percentile is 0 and all active cells
    are high.

    Args:
        activations: non-negative [cells, features], dense or sparse.
        percentile: from 0 up to, not including, 100.

    Returns:
        The high and the active cells of every feature.

    Raises:
        InputError: as `features.as_columns`; if there are no cells, or for another percentile.
    """
    if not 0 <= percentile < 100:
        raise InputError(f"percentile={percentile}: give a number of at least 0 and below 100.")
    columns = as_columns(activations)
    n_cells = columns.shape[0]
    if n_cells == 0:
        raise InputError("activations hold no cells: there is no percentile to take.")
    feature = feature_of_entry(columns)
    ascending = columns.data[np.lexsort((columns.data, feature))]
    n_zeros = n_cells - np.diff(columns.indptr)

    def sorted_value(rank: int) -> np.ndarray:
        """The value at this rank (from 0) of each feature's cells in ascending order."""
        value = np.zeros(columns.shape[1])
        active = np.flatnonzero(rank >= n_zeros)
        value[active] = ascending[columns.indptr[active] + rank - n_zeros[active]]
        return value

    below, fraction = divmod((n_cells - 1) * (percentile / 100), 1)
    lower, upper = sorted_value(int(below)), sorted_value(min(int(below) + 1, n_cells - 1))
    threshold = lower + (upper - lower) * fraction
    return _groups(columns, columns.data > threshold[feature])


def cells_above(n_cells: int, percentile: float) -> int:
    """How many of so many different values lie above the percentile of `top_cells`."""
    # 1e-9: 90 percent of 10 steps are 9 of them, whatever a float says.
    return n_cells - 1 - math.floor((n_cells - 1) * percentile / 100 + 1e-9)


def top_n(activations: Matrix, n: int) -> Groups:
    """The n most active cells of every feature; all active ones if there are fewer than n.

    Never more than n: among cells of equal activation the earlier one goes first.

    Args:
        activations: non-negative [cells, features], dense or sparse.
        n: at least 1.

    Returns:
        The high and the active cells of every feature.

    Raises:
        InputError: as `features.as_columns`, or for n below 1.
    """
    if n < 1:
        raise InputError(f"n={n}: give at least 1 cell.")
    columns = as_columns(activations)
    feature = feature_of_entry(columns)
    descending = np.lexsort((columns.indices, -columns.data, feature))
    high = np.empty(columns.nnz, dtype=bool)
    high[descending] = np.arange(columns.nnz) - columns.indptr[feature] < n
    return _groups(columns, high)


def _groups(columns: sparse.csc_array, high: np.ndarray) -> Groups:
    """Masks [features, cells]: a transposed CSC matrix is a CSR matrix of the same three arrays."""
    shape = columns.shape[::-1]
    active = (np.ones(columns.nnz, dtype=bool), columns.indices, columns.indptr)
    top = sparse.csr_array((high, columns.indices, columns.indptr), shape=shape, copy=True)
    top.eliminate_zeros()
    return Groups(high=top, active=sparse.csr_array(active, shape=shape))


def as_mask(name: str, mask: Matrix, n_cells: int | None = None) -> sparse.csr_array:
    """A checked copy of a boolean mask [features, cells]: canonical CSR that stores True only.

    Args:
        name: what to call the mask in an error.
        mask: of at least one feature; as in `features.as_booleans`.
        n_cells: how many cells there must be; None for any number.

    Raises:
        InputError: if it is not such a mask.
    """
    mask = as_booleans(name, mask)
    if mask.ndim != 2 or mask.shape[0] == 0 or n_cells not in (None, mask.shape[1]):
        cells = "cells" if n_cells is None else f"the {n_cells} cells of the other input"
        raise InputError(f"{name} has shape {np.shape(mask)}: give a mask of features by {cells}.")
    return sparse.csr_array(mask)


def within(groups: Groups, cells: ArrayLike) -> Groups:
    """The groups of one cell type: the masks, cut to the chosen cells.

    The masks keep the chosen cells' columns only, so they go with `expression[cells]`. With all
    columns kept, "every cell that is not active" would be mostly cells of other types.

    Args:
        groups: masks [features, cells].
        cells: boolean [cells], the cells to keep.

    Returns:
        Masks [features, chosen cells], cells in their order. The high cells are those of the whole;
        for a percentile of the chosen cells see `top_cells_within`.

    Raises:
        InputError: if `cells` is not one boolean per cell or chooses none.
    """
    chosen = np.flatnonzero(_chosen(cells, groups.high.shape[1]))
    return Groups(high=groups.high[:, chosen], active=groups.active[:, chosen])


def top_cells_within(
    activations: Matrix, cells: ArrayLike, percentile: float = 99.0, *, active_only: bool = False
) -> Groups:
    """The cells above a percentile of a feature's activation among the chosen cells.

    Args:
        activations: non-negative [cells, features], dense or sparse.
        cells: boolean [cells], the cells to keep: those of one type.
        percentile: from 0 up to, not including, 100.
        active_only: whether the percentile is that of the feature's active cells (Schuster's manual
            analysis, with 95; its low group: `low_percentile` likewise) instead of all chosen ones.

    Returns:
        Masks [features, chosen cells], for `expression[cells]` as in `within`.

    Raises:
        InputError: as `top_cells` and `within`.
    """
    if np.ndim(activations) != 2:
        raise InputError(f"activations have {np.ndim(activations)} dimensions: give a matrix.")
    chosen = np.flatnonzero(_chosen(cells, activations.shape[0]))
    columns = as_columns(sparse.csr_array(activations)[chosen])
    groups = top_cells(columns, percentile)
    if not active_only:
        return groups
    threshold = _percentiles(columns, percentile, active_only=True)
    above = columns.data > threshold[feature_of_entry(columns)]
    return Groups(high=_entries(columns, above), active=groups.active)


def low_sample(active: Matrix, n: int = 1000, seed: int = 0) -> sparse.csr_array:
    """A random sample of n silent cells of every feature; all silent ones if there are fewer.

    A feature's sample is drawn from (seed, index of the feature) and from its own silent cells
    alone: neither the other features nor their number change it.

    Args:
        active: boolean mask [features, cells], dense or sparse.
        n: at least 1.
        seed: non-negative.

    Returns:
        Boolean mask [features, cells].

    Raises:
        InputError: for n below 1 or a negative seed, or if `active` is not a mask.
    """
    if n < 1 or seed < 0:
        raise InputError(f"n={n}, seed={seed}: give at least 1 cell and a seed of at least 0.")
    active = as_mask("active", active)
    rows = []
    for feature, taken in enumerate(_rows(active)):
        n_silent = active.shape[1] - taken.size
        rank = np.arange(n_silent)
        if n_silent > n:
            rng = np.random.default_rng([seed, feature])
            rank = np.sort(rng.choice(n_silent, n, replace=False, shuffle=False))
        # Silent cell number r has before it those active cells that follow at most r silent ones.
        silent_before = taken - np.arange(taken.size)
        rows.append(rank + np.searchsorted(silent_before, rank, side="right"))
    return _stack(rows, active.shape[1])


def low_percentile(
    activations: Matrix, percentile: float = 5.0, *, active_only: bool = False
) -> sparse.csr_array:
    """The cells at or below a percentile of a feature's activation: the low group of a dense code.

    NumPy's linear percentile. Where at least this share of the cells is silent, all silent cells
    are low (the mask of a sparse code is nearly full: give `active` to `welch` instead).

    Args:
        activations: [cells, features], dense or sparse; negative values are allowed (neurons).
        percentile: above 0, up to 100.
        active_only: whether only active cells are ranked, and can be low; no negative values then.

    Returns:
        Boolean mask [features, cells].

    Raises:
        InputError: as `features.as_columns`; if there are no cells, or for another percentile.
    """
    if not 0 < percentile <= 100:
        raise InputError(f"percentile={percentile}: give a number above 0 and of at most 100.")
    columns = as_columns(activations, signed=not active_only)
    if columns.shape[0] == 0:
        raise InputError("activations hold no cells: there is no percentile to take.")
    threshold = _percentiles(columns, percentile, active_only)
    if active_only:
        return _entries(columns, columns.data <= threshold[feature_of_entry(columns)])
    rows = [np.flatnonzero(v <= t) for v, t in zip(_dense(columns), threshold, strict=True)]
    return _stack(rows, columns.shape[0])


def nearest_silent(
    embedding: ArrayLike,
    high: Matrix,
    active: Matrix,
    n: int = 1000,
    *,
    to: str = "centroid",
    block: int = 256,
) -> sparse.csr_array:
    """The n silent cells nearest to a feature's high cells: Claye's counterfactual cells.

    The paper leaves open what a group of cells is near to. "centroid", the default, is the mean of
    the high cells: one distance per cell. "cell" is the nearest one of the high cells, which suits
    a feature that is high in several places, and costs as many distances as there are high cells.
    Distances are Euclidean and exact to float64 rounding; of cells equally far, the earlier ones.

    The paper's groups are `top = top_n(activations, 1000)` against `nearest_silent(x, *top, 1000)`.

    Args:
        embedding: what the dictionary was trained on [cells, dimensions].
        high: boolean mask [features, cells].
        active: boolean mask [features, cells]; contains `high`.
        n: at least 1. Where fewer cells are silent, all of them.
        to: "centroid" or "cell".
        block: rows of distances (8 bytes × cells each) held at once.

    Returns:
        Boolean mask [features, cells]; no cells for a feature without high ones.

    Raises:
        InputError: if shapes or types do not fit, for other options, or if high cells are not
            active.
    """
    if n < 1 or block < 1 or to not in ("centroid", "cell"):
        raise InputError(
            f'n={n}, block={block}, to={to!r}: give positive numbers and "centroid" or "cell".'
        )
    x = np.asarray(embedding, dtype=np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise InputError(
            f"embedding has shape {x.shape}: give finite numbers for cells by dimensions."
        )
    high, active = as_mask("high", high, len(x)), as_mask("active", active, len(x))
    if high.shape != active.shape or high.multiply(active).nnz != high.nnz:
        raise InputError("high and active must hold the same features, and high cells be active.")
    rows = []
    distances = (_to_centroid if to == "centroid" else _to_cell)(x, high, block)
    for near, taken, distance in zip(_rows(high), _rows(active), distances, strict=True):
        silent = np.ones(len(x), dtype=bool)
        silent[taken] = False
        candidates = np.flatnonzero(silent)
        rows.append(candidates[_smallest(distance[candidates], n if near.size else 0)])
    return _stack(rows, len(x))


def _to_centroid(x: np.ndarray, high: sparse.csr_array, block: int) -> Iterator[np.ndarray]:
    """For every feature, squared distances [cells] to its centroid, but for a constant."""
    centroid = (high.astype(np.float64) @ x) / np.maximum(np.diff(high.indptr), 1)[:, None]
    squares = np.sum(x**2, axis=1)
    for begin in range(0, len(centroid), block):
        yield from squares - 2 * centroid[begin : begin + block] @ x.T


def _to_cell(x: np.ndarray, high: sparse.csr_array, block: int) -> Iterator[np.ndarray]:
    """For every feature, squared distances [cells] to the nearest high cell."""
    squares = np.sum(x**2, axis=1)
    for near in _rows(high):
        distance = np.full(len(x), np.inf)
        for begin in range(0, near.size, block):
            some = near[begin : begin + block]
            parts = squares[some][:, None] - 2 * x[some] @ x.T
            np.minimum(distance, parts.min(axis=0), out=distance)
        yield distance + squares


def _smallest(values: np.ndarray, n: int) -> np.ndarray:
    """Where the n smallest values are, in order of place; of equal values the first ones."""
    if n == 0 or values.size <= n:
        return np.arange(min(n, values.size))
    last = np.partition(values, n - 1)[n - 1]
    below, equal = np.flatnonzero(values < last), np.flatnonzero(values == last)
    return np.sort(np.concatenate([below, equal[: n - below.size]]))


def _percentiles(columns: sparse.csc_array, percentile: float, active_only: bool) -> np.ndarray:
    """NumPy's linear percentile of every feature [features]; NaN if it has nothing to rank."""
    values = _rows(columns, columns.data) if active_only else _dense(columns)
    return np.array([np.percentile(v, percentile) if v.size else np.nan for v in values])


def _dense(columns: sparse.csc_array) -> Iterator[np.ndarray]:
    """The features one after another, with their zeros [cells]."""
    for cells, stored in zip(_rows(columns), _rows(columns, columns.data), strict=True):
        values = np.zeros(columns.shape[0])
        values[cells] = stored
        yield values


def _rows(
    matrix: sparse.csr_array | sparse.csc_array, entries: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """For every feature its stored cells, or its part of other `entries` in stored order."""
    entries = matrix.indices if entries is None else entries
    for begin, end in pairwise(matrix.indptr):
        yield entries[begin:end]


def _stack(rows: list[np.ndarray], n_cells: int) -> sparse.csr_array:
    """A mask of the cells of every feature, given in ascending order."""
    indptr = np.concatenate([[0], np.cumsum([row.size for row in rows])])
    indices = np.concatenate(rows)
    values = np.ones(indices.size, dtype=bool)
    return sparse.csr_array((values, indices, indptr), shape=(len(rows), n_cells))


def _entries(columns: sparse.csc_array, chosen: np.ndarray) -> sparse.csr_array:
    """The mask of the chosen ones among stored entries: a transposed CSC matrix is CSR."""
    shape = columns.shape[::-1]
    mask = sparse.csr_array((chosen, columns.indices, columns.indptr), shape=shape, copy=True)
    mask.eliminate_zeros()
    return mask


def _chosen(cells: ArrayLike, n_cells: int) -> np.ndarray:
    cells = np.asarray(cells)
    if cells.shape != (n_cells,) or cells.dtype != bool or not cells.any():
        raise InputError(
            f"cells is {cells.dtype} of shape {cells.shape}: give one boolean for each of the "
            f"{n_cells} cells, at least one of them True."
        )
    return cells

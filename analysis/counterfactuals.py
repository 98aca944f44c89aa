"""Which cells are compared to explain a concept: prototypes, and like cells without it.

Claye, section 3.2. Prototypes of a concept are the cells that activate it most; the counterfactuals
of a prototype are the cells nearest to it in the embedding that do not activate it (equation 1).
Where two cells are equally active or equally near, the earlier one goes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from analysis.blocks import slices
from analysis.features import Matrix, as_columns
from sae_jax.errors import InputError

PROTOTYPES, COUNTERFACTUALS = 10, 3  # of the paper, section 4.2
BYTES = 2**26  # of distances at once


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Prototypes and their counterfactuals; a concept's follow one another, best prototype and
    nearest counterfactual first.

    Attributes:
      concepts: the latents that are explained, int64 [concepts].
      concept: of each pair, its position in `concepts`, ascending, int64 [pairs]. A concept
        without pairs is one that no cell activates, or every one.
      prototype, counterfactual: positions of cells, int64 [pairs].
      distance: between the two in the embedding, Euclidean, float64 [pairs].
    """

    concepts: np.ndarray
    concept: np.ndarray
    prototype: np.ndarray
    counterfactual: np.ndarray
    distance: np.ndarray

    @property
    def count(self) -> np.ndarray:
        """Pairs of each concept, int64 [concepts]."""
        return np.bincount(self.concept, minlength=len(self.concepts))

    @property
    def cells(self) -> np.ndarray:
        """The cells that occur, ascending."""
        return np.union1d(self.prototype, self.counterfactual)

    def of(self, wanted: ArrayLike) -> Pairs:
        """Those of some concepts, by ascending position in `concepts`."""
        wanted = np.asarray(wanted)
        chosen = np.isin(self.concept, wanted)
        parts = (self.prototype, self.counterfactual, self.distance)
        return Pairs(
            self.concepts[wanted], np.searchsorted(wanted, self.concept[chosen]),
            *(part[chosen] for part in parts),
        )  # fmt: skip

    def check(self, n_cells: int) -> None:
        """Refuse pairs of cells that are not there.

        Raises:
            InputError: positions outside 0 .. n_cells - 1, or no pairs at all.
        """
        if not self.cells.size or self.cells[0] < 0 or self.cells[-1] >= n_cells:
            raise InputError(f"pairs must be of cells 0 .. {n_cells - 1}, one pair at least.")

    def local(self) -> Pairs:
        """The same with positions in `cells` for cells."""
        cells = self.cells
        return dataclasses.replace(
            self,
            prototype=np.searchsorted(cells, self.prototype),
            counterfactual=np.searchsorted(cells, self.counterfactual),
        )

    def frame(self, names: ArrayLike | None = None) -> pd.DataFrame:
        """A row a pair: `concept`, `prototype`, `counterfactual`, `distance`; cells by name."""
        cells = {"prototype": self.prototype, "counterfactual": self.counterfactual}
        if names is not None:
            cells = {role: np.asarray(names)[cell] for role, cell in cells.items()}
        return pd.DataFrame(
            {"concept": self.concepts[self.concept], **cells, "distance": self.distance}
        )


def choose(
    codes: Matrix,
    embedding: ArrayLike,
    concepts: Sequence[int] | np.ndarray | None = None,
    *,
    prototypes: int = PROTOTYPES,
    counterfactuals: int = COUNTERFACTUALS,
    quantile: float | None = None,
) -> Pairs:
    """The prototypes of each concept, and of each of them the nearest cells without the concept.

    Args:
        codes: activations [cells, latents], dense or sparse; never negative, but with `quantile`.
        embedding: what the codes are of [cells, d].
        concepts: latents, each once; None: all.
        prototypes: the most active cells of a concept; fewer where fewer activate it.
        counterfactuals: of each prototype; fewer where fewer cells are silent.
        quantile: of dense codes (neurons, principal components), which are hardly ever 0: cells at
            or below this quantile of a concept's codes count as silent, and the prototypes are
            cells above it. None: silent is exactly 0 (equation 1).

    Raises:
        InputError: shapes that do not fit, numbers out of range, values that are not finite; or no
            concept at all that some cells activate and others do not.
    """
    if prototypes < 1 or counterfactuals < 1:
        raise InputError("prototypes and counterfactuals must be at least 1 cell each.")
    if quantile is not None and not 0 < quantile < 1:
        raise InputError(f"quantile={quantile}: give a number between 0 and 1.")
    x = np.asarray(embedding, np.float64)
    columns = as_columns(codes, signed=quantile is not None)
    if x.ndim != 2 or not np.isfinite(x).all() or len(x) != columns.shape[0]:
        raise InputError(
            f"the embedding has shape {x.shape} for codes of {columns.shape[0]} cells: give finite "
            "rows [cells, d] of the same cells."
        )
    concepts = known(concepts, columns.shape[1])
    neighbours = _Neighbours(x)
    parts: list[tuple[np.ndarray, ...]] = []
    for i, latent in enumerate(concepts):
        high, silent = _split(columns, latent, prototypes, quantile)
        near, far = neighbours.nearest(high, silent, counterfactuals)
        one = np.broadcast_to(high[:, None], near.shape)
        parts.append(tuple(part.ravel() for part in (np.full_like(near, i), one, near, far)))
    concept, prototype, counterfactual, distance = map(np.concatenate, zip(*parts, strict=True))
    if not concept.size:
        raise InputError(
            "no concept has both cells that activate it and cells that do not: "
            + ("lower the quantile." if quantile else "of dense codes give quantile=0.05, say.")
        )
    return Pairs(concepts, concept, prototype, counterfactual, distance)


def known(concepts: Sequence[int] | np.ndarray | None, n_latents: int) -> np.ndarray:
    """Latents, each once, int64; None: all of them.

    Raises:
        InputError: others than 0 .. n_latents - 1, or one that comes twice.
    """
    if concepts is None:
        return np.arange(n_latents)
    found = np.atleast_1d(np.asarray(concepts))
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise InputError(f"concepts must be numbers of latents, one at least, not {concepts!r}.")
    if found.min() < 0 or found.max() >= n_latents or np.unique(found).size < found.size:
        raise InputError(f"concepts must be latents 0 .. {n_latents - 1}, each of them once.")
    return found.astype(np.int64)


def _split(
    columns: sparse.csc_array, latent: int, n: int, quantile: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The n most active cells, the most active first; and bool [cells], which are silent."""
    span = slice(columns.indptr[latent], columns.indptr[latent + 1])
    code = np.zeros(columns.shape[0])
    code[columns.indices[span]] = columns.data[span]
    threshold = 0 if quantile is None else np.quantile(code, quantile)
    high = np.flatnonzero(code > threshold)
    return high[np.argsort(-code[high], kind="stable")[:n]], code <= threshold


class _Neighbours:
    """The cells of an embedding x [cells, d], to be searched for the nearest ones.

    Squared distances come as |a|^2 - 2 a b + |b|^2 in float32; those whose rounding leaves a chance
    are then taken again in float64, by differences.
    """

    def __init__(self, x: np.ndarray) -> None:
        centred = x - x.mean(axis=0)
        largest = np.sqrt((centred**2).sum(axis=1).max())
        self._x, self._rows = x, jnp.asarray(centred, jnp.float32)
        eps = float(np.finfo(np.float32).eps)
        self._slack = 2 * (x.shape[1] + 8) * eps * (2 * largest) ** 2

    def nearest(self, cells: np.ndarray, mask: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each cell the n nearest of a mask [cells], nearest first, and how far they are.

        Both [cells given, n], or narrower where the mask has fewer.
        """
        n = min(n, int(mask.sum()))
        near, far = np.empty((len(cells), n), np.int64), np.empty((len(cells), n))
        if not near.size:
            return near, far
        for part in slices(len(cells), max(1, BYTES // (4 * len(mask)))):
            for i, row in enumerate(self._squared(cells[part]), part.start):
                row[~mask] = np.inf
                bound = np.partition(row, n - 1)[n - 1] + self._slack
                candidates = np.flatnonzero(row <= bound)
                exact = np.sqrt(((self._x[candidates] - self._x[cells[i]]) ** 2).sum(axis=1))
                first = np.lexsort((candidates, exact))[:n]
                near[i], far[i] = candidates[first], exact[first]
        return near, far

    def _squared(self, cells: np.ndarray) -> np.ndarray:
        """Squared distances to all cells but for a constant, [cells given, cells]."""
        padded = np.resize(cells, -(-len(cells) // PROTOTYPES) * PROTOTYPES)  # few shapes
        return np.array(_squared(self._rows, self._rows[padded]))[: len(cells)]


@jax.jit
def _squared(x: jax.Array, rows: jax.Array) -> jax.Array:
    """|x|^2 - 2 rows x, [rows, cells]."""
    with jax.default_matmul_precision("highest"):
        return jnp.sum(x**2, axis=1)[None, :] - 2 * rows @ x.T

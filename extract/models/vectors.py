"""Cells as vectors: what models share that read a cell without tokens."""

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
import torch

from extract.errors import InputError
from extract.models.base import Edited

CHUNK = 4096  # rows decoded at once


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Arrays, matrices or tensors with a row for each cell, and which cells express nothing."""

    parts: tuple[Any, ...]
    silent: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Ones, int64 [cells]."""
        return np.ones(self.parts[0].shape[0], np.int64)

    @property
    def empty(self) -> np.ndarray:
        """Cells without any count in a gene of the model, bool [cells]."""
        return np.zeros(len(self.lengths), bool) if self.silent is None else self.silent

    def take(self, positions: np.ndarray) -> "Vectors":
        """The same of some cells."""
        silent = None if self.silent is None else self.silent[positions]
        return Vectors(tuple(part[positions] for part in self.parts), silent)

    def rows(self, pooling: str) -> np.ndarray:
        """One row a cell, int64 [cells]."""
        return self.lengths


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder of vectors in plain arrays.

        h = values, or log1p of them;  h = relu(norm(W h + b)) in every layer;  W h + b at the end

    Attributes:
      weights: of each layer and of the end, float32 [out, in]; batch norms are folded in.
      biases: the same, float32 [batches, out], one row where the batch adds nothing.
      layer_norm: of each layer but the end the epsilon of its norm (mean 0, variance 1), or None.
      log1p: whether values are log-transformed first.
    """

    weights: list[np.ndarray]
    biases: list[np.ndarray]
    layer_norm: tuple[float | None, ...]
    log1p: bool


@dataclasses.dataclass(frozen=True)
class VectorSwaps:
    """Cells of a model that reads vectors, and all it takes to encode them with other values.

    Attributes:
      genes: names.
      values: what is read of the cells, CSR float64 [cells, genes].
      batch: rows of the encoder's biases, int64 [cells]; those of one row have 0.
      encoder: of `genes`; those of the model that the file lacks are 0 and left out.
    """

    genes: list[str]
    values: scipy.sparse.csr_matrix
    batch: np.ndarray
    encoder: Encoder


def edit_all(edited: Edited, latent: torch.Tensor) -> torch.Tensor:
    """`Edited.apply` where a cell is one vector: every row of `latent` [cells, d] is given to it.

    Raises:
      InputError: `edited` wants some kind of tokens.
    """
    if edited.tokens != "all":
        raise InputError(f"a cell is one vector here, without tokens: '{edited.tokens}' are none")
    return edited.apply(latent, torch.ones(len(latent), dtype=torch.bool, device=latent.device))


def check_latents(latents: np.ndarray, width: int, what: str = "latents") -> np.ndarray:
    """Rows to decode as float32 [cells, width].

    Raises:
      InputError: another shape, values that are not finite.
    """
    rows = np.array(latents, np.float32)  # a copy: torch warns of arrays that are read-only
    if rows.ndim != 2 or rows.shape[1] != width:
        raise InputError(f"{what} must be [cells, {width}], not {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise InputError(f"{what} hold NaN or infinite values")
    return rows

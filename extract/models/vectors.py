"""Cells as vectors: what models share that read a cell without tokens."""

import dataclasses
from typing import Any

import numpy as np
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

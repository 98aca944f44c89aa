"""The dimensions of an embedding as features, for everything that is measured of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse as sp

from analysis.features import Matrix
from sae_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Neurons:
    """Either side of each dimension from its median: 2 d features, silent in half of the cells.

    A dimension is dense and has two directions; a concept is silent somewhere and has one. Cut at
    the median a dimension is two features that have what the methods need: high cells, and cells of
    activation exactly 0. The first d rise with their dimension, the others fall.

    median: [d], float32.
    """

    median: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> Neurons:
        """Of the rows x [cells, d]."""
        return cls(np.median(np.asarray(x, np.float32), axis=0))

    @property
    def n_components(self) -> int:
        """2 d."""
        return 2 * len(self.median)

    @property
    def decoder(self) -> np.ndarray:
        """What a side's 1 adds to the embedding [2 d, d]."""
        one = np.eye(len(self.median), dtype=np.float32)
        return np.concatenate([one, -one])

    def names(self) -> list[str]:
        """neuron_3+ and neuron_3- for the sides of dimension 3."""
        return [f"neuron_{i}{side}" for side in "+-" for i in range(len(self.median))]

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Activations [cells, 2 d] of rows x [cells, d], float32.

        Raises:
          InputError: rows of another width, or not finite.
        """
        x = np.asarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != len(self.median):
            raise InputError(f"x has shape {x.shape}: give rows of {len(self.median)} dimensions.")
        if not np.isfinite(x).all():
            raise InputError("x must be finite.")
        centred = x - self.median
        z = np.concatenate([np.maximum(centred, 0), np.maximum(-centred, 0)], axis=1)
        return sp.csr_matrix(z) if sparse else z

    def decode(self, z: Matrix) -> np.ndarray:
        """Rows [cells, d]: what was encoded, exactly."""
        d = len(self.median)
        z = z.toarray() if sp.issparse(z) else np.asarray(z)
        return self.median + (z[:, :d] - z[:, d:])

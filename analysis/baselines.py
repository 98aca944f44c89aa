"""Linear baselines for a dictionary: principal, independent and singular components.

Schuster, Table S5: PCA, ICA and SVD of the autoencoder's embedding by scikit-learn; components
stand where latents do, with the `encode` of `sae_jax.Dictionary`, so that whatever measures the one
measures the other. A component has no preferred sign: a correlation of -.9 says as much as one of
.9.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA, FastICA, TruncatedSVD
from sklearn.exceptions import ConvergenceWarning

from sae_jax import InputError

METHODS = ("PCA", "ICA", "SVD")
ITERATIONS = 500  # of FastICA, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """Components of an embedding.

    Attributes:
      name: one of `METHODS`.
      estimator: scikit-learn's, fitted.
      converged: False if FastICA gave up; the others have a closed form.
    """

    name: str
    estimator: BaseEstimator
    converged: bool = True

    @property
    def decoder(self) -> np.ndarray:
        """What a component of 1 adds to the embedding [components, d]."""
        mixing = getattr(self.estimator, "mixing_", None)
        return self.estimator.components_ if mixing is None else mixing.T

    @property
    def n_components(self) -> int:
        """How many there are."""
        return len(self.decoder)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Codes [rows, components] of embedding rows x [rows, d].

        Raises:
          InputError: rows of another width, or not finite.
        """
        x = _checked(x)
        if x.shape[1] != self.decoder.shape[1]:
            raise InputError(
                f"x has {x.shape[1]} dimensions, {self.name} has {self.decoder.shape[1]}"
            )
        return self.estimator.transform(x)


def fit(name: str, x: np.ndarray, n_components: int | None = None, seed: int = 0) -> Baseline:
    """PCA, ICA (FastICA) or SVD (TruncatedSVD, which does not subtract the mean) of x [rows, d].

    Args:
      n_components: None: as many as x has directions in which it varies, d at most; the others
        would be whitened rounding.
      seed: of FastICA's start and of the randomised SVD.

    Raises:
      InputError: an unknown method, rows that are not finite, or more components than directions.
    """
    if name not in METHODS:
        raise InputError(f"baseline {name!r} is not one of {', '.join(METHODS)}")
    x = _checked(x)
    most = int(np.linalg.matrix_rank(np.cov(x, rowvar=False).reshape(x.shape[1], -1)))
    if n_components is None:
        n_components = most
    if not 1 <= n_components <= most:
        raise InputError(
            f"n_components={n_components} must be at least 1, and at most the {most} directions in "
            f"which x varies"
        )
    estimator = {
        "PCA": PCA(n_components, random_state=seed),
        "ICA": FastICA(n_components, whiten="unit-variance", max_iter=ITERATIONS,
                       random_state=seed),
        "SVD": TruncatedSVD(n_components, random_state=seed),
    }[name]  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator.fit(x)
    converged = True
    for each in caught:
        if issubclass(each.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return Baseline(name, estimator, converged)


def fit_all(x: np.ndarray, n_components: int | None = None, seed: int = 0) -> Iterator[Baseline]:
    """Each of `METHODS` in turn; see `fit`."""
    return (fit(name, x, n_components, seed) for name in METHODS)


def _checked(x: np.ndarray) -> np.ndarray:
    """As float64: FastICA of float32 stops at its rounding."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise InputError(f"x has shape {x.shape}: give rows by dimensions, two rows at least")
    if not np.isfinite(x).all():
        raise InputError("x must be finite")
    return x

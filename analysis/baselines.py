"""Baselines for a dictionary, and one door through which all of them are measured.

Schuster, Table S5: PCA, ICA and SVD of the autoencoder's embedding by scikit-learn; Claye,
appendix B: semi-NMF (`semi_nmf`). k-means and random directions are what a dictionary should beat
whatever it is for. Components stand where latents do, with the `encode` and `decode` of
`sae_jax.Dictionary`, so that whatever measures the one measures the other. A component of PCA, ICA
or SVD has no preferred sign: a correlation of -.9 says as much as one of .9.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import linalg
from scipy import sparse as sparse_matrices
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA, TruncatedSVD
from sklearn.exceptions import ConvergenceWarning

from analysis import probes
from analysis.blocks import slices
from analysis.features import Matrix
from analysis.probes import Probe
from sae_jax import InputError

METHODS = ("PCA", "ICA", "SVD")
ITERATIONS = 500  # of FastICA, at most
ROWS = 4096  # encoded and decoded at a time
RIDGE = 1e-9  # of a mean square of codes: random directions may be more than there are rows


class Coder(Protocol):
    """What is measured: a `sae_jax.Dictionary`, a consensus, a baseline."""

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [rows, components] of embedding rows x [rows, d]; each row's on its own."""

    def decode(self, z: Matrix) -> np.ndarray:
        """Reconstructions [rows, d] of codes z [rows, components]."""


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

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [rows, components] of embedding rows x [rows, d]; none of them is 0.

        Raises:
          InputError: rows of another width, or not finite.
        """
        x = _checked(x)
        if x.shape[1] != self.decoder.shape[1]:
            raise InputError(
                f"x has {x.shape[1]} dimensions, {self.name} has {self.decoder.shape[1]}"
            )
        z = self.estimator.transform(x)
        return sparse_matrices.csr_matrix(z) if sparse else z

    def decode(self, z: Matrix) -> np.ndarray:
        """Reconstructions [rows, d] of codes z [rows, components]."""
        z = z.toarray() if sparse_matrices.issparse(z) else np.asarray(z)
        return self.estimator.inverse_transform(z)


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """k-means as a dictionary whose codes have one 1 each: the cluster of a row.

    decoder: centroids [components, d]; a reconstruction is the nearest one.
    """

    decoder: np.ndarray
    estimator: KMeans
    name: str = "k-means"
    converged: bool = True

    @property
    def n_components(self) -> int:
        """How many there are."""
        return len(self.decoder)

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [rows, components] of embedding rows x [rows, d]: 1 for the nearest centroid."""
        label = self.estimator.predict(_checked(x))
        ones, ends = np.ones(len(label)), np.arange(len(label) + 1)
        z = sparse_matrices.csr_matrix((ones, label, ends), shape=(len(label), self.n_components))
        return z if sparse else z.toarray()

    def decode(self, z: Matrix) -> np.ndarray:
        """Reconstructions [rows, d] of codes z [rows, components]."""
        return z @ self.decoder


@dataclasses.dataclass(frozen=True, eq=False)
class RandomDirections:
    """Features that no training chose, as `nulls.random_directions` makes them, for any rows.

    A code is how far a row lies beyond `threshold` along a random unit vector of the standardised
    embedding, 0 below it. The decoder is the least-squares one of the rows it was made from: the
    best that anyone could read from such codes.

    directions: [components, d], unit rows. threshold: [components]. mean, scale: of x [d].
    decoder: [components, d]. bias: [d].
    """

    directions: np.ndarray
    threshold: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    decoder: np.ndarray
    bias: np.ndarray
    name: str = "random directions"
    converged: bool = True

    @property
    def n_components(self) -> int:
        """How many there are."""
        return len(self.directions)

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [rows, components] of embedding rows x [rows, d], never negative."""
        along = (_checked(x) - self.mean) / self.scale @ self.directions.T
        z = np.maximum(along - self.threshold, 0)
        return sparse_matrices.csr_matrix(z) if sparse else z

    def decode(self, z: Matrix) -> np.ndarray:
        """Reconstructions [rows, d] of codes z [rows, components]."""
        return z @ self.decoder + self.bias


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


def clusters(x: np.ndarray, n_components: int, seed: int = 0) -> Clusters:
    """k-means of x [rows, d], started by k-means++ from `seed`.

    Raises:
      InputError: rows that are not finite, or more components than rows.
    """
    x = _checked(x)
    if not 1 <= n_components <= len(x):
        raise InputError(f"n_components={n_components} must lie in 1 .. {len(x)}, the rows of x")
    estimator = KMeans(n_components, n_init=1, random_state=seed).fit(x)
    done = estimator.n_iter_ < estimator.max_iter
    return Clusters(estimator.cluster_centers_, estimator, converged=done)


def random_directions(x: np.ndarray, density: ArrayLike, seed: int = 0) -> RandomDirections:
    """Random directions of x [rows, d], as sparse as another method's codes are.

    Args:
      density: of each component the share of x in which it shall be active, in (0, 1], such as
        `(z > 0).mean(axis=0)` of a dictionary's live latents: L0 is then the same on x.
      seed: of the directions.

    Raises:
      InputError: rows that are not finite, or shares out of their range.
    """
    x, density = _checked(x), np.asarray(density, np.float64)
    if density.ndim != 1 or density.size == 0 or not ((density > 0) & (density <= 1)).all():
        raise InputError("density must be shares above 0 and at most 1, one for each component")
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(density.size, x.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 0, spread, 1)
    along = (x - mean) / scale @ directions.T
    threshold = np.array(
        [np.quantile(a, 1 - share) for a, share in zip(along.T, density, strict=True)]
    )
    z = np.maximum(along - threshold, 0)
    centred = z - z.mean(axis=0)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
    decoder = linalg.solve(gram, centred.T @ x, assume_a="pos")
    bias = mean - z.mean(axis=0) @ decoder
    return RandomDirections(directions, threshold, mean, scale, decoder, bias)


def reconstruction(coder: Coder, x: np.ndarray) -> dict[str, float]:
    """How well and how sparsely x [rows, d] is coded, by the definitions of `sae_jax.metrics`.

    Returns:
      rows: how many. r2: 1 - squared error / squared distance from the mean of each dimension of x
      (Claye 4.1: 0 is the mean embedding). r2_scalar_mean: the form that subtracts one mean of all
      dimensions. l0: mean number of codes a row that are not 0; sparsity: 1 - l0 / components;
      active: components that are not 0 in some row.

    Raises:
      InputError: rows that are not finite; or all the same, so that nothing is to be explained.
    """
    x = _checked(x)
    error, nonzero, active = 0.0, 0, False
    for rows in slices(len(x), ROWS):
        z = coder.encode(x[rows], sparse=True)
        error += float(np.square(x[rows] - coder.decode(z)).sum())
        per_component = z.getnnz(axis=0)
        nonzero, active = nonzero + int(per_component.sum()), active | (per_component > 0)
    mean = x.mean(axis=0)
    within = float(np.square(x - mean).sum())
    if within == 0:
        raise InputError("all rows of x are the same: there is nothing to explain")
    between = len(x) * float(np.square(mean - mean.mean()).sum())
    return {
        "rows": len(x),
        "r2": 1 - error / within,
        "r2_scalar_mean": 1 - error / (within + between),
        "l0": nonzero / len(x),
        "sparsity": 1 - nonzero / len(x) / len(active),
        "active": int(active.sum()),
    }


def evaluate(
    coder: Coder,
    x_train: np.ndarray,
    x_test: np.ndarray,
    labels_train: ArrayLike | None = None,
    labels_test: ArrayLike | None = None,
    **probing: Any,
) -> tuple[dict[str, Any], Probe | None]:
    """The metrics of one coder: of the tables 4 and 5 of Claye.

    Args:
      x_train: rows [cells, d] from whose codes the probe learns the labels; without labels unused.
      x_test: rows [other cells, d] that all metrics are of.
      labels_train, labels_test: one per cell; see `probes.split` for balanced ones.
      **probing: as of `probes.fit`.

    Returns:
      What `reconstruction` gives and `accuracy`, and the probe; NaN and None without labels.
    """
    row: dict[str, Any] = {**reconstruction(coder, x_test), "accuracy": np.nan}
    if labels_train is None or labels_test is None:
        return row, None
    codes = [_compact(coder.encode(x, sparse=True)) for x in (x_train, x_test)]
    probe = probes.fit(codes[0], labels_train, codes[1], labels_test, **probing)
    return row | {"accuracy": probe.accuracy, "probe_converged": probe.converged}, probe


def compare(
    coders: Mapping[str, Coder],
    x_train: np.ndarray,
    x_test: np.ndarray,
    labels_train: ArrayLike,
    labels_test: ArrayLike,
    genes_train: Matrix | None = None,
    genes_test: Matrix | None = None,
    **probing: Any,
) -> tuple[pd.DataFrame, dict[str, Probe]]:
    """One table of everything: dictionaries and baselines, the embedding itself, gene rivals.

    Args:
      coders: by name.
      x_train, x_test, labels_train, labels_test: as of `evaluate`, the same for all.
      genes_train, genes_test: ln(1 + normalised counts) [cells, genes] of the same cells: adds the
        supervised rivals `probes.fit(..., penalty="l1")` and `probes.marker_ranking` on genes.
      **probing: as of `probes.fit`, for all but the rivals' own penalty.

    Returns:
      A row per method (index): as `evaluate`; `neurons` is the embedding itself. r2 and l0 are NaN
      where nothing is coded; `active` of a rival is the genes that it uses. And the probes.
    """
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, Probe] = {}
    for name, coder in coders.items():
        rows[name], found[name] = evaluate(
            coder, x_train, x_test, labels_train, labels_test, **probing
        )
    found["neurons"] = probes.fit(x_train, labels_train, x_test, labels_test, **probing)
    if genes_train is not None and genes_test is not None:
        of = genes_train, labels_train, genes_test, labels_test
        found["genes, L1 logistic"] = probes.fit(*of, **(probing | {"penalty": "l1"}))
        found["genes, markers"] = probes.marker_ranking(*of)
    for name, probe in found.items():
        if name not in rows:
            used = int((probe.coefficients != 0).any(axis=0).sum())
            rows[name] = {
                "rows": probe.n_test, "active": used, "accuracy": probe.accuracy,
                "probe_converged": probe.converged,
            }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method"), found


def _compact(z: Matrix) -> Matrix:
    """Codes as an array where most of them are not 0, which is faster then."""
    return z.toarray() if z.nnz > z.shape[0] * z.shape[1] / 2 else z


def _checked(x: np.ndarray) -> np.ndarray:
    """As float64: FastICA of float32 stops at its rounding."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise InputError(f"x has shape {x.shape}: give rows by dimensions, two rows at least")
    if not np.isfinite(x).all():
        raise InputError("x must be finite")
    return x

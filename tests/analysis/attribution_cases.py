"""Encoders and dictionaries whose attributions are known, for the tests of attribution."""

from typing import Any

import anndata
import jax
import numpy as np
import scipy.sparse
from scipy import sparse as sp

from sae_jax import SAEConfig, models
from sae_jax.dictionary import Dictionary
from sae_jax.state import Normalizer

GENES = [f"g{i}" for i in range(24)]


def some_cells(n: int = 60, seed: int = 0, genes: int = 24) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 2, genes), (n, genes)).astype(np.float32)
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.obs_names, adata.var_names = [f"c{i}" for i in range(n)], GENES[:genes]
    return adata


class Planted:
    """Embeds cells by three genes alone, found by name: tanh of their log counts, mixed."""

    READ = ("g3", "g8", "g20")

    def __init__(self) -> None:
        self.cells = 0  # embedded so far

    def embed(self, adata: anndata.AnnData) -> np.ndarray:
        self.cells += adata.n_obs
        x = adata[:, list(self.READ)].X
        x = np.log1p(x.toarray() if scipy.sparse.issparse(x) else x)
        return np.tanh(x * [0.3, 0.5, 0.4]) @ np.array([[1.0, 0.4, 0], [-0.3, 1, 0.2], [0.5, 0, 1]])


class Threshold:
    """Codes: how far each dimension lies beyond a threshold."""

    def __init__(self, threshold: float = 0.3) -> None:
        self.threshold = threshold

    def encode(self, x: np.ndarray, sparse: bool = False) -> Any:
        z = np.maximum(np.asarray(x) - self.threshold, 0)
        return sp.csr_matrix(z) if sparse else z


def dictionary(x: np.ndarray, n: int = 40, seed: int = 0, **fields: Any) -> Dictionary:
    """Of random weights, but for the normalisation of x."""
    fields = {"activation": "topk", "k": 4} | fields
    config = SAEConfig(
        d_in=x.shape[1], n_latents=n, input_normalization="zscore", seed=seed, **fields
    )
    params = jax.tree.map(np.asarray, models.init(seed, config.architecture, np.float32))
    return Dictionary(config, params, Normalizer(x.mean(axis=0), x.std(axis=0)))


def brute_force(
    model: Any, coder: Any, adata: anndata.AnnData, pairs: Any, genes: list[str], concept: int,
    **options: Any,
) -> np.ndarray:  # fmt: skip
    """Equation 2 for every gene of every pair, one perturbed cell at a time [pairs, genes]."""

    def codes(cell: anndata.AnnData) -> float:
        rows = model.embed(cell, **options)
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        return float(np.asarray(coder.encode(rows))[0, concept])

    x = adata.X.toarray()
    found = np.zeros((len(pairs.prototype), len(genes)))
    for row, (p, c) in enumerate(zip(pairs.prototype, pairs.counterfactual, strict=True)):
        before = codes(adata[[p]].copy())
        for column, gene in enumerate(genes):
            at = adata.var_names.get_loc(gene)
            cell = adata[[p]].copy()
            changed = x[[p]].copy()
            changed[0, at] = x[c, at]
            cell.X = sp.csr_matrix(changed)
            found[row, column] = before - codes(cell)
    return found

"""Integrated gradients (Sundararajan, Taly and Yan 2017), the cheap approximation of attribution.

    a_gene = (x_p - x_c) times the mean over t in (0, 1) of dz/dx at x_c + t (x_p - x_c)

x are the values that the model's first layer takes (scVI: log1p of counts where it takes that), x_p
a prototype's and x_c a counterfactual's; the mean is by the midpoints of equal steps. Over genes
the scores of a pair sum to z_p - z_c where z is continuous along the path, which a top-k is not.
Nothing says that they agree with what exchanging one gene does, so that is measured along with
them, on some concepts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import anndata
import jax
import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

from analysis import attribution
from analysis.attribution import Attribution, descending
from analysis.attribution_store import Forwards
from analysis.counterfactuals import Pairs
from analysis.perturbed import (
    Coder,
    Embedder,
    Linear,
    Perturbed,
    Tokens,
    codes_of,
    encode_rest,
    perturbed,
)
from sae_jax.config import Architecture
from sae_jax.errors import InputError

STEPS = 32
CHECKED = 10  # concepts
TOP = 10  # genes


@dataclasses.dataclass(frozen=True, eq=False)
class Approximation:
    """Attribution by integrated gradients, and how far it can be trusted.

    Attributes:
      attribution: as of `attribution.attribute`; `forwards.done` counts steps, each of which is a
        forward and a backward pass.
      agreement: for each concept checked (index): `spearman` with occlusion over the genes that
        differ in one of its pairs, `top` the share of the ten best genes that are the same, and
        `completeness`, the sum of scores over the mean of z_p - z_c (1 if nothing is missed).
    """

    attribution: Attribution
    agreement: pd.DataFrame


def integrated_gradients(
    model: Embedder,
    dictionary: Coder,
    adata: anndata.AnnData,
    pairs: Pairs,
    *,
    steps: int = STEPS,
    checked: int = CHECKED,
    options: Mapping[str, Any] | None = None,
    exchange: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Approximation:
    """Scores of every gene for the concepts of some pairs.

    Args:
        model, dictionary, adata, options, exchange: as of `attribution.attribute`; the model must
            have gradients that can be had here, the dictionary be a `sae_jax.Dictionary`.
        pairs: of `attribution.find_pairs`.
        steps: of the path.
        checked: concepts, evenly spread, that are attributed by occlusion too; 2 at least.

    Raises:
        InputError: whatever of the input does not fit.
    """
    if steps < 1 or checked < 2:
        raise InputError(f"steps={steps}, checked={checked}: give 1 step and 2 concepts at least.")
    pairs.check(adata.n_obs)
    found = perturbed(model, dictionary, adata, pairs.cells, options, exchange)
    slopes = getattr(getattr(found, "swaps", None), "slopes", None)
    if (slopes is None and not isinstance(found, Linear)) or found.score.fused is None:
        raise InputError(
            "integrated gradients need a model that gives gradients (extract's scVI and scGPT) and "
            "a sae_jax.Dictionary: attribute by occlusion instead."
        )
    local = pairs.local()
    scores = np.full((len(pairs.concepts), len(found.genes)), np.nan)
    forwards = Forwards()
    whole = np.full(len(pairs.concepts), np.nan)
    there = np.unique(local.concept)
    for i in tqdm(there, desc="integrated gradients", unit=" concept", disable=not progress):
        some = local.of([i])
        one = _linear if isinstance(found, Linear) else _tokens
        scores[i] = one(found, some, steps).mean(axis=0)
        whole[i] = _difference(found, some)
        n = len(some.prototype)
        forwards += Forwards(n * len(found.genes), n * len(found.genes), n * steps)
    approximate = Attribution(scores, list(found.genes), pairs, None, forwards)
    among = there[np.unique(np.linspace(0, len(there) - 1, checked).round().astype(int))]
    exact = attribution.attribute(
        model, dictionary, adata, pairs=pairs.of(among), options=options, exchange=exchange,
        progress=progress,
    )  # fmt: skip
    rows = []
    for row, i in zip(exact.scores, among, strict=True):
        some = local.of([i])
        differ = (found.values[some.prototype] != found.values[some.counterfactual]).tocsr()
        genes = np.unique(differ.indices)
        rows.append(
            {
                "concept": pairs.concepts[i],
                **agreement(row[genes], scores[i, genes]),
                "completeness": scores[i].sum() / whole[i],
            }
        )
    return Approximation(approximate, pd.DataFrame(rows).set_index("concept"))


def agreement(exact: np.ndarray, approximate: np.ndarray) -> dict[str, float]:
    """Of two scores of the same genes [genes]: Spearman's rho, and the share of the ten best genes
    (fewer where there are fewer) that are the same."""
    most = min(TOP, len(exact))
    same = np.intersect1d(descending(exact)[:most], descending(approximate)[:most])
    rho = stats.spearmanr(exact, approximate).statistic if len(exact) > 2 else np.nan
    return {"spearman": float(rho), "top": len(same) / most if most else np.nan}


def _linear(found: Linear, pairs: Pairs, steps: int) -> np.ndarray:
    """Scores of one concept's pairs, float64 [pairs, genes].

    The path is straight in the first layer's output too, and its weights take the gradient back.
    """
    p, c = pairs.prototype, pairs.counterfactual
    end = found.start[p]
    begin = found.start[c] - found.bias[c] + found.bias[p]  # the prototype's batch all the way
    shares = (np.arange(steps) + 0.5)[None, :, None] / steps
    path = begin[:, None] + shares * (end - begin)[:, None]
    rows = path.reshape(-1, path.shape[-1]).astype(np.float32)
    slope = _slope(
        rows, found.rest, np.repeat(found.batch[p], steps), found.score.fused,
        pairs.concepts.astype(np.int32), layer_norm=found.layer_norm,
        architecture=found.score.architecture,
    )  # fmt: skip
    mean = np.asarray(slope, np.float64).reshape(path.shape).mean(axis=1)
    return (found.inputs[p] - found.inputs[c]).toarray() * (mean @ found.first64.T)


def _tokens(found: Tokens, pairs: Pairs, steps: int) -> np.ndarray:
    """The same of a model that is differentiated by its reader, along the values of tokens."""
    concept = pairs.concepts.astype(np.int32)

    def pull(rows: np.ndarray) -> np.ndarray:
        slope = _slope_of_rows(
            rows, found.score.fused, concept, architecture=found.score.architecture
        )
        return np.array(slope)

    scores = np.empty((len(pairs.prototype), len(found.genes)))
    for cell in np.unique(pairs.prototype):
        some = np.flatnonzero(pairs.prototype == cell)
        scores[some] = found.swaps.slopes(cell, pairs.counterfactual[some], steps, pull)
    return scores


def _difference(found: Perturbed, pairs: Pairs) -> float:
    """Mean z_p - z_c of one concept's pairs."""
    cells = np.concatenate([pairs.prototype, pairs.counterfactual])
    nothing = np.zeros(0, np.int64)
    starts = np.zeros(len(cells) + 1, np.int64)
    codes = found.codes(cells, starts, nothing, np.zeros(0), pairs.concepts)[:, 0]
    before, after = np.split(codes.astype(np.float64), 2)
    return float((before - after).mean())


@functools.partial(jax.jit, static_argnames=("layer_norm", "architecture"))
def _slope(
    hidden: jax.Array,
    rest: list[tuple[jax.Array, jax.Array]],
    batch: jax.Array,
    coder: tuple[Any, ...],
    concept: jax.Array,
    *,
    layer_norm: tuple[float | None, ...],
    architecture: Architecture,
) -> jax.Array:
    """Of one concept's code along the first layer's outputs [rows, hidden], the same shape."""

    def summed(hidden: jax.Array) -> jax.Array:
        rows = encode_rest(rest, hidden, batch, layer_norm)
        return codes_of(*coder, rows, concept, architecture).sum()

    with jax.default_matmul_precision("highest"):
        return jax.grad(summed)(hidden)


@functools.partial(jax.jit, static_argnames="architecture")
def _slope_of_rows(
    rows: jax.Array, coder: tuple[Any, ...], concept: jax.Array, *, architecture: Architecture
) -> jax.Array:
    """The same along embedding rows [rows, d]."""
    with jax.default_matmul_precision("highest"):
        return jax.grad(lambda x: codes_of(*coder, x, concept, architecture).sum())(rows)

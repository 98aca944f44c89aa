"""What happens to cells when a feature is turned up: in the latent space and in predicted genes.

Schuster's text maximises a feature in z and decodes; the code raises it to the mean activation of
the TARGET type, and compares the decoded cells with the original ones, so that what the dictionary
does not reconstruct counts as effect. Here the error stays in the cell, x + decode(z') - decode(z),
unless `keep_error=False` asks for decode(z').

Latents before and after go through a model's decoder by `predict`. What it returns, shares of
counts of the same cells before and after, is what a paired test of genes needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from analysis.features import Matrix
from sae_jax.errors import InputError

RULES = ("target_mean", "maximum")
DEPTH = 1e4  # counts a cell, in which shares of counts are expressed


class Codebook(Protocol):
    """A dictionary of latents, such as `sae_jax.Dictionary`; its decoder must be linear."""

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [cells, features] of latents x [cells, d]."""

    def decode(self, z: Matrix) -> np.ndarray:
        """Latents [cells, d] of codes z [cells, features]."""

    def steer(
        self, x: np.ndarray, features: Any, *, set: Any = None, scale: Any = None,
        keep_error: bool = True,
    ) -> np.ndarray:  # fmt: skip
        """Latents [cells, d] as they were if `features` had other codes."""


class Decoder(Protocol):
    """A model that predicts expression from latents."""

    def decode(self, latents: np.ndarray, *, batch: Any, covariates: Any) -> np.ndarray:
        """Share of each gene in a cell's expected counts [cells, genes]; a cell's sum is 1."""


def levels(z: Matrix, rule: str = "maximum", factor: float = 1.0) -> np.ndarray:
    """The codes that features are raised to.

    Args:
        z: codes [cells, features] of the cells that set the level: of the target type for
            "target_mean", of all cells for "maximum".
        rule: "target_mean", the mean over these cells, silent ones counted (the paper's code); or
            "maximum", the largest code that occurs (the paper's text, "maximise").
        factor: multiplies it; the paper's code sometimes takes 1.5.

    Returns:
        One code per feature [features].
    """
    if rule not in RULES:
        raise InputError(f"rule={rule!r}: give one of {', '.join(RULES)}.")
    if np.ndim(z) != 2 or z.shape[0] == 0:
        raise InputError(f"codes have shape {np.shape(z)}: give at least one cell by features.")
    columns = sparse.csc_array(z, dtype=np.float64)
    if rule == "maximum":
        return columns.max(axis=0).toarray() * factor
    return columns.sum(axis=0) / columns.shape[0] * factor


def raise_to(
    dictionary: Codebook,
    x: np.ndarray,
    features: int | Sequence[int],
    reference: np.ndarray,
    rule: str = "maximum",
    factor: float = 1.0,
    keep_error: bool = True,
) -> np.ndarray:
    """Latents [cells, d] of x with features set to their level in reference cells.

    As in the paper every cell gets the level, also one whose code was above it. To set or to scale
    codes by a number, `dictionary.steer(x, features, set=...)` or `scale=...`.

    Args:
        x: latents to change [cells, d].
        features: one or several, changed together.
        reference: latents of the cells that set the level [other cells, d].
        rule, factor: as in `levels`.
        keep_error: False gives decode(z'), as the authors' code does.
    """
    level = levels(dictionary.encode(reference, sparse=True), rule, factor)
    _known(features, len(level))
    return dictionary.steer(x, features, set=level[features], keep_error=keep_error)


def latent_shift(
    before: np.ndarray, after: np.ndarray, target: np.ndarray | None = None
) -> pd.DataFrame:
    """How far each cell moved in the latent space, and how far towards a target group.

    Args:
        before, after: latents of the same cells [cells, d].
        target: latents of the target's cells [other cells, d].

    Returns:
        One row per cell: `norm` of the shift; with a target also `towards`, its length along the
        line from the centroid of `before` to that of the target, and `progress`, towards over the
        length of that line (1 for a shift by all of it).
    """
    _paired("latents", before, after)
    shift = np.asarray(after, np.float64) - before
    found = {"norm": np.linalg.norm(shift, axis=1)}
    if target is not None:
        direction, distance = _line(before, target)
        found["towards"] = shift @ direction
        found["progress"] = found["towards"] / distance
    return pd.DataFrame(found)


@dataclass(frozen=True, eq=False)
class Predicted:
    """Shares of counts that a model predicts for cells before and after; both [cells, genes]."""

    before: np.ndarray
    after: np.ndarray


def predict(
    model: Decoder, before: np.ndarray, after: np.ndarray, batch: Any = None, covariates: Any = None
) -> Predicted:
    """Expression before and after, by the model's own decoder.

    Args:
        model: whatever decodes latents into shares of counts; `extract`'s scVI and multiDGD do.
        before, after: latents of the same cells [cells, d].
        batch, covariates: given to the decoder as they are, the same before and after.
    """
    _paired("latents", before, after)
    shares = [model.decode(x, batch=batch, covariates=covariates) for x in (before, after)]
    return Predicted(*shares)


def expression_shift(
    predicted: Predicted, genes: Sequence[str], pseudocount: float = 1.0
) -> pd.DataFrame:
    """Change of every gene's predicted expression.

    Means over cells, in counts per 10,000, and log2((after + pseudocount) / (before + ...)). A
    decoder has no sampling noise, so a change is no evidence by itself: see a paired test for that.

    Returns:
        One row per gene (index): `before`, `after`, `log2_fold_change`, and `share_up`, the share
        of cells in which it rose.
    """
    _paired("predictions", predicted.before, predicted.after)
    if len(genes) != predicted.before.shape[1]:
        raise InputError(
            f"{len(genes)} genes for predictions of shape {predicted.before.shape}: name each."
        )
    if pseudocount <= 0:
        raise InputError(f"pseudocount={pseudocount}: give a number above 0.")
    before = predicted.before.mean(axis=0, dtype=np.float64) * DEPTH
    after = predicted.after.mean(axis=0, dtype=np.float64) * DEPTH
    return pd.DataFrame(
        {
            "before": before,
            "after": after,
            "log2_fold_change": np.log2((after + pseudocount) / (before + pseudocount)),
            "share_up": (predicted.after > predicted.before).mean(axis=0),
        },
        index=pd.Index(genes, name="gene"),
    )


def rank_candidates(
    dictionary: Codebook,
    x: np.ndarray,
    target: np.ndarray,
    candidates: ArrayLike,
    level: ArrayLike,
    keep_error: bool = True,
) -> pd.DataFrame:
    """Candidate features, each raised alone, by how far they move cells towards a target group.

    The decoder is linear, so a shift is the change of one code times that feature's direction:
    all candidates come from one encoding of x, as `dictionary.steer` would move the cells.

    Args:
        x: latents of the cells to change [cells, d].
        target: latents of the target's cells [other cells, d].
        candidates: features [candidates].
        level: the code that each is set to [candidates], such as `levels(...)[candidates]`.
        keep_error: False measures decode(z') - x, as the authors' code does: the dictionary's
            error is then part of every shift, and the same part for all.

    Returns:
        One row per candidate, the largest `towards` first (ties in the order given): `feature`,
        `level`, `mean_change` of the code, and the means over cells of `norm`, `towards` and
        `progress` as in `latent_shift`.
    """
    candidates, level = np.asarray(candidates), np.asarray(level, np.float64)
    if candidates.ndim != 1 or candidates.size == 0 or candidates.shape != level.shape:
        raise InputError(
            f"{candidates.shape} candidates with {level.shape} levels: give one level for each."
        )
    codes = dictionary.encode(x, sparse=True)
    n_features = codes.shape[1]
    _known(candidates, n_features)
    ones = (np.ones(candidates.size, np.float32), (np.arange(candidates.size), candidates))
    each = sparse.csr_matrix(ones, shape=(candidates.size, n_features))
    nothing = sparse.csr_matrix((1, n_features), dtype=np.float32)
    bias = np.asarray(dictionary.decode(nothing), np.float64)
    directions = dictionary.decode(each) - bias  # [candidates, d]

    change = level - sparse.csc_array(codes)[:, candidates].toarray().astype(np.float64)
    towards, distance = _line(x, target)
    along = change * (directions @ towards)
    squared = change**2 * (directions**2).sum(axis=1)
    if not keep_error:
        error = np.asarray(dictionary.decode(codes), np.float64) - x
        along += (error @ towards)[:, None]
        squared += 2 * change * (error @ directions.T) + (error**2).sum(axis=1)[:, None]
    norm = np.sqrt(np.maximum(squared, 0))
    table = pd.DataFrame(
        {
            "feature": candidates,
            "level": level,
            "mean_change": change.mean(axis=0),
            "norm": norm.mean(axis=0),
            "towards": along.mean(axis=0),
            "progress": along.mean(axis=0) / distance,
        }
    )
    return table.sort_values("towards", ascending=False, kind="stable", ignore_index=True)


def _line(x: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Unit vector [d] from the centroid of x to that of the target, and their distance."""
    if np.ndim(target) != 2 or len(x) == 0 or len(target) == 0 or target.shape[1] != x.shape[1]:
        raise InputError(
            f"cells {np.shape(x)} and target {np.shape(target)}: give at least one cell in each, "
            "with the same number of latents."
        )
    line = target.mean(axis=0, dtype=np.float64) - x.mean(axis=0, dtype=np.float64)
    distance = float(np.linalg.norm(line))
    if distance == 0:
        raise InputError("the target's centroid is that of the cells: there is no way towards it.")
    return line / distance, distance


def _known(features: ArrayLike, n_features: int) -> None:
    unknown = np.setdiff1d(features, np.arange(n_features))
    if unknown.size:
        raise InputError(f"feature {unknown[0]}: the dictionary has 0 to {n_features - 1}.")


def _paired(name: str, before: np.ndarray, after: np.ndarray) -> None:
    if np.ndim(before) != 2 or np.shape(before) != np.shape(after):
        raise InputError(
            f"{name} before have shape {np.shape(before)} and after {np.shape(after)}: give the "
            "same cells in both."
        )

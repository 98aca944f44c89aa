"""What a model does with a feature: splice, ablate and steer at a layer, look at what comes after.

Three questions to any model that can be run with the hidden states of a layer exchanged on the way
(`extract`'s can). Fidelity: what of the later layers, embeddings and outputs survives when the
dictionary's reconstruction stands in for a layer. Effects: what changes there when one feature is
ablated or set. And whether that is more than the same change of every row's norm in a random
direction does, and more than the dictionary's own error.

Features are changed as x + decode(z') - decode(z), so that what the dictionary does not reconstruct
stays in the hidden state; `keep_error=False` compares decode(z') with decode(z) instead, and then
the error is in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from analysis.steering import Codebook
from sae_jax.errors import InputError

Layer = int | str
Edit = Callable[[np.ndarray], np.ndarray]


class Run(Protocol):
    """A forward pass: `hidden` {layer: [rows, d]} and `outputs` {name: [rows, ...]}."""

    hidden: Mapping[Layer, np.ndarray]
    outputs: Mapping[str, np.ndarray]


class Editable(Protocol):
    """A model that can be run with hidden states exchanged on the way."""

    def run(
        self, adata: Any, layer: Layer, edit: Edit | None, layers: Any = None, **options: Any
    ) -> Run:
        """Forward pass with the rows of `layer` replaced by edit(rows); see `extract`'s models."""


@dataclass(frozen=True)
class Site:
    """Where a model is edited and where it is read.

    Attributes:
      model: see `Editable`.
      adata: the cells.
      layer: whose hidden states are exchanged; the dictionary must be of this layer.
      layers: that are read, at or after `layer`; None for the model's default, its embedding.
      outputs: of the model's, such as its predicted expression.
      tokens: which rows of `layer` are exchanged: "all", "genes", "cls".
      options: whatever else `model.run` takes: pooling, batch_size, ...
    """

    model: Editable
    adata: Any
    layer: Layer
    layers: Layer | Sequence[Layer] | None = None
    outputs: Sequence[str] = ()
    tokens: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, edit: Edit | None) -> dict[str, np.ndarray]:
        """Rows [rows, values] by place, "layer 3" or "output expression", float64."""
        found = self.model.run(
            self.adata, self.layer, edit, self.layers, tokens=self.tokens,
            **({"outputs": self.outputs} if self.outputs else {}), **self.options,
        )  # fmt: skip
        places = {f"layer {layer}": rows for layer, rows in found.hidden.items()}
        places |= {f"output {name}": rows for name, rows in found.outputs.items()}
        return {
            name: np.asarray(rows, np.float64).reshape(len(rows), -1)
            for name, rows in places.items()
        }


def fidelity(site: Site, dictionary: Codebook) -> pd.DataFrame:
    """What survives of later layers, embeddings and outputs with the reconstruction in place.

    The yardsticks are hidden states without information: every row its mean over all of them, and
    zero. 1 is recovered if nothing changes, 0 if the reconstruction does as badly as the yardstick;
    it can be below 0.

    Args:
        site: where; see `Site`.
        dictionary: of the hidden states of `site.layer`.

    Returns:
        A row per place (index): `rows`; mean squared distances from the unedited run,
        `error_reconstruction`, `error_mean`, `error_zero`; `recovered_of_mean` and
        `recovered_of_zero`, 1 - error / yardstick's, NaN where a yardstick changes nothing;
        `cosine`, the mean over rows with the unedited run.
    """
    moments = _Moments()
    original = site.run(moments)
    mean = moments.mean
    runs = {
        "reconstruction": site.run(lambda x: _decoded(dictionary, x)),
        "mean": site.run(lambda x: np.tile(mean.astype(x.dtype), (len(x), 1))),
        "zero": site.run(np.zeros_like),
    }
    rows = {}
    for place, before in original.items():
        errors = {
            name: float(np.square(after[place] - before).sum(axis=1).mean())
            for name, after in runs.items()
        }
        rows[place] = {
            "rows": len(before),
            **{f"error_{name}": error for name, error in errors.items()},
            "recovered_of_mean": _recovered(errors["reconstruction"], errors["mean"]),
            "recovered_of_zero": _recovered(errors["reconstruction"], errors["zero"]),
            "cosine": _cosine(before, runs["reconstruction"][place]).mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("place")


def effects(
    site: Site,
    dictionary: Codebook,
    features: Iterable[int],
    *,
    set: float | Mapping[int, float] | None = None,
    scale: float | None = None,
    draws: int = 20,
    keep_error: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """What changing one feature at a time does, beside random directions and the reconstruction.

    A random direction is a random unit vector, the same for all rows, along which every row moves
    by exactly as much, and to the same side, as it does along the feature's. A feature that moves
    no row gets zeros and p = 1. Each feature costs 1 + draws runs.

    Args:
        site: where; see `Site`.
        dictionary: of the hidden states of `site.layer`.
        features: each is changed alone.
        set: the code that it gets in every row, one for all or by feature, such as
            `steering.levels`; 0 ablates.
        scale: the factor that its code gets instead.
        draws: random directions per feature.
        keep_error: False replaces hidden states by decode(z') and compares with decode(z).
        seed: of the directions.

    Returns:
        A row per feature and place: `feature`, `place`; `moved`, the mean norm of the change at
        `site.layer` over the rows exchanged there; `norm`, the mean norm of the change at the
        place; `relative`, over the mean norm there before; `cosine`, the mean of before and after;
        `share_changed`, of rows; `random_norm` and `random_sd`, mean and sd of `norm` over the
        random directions; `ratio` to that mean; `p` = (1 + draws that do as much or more) /
        (1 + draws); `reconstruction_norm`, the mean norm of the change by the reconstruction alone.

    Raises:
        InputError: not exactly one of set and scale; a feature that the dictionary does not have;
            no draws.
    """
    features = [int(feature) for feature in features]
    if (set is None) == (scale is None):
        raise InputError("effects needs exactly one of set and scale.")
    if draws < 1 or not features:
        raise InputError(f"{len(features)} features and draws={draws}: give one at least of each.")
    if isinstance(set, Mapping) and (missing := [f for f in features if f not in set]):
        raise InputError(f"set has no code for feature {missing[0]}.")
    moments = _Moments()
    original = site.run(moments)
    rebuilt = site.run(lambda x: _decoded(dictionary, x))
    directions = _directions(dictionary, features, moments.mean.size)
    before = original if keep_error else rebuilt
    alone = {place: _norms(rebuilt[place] - original[place]).mean() for place in original}
    rows = []
    for feature, direction in zip(features, directions, strict=True):
        code = set[feature] if isinstance(set, Mapping) else set
        value = {"scale": scale} if code is None else {"set": code}
        change = _Change(dictionary, feature, value, direction, keep_error)
        after = site.run(change)
        norms = {place: _norms(after[place] - before[place]) for place in before}
        rng = np.random.default_rng([seed, feature])
        by_chance: dict[str, list[float]] = {place: [] for place in before}
        for _ in range(draws if change.moved > 0 else 0):
            drawn = rng.normal(size=direction.size)
            other = site.run(change.along(drawn / np.linalg.norm(drawn)))
            for place, rows_after in other.items():
                by_chance[place].append(_norms(rows_after - before[place]).mean())
        for place, norm in norms.items():
            random = np.array(by_chance[place] or [0.0] * draws)
            size = _norms(before[place]).mean()
            rows.append(
                {
                    "feature": feature,
                    "place": place,
                    "moved": change.moved,
                    "norm": norm.mean(),
                    "relative": _over(norm.mean(), size),
                    "cosine": _cosine(before[place], after[place]).mean(),
                    "share_changed": (norm > 0).mean(),
                    "random_norm": random.mean(),
                    "random_sd": random.std(ddof=1) if draws > 1 else np.nan,
                    "ratio": _over(norm.mean(), random.mean()),
                    "p": (1 + (random >= norm.mean()).sum()) / (1 + draws),
                    "reconstruction_norm": alone[place],
                }
            )
    return pd.DataFrame(rows)


class _Moments:
    """An edit that changes nothing and keeps the mean of the rows it sees."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.total = self.total + np.asarray(x, np.float64).sum(axis=0)
        self.count += len(x)
        return x

    @property
    def mean(self) -> np.ndarray:
        """[d]."""
        if self.count == 0:
            raise InputError("no hidden state came to the edit: are there cells with such tokens?")
        return self.total / self.count


class _Change:
    """The edit of one feature, and the same along other directions.

    moved: mean norm of the change over the rows edited so far by the feature itself.
    """

    def __init__(
        self,
        dictionary: Codebook,
        feature: int,
        value: dict[str, float],
        direction: np.ndarray,
        keep_error: bool,
    ) -> None:
        self.dictionary, self.feature, self.value = dictionary, feature, value
        self.direction, self.keep_error = direction, keep_error
        self.total, self.count = 0.0, 0

    @property
    def moved(self) -> float:
        return self.total / max(1, self.count)

    def steered(self, x: np.ndarray) -> np.ndarray:
        """Rows of x with the feature changed, whatever is kept of the error."""
        return self.dictionary.steer(x, [self.feature], **self.value, keep_error=self.keep_error)

    def base(self, x: np.ndarray) -> np.ndarray:
        return x if self.keep_error else _decoded(self.dictionary, x)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        after = self.steered(x)
        difference = np.asarray(after, np.float64) - self.base(x)
        self.total += float(_norms(difference).sum())
        self.count += len(x)
        return after

    def along(self, other: np.ndarray) -> Edit:
        """Every row moved by as much along the unit vector `other` [d] instead."""
        size = np.linalg.norm(self.direction)

        def edit(x: np.ndarray) -> np.ndarray:
            base = self.base(x)
            by = (np.asarray(self.steered(x), np.float64) - base) @ (self.direction / size)
            return (base + by[:, None] * other).astype(x.dtype)

        return edit


def _directions(dictionary: Codebook, features: Sequence[int], d: int) -> np.ndarray:
    """What a code of 1 adds to a hidden state [features, d], float64."""
    n_features = dictionary.encode(np.zeros((1, d), np.float32), sparse=True).shape[1]
    if unknown := [f for f in features if not 0 <= f < n_features]:
        raise InputError(f"feature {unknown[0]}: the dictionary has 0 to {n_features - 1}.")
    ones = (np.ones(len(features), np.float32), (np.arange(len(features)), features))
    each = sparse.csr_matrix(ones, shape=(len(features), n_features))
    nothing = sparse.csr_matrix((1, n_features), dtype=np.float32)
    return np.asarray(dictionary.decode(each), np.float64) - dictionary.decode(nothing)


def _decoded(dictionary: Codebook, x: np.ndarray) -> np.ndarray:
    return np.asarray(dictionary.decode(dictionary.encode(x, sparse=True))).astype(x.dtype)


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=1)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row; NaN where one of the two is zero."""
    with np.errstate(invalid="ignore"):
        return np.einsum("rd,rd->r", a, b) / (_norms(a) * _norms(b))


def _over(a: float, b: float) -> float:
    """a / b; NaN for 0 / 0, infinite for more."""
    return a / b if b > 0 else (np.inf if a > 0 else np.nan)


def _recovered(error: float, yardstick: float) -> float:
    return 1 - error / yardstick if yardstick > 0 else np.nan

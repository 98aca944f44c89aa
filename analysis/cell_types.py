"""How well single features tell cell types apart, chosen on some cells and measured on others.

Kendiukhov, section 3.4: a feature is specific for a type above an AUROC of 0.8. The best of
thousands of features looks good on the cells that it was chosen on whatever the features are, so
here the two are apart. A latent is zero where it is silent and has one side, a component has two:
whatever is compared is compared with the same sides. The authors' code takes a latent's upper side,
a component's better one, and the same cells for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import features
from analysis.features import Matrix
from sae_jax.errors import InputError

SPECIFIC = 0.8
SIDES = ("one", "two")


def split(labels: pd.Series, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of the cells to choose on and of those to measure on.

    Of every label `round(share n)` cells are measured on, and of the unlabelled ones too. With
    share 0 both are all cells: what is chosen is measured where it was chosen.

    Raises:
        InputError: a share outside of [0, 1).
    """
    if not 0 <= share < 1:
        raise InputError(f"share={share}: give a share of the cells from 0 to below 1.")
    everything = np.arange(len(labels))
    if share == 0:
        return everything, everything
    rng = np.random.default_rng(seed)
    codes = pd.Categorical(labels).codes
    held_out = [
        rng.permutation(of)[: round(share * len(of))]
        for of in (np.flatnonzero(codes == code) for code in np.unique(codes))
    ]
    measured = np.sort(np.concatenate(held_out)).astype(np.int64)
    return np.setdiff1d(everything, measured), measured


@dataclass(frozen=True, eq=False)
class Areas:
    """Area under the ROC curve of every feature for every label against all other cells.

    labels: names, of the labels with cells enough. n_cells: of each, on both sides together.
    chosen, measured: [features, labels], from 0 to 1, on the cells to choose and to measure on.
    """

    labels: np.ndarray
    n_cells: np.ndarray
    chosen: np.ndarray
    measured: np.ndarray

    def best(self, sides: str = "one") -> pd.DataFrame:
        """One row per label: its best feature where it is chosen, and how that one measures.

        Args:
            sides: "one": high activation speaks for the label. "two": or against it, whichever is
                better where it is chosen; the side is kept.

        Returns:
            `label`, `cells`, `feature` (the first of equals), `higher` (False: the label has the
            lower activations), `auroc_chosen`, `auroc`.
        """
        areas = self._sided(sides)
        feature = areas.argmax(axis=0)
        at = np.arange(len(self.labels))
        higher = self._higher(sides)[feature, at]
        measured = self.measured[feature, at]
        return pd.DataFrame(
            {
                "label": self.labels,
                "cells": self.n_cells,
                "feature": feature,
                "higher": higher,
                "auroc_chosen": areas[feature, at],
                "auroc": np.where(higher, measured, 1 - measured),
            }
        )

    def best_of(self, n: int, sides: str = "one", draws: int = 20, seed: int = 0) -> float:
        """Mean over labels of the best feature's measured AUROC, of n features drawn at random.

        More candidates have a better best: this is for comparing with n components. The mean over
        draws without replacement; of n features or fewer, all of them.
        """
        n_features = len(self.chosen)
        if n >= n_features:
            return float(self.best(sides)["auroc"].mean())
        rng = np.random.default_rng(seed)
        means = []
        for _ in range(draws):
            some = np.sort(rng.choice(n_features, n, replace=False))
            part = Areas(self.labels, self.n_cells, self.chosen[some], self.measured[some])
            means.append(part.best(sides)["auroc"].mean())
        return float(np.mean(means))

    def per_feature(self, sides: str = "one", threshold: float = SPECIFIC) -> pd.DataFrame:
        """One row per feature: the label it tells best where that is chosen, and measured.

        Returns:
            `label`, `auroc_chosen`, `auroc`, and `specific`: both are above the threshold.
        """
        areas = self._sided(sides)
        label = areas.argmax(axis=1)
        at = np.arange(len(areas))
        measured = self.measured[at, label]
        measured = np.where(self._higher(sides)[at, label], measured, 1 - measured)
        chosen = areas[at, label]
        return pd.DataFrame(
            {
                "label": pd.Categorical(self.labels[label], self.labels),
                "auroc_chosen": chosen,
                "auroc": measured,
                "specific": (chosen > threshold) & (measured > threshold),
            },
            index=pd.RangeIndex(len(areas), name="feature"),
        )

    def _higher(self, sides: str) -> np.ndarray:
        if sides not in SIDES:
            raise InputError(f"sides={sides!r}: give one of {', '.join(SIDES)}.")
        return self.chosen >= 0.5 if sides == "two" else np.ones(self.chosen.shape, bool)

    def _sided(self, sides: str) -> np.ndarray:
        return np.where(self._higher(sides), self.chosen, 1 - self.chosen)


def areas(
    z: Matrix, labels: pd.Series, choose: np.ndarray, measure: np.ndarray, least: int = 5
) -> Areas:
    """The areas of all features, on the cells to choose on and on those to measure on.

    Args:
        z: [cells, features], dense or sparse; negative values are allowed.
        labels: one per cell; cells without one are left out.
        choose, measure: positions of cells, from `split`.
        least: a label has so many cells on either side, or it is only among the others.

    Raises:
        InputError: what `features.auroc` refuses; fewer than two labels with cells enough.
    """
    labels = pd.Series(pd.Categorical(labels))
    counts = [labels.iloc[cells].value_counts() for cells in (choose, measure)]
    enough = counts[0].index[counts[0] >= least].intersection(counts[1].index[counts[1] >= least])
    enough = np.asarray([label for label in labels.cat.categories if label in enough])
    if len(enough) < 2:
        raise InputError(
            f"{len(enough)} labels have {least} cells or more on either side of the split: "
            "two are needed."
        )
    z = features.as_columns(z, signed=True)
    found = []
    for cells in (choose, measure):
        if len(found) and np.array_equal(choose, measure):
            found.append(found[0])
            continue
        names, values = features.auroc(z[cells], labels.iloc[cells])
        found.append(values[:, pd.Index(names).get_indexer(enough)])
    n_cells = labels.value_counts().reindex(enough).to_numpy()
    return Areas(enough, n_cells, *found)

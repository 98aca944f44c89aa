"""Which marker sets the genes of a feature hold more of than chance, for a whole dictionary.

Kendiukhov, sections 3.4 and 4.4: Fisher's exact test of a feature's top correlated genes against
marker sets, and the share of features with at least one set at FDR < 0.05. The universe are all
genes that could have been chosen; the authors' code has the genes of the sets alone, of which any
selection of markers is a large part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import enrichment
from analysis.features import Matrix
from analysis.gene_sets import GeneSets
from sae_jax.errors import InputError

UNIVERSES = ("measured", "markers")
FDR = 0.05
PAPER = " (Kendiukhov)"  # ends the names of the paper's sets among the embedded ones


@dataclass(frozen=True, eq=False)
class Marked:
    """Marker sets tested in every feature's genes; all [features, sets] but for the names.

    sets: names. hits: selected genes in the set. effect: hits over those expected.
    p: one-sided tail probability. q: false discovery rate over all features and sets (and sides,
        where `mark_sides` tested both together).
    """

    sets: list[str]
    hits: np.ndarray
    effect: np.ndarray
    p: np.ndarray
    q: np.ndarray

    @property
    def annotated(self) -> np.ndarray:
        """Features with at least one set at FDR < 0.05, bool [features]."""
        return (self.q < FDR).any(axis=1)

    def table(self) -> pd.DataFrame:
        """One row per feature and set found: `feature`, `set`, `hits`, `effect`, `p`, `q`."""
        feature, at = np.nonzero(self.q < FDR)
        found = {name: getattr(self, name)[feature, at] for name in ("hits", "effect", "p", "q")}
        return pd.DataFrame({"feature": feature, "set": np.asarray(self.sets)[at], **found})

    def counts(self) -> pd.Series:
        """Features that each set is found in, the most frequent first."""
        found = pd.Series((self.q < FDR).sum(axis=0), index=self.sets, name="features")
        return found.sort_values(ascending=False, kind="stable")


def mark(selected: Matrix, sets: GeneSets, universe: str = "measured") -> Marked:
    """Fisher's exact test (over-representation) of every set in every feature's selected genes.

    Args:
        selected: boolean [features, genes].
        sets: over the same genes.
        universe: "measured", all of these genes; or "markers", those that any set has, as the
            authors' code does (the other selected genes are then left out).

    Raises:
        InputError: another universe; shapes that do not fit.
    """
    return mark_sides({"up": selected}, sets, universe)["up"]


def mark_sides(
    selected: Mapping[str, Matrix], sets: GeneSets, universe: str = "measured"
) -> dict[str, Marked]:
    """`mark` of several selections of each feature's genes, corrected as one family.

    A principal component has no preferred side: its genes are those on either, and the two tests of
    a set count twice among all tests.
    """
    if universe not in UNIVERSES:
        raise InputError(f"universe={universe!r}: give one of {', '.join(UNIVERSES)}.")
    membership, keep = sets.membership, slice(None)
    if universe == "markers":
        keep = np.flatnonzero(membership.sum(axis=0) > 0)
        membership = membership[:, keep]
    found = {
        side: enrichment.hypergeometric(some[:, keep], membership)
        for side, some in selected.items()
    }
    q = enrichment.benjamini_hochberg(np.stack([each.p for each in found.values()]), axis=None)
    return {
        side: Marked(list(sets.names), each.hits, each.effect, each.p, q[number])
        for number, (side, each) in enumerate(found.items())
    }


def of_paper(sets: GeneSets) -> GeneSets:
    """The paper's marker and functional sets among the embedded ones.

    Raises:
        InputError: none of them is there.
    """
    keep = [i for i, name in enumerate(sets.names) if name.endswith(PAPER)]
    if not keep:
        raise InputError(
            f"none of the paper's marker sets has enough measured genes (of {len(sets.names)} "
            "embedded sets): are the genes human symbols? --marker_sets=all takes all sets."
        )
    return dataclasses.replace(
        sets, names=[sets.names[i].removesuffix(PAPER) for i in keep],
        membership=sets.membership[keep], descriptions=[sets.descriptions[i] for i in keep],
    )  # fmt: skip

"""What is known of every feature of a dictionary, and when a term names one.

A term names a feature where all tests of the rule find it, by default two. "change" says that the
term's genes differ between the cells at all, which a random set's do too as soon as it holds a
marker; "matched" that more of the genes that differ are in it than of genes of like expression,
which may be no more than co-expression in permuted features. Each is blind where the other sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import enrichment
from analysis.blocks import slices

OVERLAPS = ("fisher", "binomial", "matched")  # tests of the relevant genes
TESTS = ("change", "calibrated", "mann_whitney", *OVERLAPS)
DIRECTIONS = ("up", "down", "both")
EFFECTS = ("change", "change_z", "auc", "z", "calibrated_z")
# Of each test that is calibrated, the statistic and its deviate from permuted features.
CALIBRATED = {"change": ("change", "change_z"), "calibrated": ("z", "calibrated_z")}


@dataclass(frozen=True)
class Rule:
    """Which cells are high, which genes are relevant, when a term names a feature.

    percentile: of all cells; a cell above it is high (Schuster: 99).
    cells: a feature with fewer high or silent cells is not named; nor is one with fewer silent
      cells than a quarter of its high ones.
    gene_q, fold_change, fallback_p: relevant are genes of Benjamini-Hochberg q below the first and
      a fold change of mean counts of at least the second; where there are none, those of p below
      the third (Schuster A.3.7's two stages; None: no second stage).
    direction: of relevant genes: "up", "down", or "both".
    pseudocount: added to the mean counts (per ten thousand) of both groups.
    naming: the tests that all must find a term, on one side, for it to name a feature; the first
      ranks terms.
    term_q: at a q of each, over the feature's terms, below it.
    """

    percentile: float = 99.0
    cells: int = 10
    gene_q: float = 1e-5
    fold_change: float = 2.0
    fallback_p: float | None = 0.05
    direction: str = "both"
    pseudocount: float = 1.0
    naming: tuple[str, ...] = ("change", "matched")
    term_q: float = 0.05

    def testable(self, n_high: np.ndarray, n_low: np.ndarray) -> np.ndarray:
        """Whether groups of these sizes can name a feature."""
        return (n_high >= self.cells) & (n_low >= np.maximum(self.cells, n_high / 4))


@dataclass(eq=False)
class Lens:
    """What is known of every feature; tables are [features, terms], float32.

    log_p: -log10 p of each test in `TESTS` that was made.
    auc: Mann-Whitney's effect, U / (n1 n2); z: its deviate; fold: hits over expected hits.
    change: mean `Welch.moderated_d` of the term's genes, those that do not change included.
    change_z, calibrated_z: change and z standardised by permuted features; None without these.
    hits: relevant genes in the term, int32.
    n_high, n_low, n_relevant: cells, cells, genes of each feature.
    top: one row per feature and kept gene: feature, gene, t, log2_fold_change, cohens_d,
      detected_high, detected_low, log10_p, q.
    """

    terms: list[str]
    sizes: np.ndarray
    rule: Rule
    log_p: dict[str, np.ndarray]
    auc: np.ndarray
    z: np.ndarray
    fold: np.ndarray
    hits: np.ndarray
    n_high: np.ndarray
    n_low: np.ndarray
    n_relevant: np.ndarray
    change: np.ndarray
    top: pd.DataFrame
    change_z: np.ndarray | None = None
    calibrated_z: np.ndarray | None = None

    def testable(self) -> np.ndarray:
        """[features]: whether there are cells enough on both sides to name a feature."""
        return self.rule.testable(self.n_high, self.n_low)

    def log_q(self, test: str, rows: slice = slice(None)) -> np.ndarray:
        """-log10 q over the terms of each feature, of some features."""
        return enrichment.benjamini_hochberg_log(self.log_p[test][rows])

    def side(self, test: str, rows: slice = slice(None)) -> np.ndarray:
        """[some features, terms]: 1 where a term's genes are up in the high cells, -1 where they
        are down; 0 where a calibrated test says one and its statistic the other: the term is then
        further up or down than in permuted features, but not up or down. An overlap test is of the
        rule's direction; of both, it has no side, and Mann-Whitney's is taken."""
        if test in OVERLAPS and self.rule.direction != "both":
            side = {"up": 1.0, "down": -1.0}[self.rule.direction]
            return np.full(self.auc[rows].shape, side)
        statistic, deviate = CALIBRATED.get(test, ("z", "z"))
        side = np.sign(getattr(self, statistic)[rows])
        return np.where(np.sign(getattr(self, deviate)[rows]) == side, side, 0)

    def named(self, test: str | None = None) -> np.ndarray:
        """[features, terms] bool: which term names which feature, by the rule or by one test."""
        tests = self.naming if test is None else (test,)
        return np.concatenate([self._named(rows, tests) for rows in slices(len(self.auc), 256)])

    def _named(self, rows: slice, tests: Sequence[str]) -> np.ndarray:
        side = self.side(tests[0], rows)
        found = self.testable()[rows, None] & (side != 0)
        for test in tests:
            found = found & (self.log_q(test, rows) > -np.log10(self.rule.term_q))
            if test not in OVERLAPS or self.rule.direction != "both":
                found = found & (self.side(test, rows) == side)
        return found

    @property
    def naming(self) -> tuple[str, ...]:
        """Those of the rule's tests that were made."""
        return tuple(test for test in self.rule.naming if test in self.log_p) or ("fisher",)

    def share_named(self, test: str | None = None) -> float:
        """Share of the testable features that a term names; NaN if none is testable."""
        testable = self.testable()
        if not testable.any():
            return float("nan")
        return float(self.named(test).any(axis=1).sum() / testable.sum())

    def paper_annotated(self) -> np.ndarray:
        """[features] bool, the published rule: any term of binomial or Mann-Whitney p below .01."""
        most = np.fmax(self.log_p["binomial"].max(axis=1), self.log_p["mann_whitney"].max(axis=1))
        return (most > 2) & (self.n_high > 0)

    def best(self, most: int = 10, test: str | None = None) -> pd.DataFrame:
        """The terms of each feature, first those that are up, then those down.

        On each side first those that name the feature, then by the smallest p of the test (by
        default the first of the rule's, whose p and q are given).

        Returns:
          One row per feature, side and term: feature, side ("up", "down"), rank, term, size, hits,
          change, change_z, auc, z, calibrated_z, -log10 of p and q of the test, and `named`:
          whether the term names the feature.
        """
        tests = self.naming if test is None else (test,)
        return pd.concat(
            [
                self._best(part, side, most, tests)
                for part in slices(len(self.auc), 256)
                for side in ("up", "down")
            ]
        ).sort_values("feature", kind="stable", ignore_index=True)

    def _best(self, part: slice, side: str, most: int, tests: Sequence[str]) -> pd.DataFrame:
        p, q = self.log_p[tests[0]][part], self.log_q(tests[0], part)
        there = self.side(tests[0], part) == {"up": 1, "down": -1}[side]
        named = self._named(part, tests)
        first = np.nan_to_num(p, nan=-1) + 1e6 * named  # no p comes near
        order = np.argsort(-np.where(there, first, -1), axis=1, kind="stable")
        order = order[:, :most]
        row, rank = np.indices(order.shape).reshape(2, -1)
        at = (row, order.ravel())
        columns = {name: getattr(self, name) for name in EFFECTS}
        found = pd.DataFrame(
            {
                "feature": part.start + row,
                "side": side,
                "rank": rank,
                "term": np.asarray(self.terms, object)[at[1]],
                "size": self.sizes[at[1]],
                "hits": self.hits[part][at],
                **{name: np.nan if x is None else x[part][at] for name, x in columns.items()},
                "log10_p": p[at],
                "log10_q": q[at],
                "named": named[at],
            }
        )
        return found[there[at] & ~np.isnan(p[at])]

"""A whole dictionary annotated: every feature against every gene and every gene set.

Schuster's section 5 as arithmetic. Features go through in blocks, in threads; of the genes only the
best of each feature are kept, of the terms every test as -log10 p in float32, in memory or, beyond
a limit, in files.

Two statistics of a term are standardised by what permuted features have (see `calibration`): the
mean change of its genes, in standard deviations of theirs, "change", and Mann-Whitney's z of their
t, "calibrated". Ranks do not know how far a gene has moved: of ten thousand genes the few that a
cell type is known by move a rank sum little, however loud they are.

A term names a feature by two tests together. "change" says that the term's genes differ between
the cells at all, which a random set's do too as soon as it holds a marker; "matched" that more of
the genes that differ are in it than of genes of like expression, which may be no more than
co-expression in permuted features. Each is blind where the other sees.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse, special
from tqdm import tqdm

from analysis import calibration, differential, enrichment
from analysis.blocks import Tables, in_order, slices
from analysis.cells import Expression
from analysis.gene_sets import GeneSets
from analysis.groups import Groups, top_cells
from sae_jax import files
from sae_jax.errors import InputError

TESTS = ("change", "calibrated", "mann_whitney", "fisher", "binomial", "matched")
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
    naming: the tests that all must find a term for it to name a feature; the first ranks terms.
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
    _folder: Any = field(default=None, repr=False)  # deletes the files of large tables

    def testable(self) -> np.ndarray:
        """[features]: whether there are cells enough on both sides to name a feature."""
        return self.rule.testable(self.n_high, self.n_low)

    def log_q(self, test: str, rows: slice = slice(None)) -> np.ndarray:
        """-log10 q over the terms of each feature, of some features."""
        return enrichment.benjamini_hochberg_log(self.log_p[test][rows])

    def side(self, test: str, rows: slice = slice(None)) -> np.ndarray:
        """[some features, terms]: 1 where a term's genes are up in the high cells, -1 where they
        are down; 0 where a calibrated test says one and its statistic the other: the term is then
        further up or down than in permuted features, but not up or down."""
        statistic, deviate = CALIBRATED.get(test, ("z", "z"))
        side = np.sign(getattr(self, statistic)[rows])
        return np.where(np.sign(getattr(self, deviate)[rows]) == side, side, 0)

    def named(self, test: str | None = None) -> np.ndarray:
        """[features, terms] bool: which term names which feature, by the rule or by one test."""
        tests = self.naming if test is None else (test,)
        return np.concatenate([self._named(rows, tests) for rows in slices(len(self.auc), 256)])

    def _named(self, rows: slice, tests: Sequence[str]) -> np.ndarray:
        found = self.testable()[rows, None] & (self.side(tests[0], rows) != 0)
        for test in tests:
            found = found & (self.log_q(test, rows) > -np.log10(self.rule.term_q))
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


def annotate(
    z: sparse.csr_matrix,
    expression: Expression,
    sets: GeneSets,
    rule: Rule | None = None,
    *,
    null_features: int = 300,
    bins: int = 6,
    seed: int = 0,
    matched: bool = True,
    top_genes: int = 50,
    block: int = 64,
    workers: int | None = None,
    memory_bytes: int = 4 << 30,
    progress: bool = True,
    known: dict[str, calibration.Calibration] | None = None,
) -> tuple[Lens, dict[str, calibration.Calibration]]:
    """Test every feature of z [cells, features] against every gene and every gene set.

    Args:
      expression: of the same cells, in the same order.
      sets: over the genes of `expression`, in the same order.
      null_features: permuted features for each of `bins` sizes of groups; 0: no calibration.
      seed: of the permutations.
      matched: whether to make the test within strata of like expression.
      top_genes: genes of a feature that are kept, those of the largest |t|.
      block: features at once in each of `workers` threads (default: the cores).
      memory_bytes: tables beyond it are kept in files of the temporary folder.
      known: calibrations made before, instead of new ones.

    Returns:
      The annotation, and the calibrations used, by test.

    Raises:
      InputError: shapes that do not fit, fewer than 100 genes, no feature with high cells.
    """
    rule = rule or Rule()
    _check(z, expression, sets, rule)
    prepared = differential.Prepared.of(expression.x)
    groups = top_cells(z, rule.percentile)
    n_features, n_terms = z.shape[1], len(sets.names)
    if not groups.high.nnz:
        raise InputError("no feature has a high cell: is the dictionary dead on these cells?")
    strata = enrichment.strata_of_rank(np.asarray(expression.x.mean(axis=0)).ravel())
    known = known or {}
    made = {test: bool(null_features) or test in known for test in CALIBRATED}
    made["matched"] = matched
    tests = [test for test in TESTS if made.get(test, True)]
    tables = Tables((n_features, n_terms), len(tests) + 7, memory_bytes)
    log_p = {test: tables.new() for test in tests}
    auc, deviate, change, fold = (tables.new() for _ in range(4))
    hits = tables.new(np.int32)
    mean_of_set = sparse.diags_array(1 / sets.membership.sum(axis=1)) @ sets.membership
    n_high, n_low, n_relevant = np.zeros((3, n_features), np.int64)
    tops: list[pd.DataFrame | None] = [None] * -(-n_features // block)

    def test(rows: slice) -> None:
        part = Groups(groups.high[rows], groups.active[rows])
        welch = prepared.welch(part, rule.pseudocount)
        gene_q = enrichment.benjamini_hochberg(welch.p, axis=1)
        chosen = relevant(welch, gene_q, rule)
        ranked = enrichment.mann_whitney(welch.scores(), sets.membership)
        fisher = enrichment.hypergeometric(chosen, sets.membership)
        log_p["mann_whitney"][rows] = two_sided(ranked.z)
        log_p["fisher"][rows] = _log(fisher.p)
        log_p["binomial"][rows] = _log(enrichment.binomial(chosen, sets.membership).p)
        if matched:
            overlap = enrichment.matched_overlap(chosen, sets.membership, strata)
            log_p["matched"][rows] = _log(overlap.p)
        auc[rows], deviate[rows], fold[rows] = ranked.effect, ranked.z, fisher.effect
        change[rows] = mean_change(welch)
        hits[rows] = fisher.hits
        n_high[rows], n_low[rows] = welch.n_high, welch.n_low
        n_relevant[rows] = chosen.sum(axis=1)
        tops[rows.start // block] = _top(welch, gene_q, expression.genes, rows.start, top_genes)

    def mean_change(welch: differential.Welch) -> np.ndarray:
        found = (mean_of_set @ np.nan_to_num(welch.moderated_d(prepared.typical_sd)).T).T
        found[np.minimum(welch.n_high, welch.n_low) < 2] = np.nan
        return found

    def statistics(drawn: Groups) -> np.ndarray:
        welch = prepared.welch(drawn, rule.pseudocount)
        z = enrichment.mann_whitney(welch.scores(), sets.membership).z
        return np.concatenate([mean_change(welch), z], axis=1)

    # A thread holds some twenty tables [block, genes] of float64.
    fitting = memory_bytes // (20 * 8 * block * len(expression.genes))
    workers = workers or max(1, min(len(os.sched_getaffinity(0)), fitting))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        bar = tqdm(total=n_features, unit=" features", disable=not progress, desc="features")
        for _ in in_order(pool, test, slices(n_features, block), workers):
            bar.update(min(block, n_features - bar.n))
        bar.close()
        testable = rule.testable(n_high, n_low)
        n_active = z.shape[0] - n_low
        if not known and null_features and testable.any():
            sizes, null = calibration.permuted(
                z.shape[0], n_high[testable], n_active[testable], statistics, bins=bins,
                per_bin=null_features, block=block, seed=seed,
                run=lambda work, some: tqdm(
                    in_order(pool, work, some, workers), desc="permuted", unit=" blocks",
                    disable=not progress,
                ),
            )  # fmt: skip
            known = {
                test: calibration.Calibration.of_null(z.shape[0], sizes, part)
                for test, part in zip(CALIBRATED, np.split(null, 2, axis=2), strict=True)
            }
    deviates = {}
    for test in [test for test in CALIBRATED if made[test]]:
        statistic = {"change": change, "calibrated": deviate}[test]
        table = deviates[CALIBRATED[test][1]] = tables.new()
        if test not in known:  # no feature can be named
            table[:] = log_p[test][:] = np.nan
            continue
        moments = known[test]
        for rows in slices(n_features, 256):
            some = moments.deviates(statistic[rows].astype(np.float64), n_active[rows])
            some[~testable[rows]] = np.nan  # no bin is like them
            table[rows], log_p[test][rows] = some, moments.log_p(some)
    lens = Lens(
        terms=list(sets.names), sizes=np.asarray(sets.membership.sum(axis=1), int).ravel(),
        rule=rule, log_p=log_p, auc=auc, z=deviate, fold=fold, hits=hits, n_high=n_high,
        n_low=n_low, n_relevant=n_relevant, top=pd.concat(tops, ignore_index=True),
        change=change, **deviates,
        _folder=tables.folder,
    )  # fmt: skip
    return lens, known


def feature_names(latents: np.ndarray) -> np.ndarray:
    """feature_17 for latent 17."""
    return np.asarray([f"feature_{latent}" for latent in latents], object)


def relevant(welch: differential.Welch, gene_q: np.ndarray, rule: Rule) -> np.ndarray:
    """Genes that overlap tests are made with, bool [features, genes]; see `Rule`."""
    change = np.log2(rule.fold_change)
    up, down = welch.log2_fold_change >= change, welch.log2_fold_change <= -change
    sign = {"up": welch.t > 0, "down": welch.t < 0, "both": welch.t != 0}[rule.direction]
    side = {"up": up, "down": down, "both": up | down}[rule.direction]
    chosen = (gene_q < rule.gene_q) & side & sign
    if rule.fallback_p is not None:
        none = ~chosen.any(axis=1)
        chosen[none] = ((welch.p < rule.fallback_p) & sign)[none]
    return chosen


def two_sided(z: np.ndarray) -> np.ndarray:
    """-log10 of the two-sided p of normal deviates, also where p underflows."""
    return -(special.log_ndtr(-np.abs(z)) + np.log(2)) / np.log(10)


def write(
    lens: Lens,
    names: np.ndarray,
    path: str | Path,
    block: int = 64,
    memory_bytes: int = 4 << 30,
) -> None:
    """The long table as parquet, one row per feature and term, a block of features at a time.

    Columns: feature, term, size, hits, fold, change, change_z, auc, z, calibrated_z, and for each
    test log10_p_<test>, log10_q_<test> (over the feature's terms) and log10_q_all_<test> (over
    all terms of all testable features; NaN for the others), all of them -log10.
    """
    testable = np.flatnonzero(lens.testable())
    tables = Tables(lens.auc.shape, len(lens.log_p) + 2, memory_bytes)
    everywhere = {}
    for test, table in lens.log_p.items():
        everywhere[test] = tables.new()
        everywhere[test][:] = np.nan
        if testable.size:
            corrected = enrichment.LogQ.over(table[testable])
            for part in slices(len(testable), 256):
                rows = testable[part]
                everywhere[test][rows] = corrected(table[rows])
    names, terms = pa.array(list(names)), pa.array(lens.terms)
    writer = None
    with files.write_aside(path) as fresh:
        for rows in slices(len(lens.auc), block):
            count, n_terms = lens.auc[rows].shape
            feature = np.repeat(np.arange(rows.start, rows.start + count, dtype=np.int32), n_terms)
            term = np.tile(np.arange(n_terms, dtype=np.int32), count)
            columns: dict[str, Any] = {
                "feature": pa.DictionaryArray.from_arrays(pa.array(feature), names),
                "term": pa.DictionaryArray.from_arrays(pa.array(term), terms),
                "size": lens.sizes[term].astype(np.int32),
            }
            for name in ("hits", "fold", *EFFECTS):
                if (values := getattr(lens, name)) is not None:
                    columns[name] = values[rows].ravel()
            for test, table in lens.log_p.items():
                columns[f"log10_p_{test}"] = table[rows].ravel()
                columns[f"log10_q_{test}"] = lens.log_q(test, rows).astype(np.float32).ravel()
                columns[f"log10_q_all_{test}"] = everywhere[test][rows].ravel()
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(
                    fresh, table.schema, write_page_checksum=True, compression="zstd",
                    use_dictionary=["feature", "term"],
                )  # fmt: skip
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _log(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return -np.log10(np.maximum(p, 1e-320))


def _top(
    welch: differential.Welch, gene_q: np.ndarray, genes: np.ndarray, first: int, most: int
) -> pd.DataFrame:
    size = np.nan_to_num(np.abs(welch.t), nan=-1)
    most = min(most, size.shape[1])
    some = np.argpartition(-size, most - 1, axis=1)[:, :most]
    inner = np.argsort(-np.take_along_axis(size, some, 1), axis=1, kind="stable")
    chosen = np.take_along_axis(some, inner, 1)

    def of(table: np.ndarray) -> np.ndarray:
        return np.take_along_axis(table, chosen, 1).ravel()

    found = pd.DataFrame(
        {
            "feature": np.repeat(np.arange(first, first + len(chosen)), most),
            "gene": np.asarray(genes)[chosen.ravel()],
            "t": of(welch.t),
            "log2_fold_change": of(welch.log2_fold_change),
            "cohens_d": of(welch.cohens_d),
            "detected_high": of(welch.detected_high),
            "detected_low": of(welch.detected_low),
            "log10_p": _log(of(welch.p)),
            "q": of(gene_q),
        }
    )
    return found[found["t"].notna()]


def _check(z: Any, expression: Expression, sets: GeneSets, rule: Rule) -> None:
    if z.shape[0] != expression.x.shape[0]:
        raise InputError(
            f"activations are of {z.shape[0]} cells, the expression of {expression.x.shape[0]}"
        )
    if sets.membership.shape[1] != expression.x.shape[1]:
        raise InputError("the gene sets are over other genes than the expression's")
    if expression.x.shape[1] < 100:
        raise InputError(
            f"{expression.x.shape[1]} genes are no universe to test sets in; give 100 or more"
        )
    if not rule.naming or set(rule.naming) - set(TESTS):
        raise InputError(f"naming={rule.naming!r} must be some of {', '.join(TESTS)}")
    if rule.direction not in DIRECTIONS:
        raise InputError(f"direction={rule.direction!r} must be one of {', '.join(DIRECTIONS)}")

"""A whole dictionary annotated: every feature against every gene and every gene set.

Schuster's section 5 as arithmetic. Features go through in blocks, in threads; of the genes only the
best of each feature are kept, of the terms every test as -log10 p in float32, in memory or, beyond
a limit, in files. Expression may stay in its file: the sums of many features are then taken in one
pass over the cells. `annotated` has what comes out and what it names, `long_table` writes it.

Two statistics of a term are standardised by what permuted features have (see `calibration`): the
mean change of its genes, in standard deviations of theirs, "change", and Mann-Whitney's z of their
t, "calibrated". Ranks do not know how far a gene has moved: of ten thousand genes the few that a
cell type is known by move a rank sum little, however loud they are.
"""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse, special
from tqdm import tqdm

from analysis import calibration, differential, enrichment
from analysis.annotated import CALIBRATED, DIRECTIONS, TESTS, Lens, Rule
from analysis.blocks import Tables, in_order, slices
from analysis.cells import Expression
from analysis.chunked import Chunked
from analysis.gene_sets import GeneSets
from analysis.groups import Groups, top_cells
from analysis.long_table import write
from sae_jax.errors import InputError

__all__ = [
    "DIRECTIONS", "TESTS", "Lens", "Rule", "annotate", "feature_names", "passes", "relevant",
    "two_sided", "write",
]  # fmt: skip

OTHERS = 7  # tables [features, terms] beside those of the tests
BINS, BLOCK = 6, 64  # of `annotate`, unless it is told otherwise


def annotate(
    z: sparse.csr_matrix,
    expression: Expression,
    sets: GeneSets,
    rule: Rule | None = None,
    *,
    null_features: int = 300,
    bins: int = BINS,
    seed: int = 0,
    matched: bool = True,
    top_genes: int = 50,
    block: int = BLOCK,
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
      top_genes: genes of a feature that are kept, those of the largest |t| in the rule's direction.
      block: features at once in each of `workers` threads (default: the cores).
      memory_bytes: of all that is held beside the arguments. Tables that would take more than a
        quarter of it are kept in a file of the temporary folder; the rest is for tests in threads
        and, where expression is in blocks (`cells.parts`), for these and their sums: see `passes`.
      progress: whether to show bars and, before the work starts, the memory in the log.
      known: calibrations made before, instead of new ones.

    Returns:
      The annotation, and the calibrations used, by test.

    Raises:
      InputError: shapes that do not fit, fewer than 100 genes, no feature with high cells, memory
        in which blocks and the sums of one feature have no place.
      DiskError: no place for the file.
    """
    rule = rule or Rule()
    if block < 1 or bins < 1 or not (null_features == 0 or null_features >= 30):
        raise InputError(
            f"block={block}, bins={bins} must be at least 1, null_features={null_features} 0 or at "
            "least 30 permuted ones"
        )
    _check(z, expression, sets, rule)
    groups = top_cells(z, rule.percentile)
    n_features, n_terms = z.shape[1], len(sets.names)
    if not groups.high.nnz:
        raise InputError("no feature has a high cell: is the dictionary dead on these cells?")
    known = known or {}
    tests = _tests(null_features, matched, known)
    tables = Tables((n_features, n_terms), len(tests) + OTHERS, memory_bytes // 4)
    demand = _demand(
        expression, n_features, n_terms, null_features=null_features, bins=bins, matched=matched,
        block=block, workers=workers, memory_bytes=memory_bytes, known=known,
    )  # fmt: skip
    workers = demand["threads"]
    prepared = differential.prepare(expression.x, **demand, tell=progress)
    block = prepared.tested or block
    strata = enrichment.strata_of_rank(prepared.everything.x[0])
    log_p = {test: tables.new() for test in tests}
    auc, deviate, change, fold = (tables.new() for _ in range(4))
    hits = tables.new(np.int32)
    mean_of_set = sparse.diags_array(1 / sets.membership.sum(axis=1)) @ sets.membership
    n_high, n_low, n_relevant = np.zeros((3, n_features), np.int64)
    tops: list[pd.DataFrame | None] = [None] * -(-n_features // block)

    def test(rows: slice, made: differential.Test) -> None:
        welch = made()
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
        tops[rows.start // block] = _top(
            welch, gene_q, expression.genes, rows.start, top_genes, rule.direction
        )

    def mean_change(welch: differential.Welch) -> np.ndarray:
        found = (mean_of_set @ np.nan_to_num(welch.moderated_d(prepared.typical_sd)).T).T
        found[np.minimum(welch.n_high, welch.n_low) < 2] = np.nan
        return found

    def statistics(made: differential.Test) -> np.ndarray:
        welch = made()
        z = enrichment.mann_whitney(welch.scores(), sets.membership).z
        return np.concatenate([mean_change(welch), z], axis=1)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        bar = tqdm(total=n_features, unit=" features", disable=not progress, desc="features")
        parts = list(slices(n_features, block))
        some = (Groups(groups.high[rows], groups.active[rows]) for rows in parts)
        tests_made = zip(parts, prepared.tests(some, rule.pseudocount), strict=True)
        for _ in in_order(pool, lambda item: test(*item), tests_made, workers):
            bar.update(min(block, n_features - bar.n))
        bar.close()
        testable = rule.testable(n_high, n_low)
        n_active = z.shape[0] - n_low
        if not known and null_features and testable.any():
            sizes, null = calibration.permuted(
                z.shape[0], n_high[testable], n_active[testable], statistics, bins=bins,
                per_bin=null_features, block=block, seed=seed,
                run=lambda work, drawn: tqdm(
                    in_order(pool, work, prepared.tests(drawn, rule.pseudocount), workers),
                    desc="permuted", unit=" blocks", disable=not progress,
                ),
            )  # fmt: skip
            known = {
                test: calibration.Calibration.of_null(z.shape[0], sizes, part)
                for test, part in zip(CALIBRATED, np.split(null, 2, axis=2), strict=True)
            }
    deviates = {}
    for test in [test for test in CALIBRATED if test in tests]:
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
    )  # fmt: skip
    return lens, known


def passes(
    expression: Expression,
    n_features: int,
    n_terms: int,
    *,
    null_features: int = 300,
    memory_bytes: int = 4 << 30,
) -> differential.Passes | None:
    """How `annotate` would test so many features, or fewer, of expression in blocks. None:
    expression in memory, which is not gone through in passes.

    Raises:
      InputError: not one feature fits the memory.
    """
    demand = _demand(
        expression, n_features, n_terms, null_features=null_features, bins=BINS, matched=True,
        block=BLOCK, workers=None, memory_bytes=memory_bytes, known={}, or_fewer=True,
    )  # fmt: skip
    if not isinstance(expression.x, Chunked):
        return None
    return differential.Passes.of(expression.x, **demand)


def _demand(
    expression: Expression,
    n_features: int,
    n_terms: int,
    *,
    null_features: int,
    bins: int,
    matched: bool,
    block: int,
    workers: int | None,
    memory_bytes: int,
    known: dict[str, calibration.Calibration],
    or_fewer: bool = False,
) -> dict[str, int]:
    """Arguments of `differential.Passes.of`, and of `prepare`; or_fewer: enough for less, too."""
    tables = 4 * (len(_tests(null_features, matched, known)) + OTHERS) * n_features * n_terms
    most = memory_bytes // 4  # beyond which they are in a file
    beside = min(tables, most) if or_fewer else tables * (tables <= most)
    if null_features and not known:
        beside += len(CALIBRATED) * 8 * bins * null_features * n_terms  # of permuted features
    # A thread holds some twenty tables [block, genes] of float64.
    fitting = (memory_bytes - beside) // (20 * 8 * block * len(expression.genes))
    workers = workers or max(1, min(len(os.sched_getaffinity(0)), fitting))
    return {
        "features": max(n_features, bins * null_features), "memory_bytes": memory_bytes,
        "tested": block, "threads": workers, "beside": beside,
    }  # fmt: skip


def _tests(
    null_features: int, matched: bool, known: dict[str, calibration.Calibration]
) -> list[str]:
    """Those that are made."""
    made = {test: bool(null_features) or test in known for test in CALIBRATED}
    return [test for test in TESTS if (made | {"matched": matched}).get(test, True)]


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


def _log(p: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return -np.log10(np.maximum(p, 1e-320))


def _top(
    welch: differential.Welch,
    gene_q: np.ndarray,
    genes: np.ndarray,
    first: int,
    most: int,
    direction: str,
) -> pd.DataFrame:
    size = {"up": welch.t, "down": -welch.t, "both": np.abs(welch.t)}[direction]
    size = np.nan_to_num(size, nan=-np.inf)
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
    return found[of(size) > 0]


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

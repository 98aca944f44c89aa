"""From activations to named features: one pipeline, for real features and for nulls alike.

For each feature: the cells where it is high against those where it is silent (Welch's t for every
gene), the genes that are up, and the gene sets that those genes (Fisher, and matched for
expression) or the whole ranking (Mann-Whitney) favour.

A feature is named by the matched test alone. Mann-Whitney takes co-expressed genes for independent
ones and finds sets in permuted activations; Fisher takes highly expressed genes for as hard to find
as rare ones and finds sets of genes that were exchanged for others of like expression. `nulls` has
both, and what each test names there is reported beside what it names here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from analysis import differential, enrichment
from analysis.cells import Expression
from analysis.gene_sets import GeneSets
from analysis.groups import top_cells
from sae_jax import files

TESTS = ("matched", "fisher", "mann_whitney")
BLOCK = 128  # features in memory as dense [features, genes] tables at once
SCHEMA = pa.schema(
    {
        "feature": pa.string(),
        "term": pa.string(),
        "test": pa.string(),
        "size": pa.int32(),
        "hits": pa.int32(),
        "effect": pa.float32(),
        "p": pa.float64(),
        "q": pa.float64(),
        "q_all": pa.float64(),
    }
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a cell is high, a gene is up and a feature is named.

    percentile: of all cells; a cell above it is high. 90 leaves a few dozen high cells in a data
      set of some hundreds; Schuster takes 99, for tens of thousands.
    cells: a feature with fewer high cells is not named, nor one with fewer silent cells than this
      or than a quarter of the high ones: a gene absent from a handful of cells has no variance
      there, and its t means nothing.
    gene_q, fold_change: a gene is up at Benjamini-Hochberg q below the one and a fold change of
      mean counts of at least the other, `pseudocount` added to both means.
    term_q, hits: a term names a feature at q (over the feature's terms) below the one and with at
      least so many genes up.
    """

    percentile: float = 90.0
    cells: int = 10
    gene_q: float = 0.01
    fold_change: float = 1.5
    pseudocount: float = 0.1
    term_q: float = 0.05
    hits: int = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """One test of every feature against every term; all [features, terms].

    q over the terms of a feature, q_all over all features and terms of this test. effect is hits
    over expected hits (matched, fisher) or the area under the ROC curve (mann_whitney).
    """

    p: np.ndarray
    q: np.ndarray
    q_all: np.ndarray
    effect: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Annotation:
    """Every feature against every term.

    terms, sizes: names, and measured genes, of the terms.
    tests: `matched`, `fisher` and `mann_whitney`. A gene whose t is undefined (constant in both
      groups) stands in the middle of the latter's ranking.
    hits: genes of the term that are up [features, terms].
    n_high, n_low, n_up: high cells, silent cells and genes up of each feature.
    top_genes: of each feature, up to ten genes with the largest positive t.
    """

    terms: list[str]
    sizes: np.ndarray
    tests: dict[str, Tested]
    hits: np.ndarray
    n_high: np.ndarray
    n_low: np.ndarray
    n_up: np.ndarray
    top_genes: list[list[str]]
    rule: Rule

    def testable(self) -> np.ndarray:
        """[features]: whether there are cells enough on both sides to name a feature."""
        fewest = np.maximum(self.rule.cells, self.n_high / 4)
        return (self.n_high >= self.rule.cells) & (self.n_low >= fewest)

    def names(self, test: str = "matched") -> np.ndarray:
        """[features, terms]: whether the term names the feature, by the rule or by another test."""
        found = self.tests[test].q < self.rule.term_q
        if test != "mann_whitney":
            found &= self.hits >= self.rule.hits
        return found & self.testable()[:, None]

    def naming_terms(self, most: int, test: str = "matched") -> list[list[str]]:
        """Of each feature, up to `most` terms that name it, smallest p first."""
        p = np.where(self.names(test), self.tests[test].p, np.inf)
        order = np.argsort(p, axis=1, kind="stable")[:, :most]
        return [
            [self.terms[t] for t in terms if np.isfinite(row[t])]
            for terms, row in zip(order, p, strict=True)
        ]

    def share_named(self, test: str = "matched") -> float:
        """Share of the testable features that have a naming term; NaN if none is testable."""
        testable = self.testable()
        named = self.names(test).any(axis=1)
        return float(named.sum() / testable.sum()) if testable.any() else float("nan")


def annotate(
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets, rule: Rule | None = None
) -> Annotation:
    """Test every feature of z [cells, features] against every gene set.

    Cells are those of `expression`, genes of `sets.membership` those of `expression.genes`, both in
    the same order. Genes without any expression are compared with nothing: leave them out.
    """
    rule = rule or Rule()
    groups = top_cells(z, rule.percentile)
    strata = enrichment.strata_of_rank(np.asarray(expression.x.mean(axis=0)).ravel())
    columns: dict[str, list[np.ndarray]] = {}
    top_genes: list[list[str]] = []
    for welch in differential.welch_blocks(
        expression.x,
        groups.high,
        active=groups.active,
        pseudocount=rule.pseudocount,
        block=BLOCK,
    ):
        gene_q = enrichment.benjamini_hochberg(welch.p, axis=1)
        up = (gene_q < rule.gene_q) & (welch.log2_fold_change >= np.log2(rule.fold_change))
        # Rounded, or equal statistics that differ in their last bits would be ranked by noise.
        scores = np.nan_to_num(np.round(welch.t, 9), nan=0.0)
        matched = enrichment.matched_overlap(up, sets.membership, strata)
        fisher = enrichment.hypergeometric(up, sets.membership)
        ranked = enrichment.mann_whitney(scores, sets.membership)
        for name, value in {
            "matched_p": matched.p,
            "matched_effect": matched.effect,
            "fisher_p": fisher.p,
            "fisher_effect": fisher.effect,
            "mann_whitney_p": ranked.p,
            "mann_whitney_effect": ranked.effect,
            "hits": fisher.hits,
            "n_high": welch.n_high,
            "n_low": welch.n_low,
            "n_up": up.sum(axis=1),
        }.items():
            columns.setdefault(name, []).append(value)
        for row in scores:
            best = np.argsort(-row, kind="stable")[:10]
            top_genes.append([str(expression.genes[gene]) for gene in best if row[gene] > 0])
    found = {name: np.concatenate(values) for name, values in columns.items()}
    return Annotation(
        terms=sets.names,
        sizes=np.asarray(sets.membership.sum(axis=1), dtype=int).ravel(),
        tests={test: _tested(found[f"{test}_p"], found[f"{test}_effect"]) for test in TESTS},
        hits=found["hits"],
        n_high=found["n_high"],
        n_low=found["n_low"],
        n_up=found["n_up"],
        top_genes=top_genes,
        rule=rule,
    )


def write(annotation: Annotation, features: np.ndarray, path: str | Path) -> None:
    """The long table as parquet: feature, term, test, size, hits, effect, p, q, q_all.

    One row per feature, term and test, features in order, written a block of features at a time.
    `hits` is empty for mann_whitney, which counts no genes.
    """
    terms = pa.array(annotation.terms)
    with (
        files.write_aside(path) as fresh,
        pq.ParquetWriter(fresh, SCHEMA, write_page_checksum=True, compression="zstd") as writer,
    ):
        for begin in range(0, len(features), BLOCK):
            rows = slice(begin, begin + BLOCK)
            block = pa.array(features[rows])
            for test in TESTS:
                tested, shape = annotation.tests[test], annotation.hits[rows].shape
                every_term = np.tile(np.arange(shape[1], dtype=np.int32), shape[0])
                every_feature = np.repeat(np.arange(shape[0], dtype=np.int32), shape[1])
                hits = annotation.hits[rows].ravel()
                writer.write_table(
                    pa.table(
                        {
                            "feature": block.take(pa.array(every_feature)),
                            "term": terms.take(pa.array(every_term)),
                            "test": pa.array([test]).take(pa.array(np.zeros(hits.size, int))),
                            "size": annotation.sizes[every_term],
                            "hits": pa.array(hits, mask=np.full(hits.size, test == "mann_whitney")),
                            "effect": tested.effect[rows].ravel(),
                            "p": tested.p[rows].ravel(),
                            "q": tested.q[rows].ravel(),
                            "q_all": tested.q_all[rows].ravel(),
                        },
                        schema=SCHEMA,
                    )
                )


def _tested(p: np.ndarray, effect: np.ndarray) -> Tested:
    return Tested(
        p=p,
        q=enrichment.benjamini_hochberg(p, axis=1),
        q_all=enrichment.benjamini_hochberg(p, axis=None),
        effect=effect,
    )

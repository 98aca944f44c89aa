"""What is shown of one feature: cells, labels, genes, terms, curves, the features like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.browser.columns import SIGNIFICANT
from analysis.browser.index import RANGE
from analysis.browser.inverted import CURVES as CURVE_FILES
from analysis.browser.run import Run
from analysis.gsea_null import Ranking

BINS = 40
TOP_CELLS, NEAREST, MOST_GENES, MOST_TERMS, BEST_TERMS, CURVES = 10, 10, 500, 100, 20, 10
STRETCH = 1 << 20  # entries
BANDS = (0.8, 0.6, 0.4, 0.2, 0.0)  # lower bounds of an activation, as shares of the highest
MARKED, ENOUGH = 0.7, 100  # Claye: share of the active cells, and how many these must be


def gone(run: Run, what: str) -> dict[str, str]:
    """A document in the place of one that is not there: why, and what makes it."""
    return {"absent": run.missing(what)}


def page(run: Run, i: int) -> dict[str, Any]:
    """The feature, its cells by activation and by label, and the features nearest to it."""
    row = run.features.iloc[i]
    found = {
        "index": i, "name": run.names[i], "kind": row["kind"], "latent": int(row["latent"]),
        "summary": {name: plain(value) for name, value in row.items()},
        "previous": run.brief(i - 1) if i else None,
        "next": run.brief(i + 1) if i + 1 < run.n_features else None,
        **{name: _genes(run, row.get(name)) for name in ("top_genes", "attributed_genes")},
        "nearest_decoder": _nearest(run, i, _cosines(run, i)),
    }  # fmt: skip
    if not run.n_cells:
        told = run.missing("cells")
        return found | {"histogram": None, "labels": [], "bands": [], "nearest_activation": [],
                        "missing": {"cells": told}}  # fmt: skip
    cells, values = run.index.entries("by_feature", i)
    edges = np.linspace(0, values.max(initial=0), BINS + 1)
    counts = np.histogram(values, edges)[0] if len(values) else np.zeros(BINS)
    return found | {
        "histogram": {
            "edges": edges.astype(np.float32), "counts": counts.astype(np.uint32),
            "n_silent": run.n_cells - len(values),
        },
        "labels": _labels(run, i),
        "bands": _bands(run, cells, values),
        "nearest_activation": _nearest(run, i, correlations(run, i)),
    }  # fmt: skip


def _genes(run: Run, text: Any) -> list[dict[str, Any]]:
    """The genes that a column of the table lists, with their numbers."""
    names = text.split(", ") if isinstance(text, str) else []
    known = [name for name in names if name in run.gene_number]
    return [{"gene": run.gene_number[name], "name": name} for name in known]


def plain(value: Any) -> Any:
    """A value of a table for JSON."""
    if value is None or value is pd.NA:
        return None
    return value.item() if isinstance(value, np.generic) else value


def _labels(run: Run, i: int) -> list[dict[str, Any]]:
    """By column; shares are of the active cells that have a label in it."""
    found = []
    counts = run.index["of_label"][i]
    for number, held, place in run.labels():
        sizes = run.label_sizes(number)
        active = counts[place].astype(np.int64)
        n_active = int(active.sum())
        rows = [
            {
                "value": value, "value_index": v, "n_active": int(n), "n_cells": int(size),
                "share": n / n_active if n_active else None, "of_label": n / size,
                "marked": bool(n_active >= ENOUGH and n / n_active >= MARKED),
            }
            for v, (value, n, size) in enumerate(
                zip(held["categories"], active, sizes, strict=True)
            )
        ]  # fmt: skip
        rows.sort(key=lambda row: (-row["n_active"], row["value_index"]))
        found.append({
            "column": held["name"], "column_index": number, "rows": rows, "n_active": n_active,
            "enough": n_active >= ENOUGH,
        })  # fmt: skip
    return found


def _bands(run: Run, cells: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
    """The highest cells, then of each fifth of the range some, evenly over its ranks."""
    order = np.argsort(-values, kind="stable")
    bands = [{"title": "top cells", "rows": _cells(run, cells, values, order[:TOP_CELLS])}]
    share = values[order] / values.max(initial=0) if len(values) else values
    high = np.inf
    for low in BANDS:
        some = order[(share < high) & (share >= low)]
        chosen = np.unique(np.linspace(0, len(some) - 1, TOP_CELLS).round().astype(int))
        upper = 100 if high == np.inf else round(100 * high)
        bands.append({
            "title": f"{round(100 * low)}–{upper} % of the highest", "n": len(some),
            "rows": _cells(run, cells, values, some[chosen] if len(some) else some),
        })  # fmt: skip
        high = low
    return bands


def _cells(
    run: Run, cells: np.ndarray, values: np.ndarray, some: np.ndarray
) -> list[dict[str, Any]]:
    """The rows of some of the active cells."""
    chosen = cells[some]
    return [
        {"cell": cell, "name": run.cells[cell], "activation": float(value), "metadata": told}
        for cell, value, told in zip(
            chosen.tolist(), values[some], run.describe_cells(chosen), strict=True
        )
    ]


def _cosines(run: Run, i: int) -> np.ndarray | None:
    """Of the feature's decoder row with all others'."""
    if "decoder" not in run.index:
        return None
    rows = run.index["decoder"]
    return rows @ rows[i]


def correlations(run: Run, i: int) -> np.ndarray:
    """Pearson correlation of the feature's activation with every other's, over all cells; NaN for
    features that never change."""
    n = run.n_cells
    product = np.zeros(run.n_features)
    cells, values = run.index.entries("by_feature", i)
    indptr = run.index["by_cell.indptr"]
    starts, sizes = indptr[cells], indptr[cells + 1] - indptr[cells]
    first = 0
    while first < len(cells):  # a stretch of the file at a time, which is let go of again
        last = int(np.searchsorted(starts, starts[first] + STRETCH, "right"))
        own = sizes[first:last]
        ends = np.cumsum(own)
        place = np.arange(ends[-1]) + np.repeat(starts[first:last] - (ends - own), own)
        weight = np.repeat(values[first:last].astype(np.float64), own)
        weight *= run.index["by_cell.values"][place]
        feature = run.index["by_cell.indices"][place]
        product += np.bincount(feature, weight, minlength=run.n_features)
        first = last
    total, square = run.index["sum"], run.index["square"]
    covariance = product / n - total[i] / n * (total / n)
    variance = np.maximum(square / n - (total / n) ** 2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = covariance / np.sqrt(variance[i] * variance)
    return np.where(np.isfinite(found), found, np.nan)


def _nearest(run: Run, i: int, alike: np.ndarray | None) -> list[dict[str, Any]]:
    """The features of the largest values, without the feature itself."""
    if alike is None:
        return []
    alike = np.where(np.isnan(alike), -np.inf, alike).astype(np.float64)
    alike[i] = -np.inf
    most = min(NEAREST, len(alike))
    some = np.argpartition(-alike, most - 1)[:most]
    some = some[np.lexsort((some, -alike[some]))]
    return [{**run.brief(int(f)), "value": float(alike[f])} for f in some if np.isfinite(alike[f])]


def activation(run: Run, i: int) -> dict[str, Any]:
    """Active cells and their activations, in 65,535ths of the highest; none of them becomes 0."""
    if not run.n_cells:
        return gone(run, "cells")
    cells, values = run.index.entries("by_feature", i)
    highest = float(run.index["maximum"][i])
    codes = np.rint(values / (highest or 1) * RANGE)
    return {
        "rows": np.array(cells, np.uint32), "max": highest,
        "values": np.maximum(codes, 1).astype(np.uint16),
    }  # fmt: skip


def attribution(run: Run, i: int) -> dict[str, Any]:
    """Genes that drive the feature, and the single pairs of cells that this is the mean of."""
    table = run.rows("attribution", i, ["gene", "attribution"])
    if table is None:
        return gone(run, "attribution")
    values = table["attribution"].to_numpy(np.float64)
    genes = _numbers(run, table["gene"])
    other = np.flatnonzero(np.nan_to_num(values))
    chosen = other[np.argsort(-np.abs(values[other]), kind="stable")[:MOST_GENES]]
    chosen = chosen[np.argsort(-values[chosen], kind="stable")]
    shown = genes[chosen]
    return {
        "genes": shown.astype(np.uint32), "values": values[chosen].astype(np.float32),
        "names": [run.genes[g] for g in shown], "descriptions": [run.told(g) for g in shown],
        "n_genes": int(np.count_nonzero(~np.isnan(values))), "n_nonzero": len(other),
        "samples": _samples(run, i, shown),
    }  # fmt: skip


def _samples(run: Run, i: int, genes: np.ndarray) -> dict[str, Any] | None:
    """The single samples of some genes whose mean is not 0.

    A gene that has a row in no sample was not kept and is NaN; in a sample that lacks a gene of
    others it is 0.
    """
    names = ["prototype", "counterfactual", "gene", "attribution"]
    table = run.rows("samples", i, names)
    if table is None:
        return None
    pairs = table[["prototype", "counterfactual"]].to_numpy(np.int64)
    distinct, first, which = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    distinct, which = distinct[order], np.argsort(order)[which.ravel()]
    place = np.full(len(run.genes), -1)
    place[genes] = np.arange(len(genes))
    column = place[_numbers(run, table["gene"])]
    shown = column >= 0
    values = np.full((len(distinct), len(genes)), np.nan, np.float32)
    values[:, column[shown]] = 0
    values[which[shown], column[shown]] = table["attribution"].to_numpy(np.float32)[shown]
    sides = [list(dict.fromkeys(distinct[:, side].tolist())) for side in (0, 1)]
    cells = run.cells if run.n_cells else ()
    told = [
        [{"cell": cell, "name": cells[cell] if cell < len(cells) else f"cell {cell}"}
         for cell in side]
        for side in sides
    ]  # fmt: skip
    where = [{cell: k for k, cell in enumerate(side)} for side in sides]
    return {
        "prototypes": told[0], "counterfactuals": told[1],
        "of": [[where[0][a], where[1][b]] for a, b in distinct.tolist()],
        "values": values.ravel(),
    }  # fmt: skip


def dge(run: Run, i: int) -> dict[str, Any]:
    """Genes that differ between the feature's cells and silent ones; those that vary in neither are
    untested. Their names are in the document `names`.

    `significant` is by `rule`: Bonferroni's over the genes tested, where all are there, else the q
    that was stored, which is over all genes too.
    """
    columns = ["gene", "log2_fold_change", "log10_p"]
    complete, table = True, run.rows("dge", i, columns)
    if table is None:
        complete, table = False, run.rows("genes", i, [*columns, "q"])
    if table is None:
        return gone(run, "dge")
    told = run.groups(table.attrs["folder"])
    tested = table[table["log10_p"].notna()]
    if complete:
        rule = "p < 0.05 after Bonferroni"
        significant = tested["log10_p"] > -np.log10(SIGNIFICANT / max(1, len(tested)))
    else:
        rule, significant = "q < 0.05", tested["q"] < SIGNIFICANT
    return {
        "genes": _numbers(run, tested["gene"]).astype(np.uint32),
        "log2_fold_change": tested["log2_fold_change"].to_numpy(np.float32),
        "log10_p": tested["log10_p"].to_numpy(np.float32),
        "significant": significant.to_numpy(np.uint32), "rule": rule,
        "complete": complete, "n_genes": len(tested), "n_untested": len(table) - len(tested),
        "told": told,
    }  # fmt: skip


def terms(run: Run, i: int) -> dict[str, Any]:
    """The lens' best terms of the feature; of the quickstart's, those of the smallest p."""
    columns = ["term", "size", "hits", "auc", "change"]
    told = ["side", "log10_p", "log10_q", "named"]
    table = run.rows("top_terms", i, [*columns, *told])
    test = run.naming_test
    if table is None and test is not None:
        table = run.rows("enrichment", i, [*columns, f"log10_p_{test}", f"log10_q_{test}"])
        if table is not None:
            named = set(run.feature_terms[[i]].indices.tolist())
            table = table.rename(
                columns={f"log10_{what}_{test}": f"log10_{what}" for what in ("p", "q")}
            )
            table = table.sort_values("log10_p", ascending=False, kind="stable")[:BEST_TERMS]
            table["side"] = np.where(table["auc"] >= 0.5, "up", "down")
            table["named"] = [run.term_number[str(term)] in named for term in table["term"]]
    if table is None:
        return gone(run, "terms")
    top = run.rows("genes", i, ["gene"])
    relevant = [] if top is None else _numbers(run, top["gene"]).tolist()
    rows = []
    for row in table.to_dict("records"):
        term = run.term_number[str(row["term"])]
        members = set(run.genes_of(term, table.attrs["folder"]).tolist())
        rows.append({
            "term": term, "name": str(row["term"]), "size": int(row["size"]),
            "hits": int(row["hits"]), "direction": str(row["side"]), "named": bool(row["named"]),
            **{key: float(row[key]) for key in ("auc", "change", "log10_p", "log10_q")},
            "genes": [run.genes[g] for g in relevant if g in members],
        })  # fmt: skip
    return {"rows": rows, "tests": run.tests()}


def gsea(run: Run, i: int, method: str) -> dict[str, Any]:
    """Terms of the feature's ranked genes, and the running sums of the best.

    Args:
      method: "attribution" or "dge", by which genes are ranked.
    """
    table = run.rows(f"gsea_{method}", i, ["term", "es", "nes", "p", "q"])
    if table is None:
        return gone(run, f"gsea/{method}")
    folder = table.attrs["folder"]
    ranked = Ranked.of(run, i, method, folder) if f"sets.{folder}.indptr" in run.index else None
    table = table[table["p"].notna()]
    order = np.lexsort((-table["nes"].abs().to_numpy(), table["p"].to_numpy()))[:MOST_TERMS]
    rows, curves = [], {}
    for row in table.iloc[order].to_dict("records"):
        term = run.term_number[str(row["term"])]
        told = {"term": term, "name": str(row["term"]), "size": run.size(term), "lead": []}
        rows.append(told | {key: float(row[key]) for key in ("es", "nes", "p", "q")})
        if ranked is None or (curve := ranked.running_sum(run.genes_of(term, folder))) is None:
            continue
        rows[-1]["size"] = len(curve["hits"])
        rows[-1]["lead"] = [run.genes[gene] for gene in ranked.leading(curve, row["es"] >= 0)]
        if len(curves) < CURVES:
            curves[str(term)] = curve
    found = {"rows": rows, "curves": curves, "n_tested": len(table)}
    return found if ranked is not None else found | {"missing": {"curves": run.missing("sets")}}


@dataclass(frozen=True, eq=False)
class Ranked:
    """Genes from the highest score down, as `sae-jax concepts` gave them to GSEA.

    Attributes:
      order: the gene at each rank. rank: of each gene of the run, -1 for those without.
      ranking: weights by rank, and bounds of the ranks that share a score.
    """

    order: np.ndarray
    rank: np.ndarray
    ranking: Ranking

    @classmethod
    def of(cls, run: Run, i: int, method: str, folder: int) -> Ranked | None:
        """Of a feature, by a folder's table; None where its genes have no scores."""
        column = {"attribution": "attribution", "dge": "log2_fold_change"}[method]
        table = run.rows(method, i, ["gene", column], folder)
        if table is None:
            return None
        scores = np.nan_to_num(np.round(table[column].to_numpy(np.float64), 9))
        ranking = Ranking.of(scores, 1.0)
        order = _numbers(run, table["gene"])[ranking.order]
        rank = np.full(len(run.genes), -1)
        rank[order] = np.arange(len(order))
        return cls(order, rank, ranking)

    def running_sum(self, genes: np.ndarray) -> dict[str, Any] | None:
        """The running sum of GSEA of a set of genes; None where it has none.

        It rises at genes of the set by their share of the set's weight and falls evenly at the
        others. Within genes of equal score it has no order and is drawn as a straight line.

        Returns:
          hits: the ranks of the set's genes. es: before and after each of them [2 hits]. at, sum:
          the corners of the curve, from (0, 0) to (n, 0). n: genes.
        """
        hits = np.sort(self.rank[genes])
        hits, n = hits[hits >= 0], len(self.order)
        weight = np.concatenate([[0.0], np.cumsum(self.ranking.weight[hits])])
        if weight[-1] == 0 or len(hits) == n:
            return None
        corners = np.unique(
            np.concatenate([[0, n], self.ranking.start[hits], self.ranking.end[hits]])
        )
        before = np.searchsorted(hits, corners)
        height = weight[before] / weight[-1] - (corners - before) / (n - len(hits))
        sides = np.stack([hits, hits + 1], axis=1).ravel()
        return {
            "hits": hits.astype(np.uint32), "n": n, "at": corners.astype(np.uint32),
            "es": np.interp(sides, corners, height).astype(np.float32),
            "sum": height.astype(np.float32),
        }  # fmt: skip

    def leading(self, curve: dict[str, Any], up: bool) -> np.ndarray:
        """The set's genes that make its score, the outermost first: those before the peak, or from
        the trough on."""
        hits = curve["hits"]
        if up:
            return self.order[hits[hits < curve["at"][curve["sum"].argmax()]]]
        return self.order[hits[hits >= curve["at"][curve["sum"].argmin()]]][::-1]


def deletion(run: Run, i: int) -> dict[str, Any]:
    """What is left of the activation as genes are exchanged, by order of the genes; areas under
    the curves of deletion and of insertion, as shares of the square.

    `held_out` has the same on cells that the attribution was not computed on, None where not made.
    """
    found, held_out = (_curves(run, i, name) for name in CURVE_FILES)
    return gone(run, "deletion") if found is None else found | {"held_out": held_out}


def _curves(run: Run, i: int, name: str) -> dict[str, Any] | None:
    names = run.index.meta["curves"][name]
    first, last = (0, 0) if names is None else run.index[f"{name}.indptr"][i : i + 2].tolist()
    if first == last:
        return None
    columns = ("kind", "order", "n_genes", "activation")
    kind, order, n_genes, left = (run.index[f"{name}.{column}"][first:last] for column in columns)
    curves: list[dict[str, Any]] = []
    areas: dict[str, dict[str, float]] = {"deletion": {}, "insertion": {}}
    for k, o in dict.fromkeys(zip(kind.tolist(), order.tolist(), strict=True)):
        some = (kind == k) & (order == o)
        n, y = np.array(n_genes[some]), np.array(left[some])
        told = {"kind": names["kinds"][k], "order": names["orders"][o]}
        curves.append({**told, "n_genes": n, "activation": y})
        if n[-1] > n[0]:
            area = np.trapezoid(y.astype(np.float64), n) / (n[-1] - n[0])
            areas.setdefault(told["kind"], {})[told["order"]] = float(area)
    return {"curves": curves, "areas": areas["deletion"], "insertion_areas": areas["insertion"]}


def _numbers(run: Run, genes: pd.Series | Sequence[str]) -> np.ndarray:
    """Numbers of a column of genes."""
    column = pd.Categorical(genes)
    return np.asarray([run.gene_number[str(name)] for name in column.categories])[column.codes]

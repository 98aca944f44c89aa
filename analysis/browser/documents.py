"""Documents: what a page shows, by key. The server makes them when asked, the export all of them.

A key is made of words and numbers only: about, features, names, map, cells/coordinates/<i>,
cells/column/<i>, feature/<i>/page, .../activation, .../attribution, .../dge, .../terms,
.../gsea/attribution, .../gsea/dge, .../deletion, gene/<i>, term/<i>, label/<column>/<value>,
cell/<i>. Features, genes, terms, columns, labels and cells are numbered by the run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from analysis.browser import feature_documents as of_feature
from analysis.browser.columns import FLAG, NUMBER
from analysis.browser.index import scaled, smallest
from analysis.browser.inverted import BY, MOST_DIFFERING, MOST_DRIVING
from analysis.browser.run import Run
from sae_jax.reading import reading

MOST_ROWS = 200  # of a table of features, of each kind
MOST_OF_CELL = 50
WHOLE = ("about", "features", "names", "map")  # documents without a number
LISTED = {  # on the page of a gene
    "driven": f"Of each feature the {MOST_DRIVING} genes that drive it most are listed.",
    "differing": (
        f"Of each feature the {MOST_DIFFERING} genes that rise most and the {MOST_DIFFERING} that "
        "fall most are listed."
    ),
}
OF_FEATURE: dict[str, Callable[[Run, int], dict[str, Any]]] = {
    "page": of_feature.page,
    "activation": of_feature.activation,
    "attribution": of_feature.attribution,
    "dge": of_feature.dge,
    "terms": of_feature.terms,
    "gsea/attribution": partial(of_feature.gsea, method="attribution"),
    "gsea/dge": partial(of_feature.gsea, method="dge"),
    "deletion": of_feature.deletion,
}


class NoDocumentError(KeyError):
    """A key that the run has no document of."""


def document(run: Run, key: str) -> dict[str, Any]:
    """The document of a key; `{"absent": why}` where no analysis of the run has what it shows.

    Raises:
      NoDocumentError: the run has no such key.
      InputError: a file of the run is damaged.
    """
    name, numbers = parsed(key)
    if name.startswith("feature/"):
        (i,) = _within(numbers, run.n_features)
        with reading(" or ".join(str(folder.path) for folder in run.folders)):
            return OF_FEATURE[name.removeprefix("feature/")](run, i)
    return _DOCUMENTS[name](run, *numbers)


def parsed(key: str) -> tuple[str, list[int]]:
    """The kind of a key ("feature/page", "label") and its numbers.

    Raises:
      NoDocumentError: it is none.
    """
    words, numbers = [], []
    for part in key.split("/"):
        if re.fullmatch(r"0|[1-9][0-9]{0,8}", part, re.ASCII):
            numbers.append(int(part))
        else:
            words.append(part)
    name = "/".join(words)
    n_numbers = {"label": 2, **dict.fromkeys(WHOLE, 0)}.get(name, 1)
    known = name in _DOCUMENTS or name.removeprefix("feature/") in OF_FEATURE
    again = _key(name, *numbers) if known and len(numbers) == n_numbers else None
    if again != key:
        raise NoDocumentError(key)
    return name, numbers


def keys(run: Run, cells: bool = False) -> Iterator[str]:
    """Every key of the run; those of single cells where asked for."""
    yield from WHOLE
    yield from (f"cells/coordinates/{i}" for i in range(len(run.maps)))
    yield from (f"cells/column/{i}" for i in range(len(run.metadata)))
    for i in range(run.n_features):
        yield from (f"feature/{i}/{name}" for name in OF_FEATURE)
    yield from (f"gene/{i}" for i in range(len(run.genes)))
    yield from (f"term/{i}" for i in range(len(run.terms)))
    for c, held, _ in run.labels():
        yield from (f"label/{c}/{v}" for v in range(len(held["categories"])))
    if cells:
        yield from (f"cell/{i}" for i in range(run.n_cells))


def _key(name: str, *numbers: int) -> str:
    if name.startswith("feature/"):
        return f"feature/{numbers[0]}/{name.removeprefix('feature/')}"
    return "/".join([name, *map(str, numbers)])


def _within(numbers: list[int] | tuple[int, ...], *bounds: int) -> tuple[int, ...]:
    """The numbers, each below its bound; NoDocumentError."""
    if any(number >= bound for number, bound in zip(numbers, bounds, strict=True)):
        raise NoDocumentError("/".join(map(str, numbers)))
    return tuple(numbers)


def about(run: Run) -> dict[str, Any]:
    """What the run is, and what of it is there."""
    told = {key: value for folder in reversed(run.folders) for key, value in folder.about.items()}
    settings = run.folders[0].settings
    source = settings.get("h5ad")
    n_latents = told.get("n_latents", settings.get("n_latents"))
    shown = {column["name"] for _, column in run.metadata}
    return {
        "title": Path(source).stem if isinstance(source, str) and source else "A run",
        "program": run.folders[0].program, "programs": run.programs(),
        "model": told.get("model", settings.get("model")),
        "layer": told.get("layer", settings.get("layer")),
        "n_cells": run.n_cells, "n_features": run.n_features,
        "n_latents": n_latents if isinstance(n_latents, int) else None,
        "d_in": told.get("d_in"), "l0": told.get("l0"), "r2": told.get("r2"),
        **_named(run), "nulls": run.nulls[1:], "kinds": dict(Counter(run.features["kind"])),
        "columns": [
            {"name": held["name"], "kind": held["kind"], "published": True,
             "n_categories": len(held.get("categories", ())) or None}
            for _, held in run.metadata
        ],
        "identifiers": [held["name"] for _, held in run.identifiers if held["name"] not in shown],
        "maps": [held["name"] for held in run.maps], "feature_map": run.feature_map is not None,
        "panels": {what: None if run.there(what) else run.missing(what) for what in run.PANELS}
        | run.index.meta["skipped"],
        "gene_info": run.index.meta["gene_info"] is not None,
        "table_columns": [vars(column) for column in run.columns],
        "fingerprint": run.fingerprint,
    }  # fmt: skip


def _named(run: Run) -> dict[str, Any]:
    """Of the live concepts how many have a term, as the table counts them, and their share; and
    what the shares of `nulls` are to be compared with: the run's own of the same features."""
    found: dict[str, Any] = dict.fromkeys(("n_named", "share_named", "named_told"))
    if "n_terms" in run.features:
        live = run.features["kind"] == "concept"
        if "n_active" in run.features:
            live &= run.features["n_active"] > 0
        has_term = run.features["n_terms"][live] > 0
        found |= {"n_named": int(has_term.sum()),
                  "share_named": float(has_term.mean()) if len(has_term) else None}  # fmt: skip
    if run.nulls and np.isfinite(run.nulls[0]["named"]):
        found["named_told"] = (
            "Of the features with cells enough on both sides to be tested, "
            f"{run.nulls[0]['named']:.1%} are named; the shares where there is less or nothing to "
            "find are of such features, too."
        )
    return found


def features(run: Run) -> dict[str, Any]:
    """The table of features, column by column."""
    columns = {}
    for column in run.columns[1:]:
        values = run.features[column.name]
        if column.kind in (NUMBER, FLAG):
            columns[column.name] = _lean(values.to_numpy(np.float64, na_value=np.nan))
            continue
        label = pd.Categorical(values)
        if len(label.categories) > len(values) / 2:
            columns[column.name] = [None if value is None else str(value) for value in values]
            continue
        n = len(label.categories)
        none = bool((label.codes < 0).any())
        codes = np.where(label.codes < 0, n, label.codes).astype(smallest(n + 1))
        columns[column.name] = {
            "codes": codes, "categories": [str(value) for value in label.categories],
            "missing": n if none else None,
        }  # fmt: skip
    return {"names": run.names, "columns": columns}


def _lean(values: np.ndarray) -> np.ndarray:
    """Small whole numbers as such, others as float32."""
    whole = len(values) and (values == np.rint(values)).all() and values.min() >= 0
    return values.astype(smallest(int(values.max()) + 1) if whole else np.float32)


def names(run: Run) -> dict[str, Any]:
    """The names of all genes, terms and labels."""
    labels = [
        {"text": value, "index": [c, v]}
        for c, held, _ in run.labels() for v, value in enumerate(held["categories"])
    ]  # fmt: skip
    return {"genes": run.genes, "terms": run.terms, "labels": labels}


def feature_map(run: Run) -> dict[str, Any]:
    """The map of the features that have a place on it."""
    if run.feature_map is None:
        return of_feature.gone(run, "feature_map")
    placed = np.flatnonzero(np.isfinite(run.feature_map).all(axis=1))
    (x, y), (x_range, y_range) = scaled(run.feature_map[placed])
    return {"x": x, "y": y, "x_range": x_range, "y_range": y_range,
            "feature": placed.astype(np.uint32)}  # fmt: skip


def coordinates(run: Run, i: int) -> dict[str, Any]:
    """A map of the cells."""
    _within((i,), len(run.maps))
    x, y = run.index[f"map.{i}"]
    held = run.maps[i]
    return {"name": held["name"], "x": np.array(x), "y": np.array(y),
            "x_range": held["ranges"][0], "y_range": held["ranges"][1]}  # fmt: skip


def column(run: Run, i: int) -> dict[str, Any]:
    """A column of the cells' metadata."""
    _within((i,), len(run.metadata))
    stored, held = run.metadata[i]
    values = np.array(run.index[f"metadata.{stored}"])
    if held["kind"] == "number":
        return {**held, "values": values.astype(np.float32)}
    return {**held, "codes": values}


def gene(run: Run, i: int) -> dict[str, Any]:
    """A gene: what it is, the features that it drives or differs in, its terms."""
    _within((i,), len(run.genes))
    number, symbol, ensembl, description, aliases = run.gene_info(i)
    driven = _entries(run, "driven", i, ("value", "rank"), by="value")
    differing = _entries(run, "differing", i, ("t", "log2_fold_change", "rank"), by="t")
    mine = run.index["gene_terms.indices"][slice(*run.index["gene_terms.indptr"][i : i + 2])]
    missing = {}
    if not run.has("attribution"):
        missing["driven"] = run.missing("attribution")
    if not (run.has("dge") or run.has("genes")):
        missing["differing"] = run.missing("dge")
    if not run.has_sets:
        missing["terms"] = run.missing("sets")
    return {
        "index": i, "name": run.genes[i], "description": description, "aliases": aliases,
        "ensembl": ensembl, "links": _links(symbol, number, ensembl),
        "driven": driven[0], "n_driven": driven[1], "differing": differing[0],
        "n_differing": differing[1], "most": MOST_ROWS, "told": LISTED, "missing": missing,
        "terms": [{"term": int(t), "name": run.terms[t], "size": run.size(t)} for t in mine],
    }  # fmt: skip


def _links(symbol: str, number: str | None, ensembl: str | None) -> list[dict[str, str]]:
    """Where else one reads of a gene."""
    said = quote(symbol, safe="")
    ncbi = f"gene/{number}" if number else f"gene/?term={said}%5Bsym%5D"
    atlas = quote(ensembl, safe="") if ensembl else f"search/{said}"
    return [
        {"title": "NCBI Gene", "href": f"https://www.ncbi.nlm.nih.gov/{ncbi}"},
        {"title": "Human Protein Atlas", "href": f"https://www.proteinatlas.org/{atlas}"},
        {"title": "PubMed", "href": f"https://pubmed.ncbi.nlm.nih.gov/?term={said}"},
    ]


def _entries(
    run: Run, name: str, i: int, keys: tuple[str, ...], by: str
) -> tuple[list[dict[str, Any]], int]:
    """Features that the index has for a gene, those of the largest |value| first; how many."""
    some = slice(*run.index[f"{name}.indptr"][i : i + 2].tolist())
    feature = run.index[f"{name}.feature"][some]
    held = {key: run.index[f"{name}.{key}"][some] for key in keys}
    order = _first(run, feature, np.lexsort((feature, -np.abs(held[by]))), MOST_ROWS)
    rows = [
        {**run.brief(int(feature[k])), **{key: plain.item(k) for key, plain in held.items()}}
        for k in order
    ]
    return rows, len(feature)


def _first(run: Run, features: np.ndarray, order: np.ndarray, most: int) -> np.ndarray:
    """The first of each kind: neurons, which are dense, would fill every list.

    features: of each row. order: positions of rows.
    """
    kind = pd.factorize(run.features["kind"])[0][features[order]]
    return order[pd.Series(kind).groupby(kind).cumcount().to_numpy() < most]


def term(run: Run, i: int) -> dict[str, Any]:
    """A gene set: its genes, and the features that it names."""
    _within((i,), len(run.terms))
    named = run.named
    some = np.flatnonzero(named["term"] == i)
    order = some[np.lexsort((named["feature"][some], -named["log10_q"][some], named["by"][some]))]
    rows = [
        {**run.brief(int(named["feature"][k])), "by": BY[named["by"][k]],
         "direction": "down" if named["side"][k] < 0 else "up",
         **{key: named[key][k] for key in ("log10_q", "auc", "nes")}}
        for k in _first(run, named["feature"], order, MOST_ROWS)
    ]  # fmt: skip
    found = re.search(r"\(?\b(GO:\d{7}|R-[A-Z]{3}-\d+)\b\)?", run.terms[i])
    return {
        "index": i, "name": run.terms[i], "id": found[1] if found else None, "size": run.size(i),
        "genes": [{"gene": int(g), "name": run.genes[g]} for g in run.genes_of(i)],
        "features": rows, "n_features": len(order), "most": MOST_ROWS,
        "missing": {} if run.has_sets else {"genes": run.missing("sets")},
    }  # fmt: skip


def label(run: Run, c: int, v: int) -> dict[str, Any]:
    """A label: the features that tell it best, by the AUROC of this very label."""
    place = {number: (held, own) for number, held, own in run.labels()}
    if c not in place:
        raise NoDocumentError(f"label/{c}/{v}")
    held, own = place[c]
    _within((v,), len(held["categories"]))
    areas = np.array(run.index["auroc"][:, own.start + v], np.float64)
    of_column = np.array(run.index["of_label"][:, own], np.int64)
    active, n_active = of_column[:, v], of_column.sum(axis=1)
    n_cells = int(run.label_sizes(c)[v])
    every = np.argsort(-np.nan_to_num(areas, nan=-1), kind="stable")
    order = _first(run, np.arange(len(areas)), every, MOST_ROWS)
    return {
        "column": held["name"], "column_index": c, "value": held["categories"][v],
        "value_index": v, "n_cells": n_cells, "n_features": run.n_features, "most": MOST_ROWS,
        "features": [
            {**run.brief(int(f)), "auroc": areas[f], "n_active": int(active[f]),
             "share": active[f] / n_active[f] if n_active[f] else None,
             "of_label": active[f] / n_cells}
            for f in order
        ],
    }  # fmt: skip


def cell(run: Run, i: int) -> dict[str, Any]:
    """A cell and its features of the highest activation."""
    _within((i,), run.n_cells)
    features, values = run.index.entries("by_cell", i)
    order = _first(run, features, np.argsort(-values, kind="stable"), MOST_OF_CELL)
    highest = run.index["maximum"]
    return {
        "index": i, "name": run.cells[i], "metadata": run.describe_cells(np.array([i]))[0],
        "n_features": len(features), "most": MOST_OF_CELL,
        "features": [
            {**run.brief(int(features[k])), "activation": float(values[k]),
             "of_max": float(values[k] / highest[features[k]])}
            for k in order
        ],
    }  # fmt: skip


_DOCUMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "about": about,
    "features": features,
    "names": names,
    "map": feature_map,
    "cells/coordinates": coordinates,
    "cells/column": column,
    "gene": gene,
    "term": term,
    "label": label,
    "cell": cell,
}

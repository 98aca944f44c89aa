"""Finding things by what one types: features, genes, terms, labels, cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from analysis.browser.inverted import BY
from analysis.browser.run import Run

MOST = 10  # of each kind


def find(run: Run, text: str) -> dict[str, list[dict[str, Any]]]:
    """A few features, genes, terms, labels and cells that a text may mean, the likeliest first.

    Upper and lower case are alike. Terms hold every word of the text. Genes are known by symbol,
    alias, Ensembl and NCBI's number; features by name, label, genes and the words of their terms.

    Returns:
      Of each kind a list of `index` (a label's is [column, value]), `text`, `why`.
    """
    wanted = text.strip()
    empty: dict[str, list[dict[str, Any]]] = {
        kind: [] for kind in ("features", "genes", "terms", "labels", "cells")
    }
    if not wanted:
        return empty
    low = wanted.casefold()
    terms = terms_with(run, low.split())
    found = {
        "features": _features(run, low, terms),
        "genes": _genes(run, wanted),
        "terms": [_hit(int(i), run.terms[i], "term") for i in _shortest(run.terms, terms)],
        "labels": list(_labels(run, low)),
        "cells": _cells(run, wanted),
    }
    return empty | {kind: hits[:MOST] for kind, hits in found.items()}


def gene(run: Run, text: str) -> int | None:
    """The one gene of the run that a name means, None for none or several.

    The run's own names come first, then current names (symbol, Ensembl, NCBI's number), then
    aliases; all of them as they are written, then whatever their case.
    """
    text = _versionless(text.strip())
    written, folded = _names(run)
    for tiers, wanted in ((written, text), (folded, text.casefold())):
        for names in tiers:
            if found := names.get(wanted):
                return found[0] if len(found) == 1 else None
    return None


def terms_with(run: Run, words: list[str]) -> np.ndarray:
    """Numbers of the terms that hold every word, in small letters."""
    names = _folded(run)["terms"]
    return np.asarray([i for i, name in enumerate(names) if all(w in name for w in words)], int)


def _hit(index: Any, text: str, why: str) -> dict[str, Any]:
    return {"index": index, "text": text, "why": why}


def _shortest(names: list[str], some: np.ndarray) -> list[int]:
    return sorted(some.tolist(), key=lambda i: (len(names[i]), i))[:MOST]


def _folded(run: Run) -> dict[str, list[str]]:
    """Names in small letters."""
    if "search" not in run.memo:
        columns = [run.features[name] for name in ("label", "top_genes", "attributed_genes")
                   if name in run.features]  # fmt: skip
        run.memo["search"] = {
            "terms": [name.casefold() for name in run.terms],
            "features": [name.casefold() for name in run.names],
            **{
                column.name: ["" if v is None else str(v).casefold() for v in column]
                for column in columns
            },
        }
    return run.memo["search"]


def _features(run: Run, low: str, terms: np.ndarray) -> list[dict[str, Any]]:
    """By name, whole or from its beginning on first; then by label, gene, term."""
    held = _folded(run)
    names = held["features"]
    by_name = [i for i, name in enumerate(names) if low in name]
    by_name.sort(key=lambda i: (names[i] != low, not names[i].startswith(low), len(names[i]), i))
    number = run.feature(low)
    if number is not None and number not in by_name:  # another folder's name of it
        by_name.insert(0, number)
    found = {i: _hit(i, run.names[i], "feature") for i in by_name[:MOST]}
    if low.isdigit() and "latent" in run.features:
        for i in np.flatnonzero(run.features["latent"].to_numpy() == int(low[:18]))[:MOST]:
            found.setdefault(int(i), _hit(int(i), run.names[i], f"latent {low}"))
    if "label" in held:
        areas = np.nan_to_num(run.features["auroc"].to_numpy(np.float64))
        ours = [i for i, label in enumerate(held["label"]) if low in label]
        for i in sorted(ours, key=lambda i: (-areas[i], i))[:MOST]:
            told = f"{run.features['label'].iloc[i]}, AUROC {areas[i]:.2f}"
            found.setdefault(i, _hit(i, run.names[i], told))
    for column in ("top_genes", "attributed_genes"):
        ours = [i for i, genes in enumerate(held.get(column, ())) if low in genes.split(", ")]
        ours.sort(key=lambda i: (held[column][i].split(", ").index(low), i))
        for i in ours[:MOST]:
            found.setdefault(i, _hit(i, run.names[i], f"one of its top genes is {low.upper()}"))
    named = run.named
    ours = np.flatnonzero((named["by"] != BY.index("dge")) & np.isin(named["term"], terms))
    for k in ours[np.argsort(-named["log10_q"][ours], kind="stable")]:
        if len(found) >= 3 * MOST:
            break
        i, term = int(named["feature"][k]), int(named["term"][k])
        found.setdefault(i, _hit(i, run.names[i], run.terms[term]))
    return list(found.values())


def _names(run: Run) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Genes by name, as written and in small letters: by the run's own names, by other current
    names, by aliases."""
    if "genes" not in run.memo:
        written: list[dict[str, list[int]]] = [{}, {}, {}]
        folded: list[dict[str, list[int]]] = [{}, {}, {}]
        for i, own in enumerate(run.genes):
            number, symbol, ensembl, _, others = run.gene_info(i)
            for tier, names in enumerate(([own], [number, symbol, ensembl], others)):
                known = {_versionless(name) for name in names if name}
                for name in known:
                    written[tier].setdefault(name, []).append(i)
                for name in {name.casefold() for name in known}:
                    folded[tier].setdefault(name, []).append(i)
        run.memo["genes"] = (written, folded)
    return run.memo["genes"]


def _versionless(name: str) -> str:
    """An Ensembl id without what is after its dot."""
    return name.split(".")[0] if name.startswith("ENS") else name


def _genes(run: Run, wanted: str) -> list[dict[str, Any]]:
    """Those that are called so; then those whose name begins so, then those that hold it."""
    low, found = wanted.casefold(), {}
    for names in _names(run)[1]:
        for i in names.get(_versionless(wanted).casefold(), ()):
            told = "gene" if run.genes[i].casefold() == low else f"also called {wanted}"
            found.setdefault(i, _hit(i, run.genes[i], told))
    holding = [(name.casefold(), i) for i, name in enumerate(run.genes) if low in name.casefold()]
    holding.sort(key=lambda pair: (not pair[0].startswith(low), len(pair[0]), pair))
    for _, i in holding[:MOST]:
        found.setdefault(i, _hit(i, run.genes[i], "gene"))
    for i, described in enumerate(run.told(i) for i in range(len(run.genes))):
        if len(found) >= MOST:
            break
        if described and low in described.casefold():
            found.setdefault(i, _hit(i, run.genes[i], described))
    return list(found.values())


def _labels(run: Run, low: str) -> Iterator[dict[str, Any]]:
    for c, held, _ in run.labels():
        for v, value in enumerate(held["categories"]):
            if low in value.casefold() or low == held["name"].casefold():
                yield _hit([c, v], value, held["name"])


def _cells(run: Run, wanted: str) -> list[dict[str, Any]]:
    """By name, and by the columns that name cells; letters as written, or all capitals or small."""
    found: dict[int, dict[str, Any]] = {}
    if run.n_cells:
        columns = [("cells", "cell"), *((f"metadata.{i}", held["name"])
                   for i, held in run.identifiers)]  # fmt: skip
        for stored, why in columns:
            texts = run.index.texts(stored)
            for form in dict.fromkeys((wanted, wanted.upper(), wanted.lower())):
                for i in texts.find(form, MOST):
                    found.setdefault(i, _hit(i, run.cells[i], why))
    return list(found.values())

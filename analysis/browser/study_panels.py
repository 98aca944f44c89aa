"""What an item of a study shows: a whitelist, cut so that only what it says tells items apart.

Left out on purpose: id, label, terms, density, AUROC, kind and map of activations (a neuron is
dense: it would give itself away), values of activations, and the cells' names. Names of cells tell
no kind, but ten of them recognise a repeat, let who holds the data look the feature up, and often
spell the donor or the cell type.

Every item has the same number of genes, samples and cells, and all its lists together name the same
number of genes (`level`: how much the samples of a feature differ would tell its kind at a glance);
attributions are given relative to the largest beside them, in thousandths: neither scale nor digits
belong to a kind of feature (a latent that drops out of the top k falls by all it has, and other
samples of it would look empty).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sae_jax import InputError

Documents = Callable[[str], Mapping[str, Any]]  # key -> document of the explorer
Links = Callable[[int], list[dict[str, str]]]  # gene -> titles and addresses

PANELS = ("attribution", "samples", "cells", "descriptions")
N_CELLS = 10  # as in the paper
_PLACES = 3  # decimals of a relative attribution


class CannotShowError(Exception):
    """A feature lacks what a panel shows; the message says what."""


def available(documents: Documents, panels: Sequence[str] | None) -> tuple[str, ...]:
    """The panels to show, in the order of `PANELS`; None asks for all that the run has.

    Raises:
        InputError: if one is unknown, or the run has not what it shows.
    """
    lacks = _lacks(documents)
    if panels is None:
        panels = [each for each in PANELS if each not in lacks or each == "attribution"]
    for each in panels:
        if each not in PANELS:
            raise InputError(f"{each!r} is no panel of a study: take of {', '.join(PANELS)}.")
        if each in lacks:
            raise InputError(f"the panel {each!r} cannot be shown. {lacks[each]}")
    if not {"attribution", "cells"} & set(panels):
        raise InputError("a study shows attribution, cells or both: else there is nothing to rate.")
    if "attribution" not in panels and {"samples", "descriptions"} & set(panels):
        raise InputError("samples and descriptions belong to attribution: name that panel too.")
    return tuple(each for each in PANELS if each in panels)


def columns(about: Mapping[str, Any], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Columns of the top cells' table; None for every one of categories but identifiers.

    Raises:
        InputError: if the cells have no such column.
    """
    known = {each["name"]: each for each in about["columns"]}
    if asked is None:
        return tuple(
            name
            for name, each in known.items()
            if each["kind"] == "category" and 2 * each["n_categories"] <= about["n_cells"]
        )
    if strange := [name for name in asked if name not in known]:
        raise InputError(f"the cells have no column {strange[0]!r}; they have {', '.join(known)}.")
    return tuple(asked)


def project(
    documents: Documents,
    feature: int,
    panels: Sequence[str],
    metadata: Sequence[str],
    *,
    n_genes: int,
    links: Links,
) -> dict[str, Any]:
    """What a rater sees of a feature; `level` makes items with samples alike, and then final.

    Args:
        documents: of the run.
        feature: its number.
        panels, metadata: of `available` and `columns`.
        n_genes: genes of the average, and of every sample: each shows its own.
        links: where else one reads of a gene, by its number.

    Returns:
        `genes`: names, links (and descriptions) of all genes that are shown; `average`: [gene,
        relative attribution], the largest first, n_genes of them; `samples`: attribution of every
        gene of `genes` [samples, genes], of which `level` makes lists like `average`; `titles` of
        the samples; `cells`: metadata of the top cells, as text, the highest activation first.

    Raises:
        CannotShowError: if the feature has fewer genes or cells than every item must show.
    """
    shown: dict[str, Any] = {}
    if "attribution" in panels:
        shown |= _attribution(documents(f"feature/{feature}/attribution"), panels, n_genes, links)
    if "cells" in panels:
        bands = documents(f"feature/{feature}/page").get("bands") or [{"rows": []}]
        rows = bands[0]["rows"][:N_CELLS]
        if len(rows) < N_CELLS:
            raise CannotShowError(f"fewer than {N_CELLS} active cells")
        shown["cells"] = [
            [_text(row["metadata"].get(column)) for column in metadata] for row in rows
        ]
    return shown


def level(items: Iterable[dict[str, Any]]) -> int:
    """Makes the samples of all items alike, in place.

    Every item keeps as many samples, under the same titles, and names as many genes as the item
    with the fewest: those of the average, and of the others the strongest relative to the largest
    of a sample. A sample lists its largest among those, as many as the average lists.

    Returns:
        The number of samples.
    """
    items = [each for each in items if "samples" in each]
    n = min((len(each["samples"]) for each in items), default=0)
    titles = [each.pop("titles")[:n] for each in items]
    alike = all(each == titles[0] for each in titles)
    strengths = [_strengths(each, n) for each in items]
    n_named = min((int(np.isfinite(each).sum()) for each in strengths), default=0)
    for each, strength in zip(items, strengths, strict=True):
        kept = np.sort(np.argsort(-strength, kind="stable")[:n_named])
        place = {gene: i for i, gene in enumerate(kept.tolist())}
        each["genes"] = [each["genes"][gene] for gene in kept.tolist()]
        each["average"] = [[place[gene], value] for gene, value in each["average"]]
        bars = _bars(each["samples"][:n, kept], len(each["average"]))
        each["samples"] = [
            {"title": titles[0][k] if alike else f"sample {k + 1}", "bars": row}
            for k, row in enumerate(bars)
        ]
    return n


def _lacks(documents: Documents) -> dict[str, str]:
    """What keeps panels from being shown, by the first feature that is attributed."""
    lacks, about = {}, documents("about")
    if told := about["panels"]["cells"]:
        lacks["cells"] = f"There is no features.h5ad. {told}"
    if not about.get("gene_info"):
        lacks["descriptions"] = "The run is open without NCBI's gene table: give --gene_info=FILE."
    told = "This run attributes nothing: make it with `sae-jax concepts`."
    for feature in range(len(documents("features")["names"])):
        found = documents(f"feature/{feature}/attribution")
        if "absent" not in found:
            if not found.get("samples"):
                lacks["samples"] = "This run kept no single samples: make it again."
            return lacks
        told = found["absent"]
    return lacks | {"attribution": told, "samples": told}


def _attribution(
    found: Mapping[str, Any], panels: Sequence[str], n_genes: int, links: Links
) -> dict[str, Any]:
    if "absent" in found or len(found["names"]) < n_genes:
        raise CannotShowError(f"attributed to fewer than {n_genes} genes")
    rows = np.asarray(found["values"], np.float64)[None]
    if "samples" in panels:
        if not found.get("samples") or not len(found["samples"]["of"]):
            raise CannotShowError("without single samples")
        values = np.asarray(found["samples"]["values"], np.float64)
        rows = np.vstack([rows, values.reshape(len(found["samples"]["of"]), len(found["names"]))])
    genes = np.unique(_best(rows, n_genes))
    rows = rows[:, genes]
    if not np.isfinite(rows).all():
        raise CannotShowError("attributions that are not finite")
    shown: dict[str, Any] = {
        "genes": [
            {"name": str(found["names"][gene]), "links": links(int(found["genes"][gene]))}
            for gene in genes.tolist()
        ],
        "average": _bars(rows[:1], n_genes)[0],
    }
    if "descriptions" in panels:
        for each, gene in zip(shown["genes"], genes.tolist(), strict=True):
            each["description"] = found["descriptions"][gene]
    if "samples" in panels:
        shown["samples"] = rows[1:]
        shown["titles"] = _titles([p for p, _ in found["samples"]["of"]])
    return shown


def _best(values: np.ndarray, n: int) -> np.ndarray:
    """The n largest of each row, by place; equal ones in the order of the average, in all rows."""
    return np.argsort(-values, axis=1, kind="stable")[:, :n]


def _bars(values: np.ndarray, n: int) -> list[list[list[float]]]:
    """Of each row the n largest, [place, value relative to the largest of them]."""
    best = _best(values, n)
    top = np.take_along_axis(values, best, axis=1)
    relative = np.round(top / _largest(top), _PLACES) + 0.0  # no -0
    return [
        [[gene, value] for gene, value in zip(*row, strict=True)]
        for row in zip(best.tolist(), relative.tolist(), strict=True)
    ]


def _largest(top: np.ndarray) -> np.ndarray:
    """By absolute value, of each row [rows, 1]; 1 where all is 0."""
    largest = np.abs(top).max(axis=1, keepdims=True)
    return np.where(largest, largest, 1)


def _strengths(item: Mapping[str, Any], n: int) -> np.ndarray:
    """Of each gene of an item, its largest share of what is largest in one of the first n samples.

    Greater than all others for genes of the average; NaN for those that none of them lists.
    """
    values, n_genes = item["samples"][:n], len(item["average"])
    best = _best(values, n_genes)
    relative = values / _largest(np.take_along_axis(values, best, axis=1))
    strength = np.full(values.shape[1], np.nan)
    listed = np.unique(best)
    strength[listed] = relative[:, listed].max(axis=0)
    strength[[gene for gene, _ in item["average"]]] = np.finfo(np.float64).max
    return strength


def _titles(prototypes: Sequence[int]) -> list[str]:
    """Of samples, by the prototype of each; its counterfactuals are counted."""
    seen: Counter[int] = Counter()
    titles = []
    for p in prototypes:
        seen[p] += 1
        titles.append(f"cell {p + 1}, counterfactual {seen[p]}")
    return titles


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

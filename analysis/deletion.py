"""Do the genes of an attribution matter together? Deletion and insertion curves (Claye, Figure 8).

Deletion: the first n genes of an order are given the counterfactual's values in the prototype, all
together, and the concept's activation is taken. A good order makes it fall early. Insertion is the
same from the other side: the prototype's values are put into the counterfactual. Activations are
summed over a concept's pairs and stated as a share of that of its prototypes, so that deletion
starts at 1 and insertion, whose cells are silent, at 0. Its mean over n, the area under the curve,
says how good an order is: low for deletion, high for insertion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from tqdm import tqdm

from analysis.attribution import descending
from analysis.cell_plots import BLUE, INK, ORANGE, colours
from analysis.counterfactuals import Pairs
from analysis.perturbed import Coder, Embedder, Perturbed, perturbed
from analysis.plots import plain
from sae_jax.errors import InputError

KINDS = ("deletion", "insertion")
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 75, 100)
Orders = Mapping[str, Sequence[np.ndarray]]


def ranked(scores: ArrayLike, keep: ArrayLike | None = None) -> list[np.ndarray]:
    """Genes by falling score, an order for each concept; equal ones as they come.

    For the DGE order of the paper: |log2 fold changes|, and keep=p <= 5e-3.

    Args:
        scores: [concepts, genes], of the genes that the attribution has; NaN is never kept.
        keep: bool of the same shape, the genes that are in the order at all; None: all.

    Raises:
        InputError: another shape.
    """
    scores = np.asarray(scores, np.float64)
    kept = np.ones(scores.shape, bool) if keep is None else np.asarray(keep, bool)
    if scores.ndim != 2 or kept.shape != scores.shape:
        raise InputError(f"scores {scores.shape}, keep {kept.shape}: give [concepts, genes] both.")
    kept = kept & ~np.isnan(scores)
    orders = [descending(row) for row in scores]
    return [order[some[order]] for order, some in zip(orders, kept, strict=True)]


def shuffled(values: Any, pairs: Pairs, seed: int = 0) -> list[np.ndarray]:
    """A random order for each concept, of the genes that differ in one of its pairs at least.

    Of all genes most would change nothing, and any order would beat theirs.

    Args:
        values: what is exchanged, CSR [cells, genes], such as `Perturbed.values`.
        pairs: of these cells.
        seed: each concept's order is drawn from it and from the latent's number.
    """
    found = []
    for i, latent in enumerate(pairs.concepts):
        some = pairs.concept == i
        differ = values[pairs.prototype[some]] != values[pairs.counterfactual[some]]
        genes = np.unique(differ.tocsr().indices)
        found.append(np.random.default_rng([seed, int(latent)]).permutation(genes))
    return found


def held_out(pairs: Pairs, first: int) -> Pairs:
    """The pairs of other prototypes than each concept's `first` most active ones.

    An order of genes that was found on those is then tested on cells that it has not seen; in its
    own cells even a random gene's attribution is an effect.

    Args:
        pairs: with more than `first` prototypes a concept, where there are as many cells.
        first: how many are left out; a concept without others has no pairs then.

    Raises:
        InputError: none are left out.
    """
    if first < 1:
        raise InputError(f"first={first}: leave out 1 prototype at least.")
    new = np.append(True, pairs.prototype[1:] != pairs.prototype[:-1])
    new[1:] |= pairs.concept[1:] != pairs.concept[:-1]
    rank = np.cumsum(new) - 1  # of the prototype: over all concepts, then within its own
    rank -= rank[np.searchsorted(pairs.concept, pairs.concept)]
    parts = (pairs.concept, pairs.prototype, pairs.counterfactual, pairs.distance)
    return Pairs(pairs.concepts, *(part[rank >= first] for part in parts))


def curves(
    model: Embedder,
    dictionary: Coder | str,
    adata: anndata.AnnData,
    pairs: Pairs,
    orders: Orders,
    *,
    steps: Sequence[int] = STEPS,
    kinds: Sequence[str] = KINDS,
    seed: int | None = 0,
    options: Mapping[str, Any] | None = None,
    exchange: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Activation of each concept after the first n genes of each order were replaced.

    Args:
        model, dictionary, adata, options, exchange: as of `attribution.attribute`.
        pairs: of an attribution of these cells.
        orders: by name an order for each concept, positions in `Attribution.genes`; where it has
            fewer than n genes, all of them are replaced.
        steps: numbers of genes replaced; 0 is added.
        kinds: of `KINDS`.
        seed: adds the order "random" (`shuffled`); None: without it.
        progress: whether to show a bar.

    Returns:
        A row each: `kind`, `order`, `concept` (the latent), `n_genes`, `activation`, a share of the
        prototypes'. Concepts without pairs are left out.

    Raises:
        InputError: other kinds, steps, orders of other genes or another number of concepts.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS] or not kinds:
        raise InputError(f"kinds={unknown or kinds}: give some of {', '.join(KINDS)}.")
    if not len(steps) or min(steps) < 0 or max(steps) < 1:
        raise InputError(f"steps={steps}: give numbers of genes, 1 at least.")
    pairs.check(adata.n_obs)
    found = perturbed(model, dictionary, adata, pairs.cells, options, exchange)
    local = pairs.local()
    every = {name: list(order) for name, order in orders.items()}
    for name, order in every.items():
        if len(order) != len(pairs.concepts):
            raise InputError(f"{name}: {len(order)} orders for {len(pairs.concepts)} concepts.")
        for genes in order:
            inside = len(genes) == 0 or 0 <= np.min(genes) <= np.max(genes) < len(found.genes)
            if not inside or len(np.unique(genes)) < len(genes):
                raise InputError(
                    f"{name}: an order holds positions of genes, 0 .. {len(found.genes) - 1}, each "
                    "once at most."
                )
    if seed is not None:
        every["random"] = shuffled(found.values, local, seed)
    counts = np.unique([0, *steps])
    rows = []
    for i in tqdm(np.unique(local.concept), desc="curves", unit=" concept", disable=not progress):
        some = local.of([i])
        for kind in kinds:
            for name, order in every.items():
                activation = _curve(found, some, np.asarray(order[i], np.int64), counts, kind)
                rows.append(pd.DataFrame(
                    {"kind": kind, "order": name, "concept": pairs.concepts[i], "n_genes": counts,
                     "activation": activation}
                ))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def _curve(
    found: Perturbed, pairs: Pairs, order: np.ndarray, counts: np.ndarray, kind: str
) -> np.ndarray:
    """Activations of one concept [counts], a share of its prototypes'."""
    into, of = pairs.prototype, pairs.counterfactual
    if kind == "insertion":
        into, of = of, into
    own, new = found.values[into][:, order].toarray(), found.values[of][:, order].toarray()
    cells, starts, genes, values = [], [0], [], []
    for cell, mine, theirs in zip(into, own, new, strict=True):
        differ = mine != theirs
        for n in counts:
            first = np.flatnonzero(differ[:n])
            cells.append(cell)
            genes.append(order[first])
            values.append(theirs[first])
            starts.append(starts[-1] + len(first))
    codes = found.codes(
        np.array(cells), np.array(starts), np.concatenate(genes), np.concatenate(values),
        pairs.concepts,
    )  # fmt: skip
    summed = codes.reshape(len(into), len(counts)).sum(axis=0, dtype=np.float64)
    if kind == "deletion":
        return _share(summed, summed[0])
    nothing = np.zeros(0, np.int64)
    prototypes = found.codes(
        pairs.prototype, np.zeros(len(into) + 1, np.int64), nothing, np.zeros(0), pairs.concepts
    )
    return _share(summed, prototypes.sum(dtype=np.float64))


def _share(summed: np.ndarray, whole: float) -> np.ndarray:
    """NaN where prototypes do not activate: then a share means nothing."""
    return summed / whole if whole > 0 else np.full(len(summed), np.nan)


def areas(table: pd.DataFrame) -> pd.DataFrame:
    """The area under each curve, a share of the square: the mean activation over n, by trapezoids.

    Args:
        table: of `curves`.

    Returns:
        A row a concept and kind (index), a column an order.
    """

    def area(curve: pd.DataFrame) -> float:
        n = curve["n_genes"].to_numpy()
        return float(np.trapezoid(curve["activation"], n) / (n[-1] - n[0]))

    groups = table.groupby(["kind", "concept", "order"], sort=False)
    found = groups[["n_genes", "activation"]].apply(area)
    return found.unstack("order")[list(dict.fromkeys(table["order"]))]


def figure(table: pd.DataFrame) -> Figure:
    """Mean over concepts and, as a band, one standard deviation either way; a panel a kind.

    The legend gives the mean area of each order.
    """
    kinds = list(dict.fromkeys(table["kind"]))
    shown = Figure(figsize=(4.6 * len(kinds), 3.6), layout="constrained")
    panels = shown.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(table["order"]))
    others = iter(colours(len(names)))
    known = {"attribution": BLUE, "DGE": ORANGE, "random": INK}
    colour = {name: known.get(name) or next(others) for name in names}
    area = areas(table)
    for axes, kind in zip(panels, kinds, strict=True):
        for name in names:
            some = table[(table["kind"] == kind) & (table["order"] == name)]
            stats = some.groupby("n_genes")["activation"].agg(["mean", "std"]).fillna(0)
            mean, spread = stats["mean"], stats["std"]
            label = f"{plain(name)}, area {area.loc[kind, name].mean():.2f}"
            axes.plot(stats.index, mean, color=colour[name], linewidth=1.6, label=label)
            axes.fill_between(stats.index, mean - spread, mean + spread, color=colour[name],
                              alpha=0.15, linewidth=0)  # fmt: skip
        axes.set(xlabel="genes replaced", title=kind)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("activation, share of the prototypes'")
    return shown

"""The picture of one gene set in one ranking: running sum, where its genes are, the scores."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.cell_plots import BLUE, INK, ORANGE
from analysis.gsea import Prerank
from analysis.plots import plain


def enrichment(result: Prerank, row: int, term: int, title: str = "") -> Figure:
    """Running sum over the ranks of list `row`, the genes of the term, and all scores.

    Genes of the leading edge are drawn in colour. Genes of equal score lie in no order, and the sum
    is a straight line over them.

    Raises:
      InputError: if the term has no es in the list.
    """
    at, value = result.running_sum(row, term)
    order = np.argsort(-result.scores[row], kind="stable")
    rank = np.argsort(order)
    members = result.membership[[term]].indices
    leading = np.isin(members, result.leading_edge(row, term))
    es = result.es[row, term]
    colour = ORANGE if es >= 0 else BLUE

    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(6, 1, 3))
    peak = np.argmin(np.abs(value - es))
    top.plot(at, value, color=colour, linewidth=1.6)
    top.axhline(0, color=INK, linewidth=0.6)
    top.vlines(at[peak], *sorted((0, es)), color=colour, linestyle="--", linewidth=1)
    top.set_ylabel("running sum")
    top.set_title(plain(title), fontsize=10)
    nes, p = result.nes[row, term], result.p[row, term]
    told = "no null of this sign" if np.isnan(p) else f"NES {nes:.2f}   p {p:.2g}"
    # Where the curve is not: opposite the side that its peak is on.
    right, low = at[peak] < at[-1] / 2, es < 0
    top.text(0.98 if right else 0.02, 0.06 if low else 0.94, f"ES {es:.3f}   {told}", fontsize=9,
             ha="right" if right else "left", va="bottom" if low else "top",
             transform=top.transAxes)  # fmt: skip
    middle.vlines(rank[members[~leading]] + 0.5, 0, 1, color=INK, linewidth=0.6)
    middle.vlines(rank[members[leading]] + 0.5, 0, 1, color=colour, linewidth=0.9)
    middle.set(ylim=(0, 1), yticks=[])
    middle.set_ylabel("genes", rotation=0, ha="right", va="center")
    scores = result.scores[row, order]
    bottom.fill_between(np.arange(len(scores)) + 0.5, scores, color=INK, alpha=0.35, linewidth=0,
                        rasterized=True)  # fmt: skip
    bottom.axhline(0, color=INK, linewidth=0.6)
    bottom.set(xlabel="rank, highest score first", ylabel="score", xlim=(0, len(scores)))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels((top, bottom))
    return figure

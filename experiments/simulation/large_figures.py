"""Figures 1C, S1, S2 and S13 of the paper, from `large`; each returns a matplotlib Figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.simulation.large_saes import chosen

if TYPE_CHECKING:
    from experiments.simulation.data import Cells, Large

STYLES = {
    "Y": ("black", "s"), "X''": ("#0173b2", "o"), "X'": ("#56b4e9", "o"), "X": ("#b3d8ee", "o"),
    "A": ("#029e73", "^"), "B": ("#d55e00", "v"),
}  # fmt: skip
COLORED = {"latents": "Latent dimension", "depth": "Hidden layers", "width": "Architecture"}
LOSS, FIT = "Validation loss (MSE)", "Superposition fit (R²)"
LEAST = -0.1  # R² below it is drawn on the edge
MARKERS = ("o", "s", "^", "D")  # of autoencoders
NULLS = {"permuted M": "#d55e00", "other cells": "#cc78bc", "untrained": "#029e73"}


def fits(table: pd.DataFrame) -> Figure:
    """1C: R² of every group over the validation loss, a point an autoencoder."""
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for group, (color, marker) in STYLES.items():
        axes.scatter(table["validation_loss"], table[group].clip(lower=LEAST), color=color,
                     marker=marker, s=30, alpha=0.85, label=group, linewidths=0)  # fmt: skip
    axes.set(ylabel=FIT, ylim=(LEAST - 0.03, 1.05))
    _losses(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="Variable")
    return figure


def fits_by_size(table: pd.DataFrame) -> Figure:
    """S2: the same, a row a group, coloured by latents, by hidden layers and by width."""
    figure = Figure(figsize=(10, 1.9 * len(STYLES)), layout="constrained")
    grid = figure.subplots(len(STYLES), 3, sharex=True, sharey="row")
    for column, (by, title) in enumerate(COLORED.items()):
        values = sorted(table[by].unique())
        colors = mpl.colormaps["viridis"](np.linspace(0.1, 0.9, len(values)))
        for row, group in enumerate(STYLES):
            for value, color in zip(values, colors, strict=True):
                some = table[table[by] == value]
                grid[row, column].scatter(some["validation_loss"], some[group].clip(lower=LEAST),
                                          color=color, s=26, alpha=0.85)  # fmt: skip
            grid[row, 0].set_ylabel(f"{group}\n{FIT}", fontsize=8)
        handles = [
            Line2D([], [], linestyle="", marker="o", color=c, label=v)
            for v, c in zip(values, colors, strict=True)
        ]
        grid[0, column].legend(handles=handles, title=title, frameon=False, ncols=len(values),
                               loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8,
                               handletextpad=0.1, columnspacing=0.8)  # fmt: skip
        _losses(grid[-1, column])
    return figure


def _losses(axes: Axes) -> None:
    """A logarithmic axis of them, with plain numbers."""
    axes.set(xscale="log", xlabel=LOSS)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def simulated(cells: Cells, simulation: Large) -> Figure:
    """S1 without its single-cell column: PCA of Y and of X'' by A and by B, values of Y."""
    from sklearn.decomposition import PCA

    y = simulation.counts(cells.x_active)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.subplot_mosaic([["ya", "yb", "h"], ["xa", "xb", "h"]])
    for letter, name, values in (("y", "Y", y), ("x", "X''", cells.x_active)):
        plane = PCA(2, random_state=0).fit_transform(values)
        by: dict[str, tuple[str, np.ndarray, Any]] = {
            "a": ("A (cell type)", cells.cell_type, "nipy_spectral"),
            "b": ("B (batch)", cells.batch, "viridis"),
        }
        for which, (title, codes, palette) in by.items():
            axes = grid[letter + which]
            axes.scatter(*plane.T, c=codes, cmap=palette, s=5, linewidths=0, rasterized=True)
            axes.set(title=f"simulated {name}, by {title}", xlabel="PC 1", ylabel="PC 2")
    grid["h"].hist(y.ravel(), bins=80, color="grey")
    share = float((np.abs(y) < 0.5).mean())
    grid["h"].set(title=f"values of Y ({share:.1%} within .5 of 0)", yscale="log", xlabel="Y",
                  ylabel="cells × genes")  # fmt: skip
    return figure


def recovery_and_structure(recovered: pd.DataFrame, structure: pd.DataFrame) -> Figure:
    """S13: highest correlations over the scaling factor, and coverage of M over the percentile.

    Left: means over `large_saes.chosen` of each autoencoder, bars one standard error over seeds.
    Right: boxes of X'', as in the paper, beside the means of three nulls, and of the share of all
    genes that the covering latents are connected to, all of which the paper lacks.
    """
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _recovery(left, recovered)
    _structure(right, structure)
    return figure


def _recovery(axes: Axes, recovered: pd.DataFrame) -> None:
    recovered = recovered[recovered["status"] == "trained"].sort_values("d_in", kind="stable")
    names = list(recovered["autoencoder"].unique())
    markers = dict(zip(names, MARKERS * len(names), strict=False))
    for name, marker in markers.items():
        some = chosen(recovered[recovered["autoencoder"] == name])
        for group, (color, _) in STYLES.items():
            found = some.groupby("scaling")[f"highest:{group}"].agg(["mean", "sem"])
            axes.errorbar(found.index, found["mean"], yerr=found["sem"].fillna(0), color=color,
                          marker=marker, markersize=5, linewidth=0.8, capsize=2)  # fmt: skip
    rate, weight = (some[column].iloc[0] for column in ("learning_rate", "l1_weight"))
    places = sorted(recovered["scaling"].unique())
    axes.set(xscale="log", xlabel="Hidden scaling factor", ylim=(min(0, axes.get_ylim()[0]), 1.03),
             ylabel="Maximum Pearson correlation",
             title=f"SAEs of rate {rate:g}, L1 weight {weight:g}")  # fmt: skip
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.xaxis.set_minor_formatter(NullFormatter())
    handles = [Line2D([], [], color=c, linewidth=3, label=g) for g, (c, _) in STYLES.items()]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color="grey", label=name)
        for name, marker in markers.items()
    ]
    axes.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _structure(axes: Axes, structure: pd.DataFrame) -> None:
    own = structure[structure["latents_of"] == "SAE"]
    places = sorted(structure["percentile"].unique())
    boxes = [own.loc[own["percentile"] == place, "coverage"] for place in places]
    # A notch is wider than the box of a few values, and folds over.
    axes.boxplot(boxes, positions=places, widths=6, notch=min(map(len, boxes)) >= 10,
                 showmeans=True, manage_ticks=False, flierprops={"markersize": 2},
                 meanprops={"marker": "o", "markerfacecolor": "red", "markeredgecolor": "red",
                            "markersize": 4},
                 medianprops={"color": "black"})  # fmt: skip
    for place, box in zip(places, boxes, strict=True):
        axes.annotate(str(len(box)), (place, 1.06), ha="center", fontsize=8)
    for kind, color in NULLS.items():
        mean = structure[structure["latents_of"] == kind].groupby("percentile")["coverage"].mean()
        axes.plot(mean.index, mean, color=color, marker=".", label=kind)
    share = own.groupby("percentile")["share"].mean()
    axes.plot(share.index, share, color="grey", linestyle="--", label="share of all genes")
    axes.set(xlabel="Percentile of cosine similarity", ylabel="Covered genes of an X''",
             ylim=(-0.03, 1.13), xticks=places,
             title="boxes: SAE; red: mean; above: X'' matched")  # fmt: skip
    axes.legend(frameon=False, title="nulls, means", loc="center left", bbox_to_anchor=(1, 0.5))

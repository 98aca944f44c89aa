"""Figures 1C, S1 and S2 of the paper, from `large`; each function returns a matplotlib Figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

if TYPE_CHECKING:
    from experiments.simulation.data import Cells, Large

STYLES = {
    "Y": ("black", "s"), "X''": ("#0173b2", "o"), "X'": ("#56b4e9", "o"), "X": ("#b3d8ee", "o"),
    "A": ("#029e73", "^"), "B": ("#d55e00", "v"),
}  # fmt: skip
COLORED = {"latents": "Latent dimension", "depth": "Hidden layers", "width": "Architecture"}
LOSS, FIT = "Validation loss (MSE)", "Superposition fit (R²)"
LEAST = -0.1  # R² below it is drawn on the edge


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

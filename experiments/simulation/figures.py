"""Figures S3 to S12 of the paper, from the tables of `small`.

Each function returns a matplotlib Figure. Lines are means over the other settings, bands and error
bars 1.96 standard errors of them. A `Rule` says which of the two counts and correlations is drawn.
Where the paper's captions of S7 to S10 and S12 say X, its code has X' (X times A); so have these.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.lines
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TYPES = ("Vanilla", "ReLU", "TopK")
TYPE_COLORS = {"Vanilla": "grey", "ReLU": "lightseagreen", "TopK": "darkorange"}
VARIABLE_COLORS = {"Y": "#0173b2", "X'": "#de8f05", "A": "#029e73", "X": "#d55e00"}
MARKERS = ("o", "X", "s", "P", "D", "^", "v", "*")
RATE = 1e-4
WIDTH = "SAE hidden dimensionality"
LABELS = {
    "train_mse": "MSE loss",
    "fraction_active": "Fraction of active neurons",
    "fraction_dead": "Fraction of dead neurons",
    "mean_active": "Active neurons\nper sample",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Columns of the results: the text's r, or the signed r of largest |r| and the code's |r|."""

    highest: str = "highest"
    count: str = "latents"

    @classmethod
    def of(cls, variant: str) -> Rule:
        """Of "text" or "code"."""
        return cls() if variant == "text" else cls("highest_signed", "latents_absolute")

    def labels(self) -> dict[str, str]:
        """Axis labels of the columns of all groups."""
        named = {f"{self.highest}:{g}": f"Highest correlation\nwith {g}" for g in VARIABLE_COLORS}
        counts = {f"{self.count}:{g}": f"N active neurons\nper {g}" for g in VARIABLE_COLORS}
        return LABELS | named | counts


def superpositions(autoencoders: Mapping[str, Mapping[str, Any]], truth: np.ndarray) -> Figure:
    """S3: losses by epoch, and each X' beside its superposition, a row an autoencoder.

    autoencoders: by title; train_loss and validation_loss [epochs], superposition [cells, 3] (the
    latents times the coefficients, without intercept, as the paper draws it) and r2 [3]. truth: X'
    [cells, 3].
    """
    rows = len(autoencoders)
    figure = Figure(figsize=(12, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False, gridspec_kw={"width_ratios": [2, 1, 1, 1]})
    for row, (letter, (title, found)) in enumerate(zip("ABCDEFGH", autoencoders.items())):  # noqa: B905
        losses, *panels = grid[row]
        for name, label in (("train_loss", "train loss"), ("validation_loss", "validation loss")):
            losses.plot(found[name], label=label, linewidth=1.2)
        losses.set(ylabel="MSE loss", ylim=(0, None), xlabel="Epoch" if row == rows - 1 else "")
        losses.set_title(f"{letter}   {title}", loc="left", fontsize=10, fontweight="bold")
        for j, panel in enumerate(panels):
            value = found["superposition"][:, j]
            # Counts repeat: a few thousand cells are a few hundred points.
            points = np.unique(np.stack([truth[:, j], value.round(3)], axis=1), axis=0)
            ends = [value.min(), value.max()]
            panel.plot(ends, ends, color="black", linewidth=0.7)
            panel.scatter(*points.T, s=14, color=list(VARIABLE_COLORS.values())[j], alpha=0.7)
            panel.text(
                0.95, 0.05, f"R²={found['r2'][j]:.2f}", transform=panel.transAxes, ha="right"
            )
            panel.set(xlabel=f"X'{'₁₂₃'[j]}" if row == rows - 1 else "")
        panels[0].set_ylabel("Superposition")
    grid[-1][0].legend(frameon=False)
    return figure


def overview(results: pd.DataFrame, rule: Rule) -> Figure:
    """S4: loss by width and by learning rate; correlation with X', and with every variable."""
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    a, b, c, d = figure.subplots(1, 4)
    chosen = at_rate(results)
    for axes, table, x, y in (
        (a, chosen, "n_latents", "train_mse"),
        (b, results, "learning_rate", "train_mse"),
        (c, chosen, "n_latents", f"{rule.highest}:X'"),
    ):
        _lines(axes, table, x, y, "type", TYPE_COLORS)
    long = chosen.melt("n_latents", [f"{rule.highest}:{g}" for g in VARIABLE_COLORS])
    long["variable"] = long["variable"].str.split(":").str[1]
    _lines(d, long, "n_latents", "value", "variable", VARIABLE_COLORS)
    a.set(title="A  Loss vs hidden size", xlabel=WIDTH, ylabel="MSE loss", yscale="log")
    b.set(title="B  Loss vs learning rate", xlabel="Learning rate", yscale="log")
    c.set(title="C  max(corr(neurons, X'))", xlabel=WIDTH, ylabel="Pearson correlation")
    d.set(title="D  max(corr(neurons, variables))", xlabel=WIDTH, ylabel="Pearson correlation")
    c.legend(frameon=False, title="SAE type")
    d.legend(frameon=False, title="Variable")
    return figure


def hyperparameters(results: pd.DataFrame) -> Figure:
    """S5: loss by width and rate, loss by width and penalty, active share by width and penalty."""
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    grid = figure.subplots(3, 3)
    for column, kind in enumerate(TYPES):
        chosen = results[results["type"] == kind]
        penalty = penalty_of(kind)
        for row, (y, by) in enumerate(
            (("train_mse", "learning_rate"), ("train_mse", penalty), ("fraction_active", penalty))
        ):
            axes = grid[row, column]
            _bars(axes, chosen, "n_latents", y, by)
            low = results["train_mse"].min()
            limits = {"yscale": "log", "ylim": (low / 2, 2 * results["train_mse"].max())}
            axes.set(title=kind if row == 0 else "", xlabel=WIDTH, ylabel=LABELS[y],
                     **(limits if y == "train_mse" else {"ylim": (0, 1.02)}))  # fmt: skip
            if column > 0 and not (row == 0 and column == 1):
                axes.legend(frameon=False, title=NAMES[by], loc="center left",
                            bbox_to_anchor=(1, 0.5), fontsize=8)  # fmt: skip
    return figure


def learning_rates(results: pd.DataFrame) -> Figure:
    """S6: active share by penalty and learning rate, at the width nearest 100 times the latents."""
    widths = results["scaling"].unique()
    scaling = widths[np.abs(np.log(widths / 100)).argmin()]
    chosen = results[results["scaling"] == scaling]
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 3), TYPES, strict=True):
        table = chosen[chosen["type"] == kind]
        _bars(axes, table, penalty_of(kind), "fraction_active", "learning_rate")
        axes.set(title=f"{kind}, {chosen['n_latents'].iloc[0]} latents",
                 xlabel=NAMES[penalty_of(kind)], ylabel=LABELS["fraction_active"],
                 ylim=(0, 1.02))  # fmt: skip
    axes.legend(frameon=False, title="Learning rate", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def by_width(results: pd.DataFrame, columns: Sequence[str], rule: Rule) -> Figure:
    """S7 and S8: a row a metric over width; all types together, then each by its penalty."""
    chosen = at_rate(results).assign(fraction_dead=lambda table: 1 - table["fraction_active"])
    figure = Figure(figsize=(14, 2.4 * len(columns) + 0.5), layout="constrained")
    grid = figure.subplots(len(columns), 4, sharex=True, sharey="row", squeeze=False)
    labels = rule.labels()
    for row, y in enumerate(columns):
        _lines(grid[row, 0], chosen, "n_latents", y, "type", TYPE_COLORS)
        for axes, kind in zip(grid[row, 1:], TYPES, strict=True):
            table = chosen[chosen["type"] == kind]
            _lines(axes, table, "n_latents", y, penalty_of(kind), _colors(table, penalty_of(kind)))
        counted = y.startswith(rule.count) or y in ("train_mse", "mean_active")
        grid[row, 0].set(ylabel=labels[y], yscale="log" if counted else "linear")
    for axes, title in zip(grid[0], ("All", *TYPES), strict=True):
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set_xlabel(WIDTH)
    for axes, title in zip(grid[-1], ("SAE type", "L1 weight", "L1 weight", "k (%)"), strict=True):
        axes.legend(frameon=False, title=title, loc="upper center", bbox_to_anchor=(0.5, -0.28),
                    ncols=3, fontsize=8)  # fmt: skip
    return figure


def sensitivity(results: pd.DataFrame, group: str, rule: Rule) -> Figure:
    """S9 (X') and S10 (Y): highest correlation over latents a variable; below, the grey box."""
    chosen = at_rate(results)
    x, y = f"{rule.count}:{group}", f"{rule.highest}:{group}"
    colors = _colors(chosen, "n_latents", "viridis")
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    grid = figure.subplots(2, 3)
    for column, kind in enumerate(TYPES):
        table = chosen[chosen["type"] == kind]
        penalties = sorted(table[penalty_of(kind)].unique())
        for row, axes in enumerate(grid[:, column]):
            axes.fill_between([1, 10], [0.95, 0.95], [1, 1], color="lightslategray", alpha=0.25)
            for marker, penalty in zip(itertools.cycle(MARKERS), penalties, strict=False):
                points = table[table[penalty_of(kind)] == penalty]
                axes.scatter(points[x], points[y], c=[colors[n] for n in points["n_latents"]],
                             marker=marker, s=42, edgecolors="white",
                             linewidths=0.4)  # fmt: skip
            axes.set(xlabel=f"N active neurons per {group}", title=kind if row == 0 else "",
                     ylabel=f"Highest correlation with {group}")  # fmt: skip
        grid[0, column].set(xscale="symlog", xlim=(-0.2, None), ylim=_correlations(chosen[y]))
        grid[0, column].xaxis.set_minor_locator(mpl.ticker.NullLocator())
        grid[1, column].set(xlim=(1, 10), ylim=(0.948, 1.002), xticks=range(1, 11))
        shapes = [
            _dot("black", f"{penalty:g}", marker)
            for marker, penalty in zip(itertools.cycle(MARKERS), penalties, strict=False)
        ]
        grid[1, column].legend(handles=shapes, frameon=False, title=NAMES[penalty_of(kind)],
                               ncols=3, fontsize=8, loc="upper center",
                               bbox_to_anchor=(0.5, -0.16))  # fmt: skip
    handles = [_dot(color, width) for width, color in colors.items()]
    figure.legend(handles=handles, loc="outside right upper", title=WIDTH.replace(" hidden ", "\n"),
                  frameon=False)  # fmt: skip
    return figure


def distant(results: pd.DataFrame, rule: Rule) -> Figure:
    """S11: highest correlation with A, and with X, over width.

    The paper's lower row is named B, which the small simulation does not have: its code plots the
    Bernoulli X there.
    """
    chosen = at_rate(results)
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    grid = figure.subplots(2, 3, sharey="row")
    widths = sorted(chosen["n_latents"].unique())
    for row, group in enumerate(("A", "X")):
        y = f"{rule.highest}:{group}"
        for axes, kind in zip(grid[row], TYPES, strict=True):
            table = chosen[chosen["type"] == kind]
            for penalty, color in _colors(table, penalty_of(kind)).items():
                points = table[table[penalty_of(kind)] == penalty]
                axes.scatter(np.searchsorted(widths, points["n_latents"]), points[y], s=26,
                             color=color, label=f"{penalty:g}", alpha=0.85)  # fmt: skip
            axes.set_xticks(range(len(widths)), widths, rotation=90)
            axes.set(title=kind if row == 0 else "", xlabel="N hidden neurons" if row else "",
                     ylim=_correlations(chosen[y]))  # fmt: skip
            if row:
                axes.legend(frameon=False, title=NAMES[penalty_of(kind)], ncols=3, fontsize=8,
                            loc="upper center", bbox_to_anchor=(0.5, -0.32))  # fmt: skip
        grid[row, 0].set_ylabel(f"Highest correlation with {group}")
    grid[1, 0].set_ylabel('Highest correlation with X\n("B" in the paper)')
    return figure


def redundancy(results: pd.DataFrame, rule: Rule) -> Figure:
    """S12: latents per X' over width, by L1 weight and by k."""
    chosen = at_rate(results)
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    pairs = ((chosen["type"] != "TopK", "l1_weight"), (chosen["type"] == "TopK", "k_percent"))
    for axes, (kept, by) in zip(figure.subplots(1, 2, sharey=True), pairs, strict=True):
        table = chosen[kept]
        _lines(axes, table, "n_latents", f"{rule.count}:X'", by, _colors(table, by))
        names = ", ".join(table["type"].unique())
        axes.set(title=f"Active neurons per X'\n({names})", xlabel=WIDTH, yscale="log",
                 ylabel="N active neurons")  # fmt: skip
        axes.legend(frameon=False, title=NAMES[by], loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


NAMES = {"learning_rate": "Learning rate", "l1_weight": "L1 weight", "k_percent": "k (%)"}


def penalty_of(kind: str) -> str:
    """The column of a type's sparsity parameter."""
    return "k_percent" if kind == "TopK" else "l1_weight"


def at_rate(results: pd.DataFrame) -> pd.DataFrame:
    """Those of learning rate 1e-4 (the k = 1 % that the paper's figures leave out, left out)."""
    return results[np.isclose(results["learning_rate"], RATE) & (results["k_percent"] != 1)]


def _dot(color: Any, label: object, marker: str = "o") -> mpl.lines.Line2D:
    """A point for a legend."""
    return mpl.lines.Line2D([], [], linestyle="", marker=marker, color=color, label=label)


def _correlations(values: pd.Series) -> tuple[float, float]:
    """Limits of an axis of correlations."""
    low = float(values.min())
    return low - 0.04 * (1.02 - low) - 0.01, 1.02


def _colors(table: pd.DataFrame, by: str, palette: str | None = None) -> dict[float, Any]:
    """A colour for each value of a column."""
    values = sorted(table[by].dropna().unique())
    palette = palette or {"k_percent": "magma_r", "learning_rate": "viridis"}.get(by, "viridis_r")
    shades = mpl.colormaps[palette](np.linspace(0.12, 0.92, max(len(values), 2)))
    return dict(zip(values, shades[: len(values)], strict=True))


def _lines(
    axes: Axes, table: pd.DataFrame, x: str, y: str, by: str, colors: Mapping[Any, Any]
) -> None:
    """Mean of y over x for each value of `by`, and a band of 1.96 standard errors."""
    for marker, (value, color) in zip(itertools.cycle(MARKERS), colors.items(), strict=False):
        found = table[table[by] == value].groupby(x)[y].agg(["mean", "sem"])
        if found.empty:
            continue
        label = value if isinstance(value, str) else f"{value:g}"
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.4}
        axes.plot(found.index, found["mean"], marker=marker, markersize=4.5, color=color,
                  linewidth=1.3, label=label, **edge)  # fmt: skip
        half = 1.96 * found["sem"].fillna(0)
        axes.fill_between(found.index, (found["mean"] - half).clip(lower=found["mean"] / 20),
                          found["mean"] + half, color=color, alpha=0.15, linewidth=0)  # fmt: skip
    axes.set_xscale("log")


def _bars(axes: Axes, table: pd.DataFrame, x: str, y: str, by: str) -> None:
    """Means of y in groups of x, a bar for each value of `by`."""
    places = sorted(table[x].unique())
    colors = _colors(table, by, "viridis")
    width = 0.8 / max(len(colors), 1)
    for i, (value, color) in enumerate(colors.items()):
        found = table[table[by] == value].groupby(x)[y].agg(["mean", "sem"]).reindex(places)
        half = 1.96 * found["sem"].fillna(0).to_numpy()
        low = np.minimum(half, 0.95 * found["mean"].to_numpy())  # an axis may be logarithmic
        axes.bar(np.arange(len(places)) + (i - (len(colors) - 1) / 2) * width, found["mean"],
                 width, color=color, yerr=[low, half], label=f"{value:g}",
                 error_kw={"linewidth": 0.8, "capsize": 1.5})  # fmt: skip
    axes.set_xticks(range(len(places)), [f"{place:g}" for place in places],
                    rotation=90 if len(places) > 6 else 0)  # fmt: skip

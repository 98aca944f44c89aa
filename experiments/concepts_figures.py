"""The figures of the study of concepts, after those of Claye et al."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import concept_terms, plots

COLOURS = {"strong": "#1b6ca8", "weak": "#8fc1e3", "none": "#dddddd"}


def strengths(shares: pd.DataFrame) -> Figure:
    """Figure 3A, b: share of concepts and of neurons by their best term; the paper's axis."""
    figure = Figure(figsize=(6.4, 0.7 + 0.45 * len(shares)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(shares))
    for kind in concept_terms.STRENGTHS:
        width = shares[kind].to_numpy()
        axes.barh(np.arange(len(shares)), width, left=left, color=COLOURS[kind], label=kind)
        left += width
    axes.set_yticks(np.arange(len(shares)), [f"{name} ({n})" for name, n in shares["n"].items()])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share, by the p of the best term (5e-5, 5e-3)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def replication(stability: pd.DataFrame) -> Figure:
    """Best cosine and best correlation of each concept with the other seeds, and the nulls'."""
    live = stability[stability["live"]]
    panels = {"best_cosine": "cosine_threshold", "best_correlation": "correlation_threshold"}
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    for axes, (name, threshold) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.hist(live[name].dropna(), bins=np.linspace(-0.2, 1, 49), color="#1b6ca8")
        axes.axvline(live[threshold].max(), color="black", linestyle="--", linewidth=1)
        axes.set(xlabel=f"{name.replace('_', ' ')} with another seed", ylabel="concepts")
        axes.spines[["top", "right"]].set_visible(False)
        axes.annotate(
            "null", (live[threshold].max(), axes.get_ylim()[1]), (3, -9),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    return figure


def confusion(tables: dict[tuple[str, str], pd.DataFrame]) -> Figure:
    """Confusion matrices by task (rows) and by what was learned from, shares of a class's cells."""
    tasks = list(dict.fromkeys(task for task, _ in tables))
    columns = list(dict.fromkeys(name for _, name in tables))
    size = max(2.4, 0.42 * max(len(table) for table in tables.values()) + 1.4)
    figure = Figure(figsize=(size * len(columns), size * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(columns), squeeze=False)
    for (task, name), table in tables.items():
        axes = grid[tasks.index(task), columns.index(name)]
        share = table.to_numpy(float) / np.maximum(table.to_numpy(float).sum(axis=1), 1)[:, None]
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        labels = [plots.plain(label, 18) for label in table.index]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_title(plots.plain(f"{task}: {name}"), fontsize=9)
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                axes.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center",
                          fontsize=6, color="white" if value > 0.6 else "black")  # fmt: skip
    for axes in grid[:, 0]:
        axes.set_ylabel("class of the cells")
    return figure


def attributed(features: pd.DataFrame, shown: list[str], scores: Any, genes: Any) -> Figure:
    """Bars of the ten genes that most drive each of a few features, as an expert sees them."""
    figure = Figure(figsize=(2.5 * len(shown), 2.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        row = scores[name]
        order = np.argsort(-row, kind="stable")[:10]
        axes.barh(np.arange(len(order)), row[order], color="#1b6ca8")
        axes.set_yticks(
            np.arange(len(order)), [plots.plain(genes[g], 20) for g in order], fontsize=7
        )
        axes.invert_yaxis()
        axes.set_xlabel("drop in activation", fontsize=8)
        axes.set_title(f"{name}\n{term(features.loc[name], 'attribution')}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def term(row: pd.Series, method: str) -> str:
    """A feature's best term by attribution or dge, for a title; "no term" where none was tested."""
    found = row[f"{method}:term"]
    return plots.plain(found, 30) if pd.notna(found) else "no term"

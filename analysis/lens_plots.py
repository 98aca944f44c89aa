"""Figures of a dictionary's features: counted, mapped, compared (Schuster, Figures S14 to S32).

Those of cells are in `cell_plots`, the map that S22, S30 and 3A colour is `feature_space.figure`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike
from scipy import sparse

from analysis import feature_space
from analysis.cell_plots import BLUE, HALO, INK, ORANGE, colours, spread
from analysis.features import Matrix
from analysis.matching import AnnotationMatching
from analysis.plots import plain
from sae_jax.errors import InputError

KIND_COLOURS = {"global": BLUE, "local": ORANGE, "dead": INK}
CATEGORY_COLOURS = ("#009e73", "#cc79a7", "#56b4e9", INK)
BINS = 30
SMALLEST_Q = 1e-300


def training_loss(history: pd.DataFrame) -> Figure:
    """Loss, and the loss on a log scale, over epochs; dashed: of the held-out rows (Figure S14).

    Args:
        history: as `sae_jax.train` returns it: `member`, `epoch`, `loss`, `validation_loss`.
    """
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    names = {"loss": ("-", "training"), "validation_loss": ("--", "held-out rows")}
    for axes in panels:
        members = history.groupby("member")
        for colour, (_, rows) in zip(colours(len(members)), members, strict=True):
            for column, (style, name) in names.items():
                if rows[column].notna().any():
                    axes.plot(rows["epoch"], rows[column], style, color=colour, linewidth=1.4,
                              label=name)  # fmt: skip
        axes.set(xlabel="epoch", ylabel="loss")
        axes.grid(alpha=0.25)
    if (history["loss"] > 0).any():
        panels[1].set(yscale="log", ylabel="loss (log scale)")
    by_name = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    panels[0].legend(by_name.values(), by_name.keys(), frameon=False)
    return figure


def activity(table: pd.DataFrame, rule: str = "text") -> Figure:
    """Features by mean and maximum activation and by active cells, by kind (Figure S16).

    Args:
        table: one row per live feature: `mean_activation`, `max_activation`, `n_active` as
            `features.activity` has them, and `kind_<rule>` where there are labels.
        rule: of eq. 8, "text" or "code".
    """
    kind = table.get(f"kind_{rule}")
    figure = Figure(figsize=(10.5, 3.3), layout="constrained")
    columns = {
        "mean_activation": "mean activation",
        "max_activation": "maximum activation",
        "n_active": "cells in which it is active",
    }
    panels = figure.subplots(1, 3)
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        _histogram(axes, _by_kind(table[column], kind))
        axes.set_xlabel(title)
    panels[0].set_ylabel("features")
    _legend(figure, panels[0])
    return figure


def local_features(table: pd.DataFrame, labels: pd.Series, rule: str = "text") -> Figure:
    """Local features of each label, and beside the label's number of cells (Figures S17, S27).

    Labels have the numbers and colours of `cell_plots.embedding`.

    Args:
        table: one row per live feature: `kind_<rule>`, `local_label_<rule>`.
        labels: one per cell.
    """
    label = pd.Categorical(labels).remove_unused_categories()
    of = table.loc[table[f"kind_{rule}"] == "local", f"local_label_{rule}"].astype(object)
    n_local = of.value_counts().reindex(label.categories, fill_value=0).to_numpy()
    order = np.argsort(-n_local, kind="stable")
    colour = np.array(colours(len(order)))
    cells = np.bincount(label.codes[label.codes >= 0])
    figure = Figure(figsize=(10, max(3.4, 1 + 0.2 * len(order))), layout="constrained")
    bars, dots = figure.subplots(1, 2, width_ratios=[1.2, 1])
    bars.barh(range(len(order)), n_local[order], color=colour[order])
    names = [f"{plain(label.categories[i], 40)}  {i + 1}" for i in order]
    bars.set_yticks(range(len(order)), names, fontsize=7)
    bars.invert_yaxis()
    bars.set(xlabel="local features", ylabel=plain(labels.name))
    dots.scatter(cells, n_local, c=colour, s=36, zorder=2)
    for i, (x, y) in enumerate(zip(cells, n_local, strict=True)):
        dots.annotate(str(i + 1), (x, y), (4, 4), textcoords="offset points", fontsize=7,
                      path_effects=HALO)  # fmt: skip
    dots.set(xlabel="cells", ylabel="local features", xscale="log")
    for axes in (bars, dots):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def cells_and_features(z: Matrix) -> Figure:
    """Features by the cells in which they fire, and cells by the features that fire (Figure S28).

    The paper's "histogram of features over cells" can be either. Dead features are left out.
    """
    z = sparse.csr_array(z)
    n_cells = z.count_nonzero(axis=0)
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _histogram(left, {"": n_cells[n_cells > 0]})
    left.set(xlabel="cells in which a feature fires", ylabel="features")
    _histogram(right, {"": z.count_nonzero(axis=1)}, log_y=False)
    right.set(xlabel="features that fire in a cell", ylabel="cells")
    return figure


def volcano(experiments: Mapping[str, pd.DataFrame], most: int = 8) -> Figure:
    """Genes by log2 fold change and q, a row an experiment (Figure S21).

    Coloured: q < .05 and a fold change of at least 2 either way. Named: the most significant of
    these, in the margins. A change that is not finite (a gene without counts on one side) is drawn
    at the edge, as a triangle; q below 1e-300 at 1e-300; a gene without q is not drawn.

    Args:
        experiments: of each title one row per gene (index): `log2_fold_change`, `q`.
        most: genes that are named on each side.
    """
    if not experiments:
        raise InputError("no experiments: give at least one.")
    figure = Figure(figsize=(7, 3.4 * len(experiments)), layout="constrained")
    rows = figure.subplots(len(experiments), 1, squeeze=False).flat
    for axes, (title, table) in zip(rows, experiments.items(), strict=True):
        table = table[table["q"].notna() & table["log2_fold_change"].notna()]
        change = table["log2_fold_change"].to_numpy(np.float64)
        height = -np.log10(np.maximum(table["q"].to_numpy(np.float64), SMALLEST_Q))
        finite = np.abs(change[np.isfinite(change)])
        edge = 1.1 * max(finite.max(initial=0), 1.5)
        x = np.clip(change, -edge, edge)
        strong = (table["q"].to_numpy() < 0.05) & (np.abs(change) >= 1)
        top = max(height.max(initial=0), 2) * 1.05
        for chosen, colour, name in (
            (~strong, "#9e9e9e", "other genes"), (strong, ORANGE, "q < .05, fold change ≥ 2"),
        ):  # fmt: skip
            for where, marker in ((np.isfinite(change), "o"), (~np.isfinite(change), "^")):
                rest = chosen & where
                axes.scatter(x[rest], height[rest], s=9, c=colour, marker=marker, linewidths=0,
                             rasterized=True, label=name if marker == "o" else None)  # fmt: skip
        for sign in (-1, 1):
            named = np.flatnonzero(strong & (np.sign(change) == sign))
            named = named[np.argsort(-height[named], kind="stable")[:most]]
            at = spread(height[named], 0.06 * top, 0.03 * top, 0.97 * top)
            for gene, y in zip(named, at, strict=True):
                axes.annotate(
                    plain(table.index[gene], 16), (x[gene], height[gene]), (sign * 1.12 * edge, y),
                    fontsize=6.5, va="center", ha="left" if sign > 0 else "right",
                    arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.5,
                                "shrinkA": 0, "shrinkB": 1},
                )  # fmt: skip
        axes.axhline(-np.log10(0.05), color=INK, linewidth=0.5, linestyle=":")
        axes.set(xlim=(-1.4 * edge, 1.4 * edge), ylim=(-0.02 * top, top), ylabel="-log10 q")
        axes.set_title(plain(title), fontsize=9)
    axes.set_xlabel("log2 fold change")
    _legend(figure, axes)
    return figure


def term_counts(frequencies: pd.DataFrame, category: Mapping[str, str] | None = None) -> Figure:
    """Terms by how many features they name: by kind, and by category (Figures S23, S29).

    Args:
        frequencies: of `feature_space.term_frequencies`: index term, `n_features`, and `n_<kind>`
            where features have kinds. A term counts for a kind if it names a feature of it.
        category: of terms, such as their branch of the Gene Ontology.
    """
    kinds = {
        column[2:]: frequencies[column]
        for column in frequencies
        if column.startswith("n_") and column != "n_features"
    } or {"": frequencies["n_features"]}
    parts = [kinds]
    if category is not None:
        of = frequencies.index.map(category).astype(object)
        groups = frequencies["n_features"].groupby(of.fillna("other"))
        parts.append(dict(iter(groups)))
    figure = Figure(figsize=(4.4 * len(parts), 3.6), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False, sharex=True).flat
    for axes, values in zip(panels, parts, strict=True):
        _histogram(axes, {name: n[n > 0] for name, n in values.items()}, log_x=True)
        axes.set(xlabel="features that a term names", ylabel="terms")
        if "" not in values:
            axes.legend(frameon=False, fontsize=8, loc="lower center", ncols=3,
                        bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    return figure


def highlighted(coordinates: np.ndarray, names: Sequence[str], chosen: Iterable[str]) -> Figure:
    """The map of features with some of them large and named (Figure S24).

    Args:
        coordinates: [features, 2] of `feature_space.plane`; a feature at NaN is not drawn.
        names: of the features. chosen: some of these; those without a place are left out.
    """
    at = pd.Index(names).get_indexer(list(chosen))
    if (at < 0).any():
        raise InputError(f"{int((at < 0).sum())} of the chosen features are not among the names.")
    at = at[np.isfinite(coordinates[at]).all(axis=1)]
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    size = float(np.clip(12000 / max(len(coordinates), 1), 1.5, 16.0))
    axes.scatter(*coordinates.T, s=size, c="#9ecae1", linewidths=0, rasterized=True)
    axes.scatter(*coordinates[at].T, s=60, c=colours(len(at)), edgecolors=INK, linewidths=0.6)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    heights = spread(coordinates[at, 1], 0.035 * (high - low), low, high)
    for feature, height in zip(at, heights, strict=True):
        where = (coordinates[feature, 0] + 0.03 * (right - left), height)
        axes.annotate(
            plain(names[feature], 24), coordinates[feature], where, fontsize=8, va="center",
            path_effects=HALO, arrowprops={"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0},
        )  # fmt: skip
    axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    return figure


def probed(
    annotated: feature_space.FeatureTerms, words: Sequence[str], most: int = 8
) -> dict[str, pd.Categorical | np.ndarray]:
    """Colour keys for `feature_space.figure`: by word, which term holds it (Figures S25, S31).

    A feature with several such terms gets the most special one (that names the fewest features) of
    the `most` that name the most features; "other terms" if it has none of these; NaN for no term.
    A word that no term holds has False for all features.
    """
    found = feature_space.probe(annotated, words)
    n_features = found.groupby(["word", "term"])["feature"].size()
    keys = {}
    for word in words:
        hits = found[found["word"] == word]
        if hits.empty:
            keys[f"{word} (0 features)"] = np.zeros(annotated.matrix.shape[0], bool)
            continue
        shown = n_features[word].sort_values(ascending=False, kind="stable").index[:most]
        names = [*shown, "other terms"]
        # Of a term's place: the last of those shown is the most special, then the "other terms".
        place = pd.Index(shown).get_indexer(hits["term"])
        best = pd.Series(place).groupby(hits["feature"].to_numpy()).max()
        codes = np.full(annotated.matrix.shape[0], -1)
        codes[best.index.to_numpy(np.int64)] = np.where(best < 0, len(shown), best)
        title = f"{word} ({int((codes >= 0).sum())} features)"
        keys[title] = pd.Categorical.from_codes(codes, names).remove_unused_categories()
    return keys


def shared_term_counts(found: AnnotationMatching, a: str = "a", b: str = "b") -> Figure:
    """Features that each shared term names in the one and the other dictionary (Figure S32)."""
    shared = found.terms[(found.terms["a"] > 0) & (found.terms["b"] > 0)]
    if shared.empty:
        raise InputError("the dictionaries share no term: there is nothing to draw.")
    figure = Figure(figsize=(4.8, 4.9), layout="constrained")
    axes = figure.subplots()
    axes.scatter(shared["a"], shared["b"], s=14, alpha=0.5, c=BLUE, linewidths=0, rasterized=True)
    ends = (0.8, 1.25 * float(shared.to_numpy().max()))
    axes.plot(ends, ends, color=INK, linewidth=0.6, linestyle=":")
    axes.set(
        xscale="log", yscale="log", xlim=ends, ylim=ends,
        xlabel=f"features of a shared term, {plain(a, 40)}",
        ylabel=f"features of a shared term, {plain(b, 40)}",
    )  # fmt: skip
    axes.set_title(
        f"{len(shared)} terms, Pearson {found.pearson:.2f}, Spearman {found.spearman:.2f}",
        fontsize=9,
    )
    return figure


def _by_kind(values: pd.Series, kind: pd.Series | None) -> dict[str, pd.Series]:
    if kind is None:
        return {"": values}
    return {name: values[kind == name] for name in KIND_COLOURS if (kind == name).any()}


def _histogram(
    axes: Axes, values: Mapping[str, ArrayLike], *, log_x: bool = False, log_y: bool = True
) -> None:
    """One histogram over another, in the same bins; `log_x` is for counts from 1 on."""
    values = {name: np.asarray(some) for name, some in values.items()}
    together = np.concatenate([*values.values(), np.zeros(0)])
    low, high = (together.min(), together.max()) if together.size else (0, 1)
    if log_x:
        edges = np.unique(np.ceil(np.geomspace(1, high + 1, BINS + 1))) - 0.5
    elif (together % 1 == 0).all():  # integers: each bin holds equally many
        step = int(np.ceil((high - low + 1) / BINS))
        edges = np.arange(low, high + step + 1, step) - 0.5
    else:
        edges = np.histogram_bin_edges(together, BINS)
    spare = itertools.cycle(CATEGORY_COLOURS)
    for name, some in values.items():
        colour = BLUE if name == "" else KIND_COLOURS.get(name) or next(spare)
        counts, _ = np.histogram(some, edges)
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(counts, edges, color=colour, linewidth=1.2, label=name, zorder=2)
    for chosen, axis in ((log_x, axes.xaxis), (log_y, axes.yaxis)):
        if chosen:
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    if log_y:
        axes.set_ylim(bottom=0.6)  # a bin of one must show
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, beside them; none for a single group without a name."""
    handles, names = axes.get_legend_handles_labels()
    if any(names):
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False,
                      fontsize=8)  # fmt: skip

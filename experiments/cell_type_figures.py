"""The figures of `cell_type_programs`: what the reduction does, what layers know, what tells types.

The paper prints tables only; these show the same numbers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from scipy import sparse

from analysis import cell_types, plots
from analysis.cell_plots import BLUE, INK, ORANGE, colours
from analysis.plots import plain
from experiments.cell_type_features import Cells

GREEN, GREY = "#009e73", "#9e9e9e"
OF_FEATURES = {"latents": (BLUE, "o"), "components": (ORANGE, "s"), "dimensions": (GREY, "^")}
SEVERAL = 3  # layers in one figure of curves
PANELS = 11


def draw(
    out: Path,
    tables: dict[str, pd.DataFrame],
    shown: dict[str, Any],
    vectors: np.ndarray,
    z: np.ndarray,
    cells: Cells,
) -> dict[str, Path]:
    """Write every figure that the tables allow into `out`/figures; the PNG of each name.

    Args:
        tables: as the program writes them.
        shown: which dictionary the last ones are of, a row of the summary.
        vectors, z: cells' vectors [cells, d] and codes [cells, latents] of that layer.
        cells: these cells.
    """
    pictures = {}

    def keep(name: str, figure: Figure) -> None:
        pictures[name] = plots.save(figure, out / "figures", name)

    keep("reduction", reduction(tables["table_2"]))
    keep("layers", layers(tables["layers"], shown))
    if tables["layers"]["n_latents"].nunique() > 1:
        keep("widths", widths(tables, shown))
    labels = of_shown(tables["labels"], shown)
    keep("types", types(labels, tables["layers"], shown))
    if "sets" in tables:
        sets = of_shown(tables["sets"], shown, ("latents",))
        if len(sets):
            keep("marker_sets", marker_sets(sets, shown["alive"]))
    chosen = labels[(labels["features"] == "latents") & (labels["sides"] == "one")]
    chosen = chosen[chosen["held_out"]].sort_values("auroc", ascending=False, kind="stable")
    best = list(dict.fromkeys(chosen["feature"]))[:PANELS]
    names = titles(best, of_shown(tables["features"], shown, ("latents",)))
    areas = cell_types.areas(z[:, best], cells.labels, cells.choose, cells.measure, cells.least)
    keep("label_auroc", plots.label_heatmap(pd.DataFrame(areas.measured.T, areas.labels), names))
    coordinates, axis = plots.plane(vectors)
    keep("cells", plots.cells_by_feature(coordinates, axis, sparse.csr_matrix(z[:, best]), names,
                                         cells.labels))  # fmt: skip
    return pictures


def of_shown(
    table: pd.DataFrame,
    shown: dict[str, Any],
    kinds: Sequence[str] = ("latents", "components", "dimensions"),
) -> pd.DataFrame:
    """The rows of the dictionary that is shown, and of what it is compared with."""
    same = (table["layer"] == shown["layer"]) & (table["cell_features"] == shown["cell_features"])
    member = (table["features"] != "latents") | (table["member"] == shown["member"])
    return table[same & member & table["features"].isin(kinds)]


def titles(chosen: Sequence[int], table: pd.DataFrame) -> list[str]:
    """Of each feature its number and the marker sets, or the gene, that it goes along with."""
    table = table.set_index("feature").reindex(chosen)
    sets, genes = table["marker_sets"], table["top_genes"].astype(object)
    return [
        f"{feature}: {named.split('; ')[0] if isinstance(named, str) else _first(gene)}"
        for feature, named, gene in zip(chosen, sets, genes, strict=True)
    ]


def _first(genes: object) -> str:
    return genes.split(", ")[0] if isinstance(genes, str) else "no genes"


def reduction(table: pd.DataFrame) -> Figure:
    """L0 and R² over the penalty, by reduction; dotted: the mean's, in units of the sum.

    The same number penalises n_latents / d times as much under sums: moved by that factor, the
    mean's curve lies near the sum's (not on it: gradients are clipped at the same norm). First,
    middle and last layer; the narrowest dictionaries.
    """
    table = table[table["n_latents"] == table["n_latents"].min()].drop_duplicates(
        ["layer", "trained_on", "reduction", "l1_weight"]
    )
    of = table["layer"] + np.where(
        table.groupby("layer")["trained_on"].transform("nunique") > 1,
        ", " + table["trained_on"], "",
    )  # fmt: skip
    names = list(dict.fromkeys(of))
    some = np.unique(np.linspace(0, len(names) - 1, SEVERAL).round().astype(int))
    figure = Figure(figsize=(9.2, 3.7), layout="constrained")
    panels = figure.subplots(1, 2)
    for colour, place in zip(colours(len(some)), some, strict=True):
        rows = table[of == names[place]].sort_values("l1_weight")
        for kind, style in {"mean": "-o", "sum": "--s"}.items():
            part = rows[rows["reduction"] == kind]
            for axes, column in zip(panels, ("l0", "r2"), strict=True):
                axes.plot(part["l1_weight"], part[column], style, color=colour, markersize=4,
                          linewidth=1.4, label=f"{plain(names[place])}, {kind}")  # fmt: skip
                if kind == "mean":
                    axes.plot(part["l1_weight_as_sum"], part[column], ":", color=colour,
                              linewidth=2.4, alpha=0.55,
                              label=f"{plain(names[place])}, mean × d / latents")  # fmt: skip
    for axes, name in zip(panels, ("active latents a row (L0)", "R²"), strict=True):
        axes.set(xscale="log", xlabel="penalty λ, as it is given", ylabel=name)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
    panels[0].set_ylim(bottom=0)
    _legend(figure, panels[0], 3)
    return figure


def layers(table: pd.DataFrame, shown: dict[str, Any]) -> Figure:
    """Over layers: mean best AUROC, types told above 0.8, and the share with a marker set.

    Held-out cells, one side. Lines: latents by penalty; components and dimensions; and on the
    right, dotted, what sets of other genes of like expression would give.
    """
    table = table[table["cell_features"] == shown["cell_features"]]
    same = table["reduction"] == shown["reduction"]
    same &= table["n_latents"] == shown["n_latents"]
    table = table[same | (table["features"] != "latents")]
    names = list(dict.fromkeys(table["layer"]))
    place = table["layer"].map({name: i for i, name in enumerate(names)})
    weights = sorted(table["l1_weight"].dropna().unique())
    lines = {f"latents, λ = {weight:g}": table["l1_weight"] == weight for weight in weights}
    lines |= {kind: table["features"] == kind for kind in ("components", "dimensions")}
    shades = [*_shades(len(weights)), ORANGE, GREY]
    columns = {"auroc_one": "mean best AUROC", "types_one": "types told (AUROC > 0.8)",
               "share_annotated_one": "share with a marker set"}  # fmt: skip
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for (name, which), colour in zip(lines.items(), shades, strict=True):
            rows = table[which].assign(place=place).sort_values("place")
            axes.plot(rows["place"], rows[column], "-o", color=colour, markersize=4, linewidth=1.4,
                      label=name)  # fmt: skip
            if column == "share_annotated_one":
                axes.plot(rows["place"], rows["share_relabelled_annotated_one"], ":",
                          marker=".", color=colour, linewidth=1.2)  # fmt: skip
        axes.set_xticks(range(len(names)), [plain(n.removeprefix("layer_")) for n in names])
        axes.set(xlabel="layer", ylabel=title, xlim=(-0.4, len(names) - 0.6))
        axes.grid(alpha=0.25)
    panels[0].axhline(0.5, color=INK, linewidth=0.6, linestyle=":")
    panels[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(bottom=0)
    _legend(figure, panels[0], 4)
    return figure


def widths(tables: dict[str, pd.DataFrame], shown: dict[str, Any]) -> Figure:
    """Over the width, in the layer that is shown: AUROC, share alive, R², by penalty."""
    of = {
        name: tables[name][
            (tables[name]["layer"] == shown["layer"])
            & (tables[name]["cell_features"] == shown["cell_features"])
            & (tables[name]["reduction"] == shown["reduction"])
        ]
        for name in ("layers", "table_2")
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    weights = sorted(of["table_2"]["l1_weight"].unique())
    for colour, weight in zip(_shades(len(weights)), weights, strict=True):
        studied, trained = (
            rows[rows["l1_weight"] == weight].sort_values("n_latents") for rows in of.values()
        )
        for axes, x, y in (
            (panels[0], studied["n_latents"], studied["auroc_one"]),
            (panels[1], trained["n_latents"], trained["alive"] / trained["n_latents"]),
            (panels[2], trained["n_latents"], trained["r2"]),
        ):
            axes.plot(x, y, "-o", color=colour, markersize=4, label=f"λ = {weight:g}")
    for axes, title in zip(
        panels, ("mean best AUROC", "share of latents alive", "R²"), strict=True
    ):
        axes.set(xscale="log", xlabel="latents", ylabel=title)
        axes.set_xticks(sorted(of["table_2"]["n_latents"].unique()))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    panels[1].set_ylim(0, 1.05)
    _legend(figure, panels[0], 5)
    return figure


def types(labels: pd.DataFrame, summary: pd.DataFrame, shown: dict[str, Any]) -> Figure:
    """The best feature of every type, held out (filled) and where it was chosen (hollow).

    Left with one side for all, right with both for all.
    """
    held_out = labels[labels["held_out"]]
    order = held_out[(held_out["features"] == "latents") & (held_out["sides"] == "one")]
    names = list(order.sort_values("auroc", kind="stable")["label"])
    figure = Figure(figsize=(9.6, 1.5 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, sides in zip(panels, cell_types.SIDES, strict=True):
        of = held_out[held_out["sides"] == sides]
        for offset, (kind, (colour, marker)) in zip(
            (0.2, 0, -0.2), OF_FEATURES.items(), strict=True
        ):
            rows = of[of["features"] == kind].set_index("label").reindex(names)
            y = np.arange(len(names)) + offset
            axes.hlines(y, rows["auroc"], rows["auroc_chosen"], color=colour, linewidth=0.8)
            axes.plot(rows["auroc_chosen"], y, marker, mfc="white", mec=colour, markersize=5)
            axes.plot(rows["auroc"], y, marker, color=colour, markersize=5, label=kind)
        axes.axvline(cell_types.SPECIFIC, color=INK, linewidth=0.7, linestyle="--")
        axes.axvline(0.5, color=INK, linewidth=0.6, linestyle=":")
        axes.set(xlabel="AUROC of the best one", title=f"{sides} side{'s' * (sides == 'two')}")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.25, axis="x")
    panels[0].set_yticks(range(len(names)), [plain(name, 40) for name in names], fontsize=8)
    _legend(figure, panels[0], 3)
    return figure


def marker_sets(sets: pd.DataFrame, alive: int) -> Figure:
    """Features with each set among their genes, beside permuted cells and other genes."""
    sets = sets.sort_values("found", kind="stable")
    bars = {
        "found": (BLUE, "found"),
        "relabelled_found": (ORANGE, "genes of like expression"),
        "permuted_found": (GREY, "permuted cells"),
    }
    figure = Figure(figsize=(7.4, 1.4 + 0.34 * len(sets)), layout="constrained")
    axes = figure.subplots()
    for offset, (column, (colour, name)) in zip((0.26, 0, -0.26), bars.items(), strict=True):
        axes.barh(np.arange(len(sets)) + offset, sets[column], 0.25, color=colour, label=name)
    names = [
        f"{plain(name, 40)} ({size})" for name, size in zip(sets["set"], sets["genes"], strict=True)
    ]
    axes.set_yticks(range(len(sets)), names, fontsize=8)
    axes.set_xlabel(f"features (of {int(alive)} alive) with the set at q < .05")
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes, 3)
    return figure


def _shades(n: int) -> list[Any]:
    """Of one hue, from pale to dark."""
    import matplotlib as mpl

    return [mpl.colormaps["Blues"](value) for value in np.linspace(0.35, 1, n)]


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, above them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns,
                  frameon=False, fontsize=8)  # fmt: skip

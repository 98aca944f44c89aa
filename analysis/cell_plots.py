"""Figures of cells, and of features that fire in them (Schuster, Figures 2, S15, S18 to S20, S26).

Activations come as in `features`, cells by features. Cells lie in the plane of the embedding's
first two principal components, fitted once by `components`, so that steered cells lie in the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy import optimize, sparse
from sklearn.decomposition import PCA

from analysis.characterisation import Z_95
from analysis.features import Matrix
from analysis.plots import GREY, plain
from sae_jax.errors import InputError

MOST_PIXELS = (700, 1200)  # rows and columns of a heat map; a screen shows no more
INK, BLUE, ORANGE = "#222222", "#0072b2", "#d55e00"  # told apart by all eyes
HALO = [patheffects.withStroke(linewidth=2, foreground="white")]


def components(x: np.ndarray) -> PCA:
    """The plane of the first two principal components of an embedding [cells, d], fitted."""
    if np.ndim(x) != 2 or min(np.shape(x)) < 2:
        raise InputError(f"the embedding has shape {np.shape(x)}: a plane needs at least 2 by 2.")
    return PCA(2, random_state=0).fit(x)


def colours(n: int) -> list[tuple[float, float, float]]:
    """One for each of n labels: ten strong ones, ten pale ones, and again from the first."""
    palette = mpl.colormaps["tab20"].colors
    return [palette[2 * i % 20 + i // 10 % 2] for i in range(n)]


def spread(positions: ArrayLike, gap: float, low: float, high: float) -> np.ndarray:
    """Positions of texts, moved as little as possible (least squares) to lie `gap` apart.

    Between low and high, or a smaller gap where they do not fit. Ascending positions stay in order.
    """
    wanted = np.asarray(positions, np.float64)
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    steps = gap * np.arange(len(wanted))
    found = np.empty(len(wanted))
    if len(wanted):
        level = optimize.isotonic_regression(wanted[order] - steps).x
        found[order] = np.clip(level, low, max(low, high - steps[-1])) + steps
    return found


def embedding(x: np.ndarray, labels: pd.Series | None, seed: int = 0) -> Figure:
    """Principal components (left) and UMAP (right) of an embedding, by label (Figure S26).

    UMAP with 20 neighbours and a minimum distance of 0.2. The paper's spread of 0 is not possible
    (it must not be below the minimum distance), so it is UMAP's own, 1. Without umap-learn there is
    the left panel only. Labels are numbered on the map: 20 colours are hard to tell apart.

    Args:
        x: [cells, d]. labels: one per cell; cells without one are grey. seed: of UMAP.
    """
    plane = components(x)
    share = plane.explained_variance_ratio_
    maps = [(plane.transform(x), f"PC 1 ({share[0]:.0%})", f"PC 2 ({share[1]:.0%})")]
    with contextlib.suppress(ImportError):
        import umap

        neighbours = min(20, len(x) - 1)
        model = umap.UMAP(n_neighbors=neighbours, min_dist=0.2, random_state=seed, n_jobs=1)
        maps.append((model.fit_transform(x), "UMAP 1", "UMAP 2"))
    figure = Figure(figsize=(4.6 * len(maps) + 2, 4.4), layout="constrained")
    for axes, (xy, first, second) in zip(
        figure.subplots(1, len(maps), squeeze=False).flat, maps, strict=True
    ):
        _by_label(axes, xy, labels)
        axes.set(xlabel=first, ylabel=second, xticks=[], yticks=[])
    handles, names = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(
            handles, names, loc="outside right center", frameon=False, fontsize=7,
            title=plain(labels.name), title_fontsize=8, ncols=-(-len(names) // 26),
        )  # fmt: skip
        for handle in legend.legend_handles:
            handle.set_sizes([28])
    return figure


def feature_panels(
    xy: np.ndarray, z: Matrix, titles: Sequence[str], axis_name: str = "PC"
) -> Figure:
    """Cells coloured and sized by the activation of a feature, a panel each (Figures 2A, 2C).

    Silent cells are small and grey; the most active ones lie on top.

    Args:
        xy: of the cells [cells, 2]. z: activations [cells, features], one feature per title.
    """
    if np.shape(z) != (len(xy), len(titles)) or not len(titles):
        raise InputError(f"z has shape {np.shape(z)} for {len(xy)} cells and {len(titles)} titles.")
    size = _size(len(xy))
    figure, panels = _panels(len(titles), 3.4, 3.2)
    for axes, title, feature in zip(panels, titles, sparse.csc_array(z).T, strict=True):
        values = feature.toarray().ravel()
        active = np.flatnonzero(values)
        active = active[np.argsort(values[active], kind="stable")]
        axes.scatter(*xy[values == 0].T, s=size, c=GREY, linewidths=0, rasterized=True)
        of_most = values[active] / max(values.max(), np.finfo(float).tiny)
        dots = axes.scatter(
            *xy[active].T, s=max(size, 2.5) * (1 + 4 * of_most), c=values[active], cmap="viridis_r",
            linewidths=0, rasterized=True,
        )  # fmt: skip
        axes.set_title(plain(title, 44), fontsize=8)
        axes.set(xticks=[], yticks=[])
        if active.size:
            figure.colorbar(dots, ax=axes, shrink=0.6, pad=0.01).ax.tick_params(labelsize=6)
    figure.supxlabel(f"{axis_name} 1", fontsize=8)
    figure.supylabel(f"{axis_name} 2", fontsize=8)
    return figure


def steered(
    xy: np.ndarray, cases: Mapping[str, tuple[np.ndarray, np.ndarray]], axis_name: str = "PC"
) -> Figure:
    """Cells before and after a feature was raised in them, a panel a case (Figures 2B, S20).

    Args:
        xy: all cells, for orientation [cells, 2].
        cases: of each title, coordinates of the same cells before and after [some cells, 2].
    """
    if not cases:
        raise InputError("no cases: give at least one, cells before and after.")
    figure, panels = _panels(len(cases), 3.2, 3.2)
    for axes, (title, (before, after)) in zip(panels, cases.items(), strict=True):
        axes.scatter(*xy.T, s=_size(len(xy)), c=GREY, linewidths=0, rasterized=True)
        for moved, colour, name in ((before, INK, "before"), (after, ORANGE, "after")):
            axes.scatter(*moved.T, s=7, c=colour, alpha=0.6, linewidths=0, rasterized=True,
                         label=name)  # fmt: skip
        axes.set_title(plain(title, 44), fontsize=8)
        axes.set(xticks=[], yticks=[])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  frameon=False, fontsize=8, markerscale=2)  # fmt: skip
    figure.supxlabel(f"{axis_name} 1", fontsize=8)
    figure.supylabel(f"{axis_name} 2", fontsize=8)
    return figure


def activations(
    z: Matrix,
    labels: pd.Series,
    names: Sequence[str] | None = None,
    most: tuple[int, int] = MOST_PIXELS,
) -> Figure:
    """Activations, cells sorted by label (Figure S15), or those of named candidates (Figure S19).

    Beyond `most` rows or columns, a field is the mean of a block. It is made by two sparse products
    and never dense at full size. Colours follow the square root, up to the 99.5th percentile of the
    fields above zero. A label of fewer cells than a row stands for shares its row.

    Args:
        z: activations [cells, features].
        labels: one per cell; cells without one are left out.
        names: of the features, which then keep their order; else live ones are sorted by the label
            with the highest mean, within it by how often they fire, and have no names.
    """
    if np.ndim(z) != 2 or len(labels) != z.shape[0]:
        raise InputError(f"z has shape {np.shape(z)} for {len(labels)} labels: one per cell.")
    z = sparse.csr_array(z)
    label = pd.Categorical(labels).remove_unused_categories()
    codes = label.codes.astype(np.int64)
    cells = np.argsort(codes, kind="stable")[np.count_nonzero(codes < 0) :]
    if names is None:
        mean = _means_by_label(z, codes, len(label.categories))
        density = z.count_nonzero(axis=0)
        columns = np.lexsort((-density, mean.argmax(axis=0)))
        columns = columns[density[columns] > 0]
    elif len(names) == z.shape[1]:
        columns = np.arange(len(names))
    else:
        raise InputError(f"{len(names)} names for {z.shape[1]} features: name each.")
    if not len(columns) or not len(cells):
        raise InputError("nothing to draw: no feature is active, or no cell has a label.")
    across = _averaging(columns, z.shape[1], most[1])
    picture = (_averaging(cells, z.shape[0], most[0]) @ z @ across.T).toarray()

    width = 9.5 if names is None else np.clip(3 + 0.22 * len(names), 5, 14)
    figure = Figure(figsize=(width, 6.4), layout="constrained")
    axes = figure.subplots()
    above = picture[picture > 0]
    image = axes.imshow(
        picture, aspect="auto", interpolation="nearest", cmap="magma_r",
        extent=(0, len(columns), len(cells), 0),
        norm=PowerNorm(0.5, vmin=0, vmax=np.percentile(above, 99.5) if above.size else 1),
    )  # fmt: skip
    _label_rows(axes, label.categories, np.bincount(codes[codes >= 0]))
    axes.set_xlabel(f"{len(columns)} features" if names is None else "features")
    if names is not None:
        axes.set_xticks(np.arange(len(names)) + 0.5, [plain(name, 30) for name in names],
                        rotation=90, fontsize=6 if len(names) > 30 else 7)  # fmt: skip
    blocks = picture.shape != (len(cells), len(columns))
    figure.colorbar(image, shrink=0.6, extend="max",
                    label="activation, mean of a block" if blocks else "activation")  # fmt: skip
    return figure


def firing_per_label(z: Matrix, labels: pd.Series) -> Figure:
    """Features that fire in a cell: mean by label and its 95 % interval (Figure S18).

    The interval is 1.96 standard errors to both sides; a label of one cell has none.
    """
    n_firing = sparse.csr_array(z).count_nonzero(axis=1)
    by_label = pd.Series(n_firing).groupby(pd.Categorical(labels), observed=True)
    found = by_label.agg(["mean", "sem", "size"]).sort_values("mean")
    figure = Figure(figsize=(6.4, 1.1 + 0.24 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(found)), found["mean"], color=BLUE)
    axes.errorbar(
        found["mean"], range(len(found)), xerr=(Z_95 * found["sem"]).fillna(0), fmt="none",
        ecolor=INK, capsize=2.5, linewidth=1,
    )  # fmt: skip
    names = [f"{plain(name, 40)} ({n})" for name, n in found["size"].items()]
    axes.set_yticks(range(len(found)), names, fontsize=7)
    axes.set(xlabel="features that fire in a cell (mean, 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _size(n_cells: int) -> float:
    return float(np.clip(16000 / max(n_cells, 1), 1.0, 12.0))


def _panels(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, four in a row."""
    columns = min(4, n)
    rows = -(-n // columns)
    figure = Figure(figsize=(max(width * columns, 4.5), height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[n:]:
        spare.set_axis_off()
    return figure, axes[:n]


def _by_label(axes: Axes, xy: np.ndarray, labels: pd.Series | None) -> None:
    """Cells by label, with the label's number at the median of its cells."""
    size = _size(len(xy))
    label = pd.Categorical([None] * len(xy) if labels is None else labels)
    label = label.remove_unused_categories()
    bare = label.codes < 0
    axes.scatter(*xy[bare].T, s=size, c=BLUE if labels is None else GREY, linewidths=0,
                 rasterized=True)  # fmt: skip
    for code, colour in enumerate(colours(len(label.categories))):
        own = xy[label.codes == code]
        axes.scatter(*own.T, s=size, color=colour, linewidths=0, rasterized=True,
                     label=f"{code + 1}  {plain(label.categories[code], 40)}")  # fmt: skip
        axes.text(*np.median(own, axis=0), str(code + 1), fontsize=8, ha="center", va="center",
                  path_effects=HALO)  # fmt: skip


def _means_by_label(z: sparse.csr_array, codes: np.ndarray, n_labels: int) -> np.ndarray:
    """Mean activation [labels, features]; cells without a label left out."""
    known = np.flatnonzero(codes >= 0)
    weights = 1 / np.bincount(codes[known], minlength=n_labels)
    one_hot = sparse.csr_array(
        (weights[codes[known]], (codes[known], known)), shape=(n_labels, len(codes))
    )
    return (one_hot @ z).toarray()


def _averaging(order: np.ndarray, n: int, most: int) -> sparse.csr_array:
    """Matrix [blocks, n] that averages what stands at `order` in at most `most` equal blocks."""
    blocks = min(len(order), most)
    block = np.arange(len(order)) * blocks // len(order)
    weights = 1 / np.bincount(block)[block]
    return sparse.csr_array((weights, (block, order)), shape=(blocks, n))


def _label_rows(axes: Axes, names: Sequence[str], n_cells: np.ndarray) -> None:
    """Names of labels beside their rows; moved apart, with a line, where the rows are narrow."""
    ends = np.cumsum(n_cells)
    total = ends[-1]
    middle = (ends - n_cells / 2) / total
    at = spread(middle, 0.026, 0.0, 1.0)
    for name, n, mid, text in zip(names, n_cells, middle, at, strict=True):
        axes.annotate(
            f"{plain(name, 40)} ({n})", xy=(0, 1 - mid), xytext=(-0.035, 1 - text),
            xycoords="axes fraction", ha="right", va="center", fontsize=7,
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 1,
                        "shrinkB": 0},
        )  # fmt: skip
    axes.hlines(ends[:-1], *axes.get_xlim(), color="white", linewidth=0.5)
    axes.hlines(ends[:-1], *axes.get_xlim(), color=INK, linewidth=0.25)
    axes.set_yticks([])

"""The figures. Each function returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import sparse

from sae_jax import files

PRESET_STYLE = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
GREY = "#d5d5d5"


def plain(text: object, most: int = 60) -> str:
    """Text for a figure: not read as a formula, and cut where it is very long."""
    text = str(text)
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write `name`.png (150 dpi) and `name`.pdf; returns the PNG's path."""
    for suffix in (".pdf", ".png"):
        with files.write_aside(folder / f"{name}{suffix}") as fresh:
            figure.savefig(fresh, dpi=150, bbox_inches="tight")
    return folder / f"{name}.png"


def frontier(
    results: pd.DataFrame,
    chosen: int | None = None,
    max_l0_share: float | None = None,
    min_r2: float | None = None,
    split: str = "validation",
) -> Figure:
    """Reconstruction (R² of a split) over sparsity (its L0 as a share of the latents).

    One point a configuration, by preset. Where a choice was made, the chosen one is ringed and the
    region that its rule admits is shaded. A point below the axis' range is drawn on its edge; those
    that diverged are absent.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    share = results[f"{split}_l0"] / results["n_latents"]
    r2 = results[f"{split}_r2"]
    floor = max(-0.05, float(r2.min()) - 0.05)
    if max_l0_share is not None and min_r2 is not None:
        axes.axvspan(
            share[share > 0].min() / 2, max_l0_share, (min_r2 - floor) / (1.03 - floor), 1,
            color="#e8f2e4", zorder=0, label="admissible",
        )  # fmt: skip
    for marker, (name, rows) in zip(
        itertools.cycle(PRESET_STYLE), results.groupby("name", sort=False), strict=False
    ):
        axes.scatter(
            share[rows.index], r2[rows.index].clip(lower=floor), marker=marker, s=36, alpha=0.75,
            label=plain(name),
        )  # fmt: skip
    if chosen is not None:
        axes.scatter(share[chosen], r2[chosen], s=170, facecolors="none", edgecolors="black",
                     linewidths=1.6, label="chosen")  # fmt: skip
    axes.set(
        xscale="log" if (share > 0).any() else "linear",  # none is, where every one diverged
        ylim=(floor, 1.03), ylabel=f"{split} R²",
        xlabel="active latents a cell (L0), share of all latents",
    )  # fmt: skip
    if (share > 0).any():
        wide = share.max() > 100 * share[share > 0].min()
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}%")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def label_heatmap(auroc: pd.DataFrame, titles: Sequence[str]) -> Figure:
    """AUROC of features (columns) for labels (rows), written into each field."""
    rows, columns = auroc.shape
    figure = Figure(figsize=(2.6 + 0.62 * columns, 2.4 + 0.34 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(auroc, cmap="RdBu_r", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(rows), [plain(name) for name in auroc.index], fontsize=8)
    axes.set_xticks(range(columns), [plain(t) for t in titles], rotation=40, ha="right", fontsize=7,
                    rotation_mode="anchor")  # fmt: skip
    for (row, column), value in np.ndenumerate(auroc.to_numpy()):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5,
                  color="white" if abs(value - 0.5) > 0.33 else "black")  # fmt: skip
    figure.colorbar(image, label="AUROC, label against all other cells", shrink=0.8)
    return figure


def cells_by_feature(
    coordinates: np.ndarray,
    axis_name: str,
    z: sparse.csr_matrix,
    titles: Sequence[str],
    labels: pd.Series | None,
) -> Figure:
    """Cells in the plane: by label first, then a panel a feature (columns of z).

    Cells where the feature is silent are grey and lie below.
    """
    panels = len(titles) + (labels is not None)
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.4 * columns, 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    size = float(np.clip(16000 / len(coordinates), 1.5, 16.0))
    for spare in axes:
        spare.set_axis_off()
    if labels is not None:
        _label_panel(axes.pop(0), coordinates, labels, size)
    for panel, title, feature in zip(axes, titles, sparse.csc_matrix(z).T, strict=False):
        values = feature.toarray().ravel()
        active = np.flatnonzero(values)
        active = active[np.argsort(values[active])]
        panel.scatter(*coordinates[values == 0].T, s=size, c=GREY, linewidths=0, rasterized=True)
        dots = panel.scatter(*coordinates[active].T, s=size, c=values[active], cmap="YlGnBu",
                             linewidths=0, rasterized=True)  # fmt: skip
        panel.set_title(plain(title), fontsize=8)
        figure.colorbar(dots, ax=panel, shrink=0.55, pad=0.01).ax.tick_params(labelsize=6)
    figure.supxlabel(f"{axis_name} 1", fontsize=8)
    figure.supylabel(f"{axis_name} 2", fontsize=8)
    return figure


def plane(embedding: np.ndarray) -> tuple[np.ndarray, str]:
    """Two coordinates a cell, and their name: UMAP if umap-learn is installed, else components."""
    try:
        import umap
    except ImportError:
        from sklearn.decomposition import PCA

        return PCA(2, random_state=0).fit_transform(embedding), "PC"
    neighbors = min(15, len(embedding) - 1)
    model = umap.UMAP(n_neighbors=neighbors, random_state=0, n_jobs=1)
    return model.fit_transform(embedding), "UMAP"


def _label_panel(axes: Axes, xy: np.ndarray, labels: pd.Series, size: float) -> None:
    """Cells by label, with a legend below where there are few enough labels to tell apart."""
    palette = mpl.colormaps["tab20"].colors
    codes = labels.cat.codes.to_numpy()
    axes.scatter(*xy[codes < 0].T, s=size, c=GREY, linewidths=0, rasterized=True)
    for code, name in enumerate(labels.cat.categories):
        axes.scatter(
            *xy[codes == code].T, s=size, color=palette[2 * code % 20 + code // 10 % 2],
            linewidths=0, rasterized=True, label=plain(name),
        )  # fmt: skip
    axes.set_title(plain(labels.name), fontsize=8)
    if len(labels.cat.categories) <= len(palette):
        axes.legend(
            fontsize=5.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0.0),
            markerscale=max(1.0, 4 / size**0.5), handletextpad=0.1, columnspacing=0.8,
        )  # fmt: skip


def training(history: pd.DataFrame) -> Figure:
    """Loss and L0 by epoch of every member of `history`; dashed: of the held-out rows."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    loss, l0 = figure.subplots(1, 2)
    for member, rows in history.groupby("member"):
        (line,) = loss.plot(rows["epoch"], rows["loss"], linewidth=1.4, label="training")
        held_out = rows["validation_loss"]
        if held_out.notna().any():
            loss.plot(
                rows["epoch"], held_out, linestyle="--", linewidth=1.4, color=line.get_color(),
                label="held-out rows",
            )  # fmt: skip
        l0.plot(rows["epoch"], rows["l0"], linewidth=1.4, color=line.get_color(), label=str(member))
    positive = (history[["loss", "validation_loss"]].min() > 0).any()
    loss.set(xlabel="epoch", ylabel="loss", yscale="log" if positive else "linear")
    most = history["l0"].max()
    l0.set(
        xlabel="epoch", ylabel="active latents a row (L0)",
        ylim=(0, 1.08 * most if most > 0 else 1),
    )  # fmt: skip
    if history["member"].nunique() == 1:
        loss.legend(frameon=False)
    for axes in (loss, l0):
        axes.grid(alpha=0.25)
    return figure

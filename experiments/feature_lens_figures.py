"""The figures of one annotated dictionary, as the paper has them (Schuster, section 5 and A.3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import sparse

from analysis import cell_plots, feature_space, lens_plots, plots

PANELS = 8


def draw(
    out: Path,
    *,
    x: np.ndarray,
    z: sparse.csr_matrix,
    table: pd.DataFrame,
    labels: pd.Series | None,
    annotated: feature_space.FeatureTerms,
    coordinates: np.ndarray | None,
    telling: pd.DataFrame | None = None,
    history: pd.DataFrame | None = None,
    words: Sequence[str] = (),
    highlight: Sequence[str] = (),
    top_terms: feature_space.FeatureTerms | None = None,
    category: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """Write every figure that these inputs allow into `out`/figures, as PNG and PDF.

    Args:
        out: the run's folder.
        x: embedding [cells, d]. z: activations of the live features [cells, features].
        table: one row per live feature, by name, as `feature_lens.describe` makes it.
        labels: one per cell, or None.
        annotated: which term names which feature.
        coordinates: the map of the features [features, 2], or None where too few have terms.
        telling: the best feature of every label, as `features.telling`; None without labels.
        history: of the training, as `sae_jax.train` returns it.
        words: to look for in terms.
        highlight: names of features with a panel of their own and a place on the map; without any,
            those that tell the labels best have the panels.
        top_terms: the terms by top-level terms, as `feature_space.top_level` finds them.
        category: of terms, such as their branch of the Gene Ontology.
        seed: of the cells' UMAP.

    Returns:
        The PNG of each caption, in the order of the paper.
    """
    pictures: dict[str, Path] = {}

    def keep(name: str, figure: Figure, caption: str) -> None:
        pictures[caption] = plots.save(figure, out / "figures", name)

    shown = list(highlight) or best_features(table, telling)
    xy = cell_plots.components(x).transform(x)
    panels = cell_plots.feature_panels(
        xy, z[:, table.index.get_indexer(shown)], [title(name, table) for name in shown]
    )
    keep("features", panels, "Cells by the activation of a feature; silent ones are grey (Fig. 2).")
    if coordinates is not None and top_terms is not None:
        keys = {"most common top-level term": feature_space.dominant(annotated, top_terms)}
        keep("feature_space_terms", feature_space.figure(coordinates, keys),
             "Features by the top level of their terms (Fig. 3A).")  # fmt: skip
    if history is not None:
        keep("training", lens_plots.training_loss(history), "Loss of the training (Fig. S14).")
    if labels is not None:
        keep("activations", cell_plots.activations(z, labels),
             "Activations: cells by label, features by the label of their highest mean "
             "(Fig. S15).")  # fmt: skip
    keep("activity", lens_plots.activity(table), "How strongly and how often features fire; local "
         "and global by eq. 8 (Fig. S16).")  # fmt: skip
    if labels is not None:
        keep("local_features", lens_plots.local_features(table, labels),
             "Local features of each label (Fig. S17, S27).")  # fmt: skip
        keep("firing", cell_plots.firing_per_label(z, labels),
             "Features that fire in a cell, by label (Fig. S18).")  # fmt: skip
    if coordinates is not None:
        keys = {"cells in which it is active (log10)": np.log10(table["n_active"])}
        if "kind_text" in table:
            keys = {"local or global (eq. 8)": table["kind_text"], **keys,
                    "label told best": table["best_label"]}  # fmt: skip
        keep("feature_space", feature_space.figure(coordinates, keys),
             "Features by the terms that name them (UMAP; Fig. S22, S30).")  # fmt: skip
    frequencies = feature_space.term_frequencies(annotated, table.get("kind_text"))
    if len(frequencies):
        keep("term_counts", lens_plots.term_counts(frequencies, category),
             "How many features a term names (Fig. S23, S29).")  # fmt: skip
    if coordinates is not None and highlight:
        keep("highlighted", lens_plots.highlighted(coordinates, list(table.index), highlight),
             "Chosen features on the map (Fig. S24).")  # fmt: skip
    if coordinates is not None and words:
        keep("probing", feature_space.figure(coordinates, lens_plots.probed(annotated, words)),
             "Features whose terms hold a word, by the term (Fig. 3B, S25, S31).")  # fmt: skip
    keep("embedding", cell_plots.embedding(x, labels, seed), "The embedding: principal components "
         "and UMAP (Fig. S26; spread 1, the paper's 0 is not possible).")  # fmt: skip
    keep("cells", lens_plots.cells_and_features(z), "Features over cells (Fig. S28).")
    return pictures


def best_features(table: pd.DataFrame, telling: pd.DataFrame | None) -> list[str]:
    """Those that tell a label best, or the strongest ones; at most eight names."""
    if telling is None:
        return list(table.nlargest(PANELS, "mean_activation").index)
    order = telling.sort_values("auroc", ascending=False, kind="stable")
    return list(table.index[order["feature"].drop_duplicates()[:PANELS]])


def title(name: str, table: pd.DataFrame) -> str:
    """A feature's name, and what it is named for."""
    term = table.at[name, "best_term"]
    return name if pd.isna(term) else f"{name.removeprefix('feature_')}: {term}"

"""The page and the pictures of the feature lens."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import plots, report
from experiments import replicates
from experiments.inputs import Inputs
from sae_jax import files

REAL, PERMUTED = "the dictionary's", "cells permuted"  # rows of nulls.csv


def write(
    out: Path,
    inputs: Inputs,
    table: pd.DataFrame,
    telling: pd.DataFrame | None,
    pictures: dict[str, Path],
    top: int,
) -> None:
    """Write `out`/report.html; `telling` as `features.telling`, `pictures` by caption, in order."""
    rates = pd.read_csv(out / "nulls.csv")
    null_picture = plots.save(null_figure(rates), out / "figures", "nulls")
    sections = [("In short", summary(inputs, table, rates))]
    sections.append(
        (
            "How much of it is chance",
            [
                report.picture(null_picture, "Share of testable features named at q < .05.", "70%"),
                report.paragraph(
                    "Permuted cells leave a feature nothing to find: what a test names there is "
                    "false. Exchanged gene sets keep sizes and overlaps and lose their meaning. "
                    "Random directions, an untrained dictionary and single dimensions follow the "
                    "cells' structure without a trained dictionary: what they share with the "
                    "dictionary is no merit of it. A term names a feature where `change` and "
                    "`matched` both find it."
                ),
                report.table(rates),
            ],
        )
    )  # fmt: skip
    shown = [report.picture(path, caption) for caption, path in pictures.items()]
    sections.append(("Pictures", shown))
    frequencies = pd.read_csv(out / "terms.csv").head(15)
    sections.append(("Most frequent terms", [report.table(frequencies)]))
    if telling is not None:
        sections.append(("Labels", [report.table(label_table(table, telling))]))
    chosen = table.sort_values("best_term_log10_q", ascending=False).head(top)
    terms = files.read_parquet(out / "top_terms.parquet").set_index("feature")
    genes = files.read_parquet(out / "genes.parquet").set_index("feature")
    for name, row in chosen.iterrows():
        sections.append(
            (
                plots.plain(name),
                feature_section(row, terms[terms.index == name], genes[genes.index == name]),
            )
        )
    report.write(out / "report.html", "Feature lens", sections)


def summary(inputs: Inputs, table: pd.DataFrame, rates: pd.DataFrame) -> list[str]:
    """What was annotated and how many of it."""
    testable = int(table["testable"].sum())
    annotated = int((table["n_terms"] > 0).sum())
    lines = [
        f"{len(inputs.embedding)} cells, {len(inputs.expression.genes)} genes",
        str(inputs.sets.coverage),
        f"{len(table)} live features, {testable} of them with cells enough to be tested",
        f"{annotated} named at q < .05 of both tests: {share(rates, REAL)} of the testable ones, "
        f"beside {share(rates, PERMUTED)} with permuted cells",
        f"{int(table['paper_annotated'].sum())} annotated by the published rule (any term of "
        "p < .01, uncorrected)",
    ]
    if "kind_text" in table:
        for rule in ("text", "code"):
            kinds = table[f"kind_{rule}"].value_counts()
            numbers = f"{kinds.get('local', 0)} local, {kinds.get('global', 0)} global"
            lines.append(f"{numbers} (eq. 8, the {rule}'s rule)")
    if replicates.SCORES[0] in table:
        lines.append(replicates.told(table))
    if "technical" in table:
        lines.append(f"{int(table['technical'].sum())} flagged as technical")
    return [report.items(lines)]


def share(rates: pd.DataFrame, features: str) -> str:
    """Of a row of nulls.csv, by the rule that names."""
    found = rates.loc[rates["features"] == features, "named"].dropna()
    return f"{found.iloc[0]:.1%}" if len(found) else "none"


def label_table(table: pd.DataFrame, telling: pd.DataFrame) -> pd.DataFrame:
    """The feature that tells each label best, with its name."""
    best = table.iloc[telling["feature"]].rename_axis("feature").reset_index()
    best = best.assign(label=telling["label"].astype(str), auroc=telling["auroc"])
    return best[
        ["label", "feature", *replicates.of(table), "auroc", "density", "best_term", "top_genes"]
    ]


def feature_section(row: pd.Series, terms: pd.DataFrame, genes: pd.DataFrame) -> list[str]:
    """Activity, terms and genes of one feature."""
    about = [f"active in {row['density']:.2%} of the cells ({int(row['n_active'])})"]
    if replicates.SCORES[0] in row:
        about.append(
            f"comes back in {row['replicated_by_direction']:.0%} of the other dictionaries by "
            f"direction, in {row['replicated_by_activation']:.0%} by activation"
        )
    if "best_label" in row:
        about.append(f"tells {row['best_label']} best, AUROC {row['best_label_auroc']:.3f}")
        about.append(f"{row['kind_text']} (eq. 8)")
    columns = ["side", "term", "size", "hits", "change", "change_z", "auc", "log10_p", "log10_q"]
    shown = terms[terms["rank"] < 6][columns]
    gene_columns = [
        "gene",
        "t",
        "log2_fold_change",
        "cohens_d",
        "detected_high",
        "detected_low",
        "q",
    ]
    return [
        report.items(about),
        report.table(shown),
        report.table(genes[gene_columns].head(10)),
    ]


def null_figure(rates: pd.DataFrame) -> Figure:
    """Bars: share named, by test, of the real features and of each null."""
    tests = [column for column in rates.columns if column != "features"]
    figure = Figure(figsize=(8, 0.5 + 0.42 * len(rates)), layout="constrained")
    axes = figure.subplots(1, len(tests), sharey=True)
    for panel, test in zip(axes, tests, strict=True):
        values = rates[test].to_numpy()
        colours = ["#08519c"] + ["#9e9e9e"] * (len(values) - 1)
        panel.barh(range(len(values)), values, color=colours)
        for row, value in enumerate(np.nan_to_num(values)):
            text = "not defined" if np.isnan(values[row]) else f" {value:.2f} "
            side = {"ha": "right", "color": "white"} if value > 0.7 else {"ha": "left"}
            panel.text(value, row, text, va="center", fontsize=7, **side)
        panel.set(xlim=(0, 1), title=test.replace("_", " "))
        panel.title.set_fontsize(9)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rates)), rates["features"])
    axes[0].invert_yaxis()
    return figure

"""The page and the pictures of steering (Schuster, Figures 2B and S19 to S21, Table S8)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import sparse

from analysis import cell_plots, lens_plots, plots, report
from experiments.perturbation import SPECIFIC, Design, Result, Subject

Experiment = tuple[str, int]  # label, feature
MOST_PANELS = 12
GENE_COLUMNS = ("gene", "before", "after", "log2_fold_change", "effect", "share_up", "z", "q",
                "control_median", "control_p")  # fmt: skip


def write(
    out: Path, subject: Subject, design: Design, z: sparse.csr_matrix, ranked: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame], results: Mapping[Experiment, Result], asked: list[str],
    about: list[str],
) -> None:  # fmt: skip
    """Draw the figures and write `out`/report.html."""
    pictures = figures(out, subject, design, z, ranked, tables, results, asked)
    level = {"maximum": "their maximum", "target_mean": f"their mean in {design.stages[-1]}"}
    factor = f" times {design.factor:g}" if design.factor != 1 else ""
    error = "kept" if design.keep_error else "left out"
    lines = [
        f"{', '.join(design.cells)} steered, features raised to {level[design.raise_to]}{factor}; "
        f"the dictionary's error is {error}",
        f"features that rise along {' -> '.join(design.stages)}: {int(ranked['passes'].sum())}",
        *about,
    ]
    sections = [
        ("In short", [report.items(lines), report.table(summary(tables))]),
        ("How to read the numbers", [report.paragraph(text) for text in READING]),
        ("Candidates", [report.table(candidate_table(ranked)), pictures["candidates"]]),
        ("Latent space", [pictures["steered"]]),
    ]
    if "genes" in pictures:
        listed = report.table(gene_table(tables["expression"], asked))
        sections.append(("Genes asked for", [pictures["genes"], listed]))
    sections.append(("All genes", [pictures["volcano"]]))
    for feature in ranked.loc[ranked["steered"], "feature"]:
        terms = tables["terms"][tables["terms"]["feature"] == feature]
        sections.append((f"Terms of feature {feature}", terms_section(terms, design)))
    for (label, feature), found in results.items():
        sections.append((f"Feature {feature} in {label}", experiment_section(found)))
    report.write(out / "report.html", "Steering", sections)


READING = (
    "A decoder predicts expected counts, which have no sampling noise. z and q are those of a "
    "negative-binomial regression with an intercept for each cell, of the expected counts at each "
    "cell's own library, with the model's dispersion: what a sequencing of these cells before and "
    "after would give on average. They measure how large a change is beside the noise of counting "
    "and grow with the number of cells; they are no evidence that cells would do what the model "
    "says.",
    "control p is the share of random live features, each cell moved equally far, that move the "
    "gene at least as far the same way, up or down as it went (itself counted): by chance it is "
    "below .05 twice as often as that. Features of the same lineage may be among them. "
    "log2 fold change is of mean counts per ten thousand, .01 added; effect is the regression's.",
)


def figures(
    out: Path, subject: Subject, design: Design, z: sparse.csr_matrix, ranked: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame], results: Mapping[Experiment, Result], asked: list[str],
) -> dict[str, str]:  # fmt: skip
    """HTML of each figure, drawn and saved."""
    made = {}

    def add(name: str, figure: Figure, caption: str, width: str = "100%") -> None:
        made[name] = report.picture(plots.save(figure, out / "figures", name), caption, width)

    others = [name for name in subject.labels.cat.categories if name not in design.stages]
    ordered = pd.Series(subject.labels.cat.set_categories([*design.stages, *others]))
    shown = ranked["feature"].head(60)
    add(
        "candidates",
        cell_plots.activations(z[:, shown.to_numpy()], ordered, [str(name) for name in shown]),
        "Activations of the candidates, cells sorted by label, stages first (Figure S19).",
        "50%" if len(shown) < 10 else "100%",
    )
    plane = cell_plots.components(subject.x)
    some = dict(list(results.items())[:MOST_PANELS])
    moved = {
        title(key): (plane.transform(found.before), plane.transform(found.after))
        for key, found in some.items()
    }
    add(
        "steered",
        cell_plots.steered(plane.transform(subject.x), moved),
        "All cells (grey), and those steered before and after (Figures 2B, S20).",
        f"{min(100, 40 * len(some))}%",
    )
    changes = {}
    for key, found in some.items():
        genes = found.expression.set_index("gene")
        changes[title(key)] = pd.DataFrame({"log2_fold_change": genes["effect"], "q": genes["q"]})
    add(
        "volcano",
        lens_plots.volcano(changes),
        "Every gene's log2 fold change (the regression's effect) and q (Figure S21).",
        "70%",
    )
    if asked:
        add(
            "genes",
            gene_figure(tables["expression"], tables["controls"], asked, list(some)),
            "Genes asked for: the feature (blue) and random features moved equally far (grey).",
            f"{min(100, 50 * len(some))}%",
        )
    return made


def gene_figure(
    expression: pd.DataFrame, controls: pd.DataFrame, asked: list[str], keys: list[Experiment]
) -> Figure:
    """log2 fold changes of genes, a panel an experiment: of the feature, and of random ones."""
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    width, height = 1.2 + 0.5 * len(asked), 2.9
    figure = Figure(figsize=(max(3.2, width) * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    rng = np.random.default_rng(0)
    for spare in panels[len(keys) :]:
        spare.set_axis_off()
    for axes, (label, feature) in zip(panels, keys, strict=False):
        ours = of(expression, label, feature).set_index("gene")["log2_fold_change"]
        others = of(controls, label, feature)
        for i, gene in enumerate(asked):
            drawn = others.loc[others["gene"] == gene, "log2_fold_change"]
            axes.scatter(i + rng.uniform(-0.22, 0.22, len(drawn)), drawn, s=7, c="#b5b5b5",
                         linewidths=0)  # fmt: skip
            axes.scatter(i, ours[gene], s=46, c="#08519c", zorder=3)
        axes.axhline(0, color="#777777", linewidth=0.6)
        axes.set_xticks(range(len(asked)), [plots.plain(gene, 16) for gene in asked], rotation=40,
                        ha="right", rotation_mode="anchor", fontsize=8)  # fmt: skip
        axes.set_title(title((label, feature)), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("log2 fold change", fontsize=9)
    return figure


def title(key: Experiment) -> str:
    """Of a panel."""
    return plots.plain(f"feature {key[1]} in {key[0]}", 40)


def of(table: pd.DataFrame, label: str, feature: int) -> pd.DataFrame:
    """The rows of one experiment."""
    return table[(table["cells"] == label) & (table["feature"] == feature)]


def summary(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row an experiment: its cells, their mean shift, and how many genes change."""
    keys = ["cells", "feature"]
    shift = tables["shift"].groupby(keys, sort=False)
    found = shift[[name for name in ("norm", "progress") if name in tables["shift"]]].mean()
    found.insert(0, "n cells", shift.size())
    of_experiment = tables["terms"].groupby(keys, sort=False)
    found["changed genes"] = of_experiment["n_changed"].first()
    found["terms"] = of_experiment["found"].sum()
    return found.reset_index()


def gene_table(expression: pd.DataFrame, asked: list[str]) -> pd.DataFrame:
    """One row per experiment and gene asked for."""
    columns = ["cells", "feature", *GENE_COLUMNS]
    rows = expression.set_index("gene").loc[asked].reset_index()
    rows = rows.sort_values(["cells", "feature"], kind="stable")
    return rows[[name for name in columns if name in rows]].head(60)


def candidate_table(ranked: pd.DataFrame) -> pd.DataFrame:
    """The best candidates, in fewer columns than candidates.csv."""
    columns = ["feature", "steered", "passes", "level", "norm", "progress", "elsewhere"]
    return ranked[columns + [name for name in ranked if name.startswith("mean ")]].head(20)


def terms_section(terms: pd.DataFrame, design: Design) -> list[str]:
    """Table S8: terms of at most 400 genes that an experiment found, by experiment."""
    hits = terms[terms["specific"]]
    if hits.empty:
        return [report.paragraph(f"No term of at most {SPECIFIC} genes at q < .05.")]
    wide = hits.assign(mark="\N{CHECK MARK}").pivot(index="term", columns="cells", values="mark")
    wide = wide.reindex(columns=list(design.cells)).fillna("")
    best = hits.groupby("term")[["log10_q_fisher", "experiments"]].max()
    wide["experiments"] = best["experiments"]
    order = best.sort_values(["experiments", "log10_q_fisher"], ascending=False).index[:30]
    note = f"{len(wide)} terms of at most {SPECIFIC} measured genes (Fisher's q < .05)"
    if len(design.cells) > 1:
        note += f", {int((wide['experiments'] > 1).sum())} of them in more than one experiment"
    return [report.paragraph(note + "."), report.table(wide.loc[order].reset_index())]


def experiment_section(found: Result) -> list[str]:
    """Genes that rise and fall most by z, and the best terms."""
    columns = [name for name in GENE_COLUMNS if name in found.expression]
    known = found.expression.dropna(subset="z").sort_values("z", ascending=False)
    terms = found.terms[["term", "size", "hits", "fold", "auc", "log10_p_binomial",
                         "log10_p_fisher", "log10_q_fisher", "log10_q_mann_whitney"]]  # fmt: skip
    return [
        report.paragraph("Up:"), report.table(known[columns].head(12)),
        report.paragraph("Down:"), report.table(known[columns].tail(8)[::-1]),
        report.paragraph("Terms of the changed genes:"), report.table(terms.head(10)),
    ]  # fmt: skip

"""The pictures and the page of the quickstart."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import anndata
import pandas as pd

from analysis import plots, report
from analysis.gene_sets import Coverage
from analysis.lens import Lens

FILES = {
    "report.html": "the page: everything below, to look at",
    "results.parquet": "one row a configuration: settings and metrics",
    "history.parquet": "one row per configuration and epoch: losses",
    "manifest.json": "size and SHA-256 of every file",
    "choice.json": "the chosen dictionary, and why",
    "dictionaries": "one folder a configuration: cfg.json, sae_weights.safetensors",
    "features.h5ad": "cells × live features of the chosen dictionary; var names them",
    "enrichment.parquet": "feature × term: size, hits, effects, every test's -log10 p and q",
    "labels.csv": "the best feature of every label, measured on cells not used to choose",
    "figures": "frontier, label_auroc, cells: PNG and PDF",
}
PER_LABEL = 2  # features a label has in the heat map
PANELS = 11
TOP = 10


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the page tells."""

    results: pd.DataFrame
    member: int
    reason: str
    limits: tuple[float, float]  # share of active latents at most, R² at least
    adata: anndata.AnnData  # cells × live features; its var is the table of features
    axis: str
    labels: pd.Series | None
    best: pd.DataFrame | None
    coverage: Coverage
    universe: int
    found: Lens
    null_rates: dict[str, dict[str, float]]
    settings: dict[str, Any]


def write(out: Path, findings: Findings) -> None:
    """Draw the figures into `out`/figures and write `out`/report.html."""
    pictures = _draw(out / "figures", findings)
    report.write(out / "report.html", "Features of an embedding", _sections(findings, pictures))


def top_named(table: pd.DataFrame) -> pd.DataFrame:
    """The best-named features: smallest q first, each term once."""
    named = table[table["best_term"].notna()].sort_values("best_term_q", kind="stable")
    return named.drop_duplicates("best_term").head(TOP)


def top_lines(table: pd.DataFrame) -> list[str]:
    """The same, a line each."""
    lines = []
    for name, row in top_named(table).iterrows():
        label = ""
        if "best_label_auroc" in row:
            label = f"  {row['best_label']} {row['best_label_auroc']:.3f}"
        lines.append(
            f"{name:<13} {row['best_term']}  q={row['best_term_q']:.1e}{label}"
            f"  [{row['top_genes']}]"
        )
    return lines or ["none: no gene set is over-represented in any feature's genes"]


def auroc_column(label: str) -> str:
    """A label's column in var. HDF5 takes a slash for a path and could not read the file again."""
    return f"auroc:{label}".replace("/", "|")


def title(name: str, row: pd.Series) -> str:
    """A feature's short name in a figure."""
    term = "unnamed" if pd.isna(row["best_term"]) else re.sub(r" \(GO:\d+\)$", "", row["best_term"])
    return f"{name.removeprefix('feature_')}: {term if len(term) <= 34 else term[:33] + '…'}"


def _draw(folder: Path, findings: Findings) -> dict[str, Path]:
    table, adata = findings.adata.var, findings.adata
    pictures = {
        "frontier": plots.save(
            plots.frontier(findings.results, findings.member, *findings.limits), folder, "frontier"
        )
    }
    shown = list(top_named(table).index)
    if findings.labels is not None:
        columns = [auroc_column(label) for label in findings.labels.cat.categories]
        areas = table[columns].set_axis(findings.labels.cat.categories, axis=1)
        picked = list(
            dict.fromkeys(
                name for label in areas for name in areas[label].nlargest(PER_LABEL).index
            )
        )
        figure = plots.label_heatmap(
            areas.loc[picked].T, [title(name, table.loc[name]) for name in picked]
        )
        pictures["labels"] = plots.save(figure, folder, "label_auroc")
        shown = list(dict.fromkeys([*findings.best["feature"], *shown]))
    shown = shown[:PANELS] or list(table.nlargest(PANELS, "mean_activation").index)
    figure = plots.cells_by_feature(
        adata.obsm["X_umap" if findings.axis == "UMAP" else "X_pca"],
        findings.axis,
        adata[:, shown].X,
        [title(name, table.loc[name]) for name in shown],
        findings.labels,
    )
    pictures["cells"] = plots.save(figure, folder, "cells")
    return pictures


def _sections(findings: Findings, pictures: dict[str, Path]) -> list[tuple[str, list[str]]]:
    table, chosen = findings.adata.var, findings.results.loc[findings.member]
    found, rates, rule = findings.found, findings.null_rates, findings.found.rule
    sections = [
        (
            "What was found",
            [
                report.paragraph(
                    f"{findings.adata.n_obs} cells, an embedding of {chosen['d_in']} dimensions, "
                    f"{chosen['n_latents']} latents, of which {len(table)} are live (active in at "
                    f"least one training cell). {_named(found)} For comparison, the same pipeline "
                    f"names {rates['cells permuted']['matched']:.1%} of features whose cells were "
                    f"permuted, and {rates['genes relabelled']['matched']:.1%} when every gene is "
                    "exchanged for one of like expression."
                ),
                report.table(_readable(top_named(table).reset_index(names="feature"))),
            ],
        )
    ]
    if findings.best is not None:
        sections.append(
            (
                "The best feature of every label",
                [
                    report.paragraph(
                        "Chosen on one half of the cells; AUROC is measured on the other half "
                        "(cells not used to choose; most were trained on, without their labels). "
                        "Beside it that of the best single dimension of the embedding, chosen and "
                        "measured in the same way (either sign). Fisher's terms are not matched "
                        "for expression: read them with the rates below."
                    ),
                    report.table(_labels(findings.best)),
                    report.picture(
                        pictures["labels"],
                        f"The {PER_LABEL} features of highest AUROC of every label, all cells.",
                    ),
                ],
            )
        )
    sections += [
        (
            "Cells",
            [
                report.picture(
                    pictures["cells"],
                    "Cells by label, then by the activation of features; grey: silent.",
                )
            ],
        ),
        (
            "The sweep",
            [
                report.paragraph(
                    f"Chosen: configuration {findings.member} ({chosen['name']}), "
                    f"validation R² {chosen['validation_r2']:.3f}, "
                    f"L0 {chosen['validation_l0']:.1f} of {chosen['n_latents']} "
                    f"({chosen['validation_l0'] / chosen['n_latents']:.1%}): {findings.reason}."
                ),
                report.picture(
                    pictures["frontier"], "Every configuration on held-out cells.", "40rem"
                ),
                report.table(_results(findings.results)),
            ],
        ),
        (
            "How features were named",
            [
                report.items(
                    [
                        f"A cell is high above the {rule.percentile:g}th percentile of all cells, "
                        "and is compared with all cells in which the feature is silent, gene by "
                        "gene, by Welch's t-test on ln(1 + counts per ten thousand).",
                        f"A gene is up at q < {rule.gene_q:g} and a fold change of mean counts of "
                        f"at least {rule.fold_change:g} ({rule.pseudocount:g} added to both).",
                        "A term names a feature if the genes that are up hold more of its genes "
                        "than genes of like expression would (matched; strata of about a hundred), "
                        f"at q < {rule.term_q:g} over the terms (Benjamini-Hochberg). The universe "
                        f"are the {findings.universe} measured genes. Features of fewer than "
                        f"{rule.cells} high cells are not named, nor those with few silent cells.",
                        "Fisher's exact and the binomial test of the same genes and Mann-Whitney "
                        "on the ranking of all genes are in enrichment.parquet too, and name "
                        "nothing: see what they find when there is nothing to find.",
                    ]
                ),
                report.table(_rates(found, rates)),
                report.paragraph(f"Gene sets: {findings.coverage}."),
                report.items(
                    [
                        f"{what}: {_some(dropped)}"
                        for what, dropped in {
                            "left out, with no measured gene": {
                                name: n for name, n in findings.coverage.too_small.items() if n == 0
                            },
                            "left out, with too few measured genes": {
                                name: n for name, n in findings.coverage.too_small.items() if n > 0
                            },
                            "left out, with too many measured genes": findings.coverage.too_large,
                        }.items()
                        if dropped
                    ]
                ),
            ],
        ),
        ("Files", [report.items([f"{n}: {what}" for n, what in FILES.items()])]),
        ("Settings", [report.code(json.dumps(findings.settings, indent=1))]),
    ]
    return sections


def _named(found: Lens) -> str:
    testable = int(found.testable().sum())
    share = f"{found.share_named():.0%} of those are named by a gene set." if testable else ""
    return f"{testable} have cells enough on both sides to be named; {share}"


def _rates(found: Lens, rates: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Share of features that each test names: here, and under each null."""
    return pd.DataFrame(
        [
            {"share named by": test, "these features": found.share_named(test)}
            | {name: null[test] for name, null in rates.items()}
            for test in found.log_p
        ]
    )


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "feature": "feature",
        "best_term": "best term",
        "best_term_q": "q",
        "best_label": "best label",
        "best_label_auroc": "AUROC",
        "density": "share of cells",
        "top_genes": "top genes",
    }
    table = table[[column for column in shown if column in table]]
    return table.assign(top_genes=_first(table["top_genes"], 6)).rename(columns=shown)


def _labels(best: pd.DataFrame) -> pd.DataFrame:
    shown = {
        "label": "label",
        "cells": "cells",
        "feature": "feature",
        "auroc": "AUROC",
        "dimension_auroc": "a dimension's",
        "top_terms": "named by",
        "fisher_terms": "Fisher's terms",
        "top_genes": "top genes",
    }
    return best.assign(top_genes=_first(best["top_genes"], 6))[list(shown)].rename(columns=shown)


def _first(listed: pd.Series, most: int) -> pd.Series:
    """The first few of comma-separated names."""
    return listed.map(lambda names: ", ".join(names.split(", ")[:most]))


def _results(results: pd.DataFrame) -> pd.DataFrame:
    settings = ["member", "name", "l1_weight", "k", "seed", "status"]
    measured = [f"{split}_{m}" for split in ("validation", "train") for m in ("r2", "l0", "live")]
    return results[settings + measured]


def _some(dropped: dict[str, int], most: int = 12) -> str:
    names = list(dropped)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""The page of the study of concepts: each table beside the paper's numbers, each figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import sae_jax
from analysis import concept_terms, deletion, plots, report
from analysis.gene_sets import Coverage
from experiments import concepts_figures
from experiments.concepts_study import telling

if TYPE_CHECKING:
    from experiments.concepts import Explained, Learned
    from experiments.concepts_study import Subject

TOP = 12
PICTURED = 4
PAPER_STRENGTHS = (
    "The paper (Figure 3A) finds concepts annotated more often than neurons, for scVI and scGPT."
)
PAPER_METHODS = (
    "The paper (Tables 4, 5; immune cells of Tabula Sapiens): R2 of TopK .995 against .933 of "
    "semi-NMF (scGPT), .980 against .849 (scVI); cell types from concepts / neurons .860 / .869 "
    "(scGPT), .853 / .853 (scVI); cell cycle .487 / .482 and .485 / .493."
)


def write(
    out: Path,
    subject: Subject,
    run: sae_jax.Run,
    members: Sequence[int],
    found: Explained,
    learned: Learned,
    tested: dict[str, pd.DataFrame],
    settings: dict[str, Any],
) -> None:
    """Draw the figures into `out`/figures and write `out`/report.html."""
    pictures = draw(out / "figures", subject, run.dictionaries[members[0]], found, learned)
    report.write(
        out / "report.html",
        "Concepts of an embedding",
        sections(subject, run, members, found, learned, tested, settings, pictures),
    )


def draw(
    folder: Path, subject: Subject, dictionary: sae_jax.Dictionary, found: Explained,
    learned: Learned,
) -> dict[str, Path]:  # fmt: skip
    """Every figure, PNG and PDF."""
    table = found.features
    every = [*found.concepts, *found.neurons]
    shown = shown_concepts(found)
    scores = {name: found.attribution[every.index(name)] for name in shown}
    coordinates, axis = plots.plane(subject.x)
    z = dictionary.encode(subject.x, sparse=True)
    latents = [int(name.removeprefix("concept_")) for name in shown]
    titles = [f"{name}: {concepts_figures.term(table.loc[name])}" for name in shown]
    figures = {
        "cells": plots.cells_by_feature(
            coordinates, axis, z[:, latents], titles, subject.labels.iloc[:, 0]
        ),
        "attributed": concepts_figures.attributed(
            table, shown[:PICTURED], scores, subject.expression.genes
        ),
        "strengths": concepts_figures.strengths(found.strengths),
        "deletion": deletion.figure(found.deletion),
        "confusion": concepts_figures.confusion(learned.confusion),
    }
    if found.stability is not None:
        figures["replication"] = concepts_figures.replication(found.stability)
    return {name: plots.save(figure, folder, name) for name, figure in figures.items()}


def shown_concepts(found: Explained) -> list[str]:
    """For each column and label the concept that tells it best, then the most surely annotated."""
    table = found.features.loc[found.concepts]
    chosen = telling(table)
    chosen += table.sort_values("attribution:p").index.tolist()
    return list(dict.fromkeys(chosen))[: TOP - 1]


def told(found: Explained, learned: Learned, follow: Sequence[str]) -> list[str]:
    """What the program must show, a line each."""
    table = found.features.loc[found.concepts]
    lines = []
    for column in [name for name in table if name.endswith(":auroc")]:
        best = table[column].idxmax()
        row = table.loc[best]
        name = column.removesuffix(":auroc")
        label, again = row[f"{name}:best"], ""
        if "replicated_by_direction" in row:
            again = (
                f"; in the other seeds by direction {row['replicated_by_direction']:.0%}, by "
                f"activation {row['replicated_by_activation']:.0%}"
            )
        lines.append(
            f"{name}: {best} tells {label} by AUROC {row[column]:.3f}; {row['attribution:term']} "
            f"(p {row['attribution:p']:.1e}, q {row['attribution:q']:.1e}); "
            f"{row['top_genes']}{again}"
        )
        if follow:
            genes = row["top_genes"].split(", ")
            lines.append(f"  followed and among its ten genes: {sorted(set(genes) & set(follow))}")
    curves = deletion.areas(found.deletion).groupby("kind").mean()
    lines += [f"area under {kind} curves: {_dict(row)}" for kind, row in curves.iterrows()]
    for name, row in found.strengths.iterrows():
        lines.append(
            f"{name}: strong {row['strong']:.0%}, weak {row['weak']:.0%} of {row['n']:g}; by "
            f"chance {row['chance']:.0%} strong or weak; with a term of q <= .05 {row['q']:.0%}"
        )
    for task, part in learned.methods.groupby("task", sort=False):
        accuracy = part.set_index("method")["accuracy"]
        lines.append(f"{task}, accuracy: " + _dict(accuracy))
    return lines


def sections(
    subject: Subject,
    run: sae_jax.Run,
    members: Sequence[int],
    found: Explained,
    learned: Learned,
    tested: dict[str, pd.DataFrame],
    settings: dict[str, Any],
    pictures: dict[str, Path],
) -> list[tuple[str, list[str]]]:
    """Heading and pieces of HTML of each part of the page."""
    from experiments.concepts import FILES
    from experiments.concepts_study import table_3

    chosen = run.results.loc[members[0]]
    n_live = int((found.features["kind"] == "concept").sum())
    parts = [
        (
            "What was found",
            [
                report.paragraph(
                    f"{len(subject.x)} cells, {subject.x.shape[1]} dimensions of "
                    f"{settings['model']}, {int(chosen['n_latents'])} concepts of which {n_live} "
                    f"are live on training cells; k = {int(chosen['k'])}, R2 "
                    f"{chosen['validation_r2']:.3f} on held-out cells. {len(found.concepts)} "
                    f"concepts and {len(found.neurons)} neurons, drawn at random, were attributed."
                ),
                report.items(told(found, learned, settings["follow"])),
                report.table(_shown(found)),
                report.picture(pictures["cells"], "Cells by label, then by activation."),
                report.picture(
                    pictures["attributed"],
                    "Genes by attribution: the drop of the concept's activation when the gene's "
                    "value is exchanged for that of a like cell without the concept.",
                ),
            ],
        ),
        (
            "Terms: concepts and neurons",
            [
                report.paragraph(PAPER_STRENGTHS),
                report.picture(pictures["strengths"], "Best term by prerank GSEA.", "40rem"),
                report.table(found.strengths.reset_index()),
                report.paragraph(
                    "The best of many terms has a small p by chance alone: see the columns. Of a "
                    f"concept's important genes (attribution above .05) "
                    f"{_mean(found, 'in_no_term')} are in no term, in the mean."
                ),
                report.paragraph(_coverage(subject.sets.coverage)),
            ],
        ),
        (
            "Attribution against differential expression",
            [
                report.picture(
                    pictures["deletion"],
                    "Activation left as genes are exchanged, mean and sd over concepts. "
                    "Attribution is ranked on the very cells of the curve, which flatters it, as "
                    "in the paper.",
                    "40rem",
                ),
                report.table(found.table_6.rename_axis("quantity").reset_index()),
                report.paragraph(
                    "The paper's Table 6, its exchanged cells put right: "
                    + "; ".join(f"{' '.join(key)}: {_dict(value)}"
                                for key, value in concept_terms.PAPER.items())
                ),
            ],
        ),
        (
            "Other methods, and what can be learned from each",
            [
                report.paragraph(PAPER_METHODS),
                report.items([
                    f"{task}: {split.n_train} and {split.n_test} cells a class of "
                    f"{len(split.classes)} (chance {1 / len(split.classes):.2f}), "
                    f"{split.factor:.3g} of what was asked for; left out, with few cells: "
                    f"{_dict(split.left_out) or 'none'}"
                    for task, split in learned.split.items()
                ]),
                report.table(learned.methods),
                report.picture(pictures["confusion"], "Shares of a class's test cells.", "60rem"),
                report.table(learned.coefficients),
            ],
        ),
        ("Dictionaries (Table 3)", [report.table(table_3(run))]),
    ]  # fmt: skip
    if found.stability is not None:
        share = found.features["replicated_by_direction"].dropna()
        active = found.features["replicated_by_activation"].dropna()
        parts.append(
            (
                "Stability",
                [
                    report.paragraph(
                        f"{(share > 0).mean():.0%} of the concepts come back in another seed by "
                        f"direction, {(share == 1).mean():.0%} in all of them (beyond what random "
                        f"directions reach); by activation {(active > 0).mean():.0%} and "
                        f"{(active == 1).mean():.0%}."
                    ),
                    report.picture(pictures["replication"], "All live concepts of all seeds.",
                                   "50rem"),
                ],
            )
        )  # fmt: skip
    parts += [
        (
            "In the model",
            [
                report.paragraph("What survives with the reconstruction in the embedding's place:"),
                report.table(tested["fidelity"]),
                report.paragraph(
                    "Single concepts set to 0, beside 20 random directions that move every cell as "
                    "far (so the least p is 1 / 21):"
                ),
                report.table(tested["causal"]),
            ],
        ),
        ("Files", [report.items([f"{name}: {what}" for name, what in FILES.items()])]),
        ("Settings", [report.code(json.dumps(settings, indent=1))]),
    ]
    return parts


def _shown(found: Explained) -> pd.DataFrame:
    table = found.features.loc[shown_concepts(found)]
    columns = ["density", *(name for name in table if name.endswith((":best", ":auroc"))),
               "replicated_by_direction", "attribution:term", "attribution:p", "dge:term",
               "dge:p", "top_genes"]  # fmt: skip
    return table[[name for name in columns if name in table]].rename_axis("concept").reset_index()


def _mean(found: Explained, column: str) -> str:
    values = found.features.loc[found.concepts, column].dropna()
    return f"{np.mean(values):.0%}" if len(values) else "none"


def _coverage(coverage: Coverage) -> str:
    return f"Gene sets: {coverage}."


def _dict(values: Any) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in dict(values).items())

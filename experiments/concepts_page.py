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
from experiments import concepts_figures, replicates
from experiments import concepts_study as study

if TYPE_CHECKING:
    from experiments.concepts_explained import Explained
    from experiments.concepts_learned import Learned, Tested
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
ABSENT = (
    "Left out, since the model of the embedding's store is not there (give its folder by "
    "--checkpoint): the genes that drive a concept, their terms, deletion curves, tests in the "
    "model. Genes and terms are those of differential expression."
)
SEMI_NMF = (
    "Semi-NMF has as many codes above 0 as it likes; with a number a cell at most as many as TopK, "
    "by matching pursuit, which is a search in each cell where TopK's encoder is one product. R2 "
    "and L0 are of cells that nothing was fitted to."
)


def write(
    out: Path,
    subject: Subject,
    run: sae_jax.Run,
    members: Sequence[int],
    found: Explained,
    learned: Learned,
    tested: dict[str, pd.DataFrame],
    coordinates: np.ndarray,
    settings: dict[str, Any],
) -> None:
    """Draw the figures into `out`/figures, cells at their coordinates, and write
    `out`/report.html."""
    pictures = draw(out / "figures", subject, coordinates, found, learned)
    report.write(
        out / "report.html",
        "Concepts of an embedding",
        sections(subject, run, members, found, learned, tested, settings, pictures),
    )


def draw(
    folder: Path, subject: Subject, coordinates: np.ndarray, found: Explained, learned: Learned
) -> dict[str, Path]:
    """Every figure, PNG and PDF."""
    table = found.features
    shown = shown_concepts(found)
    titles = [f"{name}: {concepts_figures.term(table.loc[name], found.method)}" for name in shown]
    figures = {
        "cells": plots.cells_by_feature(
            coordinates, "map", found.z[:, table.index.get_indexer(shown)], titles,
            subject.labels.iloc[:, 0],
        ),
        "strengths": concepts_figures.strengths(found.strengths),
        "confusion": concepts_figures.confusion(learned.confusion),
    }  # fmt: skip
    if found.attribution is not None:
        every = [*found.concepts, *found.neurons]
        scores = {name: found.attribution[every.index(name)] for name in shown}
        figures["attributed"] = concepts_figures.attributed(
            table, shown[:PICTURED], scores, subject.expression.genes
        )
        figures["deletion"] = deletion.figure(found.deletion)
    if len(found.held_out):
        figures["deletion_held_out"] = deletion.figure(found.held_out)
    if found.stability is not None:
        figures["replication"] = concepts_figures.replication(found.stability)
    return {name: plots.save(figure, folder, name) for name, figure in figures.items()}


def shown_concepts(found: Explained) -> list[str]:
    """Those that tell a label best, then the most surely annotated."""
    table = found.features.loc[found.concepts]
    chosen = [*found.telling, *table.sort_values(f"{found.method}:p").index]
    return list(dict.fromkeys(chosen))[: TOP - 1]


def told(found: Explained, learned: Learned, follow: Sequence[str]) -> list[str]:
    """What the program must show, a line each."""
    table, by = found.features.loc[found.concepts], found.method
    lines = [] if found.attribution is not None else [ABSENT]
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
            f"{name}: {best} tells {label} by AUROC {row[column]:.3f}; {row[f'{by}:term']} "
            f"(p {row[f'{by}:p']:.1e}, q {row[f'{by}:q']:.1e}); "
            f"{row['top_genes']}{again}"
        )
        if follow:
            genes = row["top_genes"].split(", ")
            lines.append(f"  followed and among its ten genes: {sorted(set(genes) & set(follow))}")
    for where, table_of in (("", found.deletion), (" of held-out prototypes", found.held_out)):
        if len(table_of):
            curves = deletion.areas(table_of).groupby("kind").mean()
            n = table_of["concept"].nunique()
            lines += [
                f"area under {kind} curves{where} ({n} concepts): {_dict(row)}"
                for kind, row in curves.iterrows()
            ]
    for name, row in found.strengths.iterrows():
        lines.append(
            f"{name}: strong {row['strong']:.0%}, weak {row['weak']:.0%} of {row['n']:g}; by "
            f"chance {row['chance']:.0%} strong or weak; with a term of q <= .05 {row['q']:.0%}; "
            f"{row['few_cells']:g} are active in fewer than {study.FEW} cells"
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

    chosen = run.results.loc[members[0]]
    n_live = int((found.features["kind"] == "concept").sum())
    parts = [
        (
            "What was found",
            [
                report.paragraph(
                    f"{len(subject.x)} cells, {subject.x.shape[1]} dimensions of "
                    f"{subject.model_name}, {int(chosen['n_latents'])} concepts of which {n_live} "
                    f"are live on training cells; k = {int(chosen['k'])}, R2 "
                    f"{chosen['validation_r2']:.3f} on held-out cells. {_studied(found)} "
                    f"and {len(found.neurons)} neurons, drawn at random, were studied."
                ),
                report.items(told(found, learned, settings["follow"])),
                report.table(_shown(found)),
                report.picture(pictures["cells"], "Cells by label, then by activation."),
                *_picture(
                    pictures,
                    "attributed",
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
                    "The best of many terms has a small p by chance alone: see the columns. "
                    f"{_few(found)}{_in_no_term(found)}"
                ),
                report.paragraph(_coverage(subject.sets.coverage)),
            ],
        ),
        *([] if found.attribution is None else [_against_dge(found, pictures, settings)]),
        (
            "Other methods, and what can be learned from each",
            [
                report.paragraph(PAPER_METHODS),
                report.paragraph(SEMI_NMF),
                report.items([_tested(task, cells) for task, cells in learned.tested.items()]),
                report.table(learned.methods),
                report.picture(pictures["confusion"], "Shares of a class's test cells.", "60rem"),
                report.table(learned.coefficients),
            ],
        ),
        ("Dictionaries (Table 3)", [report.table(study.table_3(run))]),
    ]  # fmt: skip
    if found.stability is not None:
        concepts = found.features[found.features["kind"] == "concept"]
        parts.append(
            (
                "Stability",
                [
                    report.paragraph(f"Of the live concepts {replicates.told(concepts)}."),
                    report.picture(pictures["replication"], "All live concepts of all seeds.",
                                   "50rem"),
                ],
            )
        )  # fmt: skip
    parts += [
        *([_in_model(tested)] if tested else []),
        ("Files", [report.items([f"{name}: {what}" for name, what in FILES.items()])]),
        ("Settings", [report.code(json.dumps(settings, indent=1))]),
    ]
    return parts


def _picture(pictures: dict[str, Path], name: str, caption: str) -> list[str]:
    """A picture, if it was drawn."""
    return [report.picture(pictures[name], caption)] if name in pictures else []


def _against_dge(
    found: Explained, pictures: dict[str, Path], settings: dict[str, Any]
) -> tuple[str, list[str]]:
    """Deletion curves, and Table 6."""
    return (
        "Attribution against differential expression",
        [
            report.picture(
                pictures["deletion"],
                "Activation left as genes are exchanged, mean and sd over concepts. Attribution is "
                "ranked on the very cells of the curve, which flatters it, as in the paper.",
                "40rem",
            ),
            *_held_out(found, pictures, settings["prototypes"]),
            report.table(found.table_6.rename_axis("quantity").reset_index()),
            report.paragraph(
                "The paper's Table 6, its exchanged cells put right: "
                + "; ".join(
                    f"{' '.join(key)}: {_dict(value)}" for key, value in concept_terms.PAPER.items()
                )
            ),
        ],
    )


def _in_model(tested: dict[str, pd.DataFrame]) -> tuple[str, list[str]]:
    """What reconstructions and single concepts do to the model."""
    return (
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
    )


def _held_out(found: Explained, pictures: dict[str, Path], prototypes: int) -> list[str]:
    """The curves of cells that attribution has not seen, beside those of its own for the same
    concepts."""
    table = found.held_out
    told = (
        f"Held-out prototypes: the next {prototypes} cells of each concept after the {prototypes} "
        "that its attribution was computed on, with the silent cells nearest to them. "
    )
    if not len(table):
        return [report.paragraph(told + "No concept has as many cells.")]
    there = found.deletion[found.deletion["concept"].isin(table["concept"])]
    areas = [deletion.areas(each).groupby("kind").mean() for each in (there, table)]
    kinds = ["the cells of the attribution", "held-out prototypes"]
    joined = pd.concat(areas, keys=kinds, names=["cells"]).reset_index()
    return [
        report.picture(
            pictures["deletion_held_out"], "The same in held-out prototypes, which attribution "
            "has not seen.", "40rem",
        ),
        report.paragraph(
            f"{told}{table['concept'].nunique()} of {found.deletion['concept'].nunique()} concepts "
            "have some; areas under the curves of these:"
        ),
        report.table(joined),
    ]  # fmt: skip


def _tested(task: str, cells: Tested) -> str:
    """How many cells a probe learned from and was tested on, and whether any method knew them."""
    split = cells.split
    where = (
        "those tested are cells that no dictionary and no other method was fitted to"
        if cells.unseen
        else "too few cells of a class were held out of the dictionaries' training, so those "
        "tested are any cells, most of them seen in training without their labels"
    )
    return (
        f"{task}: {split.n_train} cells a class to learn from and {split.n_test} to be tested on, "
        f"of {len(split.classes)} classes (chance {1 / len(split.classes):.2f}); {where}; "
        f"{split.factor:.3g} of what was asked for; left out, with few cells: "
        f"{_dict(split.left_out) or 'none'}"
    )


def _shown(found: Explained) -> pd.DataFrame:
    table = found.features.loc[shown_concepts(found)]
    columns = ["density", *(name for name in table if name.endswith((":best", ":auroc"))),
               *replicates.of(table), "attribution:term", "attribution:p", "dge:term",
               "dge:p", "top_genes"]  # fmt: skip
    return table[[name for name in columns if name in table]].rename_axis("concept").reset_index()


def _studied(found: Explained) -> str:
    """How many concepts were drawn, and how many came beside them."""
    drawn = int(found.features.loc[found.concepts, "drawn"].sum())
    beside = len(found.concepts) - drawn
    return f"{drawn} concepts" + f" (and {beside} that tell a label best)" * (beside > 0)


def _few(found: Explained) -> str:
    """How many concepts are active in so few cells that labels, genes and terms are of these."""
    concepts = found.features[found.features["kind"] == "concept"]
    few = concepts["n_active"] < study.FEW
    studied = int(few.loc[found.concepts].sum())
    return (
        f"{int(few.sum())} of the {len(concepts)} live concepts are active in fewer than "
        f"{study.FEW} cells, {studied} of those studied: what is told of them is of single cells."
    )


def _in_no_term(found: Explained) -> str:
    if found.attribution is None:
        return ""
    values = found.features.loc[found.concepts, "in_no_term"].dropna()
    share = f"{np.mean(values):.0%}" if len(values) else "none"
    return (
        f" Of a concept's important genes (attribution above .05) {share} are in no term, in the "
        "mean."
    )


def _coverage(coverage: Coverage) -> str:
    return f"Gene sets: {coverage}."


def _dict(values: Any) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in dict(values).items())

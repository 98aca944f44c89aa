"""The page of `cell_type_programs`: our numbers, the paper's beside them, and how to read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import report
from experiments.cell_type_features import FEW, Cells
from experiments.cell_type_figures import of_shown

FEATURES = 25  # on the page; all are in features.parquet


def write(
    out: Path,
    tables: dict[str, pd.DataFrame],
    shown: dict[str, Any],
    pictures: dict[str, Path],
    cells: Cells,
    settings: dict[str, Any],
) -> None:
    """Write `out`/report.html."""
    held_out = not np.array_equal(cells.choose, cells.measure)
    name = f"{shown['layer']}, λ = {shown['l1_weight']:g} ({shown['reduction']}), " \
           f"{shown['n_latents']:g} latents, cells by {WAYS[shown['cell_features']]}"  # fmt: skip
    sections = [
        ("In short", [report.items(summary(tables, shown, cells, held_out, name))]),
        (
            "Cells (table 1)",
            [report.table(tables["table_1"])],
        ),
        (
            "Sparsity and reconstruction (table 2)",
            [
                report.paragraph(
                    "L0, R², alive and dead (active on less than 1 % of the inputs) are of "
                    f"{'held-out rows' if held_out else 'the rows trained on'}; the columns of "
                    "cells count the same latents over cells. The two denominators differ much: "
                    "the paper's 699 alive latents of table 2 and 160 of section 4.4 (layer 11, "
                    "λ = 10) may be one dictionary. r2_cells is of cells' vectors under it, where "
                    "it encodes these. The paper's numbers are of another model's layers, other "
                    "cells and genes: they stand beside ours to be compared, not to agree."
                ),
                report.table(tables["table_2"]),
                report.picture(pictures["reduction"], "What a penalty means depends on whether the "
                               "loss is a mean over dimensions and latents (the paper's code) or a "
                               "sum (its equation 4). Dotted: the mean's curve, its penalty times "
                               "d / latents."),
            ],
        ),
    ]  # fmt: skip
    if len(tables["table_3"]):
        sections.append(("Low penalties (table 3)", [report.table(tables["table_3"])]))
    sections += [
        (
            "Layers",
            [
                report.picture(pictures["layers"], "Held-out AUROC, one side; dotted: marker sets "
                               "exchanged for other genes of like expression."),
                report.table(progression(tables["layers"])),
            ],
        ),
        (
            "Latents, components, dimensions (table 4)",
            [
                report.paragraph(
                    "Mean over types of the best one's AUROC, chosen on some cells and measured on "
                    "others, with one side for all (_one) and with both for all (_two); of "
                    f"{FEW} at random (_of_{FEW}), since more candidates have a better best. "
                    "Annotated: share of the alive ones with a marker set at q < .05; beside it "
                    "with cells permuted, and with sets of other genes of like expression. "
                    "authors_ is their mixture: latents with one side, components with both, "
                    "chosen and measured on all cells, which is what the paper's numbers compare."
                ),
                report.table(tables["table_4"]),
                report.picture(pictures["types"], f"{name}: the best one of every type; filled on "
                               "held-out cells, hollow where it was chosen."),
            ],
        ),
    ]  # fmt: skip
    if "widths" in pictures:
        sections.append(("Widths", [report.picture(pictures["widths"], "By dictionary size.")]))
    sections.append(("Features of types", of_types(tables, shown, pictures, name)))
    sections.append(("Marker sets", of_sets(tables, shown, pictures, cells, name)))
    sections.append(("Metadata", of_metadata(tables, shown, cells)))
    sections.append(("Settings", [report.code(json.dumps(settings, indent=1))]))
    report.write(out / "report.html", "Cell-type programs", sections)


WAYS = {
    "cells": "a dictionary of their vectors",
    "mean": "the mean of their tokens' codes",
    "pooled": "a dictionary of tokens on their vectors (the authors' way)",
}


def summary(
    tables: dict[str, pd.DataFrame], shown: dict[str, Any], cells: Cells, held_out: bool, name: str
) -> list[str]:
    """The page in a few lines."""
    rows = of_shown(tables["layers"], shown).set_index("features")
    of = rows.loc["latents"]
    lines = [
        f"{len(cells.labels)} cells, {len(cells.genes)} genes, {len(cells.sets.names)} marker sets",
        f"shown in detail: {name}",
        f"mean best AUROC over {int(of['n_types'])} types, "
        + ("held-out cells" if held_out else "on the cells it was chosen on")
        + f", one side: latents {of['auroc_one']:.3f}, components "
        f"{rows.at['components', 'auroc_one']:.3f}, dimensions "
        f"{rows.at['dimensions', 'auroc_one']:.3f}; both sides: {of['auroc_two']:.3f}, "
        f"{rows.at['components', 'auroc_two']:.3f}, {rows.at['dimensions', 'auroc_two']:.3f}",
        f"the best of as many latents by permuted labels, measured where chosen: "
        f"{of['by_chance_auroc_one']:.3f}",
        f"{int(of['specific'])} latents tell a type above .8 on either part of the cells",
        f"{int(of['annotated_one'])} of {int(of['alive'])} latents alive in cells, of "
        f"{int(of['n_features'])} in all, have a marker set at q < .05; with cells permuted "
        f"{int(of['permuted_annotated_one'])}, with other genes of like expression "
        f"{int(of['relabelled_annotated_one'])}",
    ]  # fmt: skip
    return lines


def progression(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that section 4.2 speaks of."""
    wanted = ["layer", "cell_features", "features", "reduction", "l1_weight", "n_latents",
              "auroc_one", "paper_auroc", "types_one", "paper_types", "n_types", "specific",
              "annotated_one", "paper_annotated", "relabelled_annotated_one", "alive",
              "paper_alive", "r2_cells"]  # fmt: skip
    return table[[column for column in wanted if column in table]]


def of_types(
    tables: dict[str, pd.DataFrame], shown: dict[str, Any], pictures: dict[str, Path], name: str
) -> list[str]:
    """The best latent of every type with its genes, gene tokens and marker sets."""
    labels = of_shown(tables["labels"], shown, ("latents",))
    labels = labels[(labels["sides"] == "one") & labels["held_out"]]
    about = of_shown(tables["features"], shown, ("latents",)).set_index("feature")
    table = labels[["label", "cells", "feature", "auroc_chosen", "auroc"]].reset_index(drop=True)
    for column in ("marker_sets", "top_genes"):
        table[column] = about[column].reindex(table["feature"]).to_numpy(object)
    if "tokens" in tables:
        tokens = of_shown(tables["tokens"], shown, ("latents",))
        joined = tokens.groupby("feature")["gene"].agg(", ".join)
        table["top_tokens"] = joined.reindex(table["feature"]).to_numpy(object)
    return [
        report.paragraph(f"{name}. Chosen on some cells, `auroc` is of the others."),
        report.table(table),
        report.picture(pictures["label_auroc"], "The same latents for every type, held-out cells."),
        report.picture(pictures["cells"], "Cells by type, then by activation; grey: silent."),
    ]


def of_sets(
    tables: dict[str, pd.DataFrame],
    shown: dict[str, Any],
    pictures: dict[str, Path],
    cells: Cells,
    name: str,
) -> list[str]:
    """How often each set was found, and the features it was found in."""
    lines = [
        report.paragraph(
            f"{name}. Fisher's exact test of the {cells.n_top} most correlated genes (r > 0) of "
            f"each latent alive in cells; universe: "
            + (f"{len(cells.genes)} measured genes" if cells.universe == "measured"
               else "the genes of the sets only, as in the authors' code")
            + "; q over all latents and sets. A set of highly expressed genes is found in any "
            "selection of well-measured genes: read the bars beside those of other genes of like "
            "expression."
        )
    ]  # fmt: skip
    if "marker_sets" in pictures:
        lines.append(report.picture(pictures["marker_sets"], "Latents by marker set.", "75%"))
    if "markers" in tables:
        found = of_shown(tables["markers"], shown, ("latents",))
        found = found[found["side"] == "up"].sort_values("q", kind="stable").head(FEATURES)
        lines.append(report.table(found[["feature", "set", "hits", "effect", "p", "q"]]))
    return lines


def of_metadata(tables: dict[str, pd.DataFrame], shown: dict[str, Any], cells: Cells) -> list[str]:
    """How many features are specific to a value of each column."""
    about = of_shown(tables["features"], shown, ("latents",))
    rows = []
    for column in cells.metadata:
        verdict = about[f"{column}_verdict"].value_counts()
        specific = about[about[f"{column}_verdict"] == "specific"]
        most = specific[f"{column}_label"].value_counts().head(5)
        rows.append(
            {"column": column}
            | {name: int(verdict.get(name, 0)) for name in VERDICTS}
            | {"specific to": ", ".join(f"{label} {count}" for label, count in most.items())}
        )
    return [
        report.paragraph(
            f"A feature is specific to a value that at least {cells.share:.0%} of its active cells "
            f"have, with at least {cells.min_cells} active cells. Means of tokens' codes are above "
            "0 in nearly all cells, so that few features can be specific by this rule."
        ),
        report.table(pd.DataFrame(rows)),
    ]


VERDICTS = ("specific", "unspecific", "not enough data")

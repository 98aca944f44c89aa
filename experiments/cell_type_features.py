"""Everything that `cell_type_programs` says of a set of features, be they latents, principal
components or the layer's own dimensions: the same functions for all."""

import dataclasses

import numpy as np
import pandas as pd
from scipy import sparse

from analysis import cell_types, characterisation, gene_associations, markers, nulls
from analysis.features import Matrix
from analysis.gene_sets import GeneSets

ALIVE = 0.01  # of the cells; Kendiukhov, table 2
FEW = 50  # features that are compared with as many components
STORED_GENES = 10  # of a feature, in genes.parquet
NULLS = ("", "permuted_", "relabelled_")  # what `annotated` is of: these, and those of no meaning


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The cells that features are looked at in, and how.

    labels: one per cell. metadata: columns of obs to describe features by.
    expression: [cells, genes]; its genes are those of `genes` and `sets`: the universe.
    choose, measure: positions of cells; the same for both where nothing is held out.
    n_top: genes of a feature that are tested for markers. universe: of `markers.mark`.
    least: cells of a label on either side. share, min_cells: of metadata specificity.
    """

    labels: pd.Series
    metadata: pd.DataFrame
    expression: sparse.csr_matrix
    genes: np.ndarray
    sets: GeneSets
    choose: np.ndarray
    measure: np.ndarray
    n_top: int = 50
    universe: str = "measured"
    least: int = 5
    share: float = 0.7
    min_cells: int = 100
    seed: int = 0

    def of(self, positions: np.ndarray) -> "Cells":
        """The same of some cells; positions ascend."""
        place = np.full(len(self.labels), -1)
        place[positions] = np.arange(len(positions))
        sides = {
            name: place[cells[place[cells] >= 0]]
            for name, cells in {"choose": self.choose, "measure": self.measure}.items()
        }
        return dataclasses.replace(
            self, labels=self.labels.iloc[positions], metadata=self.metadata.iloc[positions],
            expression=self.expression[positions], **sides,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """What came out; `feature` everywhere is the column of z.

    summary: numbers of the whole. features: one row per alive feature. labels: best feature of
    every label, for each number of sides. markers: features and sets at FDR < 0.05, up or down.
    sets: features of each set, beside nulls. genes: the top genes of each feature.
    """

    summary: dict[str, float]
    features: pd.DataFrame
    labels: pd.DataFrame
    markers: pd.DataFrame
    sets: pd.DataFrame
    genes: pd.DataFrame


def study(z: Matrix, cells: Cells, signed: bool = False) -> Study:
    """Describe the features z [cells, features] by types, genes, marker sets and metadata.

    Args:
        signed: components or dimensions, which have no zero: all that vary are alive, and there are
            no active cells for metadata to be counted in.
    """
    n_active = np.asarray((z != 0).sum(axis=0)).ravel()
    alive = np.flatnonzero(n_active >= ALIVE * z.shape[0])
    z = sparse.csc_array(z)
    summary = {
        "n_cells": z.shape[0], "n_measured": len(cells.measure), "n_features": z.shape[1],
        "live": int((n_active > 0).sum()), "alive": len(alive), "l0": n_active.sum() / z.shape[0],
    }  # fmt: skip
    areas, labels, per_feature = _types(z, cells)
    summary |= areas
    table = per_feature.iloc[alive].reset_index()
    if not signed:
        table = pd.concat([table, _metadata(z, cells).iloc[alive].reset_index(drop=True)], axis=1)
    marks, genes, sets = (pd.DataFrame() for _ in range(3))
    summary |= {f"{null}annotated_{sides}": 0 for null in NULLS for sides in cell_types.SIDES}
    table[["marker_sets", "top_genes"]] = None
    if len(alive):
        found, marks, genes, sets = _genes(z[:, alive], cells)
        summary |= found
        for frame in (marks, genes):
            frame["feature"] = alive[frame["feature"]]
        named = marks[marks["side"] == "up"].sort_values("q", kind="stable")
        named = named.groupby("feature")["set"].agg("; ".join)
        table["marker_sets"] = table["feature"].map(named)
        shown = genes[genes["side"] == "up"].groupby("feature")["gene"].agg(", ".join)
        table["top_genes"] = table["feature"].map(shown)
    return Study(summary, table, labels, marks, sets, genes)


def _types(z: Matrix, cells: Cells) -> tuple[dict[str, float], pd.DataFrame, pd.DataFrame]:
    """Of the AUROC: numbers, the best feature of each label, and each feature's best label.

    Held out; on all cells, as the authors' code has it; and on all cells by permuted labels, which
    is what so many features reach where there is nothing to tell.
    """
    everything = np.arange(z.shape[0])
    rng = np.random.default_rng(cells.seed)
    shuffled = pd.Series(cells.labels.to_numpy()[rng.permutation(len(cells.labels))])
    cases = {
        "": cell_types.areas(z, cells.labels, cells.choose, cells.measure, cells.least),
        "all_cells_": cell_types.areas(z, cells.labels, everything, everything, cells.least),
        "by_chance_": cell_types.areas(z, shuffled, everything, everything, cells.least),
    }
    summary, tables = {}, []
    for case, areas in cases.items():
        for sides in cell_types.SIDES:
            best = areas.best(sides)
            summary[f"{case}auroc_{sides}"] = float(best["auroc"].mean())
            summary[f"{case}types_{sides}"] = int((best["auroc"] > cell_types.SPECIFIC).sum())
            summary[f"{case}n_types"] = len(best)
            if case != "by_chance_":
                tables.append(best.assign(sides=sides, held_out=case == ""))
    for sides in cell_types.SIDES:
        summary[f"few_auroc_{sides}"] = cases[""].best_of(FEW, sides, seed=cells.seed)
    per_feature = cases[""].per_feature("one")
    summary["specific"] = int(per_feature["specific"].sum())
    return summary, pd.concat(tables, ignore_index=True), per_feature


def _metadata(z: sparse.csc_array, cells: Cells) -> pd.DataFrame:
    """Which value of each column most of a feature's active cells have, with a verdict."""
    columns = {"n_active": np.diff(z.indptr)}
    for name, values in cells.metadata.items():
        if values.nunique() < 2:  # among these cells: nothing to be specific to
            columns |= {f"{name}_label": None, f"{name}_share": np.nan,
                        f"{name}_verdict": "not enough data"}  # fmt: skip
            continue
        found = characterisation.metadata_specificity(z, values, cells.share, cells.min_cells)
        columns |= {f"{name}_{key}": found[key] for key in ("label", "share", "verdict")}
    return pd.DataFrame(columns)


def _genes(
    z: sparse.csc_array, cells: Cells
) -> tuple[dict[str, float], pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Top genes, the marker sets among them, and how many features have one by chance."""
    x, n_genes = cells.expression, len(cells.genes)
    z = sparse.csr_array(z)
    here = (z[cells.choose], x[cells.choose])
    held_out = None
    if not np.array_equal(cells.choose, cells.measure):
        held_out = (z[cells.measure], x[cells.measure])
    top = gene_associations.top_genes(*here, cells.n_top, held_out=held_out)
    chosen = {side: some.selected(n_genes) for side, some in top.items()}
    permuted = nulls.permuted_cells(here[0], cells.seed)
    by_chance = gene_associations.top_genes(permuted, here[1], cells.n_top)
    means = np.asarray(x.mean(axis=0)).ravel()
    relabelled = nulls.relabelled_genes(cells.sets, means, cells.seed)
    elsewhere = {side: some.selected(n_genes) for side, some in by_chance.items()}
    of = ((chosen, cells.sets), (elsewhere, cells.sets), (chosen, relabelled))
    cases = dict(zip(NULLS, of, strict=True))
    summary, counts, tables = {}, {}, []
    for case, (selected, sets) in cases.items():
        one = markers.mark(selected["up"], sets, cells.universe)
        two = markers.mark_sides(selected, sets, cells.universe)
        either = two["up"].annotated | two["down"].annotated
        summary[f"{case}annotated_one"] = int(one.annotated.sum())
        summary[f"{case}annotated_two"] = int(either.sum())
        counts[f"{case}found"] = one.counts()
        if case == "":
            tables = [one.table().assign(side="up"), two["down"].table().assign(side="down")]
    sizes = pd.Series(cells.sets.membership.sum(axis=1).astype(int), index=cells.sets.names)
    sets = pd.DataFrame({"genes": sizes} | counts).rename_axis("set").reset_index()
    return summary, pd.concat(tables, ignore_index=True), _gene_table(top, cells.genes), sets


def _gene_table(top: dict[str, gene_associations.TopGenes], genes: np.ndarray) -> pd.DataFrame:
    """The first genes of each feature and side: `feature`, `side`, `rank`, `gene`, `r`, ..."""
    tables = []
    for side, found in top.items():
        some = found.genes[:, :STORED_GENES]
        feature, rank = np.nonzero(some >= 0)
        values = {name: getattr(found, name)[feature, rank] for name in ("r", "r_held_out")}
        gene = genes[some[feature, rank]]
        tables.append(
            pd.DataFrame({"feature": feature, "side": side, "rank": rank, "gene": gene, **values})
        )
    return pd.concat(tables, ignore_index=True)

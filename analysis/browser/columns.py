"""The table of features: columns of one name whatever program wrote them, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.browser.folder import Folder

TEXT, NUMBER, FLAG, CATEGORY = "text", "number", "flag", "category"
CELLS, SHARE = "cells", "share, 0 to 1"
SIGNIFICANT = 0.05  # q at which GSEA names a feature
MOST_CATEGORIES = 200  # of a column to be chosen from a list


@dataclass(frozen=True)
class Column:
    """A column of the table: its kind is one of text, number, flag, category."""

    name: str
    title: str
    kind: str
    unit: str | None
    description: str


STANDARD = (
    Column("kind", "Kind", CATEGORY, None,
           "A concept is a feature that the dictionary learned; a neuron is one dimension of the "
           "model's own embedding, on one side of its median."),
    Column("label", "Best label", CATEGORY, None,
           "The label of the cells that the feature tells best from all others, by AUROC."),
    Column("label_column", "Of column", CATEGORY, None, "The column of metadata of that label."),
    Column("auroc", "AUROC", NUMBER, "0 to 1",
           "How well the activation tells the cells of the best label from the others: 1 is "
           "perfectly, 0.5 not at all. The chance that a cell of the label has the higher one."),
    Column("term", "Best term", TEXT, None, "The gene set that names the feature best."),
    Column("term_q", "Term q", NUMBER, "false discovery rate",
           "Calibrated: how often terms as striking would be false, among the terms of this "
           "feature."),
    Column("term_log10_q", "Term −log10 q", NUMBER, "−log10", "The same as −log10: 2 is q = 0.01."),
    Column("term_down", "Best term, down", TEXT, None,
           "The gene set whose genes are lower in the feature's cells."),
    Column("n_terms", "Terms", NUMBER, "gene sets", "How many gene sets name the feature."),
    Column("scope", "Scope", CATEGORY, None,
           "Local: active mostly in cells of one label. Global: across labels."),
    Column("density", "Density", NUMBER, SHARE, "Share of all cells in which it is active."),
    Column("n_active", "Active cells", NUMBER, CELLS, "Cells in which it is active."),
    Column("mean_active", "Mean activation", NUMBER, "activation", "Over its active cells."),
    Column("max_activation", "Highest activation", NUMBER, "activation", "In any cell."),
    Column("replication", "Replication", NUMBER, SHARE,
           "Share of dictionaries of other seeds that have a feature of the same direction."),
    Column("technical", "Technical", FLAG, None,
           "A technical column, such as the counts of a cell or its batch, explains much of it."),
    Column("top_genes", "Top genes", TEXT, None, "The genes that are highest in its cells."),
    Column("attributed_genes", "Driving genes", TEXT, None,
           "The genes that drive it most (attribution, of `sae-jax concepts`)."),
    Column("latent", "Latent", NUMBER, None, "Its number in the dictionary."),
)  # fmt: skip

# By name or pattern: title, unit, description. `\1` is the column of metadata.
OTHERS = {
    r"replicated_by_activation": ("Replication by activation", SHARE,
        "Share of dictionaries of other seeds that have a feature active in the same cells."),
    r"best_cosine": ("Best cosine", "cosine", "With the most alike feature of another seed."),
    r"mean_activation": ("Mean over all cells", "activation", "Silent cells count as 0."),
    r"n_high": ("High cells", CELLS, "Those in which it is highest, compared with silent ones."),
    r"n_low": ("Silent cells", CELLS, "Those in which it is not active."),
    r"n_relevant": ("Differing genes", "genes", "Genes that differ between high and silent cells."),
    r"testable": ("Testable", None, "It has cells enough on both sides to be named by a term."),
    r"paper_annotated": ("Named by the published rule", None,
        "Any term of p < .01, uncorrected: nearly every feature passes."),
    r"best_term_auc": ("Best term's AUC", "0 to 1", "Chance that a gene of the term ranks higher."),
    r"best_term_down_auc": ("Down term's AUC", "0 to 1", "The same of the term that is down."),
    r"best_term_down_log10_q": ("Down term's −log10 q", "−log10", "2 is q = 0.01."),
    r"technical_column": ("Technical column", None, "The column that explains it most."),
    r"technical_explained": ("Explained by it", SHARE, "Share of the variance of its ranks."),
    r"kind_code": ("Scope by the authors' code", None,
        "Local or global as the published code has it: a type counts where eq. 8's alpha is above "
        "0, not from 0.05 on as in the paper and in the column Scope."),
    r"local_label_text": ("Local to", None, "Of a local feature the label, as the scope has it."),
    r"local_label_code": ("Local to, by the authors' code", None,
        "Of a feature that is local by the authors' code, the label."),
    r"drawn": ("Drawn at random", None, "Chosen for attribution by chance, not for a label."),
    r"n_important": ("Important genes", "genes", "Genes of an attribution above 0.05."),
    r"in_no_term": ("Genes in no term", SHARE, "Share of the important genes that no set holds."),
    r"(.+):label": (r"Commonest \1", None, r"The commonest label of \1 among its active cells."),
    r"(.+):share": (r"Share of it (\1)", SHARE, "Share of the active cells that have this label."),
    r"(.+):verdict": (r"Verdict (\1)", None,
        "Specific at 70 % or more of the active cells; nothing is said of fewer than 100 cells."),
    r"(.+):best": (r"Best label (\1)", None, "The label that it tells best, by AUROC."),
    r"(.+):auroc": (r"AUROC (\1)", "0 to 1", "Of this label against the others of the column."),
    r"(attribution|dge):term": (r"Best term (\1)", None, r"Of the smallest p in GSEA (\1)."),
    r"(attribution|dge):nes": (r"NES (\1)", "normalised enrichment score", "Of the best term."),
    r"(attribution|dge):p": (r"p (\1)", None, "Of the best term, uncorrected."),
    r"(attribution|dge):q": (r"q (\1)", "false discovery rate", "Of the best term."),
    r"(attribution|dge):strength": (r"Strength (\1)", None,
        "Strong: p <= 5e-5 of the best term; weak: p <= 5e-3."),
    r"(attribution|dge):least_q": (r"Least q (\1)", "false discovery rate", "Over all its terms."),
}  # fmt: skip

# Standard columns that another name already holds.
_SAME = {
    "label": "best_label", "auroc": "best_label_auroc", "term": "best_term",
    "term_log10_q": "best_term_log10_q", "term_down": "best_term_down", "scope": "kind_text",
    "replication": "replicated_by_direction",
}  # fmt: skip


def standard(folder: Folder, hidden: Collection[str] = ()) -> pd.DataFrame:
    """A folder's table with the standard columns that it can fill; the others after them.

    What the program found out about `hidden` columns of the cells' metadata is left out.
    """
    table = _without(folder, set(hidden)).rename(columns={old: new for new, old in _SAME.items()})
    if folder.program == "concepts" and (folder.path / "attribution.parquet").exists():
        table = table.rename(columns={"top_genes": "attributed_genes"})
    table = table.loc[:, ~table.columns.duplicated()]
    if "label" in table:
        known = table["label"].notna().to_numpy()
        table["label_column"] = np.where(known, folder.settings.get("label"), None)
    areas = {name.removesuffix(":auroc"): table[name] for name in table if name.endswith(":auroc")}
    if areas and "label" not in table:
        names = [name for name in areas if f"{name}:best" in table]
        held = np.stack([areas[name].to_numpy(np.float64, na_value=np.nan) for name in names])
        none = np.isnan(held).all(axis=0)
        best = np.where(np.isnan(held), -np.inf, held).argmax(axis=0)
        labels = np.stack([table[f"{name}:best"].astype(object).to_numpy() for name in names])
        rows = np.arange(len(table))
        table["label"] = np.where(none, None, labels[best, rows])
        table["label_column"] = np.where(none, None, np.asarray(names, object)[best])
        table["auroc"] = np.where(none, np.nan, held[best, rows])
    if "term" not in table and "attribution:term" in table and "attribution:q" in table:
        q = table["attribution:q"].to_numpy(np.float64, na_value=np.nan)
        named = q <= SIGNIFICANT
        table["term"] = np.where(named, table["attribution:term"].astype(object), None)
        log10_q = -np.log10(np.maximum(q, np.finfo(float).tiny))
        table["term_log10_q"] = np.where(named, log10_q, np.nan)
    if "best_term_q" in table:  # of the quickstart
        table["term_q"] = table.pop("best_term_q")
        with np.errstate(divide="ignore"):
            log10_q = -np.log10(table["term_q"].to_numpy(np.float64, na_value=np.nan))
        table["term_log10_q"] = log10_q
    elif "term_log10_q" in table:
        log10_q = table["term_log10_q"].to_numpy(np.float64, na_value=np.nan)
        table["term_q"] = 10.0**-log10_q
    for name in table.select_dtypes(["object", "category"]):
        texts = table[name].astype(object)
        table[name] = texts.where(texts.notna() & ~texts.isin(["", "nan"]), None)
    return table


def _without(folder: Folder, hidden: set[str]) -> pd.DataFrame:
    table = folder.table
    dropped = set()
    if folder.settings.get("label") in hidden:
        dropped |= {"best_label", "best_label_auroc"}
        told = ("kind_", "local_label_", "auroc:")
        dropped |= {name for name in table if name.startswith(told)}
    for column in hidden:
        dropped |= {name for name in table if name.startswith(f"{column}:")}
        dropped |= {f"{column}_{suffix}" for suffix in ("high", "low", "alpha", "rho", "q")}
    table = table.drop(columns=[name for name in table if name in dropped])
    if "technical_column" in table:
        column = table["technical_column"].astype(object)
        table["technical_column"] = column.where(~column.isin(hidden), None)
    return table


def merged(tables: Sequence[pd.DataFrame], places: Sequence[np.ndarray], n: int) -> pd.DataFrame:
    """The tables of folders as one of n features, the standard columns first.

    What several tell of a feature, the first tells.

    Args:
      places: of each table the number in the run of each of its rows.
    """
    found: dict[str, pd.Series] = {}
    for table, place in zip(tables, places, strict=True):
        for name in table:
            values = pd.Series(table[name].to_numpy(), index=place).reindex(range(n))
            values = _plain(values)
            if name not in found:
                found[name] = values
            else:
                first = found[name]
                found[name] = first.where(first.notna(), values)
    order = [column.name for column in STANDARD if column.name in found]
    order += [name for name in found if name not in order]
    return pd.DataFrame({name: _typed(found[name]) for name in order})


def _plain(values: pd.Series) -> pd.Series:
    """Numbers as float64, flags and texts as objects, so that gaps have room."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return pd.Series(values.to_numpy(np.float64, na_value=np.nan), index=values.index)
    return values.astype(object)


def _typed(values: pd.Series) -> pd.Series:
    """Whole numbers as such where none is missing; flags as booleans."""
    if values.dtype == object:
        known = values.dropna()
        if len(known) and all(isinstance(value, bool | np.bool_) for value in known):
            return values.astype("boolean") if len(known) < len(values) else values.astype(bool)
        texts = [None if missing else str(value)
                 for value, missing in zip(values, values.isna(), strict=True)]  # fmt: skip
        return pd.Series(texts, index=values.index, dtype=object)
    whole = values.notna().all() and (values == np.rint(values)).all() and values.abs().max() < 1e15
    return values.astype(np.int64) if whole and len(values) else values


def describe(features: pd.DataFrame) -> list[Column]:
    """What each column of the table is, the features' names first."""
    names = Column("name", "Feature", TEXT, None, "Its name: press it for everything known of it.")
    known = {column.name: column for column in STANDARD}
    return [names, *(known.get(name) or _other(name, features[name]) for name in features)]


def _other(name: str, values: pd.Series) -> Column:
    kind = kind_of(values)
    for pattern, (title, unit, description) in OTHERS.items():
        if match := re.fullmatch(pattern, name):
            told = (match.expand(part) if part and match.groups() else part
                    for part in (title, unit, description))  # fmt: skip
            title, unit, description = told
            return Column(name, title, kind, unit, description)
    return Column(name, name, kind, None, f"The column {name} of features.parquet.")


def kind_of(values: pd.Series) -> str:
    """The kind of a column, by what it holds."""
    if pd.api.types.is_bool_dtype(values):
        return FLAG
    if pd.api.types.is_numeric_dtype(values):
        return NUMBER
    return CATEGORY if values.nunique() <= min(MOST_CATEGORIES, len(values) / 2) else TEXT

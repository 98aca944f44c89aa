"""Genes of a file matched to genes of a model: by name, never by position."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np
import pandas as pd
import scipy.sparse

from extract.errors import InputError, listed

_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?", re.IGNORECASE)
# How the genes of a file or of a model are named, in words.
NAMINGS = {"symbol": "gene symbol", "ensembl": "Ensembl id"}


class Annotated(Protocol):
    """Whatever says what its columns are: an AnnData, an `Expression`."""

    var: pd.DataFrame


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Which columns of a file are which genes of a model.

    Attributes:
      columns: positions in the file, int64 [matched], ascending.
      index: positions in the model's genes, int64 [matched].
      n_columns, n_genes: of the file, of the model.
      of: whose share of genes the coverage is: of the "model", or of the "smaller" of the two.
    """

    columns: np.ndarray
    index: np.ndarray
    n_columns: int
    n_genes: int
    of: str

    @property
    def coverage(self) -> float:
        """The share of genes found, in 0 .. 1. Columns of one gene count once."""
        most = self.n_genes if self.of == "model" else min(self.n_columns, self.n_genes)
        return self.n_matched / max(most, 1)

    @property
    def n_matched(self) -> int:
        """Genes of the model that the file has."""
        return len(np.unique(self.index))

    def describe(self) -> dict[str, float | int | str]:
        """For provenance and for the dry run."""
        return {
            "columns": self.n_columns,
            "model_genes": self.n_genes,
            "columns_matched": len(self.columns),
            "genes_matched": self.n_matched,
            "coverage": round(self.coverage, 6),
            "coverage_of": self.of,
        }

    def select(self, matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Counts [cells, columns] as the model's genes [cells, genes]: columns of one gene are
        summed, genes that the file lacks are zero. Sums mean something of counts alone: whatever is
        computed of counts comes after this."""
        if matrix.dtype.kind in "biu":  # sums of small integers would wrap
            matrix = matrix.astype(np.float64)
        pick = scipy.sparse.csr_matrix(
            (np.ones(len(self.columns), matrix.dtype), (self.columns, self.index)),
            shape=(self.n_columns, self.n_genes),
        )
        chosen = (matrix @ pick).tocsr()
        chosen.sort_indices()
        return chosen


def align(
    adata: Annotated,
    column: str | None,
    known: Mapping[str, int],
    *,
    n_genes: int,
    of: str,
    min_coverage: float,
    naming: str,
    duplicates: str = "refuse",
    translate: Callable[[str], str] = lambda name: name,
) -> Alignment:
    """Match the names in `var[column]` (None: var_names) to the model's.

    Args:
      adata: an AnnData, or an `Expression`, whose columns may be those of raw.
      known: the position of each of the model's genes, by name.
      n_genes: how many positions there are.
      of: whose share of genes `min_coverage` bounds: of the "model" where every gene is an input
        (scVI), of the "smaller" of file and model where a vocabulary has all genes there are
        (scGPT, Geneformer).
      naming: one of `NAMINGS`, or what the model's names are in words, for messages.
      duplicates: "refuse" or "sum": two columns of one gene of the model.
      translate: from a name in the file to a name in `known`.

    Raises:
      InputError: no such column, coverage under the bound (with the likely reason), duplicates.
    """
    names = gene_names(adata, column)
    where = "var_names" if column is None else f"var['{column}']"
    found = np.array([known.get(translate(name), -1) for name in names], np.int64)
    columns = np.flatnonzero(found >= 0)
    alignment = Alignment(columns, found[columns], len(names), n_genes, of)
    if not isinstance(min_coverage, int | float) or not 0 <= min_coverage <= 1:
        raise InputError(f"min_gene_coverage must be in 0 .. 1, not {min_coverage!r}")
    if not len(columns) or alignment.coverage < min_coverage:
        whose = "the model's" if of == "model" else "the smaller's"
        raise InputError(
            f"{where}: {alignment.n_matched} genes are in both, of {len(names)} in the file and "
            f"{n_genes} of the model ({alignment.coverage:.1%} of {whose}; "
            f"min_gene_coverage={min_coverage:g}). The model names genes by "
            f"{NAMINGS.get(naming, naming)} ({listed(known, 3)}); the file has {listed(names, 3)}. "
            f"{_advice(names, known)}"
        )
    index, times = np.unique(alignment.index, return_counts=True)
    if duplicates not in ("refuse", "sum"):
        raise InputError(f"duplicates must be refuse or sum, not '{duplicates}'")
    if duplicates == "refuse" and (times > 1).any():
        twice = np.isin(alignment.index, index[times > 1])
        which = list(dict.fromkeys(names[i] for i in columns[twice]))
        raise InputError(
            f"{where}: {len(index[times > 1])} genes occur more than once ({listed(which)}); "
            'give duplicates="sum" (--option=duplicates=sum) to add them up, or keep one column'
        )
    return alignment


def gene_names(adata: Annotated, column: str | None) -> list[str]:
    """The names in `var[column]`, or var_names; "" where there is none (NaN, NA, None)."""
    if column is not None and column not in adata.var:
        raise InputError(f"there is no var['{column}']; var has {listed(adata.var.columns, 20)}")
    names = adata.var.index if column is None else adata.var[column]
    return ["" if lacks else str(name) for name, lacks in zip(names, pd.isna(names), strict=True)]


def naming_of(names: Iterable[str]) -> str:
    """Which of `NAMINGS` most of the first 1000 names are of; what is no Ensembl id is a symbol."""
    some = [str(name) for name in itertools.islice(names, 1000)]
    ensembl = sum(bool(_ENSEMBL.fullmatch(name)) for name in some)
    return "ensembl" if ensembl > len(some) / 2 else "symbol"


def _advice(names: list[str], known: Mapping[str, int]) -> str:
    wanted = naming_of(known)
    if wanted != naming_of(names):
        return (
            f"The model wants {NAMINGS[wanted]}s: name the column of var that holds them with "
            "genes= (--genes)"
        )
    return "Name the column of var that holds the model's names with genes= (--genes)"

"""Genes of a file matched to genes of a model: by name, never by position."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import anndata
import numpy as np
import scipy.sparse

from extract.errors import InputError, listed

_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Which columns of a file are which genes of a model.

    Attributes:
      columns: positions in the file, int64 [matched], ascending.
      index: positions in the model's genes, int64 [matched].
      n_columns, n_genes: of the file, of the model.
      coverage: the share of genes found, of the side that `of` names ("file" or "model").
    """

    columns: np.ndarray
    index: np.ndarray
    n_columns: int
    n_genes: int
    of: str

    @property
    def coverage(self) -> float:
        """In 0 .. 1. Columns that share a gene count once each."""
        if self.of == "file":
            return len(self.columns) / max(self.n_columns, 1)
        return len(np.unique(self.index)) / max(self.n_genes, 1)

    def describe(self) -> dict[str, float | int | str]:
        """For provenance and for the dry run."""
        return {
            "columns": self.n_columns,
            "model_genes": self.n_genes,
            "columns_matched": len(self.columns),
            "genes_matched": len(np.unique(self.index)),
            "coverage": round(self.coverage, 6),
            "coverage_of": self.of,
        }

    def select(self, matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Counts [cells, columns] as the model's genes [cells, genes]: columns of one gene are
        summed, genes that the file lacks are zero."""
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
    adata: anndata.AnnData,
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
      known: the position of each of the model's genes, by name.
      n_genes: how many positions there are.
      of: whose share `min_coverage` bounds: "model" where every gene is an input (scVI), "file"
        where the vocabulary is all genes there are (scGPT, Geneformer).
      naming: what the model's names are, in words, for messages.
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
    if not 0 <= min_coverage <= 1:
        raise InputError(f"min_gene_coverage must be in 0 .. 1, not {min_coverage}")
    if not len(columns) or alignment.coverage < min_coverage:
        counts = alignment.describe()
        share = (
            f"{len(columns)} of {len(names)} genes of the file are known to the model"
            if of == "file"
            else f"{counts['genes_matched']} of the model's {n_genes} genes are in the file"
        )
        raise InputError(
            f"{where}: {share} ({alignment.coverage:.1%}; min_gene_coverage={min_coverage:g}). "
            f"The model names genes by {naming} ({listed(known, 3)}); the file has "
            f"{listed(names, 3)}. {_advice(names, known)}"
        )
    index, times = np.unique(alignment.index, return_counts=True)
    if duplicates not in ("refuse", "sum"):
        raise InputError(f"duplicates must be refuse or sum, not '{duplicates}'")
    if duplicates == "refuse" and (times > 1).any():
        twice = np.isin(alignment.index, index[times > 1])
        which = list(dict.fromkeys(names[i] for i in columns[twice]))
        raise InputError(
            f"{where}: {len(index[times > 1])} genes occur more than once ({listed(which)}); "
            'give duplicates="sum" to add them up, or keep one column of each'
        )
    return alignment


def gene_names(adata: anndata.AnnData, column: str | None) -> list[str]:
    """The names in `var[column]`, or var_names."""
    if column is None:
        return [str(name) for name in adata.var_names]
    if column not in adata.var:
        raise InputError(f"there is no var['{column}']; var has {listed(adata.var.columns, 20)}")
    return ["" if value != value else str(value) for value in adata.var[column]]


def _advice(names: list[str], known: Mapping[str, int]) -> str:
    def ensembl(some: list[str]) -> bool:
        return sum(bool(_ENSEMBL.fullmatch(name)) for name in some) > len(some) / 2

    theirs, ours = ensembl(names[:1000]), ensembl([str(name) for name in list(known)[:1000]])
    if ours and not theirs:
        return "The model wants Ensembl ids: name the column of var that holds them with genes="
    if theirs and not ours:
        return "The model wants gene symbols: name the column of var that holds them with genes="
    return "Name the column of var that holds the model's names with genes="

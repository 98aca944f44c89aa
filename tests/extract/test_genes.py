"""Genes matched by name: shares, names that are missing, what the names look like."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from extract import InputError
from extract.genes import align, gene_names, naming_of


def columns(*names: object) -> anndata.AnnData:
    found = anndata.AnnData(np.zeros((1, len(names)), np.float32))
    found.var["name"] = pd.array(names, dtype="string")
    return found


@pytest.mark.parametrize(
    ("names", "n_genes", "of", "coverage"),
    [
        ("abx", 10, "smaller", 2 / 3),  # the file has fewer
        ("abxxxxxxxx", 4, "smaller", 2 / 4),  # the model has
        ("aab", 10, "smaller", 2 / 3),  # twice is once
        ("abx", 10, "model", 2 / 10),
        ("aabx", 4, "model", 2 / 4),
    ],
)
def test_the_share_of_genes_found(names: str, n_genes: int, of: str, coverage: float) -> None:
    call = {"known": {"a": 0, "b": 1}, "n_genes": n_genes, "of": of, "naming": "symbol"}
    found = align(columns(*names), "name", min_coverage=coverage, duplicates="sum", **call)
    assert found.coverage == coverage
    about = found.describe()
    assert (about["columns"], about["model_genes"]) == (len(names), n_genes)
    assert about["genes_matched"] == 2
    message = f"2 genes are in both, of {len(names)} in the file and {n_genes} of the model"
    with pytest.raises(InputError, match=message):
        align(columns(*names), "name", min_coverage=coverage + 0.01, duplicates="sum", **call)


def test_names_that_are_missing() -> None:
    adata = columns("a", pd.NA, "b")
    adata.var["old"] = ["a", np.nan, None]
    assert gene_names(adata, "name") == ["a", "", "b"]
    assert gene_names(adata, "old") == ["a", "", ""]
    known = {"a": 1, "b": 0}
    call = {"n_genes": 2, "of": "smaller", "min_coverage": 0.5, "naming": "symbol"}
    found = align(adata, "name", known, **call)
    block = scipy.sparse.csr_matrix(np.array([[5.0, 6.0, 7.0]]))
    np.testing.assert_array_equal(found.select(block).toarray(), [[7.0, 5.0]])


def test_what_names_look_like() -> None:
    ids = [f"ENSG{i:011d}.{i}" for i in range(9)]
    assert naming_of(ids) == "ensembl"
    assert naming_of(["ENSMUSG00000000001", *ids, "TP53"]) == "ensembl"
    assert naming_of(["TP53", "GATA1", ids[0]]) == "symbol"
    assert naming_of([]) == "symbol"

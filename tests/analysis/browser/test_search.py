"""Search: names of genes in every naming, and what else one types."""

import gzip

import anndata
import pandas as pd
import pytest

from analysis.browser import search
from analysis.browser.documents import document
from analysis.browser.run import Run
from tests.analysis.browser import run_cases

RENAMED = {"GENE0": "MS4A1", "GENE1": "LYZ", "GENE2": "lyz", "GENE3": "ENSG00000171431.4"}


@pytest.fixture(scope="module", params=["plain", "gzip"])
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    root = tmp_path_factory.mktemp("search")
    folder = run_cases.lens(root / "run")
    for path in folder.glob("*.parquet"):
        table = pd.read_parquet(path)
        if "gene" in table:
            old = table["gene"].astype(object)
            table["gene"] = old.map(lambda name: RENAMED.get(name, name))
            table.to_parquet(path, index=False)
    adata = anndata.read_h5ad(folder / "features.h5ad")
    adata.obs["barcode"] = [f"ACGT{i}\n" for i in range(adata.n_obs)]
    adata.write_h5ad(folder / "features.h5ad")
    path = root / "gene_info"
    content = run_cases.GENE_INFO.encode()
    path.write_bytes(gzip.compress(content) if request.param == "gzip" else content)
    return Run.open([folder], root / "state", path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("MS4A1", "MS4A1"), ("ms4a1", "MS4A1"), ("931", "MS4A1"), ("ENSG00000156738", "MS4A1"),
        ("ENSG00000156738.12", "MS4A1"), ("LEU-16", "MS4A1"), (" leu-16 ", "MS4A1"),
        ("LYZ", "LYZ"), ("lyz", "lyz"), ("LZM", "LYZ"),
        ("K20", "ENSG00000171431.4"), ("KRT20", "ENSG00000171431.4"),
        ("ENSG00000171431", "ENSG00000171431.4"), ("ENSG00000171431.9", "ENSG00000171431.4"),
        ("CD20", None), ("Lyz", None), ("OTHER", None), ("", None), ("nothing", None),
    ],
)  # fmt: skip
def test_a_gene_by_any_of_its_names(run: Run, text: str, name: str | None) -> None:
    found = search.gene(run, text)
    assert (None if found is None else run.genes[found]) == name


def test_a_name_of_several_genes_offers_all(run: Run) -> None:
    hits = search.find(run, "CD20")["genes"]
    assert {hit["text"] for hit in hits} == {"MS4A1", "ENSG00000171431.4"}
    assert all(hit["why"] == "also called CD20" for hit in hits)
    described = search.find(run, "membrane spanning")["genes"]
    assert [hit["text"] for hit in described] == ["MS4A1"]


def test_what_is_told_of_a_gene(run: Run) -> None:
    found = document(run, f"gene/{run.gene_number['MS4A1']}")
    assert found["description"] == "membrane spanning <b>"
    assert found["aliases"] == ["CD20", "LEU-16"]
    assert found["ensembl"] == "ENSG00000156738"
    assert [link["href"] for link in found["links"]] == [
        "https://www.ncbi.nlm.nih.gov/gene/931", "https://www.proteinatlas.org/ENSG00000156738",
        "https://pubmed.ncbi.nlm.nih.gov/?term=MS4A1",
    ]  # fmt: skip
    unknown = document(run, f"gene/{run.gene_number['GENE7']}")
    assert (unknown["description"], unknown["aliases"], unknown["ensembl"]) == (None, [], None)
    assert unknown["links"][1]["href"] == "https://www.proteinatlas.org/search/GENE7"


def test_features_by_name_label_gene_and_term(run: Run) -> None:
    first = search.find(run, "Feature_1")["features"]
    assert [hit["text"] for hit in first[:2]] == ["feature_1", "feature_10"]
    label = run.features["label"].iloc[0]
    hits = search.find(run, label)["features"]
    best = run.features[run.features["label"] == label].sort_values("auroc", ascending=False)
    assert [hit["text"] for hit in hits] == best.index[:10].tolist()
    gene = run.features["top_genes"].iloc[5].split(", ")[0]
    assert any("top genes" in hit["why"] for hit in search.find(run, gene)["features"])
    named = run.terms[int(run.named["term"][0])]
    hits = search.find(run, named)
    assert hits["terms"][0]["text"] == named
    carriers = {hit["index"] for hit in hits["features"]}
    assert carriers <= set(run.feature_terms[:, [run.term_number[named]]].nonzero()[0])


def test_terms_hold_every_word(run: Run) -> None:
    hits = search.find(run, "CELLS process 12")["terms"]
    assert [hit["text"] for hit in hits] == [run.terms[run.term_number[hits[0]["text"]]]]
    assert "process 12 of cells" in hits[0]["text"]
    assert search.find(run, "process nothing")["terms"] == []


def test_labels_and_cells(run: Run) -> None:
    hits = search.find(run, "TYPE 1")["labels"]
    assert hits == [{"index": [0, 1], "text": "type 1", "why": "cell_type"}]
    assert len(search.find(run, "cell_type")["labels"]) == 4
    cells = search.find(run, "cell00000017")["cells"]
    assert cells == [{"index": 17, "text": "CELL00000017-1", "why": "cell"}]
    barcode = search.find(run, "ACGT39")["cells"]
    assert [hit["index"] for hit in barcode] == [39, *range(390, 399)]
    assert {hit["why"] for hit in barcode} == {"barcode"}


@pytest.mark.parametrize("text", ["", "   ", "\n", "<img src=x>", "%", "x" * 200, "☃", "\\", "("])
def test_anything_may_be_typed(run: Run, text: str) -> None:
    found = search.find(run, text)
    assert set(found) == {"features", "genes", "terms", "labels", "cells"}
    assert not text.strip() or len(text) > 1 or all(len(hits) <= 10 for hits in found.values())

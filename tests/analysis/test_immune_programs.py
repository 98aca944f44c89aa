import gzip
import os
from collections import Counter
from pathlib import Path

import pytest

GMT = Path(__file__).parents[2] / "analysis" / "data" / "immune_programs.gmt"
PAPER_MARKERS = {
    "B cell": {"CD79A", "MS4A1"},
    "T cell": {"CD3D", "CD3E"},
    "Macrophage": {"CD68", "CD14"},
    "NK cell": {"NKG7", "GNLY"},
    "Neutrophil": {"S100A8", "S100A9"},
    "Monocyte": {"CD14", "S100A8", "S100A9"},
    "Erythrocyte": {"HBB", "HBA1"},
}
PAPER_FUNCTIONS = (
    "Cytokine signalling",
    "Antigen presentation",
    "TCR signalling",
    "BCR signalling",
    "Innate immunity",
)


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    return [line.split("\t") for line in GMT.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sets(rows: list[list[str]]) -> dict[str, list[str]]:
    return {name: genes for name, _, *genes in rows}


def test_lines_are_well_formed(rows: list[list[str]]) -> None:
    assert len(rows) >= 35
    assert [n for n, k in Counter(row[0] for row in rows).items() if k > 1] == []
    for name, source, *genes in rows:
        assert name.strip() == name != ""
        assert source.strip() == source != "", name
        assert len(genes) >= 2, name
        assert len(set(genes)) == len(genes), name
        assert all(g and g == g.strip() for g in genes), name


@pytest.mark.parametrize("name", PAPER_MARKERS)
def test_marker_sets_are_those_of_the_paper(sets: dict[str, list[str]], name: str) -> None:
    assert set(sets[f"{name} markers (Kendiukhov)"]) == PAPER_MARKERS[name]


def test_plasma_cell_set_is_immunoglobulins(sets: dict[str, list[str]]) -> None:
    genes = set(sets["Plasma cell markers (Kendiukhov)"])
    assert genes >= {"IGHA1", "IGHG1", "IGKC"}
    assert all(g.startswith("IG") for g in genes - {"JCHAIN"})


@pytest.mark.parametrize("name", PAPER_FUNCTIONS)
def test_functional_sets_are_present(sets: dict[str, list[str]], name: str) -> None:
    assert 10 <= len(sets[f"{name} (Kendiukhov)"]) <= 42


def test_symbols_are_human_genes(sets: dict[str, list[str]]) -> None:
    """Official symbols; a previous one only beside the gene whose listed synonym it is."""
    root = os.environ.get("SAE_JAX_DATA")
    if not root:
        pytest.skip("SAE_JAX_DATA is not set: no gene table to check the symbols against")
    official: set[str] = set()
    renamed: dict[str, set[str]] = {}
    with gzip.open(Path(root) / "data/genes/Homo_sapiens.gene_info.gz", "rt") as table:
        columns = {c: i for i, c in enumerate(next(table).lstrip("#").rstrip("\n").split("\t"))}
        for line in table:
            row = line.rstrip("\n").split("\t")
            if row[columns["tax_id"]] != "9606":
                continue
            symbol = row[columns["Symbol"]]
            # NCBI writes ND1 where HGNC, and the data, write MT-ND1
            names = {symbol, row[columns["Symbol_from_nomenclature_authority"]]} - {"-"}
            official |= names
            for synonym in row[columns["Synonyms"]].split("|"):
                renamed.setdefault(synonym, set()).update(names)
    wrong = [
        (name, gene)
        for name, genes in sets.items()
        for gene in genes
        if gene not in official and not renamed.get(gene, set()) & set(genes)
    ]
    assert wrong == []

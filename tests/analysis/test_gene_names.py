import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest

from analysis import gene_names
from sae_jax.errors import InputError

HEAD = "#tax_id\tGeneID\tSymbol\tSynonyms\tdbXrefs\tSymbol_from_nomenclature_authority\n"
ROWS = """\
9606\t915\tCD3D\tCD3-DELTA|T3D\tHGNC:HGNC:1673|Ensembl:ENSG00000167286\tCD3D
9606\t916\tCD3E\tT3E|P21\tEnsembl:ENSG00000198851\tCD3E
9606\t1026\tCDKN1A\tP21|CD3D\tEnsembl:ENSG00000124762\tCDKN1A
9606\t4535\tND1\t-\tEnsembl:ENSG00000198888\tMT-ND1
9606\t3045\tHBD\t-\tEnsembl:ENSG00000223609\tHBD
9606\t100187828\tHBD\t-\t-\t-
9606\t7006\tTEC\t-\t-\t-
9606\t100124696\tTEC\t-\t-\t-
9606\t10\tNAT2\t77\tEnsembl:ENSG00000000001|Ensembl:ENSG00000000002\tNAT2
9606\t11\tNA\tnull\tEnsembl:ENSG00000000003\t-
9606\t12\tLOC12\t-\tEnsembl:ENSG00000000001|Ensembl:ENSG00000000003\t-
9606\t13\tSAT1\t-\tEnsembl:ENSG00000000002\tSAT1
63221\t99\tCD3D\tT3D\t-\t-
"""


@pytest.fixture
def gene_info(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str = HEAD + ROWS) -> Path:
        path = tmp_path / "some.gene_info.gz"
        path.write_bytes(gzip.compress(text.encode()))
        return path

    return write


@pytest.fixture
def table(gene_info: Callable[..., Path]) -> gene_names.GeneTable:
    return gene_names.read(gene_info())


@pytest.mark.parametrize(
    ("name", "symbol", "ensembl", "entrez", "how"),
    [
        ("CD3E", "CD3E", "ENSG00000198851", "916", "current"),
        ("T3E", "CD3E", "ENSG00000198851", "916", "synonym"),
        ("916", "CD3E", "ENSG00000198851", "916", "current"),
        ("ENSG00000198851.12", "CD3E", "ENSG00000198851", "916", "current"),
        # A current symbol wins over another gene's synonym; the authority's over NCBI's.
        ("CD3D", "CD3D", "ENSG00000167286", "915", "current"),
        ("HBD", "HBD", "ENSG00000223609", "3045", "current"),
        ("MT-ND1", "MT-ND1", "ENSG00000198888", "4535", "current"),
        ("ND1", "MT-ND1", "ENSG00000198888", "4535", "current"),
        # What several genes share means none of them.
        ("P21", None, None, None, "ambiguous"),
        ("TEC", None, None, None, "ambiguous"),
        ("ENSG00000000002", None, None, None, "ambiguous"),
        ("ENSG00000000003", None, None, None, "ambiguous"),
        # A gene with an official symbol wins over one without; a gene of two ids has not one.
        ("ENSG00000000001", "NAT2", None, "10", "current"),
        ("NAT2", "NAT2", None, "10", "current"),
        # No missing values, and no synonym of digits for an unknown Entrez id.
        ("NA", "NA", "ENSG00000000003", "11", "current"),
        ("null", "NA", "ENSG00000000003", "11", "synonym"),
        ("77", None, None, None, "unknown"),
        ("99", None, None, None, "unknown"),
        ("cd3e", None, None, None, "unknown"),
        ("-", None, None, None, "unknown"),
    ],
)
def test_a_name_is_mapped_where_it_means_one_gene(
    table: gene_names.GeneTable,
    name: str,
    symbol: str | None,
    ensembl: str | None,
    entrez: str | None,
    how: str,
) -> None:
    for to, expected in (("symbol", symbol), ("ensembl", ensembl), ("entrez", entrez)):
        mapped, report = table.map([name], to)
        assert list(mapped) == [expected]
        assert report.how == [how]
        assert report.n_without == (expected is None and entrez is not None)


def test_the_report_counts_each_kind(table: gene_names.GeneTable) -> None:
    names = ["CD3D", "T3D", "CD3E", "P21", "P21", "X1", "NAT2"]
    mapped, report = table.map(names, "ensembl")
    assert mapped.tolist() == ["ENSG00000167286"] * 2 + ["ENSG00000198851"] + [None] * 4
    assert (report.ambiguous, report.unknown) == (["P21"], ["X1"])
    assert (report.n_shared, report.n_without) == (2, 1)
    assert str(report) == (
        "3 of 7 names are current, 1 synonyms of one gene, 2 ambiguous (P21), 1 unknown (X1), "
        "1 without one ensembl name, 2 share a gene with another"
    )


def test_a_stated_naming_takes_names_for_nothing_else(table: gene_names.GeneTable) -> None:
    mapped, report = table.map(["CD3E", "915"], "entrez", naming="symbol")
    assert mapped.tolist() == ["916", None]
    assert report.unknown == ["915"]
    with pytest.raises(InputError, match="no gene's name looks like ensembl: CD3E"):
        table.map(["CD3E"], naming="ensembl")


def test_the_taxon_decides_and_text_is_read_like_gzip(
    gene_info: Callable[..., Path], tmp_path: Path
) -> None:
    assert gene_names.read(gene_info(), 63221).map(["T3D"], "entrez")[0] == ["99"]
    path = tmp_path / "plain.gz"
    path.write_text(HEAD + ROWS)
    assert len(gene_names.read(path)) == 12
    with pytest.raises(InputError, match=r"no genes of taxon 10090, but of 9606 \(12 genes\), 63"):
        gene_names.read(path, 10090)


def test_a_table_without_the_authority_is_read_too(gene_info: Callable[..., Path]) -> None:
    lines = [line.rpartition("\t")[0] + "\n" for line in (HEAD + ROWS).splitlines()]
    mapped, report = gene_names.read(gene_info("".join(lines))).map(["CD3D", "HBD"])
    assert mapped.tolist() == ["CD3D", None]
    assert report.ambiguous == ["HBD"]


@pytest.mark.parametrize("call", [{"to": "uniprot"}, {"naming": "refseq"}])
def test_unknown_namings_and_names_that_are_no_text_are_refused(
    table: gene_names.GeneTable, call: dict[str, str]
) -> None:
    with pytest.raises(InputError, match="is no naming of genes"):
        table.map(["CD3D"], **call)
    with pytest.raises(InputError, match="gene 1 is nan"):
        table.map(["CD3D", np.nan])


def test_files_that_are_no_gene_table_are_refused(
    gene_info: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"first line lacks \['#tax_id', 'GeneID'"):
        gene_names.read(gene_info("gene,symbol\n"))
    with pytest.raises(InputError, match="no genes of taxon 9606, but of none at all"):
        gene_names.read(gene_info(HEAD))
    with pytest.raises(InputError, match="there is no gene table file"):
        gene_names.read(tmp_path / "absent")
    path = tmp_path / "cut.gz"
    path.write_bytes(gene_info().read_bytes()[:-12])
    with pytest.raises(InputError, match="damaged gzip"):
        gene_names.read(path)


@pytest.fixture(scope="module")
def ncbi(data_folder: Path) -> gene_names.GeneTable:
    return gene_names.read(data_folder / "data/genes/Homo_sapiens.gene_info.gz")


def test_human_genes_only_and_every_entrez_id_comes_back(
    ncbi: gene_names.GeneTable, data_folder: Path
) -> None:
    path = data_folder / "data/genes/Homo_sapiens.gene_info.gz"
    with gzip.open(path, "rt") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        ids = [row["GeneID"] for row in rows if row["#tax_id"] == "9606"]
    assert len(ids) == len(ncbi) == 61603
    mapped, _ = ncbi.map(ids, "entrez")
    assert mapped.tolist() == ids


def test_zheng_symbols_by_themselves_and_beside_their_ensembl_ids(
    ncbi: gene_names.GeneTable, data_folder: Path
) -> None:
    path = data_folder / "data/counts/zheng_facs_pbmc_3774x16791.h5ad"
    var = anndata.read_h5ad(path, backed="r").var
    by_symbol, report = ncbi.map(var["symbol"], "entrez")
    how = np.asarray(report.how)
    assert (how == "current").mean() == pytest.approx(0.79, abs=0.005)
    assert (how == "synonym").sum() > 900
    assert (how == "ambiguous").sum() < 50
    # The ids are a second source of which gene each row is.
    by_id, _ = ncbi.map(var.index, "entrez", naming="ensembl")
    known = (by_symbol != None) & (by_id != None)  # noqa: E711
    for kind, n, share in (("current", 13_000, 0.998), ("synonym", 800, 0.99)):
        rows = known & (how == kind)
        assert rows.sum() > n
        assert (by_symbol[rows] == by_id[rows]).mean() > share

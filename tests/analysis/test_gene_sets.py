import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from analysis import gene_names, gene_sets
from sae_jax.errors import InputError

GENES = ["CD3D", "CD3E", "CD8A", "MS4A1", "NKG7", "LYZ"]
DATA = os.environ.get("SAE_JAX_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SAE_JAX_DATA does not name the test data")


@pytest.fixture
def gmt(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "sets.gmt") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


def test_reads_names_descriptions_and_membership_by_name(gmt: Callable[..., Path]) -> None:
    path = gmt("B\tb cells\tMS4A1\tABSENT\nT\t\tCD8A\tCD3E\tCD3D\n")
    sets = gene_sets.read(path, GENES, min_size=1)
    names, membership = sets
    assert names == ["B", "T"] == sets.names
    assert sets.descriptions == ["b cells", ""]
    np.testing.assert_array_equal(membership.toarray(), [[0, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]])


def test_the_order_of_the_genes_decides_the_columns_only(gmt: Callable[..., Path]) -> None:
    path = gmt("B\t\tMS4A1\tLYZ\nT\t\tCD8A\tCD3E\tCD3D\n")
    _, forward = gene_sets.read(path, GENES, min_size=1)
    _, backward = gene_sets.read(path, GENES[::-1], min_size=1)
    np.testing.assert_array_equal(forward.toarray(), backward.toarray()[:, ::-1])


def test_sizes_count_the_universe_and_the_coverage_tells_what_was_dropped(
    gmt: Callable[..., Path],
) -> None:
    path = gmt(
        "small\t\tCD3D\tX1\tX2\tX3\nfits\t\tCD3D\tCD3E\tX1\nlarge\t\tCD3D\tCD3E\tCD8A\tLYZ\nnone\t\tX9\n"
    )
    sets = gene_sets.read(path, GENES, min_size=2, max_size=3)
    assert sets.names == ["fits"]
    coverage = sets.coverage
    assert (coverage.n_read, coverage.n_kept) == (4, 1)
    assert coverage.too_small == {"small": 1, "none": 0}
    assert coverage.too_large == {"large": 4}
    assert (coverage.n_set_genes, coverage.n_found) == (8, 4)
    assert coverage.share_found == 0.5
    assert "1 of 4 gene sets kept" in str(coverage)


def test_repeated_genes_blank_fields_weights_and_line_ends(gmt: Callable[..., Path]) -> None:
    path = gmt("\ufeffT\t\tCD3D,1.0\tCD3D\t\tCD3E \t\r\n\r\nNK\t\tNKG7,0.25\tA,B\t\t\r\n")
    names, membership = gene_sets.read(path, [*GENES, "A,B"], min_size=1)
    assert names == ["T", "NK"]
    np.testing.assert_array_equal(membership.toarray(), [[1, 1] + [0] * 5, [0] * 4 + [1, 0, 1]])


def test_a_set_given_twice_is_taken_once_unless_the_two_differ(gmt: Callable[..., Path]) -> None:
    assert gene_sets.read(gmt("T\ta\tCD3D\tCD3E\nT\tb\tCD3E\tCD3D\n"), GENES, 1).names == ["T"]
    with pytest.raises(InputError, match=r"line 2: the set 'T' .* different genes"):
        gene_sets.read(gmt("T\ta\tCD3D\tCD3E\nT\tb\tCD3E\tLYZ\n"), GENES, 1)


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    path = tmp_path / "sets.gmt"
    path.write_bytes(gzip.compress(b"T\t\tCD3D\n"))
    assert gene_sets.read(path, GENES, min_size=1).names == ["T"]
    path.write_bytes(gzip.compress(b"T\t\tCD3D\n" * 100)[:-12])
    with pytest.raises(InputError, match="damaged gzip"):
        gene_sets.read(path, GENES, min_size=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no gene sets"),
        (b"\n \n", "holds no gene sets"),
        (b"T\tempty\n", "holds no gene sets"),
        (b"gene,score\nCD3D,1\n", "line 1 is not GMT: 'gene,score'"),
        (b"T\t\tCD3D\nCD3E\n", "line 2 is not GMT"),
        (b"\tno name\tCD3D\n", "line 1 is not GMT"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "not a text file"),
        (b"T\t\t\x00\x00", "not a text file"),
    ],
)
def test_files_that_are_not_gmt_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.gmt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        gene_sets.read(path, GENES)


@pytest.mark.parametrize("missing", ["no_such_file.gmt", "."])
def test_a_missing_file_or_a_folder_is_refused(missing: str) -> None:
    with pytest.raises(InputError, match="there is no gene set file"):
        gene_sets.read(missing, GENES)


def test_repeated_or_nameless_genes_are_refused(gmt: Callable[..., Path]) -> None:
    path = gmt("T\t\tCD3D\n")
    with pytest.raises(InputError, match=r"1 gene names occur more than once \(CD3D\)"):
        gene_sets.read(path, [*GENES, "CD3D"])
    with pytest.raises(InputError, match="gene 0 is 4"):
        gene_sets.read(path, [4, 5])


@pytest.mark.parametrize(
    ("ours", "theirs", "hint"),
    [
        (["Cd3d", "Cd3e"], ["CD3D", "CD3E"], "upper case 2 would match"),
        (["ENSG00000167286", "ENSG00000198851"], ["CD3D", "CD3E"], "Only your genes are Ensembl"),
        (["CD3D", "CD3E"], ["ENSG00000167286", "ENSG00000198851"], "Only the sets' genes are"),
        (["ENSG00000167286.9"], ["ENSG00000167286"], "Without the version"),
        (["CD3D"], ["915"], "same species and kind"),
    ],
)
def test_no_gene_in_common_shows_both_sides_and_guesses_why(
    ours: list[str], theirs: list[str], hint: str
) -> None:
    with pytest.raises(InputError, match=hint) as error:
        gene_sets.from_sets({"T": theirs}, ours, min_size=1)
    assert ours[0] in str(error.value)
    assert theirs[0] in str(error.value)


def test_no_set_of_a_fitting_size_says_what_sizes_there_are() -> None:
    sets = {"a": GENES[:2], "b": [*GENES[:3], "X"], "c": ["X"]}
    with pytest.raises(InputError, match=r"20 to 500 .* have 0 to 3, median 2; 3 of their 4 genes"):
        gene_sets.from_sets(sets, GENES)
    with pytest.raises(InputError, match="1 <= min_size <= max_size"):
        gene_sets.from_sets(sets, GENES, min_size=0)


def test_a_chance_match_does_not_hide_the_wrong_species() -> None:
    human = [f"GENE{i}" for i in range(30)]
    mouse = [name.capitalize() for name in human[1:]] + ["GENE0"]
    with pytest.raises(InputError, match="In upper case 30 would match"):
        gene_sets.from_sets({"a": human}, mouse)


def test_load_takes_a_path_the_packaged_programs_or_a_library(
    gmt: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gene_sets.load(gmt("T\t\tCD3D\n"), GENES, min_size=1).names == ["T"]

    embedded = gene_sets.load("embedded", GENES, min_size=1)
    assert embedded.coverage.n_found >= 3

    asked = {}

    def library(name: str, organism: str, max_size: int) -> dict[str, list[str]]:
        asked.update(name=name, organism=organism)
        return {"T": ["CD3D", "CD3E"]}

    monkeypatch.setattr("gseapy.get_library", library)
    assert gene_sets.load("Some_2021", GENES, min_size=1, organism="Mouse").names == ["T"]
    assert asked == {"name": "Some_2021", "organism": "Mouse"}


@pytest.mark.parametrize(
    "failure", [requests.ConnectionError("no route"), ValueError("not a library")]
)
def test_a_library_that_cannot_be_had_names_the_ways_out(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def library(name: str, organism: str, max_size: int) -> dict[str, list[str]]:
        raise failure

    monkeypatch.setattr("gseapy.get_library", library)
    with pytest.raises(InputError, match=r"'Some_2021'.*network, or give the path of a GMT file"):
        gene_sets.load("Some_2021", GENES)
    with pytest.raises(InputError, match=r"there is no gene set file sets/some\.gmt"):
        gene_sets.load("sets/some.gmt", GENES)


@given(
    st.dictionaries(
        st.text("abc", min_size=1),
        st.lists(st.sampled_from("ABCDEFGHIJ"), max_size=8),
        min_size=1,
        max_size=6,
    ),
    st.permutations("ABCDEF"),
)
def test_membership_is_set_membership(sets: dict[str, list[str]], genes: list[str]) -> None:
    expected = {name: set(members) & set(genes) for name, members in sets.items()}
    if not any(expected.values()):
        with pytest.raises(InputError, match="none of the"):
            gene_sets.from_sets(sets, genes, min_size=1)
        return
    names, membership = gene_sets.from_sets(sets, genes, min_size=1)
    assert names == [name for name in sets if expected[name]]
    for name, row in zip(names, membership.toarray(), strict=True):
        assert {gene for gene, inside in zip(genes, row, strict=True) if inside} == expected[name]


def test_genes_without_names_are_refused() -> None:
    with pytest.raises(InputError, match="no names, only the numbers 0 to 5"):
        gene_sets.from_sets({"T": ["1"]}, [str(i) for i in range(6)], 1)
    with pytest.raises(InputError, match="gene 1 is ' '"):
        gene_sets.from_sets({"T": ["CD3D"]}, ["CD3D", " "], 1)


# CD3D has the synonym T3D, and P21 is one of both CD3E and MS4A1.
TABLE = gene_names.GeneTable(
    symbol={"915": "CD3D", "916": "CD3E", "931": "MS4A1"},
    ensembl={"915": "ENSG00000167286"},
    current={
        **{"CD3D": ["915"], "CD3E": ["916"], "MS4A1": ["931"], "915": ["915"], "916": ["916"]},
        **{"931": ["931"], "ENSG00000167286": ["915"], "ENSG00000198851": ["916"]},
    },
    synonyms={"T3D": ["915"], "CD20": ["931"], "P21": ["916", "931"]},
)


@pytest.mark.parametrize(
    ("genes", "expected"),
    [
        (["CD3E", "CD3D", "MS4A1", "LYZ"], [1, 1, 0, 0]),
        (["MS4A1", "ENSG00000198851.4", "T3D", "LYZ"], [0, 1, 1, 0]),
        # One gene by two names: the current one, wherever it stands, or the first in the alphabet.
        (["T3D", "CD3D", "CD3E"], [0, 1, 1]),
        (["ENSG00000167286", "CD3D", "CD3E"], [0, 1, 1]),
        # A name that several genes share is none of them.
        (["CD3D", "P21"], [1, 0]),
    ],
)
def test_through_a_gene_table_entrez_sets_fit_genes_of_any_name(
    genes: list[str], expected: list[int]
) -> None:
    sets = {"T": ["915", "916", "100"], "small": ["931"]}
    found = gene_sets.from_sets(sets, genes, 1, gene_table=TABLE)
    np.testing.assert_array_equal(found.membership.toarray()[0], expected)
    assert found.coverage.n_set_genes == 4
    ours, theirs = found.coverage.notes
    assert str(found.coverage).endswith(f"; {ours}; {theirs}")
    assert theirs.startswith("the sets' genes: 3 of 4 names are current, 0 synonyms")


def test_names_of_one_gene_count_once_and_unknown_ones_match_themselves() -> None:
    sets = {"T": ["CD3D", "T3D", "915", "MYSTERY", "P21"]}
    found = gene_sets.from_sets(sets, ["MYSTERY", "T3D", "P21"], 3, 3, gene_table=TABLE)
    np.testing.assert_array_equal(found.membership.toarray(), [[1, 1, 1]])
    assert (found.coverage.n_set_genes, found.coverage.n_found) == (3, 3)


def test_no_match_through_a_gene_table_says_how_names_were_understood() -> None:
    with pytest.raises(InputError, match=r"your genes: 0 of 1 .* 1 unknown \(Cd3d\)") as error:
        gene_sets.from_sets({"T": ["915"]}, ["Cd3d"], 1, gene_table=TABLE)
    assert "the sets' genes: 1 of 1 names are current" in str(error.value)
    with pytest.raises(InputError, match="no gene's name looks like ensembl: CD3D"):
        gene_sets.from_sets({"T": ["915"]}, ["CD3D"], 1, gene_table=TABLE, naming="ensembl")
    with pytest.raises(InputError, match="'ensembl' needs a gene table"):
        gene_sets.from_sets({"T": ["915"]}, ["CD3D"], 1, naming="ensembl")


PANEL = ["CD3D", "T3E", *(f"GENE{i}" for i in range(98))]
OBO = "ontology: x\n\n[Term]\nid: X:1\nname: all\n\n[Term]\nid: X:2\nname: T\nis_a: X:1\n"
GAF = "U\tP1\tCD3D\t\tX:2\tR\tIDA\t\tP\t\t\tprotein\ttaxon:9606\t2020\tU\n"


def test_load_takes_tables_closures_and_annotations(gmt: Callable[..., Path]) -> None:
    net = gmt("source,target\nT,CD3D\nT,CD3D\nT,X\n", "net.csv")
    tsv = gmt("tf\tgene\nT\tCD3D\n", "net.tsv")
    edges = gmt("source_id,target_id,type,experimental\n915,X:1,direct,True\n", "edges.csv")
    nodes = gmt("identifier,name\nX:1,all\n", "nodes.csv")
    gaf, obo = gmt(GAF, "a.gaf"), gmt(OBO, "x.obo")
    assert gene_sets.load(net, PANEL, 1).names == ["T"]
    assert gene_sets.load(net, PANEL, 1).coverage.n_set_genes == 2
    assert gene_sets.load(tsv, PANEL, 1, source="tf", target="gene").names == ["T"]
    assert gene_sets.load(edges, PANEL, 1, nodes=nodes, gene_table=TABLE).names == ["all (X:1)"]
    terms = gene_sets.load(gaf, PANEL, 1, obo=obo)
    assert terms.names == ["all (X:1)", "T (X:2)"]
    assert terms.descriptions == ["X:1", "X:2"]
    for sets in (gene_sets.load(net, PANEL, 1), terms):
        assert set(sets.membership.indices) == {0}


def test_load_refuses_few_genes_and_options_that_do_not_apply(gmt: Callable[..., Path]) -> None:
    net, path = gmt("source,target\nT,CD3D\n", "net.csv"), gmt("T\t\tCD3D\n")
    with pytest.raises(InputError, match="there are 99 genes, fewer than 100"):
        gene_sets.load(net, PANEL[:99], 1)
    assert gene_sets.load(net, PANEL[:9], 1, min_universe=9).names == ["T"]
    with pytest.raises(InputError, match="there are 6 genes, fewer than 100"):
        gene_sets.load(path, GENES, 1, min_universe=gene_sets.MIN_UNIVERSE)
    with pytest.raises(InputError, match=r"sets\.gmt takes no obo"):
        gene_sets.load(path, GENES, 1, obo="x.obo")
    with pytest.raises(InputError, match="give obo="):
        gene_sets.load(gmt(GAF, "a.gaf"), PANEL, 1)
    with pytest.raises(InputError, match=r"give annotations \(\.gaf\)"):
        gene_sets.load(gmt(OBO, "x.obo"), PANEL, 1)
    with pytest.raises(InputError, match="there is no gene set file"):
        gene_sets.load("absent.csv", PANEL, 1)


@needs_data
def test_go_biological_process_restricted_to_the_golden_universe() -> None:
    anndata = pytest.importorskip("anndata")
    golden = Path(DATA) / "golden/enrichment"
    symbols = anndata.read_h5ad(golden / "counts.h5ad", backed="r").var["symbol"].unique()
    whole = gene_sets.read(Path(DATA) / "data/genesets/GO_Biological_Process_2021.gmt", symbols)
    restricted = gene_sets.read(golden / "go_terms.gmt.gz", symbols)
    assert whole.names == restricted.names
    assert len(whole.names) == 1492
    np.testing.assert_array_equal(whole.membership.indices, restricted.membership.indices)
    np.testing.assert_array_equal(whole.membership.indptr, restricted.membership.indptr)


def test_the_closure_fits_symbols_and_ensembl_ids_alike(data_folder: Path) -> None:
    anndata = pytest.importorskip("anndata")
    data = data_folder / "data"
    var = anndata.read_h5ad(data / "counts/zheng_facs_pbmc_3774x16791.h5ad", backed="r").var
    var = var.drop_duplicates("symbol")
    table = gene_names.read(data / "genes/Homo_sapiens.gene_info.gz")
    edges = data / "genesets/actiobio_edge_Gene_enables_MolecularFunction.csv.gz"
    nodes = data / "genesets/actiobio_node_MolecularFunction.csv.gz"
    by_symbol = gene_sets.load(edges, list(var["symbol"]), gene_table=table, nodes=nodes)
    by_id = gene_sets.load(edges, list(var.index), gene_table=table, nodes=nodes, naming="ensembl")
    both = [name for name in by_symbol.names if name in set(by_id.names)]
    assert len(both) > 0.98 * len(by_symbol.names) > 500
    rows = [
        sets.membership[[sets.names.index(name) for name in both]].toarray() > 0
        for sets in (by_symbol, by_id)
    ]
    assert (rows[0] & rows[1]).sum() / (rows[0] | rows[1]).sum() > 0.98
    cytokine = by_symbol.names.index("cytokine activity (GO:0005125)")
    members = set(var["symbol"].iloc[by_symbol.membership[[cytokine]].indices])
    assert members > {"IL1B", "TNF", "IFNG", "CCL5"}


def test_enrichrs_symbols_are_the_genes_of_the_closure(data_folder: Path) -> None:
    data = data_folder / "data"
    table = gene_names.read(data / "genes/Homo_sapiens.gene_info.gz")
    edges = data / "genesets/actiobio_edge_Gene_involvedIn_BiologicalProcess.csv.gz"
    universe = sorted(table.symbol)
    closure = gene_sets.load(edges, universe, 1, 20_000, gene_table=table)
    row = {name: i for i, name in enumerate(closure.names)}
    enrichr = gene_sets.load(
        data / "genesets/GO_Biological_Process_2021.gmt", universe, 20, 500, gene_table=table
    )
    shared = [(i, row[n[-11:-1]]) for i, n in enumerate(enrichr.names) if n[-11:-1] in row]
    theirs, ours = (sets.membership[list(rows)].astype(bool) for sets, rows in
                    zip((enrichr, closure), zip(*shared, strict=True), strict=True))  # fmt: skip
    share = theirs.multiply(ours).sum(1) / theirs.sum(1)
    assert len(shared) > 1800
    assert np.median(share) > 0.9

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from analysis import gene_sets
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

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import ontology
from sae_jax.errors import InputError

OBO = """\
format-version: 1.2
ontology: go

[Term]
id: GO:1
name: process
namespace: biological_process

[Term]
id: GO:2
name: immune response
namespace: biological_process
alt_id: GO:22
is_a: GO:1 ! process

[Term]
id: GO:3
name: activation
namespace: biological_process
is_a: GO:1 {source="x"} ! process
relationship: part_of GO:2 ! immune response

[Term]
id: GO:4
name: regulation of activation
namespace: biological_process
is_a: GO:1 ! process
relationship: regulates GO:3 ! activation

[Term]
id: GO:5
name: binding
namespace: molecular_function
relationship: part_of GO:3

[Term]
id: GO:9
name: obsolete activation
namespace: biological_process
is_obsolete: true
replaced_by: GO:3

[Typedef]
id: part_of
name: part of
"""


def annotation(
    gene: str, term: str, evidence: str = "IDA", qualifier: str = "", taxon: str = "taxon:9606"
) -> str:
    fields = ["UniProtKB", f"P{gene}", gene, qualifier, term, "PMID:1", evidence, "", "P", "", ""]
    return "\t".join([*fields, "protein", taxon, "20200101", "UniProt", "", ""])


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def members(found: ontology.NamedSets) -> dict[str, set[str]]:
    return {re.sub(r".*\((.*)\)", r"\1", name): set(g) for name, g in found.sets.items()}


def test_genes_reach_all_that_a_term_is_or_is_part_of(put: Callable[[str, str], Path]) -> None:
    lines = ["!gaf-version: 2.2", *(annotation(f"G{i}", f"GO:{i}") for i in range(1, 6))]
    found = ontology.gaf_sets(put("a.gaf.gz", "\n".join(lines)), put("go.obo", OBO))
    assert members(found) == {
        "GO:1": {"G1", "G2", "G3", "G4", "G5"},
        "GO:2": {"G2", "G3", "G5"},
        "GO:3": {"G3", "G5"},
        "GO:4": {"G4"},
        "GO:5": {"G5"},
    }
    assert list(found.sets)[2] == "activation (GO:3)"
    assert found.descriptions["activation (GO:3)"] == "GO:3"
    assert found.notes == ()
    process = ontology.gaf_sets(
        put("a.gaf.gz", "\n".join(lines)), put("go.obo", OBO), namespace="biological_process"
    )
    assert members(process) == {k: v for k, v in members(found).items() if k != "GO:5"}


def test_what_is_no_annotation_is_left_out_and_counted(put: Callable[[str, str], Path]) -> None:
    lines = [
        annotation("A", "GO:3"),
        annotation("B", "GO:3", "IEA"),
        annotation("C", "GO:3", qualifier="NOT|involved_in"),
        annotation("D", "GO:1", "ND"),
        annotation("E", "GO:9"),
        annotation("F", "GO:77"),
        annotation("G", "GO:22", taxon="taxon:9606|taxon:562"),
        annotation("H", "GO:3", taxon="taxon:562|taxon:9606"),
        annotation("C", "GO:2"),  # what one source denies of activation holds for all the response
    ]
    gaf, obo = put("a.gaf", "\n".join(lines) + "\n"), put("go.obo.gz", OBO)
    found = ontology.gaf_sets(gaf, obo, evidence=ontology.EXPERIMENTAL, taxon=9606)
    assert members(found) == {
        "GO:1": {"A", "C", "G"},
        "GO:2": {"A", "C", "G"},
        "GO:3": {"A"},
    }
    assert set(found.notes) == {
        "2 annotations by their evidence left out",
        "1 annotations that say NOT left out",
        "2 annotations of obsolete or unknown terms left out",
        "1 annotations of another taxon left out",
    }
    assert members(ontology.gaf_sets(gaf, obo, genes_by="id"))["GO:3"] == {"PA", "PB", "PH"}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 11), st.integers(0, 11), st.sampled_from(["is_a", "part_of", "other"])
        ),
        max_size=30,
    ),
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from("ABCDE")), min_size=1, max_size=20),
    st.permutations(range(12)),
)
def test_propagation_is_a_walk_up_every_path(
    tmp_path_factory: pytest.TempPathFactory,
    edges: list[tuple[int, int, str]],
    direct: list[tuple[int, str]],
    order: list[int],
) -> None:
    edges = [(low, high, kind) for low, high, kind in edges if low < high]
    stanzas = []
    for term in order:
        lines = ["[Term]", f"id: T:{term}", f"name: n{term}"]
        for low, high, kind in edges:
            if low == term:
                lines.append(
                    f"is_a: T:{high}" if kind == "is_a" else f"relationship: {kind} T:{high} ! x"
                )
        stanzas.append("\n".join(lines))
    path = tmp_path_factory.mktemp("obo") / "t.obo"
    path.write_text("ontology: t\n\n" + "\n\n".join(stanzas) + "\n")

    expected: dict[str, set[str]] = {}

    def walk(term: int, gene: str) -> None:
        expected.setdefault(f"T:{term}", set()).add(gene)
        for low, high, kind in edges:
            if low == term and kind != "other":
                walk(high, gene)

    annotated: dict[str, list[str]] = {}
    for term, gene in direct:
        walk(term, gene)
        annotated.setdefault(f"T:{term}", []).append(gene)
    assert ontology.read_obo(path).propagate(annotated) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an ontology|holds no terms"),
        ("gene,score\nCD3D,1\n", "not an ontology in OBO format"),
        ("ontology: go\n\n[Typedef]\nid: x\nname: x\n", "holds no terms"),
        (OBO.replace("[Term]\nid: GO:1", "[Typedef]\nid: GO:1"), r"1 parents .* \(GO:1\)"),
        (OBO.replace("name: process\n", "name: process\nis_obsolete: true\n"), "or obsolete"),
        (OBO.replace("alt_id: GO:22", "is_a: GO:3"), r"own ancestors .*GO:[23] -> GO:[23]"),
    ],
)
def test_files_that_are_no_whole_ontology_are_refused(
    put: Callable[[str, str], Path], text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ontology.read_obo(put("go.obo", text))


def test_annotations_of_which_nothing_is_left_are_refused(put: Callable[[str, str], Path]) -> None:
    obo, gaf = put("go.obo", OBO), put("a.gaf", annotation("A", "GO:3", "IEA"))
    with pytest.raises(InputError, match=r"1 annotations by their evidence left out\. .* IEA"):
        ontology.gaf_sets(gaf, obo, evidence=["IDA"])
    with pytest.raises(InputError, match=r"'cellular_component'; .*\['biological_process', 'mol"):
        ontology.gaf_sets(gaf, obo, namespace="cellular_component")
    with pytest.raises(InputError, match="is left: it has none"):
        ontology.gaf_sets(put("empty.gaf", "!gaf-version: 2.2\n"), obo)
    with pytest.raises(InputError, match="line 1 is not GAF: it has 2 columns"):
        ontology.gaf_sets(put("b.gaf", "T\tCD3D\n"), obo)
    with pytest.raises(InputError, match="take 'symbol' or 'id'"):
        ontology.gaf_sets(gaf, obo, genes_by="name")


NET = pd.DataFrame(
    {
        "source": ["TF2", "TF1", "TF1", "TF1"],
        "target": ["NA", "CD3D", "CD3E", "CD3D"],
        "weight": [1.0, -1.0, 0.5, 1.0],
    }
)


@pytest.mark.parametrize("name", ["net.csv", "net.tsv", "net.csv.gz", "net.parquet"])
def test_pairs_are_sets_in_the_order_of_the_table(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        NET.assign(source=NET["source"].astype("category")).to_parquet(path)
    else:
        NET.to_csv(path, sep="\t" if "tsv" in name else ",")  # with row names, as decoupler's
    found = ontology.pair_sets(path)
    assert {set_: list(genes) for set_, genes in found.sets.items()} == {
        "TF2": ["NA"],
        "TF1": ["CD3D", "CD3E"],
    }
    assert list(found.sets) == ["TF2", "TF1"]
    assert list(ontology.pair_sets(path, "target", "source").sets) == ["NA", "CD3D", "CD3E"]


def test_entrez_ids_of_a_parquet_are_text(tmp_path: Path) -> None:
    path = tmp_path / "net.parquet"
    pd.DataFrame({"source": ["A"], "target": [915]}).to_parquet(path)
    assert list(ontology.pair_sets(path).sets["A"]) == ["915"]
    pd.DataFrame({"source": ["A", None], "target": ["X", "Y"]}).to_parquet(path)
    with pytest.raises(InputError, match=r"1 rows have an empty field .* row 2"):
        ontology.pair_sets(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", r"no column source or target, but \[\]"),
        ("a.csv", "set;gene\nA;B\n", r"no column source or target, but \['set;gene'\]"),
        ("a.csv", "source,target\n", "has no rows"),
        ("a.csv", "source,target\nA,B\nC, \n", "1 rows have an empty field .* row 2"),
        ("a.tsv", "source\ttarget\nA\tB\tC\tD\nA\tB\n", "cannot be read as a table|empty field"),
        ("a.parquet", "source,target\nA,B\n", "is not a parquet file"),
    ],
)
def test_files_that_are_no_table_of_pairs_are_refused(
    put: Callable[[str, str], Path], name: str, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ontology.pair_sets(put(name, text))


def test_tables_that_are_missing_or_misnamed_are_refused(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent.parquet"):
        with pytest.raises(InputError, match="there is no gene set file"):
            ontology.pair_sets(tmp_path / name)
    with pytest.raises(InputError, match="source and target are both 'gene'"):
        ontology.pair_sets(tmp_path / "absent.csv", "gene", "gene")


CLOSURE = """\
source_id,target_id,type,experimental
915,GO:2,direct,True
916,GO:2,direct,False
915,GO:1,inferred,False
916,GO:1,inferred,False
"""


def test_a_closure_is_taken_whole_or_by_its_flags(put: Callable[[str, str], Path]) -> None:
    path = put("edges.csv.gz", CLOSURE)
    nodes = put("nodes.csv", 'identifier,name\nGO:2,"alpha-1,6 activity"\n')
    whole = ontology.closure_sets(path, nodes)
    assert {name: set(genes) for name, genes in whole.sets.items()} == {
        "GO:1": {"915", "916"},
        "alpha-1,6 activity (GO:2)": {"915", "916"},
    }
    assert whole.descriptions["alpha-1,6 activity (GO:2)"] == "GO:2"
    assert members(ontology.closure_sets(path, only_direct=True)) == {"GO:2": {"915", "916"}}
    found = ontology.closure_sets(path, only_experimental=True)
    assert members(found) == {"GO:2": {"915"}}
    assert found.notes == ("3 of 4 rows left out as not asked for",)


def test_a_closure_of_other_flags_or_without_a_row_is_refused(
    put: Callable[[str, str], Path],
) -> None:
    with pytest.raises(InputError, match=r"type must be one of .* not \['implied'\]"):
        ontology.closure_sets(put("a.csv", CLOSURE.replace("inferred", "implied")))
    with pytest.raises(InputError, match="none of the 4 rows"):
        ontology.closure_sets(
            put("b.csv", CLOSURE.replace("True", "False")), only_experimental=True
        )


def test_the_closure_holds_what_its_direct_rows_propagate_to(data_folder: Path) -> None:
    slim = ontology.read_obo(data_folder / "data/genesets/goslim_generic.obo")
    path = data_folder / "data/genesets/actiobio_edge_Gene_involvedIn_BiologicalProcess.csv.gz"
    whole = {term: set(genes) for term, genes in ontology.closure_sets(path).sets.items()}
    direct = ontology.closure_sets(path, only_direct=True).sets
    own = {term: set(direct[term]) for term in direct if term in slim.names}
    reached = slim.propagate(own)
    # The closure's root lacks genes; and since the slim, cell motility is no more a locomotion.
    changed = {"GO:0008150", "GO:0040011"}
    compared = [term for term in reached if term in whole and term not in changed]
    assert len(compared) == 50
    assert sum(len(reached[term]) > len(own.get(term, ())) for term in compared) > 5
    assert all(reached[term] <= whole[term] for term in compared)

    edges = [(low, high) for low in whole for high in slim.parents.get(low, ())]
    edges = [(low, high) for low, high in edges if high in whole and high not in changed]
    assert len(edges) == 13
    assert all(whole[low] <= whole[high] for low, high in edges)

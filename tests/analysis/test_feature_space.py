import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from analysis import feature_space as fs
from analysis import ontology
from sae_jax.errors import InputError

OBO = """format-version: 1.2
subsetdef: goslim_generic "Generic GO slim"

[Term]
id: GO:0008150
name: biological_process
subset: goslim_generic

[Term]
id: GO:0000001
name: cell death
alt_id: GO:0000099
subset: goslim_generic
is_a: GO:0008150 ! biological_process

[Term]
id: GO:0000002
name: Apoptotic process
is_a: GO:0000001 {source="x"} ! cell death
relationship: regulates GO:0000003 ! signaling

[Term]
id: GO:0000003
name: signaling
subset: goslim_generic
is_a: GO:0008150 ! biological_process

[Term]
id: GO:0000004
name: death signaling
subset: goslim_generic
is_a: GO:0000003 ! signaling
relationship: part_of GO:0000001 ! cell death

[Term]
id: GO:0000005
name: gone
is_a: GO:0000001 ! cell death
is_obsolete: true

[Term]
id: GO:0000006
name: very special death signaling
is_a: GO:0000004 ! death signaling

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def hierarchy(tmp_path: Path) -> ontology.Ontology:
    (tmp_path / "small.obo").write_text(OBO)
    return ontology.read_obo(tmp_path / "small.obo")


def test_feature_terms_from_booleans_and_from_names_agree() -> None:
    table = np.array([[False, True], [False, False], [True, True]])
    one = fs.feature_terms(table, ["b", "a"])
    other = fs.from_names([["a"], [], ["b", "a", "b"]])
    assert other.terms == ["a", "b"]
    np.testing.assert_array_equal(one.matrix.toarray()[:, ::-1], other.matrix.toarray())
    assert one.annotated().tolist() == other.annotated().tolist() == [0, 2]
    stored = sparse.csr_array((np.array([False, True]), ([0, 0], [0, 1])), shape=(1, 2))
    assert fs.feature_terms(stored, ["b", "a"]).matrix.nnz == 1
    assert fs.from_names([[], []]).matrix.shape == (2, 0)
    for named, terms in ((table, ["a"]), (table.astype(float), ["b", "a"])):
        with pytest.raises(InputError, match="give booleans"):
            fs.feature_terms(named, terms)
    with pytest.raises(InputError, match="more than once"):
        fs.feature_terms(table, ["a", "a"])


def test_umap_gets_the_papers_parameters_and_only_features_with_terms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {}

    class Umap:
        def __init__(self, **parameters: object) -> None:
            asked.update(parameters)

        def fit_transform(self, x: sparse.csr_matrix) -> np.ndarray:
            assert isinstance(x, sparse.csr_matrix)
            assert x.dtype == np.float32
            return np.arange(2.0 * x.shape[0]).reshape(-1, 2)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    annotated = fs.from_names([[], *([["a"]] * 11)])
    found = fs.plane(annotated)
    assert np.isnan(found[0]).all()
    assert found[11].tolist() == [20, 21]
    assert asked == {
        "n_neighbors": 10, "min_dist": 1.0, "spread": 10.0, "random_state": 0, "n_jobs": 1,
        "metric": "euclidean",
    }  # fmt: skip
    with pytest.raises(InputError, match="spread=0"):
        fs.plane(annotated, n_neighbors=20, min_dist=0.2, spread=0)
    with pytest.raises(InputError, match="11 features have terms"):
        fs.plane(annotated, n_neighbors=11)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(InputError, match="single-cell"):
        fs.plane(annotated)


def test_umap_itself_takes_the_papers_parameters_and_keeps_groups_apart() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    table = np.kron(np.eye(2), np.ones((30, 12))) * rng.random((60, 24)) > 0.4
    table[5] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of its curve's fit, which is no fault
        found = fs.plane(fs.feature_terms(table, [f"t{i}" for i in range(24)]))
    drawn = table.any(axis=1)
    np.testing.assert_array_equal(np.isfinite(found).all(axis=1), drawn)
    one, other = found[:30][drawn[:30]], found[30:][drawn[30:]]
    apart = np.linalg.norm(one.mean(axis=0) - other.mean(axis=0))
    assert apart > max(one.std(), other.std())


def test_hierarchy_is_read_and_climbed(hierarchy: ontology.Ontology) -> None:
    assert "GO:0000005" not in hierarchy.names
    assert hierarchy.parents["GO:0000002"] == ("GO:0000001",)  # regulates does not lie above
    assert hierarchy.parents["GO:0000004"] == ("GO:0000003", "GO:0000001")
    assert hierarchy.ancestors("GO:0000006") == {f"GO:000000{i}" for i in (1, 3, 4)} | {
        "GO:0008150"
    }
    assert hierarchy.first_level() == {"GO:0000001", "GO:0000003"}
    assert hierarchy.slim() == {"GO:0000001", "GO:0000003", "GO:0000004"}
    assert hierarchy.identify("apoptosis (GO:0000002)") == "GO:0000002"
    assert hierarchy.identify("cell death (GO:0000099)") == "GO:0000001"
    assert hierarchy.identify("apoptotic PROCESS") == "GO:0000002"
    assert hierarchy.identify("gone (GO:0000005)") is None
    assert hierarchy.identify("what?") is None
    with pytest.raises(InputError, match="no subset 'goslim_plant'"):
        hierarchy.slim("goslim_plant")


def test_top_level_takes_the_lowest_of_the_terms_above(hierarchy: ontology.Ontology) -> None:
    terms = ["x (GO:0000006)", "signaling", "Apoptotic process", "nobody knows"]
    slim = fs.top_level(terms, hierarchy, hierarchy.slim())
    assert slim.terms == ["cell death", "death signaling", "signaling"]
    assert [row.nonzero()[0].tolist() for row in slim.matrix.toarray()] == [[1], [2], [0], []]
    first = fs.top_level(terms, hierarchy, hierarchy.first_level())
    assert first.terms == ["cell death", "signaling"]
    assert first.matrix.toarray().tolist() == [
        [True, True], [False, True], [True, False], [False, False]
    ]  # fmt: skip


def test_dominant_is_the_most_common_and_of_ties_the_rarer() -> None:
    annotated = fs.from_names([["a", "b", "c"], ["a", "c"], ["d"], [], ["a", "b"]])
    top = fs.from_names([["large"], ["large"], ["small"], []])  # of a, b, c, d
    found = fs.dominant(annotated, top)
    assert found.tolist() == ["large", "small", np.nan, np.nan, "large"]
    assert found.categories.tolist() == ["large", "small"]
    nothing = fs.dominant(annotated, fs.from_names([[]] * 4))
    assert nothing.isna().all()
    with pytest.raises(InputError, match="top levels of 2 terms"):
        fs.dominant(annotated, fs.from_names([["large"], []]))


def test_top_level_by_genes_is_the_smallest_that_holds_most() -> None:
    membership = np.zeros((4, 20))
    membership[0, :10] = membership[1, 10:] = membership[2, [0, 15]] = 1
    tops = np.zeros((3, 20))
    tops[0, :18] = tops[1, :9] = tops[2, 9:] = 1
    found = fs.top_level_by_genes(membership, tops, ["all", "low", "high"])
    assert found.terms == ["all", "high", "low"]
    assert [row.nonzero()[0].tolist() for row in found.matrix.toarray()] == [[2], [1], [0], []]
    with pytest.raises(InputError, match="for 2 tops"):
        fs.top_level_by_genes(membership, tops, ["all", "low"])
    assert fs.top_level_by_genes(membership, tops[:0], []).matrix.shape == (4, 0)


def test_probe_looks_where_words_begin() -> None:
    annotated = fs.from_names(
        [["B cell activation", "T cell activation"], ["regulation of b cell death"],
         ["Rb cell cycle"], []]
    )  # fmt: skip
    found = fs.probe(annotated, ["B cell", "act", "(x"])
    assert found.to_numpy().tolist() == [
        ["B cell", 0, "B cell activation"],
        ["B cell", 1, "regulation of b cell death"],
        ["act", 0, "B cell activation"],
        ["act", 0, "T cell activation"],
    ]
    assert fs.probe(annotated, ["none"]).empty
    assert list(fs.probe(annotated, [])) == ["word", "feature", "term"]
    with pytest.raises(InputError, match="empty word"):
        fs.probe(annotated, [" "])


def test_term_frequencies_count_features_by_kind() -> None:
    annotated = fs.feature_terms(
        np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], bool),
        ["often", "once", "never", "also twice"],
    )
    kind = ["local", "global", "dead", "global"]
    table = fs.term_frequencies(annotated, kind)
    assert table.index.tolist() == ["often", "also twice", "once"]
    assert table["n_features"].tolist() == [3, 2, 1]
    np.testing.assert_allclose(table["share"], [1, 2 / 3, 1 / 3])
    assert table["n_local"].tolist() == [1, 0, 1]
    assert table["n_global"].tolist() == [2, 2, 0]
    assert list(fs.term_frequencies(annotated)) == ["n_features", "share"]
    with pytest.raises(InputError, match="1 kinds for 4 features"):
        fs.term_frequencies(annotated, ["local"])


@given(
    hnp.arrays(np.bool_, st.tuples(st.integers(1, 7), st.just(6))),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.data(),
)
def test_collapse_equals_a_loop(
    membership: np.ndarray, threshold: float, data: st.DataObject
) -> None:
    p = data.draw(hnp.arrays(np.float64, len(membership), elements=st.sampled_from([0, 0.1, 0.2])))
    found = fs.collapse(p, sparse.csr_array(membership), threshold)

    def jaccard(a: int, b: int) -> float:
        either = (membership[a] | membership[b]).sum()
        return (membership[a] & membership[b]).sum() / either if either else 0.0

    expected: dict[int, int] = {}
    for term in sorted(range(len(p)), key=lambda t: (p[t], t)):
        stands = [t for t, r in expected.items() if t == r and jaccard(t, term) >= threshold]
        expected[term] = max(stands, key=lambda t: (jaccard(t, term), -p[t], -t), default=term)
    assert found.tolist() == [expected[term] for term in range(len(p))]
    assert (found[found] == found).all()
    assert (p[found] <= p).all()


def test_merge_keeps_the_representatives_columns() -> None:
    annotated = fs.from_names([["a"], ["b", "c"], ["c"], []])
    merged = fs.merge(annotated, np.array([0, 0, 2]))
    assert merged.terms == ["a", "c"]
    assert merged.matrix.dtype == bool
    assert merged.matrix.toarray().tolist() == [
        [True, False], [True, True], [False, True], [False, False]
    ]  # fmt: skip
    twice = fs.merge(fs.from_names([["a", "b"]]), np.array([1, 1]))
    assert (twice.terms, twice.matrix.toarray().tolist(), twice.matrix.nnz) == (["b"], [[True]], 1)


@pytest.mark.parametrize(("p", "threshold"), [([0.1], 0.5), ([0.1, np.nan], 0.5), ([0, 0], 0)])
def test_collapse_refuses_what_has_no_order(p: list[float], threshold: float) -> None:
    with pytest.raises(InputError, match="one p"):
        fs.collapse(p, np.eye(2), threshold)


def test_figure_has_a_panel_a_key_and_leaves_out_features_without_a_place() -> None:
    rng = np.random.default_rng(0)
    xy = rng.normal(size=(30, 2))
    xy[4] = np.nan
    keys = {
        "top": pd.Categorical(rng.choice(["a", "b$"], 30)).set_categories(["b$", "a"]),
        "kind": pd.Series(rng.choice(["local", None], 30), index=np.arange(100, 130)),
        "active cells": np.where(np.arange(30) < 5, np.nan, np.arange(30.0)),
        "probe": np.arange(30) == 7,
    }
    picture = fs.figure(xy, keys)
    titles = [axes.get_title() for axes in picture.axes if axes.get_title()]
    assert titles == list(keys)
    grey, dots = picture.axes[3].collections[:2]
    assert (len(grey.get_offsets()), len(dots.get_offsets())) == (29, 1)
    assert len(picture.axes[2].collections[1].get_offsets()) == 25
    picture.canvas.draw()
    with pytest.raises(InputError, match="one per feature"):
        fs.figure(xy, {"short": [1, 2]})
    with pytest.raises(InputError, match="no keys"):
        fs.figure(xy, {})


def test_of_too_many_categories_the_rarest_stay_grey() -> None:
    names = [f"type {i:02}" for i in range(25)]
    values = pd.Categorical(np.repeat(names, np.arange(1, 26)), ["unused", *names])
    picture = fs.figure(np.random.default_rng(0).normal(size=(len(values), 2)), {"type": values})
    shown = [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
    assert shown == names[5:]

"""Probes: balanced cells, scikit-learn's numbers, and classes that are known beforehand."""

import builtins
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score

from analysis import chunked, probes
from sae_jax.errors import InputError

NAMES = np.array(["B cell", "NK cell", "monocyte"])


@pytest.fixture(scope="module")
def cells() -> tuple[np.ndarray, np.ndarray]:
    """Features [cells, 6], the first three high in one class each, and labels."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 400)
    z = np.maximum(rng.normal(size=(400, 6)) - 0.5, 0)
    z[np.arange(400), kind] += rng.exponential(1.5, 400)
    return z, NAMES[kind]


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix])
def test_fit_is_scikit_learns_regression(cells: tuple, make: Any) -> None:
    z, labels = cells
    found = probes.fit(make(z[:300]), labels[:300], make(z[300:]), labels[300:])
    model = LogisticRegression(max_iter=50).fit(z[:300], labels[:300])
    predicted = model.predict(z[300:])
    assert found.accuracy == accuracy_score(labels[300:], predicted)
    np.testing.assert_allclose(found.coefficients, model.coef_, atol=2e-3)
    np.testing.assert_array_equal(
        found.per_class, recall_score(labels[300:], predicted, average=None)
    )
    assert (
        found.confusion.loc["B cell", "NK cell"]
        == ((labels[300:] == "B cell") & (predicted == "NK cell")).sum()
    )
    assert found.confusion.to_numpy().sum() == found.n_test == 100
    assert found.converged
    assert not probes.fit(z, labels, z, labels, max_iter=2).converged


def test_a_probe_ignores_units_only_if_standardised(cells: tuple) -> None:
    z, labels = cells
    units = np.array([1e-3, 1, 50, 1, 1, 1])
    one, other = (
        probes.fit(x, labels, x, labels, standardize=True, max_iter=200) for x in (z, z * units)
    )
    np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-3)
    np.testing.assert_array_equal(one.confusion, other.confusion)
    raw = [probes.fit(x, labels, x, labels, max_iter=200) for x in (z, z * units)]
    assert raw[1].accuracy < raw[0].accuracy - 0.03


def test_two_classes_have_coefficients_each(cells: tuple) -> None:
    z, labels = cells
    two = labels != "monocyte"
    found = probes.fit(z[two], labels[two], z[two], labels[two])
    np.testing.assert_allclose(found.coefficients[0], -found.coefficients[1])
    assert found.coefficients[:, :2].argmax(axis=1).tolist() == [0, 1]
    assert found.intercept.shape == (2,)


def test_an_l1_penalty_leaves_features_out(cells: tuple) -> None:
    z, labels = cells
    of = sparse.csr_matrix(z[:300]), labels[:300], z[300:], labels[300:]
    found = probes.fit(*of, penalty="l1", strength=0.03, max_iter=500)
    assert (found.coefficients[:, 3:] == 0).all()
    assert np.diag(found.coefficients).min() > 0
    assert found.accuracy > 0.6
    assert found.converged


def test_a_class_that_was_never_learnt_is_in_the_confusion(cells: tuple) -> None:
    z, labels = cells
    known = labels != "monocyte"
    found = probes.fit(z[known], labels[known], z, labels)
    assert found.confusion.loc["monocyte", "monocyte"] == 0
    assert found.per_class["monocyte"] == 0
    assert found.confusion.to_numpy().sum() == 400


def test_splits_are_balanced_disjoint_and_scaled_down() -> None:
    labels = pd.Series(["a"] * 300 + ["b"] * 80 + ["c"] * 7 + [None] * 13).sample(
        frac=1, random_state=0
    )
    found = probes.split(labels, 60, 20)
    assert found.classes.tolist() == ["a", "b"]
    assert (found.n_train, found.n_test, found.factor) == (60, 20, 1)
    values = labels.to_numpy()
    for cells, n in ((found.train, 60), (found.test, 20)):
        assert pd.Series(values[cells]).value_counts().to_dict() == {"a": n, "b": n}
    assert not np.intersect1d(found.train, found.test).size
    assert found.left_out.to_dict() == {"c": 7}
    paper = probes.split(labels)
    assert (paper.n_train, paper.n_test, paper.factor) == (60, 20, 0.01)
    named = probes.split(labels, classes=["a", "c"])
    assert (named.n_train, named.n_test) == (5, 1)
    among = np.arange(400) < 200
    some = probes.split(labels, 10, 10, among=among)
    assert max(some.train.max(), some.test.max()) < 200
    np.testing.assert_array_equal(probes.split(labels, 60, 20).train, found.train)
    assert (probes.split(labels, 60, 20, seed=1).train != found.train).any()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": ["a"] * 50}, "1 classes with at least 20 cells"),
        ({"classes": ["a", "d"]}, "class 'd' has fewer than 2 cells"),
        ({"train": 0}, "train=0"),
        ({"among": [1, 0]}, "among must be booleans of the 80 cells"),
    ],
)
def test_what_a_split_refuses(changed: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        probes.split(**({"labels": ["a"] * 40 + ["b"] * 40} | changed))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, np.full((4, 2), np.nan), "train features hold NaN"),
        (2, np.ones((4, 3)), "2 features to learn from and 3"),
        (1, ["a", "a", "b", None], "train labels"),
        (3, ["a", "b"], "test labels have shape"),
        (1, ["a"] * 4, "of one class"),
        (0, np.ones(4), "give cells by features"),
    ],
)
def test_what_a_probe_refuses(place: int, value: Any, said: str) -> None:
    of = [np.ones((4, 2)), ["a", "a", "b", "b"], np.ones((4, 2)), ["a", "a", "b", "b"]]
    of[place] = value
    with pytest.raises(InputError, match=said):
        probes.fit(*of)


def test_markers_are_found_and_classify(cells: tuple) -> None:
    z, labels = cells
    x = np.log1p(z) * np.array([0.1, 1, 3, 1, 1, 1])
    of = x[:300], labels[:300], x[300:], labels[300:]
    found = probes.marker_ranking(*of, n_markers=1)
    assert (found.coefficients != 0).tolist() == np.eye(3, 6, dtype=bool).tolist()
    standard = ((x - x[:300].mean(axis=0)) / x[:300].std(axis=0))[300:, :3]
    wanted = (NAMES[standard.argmax(axis=1)] == labels[300:]).mean()
    assert found.accuracy == pytest.approx(wanted)
    assert wanted > 0.6
    other = probes.marker_ranking(sparse.csr_matrix(of[0]), of[1], sparse.csr_matrix(of[2]), of[3],
                                  n_markers=1)  # fmt: skip
    np.testing.assert_array_equal(other.confusion, found.confusion)
    with pytest.raises(InputError, match="there are no markers"):
        probes.marker_ranking(np.ones((4, 2)), list("aabb"), np.ones((4, 2)), list("aabb"))


def test_top_features_with_their_genes_and_known_markers(cells: tuple) -> None:
    z, labels = cells
    probe = probes.fit(z, labels, z, labels)
    genes = ["MS4A1", "GNLY", "LYZ", "ACTB", "CD79A"]
    scores = np.zeros((6, 5))
    scores[0] = [3, -1, 0, 2, 4]
    scores[1, 1] = 1
    markers = {"B cell": ["MS4A1", "CD79A", "CD19"], "NK cell": ["NKG7"]}
    found = probes.top_features(probe, 2, scores=scores, genes=genes, markers=markers)
    first = found[found["rank"] == 1].set_index("class")
    assert first["feature"].tolist() == [0, 1, 2]
    assert first["genes"].tolist() == [["CD79A", "MS4A1", "ACTB"], ["GNLY"], []]
    assert first["markers"].tolist() == [["CD79A", "MS4A1"], [], []]
    assert first["n_markers"].tolist() == [2, 0, 0]
    np.testing.assert_array_equal(first["coefficient"], np.diag(probe.coefficients))
    assert (found["coefficient"] > 0).all()
    assert probes.top_features(probe, 1).columns.tolist() == [
        "class", "rank", "feature", "coefficient",
    ]  # fmt: skip
    with pytest.raises(InputError, match="scores and genes together"):
        probes.top_features(probe, scores=scores)
    with pytest.raises(InputError, match="give 6 features by 5 genes"):
        probes.top_features(probe, scores=scores[:2], genes=genes)


def test_the_cell_cycle_genes_are_97() -> None:
    published = probes.cell_cycle_genes()
    assert {phase: len(genes) for phase, genes in published.items()} == {"S": 43, "G2M": 54}
    assert len({gene for genes in published.values() for gene in genes}) == 97
    assert {"MCM5", "PCNA", "MLF1IP"} <= set(published["S"])
    assert {"CDK1", "TOP2A", "FAM64A"} <= set(published["G2M"])
    there = probes.cell_cycle_genes(["PCNA", "CENPU", "HN1", "JPT1", "ACTB"])
    assert there == {"S": ["PCNA", "CENPU"], "G2M": ["HN1"]}


def test_phases_are_those_of_scanpy() -> None:
    scanpy = pytest.importorskip("scanpy")
    rng = np.random.default_rng(1)
    genes = probes.cell_cycle_genes()
    names = [*genes["S"], *genes["G2M"], *(f"g{i}" for i in range(300))]
    counts = rng.poisson(0.5, (90, len(names)))
    counts[:30, :43] += rng.poisson(2, (30, 43))
    counts[30:60, 43:97] += rng.poisson(2, (30, 54))
    x = sparse.csr_matrix(np.log1p(counts), dtype=np.float32)
    found, used = probes.cell_cycle(x, names)
    assert used == genes
    wanted = anndata.AnnData(x, var=pd.DataFrame(index=names))
    scanpy.tl.score_genes_cell_cycle(
        wanted, s_genes=genes["S"], g2m_genes=genes["G2M"], random_state=0
    )
    pd.testing.assert_frame_equal(
        found, wanted.obs.reset_index(drop=True), atol=1e-6, check_dtype=False
    )
    for other in (chunked.chunked(x, rows=7), x.toarray()):
        pd.testing.assert_frame_equal(probes.cell_cycle(other, names)[0], found)
    twice = sparse.hstack([x, x[:, ::-1]], "csr")  # of genes that share a symbol the first counts
    pd.testing.assert_frame_equal(probes.cell_cycle(twice, names + names[::-1])[0], found)
    assert (found["phase"][:30] == "S").mean() > 0.9
    assert (found["phase"][30:60] == "G2M").mean() > 0.9
    assert set(found["phase"]) == set(probes.PHASES)

    with pytest.raises(InputError, match="give human gene symbols"):
        probes.cell_cycle(x, [f"E{name}" for name in names])
    with pytest.raises(InputError, match="x holds counts"):
        probes.cell_cycle(sparse.csr_matrix(counts), names)


def test_without_scanpy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "scanpy":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match="pip install 'sae-jax"):
        probes.cell_cycle(np.ones((2, 2)), ["a", "b"])

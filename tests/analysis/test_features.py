import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from sklearn.metrics import roc_auc_score

from analysis import features
from sae_jax.errors import InputError


def sparse_relu(rng: np.random.Generator, n_cells: int = 200, n_features: int = 30) -> np.ndarray:
    z = np.maximum(rng.normal(size=(n_cells, n_features)) - rng.uniform(-1, 2.5, n_features), 0)
    z[:, 3] = 0
    z[:, 4] = np.round(z[:, 4])
    return z.astype(np.float32)


def test_activity_counts() -> None:
    z = np.array([[0, 1, 2], [0, 3, 0], [0, 0, 0], [0, 0, 4]], dtype=np.float32)
    for given_z in (z, sparse.csr_matrix(z), sparse.csc_array(z)):
        table = features.activity(given_z)
        assert table.index.name == "feature"
        assert table["n_active"].tolist() == [0, 2, 2]
        assert table["density"].tolist() == [0, 0.5, 0.5]
        assert table["mean_activation"].tolist() == [0, 1, 1.5]
        np.testing.assert_array_equal(table["mean_active"], [np.nan, 2, 3])
        assert table["max_activation"].tolist() == [0, 3, 4]


def test_stored_zeros_are_not_activity_and_the_input_is_left_alone() -> None:
    z = sparse.csr_array((np.array([0.0, 2.0]), np.array([0, 1]), np.array([0, 2])), shape=(1, 2))
    assert features.activity(z)["n_active"].tolist() == [0, 1]
    assert z.nnz == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "feature 2 in cell 1 is NaN"), (-1.0, "feature 2 in cell 1 is negative")],
)
def test_activity_refuses_what_has_no_meaning(value: float, message: str) -> None:
    z = np.ones((3, 4))
    z[1, 2] = value
    with pytest.raises(InputError, match=message):
        features.activity(sparse.csr_array(z))
    with pytest.raises(InputError, match="1 dimensions"):
        features.activity(np.ones(3))
    with pytest.raises(InputError, match="no cells"):
        features.activity(np.ones((0, 3)))


@pytest.mark.parametrize("signed", [False, True])
def test_auroc_equals_sklearn(signed: bool) -> None:
    rng = np.random.default_rng(0)
    z = sparse_relu(rng)
    if signed:
        z -= np.roll(z, 1, axis=1)
    labels = rng.choice(["T", "B", "NK"], size=len(z), p=[0.8, 0.15, 0.05])
    names, area = features.auroc(sparse.csr_array(z), labels)
    assert names.tolist() == ["B", "NK", "T"]
    expected = [[roc_auc_score(labels == name, column) for name in names] for column in z.T]
    np.testing.assert_allclose(area, expected, rtol=1e-13)
    np.testing.assert_array_equal(area, features.auroc(z, labels)[1])


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(2, 12), st.integers(1, 3)), elements=st.integers(-2, 2)
    ),
    st.data(),
)
def test_auroc_equals_sklearn_on_ties(z: np.ndarray, data: st.DataObject) -> None:
    n = len(z)
    labels = data.draw(
        hnp.arrays(bool, n).filter(lambda values: 0 < values.sum() < len(values)), label="labels"
    )
    names, area = features.auroc(z, labels)
    assert names.tolist() == [False, True]
    np.testing.assert_allclose(area[:, 1], [roc_auc_score(labels, column) for column in z.T])
    np.testing.assert_allclose(area.sum(axis=1), 1)


def test_auroc_leaves_out_cells_without_a_label() -> None:
    rng = np.random.default_rng(1)
    z = sparse_relu(rng)
    labels = pd.Series(rng.choice(["a", "b"], size=len(z))).where(rng.random(len(z)) < 0.7)
    names, area = features.auroc(sparse.csr_matrix(z), labels)
    known = labels.notna().to_numpy()
    assert names.tolist() == ["a", "b"]
    np.testing.assert_array_equal(area, features.auroc(z[known], labels[known])[1])


def test_one_feature_may_tell_several_labels_best_and_every_label_has_one() -> None:
    labels = pd.Series(pd.Categorical([*list("AAABBBCCCDDD"), None], list("DCBA")))
    z = np.zeros((13, 3))
    z[:6, 1] = [9, 8, 7, 3, 2, 1]  # A above B above the rest
    z[3:6, 2] = [0, 1, 0]
    z[12] = 99  # of no label
    found = features.telling(z, labels).set_index("label")
    assert found.index.tolist() == list("DCBA")
    areas = {
        name: [roc_auc_score(labels[:12] == name, z[:12, i]) for i in range(3)] for name in "ABCD"
    }
    for name, own in areas.items():
        assert found.at[name, "feature"] == int(np.argmax(own))
        assert found.at[name, "auroc"] == pytest.approx(max(own))
    assert found.loc[["A", "B"], "feature"].tolist() == [1, 1]


def test_auroc_keeps_the_order_of_categories_that_occur() -> None:
    labels = pd.Categorical(["late", "early", "late"], categories=["early", "never", "late"])
    names, area = features.auroc(np.array([[2.0], [1.0], [3.0]]), labels)
    assert names.tolist() == ["early", "late"]
    assert area.tolist() == [[0.0, 1.0]]


def test_auroc_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="needs two different labels"):
        features.auroc(np.eye(3), ["a", "a", None])
    with pytest.raises(InputError, match="one per cell"):
        features.auroc(np.eye(3), ["a", "b"])

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import roc_auc_score

from analysis import cell_types as ct
from sae_jax.errors import InputError

LABELS = pd.Series(["B"] * 40 + ["T"] * 60 + ["NK"] * 20 + ["rare"] * 3 + [None] * 7, name="type")


def activations(seed: int = 0, features: int = 9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.normal(size=(len(LABELS), features)), 0)
    z[LABELS == "B", 0] += 1.5
    z[LABELS == "T", 1] = 0  # silent in T: tells them from its other side
    return z


@given(st.floats(0.05, 0.9), st.integers(0, 5))
def test_a_split_holds_out_the_same_share_of_every_label(share: float, seed: int) -> None:
    choose, measure = ct.split(LABELS, share, seed)
    assert np.sort(np.concatenate([choose, measure])).tolist() == list(range(len(LABELS)))
    assert (np.diff(choose) > 0).all()
    counts = LABELS.iloc[measure].value_counts(dropna=False)
    for label, n in LABELS.value_counts(dropna=False).items():
        assert counts.get(label, 0) == round(share * n)


def test_a_split_of_nothing_is_all_cells_twice() -> None:
    choose, measure = ct.split(LABELS, 0)
    assert choose.tolist() == measure.tolist() == list(range(len(LABELS)))
    assert not np.array_equal(ct.split(LABELS, 0.3, 1)[0], ct.split(LABELS, 0.3, 2)[0])
    with pytest.raises(InputError, match="from 0 to below 1"):
        ct.split(LABELS, 1)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_areas_equal_sklearn_on_either_part(form: type) -> None:
    z = activations()
    choose, measure = ct.split(LABELS, 0.4)
    found = ct.areas(form(z), LABELS, choose, measure)
    assert found.labels.tolist() == ["B", "NK", "T"]  # the rare are among the others only
    assert found.n_cells.tolist() == [40, 20, 60]
    for cells, areas in ((choose, found.chosen), (measure, found.measured)):
        known = cells[LABELS.iloc[cells].notna()]
        for feature in range(z.shape[1]):
            for at, label in enumerate(found.labels):
                expected = roc_auc_score(LABELS.iloc[known] == label, z[known, feature])
                assert areas[feature, at] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sides", ct.SIDES)
def test_the_best_is_chosen_on_one_part_and_measured_on_the_other(sides: str) -> None:
    areas = ct.areas(activations(), LABELS, *ct.split(LABELS, 0.4))
    best = areas.best(sides).set_index("label")
    for at, label in enumerate(areas.labels):
        column, other = areas.chosen[:, at], areas.measured[:, at]
        score = np.maximum(column, 1 - column) if sides == "two" else column
        feature = int(score.argmax())
        up = sides == "one" or column[feature] >= 0.5
        row = best.loc[label]
        assert row["feature"] == feature
        assert row["higher"] == up
        assert row["auroc_chosen"] == pytest.approx(score[feature])
        assert row["auroc"] == pytest.approx(other[feature] if up else 1 - other[feature])
    assert best.at["B", "feature"] == 0
    if sides == "two":
        assert best.loc["T", ["feature", "higher"]].tolist() == [1, False]
    table = areas.per_feature(sides, 0.7)
    assert table.loc[0, "label"] == "B"
    assert table["specific"].equals((table["auroc_chosen"] > 0.7) & (table["auroc"] > 0.7))
    assert table["specific"][0]
    assert (table["label"][1] == "T") == (sides == "two")


def test_the_side_is_that_of_the_cells_it_was_chosen_on() -> None:
    areas = ct.Areas(np.array(["B", "T"]), np.array([9, 9]), np.array([[0.2, 0.6]]),
                     np.array([[0.7, 0.4]]))  # fmt: skip
    assert areas.best("two")["auroc"].tolist() == pytest.approx([0.3, 0.4])
    assert areas.best("one")["auroc"].tolist() == pytest.approx([0.7, 0.4])
    row = areas.per_feature("two").loc[0]
    assert (row["label"], row["auroc_chosen"], row["auroc"]) == ("B", 0.8, pytest.approx(0.3))
    assert not areas.per_feature("two", 0.75)["specific"][0]


def test_of_many_features_of_noise_the_best_looks_good_only_where_it_was_chosen() -> None:
    z = np.random.default_rng(0).random((len(LABELS), 2000))
    areas = ct.areas(z, LABELS, *ct.split(LABELS, 0.5))
    best = areas.best()
    assert best["auroc_chosen"].min() > 0.7
    assert abs(best["auroc"].mean() - 0.5) < 0.12
    everything = np.arange(len(LABELS))
    assert ct.areas(z, LABELS, everything, everything).best()["auroc"].min() > 0.65


def test_the_best_of_fewer_candidates() -> None:
    areas = ct.areas(activations(), LABELS, *ct.split(LABELS, 0.4))
    whole = areas.best()["auroc"].mean()
    assert areas.best_of(9) == areas.best_of(50) == pytest.approx(whole)
    # One candidate at random is on average the mean over all features, whatever is chosen.
    single = areas.best_of(1, draws=1500)
    assert single == pytest.approx(areas.measured.mean(), abs=0.015)
    assert single < areas.best_of(4) < whole + 0.05
    assert areas.best_of(4, seed=3) == areas.best_of(4, seed=3)


def test_what_cannot_be_told_apart_is_refused() -> None:
    choose, measure = ct.split(LABELS, 0.4)
    with pytest.raises(InputError, match="1 labels have 20 cells or more"):
        ct.areas(activations(), LABELS, choose, measure, 20)
    with pytest.raises(InputError, match="sides='both'"):
        ct.areas(activations(), LABELS, choose, measure).best("both")

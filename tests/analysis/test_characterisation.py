import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

from analysis import characterisation as ch
from analysis.groups import top_cells
from sae_jax.errors import InputError

SMALL = hnp.arrays(
    np.float64, st.tuples(st.integers(3, 14), st.integers(1, 3)), elements=st.integers(0, 3)
)


def sparse_relu(rng: np.random.Generator, n_cells: int = 300, n_features: int = 25) -> np.ndarray:
    z = np.maximum(rng.normal(size=(n_cells, n_features)) - rng.uniform(-1, 2.5, n_features), 0)
    z[:, 3] = 0
    z[:, 4] = np.round(z[:, 4])
    z[:, 5] = 2
    return z


def alpha_of(one: np.ndarray, other: np.ndarray) -> float:
    """Equation 8, as printed."""
    margin = 1.96 * (one.std() / np.sqrt(len(one)) + other.std() / np.sqrt(len(other)))
    return abs(one.mean() - other.mean()) - margin


@pytest.mark.parametrize("rule", ["text", "code"])
@pytest.mark.parametrize("missing", [False, True])
def test_specificity_equals_equation_8_in_a_loop(rule: str, missing: bool) -> None:
    rng = np.random.default_rng(0)
    z = sparse_relu(rng)
    labels = pd.Series(rng.choice(["T", "B", "NK"], size=len(z), p=[0.7, 0.2, 0.1]))
    z[labels == "B", 7] += 0.5
    z[labels != "T", 8] += 0.5
    z[:, 9] /= 1000
    z[labels == "NK", 9] += 0.01  # beyond doubt, but less than the text's 0.05
    if missing:
        labels = labels.where(rng.random(len(z)) < 0.8)
    found = ch.specificity(sparse.csr_array(z), labels, rule)
    assert found.labels.tolist() == ["B", "NK", "T"]
    for feature, values in enumerate(z.T):
        for at, name in enumerate(found.labels):
            one, other = values[labels == name], values[labels.notna() & (labels != name)]
            alpha = alpha_of(one, other)
            assert found.n_cells[at] == len(one)
            assert found.n_active[feature, at] == (one > 0).sum()
            got = [found.mean[feature, at], found.sd[feature, at], found.alpha[feature, at]]
            np.testing.assert_allclose(got, [one.mean(), one.std(), alpha], rtol=0, atol=1e-12)
            up = one.mean() > other.mean() and (alpha >= 0.05 if rule == "text" else alpha > 0)
            assert found.higher[feature, at] == up
    table = found.table()
    n_higher = found.higher.sum(axis=1)
    assert (table["kind"] == "local").to_numpy().tolist() == (n_higher == 1).tolist()
    assert table["kind"][3] == "dead"
    assert table["kind"][5] == "global"
    assert table.loc[7, ["kind", "label"]].tolist() == ["local", "B"]
    assert table.loc[8, ["kind", "n_higher"]].tolist() == ["global", 2]
    assert table["kind"][9] == ("local" if rule == "code" else "global")
    assert table["label"][[3, 8]].isna().all()
    np.testing.assert_array_equal(table["n_active"], (z > 0).sum(axis=0))


@given(SMALL, st.data())
def test_kinds_partition_the_features_and_do_not_depend_on_the_order(
    z: np.ndarray, data: st.DataObject
) -> None:
    labels = data.draw(
        hnp.arrays(np.int64, len(z), elements=st.integers(0, 2)).filter(lambda v: len(set(v)) > 1)
    )
    order = data.draw(st.permutations(range(len(z))))
    found, other = ch.specificity(z, labels), ch.specificity(z[order], labels[order])
    np.testing.assert_array_equal(found.kind == "dead", (z == 0).all(axis=0))
    np.testing.assert_array_equal(found.n_active.sum(axis=1), (z > 0).sum(axis=0))
    np.testing.assert_allclose(found.alpha, other.alpha, atol=1e-12)


def test_a_type_of_one_cell_is_never_significant() -> None:
    z = np.array([[9.0], [0], [0], [0]])
    found = ch.specificity(z, ["rare", "a", "a", "a"])
    assert np.isnan(found.alpha).all()
    assert found.kind.tolist() == ["global"]


def test_cells_without_a_label_only_keep_a_feature_alive() -> None:
    found = ch.specificity(np.array([[1.0], [0], [0]]), [None, "a", "b"])
    assert found.table().loc[0, ["kind", "n_active"]].tolist() == ["global", 1]


def test_labels_must_fit() -> None:
    for labels, message in ([["a"] * 3, "two different"], [["a", "b"], "one per cell"]):
        with pytest.raises(InputError, match=message):
            ch.specificity(np.eye(3), labels)
        with pytest.raises(InputError, match=message):
            ch.metadata_specificity(np.eye(3), labels)
    with pytest.raises(InputError, match='give "text" or "code"'):
        ch.specificity(np.eye(3), ["a", "b", "b"], "both")


def test_metadata_specificity_by_shares_of_active_cells() -> None:
    labels = np.repeat(["lung", "skin", None], [200, 200, 50])
    z = np.zeros((450, 5))
    z[60:200, 0] = z[200:260, 0] = 1  # 140 and 60: exactly 70 %
    z[61:200, 1] = z[200:261, 1] = 1
    z[:99, 2] = z[400:, 2] = 1  # the unlabelled do not count
    z[:50, 3] = z[350:400, 3] = 1  # tie
    table = ch.metadata_specificity(sparse.csc_array(z), labels)
    assert table["n_active"].tolist() == [200, 200, 99, 100, 0]
    assert table["label"].tolist() == ["lung", "lung", "lung", "lung", None]
    np.testing.assert_allclose(table["share"], [0.7, 0.695, 1, 0.5, np.nan])
    assert table["verdict"].tolist() == [
        "specific", "unspecific", "not enough data", "unspecific", "not enough data"
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"above 0\.5"):
        ch.metadata_specificity(z, labels, share=0.5)


def test_differentiation_needs_a_rise_at_every_stage_and_more_than_elsewhere() -> None:
    labels = np.array(["stem", "stem", "mid", "late", "late", "T", "T", None])
    z = np.array(
        [
            [0, 0, 1, 2, 4, 0, 1, 9],  # rises: .0 1 3, 7/5 > .5
            [0, 0, 1, 2, 4, 9, 9, 0],  # rises, but higher elsewhere
            [0, 0, 1, 0, 2, 0, 0, 0],  # 0 1 1: no rise at the last step
            [0] * 8,
        ],
        dtype=float,
    ).T
    table = ch.differentiation(sparse.csr_array(z), labels, ["stem", "mid", "late"])
    assert table["passes"].tolist() == [True, False, False, False]
    assert table.loc[0].tolist() == [True, 7 / 5, 0.5, 3, 0, 1, 3]
    assert list(table.columns[4:]) == ["mean stem", "mean mid", "mean late"]
    narrow = ch.differentiation(z, labels, ["stem", "mid", "late"], lineage=["mid", "late"])
    assert narrow.loc[0, ["lineage", "elsewhere"]].tolist() == [7 / 3, 1 / 4]
    with pytest.raises(InputError, match="no cell is labelled 'later'"):
        ch.differentiation(z, labels, ["stem", "later"])
    for stages in (["stem"], ["stem", "stem"], ["stem", "mid", "late", "T"]):
        with pytest.raises(InputError, match="at least two stages"):
            ch.differentiation(z, labels, stages)


def test_seed_robustness_gives_the_papers_table_with_its_divisor() -> None:
    def table(n_local: int, n_global: int) -> pd.DataFrame:
        sizes = [n_local, n_global, 10_000 - n_local - n_global]
        return pd.DataFrame({"kind": np.repeat(["local", "global", "dead"], sizes)})

    tables = [table(908, 4410), table(917, 4436), table(917, 4436)]
    paper = ch.seed_robustness(tables, ddof=0)
    assert paper.loc["local"].round(2).tolist() == [914.00, 2.45, 3]
    assert paper.loc["global"].round(2).tolist() == [4427.33, 7.08, 3]
    assert paper.loc["dead"].round(2).tolist() == [4658.67, 9.53, 3]
    ours = ch.seed_robustness(tables)
    assert ours.loc["live", "sem"] == pytest.approx(stats.sem([5318, 5353, 5353]))
    alone = ch.seed_robustness([table(10_000, 0)])
    assert alone["mean"].tolist() == [10_000, 10_000, 0, 0]
    assert alone["sem"].isna().all()
    with pytest.raises(InputError, match="no tables"):
        ch.seed_robustness([])


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@pytest.mark.parametrize("signed", [False, True])
def test_spearman_equals_scipy(signed: bool) -> None:
    rng = np.random.default_rng(1)
    z = sparse_relu(rng)
    if signed:
        z -= np.roll(z, 1, axis=1)
    values = rng.normal(size=(len(z), 4)) + z[:, [0]]
    values[:, 1] = np.round(values[:, 1])
    values[rng.random(len(z)) < 0.3, 2] = np.nan
    values[:, 3] = 1
    rho, p = ch.spearman(sparse.csr_array(z), values)
    for column, y in enumerate(values.T):
        known = ~np.isnan(y)
        for feature, x in enumerate(z.T):
            expected = stats.spearmanr(x[known], y[known])
            got = [rho[feature, column], p[feature, column]]
            np.testing.assert_allclose(got, list(expected), rtol=1e-10, atol=1e-13)
    trend = ch.trend(z, values[:, 2])
    np.testing.assert_array_equal(trend["rho"], rho[:, 2])
    assert (trend["q"] >= trend["p"]).equals(trend["p"].notna())


@given(SMALL, st.data())
def test_spearman_is_symmetric_and_bounded(z: np.ndarray, data: st.DataObject) -> None:
    y = data.draw(hnp.arrays(np.float64, len(z), elements=st.integers(-2, 2)))
    rho, p = ch.spearman(z, y)
    back = [ch.spearman(y[:, None], column)[0][0] for column in z.T]
    np.testing.assert_allclose(rho, back, atol=1e-12)
    np.testing.assert_allclose(ch.spearman(z, -y)[0], -rho)
    known = ~np.isnan(rho)
    np.testing.assert_array_equal(known, (np.ptp(z, axis=0) > 0) & (np.ptp(y) > 0))
    assert (np.abs(rho[known]) <= 1).all()
    assert ((p[known] >= 0) & (p[known] <= 1)).all()


def test_spearman_refuses_another_number_of_cells_and_skips_short_columns() -> None:
    with pytest.raises(InputError, match="one row per cell"):
        ch.spearman(np.eye(3), [1, 2])
    assert np.isnan(ch.spearman(np.eye(3), [1, 2, np.nan])[0]).all()


def test_confounders_equal_scipy_and_sklearn_and_flag_what_is_technical() -> None:
    rng = np.random.default_rng(2)
    z = sparse_relu(rng)
    donor = rng.choice(["d1", "d2", "d3"], size=len(z))
    z[donor == "d2", 6] += 3
    depth = rng.integers(1000, 9000, size=len(z))
    z[:, 7] = depth * 0.001
    obs = pd.DataFrame(
        {
            "total_counts": pd.array(depth, dtype="Int64"),
            "donor": pd.Series(donor).where(rng.random(len(z)) < 0.9),
            "female": rng.random(len(z)) < 0.5,
            "tissue": "blood",
        }
    )
    table = ch.confounders(sparse.csr_array(z), obs)
    assert len(table) == 4 * z.shape[1]
    by = table.set_index(["column", "feature"])
    known = obs["donor"].notna().to_numpy()
    for feature in (0, 4, 6):
        x = z[known, feature]
        names = obs["donor"][known].to_numpy()
        h, p = stats.kruskal(*(x[names == name] for name in ("d1", "d2", "d3")))
        found = by.loc[("donor", feature)]
        np.testing.assert_allclose([found["explained"], found["p"]], [h / (len(x) - 1), p])
        areas = {name: roc_auc_score(names == name, x) for name in ("d1", "d2", "d3")}
        level = max(areas, key=lambda name: abs(areas[name] - 0.5))
        assert found["level"] == level
        assert found["auroc"] == pytest.approx(areas[level])
    rho = stats.spearmanr(z[:, 7], depth)[0]
    assert by.loc[("total_counts", 7), "explained"] == pytest.approx(rho**2)
    assert by.loc[("donor", 6), "level"] == "d2"
    assert by.loc["tissue"][["explained", "p", "q", "auroc"]].isna().all(axis=None)
    assert by.loc[(slice(None), [3, 5]), "explained"].isna().all()

    flags = ch.technical(table)
    assert flags.index[flags["technical"]].tolist() == [6, 7]
    assert flags["column"][[6, 7]].tolist() == ["donor", "total_counts"]
    assert flags.loc[3, ["technical", "column"]].tolist() == [False, None]
    only_sex = ch.technical(table[table["column"] == "female"])
    assert not only_sex["technical"].any()


def test_confounders_work_with_categories_alone_and_refuse_names_of_cells() -> None:
    z = np.arange(8.0).reshape(4, 2)
    table = ch.confounders(z, pd.DataFrame({"batch": pd.Categorical([1, 1, 2, 2])}))
    assert table["auroc"].tolist() == [0.0, 0.0]  # of equally far levels the first
    assert table["rho"].isna().all()
    with pytest.raises(InputError, match="a row per cell"):
        ch.confounders(z, pd.DataFrame({"batch": [1]}))
    with pytest.raises(InputError, match="'barcode' has 1500 levels"):
        ch.confounders(np.eye(1500), pd.DataFrame({"barcode": [f"c{i}" for i in range(1500)]}))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_compare_equals_equation_8_in_a_loop(kind: str) -> None:
    rng = np.random.default_rng(3)
    z = sparse_relu(rng)
    values = np.maximum(rng.normal(size=(len(z), 6)), 0) + 0.3 * z[:, [2]]
    groups = top_cells(z, 90)
    low = z.T == 0
    if kind == "dense":
        values[rng.random(values.shape) < 0.1] = np.nan
    given_values = values if kind == "dense" else sparse.csc_array(values)
    found = ch.compare(given_values, groups.high, low)
    same = ch.compare(given_values, groups.high, active=groups.active)
    high = groups.high.toarray()
    for feature in range(z.shape[1]):
        for column, y in enumerate(values.T):
            one, other = (y[mask & ~np.isnan(y)] for mask in (high[feature], low[feature]))
            assert found.n_high[feature, column] == len(one)
            assert found.n_low[feature, column] == len(other)
            if min(len(one), len(other)) > 1:
                alpha = alpha_of(one, other)
                assert found.alpha[feature, column] == pytest.approx(alpha, abs=1e-9)
                assert found.mean_high[feature, column] == pytest.approx(one.mean())
                assert found.sd_low[feature, column] == pytest.approx(other.std())
    assert np.isnan(found.alpha[3]).all()  # no high cell
    assert np.isnan(found.mean_low[5]).all()  # no silent cell
    np.testing.assert_array_equal(found.significant, found.alpha >= 0.05)
    np.testing.assert_array_equal(found.n_low, same.n_low)
    np.testing.assert_allclose(found.alpha, same.alpha, atol=1e-9)
    np.testing.assert_allclose(found.mean_low, same.mean_low, atol=1e-12)


def test_compare_takes_one_column_and_refuses_masks_that_do_not_fit() -> None:
    high = np.array([[True, True, False, False]])
    found = ch.compare([5.0, 5.0, 1.0, 1.0], high, ~high)
    assert found.alpha.tolist() == [[4.0]]
    assert found.significant.tolist() == [[True]]
    assert not ch.compare([5.0, 5, 1, 1], high, ~high, threshold=4.1).significant.any()
    with pytest.raises(InputError, match="either low or active"):
        ch.compare(np.ones(4), high)
    with pytest.raises(InputError, match="a mask is bool of shape"):
        ch.compare(np.ones(5), high, ~high)
    with pytest.raises(InputError, match="a mask is float64"):
        ch.compare(np.ones(4), high.astype(float), ~high)
    with pytest.raises(InputError, match="NaN or infinity"):
        ch.compare(sparse.csr_array([[np.nan]] * 4), high, ~high)

"""What is drawn equals the data: offsets of dots, heights of bars, fields of heat maps."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import sparse, stats

from analysis import cell_plots, feature_space, lens_plots, matching, plots
from sae_jax.errors import InputError

RNG = np.random.default_rng(0)
XY = RNG.normal(size=(60, 2))
Z = sparse.random_array((60, 6), density=0.4, rng=RNG, format="csr")
LABELS = pd.Series(pd.Categorical(RNG.choice(["b", "a", "c"], 60)), name="kind")


def dots(axes: Axes) -> list[PathCollection]:
    return [found for found in axes.collections if isinstance(found, PathCollection)]


def steps(axes: Axes) -> dict[str, np.ndarray]:
    """Counts of each outlined histogram, by its label."""
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    return {patch.get_label(): patch.get_data().values for patch in outlines}


def texts(key: pd.Categorical) -> list[str]:
    return pd.Series(key, dtype=object).fillna("-").tolist()


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0, 0.2),
)
def test_spread_texts_keep_order_gap_and_bounds(wanted: list[float], gap: float) -> None:
    at = cell_plots.spread(wanted, gap, 0, 1)
    assert at.min() >= -1e-9
    assert at.max() <= 1 + 1e-9
    order = np.argsort(wanted, kind="stable")
    least = min(gap, 1 / max(len(wanted) - 1, 1))
    assert (np.diff(at[order]) >= least - 1e-9).all()


def test_spread_moves_only_what_lies_too_close() -> None:
    at = cell_plots.spread([0.9, 0.2, 0.22], 0.1, 0, 1)
    np.testing.assert_allclose(at, [0.9, 0.16, 0.26])


def test_components_are_those_of_the_svd() -> None:
    x = np.random.default_rng(1).normal(size=(40, 5)) * [5, 3, 1, 1, 1]
    xy = cell_plots.components(x).transform(x)
    left, scale, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(left[:, :2] * scale[:2]), atol=1e-10)
    with pytest.raises(InputError, match="at least 2 by 2"):
        cell_plots.components(x[:, :1])


def test_embedding_draws_each_label_where_its_cells_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    class Umap:
        def __init__(self, **parameters: object) -> None:
            asked.update(parameters)

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, 2:]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    x = np.random.default_rng(1).normal(size=(60, 4))
    labels = LABELS.copy()
    labels.iloc[:5] = np.nan
    figure = cell_plots.embedding(x, labels)
    left, right = figure.axes
    xy = cell_plots.components(x).transform(x)
    np.testing.assert_array_equal(dots(right)[0].get_offsets(), x[:5, 2:])
    assert asked == {"n_neighbors": 20, "min_dist": 0.2, "random_state": 0, "n_jobs": 1}
    bare, *own = dots(left)
    np.testing.assert_allclose(bare.get_offsets(), xy[:5])
    assert len(own) == 3
    for code, (name, found) in enumerate(zip("abc", own, strict=True)):
        at = xy[(labels == name).to_numpy()]
        np.testing.assert_allclose(found.get_offsets(), at)
        assert left.texts[code].get_text() == str(code + 1)
        np.testing.assert_allclose(left.texts[code].get_position(), np.median(at, axis=0))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["1  a", "2  b", "3  c"]
    monkeypatch.setitem(sys.modules, "umap", None)  # not installed
    without = cell_plots.embedding(x, None)
    assert len(without.axes) == 1
    assert not without.legends
    np.testing.assert_allclose(dots(without.axes[0])[0].get_offsets(), xy)


def test_feature_panels_colour_and_size_by_activation_with_the_strongest_on_top() -> None:
    z = Z.toarray()
    z[:, 2] = 0
    figure = cell_plots.feature_panels(XY, sparse.csr_matrix(z[:, :3]), ["one", "two", "silent"])
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["one", "two", "silent"]
    for axes, values in zip(panels, z[:, :3].T, strict=True):
        silent, active = dots(axes)
        np.testing.assert_array_equal(silent.get_offsets(), XY[values == 0])
        order = np.argsort(values)[(values == 0).sum() :]
        np.testing.assert_array_equal(active.get_offsets(), XY[order])
        np.testing.assert_array_equal(active.get_array(), values[order])
        sizes = np.asarray(active.get_sizes())
        assert (np.diff(sizes) > 0).all()
    with pytest.raises(InputError, match="2 titles"):
        cell_plots.feature_panels(XY, Z, ["one", "two"])


def test_steered_cells_lie_before_and_after_over_all_cells() -> None:
    before, after = XY[:7], XY[:7] + 1
    figure = cell_plots.steered(XY, {"up": (before, after), "again": (after, before)})
    for axes, pair in zip(figure.axes, [(before, after), (after, before)], strict=True):
        for found, expected in zip(dots(axes), [XY, *pair], strict=True):
            np.testing.assert_array_equal(found.get_offsets(), expected)


@pytest.mark.parametrize("most", [(1000, 1000), (12, 5)])
def test_activations_are_block_means_of_the_sorted_matrix(most: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    dense = rng.random((60, 20)) * (rng.random((60, 20)) < 0.5)
    dense[:, 3] = 0
    labels = LABELS.copy()
    labels.iloc[:6] = np.nan
    figure = cell_plots.activations(sparse.csr_matrix(dense), labels, most=most)
    picture = figure.axes[0].images[0].get_array()

    cells = np.concatenate([np.flatnonzero(labels == name) for name in "abc"])
    means = np.stack([dense[labels == name].mean(axis=0) for name in "abc"])
    columns = sorted(
        (i for i in range(20) if i != 3),
        key=lambda i: (means[:, i].argmax(), -np.count_nonzero(dense[:, i])),
    )
    expected = dense[np.ix_(cells, columns)]
    if most[0] < 60:  # 54 cells in 12 blocks, 19 features in 5
        rows = [np.flatnonzero(np.arange(54) * 12 // 54 == b) for b in range(12)]
        parts = [np.flatnonzero(np.arange(19) * 5 // 19 == b) for b in range(5)]
        expected = np.array([[expected[np.ix_(r, c)].mean() for c in parts] for r in rows])
    np.testing.assert_allclose(picture, expected, atol=1e-12)
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names == [f"{name} ({(labels == name).sum()})" for name in "abc"]


def test_named_candidates_keep_their_order() -> None:
    figure = cell_plots.activations(Z, LABELS, ["f5", "f4", "f3", "f2", "f1", "f0"])
    cells = np.argsort(LABELS.cat.codes, kind="stable")
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), Z.toarray()[cells])
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["f5", "f4", "f3", "f2", "f1", "f0"]
    with pytest.raises(InputError, match="name each"):
        cell_plots.activations(Z, LABELS, ["f0"])
    with pytest.raises(InputError, match="nothing to draw"):
        cell_plots.activations(sparse.csr_matrix((60, 6)), LABELS)


def test_a_large_heat_map_is_never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    z = sparse.random_array((5000, 3000), density=0.01, rng=np.random.default_rng(0), format="csr")
    labels = pd.Series(pd.Categorical(np.arange(5000) % 22))
    largest, dense = [], sparse.csr_array.toarray

    def toarray(self: sparse.csr_array, *given: object) -> np.ndarray:
        largest.append(np.prod(self.shape))
        return dense(self, *given)

    monkeypatch.setattr(sparse.csr_array, "toarray", toarray)
    cell_plots.activations(z, labels)
    assert max(largest) <= np.prod(cell_plots.MOST_PIXELS)


def test_firing_bars_are_means_with_their_interval() -> None:
    figure = cell_plots.firing_per_label(Z, LABELS)
    axes = figure.axes[0]
    n_firing = (Z.toarray() > 0).sum(axis=1)
    means = {name: n_firing[name == LABELS].mean() for name in "abc"}
    order = sorted(means, key=means.get)
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], sorted(means.values()))
    (error,) = (c for c in axes.collections if not isinstance(c, PathCollection))
    for name, line in zip(order, error.get_segments(), strict=True):
        half = 1.96 * stats.sem(n_firing[name == LABELS])
        np.testing.assert_allclose(line[:, 0], [means[name] - half, means[name] + half])
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    assert ticks == [f"{name} ({(name == LABELS).sum()})" for name in order]


def table_of_features() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    kind = pd.Categorical(["local", "global"] * 20, ["local", "global", "dead"])
    local = np.where(kind == "local", rng.choice(["a", "b"], 40, p=[0.2, 0.8]), None)
    return pd.DataFrame(
        {"mean_activation": rng.random(40), "max_activation": 1 + rng.random(40),
         "n_active": rng.integers(1, 9, 40), "kind_text": kind,
         "local_label_text": pd.Categorical(local)},
        index=[f"feature_{i}" for i in range(40)],
    )  # fmt: skip


def test_activity_histograms_hold_every_feature_once_by_kind() -> None:
    table = table_of_features()
    panels = lens_plots.activity(table).axes
    for axes, column in zip(panels, ["mean_activation", "max_activation", "n_active"], strict=True):
        found = steps(axes)
        assert {name: n.sum() for name, n in found.items()} == {"global": 20, "local": 20}
        assert axes.get_yscale() == "log"
        if column == "n_active":  # one bin a number
            own = table.loc[table["kind_text"] == "local", column]
            low, high = table[column].min(), table[column].max()
            np.testing.assert_array_equal(
                found["local"], np.bincount(own, minlength=high + 1)[low : high + 1]
            )
    alone = lens_plots.activity(table.drop(columns="kind_text"))
    assert steps(alone.axes[0])[""].sum() == 40
    assert not alone.legends


def test_local_features_by_label_and_by_cells() -> None:
    table = table_of_features()
    bars, right = lens_plots.local_features(table, LABELS).axes
    local = table.loc[table["kind_text"] == "local", "local_label_text"]
    expected = {name: int((local == name).sum()) for name in "abc"}
    assert expected["c"] == 0
    order = sorted("abc", key=lambda name: -expected[name])
    assert order == ["b", "a", "c"]
    assert [bar.get_width() for bar in bars.patches] == [expected[name] for name in order]
    ticks = [text.get_text() for text in bars.get_yticklabels()]
    assert ticks == [f"{name}  {'abc'.index(name) + 1}" for name in order]
    (points,) = dots(right)
    at = [((name == LABELS).sum(), expected[name]) for name in "abc"]
    np.testing.assert_array_equal(points.get_offsets(), at)
    colour = {name: to_hex(c) for name, c in zip("abc", points.get_facecolors(), strict=True)}
    assert [to_hex(bar.get_facecolor()) for bar in bars.patches] == [colour[n] for n in order]


def test_cells_and_features_are_counted_both_ways() -> None:
    z = sparse.csr_array(np.array([[1, 0, 2, 0], [0, 0, 3, 0], [1, 0, 1, 0]], float))
    left, right = lens_plots.cells_and_features(z).axes
    np.testing.assert_array_equal(steps(left)[""], [1, 1])  # 2 and 3 cells; dead ones are not in it
    np.testing.assert_array_equal(steps(right)[""], [1, 2])  # 1 and 2 features


def test_training_loss_on_both_scales() -> None:
    history = pd.DataFrame(
        {"member": 0, "epoch": range(5), "loss": [5.0, 4, 3, 2, 1], "validation_loss": np.nan}
    )
    linear, log = lens_plots.training_loss(history).axes
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    for axes in (linear, log):
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_ydata(), history["loss"])
    held_out = lens_plots.training_loss(history.assign(validation_loss=[6.0, 5, 4, 3, 3]))
    assert [len(axes.lines) for axes in held_out.axes] == [2, 2]
    names = [text.get_text() for text in held_out.axes[0].get_legend().get_texts()]
    assert names == ["training", "held-out rows"]


def test_volcano_marks_by_both_rules_and_keeps_what_is_not_finite() -> None:
    table = pd.DataFrame(
        {"log2_fold_change": [0.5, 1.0, -2.0, 3.0, np.inf, np.nan, 2.5],
         "q": [1e-9, 1e-3, 1e-8, 0.2, 1e-5, 1e-5, 0.0]},
        index=list("abcdefg"),
    )  # fmt: skip
    axes = lens_plots.volcano({"one": table}, most=2).axes[0]
    other, _, strong, infinite = (found.get_offsets() for found in dots(axes))
    np.testing.assert_allclose(other, [[0.5, 9], [3, -np.log10(0.2)]])
    np.testing.assert_allclose(strong, [[1, 3], [-2, 8], [2.5, 300]])
    np.testing.assert_allclose(infinite, [[3.3, 5]])  # at the edge, beyond the largest finite one
    assert {text.get_text() for text in axes.texts} == {"c", "g", "e"}  # two on each side at most
    for text in axes.texts:
        assert text.xy[1] == pytest.approx(-np.log10(max(table["q"][text.get_text()], 1e-300)))


def annotation() -> feature_space.FeatureTerms:
    names = [["T cell", "T cell exhaustion"], ["T cell"], [], ["B cell"], ["T cell", "B cell"]]
    return feature_space.from_names(names)


def test_term_counts_by_kind_and_category() -> None:
    kind = ["local", "global", "global", "local", "global"]
    frequencies = feature_space.term_frequencies(annotation(), kind)
    figure = lens_plots.term_counts(frequencies, {"T cell": "BP", "B cell": "MF"})
    by_kind, by_category = (steps(axes) for axes in figure.axes)
    # local: T cell 1, its exhaustion 1, B cell 1. global: T cell 2, B cell 1.
    np.testing.assert_array_equal(by_kind["local"], [3, 0])
    np.testing.assert_array_equal(by_kind["global"], [1, 1])
    # T cell 3 features, B cell 2, exhaustion 1: of no category
    assert {name: np.flatnonzero(n).tolist() for name, n in by_category.items()} == {
        "BP": [2], "MF": [1], "other": [0]
    }  # fmt: skip
    alone = lens_plots.term_counts(feature_space.term_frequencies(annotation()))
    assert steps(alone.axes[0])[""].sum() == 3


def test_highlighted_features_are_named_where_they_lie() -> None:
    coordinates = np.array([[0, 0], [1, 1], [np.nan, np.nan], [5, 1.01], [2, 3]], float)
    names = list("abcde")
    axes = lens_plots.highlighted(coordinates, names, ["b", "c", "d"]).axes[0]
    _, chosen = dots(axes)
    np.testing.assert_array_equal(chosen.get_offsets(), coordinates[[1, 3]])  # c has no place
    assert {text.get_text(): tuple(text.xy) for text in axes.texts} == {"b": (1, 1), "d": (5, 1.01)}
    with pytest.raises(InputError, match="1 of the chosen"):
        lens_plots.highlighted(coordinates, names, ["b", "z"])


def test_probed_features_have_the_most_special_of_the_shown_terms() -> None:
    keys = lens_plots.probed(annotation(), ["t cell", "B", "nothing"])
    assert list(keys) == ["t cell (3 features)", "B (2 features)", "nothing (0 features)"]
    first, second, nothing = keys.values()
    assert texts(first) == [
        "T cell exhaustion", "T cell", "-", "-", "T cell"
    ]  # fmt: skip
    assert texts(second) == ["-", "-", "-", "B cell", "B cell"]
    assert not nothing.any()
    (few,) = lens_plots.probed(annotation(), ["cell"], most=1).values()
    assert texts(few) == [
        "T cell", "T cell", "-", "other terms", "T cell"
    ]  # fmt: skip
    drawn = feature_space.figure(np.arange(10.0).reshape(5, 2), keys)
    assert isinstance(drawn, Figure)


def test_shared_term_counts_are_the_points_of_both_dictionaries(tmp_path: Path) -> None:
    other = feature_space.from_names([["T cell"], ["B cell"], ["B cell", "neuron"], ["B cell"]])
    found = matching.match_annotations(annotation(), other)
    figure = lens_plots.shared_term_counts(found, "one", "two")
    (points,) = dots(figure.axes[0])
    assert sorted(map(tuple, points.get_offsets().tolist())) == [(2, 3), (3, 1)]
    assert "2 terms" in figure.axes[0].get_title()
    assert plots.save(figure, tmp_path, "shared").is_file()
    apart = matching.match_annotations(annotation(), feature_space.from_names([["neuron"]]))
    with pytest.raises(InputError, match="share no term"):
        lens_plots.shared_term_counts(apart)

import io
import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from analysis.browser import agreement
from analysis.browser.study import QUESTIONS
from sae_jax import InputError

STEPS = ["no", "unclear", "yes"]
ASKED = [q["id"] for q in QUESTIONS]


def ratings(rows: list[tuple]) -> pd.DataFrame:
    """(rater, feature, kind, repeat, cell type, tissue, process)"""
    return pd.DataFrame(rows, columns=["rater", "feature", "kind", "repeat", *ASKED])


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(STEPS)), min_size=1, max_size=30))
def test_kappa_equals_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    a, b = map(list, zip(*pairs, strict=True))
    found = agreement.kappa(a, b, STEPS)
    assert found["n"] == len(pairs)
    assert found["same"] == pytest.approx(np.mean([x == y for x, y in pairs]))
    if len({*a, *b}) == 1:
        assert np.isnan(found["kappa"])
    else:
        expected = cohen_kappa_score(a, b, labels=STEPS, weights="linear")
        assert found["kappa"] == pytest.approx(expected, abs=1e-12)
    if a == b or min(len({*a}), len({*b})) == 1:
        assert np.isnan(found["low"])
    if np.isfinite(found["low"]):
        assert -1 <= found["low"] <= found["kappa"] <= found["high"] <= 1
        assert found["low"] < found["high"]


def test_kappa_of_two_options_is_the_plain_one_and_its_interval_the_printed_formulas() -> None:
    table = {("yes", "yes"): 20, ("yes", "no"): 5, ("no", "yes"): 10, ("no", "no"): 15}
    a, b = map(list, zip(*[pair for pair, n in table.items() for _ in range(n)], strict=True))
    found = agreement.kappa(a, b, ["no", "yes"])
    assert found["kappa"] == pytest.approx(0.4)
    # Fleiss, Cohen and Everitt (1969), equation 13, with p_o = .7 and p_e = .5.
    p = np.array([[0.3, 0.1], [0.2, 0.4]])  # rows a: no, yes; columns b
    rows, columns, k, pe = p.sum(axis=1), p.sum(axis=0), 0.4, 0.5
    inner = sum(
        p[i, j] * (((i == j) - (rows[j] + columns[i]) * (1 - k)) ** 2)
        for i, j in itertools.product(range(2), repeat=2)
    )
    error = np.sqrt((inner - (k - pe * (1 - k)) ** 2) / (50 * (1 - pe) ** 2))
    assert found["high"] - found["kappa"] == pytest.approx(stats.norm.ppf(0.975) * error)


def test_kappas_interval_ends_at_one_and_minus_one() -> None:
    same = ["yes", "no"] * 3
    for a, b, end in (
        (same, [*same[:5], "yes"], "high"),
        (same, ["no", "yes"] * 2 + same[:2], "low"),
    ):
        found = agreement.kappa(a, b, ["no", "yes"])
        assert found[end] == {"high": 1, "low": -1}[end]


def counts_of(data: list[list[float]], values: list[float]) -> np.ndarray:
    return np.stack([(np.array(data) == value).sum(axis=0) for value in values], axis=1)


def test_alpha_equals_the_published_ones() -> None:
    x = np.nan
    # Krippendorff (2011), example B: two observers, binary, no gaps: .095.
    binary = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
    assert agreement.alpha(counts_of(binary, [0, 1])) == pytest.approx(0.095, abs=5e-4)
    # The same, examples C and D: four observers, gaps: nominal .743, ordinal .815.
    four = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3],
        [x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x],
    ]  # fmt: skip
    counts = counts_of(four, [1, 2, 3, 4, 5])
    assert agreement.alpha(counts, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert agreement.alpha(counts, "ordinal") == pytest.approx(0.815, abs=5e-4)
    # Wikipedia's example: three coders, 15 units: nominal .691.
    three = [
        [x, x, x, x, x, 3, 4, 1, 2, 1, 1, 3, 3, x, 3], [1, x, 2, 1, 3, 3, 4, 3, *[x] * 7],
        [x, x, 2, 1, 3, 4, 4, x, 2, 1, 1, 3, 3, x, 4],
    ]  # fmt: skip
    assert agreement.alpha(counts_of(three, [1, 2, 3, 4])) == pytest.approx(0.691, abs=5e-4)


@given(st.lists(st.lists(st.sampled_from([0, 1, 2]), max_size=5), min_size=1, max_size=8))
def test_alpha_equals_a_loop_over_pairs(things: list[list[int]]) -> None:
    """The answers of each thing; things with one answer or none are left out of everything."""
    paired = [each for each in things if len(each) > 1]
    pool = [value for each in paired for value in each]
    n = {v: pool.count(v) for v in range(3)}

    def ordinal(c: int, k: int) -> float:
        c, k = min(c, k), max(c, k)
        return (sum(n[g] for g in range(c, k + 1)) - (n[c] + n[k]) / 2) ** 2

    counts = np.array([[each.count(v) for v in range(3)] for each in things])
    for level, distance in (("nominal", lambda c, k: float(c != k)), ("ordinal", ordinal)):
        within = sum(
            distance(c, k) / (len(each) - 1)
            for each in paired
            for c, k in itertools.permutations(each, 2)
        )
        all_pairs = sum(distance(c, k) for c, k in itertools.permutations(pool, 2))
        found = agreement.alpha(counts, level)
        if all_pairs == 0:
            assert np.isnan(found)
        else:
            expected = 1 - (within / len(pool)) / (all_pairs / (len(pool) * (len(pool) - 1)))
            assert found == pytest.approx(expected, abs=1e-12)


def test_alphas_interval_is_that_of_things_drawn_again() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=40)
    data = np.where(rng.random((3, 40)) < 0.7, truth, rng.integers(3, size=(3, 40)))
    counts = counts_of(data.tolist(), [0, 1, 2])
    low, high = agreement.alpha_interval(counts, "ordinal")
    drawn = [agreement.alpha(counts[rng.integers(40, size=40)], "ordinal") for _ in range(2000)]
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=0.02)
    assert low < agreement.alpha(counts, "ordinal") < high
    padded = np.vstack([counts, [[1, 0, 0]] * 20])  # things with one answer change nothing
    assert agreement.alpha_interval(padded, "ordinal") == (low, high)
    assert np.isnan(agreement.alpha_interval(counts[:1], "nominal")).all()


def test_agreement_within_a_rater_is_over_repeats_with_unclear_read_each_way() -> None:
    rows = [
        ("ann", "a", "concept", False, "yes", "no", "unclear"),
        ("ann", "a", "concept", True, "yes", "no", "no"),
        ("ann", "b", "neuron", False, "no", "no", "yes"),
        ("ann", "b", "neuron", True, "no", "yes", "unclear"),
        ("ann", "c", "neuron", False, "no", "no", "no"),
        ("ann", "c", "neuron", True, "yes", None, "no"),
        ("ann", "d", "neuron", False, "yes", "yes", "yes"),
        ("bob", "a", "concept", True, "yes", "yes", "yes"),
    ]
    found = agreement.within(ratings(rows), QUESTIONS).set_index(["rater", "question", "unclear"])
    assert found.loc[("ann", "cell_type", ""), "n"] == 3
    assert found.loc[("ann", "tissue", ""), "n"] == 2
    assert found.loc[("bob", "process", "as its own step"), "n"] == 0
    for reading, merge in agreement.MERGES.items():
        first = [merge.get(x, x) for x in ("unclear", "yes", "no")]
        again = [merge.get(x, x) for x in ("no", "unclear", "no")]
        labels = [x for x in STEPS if x not in merge]
        expected = cohen_kappa_score(first, again, labels=labels, weights="linear")
        row = found.loc[("ann", "process", reading)]
        assert row["kappa"] == pytest.approx(expected)
        assert row["same"] == np.mean(np.array(first) == again)
    changed = agreement.changes(ratings(rows), QUESTIONS).set_index(["question", "first", "again"])
    assert changed["n"].to_dict() == {
        ("cell_type", "no", "no"): 1, ("cell_type", "no", "yes"): 1,
        ("cell_type", "yes", "yes"): 1, ("process", "no", "no"): 1,
        ("process", "unclear", "no"): 1, ("process", "yes", "unclear"): 1,
        ("tissue", "no", "no"): 1, ("tissue", "no", "yes"): 1,
    }  # fmt: skip


def test_agreement_between_raters_is_over_first_showings_both_answered() -> None:
    rows = [
        ("ann", "a", "concept", False, "yes", "no", "unclear"),
        ("ann", "b", "neuron", False, "no", "no", "yes"),
        ("ann", "c", "neuron", False, "no", None, "no"),
        ("bob", "a", "concept", False, "yes", "no", "no"),
        ("bob", "b", "neuron", False, "yes", "no", "yes"),
        ("bob", "b", "neuron", True, "no", "no", "no"),
        ("bob", "c", "neuron", False, "no", "yes", "yes"),
        ("eve", "a", "concept", False, "no", "no", "no"),
    ]
    found = agreement.between(ratings(rows), QUESTIONS)
    assert found[["rater", "other"]].drop_duplicates().to_numpy().tolist() == [
        ["ann", "bob"], ["ann", "eve"], ["bob", "eve"],
    ]  # fmt: skip
    found = found.set_index(["rater", "other", "question", "unclear"])
    assert found.loc[("ann", "bob", "cell_type", "")][["n", "same"]].tolist() == [3, 2 / 3]
    assert found.loc[("ann", "bob", "tissue", ""), "n"] == 2
    assert found.loc[("ann", "bob", "process", "as its own step"), "kappa"] == pytest.approx(
        cohen_kappa_score(["unclear", "yes", "no"], ["no", "yes", "yes"], labels=STEPS,
                          weights="linear")
    )  # fmt: skip
    alphas = agreement.alphas(ratings(rows), QUESTIONS)
    alphas = alphas.set_index(["question", "unclear", "level"])
    assert len(alphas) == 6
    counts = [[1, 2], [1, 1], [2, 0]]  # of no and yes, for a, b, c
    assert alphas.loc[("cell_type", "", "nominal"), "alpha"] == agreement.alpha(counts)
    steps = [[2, 1, 0], [0, 0, 2], [1, 0, 1]]
    ordinal = alphas.loc[("process", "as its own step", "ordinal")]
    assert ordinal["alpha"] == agreement.alpha(steps, "ordinal")
    assert ordinal["n"] == 3


def test_a_verdict_needs_one_yes_or_all_answers() -> None:
    rows = [
        ("ann", "a", "concept", False, "yes", None, None),
        ("ann", "b", "concept", False, "no", "yes", "unclear"),
        ("ann", "c", "concept", False, "no", "no", "unclear"),
        ("ann", "d", "neuron", False, "no", "no", "no"),
        ("ann", "e", "neuron", False, "no", "no", None),
        ("ann", "f", "neuron", False, "no", None, "unclear"),
        ("ann", "d", "neuron", True, "yes", "yes", "yes"),
    ]
    found = agreement.verdicts(ratings(rows), QUESTIONS)
    assert dict(zip(found["feature"], found["verdict"], strict=True)) == {
        "a": "interpretable", "b": "interpretable", "c": "signal but unclear",
        "d": "not interpretable",
    }  # fmt: skip


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=2, max_size=6))
def test_the_majority_needs_more_than_half(levels: list[int]) -> None:
    rows = [
        (f"rater {i}", "a", "concept", False, ("no", "no", "yes")[level], "no",
         ("no", "unclear", "no")[level])
        for i, level in enumerate(levels)
    ]  # fmt: skip
    found = agreement.verdicts(ratings(rows), QUESTIONS)
    mine = found.loc[found["rater"] == agreement.MAJORITY, "verdict"].item()
    more = [level for level in (2, 1) if 2 * sum(x >= level for x in levels) > len(levels)]
    assert mine == agreement.VERDICTS[more[0] if more else 0]


def rated(shares: dict[str, tuple[int, int]], raters: tuple[str, ...] = ("ann",)) -> pd.DataFrame:
    """Verdicts: of each kind, how many are interpretable and how many are not."""
    rows = [
        {"rater": rater, "feature": f"{kind} {i}", "kind": kind,
         "verdict": agreement.VERDICTS[2 if i < yes else 0]}
        for rater in raters
        for kind, (yes, no) in shares.items()
        for i in range(yes + no)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 9), st.integers(1, 9))
@settings(max_examples=40)
def test_shares_have_wilsons_interval_and_fishers_test(a: int, b: int, c: int, d: int) -> None:
    found = rated({"concept": (a, b + 1), "neuron": (c, d)})
    table = agreement.shares(found).query("counted == 'yes'").set_index("kind")
    z = stats.norm.ppf(0.975)
    for kind, k, n in (("concept", a, a + b + 1), ("neuron", c, c + d)):
        p, row = k / n, table.loc[kind]
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        assert (row["interpretable"], row["n"], row["share"]) == (k, n, p)
        assert row["low"] == pytest.approx(middle - half, abs=1e-12)
        assert row["high"] == pytest.approx(middle + half, abs=1e-12)
    row = agreement.compare(found).query("counted == 'yes'").iloc[0]
    null = stats.hypergeom(a + b + 1 + c + d, a + c, a + b + 1)
    chances = null.pmf(np.arange(a + c + 1))
    assert row["p"] == pytest.approx(chances[chances <= null.pmf(a) * (1 + 1e-7)].sum())
    assert row["difference"] == pytest.approx(a / (a + b + 1) - c / (c + d))


def test_concepts_come_before_neurons_whoever_was_rated_first() -> None:
    found = rated({"neuron": (1, 3), "concept": (3, 1)}, ("bob", "ann"))
    table = agreement.shares(found)
    assert list(zip(table["rater"], table["kind"], strict=True))[::2] == [
        ("bob", "concept"), ("bob", "neuron"), ("ann", "concept"), ("ann", "neuron"),
    ]  # fmt: skip
    labels = [each.get_text() for each in agreement.figure(found).axes[0].get_xticklabels()]
    assert [each.split("\n")[0] for each in labels] == ["concepts", "neurons"]


def test_several_raters_of_a_feature_are_not_several_features() -> None:
    """Raters who say the same add nothing: p is that of one of them, permuting features."""
    shares = {"concept": (5, 1), "neuron": (1, 4)}
    one, three = rated(shares), rated(shares, ("ann", "bob", "eve"))
    p = agreement.compare(three).set_index(["rater", "counted"])["p"]
    scores = np.array([1.0] * 5 + [0] + [1] + [0] * 4)
    observed, differences = 5 / 6 - 1 / 5, []
    for concepts in itertools.combinations(range(11), 6):
        chosen = np.isin(np.arange(11), concepts)
        differences.append(scores[chosen].mean() - scores[~chosen].mean())
    differences = np.array(differences)
    sides = [(differences >= observed - 1e-12).mean(), (differences <= observed + 1e-12).mean()]
    assert p["all raters", "yes"] == pytest.approx(2 * min(sides))
    assert p["ann", "yes"] == agreement.compare(one)["p"][0]


def test_a_kind_or_a_rater_too_few_is_not_compared() -> None:
    assert agreement.compare(rated({"concept": (3, 1)})).empty
    assert (
        list(agreement.compare(rated({"concept": (3, 1), "neuron": (1, 3)}))["rater"])
        == ["ann"] * 2
    )
    nothing = agreement.verdicts(ratings([]), QUESTIONS)
    assert nothing.empty
    for made in (agreement.shares, agreement.compare):
        assert made(nothing).empty
    for made in (agreement.within, agreement.between, agreement.changes):
        assert made(ratings([]), QUESTIONS).empty


def test_the_figure_shows_the_shares() -> None:
    found = rated({"concept": (6, 4), "neuron": (2, 8)}, ("ann", "a rater called $x$"))
    found.loc[found["feature"].eq("neuron 9"), "verdict"] = agreement.VERDICTS[1]
    picture = agreement.figure(found)
    heights = [
        {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers[:3]}
        for axes in picture.axes
    ]
    assert heights[0] == {
        "interpretable": pytest.approx([0.6, 0.2]), "signal but unclear": pytest.approx([0, 0.1]),
        "not interpretable": pytest.approx([0.4, 0.7]),
    }  # fmt: skip
    written: Any = io.BytesIO()
    picture.savefig(written, format="png")
    written.seek(0)
    assert imread(written).std() > 0
    with pytest.raises(InputError, match="no item has been rated"):
        agreement.figure(found[:0])

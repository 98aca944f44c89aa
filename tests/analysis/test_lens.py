"""A whole dictionary at once equals its parts, and names nothing where there is nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats

from analysis import calibration, cells, differential, enrichment, gene_sets, lens, nulls
from analysis.cells import Expression
from analysis.gene_sets import GeneSets
from analysis.groups import top_cells
from analysis.lens import Rule
from sae_jax.errors import InputError

CELLS, GENES, FEATURES = 600, 400, 11
TERMS = 20
RULE = Rule(percentile=90, gene_q=0.01, fold_change=1.2)
# One overlap test alone, of genes that are up beyond doubt: the quickstart's.
UP = Rule(
    percentile=90, gene_q=0.01, fold_change=1.5, fallback_p=None, direction="up", pseudocount=0.1,
    naming=("matched",),
)  # fmt: skip
ALONE = {"null_features": 0, "progress": False}


def drawn(rate: np.ndarray) -> Expression:
    """Poisson counts of these rates [cells, genes]."""
    x = np.log1p(np.random.default_rng(1).poisson(rate)).astype(np.float32)
    return Expression(sparse.csr_matrix(x), np.asarray([f"G{g}" for g in range(GENES)]))


@pytest.fixture(scope="module")
def expression() -> Expression:
    """Two weak programs of twenty genes, each on in a sixth of the cells."""
    rate = np.full((CELLS, GENES), 0.5)
    rate[:100, :20] = rate[100:200, 20:40] = 1.2
    return drawn(rate)


@pytest.fixture(scope="module")
def sets(expression: Expression) -> GeneSets:
    named = {f"set {i}": [f"G{g}" for g in range(20 * i, 20 * i + 20)] for i in range(TERMS)}
    return gene_sets.from_sets(named, expression.genes, 2, 100)


@pytest.fixture(scope="module")
def z() -> sparse.csr_matrix:
    """Features 0 and 1 follow the programs, 2 is dead, the others are noise."""
    rng = np.random.default_rng(2)
    z = rng.uniform(1, 2, (CELLS, FEATURES)) * (rng.random((CELLS, FEATURES)) < 0.2)
    z[:, :3] = 0
    z[:100, 0], z[100:200, 1] = rng.uniform(1, 2, (2, 100))
    return sparse.csr_matrix(z.astype(np.float32))


@pytest.fixture(scope="module")
def made(
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets
) -> tuple[lens.Lens, dict[str, calibration.Calibration]]:
    return lens.annotate(z, expression, sets, RULE, null_features=60, bins=2, progress=False)


@pytest.fixture(scope="module")
def real(data_folder: Path) -> tuple[Expression, GeneSets]:
    """A third of the Zheng cells, and GO."""
    adata = cells.read(data_folder / "data/counts/zheng_facs_pbmc_3774x16791.h5ad")[::3].copy()
    expression = cells.expression(adata, "X", "counts", "symbol")
    path = data_folder / "data/genesets/GO_Biological_Process_2021.gmt"
    return expression, gene_sets.read(path, expression.genes, 20, 500)


def test_every_table_equals_the_tests_made_one_by_one(
    made: tuple[lens.Lens, dict[str, calibration.Calibration]],
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets,
) -> None:  # fmt: skip
    found, known = made
    groups = top_cells(z, RULE.percentile)
    welch = differential.welch(expression.x, groups.high, active=groups.active)
    gene_q = enrichment.benjamini_hochberg(welch.p, axis=1)
    chosen = lens.relevant(welch, gene_q, RULE)
    scores = np.nan_to_num(np.round(welch.t, 9))
    ranked = enrichment.mann_whitney(scores, sets.membership)
    fisher = enrichment.hypergeometric(chosen, sets.membership)
    binomial = enrichment.binomial(chosen, sets.membership)
    close = {"rtol": 2e-6, "atol": 1e-7}
    np.testing.assert_allclose(found.auc, ranked.effect, **close)
    np.testing.assert_allclose(found.z, ranked.z, **close)
    np.testing.assert_array_equal(found.hits, fisher.hits)
    np.testing.assert_array_equal(found.n_relevant, chosen.sum(axis=1))
    for test, p in (("mann_whitney", ranked.p), ("fisher", fisher.p), ("binomial", binomial.p)):
        np.testing.assert_allclose(found.log_p[test], -np.log10(p), **close)
    x, high, active = expression.x.toarray(), groups.high.toarray(), groups.active.toarray()
    mean = x.mean(axis=0)
    typical = np.median(x.std(axis=0, ddof=1)[mean >= np.median(mean)])
    for i in np.flatnonzero(high.any(axis=1)):
        a, b = x[high[i]], x[~active[i]]
        squares = ((a - a.mean(0)) ** 2).sum(0) + ((b - b.mean(0)) ** 2).sum(0)
        d = (a.mean(0) - b.mean(0)) / (np.sqrt(squares / (len(a) + len(b) - 2)) + typical)
        change = d.reshape(TERMS, 20).mean(axis=1)  # sets lie in a row
        np.testing.assert_allclose(found.change[i], change, rtol=1e-4, atol=1e-6)
    for test, statistic in (("change", found.change), ("calibrated", ranked.z)):
        deviates = known[test].deviates(statistic, active.sum(axis=1))
        expected = -np.log10(2 * stats.t.sf(np.abs(deviates), 59))
        expected[~found.testable()] = np.nan
        np.testing.assert_allclose(found.log_p[test], expected, rtol=1e-5, atol=1e-5)
    for feature, rows in found.top.groupby("feature"):
        best = np.argsort(-np.nan_to_num(np.abs(welch.t[feature]), nan=-1))[: len(rows)]
        assert set(rows["gene"]) == set(expression.genes[best])
        gene = np.flatnonzero(expression.genes == rows["gene"].iloc[0])[0]
        assert rows["t"].iloc[0] == pytest.approx(welch.t[feature, gene])
        assert rows["q"].iloc[0] == pytest.approx(gene_q[feature, gene])


def test_one_feature_equals_scipy_from_the_cells_on(
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets
) -> None:
    found, _ = lens.annotate(z, expression, sets, UP, **ALONE)
    x, activation = expression.x.toarray().astype(np.float64), z.toarray()[:, 0].astype(np.float64)
    high, low = x[activation > np.percentile(activation, 90)], x[activation == 0]
    welch = stats.ttest_ind(high, low, equal_var=False)
    fold = (np.expm1(high).mean(0) + 0.1) / (np.expm1(low).mean(0) + 0.1)
    up = (stats.false_discovery_control(welch.pvalue) < UP.gene_q) & (fold >= UP.fold_change)
    up &= welch.statistic > 0
    assert found.n_relevant[0] == up.sum() > 5
    for term in range(TERMS):
        inside = np.arange(GENES) // 20 == term
        table = [[(up & inside).sum(), (up & ~inside).sum()],
                 [(~up & inside).sum(), (~up & ~inside).sum()]]  # fmt: skip
        fisher = stats.fisher_exact(table, alternative="greater").pvalue
        assert found.log_p["fisher"][0, term] == pytest.approx(-np.log10(fisher), rel=1e-5)
        assert found.hits[0, term] == table[0][0]
        t = np.round(welch.statistic, 9)
        ranked = stats.mannwhitneyu(t[inside], t[~inside], method="asymptotic").pvalue
        assert found.log_p["mann_whitney"][0, term] == pytest.approx(-np.log10(ranked), rel=1e-5)
    best = np.argsort(-welch.statistic)[:50]
    assert found.top.query("feature == 0")["gene"].tolist() == expression.genes[best].tolist()


def test_the_features_with_a_program_are_named(
    made: tuple[lens.Lens, dict[str, calibration.Calibration]],
) -> None:
    found, _ = made
    named = found.named()
    up = named & (found.z > 0)  # the other program is lower there, and named for that
    assert np.flatnonzero(up[0]).tolist() == [0]
    assert np.flatnonzero(up[1]).tolist() == [1]
    assert not named[2:].any()
    best = found.best(2)
    assert best.drop_duplicates("feature")["side"].eq("up").all()
    assert best.query("feature == 1")["term"].iloc[0] == "set 1"
    assert best.query("feature == 1 and side == 'down'")["term"].iloc[0] == "set 0"
    assert (best["auc"] > 0.5).eq(best["side"] == "up").all()
    assert best.groupby(["feature", "side"], observed=True)["log10_p"].is_monotonic_decreasing.all()


def test_a_feature_of_few_cells_is_tested_and_not_named(sets: GeneSets) -> None:
    """Of few silent ones neither: a quarter of the high cells, and no fewer than the rule's."""
    rate = np.full((CELLS, GENES), 0.5)
    rate[:10, :20] = 4
    z = np.zeros((CELLS, 4))
    z[:9, 0] = 1
    z[:10, 1] = 1
    z[9:, 2] = np.arange(9, CELLS)  # 60 high cells and 9 silent
    z[15:, 3] = np.arange(15, CELLS)  # and 15
    strict, lenient = (
        lens.annotate(sparse.csr_matrix(z), drawn(rate), sets, rule, **ALONE)[0]
        for rule in (UP, dataclasses.replace(UP, cells=9, direction="both"))
    )
    assert strict.testable().tolist() == [False, True, False, True]
    assert UP.testable(np.array([12, 12]), np.array([9, 10])).tolist() == [False, True]
    assert lenient.testable().tolist() == [True, True, False, True]
    assert not strict.named()[[0, 2]].any()
    assert strict.named()[1, 0]
    assert lenient.named()[0, 0]
    assert (strict.log_p["fisher"][0] > 2).any()


def test_an_overlap_test_names_on_the_side_of_its_genes(sets: GeneSets) -> None:
    """Six of a set's twenty genes are far up and the rest a little down: each is found on its own
    side, whatever the ranks say; and not by tests that find the set on different sides."""
    rate = np.full((CELLS, GENES), 0.6)
    rate[:100, :6], rate[:100, 6:20] = 6, 0.3
    expression = drawn(rate)
    z = sparse.csr_matrix((np.arange(CELLS) < 100)[:, None] * 1.0)

    def annotate(direction: str, *naming: str) -> lens.Lens:
        rule = dataclasses.replace(
            UP, percentile=80, direction=direction, naming=naming, fold_change=1.2
        )
        call = {"null_features": 40 * ("change" in naming), "bins": 1, "progress": False}
        return lens.annotate(z, expression, sets, rule, **call)[0]

    for direction, sign in (("up", 1), ("down", -1)):
        found = annotate(direction, "matched")
        assert found.z[0, 0] < 0
        assert np.flatnonzero(found.named()[0]).tolist() == [0]
        for test in ("matched", "fisher", "binomial"):
            assert (found.side(test) == sign).all()
        best = found.best(1).query("named")
        assert best[["side", "term"]].to_numpy().tolist() == [[direction, "set 0"]]
        t = found.top["t"].to_numpy()
        assert (sign * t > 0).all()
        assert (np.diff(sign * t) <= 0).all()
        assert found.side("mann_whitney")[0, 0] == -1
    assert annotate("both", "matched").side("matched")[0, 0] == -1  # the ranks', for want of one

    for order in (("change", "matched"), ("matched", "change")):
        agree, contradict = annotate("up", *order), annotate("down", *order)
        assert agree.change[0, 0] > 0
        assert agree.named()[0, 0]
        assert all(contradict.named(test)[0, 0] for test in order)
        assert not contradict.named()[0].any()


@pytest.mark.parametrize("terms", [1, 2])
def test_few_terms_are_calibrated_as_many_are(
    z: sparse.csr_matrix, expression: Expression, terms: int
) -> None:
    chosen = {f"set {i}": [f"G{20 * i}", f"G{20 * i + 1}"] for i in (0, 7)[:terms]}
    sets = gene_sets.from_sets(chosen, expression.genes, 2, 100)
    rule = dataclasses.replace(RULE, naming=("change",))
    found, known = lens.annotate(
        z, expression, sets, rule, null_features=200, bins=2, progress=False
    )
    assert found.named()[0].tolist() == [True, False][:terms]
    assert np.isfinite(known["change"].inflation).all()
    rng = np.random.default_rng(3)
    none = sparse.csr_matrix(rng.permuted(np.repeat(z[:, [0]].toarray(), 300, axis=1), axis=0))
    call = {"null_features": 0, "known": known, "progress": False}
    assert lens.annotate(none, expression, sets, rule, **call)[0].share_named() <= 0.05


@pytest.mark.parametrize(
    "options", [{"block": 3}, {"workers": 1}, {"workers": 3, "block": 2}, {"memory_bytes": 0}]
)
def test_blocks_threads_and_files_change_nothing(
    made: tuple[lens.Lens, dict[str, calibration.Calibration]],
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets, options: dict[str, int],
) -> None:  # fmt: skip
    found, known = made
    again, _ = lens.annotate(
        z, expression, sets, RULE, null_features=0, known=known, progress=False, **options
    )
    for test, table in found.log_p.items():
        np.testing.assert_array_equal(again.log_p[test], table)
    pd.testing.assert_frame_equal(again.top, found.top)
    assert isinstance(again.auc, np.memmap) == ("memory_bytes" in options)


def test_tables_have_a_quarter_of_the_memory(
    made: tuple[lens.Lens, dict[str, calibration.Calibration]],
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    taken, prepare = [], differential.prepare

    def noted(*given: Any, beside: int, **options: Any) -> Any:
        taken.append(beside)
        return prepare(*given, beside=beside, **options)

    monkeypatch.setattr(differential, "prepare", noted)
    size = made[0].auc.size * 4 * (len(lens.TESTS) + 7)
    for memory_bytes in (4 * size, 4 * size - 4):
        found, _ = lens.annotate(
            z, expression, sets, RULE, null_features=0, known=made[1], progress=False,
            memory_bytes=memory_bytes,
        )  # fmt: skip
        assert isinstance(found.auc, np.memmap) == (memory_bytes < 4 * size)
    assert taken == [size, 0]


def test_a_calibration_depends_on_sizes_and_seed_alone(
    made: tuple[lens.Lens, dict[str, calibration.Calibration]],
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets,
) -> None:  # fmt: skip
    _, known = made
    call = {"null_features": 60, "bins": 2, "progress": False, "workers": 1}
    _, same = lens.annotate(z, expression, sets, RULE, **call)
    _, other = lens.annotate(z, expression, sets, RULE, **call, seed=1)
    order = np.random.default_rng(0).permutation(FEATURES)
    _, shuffled = lens.annotate(z[:, order], expression, sets, RULE, **call)
    for test in known:
        np.testing.assert_array_equal(same[test].mean, known[test].mean)
        np.testing.assert_array_equal(shuffled[test].sd, known[test].sd)
        np.testing.assert_array_equal(shuffled[test].inflation, known[test].inflation)
        assert np.abs(other[test].mean - known[test].mean).max() > 1e-3


@given(st.integers(0, 100), st.sampled_from([0.0, 1.0]))
def test_no_more_than_one_in_fifty_of_the_permuted_features_is_named(
    seed: int, skew: float
) -> None:
    """Of those that made the calibration, each standardised without itself."""
    rng = np.random.default_rng(seed)
    shared = rng.gamma(2, 1, (60, 1)) * skew
    null = rng.normal(size=(60, 40)) + shared * rng.normal(size=(60, 1))
    made = calibration.Calibration.of_null(100, np.array([10]), null[None])
    assert made.inflation[0] >= 1
    named = 0
    for i in range(60):
        others = np.delete(null, i, axis=0)
        alone = calibration.Calibration(
            100,
            made.n_active,
            others.mean(0)[None],
            others.std(0, ddof=1)[None],
            made.inflation,
            59,
        )
        t = alone.deviates(null[[i]], np.array([10]))
        p = 2 * stats.t.sf(np.abs(t), 59)
        named += enrichment.benjamini_hochberg(p, axis=1).min() < calibration.LEVEL
    assert named <= 1
    assert named == 1 or (made.inflation == 1).all()  # nor is it divided by more than it takes


def test_between_two_sizes_a_calibration_is_between_theirs() -> None:
    null = np.random.default_rng(0).normal(size=(2, 50, 3)) * np.array([1, 2, 4])
    null[1] = null[1] * 3 + 1
    made = calibration.Calibration.of_null(1010, np.array([10, 1000]), null)
    z = np.ones((3, 3))
    half = (made.mean.mean(0), made.sd.mean(0), made.inflation.mean())
    found = made.deviates(z, np.array([10, 505, 1010]))  # odds of 1 to 100, 1 and 100
    for row, (mean, sd, inflation) in enumerate(
        [(made.mean[0], made.sd[0], made.inflation[0]), half,
         (made.mean[1], made.sd[1], made.inflation[1])]
    ):  # fmt: skip
        expected = (1 - mean) / (sd * np.sqrt(1 + 1 / 50) * inflation)
        np.testing.assert_allclose(found[row], expected)


def test_a_calibration_survives_its_file(
    made: tuple[lens.Lens, dict[str, calibration.Calibration]], tmp_path: Path
) -> None:
    _, known = made
    calibration.save(tmp_path / "c.npz", known)
    again = calibration.load(tmp_path / "c.npz")
    assert set(again) == {"change", "calibrated"}
    for test, expected in known.items():
        np.testing.assert_array_equal(again[test].sd, expected.sd)
        z, size = expected.mean + 3 * expected.sd, expected.n_active
        np.testing.assert_array_equal(again[test].deviates(z, size), expected.deviates(z, size))


def test_the_table_on_disk(
    made: tuple[lens.Lens, dict[str, calibration.Calibration]], tmp_path: Path
) -> None:
    found, _ = made
    names = np.asarray([f"feature_{i}" for i in range(FEATURES)])
    lens.write(found, names, tmp_path / "t.parquet", block=4)
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert len(table) == FEATURES * TERMS
    for test in found.log_p:
        p = 10 ** -table[f"log10_p_{test}"].to_numpy(np.float64).reshape(FEATURES, TERMS)
        q = enrichment.benjamini_hochberg(p, axis=1)
        every = np.full(p.shape, np.nan)
        testable = found.testable()
        every[testable] = enrichment.benjamini_hochberg(p[testable], axis=None)
        for column, expected in (("q", q), ("q_all", every)):
            ours = 10 ** -table[f"log10_{column}_{test}"].to_numpy(np.float64)
            np.testing.assert_allclose(ours.reshape(p.shape), expected, rtol=1e-4, atol=1e-30)
    row = table.iloc[TERMS + 2]
    assert (row["feature"], row["term"], row["size"]) == ("feature_1", "set 2", 20)
    assert row["auc"] == found.auc[1, 2]


def test_two_stages_of_relevance() -> None:
    shape = (2, 5)
    one = np.ones(shape)
    welch = differential.Welch(
        t=np.array([[9, -9, 9, 2.7, 0.7], [2.7, -2.7, 1.3, 0.5, 0.1]]), df=one * 50,
        log2_fold_change=np.array([[2, -2, 0.5, 3, 0], [0.1, -0.1, 2, 0, 0]], float),
        mean_high=one, mean_low=one, var_high=one, var_low=one, detected_high=one,
        detected_low=one, n_high=np.array([9, 9]), n_low=np.array([9, 9]),
    )  # fmt: skip
    q = np.where(welch.p < 1e-5, 1e-8, 0.5)
    wanted = {
        "both": [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]],
        "up": [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
        "down": [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]],
    }
    for direction, expected in wanted.items():
        chosen = lens.relevant(welch, q, Rule(direction=direction))
        np.testing.assert_array_equal(chosen, np.asarray(expected, bool))
    strict = lens.relevant(welch, q, Rule(fallback_p=None))
    assert not strict[1].any()


def test_tails_that_no_double_holds() -> None:
    z = np.array([0.0, 1.0, 38.0, 60.0, 1000.0])
    exact = [0, -np.log10(2 * stats.norm.sf(1)), 315.54, 783.6, 217149.7]
    np.testing.assert_allclose(lens.two_sided(z), exact, rtol=1e-3)
    known = calibration.Calibration(
        100, np.array([10]), np.zeros((1, 1)), np.ones((1, 1)), np.ones(1), 301
    )
    far = known.log_p(
        known.deviates(np.array([[1e1], [1e3], [1e6]]), np.array([10, 10, 10]))
    ).ravel()
    assert np.isfinite(far).all()
    assert (np.diff(far) > 0).all()


def test_bh_of_logarithms() -> None:
    rng = np.random.default_rng(0)
    p = 10 ** -np.round(rng.exponential(3, (4, 50)), 1)  # with ties
    p[1, 3] = np.nan
    ours = enrichment.benjamini_hochberg_log(-np.log10(p))
    np.testing.assert_allclose(10**-ours, enrichment.benjamini_hochberg(p, axis=1), rtol=1e-9)
    table = (-np.log10(p)).astype(np.float32)
    every = enrichment.LogQ.over(table)(table).astype(np.float64)
    np.testing.assert_allclose(10**-every, enrichment.benjamini_hochberg(p, axis=None), rtol=1e-5)
    rows, room = np.array([0, 2, 3]), (np.empty_like(table), np.empty_like(table))
    of_some, before = enrichment.LogQ.over(table, rows, room), table.copy()
    expected = enrichment.LogQ.over(table[rows].copy())
    np.testing.assert_array_equal(of_some(table[rows]), expected(table[rows]))
    np.testing.assert_array_equal(table, before)
    assert np.shares_memory(of_some.log_p, room[0])
    assert np.shares_memory(of_some.log_q, room[1])


def test_bad_input(z: sparse.csr_matrix, expression: Expression, sets: GeneSets) -> None:
    with pytest.raises(InputError, match="activations are of 100 cells, the expression of 600"):
        lens.annotate(z[:100], expression, sets)
    with pytest.raises(InputError, match="is the dictionary dead"):
        lens.annotate(z * 0, expression, sets)
    few = Expression(expression.x[:, :50], expression.genes[:50])
    some = gene_sets.from_sets({"a": ["G0", "G1"]}, few.genes, 2, 9)
    with pytest.raises(InputError, match="50 genes are no universe"):
        lens.annotate(z, few, some)
    with pytest.raises(InputError, match="direction='sideways'"):
        lens.annotate(z, expression, sets, Rule(direction="sideways"))
    with pytest.raises(InputError, match="at least 30 permuted"):
        lens.annotate(z, expression, sets, RULE, null_features=5, progress=False)


def test_permuted_cells_are_not_named_after_calibration(
    real: tuple[Expression, GeneSets],
) -> None:
    """Features of real cells that the calibration has not seen, at two group sizes."""
    expression, sets = real
    n_cells = expression.x.shape[0]
    rng = np.random.default_rng(0)
    density = np.repeat([0.03, 0.16], 40)
    z = rng.uniform(1, 2, (n_cells, 80)) * (rng.random((n_cells, 80)) < density)
    found, _ = lens.annotate(
        sparse.csr_matrix(z), expression, sets, Rule(percentile=84), null_features=150, bins=2,
        progress=False, matched=False,
    )  # fmt: skip
    assert found.share_named() <= 0.05
    assert found.share_named("mann_whitney") > 0.4  # what it is for


def test_a_calibration_is_made_for_the_sizes_that_can_be_named(
    expression: Expression, sets: GeneSets
) -> None:
    """Hundreds of features of one cell, as overcomplete dictionaries have them, change nothing."""
    rng = np.random.default_rng(0)
    z = np.zeros((CELLS, 330), np.float32)
    for i in range(300):
        z[rng.integers(CELLS), i] = 1
    for i in range(300, 330):
        z[rng.choice(CELLS, 20 + i % 3, replace=False), i] = 1
    call = {"null_features": 40, "bins": 2, "progress": False}
    _, known = lens.annotate(sparse.csr_matrix(z), expression, sets, RULE, **call)
    assert (known["change"].n_active >= 20).all()
    none, known = lens.annotate(sparse.csr_matrix(z[:, :300]), expression, sets, RULE, **call)
    assert known == {}
    assert np.isnan(none.log_p["change"]).all()
    assert not none.named().any()
    assert len(none.best()) == 0


def test_genes_up_beyond_doubt_name_few_permuted_features(
    real: tuple[Expression, GeneSets],
) -> None:
    """By the matched test alone, uncalibrated; Mann-Whitney names most of them. Nor do features
    that are silent in a handful of cells, where a gene that is absent has no variance, get names
    from noise."""
    expression, sets = real
    n_cells = expression.x.shape[0]
    rng = np.random.default_rng(0)
    z = rng.exponential(size=(n_cells, 160))
    z[:, :80] *= rng.random((n_cells, 80)) < 0.15
    for feature, silent in enumerate(np.repeat([2, 5, 12, 32], 20), 80):
        z[rng.choice(n_cells, silent, replace=False), feature] = 0
    found, _ = lens.annotate(sparse.csr_matrix(z), expression, sets, UP, **ALONE)
    assert found.testable().tolist() == [True] * 80 + [False] * 60 + [True] * 20
    assert (found.n_relevant[140:] > 0).any()
    for test in ("matched", "fisher"):
        named = found.named(test).any(axis=1)
        assert not named[80:140].any()
        assert named[:80].mean() <= 0.05
        assert named[140:].mean() <= 0.05
    assert found.named("mann_whitney").any(axis=1)[:80].mean() > 0.2


def test_genes_exchanged_for_others_of_like_expression_are_not_named(
    real: tuple[Expression, GeneSets],
) -> None:
    """Selections that follow expression alone: Fisher finds sets in them, the matched test none."""
    expression, sets = real
    means = np.asarray(expression.x.mean(axis=0)).ravel()
    rng = np.random.default_rng(0)
    chance = 300 * means**0.7 / (means**0.7).sum()
    selected = rng.random((100, means.size)) < chance
    strata = enrichment.strata_of_rank(means)
    matched = enrichment.matched_overlap(selected, sets.membership, strata)
    fisher = enrichment.hypergeometric(selected, sets.membership)
    share = [
        (enrichment.benjamini_hochberg(p) < 0.05).any(axis=1).mean() for p in (matched.p, fisher.p)
    ]
    assert share[0] <= 0.05
    assert share[1] > 0.5

    moved = nulls.relabelled_genes(sets, means, seed=0)
    sizes = [np.asarray(s.membership.sum(axis=1)).ravel() for s in (sets, moved)]
    np.testing.assert_array_equal(*sizes)
    level = [np.asarray(s.membership @ means).ravel() / sizes[0] for s in (sets, moved)]
    assert np.median(np.abs(level[1] / level[0] - 1)) < 0.03
    assert (sets.membership != moved.membership).nnz > sets.membership.nnz


def test_permuted_cells_depend_on_their_seed(z: sparse.csr_matrix) -> None:
    null = nulls.permuted_cells(z, seed=0)
    assert (nulls.permuted_cells(z, seed=0) != null).nnz == 0
    assert (nulls.permuted_cells(z, seed=1) != null).nnz > 0

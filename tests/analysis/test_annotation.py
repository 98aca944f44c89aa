from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from analysis import annotation, cells, enrichment, nulls
from analysis.annotation import Rule
from analysis.cells import Expression
from analysis.gene_sets import GeneSets, from_sets, read
from analysis.groups import top_cells

CELLS, GENES = 300, 120


@pytest.fixture(scope="module")
def expression() -> Expression:
    """Genes 0-19 are on in cells 0-59, genes 20-39 in cells 60-119; the rest is noise."""
    rng = np.random.default_rng(1)
    rate = np.full((CELLS, GENES), 0.5)
    rate[:60, :20] = rate[60:120, 20:40] = 5
    x = np.log1p(rng.poisson(rate)).astype(np.float32)
    return Expression(sparse.csr_matrix(x), np.asarray([f"G{g}" for g in range(GENES)]))


@pytest.fixture(scope="module")
def sets(expression: Expression) -> GeneSets:
    named = {f"set {i}": [f"G{g}" for g in range(10 * i, 10 * i + 10)] for i in range(12)}
    return from_sets(named, expression.genes, 2, 100)


@pytest.fixture(scope="module")
def z() -> sparse.csr_matrix:
    """Feature 0 follows the first program, 1 the second, 2 nothing, 3 fires in four cells."""
    rng = np.random.default_rng(2)
    z = np.zeros((CELLS, 4), np.float32)
    z[:60, 0] = rng.uniform(1, 2, 60)
    z[60:120, 1] = rng.uniform(1, 2, 60)
    z[rng.choice(CELLS, 60, replace=False), 2] = rng.uniform(1, 2, 60)
    z[[0, 1, 2, 3], 3] = 1
    return sparse.csr_matrix(z)


@pytest.fixture(scope="module")
def real(data_folder: Path) -> tuple[Expression, GeneSets]:
    """A third of the Zheng cells, and GO."""
    adata = cells.read(data_folder / "data/counts/zheng_facs_pbmc_3774x16791.h5ad")[::3].copy()
    expression = cells.expression(adata, "X", "counts", "symbol")
    path = data_folder / "data/genesets/GO_Biological_Process_2021.gmt"
    return expression, read(path, expression.genes, 20, 500)


def test_features_get_the_terms_of_the_genes_they_follow(
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets
) -> None:
    found = annotation.annotate(z, expression, sets, Rule(percentile=80))
    named = found.names()
    assert set(np.flatnonzero(named[0])) == {0, 1}, found.tests
    assert set(np.flatnonzero(named[1])) == {2, 3}
    assert not named[2].any()
    assert set(found.naming_terms(5)[1]) == {"set 2", "set 3"}
    assert [len(terms) for terms in found.naming_terms(1)[:3]] == [1, 1, 0]
    assert {int(gene[1:]) for gene in found.top_genes[1]} <= set(range(20, 40))
    assert found.share_named() == pytest.approx(2 / 3)  # three have cells enough


def test_a_feature_of_few_cells_is_tested_and_not_named(
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets
) -> None:
    strict = annotation.annotate(z, expression, sets, Rule(percentile=80, cells=10))
    lenient = annotation.annotate(z, expression, sets, Rule(percentile=80, cells=4))
    assert not strict.names()[3].any()
    assert lenient.names()[3].any()
    np.testing.assert_array_equal(strict.tests["fisher"].p, lenient.tests["fisher"].p)


def test_one_pair_equals_scipy_from_the_cells_on(
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets
) -> None:
    rule = Rule(percentile=80)
    found = annotation.annotate(z, expression, sets, rule)
    x = expression.x.toarray().astype(np.float64)
    activation = z.toarray()[:, 0].astype(np.float64)
    high, low = x[activation > np.percentile(activation, 80)], x[activation == 0]
    welch = stats.ttest_ind(high, low, equal_var=False)
    fold = (np.expm1(high).mean(0) + 0.1) / (np.expm1(low).mean(0) + 0.1)
    up = (stats.false_discovery_control(welch.pvalue) < rule.gene_q) & (fold >= rule.fold_change)
    for term in range(12):
        inside = np.zeros(GENES, bool)
        inside[10 * term : 10 * term + 10] = True
        table = [[(up & inside).sum(), (up & ~inside).sum()],
                 [(~up & inside).sum(), (~up & ~inside).sum()]]  # fmt: skip
        expected = stats.fisher_exact(table, alternative="greater").pvalue
        assert found.tests["fisher"].p[0, term] == pytest.approx(expected, rel=1e-9)
        assert found.hits[0, term] == table[0][0]
        scores = np.round(welch.statistic, 9)
        ranked = stats.mannwhitneyu(scores[inside], scores[~inside], method="asymptotic")
        assert found.tests["mann_whitney"].p[0, term] == pytest.approx(ranked.pvalue, rel=1e-8)


def test_blocks_do_not_matter(
    z: sparse.csr_matrix,
    expression: Expression,
    sets: GeneSets,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = annotation.annotate(z, expression, sets)
    annotation.write(whole, np.asarray(list("abcd")), tmp_path / "whole.parquet")
    monkeypatch.setattr(annotation, "BLOCK", 3)
    parts = annotation.annotate(z, expression, sets)
    annotation.write(parts, np.asarray(list("abcd")), tmp_path / "parts.parquet")
    one, two = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in ("whole", "parts"))
    order = ["test", "feature", "term"]
    pd.testing.assert_frame_equal(
        one.sort_values(order, ignore_index=True), two.sort_values(order, ignore_index=True)
    )


def test_table_on_disk_is_the_annotation(
    z: sparse.csr_matrix, expression: Expression, sets: GeneSets, tmp_path: Path
) -> None:
    found = annotation.annotate(z, expression, sets)
    annotation.write(found, np.asarray(list("abcd")), tmp_path / "table.parquet")
    table = pd.read_parquet(tmp_path / "table.parquet").set_index(["test", "feature", "term"])
    assert len(table) == 3 * 4 * 12
    for test in annotation.TESTS:
        for i, feature in enumerate("abcd"):
            for j, term in enumerate(sets.names):
                row = table.loc[(test, feature, term)]
                tested = found.tests[test]
                assert row["p"] == tested.p[i, j]
                assert row["q"] == tested.q[i, j]
                assert row["q_all"] == tested.q_all[i, j]
                assert row["size"] == 10
    assert table.loc["mann_whitney", "hits"].isna().all()
    fisher = table.loc["fisher"]
    for feature, rows in fisher.groupby("feature"):
        expected = stats.false_discovery_control(rows["p"])
        np.testing.assert_allclose(rows["q"], expected, err_msg=feature)
    np.testing.assert_allclose(fisher["q_all"], stats.false_discovery_control(fisher["p"]))


def test_permuted_cells_keep_values_and_lose_cells(z: sparse.csr_matrix) -> None:
    null = nulls.permuted_cells(z, seed=0)
    assert (null != z).nnz > 0
    for feature in range(z.shape[1]):
        np.testing.assert_array_equal(
            np.sort(null[:, [feature]].data), np.sort(z[:, [feature]].data)
        )
    assert (nulls.permuted_cells(z, seed=0) != null).nnz == 0
    assert (nulls.permuted_cells(z, seed=1) != null).nnz > 0


def test_naming_holds_its_level_on_permuted_real_cells(
    real: tuple[Expression, GeneSets],
) -> None:
    """Real co-expression: Mann-Whitney names most permuted features, the rule hardly any."""
    expression, sets = real
    rng = np.random.default_rng(0)
    shape = (expression.x.shape[0], 100)
    z = sparse.csr_matrix(np.where(rng.random(shape) < 0.15, rng.exponential(size=shape), 0))
    null = annotation.annotate(z, expression, sets)
    assert null.share_named() <= 0.05
    assert null.share_named("mann_whitney") > 0.2


def test_features_on_in_almost_every_cell_get_no_names_from_noise(
    real: tuple[Expression, GeneSets],
) -> None:
    """A gene absent from a handful of silent cells has no variance there; its t means nothing."""
    expression, sets = real
    rng = np.random.default_rng(0)
    z = rng.exponential(size=(expression.x.shape[0], 80))
    for feature, silent in enumerate(np.repeat([2, 5, 12, 32], 20)):
        z[rng.choice(expression.x.shape[0], silent, replace=False), feature] = 0
    null = annotation.annotate(sparse.csr_matrix(z), expression, sets)
    for test in ("matched", "fisher"):
        named = null.names(test).any(axis=1)
        assert not named[:60].any()
        assert named[60:].mean() <= 0.05
    assert null.testable()[60:].all()  # so that the bound above is about something


def test_naming_holds_its_level_when_genes_are_exchanged_for_others_of_like_expression(
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


def test_high_cells_of_the_rule_are_those_above_the_percentile(z: sparse.csr_matrix) -> None:
    groups = top_cells(z, 90.0)
    dense = z.toarray().astype(np.float64)
    expected = dense > np.percentile(dense, 90, axis=0)
    np.testing.assert_array_equal(groups.high.toarray(), expected.T)

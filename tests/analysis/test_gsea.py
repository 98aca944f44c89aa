"""Prerank GSEA beside gseapy, exact distributions, enumeration and plain loops."""

import itertools
import os
from pathlib import Path

import gseapy
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.colors import to_hex
from scipy import sparse

from analysis import enrichment, gene_sets, gsea, gsea_null, gsea_plots
from analysis import gsea_kernels as kernels
from sae_jax.errors import InputError

DATA = os.environ.get("SAE_JAX_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SAE_JAX_DATA does not name the test data")

FEW = {"n_permutations": 10, "workers": 1}
TIED = hnp.arrays(np.float64, (2, 9), elements=st.integers(-2, 3))
MEMBERSHIP = hnp.arrays(bool, (3, 9))
DISTINCT = st.permutations(range(9)).map(lambda order: np.array(order) - 3.5)


def plain_es(
    scores: np.ndarray, inside: np.ndarray, weight: float = 1.0, score_type: str = "std"
) -> tuple[float, set[int]]:
    """By the definition, score by score; NaN where it says nothing. And the leading edge."""
    total = (np.abs(scores[inside]) ** weight).sum()
    if not inside.any() or inside.all() or total == 0 or np.ptp(scores) == 0:
        return np.nan, set()
    sums, hit, missed = [0.0], 0.0, 0
    values = np.unique(scores)[::-1]
    for value in values:
        here = scores == value
        hit += (here & inside).sum() * abs(value) ** weight
        missed += (here & ~inside).sum()
        sums.append(hit / total - missed / (~inside).sum())
    high, low = max(sums), min(sums)
    up = {"std": high > -low, "pos": True, "neg": False}[score_type]
    if up:
        reached = values[: int(np.argmax(np.isclose(sums, high)))]
        return high, set(np.flatnonzero(inside & np.isin(scores, reached)))
    reached = values[: int(np.argmax(np.isclose(sums, low)))]
    return low, set(np.flatnonzero(inside & ~np.isin(scores, reached)))


@settings(max_examples=40)
@given(TIED, MEMBERSHIP, st.sampled_from([0.0, 1.0, 1.5]), st.sampled_from(gsea.SCORE_TYPES))
def test_es_is_the_farthest_running_sum_at_the_end_of_a_score(
    scores: np.ndarray, membership: np.ndarray, weight: float, score_type: str
) -> None:
    found = gsea.prerank(scores, membership, weight=weight, score_type=score_type, **FEW)
    for row, term in np.ndindex(found.es.shape):
        inside = membership[term]
        es, leading = plain_es(scores[row], inside, weight, score_type)
        ours = found.es[row, term]
        if abs(es) < 1e-9 or np.isclose(ours, -es):  # where peak and trough are as far, either
            np.testing.assert_allclose(abs(ours), abs(es), atol=1e-12)
            continue
        np.testing.assert_allclose(ours, es, atol=1e-12)
        if not np.isnan(es):
            at, value = found.running_sum(row, term)
            assert np.abs(value - es).min() < 1e-12
            assert (at[0], at[-1], value[0]) == (0, 9, 0)
            assert abs(value[-1]) < 1e-12
            extreme = value.max() if es > 0 else value.min()
            if (np.abs(value - extreme) < 1e-9).sum() == 1:
                assert set(found.leading_edge(row, term)) == leading
        else:
            assert not found.leading_edge(row, term).size


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_es_and_table_equal_gseapy(weight: float) -> None:
    rng = np.random.default_rng(3)
    scores, genes = rng.normal(size=300) + 0.2, [f"g{i:03}" for i in range(300)]
    sets = {f"s{i}": list(rng.choice(genes, size, replace=False)) for i, size in enumerate([9] * 6)}
    theirs = gseapy.prerank(
        pd.DataFrame({"gene": genes, "score": scores}), sets, min_size=1, permutation_num=10,
        weight=weight, outdir=None, no_plot=True, threads=1,
    ).res2d  # fmt: skip
    membership = np.array([np.isin(genes, members) for members in sets.values()])
    found = gsea.prerank(scores[None], membership, weight=weight, **FEW)
    table = found.table(0, list(sets), genes)
    assert set(theirs.columns) - set(table.columns) == {"FWER p-val"}
    assert (table["NES"].abs().diff().dropna() <= 0).all()
    theirs, table = theirs.set_index("Term"), table.set_index("Term")
    np.testing.assert_allclose(table["ES"], theirs["ES"].loc[table.index].astype(float), rtol=1e-12)
    for column in ("Name", "Tag %", "Gene %", "Lead_genes"):
        assert table[column].equals(theirs[column].loc[table.index].astype(object)), column


def golden_prerank() -> tuple[pd.DataFrame, sparse.csr_array, list[str], dict[str, list]]:
    """Two rankings, the terms' genes, their names, and gseapy's results with two seeds."""
    golden = Path(DATA) / "golden/enrichment"
    ranking = pd.read_parquet(golden / "prerank_ranking.parquet")
    theirs = pd.read_parquet(golden / "prerank_gseapy.parquet")
    names, membership = gene_sets.read(golden / "go_terms.gmt.gz", ranking["gene"])
    terms = sorted(theirs["term"].unique())
    membership = sparse.csr_array(membership)[[names.index(term) for term in terms]]
    seeds = {
        kind: [
            theirs[(theirs["ranking"] == kind) & (theirs["seed"] == seed)]
            .set_index("term").loc[terms] for seed in (7, 8)
        ]
        for kind in "AB"
    }  # fmt: skip
    return ranking, membership, terms, seeds


@needs_data
def test_golden_rankings_nearer_to_the_truth_than_gseapy() -> None:
    """A maximum over terms of ours less a seed's may exceed that of a seed less the other: what
    counts is how far each is from what five times as many random sets tell."""
    ranking, membership, _, seeds = golden_prerank()
    scores = ranking[["score_A", "score_B"]].to_numpy().T
    found = gsea.prerank(scores, membership)
    truth = gsea.prerank(scores, membership, n_permutations=5_000, seed=5)
    for row, kind in enumerate("AB"):
        told = seeds[kind][0]["same_sign_null_fraction"].to_numpy() >= 0.1
        for name, column in (("nes", "nes"), ("p", "nom_p")):
            true = getattr(truth, name)[row, told]
            ours = np.abs(getattr(found, name)[row, told] - true)
            for seed in seeds[kind]:
                away = np.abs(seed[column].to_numpy()[told] - true)
                assert ours.mean() < away.mean(), (kind, name)
                assert ours.max() < away.max(), (kind, name)


@needs_data
def test_golden_rankings_within_the_noise_of_gseapy() -> None:
    ranking, membership, terms, seeds = golden_prerank()
    scores = ranking[["score_A", "score_B"]].to_numpy().T
    found = gsea.prerank(scores, membership)
    for row, kind in enumerate("AB"):
        one, two = seeds[kind]
        np.testing.assert_allclose(found.es[row], one["es"], rtol=0, atol=1e-9)
        told = one["same_sign_null_fraction"].to_numpy() >= 0.1
        assert not np.isnan(found.p[row, told]).any()
        for name, column in (("nes", "nes"), ("p", "nom_p"), ("fdr", "fdr_q")):
            noise = np.abs(one[column] - two[column])[told]
            ours = getattr(found, name)[row]
            for seed in (one, two):
                away = np.abs(ours - seed[column])[told]
                assert away.mean() < 1.3 * noise.mean(), (kind, name)
                assert away.max() < 2 * noise.max(), (kind, name)
        table = found.table(row, terms, ranking["gene"]).set_index("Term").loc[terms]
        for column, name in (("Tag %",) * 2, ("Gene %",) * 2, ("Lead_genes", "lead_genes")):
            assert (table[column] == one[name]).all()
        # Where chance hardly ever has the sign, there is no null of the sign; never 0, never 1.
        none = one["same_sign_null_fraction"].to_numpy() == 0
        assert np.isnan(found.p[row, none]).all()
        assert np.isnan(found.nes[row, none]).all()
        assert np.isnan(found.q[row, none]).all()
        assert (found.same_sign[row, none] < 1e-3).all()
        np.testing.assert_allclose(found.same_sign[row], one["same_sign_null_fraction"], atol=0.12)
    assert found.p[1, terms.index("cytoplasmic translation (GO:0002181)")] < 1e-15


@pytest.mark.parametrize("without", [0, 9])
@pytest.mark.parametrize("score_type", gsea.SCORE_TYPES)
def test_p_equals_enumeration_of_all_sets(score_type: str, without: int) -> None:
    """1001 sets of 4 of 14 genes, with ties; 126 of them without a score where 9 genes are."""
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=14) * 2 + 1)
    scores[rng.permutation(14)[:without]] = 0
    sets = list(itertools.combinations(range(14), 4))
    membership = np.zeros((len(sets), 14), bool)
    for row, members in zip(membership, sets, strict=True):
        row[list(members)] = True
    found = gsea.prerank(scores[None], membership, n_permutations=20_000, score_type=score_type)
    es = found.es[0]
    null = es[~np.isnan(es)]
    signs = {"std": (1, -1), "pos": (1,), "neg": (-1,)}[score_type]
    for sign in signs:
        same = null[null > 0] if sign > 0 else -null[null <= 0]
        same = null * sign if score_type != "std" else same
        mine = np.flatnonzero((es * sign > 0) if score_type == "std" else ~np.isnan(es))
        far = np.abs(es[mine])
        exact = (same[None] >= far[:, None] - 1e-9).mean(axis=1)
        assert (np.abs(found.p[0, mine] - exact) < 5 * found.p_error[0, mine] + 1e-4).all()
        assert found.p[0, mine].min() > 0
        np.testing.assert_allclose(found.nes[0, mine], es[mine] / same.mean(), rtol=0.02)
        np.testing.assert_allclose(found.same_sign[0, mine], len(same) / len(null), atol=0.02)


def test_fdr_counts_terms_and_null_that_are_as_far_out() -> None:
    """As gseapy's, from the direct null of each of two sizes."""
    rng = np.random.default_rng(6)
    scores = rng.normal(size=200)
    membership = np.zeros((60, 200), bool)
    for i, row in enumerate(membership):
        row[rng.choice(200, (8, 20)[i % 2], replace=False)] = True
    found = gsea.prerank(scores[None], membership, n_permutations=5000)
    ranking = gsea_null.Ranking.of(scores, 1.0)
    null = []
    for size in (8, 20):
        sets = gsea_null.RandomSets.draw(200, size, 5000, 9).positions
        high, low = np.empty((2, 5000))
        kernels.extremes(sets, ranking.weight, ranking.start, ranking.end, high, low)
        es = np.where(high > -low, high, low)
        null.append(np.where(es > 0, es / es[es > 0].mean(), -es / es[es < 0].mean()))
    null, nes = np.concatenate(null), found.nes[0]
    for term in range(60):
        sign = np.sign(nes[term])
        tail, seen = ((x[x * sign > 0] * sign >= abs(nes[term])).mean() for x in (null, nes))
        assert found.fdr[0, term] == pytest.approx(min(1, tail / seen), abs=0.06)
    np.testing.assert_array_equal(found.q[0], enrichment.benjamini_hochberg(found.p[0]))


@settings(max_examples=40)
@given(TIED, MEMBERSHIP, st.permutations(range(9)), st.sampled_from(gsea.SCORE_TYPES))
def test_the_order_of_genes_terms_and_lists_changes_nothing(
    scores: np.ndarray, membership: np.ndarray, order: list[int], score_type: str
) -> None:
    found = gsea.prerank(scores, membership, score_type=score_type, **FEW)
    moved = gsea.prerank(
        scores[::-1, order], sparse.csr_matrix(membership[::-1, order].astype(float)),
        score_type=score_type, **FEW,
    )  # fmt: skip
    alone = gsea.prerank(scores[[1]], membership[[2]], score_type=score_type, **FEW)
    for name in ("es", "nes", "p", "p_error", "fdr", "q", "same_sign", "leading"):
        ours = getattr(found, name)
        np.testing.assert_array_equal(getattr(moved, name)[::-1, ::-1], ours, strict=True)
        if name not in ("fdr", "q"):
            np.testing.assert_array_equal(getattr(alone, name)[0, 0], ours[1, 2])


@settings(max_examples=40)
@given(DISTINCT, MEMBERSHIP, st.sampled_from([2.0**-40, 8.0]))
def test_signs_and_scale_of_scores(
    scores: np.ndarray, membership: np.ndarray, scale: float
) -> None:
    scores = (scores**3)[None]
    found = gsea.prerank(scores, membership, **FEW)
    scaled = gsea.prerank(scores * scale, membership, **FEW)
    for name in ("es", "nes", "p", "fdr"):
        np.testing.assert_allclose(getattr(scaled, name), getattr(found, name), rtol=1e-9)
    flipped = gsea.prerank(-scores, membership, **FEW)
    np.testing.assert_allclose(np.abs(flipped.es), np.abs(found.es), rtol=1e-9)
    peak = gsea.prerank(scores, membership, score_type="pos", **FEW).es
    trough = gsea.prerank(-scores, membership, score_type="neg", **FEW).es
    np.testing.assert_allclose(peak, -trough, atol=1e-12)
    clear = np.abs(flipped.es - found.es) > 1e-9  # peak and trough are not as far
    np.testing.assert_allclose(flipped.es[clear], -found.es[clear], rtol=1e-9)


def test_nothing_to_tell_is_nan() -> None:
    scores = np.array([[2.0, 1, 0, 0, 0, -1], [0.0] * 6, [3.0] * 6])
    membership = np.array([
        [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0] * 6, [1] * 6, [0, 0, 0, 0, 1, 1],
    ])  # fmt: skip
    found = gsea.prerank(scores, membership, n_permutations=200)
    assert found.es[0, [0, 4]].tolist() == [1, -1]
    for name in ("es", "nes", "p", "p_error", "fdr", "q", "same_sign"):
        values = getattr(found, name)
        assert np.isnan(values[0, 1:4]).all(), name
        assert np.isnan(values[1:]).all(), name
        assert not np.isnan(values[0, 0]), name
    with pytest.raises(InputError, match="term 1 has no running sum in list 0"):
        found.running_sum(0, 1)
    table = found.table(0, list("abcde"), list("uvwxyz"), name="mine")
    assert table["Term"].tolist()[2:] == ["b", "c", "d"]
    assert table.loc[2:, "Lead_genes"].tolist() == [""] * 3
    assert set(table["Name"]) == {"mine"}


def test_equal_scores_lead_together_and_by_name() -> None:
    scores = np.array([[5.0, 1, 1, 1, -2, -2]])
    found = gsea.prerank(scores, np.array([[0, 1, 1, 0, 0, 0]]), n_permutations=50)
    assert found.es[0, 0] == pytest.approx(1 - 2 / 4)
    assert set(found.leading_edge(0, 0)) == {1, 2}
    table = found.table(0, ["t"], list("pzyxba"))
    assert table[["Lead_genes", "Tag %", "Gene %"]].to_numpy().tolist() == [
        ["y;z", "2/2", "66.67%"]
    ]
    at, value = found.running_sum(0, 0)
    assert at.tolist() == [0, 1, 4, 6]
    np.testing.assert_allclose(value, [0, -1 / 4, 1 / 2, 0], atol=1e-12)


def test_bad_input_is_refused() -> None:
    scores, membership = np.zeros((2, 5)), np.eye(5)[:3]
    with pytest.raises(InputError, match=r"scores have shape \(2, 5\) and membership \(3, 4\)"):
        gsea.prerank(scores, membership[:, :4])
    with pytest.raises(InputError, match="one or more of each"):
        gsea.prerank(scores, membership[:0])
    with pytest.raises(InputError, match="membership is float64"):
        gsea.prerank(scores, 2 * membership)
    with pytest.raises(InputError, match="score_type='both'"):
        gsea.prerank(scores, membership, score_type="both")
    for wrong in ({"n_permutations": 9}, {"weight": -1.0}, {"weight": np.nan}, {"seed": -1}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}="):
            gsea.prerank(scores, membership, **wrong)
    for bad in (np.nan, np.inf):
        scores[1, 3] = bad
        with pytest.raises(InputError, match=r"1 values .* the first for list 1 at gene 3"):
            gsea.prerank(scores, membership)
    found = gsea.prerank(np.arange(5.0)[None], membership, **FEW)
    with pytest.raises(InputError, match="2 terms and 5 genes are named"):
        found.table(0, ["a", "b"], list("vwxyz"))


def test_figure_shows_the_running_sum_and_the_leading_edge() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(1, 80))
    membership = np.zeros((2, 80), bool)
    membership[0, np.argsort(-scores[0])[[0, 1, 3, 5, 40]]] = True
    membership[1, np.argsort(-scores[0])[[30, 76, 78]]] = True
    found = gsea.prerank(scores, membership, n_permutations=100)
    for term, colour in ((0, gsea_plots.ORANGE), (1, gsea_plots.BLUE)):
        figure = gsea_plots.enrichment(found, 0, term, "a $ set")
        top, middle, bottom = figure.axes
        np.testing.assert_array_equal(top.lines[0].get_ydata(), found.running_sum(0, term)[1])
        assert f"ES {found.es[0, term]:.3f}" in top.texts[0].get_text()
        rest, leading = middle.collections
        drawn = {float(segment[0, 0]) - 0.5 for segment in leading.get_segments()}
        rank = np.argsort(np.argsort(-scores[0]))
        assert drawn == set(rank[found.leading_edge(0, term)].astype(float))
        assert len(rest.get_segments()) + len(drawn) == membership[term].sum()
        assert to_hex(leading.get_color()[0]) == to_hex(colour)
        assert bottom.get_xlim() == (0, 80)

"""Documents against the raw files, by pandas and plain loops; keys that are none; hostile names."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.browser import documents, table, wire
from analysis.browser.documents import document
from analysis.browser.feature_documents import Ranked
from analysis.browser.run import Run
from analysis.gsea_null import Ranking
from tests.analysis.browser import run_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases.lens(tmp_path_factory.mktemp("documents") / "run")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return Run.open([folder], folder.parent / "state")


@pytest.fixture(scope="module")
def adata(folder: Path) -> anndata.AnnData:
    return anndata.read_h5ad(folder / "features.h5ad")


def of(folder: Path, name: str, feature: int) -> pd.DataFrame:
    table = pd.read_parquet(folder / f"{name}.parquet")
    return table[table["feature"] == f"feature_{feature}"].reset_index(drop=True)


# Keys


def test_every_key_has_a_document_that_can_be_packed(run: Run) -> None:
    keys = list(documents.keys(run, cells=True))
    assert len(set(keys)) == len(keys)
    expected = 4 + 2 + 3 + 96 * 8 + 120 + 30 + 4 + 6 + 400
    assert len(keys) == expected
    assert len(list(documents.keys(run))) == expected - 400
    for key in keys:
        numbers = documents.parsed(key)[1]
        assert [int(part) for part in key.split("/") if part.isdigit()] == numbers
        assert len(wire.pack(document(run, key))) < 1e6


@pytest.mark.parametrize(
    "key",
    [
        "", "about/", "/about", "about/0", "feature/0", "feature/00/page", "feature/96/page",
        "feature/-1/page", "feature/1.0/page", "feature/٣/page", "feature/1/gsea", "feature/page/1",
        "feature/1/page/", "feature//page", "gsea/dge", "cell/400", "term/30", "gene/120",
        "label/0", "label/0/4", "label/2/0", "label/0/0/0", "cells/coordinates/2", "cells/column/3",
        "cells", "../about", "feature/1/../2/page", "gene/9999999999", "map\n", "gene/1\n",
        "1/gene", "gene/ 1", "page", "feature/1/__class__", "names/0",
    ],
)  # fmt: skip
def test_what_is_no_key(run: Run, key: str) -> None:
    with pytest.raises(KeyError):
        document(run, key)


@settings(max_examples=100)
@given(st.text("abcdefglmnoprstu/0123.\n%", max_size=20))
def test_a_key_is_a_key_or_refused(key: str) -> None:
    try:
        name, numbers = documents.parsed(key)
    except KeyError:
        return
    parts = [part for part in key.split("/") if not part.isdigit()]
    assert "/".join(parts) == name
    assert all(number < 10**9 for number in numbers)


# Cells


def test_activations_are_those_of_the_file(run: Run, adata: anndata.AnnData) -> None:
    x = adata.X.toarray()
    for feature in (0, 1, 40, 95):
        found = document(run, f"feature/{feature}/activation")
        assert np.array_equal(found["rows"], np.flatnonzero(x[:, feature]))
        truth = x[found["rows"], feature]
        assert found["max"] == x[:, feature].max()
        assert (found["values"] > 0).all()
        assert np.allclose(found["values"] / 65535 * found["max"], truth, atol=found["max"] / 1e5)


def test_a_faint_activation_is_no_silence(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    adata = anndata.read_h5ad(copy / "features.h5ad")
    adata.X.data[0] = 1e-9
    feature = int(adata.X.indices[0])
    adata.write_h5ad(copy / "features.h5ad")
    found = document(Run.open([copy], tmp_path / "state"), f"feature/{feature}/activation")
    assert (found["rows"][0], found["values"][0]) == (0, 1)


def test_a_feature_page(run: Run, adata: anndata.AnnData) -> None:
    x = adata.X.toarray()
    for i in (0, 50, 95):
        found = document(run, f"feature/{i}/page")
        own = x[:, i]
        active = own[own > 0]
        edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
        assert counts.sum() == len(active)
        assert found["histogram"]["n_silent"] == 400 - len(active)
        assert np.array_equal(counts, np.histogram(active, len(counts), (0, active.max()))[0])
        assert np.allclose(edges[[0, -1]], [0, active.max()])
        assert found["summary"]["n_active"] == len(active)
        beside = [found[side] and found[side]["feature"] for side in ("previous", "next")]
        assert beside == [i - 1 if i else None, i + 1 if i < 95 else None]
        for held in found["labels"]:
            column = adata.obs[held["column"]]
            known = own[column.notna().to_numpy()]
            n_active = int((known > 0).sum())
            assert held["n_active"] == n_active
            assert held["enough"] == (n_active >= 100)
            for row in held["rows"]:
                inside = (column == row["value"]).to_numpy()
                n = int((own[inside] > 0).sum())
                assert (row["n_active"], row["n_cells"]) == (n, inside.sum())
                assert np.isclose(row["share"], n / n_active)
                assert np.isclose(row["of_label"], n / inside.sum())
                assert row["marked"] == (n_active >= 100 and n >= 0.7 * n_active)
        top = found["bands"][0]["rows"]
        order = np.argsort(-own, kind="stable")[: min(10, len(active))]
        assert [row["cell"] for row in top] == order.tolist()
        high = np.inf
        for band, low in zip(found["bands"][1:], (0.8, 0.6, 0.4, 0.2, 0), strict=True):
            within = np.flatnonzero((own / own.max() >= low) & (own / own.max() < high) & (own > 0))
            assert band["n"] == len(within)
            assert {row["cell"] for row in band["rows"]} <= set(within)
            assert len(band["rows"]) == min(10, len(within))
            high = low
        for row in (row for band in found["bands"] for row in band["rows"]):
            cell = adata.obs.iloc[row["cell"]]
            assert row["name"] == adata.obs_names[row["cell"]]
            assert row["activation"] == own[row["cell"]]
            for name, value in row["metadata"].items():
                missing = isinstance(cell[name], float) and math.isnan(cell[name])
                assert value == (None if missing else cell[name])


@pytest.mark.parametrize("stretch", [1, 50, 1 << 20])
def test_the_features_nearest(
    run: Run, adata: anndata.AnnData, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.browser.feature_documents.STRETCH", stretch)
    correlation = np.corrcoef(adata.X.toarray().T)
    decoder = adata.varm["decoder"].astype(np.float64)
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for i in (0, 1, 60):
        page = document(run, f"feature/{i}/page")
        for name, truth in (
            ("nearest_activation", correlation[i]),
            ("nearest_decoder", unit @ unit[i]),
        ):
            others = np.delete(np.arange(96), i)
            order = others[np.argsort(-truth[others], kind="stable")][:10]
            assert [row["feature"] for row in page[name]] == order.tolist()
            assert np.allclose([row["value"] for row in page[name]], truth[order], atol=1e-5)


def test_cells_columns_and_maps(run: Run, adata: anndata.AnnData) -> None:
    about = document(run, "about")
    assert about["maps"] == list(adata.obsm)
    for i, name in enumerate(adata.obsm):
        found = document(run, f"cells/coordinates/{i}")
        for axis in (0, 1):
            low, high = found[f"{'xy'[axis]}_range"]
            back = low + found["xy"[axis]] / 65535 * (high - low)
            assert np.allclose(back, adata.obsm[name][:, axis], atol=(high - low) / 65535)
    for i, column in enumerate(about["columns"]):
        found, truth = document(run, f"cells/column/{i}"), adata.obs[column["name"]]
        if found["kind"] == "number":
            assert np.allclose(found["values"], truth)
            continue
        names = [*found["categories"], None]
        told = [names[code] for code in found["codes"]]
        assert told == [None if pd.isna(value) else value for value in truth]
        assert found["codes"].dtype == np.uint8
        assert column["n_categories"] == len(found["categories"])


def test_a_cell(run: Run, adata: anndata.AnnData) -> None:
    found = document(run, "cell/17")
    own = adata.X[[17]].toarray()[0]
    order = np.argsort(-own, kind="stable")[: (own > 0).sum()]
    assert [row["feature"] for row in found["features"]] == order.tolist()
    assert [row["activation"] for row in found["features"]] == own[order].tolist()
    highest = adata.X.toarray().max(axis=0)[order]
    assert np.allclose([row["of_max"] for row in found["features"]], own[order] / highest)


def test_a_label(run: Run, adata: anndata.AnnData) -> None:
    found = document(run, "label/0/2")
    inside = (adata.obs["cell_type"] == found["value"]).to_numpy()
    known = adata.obs["cell_type"].notna().to_numpy()
    x = adata.X.toarray()
    assert found["n_cells"] == inside.sum()
    areas = [row["auroc"] for row in found["features"]]
    assert areas == sorted(areas, reverse=True)
    assert len(areas) == 96
    for row in found["features"][::9]:
        own = x[:, row["feature"]]
        a, b = own[inside], own[known & ~inside]
        greater = (a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean()
        assert np.isclose(row["auroc"], greater, atol=1e-6)
        assert row["n_active"] == (a > 0).sum()
        assert np.isclose(row["share"], (a > 0).sum() / (own[known] > 0).sum())
        assert np.isclose(row["of_label"], (a > 0).mean())


# Genes and terms


def test_attribution_and_its_samples(run: Run, folder: Path) -> None:
    found, truth = document(run, "feature/4/attribution"), of(folder, "attribution", 4)
    shown = truth[truth["attribution"] != 0].sort_values("attribution", ascending=False)
    assert found["names"] == shown["gene"].tolist()
    assert np.allclose(found["values"], shown["attribution"])
    assert (found["n_genes"], found["n_nonzero"]) == (120, len(shown))
    assert [run.genes[gene] for gene in found["genes"]] == found["names"]
    samples, raw = found["samples"], of(folder, "samples", 4)
    values = samples["values"].reshape(30, -1)
    held = raw.set_index(["prototype", "counterfactual", "gene"])["attribution"]
    for row, (a, b) in zip(values, samples["of"], strict=True):
        cells = samples["prototypes"][a]["cell"], samples["counterfactuals"][b]["cell"]
        assert samples["prototypes"][a]["name"] == f"CELL{cells[0]:08d}-1"
        for gene, value in zip(found["names"], row, strict=True):
            if gene not in set(raw["gene"]):
                assert math.isnan(value)
            else:
                assert np.isclose(value, held.get((*cells, gene), 0))


def test_only_the_largest_genes_of_many(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = document(run, "feature/4/attribution")
    monkeypatch.setattr("analysis.browser.feature_documents.MOST_GENES", 7)
    found = document(run, "feature/4/attribution")
    order = np.argsort(-np.abs(whole["values"]), kind="stable")[:7]
    assert set(found["names"]) == {whole["names"][k] for k in order}
    assert (np.diff(found["values"]) <= 0).all()


def test_differential_expression(run: Run, folder: Path) -> None:
    found, truth = document(run, "feature/4/dge"), of(folder, "dge", 4)
    assert found["complete"]
    assert [run.genes[gene] for gene in found["genes"]] == truth["gene"].tolist()
    for name in ("log2_fold_change", "log10_p"):
        assert np.allclose(found[name], truth[name])
    assert found["rule"] == "p < 0.05 after Bonferroni"
    p = 10.0 ** -truth["log10_p"].to_numpy()
    np.testing.assert_array_equal(found["significant"], p < 0.05 / len(p))
    found, truth = document(run, "feature/40/dge"), of(folder, "genes", 40)
    assert not found["complete"]
    # Of fifty genes alone Bonferroni's bound would be that of fifty tests.
    assert found["rule"] == "q < 0.05"
    np.testing.assert_array_equal(found["significant"], truth["q"] < 0.05)
    assert 0 < found["significant"].sum() < len(truth)
    assert [run.genes[gene] for gene in found["genes"]] == truth["gene"].tolist()
    assert "99th percentile" in found["told"]


def test_the_lens_terms(run: Run, folder: Path) -> None:
    found, truth = document(run, "feature/40/terms"), of(folder, "top_terms", 40)
    sets = pd.read_parquet(folder / "gene_sets.parquet")
    genes = of(folder, "genes", 40)["gene"].astype(str).tolist()
    for row, raw in zip(found["rows"], truth.to_dict("records"), strict=True):
        for ours, theirs in (("name", "term"), ("direction", "side")):
            assert row[ours] == raw[theirs]
        for name in ("size", "hits", "auc", "change", "log10_p", "log10_q", "named"):
            assert row[name] == raw[name]
        members = set(sets.loc[sets["term"] == raw["term"], "gene"].astype(str))
        assert row["genes"] == [gene for gene in genes if gene in members]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), n=st.integers(3, 40), levels=st.sampled_from([2, 4, 1000]))
def test_the_running_sum_is_that_of_a_plain_loop(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels + 1, n) / levels
    member = rng.random(n) < 0.4
    ranking = Ranking.of(scores, 1.0)
    ranked = Ranked(ranking.order, np.argsort(ranking.order), ranking)
    found = ranked.running_sum(np.flatnonzero(member))
    weight = np.abs(scores[member]).sum()
    if weight == 0 or member.all():
        assert found is None
        return
    value, curve = 0.0, {0: 0.0}
    order = np.argsort(-scores, kind="stable")
    for rank, gene in enumerate(order):
        value += abs(scores[gene]) / weight if member[gene] else -1 / (~member).sum()
        if rank + 1 == n or scores[order[rank + 1]] != scores[gene]:  # defined where a score ends
            curve[rank + 1] = value
    assert found["hits"].tolist() == [rank for rank, gene in enumerate(order) if member[gene]]
    drawn = np.interp(list(curve), found["at"], found["sum"])
    assert np.allclose(drawn, list(curve.values()), atol=1e-6)
    assert np.isclose(found["sum"].max(), max(curve.values()), atol=1e-6)
    assert np.isclose(found["sum"].min(), min(curve.values()), atol=1e-6)
    sides = np.interp(np.ravel([[h, h + 1] for h in found["hits"]]), found["at"], found["sum"])
    assert np.allclose(found["es"], sides, atol=1e-6)
    peak = max(curve, key=lambda at: (round(curve[at], 9), -at))
    before = [gene for gene in order[:peak] if member[gene]]
    assert ranked.leading(found, up=True).tolist() == before
    trough = min(curve, key=lambda at: (round(curve[at], 9), at))
    after = [gene for gene in order[trough:] if member[gene]]
    assert ranked.leading(found, up=False).tolist() == after[::-1]


def test_gsea(run: Run, folder: Path) -> None:
    for method, score in (("attribution", "attribution"), ("dge", "log2_fold_change")):
        found, truth = document(run, f"feature/6/gsea/{method}"), of(folder, f"gsea_{method}", 6)
        order = truth.assign(size=-truth["nes"].abs()).sort_values(["p", "size"])
        assert [row["name"] for row in found["rows"]] == order["term"].tolist()
        for name in ("es", "nes", "p", "q"):
            assert [row[name] for row in found["rows"]] == order[name].tolist()
        assert len(found["curves"]) == 10
        genes = of(folder, method, 6).sort_values(score, ascending=False, kind="stable")["gene"]
        sets = pd.read_parquet(folder / "gene_sets.parquet")
        for row in found["rows"][:10]:
            members = set(sets.loc[sets["term"] == row["name"], "gene"].astype(str))
            ranks = [rank for rank, gene in enumerate(genes) if gene in members]
            assert found["curves"][str(row["term"])]["hits"].tolist() == ranks
            assert row["size"] == len(ranks)
            assert set(row["lead"]) <= members


def test_deletion_curves(run: Run, folder: Path) -> None:
    found = document(run, "feature/3/deletion")
    truth = pd.read_parquet(folder / "deletion.parquet").query("concept == 3")
    for curve in found["curves"]:
        own = truth[(truth["kind"] == curve["kind"]) & (truth["order"] == curve["order"])]
        assert curve["n_genes"].tolist() == own["n_genes"].tolist()
        assert np.allclose(curve["activation"], own["activation"])
        area = np.trapezoid(own["activation"], own["n_genes"]) / 100
        areas = {"deletion": found["areas"], "insertion": found["insertion_areas"]}
        assert np.isclose(areas[curve["kind"]][curve["order"]], area)
    assert len(found["curves"]) == 6
    assert found["held_out"] is None


def test_a_gene(run: Run, folder: Path) -> None:
    gene = run.gene_number["GENE5"]
    found = document(run, f"gene/{gene}")
    table = pd.read_parquet(folder / "attribution.parquet").astype({"feature": str})
    table["rank"] = table.groupby("feature")["attribution"].rank(ascending=False, method="first")
    truth = table[(table["gene"] == "GENE5") & (table["attribution"] > 0)]
    truth = truth.sort_values("attribution", ascending=False)
    assert [row["name"] for row in found["driven"]] == truth["feature"].tolist()
    assert [row["rank"] for row in found["driven"]] == truth["rank"].tolist()
    assert np.allclose([row["value"] for row in found["driven"]], truth["attribution"])
    dge = pd.read_parquet(folder / "dge.parquet")
    top = pd.concat([dge, pd.read_parquet(folder / "genes.parquet")]).astype({"feature": str})
    top = top[~top.duplicated(["feature", "gene"])]
    top["size"] = top["t"].abs()
    first = {f"feature_{i}" for i in range(10)}
    top = pd.concat([dge.astype({"feature": str}), top[~top["feature"].isin(first)]])
    up = top["t"] > 0
    top["rank"] = top["t"].abs().groupby([top["feature"], up]).rank(ascending=False, method="first")
    truth = top[(top["gene"] == "GENE5") & (top["rank"] <= 50)]
    assert {row["name"]: row["rank"] for row in found["differing"]} == dict(
        zip(truth["feature"], truth["rank"], strict=True)
    )
    kept = np.bincount(run.index["differing.feature"], run.index["differing.t"] > 0, minlength=96)
    assert kept.tolist() == [min(50, n) for n in up.groupby(top["feature"]).sum()[run.names]]
    assert len(run.index["differing.feature"]) == (top["rank"] <= 50).sum()
    assert "50 genes that rise most and the 50 that fall most" in found["told"]["differing"]
    assert "500 genes" in found["told"]["driven"]
    sizes = [abs(row["t"]) for row in found["differing"]]
    assert sizes == sorted(sizes, reverse=True)
    sets = pd.read_parquet(folder / "gene_sets.parquet")
    mine = sets.loc[sets["gene"] == "GENE5", "term"].astype(str)
    assert {row["name"] for row in found["terms"]} == set(mine)
    assert all(row["size"] == (sets["term"] == row["name"]).sum() for row in found["terms"])


def test_a_term(run: Run, folder: Path) -> None:
    term = 3
    found = document(run, f"term/{term}")
    assert found["id"] == found["name"].split("(")[1][:-1]
    sets = pd.read_parquet(folder / "gene_sets.parquet").astype(str)
    assert {row["name"] for row in found["genes"]} == set(
        sets.loc[sets["term"] == found["name"], "gene"]
    )
    lens = pd.read_parquet(folder / "top_terms.parquet").query("named")
    rows = {("enrichment", name) for name in lens.loc[lens["term"] == found["name"], "feature"]}
    for method in ("attribution", "dge"):
        table = pd.read_parquet(folder / f"gsea_{method}.parquet").query("q <= 0.05")
        rows |= {(method, name) for name in table.loc[table["term"] == found["name"], "feature"]}
    assert {(row["by"], row["name"]) for row in found["features"]} == rows
    assert found["n_features"] == len(rows)


def test_every_naming_of_the_lens_not_its_ten_best_alone(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    named = np.random.default_rng(0).random((96, 30)) < 0.5
    table = pd.read_parquet(copy / "enrichment.parquet")
    terms = table["term"].unique().astype(str)
    indptr = np.concatenate([[0], np.cumsum(named.sum(axis=1))])
    np.savez(copy / "named.npz", indptr=indptr, indices=np.nonzero(named)[1], terms=terms)
    (copy / "gsea_attribution.parquet").unlink()
    run = Run.open([copy], tmp_path / "state")
    assert run.features["n_terms"].tolist() == named.sum(axis=1).tolist()
    found = document(run, f"term/{run.term_number[terms[7]]}")
    lens = [row for row in found["features"] if row["by"] == "enrichment"]
    assert {row["feature"] for row in lens} == set(np.flatnonzero(named[:, 7]))
    own = table[table["term"] == terms[7]].reset_index(drop=True)
    for row in lens:
        assert np.isclose(row["log10_q"], own["log10_q_change"][row["feature"]])
        assert np.isclose(row["auc"], own["auc"][row["feature"]])


def test_terms_of_a_quickstart(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    for name in ("top_terms", "gsea_attribution"):
        (copy / f"{name}.parquet").unlink()
    (copy / "lens.json").rename(copy / "quickstart.json")
    long = pd.read_parquet(copy / "enrichment.parquet").astype({"feature": str, "term": str})
    long["log10_q_change"] *= 2
    long.to_parquet(copy / "enrichment.parquet", index=False)
    features = pd.read_parquet(copy / "features.parquet").drop(columns="best_term_log10_q")
    features["best_term_q"] = np.where(features["best_term"].notna(), 0.01, np.nan)
    features.to_parquet(copy / "features.parquet", index=False)
    run = Run.open([copy], tmp_path / "state")
    named = features.loc[features["best_term"].notna(), "feature"]
    passed = long[long["feature"].isin(named) & (long["log10_q_change"] >= -np.log10(0.05))]
    count = passed.groupby("feature").size().reindex(run.names).fillna(0)
    assert run.features["n_terms"].tolist() == count.tolist()
    assert count.max() > 0
    assert np.nanmax(run.features["term_log10_q"]) == pytest.approx(2)
    i = run.feature(named.iloc[0])
    found = document(run, f"feature/{i}/terms")["rows"]
    own = long[long["feature"] == run.names[i]].sort_values("log10_p_change", ascending=False)
    assert [row["name"] for row in found] == own["term"].tolist()[:20]
    terms = set(passed.loc[passed["feature"] == run.names[i], "term"])
    assert {row["name"] for row in found if row["named"]} == terms & {r["name"] for r in found}


# The run


def test_the_table_of_features(run: Run) -> None:
    found = document(run, "features")
    assert found["names"] == run.names
    about = {column["name"]: column for column in document(run, "about")["table_columns"]}
    assert list(about) == ["name", *found["columns"]]
    for name, column in found["columns"].items():
        values: list[Any] = list(run.features[name])
        if isinstance(column, dict):
            held = [*column["categories"], None]
            assert [held[code] for code in column["codes"]] == values
        elif isinstance(column, np.ndarray):
            truth = run.features[name].to_numpy(np.float64, na_value=np.nan)
            assert np.allclose(column, truth, equal_nan=True)
            assert about[name]["kind"] in ("number", "flag")
        else:
            assert column == values
        assert about[name]["description"]


def test_the_map_of_features(run: Run, folder: Path) -> None:
    found = document(run, "map")
    truth = pd.read_parquet(folder / "feature_space.parquet")
    placed = truth["umap_1"].notna().to_numpy()
    assert np.array_equal(found["feature"], np.flatnonzero(placed))
    low, high = found["y_range"]
    back = low + found["y"] / 65535 * (high - low)
    assert np.allclose(back, truth["umap_2"][placed], atol=(high - low) / 65535)


def test_what_the_run_is(run: Run) -> None:
    about = document(run, "about")
    assert (about["n_cells"], about["n_features"], about["d_in"]) == (400, 96, 5)
    assert about["program"] == "lens"
    assert about["title"] == "synthetic"
    assert about["nulls"] == [{"features": "cells permuted", "named": 0.0}]
    assert about["n_named"] == (run.features["n_terms"] > 0).sum()
    assert about["share_named"] == about["n_named"] / (run.features["n_active"] > 0).sum()
    assert "to be tested" in about["named_told"]
    missing = {name for name, told in about["panels"].items() if told}
    assert missing == {"gene_info"}
    assert document(run, "feature/50/attribution")["absent"].startswith("This feature was not")
    names = document(run, "names")
    assert (names["genes"], names["terms"]) == (run.genes, run.terms)
    for label in names["labels"]:
        found = document(run, "label/{}/{}".format(*label["index"]))
        assert found["value"] == label["text"]


def test_a_marker_is_listed_though_more_genes_fall_by_more(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    dge = pd.read_parquet(copy / "dge.parquet").astype({"feature": str, "gene": str})
    own = dge["feature"] == "feature_3"
    dge.loc[own, "t"] = -100 - np.arange(own.sum())
    dge.loc[own & (dge["gene"] == "GENE5"), "t"] = 7.0
    dge.to_parquet(copy / "dge.parquet", index=False)
    run = Run.open([copy], tmp_path / "state")
    listed = document(run, f"gene/{run.gene_number['GENE5']}")["differing"]
    (row,) = [row for row in listed if row["name"] == "feature_3"]
    assert (row["t"], row["rank"]) == (7.0, 1)


def test_named_are_counted_as_the_table_counts_them(folder: Path, tmp_path: Path) -> None:
    pair = (tmp_path / "lens", tmp_path / "concepts")
    run_cases.split(folder, *pair)
    with h5py.File(pair[0] / "features.h5ad", "a") as file:  # the lens counts testable ones
        told = json.loads(file["uns/about"][()]) | {"n_named": 3, "share_named": 0.9}
        file["uns/about"][()] = json.dumps(told)
    gsea = pd.read_parquet(pair[1] / "gsea_attribution.parquet").astype({"feature": str})
    first = gsea["feature"] == gsea["feature"].iloc[0]
    of_neuron = gsea[first].assign(feature="neuron_0+", q=0.01)
    pd.concat([gsea, of_neuron]).to_parquet(pair[1] / "gsea_attribution.parquet", index=False)
    run = Run.open(pair, tmp_path / "state")
    about = document(run, "about")
    passed = table.query(run, {"n_terms_min": "1", "kind": "concept"})["total"]
    assert table.query(run, {"n_terms_min": "1"})["total"] == passed + 1
    assert about["n_named"] == passed
    concepts = run.features[run.features["kind"] == "concept"]
    assert about["share_named"] == passed / (concepts["n_active"] > 0).sum()


def test_hostile_names_are_data(tmp_path: Path) -> None:
    folder = run_cases.hostile(tmp_path / "run")
    run = Run.open([folder], tmp_path / "state")
    for number, name in enumerate(run_cases.HOSTILE):
        assert run.feature(name) == number
        gene, term = run.gene_number[name], run.term_number[name]
        for key in (f"feature/{number}/page", f"gene/{gene}", f"term/{term}", f"cell/{number}"):
            back = wire.unpack(wire.pack(document(run, key)))
            assert back["name"] == name
    about = wire.unpack(wire.pack(document(run, "about")))
    columns = [column["name"] for column in about["columns"]]
    assert {"<b>", "$"} <= set(columns)
    place = columns.index("<b>")
    value = document(run, f"cells/column/{place}")["categories"].index(run_cases.HOSTILE[0])
    assert document(run, f"label/{place}/{value}")["value"] == run_cases.HOSTILE[0]
    for key in list(documents.keys(run))[:100]:
        wire.unpack(wire.pack(document(run, key)))
    links = document(run, f"gene/{run.gene_number[run_cases.HOSTILE[0]]}")["links"]
    assert all(link["href"].startswith("https://") and "<" not in link["href"] for link in links)


def test_each_kind_has_its_place_in_a_list_that_is_cut(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neuron is active in most cells: by activation alone they would fill the list."""
    pair = (tmp_path / "lens", tmp_path / "concepts")
    run_cases.split(folder, *pair)
    run = Run.open(pair, tmp_path / "state")
    whole = [row["feature"] for row in document(run, "label/0/0")["features"]]
    monkeypatch.setattr(documents, "MOST_ROWS", 2)
    monkeypatch.setattr(documents, "MOST_OF_CELL", 2)
    found = document(run, "label/0/0")
    concepts = [feature for feature in whole if feature != 96]
    assert [row["feature"] for row in found["features"] if row["feature"] != 96] == concepts[:2]
    assert 96 in [row["feature"] for row in found["features"]]
    assert (found["n_features"], found["most"]) == (97, 2)
    last = document(run, f"cell/{run.n_cells - 1}")["features"]  # the neuron is highest there
    assert [row["feature"] == 96 for row in last].count(True) == 1
    assert len(last) == 3

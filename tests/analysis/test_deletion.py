"""Deletion and insertion curves, and integrated gradients: plain loops and closed forms."""

import dataclasses
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import sparse as sp
from scipy import stats

import extract
from analysis import deletion, integrated
from analysis.attribution import attribute, find_pairs
from sae_jax.errors import InputError
from tests.analysis.attribution_cases import (
    GENES,
    Planted,
    Threshold,
    dictionary,
    some_cells,
)

CELLS = some_cells()
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def pbmc(data_folder: Path) -> anndata.AnnData:
    return anndata.read_h5ad(data_folder / "golden/scvi/counts_hvg.h5ad")[::60, :300].copy()


@pytest.fixture(scope="module")
def scvi(data_folder: Path) -> Any:
    return extract.load_model("scvi", data_folder / "golden/scvi/model")


OPTIONS = {"min_gene_coverage": 0.1}


def share(
    model: Any, coder: Any, adata: anndata.AnnData, pairs: Any, order: np.ndarray, n: int,
    kind: str, genes: list[str], concept: int, **options: Any,
) -> float:  # fmt: skip
    """What a curve has at n, one perturbed cell at a time."""

    def code(values: np.ndarray, like: int) -> float:
        cell = adata[[like]].copy()
        cell.X = sp.csr_matrix(values[None].astype(np.float32))
        rows = model.embed(cell, **options)
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        return float(np.asarray(coder.encode(rows))[0, concept])

    x = adata.X.toarray()
    at = adata.var_names.get_indexer([genes[i] for i in order[:n]])
    before = after = 0.0
    for p, c in zip(pairs.prototype, pairs.counterfactual, strict=True):
        into, of = (p, c) if kind == "deletion" else (c, p)
        values = x[into].copy()
        values[at] = x[of][at]
        before, after = before + code(x[p], p), after + code(values, into)
    return after / before


def test_curves_of_any_object() -> None:
    model, coder = Planted(), Threshold()
    found = attribute(model, coder, CELLS, prototypes=3, counterfactuals=2, **QUIET)
    orders = {"attribution": deletion.ranked(found.scores), "short": [np.array([3, 5])] * 3}
    table = deletion.curves(
        model, coder, CELLS, found.pairs, orders, steps=(1, 2, 5, 24), seed=4, **QUIET
    )
    assert set(table["order"]) == {"attribution", "short", "random"}
    assert set(table["n_genes"]) == {0, 1, 2, 5, 24}
    values = table.set_index(["kind", "order", "concept", "n_genes"])["activation"]
    for kind in deletion.KINDS:
        for name, order in orders.items():
            for concept in (0, 2):
                for n in (0, 1, 2, 5):
                    expected = share(
                        model, coder, CELLS, found.pairs.of([concept]), order[concept], n, kind,
                        GENES, concept,
                    )  # fmt: skip
                    assert values[kind, name, concept, n] == pytest.approx(expected, abs=1e-9)
    # Nothing replaced, and everything: a prototype's activation, and a counterfactual's, 0.
    for name in ("attribution", "random"):
        np.testing.assert_allclose(values.loc["deletion", name, :, 0], 1)
        np.testing.assert_allclose(values.loc["deletion", name, :, 24], 0, atol=1e-9)
        np.testing.assert_allclose(values.loc["insertion", name, :, 0], 0, atol=1e-9)
        np.testing.assert_allclose(values.loc["insertion", name, :, 24], 1)
    assert (
        values.loc["deletion", "short", :, 2] == values.loc["deletion", "short", :, 24].to_numpy()
    ).all()
    # Three genes are all there is: the attribution's order is the best there can be.
    area = deletion.areas(table).groupby("kind").mean()
    assert area.loc["deletion", "attribution"] < area.loc["deletion", "random"]
    assert area.loc["insertion", "attribution"] > area.loc["insertion", "random"]
    again = deletion.curves(
        model, coder, CELLS, found.pairs, orders, steps=(1, 2, 5, 24), seed=4, **QUIET
    )
    pd.testing.assert_frame_equal(again, table)


def test_curves_of_scvi_are_those_of_single_cells(scvi: Any, pbmc: anndata.AnnData) -> None:
    x = scvi.embed(pbmc, **OPTIONS)["latent"]
    coder = dictionary(x)
    call: dict[str, Any] = {"options": OPTIONS, **QUIET}
    found = attribute(scvi, coder, pbmc, [3, 11], prototypes=2, counterfactuals=1, **call)
    lfc = np.random.default_rng(0).random(found.scores.shape)
    orders = {"attribution": deletion.ranked(found.scores), "DGE": deletion.ranked(lfc, lfc > 0.5)}
    table = deletion.curves(scvi, coder, pbmc, found.pairs, orders, steps=(2, 9, 30), **call)
    values = table.set_index(["kind", "order", "concept", "n_genes"])["activation"]
    for kind, n in (("deletion", 9), ("insertion", 2), ("insertion", 0)):
        expected = share(
            scvi, coder, pbmc, found.pairs.of([1]), orders["attribution"][1], n, kind, found.genes,
            11, **OPTIONS,
        )  # fmt: skip
        assert values[kind, "attribution", 11, n] == pytest.approx(expected, abs=1e-5)
    area = deletion.areas(table).groupby("kind").mean()
    for rival in ("DGE", "random"):
        assert area.loc["deletion", "attribution"] < area.loc["deletion", rival]
        assert area.loc["insertion", "attribution"] > area.loc["insertion", rival]


def test_orders() -> None:
    scores = np.array([[0.1, 0.5, 0.1, np.nan], [1, 2, 3, 4]])
    assert [order.tolist() for order in deletion.ranked(scores)] == [[1, 0, 2], [3, 2, 1, 0]]
    kept = deletion.ranked(scores, np.array([[1, 0, 1, 1], [0, 0, 1, 1]], bool))
    assert [order.tolist() for order in kept] == [[0, 2], [3, 2]]
    pairs = find_pairs(Planted(), Threshold(), CELLS, prototypes=2, counterfactuals=1)
    x = CELLS.X.toarray()
    random = deletion.shuffled(sp.csr_array(CELLS.X), pairs, 1)
    for i, order in enumerate(random):
        some = pairs.of([i])
        differ = (x[some.prototype] != x[some.counterfactual]).any(axis=0)
        assert sorted(order) == np.flatnonzero(differ).tolist()
    alone = deletion.shuffled(sp.csr_array(CELLS.X), pairs.of([2]), 1)  # of its own seed
    np.testing.assert_array_equal(alone[0], random[2])
    with pytest.raises(InputError, match=r"give \[concepts, genes\] both"):
        deletion.ranked(scores, np.ones(4, bool))


def test_areas_and_the_figure() -> None:
    n = [0, 1, 5]
    parts = {("attribution", 7): [1, 0.5, 0], ("attribution", 9): [1, 0, 0],
             ("random", 7): [1, 1, 1], ("random", 9): [1, 1, 0.4]}  # fmt: skip
    table = pd.concat(
        pd.DataFrame({"kind": "deletion", "order": name, "concept": concept, "n_genes": n,
                      "activation": values})
        for (name, concept), values in parts.items()
    )  # fmt: skip
    area = deletion.areas(table)
    expected = [[(0.75 + 1) / 5, 1], [0.5 / 5, (1 + 2.8) / 5]]
    np.testing.assert_allclose(area.loc["deletion"], expected)
    assert list(area) == ["attribution", "random"]
    figure = deletion.figure(table)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert list(drawn) == [
        f"attribution, area {np.mean([row[0] for row in expected]):.2f}",
        f"random, area {np.mean([row[1] for row in expected]):.2f}",
    ]
    np.testing.assert_allclose(
        next(iter(drawn.values())), np.column_stack([n, [1, 0.25, 0]]), atol=1e-12
    )
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.25 - np.std([0.5, 0], ddof=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kinds": ("both",)}, "give some of deletion, insertion"),
        ({"kinds": ()}, "give some of deletion, insertion"),
        ({"steps": ()}, "numbers of genes"),
        ({"steps": (0,)}, "numbers of genes"),
        ({"orders": {"a": [np.arange(3)]}}, "a: 1 orders for 3 concepts"),
        ({"orders": {"a": [np.array([0, 24])] * 3}}, r"positions of genes, 0 \.\. 23"),
        ({"orders": {"a": [np.array([1, 1])] * 3}}, "each once at most"),
    ],
)
def test_what_curves_refuse(change: dict[str, Any], words: str) -> None:
    pairs = find_pairs(Planted(), Threshold(), CELLS, prototypes=2)
    call = {"orders": {"a": [np.arange(3)] * 3}} | change
    with pytest.raises(InputError, match=words):
        deletion.curves(Planted(), Threshold(), CELLS, pairs, call.pop("orders"), **call, **QUIET)


# Integrated gradients


def test_integrated_gradients_of_scvi_add_up(scvi: Any, pbmc: anndata.AnnData) -> None:
    x = scvi.embed(pbmc, **OPTIONS)["latent"]
    coder = dictionary(x, activation="relu", k=None, l1_weight=0.1)
    call: dict[str, Any] = {"options": OPTIONS, **QUIET}
    pairs = find_pairs(scvi, coder, pbmc, range(0, 40, 4), prototypes=2, counterfactuals=1,
                       options=OPTIONS)  # fmt: skip
    found = integrated.integrated_gradients(scvi, coder, pbmc, pairs, steps=512, checked=4, **call)
    there = np.flatnonzero(pairs.count)
    z = coder.encode(x)
    for i in there:
        some, latent = pairs.of([i]), pairs.concepts[i]
        difference = (z[some.prototype, latent] - z[some.counterfactual, latent]).mean()
        assert found.attribution.scores[i].sum() == pytest.approx(difference, rel=2e-2)
    assert len(found.agreement) == min(4, len(there))
    np.testing.assert_allclose(found.agreement["completeness"], 1, atol=2e-2)
    # What the table says of a concept, from both scores as they are.
    latent = int(found.agreement.index[0])
    i = int(np.flatnonzero(pairs.concepts == latent)[0])
    some = pairs.of([i])
    exact = attribute(scvi, coder, pbmc, pairs=some, **call).scores[0]
    values = pbmc[:, found.attribution.genes].X.toarray()
    differ = (values[some.prototype] != values[some.counterfactual]).any(axis=0)
    rho = stats.spearmanr(exact[differ], found.attribution.scores[i, differ]).statistic
    assert found.agreement.loc[latent, "spearman"] == pytest.approx(rho)
    assert rho > 0.5
    assert not found.attribution.scores[i, ~differ].any()
    assert found.attribution.forwards.done == 512 * len(pairs.prototype)


def test_agreement_of_scores() -> None:
    exact = np.arange(20.0)
    assert integrated.agreement(exact, exact) == pytest.approx({"spearman": 1.0, "top": 1.0})
    assert integrated.agreement(exact, -exact)["top"] == 0
    moved = exact.copy()
    moved[[19, 0]] = moved[[0, 19]]
    assert integrated.agreement(exact, moved)["top"] == 0.9
    assert np.isnan(integrated.agreement(exact[:2], exact[:2])["spearman"])


def test_integrated_gradients_of_scgpt(data_folder: Path) -> None:
    folder = data_folder / "golden/scgpt"
    cells = anndata.read_h5ad(folder / "cells_counts.h5ad")
    cells = cells[:10, np.flatnonzero(cells.var["in_vocab"])[:40]].copy()
    cells.var_names = cells.var["feature_name"].astype(str)
    model = extract.load_model("scgpt", folder / "model")
    options = {"min_gene_coverage": 0.0, "include_zeros": True, "pooling": "mean"}
    x = model.embed(cells, **options)[2]
    coder = dictionary(x, 8, activation="relu", k=None, l1_weight=0.1)
    exchange = {"bins": "own"}
    pairs = find_pairs(model, coder, cells, prototypes=1, counterfactuals=1, options=options)
    found = integrated.integrated_gradients(
        model, coder, cells, pairs.of(np.flatnonzero(pairs.count)[:2]), steps=64, options=options,
        exchange=exchange, **QUIET,
    )  # fmt: skip
    np.testing.assert_allclose(found.agreement["completeness"], 1, atol=0.2)


def test_what_has_no_gradients_is_refused(scvi: Any, pbmc: anndata.AnnData) -> None:
    pairs = find_pairs(Planted(), Threshold(), CELLS)
    with pytest.raises(InputError, match="need a model that gives gradients"):
        integrated.integrated_gradients(Planted(), Threshold(), CELLS, pairs, **QUIET)
    with pytest.raises(InputError, match=r"a sae_jax\.Dictionary"):
        integrated.integrated_gradients(
            scvi, Threshold(), pbmc, dataclasses.replace(pairs), options=OPTIONS, **QUIET
        )
    with pytest.raises(InputError, match="1 step and 2 concepts"):
        integrated.integrated_gradients(Planted(), Threshold(), CELLS, pairs, steps=0)


def test_held_out_prototypes_are_those_after_the_first() -> None:
    """Pairs of a concept follow one another, a prototype's together; concepts may share one."""
    concept = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    prototype = np.array([5, 5, 7, 7, 7, 8, 9, 9])
    pairs = deletion.Pairs(np.array([4, 6, 9]), concept, prototype, np.arange(8), np.ones(8))
    later = deletion.held_out(pairs, 1)
    assert later.concepts.tolist() == [4, 6, 9]
    assert later.concept.tolist() == [0, 1, 1]
    assert later.prototype.tolist() == [7, 8, 9]
    assert later.counterfactual.tolist() == [2, 5, 6]
    assert deletion.held_out(pairs, 2).prototype.tolist() == [9]
    assert not len(deletion.held_out(pairs, 3).concept)
    with pytest.raises(InputError, match="first=0"):
        deletion.held_out(pairs, 0)

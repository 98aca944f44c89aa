"""Exchanged genes: beside cells that were measured so, and tokens that were changed by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import anndata
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse

import extract
from extract.errors import InputError
from extract.models.geneformer_tokens import RankSwaps
from extract.models.scgpt import ScGPT
from extract.models.sequences import Sequences
from tests.extract.small import CELLS, some_cells, write_checkpoint

PLAIN = {"select": "all", "include_zeros": False}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ScGPT:
    return extract.load_model("scgpt", write_checkpoint(tmp_path_factory.mktemp("m") / "scgpt"))


def one(cells: anndata.AnnData, cell: int, gene: int, value: float) -> anndata.AnnData:
    """A cell by its own name, measured otherwise."""
    found = cells[[cell]].copy()
    dense = found.X.toarray()
    dense[0, gene] = value
    found.X = scipy.sparse.csr_matrix(dense)
    return found


def single(
    swaps: Any, cell: int, genes: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return np.full(len(genes), cell), np.arange(len(genes) + 1), genes, values


@pytest.mark.parametrize(
    "variant", ["", "batch_nb", "batch_encoded_deep", "layernorm", "no_log_variational"]
)
def test_the_encoder_of_scvi_in_arrays(data_folder: Path, variant: str) -> None:
    folder = data_folder / "golden/scvi"
    cells = anndata.read_h5ad(folder / "counts_hvg.h5ad")[::100].copy()
    where = folder / "variants" / variant if variant else folder
    model = extract.load_model("scvi", where / "model")
    some = np.array([7, 2, 30])
    found = model.swaps(cells, some, layers="latent")
    encoder, h = found.encoder, found.values.toarray()
    h = np.log1p(h) if encoder.log1p else h
    parts = list(zip(encoder.weights, encoder.biases, strict=True))
    for i, (weight, bias) in enumerate(parts):
        h = h @ weight.T + bias[found.batch]
        if i < len(parts) - 1:
            if encoder.layer_norm[i] is not None:
                h = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(
                    h.var(axis=1, keepdims=True) + encoder.layer_norm[i]
                )
            h = np.maximum(h, 0)
    np.testing.assert_allclose(h, model.embed(cells)["latent"][some], atol=2e-6)
    assert [len(b) for b in encoder.biases] == [2 if "encoded" in variant else 1] * len(parts)


def test_scvi_exchanges_only_genes_that_the_file_has(data_folder: Path) -> None:
    folder = data_folder / "golden/scvi"
    cells = anndata.read_h5ad(folder / "counts_hvg.h5ad")[:5]
    model = extract.load_model("scvi", folder / "model")
    part = cells[:, 1500:400:-1].copy()
    found = model.swaps(part, np.arange(5))
    assert sorted(found.genes) == sorted(part.var_names)
    np.testing.assert_array_equal(found.values.toarray(), part[:, found.genes].X.toarray())
    assert found.encoder.weights[0].shape[1] == len(found.genes) == 1100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 9},
        {"max_length": 9, "select": "top"},
        {"include_zeros": True},
        {"values": "log1p"},
        {"n_bins": 7, "seed": 3, "gene_list": [f"G{i}" for i in range(4, 20)]},
    ],
)
def test_binned_anew_is_a_cell_measured_so(small: ScGPT, options: dict[str, Any]) -> None:
    found = small.swaps(CELLS, np.array([3, 5]), bins="rebin", **options)
    own = found.values[[0]].toarray()[0]
    rng = np.random.default_rng(0)
    genes = np.concatenate(
        [rng.choice(np.flatnonzero(own), 6), rng.choice(np.flatnonzero(own == 0), 3)]
    )
    values = np.array([0, 1, 2, 4, 9, 30, 1, 3, 30], float)
    if options.get("values") == "log1p":  # of an exchange the other genes keep theirs
        others = found.values[[1]].toarray()[0]
        values = others[genes]
        dense = np.repeat(own[None], len(genes), axis=0)
        dense[np.arange(len(genes)), genes] = values
        given = anndata.AnnData(dense)
        given.var_names = found.genes
        rows = small.embed(given, values="given")[2]
        np.testing.assert_allclose(found.embed(*single(found, 0, genes, values)), rows, atol=1e-6)
        return
    expected = [
        small.embed(one(CELLS, 3, CELLS.var_names.get_loc(found.genes[g]), v), **options)[2][0]
        for g, v in zip(genes, values, strict=True)
    ]
    got = found.embed(*single(found, 0, genes, values))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # One that changes nothing is the cell; several of a row go together.
    together = found.embed(np.array([1, 1]), np.array([0, 0, 2]), np.array([2, 6]), np.ones(2) * 5)
    two = one(CELLS, 5, CELLS.var_names.get_loc(found.genes[2]), 5)
    two = one(two, 0, CELLS.var_names.get_loc(found.genes[6]), 5)
    for row, cell in zip(together, (CELLS[[5]], two), strict=True):
        np.testing.assert_allclose(row, small.embed(cell, **options)[2][0], atol=1e-6)


def by_hand(
    official: ScGPT, read: Sequences, cell: int, gene: int, digit: float, columns: list[int]
) -> Sequences:
    """The tokens of a cell with one taken out, put in or changed, in the order of columns."""
    ids, values = list(read.ids[cell]), list(read.values[cell])
    if gene in ids:
        values[ids.index(gene)] = digit
        if digit == 0:
            values.pop(ids.index(gene))
            ids.remove(gene)
    elif digit:
        before = [i for i in ids[1:] if columns.index(i) < columns.index(gene)]
        ids.insert(1 + len(before), gene)
        values.insert(1 + len(before), digit)
    return Sequences([np.array(ids)], [np.array(values, np.float32)], 1, 0, np.zeros(1, bool))


@pytest.mark.parametrize("bins", ["prototype", "own"])
def test_tokens_of_scgpt_changed_by_hand(data_folder: Path, bins: str) -> None:
    folder = data_folder / "golden/scgpt"
    model = extract.load_model("scgpt", folder / "model")
    cells = anndata.read_h5ad(folder / "cells_counts.h5ad")[:6].copy()
    options = {"genes": "feature_name", "select": "all"}
    found = model.swaps(cells, np.array([0, 4]), bins=bins, **options)
    plan = model.plan(cells, **options)
    read, raw = plan.read(slice(None)), plan.values(slice(None)).toarray()
    columns = [model.vocabulary[name] for name in plan.genes]
    edges = np.quantile(raw[0][raw[0] > 0], np.linspace(0, 1, 50))
    differ = np.flatnonzero(raw[0] != raw[4])
    kinds = [
        (raw[0] == 0) & (raw[4] > 0),
        (raw[0] > 0) & (raw[4] == 0),
        (raw[0] > 0) & (raw[4] > 0),
    ]
    genes = np.concatenate([np.intersect1d(np.flatnonzero(kind), differ)[:3] for kind in kinds])
    new = found.values[[1]].toarray()[0][genes]
    seen = found.seen(0, genes, new)
    for gene, value, number in zip(genes, raw[4][genes], seen, strict=True):
        ids = read.ids[4].tolist()
        if bins == "own":
            digit = read.values[4][ids.index(columns[gene])] if columns[gene] in ids else 0
        else:
            low, high = (np.searchsorted(edges, value, side) for side in ("left", "right"))
            allowed = range(max(min(low + 1, high), 1), max(high, 1) + 1)
            digit = number
            assert number in allowed if value else number == 0
        changed = by_hand(model, read, 0, columns[gene], digit, columns)
        ours = found.sequences(*single(found, 0, np.array([gene]), new[genes == gene]))
        np.testing.assert_array_equal(ours.ids[0], changed.ids[0])
        np.testing.assert_array_equal(ours.values[0], changed.values[0])
        assert ours.before == 1
        assert not ours.empty.any()
    untouched = found.sequences(np.array([0]), np.array([0, 0]), genes[:0], new[:0])
    np.testing.assert_array_equal(untouched.values[0], read.values[0])
    np.testing.assert_allclose(
        found.embed(np.array([0]), np.array([0, 0]), genes[:0], new[:0]),
        model.embed(cells[[0]], **options)[2], atol=1e-6,
    )  # fmt: skip


def test_a_value_beyond_the_bins_has_the_outermost_digit(small: ScGPT) -> None:
    found = small.swaps(CELLS, np.array([3]), bins="prototype", n_bins=7)
    own = found.values.data
    gene = int(np.flatnonzero(found.values.toarray()[0] == 0)[0])
    digits = found.seen(0, np.full(4, gene), np.array([0, own.min() / 2, own.max() * 2, 1e6]))
    assert digits.tolist() == [0, 1, 6, 6]


def test_which_tokens_are_the_highest_is_seen(small: ScGPT) -> None:
    """Three bins have one digit for all but the highest; the order of values decides who stays."""
    cells = anndata.AnnData(np.array([[9.0, 5, 4, 3, 2, 0]]))
    cells.var_names = ["G0", "G1", "G2", "G3", "G4", "G5"]
    found = small.swaps(cells, np.array([0]), n_bins=3, select="top", max_length=4)
    genes, values = np.array([4, 4, 4]), np.array([2.0, 1.0, 8.0])
    seen = found.seen(0, genes, values)
    names = [found.tokens(0, genes[[i]], values[[i]])[0].tolist() for i in range(3)]
    assert names == [[0, 1, 2], [0, 1, 2], [0, 1, 4]]
    assert seen[2] not in seen[:2]


@hypothesis.given(
    seed=st.integers(0, 2**16),
    bins=st.sampled_from(["prototype", "rebin", "own"]),
    room=st.sampled_from([6, 40]),
    rule=st.sampled_from(["random", "top"]),
)
@hypothesis.settings(max_examples=25)
def test_what_is_seen_alike_has_the_same_tokens(
    small: ScGPT, seed: int, bins: str, room: int, rule: str
) -> None:
    hypothesis.assume(not (bins == "own" and rule == "top"))
    cells = some_cells(6, seed)
    found = small.swaps(cells, np.arange(6), bins=bins, max_length=room, select=rule, n_bins=5)
    rng = np.random.default_rng(seed)
    genes = rng.integers(0, len(found.genes), 40)
    values = found.values[rng.integers(1, 6, 40), genes].A1
    seen = found.seen(0, genes, values)
    own = found.values[np.zeros(40, int), genes].A1
    before = found.seen(0, genes, own)
    tokens = [found.tokens(0, genes[[i]], values[[i]]) for i in range(40)]
    itself = found.tokens(0, genes[:0], values[:0])
    for i in range(40):
        if seen[i] == before[i]:
            np.testing.assert_array_equal(np.stack(tokens[i]), np.stack(itself))
        elif room == 40 and rule == "random" and bins != "rebin":
            same = tokens[i][0].tolist() == itself[0].tolist()
            assert not same or (tokens[i][1] != itself[1]).any()
        for j in np.flatnonzero((genes == genes[i]) & (seen == seen[i])):
            np.testing.assert_array_equal(np.stack(tokens[i]), np.stack(tokens[j]))


def ranks(values: np.ndarray, most: int, n_cells: int = 2) -> RankSwaps:
    block = scipy.sparse.csr_matrix(values)
    n = values.shape[1]
    names = [f"c{i}" for i in range(n_cells)]
    return RankSwaps(
        [f"g{i}" for i in range(n)], block, names, [90], [91], None, None, np.arange(n) + 10, most
    )


@hypothesis.given(seed=st.integers(0, 2**16), most=st.sampled_from([3, 8, 50]))
@hypothesis.settings(max_examples=40)
def test_a_gene_goes_where_its_value_belongs(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 5, (2, 12)).astype(float)
    values[0, 0] += 1  # one gene at least
    found = ranks(values, most)
    genes, new = np.arange(12), values[1]
    seen, before = found.seen(0, genes, new), found.seen(0, genes, values[0])
    for gene in genes:
        others = [g for g in np.argsort(-values[0], kind="stable") if g != gene and values[0, g]]
        place = sum((-values[0, g], g) < (-new[gene], gene) for g in others)
        expected = list(others)
        if new[gene]:
            expected.insert(place, gene)
        ids, _ = found.tokens(0, genes[[gene]], new[[gene]])
        assert (ids - 10).tolist() == expected[:most]
        assert seen[gene] == (min(place, most) if new[gene] else most)
        same = ids.tolist() == found.tokens(0, genes[:0], new[:0])[0].tolist()
        assert same == (seen[gene] == before[gene])


def test_geneformer_ranks_by_the_total_of_each_cell(data_folder: Path) -> None:
    folder = data_folder / "golden/geneformer"
    files = folder / "dictionaries"
    model = extract.load_model(
        "geneformer", folder / "model_special", dictionaries=files,
        token_dictionary=files / "token_dictionary_special.json",
        gene_median=files / "gene_median_dictionary.json",
    )  # fmt: skip
    cells = anndata.read_h5ad(folder / "cells_counts.h5ad")[:4].copy()
    options = {"genes": "ensembl_id", "n_counts": "n_counts"}
    found = model.swaps(cells, np.array([2, 0]), **options)
    nothing = np.zeros(0, np.int64)
    rows = found.embed(np.arange(2), np.zeros(3, np.int64), nothing, np.zeros(0))
    expected = model.embed(cells, **options)[model.default_layer]
    np.testing.assert_allclose(rows, expected[[2, 0]], atol=1e-6)
    read = model.plan(cells, **options).read(slice(None))
    ours = found.sequences(np.arange(2), np.zeros(3, np.int64), nothing, np.zeros(0))
    np.testing.assert_array_equal(ours.ids[0], read.ids[2])
    deeper = cells.copy()  # a cell twice as deep is no other cell
    deeper.X = deeper.X * 2
    deeper.obs["n_counts"] = deeper.obs["n_counts"] * 2
    again = model.swaps(deeper, np.array([2, 0]), **options)
    np.testing.assert_allclose(again.values.toarray(), found.values.toarray(), rtol=1e-12)


def test_slopes_are_finite_differences(data_folder: Path) -> None:
    folder = data_folder / "golden/scgpt"
    model = extract.load_model("scgpt", folder / "model")
    cells = anndata.read_h5ad(folder / "cells_counts.h5ad")[:2]
    cells = cells[:, np.flatnonzero(cells.var["in_vocab"])[:40]].copy()
    options = {"genes": "feature_name", "min_gene_coverage": 0.0, "layers": 1}
    found = model.swaps(cells, np.arange(2), pooling="cls_raw", **options)
    inputs = found.sequences(np.arange(2), np.zeros(3, np.int64), np.zeros(0, int), np.zeros(0))
    assert len(inputs.ids[0]) != len(inputs.ids[1])  # one of them is padded
    inputs = dataclasses.replace(inputs, values=[v / 50 for v in inputs.values])
    towards = np.random.default_rng(0).normal(size=model.d_model).astype(np.float32)
    slopes = found.evaluate.gradients(inputs, lambda rows: np.tile(towards, (len(rows), 1)))
    assert [len(slope) for slope in slopes] == inputs.lengths.tolist()
    for cell, slope in enumerate(slopes):
        expected = []
        for token in range(1, len(slope)):
            ends = []
            for step in (-0.01, 0.01):
                values = [v.copy() for v in inputs.values]
                values[cell][token] += step
                rows = found.evaluate(dataclasses.replace(inputs, values=values))
                ends.append(rows[cell].astype(np.float64) @ towards)
            expected.append((ends[1] - ends[0]) / 0.02)
        assert np.corrcoef(slope[1:], expected)[0, 1] > 0.99
        np.testing.assert_allclose(slope[1:], expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize("bins", ["own", "prototype"])
def test_integrated_slopes_add_up(small: ScGPT, bins: str) -> None:
    """With a token for every gene the path ends in the two cells: scores sum to the difference."""
    found = small.swaps(CELLS, np.arange(4), bins=bins, include_zeros=True, pooling="mean")
    towards = np.random.default_rng(0).normal(size=small.d_model).astype(np.float32)
    scores = found.slopes(1, np.array([2]), 200, lambda rows: np.tile(towards, (len(rows), 1)))
    genes = np.arange(len(found.genes))
    for score, other in zip(scores, (2,), strict=True):
        new = found.values[[other]].toarray()[0]
        rows = found.embed(np.array([1, 1]), np.array([0, 0, len(genes)]), genes, new)
        difference = (rows[0] - rows[1]) @ towards
        assert abs(score.sum() - difference) < 0.03 * np.abs(score).sum()
        assert not score[found.values[[1]].toarray()[0] == new].any()


def test_the_refused(small: ScGPT, data_folder: Path) -> None:
    some = np.array([0])
    with pytest.raises(InputError, match="bins must be one of prototype, rebin, own, not 'mine'"):
        small.swaps(CELLS, some, bins="mine")
    for options in ({"select": "top"}, {"values": "log1p"}):
        with pytest.raises(InputError, match="bins='own' exchanges digits"):
            small.swaps(CELLS, some, bins="own", **options)
    for options in ({"layers": [0, 1]}, {"pooling": "tokens"}):
        with pytest.raises(InputError, match="one layer and for one row a cell"):
            small.swaps(CELLS, some, **options)
    bare = CELLS[[0]].copy()
    dense = np.zeros(bare.shape, np.float32)
    dense[0, 2] = 3
    bare.X = scipy.sparse.csr_matrix(dense)
    with pytest.raises(InputError, match="leaves cell 'cell0' without any gene"):
        small.swaps(bare, some).embed(some, np.array([0, 1]), np.array([2]), np.zeros(1))
    model = extract.load_model("multidgd", data_folder / "golden/multidgd/model")
    with pytest.raises(InputError, match=r"multidgd has no encoder: .*analysis\.steering"):
        model.swaps(CELLS, some)

"""The reader of scGPT against what the authors' own code computed on real cells."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import torch

import extract
from extract import InputError, checkpoints, variable
from extract.models import scgpt_tokens
from extract.models.scgpt import ScGPT
from extract.models.sequences import Batch, Sequences, pool
from tests.extract.small import CELLS, GENES, some_cells, write_checkpoint


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> Path:
    return data_folder / "golden/scgpt"


@pytest.fixture(scope="module")
def official(golden: Path) -> ScGPT:
    return extract.load_model("scgpt", golden / "model")


@pytest.fixture(scope="module")
def real(golden: Path) -> anndata.AnnData:
    return anndata.read_h5ad(golden / "cells_counts.h5ad")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ScGPT:
    return extract.load_model("scgpt", write_checkpoint(tmp_path_factory.mktemp("m") / "scgpt"))


def sequences(ids: np.ndarray, values: np.ndarray, pads: np.ndarray, cls: int) -> Sequences:
    """Inputs of given tokens; with cls=0 <cls> counts as a gene."""
    return Sequences(
        [row[~pad].astype(np.int64) for row, pad in zip(ids, pads, strict=True)],
        [row[~pad].astype(np.float32) for row, pad in zip(values, pads, strict=True)],
        cls, 0, np.zeros(len(ids), bool),
    )  # fmt: skip


# The authors' numbers


@pytest.mark.parametrize("name", ["hidden_states", "hidden_states_unbinned_nocls"])
def test_hidden_states_of_every_layer(official: ScGPT, golden: Path, name: str) -> None:
    found = np.load(golden / f"{name}.npz")
    pads = found["padding_mask"]
    cls = int(found["gene_ids"][0, 0] == official.vocabulary["<cls>"])
    # All tokens as genes, so that "tokens" gives the hidden state of <cls> too.
    cells = sequences(found["gene_ids"], found["values"], pads, cls=0)
    states = official.evaluate(cells, official.all_layers, "tokens").hidden
    for j, layer in enumerate(official.all_layers):
        np.testing.assert_allclose(states[layer], found["hidden"][:, j][~pads], atol=3e-5)
    cells = sequences(found["gene_ids"], found["values"], pads, cls)
    ours = {"mean_with_cls": "mean_with_cls", "mean_without_cls": "mean"}
    ours |= {"cls": "cls_raw", "cls_l2": "cls"} if cls else {}
    for theirs, pooling in ours.items():
        if f"pool_{theirs}_layer0" not in found:
            continue
        pooled = official.evaluate(cells, official.all_layers, pooling, batch_size=3).hidden
        for j, layer in enumerate(official.all_layers):
            np.testing.assert_allclose(
                pooled[layer], found[f"pool_{theirs}_layer{j}"], atol=3e-5, err_msg=f"{theirs} {j}"
            )


def test_heads(official: ScGPT, golden: Path) -> None:
    found, heads = np.load(golden / "hidden_states.npz"), np.load(golden / "heads.npz")
    pads = found["padding_mask"]
    cells = sequences(found["gene_ids"], found["values"], pads, cls=1)
    out = official.evaluate(cells, [2], "cls", outputs=("mlm", "mvc"), batch_size=3).outputs
    genes = ~pads
    genes[:, 0] = False
    for name in ("mlm", "mvc"):
        np.testing.assert_allclose(out[name], heads[f"{name}_output"][genes], atol=5e-5)


@pytest.mark.parametrize("name", ["embed_data_full", "embed_data_sampled_max200"])
def test_embeddings_of_the_inputs_that_were_drawn(official: ScGPT, golden: Path, name: str) -> None:
    found = np.load(golden / f"{name}.npz")
    cells = sequences(found["gene_ids"], found["values_used"], found["padding_mask"], 1)
    embedding = official.evaluate(cells, [2], "cls").hidden[2]
    np.testing.assert_allclose(embedding, found["official_embedding"], atol=2e-6)


def test_pools_of_every_layer(official: ScGPT, golden: Path) -> None:
    found, pools = np.load(golden / "embed_data_full.npz"), np.load(golden / "pooled_full.npz")
    cells = sequences(found["gene_ids"], found["values_used"], found["padding_mask"], 1)
    names = {"mean_with_cls": "mean_with_cls", "mean": "mean_without_cls", "cls": "cls_l2"}
    for pooling, theirs in names.items():
        states = official.evaluate(cells, official.all_layers, pooling).hidden
        for j, layer in enumerate(official.all_layers):
            np.testing.assert_allclose(states[layer], pools[f"{theirs}_layer{j}"], atol=3e-5)


def test_from_continuous_values_nothing_is_drawn(official: ScGPT, golden: Path) -> None:
    found = np.load(golden / "embed_data_deterministic.npz")
    cells = anndata.read_h5ad(golden / "pseudobulk_continuous.h5ad")
    options = {"genes": "feature_name", "max_length": int(found["max_length"])}
    inputs = official.plan(cells, **options).read(slice(None))
    for i, pads in enumerate(found["padding_mask"]):
        np.testing.assert_array_equal(inputs.ids[i], found["gene_ids"][i][~pads])
        np.testing.assert_array_equal(inputs.values[i], found["values_used"][i][~pads])
    embedding = official.embed(cells, **options)[2]
    np.testing.assert_allclose(embedding, found["official_embedding"], atol=2e-6)


def test_tokens_of_counts_are_among_those_allowed(
    official: ScGPT, golden: Path, real: anndata.AnnData
) -> None:
    found = np.load(golden / "embed_data_full.npz")
    inputs = official.plan(real, genes="feature_name").read(slice(None))
    agree = []
    for i, pads in enumerate(found["padding_mask"]):
        np.testing.assert_array_equal(inputs.ids[i], found["gene_ids"][i][~pads])
        counts = real.X[i].toarray().ravel()
        chosen = (counts > 0) & real.var["in_vocab"].to_numpy()
        low, high = scgpt_tokens.bin_interval(counts[chosen], 51)
        ours, theirs = inputs.values[i][1:], found["values_used"][i][~pads][1:]
        assert inputs.values[i][0] == -2
        assert ((ours >= low) & (ours <= high)).all()
        np.testing.assert_array_equal(ours[low == high], theirs[low == high])
        agree.append(np.corrcoef(ours, theirs)[0, 1])
    assert min(agree) > 0.3  # the same ties, drawn anew
    # Another draw of the ties moves an embedding as little as another seed of theirs does.
    cosine = (official.embed(real, genes="feature_name")[2] * found["official_embedding"]).sum(1)
    assert np.median(cosine) > 0.997
    assert cosine.min() > 0.985


def test_edges_and_digits(golden: Path) -> None:
    found = np.load(golden / "binning.npz")
    rows = sorted({key[:3] for key in found})
    assert len(rows) > 20
    for row in rows:
        values = found[f"{row}_values"]
        nonzero = values > 0
        low, high = (found[f"{row}_{side}"][nonzero] for side in ("low", "high"))
        n_bins = len(found[f"{row}_edges"]) + 1
        np.testing.assert_allclose(
            scgpt_tokens.bin_edges(values[nonzero], n_bins), found[f"{row}_edges"], rtol=1e-7
        )
        ours = scgpt_tokens.bin_interval(values[nonzero], n_bins)
        np.testing.assert_array_equal(ours[0], low, err_msg=row)
        np.testing.assert_array_equal(ours[1], high, err_msg=row)
        for draw, side in ((0.0, low), (1 - 2**-53, high)):
            drawn = scgpt_tokens.bin_values(values[nonzero], n_bins, np.full(len(low), draw))
            np.testing.assert_array_equal(drawn, side)


@pytest.mark.parametrize("zeros", [False, True])
def test_the_route_of_chosen_genes(
    official: ScGPT, golden: Path, real: anndata.AnnData, zeros: bool
) -> None:
    found = np.load(golden / "tokenize_hvg.npz")
    key = f"zero{int(zeros)}"
    cells = real[found["obs_names"]].copy()
    options = {
        "genes": "feature_name", "gene_list": found["hvg_symbols"].tolist(), "cls_value": 0,
        "include_zeros": zeros,
    }  # fmt: skip
    inputs = official.plan(cells, **options).read(slice(None))
    pads = found[f"{key}_padding_mask"]
    for i in range(len(cells)):
        order = np.argsort(inputs.ids[i])
        theirs = found[f"{key}_gene_ids"][i][~pads[i]]
        np.testing.assert_array_equal(inputs.ids[i][order], np.sort(theirs))
        assert inputs.ids[i][0] == theirs[0] == official.vocabulary["<cls>"]
        assert inputs.values[i][0] == 0
    cells = sequences(found[f"{key}_gene_ids"], found[f"{key}_values"], pads, 1)
    for pooling, theirs in (
        ("cls", "cls_l2"), ("mean", "mean_without_cls"), ("mean_with_cls", "mean_with_cls")
    ):  # fmt: skip
        if f"{key}_{theirs}" in found:
            states = official.evaluate(cells, [2], pooling).hidden[2]
            np.testing.assert_allclose(states, found[f"{key}_{theirs}"], atol=3e-5)


@pytest.mark.parametrize("name", ["best_model_flash.pt", "best_model_flash2.pt"])
def test_names_of_flash_attention(
    official: ScGPT, golden: Path, name: str, tmp_path: Path, real: anndata.AnnData
) -> None:
    for file in ("args.json", "vocab.json"):
        shutil.copy(golden / "model" / file, tmp_path / file)
    shutil.copy(golden / "model" / name, tmp_path / "best_model.pt")
    if name == "best_model_flash.pt":
        with pytest.warns(UserWarning, match=r"not used: flag_encoder\.weight"):
            model = extract.load_model("scgpt", tmp_path)
    else:
        model = extract.load_model("scgpt", tmp_path)
    ours, plain = (m.embed(real[:3], genes="feature_name")[2] for m in (model, official))
    np.testing.assert_array_equal(ours, plain)


# What must not matter


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    batch_size=st.sampled_from([1, 3, 64]),
    pooling=st.sampled_from(["cls", "mean", "mean_with_cls"]),
    options=st.sampled_from(
        [{}, {"max_length": 9}, {"select": "top", "max_length": 9}, {"values": "log1p"},
         {"order": "descending"}, {"include_zeros": True}]
    ),
)  # fmt: skip
def test_order_of_cells_and_genes_and_batches_change_nothing(
    small: ScGPT, seed: int, batch_size: int, pooling: str, options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(CELLS.n_obs), rng.permutation(CELLS.n_vars)
    plain = small.embed(CELLS, "all", pooling, **options)
    moved = small.embed(
        CELLS[rows, columns].copy(), "all", pooling, batch_size=batch_size, **options
    )
    some = small.embed(CELLS[rows[:4]].copy(), "all", pooling, **options)
    for layer, states in plain.items():
        np.testing.assert_allclose(moved[layer], states[rows], atol=1e-5)
        np.testing.assert_allclose(some[layer], states[rows[:4]], atol=1e-5)


def test_a_seed_changes_ties_and_samples(small: ScGPT) -> None:
    plain, other = (small.embed(CELLS, seed=seed, max_length=6)[2] for seed in (0, 1))
    assert np.abs(plain - other).max() > 1e-3


def test_ties_are_drawn_evenly() -> None:
    keys = scgpt_tokens.cell_keys([f"c{i}" for i in range(2000)], seed=0)
    draws = np.concatenate([scgpt_tokens.uniform(key, np.arange(50), np.uint64(1)) for key in keys])
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = len(draws) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi2 of 19: p < 1e-4 beyond
    assert (draws >= 0).all()
    assert (draws < 1).all()


def test_top_keeps_the_highest_values_and_random_does_not(small: ScGPT) -> None:
    options = {"cls": False, "max_length": 5, "values": "log1p", "order": "descending"}
    top = small.plan(CELLS, select="top", **options).read(slice(None))
    for i, values in enumerate(top.values):
        counts = CELLS.X[i].toarray().ravel().astype(np.float64)
        expected = np.sort(np.log1p(counts / counts.sum() * 1e4))[::-1][:5]
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    drawn = small.plan(CELLS, **options).read(slice(None))
    assert any(set(a) != set(b) for a, b in zip(top.ids, drawn.ids, strict=True))


def test_tokens_are_named(small: ScGPT) -> None:
    states = small.embed(CELLS, "all", "tokens")
    table = small.tokens(CELLS)
    assert table["cell"].tolist() == np.repeat(CELLS.obs_names, np.diff(CELLS.X.indptr)).tolist()
    inputs = small.plan(CELLS).read(slice(None))
    names = small.gene_names(inputs.gene_ids())
    expected = [GENES[j] for i in range(CELLS.n_obs) for j in CELLS.X[i].toarray()[0].nonzero()[0]]
    assert names.tolist() == expected == table["gene"].tolist()
    some = small.tokens(CELLS, select="top", max_length=4, min_gene_coverage=0.9)
    assert len(some) == len(small.embed(CELLS, 1, "tokens", select="top", max_length=4)[1])
    assert all(len(rows) == len(names) for rows in states.values())
    mean = small.embed(CELLS, [1], "mean")[1]
    ends = np.cumsum(inputs.rows("tokens"))
    np.testing.assert_allclose(
        mean, [part.mean(axis=0) for part in np.split(states[1], ends[:-1])], atol=1e-5
    )


# Edits


def test_an_edit_that_changes_nothing(small: ScGPT) -> None:
    plain = small.embed(CELLS, "all", "mean")
    for layer in small.all_layers:
        run = small.run(CELLS, layer, lambda rows: rows, "all", "mean", batch_size=5)
        for at, states in plain.items():
            np.testing.assert_allclose(run.hidden[at], states, atol=1e-5)


def test_an_edit_reaches_later_layers_and_outputs_alone(golden: Path) -> None:
    model = extract.load_model("scgpt", golden / "model")
    cells = anndata.read_h5ad(golden / "cells_counts.h5ad")[:4].copy()
    call = {"genes": "feature_name", "pooling": "mean", "layers": "all", "outputs": ("mlm", "mvc")}
    plain = model.run(cells, 1, None, **call)
    ablated = model.run(cells, 1, lambda rows: rows * 0, **call)
    for layer in ("embedding", 0):
        np.testing.assert_array_equal(ablated.hidden[layer], plain.hidden[layer])
    assert not ablated.hidden[1].any()
    assert np.abs(ablated.hidden[2] - plain.hidden[2]).max() > 0.1
    for name in ("mlm", "mvc"):
        assert np.abs(ablated.outputs[name] - plain.outputs[name]).max() > 1e-3
    # The last block by torch's own layer, from the edited states: the same for every token.
    args = model.args
    block = torch.nn.TransformerEncoderLayer(
        args["embsize"], args["nheads"], args["d_hid"], batch_first=True, dropout=0
    )
    weights = model.network.transformer_encoder.layers[2].state_dict()
    block.load_state_dict(weights)
    with torch.no_grad():
        expected = block.eval()(torch.zeros(1, 3, args["embsize"]))[0, 0]
    np.testing.assert_allclose(ablated.hidden[2], np.tile(expected.numpy(), (4, 1)), atol=1e-5)


def test_an_edit_of_cls_leaves_the_genes(small: ScGPT) -> None:
    seen = []

    def edit(rows: np.ndarray) -> np.ndarray:
        seen.append(rows)
        return rows + 1

    plain = small.embed(CELLS, "all", "mean")
    run = small.run(CELLS, 2, edit, "all", "mean", tokens="cls")
    assert sum(map(len, seen)) == CELLS.n_obs
    np.testing.assert_array_equal(run.hidden[2], plain[2])
    with pytest.raises(InputError, match="must return as many finite ones"):
        small.run(CELLS, 1, lambda rows: rows[:1])
    with pytest.raises(InputError, match="an edit of 'cls' wants the <cls> token"):
        small.run(CELLS, 1, edit, pooling="mean", tokens="cls", cls=False)
    with pytest.raises(InputError, match="tokens must be all, genes or cls"):
        small.run(CELLS, 1, edit, tokens="pads")


def test_an_edit_that_nothing_would_show(small: ScGPT, official: ScGPT, real: Any) -> None:
    with pytest.raises(InputError, match="edit is of layer 2, and layers 1, embedding come before"):
        small.run(CELLS, 2, lambda rows: rows, [1, "embedding"])
    call = {"layers": 0, "outputs": ["mlm"], "genes": "feature_name"}
    plain, silent = (
        official.run(real[:2], 1, edit, **call).outputs["mlm"]
        for edit in (None, lambda rows: rows * 0)
    )
    assert np.abs(plain - silent).max() > 1e-3


# What needs <cls>


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ({"pooling": "cls"}, "pooling 'cls'"),
        ({"pooling": "cls_raw"}, "pooling 'cls_raw'"),
        ({"pooling": "mean", "outputs": ["mlm", "mvc"]}, "output 'mvc'"),
    ],
)
def test_no_first_gene_passes_for_cls(
    official: ScGPT, real: anndata.AnnData, call: dict[str, Any], what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cells, message = real[:2].copy(), f"{what} wants the <cls> token, and these cells have none"
    plan = official.plan(cells, "feature_name", cls=False)
    with pytest.raises(InputError, match=message):
        official.check(plan, **call)
    official.check(official.plan(cells, "feature_name"), **call)
    inputs = plan.read(slice(None))
    with pytest.raises(InputError, match=message):
        official.evaluate(inputs, [0], call["pooling"], outputs=call.get("outputs", ()))
    # Before any value is read.
    monkeypatch.setattr("extract.cells.Expression.rows", None)
    with pytest.raises(InputError, match=message):
        official.run(cells, 0, None, 0, genes="feature_name", cls=False, **call)
    if "outputs" not in call:
        with pytest.raises(InputError, match=message):
            official.embed(cells, 0, genes="feature_name", cls=False, **call)


def test_rows_do_not_keep_all_hidden_states() -> None:
    hidden = torch.randn(3, 50, 4)
    real = torch.ones(3, 50, dtype=torch.bool)
    for pooling in ("cls", "cls_raw"):
        rows = pool(hidden, Batch(real, None, real, real), pooling)
        assert rows.untyped_storage().nbytes() == 3 * 4 * 4


# Variable genes


def of_hvg(model: ScGPT, cells: anndata.AnnData, **options: Any) -> set[str]:
    """The genes that are left, all of them tokens of a cell that expresses one."""
    inputs = model.plan(cells, include_zeros=True, **options).read(slice(None))
    return set(model.gene_names(max(inputs.ids, key=len)[1:]))


@pytest.mark.parametrize("values", ["binned", "log1p"])
def test_variable_genes_of_counts_are_scanpys(small: ScGPT, values: str) -> None:
    scanpy = pytest.importorskip("scanpy")
    pytest.importorskip("skmisc")
    cells = some_cells(90, seed=3)
    cells.X.data = cells.X.data * np.random.default_rng(0).integers(1, 9, len(cells.X.data))
    theirs = scanpy.pp.highly_variable_genes(cells, n_top_genes=11, flavor="seurat_v3", inplace=0)
    wanted = set(cells.var_names[theirs["highly_variable"]])
    assert of_hvg(small, cells, hvg=11, values=values) == wanted
    mixed = cells[:, np.random.default_rng(0).permutation(30)].copy()
    assert of_hvg(small, mixed, hvg=11, values=values) == wanted
    logged = cells.copy()
    scanpy.pp.normalize_total(logged, target_sum=1e4)
    scanpy.pp.log1p(logged)
    theirs = scanpy.pp.highly_variable_genes(logged, n_top_genes=11, inplace=False)
    other = set(cells.var_names[theirs["highly_variable"]])
    assert other != wanted
    assert of_hvg(small, logged, hvg=11, values="given") == other
    assert of_hvg(small, cells, hvg=11, values=values, hvg_flavor="seurat") == other


@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat"])
def test_scores_are_scanpys_however_cells_are_cut(
    flavor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: of whole counts as they are, of log1p values where scanpy has one thread."""
    scanpy = pytest.importorskip("scanpy")
    pytest.importorskip("skmisc")
    numba = pytest.importorskip("numba")
    cells = some_cells(90, seed=3)
    cells.X.data *= np.random.default_rng(0).integers(1, 6000, len(cells.X.data))  # squares round
    cells.X.data[::41] *= 99  # and these are clipped, to what are no whole numbers
    if flavor == "seurat":
        scanpy.pp.normalize_total(cells, target_sum=1e4)
        scanpy.pp.log1p(cells)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    theirs = scanpy.pp.highly_variable_genes(cells, n_top_genes=5, flavor=flavor, inplace=False)
    numba.set_num_threads(threads)
    wanted = theirs["variances_norm" if flavor == "seurat_v3" else "dispersions_norm"].to_numpy()
    for size in (90, 1, 7):
        found = getattr(variable, f"_{flavor}")(
            lambda size=size: (cells.X[i : i + size] for i in range(0, 90, size)), 30
        )
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.filterwarnings("ignore:`n_top_genes` > number")
@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
def test_as_many_variable_genes_as_asked_for(small: ScGPT, flavor: str) -> None:
    pytest.importorskip("skmisc")
    cells = some_cells(90, seed=3)
    cells.X = scipy.sparse.csr_matrix(cells.X.toarray()[:, np.repeat(np.arange(15), 2)])  # ties
    for n in (4, 5, 30):
        assert len(of_hvg(small, cells, hvg=n, hvg_flavor=flavor)) == n


def test_variable_genes_that_cannot_be_found(small: ScGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skmisc")
    with pytest.raises(InputError, match=r"fails on these 2 cells x 30 genes .*gene_list="):
        small.plan(some_cells(2), hvg=5)
    monkeypatch.setitem(sys.modules, "skmisc.loess", None)
    with pytest.raises(InputError, match=r"scikit-misc.*pip install 'sae-jax\[single-cell\]'"):
        small.plan(CELLS, hvg=5)


# What is refused


def changed(**parts: Any) -> anndata.AnnData:
    cells = CELLS.copy()
    for name, value in parts.items():
        setattr(cells, name, value)
    return cells


ENSEMBL = [f"ENSG{i:011d}" for i in range(30)]


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (changed(var_names=ENSEMBL), {}, "wants gene symbols: name the column of var"),
        (changed(var_names=[f"x{i}" for i in range(30)]), {},
         "0 genes are in both, of 30 in the file and 40 of the model"),
        (changed(var_names=["G0", *GENES[:29]]), {}, r"1 genes occur more than once \(G0\)"),
        (changed(obs_names=["a"] * 12), {}, "1 cell names occur more than once"),
        (changed(X=CELLS.X * 0.5), {"values": "log1p"}, "must be raw counts for scGPT"),
        (CELLS, {"values": "given"}, "it looks like counts"),
        (changed(X=-CELLS.X.toarray()), {}, "negative values"),
        (changed(X=CELLS.X.toarray() * np.nan), {}, "NaN"),
        (CELLS, {"genes": "symbol"}, r"there is no var\['symbol'\]"),
        (CELLS, {"counts": "raw"}, r"there is no raw, and no layers\['raw'\]; layers: none"),
        (CELLS, {"counts": "more"}, r"there is no layers\['more'\]"),
        (CELLS, {"binning": True}, "no preprocessing binning; it has values"),
        (CELLS, {"values": "zscore"}, "values must be one of binned, log1p, given"),
        (CELLS, {"layers": 3}, "no layer 3; it has embedding, 0, 1, 2"),
        (CELLS, {"pooling": "max"}, "no pooling 'max'"),
        (CELLS, {"hvg": 31}, "hvg must be in 1 .. 30"),
        (CELLS, {"gene_list": ["G0", "nope"]}, "gene_list: nope are not in the vocabulary"),
        (CELLS, {"batch_size": 0}, "batch_size must be a whole number, at least 1, not 0"),
        (CELLS, {"max_length": "abc"}, "max_length must be a whole number, at least 2, not 'abc'"),
        (CELLS, {"hvg": 2.5}, "hvg must be a whole number, at least 1, not 2.5"),
        (CELLS, {"n_bins": 0}, "n_bins must be a whole number, at least 3, not 0"),
        (CELLS, {"seed": "a"}, "seed must be a whole number"),
        (CELLS, {"gene_list": "G0,G1"}, "gene_list must be a list of names, not 'G0,G1'"),
        (CELLS, {"gene_list": 7}, "gene_list must be a list of names, not 7"),
        (CELLS, {"cls": "no"}, "cls must be one of True, False, not 'no'"),
        (CELLS, {"cls_value": "0"}, "cls_value must be a number, not '0'"),
        (CELLS, {"hvg": 3, "hvg_flavor": "cell_ranger"}, "hvg_flavor must be one of"),
        (changed(X=CELLS.X.log1p()), {"values": "given", "hvg": 3, "hvg_flavor": "seurat_v3"},
         "'seurat_v3' wants raw counts"),
        (changed(X=CELLS.X.log1p()), {"hvg": 3}, "raw counts for the choice of variable genes"),
        (changed(X=CELLS.X.log1p()), {"duplicates": "sum"}, "raw counts for duplicates='sum'"),
        (changed(X=CELLS.X.log1p()), {"duplicates": "sum", "values": "given"},
         "duplicates='sum' adds up counts, and values='given' has none"),
        (CELLS, {"min_gene_coverage": 2}, "must be in 0 .. 1"),
        (CELLS, {"min_gene_coverage": "half"}, "must be in 0 .. 1, not 'half'"),
        (CELLS, {"layers": []}, "layers is empty"),
    ],
)  # fmt: skip
def test_bad_cells_and_options(
    small: ScGPT, cells: anndata.AnnData, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        small.embed(cells, **options)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_duplicates_are_summed_on_request(small: ScGPT) -> None:
    double = anndata.concat([CELLS, CELLS], axis=1)
    double.obs_names = CELLS.obs_names
    twice = changed(X=CELLS.X * 2)
    np.testing.assert_array_equal(small.embed(double, duplicates="sum")[2], small.embed(twice)[2])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
def test_counts_are_summed_before_anything_else(small: ScGPT, flavor: str) -> None:
    pytest.importorskip("skmisc")
    whole = some_cells(90, seed=3)
    part = np.random.default_rng(0).binomial(whole.X.toarray().astype(int), 0.4)
    whole.var_names = [*GENES[:24], *"uvwxyz"]  # unknown genes count towards a cell's total
    halves = [anndata.AnnData(x.astype(np.float32)) for x in (part, whole.X.toarray() - part)]
    for half in halves:
        half.var_names, half.obs_names = whole.var_names, whole.obs_names
    parts = anndata.concat(halves, axis=1)
    for options in ({}, {"hvg": 7, "hvg_flavor": flavor}):
        found = small.plan(parts, values="log1p", duplicates="sum", **options).read(slice(None))
        wanted = small.plan(whole, values="log1p", **options).read(slice(None))
        for ours, theirs in zip(found.ids, wanted.ids, strict=True):
            np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))
        for ours, theirs in zip(found.values, wanted.values, strict=True):
            np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-6)
    counts = whole.X.toarray()
    by_hand = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)[0, :24]
    plain = small.plan(parts, values="log1p", duplicates="sum").read(np.array([0]))
    np.testing.assert_allclose(plain.values[0][1:], by_hand[by_hand > 0], rtol=1e-6)


def test_empty_cells_are_refused_or_named(small: ScGPT) -> None:
    cells = CELLS.copy()
    cells.X[3] = 0
    with pytest.raises(InputError, match=r"1 cells express no gene of the model \(cell3\)"):
        small.embed(cells)
    states = small.embed(cells, empty_cells="nan")[2]
    assert np.isnan(states[3]).all()
    others = np.delete(np.arange(12), 3)
    np.testing.assert_allclose(states[others], small.embed(CELLS)[2][others], atol=1e-6)


def misshape(parts: dict[str, Any]) -> None:
    parts["weights"]["transformer_encoder.layers.1.linear1.weight"] = torch.zeros(3, 3)
    del parts["weights"]["value_encoder.norm.bias"], parts["weights"]["encoder.enc_norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misshape, "enc_norm.weight is missing.*norm.bias is missing.*linear1.weight is .3, 3."),
        (lambda p: p["vocab"].pop("G3"), "the ids are not 0"),
        (lambda p: p["vocab"].update(more=43), "44 tokens.*43 rows: they are of different models"),
        (lambda p: p["vocab"].update(G3="3"), "G3 have no whole number for an id"),
        (lambda p: p["args"].pop("nheads"), "nheads must be a whole number, at least 1, not None"),
        (lambda p: p["args"].update(nheads=0), "nheads must be a whole number, at least 1, not 0"),
        (lambda p: p["args"].update(n_bins="51"), "n_bins must be a whole number"),
        (lambda p: p["args"].update(pad_value="-2"), "pad_value must be a number"),
        (lambda p: p["args"].update(input_emb_style="category"), "input_emb_style 'category'"),
        (lambda p: p["args"].update(input_emb_style="log1p"), "input_emb_style 'log1p'"),
        (lambda p: p["args"].update(input_style="normed_raw"),
         "input_style 'normed_raw' is not supported, only binned, log1p"),
        (lambda p: p["weights"].update({"dsbn.bns.0.weight": torch.ones(3)}), "by batch"),
        (lambda p: p["weights"]["encoder.enc_norm.bias"].fill_(float("nan")), "holds NaN"),
        (lambda p: p.update(weights=[1]), "holds a list"),
    ],
)  # fmt: skip
def test_bad_checkpoints(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "m", change)
    with pytest.raises(InputError, match=message):
        extract.load_model("scgpt", folder)


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
def test_files_that_are_missing_or_cut(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=name):
        extract.load_model("scgpt", folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"there is no .*{name}"):
        extract.load_model("scgpt", folder)


def test_json_beyond_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "vocab.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(InputError, match=r"vocab\.json is no JSON: it is nested too deeply"):
        extract.load_model("scgpt", folder)
    monkeypatch.setattr(checkpoints, "_LARGEST_JSON", 50_000)
    with pytest.raises(InputError, match=r"vocab\.json has 0\.0954 MiB: too much"):
        extract.load_model("scgpt", folder)


def test_a_vocabulary_without_special_tokens_gets_the_authors(tmp_path: Path) -> None:
    def drop(parts: dict[str, Any]) -> None:
        parts["vocab"] = {k: v for k, v in parts["vocab"].items() if not k.startswith("<")}

    model = extract.load_model("scgpt", write_checkpoint(tmp_path / "m", drop))
    plain = extract.load_model("scgpt", write_checkpoint(tmp_path / "n"))
    np.testing.assert_array_equal(model.embed(CELLS)[2], plain.embed(CELLS)[2])


def test_values_are_what_the_checkpoint_was_trained_on(small: ScGPT, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", lambda p: p["args"].update(input_style="log1p"))
    model = extract.load_model("scgpt", folder)
    assert (small.values, model.values, model.naming) == ("any", "counts", "symbol")
    assert model.plan(CELLS).settings["values"] == "log1p"
    np.testing.assert_array_equal(model.embed(CELLS)[2], small.embed(CELLS, values="log1p")[2])


def test_genes_are_in_the_order_of_their_ids(small: ScGPT, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(43)

    def change(parts: dict[str, Any]) -> None:
        parts["vocab"] = {name: int(order[i]) for name, i in parts["vocab"].items()}
        rows = parts["weights"]["encoder.embedding.weight"]
        parts["weights"]["encoder.embedding.weight"] = rows[np.argsort(order)]

    model = extract.load_model("scgpt", write_checkpoint(tmp_path / "m", change))
    ids = [model.vocabulary[name] for name in model.genes]
    assert ids == sorted(ids)
    assert set(model.genes) == set(GENES)
    # What is drawn goes by id, so nothing is drawn here.
    options = {"values": "log1p", "select": "all"}
    np.testing.assert_allclose(
        model.embed(CELLS, **options)[2], small.embed(CELLS, **options)[2], atol=1e-5
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("of a test"),
        MemoryError(),
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code "
            "12 (Cannot allocate memory)"
        ),
        RuntimeError("mmap: Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_halves_the_batch(
    error: Exception,
    small: ScGPT,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, real, sizes = small.embed(CELLS)[2], small.forward, []

    def forward(inputs: Sequences, *args: Any) -> Any:
        sizes.append(len(inputs.ids))
        if len(inputs.ids) > 3:
            raise error
        return real(inputs, *args)

    monkeypatch.setattr(small, "forward", forward)
    monkeypatch.setattr(small, "_most_cells", None)
    np.testing.assert_allclose(small.embed(CELLS)[2], plain, atol=1e-6)
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert "out of memory: batches of 3 cells" in caplog.text
    sizes.clear()
    small.embed(CELLS, batch_size=5)
    assert sizes == [3, 3, 3, 3]


def test_memory_that_one_cell_does_not_find(small: ScGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(inputs: Sequences, *_: Any) -> Any:
        raise RuntimeError("out of memory" if len(inputs.ids) < 9 else "another")

    monkeypatch.setattr(small, "forward", forward)
    monkeypatch.setattr(small, "_most_cells", None)
    for size, message in ((9, "another"), (4, "out of memory")):
        with pytest.raises(RuntimeError, match=message):
            small.embed(CELLS, batch_size=size)

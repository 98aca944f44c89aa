"""The reader of scGPT against what the authors' own code computed on real cells."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import extract
from extract import InputError
from extract.models import scgpt_tokens
from extract.models.scgpt import ScGPT
from extract.models.sequences import Sequences
from tests.extract.small import CELLS, GENES, write_checkpoint


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
    inputs = small.plan(CELLS).read(slice(None))
    names = small.gene_names(inputs.gene_ids())
    expected = [GENES[j] for i in range(CELLS.n_obs) for j in CELLS.X[i].toarray()[0].nonzero()[0]]
    assert names.tolist() == expected
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
    with pytest.raises(InputError, match="tokens must be all, genes or cls"):
        small.run(CELLS, 1, edit, tokens="cls", cls=False)


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
        (changed(var_names=[f"x{i}" for i in range(30)]), {}, "0 of 30 genes of the file"),
        (changed(var_names=["G0", *GENES[:29]]), {}, r"1 genes occur more than once \(G0\)"),
        (changed(obs_names=["a"] * 12), {}, "1 cell names occur more than once"),
        (changed(X=CELLS.X * 0.5), {"values": "log1p"}, "must be raw counts for scGPT"),
        (CELLS, {"values": "given"}, "it looks like counts"),
        (changed(X=-CELLS.X.toarray()), {}, "negative values"),
        (changed(X=CELLS.X.toarray() * np.nan), {}, "NaN"),
        (CELLS, {"genes": "symbol"}, r"there is no var\['symbol'\]"),
        (CELLS, {"counts": "raw"}, r"there is no layers\['raw'\]"),
        (CELLS, {"binning": True}, "no preprocessing binning; it has values"),
        (CELLS, {"values": "zscore"}, "values must be one of binned, log1p, given"),
        (CELLS, {"layers": 3}, "no layer 3; it has embedding, 0, 1, 2"),
        (CELLS, {"pooling": "max"}, "no pooling 'max'"),
        (CELLS, {"hvg": 31}, "hvg must be in 1 .. 30"),
        (CELLS, {"gene_list": ["G0", "nope"]}, "gene_list: nope are not in the vocabulary"),
        (CELLS, {"batch_size": 0}, "batch_size must be at least 1"),
        (CELLS, {"min_gene_coverage": 2}, "must be in 0 .. 1"),
    ],
)
def test_bad_cells_and_options(
    small: ScGPT, cells: anndata.AnnData, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        small.embed(cells, **options)


def test_duplicates_are_summed_on_request(small: ScGPT) -> None:
    double = anndata.concat([CELLS, CELLS], axis=1)
    double.obs_names = CELLS.obs_names
    twice = changed(X=CELLS.X * 2)
    np.testing.assert_array_equal(small.embed(double, duplicates="sum")[2], small.embed(twice)[2])


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
        (lambda p: p["args"].pop("nheads"), "lacks whole numbers for nheads"),
        (lambda p: p["args"].update(input_emb_style="category"), "input_emb_style 'category'"),
        (lambda p: p["weights"].update({"dsbn.bns.0.weight": torch.ones(3)}), "by batch"),
        (lambda p: p["weights"]["encoder.enc_norm.bias"].fill_(float("nan")), "holds NaN"),
        (lambda p: p.update(weights=[1]), "holds a list"),
    ],
)
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


def test_a_vocabulary_without_special_tokens_gets_the_authors(tmp_path: Path) -> None:
    def drop(parts: dict[str, Any]) -> None:
        parts["vocab"] = {k: v for k, v in parts["vocab"].items() if not k.startswith("<")}

    model = extract.load_model("scgpt", write_checkpoint(tmp_path / "m", drop))
    plain = extract.load_model("scgpt", write_checkpoint(tmp_path / "n"))
    np.testing.assert_array_equal(model.embed(CELLS)[2], plain.embed(CELLS)[2])


def test_memory_that_runs_out_halves_the_batch(
    small: ScGPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, real, sizes = small.embed(CELLS)[2], small.forward, []

    def forward(inputs: Sequences, *args: Any) -> Any:
        sizes.append(len(inputs.ids))
        if len(inputs.ids) > 3:
            raise torch.OutOfMemoryError("of a test")
        return real(inputs, *args)

    monkeypatch.setattr(small, "forward", forward)
    np.testing.assert_allclose(small.embed(CELLS)[2], plain, atol=1e-6)
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert "out of memory: batches of 3 cells" in caplog.text

"""`python -m extract.main`: what it leaves and what it refuses."""

import errno
import importlib.metadata
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

import sae_jax.manifest
from extract import InputError, main, store
from extract.models.base import Model, Plan
from extract.models.vectors import Vectors
from tests.extract.small import CELLS, GENES, Program, expected, write_checkpoint


def test_stores_of_all_layers(program: Program, checkpoint: Path) -> None:
    out = program(layers="all", export="npy")
    plain = expected("all", "cls", checkpoint)
    assert {p.name for p in out.glob("*.zarr")} == {
        "embedding.zarr", "layer_00.zarr", "layer_01.zarr", "layer_02.zarr",
    }  # fmt: skip
    assert not (out / ".extracting").exists()
    assert sae_jax.manifest.check(out, "full") == 2 * len(plain)
    for layer, states in plain.items():
        path = out / f"{store.layer_name(layer)}.zarr"
        found = store.open(path)
        found.verify()
        np.testing.assert_allclose(found.X[:], states, atol=1e-6)
        assert found.extraction["layer"] == layer
        cells = anndata.read_zarr(path)
        np.testing.assert_array_equal(cells.X, found.X[:])
        assert cells.obs_names.tolist() == CELLS.obs_names.tolist()
        assert cells.obs["kind"].tolist() == ["a", "b", "c"] * 4
        np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), cells.X)
        assert path.with_suffix(".names.txt").read_text().split() == CELLS.obs_names.tolist()


def test_training_reads_it_without_torch(program: Program) -> None:
    path = program(layers="1") / "layer_01.zarr"
    code = (
        "import sys, numpy as np, sae_jax\n"
        "from sae_jax import data\n"
        f"rows = data.open_rows({str(path)!r})\n"
        "about = data.provenance(%r)\n"
        % str(path)
        + f"obs = data.load_obs({str(path)!r}, 'kind')\n"
        "assert rows.shape == (12, 16) and obs[1] == 'b', (rows.shape, obs)\n"
        "assert about['model'] == 'scgpt' and about['layer'] == 1 and about['pooling'] == 'cls'\n"
        "assert 'torch' not in sys.modules and 'extract' not in sys.modules\n"
        "configs = sae_jax.grid('vanilla', d_in=16, n_latents=8, l1_weight=.1, batch_size=4)\n"
        "run = sae_jax.train(configs, rows, epochs=2, provenance=about, progress=False)\n"
        "assert run.dictionaries[0].provenance['checkpoint_sha256']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_narrow_stores(program: Program, checkpoint: Path, dtype: str, tolerance: float) -> None:
    out = program(store_dtype=dtype)
    found = store.open(out / "layer_02.zarr").X[:]
    plain = expected(None, "cls", checkpoint)[2]
    np.testing.assert_allclose(found, plain, rtol=tolerance, atol=1e-6)
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        rounded = torch.as_tensor(plain).bfloat16().float().numpy()
        assert np.mean(found == rounded) > 0.99  # batches may round the last bit before


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32) ** 9
    values[:4] = [np.nan, np.inf, -np.inf, 0]
    np.testing.assert_array_equal(
        store.to_bfloat16(values), torch.as_tensor(values).bfloat16().float().numpy()
    )


def test_tokens_carry_cell_and_gene(program: Program, checkpoint: Path) -> None:
    out = program(pooling="tokens", layers="0,-1")
    plain = expected([0, 2], "tokens", checkpoint)
    for layer, states in plain.items():
        found = store.open(out / f"layer_{layer:02d}.zarr")
        np.testing.assert_allclose(found.X[:], states, atol=1e-6)
        counts = CELLS.X.toarray()
        names = [
            (cell, GENES[j])
            for i, cell in enumerate(CELLS.obs_names)
            for j in counts[i].nonzero()[0]
        ]
        assert list(zip(found.obs["cell"], found.obs["gene"], strict=True)) == names


def test_some_cells_and_options(program: Program, checkpoint: Path) -> None:
    out = program(
        obs_filter="filter_pass == 1 and kind != 'c'", limit=5, counts="counts",
        option=["max_length=7", "select=top", "cls=False", 'order="descending"'], pooling="mean",
    )  # fmt: skip
    chosen = CELLS[[1, 3, 4, 6, 7]].copy()
    found = store.open(out / "layer_02.zarr")
    assert found.obs.index.tolist() == chosen.obs_names.tolist()
    options = {"max_length": 7, "select": "top", "cls": False, "order": "descending"}
    np.testing.assert_allclose(
        found.X[:], expected(None, "mean", checkpoint, chosen, **options)[2], atol=1e-6
    )


def test_a_dry_run_writes_nothing(
    program: Program, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="absl"):
        out = program(dry_run=True, layers="all")
    assert not out.exists()
    text = capsys.readouterr().out
    assert "12 x 16 a layer" in text
    assert "cells/s" in text
    assert "coverage 1.0" in caplog.text
    assert "tokens a cell" in caplog.text


# Damage and refusals


def test_empty_cells(program: Program, tmp_path: Path) -> None:
    cells = CELLS.copy()
    values = cells.X.toarray()
    values[4] = 0
    cells.X = values
    cells.write_h5ad(tmp_path / "e.h5ad")
    with pytest.raises(InputError, match=r"1 cells express no gene of the model \(cell4\)"):
        program(h5ad=tmp_path / "e.h5ad")
    assert not list((tmp_path / "out").glob("*"))
    out = program(h5ad=tmp_path / "e.h5ad", empty_cells="nan")
    found = store.open(out / "layer_02.zarr")
    assert np.flatnonzero(np.isnan(found.X[:]).any(axis=1)).tolist() == [4]
    assert list(found.extraction["empty_cells"]) == ["cell4"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "--model is needed"),
        ({"model": "callable"}, "--model=callable reads a Python object"),
        ({"h5ad": "nowhere.h5ad"}, "nowhere.h5ad: there is no such file"),
        ({"h5ad": "extract"}, "extract: a folder, but no zarr store"),
        ({"h5ad": "setup.py"}, "setup.py: no HDF5 file"),
        ({"output": "setup.py"}, "setup.py cannot be written to"),
        ({"output": "setup.py/out"}, "setup.py/out cannot be written to .*setup.py is no folder"),
        ({"checkpoint": "nowhere"}, "the checkpoint nowhere is not a folder"),
        ({"layers": "7"}, "no layer 7"),
        ({"layers": "last"}, "no layer 'last'"),
        ({"layers": "--1"}, "no layer '--1'"),
        ({"layers": "1.5"}, "no layer '1.5'"),
        ({"pooling": "max"}, "no pooling 'max'"),
        ({"counts": "raw"}, r"no layers\['raw'\]; layers: counts"),
        ({"genes": "symbol"}, r"no var\['symbol'\]"),
        ({"option": ["lenght=3"]}, "no preprocessing lenght"),
        ({"option": ["max_length"]}, "KEY=VALUE is wanted"),
        ({"option": ["max_length=5", "max_length=6"]}, "max_length is given twice"),
        ({"option": ["device=cuda"]}, "that is no option"),
        ({"option": ["counts=raw"]}, "that is no option"),
        ({"option": ["cls=False"]}, "wants the <cls> token"),
        ({"obs_filter": "celltype == 1"}, "--obs_filter=celltype == 1"),
        ({"obs_filter": "filter_pass + 1"}, "not true or false"),
        ({"obs_filter": "filter_pass == 5"}, "no cell is left"),
        ({"dictionaries": "there"}, "scgpt has no option dictionaries"),
        ({"device": "cuda:77"}, "no device 'cuda:77'"),
    ],
)
def test_bad_flags(
    program: Program,
    given: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main, "survey", lambda *_: pytest.fail("cells were read"))
    with pytest.raises(InputError, match=message):
        program(**given)
    assert not (tmp_path / "out").exists()


def test_a_cut_file_of_cells(program: Program, cells_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.h5ad"
    content = cells_file.read_bytes()
    for size in (10, len(content) // 2, len(content) - 100):
        cut.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"cut\.h5ad(: no HDF5 file| cannot be read)"):
            program(h5ad=cut)


@pytest.mark.parametrize("kind", ["zarr", "dense zarr", "csc", "dense", "csc zarr"])
def test_other_forms_of_cells(
    program: Program, checkpoint: Path, kind: str, tmp_path: Path
) -> None:
    cells = CELLS.copy()
    if "csc" in kind:
        cells.X = cells.X.tocsc()
    elif "dense" in kind:
        cells.X = cells.X.toarray()
    cells.obs["kind"] = ["a", "b", "c"] * 4
    path = tmp_path / ("cells" if "zarr" in kind else "of.zarr.h5ad")  # names say nothing
    (cells.write_zarr if "zarr" in kind else cells.write_h5ad)(path)
    plain = expected(None, "cls", checkpoint)[2]
    found = store.open(program(h5ad=path) / "layer_02.zarr").X[:]
    np.testing.assert_allclose(found, plain, atol=1e-6)
    some = program(h5ad=path, output=tmp_path / "some", obs_filter="kind != 'b'")
    found = store.open(some / "layer_02.zarr").X[:]
    np.testing.assert_allclose(found, plain[np.arange(12) % 3 != 1], atol=1e-6)


def normalised(cells: anndata.AnnData) -> None:
    cells.X = np.log1p(cells.X.toarray() * 0.37)


def rename(*names: str) -> Callable[[anndata.AnnData], None]:
    def change(cells: anndata.AnnData) -> None:
        cells.var_names = [*names, *cells.var_names[len(names) :]]

    return change


def tabbed(cells: anndata.AnnData) -> None:
    cells.obs_names = ["a\tb", "c\nd", *cells.obs_names[2:]]


def same_cells(cells: anndata.AnnData) -> None:
    cells.obs_names = ["cell1", *cells.obs_names[1:]]


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (normalised, {"option": ["values=log1p"]}, "must be raw counts .* it looks normalised"),
        (lambda _: None, {"option": ["values=given"]}, "must be log1p-normalised .* like counts"),
        (rename(*(f"ENSG{i:011d}" for i in range(30))), {}, "The model wants gene symbols"),
        (rename(*"abcdefgh"), {"min_gene_coverage": 0.8}, "min_gene_coverage=0.8"),
        (rename("G1"), {}, r"occur more than once \(G1\)"),
        (same_cells, {}, r"1 cell names occur more than once \(cell1\)"),
        (
            tabbed,
            {"export": "npy"},
            r"--export: 2 names \(a\\tb, c d\) hold a tab, the end",
        ),
    ],
)
def test_cells_that_do_not_fit(
    program: Program, change: Callable[..., None], given: Any, message: str, tmp_path: Path
) -> None:
    cells = CELLS.copy()
    change(cells)
    cells.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(InputError, match=message) as caught:
        program(h5ad=tmp_path / "bad.h5ad", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def lacking(parts: dict[str, Any]) -> None:
    del parts["weights"]["encoder.enc_norm.bias"]
    parts["weights"]["value_encoder.norm.weight"] = torch.ones(3)


def longer(parts: dict[str, Any]) -> None:
    parts["vocab"]["another"] = len(parts["vocab"])


def more_than_tensors(parts: dict[str, Any]) -> None:
    parts["weights"]["x"] = types.SimpleNamespace()


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, "encoder.enc_norm.bias is missing; value_encoder.norm.weight is .3,., not .16,."),
        (longer, "vocab.json has 44 tokens .* has 43 rows"),
        (more_than_tensors, "best_model.pt is refused: it holds more than tensors"),
        (cut("best_model.pt"), "best_model.pt is damaged"),
        (cut("vocab.json"), "vocab.json is no JSON"),
        (cut("args.json"), "args.json is no JSON"),
    ],
)
def test_checkpoints_that_do_not_fit(
    program: Program, change: Callable[..., None], message: str, tmp_path: Path
) -> None:
    of_parts = change in (lacking, longer, more_than_tensors)
    folder = write_checkpoint(tmp_path / "c", *([change] if of_parts else []))
    if not of_parts:
        change(folder)
    with pytest.raises(InputError, match=message) as caught:
        program(checkpoint=folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_extra_weights_are_only_warned_of(program: Program, tmp_path: Path) -> None:
    def more(parts: dict[str, Any]) -> None:
        parts["weights"]["spare"] = torch.ones(2)

    folder = write_checkpoint(tmp_path / "c", more)
    with pytest.warns(UserWarning, match="not used: spare"):
        program(checkpoint=folder)


def test_a_folder_that_may_not_be_written_to(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)  # root may write anywhere
    monkeypatch.setattr(main, "survey", lambda *_: pytest.fail("cells were read"))
    with pytest.raises(InputError, match=f"permission denied for {re.escape(str(tmp_path))}"):
        program(output=tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("bad"), 2, "error: bad"),
        (PermissionError(13, "denied", "f"), 1, "error: f cannot be read or written: Permission"),
        (OSError(errno.ENOSPC, "full", "f"), 1, "error: f cannot be read or written: No space"),
        (RuntimeError("(file write failed: errno = 28)"), 1, "error: "),  # HDF5's, say
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(main, "main", fail)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `run` sets another
    with pytest.raises(SystemExit) as stopped:
        main.run(["program"])
    assert stopped.value.code == status
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line)


# Readers of one's own


class Own(Model):
    """The first genes' values times `scale`; of pooling "bad" too few rows."""

    name, poolings, n_layers, d_model, checkpoint = "own", ("latent", "bad"), 0, 3, {}
    genes = GENES

    def __init__(
        self, folder: Path, *, scale: float = 1, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        self.device, self.scale = torch.device(device), scale

    def plan(self, adata: Any, genes: Any = None, counts: Any = None, **options: Any) -> Plan:
        options["hvg"] = adata.n_obs  # stands for what is computed over all cells

        def read(rows: Any) -> Vectors:
            at = np.arange(adata.n_obs)[rows] if adata.chosen is None else adata.chosen[rows]
            return Vectors((np.asarray(adata.X[at].todense()),))

        return Plan(list(adata.obs_names), read, options)

    def forward(self, inputs: Any, layers: Any, pooling: str, *_: Any) -> Any:
        rows = torch.as_tensor(inputs.parts[0][:, :3]).float() * self.scale
        return dict.fromkeys(layers, rows[:, :2] if pooling == "bad" else rows), {}


@pytest.fixture
def own(program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Own=Own))
    (tmp_path / "own").mkdir()
    return lambda **given: program(model="mine:Own", checkpoint=tmp_path / "own", **given)


def test_options_go_where_they_are_taken(own: Program) -> None:
    out = own(option=["scale=2.5", "note=some"])
    found = store.open(out / "latent.zarr")
    np.testing.assert_allclose(found.X[:], CELLS.X[:, :3].toarray() * 2.5)
    assert found.extraction["preprocessing"] == {"hvg": 12, "note": "some"}


def test_a_plan_is_made_of_the_chosen_cells_alone(own: Program) -> None:
    found = store.open(own(obs_filter="kind == 'b'", limit=3) / "latent.zarr")
    assert found.extraction["preprocessing"] == {"hvg": 3}
    np.testing.assert_allclose(found.X[:], CELLS.X[[1, 4, 7], :3].toarray())


def test_a_model_that_cannot_work_fails_before_anything_is_written(
    own: Program, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"own gives rows \(1, 2\) .* pooling 'bad' .* 'cell0'"):
        own(pooling="bad")
    with pytest.raises(InputError, match=r"where .* finite ones are wanted"):
        own(option=["scale=NaN"])
    assert not (tmp_path / "out").exists()


def test_where_rows_come_from(own: Program, tmp_path: Path) -> None:
    found = store.open(own() / "latent.zarr").extraction
    assert found["device"] == "cpu"
    for name in ("numpy", "torch", "sae-jax"):
        assert found["versions"][name] == importlib.metadata.version(name)
    again = own(output=tmp_path / "again", min_gene_coverage=0.1, obs_filter="filter_pass > -1")
    again = store.open(again / "latent.zarr").extraction
    assert again["min_gene_coverage"] == 0.1
    assert again["identity"] == found["identity"]
    other = own(output=tmp_path / "other", option=["scale=3", "note=some"])
    assert store.open(other / "latent.zarr").extraction["identity"] != found["identity"]

"""Readers of one's own: the README's class, and any torch module."""

import re
import sys
import types
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver

import extract
from extract import InputError, main, store
from tests.extract.small import CELLS

README = Path(extract.__file__).parents[1] / "README.md"


@pytest.fixture
def projection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The README's reader as the module `mine`, and a checkpoint for it."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class Projection(Model)" in block]
    mine = types.ModuleType("mine")
    exec(code, mine.__dict__)
    monkeypatch.setitem(sys.modules, "mine", mine)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weights = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    np.savez(folder / "weights.npz", W=weights, genes=np.asarray(CELLS.var_names[::-1], str))
    return folder


def latents(folder: Path, cells: anndata.AnnData = CELLS) -> np.ndarray:
    file = np.load(folder / "weights.npz")
    return np.log1p(cells[:, file["genes"]].X.toarray()) @ file["W"]


def test_the_readers_30_lines(projection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract, "MODELS", dict(extract.MODELS))
    extract.register("projection", sys.modules["mine"].Projection)
    model = extract.load_model("projection", projection)
    expected = latents(projection)
    found = model.embed(CELLS)
    assert list(found) == ["latent"]
    np.testing.assert_allclose(found["latent"], expected, atol=1e-5)
    moved = model.embed(CELLS[::-1, ::-1].copy(), batch_size=5)["latent"]
    np.testing.assert_allclose(moved, expected[::-1], atol=1e-5)
    run = model.run(CELLS, "latent", lambda rows: rows * 2)
    np.testing.assert_allclose(run.hidden["latent"], 2 * expected, rtol=1e-5)
    scaled = CELLS.copy()
    scaled.X = scaled.X * 0.3
    with pytest.raises(InputError, match="must be raw counts for projection"):
        model.embed(scaled)


def test_the_program_takes_it(projection: Path, tmp_path: Path) -> None:
    CELLS.write_h5ad(tmp_path / "cells.h5ad")
    words = {
        "model": "mine:Projection", "checkpoint": projection, "h5ad": tmp_path / "cells.h5ad",
        "output": tmp_path / "out",
    }  # fmt: skip
    with flagsaver.flagsaver():
        main.define_flags()
        flags.FLAGS(["program", *(f"--{k}={v}" for k, v in words.items())])
        main.main()
    found = store.open(tmp_path / "out/latent.zarr")
    np.testing.assert_allclose(found.X[:], latents(projection), atol=1e-5)


def test_rows_of_other_weights_or_options_are_not_taken_for_finished(
    projection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the reader names no hashes of its files."""
    CELLS.write_h5ad(tmp_path / "cells.h5ad")

    class Scaled(sys.modules["mine"].Projection):
        def __init__(self, folder: Path, *, scale: float = 1.0, **more: str) -> None:
            super().__init__(folder, **more)
            self.w = self.w * scale

    monkeypatch.setattr(sys.modules["mine"], "Scaled", Scaled, raising=False)

    def extracted(*words: str) -> np.ndarray:
        with flagsaver.flagsaver():
            main.define_flags()
            flags.FLAGS(
                ["program", "--model=mine:Scaled", f"--checkpoint={projection}",
                 f"--h5ad={tmp_path / 'cells.h5ad'}", f"--output={tmp_path / 'out'}", *words]
            )  # fmt: skip
            main.main()
        return store.open(tmp_path / "out/latent.zarr").X[:]

    first = extracted("--option=scale=2")
    with pytest.raises(InputError, match="scale=2"):
        extracted("--option=scale=3")
    file = dict(np.load(projection / "weights.npz"))
    np.savez(projection / "weights.npz", **file | {"W": file["W"] + 1})
    with pytest.raises(InputError, match="checkpoint_sha256"):
        extracted("--option=scale=2")
    assert not np.allclose(extracted("--option=scale=2", "--overwrite"), first)


@pytest.mark.parametrize("name", ["nobody", "mine:Nobody", "no.such.module:Model"])
def test_models_that_are_not_there(projection: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}'"):
        extract.load_model(name, projection)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(30, 6)
        self.tokens = torch.nn.Linear(1, 3)
        self.last = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.tokens(torch.relu(self.first(x)).unsqueeze(-1))))


def inputs(cells: anndata.AnnData) -> torch.Tensor:
    return torch.log1p(torch.as_tensor(cells.X.toarray()))


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_any_module_at_its_hooks(pooling: str) -> None:
    network = Network()
    model = extract.load_model(
        "callable", network, hooks=["first", "tokens", "last"], inputs=inputs
    )
    found = model.embed(CELLS, "all", pooling, batch_size=5)
    with torch.no_grad():
        first = network.first(inputs(CELLS))
        tokens = network.tokens(torch.relu(first).unsqueeze(-1))
        last = network.last(torch.relu(tokens))
    np.testing.assert_allclose(found[0], first.numpy(), atol=1e-6)
    for layer, states in ((1, tokens), (2, last)):
        pooled = states[:, 0] if pooling == "first" else states.mean(dim=1)
        np.testing.assert_allclose(found[layer], pooled.numpy(), atol=1e-6)
    run = model.run(CELLS, 0, lambda rows: rows * 0, "all", pooling)
    assert not run.hidden[0].any()
    silent = network.last(torch.relu(network.tokens(torch.zeros(1, 1, 1))))[0, 0]
    np.testing.assert_allclose(run.hidden[2], np.tile(silent.detach().numpy(), (12, 1)), atol=1e-6)
    assert not network.first._forward_hooks


def test_bad_hooks_and_inputs() -> None:
    with pytest.raises(InputError, match=r"no submodule second; there are .*first, tokens, last"):
        extract.load_model("callable", Network(), hooks=["second"], inputs=inputs)
    model = extract.load_model(
        "callable", Network(), hooks=["first"], inputs=lambda cells: inputs(cells)[:3]
    )
    with pytest.raises(InputError, match="one row for each cell"):
        model.embed(CELLS)

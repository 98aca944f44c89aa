"""Modules of one's own: what is stored stays as it was, and what is misused is said."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse
import torch

import extract
from extract import InputError, cells
from tests.extract.small import CELLS, write_checkpoint


class InPlace(torch.nn.Module):
    """Doubles its hidden states in place, after a hook has seen them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unused = torch.nn.Linear(30, 6), torch.nn.Linear(6, 6)
        self.words, self.flat = torch.nn.Identity(), torch.nn.Flatten(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        tokens = self.words(hidden.unflatten(-1, (2, 3)) + 0)
        hidden.mul_(2)
        tokens.mul_(2)
        self.flat(tokens)
        return hidden


def expression(cells: anndata.AnnData) -> torch.Tensor:
    return torch.as_tensor(cells.X.toarray())


def load(**options: Any) -> Any:
    call = {"hooks": ["first", "words"], "inputs": expression} | options
    return extract.load_model("callable", call.pop("module", None) or InPlace(), **call)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_what_follows_in_place_changes_nothing(pooling: str) -> None:
    model = load()
    with torch.no_grad():
        wanted = model.module.first(expression(CELLS)).numpy()
    words = wanted.reshape(-1, 2, 3)
    words = words[:, 0] if pooling == "first" else words.mean(axis=1)
    for edit in (None, lambda rows: rows):
        found = model.run(CELLS, 0, edit, "all", pooling).hidden
        np.testing.assert_allclose(found[0], wanted, rtol=1e-5)
        np.testing.assert_allclose(found[1], words, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["backed", "dask", "lazy", "view"])
def test_cells_wherever_they_are_come_in_memory(way: str, tmp_path: Path) -> None:
    """`inputs` may do with them what it likes: they are an AnnData like any other."""
    whole = CELLS.copy()
    whole.obsm["map"] = np.arange(24.0).reshape(12, 2)
    whole.layers["dense"], whole.raw = whole.X.toarray(), CELLS.copy()
    seen: list[anndata.AnnData] = []

    def inputs(some: anndata.AnnData) -> torch.Tensor:
        seen.append(some.copy())
        np.testing.assert_array_equal(some.X.toarray(), some.layers["dense"])
        np.testing.assert_array_equal(some.raw.X.toarray(), some.layers["dense"])
        values = some.to_df().to_numpy() + some.obsm["map"][:, :1]
        return torch.as_tensor(values.astype(np.float32))

    rows = np.array([1, 2, 7])
    wanted = load(inputs=inputs).embed(whole[rows].copy(), 0)[0]
    whole.write_h5ad(tmp_path / "a.h5ad")
    if way == "dask":
        array = pytest.importorskip("dask.array")
        there, dense = whole, array.from_array(whole.X.toarray(), chunks=(5, 30))
        there.X = dense.map_blocks(scipy.sparse.csr_matrix)
    elif way == "lazy":
        pytest.importorskip("xarray")
        there = anndata.experimental.read_lazy(tmp_path / "a.h5ad")
    else:
        there = anndata.read_h5ad(tmp_path / "a.h5ad", backed=None if way == "view" else "r")
    matrix = there.X
    some = there[rows] if way == "view" else cells.restrict(there, rows)
    np.testing.assert_array_equal(load(inputs=inputs).embed(some, 0)[0], wanted)
    assert [list(each.obs_names) for each in seen] == [["cell1", "cell2", "cell7"]] * 2
    if way == "backed":
        load(inputs=inputs).embed(there, 0)
        assert matrix[[3]].shape == (1, 30)  # the file is still open


def test_cells_that_anndata_gives_no_parts_of(tmp_path: Path) -> None:
    CELLS.write_h5ad(tmp_path / "a.h5ad")
    part = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")[np.array([1, 3])]
    with pytest.raises(InputError, match=r"take extract\.cells\.restrict\(adata, rows\) instead"):
        load().embed(part)
    with pytest.raises(InputError, match="this model reads an AnnData: open the file by anndata"):
        load().embed(cells.open_backed(str(tmp_path / "a.h5ad"), None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": {}, "hooks": "first"}, "hooks must be a list of names of submodules"),
        ({"hooks": []}, "hooks must be a list of names"),
        ({"hooks": [0]}, "hooks must be a list of names"),
        ({"inputs": "X"}, "inputs must be a function of an AnnData, not a str"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(**options)


def test_what_is_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InputError, match="callable needs the options hooks, inputs"):
        extract.load_model("callable", InPlace())
    for wrong in ("folder", {"a": 1}):
        with pytest.raises(InputError, match=r"callable reads a torch module, not a (str|dict)"):
            load(module=wrong)
    with pytest.raises(InputError, match="scgpt reads a folder, not a InPlace"):
        extract.load_model("scgpt", InPlace())
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "scgpt")
    with pytest.raises(InputError, match="scgpt has no option hooks"):
        extract.load_model("scgpt", folder, hooks=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": lambda cells: cells.X.toarray()}, "inputs must return tensors, not ndarray"),
        ({"inputs": lambda cells: None}, "inputs must return tensors, not NoneType"),
        ({"hooks": ["unused"]}, "unused did not run"),
        ({"hooks": ["flat"]}, r"output of flat must be a tensor \[12 cells, d\].*not \(72,\)"),
    ],
)
def test_modules_that_do_something_else(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(**options).embed(CELLS, 0)

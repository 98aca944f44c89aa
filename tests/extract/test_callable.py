"""Modules of one's own: what is stored stays as it was, and what is misused is said."""

from typing import Any

import anndata
import numpy as np
import pytest
import torch

import extract
from extract import InputError
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

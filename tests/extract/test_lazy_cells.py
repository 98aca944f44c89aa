"""Cells in a file, or in dask arrays, give the rows that cells in memory give, to the bit."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import extract
from extract import InputError, cells, store
from extract.models import base
from extract.models.scgpt import ScGPT
from tests.extract.small import CELLS, Program, some_cells, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
N = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ScGPT:
    return extract.load_model("scgpt", write_checkpoint(tmp_path_factory.mktemp("m") / "scgpt"))


def made(form: Callable = scipy.sparse.csr_matrix) -> anndata.AnnData:
    adata = some_cells(N)
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel()
    adata.raw = adata.copy()
    adata.X = form(adata.X.toarray())
    adata.layers["counts"] = adata.X.copy()
    return adata


def backed(adata: anndata.AnnData, folder: Path) -> anndata.AnnData:
    adata.write_h5ad(folder / "a.h5ad")
    return anndata.read_h5ad(folder / "a.h5ad", backed="r")


def lazy(adata: anndata.AnnData, folder: Path, ending: str = "zarr") -> anndata.AnnData:
    pytest.importorskip("dask.array")
    pytest.importorskip("xarray")
    path = folder / f"a.{ending}"
    (adata.write_zarr if ending == "zarr" else adata.write_h5ad)(path)
    return anndata.experimental.read_lazy(path)


def chunks(adata: anndata.AnnData, _: Path) -> anndata.AnnData:
    array = pytest.importorskip("dask.array")
    adata.X = array.from_array(adata.X.toarray(), chunks=(7, 11))
    return adata


WAYS = {
    "backed": backed,
    "lazy": lazy,
    "lazy h5ad": lambda adata, folder: lazy(adata, folder, "h5ad"),
    "dask": chunks,
}


@pytest.mark.parametrize("counts", [None, "counts", "raw"])
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_cells_in_memory(
    way: str, counts: str | None, model: ScGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BLOCK_CELLS", 16)
    expected = model.embed(made(), "all", counts=counts)
    there = WAYS[way](made(), tmp_path)
    found = model.embed(there, "all", counts=counts)
    for layer, rows in expected.items():
        np.testing.assert_array_equal(found[layer], rows)
    some = np.asarray([1, 2, 3, 9, 30])
    few = model.embed(cells.restrict(there, some), 1, counts=counts)
    np.testing.assert_array_equal(few[1], model.embed(made()[some].copy(), 1, counts=counts)[1])
    names = model.tokens(there, counts=counts)
    pd.testing.assert_frame_equal(names, model.tokens(made(), counts=counts))


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csc_matrix])
@pytest.mark.parametrize("way", ["backed", "lazy"])
def test_matrices_of_other_kinds(way: str, form: Callable, model: ScGPT, tmp_path: Path) -> None:
    expected = model.embed(made(), 1)[1]
    np.testing.assert_array_equal(model.embed(WAYS[way](made(form), tmp_path), 1)[1], expected)


@pytest.mark.parametrize("way", ["backed", "lazy", "file"])
def test_columns_are_read_once_and_that_is_told(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some cells of a CSC matrix cannot be read without the others."""
    wanted = made().X.toarray()
    if way == "file":
        made(scipy.sparse.csc_matrix).write_h5ad(tmp_path / "a.h5ad")
        there = cells.open_backed(str(tmp_path / "a.h5ad"), None)
    else:
        there = WAYS[way](made(scipy.sparse.csc_matrix), tmp_path)
    reads: list[str] = []
    by_rows = cells._by_rows
    monkeypatch.setattr(cells, "_by_rows", lambda *a: (reads.append(a[1]), by_rows(*a))[1])
    expression = cells.Expression(there, None)
    monkeypatch.setattr(cells, "_BLOCK", 7)
    for _ in range(2):
        blocks = [block.toarray() for block in expression.all_rows()]
        np.testing.assert_array_equal(np.concatenate(blocks), wanted)
    assert reads == ([] if way == "file" else ["X"])
    assert "X (40 x 30) is stored by columns (CSC), of which no cells can be read" in caplog.text
    assert " MiB in memory" in caplog.text


def test_hidden_states_are_never_in_memory_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK_CELLS", 64)
    n, width = 1024, 512
    module = torch.nn.Sequential(torch.nn.Linear(4, width))
    adata = anndata.AnnData(np.ones((n, 4), np.float32))
    adata.obs_names = [f"cell{i}" for i in range(n)]
    reader = extract.load_model(
        "callable", module, hooks=["0"], inputs=lambda some: torch.as_tensor(np.asarray(some.X))
    )
    reader.embed(adata[:128].copy())
    tracemalloc.start()
    found = reader.embed(adata)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (n, width)
    assert found.nbytes < peak < 1.5 * found.nbytes


def test_blocks_change_rows_by_rounding_alone(
    model: ScGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.embed(made(), 2)[2]
    tokens = model.embed(made(), 2, "tokens")[2]
    monkeypatch.setattr(base, "BLOCK_CELLS", 7)
    np.testing.assert_allclose(model.embed(made(), 2)[2], whole, atol=1e-5)
    np.testing.assert_allclose(model.embed(made(), 2, "tokens")[2], tokens, atol=1e-5)


def test_an_empty_cell_in_the_last_block_is_refused_before_any_is_run(
    model: ScGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BLOCK_CELLS", 16)
    adata = made()
    adata.X[N - 1] = 0
    monkeypatch.setattr(model, "forward", lambda *_: pytest.fail("a cell was run"))
    with pytest.raises(InputError, match=f"cell{N - 1}"):
        model.embed(adata)


def test_the_program_reads_zarr_as_it_does_h5ad(program: Program, tmp_path: Path) -> None:
    CELLS.write_zarr(tmp_path / "cells.zarr")
    one = store.open(program(output=tmp_path / "one") / "layer_02.zarr")
    two = store.open(
        program(h5ad=tmp_path / "cells.zarr", output=tmp_path / "two") / "layer_02.zarr"
    )
    np.testing.assert_array_equal(one.X[:], two.X[:])

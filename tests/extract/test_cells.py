"""Expression out of AnnData objects and files: raw, some cells alone, kinds of numbers."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import extract
from extract import InputError, cells
from extract.cells import Expression
from extract.models.scgpt import ScGPT
from tests.extract.small import GENES, some_cells, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2 data")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ScGPT:
    return extract.load_model("scgpt", write_checkpoint(tmp_path_factory.mktemp("m") / "scgpt"))


@pytest.fixture(params=["csr", "csc", "dense"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["h5ad", "zarr"])
def ending(request: pytest.FixtureRequest) -> str:
    return request.param


def made(kind: str = "csr") -> anndata.AnnData:
    """Counts of 30 genes in raw, log1p of the last 20 of them in X, in other columns."""
    whole = some_cells(40)
    whole.var["symbol"] = whole.var_names.to_numpy()
    whole.var_names = [f"id{i}" for i in range(30)]
    if kind != "csr":
        whole.X = whole.X.tocsc() if kind == "csc" else whole.X.toarray()
    few = whole[:, :9:-1].copy()
    few.raw = whole
    few.X = few.X.log1p() if scipy.sparse.issparse(few.X) else np.log1p(few.X)
    return few


def opened(adata: anndata.AnnData, ending: str, folder: Path, layer: str | None) -> anndata.AnnData:
    path = folder / f"cells.{ending}"
    (adata.write_h5ad if ending == "h5ad" else adata.write_zarr)(path)
    return cells.open_backed(str(path), layer)


def test_raw_has_genes_of_its_own(model: ScGPT, kind: str, ending: str, tmp_path: Path) -> None:
    adata, counts = made(kind), some_cells(40).X.toarray()
    lazy = opened(adata, ending, tmp_path, "raw")
    rows = np.array([3, 4, 17])
    for source in (adata, lazy):
        found = Expression(source, "raw")
        assert found.var["symbol"].tolist() == GENES[:30]
        np.testing.assert_array_equal(found.rows(slice(None)).toarray(), counts)
        np.testing.assert_array_equal(found.rows(rows).toarray(), counts[rows])
        some = Expression(cells.restrict(source, rows), "raw")
        np.testing.assert_array_equal(some.rows(slice(1, None)).toarray(), counts[rows[1:]])
    wanted = model.embed(some_cells(40))[2]
    np.testing.assert_array_equal(model.embed(adata, genes="symbol", counts="raw")[2], wanted)
    edited = model.run(adata, 1, None, genes="symbol", counts="raw").hidden[2]
    np.testing.assert_array_equal(edited, wanted)
    named = model.tokens(adata, "symbol", "raw")
    pd.testing.assert_frame_equal(named, model.tokens(some_cells(40)))


def test_raw_that_is_not_one(tmp_path: Path) -> None:
    adata = made()
    adata.layers["raw"] = adata.X
    with pytest.raises(InputError, match=r"adata\.raw or layers\['raw'\]: rename the layer"):
        Expression(adata, "raw")
    del adata.raw
    assert Expression(adata, "raw").where == "layers['raw']"
    del adata.layers["raw"]
    for layer, message in (
        ("raw", r"there is no raw, and no layers\['raw'\]; layers: none"),
        ("x", r"there is no layers\['x'\]; layers: none"),
    ):
        with pytest.raises(InputError, match=message):
            Expression(adata, layer)
        with pytest.raises(InputError, match=f"cells.h5ad: {message}"):
            opened(adata, "h5ad", tmp_path, layer)


def test_some_cells_alone(kind: str, ending: str, tmp_path: Path) -> None:
    adata = some_cells(40)
    counts = adata.X.toarray()
    adata.obs["kind"] = list("ab") * 20
    if kind != "csr":
        adata.X = adata.X.tocsc() if kind == "csc" else counts
    lazy = opened(adata, ending, tmp_path, None)
    rows = np.array([2, 5, 6, 7, 30, 39])
    for source in (adata, lazy):
        some = cells.restrict(source, rows)
        assert some.obs["kind"].tolist() == [list("ab")[i % 2] for i in rows]
        assert some.n_obs == 6
        found = Expression(some, None)
        assert found.names == [f"cell{i}" for i in rows]
        for which in (slice(None), slice(1, 4), np.array([0, 3, 5]), np.array([1, 2, 3])):
            np.testing.assert_array_equal(found.rows(which).toarray(), counts[rows][which])
        fewer = Expression(cells.restrict(some, np.array([0, 4])), None)
        np.testing.assert_array_equal(fewer.rows(slice(None)).toarray(), counts[[2, 30]])


def test_a_bad_value_is_of_the_cell_that_has_it(tmp_path: Path) -> None:
    adata = some_cells(40)
    adata.X[30, 0] = -1
    lazy = opened(adata, "h5ad", tmp_path, None)
    some = Expression(cells.restrict(lazy, np.array([2, 30, 39])), None)
    with pytest.raises(InputError, match="negative one in cell 'cell30'"):
        some.rows(slice(1, None))


def test_variable_genes_are_of_the_chosen_cells(model: ScGPT, tmp_path: Path) -> None:
    pytest.importorskip("skmisc")
    adata, rows = some_cells(120, seed=3), np.arange(1, 120, 2)
    adata.X = adata.X.toarray()
    adata.X[::2, :9] *= 50  # in the others these genes vary most
    adata.X = scipy.sparse.csr_matrix(adata.X)
    lazy = opened(adata, "h5ad", tmp_path, None)
    options = {"hvg": 8, "select": "all"}
    found = model.plan(cells.restrict(lazy, rows), **options)
    wanted = model.plan(adata[rows].copy(), **options)
    assert found.settings == wanted.settings
    of_all = model.plan(lazy, **options).settings
    assert of_all["candidates_sha256"] != wanted.settings["candidates_sha256"]


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, bool, np.int64])
def test_kinds_of_numbers(model: ScGPT, dtype: type, tmp_path: Path) -> None:
    adata = some_cells(12)
    counts = adata.X.toarray().astype(dtype)
    adata.X = counts.astype(np.float32)
    wanted = model.embed(adata, values="log1p")[2]
    adata.X = counts
    np.testing.assert_array_equal(model.embed(adata, values="log1p")[2], wanted)
    lazy = Expression(opened(adata, "h5ad", tmp_path, None), None)
    np.testing.assert_array_equal(lazy.rows(np.array([1, 5])).toarray(), counts[[1, 5]])


def test_no_numbers() -> None:
    adata = some_cells(3)
    adata.layers["text"] = np.full(adata.shape, "1", object)
    adata.layers["complex"] = adata.X.toarray().astype(np.complex64)
    for layer, dtype in (("text", "object"), ("complex", "complex64")):
        with pytest.raises(InputError, match=f"'{layer}'.* holds {dtype}, not numbers"):
            Expression(adata, layer)

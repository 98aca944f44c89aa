from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from sae_jax import InputError, data

X = np.random.default_rng(0).poisson(0.7, (12, 5)).astype(np.float32)
PCA = np.random.default_rng(1).normal(size=(12, 3))


def _cells(x: Any = X) -> anndata.AnnData:
    frame = pd.DataFrame({"a": np.arange(12.0)}, index=[str(i) for i in range(12)])
    obsm = {"X_pca": PCA, "X_bad": np.full((12, 2), np.nan), "X_sparse": sparse.csr_matrix(PCA)}
    return anndata.AnnData(x, obsm={**obsm, "frame": frame}, layers={"log": np.log1p(X)})


def _write(path: Path, cells: anndata.AnnData) -> str:
    if path.suffix == ".zarr":
        cells.write_zarr(path)
    else:
        cells.write_h5ad(path)
    return str(path)


@pytest.fixture(params=["cells.h5ad", "cells.zarr"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64])
def test_npy_is_read_as_it_is_written(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "rows.npy", X.astype(dtype))
    found = data.load(str(tmp_path / "rows.npy"))
    assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_array_equal(found, X)


def test_obsm_layers_and_x_are_found(store: Path) -> None:
    path = _write(store, _cells())
    np.testing.assert_array_equal(data.load(f"{path}:obsm/X_pca"), PCA)
    np.testing.assert_array_equal(data.load(f"{path}:obsm/X_sparse"), PCA)
    np.testing.assert_array_equal(data.load(f"{path}:layers/log"), np.log1p(X))
    np.testing.assert_array_equal(data.load(f"{path}:X"), X)
    np.testing.assert_array_equal(data.load(path), X)


@pytest.mark.parametrize("encode", [sparse.csr_matrix, sparse.csc_matrix])
def test_sparse_matrices_become_dense(store: Path, encode: Any) -> None:
    np.testing.assert_array_equal(data.load(_write(store, _cells(encode(X)))), X)


def test_what_is_no_matrix_is_refused_with_what_there_is(store: Path) -> None:
    path = _write(store, _cells())
    with pytest.raises(InputError, match=r"no 'obsm/X_scvi'; there are X, .*obsm/X_pca"):
        data.load(f"{path}:obsm/X_scvi")
    with pytest.raises(InputError, match="dataframe, not a matrix"):
        data.load(f"{path}:obsm/frame")
    with pytest.raises(InputError, match=r"24 NaN or infinite values in 12 of 12 rows"):
        data.load(f"{path}:obsm/X_bad")


@pytest.mark.parametrize("name", ["none.npy", "none.h5ad:obsm/X_pca", "none.zarr"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"there is no file .*none\.(npy|h5ad|zarr)$"):
        data.load(str(tmp_path / name))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("1,2\n")
    with pytest.raises(InputError, match=r"rows are read from \.npy, \.h5ad or \.zarr"):
        data.load(str(tmp_path / "rows.csv"))


def test_an_array_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(3.0))
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        data.load(str(tmp_path / "rows.npy"))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_pickled_array_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "rows.npy", np.asarray([[_Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"rows\.npy is no readable \.npy file"):
        data.load("rows.npy")
    assert not (tmp_path / "exploded").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", X)
    whole = (tmp_path / "rows.npy").read_bytes()
    for name, content in {
        "short.npy": whole[:-7],
        "empty.npy": b"",
        "text.npy": b"1 2 3\n",
        "text.h5ad": b"1 2 3\n",
        "empty.h5ad": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            data.load(str(tmp_path / name))
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputError, match=r"empty\.zarr"):
        data.load(str(tmp_path / "empty.zarr"))


def test_a_store_without_obsm_says_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "plain.h5ad", "w") as file:
        file["X"] = X
    zarr.save_group(str(tmp_path / "plain.zarr"), X=X)
    for name in ("plain.h5ad", "plain.zarr"):
        np.testing.assert_array_equal(data.load(str(tmp_path / name)), X)
        with pytest.raises(InputError, match="no 'obsm/X_pca'; there are X"):
            data.load(f"{tmp_path / name}:obsm/X_pca")


def test_obsm_of_an_old_file_is_found(tmp_path: Path) -> None:
    rows = np.rec.fromarrays([PCA.astype(np.float32)], dtype=[("X_pca", np.float32, (3,))])
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["X"], file["obsm"] = X, rows
    found = data.load(f"{tmp_path / 'old.h5ad'}:obsm/X_pca")
    np.testing.assert_array_equal(found, PCA.astype(np.float32))

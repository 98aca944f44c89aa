import json
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
        with anndata.settings.override(zarr_write_format=3 if "3" in path.stem else 2):
            cells.write_zarr(path)
    else:
        cells.write_h5ad(path)
    return str(path)


@pytest.fixture(params=["cells.h5ad", "cells.zarr", "cells3.zarr"])
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


def test_rows_of_a_store_are_read_by_slices(store: Path) -> None:
    path = _write(store, _cells(sparse.csr_matrix(X)))
    places = {"": X, ":X": X, ":obsm/X_pca": PCA, ":obsm/X_sparse": PCA, ":layers/log": np.log1p(X)}
    for inside, expected in places.items():
        rows = data.open_rows(path + inside)
        assert (rows.name, rows.shape, rows.dtype) == (
            path + inside,
            expected.shape,
            expected.dtype,
        )
        np.testing.assert_array_equal(rows[3:9], expected[3:9])
        np.testing.assert_array_equal(rows.take([0, 2, 11])[1:], expected[[2, 11]])
        assert data.fingerprint(rows) == data.fingerprint(data.load(path + inside))


def test_a_matrix_by_columns_is_refused_for_slices_only(store: Path) -> None:
    path = _write(store, _cells(sparse.csc_matrix(X)))
    with pytest.raises(InputError, match=r"stored by columns \(csc_matrix\).*tocsr"):
        data.open_rows(path)
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


def test_a_damaged_h5ad_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    _cells(sparse.csr_matrix(X)).write_h5ad(path, compression="gzip")
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for read in (data.load, data.open_rows, data.provenance, lambda p: data.load_obs(p, "a")):
            with pytest.raises(InputError, match=r"cells\.h5ad.* (is damaged|cannot be read)"):
                read(f"{path}")
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        offset = file["X/data"].id.get_chunk_info(0).byte_offset
    damaged = bytearray(whole)
    damaged[offset : offset + 8] = b"damaged."
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"h5ad, rows 0 to 2, (is damaged|cannot be read)"):
        data.open_rows(str(path))[:3]


@pytest.mark.parametrize("part", ["indptr", "indices", "shape", "data"])
@pytest.mark.parametrize("encode", [sparse.csr_matrix, sparse.csc_matrix])
def test_a_sparse_matrix_that_contradicts_itself_is_refused(
    store: Path, encode: Any, part: str
) -> None:
    path = _write(store, _cells(encode(X)))
    root = h5py.File(path, "r+") if store.suffix == ".h5ad" else zarr.open_group(path, mode="r+")
    if part == "shape":
        root["X"].attrs["shape"] = [9, 4]
    elif part == "data":
        del root["X/data"]
    else:
        root[f"X/{part}"][3] = 1000
    if store.suffix == ".h5ad":
        root.close()
    else:
        zarr.consolidate_metadata(path)
    with pytest.raises(InputError, match=r"cells3?\..* (is damaged|cannot be read)"):
        data.load(path)


@pytest.mark.parametrize("store", ["cells.zarr", "cells3.zarr"])
def test_a_damaged_zarr_is_refused(tmp_path: Path, store: str) -> None:
    path = _write(tmp_path / store, _cells())
    root, array = ("zarr.json", "zarr.json") if "3" in store else (".zgroup", ".zarray")
    (tmp_path / store / ".zmetadata").unlink(missing_ok=True)
    about = tmp_path / store / root
    group = json.loads(about.read_text())
    group.pop("consolidated_metadata", None)
    about.write_text(json.dumps(group))
    assert data.open_rows(path).shape == X.shape

    for chunk in (tmp_path / store / "X").rglob("*"):
        if chunk.is_file() and not chunk.name.startswith((".", "zarr")):
            chunk.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"zarr, rows 0 to 11, (is damaged|cannot be read)"):
        data.load(path)
    (tmp_path / store / "X" / array).write_text("{")
    with pytest.raises(InputError, match=r"zarr (is damaged|cannot be read)"):
        data.open_rows(path)
    (tmp_path / store / "X" / array).unlink()
    with pytest.raises(InputError, match="no 'X'; there are obsm/"):
        data.open_rows(path)
    about.write_text("{")
    with pytest.raises(InputError, match=r"zarr (is damaged|cannot be read)"):
        data.open_rows(path)
    about.unlink()
    with pytest.raises(InputError, match=r"zarr (is damaged|cannot be read)"):
        data.open_rows(path)


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


OBS = {
    "category": pd.Categorical(["a", "b", None, "b"] * 3, categories=["b", "a", "unused"]),
    "number of": pd.Categorical([3, 1, 1, 3] * 3),
    "text": np.asarray(["α", "b", "", "long text"] * 3, object),
    "flag": [True, False, False, True] * 3,
    "real": np.arange(12) / 10,
    "count": np.arange(12) - 3,
    "maybe": pd.array([True, None, False, None] * 3, dtype="boolean"),
    "some": pd.array([1, None, 3, 4] * 3, dtype="Int64"),
}


@pytest.mark.parametrize("strings", [False, True])
def test_columns_of_obs_are_read_as_text(store: Path, strings: bool) -> None:
    frame = pd.DataFrame(OBS, index=[f"cell{i}" for i in range(12)])
    cells = anndata.AnnData(X, obs=frame)
    if strings:  # else anndata makes categories of them
        cells.strings_to_categoricals = lambda *_: None
    path = _write(store, cells)
    root = h5py.File(path) if store.suffix == ".h5ad" else zarr.open_group(path, mode="r")
    assert hasattr(root["obs/text"], "keys") is not strings
    for column in OBS:
        expected = [
            "" if value is pd.NA or value != value else str(value) for value in frame[column]
        ]
        found = data.load_obs(f"{path}:obsm/X_pca", column)
        assert found.dtype.kind == "U"
        assert found.tolist() == expected
    assert data.load_obs(path, "_index").tolist() == frame.index.tolist()
    with pytest.raises(InputError, match=r"no column 'split' in obs; there are .*category, .*text"):
        data.load_obs(path, "split")


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_columns_of_obs_of_anndata_0_7(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"old.{suffix}"
    root = h5py.File(path, "w") if suffix == "h5ad" else zarr.open_group(path, mode="w")
    obs = root.create_group("obs")
    obs.attrs["_index"] = "index"
    names = obs.create_group("__categories")
    write = names.create_dataset if suffix == "h5ad" else names.create_array
    write("split", data=np.asarray([b"test", b"train"]))
    write = obs.create_dataset if suffix == "h5ad" else obs.create_array
    write("split", data=np.asarray([1, 0, -1, 1], np.int8))
    write("depth", data=np.arange(4))
    if suffix == "h5ad":
        root.close()
    assert data.load_obs(str(path), "split").tolist() == ["train", "test", "", "train"]
    assert data.load_obs(str(path), "depth").tolist() == ["0", "1", "2", "3"]
    with pytest.raises(InputError, match=r"there are depth, split$"):
        data.load_obs(str(path), "__categories")


def test_columns_of_obs_that_is_one_table(tmp_path: Path) -> None:
    dtype = [("index", "S5"), ("split", "i1"), ("depth", "f4")]
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"] = np.asarray([(b"a", 1, 0.5), (b"b", 0, 2), (b"c", -1, 3)], dtype)
        file["uns/split_categories"] = np.asarray(["test", "train"], h5py.string_dtype())
    path = str(tmp_path / "old.h5ad")
    assert data.load_obs(path, "split").tolist() == ["train", "test", ""]
    assert data.load_obs(path, "depth").tolist() == ["0.5", "2.0", "3.0"]
    assert data.load_obs(path, "index").tolist() == ["a", "b", "c"]
    with pytest.raises(InputError, match="there are depth, index, split"):
        data.load_obs(path, "x")


def test_a_file_without_obs_says_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "plain.h5ad", "w") as file:
        file["X"] = X
    with pytest.raises(InputError, match="no column 'split' in obs; there are none"):
        data.load_obs(str(tmp_path / "plain.h5ad"), "split")
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(InputError, match=r"x\.npy has no obs"):
        data.load_obs(str(tmp_path / "x.npy"), "split")
    with pytest.raises(InputError, match="there is no file"):
        data.load_obs(str(tmp_path / "none.h5ad"), "split")


def test_provenance_is_what_was_written(store: Path) -> None:
    about = {
        "model": "scGPT",
        "layer": 7,
        "coverage": 0.75,
        "float32": np.float32(0.5),
        "normalised": True,
        "counts": np.arange(3),
        "genes": np.asarray(["A", "B"], object),
        "matrix": np.eye(2),
        "nothing": None,
        "nested": {"version": "1.0", "deeper": {"β": "ü"}, "empty": {}},
    }
    cells = anndata.AnnData(X, uns={"extraction": about, "other": 1})
    found = data.provenance(_write(store, cells) + ":X")
    assert found == json.loads(json.dumps(found)) == {
        **about, "float32": 0.5, "counts": [0, 1, 2], "genes": ["A", "B"],
        "matrix": [[1, 0], [0, 1]],
    }  # fmt: skip
    assert [type(found[key]) for key in ("layer", "normalised", "coverage")] == [int, bool, float]


def test_no_provenance_is_empty(store: Path) -> None:
    assert data.provenance(_write(store, _cells())) == {}
    np.save(store.parent / "x.npy", X)
    assert data.provenance(str(store.parent / "x.npy")) == {}
    with h5py.File(store.parent / "plain.h5ad", "w") as file:
        file["X"] = X
    assert data.provenance(str(store.parent / "plain.h5ad")) == {}

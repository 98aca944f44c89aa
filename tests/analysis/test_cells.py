from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from analysis import cells
from sae_jax import InputError


def _adata(counts: np.ndarray, names: list[str], symbols: list[str | None]) -> anndata.AnnData:
    var = pd.DataFrame({"symbol": symbols}, index=names)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(len(counts))])
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def test_counts_become_log1p_of_counts_per_ten_thousand() -> None:
    counts = np.asarray([[1, 3, 0], [0, 0, 5], [0, 0, 0]])
    found = cells.expression(_adata(counts, list("abc"), list("ABC")), "X", "counts")
    expected = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
    np.testing.assert_allclose(found.x.toarray(), expected, rtol=1e-6)
    assert list(found.genes) == ["a", "b", "c"]


def test_a_repeated_symbol_is_its_most_expressed_column_and_unnamed_genes_go() -> None:
    counts = np.asarray([[1, 3, 2, 9], [1, 4, 2, 9]])
    adata = _adata(counts, list("abcd"), ["X", "X", "Y", None])
    found = cells.expression(adata, "X", "counts", "symbol")
    assert list(found.genes) == ["X", "Y"]
    whole = cells.expression(adata, "X", "counts").x
    np.testing.assert_array_equal(found.x.toarray(), whole[:, [1, 2]].toarray())


def test_log1p_values_are_taken_as_they_are_also_from_raw() -> None:
    adata = _adata(np.asarray([[1, 2], [3, 4]]), ["a", "b"], ["A", "B"])
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    full = adata.copy()
    adata = adata[:, ["b"]].copy()
    adata.raw = full
    found = cells.expression(adata, "raw", "log1p")
    assert list(found.genes) == ["a", "b"]
    np.testing.assert_array_equal(found.x.toarray(), full.X.toarray())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * np.nan, "6 NaN or infinite"),
        (lambda x: x * 0, "nothing but zeros"),
        (lambda x: x - 3, "negative values"),
        (lambda x: x * 40.5, "not logarithmised"),
    ],
)
def test_values_that_are_not_log1p_are_refused(change: object, message: str) -> None:
    adata = _adata(np.asarray([[1, 2, 3], [3, 4, 5]]), list("abc"), list("ABC"))
    adata.X = sparse.csr_matrix(change(adata.X.toarray()))
    with pytest.raises(InputError, match=message):
        cells.expression(adata, "X", "log1p")


def test_components_are_those_of_numpy_up_to_sign() -> None:
    x = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    found = cells.pca(sparse.csr_matrix(x), 5)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :5] * s[:5]), atol=1e-4)
    assert cells.pca(sparse.csr_matrix(x), 50).shape == (40, 11)


def test_embedding_may_be_a_table_or_sparse() -> None:
    adata = _adata(np.ones((3, 2)), ["a", "b"], ["A", "B"])
    values = np.arange(6.0).reshape(3, 2)
    adata.obsm["frame"] = pd.DataFrame(values, index=adata.obs_names, columns=["0", "1"])
    adata.obsm["sparse"] = sparse.csr_matrix(values)
    for key in ("frame", "sparse"):
        found = cells.embedding(adata, key)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values)


def test_labels_keep_gaps_and_read_integers_as_text() -> None:
    adata = _adata(np.ones((6, 2)), ["a", "b"], ["A", "B"])
    adata.obs["cluster"] = [1.0, 1.0, 2.0, 2.0, np.nan, 1.0]
    adata.obs["name"] = list("abcdef")
    found = cells.labels(adata, "cluster")
    assert list(found.cat.categories) == ["1", "2"]
    assert found.isna().sum() == 1
    with pytest.raises(InputError, match="6 different labels for 6 cells"):
        cells.labels(adata, "name")


@pytest.mark.parametrize("content", [b"", b"not hdf5 at all", b"\x89HDF\r\n\x1a\n" + bytes(600)])
def test_a_file_that_is_no_h5ad_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.h5ad").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as an h5ad file"):
        cells.read(tmp_path / "x.h5ad")


def test_a_truncated_h5ad_is_one_message(tmp_path: Path) -> None:
    _adata(np.ones((50, 40)), [f"g{i}" for i in range(40)], ["A"] * 40).write_h5ad(
        tmp_path / "x.h5ad"
    )
    whole = (tmp_path / "x.h5ad").read_bytes()
    (tmp_path / "x.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        cells.read(tmp_path / "x.h5ad")


def test_annotations_are_read_without_anything_else_and_leave_no_file_open(tmp_path: Path) -> None:
    adata = _adata(np.ones((3, 2)), ["a", "b"], ["A", "B"])
    adata.obsm = {"X_m": np.arange(6.0).reshape(3, 2), "other": np.ones((3, 4))}
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["obsm/other"].attrs["encoding-type"] = "of tomorrow"  # nobody can decode it
    found = cells.annotations(tmp_path / "a.h5ad", ["X_m"])
    np.testing.assert_array_equal(cells.embedding(found, "X_m"), adata.obsm["X_m"])
    assert [*found.obsm] == ["X_m"]
    with pytest.raises(InputError, match="obsm has no 'X_n'; it has X_m, other"):
        cells.annotations(tmp_path / "a.h5ad", ["X_n"])
    with h5py.File(tmp_path / "a.h5ad", "a"):  # refused where it is still open for reading
        pass


def test_tables_of_an_old_anndata_are_refused_with_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    _adata(np.ones((3, 2)), ["a", "b"], ["A", "B"]).write_h5ad(path)
    with h5py.File(path, "a") as file:
        del file["obs"]  # one array of records, as it once was
        file["obs"] = np.array([(b"c0",), (b"c1",), (b"c2",)], [("index", "S2")])
    with pytest.raises(InputError, match=r"a\.h5ad is of an anndata before 0\.7.*write_h5ad"):
        cells.annotations(path)
    with pytest.raises(InputError, match=r"before 0\.7"):
        cells.parts(path, "X", "counts")
    assert cells.read(path).obs_names.tolist() == ["c0", "c1", "c2"]  # as anndata does

"""What every program leaves for a browser can be read again, whatever columns are called."""

import resource
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from analysis import gene_sets
from experiments import browse, inputs, run_folder
from sae_jax import InputError, workdir
from sae_jax.disk import DiskError


def test_columns_that_hdf5_cannot_hold_are_renamed_and_all_can_be_read(tmp_path: Path) -> None:
    obs = pd.DataFrame(
        [["x", 1, None, True, 0.5], [np.nan, "two", "b", None, np.nan]],
        index=pd.Index(["c1", "c2"], name="type"),
        columns=["type/sub", "mixed", "type", "type", "type"],
    )
    var = pd.DataFrame({"a/b:label": pd.Categorical([1, 2]), "terms": ["", None]}, index=["f", "g"])
    z = sparse.csr_matrix(np.array([[0.0, 2], [3, 0]]))
    run_folder.write_features(
        tmp_path / "features.h5ad", "lens", z, obs, var, decoder=np.eye(2, 3),
        maps={"X_umap": np.ones((2, 2))}, about={"n": 1}, settings={"h5ad": "x"},
    )  # fmt: skip
    found = anndata.read_h5ad(tmp_path / "features.h5ad")
    assert found.obs.columns.tolist() == ["type|sub", "mixed", "type", "type (2)", "type (3)"]
    assert found.obs["mixed"].tolist() == ["1", "two"]
    assert found.obs["type|sub"].isna().tolist() == [False, True]
    assert found.obs["type (2)"].isna().tolist() == [False, True]
    assert found.obs["type (3)"].dtype.kind == "f"
    assert found.var.columns.tolist() == ["a|b:label", "terms"]
    assert found.var["terms"].isna().tolist() == [False, True]
    assert found.X.dtype == np.float32
    np.testing.assert_array_equal(found.X.toarray(), z.toarray())
    assert found.uns["about"] == '{"n": 1}'
    assert obs.columns[0] == "type/sub"  # what was given stays as it was


def test_a_full_disk_ends_in_a_message_not_in_hdf5(tmp_path: Path) -> None:
    """HDF5 itself ends the process when it can put away nothing of what it holds."""
    adata = anndata.AnnData(sparse.random(200, 200, 0.5, format="csr", random_state=0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskError, match=r"features\.h5ad cannot be written: File too large"):
            run_folder.write_h5ad(tmp_path / "features.h5ad", adata)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    run_folder.write_h5ad(tmp_path / "features.h5ad", adata)
    found = anndata.read_h5ad(tmp_path / "features.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())


def test_numbers_have_checksums(tmp_path: Path) -> None:
    obs = pd.DataFrame({"a": pd.Categorical(["x", "y"]), "b": [1, 2], "c": ["u", "v"]})
    adata = anndata.AnnData(
        sparse.csr_matrix(np.eye(2)), obs=obs.set_axis(["c1", "c2"]), obsm={"X_m": np.eye(2)},
        uns={"n": 3, "text": "t"},
    )  # fmt: skip
    run_folder.write_h5ad(tmp_path / "x.h5ad", adata)
    checked, unchecked = set(), set()

    def visit(name: str, held: h5py.Group | h5py.Dataset) -> None:
        if isinstance(held, h5py.Dataset) and held.shape:
            (checked if held.fletcher32 else unchecked).add(name)

    with h5py.File(tmp_path / "x.h5ad") as file:
        file.visititems(visit)
        assert file["X/data"].compression == "gzip"
    assert checked == {"X/data", "X/indices", "X/indptr", "obs/a/codes", "obs/b", "obsm/X_m"}
    assert unchecked == {"obs/_index", "obs/a/categories", "obs/c", "var/_index"}


@pytest.mark.parametrize("n_features", [0, 1, 8, 21])
def test_a_row_group_holds_whole_features(tmp_path: Path, n_features: int) -> None:
    counts = np.arange(n_features) % 5 + 1
    table = pd.DataFrame(
        {
            "feature": np.repeat([f"concept_{i}" for i in range(n_features)], counts),
            "gene": [f"g{i % 300}" for i in range(counts.sum())],
            "attribution": np.arange(counts.sum(), dtype=np.float32),
        }
    ).astype({"feature": "category", "gene": "category"})
    run_folder.write_by_feature(tmp_path / "x.parquet", table)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    groups = [
        set(file.read_row_group(i)["feature"].to_pylist()) for i in range(file.num_row_groups)
    ]
    assert sum(map(len, groups)) == len(set().union(*groups)) == n_features
    assert all(len(group) <= run_folder.ROW_GROUP for group in groups)
    found = pd.read_parquet(tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(found.astype(str), table.astype(str))


def test_parts_may_have_other_categories_in_other_numbers(tmp_path: Path) -> None:
    genes = [f"g{i}" for i in range(200)]
    parts = [
        pd.DataFrame(
            {"feature": "a", "gene": pd.Categorical(genes[:2], genes), "t": [0.0, np.nan]}
        ),
        pd.DataFrame({"feature": "b", "gene": pd.Categorical(genes, genes), "t": np.arange(200.0)}),
    ]
    run_folder.write_by_feature(tmp_path / "x.parquet", iter(parts))
    found = pd.read_parquet(tmp_path / "x.parquet")
    assert found["gene"].tolist() == [*genes[:2], *genes]
    assert found["t"].isna().tolist() == [False, True, *[False] * 200]


def test_maps_of_the_input_are_those_of_the_same_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = {"spatial": rng.normal(size=(4, 2)), "X_umap": rng.normal(size=(4, 2)),
            "X_pca": rng.normal(size=(4, 3)), "X_gaps": np.full((4, 2), np.nan)}  # fmt: skip
    adata = anndata.AnnData(np.ones((4, 3)), obsm=maps)
    adata.obs_names = list("abcd")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = run_folder.input_maps(tmp_path / "cells.h5ad", pd.Index(["d", "b"]))
    assert set(found) == {"X_spatial", "X_umap_of_input"}
    np.testing.assert_allclose(found["X_spatial"], maps["spatial"][[3, 1]], rtol=1e-6)
    assert run_folder.input_maps(tmp_path, pd.Index(["d"])) == {}  # a zarr store has none for us
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        del file["obsm"]
    assert run_folder.input_maps(tmp_path / "cells.h5ad", pd.Index(["d"])) == {}


def test_maps_are_read_without_anything_else(tmp_path: Path) -> None:
    obsm = {"X_m": np.ones((4, 2)), "wide": np.ones((4, 3)), "pairs": sparse.csr_matrix((4, 2))}
    adata = anndata.AnnData(np.ones((4, 3)), layers={"x": np.ones((4, 3))}, obsm=obsm)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        for name in ("layers/x", "obsm/wide"):  # nobody can decode them
            file[name].attrs["encoding-type"] = "of tomorrow"
    found = run_folder.input_maps(tmp_path / "cells.h5ad", adata.obs_names)
    np.testing.assert_array_equal(found.pop("X_m"), np.ones((4, 2)))
    assert found == {}


def test_maps_of_a_file_of_the_first_anndata() -> None:
    """The cells of `make demo`, whose obsm is one table."""
    pytest.importorskip("scanpy")
    path = inputs.default_cells()
    adata = anndata.read_h5ad(path)
    found = run_folder.input_maps(path, adata.obs_names[::-1])
    assert set(found) == {"X_umap_of_input"}
    expected = adata.obsm["X_umap"][::-1].astype(np.float32)
    np.testing.assert_array_equal(found["X_umap_of_input"], expected)


def test_the_sets_are_written_as_they_were_tested(tmp_path: Path) -> None:
    genes = np.array(["A", "B", "C"], object)
    sets = gene_sets.from_sets({"two": ["A", "C", "Z"], "all": ["C", "B", "A"]}, list(genes), 1, 9)
    run_folder.write_gene_sets(tmp_path / "sets.parquet", sets, genes)
    found = pd.read_parquet(tmp_path / "sets.parquet").astype(str)
    assert found.groupby("term", sort=False)["gene"].agg(sorted).to_dict() == {
        "two": ["A", "C"], "all": ["A", "B", "C"],
    }  # fmt: skip


def test_a_folder_that_was_browsed_may_be_filled_again(tmp_path: Path) -> None:
    state = browse.default_state(tmp_path)
    state.mkdir()
    workdir.refuse_others(tmp_path)
    state.rename(tmp_path / "mine")
    with pytest.raises(InputError, match="holds other files"):
        workdir.refuse_others(tmp_path)

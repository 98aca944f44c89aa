"""Expression read from a file part by part is the expression read at once."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from analysis import cells, differential
from analysis.groups import top_n
from sae_jax import InputError

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(0.5, (23, 9)).astype(np.float32)
COUNTS[:, 4] = 0
COUNTS[7] = 0


def _write(path: Path, source: str, values: np.ndarray, form: type) -> Path:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(len(values))])
    var = pd.DataFrame({"symbol": list("ABCDEFGHH")}, index=list("abcdefghi"))
    adata = anndata.AnnData(form(values), obs, var)
    if source == "raw":
        adata.raw = adata.copy()
        adata.X = None
    elif source != "X":
        adata.layers[source], adata.X = adata.X, None
    (adata.write_zarr if path.suffix == ".zarr" else adata.write_h5ad)(path)
    return path


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("source", ["X", "raw", "counts"])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("kind", cells.EXPRESSION_KINDS)
def test_parts_are_the_whole(
    tmp_path: Path, suffix: str, source: str, form: type, kind: str
) -> None:
    values = COUNTS if kind == "counts" else np.log1p(COUNTS)
    path = _write(tmp_path / f"x{suffix}", source, values, form)
    whole = cells.expression(cells.read(path), source, kind, "symbol")
    parts = cells.parts(path, source, kind, "symbol", rows=5)
    blocks = list(parts())
    assert [len(parts.cells), len(blocks), blocks[0].shape[0]] == [23, 5, 5]
    assert list(parts.genes) == list(whole.genes)
    np.testing.assert_array_equal(sparse.vstack(blocks).toarray(), whole.x.toarray())

    high, active = top_n(RNG.random((23, 3)), 6)
    [found] = differential.welch_streamed(parts, high, active=active)
    expected = differential.welch(whole.x, high, active=active)
    np.testing.assert_allclose(found.t, expected.t, rtol=1e-9)


def test_dense_matrices_of_an_h5ad_are_read_as_sparse_ones(tmp_path: Path) -> None:
    for source in ("X", "raw"):
        adata = cells.read(_write(tmp_path / f"{source}.h5ad", source, COUNTS, np.asarray))
        found = adata.raw.X if source == "raw" else adata.X
        assert sparse.issparse(found)
        np.testing.assert_array_equal(found.toarray(), COUNTS)


def test_parts_that_are_not_what_they_are_said_to_be_are_refused(tmp_path: Path) -> None:
    counts = _write(tmp_path / "a.h5ad", "X", COUNTS, sparse.csr_matrix)
    late = np.log1p(COUNTS)
    late[0] = [1, 2, 0, 0, 0, 0, 0, 1, 0]  # the first part alone would pass for counts
    logs = _write(tmp_path / "b.h5ad", "X", late, sparse.csr_matrix)
    by_genes = _write(tmp_path / "c.h5ad", "X", COUNTS, sparse.csc_matrix)
    nothing = _write(tmp_path / "d.h5ad", "X", COUNTS * 0, sparse.csr_matrix)
    for path, source, kind, message in (
        (counts, "X", "log1p", "all are integers; counts"),
        (logs, "X", "counts", "are not integers"),
        (by_genes, "X", "counts", r"stored by genes \(CSC\)"),
        (nothing, "X", "counts", "nothing but zeros"),
        (counts, "raw", "counts", "has no raw/X"),
        (counts, "spliced", "counts", "has no layers/spliced"),
        (tmp_path / "none.h5ad", "X", "counts", "there is no file"),
    ):
        with pytest.raises(InputError, match=message):
            cells.parts(path, source, kind, rows=1)

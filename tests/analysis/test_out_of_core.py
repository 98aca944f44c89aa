"""Cells in memory, in a file or in a dask array, in blocks of any size: the same results."""

import contextlib
import functools
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from analysis import attribution, cell_sums, cells, chunked, differential, gene_sets, lens, tl
from analysis.groups import top_n
from analysis.pseudobulk import donor_test
from sae_jax import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data"),
    pytest.mark.filterwarnings("ignore::anndata.ImplicitModificationWarning"),
]

N, GENES = 37, 110
RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(RNG.gamma(0.6, 1.5, GENES), (N, GENES)).astype(np.float32)
COUNTS[:, 4] = 0
COUNTS[7] = 0
Z = sparse.csr_matrix(RNG.exponential(1, (N, 6)) * (RNG.random((N, 6)) < 0.4))
HIGH, ACTIVE = top_n(Z, 9)
NAMES = [f"g{i}" for i in range(GENES)]
DONORS = np.asarray([f"d{i % 4}" for i in range(N)])


def _adata(form: Callable[[np.ndarray], Any] = sparse.csr_matrix) -> anndata.AnnData:
    obs = pd.DataFrame(
        {"kind": pd.Categorical(["a", "b"] * 18 + ["a"])}, index=[f"c{i}" for i in range(N)]
    )
    adata = anndata.AnnData(form(COUNTS), obs, pd.DataFrame({"symbol": NAMES}, index=NAMES))
    adata.obsm["X_x"] = np.random.default_rng(1).normal(size=(N, 3)).astype(np.float32)
    return adata


def _dask(form: Callable[[np.ndarray], Any], rows: int) -> anndata.AnnData:
    array = pytest.importorskip("dask.array")
    adata = _adata()
    chunks = array.from_array(COUNTS, chunks=(rows, 60))  # in columns too, which blocks join
    adata.X = chunks if form is np.asarray else chunks.rechunk({1: -1}).map_blocks(form)
    return adata


def _lazy(path: Path) -> anndata.AnnData:
    pytest.importorskip("dask.array")
    pytest.importorskip("xarray")
    return anndata.experimental.read_lazy(path)


def _stored(path: Path, form: Callable[[np.ndarray], Any]) -> Path:
    (_adata(form).write_zarr if path.suffix == ".zarr" else _adata(form).write_h5ad)(path)
    return path


WAYS: dict[str, Callable[[Path], Any]] = {
    "csr": lambda _: _adata(),
    "csc": lambda _: _adata(sparse.csc_matrix),
    "dense": lambda _: _adata(np.asarray),
    "backed csr": lambda at: anndata.read_h5ad(_stored(at / "a.h5ad", sparse.csr_matrix), "r"),
    "backed dense": lambda at: anndata.read_h5ad(_stored(at / "a.h5ad", np.asarray), "r"),
    "zarr csr": lambda at: _stored(at / "a.zarr", sparse.csr_matrix),
    "zarr dense": lambda at: _stored(at / "a.zarr", np.asarray),
    "lazy h5ad": lambda at: _lazy(_stored(at / "a.h5ad", sparse.csr_matrix)),
    "lazy zarr": lambda at: _lazy(_stored(at / "a.zarr", sparse.csr_matrix)),
    "lazy dense": lambda at: _lazy(_stored(at / "a.zarr", np.asarray)),
    "dask dense": lambda _: _dask(np.asarray, 5),
    "dask csr": lambda _: _dask(sparse.csr_matrix, 5),
    "dask csr array": lambda _: _dask(sparse.csr_array, N),
}  # fmt: skip


@functools.cache
def _expected() -> tuple[cells.Expression, differential.Welch]:
    whole = cells.expression(_adata(), "X", "counts")
    return whole, differential.welch(whole.x, HIGH, active=ACTIVE)


def _same(found: list[differential.Welch], expected: differential.Welch) -> None:
    for name in ("t", "df", "p", "log2_fold_change", "var_low", "detected_high", "n_low"):
        values = np.concatenate([getattr(part, name) for part in found])
        np.testing.assert_array_equal(values, getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("rows", [1, 7, None])
@pytest.mark.parametrize("way", WAYS)
def test_wherever_cells_are_the_tests_are_the_same_to_the_bit(
    way: str, rows: int | None, tmp_path: Path
) -> None:
    whole, expected = _expected()
    found = cells.parts(WAYS[way](tmp_path), "X", "counts", rows=rows)
    if "dask" not in way and "lazy" not in way:
        assert len(found.x.cuts) - 1 == {1: 37, 7: 6, None: 1}[rows]
    np.testing.assert_array_equal(sparse.vstack(list(found())).toarray(), whole.x.toarray())
    assert [*found.genes] == [*whole.genes]
    _same(list(differential.welch_streamed(found, HIGH, active=ACTIVE)), expected)
    by_low = differential.welch(whole.x, HIGH, low=ACTIVE.toarray() == 0)
    _same(list(differential.welch_streamed(found, HIGH, low=ACTIVE.toarray() == 0)), by_low)
    _same([differential.welch(found.x, HIGH, low=ACTIVE.toarray() == 0)], by_low)
    some, which = np.array([3, 4, 20, 36]), np.array([50, 2, 9])
    fewer, named = found.of_genes(which, found.genes[which]), whole.of_genes(which, "abc")
    np.testing.assert_array_equal(found.x[some].toarray(), whole.x[some].toarray())
    np.testing.assert_array_equal(fewer.x[some].toarray(), named.x[some].toarray())
    np.testing.assert_array_equal(fewer.means, named.means)
    for wrong in ([], [2, 1], [-1, 2], [N]):
        with pytest.raises(InputError, match="rows must rise"):
            found.x[np.array(wrong, int)]


@pytest.mark.parametrize("way", ["backed csr", "lazy zarr", "dask dense"])
def test_donors_are_tested_the_same(way: str, tmp_path: Path) -> None:
    expected = donor_test(
        sparse.csr_matrix(COUNTS), HIGH, ACTIVE.toarray() == 0, DONORS, scale="counts", min_cells=1
    )
    adata = WAYS[way](tmp_path)
    for memory_bytes in (1 << 30, 250_000):
        found = donor_test(
            chunked.chunked(adata.X, memory_bytes=120_000, rows=5), HIGH, ACTIVE.toarray() == 0,
            DONORS, scale="counts", min_cells=1, memory_bytes=memory_bytes,
        )  # fmt: skip
        for name in ("t", "p", "mean_difference", "log2_fold_change", "n_donors"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-13
            )
    log = cells.parts(adata, "X", "counts", rows=3).x
    found = donor_test(log, HIGH, ACTIVE.toarray() == 0, DONORS, scale="log1p", min_cells=1)
    whole = _expected()[0].x
    expected = donor_test(whole, HIGH, ACTIVE.toarray() == 0, DONORS, scale="log1p", min_cells=1)
    np.testing.assert_allclose(found.t, expected.t, rtol=1e-10)


def _sets() -> gene_sets.GeneSets:
    measured = len(_expected()[0].genes)
    member = sparse.csr_array(np.random.default_rng(2).random((12, measured)) < 0.2, dtype=float)
    names = [f"T{i}" for i in range(12)]
    return gene_sets.GeneSets(names, member, names, "all")


@pytest.mark.parametrize("way", ["backed csr", "lazy zarr"])
def test_the_lens_is_the_same_in_one_pass_and_in_many(way: str, tmp_path: Path) -> None:
    rule = lens.Rule(percentile=70, cells=3)
    keys = {"null_features": 30, "bins": 2, "block": 4, "top_genes": 5, "progress": False}
    whole = cells.expression(_adata(), "X", "counts")
    expected, known = lens.annotate(Z, whole, _sets(), rule, **keys)
    adata = WAYS[way](tmp_path)
    for memory_bytes in (1 << 30, 4_000_000):
        blocks = cells.expression(adata, "X", "counts", memory_bytes=1_500_000)
        assert isinstance(blocks, cells.Parts)
        found, again = lens.annotate(
            Z, blocks, _sets(), rule, memory_bytes=memory_bytes, workers=2, **keys
        )
        for test in expected.log_p:
            np.testing.assert_array_equal(found.log_p[test], expected.log_p[test])
        pd.testing.assert_frame_equal(found.top, expected.top)
        np.testing.assert_array_equal(again["change"].mean, known["change"].mean)
    np.testing.assert_array_equal(blocks.means, whole.means)


class Sums:
    """A dictionary and a model in one: embeds cells by two sums of their genes."""

    def embed(self, adata: anndata.AnnData) -> np.ndarray:
        x = np.asarray(adata.X.todense()) if sparse.issparse(adata.X) else adata.X
        return np.log1p(np.stack([x[:, :50].sum(1), x[:, 50:].sum(1)], 1)).astype(np.float32)

    def encode(self, x: np.ndarray, sparse: bool = False) -> np.ndarray:
        return np.maximum(x - np.median(x, axis=0) if len(x) == N else x - MEDIAN, 0)


MEDIAN = np.median(Sums().embed(_adata()), axis=0)


@pytest.mark.parametrize("way", ["backed csr", "backed dense", "lazy h5ad", "dask csr"])
def test_attribution_reads_the_cells_it_needs(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.perturbed.CELLS", 10)
    both = Sums()
    expected = attribution.attribute(both, both, _adata(), prototypes=3, progress=False)
    found = attribution.attribute(both, both, WAYS[way](tmp_path), prototypes=3, progress=False)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert np.abs(found.scores).max() > 0


@pytest.mark.parametrize("way", ["backed csr", "backed dense"])
def test_attribution_leaves_the_file_open(way: str, tmp_path: Path) -> None:
    both, adata = Sums(), WAYS[way](tmp_path)
    found = cells.parts(adata, "X", "counts", rows=9)
    attribution.attribute(both, both, adata, prototypes=3, progress=False)
    assert adata.file.is_open
    np.testing.assert_array_equal(
        sparse.vstack(list(found())).toarray(), _expected()[0].x.toarray()
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 2**31))
def test_sums_of_blocks_are_those_of_all_cells_wherever_they_are_cut(
    sizes: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    # Of many sizes: sums of them depend on the order.
    counts = rng.poisson(0.7, (n, 5)) * 10 ** rng.uniform(-7, 2, (n, 5))
    x = sparse.csr_matrix(np.log1p(counts).astype(np.float32))
    active = rng.random((3, n)) < 0.5
    high = sparse.csc_array(active & (rng.random((3, n)) < 0.5))
    work = cell_sums.GroupWork(high, sparse.csc_array(active), True, 5).and_all()
    states = []
    in_order = work.start()
    stops = np.cumsum(sizes, dtype=int)
    for start, stop in zip(stops - sizes, stops, strict=True):
        rows = slice(int(start), int(stop))
        in_order = work.part(rows).add(in_order, x[rows])
        states.append(work.part(rows).add(work.start(), x[rows]))
    whole = work.add(work.start(), x)
    np.testing.assert_array_equal(in_order.tables, whole.tables)
    np.testing.assert_array_equal(in_order.n, whole.n)
    merged = functools.reduce(lambda a, b: a.plus(b), states, work.start())
    np.testing.assert_allclose(merged.tables, whole.tables, rtol=1e-12)
    dense = x.toarray().astype(np.float64)
    np.testing.assert_allclose(whole.tables[1, :3, 0], active @ dense, rtol=1e-12)
    np.testing.assert_allclose(whole.tables[0, :3, 1], high @ dense**2, rtol=1e-12)
    np.testing.assert_allclose(whole.tables[1, 3, 2], np.expm1(dense).sum(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(whole.tables[0, :3, 3], high @ np.sign(dense))


@contextlib.contextmanager
def _cluster(workers: int, threads: int = 1, processes: bool = False) -> Iterator[None]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=processes,
            dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert [*client.nthreads().values()] == [threads] * workers
        yield


def test_a_cluster_adds_up_where_the_cells_are(tmp_path: Path) -> None:
    path = _stored(tmp_path / "a.zarr", sparse.csr_matrix)
    _, expected = _expected()
    found = []
    for workers in (1, 3):
        with _cluster(workers):
            for adata in (_lazy(path), _dask(sparse.csr_matrix, 2)):
                persisted = adata.X.persist() if adata.X.npartitions > 1 else adata.X
                adata.X = persisted
                blocks = cells.parts(adata, "X", "counts")
                assert blocks.x.held()[:3] == (3, 4, 1)
                found.append(list(differential.welch_streamed(blocks, HIGH, active=ACTIVE)))
    found = [np.concatenate([part.t for part in parts]) for parts in found]
    for t in found:
        np.testing.assert_allclose(t, expected.t, rtol=1e-9)
    for one, three in zip(found[:2], found[2:], strict=True):  # of one worker and of three
        np.testing.assert_array_equal(one, three)


def test_a_worker_of_another_process_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is sent can be, and what is wrong with a chunk comes back as it was raised."""
    monkeypatch.setattr(chunked, "RUNS", 2)  # so that one has two tasks
    monkeypatch.setattr(chunked, "TASK", 2)
    stored = _lazy(_stored(tmp_path / "a.h5ad", sparse.csr_matrix))
    stored.X = stored.X.rechunk((8, GENES))
    low, both = ACTIVE.toarray() == 0, Sums()
    log, expected = _expected()
    donors = donor_test(log.x, HIGH, low, DONORS, scale="log1p", min_cells=1)
    keys = {"rule": lens.Rule(percentile=70, cells=3), "null_features": 0, "progress": False}
    terms, _ = lens.annotate(Z, log, _sets(), **keys)
    scores = attribution.attribute(both, both, _adata(), prototypes=3, progress=False).scores
    with _cluster(1, 1, processes=True):
        blocks = cells.parts(stored, "X", "counts")
        found = list(differential.welch_streamed(blocks, HIGH, active=ACTIVE))
        t = np.concatenate([part.t for part in found])
        np.testing.assert_allclose(t, expected.t, rtol=1e-9)
        again = donor_test(blocks.x, HIGH, low, DONORS, scale="log1p", min_cells=1)
        np.testing.assert_allclose(again.t, donors.t, rtol=1e-9)
        named, _ = lens.annotate(Z, blocks, _sets(), **keys)
        np.testing.assert_allclose(named.log_p["fisher"], terms.log_p["fisher"], rtol=1e-5)
        np.testing.assert_allclose(named.z, terms.z, rtol=1e-5)
        found = attribution.attribute(both, both, stored, prototypes=3, progress=False)
        np.testing.assert_array_equal(found.scores, scores)
        with pytest.raises(InputError, match="are not integers"):
            cells.parts(_dask(lambda x: sparse.csr_matrix(x / 2), 8), "X", "counts")


def test_how_the_memory_is_told() -> None:
    blocks = chunked.chunked(sparse.csr_matrix(COUNTS), rows=5)
    told = differential.Passes.of(blocks, 1, 1 << 30).told
    assert told.startswith("DGE: 37 cells x 110 genes in blocks of 5 cells, 1 feature in 1 pass, ")
    told = differential.Passes.of(blocks, 1800, 1_000_000, beside=1024).told
    assert re.search(r"1,800 features in \d+ passes, at most .* KiB, 1 KiB of it for tables", told)


def test_no_more_features_are_tested_at_once_than_a_pass_has_the_sums_of() -> None:
    blocks = chunked.chunked(sparse.csr_matrix(COUNTS), rows=37)
    plan = differential.Passes.of(blocks, 1800, 400_000, tested=64, beside=200_000)
    assert (plan.features, plan.tested) == (1, 1)


def test_with_a_client_memory_is_of_all_threads_of_a_worker() -> None:
    matrix = _dask(sparse.csr_matrix, 5).X
    memory = 200_000
    alone = differential.Passes.of(chunked.chunked(matrix, memory_bytes=9_000), 500, memory)
    with _cluster(1, 3, processes=False):
        blocks = chunked.chunked(matrix, memory_bytes=9_000)
        assert blocks.held()[:3] == (9, 8, 3)
        plan = differential.Passes.of(blocks, 500, memory)
        assert plan.features <= alone.features / 6
        assert plan.bytes <= memory
        with pytest.raises(InputError, match="in each worker, of 3 threads, and may take 78"):
            differential.Passes.of(blocks, 500, 80_000)
        in_memory = chunked.chunked(matrix.compute(), memory_bytes=9_000)
        assert differential.Passes.of(in_memory, 500, memory).features > plan.features


SEEN: list[bool] = []  # of this module, which workers in this process import: not a copy


def _spoiled(block: np.ndarray, block_info: Any = None) -> np.ndarray:
    first = bool(block_info) and block_info[0]["array-location"][0][0] == 0
    SEEN.append(first)
    return block - 2 if first else block


def test_a_bad_chunk_is_told_of_at_once() -> None:
    array = pytest.importorskip("dask.array")
    n = 6 * chunked.RUNS  # chunks: two tasks a run
    matrix = array.ones((n, 3), chunks=(1, 3)).map_blocks(_spoiled, dtype=float)
    high = np.arange(n)[None] % 3 == 0
    SEEN.clear()
    with _cluster(1), pytest.raises(InputError, match="expression ranges from -1"):
        list(differential.welch_streamed(chunked.chunked(matrix), high, low=~high))
    assert any(SEEN)
    assert len(SEEN) <= 24  # of 384


def test_what_dask_holds_is_not_written_into() -> None:
    """A part that a lost worker had is made again, of the same sums as before."""
    work = cell_sums.GroupWork(HIGH.tocsc(), ACTIVE.tocsc(), True, GENES)
    x = _adata().X.log1p()
    once = chunked._added([work], None, [x], chunked.as_csr, 1 << 30, [x.shape])
    before = once.tables.copy()
    twice = chunked._added([work], once, [x], chunked.as_csr, 1 << 30, [x.shape])
    np.testing.assert_array_equal(once.tables, before)
    np.testing.assert_allclose(twice.tables, 2 * before, rtol=1e-12)


def _many(n: int, folder: Path) -> anndata.AnnData:
    """Counts of n cells and 200 genes in a file."""
    rng = np.random.default_rng(0)
    x = sparse.random_array((n, 200), density=0.5, format="csr", dtype=np.float32, rng=rng)
    x.data = np.ceil(x.data * 5)
    names = pd.DataFrame(index=np.arange(n).astype(str))
    anndata.AnnData(sparse.csr_matrix(x), names).write_h5ad(folder / f"{n}.h5ad")
    return anndata.read_h5ad(folder / f"{n}.h5ad", "r")


def _peak(n: int, folder: Path) -> tuple[int, int]:
    """Bytes at most of a DGE of n cells in a file, measured; and those stated."""
    rng, backed = np.random.default_rng(1), _many(n, folder)
    cell = rng.integers(0, n, (40, 60))
    active = sparse.csr_array((np.ones(2400, bool), (np.repeat(np.arange(40), 60), cell.ravel())))
    active.resize(40, n)
    high = sparse.csr_array(active.toarray() & (rng.random((40, n)) < 0.5))
    tracemalloc.start()
    try:
        blocks = cells.parts(backed, "X", "counts", memory_bytes=1 << 18)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        tests = differential.welch_streamed(blocks, high, active=active, memory_bytes=MEMORY)
        assert sum(len(part.t) for part in tests) == 40
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert len(blocks.x.cuts) > 10
    return peak, differential.Passes.of(blocks.x, 40, MEMORY).bytes


MEMORY = 3 << 20


def test_memory_is_what_was_stated_and_does_not_grow_with_the_cells(tmp_path: Path) -> None:
    _peak(500, tmp_path)  # compiles
    some, stated = _peak(1500, tmp_path)
    twice, again = _peak(3000, tmp_path)
    assert some <= stated <= MEMORY
    assert twice <= again <= MEMORY
    assert twice - some <= 100 * 1500  # a cell has a place in masks; its genes take 6,400 bytes


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_memory_of_tests_over_donors_has_the_tests_in_it(scale: str, tmp_path: Path) -> None:
    n, memory = 600, 6 << 20
    backed, rng = _many(n, tmp_path), np.random.default_rng(0)
    high = rng.random((500, n)) < 0.3
    low, donors = ~high & (rng.random((500, n)) < 0.5), np.arange(n) % 4
    result = 500 * 200 * 4 * 8
    for some in (slice(1), slice(None)):  # the first compiles and imports
        blocks = chunked.chunked(backed.X, memory_bytes=1 << 18)
        if scale == "log1p":
            blocks = blocks.then(_log1p, 200)
        call = (blocks, high[some], low[some], donors)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            found = donor_test(*call, scale=scale, memory_bytes=memory)
            peak = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
    masks = 1.25 * 2 * 5 * np.count_nonzero([high, low])  # by features and by cells
    assert result < peak < memory + masks
    assert np.isfinite(found.t).all()
    with pytest.raises(InputError, match="for the tests of all 500"):
        donor_test(*call, scale=scale, memory_bytes=result)


def _log1p(block: sparse.csr_matrix) -> sparse.csr_matrix:
    return block.log1p()


def _wild(form: type = sparse.csr_matrix) -> Any:
    """With an index one beyond the last gene (or cell): not far enough to end the process."""
    x = form(np.log1p(COUNTS))
    x.indices = x.indices.copy()
    x.indices[0] = x.shape[1 if x.format == "csr" else 0]
    return x


WRONG = "is damaged: indices must be <"


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array])
def test_an_index_that_points_outside_is_not_followed(form: type, tmp_path: Path) -> None:
    x, low = _wild(form), ACTIVE.toarray() == 0
    with pytest.raises(InputError, match=WRONG):
        differential.welch(x, HIGH, active=ACTIVE)
    with pytest.raises(InputError, match=WRONG):
        differential.Prepared.of(x)
    with pytest.raises(InputError, match=WRONG):
        list(differential.welch_streamed(lambda: iter([x]), HIGH, active=ACTIVE))
    with pytest.raises(InputError, match=WRONG):
        donor_test(x, HIGH, low, DONORS, scale="log1p")
    with pytest.raises(InputError, match=WRONG):
        chunked.chunked(x)
    with pytest.raises(InputError, match=WRONG):
        chunked.as_csr(x)


def test_damage_in_a_file_is_not_followed(tmp_path: Path) -> None:
    path = _stored(tmp_path / "a.h5ad", sparse.csr_matrix)
    with h5py.File(path, "a") as file:
        file["X/indices"][0] = GENES
    backed = anndata.read_h5ad(path, "r")
    with pytest.raises(InputError, match="X is damaged: indices must be <"):
        list(chunked.chunked(backed.X))
    backed.file.close()
    with h5py.File(path, "a") as file:
        file["X/indptr"][3] = file["X/indptr"][5] + 1
    with pytest.raises(InputError, match="X is damaged: its indptr does not rise"):
        chunked.chunked(anndata.read_h5ad(path, "r").X)
    nothing = sparse.csr_matrix((3, 2))
    nothing.indptr = np.array([0, 2, 0, 0], nothing.indptr.dtype)
    with pytest.raises(InputError, match="non-decreasing"):
        chunked.sound(nothing)


def test_chunks_of_other_shapes_than_dask_says_are_refused() -> None:
    array = pytest.importorskip("dask.array")
    matrix = array.ones((6, 4), chunks=(3, 4)).map_blocks(lambda x: x[:2], chunks=((3, 3), (4,)))
    with pytest.raises(InputError, match=r"a chunk came as \(2, 4\), where the array has \(3, 4\)"):
        list(chunked.chunked(matrix))


def test_lazy_columns_are_refused_before_they_are_read(tmp_path: Path) -> None:
    lazy = _lazy(_stored(tmp_path / "a.h5ad", sparse.csc_matrix))
    with pytest.raises(InputError, match=r"stored by genes \(CSC\)"):
        chunked.chunked(lazy.X)
    with pytest.raises(InputError, match=r"stored by genes \(CSC\)"):
        cells.expression(lazy, "X", "counts")
    parts = _dask(sparse.csc_matrix, 20).X  # of rows, which happen to be columns in memory
    np.testing.assert_array_equal(sparse.vstack(list(chunked.chunked(parts))).toarray(), COUNTS)


@pytest.mark.parametrize("columns", [20, GENES])
def test_blocks_of_dense_arrays_are_whole_chunks_where_memory_allows(columns: int) -> None:
    stored = zarr.array(COUNTS, chunks=(10, columns))
    row, band = GENES * (4 + chunked.ENTRY), 10 * GENES * 4
    for memory, cuts in (
        (25 * row, [0, 20, 37]),
        (19 * row, [0, 10, 20, 30, 37]),
        (band + 4 * row, [0, 4, 8, 10, 14, 18, 20, 24, 28, 30, 34, 37]),
        (band + row, [*range(38)]),
    ):
        found = chunked.chunked(stored, memory_bytes=memory)
        assert found.cuts.tolist() == cuts
        assert found.block_bytes <= memory
        np.testing.assert_array_equal(sparse.vstack(list(found)).toarray(), COUNTS)
    with pytest.raises(InputError, match="X is stored in chunks of 10 rows, of which all columns"):
        chunked.chunked(stored, memory_bytes=band + row - 1)
    with pytest.raises(InputError, match="a row of X takes up to"):
        chunked.chunked(COUNTS, memory_bytes=row - 1)


def test_what_memory_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    backed = WAYS["backed csr"](tmp_path)
    with pytest.raises(InputError, match="a row of X takes up to"):
        cells.parts(backed, "X", "counts", memory_bytes=1000)
    blocks = cells.parts(backed, "X", "counts", memory_bytes=20_000)
    assert blocks.x.block_bytes <= 20_000
    assert len(blocks.x.cuts) > 5
    with pytest.raises(InputError, match=r"needs .* of memory for one feature"):
        list(differential.welch_streamed(blocks, HIGH, active=ACTIVE, memory_bytes=30_000))
    with pytest.raises(InputError, match=r"110 genes need .* of memory for one feature"):
        donor_test(
            chunked.chunked(backed.X), HIGH, ACTIVE.toarray() == 0, DONORS, scale="counts",
            memory_bytes=1000,
        )  # fmt: skip
    for read in (cells.parts, cells.expression):
        with pytest.raises(InputError, match="reads as a whole"):
            read(backed[:5], "X", "counts")
    with pytest.raises(InputError, match=r"stored by genes \(CSC\)"):
        chunked.chunked(anndata.read_h5ad(_stored(tmp_path / "b.h5ad", sparse.csc_matrix), "r").X)
    with pytest.raises(InputError, match="holds <U1"):
        chunked.chunked(np.asarray([["a"]]))


def test_a_chunk_that_is_too_large_is_refused() -> None:
    dense, rows = _dask(np.asarray, 20).X, _dask(sparse.csr_matrix, 20).X
    with pytest.raises(InputError, match="a chunk of X has 20 rows"):
        chunked.chunked(dense, memory_bytes=50_000)
    found = chunked.chunked(rows, memory_bytes=20_000)
    with pytest.raises(InputError, match="a chunk of 20 rows holds"):
        list(found)


@pytest.mark.parametrize("way", ["backed csr", "lazy zarr"])
def test_tools_work_on_cells_that_stay_where_they_are(way: str, tmp_path: Path) -> None:
    class Coder:
        def encode(self, x: np.ndarray, sparse: bool = False) -> Any:
            return np.maximum(x, 0)

    results = []
    for adata in (_adata(), WAYS[way](tmp_path)):
        tl.encode(adata, Coder(), "X_x")
        table = tl.characterise(adata, "kind")
        tl.annotate(
            adata, _sets(), expression_is="counts", null_features=30, bins=2, progress=False,
            rule=lens.Rule(percentile=70, cells=3),
        )  # fmt: skip
        results.append((table, tl.features(adata).var))
    pd.testing.assert_frame_equal(results[0][0], results[1][0])
    pd.testing.assert_frame_equal(results[0][1], results[1][1])

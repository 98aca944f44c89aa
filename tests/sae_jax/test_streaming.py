import contextlib
import gc
import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from sae_jax import InputError, data, streaming
from sae_jax.streaming import Npy, Plan, Rows

X = np.random.default_rng(0).poisson(0.5, (1200, 7)).astype(np.float32)
X[::2, 3] = 0.1  # no integers alone
X[40:70] = 0  # rows of a sparse matrix without any entry
CHOSEN = np.flatnonzero(np.random.default_rng(1).random(1200) < 0.6)
FAR = np.asarray([0, 3, 4, 5, 100, 640, 1199])
KINDS = ["array", "npy", "fortran", "h5", "chunked", "zarr2", "zarr3", "csr.h5ad", "csr2", "csr3"]


def _source(kind: str, folder: Path, x: np.ndarray = X) -> Any:
    if kind == "array":
        return x
    if kind in ("npy", "fortran"):
        np.save(folder / "x.npy", np.asfortranarray(x) if kind == "fortran" else x)
        return Npy(folder / "x.npy")
    if kind in ("h5", "chunked"):
        chunks = {"chunks": (100, 3), "compression": "gzip"} if kind == "chunked" else {}
        with h5py.File(folder / "x.h5", "w") as file:
            file.create_dataset("x", data=x, **chunks)
        return h5py.File(folder / "x.h5")["x"]
    if kind.startswith("zarr"):
        form = {"zarr_format": int(kind[-1]), "chunks": (100, 3)}
        return zarr.create_array(folder / "x.zarr", data=x, **form)
    cells = anndata.AnnData(sparse.csr_matrix(x))
    if kind == "csr.h5ad":
        cells.write_h5ad(folder / "x.h5ad")
        return h5py.File(folder / "x.h5ad")["X"]
    with anndata.settings.override(zarr_write_format=int(kind[-1])):
        cells.write_zarr(folder / "x.zarr")
    return zarr.open_group(folder / "x.zarr", mode="r")["X"]


@pytest.fixture(params=KINDS)
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Rows:
    return Rows(_source(request.param, tmp_path))


def test_slices_are_those_of_the_array(rows: Rows) -> None:
    assert (rows.shape, rows.dtype, len(rows)) == (X.shape, np.float32, 1200)
    assert rows.nbytes == X.nbytes
    for key in [slice(0, 5), slice(50, 60), slice(39, 71), slice(1190, 1300), slice(-3, None),
                slice(5, 5), slice(7, 3), slice(None)]:  # fmt: skip
        found = rows[key]
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, X[key])
    np.testing.assert_array_equal(np.asarray(rows), X)
    ranges = [(0, 3), (700, 900), (5, 5), (30, 50)]
    np.testing.assert_array_equal(rows.read(ranges), X[np.r_[0:3, 700:900, 30:50]])


@pytest.mark.parametrize("positions", [CHOSEN, FAR, np.arange(100, 1100), np.asarray([7])])
def test_chosen_rows_are_those_of_the_array(rows: Rows, positions: np.ndarray) -> None:
    rows.block_rows = 64  # so that a read is made of several
    chosen = rows.take(positions)
    assert chosen.shape == (len(positions), 7)
    np.testing.assert_array_equal(np.asarray(chosen), X[positions])
    np.testing.assert_array_equal(chosen[2:400], X[positions][2:400])
    np.testing.assert_array_equal(rows[10:500], X[10:500])
    every_other = np.arange(0, len(positions), 2)
    np.testing.assert_array_equal(np.asarray(chosen.take(every_other)), X[positions[every_other]])


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8", "<f2", "<i8", "u1"])
@pytest.mark.parametrize("order", "CF")
def test_an_npy_file_of_any_numbers_is_read(dtype: str, order: str, tmp_path: Path) -> None:
    values = (X * 8).astype(dtype)
    np.save(tmp_path / "x.npy", np.asarray(values, order=order))
    rows = data.open_rows(str(tmp_path / "x.npy"))
    assert rows.dtype == (np.float64 if dtype[1:] == "f8" else np.float32)
    np.testing.assert_array_equal(rows[:], values)
    rows._source.span_rows = 50  # so that a read is made of several
    np.testing.assert_array_equal(rows.read([(3, 900), (17, 18)]), values[np.r_[3:900, 17:18]])
    np.testing.assert_array_equal(rows.take(CHOSEN)[:], values[CHOSEN])


@pytest.mark.parametrize("order", "CF")
def test_an_npy_file_that_is_cut_while_it_is_read_is_told(order: str, tmp_path: Path) -> None:
    """A memory map would end the process."""
    path = tmp_path / "x.npy"
    np.save(path, np.asarray(X, order=order))
    rows = data.open_rows(str(path))
    np.testing.assert_array_equal(rows[:], X)
    os.truncate(path, 2**13)
    with pytest.raises(InputError, match=r"x\.npy, rows 1100 to 1199, .* cut, .* 8,192 bytes$"):
        rows[1100:]
    with (
        pytest.raises(InputError, match=r"x\.npy, rows .* cut"),
        contextlib.closing(streaming.prefetched(rows, Plan(1200, 100), range(1))) as buffers,
    ):
        list(buffers)


class Counting:
    """An array that notes what is read of it."""

    shape, dtype, chunks = X.shape, X.dtype, (100, 7)

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def __getitem__(self, key: slice) -> np.ndarray:
        self.read.append((key.start, key.stop))
        return X[key]


def test_only_what_is_asked_for_is_read() -> None:
    source = Counting()
    rows = Rows(source)
    assert rows[5:9].shape == (4, 7)
    assert source.read == [(5, 9)]
    source.read.clear()
    Rows(source, "x", FAR)[1:6]
    assert source.read == [(3, 6), (100, 101), (640, 641)]
    source.read.clear()
    Rows(source, "x", np.arange(0, 1200, 2))[0:100]
    assert source.read == [(0, 199)]  # neighbours are read together
    source.read.clear()
    rows.block_rows = 500
    np.testing.assert_array_equal(rows[:], X)
    assert source.read == [(0, 500), (500, 1000), (1000, 1200)]


def test_a_block_is_whole_chunks_of_about_16_mib() -> None:
    assert Rows(Counting()).chunk_rows == 100
    assert Rows(Counting()).block_rows == 2**24 // 2800 * 100
    wide = np.broadcast_to(np.float32(0), (3, 2**23))
    assert (Rows(wide).block_rows, Rows(wide).chunk_rows) == (1, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.uint16, np.int64, ">f4", "f8", ">f8"])
@pytest.mark.parametrize("kind", ["npy", "h5", "zarr3"])
def test_numbers_become_float32_unless_they_are_float64(
    tmp_path: Path, kind: str, dtype: Any
) -> None:
    x = (X * 10).astype(dtype)
    found = Rows(_source(kind, tmp_path, x))
    expected = np.float64 if np.dtype(dtype).itemsize == 8 and x.dtype.kind == "f" else np.float32
    assert found.dtype == found[:3].dtype == expected
    np.testing.assert_array_equal(found[:], x.astype(expected))


def test_a_file_stays_open_as_long_as_its_rows(tmp_path: Path) -> None:
    rows = Rows(_source("chunked", tmp_path))
    gc.collect()
    np.testing.assert_array_equal(rows[100:200], X[100:200])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(3), r"^x has shape \(3,\); it must be \[rows, dimensions\]"),
        (np.zeros((2, 2), bool), "^x has dtype bool; it must hold real numbers"),
        (np.asarray([["a"]]), "^x has dtype <U1"),
        (np.zeros((0, 3)), r"^x is empty: shape \(0, 3\)"),
        (sparse.csr_matrix(X), "^x is sparse"),
        ({}, "^x is a group, not a matrix"),
    ],
)
def test_what_is_no_matrix_is_refused(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Rows(source, "x")


@pytest.mark.parametrize(
    "positions", [[], [3, 2], [2, 2], [-1, 2], [5, 1200], [0.5], [[1]], [True, False]]
)
def test_positions_must_rise_within_the_rows(positions: list) -> None:
    for make in (Rows(X, "x").take, lambda positions: Rows(X, "x", positions)):
        with pytest.raises(InputError, match=r"^positions of x must"):
            make(positions)
    with pytest.raises(InputError, match="must rise and lie in 0 to 6"):
        Rows(X, "x", FAR).take([7])


@pytest.mark.parametrize("key", [3, [1, 2], slice(0, 9, 2), (slice(3), 0)])
def test_rows_are_read_by_slices_only(key: Any) -> None:
    with pytest.raises(TypeError, match="read by slices"):
        Rows(X)[key]


def test_threads_read_one_at_a_time() -> None:
    class Slow(Counting):
        inside = most = 0

        def __getitem__(self, key: slice) -> np.ndarray:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.002)
            self.inside -= 1
            return X[key]

    source = Slow()
    both = [Rows(source)] * 2
    both[1] = both[0].take(CHOSEN)
    threads = [threading.Thread(target=lambda r=r: [r[i : i + 9] for i in range(9)]) for r in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.most == 1


# The preliminary pass.


@pytest.mark.parametrize("positions", [None, CHOSEN])
@pytest.mark.parametrize("block", [37, 5000])
def test_the_pass_finds_what_the_array_has(rows: Rows, block: int, positions: Any) -> None:
    if positions is not None:
        rows = rows.take(positions)
    rows.block_rows = block
    x = X if positions is None else X[positions]
    found = data.scan(rows)
    assert data.check_rows(rows, "x", d_in=7) is rows
    assert data.fingerprint(rows) == data.fingerprint(x) == found.fingerprint
    np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=float), rtol=1e-12)
    variance = x.astype(float).var(axis=0)
    np.testing.assert_allclose(found.deviation, variance * len(x), rtol=1e-12)
    for kind in ("zscore", "scalar"):
        expected, normalizer = data.fit_normalizer(x, kind), data.fit_normalizer(rows, kind)
        np.testing.assert_array_max_ulp(normalizer.mean, expected.mean, 1)
        np.testing.assert_array_max_ulp(normalizer.scale, expected.scale, 1)
        assert normalizer.mean.dtype == normalizer.scale.dtype == np.float32
    assert data.fit_normalizer(rows, "none") is None


def test_moments_of_float64_are_those_of_the_array() -> None:
    x = np.random.default_rng(0).normal(size=(3000, 4)) * [1, 20, 0.01, 3] + [1, 1e3, -3, 0]
    rows = Rows(x)
    rows.block_rows = 113
    for kind in ("zscore", "scalar"):
        expected, found = data.fit_normalizer(x, kind), data.fit_normalizer(rows, kind)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-12)


@pytest.mark.parametrize("value", [0.1, 0.3, 7.7, -1e-3, 0.0])
def test_a_constant_dimension_is_left_at_scale_one(value: float) -> None:
    x = np.c_[np.full(1001, value), np.arange(1001)]
    rows = Rows(x)
    rows.block_rows = 10
    np.testing.assert_array_equal(data.fit_normalizer(rows, "zscore").scale[0], 1)
    np.testing.assert_allclose(data.fit_normalizer(rows, "zscore").mean[0], value, rtol=1e-14)


def test_values_that_are_not_finite_are_counted_as_in_an_array() -> None:
    for holes in ([3], [3, 4, 500], [1, 2, 30, 400, 500], [*range(20, 27), 1199]):
        x = X.copy()
        x[holes, 2] = np.nan
        x[holes[0], 4:6] = np.inf
        rows = Rows(x)
        rows.block_rows = 25
        with pytest.raises(InputError) as expected:
            data.check_rows(x, "train")
        with pytest.raises(InputError) as found:
            data.check_rows(rows, "train")
        assert str(found.value) == str(expected.value)
    with pytest.raises(InputError, match=r"1 NaN or infinite values in 1 of 3 rows \(rows 1199\)"):
        data.scan(Rows(x, "x", [0, 7, 1199]))


def test_the_pass_is_made_once() -> None:
    source = Counting()
    rows = Rows(source)
    data.check_rows(rows, "x")
    data.fit_normalizer(rows, "zscore")
    data.fit_normalizer(rows, "scalar")
    data.fingerprint(rows)
    assert source.read == [(0, 1200)]
    assert rows.take(CHOSEN).summary is None


def test_another_width_is_refused_before_reading() -> None:
    source = Counting()
    with pytest.raises(InputError, match=r"^x has 7 dimensions, the dictionary has d_in=4"):
        data.check_rows(Rows(source), "x", d_in=4)
    assert source.read == []


# The order.

plans = st.tuples(
    st.integers(1, 700), st.integers(1, 40), st.integers(1, 90), st.integers(1, 9),
    st.integers(0, 3),
).map(
    lambda p: Plan(max(p[0], p[1]), p[1], p[2], p[3] * p[1] if p[3] < 9 else None, p[4])
)  # fmt: skip


@given(plans, st.integers(0, 5))
def test_every_row_is_used_once_but_for_less_than_a_batch(plan: Plan, epoch: int) -> None:
    positions = plan.positions(epoch)
    assert positions.shape == (plan.rows // plan.batch_size, plan.batch_size)
    assert len(positions) == plan.steps
    assert len(np.unique(positions)) == positions.size
    assert positions.min() >= 0
    assert positions.max() < plan.rows
    np.testing.assert_array_equal(positions, plan.positions(epoch))


@given(plans, st.integers(0, 5))
def test_buffers_are_full_and_read_upwards(plan: Plan, epoch: int) -> None:
    buffers = list(plan.buffers(epoch))
    sizes = [sum(stop - start for start, stop in ranges) for ranges, _ in buffers]
    assert sizes[:-1] == [plan.buffer_rows] * (len(sizes) - 1)
    assert sum(sizes) == plan.steps * plan.batch_size
    for (ranges, order), size in zip(buffers, sizes, strict=True):
        assert order.dtype == np.int32
        assert order.shape == (size // plan.batch_size, plan.batch_size)
        np.testing.assert_array_equal(np.sort(order, axis=None), np.arange(size))
        assert all(start < stop for start, stop in ranges)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
        # A block is cut by the ends of the buffer, and by the place where the sequence begins.
        assert len(ranges) <= size / plan.block + 3


def test_one_seed_and_epoch_have_one_order_for_ever() -> None:
    # Blocks 6-8, 9, 0-2, 3-5, begun at row 8.
    expected = [[1, 9], [8, 0], [4, 3], [5, 2], [7, 6]]
    found = Plan(10, 2, block=3, buffer_rows=4, data_seed=5).positions(2)
    np.testing.assert_array_equal(found, expected)


def test_seed_epoch_block_and_buffer_matter() -> None:
    plan = {"rows": 5000, "batch_size": 10, "block": 64, "buffer_rows": 500, "data_seed": 1}
    orders = [Plan(**plan).positions(epoch) for epoch in (0, 1)]
    for change in ({"data_seed": 2}, {"block": 65}, {"buffer_rows": 510}):
        orders.append(Plan(**plan | change).positions(0))
    assert len({order.tobytes() for order in orders}) == 5


def test_rows_are_mixed_over_blocks_and_within_a_buffer() -> None:
    plan = Plan(100_000, 100, block=256, buffer_rows=10_000, data_seed=0)
    positions = plan.positions(0)
    assert abs(np.corrcoef(positions.ravel(), np.arange(100_000))[0, 1]) < 0.2
    first = positions[:100]  # of a buffer
    assert len(np.unique(first // 256)) <= 41
    assert abs(np.corrcoef(first.ravel(), np.arange(10_000))[0, 1]) < 0.05
    assert np.median([len(np.unique(batch // 256)) for batch in first]) > 30


def test_rows_left_out_are_others_in_every_epoch() -> None:
    for rows, block in ((100, 256), (1000, 64)):
        plan = Plan(rows, 48, block, 48)
        used = np.bincount(
            np.concatenate([plan.positions(i).ravel() for i in range(300)]), minlength=rows
        )
        assert used.min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 5}, "batch_size=10 is more than the 5 rows"),
        ({"buffer_rows": 25}, "buffer_rows=25 must be a multiple of batch_size=10"),
        ({"buffer_rows": 0}, "buffer_rows=0 must be"),
        ({"batch_size": 0}, "must be positive"),
        ({"block": 0}, "must be positive"),
        ({"data_seed": -1}, "data_seed"),
    ],
)
def test_impossible_plans_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan(**{"rows": 100, "batch_size": 10, "buffer_rows": 20} | change)


@given(st.integers(1, 10**6), st.integers(1, 500), st.integers(1, 50))
def test_two_buffers_fit(resident: int, row_bytes: int, batch_size: int) -> None:
    if resident < 2 * row_bytes * batch_size:
        with pytest.raises(InputError, match=f"allow {2 * row_bytes * batch_size} or"):
            streaming.buffer_rows(resident, row_bytes, batch_size)
        return
    rows = streaming.buffer_rows(resident, row_bytes, batch_size)
    assert rows % batch_size == 0
    assert 2 * rows * row_bytes <= resident < 2 * (rows + batch_size) * row_bytes


# Reading ahead.

PLAN = Plan(1200, 16, block=32, buffer_rows=160, data_seed=3)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def _batches(rows: Rows, plan: Plan, epochs: range, **settings: Any) -> list[np.ndarray]:
    found = streaming.prefetched(rows, plan, epochs, **settings)
    return [buffer[step] for buffer, order in found for step in order]


def test_batches_are_those_of_the_positions(rows: Rows) -> None:
    found = _batches(rows, PLAN, range(1, 4))
    expected = [X[step] for epoch in (1, 2, 3) for step in PLAN.positions(epoch)]
    np.testing.assert_array_equal(found, expected)


def test_batches_of_chosen_rows_are_those_of_the_positions() -> None:
    plan = Plan(len(CHOSEN), 16, block=32, buffer_rows=160)
    found = _batches(Rows(X, "x", CHOSEN), plan, range(2), put=lambda x: 2 * x)
    expected = [2 * X[CHOSEN[step]] for epoch in (0, 1) for step in plan.positions(epoch)]
    np.testing.assert_array_equal(found, expected)


def test_skipped_buffers_are_not_read() -> None:
    source = Counting()
    found = _batches(Rows(source), PLAN, range(2), skip=9)  # of 8 an epoch
    np.testing.assert_array_equal(found, [X[step] for step in PLAN.positions(1)[10:]])
    assert sum(stop - start for start, stop in source.read) == 1200 - 160


class Held:
    """A buffer that can be counted."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def test_one_buffer_is_read_ahead_in_another_thread_and_two_exist() -> None:
    made: list[weakref.ref] = []
    threads, most = set(), 0

    def put(array: np.ndarray) -> Held:
        nonlocal most
        threads.add(threading.current_thread().name)
        held = Held(array)
        made.append(weakref.ref(held))
        time.sleep(0.005)  # in which the consumer lets go of the buffer before the last
        most = max(most, sum(ref() is not None for ref in made))
        return held

    count = 0
    for _, order in streaming.prefetched(Rows(X), PLAN, range(2), put):
        count += 1
        assert len(order)
        deadline = time.monotonic() + 10
        while len(made) < min(count + 1, 16) and time.monotonic() < deadline:
            time.sleep(0.001)  # the next one is read meanwhile, also across the epochs
        assert len(made) == min(count + 1, 16)
    assert count == 16
    assert most == 2
    assert len(threads) == 1
    assert threads != {threading.current_thread().name}


def test_what_the_thread_raises_comes_after_the_buffers_before_it() -> None:
    class Damaged(Counting):
        def __getitem__(self, key: slice) -> np.ndarray:
            self.read.append((key.start, key.stop))
            if len(self.read) > 12:
                raise RuntimeError("blosc: error -1")
            return X[key]

    buffers = streaming.prefetched(Rows(Damaged(), "x"), PLAN, range(2))
    assert len(list(zip(range(2), buffers, strict=False))) == 2
    with pytest.raises(InputError, match=r"x, rows \d+ to \d+, is damaged: blosc: error -1"):
        list(buffers)

    def put(array: np.ndarray) -> None:
        raise KeyError("device")

    with pytest.raises(KeyError, match="device"):
        next(streaming.prefetched(Rows(X), PLAN, range(1), put))


def test_closing_early_waits_for_the_thread() -> None:
    source = Counting()
    with contextlib.closing(streaming.prefetched(Rows(source), PLAN, range(9))) as buffers:
        next(buffers)
    read = len(source.read)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    time.sleep(0.01)
    assert len(source.read) == read
    streaming.prefetched(Rows(source), PLAN, range(9)).close()  # never begun


def test_no_epochs_have_no_buffers() -> None:
    assert list(streaming.prefetched(Rows(X), PLAN, range(0))) == []


def test_a_plan_for_other_rows_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="the plan is for 1200 rows, x has 7"):
        streaming.prefetched(Rows(X, "x", FAR), PLAN, range(1))

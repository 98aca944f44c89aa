"""The index against the files it is made of, whatever its parts' size; when it is made anew."""

import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import roc_auc_score

from analysis.browser import index
from analysis.browser.run import Run
from sae_jax import InputError
from tests.analysis.browser import run_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases.lens(tmp_path_factory.mktemp("index") / "run")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return Run.open([folder], folder.parent / "state")


def test_it_is_told_of_when_it_is_made(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with caplog.at_level("INFO", logger="absl"):
            Run.open([folder], tmp_path)
        assert caplog.text.count("making an index") == 1  # the first time


def test_columns_and_rows_are_those_of_the_file(run: Run, folder: Path) -> None:
    x = anndata.read_h5ad(folder / "features.h5ad").X.toarray()
    for feature in range(run.n_features):
        cells, values = run.index.entries("by_feature", feature)
        assert np.array_equal(cells, np.flatnonzero(x[:, feature]))
        assert np.array_equal(values, x[cells, feature])
    for cell in range(run.n_cells):
        features, values = run.index.entries("by_cell", cell)
        assert np.array_equal(features, np.flatnonzero(x[cell]))
        assert np.array_equal(values, x[cell, features])
    assert np.allclose(run.index["sum"], x.sum(axis=0, dtype=np.float64))
    assert np.allclose(run.index["square"], (x.astype(np.float64) ** 2).sum(axis=0))
    assert np.array_equal(run.index["maximum"], x.max(axis=0))


def test_aurocs_and_counts_of_every_label_are_scikit_learns(run: Run, folder: Path) -> None:
    adata = anndata.read_h5ad(folder / "features.h5ad")
    x = adata.X.toarray()
    for _, held, place in run.labels():
        label = adata.obs[held["name"]]
        known = label.notna().to_numpy()
        assert (held["missing"] is not None) == (not known.all())
        for v, value in enumerate(held["categories"]):
            inside = (label == value).to_numpy()
            active = (x[inside] > 0).sum(axis=0)
            assert np.array_equal(run.index["of_label"][:, place.start + v], active)
            areas = [roc_auc_score(inside[known], x[known, f]) for f in range(0, 96, 7)]
            assert np.allclose(run.index["auroc"][::7, place.start + v], areas, atol=1e-6)


def test_ties_and_lonely_labels() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (60, 7)).astype(float)
    codes = np.r_[np.full(30, 0), np.full(25, 1), np.full(5, 2)]  # 2 is missing
    areas, active = index.label_areas(sparse.csc_array(x), [index.OneHot(codes, 2)])
    for f in range(7):
        assert np.isclose(areas[f, 1], roc_auc_score(codes[:55] == 1, x[:55, f]))
        assert active[f].tolist() == [(x[codes == v, f] > 0).sum() for v in (0, 1)]
    alone = index.label_areas(sparse.csc_array(x), [index.OneHot(np.zeros(60, int), 1)])[0]
    assert np.isnan(alone).all()


@pytest.mark.parametrize(
    ("values", "label", "kind", "categories", "missing"),
    [
        ([2, 10, 2, 1], True, "category", ["1", "2", "10"], None),
        ([2, 10, 2, 1], False, "number", None, None),
        (["b", None, "a", "b"], False, "category", ["a", "b"], 2),
        (pd.Categorical(["b", "a", "b"], ["z", "b", "a"]), False, "category", ["b", "a"], None),
        ([True, False, True, True], False, "category", ["False", "True"], None),
        (["w", "x", "y", "z"], False, "name", None, None),
    ],
)  # fmt: skip
def test_what_a_column_of_the_cells_is(
    tmp_path: Path, values: Any, label: bool, kind: str, categories: list[str] | None,
    missing: int | None,
) -> None:  # fmt: skip
    writer = index.Writer(tmp_path / "index")
    held = index._write_column(writer, "x", pd.Series(values), label)
    assert (held["kind"], held.get("categories"), held.get("missing")) == (
        kind, categories, missing
    )  # fmt: skip


def test_the_size_of_the_parts_changes_nothing(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BLOCK", 37)
    other = Run.open([folder], folder.parent / "small parts")
    assert other.index.meta == run.index.meta
    for name in run.index.meta["arrays"]:
        assert np.array_equal(
            run.index[name], other.index[name], equal_nan=run.index[name].dtype.kind == "f"
        ), name


@given(
    st.lists(st.text("ab☃\n", max_size=5), max_size=8), st.text("ab☃", min_size=1, max_size=3),
    st.integers(1, 4),
)  # fmt: skip
def test_texts_are_found_as_by_a_plain_loop(texts: list[str], part: str, most: int) -> None:
    encoded = [text.encode() for text in texts]
    start = np.cumsum([0, *map(len, encoded)])
    held = index.Texts(np.frombuffer(b"".join(encoded), np.uint8), start)
    assert [held[i] for i in range(len(held))] == texts
    assert held.find(part, most) == [i for i, text in enumerate(texts) if part in text][:most]


def test_coordinates_keep_their_places() -> None:
    xy = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    codes, ranges = index.scaled(xy)
    for axis in (0, 1):
        low, high = ranges[axis]
        assert (low, high) == (xy[:, axis].min(), xy[:, axis].max())
        assert np.allclose(low + codes[axis] / 65535 * (high - low), xy[:, axis], atol=1e-4)
    assert index.scaled(np.ones((3, 2)))[0].tolist() == [[0, 0, 0], [0, 0, 0]]


KEYS = [f"{i:x}" * 64 for i in range(5)]


def maker(key: str, made: list[Path], value: int = 0) -> Callable[[Path], None]:
    """Writes an index of one array."""

    def make(path: Path) -> None:
        made.append(path)
        writer = index.Writer(path)
        writer.save("x", np.arange(3) + value)
        writer.finish(key=key)

    return make


def test_it_is_made_once_for_a_key(tmp_path: Path) -> None:
    made: list[Path] = []
    place = tmp_path / "index"
    first = index.opened(place, KEYS[0], maker(KEYS[0], made))
    assert index.opened(place, KEYS[0], maker(KEYS[0], made))["x"].tolist() == [0, 1, 2]
    assert len(made) == 1
    index.opened(place, KEYS[1], maker(KEYS[1], made, 7))
    assert len(made) == 2
    assert first["x"].tolist() == [0, 1, 2]
    (place / KEYS[1][:16] / "x").write_bytes(b"short")  # damaged
    index.opened(place, KEYS[1], maker(KEYS[1], made))
    assert len(made) == 3
    alike = KEYS[1][:16] + "0" * 48  # of the same folder's name
    assert index.opened(place, alike, maker(alike, made, 9))["x"].tolist() == [9, 10, 11]

    def fail(path: Path) -> None:
        index.Writer(path).save("x", np.arange(9))
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        index.opened(place, KEYS[4], fail)
    assert {path.name for path in place.iterdir()} == {KEYS[0][:16], KEYS[1][:16]}
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        index.opened(tmp_path / "file" / "index", KEYS[0], maker(KEYS[0], made))


def test_the_last_opened_stay_and_those_in_use(tmp_path: Path) -> None:
    place = tmp_path / "index"
    (place / "of someone").mkdir(parents=True)
    held = index.opened(place, KEYS[0], maker(KEYS[0], []))
    for key in KEYS[1:4]:
        index.opened(place, key, maker(key, []))
        time.sleep(0.01)
    index.opened(place, KEYS[1], maker(KEYS[1], []))
    index.opened(place, KEYS[4], maker(KEYS[4], []))
    names = {path.name for path in place.iterdir()}
    assert names == {"of someone", *(KEYS[i][:16] for i in (0, 1, 3, 4))}
    assert held["x"].tolist() == [0, 1, 2]
    del held
    index.opened(place, KEYS[2], maker(KEYS[2], []))
    assert KEYS[0][:16] not in {path.name for path in place.iterdir()}


def test_of_two_at_once_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    made: list[Path] = []
    begun = threading.Event()

    def slow(path: Path) -> None:
        begun.set()
        time.sleep(0.2)
        maker(KEYS[0], made)(path)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(index.opened, tmp_path / "index", KEYS[0], slow)
        begun.wait()
        second = index.opened(tmp_path / "index", KEYS[0], maker(KEYS[0], made, 7))
    assert len(made) == 1
    assert first.result()["x"].tolist() == second["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("most", [100, 5_000, 13_000])  # bytes of a file
def test_a_full_disk_is_no_damaged_run(folder: Path, tmp_path: Path, most: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(InputError) as caught:
            Run.open([folder], tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = str(caught.value)
    assert told.startswith(f"there is no room in {tmp_path / 'state'}: ")
    assert "it is damaged" not in told
    assert "needs about 0.1 MB" in told
    assert not list((tmp_path / "state" / "index").iterdir())
    Run.open([folder], tmp_path / "state")

"""The store by itself: what a Writer leaves, refuses and takes up again. No model runs here."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

import sae_jax.manifest
from extract import InputError, disk, export, hashing, manifest, progress, provenance, store
from extract.tokens import token_table

WIDTH, CELLS = 4, 10
LAYERS = {"layer_00": 0, "layer_01": 1}
OBS = pd.DataFrame(index=[f"c{i}" for i in range(CELLS)])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a chunk, three rows a block, of which one is left out where cells have one each."""
    monkeypatch.setattr(store, "_CHUNK_BYTES", 2 * WIDTH * 4)
    monkeypatch.setattr(store, "BLOCK_BYTES", 3 * WIDTH * 4 * len(LAYERS))


def about(obs: pd.DataFrame = OBS, **more: Any) -> dict[str, Any]:
    found = {"pooling": "cls", "empty_cells": [], "store_dtype": "float32"} | more
    found["obs_names_sha256"] = hashing.rows_hash(obs, found["pooling"])
    return found | {"identity": provenance.identity(found)}


SHARED = np.array([3, 3, 3, 1])  # rows of cells: a block each, and two share a chunk


def writer(folder: Path, dtype: str = "float32", **more: Any) -> store.Writer:
    options = {key: more.pop(key) for key in ("overwrite", "rows") if key in more}
    return store.Writer(folder, dict(LAYERS), OBS, WIDTH, about(**more), dtype, **options)


def values(layer: int) -> np.ndarray:
    return np.random.default_rng(layer).normal(size=(CELLS, WIDTH)).astype(np.float32)


def fill(some: store.Writer, most: int = 99) -> list[int]:
    """Writes what is not done, `most` blocks at most; returns which."""
    todo = [block for block in some.blocks if block.number not in some.done][:most]
    for block in todo:
        part = {name: values(layer)[block.rows] for name, layer in some.layers.items()}
        some.write(block.number, block.rows, part)
    return [block.number for block in todo]


def check(folder: Path) -> None:
    for name, layer in LAYERS.items():
        found = store.open(folder / f"{name}.zarr")
        found.verify()
        np.testing.assert_array_equal(found.X[:], values(layer))
    assert not (folder / ".extracting").exists()


def chunk(folder: Path, number: int, name: str = "layer_00") -> Path:
    return folder / f"{name}.zarr/X/c/{number}/0"


def test_a_missing_chunk_is_never_zeros(tmp_path: Path) -> None:
    some = writer(tmp_path)
    fill(some)
    some.finish()
    check(tmp_path)
    chunk(tmp_path, 2).unlink()
    rows = zarr.open_group(tmp_path / "layer_00.zarr", mode="r")["X"][:]
    assert np.isnan(rows).any(axis=1).nonzero()[0].tolist() == [4, 5]


def test_rows_of_empty_cells_are_chunks_too(tmp_path: Path) -> None:
    some = writer(tmp_path, empty_cells=["c4", "c5"])
    for block in some.blocks:
        part = values(0)
        part[4:6] = np.nan
        some.write(block.number, block.rows, dict.fromkeys(LAYERS, part[block.rows]))
    some.finish()
    assert chunk(tmp_path, 2).is_file()
    store.open(tmp_path / "layer_00.zarr")


def test_chunks_are_on_disk_before_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = writer(tmp_path)
    events: list[Path] = []
    monkeypatch.setattr(manifest, "sync", events.append)
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (events.append(target), replace(self, target))[1]
    )
    fill(some, 1)
    named = events.index(tmp_path / ".extracting/progress.json")
    for name in LAYERS:
        file = chunk(tmp_path / ".extracting", 0, name)
        written = events.index(file)  # zarr renames to it
        assert written < events.index(file, written + 1) < named
        assert file.parent in events[:named]


def test_chunks_that_were_deleted_are_computed_again(tmp_path: Path) -> None:
    some = writer(tmp_path)
    fill(some)
    chunk(tmp_path / ".extracting", 2, "layer_01").unlink()
    with pytest.raises(InputError, match=r"1 of 5 blocks are missing.*give the same command again"):
        some.finish()
    assert not list(tmp_path.glob("*.zarr"))
    again = writer(tmp_path)
    assert fill(again) == [2]
    again.finish()
    check(tmp_path)


def test_a_chunk_that_two_blocks_share(tmp_path: Path) -> None:
    fill(writer(tmp_path, rows=SHARED))
    chunk(tmp_path / ".extracting", 1).unlink()  # rows 2 and 3
    again = writer(tmp_path, rows=SHARED)
    assert fill(again) == [0, 1]
    again.finish()
    check(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "zeros", "flip"])
def test_a_shared_chunk_that_a_power_cut_damaged(tmp_path: Path, damage: str) -> None:
    """It was renamed for the block that was being written, but not yet flushed."""
    fill(writer(tmp_path, rows=SHARED), 3)
    file = chunk(tmp_path / ".extracting", 4, "layer_01")  # rows 8 and 9, of blocks 2 and 3
    whole = file.read_bytes()
    flipped = whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]
    file.write_bytes({"empty": b"", "zeros": bytes(len(whole)), "flip": flipped}[damage])
    again = writer(tmp_path, rows=SHARED)
    assert fill(again) == [2, 3]
    again.finish()
    check(tmp_path)


@pytest.mark.parametrize("width", [1, 200, 896, 1152, 12_800, 2_000_000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layers", [1, 25])
def test_blocks_of_cells_with_a_row_each_are_whole_chunks(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: str, layers: int
) -> None:
    monkeypatch.undo()
    some = store.Writer.__new__(store.Writer)
    some._rows = np.ones(100_000, np.int64)
    some._obs, some._width, some.dtype = some._rows, width, dtype
    rows, bounds = some._cut(layers)
    assert bounds[0] == 0
    assert bounds[-1] == 100_000
    steps = np.diff(bounds)
    assert (steps[:-1] % rows == 0).all()
    assert rows <= steps[0] <= store.BLOCK_CELLS
    if rows > 1:
        assert steps[0] * width * 4 * layers <= store.BLOCK_BYTES
        assert rows * width * (4 if dtype == "float32" else 2) <= store._CHUNK_BYTES


def test_what_a_kill_left_of_a_chunk_is_deleted(tmp_path: Path) -> None:
    fill(writer(tmp_path), 1)
    partial = chunk(tmp_path / ".extracting", 1).with_suffix(".0123abcd.partial")
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    again = writer(tmp_path)
    fill(again)
    again.finish()
    check(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_blocks_are_as_large_as_their_rows_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BLOCK_BYTES", 6 * WIDTH * 4 * len(LAYERS))
    monkeypatch.setattr(store, "BLOCK_CELLS", 4)
    rows = np.array([2, 4, 1, 9, 0, 1, 1, 1, 1, 1])
    obs = pd.DataFrame(index=[f"t{i}" for i in range(rows.sum())])

    def tokens() -> store.Writer:
        return store.Writer(tmp_path, dict(LAYERS), obs, WIDTH, about(obs), "float32", rows=rows)

    expected = [(0, 2, 0, 6), (2, 3, 6, 7), (3, 4, 7, 16), (4, 8, 16, 19), (8, 10, 19, 21)]

    def spans(some: store.Writer) -> list[tuple[int, ...]]:
        return [(b.cells.start, b.cells.stop, b.rows.start, b.rows.stop) for b in some.blocks]

    assert spans(tokens()) == expected
    assert spans(tokens()) == expected
    monkeypatch.setattr(store, "BLOCK_BYTES", 1)  # in another version, say
    with pytest.raises(InputError, match="by another version, in other blocks"):
        tokens()


def test_identity_alone_decides_what_goes_on(tmp_path: Path) -> None:
    fill(writer(tmp_path, input="here", versions={"numpy": "1"}), 2)
    assert fill(writer(tmp_path, input="there", versions={"numpy": "2"}), 1) == [2]
    with pytest.raises(
        InputError,
        match=r"unfinished .*\(pooling 'cls', not 'mean', store_dtype 'float32', not 'float16'\)",
    ):
        writer(tmp_path, pooling="mean", store_dtype="float16")
    assert fill(writer(tmp_path, overwrite=True), 1) == [3]
    assert fill(writer(tmp_path, pooling="mean", overwrite=True)) == [0, 1, 2, 3, 4]


def test_layers_that_were_begun_are_finished_first(tmp_path: Path) -> None:
    fill(writer(tmp_path), 2)
    one = store.Writer(tmp_path, {"layer_07": 7}, OBS, WIDTH, about(), "float32")
    assert one.layers == LAYERS
    assert fill(one) == [2, 3, 4]
    one.finish()
    check(tmp_path)


def test_overwriting_leaves_the_old_until_the_new_is_there(tmp_path: Path) -> None:
    some = writer(tmp_path)
    fill(some)
    some.finish()
    mean = about(pooling="mean")
    with pytest.raises(InputError, match=r"another extraction \(pooling 'cls', not 'mean'\)"):
        store.finished(tmp_path, "layer_00", mean)
    assert store.finished(tmp_path, "layer_00", about(), overwrite=True)
    assert not store.finished(tmp_path, "layer_00", mean, overwrite=True)
    again = writer(tmp_path, pooling="mean", overwrite=True)
    fill(again, 3)
    assert store.open(tmp_path / "layer_00.zarr").extraction["pooling"] == "cls"
    fill(again)
    again.finish()
    assert store.open(tmp_path / "layer_00.zarr").extraction["pooling"] == "mean"
    check(tmp_path)


def test_what_is_not_ours_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "layer_00.zarr"
    anndata.AnnData(np.ones((3, 2), np.float32)).write_zarr(path)
    with pytest.raises(InputError, match="in the way and no extraction store"):
        writer(tmp_path, overwrite=True)
    assert anndata.read_zarr(path).shape == (3, 2)
    assert not (tmp_path / ".extracting").exists()


FORGED = {"extraction": about(), "layers": LAYERS, "bounds": [0, 2, 4, 6, 8, 10], "done": [0]}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"extraction": 1', "[" * 100_000, json.dumps(FORGED),
     *(progress._text(FORGED | change) for change in (
         {"layers": {"../../x": 0}}, {"layers": {}}, {"layers": []}, {"bounds": "ab"},
         {"bounds": [0, 2.0]}, {"done": [5]}, {"done": [-1]}, {"done": [True]},
         {"extraction": []}, {"more": 1}))],
)  # fmt: skip
def test_a_damaged_list_of_blocks(tmp_path: Path, text: str) -> None:
    fill(writer(tmp_path), 2)
    path = tmp_path / ".extracting/progress.json"
    path.write_text(text)
    with pytest.raises(
        InputError, match=r"progress\.json is damaged: .*; give --overwrite"
    ) as told:
        writer(tmp_path)
    assert "\n" not in str(told.value)
    assert path.read_text() == text
    assert fill(writer(tmp_path, overwrite=True)) == [0, 1, 2, 3, 4]


def test_blocks_are_cut_as_here_and_not_as_a_file_says(tmp_path: Path) -> None:
    fill(writer(tmp_path), 2)
    forged = progress._text(FORGED | {"bounds": [0, 10], "done": [0]})
    (tmp_path / ".extracting/progress.json").write_text(forged)
    with pytest.raises(InputError, match=r"in other blocks: .* give --overwrite"):
        writer(tmp_path)


def test_every_byte_of_the_list_of_blocks_counts(tmp_path: Path) -> None:
    fill(writer(tmp_path), 2)
    path = tmp_path / ".extracting/progress.json"
    content = path.read_bytes()
    for place in np.random.default_rng(0).permutation(len(content))[:200].tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"progress\.json is damaged"):
            progress.Progress.load(path)
    path.write_bytes(content)
    assert progress.Progress.load(path).done == [0, 1]


def test_what_is_begun_and_damaged_is_told(tmp_path: Path) -> None:
    fill(writer(tmp_path), 2)
    (tmp_path / ".extracting/layer_01.zarr/X/zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"\.extracting is damaged, give --overwrite: "):
        writer(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "bad", "named"), [("float32", np.nan, "c2"), ("float16", 1e6, "c4")]
)
def test_values_that_are_not_finite(tmp_path: Path, dtype: str, bad: float, named: str) -> None:
    some = writer(tmp_path, dtype, empty_cells=["c3"])
    fill(some, 1)
    block = some.blocks[1]
    part = {name: values(layer)[block.rows] for name, layer in LAYERS.items()}
    part["layer_01"][:2, 1] = bad  # c3, which is empty, and another
    told = rf"layer_01: the rows of 1 cell hold .* as {dtype} \({named}\)"
    with pytest.raises(InputError, match=told):
        some.write(1, block.rows, part)
    assert progress.Progress.load(tmp_path / ".extracting/progress.json").done == [0]


@pytest.mark.parametrize("damage", ["delete", "cut", "flip", "obs", "unfinished"])
def test_a_damaged_store_is_not_opened(tmp_path: Path, damage: str) -> None:
    some = writer(tmp_path)
    fill(some)
    path, _ = some.finish()
    file = chunk(tmp_path, 0)
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "obs":
        names = next(p for p in (path / "obs/_index/c").rglob("*") if p.is_file())
        names.write_bytes(names.read_bytes()[::-1])
    else:
        meta = json.loads((path / "zarr.json").read_text())
        del meta["attributes"]["extraction-manifest"]
        (path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"layer_00\.zarr"):
        store.open(path)
    with pytest.raises(InputError, match="--overwrite replaces it"):
        store.finished(tmp_path, "layer_00", about())
    assert not store.finished(tmp_path, "layer_00", about(), overwrite=True)


def test_every_file_of_a_store_counts(tmp_path: Path) -> None:
    some = writer(tmp_path)
    fill(some)
    path, _ = some.finish()
    inside = [each for each in sorted(path.rglob("*")) if each.is_file()]
    assert manifest.check(path) == manifest.check(path, "full") == len(inside)
    rng = np.random.default_rng(0)
    for file in inside:
        content = file.read_bytes()
        places = rng.integers(len(content), size=300 if file == path / "zarr.json" else 2)
        for place in places.tolist():
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place % 8)
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=r"layer_00\.zarr is damaged"):
                manifest.check(path, "full")
            if file == path / "zarr.json":
                with pytest.raises(InputError, match=r"layer_00\.zarr is damaged"):
                    manifest.check(path)
        file.unlink()
        with pytest.raises(InputError, match=r"layer_00\.zarr"):
            store.open(path)
        file.write_bytes(content)
    store.open(path, "full").verify()


def test_a_manifest_as_it_was_before_is_read(tmp_path: Path) -> None:
    some = writer(tmp_path)
    fill(some)
    path, _ = some.finish()
    meta = json.loads((path / "zarr.json").read_text())
    noted = meta["attributes"]["extraction-manifest"]
    meta["attributes"]["extraction-manifest"] = noted["files"]
    (path / "zarr.json").write_text(json.dumps(meta))
    store.open(path, "full")
    meta["attributes"]["extraction-manifest"] = noted | {"format": 3}
    (path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="format 3, of a newer version"):
        store.open(path)


def test_all_its_arrays_have_checksums(tmp_path: Path) -> None:
    some = writer(tmp_path)
    fill(some)
    path, _ = some.finish()
    for file in path.rglob("zarr.json"):
        meta = json.loads(file.read_text())
        if meta["node_type"] == "array" and meta["shape"]:
            assert meta["codecs"][-1]["name"] == "crc32c", file


def test_a_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no extraction store"):
        store.open(tmp_path)


# Tokens


def tokens(seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cells = np.array(["b", "a", "empty", "5"], object)
    rows = np.array([3, 2, 0, 4])
    ids = rng.integers(3, 9, rows.sum()).astype(np.int32)
    names = np.array([f"gene{i}" for i in range(20)], object)
    return token_table(cells, rows, ids, names.__getitem__), np.repeat(cells, rows), ids, names


def test_the_table_of_tokens() -> None:
    table, cells, ids, names = tokens()
    assert table["cell"].tolist() == cells.tolist()
    assert table["gene"].tolist() == names[ids].tolist()
    assert table["gene"].cat.categories.tolist() == [f"gene{i}" for i in np.unique(ids)]
    nothing = token_table(["a"], np.array([0]), np.zeros(0, np.int32), names.__getitem__)
    assert nothing.shape == (0, 2)


def test_the_hash_of_tokens_is_of_cells_and_their_rows() -> None:
    table = tokens()[0]
    same = tokens(1)[0]
    as_text = hashing.names_hash(["b\0" + "3", "a\0" + "2", "5\0" + "4"])
    assert hashing.rows_hash(table, "tokens") == as_text
    assert hashing.rows_hash(same, "tokens") == as_text
    fewer = table.iloc[1:]
    assert hashing.rows_hash(fewer, "tokens") != as_text
    assert hashing.rows_hash(table.iloc[::-1], "tokens") != as_text


@pytest.mark.parametrize("cells", [1, 10])
def test_a_store_of_tokens(tmp_path: Path, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK_CELLS", cells)  # of 1: a block without rows
    table, of, ids, names = tokens()
    extraction = about(table, pooling="tokens", empty_cells=["empty"])
    rows = np.array([3, 2, 0, 4])
    part = np.random.default_rng(0).normal(size=(9, WIDTH)).astype(np.float32)

    def fresh() -> store.Writer:
        return store.Writer(
            tmp_path, {"latent": "latent"}, table, WIDTH, extraction, "float32", rows=rows
        )

    bad = part.copy()
    bad[1] = np.inf
    some = fresh()
    with pytest.raises(InputError, match=r"\(b\)"):
        some.write(0, some.blocks[0].rows, {"latent": bad[some.blocks[0].rows]})
    some = fresh()
    for block in some.blocks:
        some.write(block.number, block.rows, {"latent": part[block.rows]})
    (path,) = some.finish()
    found = store.open(path)
    pd.testing.assert_frame_equal(found.obs, table)
    npy, text = export.export_npy(path)
    np.testing.assert_array_equal(np.load(npy), part)
    lines = [f"{cell}\t{gene}" for cell, gene in zip(of, names[ids], strict=True)]
    assert text.read_text().splitlines() == lines


def test_differences_that_anndata_made_of_the_same_settings(tmp_path: Path) -> None:
    """What is read from a store is arrays and scalars of NumPy; none of it is another setting."""
    settings = {"a": None, "b": [], "c": ["x"], "d": 1.5, "e": True, "f": {}, "g": [1, 2], "h": 3}
    some = writer(tmp_path, preprocessing=settings)
    fill(some)
    some.finish()
    found = store.open(tmp_path / "layer_00.zarr").extraction
    asked = about(preprocessing=settings | {"h": 4})
    assert provenance.differences(found, asked) == "preprocessing.h 3, not 4"


# Plain arrays


def finished(folder: Path, obs: pd.DataFrame = OBS) -> Path:
    some = store.Writer(folder, {"layer_00": 0}, obs, WIDTH, about(obs), "float32")
    for block in some.blocks:
        some.write(block.number, block.rows, {"layer_00": values(0)[block.rows]})
    return some.finish()[0]


def test_exported_arrays_are_in_a_manifest(tmp_path: Path) -> None:
    sae_jax.files.write_json(tmp_path / "settings.json", {})
    sae_jax.manifest.write(tmp_path)  # of a run that is in this folder as well
    path = finished(tmp_path, OBS.set_axis(["c é", "", *OBS.index[2:]]))
    for _ in range(2):
        npy, text = export.export_npy(path)
        np.testing.assert_array_equal(np.load(npy), values(0))
        assert text.read_bytes().decode("utf-8").split("\n")[:3] == ["c é", "", "c2"]
        assert sae_jax.manifest.check(tmp_path, "full") == 3
    left = {"layer_00.zarr", "layer_00.npy", "layer_00.names.txt", "manifest.json", "settings.json"}
    assert {each.name for each in tmp_path.iterdir()} == left
    for file in (npy, text):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(sae_jax.InputError, match=f"{file.name} has other contents"):
            sae_jax.manifest.check(tmp_path, "full")
        file.write_bytes(content)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged \(delete it"):
        export.export_npy(path)


@pytest.mark.parametrize("others", [True, False])
def test_what_was_exported_goes_with_its_store(tmp_path: Path, others: bool) -> None:
    if others:
        sae_jax.files.write_json(tmp_path / "settings.json", {})
        sae_jax.manifest.write(tmp_path)
    export.export_npy(finished(tmp_path))
    some = writer(tmp_path, overwrite=True, preprocessing={"other": 1})
    fill(some)
    assert (tmp_path / "layer_00.npy").exists()  # until the new store is whole
    some.finish()
    left = {"layer_00.zarr", "layer_01.zarr"}
    left |= {"manifest.json", "settings.json"} if others else set()
    assert {each.name for each in tmp_path.iterdir()} == left
    if others:
        assert sae_jax.manifest.check(tmp_path, "full") == 1


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\r", "\n", "a\x85b", "a\u2028b", "\ud800"])
def test_names_that_no_line_holds(name: str) -> None:
    with pytest.raises(InputError, match=r"--export: 1 names .* hold a tab, the end of a line"):
        export.check_names(["fine", name, "é ü", ""])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str
) -> None:
    path = finished(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: Any, **__: Any) -> None:
        raise error

    where, name = {"write": (export.np, "ascontiguousarray"), "sync": (manifest, "sync"),
                   "rename": (Path, "rename")}[moment]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        kind = disk.DiskError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(kind) as told:
            export.export_npy(path)
    if isinstance(error, OSError):
        message = r"layer_00\.npy cannot be written: No space left on device; 160 bytes are wanted"
        assert told.match(message)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_export_left_goes_with_the_next_start(tmp_path: Path) -> None:
    (tmp_path / store.EXPORTING).mkdir()
    (tmp_path / store.EXPORTING / "layer_00.npy").write_text("half")
    with store.locked(tmp_path):
        assert [each.name for each in tmp_path.iterdir()] == [".lock"]


# Full disks


@pytest.mark.parametrize("moment", ["lock", "begin", "progress", "block", "finish", "manifest"])
def test_a_full_disk_is_told_with_the_path_and_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_block(array: zarr.Array, *given: Any) -> None:
        return full() if array.ndim == 2 else write(array, *given)

    write = zarr.Array.__setitem__
    where, name, told = {
        "lock": (store.lock, "_describe", r"\.lock cannot be written: No space"),
        "begin": (store.Writer, "_create", r"layer_00\.zarr cannot .* 160 bytes are wanted"),
        "progress": (progress, "os", r"\.json cannot .* [\d,]{3,} bytes are wanted"),
        "block": (zarr.Array, "__setitem__", r"layer_00\.zarr cannot .* 32 bytes are wanted"),
        "finish": (manifest, "sha256", r"layer_00\.zarr cannot be written: No space"),
        "manifest": (Path, "write_bytes", r"zarr\.json cannot .* [\d,]{3,} bytes are wanted"),
    }[moment]

    def work() -> None:
        with store.locked(tmp_path / "out"):
            some = writer(tmp_path / "out")
            fill(some)
            some.finish()

    fail: Any = {"progress": SimpleNamespace(fsync=full), "block": full_block}.get(moment, full)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        with pytest.raises(disk.DiskError, match=told):
            work()
    left = [each.name for each in (tmp_path / "out").iterdir()]
    assert left == ([] if moment in ("lock", "begin", "progress") else [".extracting"])
    work()
    check(tmp_path / "out")

import json
import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sae_jax import files


class BrokenDiskError(Exception):
    pass


def half_write(path: Path, error: type[BaseException]) -> None:
    if path.name == "folder":
        path.mkdir()
        path = path / "part"
    path.write_text("half")
    raise error


def test_a_file_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.txt"
    with files.write_aside(path) as fresh:
        assert fresh.name == "file.txt"
        fresh.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_an_old_file_is_replaced_in_one_rename(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with path.open() as reader, files.write_aside(path) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old"
        held = reader
        assert held.read() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_is_replaced_by_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with files.write_aside(path) as fresh:
        (fresh / "deep").mkdir(parents=True)
        (fresh / "deep" / "new").write_text("new")
        assert (path / "old").exists()
    assert [p.relative_to(path).as_posix() for p in sorted(path.rglob("*"))] == ["deep", "deep/new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [BrokenDiskError, KeyboardInterrupt])
def test_nothing_is_left_of_a_body_that_raises(tmp_path: Path, error: type) -> None:
    for path in (tmp_path / "file.txt", tmp_path / "folder"):
        with pytest.raises(error), files.write_aside(path) as fresh:
            half_write(fresh, error)
    assert list(tmp_path.iterdir()) == []


def test_the_old_contents_survive_a_body_that_raises(tmp_path: Path) -> None:
    file, folder = tmp_path / "file.txt", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "part").write_text("old")
    for path in (file, folder):
        with pytest.raises(BrokenDiskError), files.write_aside(path) as fresh:
            half_write(fresh, BrokenDiskError)
    assert file.read_text() == (folder / "part").read_text() == "old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file.txt", "folder", "part"]


def test_everything_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    flush, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        happened.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        flush(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        happened.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    with files.write_aside(tmp_path / "folder") as fresh:
        fresh.mkdir()
        (fresh / "part").write_text("x")
    assert sorted(happened[:2]) == ["folder", "part"]
    assert happened[2:] == ["rename", tmp_path.name]


def test_a_failed_flush_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"), files.write_aside(path) as fresh:
        fresh.write_text("new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_failed_rename_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "part").write_text("old")
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if Path(target) == path and "replaced" not in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="Input/output"), files.write_aside(path) as fresh:
        fresh.mkdir()
    assert (path / "part").read_text() == "old"


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """The folder it is written in aside is private; what appears in the end must not be."""
    before = os.umask(0o022)
    try:
        files.write_json(tmp_path / "file.json", 1)
        with files.write_aside(tmp_path / "folder") as fresh:
            fresh.mkdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_json_round_trips_and_refuses_nan(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    files.write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == value
    with pytest.raises(ValueError, match="Out of range float"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == value
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_parquet_round_trips_without_the_index_and_finds_a_flipped_bit(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = pd.DataFrame({"a": np.arange(1000.0), "k": pd.array([1, None] * 500, dtype="Int64")})
    path = tmp_path / "x.parquet"
    files.write_parquet(path, table.set_index(np.arange(1000) + 7))
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)

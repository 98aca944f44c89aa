import contextlib
import errno
import gzip
import json
import os
import re
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import zarr

from sae_jax import InputError, disk, files
from sae_jax.disk import DiskError


class BrokenDiskError(Exception):
    pass


def half_write(path: Path, error: type[BaseException]) -> None:
    if path.name == "folder":
        path.mkdir()
        path = path / "part"
    path.write_text("half")
    raise error


def write_folder(path: Path, text: str) -> None:
    with files.write_aside(path) as fresh:
        fresh.mkdir()
        (fresh / "part").write_text(text)


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
    assert happened[2:] == ["rename", "rename", tmp_path.name]


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_stopped_between_two_renames_one_folder_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, before: bool, error: BaseException
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "part").write_text("old")
    rename, calls = Path.rename, []

    def stopped(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number and before:
            raise error
        moved = rename(self, target)
        if len(calls) == number:
            raise error
        return moved

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises((KeyboardInterrupt, OSError)):
        write_folder(path, "new")
    assert (path / "part").read_text() == ("new" if number == 2 and not before else "old")
    assert list(tmp_path.iterdir()) == [path]


def test_the_only_copy_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it cannot be put back; what a process leaves so, the next puts back."""
    path = tmp_path / "a.folder"
    path.mkdir()
    (path / "part").write_text("old")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if Path(target) == path:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(DiskError), files.write_aside(path) as fresh:
            fresh.mkdir()
    assert not path.exists()
    (tmp_path / ".writing-b.xxxxxxxx").mkdir()
    (tmp_path / ".writing-c.xxxxxxxx.whole").touch()
    files.remove_leftovers(tmp_path)
    assert (path / "part").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [True, False])
def test_a_kill_right_after_the_last_rename_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    monkeypatch.setattr(files, "_clear", lambda *_: None)
    with files.write_aside(tmp_path / "new") as fresh:
        fresh.mkdir() if folder else fresh.touch()
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


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


# Disks that take no more, by the writers in use

NOISE = np.random.default_rng(0).normal(size=(64, 64))  # 32 KiB, incompressible


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The next byte of any file is refused, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def by_sqlite(path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        connection.execute("CREATE TABLE t (x BLOB)")
        connection.execute("INSERT INTO t VALUES (?)", (NOISE.tobytes(),))
        connection.commit()
    finally:
        connection.close()


def by_matplotlib(path: Path) -> None:
    figure = matplotlib.figure.Figure()
    figure.add_subplot().imshow(NOISE)
    figure.savefig(path, format="png")


def by_gzip(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        file.write(NOISE.tobytes())


def by_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, NOISE)


def by_pytorch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(20_000)}, path)  # "unexpected pos 576 vs 534" is all it says


# HDF5 is not among them: it ends the process (see `run_folder.write_h5ad`).
WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: path.write_text("x" * 32768),
    "csv": lambda path: pd.DataFrame(NOISE).to_csv(path),
    "gzip": by_gzip,
    "npy": by_numpy,
    "npz": lambda path: np.savez(path, x=NOISE),
    "parquet": lambda path: pd.DataFrame(NOISE).to_parquet(path),
    "safetensors": lambda path: safetensors.numpy.save_file({"x": NOISE}, path),
    "zarr": lambda path: zarr.save_array(path, NOISE),
    "sqlite": by_sqlite,
    "matplotlib": by_matplotlib,
    "pytorch": by_pytorch,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_message_whatever_the_writer_raised(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "results" / "x"
    with (
        pytest.raises(DiskError) as told,
        files_of_at_most(4096),
        files.write_aside(path) as fresh,
    ):
        WRITERS[writer](fresh)
    assert str(told.value).startswith(f"{path} cannot be written: ")
    assert " bytes of it were written, more are wanted; " in str(told.value)
    assert " bytes are free on its disk. " in str(told.value)
    assert told.value.errno in (errno.EFBIG, errno.ENOSPC, errno.EIO)
    assert list(path.parent.iterdir()) == []


def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(tmp_path: Path) -> None:
    faults = (KeyError("x"), FileNotFoundError(errno.ENOENT, "gone"), ValueError("code: 12"),
              RuntimeError("errno = 2"), OSError("no such thing"),
              RuntimeError("the compiler ended with exit code: 1"),
              RuntimeError("exit code: 28"))  # fmt: skip
    for fault in faults:
        with pytest.raises(type(fault)) as raised, files.write_aside(tmp_path / "x"):
            raise fault
        assert raised.value is fault
        assert disk.refused(fault) is None


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (OSError(errno.EROFS, "x"), errno.EROFS),
        (OSError("4096 requested and 12 written"), errno.ENOSPC),
        (RuntimeError("(file write failed: errno = 28, error message = 'x')"), errno.ENOSPC),
        (Exception('I/O error: Os { code: 122, kind: QuotaExceeded }'), errno.EDQUOT),
        (Exception("IO error: nope (os error 5)"), errno.EIO),
        (RuntimeError(f"something: {os.strerror(errno.EROFS)}"), errno.EROFS),
    ],
)  # fmt: skip
def test_what_libraries_make_of_a_disk_that_refuses(fault: Exception, number: int) -> None:
    wrapped = ValueError("while saving")
    wrapped.__cause__ = fault
    handled = ValueError("in the end")
    handled.__context__ = wrapped
    assert disk.refused(fault) == disk.refused(wrapped) == disk.refused(handled) == number
    handled.__suppress_context__ = True
    assert disk.refused(handled) is None
    assert os.strerror(number) in disk.message(wrapped, Path("there"))


def test_a_disk_without_inodes_is_told_as_one(tmp_path: Path) -> None:
    """In a namespace of its own, where a small disk may be mounted."""
    code = (
        "from pathlib import Path; from sae_jax import disk, files\n"
        "try:\n    for i in range(9): files.write_json(f'/mnt/{i}.json', i)\n"
        "except disk.DiskError as error: print(error)"
    )
    mount = "mount -t tmpfs -o size=1m,nr_inodes=7 none /mnt"
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in ended.stderr or "mount" in ended.stderr:
        pytest.skip("no namespaces here")
    told = r"/mnt/\d.json cannot be written: No space left on device; .*no inodes .*\. Make room"
    assert re.match(told, ended.stdout), ended
    assert " free on its disk" in disk.told(errno.ENOSPC, tmp_path / "none" / "such")


@pytest.mark.parametrize("path", ["new/../x", "there/new/../../x", "new/../../x"])
def test_a_way_over_a_folder_that_is_not_there_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be made on the way, and stay."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{path} leads over a folder that is not there"):
        files.check_writable(Path(path))
    files.check_writable(Path("there/../x/y"))


def test_nothing_is_written_to_another_disk_of_the_same_name(tmp_path: Path) -> None:
    """An unmounted disk leaves an empty folder, or none."""
    run = tmp_path / "mount" / "run"
    run.mkdir(parents=True)
    with files.pinned(run):
        files.write_json(run / "deep" / "a.json", 1)
        run.parent.rename(tmp_path / "away")
        with pytest.raises(DiskError, match=r"b\.json cannot be written: No such device.*disk is"):
            files.write_json(run / "b.json", 1)
        run.mkdir(parents=True)
        with pytest.raises(DiskError, match="No such device"):
            files.write_json(run / "deep" / "c.json", 1)
        assert list(run.iterdir()) == []
    files.write_json(run / "d.json", 1)


def test_a_folder_that_goes_away_from_under_the_writer(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with files.write_aside(path) as fresh:
            shutil.rmtree(path.parent)
            fresh.write_text("x")

    with pytest.raises(DiskError, match=r"run/x cannot be written"):
        write(tmp_path / "run" / "x")
    assert list(tmp_path.iterdir()) == []


def test_new_folders_are_on_the_disk_before_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "sync", flushed.append)
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a/b/c").is_dir()
    assert set(flushed) == {tmp_path, tmp_path / "a", tmp_path / "a/b"}
    flushed.clear()
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert not flushed

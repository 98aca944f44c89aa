"""The manifest of a finished folder: every flipped bit, every missing file, hostile manifests."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_jax import InputError, files, manifest, pulse

NAMES = ("results.parquet", "empty.txt", "dictionaries", "figures")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "dictionaries" / "0000").mkdir(parents=True)
    (run / "results.parquet").write_bytes(np.random.default_rng(0).bytes(1000))
    (run / "dictionaries" / "0000" / "weights").write_bytes(b"weights" * 100)
    (run / "empty.txt").touch()
    (run / ".lock").touch()
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step").touch()
    manifest.write(run, NAMES)
    return run


def test_what_was_finished_is_as_it_was(folder: Path) -> None:
    assert manifest.check(folder) == manifest.check(folder, "full") == 3
    listed = json.loads((folder / manifest.NAME).read_text())["files"]
    assert sorted(listed) == ["dictionaries/0000/weights", "empty.txt", "results.parquet"]
    (folder / "notes.txt").write_text("mine")  # who adds a file has damaged none
    assert manifest.check(folder, "full") == 3


def test_every_file_that_is_read_is_a_sign_of_life(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none that the others, who wait meanwhile, are behind by."""
    beats: list[str] = []
    (tmp_path / "pulse").write_bytes(pulse.record(0, "starting"))
    monkeypatch.setenv(pulse.VARIABLE, str(tmp_path / "pulse"))
    monkeypatch.setattr(pulse, "_count", 0)
    real = pulse.record
    monkeypatch.setattr(pulse, "record", lambda *told: beats.append(told[1]) or real(*told))
    manifest.check(folder, "full")
    assert sorted(beats) == ["reading empty.txt", "reading results.parquet", "reading weights"]
    with (tmp_path / "pulse").open() as file:
        assert pulse.read(file.fileno()).count == 0
    manifest.write(folder, NAMES)
    assert len(beats) == 6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(where=st.integers(0, 7999), name=st.sampled_from(["results.parquet"]))
def test_every_flipped_bit_is_found(folder: Path, where: int, name: str) -> None:
    path = folder / name
    before = path.read_bytes()
    damaged = bytearray(before)
    damaged[where // 8] ^= 1 << (where % 8)
    path.write_bytes(damaged)
    try:
        assert manifest.check(folder) == 3  # its size tells nothing
        with pytest.raises(InputError, match="has other contents"):
            manifest.check(folder, "full")
    finally:
        path.write_bytes(before)


def test_what_is_missing_or_cut_is_found_by_its_size(folder: Path) -> None:
    (folder / "empty.txt").unlink()
    (folder / "results.parquet").write_bytes(b"12")
    with pytest.raises(InputError, match=r"empty.txt is missing; .* has 2 bytes of 1,000\. Copy"):
        manifest.check(folder)


def test_a_folder_being_changed_has_none(folder: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), manifest.renewed(folder):
        assert not (folder / manifest.NAME).exists()
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="was not finished; give its command again"):
        manifest.check(folder)
    with manifest.renewed(folder, NAMES):
        (folder / "empty.txt").write_text("more")
    assert manifest.check(folder, "full") == 3


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"null", b'{"format": 1}', b'{"format": 1, "files": []}',
     b'{"format": 1, "files": {"a": 3}}', b'{"format": 1, "files": {"a": [1]}}',
     b'{"format": 1, "files": {"a": ["x", "y"]}}', b'{"format": 1, "files": {"../b": [0, ""]}}',
     b'{"format": 1, "files": {"/etc/passwd": [0, ""]}}', b"[" * 100_000,
     b'{"format": 1, "files": {"a\\u0000": [0, ""]}}'],
)  # fmt: skip
def test_a_damaged_manifest_is_said_to_be(folder: Path, content: bytes) -> None:
    (folder / manifest.NAME).write_bytes(content)
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        manifest.check(folder)


def test_a_manifest_of_another_format_is_not_guessed_at(folder: Path) -> None:
    files.write_json(folder / manifest.NAME, {"format": 2, "files": {}})
    with pytest.raises(InputError, match="newer sae-jax"):
        manifest.check(folder)


def test_only_five_of_many_are_named(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}").touch()
    manifest.write(tmp_path)
    for i in range(8):
        (tmp_path / f"{i}").unlink()
    with pytest.raises(InputError, match=r"4 is missing and 3 more\."):
        manifest.check(tmp_path)


def test_every_byte_of_the_manifest_counts(folder: Path) -> None:
    (folder / "empty.txt").rename(folder / "é.txt")  # escaped in JSON, in two ways
    manifest.write(folder)
    path = folder / manifest.NAME
    content = path.read_bytes()
    some = np.random.default_rng(0).permutation(len(content))[:100].tolist()
    for place in [content.index(b"u00e9") + 3, *some]:  # E for e: JSON of the same meaning
        for bit in (1 << (place % 8), 32):
            damaged = bytearray(content)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(InputError):
                manifest.check(folder, "full")
    path.write_bytes(content)
    manifest.check(folder, "full")


def test_what_comes_later_is_added(folder: Path) -> None:
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_bytes(b"a")
    (folder / "figures" / ".hidden").write_bytes(b"b")
    manifest.add(folder, "figures", "none")
    assert manifest.check(folder, "full") == 4
    (folder / "figures" / "a.png").write_bytes(b"c")
    assert manifest.differs(folder, "figures/a.png") == "figures/a.png has other contents"
    assert manifest.differs(folder, "empty.txt") is None
    assert manifest.differs(folder, "notes.txt") == "notes.txt is not in the manifest"
    manifest.add(folder, "figures")
    assert manifest.check(folder, "full") == 4
    manifest.remove(folder)
    manifest.add(folder, "empty.txt")
    assert manifest.check(folder, "full") == 1


def test_it_is_gone_from_the_disk_before_anything_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bool] = []
    sync = files.sync

    def watched(path: Path) -> None:
        flushed.append(path == folder and not (folder / manifest.NAME).exists())
        sync(path)

    monkeypatch.setattr(files, "sync", watched)
    manifest.remove(folder)
    assert flushed == [True]

"""Tables in a file that has no name."""

import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest

from analysis.blocks import Tables
from sae_jax.disk import DiskError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_tables_are_apart_and_leave_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, allocate = [], os.posix_fallocate

    def noted(file: int, *given: int) -> None:
        allocate(file, *given)
        made.append(os.fstat(file).st_blocks * 512)

    monkeypatch.setattr(os, "posix_fallocate", noted)
    tables = Tables((300, 7), 3, 100)
    assert made[0] >= 3 * 300 * 7 * 4  # a sparse file would have no blocks
    one, two, three = tables.new(), tables.new(np.int32), tables.new()
    assert [*folder.iterdir()] == []  # nothing that a kill could leave
    one[:], two[:] = 1.5, -7
    assert isinstance(three, np.memmap)
    assert (one == 1.5).all()
    assert (two == -7).all()
    assert not three.any()
    del tables, two
    assert one[299, 6] == 1.5


def test_small_ones_are_in_memory(folder: Path) -> None:
    tables = Tables((300, 7), 3, 300 * 7 * 4 * 3)
    assert not isinstance(tables.new(), np.memmap)


def test_a_full_disk_is_told_before_anything_is_written_to(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DiskError, match="25,200 bytes are wanted") as told:
            Tables((300, 7), 3, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(told.value).startswith(f"{folder} cannot be written")
    assert [*folder.iterdir()] == []

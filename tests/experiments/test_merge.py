"""Shards of a sweep, gathered: the run that one job would have made."""

import errno
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

from analysis import plots
from experiments import merge, sharding, sweep
from sae_jax import InputError, Run, manifest, metrics, trainer
from sae_jax.disk import DiskError

ROWS = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
GRID = {
    "preset": "vanilla", "n_latents": "8,12", "l1_weight": "0.1,1", "batch_size": "32",
    "learning_rate": "1e-3,1e30", "epochs": "2",
}  # fmt: skip


def call(program: Any, **given: object) -> None:
    with flagsaver.flagsaver():
        program.define_flags()
        flags.FLAGS([program.__name__, *(f"--{name}={value}" for name, value in given.items())])
        program.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job's run, `whole`, and the same in three shards, `shards`."""
    parent = tmp_path_factory.mktemp("merge")
    np.save(parent / "rows.npy", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda *_: None)
        given = GRID | {"data": parent / "rows.npy"}
        call(sweep, **given, workdir=parent / "whole")
        for index in range(3):
            more = {"workdir": parent / "shards", "num_shards": 3, "shard_index": index}
            call(sweep, **given, **more)
    return parent


@pytest.fixture
def shards(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A copy of the shards to damage, and `merge` of it into a folder, which is returned."""
    monkeypatch.setattr(plots, "save", lambda *_: None)
    shutil.copytree(runs / "shards", tmp_path / "shards")

    def merged(**given: object) -> Path:
        call(merge, workdir=tmp_path / "shards", output=tmp_path / "merged", **given)
        return tmp_path / "merged"

    return merged


def test_it_is_the_run_of_one_job(
    shards: Callable[..., Path], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shards()
    one, many = Run.load(runs / "whole"), Run.load(out)
    pd.testing.assert_frame_equal(one.results, many.results, check_exact=True)
    pd.testing.assert_frame_equal(one.history, many.history, check_exact=True)
    assert (one.results["status"] == "diverged").any()
    for a, b in zip(one.dictionaries, many.dictionaries, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            for ours, theirs in zip(*(jax.tree.leaves(d.params) for d in (a, b)), strict=True):
                assert ours.tobytes() == theirs.tobytes()
    assert manifest.check(out, "full") > 5
    monkeypatch.setattr(trainer, "train_bucket", None)  # the whole sweep finds nothing to train
    call(sweep, **GRID, data=runs / "rows.npy", workdir=out)


def test_what_is_missing_is_named_with_its_command(
    shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "shards/shard-001-of-003")
    (tmp_path / "shards/shard-002-of-003" / manifest.NAME).unlink()
    with pytest.raises(InputError, match="2 shards missing or not finished"):
        shards()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("--num_shards=3 --shard_index=1 is missing: sae-jax sweep --")
    assert lines[1].startswith("--num_shards=3 --shard_index=2 was not finished: ")
    for index, line in zip((1, 2), lines, strict=True):
        words = line.split(": ", 1)[1].split()[2:]
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        assert given["shard_index"] == str(index)
        call(sweep, **given)  # it is a command that works
    assert len(Run.load(shards()).results) == 8


def test_a_part_is_a_run_of_its_own(shards: Callable[..., Path], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "shards/shard-000-of-003")
    found = Run.load(shards(partial="true"))
    assert 0 < len(found.results) < 8
    assert found.results["member"].tolist() == list(range(len(found.results)))


def flip(folder: Path) -> None:
    path = sorted(folder.rglob("*.safetensors"))[0]
    values = bytearray(path.read_bytes())
    values[-1] ^= 1
    path.write_bytes(values)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (flip, "has other contents"),
    "no settings": (lambda f: (f / "shard-001-of-003/sweep.json").unlink(), "is no shard"),
    "settings cut": (lambda f: (f / "shard-001-of-003/sweep.json").write_text("{"), "damaged"),
    "another sweep": (
        lambda f: (f / "shard-001-of-003/sweep.json").write_text('{"positions": [1]}'),
        "of another sweep",
    ),
    "other counts": (lambda f: (f / "shard-001-of-004").mkdir(), r"shards of \[3, 4\]"),
    "a shard too many": (lambda f: (f / "shard-003-of-003").mkdir(), "--shard_index=0 .. 2"),
    "no shards": (lambda f: [shutil.rmtree(each) for each in f.iterdir()], "holds no shards"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_and_leaves_nothing(
    case: str, shards: Callable[..., Path], tmp_path: Path
) -> None:
    damage, message = DAMAGE[case]
    damage(tmp_path / "shards")
    with pytest.raises(InputError, match=message):
        shards()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_a_folder_that_is_there_is_not_touched(shards: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine").touch()
    with pytest.raises(InputError, match="is there already"):
        shards()


def test_what_a_kill_or_a_full_disk_left_is_cleared_and_the_same_command_does_it(
    shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".writing-merged.abc/merged/dictionaries").mkdir(parents=True)
    (tmp_path / ".writing-merged.abc.whole").mkdir()
    (tmp_path / ".writing-mine.abc").mkdir()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", full)
        with pytest.raises(DiskError, match="merged cannot be written"):
            shards()
    assert {path.name for path in tmp_path.iterdir()} == {"shards", ".writing-mine.abc"}
    assert manifest.check(shards(), "full")


def positions(folder: Path, index: int, places: list[int]) -> None:
    path = folder / f"shard-00{index}-of-003/sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"positions": places}))


@pytest.mark.parametrize("places", [[0], [100]], ids=["twice", "never"])
def test_shards_that_were_split_by_another_version_are_refused(
    places: list[int], shards: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    kept = json.loads((tmp_path / "shards/shard-001-of-003/sweep.json").read_text())["positions"]
    first = json.loads((tmp_path / "shards/shard-000-of-003/sweep.json").read_text())["positions"]
    positions(tmp_path / "shards", 1, [*kept[:-1], first[0] if places == [0] else 100])
    message = "split by different versions" if places == [0] else "are not the whole"
    (tmp_path / "shards/shard-001-of-003" / manifest.NAME).unlink()
    remade = manifest.write  # what a program of that version had written
    remade(tmp_path / "shards/shard-001-of-003")
    with pytest.raises(InputError, match=message):
        shards()
    if places == [0]:  # one that starts beside them sees it too
        shutil.rmtree(tmp_path / "shards/shard-002-of-003")
        more = {"workdir": tmp_path / "shards", "num_shards": 3, "shard_index": 2}
        with pytest.raises(InputError, match=message):
            call(sweep, **GRID, data=runs / "rows.npy", **more)


def test_a_shard_may_have_less_memory_but_no_other_rate(
    shards: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    given = {**GRID, "data": runs / "rows.npy", "workdir": folder, "num_shards": 3}
    shutil.rmtree(folder / "shard-002-of-003")
    with pytest.raises(InputError, match=r"of another sweep:\n  epochs"):
        call(sweep, **given | {"epochs": 3}, shard_index=2)
    call(sweep, **given, shard_index=2, resident_gib=0.5, checkpoint_seconds=600)
    assert len(Run.load(shards()).results) == 8


def test_a_shard_goes_on_with_what_it_noted(
    shards: Callable[..., Path], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though this version would split the grid otherwise."""
    monkeypatch.setattr(sharding, "split", lambda *_: [[0], [1], [2, 3, 4, 5, 6, 7]])
    monkeypatch.setattr(trainer, "train_bucket", None)
    for index in range(3):
        more = {"workdir": tmp_path / "shards", "num_shards": 3, "shard_index": index}
        call(sweep, **GRID, data=runs / "rows.npy", **more)
    assert len(Run.load(shards()).results) == 8


def test_a_shard_that_died_is_named_and_completed_by_its_command(
    shards: Callable[..., Path], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One before it wrote anything, one in its training; in a folder that a shell must quote."""
    folder = tmp_path / "my shards; 2"
    folder.mkdir()
    given = {**GRID, "data": runs / "rows.npy", "workdir": folder, "num_shards": 3}
    given["checkpoint_seconds"] = 0
    call(sweep, **given, shard_index=0)

    def dies(*_: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "evaluate", dies)
        with pytest.raises(KeyboardInterrupt):
            call(sweep, **given, shard_index=1)
    assert any((folder / "shard-001-of-003/checkpoints").rglob("*"))
    (folder / "shard-002-of-003").mkdir()
    (folder / "shard-002-of-003/.lock").touch()
    capsys.readouterr()
    with pytest.raises(InputError, match="missing or not finished"):
        call(merge, workdir=folder, output=tmp_path / "whole")
    told = capsys.readouterr().out.splitlines()
    this = "--num_shards=3 --shard_index=2 was not finished: sae-jax sweep "
    assert told[-1].startswith(this)
    for line in told:
        words = shlex.split(line.split(": ", 1)[1])[2:]
        call(sweep, **dict(word.removeprefix("--").split("=", 1) for word in words))
    call(merge, workdir=folder, output=tmp_path / "whole")
    one, many = Run.load(runs / "whole"), Run.load(tmp_path / "whole")
    pd.testing.assert_frame_equal(one.results, many.results, check_exact=True)


def test_a_shard_that_runs_is_not_started_twice(
    shards: Callable[..., Path], runs: Path, tmp_path: Path
) -> None:
    lock = tmp_path / "shards/shard-000-of-003/.lock"
    holds = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True)"
    command, pipe = [sys.executable, "-c", f"{holds}; input()", lock], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        more = {"workdir": tmp_path / "shards", "num_shards": 3, "shard_index": 0}
        with pytest.raises(InputError, match="shard-000-of-003 is being filled by another process"):
            call(sweep, **GRID, data=runs / "rows.npy", **more)
        other.communicate(b"\n")
    call(sweep, **GRID, data=runs / "rows.npy", **more)

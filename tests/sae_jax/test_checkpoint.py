"""A program that is stopped between chunks goes on as if it had not been, bit for bit."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from jax.sharding import AxisType, Mesh

import sae_jax
from sae_jax import (
    InputError,
    Run,
    SAEConfig,
    checkpoint,
    distributed,
    ensemble,
    feeds,
    files,
    metrics,
    programs,
    trainer,
)
from sae_jax.checkpoint import Checkpoints, Preempted, Preemption
from sae_jax.files import DiskError
from sae_jax.workdir import Workdir
from tests.kills import trials

ROWS = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
HELD_OUT = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
SIZE = {"d_in": 5, "n_latents": 12, "batch_size": 16}
EPOCHS = 9
# One diverges at once, one stops early, so that the bucket is compacted on the way.
CONFIGS = [
    SAEConfig(**SIZE, learning_rate=rate, l1_weight=0.1, auxiliary="auxk", dead_steps=3, seed=seed)
    for seed, rate in enumerate([1e-3, 1e30, 0.3, 3e-3, 1e-3])
]


class Killed(BaseException):
    """What no one catches."""


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one epoch each, so that there is a checkpoint after every one."""
    monkeypatch.setattr(feeds, "MAX_CHUNK_EPOCHS", 1)


def train(workdir: Path | None, kill_at: int | None = None, **changes: Any) -> Run:
    def on_epochs(positions: np.ndarray, first: int, history: Any) -> None:
        if first == kill_at:
            raise Killed

    call = {
        "configs": CONFIGS, "train": ROWS, "validation": HELD_OUT, "epochs": EPOCHS, "patience": 3,
        "progress": False, "checkpoint_seconds": 0, "on_epochs": on_epochs,
    }  # fmt: skip
    return sae_jax.train(**{**call, "workdir": workdir, **changes})


def assert_same(found: Run, expected: Run) -> None:
    pd.testing.assert_frame_equal(found.results, expected.results, check_exact=True)
    pd.testing.assert_frame_equal(found.history, expected.history, check_exact=True)
    for ours, theirs in zip(found.dictionaries, expected.dictionaries, strict=True):
        assert (ours is None) == (theirs is None)
        for a, b in zip(jax.tree.leaves(ours and ours.params),
                        jax.tree.leaves(theirs and theirs.params), strict=True):  # fmt: skip
            assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    return train(None)


def test_the_run_is_one_worth_resuming(undisturbed: Run) -> None:
    assert (undisturbed.results["status"] == "diverged").sum() == 1
    epochs = undisturbed.results["epochs"]
    assert 1 < epochs[2] < EPOCHS
    assert (epochs == EPOCHS).any()


@pytest.mark.parametrize("kill_at", range(1, EPOCHS))
def test_killed_after_any_epoch_it_ends_the_same(
    kill_at: int, undisturbed: Run, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "run", kill_at)
    assert list((tmp_path / "run/checkpoints/0000").iterdir())
    first: list[int] = []
    found = train(tmp_path / "run", on_epochs=lambda p, epoch, h: first.append(epoch))
    assert first[0] == kill_at, "what had been trained was trained again"
    assert_same(found, undisturbed)
    assert not (tmp_path / "run/checkpoints").exists()


def test_killed_at_every_epoch_in_turn_it_ends_the_same(undisturbed: Run, tmp_path: Path) -> None:
    for kill_at in range(1, EPOCHS):
        with pytest.raises(Killed):
            train(tmp_path / "run", kill_at)
    assert_same(train(tmp_path / "run"), undisturbed)


def test_it_goes_on_with_another_number_of_devices(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(members: int, latent_devices: int) -> Mesh:
        return Mesh(np.asarray(jax.devices()[:1]), ("member",), axis_types=(AxisType.Auto,))

    for before, after in ((alone, None), (None, alone)):
        folder = tmp_path / str(before)
        for mesh, kill_at in ((before, 2), (after, None)):
            with monkeypatch.context() as patch:
                if mesh is not None:
                    patch.setattr(distributed, "member_mesh", mesh)
                if kill_at is None:
                    found = train(folder)
                else:
                    with pytest.raises(Killed):
                        train(folder, kill_at)
        for ours, theirs in zip(found.dictionaries, undisturbed.dictionaries, strict=True):
            for a, b in zip(jax.tree.leaves(ours and ours.params),
                            jax.tree.leaves(theirs and theirs.params), strict=True):  # fmt: skip
                assert a.tobytes() == b.tobytes()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    values = bytearray(file.read_bytes())
    values[len(values) // 2] ^= 1
    file.write_bytes(values)


# Arrays lie in the files of folders named d. Where one cannot be read Orbax gives up while others
# are on their way, and Python tells of each that comes too late.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [cut, flip, os.remove], ids=["cut", "flip", "remove"])
@pytest.mark.parametrize("which", ["latest", "both"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    damage: Callable[[Path], None], which: str, undisturbed: Run, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with pytest.raises(Killed):
        train(tmp_path / "run", 4)
    folder = tmp_path / "run/checkpoints/0000"
    kept = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    assert [p.name for p in kept] == ["18", "24"], "six batches an epoch"
    for step in kept[-1:] if which == "latest" else kept:
        for file in step.rglob("d/*"):
            damage(file)
    first: list[int] = []
    with caplog.at_level(logging.WARNING, "absl"):
        found = train(tmp_path / "run", on_epochs=lambda p, epoch, h: first.append(epoch))
    assert first[0] == (3 if which == "latest" else 0)
    assert "checkpoints/0000/24 is skipped" in caplog.text
    assert_same(found, undisturbed)


def test_one_that_was_being_written_is_no_checkpoint(undisturbed: Run, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "run", 3)
    folder = tmp_path / "run/checkpoints/0000"
    half = folder / "4.orbax-checkpoint-tmp-1"
    shutil.copytree(folder / "18", half)
    for file in half.rglob("d/*"):
        cut(file)
    (half / "commit_success.txt").unlink(missing_ok=True)
    assert_same(train(tmp_path / "run"), undisturbed)


def test_one_of_other_configurations_is_skipped(tmp_path: Path) -> None:
    tree = {"a": np.arange(3.0)}
    Checkpoints(tmp_path / "c", [0, 1], 0, Preemption()).save(5, tree, distributed.member_mesh(1))
    step, found, first = Checkpoints(tmp_path / "c", [0, 1], 0, Preemption()).latest(tree)
    assert (step, first) == (5, 0)
    assert found["a"].tolist() == tree["a"].tolist()
    assert Checkpoints(tmp_path / "c", [0, 2], 0, Preemption()).latest(tree) is None
    other = {"b": np.arange(3.0)}
    assert Checkpoints(tmp_path / "c", [0, 1], 0, Preemption()).latest(other) is None


@pytest.mark.parametrize("name", ["24.bak", "024", "of monday", "30"])
def test_one_that_was_renamed_is_named_and_let_be(
    name: str, undisturbed: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "run", 4)
    folder = tmp_path / "run/checkpoints/0000"
    (folder / "24").rename(folder / name)
    first: list[int] = []
    with caplog.at_level(logging.WARNING, "absl"):
        found = train(tmp_path / "run", on_epochs=lambda p, epoch, h: first.append(epoch))
    assert first[0] == 3, "from the one before it"
    assert_same(found, undisturbed)
    if name == "30":  # a step that it is not of
        assert "0000/30 is skipped: it is of step 24" in caplog.text
        assert not folder.exists()
    else:
        assert f"0000/{name} is none of our names" in caplog.text
        assert [path.name for path in folder.iterdir()] == [name]
        assert_same(train(tmp_path / "run"), undisturbed)  # all is finished
        assert (folder / name / "leaves").is_dir()


def test_a_folder_of_checkpoints_that_was_renamed_is_let_be(
    undisturbed: Run, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "run", 4)
    folder = tmp_path / "run/checkpoints"
    (folder / "0000").rename(folder / "0001.bak")
    assert_same(train(tmp_path / "run"), undisturbed)
    assert sorted(path.name for path in (folder / "0001.bak").iterdir()) == ["18", "24"]


@pytest.mark.parametrize("name", ["dictionaries", "checkpoints", "figures"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_the_work(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "run", 0)
    files.remove(tmp_path / "run" / name)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(InputError, match=f"run/{name} is a file where a folder is wanted"):
        train(tmp_path / "run", 0)
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_failed_save_is_told_in_a_line(tmp_path: Path) -> None:
    """Of a process that may write no file of more than 100 kB: nothing of Orbax's own."""
    code = (
        "import pathlib, resource, sys, time, numpy as np\n"
        "from sae_jax import distributed\n"
        "from sae_jax.checkpoint import Checkpoints, Preemption\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))\n"
        "tree = {f'a{i}': np.random.rand(4, 3000) for i in range(30)}\n"
        "found = Checkpoints(pathlib.Path(sys.argv[1]), [0, 1, 2, 3], 0, Preemption())\n"
        "for step in range(1, 4): found.save(step, tree, distributed.member_mesh(1))\n"
        "time.sleep(0.5)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "c"], capture_output=True, text=True, check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    lines = ended.stderr.splitlines()
    assert len(lines) == 3, ended.stderr
    assert all(f"to {tmp_path}/c: File too large; " in line for line in lines)


def test_values_that_are_not_those_saved_are_noticed(tmp_path: Path) -> None:
    """By our own hash: what Orbax's formats let pass."""
    tree = {"a": np.arange(3.0)}
    Checkpoints(tmp_path / "c", [0], 0, Preemption()).save(5, tree, distributed.member_mesh(1))
    assert Checkpoints(tmp_path / "c", [0], 0, Preemption()).latest(tree) is not None
    about = tmp_path / "c/5/about/metadata"
    (saved,) = json.loads(about.read_text())["sha256"]
    about.write_text(about.read_text().replace(saved, "0" * 64))
    assert Checkpoints(tmp_path / "c", [0], 0, Preemption()).latest(tree) is None
    assert not about.exists()


@pytest.mark.parametrize(
    ("own", "rows"),
    [(range(2), (0, 2)), (range(1, 4), (0, 4)), (range(2, 4), (2, 4)), (range(5, 8), (4, 6)),
     (range(3, 9), (2, 6)), (range(7, 9), (4, 6))],
)  # fmt: skip
def test_each_process_reads_the_parts_that_its_members_are_in(
    own: range, rows: tuple[int, int], tmp_path: Path
) -> None:
    """Of three processes' parts, of two members each, whose states are in four rows."""
    tree = {"trained": np.arange(12.0).reshape(6, 2), "states": np.arange(12, dtype=np.int32)}
    Checkpoints(tmp_path / "a b", [0], 0, Preemption()).save(5, tree, distributed.member_mesh(1))
    parts = [{f"['{name}']": np.split(leaf, 3)[i] for name, leaf in tree.items()} for i in range(3)]
    about = tmp_path / "a b/5/about/metadata"
    told = json.loads(about.read_text())
    first, last = rows
    told["sha256"] = [  # the others' are not looked at
        checkpoint._digest(part).hex() if first <= 2 * i < last else "0" * 64
        for i, part in enumerate(parts)
    ]
    about.write_text(json.dumps(told))
    found = Checkpoints(tmp_path / "a b", [0], 0, Preemption()).latest(tree, own, "['trained']")
    assert found is not None
    assert (found[0], found[2]) == (5, first)
    assert found[1]["trained"].tolist() == tree["trained"][first:last].tolist()
    assert found[1]["states"].tolist() == tree["states"][2 * first : 2 * last].tolist()
    if (first, last) != (0, 6):
        assert Checkpoints(tmp_path / "a b", [0], 0, Preemption()).latest(tree) is None


def test_a_disk_that_refuses_costs_a_warning(
    undisturbed: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with caplog.at_level(logging.WARNING, "absl"):
        assert_same(train(tmp_path / "run"), undisturbed)
    assert "no checkpoint could be written" in caplog.text


def test_sigterm_saves_and_ends(undisturbed: Run, tmp_path: Path) -> None:
    def on_epochs(positions: np.ndarray, first: int, history: Any) -> None:
        if first == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", on_epochs=on_epochs, checkpoint_seconds=1e9)
    assert isinstance(stopped.value, Preempted)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    first: list[int] = []
    found = train(tmp_path / "run", on_epochs=lambda p, epoch, h: first.append(epoch))
    assert first[0] == 4
    assert_same(found, undisturbed)


def test_handlers_of_others_and_other_threads_are_let_be(tmp_path: Path) -> None:
    def theirs(*_: Any) -> None:
        pass

    signal.signal(signal.SIGTERM, theirs)
    try:
        with Preemption().watched():
            assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(train(tmp_path / "run", epochs=1)))
    thread.start()
    thread.join()
    assert len(runs) == 1


def test_checkpoints_are_written_at_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *args: saved.append(step))
    train(tmp_path / "a", checkpoint_seconds=1e9)
    assert not saved
    train(tmp_path / "b")
    assert saved == list(range(6, 6 * EPOCHS + 1, 6))


def test_killed_processes_resume(tmp_path: Path) -> None:
    assert trials(1, 1, 120, tmp_path) == [True]


def test_a_failing_program_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SAEConfig(d_in=5, n_latents=7, batch_size=16)
    real = trainer.train_bucket

    def fails(*args: Any, **kwargs: Any) -> trainer.Trained:
        if kwargs["architecture"].n_latents == 12:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_bucket", fails)
        run = train(tmp_path / "run", configs=[*CONFIGS, other])
        assert run.results["status"].tolist() == ["failed"] * 5 + ["trained"]
        assert [d is None for d in run.dictionaries] == [True] * 5 + [False]
        assert np.isnan(run.results["train_r2"][0])
        assert pd.read_parquet(tmp_path / "run/results.parquet")["member"].tolist() == [5]
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            train(tmp_path / "all")
    again = train(tmp_path / "run", configs=[*CONFIGS, other])
    assert "failed" not in set(again.results["status"])
    assert_same(again, train(None, configs=[*CONFIGS, other]))


def test_killed_while_who_trains_together_is_noted_nothing_stays(
    undisturbed: Run, tmp_path: Path
) -> None:
    """What a kill within `begin_program` leaves, found by killing after every system call."""
    with pytest.raises(Killed):
        train(tmp_path / "run", 2)
    (tmp_path / "run/checkpoints/.writing-0000.json.abcdefgh").mkdir()
    (tmp_path / "run/checkpoints/.writing-0000.json.abcdefgh/0000.json").write_text("{")
    (tmp_path / "run/checkpoints/.writing-0000.json.hgfedcba.whole").write_text("{}")
    assert_same(train(tmp_path / "run"), undisturbed)
    assert not (tmp_path / "run/checkpoints").exists()


def test_killed_while_checkpoints_are_deleted_none_stay(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Checkpoints) -> None:
        (self.folder / "1").mkdir(exist_ok=True)
        self.folder.with_name("0000.skipped").mkdir()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "remove", dies)
        with pytest.raises(Killed):
            train(tmp_path / "run")
    assert (tmp_path / "run/checkpoints").exists()
    assert_same(train(tmp_path / "run"), undisturbed)
    assert not (tmp_path / "run/checkpoints").exists()


def room_for(members: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the rows and so many dictionaries."""
    each = ensemble.member_bytes(CONFIGS[0].architecture, 4)
    shared = ROWS.nbytes + 4 * len(ROWS) + HELD_OUT.nbytes
    monkeypatch.setattr(distributed, "memory", lambda: int(shared + members * each))


def test_who_trained_together_goes_on_together_where_there_is_more_memory(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_epochs(positions: np.ndarray, first: int, history: Any) -> None:
        seen.append((positions.tolist(), first))
        if seen[-1] == ([2, 3], 3):
            raise Killed

    seen: list[tuple[list[int], int]] = []
    room_for(2.5, monkeypatch)  # parts of 2, 2 and 1
    with pytest.raises(Killed):
        train(tmp_path / "run", on_epochs=on_epochs)
    seen.clear()
    room_for(99, monkeypatch)
    found = train(tmp_path / "run", on_epochs=lambda p, first, _: seen.append((p.tolist(), first)))
    assert seen[0] == ([2, 3], 3), "its checkpoint was of use"
    assert_same(found, undisturbed)
    assert not (tmp_path / "run/checkpoints").exists()


def test_who_trained_together_and_does_not_fit_any_more_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "run", 2)
    room_for(2.5, monkeypatch)
    with pytest.raises(InputError, match="5 configurations trained together where"):
        train(tmp_path / "run")
    assert list((tmp_path / "run/checkpoints/0000").glob("[0-9]*")), "nothing was thrown away"


@pytest.mark.parametrize("phase", ["compiling", "evaluating", "saving"])
def test_sigterm_is_heeded_whatever_is_done(
    phase: str, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = {
        "compiling": (programs, "init_bucket"),
        "evaluating": (metrics, "evaluate"),
        "saving": (Checkpoints, "_manager"),
    }[phase]
    real = getattr(module, name)

    def told(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, told)
        with pytest.raises(Preempted):
            train(tmp_path / "run")
    results = tmp_path / "run/results.parquet"
    assert results.exists() == (phase == "evaluating"), "what was measured is kept"
    assert_same(train(tmp_path / "run"), undisturbed)


def test_one_that_cannot_be_written_is_not_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Checkpoints) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_manager", full)
    with caplog.at_level(logging.WARNING, "absl"), pytest.raises(Preempted):
        train(tmp_path / "run")
    assert "it can go on from its start, none could be written" in caplog.text


def test_dictionaries_of_a_folder_are_read_when_asked_for(undisturbed: Run, tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    assert [d is None for d in run.dictionaries] == [d is None for d in undisturbed.dictionaries]
    assert len(run.dictionaries[1:3]) == 2
    assert run.dictionaries[-1].params.encoder.tobytes() == (
        undisturbed.dictionaries[-1].params.encoder.tobytes()
    )
    with pytest.raises(IndexError):
        run.dictionaries[5]
    shutil.rmtree(tmp_path / "run/dictionaries/0000")
    with pytest.raises(InputError, match="0000"):
        run.dictionaries[0]


def test_a_disk_without_room_is_not_written_to(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    room = shutil._ntuple_diskusage(10**6, 9 * 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    monkeypatch.setattr(Checkpoints, "_manager", None)
    with caplog.at_level(logging.WARNING, "absl"):
        assert_same(train(tmp_path / "run"), undisturbed)
    assert re.search(r"no checkpoint .*0000: [\d,]+ bytes are wanted and 100,000 are", caplog.text)


@pytest.mark.parametrize(
    "note", ["", "[]", "{}", '{"members": 3}', '{"members": [0, 1.0]}', '{"members": [0, 0]}',
             '{"members": [0, true]}', '{"members": [[0]]}', '{"members": [-1]}',
             '{"members": [%s]}' % ("9" * 4000), '{"members": "0"}', '{"members": [null]}'],
)  # fmt: skip
def test_a_damaged_note_of_who_trained_together_is_as_none(note: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/0000").mkdir(parents=True)
    found = Workdir.__new__(Workdir)
    found.path = tmp_path
    (tmp_path / "checkpoints/0000.json").write_text(note)
    assert found.begun([0, 1, 2]) == []
    (tmp_path / "checkpoints/0000.json").write_text('{"members": [0, 2]}')
    assert found.begun([0, 1, 2]) == [[0, 2]]
    assert found.begun([0, 1]) == [], "one of them is finished"


def test_a_folder_that_was_taken_away_is_not_made_anew_by_a_checkpoint(tmp_path: Path) -> None:
    def on_epochs(positions: np.ndarray, first: int, history: Any) -> None:
        if first == 3:
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(DiskError, match="run"):
        train(tmp_path / "run", on_epochs=on_epochs)
    assert not (tmp_path / "run").exists()

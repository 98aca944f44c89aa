"""Several processes of this machine train one sweep together: what one process would."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax import Run, data, grid
from tests.kills import outcome

ROWS = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
# Two programs; one member diverges at once, others stop early, so that rows are taken out.
SWEEP = [
    "--preset=vanilla,topk", "--n_latents=12", "--l1_weight=0.1", "--k=3", "--seeds=0,1,2",
    "--learning_rate=1e-3,0.3,1e30", "--batch_size=16", "--epochs=12", "--patience=3",
    "--checkpoint_seconds=0",
]  # fmt: skip


def start(
    folder: Path, count: int, *more: str, devices: int = 1, last: Sequence[str] = ()
) -> list[subprocess.Popen]:
    """So many processes of a sweep into folder/out, with so many devices each; the last is given
    `last` as well."""
    if not (folder / "rows.npy").exists():
        np.save(folder / "rows.npy", ROWS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "experiments.sweep", f"--data={folder}/rows.npy",
        f"--workdir={folder}/out", *SWEEP, *(["--multihost"] if count > 1 else []), *more,
    ]  # fmt: skip
    commands = [command] * (count - 1) + [[*command, *last]]
    processes = [
        subprocess.Popen(
            commands[i], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_PLATFORMS": "cpu",
                 "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                 "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)},
        )
        for i in range(count)
    ]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    for i, process in enumerate(processes):  # long before JAX counts them
        os.sched_setaffinity(process.pid, {cores[(i + j) % len(cores)] for j in range(devices)})
    return processes


def finish(processes: list[subprocess.Popen], status: int = 0) -> list[str]:
    """What they printed, once all have ended with this status."""
    printed = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), printed
    return printed


STREAMED = ("--resident_gib=1e-6", "--preset=topk")  # buffers of a batch


def alone(folder: Path, *more: str) -> dict[str, str]:
    finish(start(folder, 1, *more))
    return outcome(folder / "out")


def test_several_processes_train_what_one_does_bit_for_bit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = alone(tmp_path_factory.mktemp("alone"))
    printed = finish(start(tmp_path, 2, devices=2))
    assert outcome(tmp_path / "out") == expected
    statuses = Run.load(tmp_path / "out").results["status"].value_counts().to_dict()
    assert statuses["diverged"] > 0
    assert statuses["trained"] > 6
    assert "R²" in printed[0]
    assert "R²" not in printed[1], "only the first draws and prints"
    assert not (tmp_path / "out/checkpoints").exists()


def test_told_to_stop_by_one_all_stop_and_go_on_as_another_number(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On rows that are streamed, of which each reads its part."""
    processes = start(tmp_path, 4, *STREAMED)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("checkpoints/*/[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[2].send_signal(signal.SIGTERM)
    assert all("can go on" in text for text in finish(processes, 143))
    assert list((tmp_path / "out").glob("checkpoints/*/*")), "where they stood"
    finish(start(tmp_path, 2, *STREAMED))
    assert outcome(tmp_path / "out") == alone(tmp_path_factory.mktemp("alone"), *STREAMED)


def test_all_are_told_what_the_first_refuses(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("of somebody else")
    printed = finish(start(tmp_path, 2), 2)
    assert all("error:" in text and "other files" in text for text in printed)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_processes_of_other_flags_are_refused(tmp_path: Path) -> None:
    printed = finish(start(tmp_path, 2, last=["--resident_gib=1"]), 2)
    assert all("process 1 has other flags than process 0" in text for text in printed)
    assert not (tmp_path / "out").exists()


def test_latents_are_shared_within_each_of_several_processes(tmp_path: Path) -> None:
    few = ("--preset=topk", "--seeds=0", "--learning_rate=1e-3", "--epochs=3")
    finish(start(tmp_path, 2, *few, "--latent_devices=2", devices=2))
    config = grid("topk", d_in=5, n_latents=12, k=3, batch_size=16)
    train, held_out = data.split(len(ROWS), 0.1, 0)
    expected = sae_jax.train(config, ROWS[train], ROWS[held_out], epochs=3, progress=False)
    found = Run.load(tmp_path / "out")
    leaves = (jax.tree.leaves(run.dictionaries[0].params) for run in (found, expected))
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert found.dictionaries[0].provenance["train"] == expected.dictionaries[0].provenance["train"]

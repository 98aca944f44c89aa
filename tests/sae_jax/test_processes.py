"""Several processes of this machine train one sweep together: what one process would."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sae_jax import Run
from tests.kills import outcome

ROWS = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
# Two programs; one member diverges at once, others stop early, so that rows are taken out.
SWEEP = [
    "--preset=vanilla,topk", "--n_latents=12", "--l1_weight=0.1", "--k=3", "--seeds=0,1,2",
    "--learning_rate=1e-3,0.3,1e30", "--batch_size=16", "--epochs=12", "--patience=3",
    "--checkpoint_seconds=0",
]  # fmt: skip


def start(folder: Path, count: int, *more: str) -> list[subprocess.Popen]:
    """So many processes of a sweep into folder/out, one device each."""
    if not (folder / "rows.npy").exists():
        np.save(folder / "rows.npy", ROWS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "experiments.sweep", f"--data={folder}/rows.npy",
        f"--workdir={folder}/out", *SWEEP, *(["--multihost"] if count > 1 else []), *more,
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_PLATFORMS": "cpu",
                 "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                 "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)},
        )
        for i in range(count)
    ]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    for i, process in enumerate(processes):  # one device each, long before JAX counts them
        os.sched_setaffinity(process.pid, {cores[i % len(cores)]})
    return processes


def finish(processes: list[subprocess.Popen], status: int = 0) -> list[str]:
    """What they printed, once all have ended with this status."""
    printed = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), printed
    return printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("alone")
    finish(start(folder, 1))
    return outcome(folder / "out")


def test_several_processes_train_what_one_does_bit_for_bit(
    alone: dict[str, str], tmp_path: Path
) -> None:
    printed = finish(start(tmp_path, 2))
    assert outcome(tmp_path / "out") == alone
    statuses = Run.load(tmp_path / "out").results["status"].value_counts().to_dict()
    assert statuses["diverged"] > 0
    assert statuses["trained"] > 6
    assert "R²" in printed[0]
    assert "R²" not in printed[1], "only the first draws and prints"
    assert not (tmp_path / "out/checkpoints").exists()


def test_told_to_stop_by_one_all_stop_and_go_on_as_another_number(
    alone: dict[str, str], tmp_path: Path
) -> None:
    processes = start(tmp_path, 4)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("checkpoints/*/[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[2].send_signal(signal.SIGTERM)
    assert all("can go on" in text for text in finish(processes, 143))
    assert list((tmp_path / "out").glob("checkpoints/*/*")), "where they stood"
    finish(start(tmp_path, 2))
    assert outcome(tmp_path / "out") == alone


def test_all_are_told_what_the_first_refuses(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("of somebody else")
    printed = finish(start(tmp_path, 2), 2)
    assert all("error:" in text and "other files" in text for text in printed)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

r"""Kill a sweep at random moments until it is done, and compare with one that was let be.

    python tests/kills.py --kills=30                          (about 10 minutes on two cores)

Each trial starts the same command again and again, in a folder of its own: all but the last are
killed (SIGKILL, one in three SIGTERM) a random time after they announced the work. It must print
`30 of 30 identical`: weights, history and results of every configuration, bit for bit.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from absl import app, flags

FLAGS = flags.FLAGS

AXES = [
    "--preset=vanilla,topk,target_l0", "--n_latents=32", "--l1_weight=0.05,1", "--k=3",
    "--target_l0=4", "--seeds=0,1", "--learning_rate=1e-3,1e30", "--batch_size=32",
]  # fmt: skip


def command(folder: Path, epochs: int) -> list[str]:
    """A sweep in three programs, of which half the members diverge; checkpoints all the time."""
    return [
        sys.executable, "-m", "experiments.sweep", f"--data={folder.parent}/rows.npy", *AXES,
        f"--epochs={epochs}", f"--workdir={folder}", "--checkpoint_seconds=0",
    ]  # fmt: skip


def outcome(folder: Path) -> dict[str, str]:
    """A hash of all that a run leaves."""
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    for name in ("results", "history"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        rows = pd.util.hash_pandas_object(table).to_numpy()
        found[name] = hashlib.sha256(rows.tobytes()).hexdigest()
    return found


def started(folder: Path, epochs: int) -> subprocess.Popen:
    """The command, once it has said what it will do: imports take their own time."""
    process = subprocess.Popen(
        command(folder, epochs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    if not any(" programs" in line for line in process.stdout):
        raise RuntimeError(f"it has announced no work: {process.communicate()[1]}")
    return process


def run_killed(folder: Path, epochs: int, seconds: float, kills: int, seed: int) -> None:
    """Runs to the end what is killed `kills` times before.

    `seconds`: from the announcement of the work to the end of a run that is let be. Where one has
    ended by the time it was to be killed, it is begun anew, to be killed in half that time.
    """
    chance = random.Random(seed)
    killed = 0
    while killed < kills:
        process = started(folder, epochs)
        time.sleep(chance.uniform(0, 0.9) * seconds)
        kind = signal.SIGTERM if chance.random() < 1 / 3 else signal.SIGKILL
        process.send_signal(kind)
        _, printed = process.communicate()
        if process.returncode == 0:
            if seconds < 1e-3:
                raise RuntimeError("it has always ended before it could be killed")
            shutil.rmtree(folder)
            killed, seconds = 0, seconds / 2
        elif process.returncode in (-signal.SIGKILL, -signal.SIGTERM, 143):
            killed += 1
        else:
            raise RuntimeError(f"status {process.returncode}: {printed}")
    subprocess.run(command(folder, epochs), check=True, capture_output=True)


def trials(count: int, each: int, epochs: int, parent: Path) -> list[bool]:
    """Of every trial, of so many kills each, whether it ended as the undisturbed run."""
    rows = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32)
    np.save(parent / "rows.npy", rows)
    process = started(parent / "undisturbed", epochs)
    began = time.monotonic()
    _, printed = process.communicate()
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {printed}")
    seconds = time.monotonic() - began
    expected = outcome(parent / "undisturbed")
    found = []
    for trial in range(count):
        folder = parent / f"trial-{trial}"
        run_killed(folder, epochs, seconds, each, trial)
        found.append(outcome(folder) == expected)
        print(f"trial {trial}: identical: {found[-1]}", flush=True)
    return found


def main(_: list[str]) -> None:
    """Runs trials until so many kills have happened."""
    with tempfile.TemporaryDirectory() as folder:
        found = trials(FLAGS.kills, 1, FLAGS.epochs, Path(folder))
    print(f"{sum(found)} of {len(found)} identical")
    sys.exit(not all(found))


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 30, "Trials, each killed once.", lower_bound=1)
    flags.DEFINE_integer("epochs", 400, "Of the sweep.", lower_bound=1)
    app.run(main)

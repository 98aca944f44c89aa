r"""One sweep by 1, 2 and 4 processes of this machine, each with one CPU device.

    python -m experiments.benchmarks.processes            (about 3 minutes on two cores)
    python -m experiments.benchmarks.processes --quick    (under a minute)

64 dictionaries of 20 -> 200 (L1) on 4,096 rows, trained by `sae_jax.train` into a folder, twice in
each process: the second time everything is compiled. Rounds alternate between the numbers of
processes. It must show: the same weights whatever the number, bit for bit; nothing exchanged
between devices in the compiled chunk of epochs, and besides the few bytes that
`distributed.agree` moves, counted here over the whole call; and on two cores about 1.6 times the
config-steps a second of one process with one device.
"""

import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from sae_jax import InputError

FLAGS = flags.FLAGS

COUNTS = (1, 2, 4)
MEMBERS, ROWS, BATCH = 64, 4096, 128


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_bool("quick", False, "Fewer epochs and one round.")
    flags.DEFINE_string("worker", None, "Used inside: the folder to fill, in one of the processes.")


def main() -> None:
    """Measures and prints."""
    if FLAGS.worker:
        work(Path(FLAGS.worker))
        return
    rounds = 1 if FLAGS.quick else 3
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for count in COUNTS:
                found[count].append(together(count, Path(folder) / f"{number}-{count}"))
                print(f"round {number + 1}, {count} processes: {found[count][-1]}", flush=True)
    hashes = {each["weights"] for runs in found.values() for each in runs}
    rate = {count: statistics.median(r["rate"] for r in runs) for count, runs in found.items()}
    print("\nprocesses  config-steps/s  x one  bytes agreed in all  exchanges in the program")
    for count, runs in found.items():
        agreed, exchanged = runs[0]["agreed"], runs[0]["exchanged"]
        print(f"{count:>9}  {rate[count]:>14,.0f}  {rate[count] / rate[1]:>5.2f}  {agreed:>20}"
              f"  {exchanged:>24}")  # fmt: skip
    print(f"weights: {'the same in all runs' if len(hashes) == 1 else 'THEY DIFFER'}")


def together(count: int, folder: Path) -> dict[str, Any]:
    """What the first of so many processes has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "experiments.benchmarks.processes", f"--worker={folder}",
        f"--quick={FLAGS.quick}",
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL,
            env={**os.environ, "JAX_COORDINATOR_ADDRESS": address,
                 "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)},
        )
        for i in range(count)
    ]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    for i, process in enumerate(processes):
        os.sched_setaffinity(process.pid, {cores[i % len(cores)]})
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise InputError(f"a process of {count} failed: {printed}")
    return json.loads(printed[0].splitlines()[-1])


def work(folder: Path) -> None:
    """In each process: train twice, and tell of the second time."""
    import jax
    import numpy as np

    import sae_jax
    from sae_jax import distributed, ensemble, programs

    if int(os.environ["JAX_NUM_PROCESSES"]) > 1:
        distributed.join()
    epochs = 4 if FLAGS.quick else 60
    rows = np.random.default_rng(0).normal(size=(ROWS, 20)).astype(np.float32)
    weights = np.logspace(-3, 0, MEMBERS).tolist()
    configs = sae_jax.grid("vanilla", d_in=20, n_latents=200, l1_weight=weights, batch_size=BATCH)
    marks: list[float] = []
    for name in ("compiled", "measured"):
        marks.clear()
        began, agreed = time.perf_counter(), distributed.agreed_bytes
        run = sae_jax.train(
            configs, rows, epochs=epochs, workdir=folder / name, progress=False,
            checkpoint_seconds=1e6,
            on_epochs=lambda *_: marks.append(time.perf_counter()),
        )  # fmt: skip
    digest = hashlib.sha256()
    for dictionary in run.dictionaries:
        for leaf in jax.tree.leaves(dictionary.params):
            digest.update(np.ascontiguousarray(leaf))
    mesh = distributed.member_mesh(MEMBERS)
    architecture = configs[0].architecture
    hyper = ensemble.stack_hyperparams(configs, mesh, rows.dtype)
    states = programs.init_bucket(hyper, architecture=architecture, mesh=mesh, dtype=rows.dtype)
    program = programs.train_chunk.lower(
        states, hyper, ensemble.replicate(rows, mesh), None, 0, 0, 1, 0,
        architecture=architecture, mesh=mesh, size=1,
    ).compile().as_text()  # fmt: skip
    print(json.dumps({
        "rate": MEMBERS * epochs * (ROWS // BATCH) / (marks[-1] - began),
        "agreed": distributed.agreed_bytes - agreed,
        "exchanged": len(distributed.collectives(program)),
        "weights": digest.hexdigest()[:12],
    }))  # fmt: skip


if __name__ == "__main__":
    cli.launch(main, define_flags)

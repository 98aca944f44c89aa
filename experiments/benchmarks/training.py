r"""Training speed: config-steps a second of our ensembles beside peers, measured in the same run.

    make bench                                      (builds .bench-venv, then about 15 minutes)
    python -m experiments.benchmarks.training --quick                      (about 6 minutes)
    python -m experiments.benchmarks.training --rows=vanilla_64,topk_16 --peers=torch --out=t.json

A config-step is one step of one configuration: 64 configurations that train for 100 steps make
6400. Ours is `trainer.train_bucket`, what `sae_jax.train` runs, from a seed to weights and history;
compile time is printed beside the rate and is no part of it. The peers, a file of `peers/` each:

    torch                a plain loop: two nn.Linear and torch.optim.Adam
    sae_lens             SAELens, by its trainer's step
    dictionary_learning  by its trainers' update
    overcomplete         by its train_sae
    sparsify             TopK only

Every peer trains one configuration after another, with one thread or all, and with the fastest of
the settings it offers, by trial in this run. The libraries' requirements are not ours, so each runs
in the environment .bench-venv/<peer> or .bench-venv, where there is one, or by --peer_python. A
peer that is not installed is absent from the ratios and named in the table.

What makes the ratio fair. Every peer gets the same rows in the same order. `torch` has the same
initial weights and the same loss; that it computes what ours computes is checked in every run, by
the mean losses of the first epochs. The libraries have their own recipes ("own recipe" in the
table; `peers/` says how each differs): that their losses are finite and fall is checked. Everybody
has a process of its own and waits while another is measured. Rounds alternate between ours and the
peers; a ratio is the median of the ratios of the rounds. Where others use the machine, CPU time is
steadier than wall time, so its ratio is printed too. Ours also counts squared error, L1 and L0 in
every step; plain torch only the loss.

It must show a ratio to the best peer well above 1 in every row but the last two, where all spend
their time in the same large matrix products and it is about 1. (--quick is rough there: ours then
trains a few steps only, and starting is part of it.)
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from experiments.benchmarks import peers, table
from experiments.benchmarks.jobs import OURS, Job
from experiments.benchmarks.rows import ROWS, Row

# Nothing of jax, sae_jax or torch before the processes are started.

TOLERANCE = 1e-4  # of the first epochs' mean losses, relative
QUICK_SECONDS, QUICK_REPEATS = 0.2, 2

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_list("rows", list(ROWS), f"Which of {', '.join(ROWS)}.")
    flags.DEFINE_list("peers", list(peers.PEERS), f"Which of {', '.join(peers.PEERS)}.")
    flags.DEFINE_list(
        "peer_python", [], "Interpreter of the peers, or NAME=PATH for one of them; commas between."
    )
    flags.DEFINE_integer("repeats", 5, "Rounds of ours and every peer.", lower_bound=1)
    flags.DEFINE_float("seconds", 1.0, "A peer trains for so long in each round.", lower_bound=0)
    flags.DEFINE_bool(
        "quick", False, "Fewer epochs, rounds and seconds: rough figures of all rows."
    )
    flags.DEFINE_string("out", None, "JSON file to write.")


def main() -> None:
    """Measures the chosen rows, prints the table."""
    from sae_jax import files

    _check_names("rows", FLAGS.rows, list(ROWS), least=1)
    _check_names("peers", FLAGS.peers, list(peers.PEERS))
    pythons = interpreters()
    results = []
    for name in FLAGS.rows:
        logging.info("%s: %s", name, ROWS[name].title)
        row = ROWS[name].quick() if FLAGS.quick else ROWS[name]
        results.append({"row": name, **measure_row(row, pythons)})
    print(table.training(results))
    if FLAGS.out:
        report = {
            "machine": {"cpus": len(os.sched_getaffinity(0)), "platform": platform.platform()},
            "repeats": repeats(),
            "quick": FLAGS.quick,
            "rows": results,
        }
        files.write_json(FLAGS.out, report)
    wrong = [
        f"{peer} in {result['row']} ({found['status']})"
        for result in results
        for peer, found in result["peers"].items()
        if found["status"] in ("failed", "other loss", "loss does not fall")
    ]
    if wrong:
        sys.exit(f"error: {', '.join(wrong)}")


def _check_names(flag: str, chosen: list[str], known: list[str], least: int = 0) -> None:
    from sae_jax import InputError

    if set(chosen) - set(known) or len(chosen) < least:
        raise InputError(f"--{flag}={','.join(chosen)}: there are {', '.join(known)}")


def interpreters() -> dict[str, str]:
    """The Python of each chosen peer."""
    from sae_jax import InputError

    given = {}
    for text in FLAGS.peer_python:
        name, _, path = text.rpartition("=")
        if name and name not in peers.PEERS:
            raise InputError(f"--peer_python={text}: the peers are {', '.join(peers.PEERS)}")
        if not Path(path).exists():
            raise InputError(f"--peer_python={text}: there is no {path}")
        given[name] = path
    return {peer: peers.interpreter(peer, given) for peer in FLAGS.peers}


def repeats() -> int:
    """Rounds of this run."""
    return QUICK_REPEATS if FLAGS.quick else FLAGS.repeats


class Worker:
    """A process that measures ours or a peer; `about` is what it said first."""

    def __init__(self, job: Job, python: str) -> None:
        command = [python, "-m", "experiments.benchmarks.worker", job.to_json()]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=peers.ROOT
        )
        self.about = self.read()

    @property
    def ready(self) -> bool:
        """Whether it can be asked to measure."""
        return "status" not in self.about

    def read(self) -> dict[str, Any]:
        """Its next line."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            status = self.process.wait()
            raise RuntimeError(f"{self.process.args} ended with status {status}; see above")
        return json.loads(line)

    def measure(self) -> dict[str, float]:
        """One measurement: config_steps, wall, cpu."""
        assert self.process.stdin
        self.process.stdin.write("measure\n")
        self.process.stdin.flush()
        return self.read()

    def stop(self) -> None:
        """Ends it."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def measure_row(row: Row, pythons: dict[str, str]) -> dict[str, Any]:
    """Everything about one row, in JSON's types."""
    seconds = QUICK_SECONDS if FLAGS.quick else FLAGS.seconds
    with tempfile.TemporaryDirectory() as folder:
        problem = str(Path(folder) / "problem.npz")
        workers: dict[str, Worker] = {}
        try:
            # Ours first: it writes the problem.
            for peer, python in {OURS: sys.executable, **pythons}.items():
                workers[peer] = Worker(Job(peer, row, problem, seconds), python)
            rounds: dict[str, list[dict[str, float]]] = {}
            for _ in range(repeats()):
                for peer, worker in workers.items():
                    if worker.ready:
                        rounds.setdefault(peer, []).append(worker.measure())
        finally:
            for worker in workers.values():
                worker.stop()
    about = {peer: worker.about for peer, worker in workers.items()}
    result = {
        "title": row.title,
        "members": row.members,
        "ours": {**table.rates(rounds[OURS]), **about[OURS]},
        "peers": {},
    }
    for peer in pythons:
        found = about[peer]
        if peer in rounds:
            found = {
                **check(peer, found["losses"], about[OURS]["losses"]),
                "ratio": table.ratio(rounds[OURS], rounds[peer], "wall"),
                "cpu_ratio": table.ratio(rounds[OURS], rounds[peer], "cpu"),
                **table.rates(rounds[peer]),
                **found,
            }
        result["peers"][peer] = found
    return {**result, "best": table.best(result["peers"])}


def check(peer: str, losses: list[list[float]], ours: list[list[float]]) -> dict[str, Any]:
    """Status of a peer by its losses [2, epochs], and how far they are from ours."""
    if not np.all(np.isfinite(losses)):
        return {"status": "loss does not fall"}
    difference = float(np.max(np.abs(np.divide(losses, ours) - 1)))
    if peers.PEERS[peer].same_loss:
        status = "same loss" if difference <= TOLERANCE else "other loss"
    else:
        falls = all(epochs[-1] < epochs[0] for epochs in losses)
        status = "own recipe" if falls else "loss does not fall"
    return {"status": status, "loss_difference": difference}


if __name__ == "__main__":
    from experiments import cli

    cli.launch(main, define_flags)

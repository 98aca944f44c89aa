r"""Training speed: config-steps a second of our ensembles beside peers, measured in the same run.

    python -m experiments.benchmarks.training                              (about 3 minutes)
    python -m experiments.benchmarks.training --quick                    (about 1.5 minutes)
    python -m experiments.benchmarks.training --rows=vanilla_64,topk_16 --out=training.json

A config-step is one step of one configuration: 64 configurations that train for 100 steps make
6400. Ours is `trainer.train_bucket`, what `sae_jax.train` runs, from a seed to weights and history;
its compile time is printed beside the rate and is no part of it. The peers:

    torch   a plain loop, one configuration after another: two nn.Linear and torch.optim.Adam, with
            the fastest of one thread or all, and of Adam's implementations, by trial in this run

What makes the ratio fair. Every peer gets the same rows in the same order, the same initial weights
and the same loss; that it computes what ours computes is checked in every run, by the mean losses
of the first epochs. Everybody has a process of its own and waits while another is measured. Rounds
alternate between ours and the peers; a ratio is the median of the ratios of the rounds. Where
others use the machine, CPU time is steadier than wall time, so its ratio is printed too. Ours also
counts squared error, L1 and L0 in every step; a peer only the loss.

It must show a ratio above 1 in every row but dense_2048: there both spend their time in the same
large matrix products, and the ratio is about 1.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

# Nothing of jax or sae_jax here: the process of a peer loads that peer alone, and may be of an
# environment that has no jax.

OURS = "sae_jax"
DATA_SEED = 0
CHECKED_EPOCHS = 2
TOLERANCE = 1e-4  # of those epochs' mean losses, relative
QUICK_EPOCHS, QUICK_SECONDS, QUICK_REPEATS = 2, 0.2, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: what is trained, and on how many rows for how many epochs."""

    title: str
    d_in: int
    n_latents: int
    members: int
    epochs: int
    batch_size: int = 128
    activation: str = "relu"
    rows: int = 4096

    def configs(self) -> list[dict[str, Any]]:
        """Each configuration, by the names of SAEConfig."""
        names = ("d_in", "n_latents", "batch_size", "activation")
        shape = {name: getattr(self, name) for name in names}
        if self.activation == "topk":
            ks = np.linspace(self.n_latents // 100, self.n_latents // 2, self.members)
            varied = [{"k": int(k)} for k in ks]
        else:
            varied = [{"l1_weight": float(w)} for w in np.geomspace(0.1, 1, self.members)]
        return [{**shape, **member, "seed": seed} for seed, member in enumerate(varied)]


ROWS = {
    "vanilla_64": Row(
        title="64 configurations of 4 -> 400, batch 128, L1 (vanilla)",
        d_in=4, n_latents=400, members=64, epochs=16,
    ),
    "vanilla_1": Row(
        title="one configuration 4 -> 400, batch 128, L1",
        d_in=4, n_latents=400, members=1, epochs=256,
    ),
    "topk_16": Row(
        title="TopK 4 -> 400, batch 128, k traced, 16 configurations",
        d_in=4, n_latents=400, members=16, epochs=8, activation="topk",
    ),
    "wide_10000": Row(
        title="20 -> 10000, batch 128, L1, one configuration",
        d_in=20, n_latents=10000, members=1, epochs=4,
    ),
    "dense_2048": Row(
        title="512 -> 2048, batch 512, L1, one configuration",
        d_in=512, n_latents=2048, members=1, epochs=4, batch_size=512,
    ),
}  # fmt: skip

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_list("rows", list(ROWS), f"Which of {', '.join(ROWS)}.")
    flags.DEFINE_integer("repeats", 5, "Rounds of ours and every peer.", lower_bound=1)
    flags.DEFINE_float("seconds", 1.0, "A peer trains for so long in each round.", lower_bound=0)
    flags.DEFINE_bool(
        "quick", False, "Fewer epochs, rounds and seconds: rough figures of all rows."
    )
    flags.DEFINE_string("out", None, "JSON file to write.")
    flags.DEFINE_string(
        "peer", None, "What this program starts itself with: serve measurements of it."
    )
    flags.DEFINE_string("row", None, "Of --peer: the row.")
    flags.DEFINE_string("problem", None, "Of --peer: .npz of data and weights, written by ours.")


def main() -> None:
    """Measures the chosen rows, prints the table."""
    from sae_jax import InputError, files

    unknown = sorted(set(FLAGS.rows) - set(ROWS))
    if unknown or not FLAGS.rows:
        raise InputError(f"--rows={','.join(FLAGS.rows)}: there are {', '.join(ROWS)}")
    results = []
    for name in FLAGS.rows:
        logging.info("%s: %s", name, ROWS[name].title)
        results.append(measure_row(name))
    print(table(results))
    if FLAGS.out:
        report = {
            "machine": {"cpus": len(os.sched_getaffinity(0)), "platform": platform.platform()},
            "repeats": repeats(),
            "quick": FLAGS.quick,
            "rows": results,
        }
        files.write_json(FLAGS.out, report)
    wrong = [
        f"{result['row']} of {peer}"
        for result in results
        for peer, found in result["peers"].items()
        if found["status"] == "other loss"
    ]
    if wrong:
        sys.exit(f"error: the losses differ from ours by more than {TOLERANCE}: {', '.join(wrong)}")


def repeats() -> int:
    """Rounds of this run."""
    return QUICK_REPEATS if FLAGS.quick else FLAGS.repeats


def epochs_of(row: Row) -> int:
    """Epochs that each configuration of a row is trained for."""
    return min(QUICK_EPOCHS, row.epochs) if FLAGS.quick else row.epochs


# What the first process does: start the others, ask them by turns, compare.


@dataclasses.dataclass
class Worker:
    """A process that measures ours or a peer: it tells about itself first, then answers."""

    process: subprocess.Popen[str]
    about: dict[str, Any]

    @classmethod
    def start(cls, peer: str, row: str, problem: Path) -> "Worker":
        """Starts it and waits until it has compiled, or chosen its settings."""
        command = [sys.executable, "-m", "experiments.benchmarks.training"]
        command += [f"--peer={peer}", f"--row={row}", f"--problem={problem}"]
        command += [f"--seconds={FLAGS.seconds}", f"--quick={FLAGS.quick}"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        worker = cls(process, {})
        worker.about = worker.read()
        return worker

    def read(self) -> dict[str, Any]:
        """Its next line."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
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


def measure_row(name: str) -> dict[str, Any]:
    """Everything about one row, in JSON's types."""
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder) / "problem.npz"
        workers = {}
        try:
            for peer in (OURS, *PEERS):  # ours first: it writes the problem
                workers[peer] = Worker.start(peer, name, problem)
            present = [peer for peer in workers if "absent" not in workers[peer].about]
            rounds: dict[str, list[dict[str, float]]] = {peer: [] for peer in present}
            for _ in range(repeats()):
                for peer in present:
                    rounds[peer].append(workers[peer].measure())
        finally:
            for worker in workers.values():
                worker.stop()
    ours = workers[OURS].about
    result = {
        "row": name,
        "title": ROWS[name].title,
        "ours": {**rates(rounds[OURS]), **ours},
        "peers": {},
    }
    for peer in PEERS:
        about = workers[peer].about
        if "absent" in about:
            result["peers"][peer] = {"status": "absent", **about}
            continue
        difference = np.max(np.abs(np.divide(about["losses"], ours["losses"]) - 1))
        result["peers"][peer] = {
            "status": "measured" if difference <= TOLERANCE else "other loss",
            "loss_difference": float(difference),
            "ratio": ratio(rounds[OURS], rounds[peer], "wall"),
            "cpu_ratio": ratio(rounds[OURS], rounds[peer], "cpu"),
            **rates(rounds[peer]),
            **about,
        }
    return result


def rates(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds."""
    per_second = [found["config_steps"] / found["wall"] for found in rounds]
    cpu = [found["cpu"] / found["config_steps"] for found in rounds]
    return {
        "config_steps_per_second": statistics.median(per_second),
        "cpu_seconds_per_config_step": statistics.median(cpu),
        "config_steps": rounds[0]["config_steps"],
    }


def ratio(ours: list[dict[str, float]], peer: list[dict[str, float]], clock: str) -> float:
    """How many times the peer's config-steps ours does in a second of `clock`: wall or cpu."""
    return statistics.median(
        (a["config_steps"] / a[clock]) / (b["config_steps"] / b[clock])
        for a, b in zip(ours, peer, strict=True)
    )


def table(results: list[dict[str, Any]]) -> str:
    """The rows in text: rates are config-steps a second, CPU is µs a config-step."""
    head = ("row", "ours /s", "CPU µs", "compile s", "peer", "peer /s", "CPU µs", "ratio")
    lines = [(*head, "CPU ratio", "setting of the peer")]
    for result in results:
        ours = result["ours"]
        for peer, found in result["peers"].items():
            line = [result["row"], *_speed(ours), f"{ours['compile_seconds']:.2f}", peer]
            if found["status"] == "absent":
                line += ["absent", "", "", "", ""]
            else:
                line += [*_speed(found), f"{found['ratio']:.2f}", f"{found['cpu_ratio']:.2f}"]
                line += [found["setting"]]
            lines.append(tuple(line))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = {0, 4, 9}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _speed(found: dict[str, Any]) -> tuple[str, str]:
    cpu = found["cpu_seconds_per_config_step"] * 1e6
    return f"{found['config_steps_per_second']:,.0f}", f"{cpu:,.0f}"


# What the other processes do: prepare, say so, then measure whenever a line arrives.


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Ours or a peer, ready to be measured.

    Attributes:
      about: JSON's types; `losses` [2, epochs] is the mean loss of the first and the last
        configuration in each of the first epochs, `setting` and `version` are text.
      measure: trains, from the initial weights on; returns the config-steps done.
    """

    about: dict[str, Any]
    measure: Callable[[], int]


def serve() -> None:
    """Answers every line of stdin with one measurement, until stdin ends."""
    logging.set_verbosity(logging.WARNING)
    prepare = prepare_ours if FLAGS.peer == OURS else PEERS[FLAGS.peer]
    try:
        prepared = prepare(ROWS[FLAGS.row], Path(FLAGS.problem))
    except ModuleNotFoundError as error:
        if FLAGS.peer == OURS or error.name != PACKAGES[FLAGS.peer]:
            raise
        print(json.dumps({"absent": str(error)}), flush=True)
        return
    print(json.dumps(prepared.about), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        config_steps = prepared.measure()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"config_steps": config_steps, "wall": wall, "cpu": cpu}), flush=True)


def prepare_ours(row: Row, problem: Path) -> Prepared:
    """Compiles, and writes the problem: rows, orders [epochs, steps, batch], first weights."""
    import jax
    import jax.numpy as jnp

    from sae_jax import SAEConfig, distributed, ensemble, models, trainer

    distributed.use_all_cpu_cores()
    configs = [SAEConfig(**fields) for fields in row.configs()]
    architecture = configs[0].architecture
    epochs = epochs_of(row)
    x = np.random.default_rng(DATA_SEED).standard_normal((row.rows, row.d_in), np.float32)
    orders = [
        np.asarray(trainer.row_order(DATA_SEED, epoch, row.rows, architecture))
        for epoch in range(min(epochs, 8))
    ]
    mesh = distributed.member_mesh(len(configs))
    hyper = ensemble.stack_hyperparams(configs, mesh, jnp.float32)
    first_weights = [
        models.init(jnp.uint32(config.seed), architecture, jnp.float32) for config in configs
    ]
    np.savez(
        problem,
        rows=x,
        orders=np.stack(orders),
        **{
            name: np.stack([np.asarray(getattr(params, name)) for params in first_weights])
            for name in ("encoder", "encoder_bias", "decoder", "decoder_bias")
        },
    )
    inputs = jnp.asarray(x)

    def train() -> trainer.Trained:
        trained = trainer.train_bucket(
            hyper, inputs, architecture=architecture, mesh=mesh, epochs=epochs, data_seed=DATA_SEED,
            on_chunk=lambda epochs, loss: None,
        )  # fmt: skip
        return jax.block_until_ready(trained)

    seconds = []
    for _ in range(2):  # the first call compiles
        began = time.perf_counter()
        trained = train()
        seconds.append(time.perf_counter() - began)
    about = {
        "losses": trained.history.loss[[0, len(configs) - 1], :CHECKED_EPOCHS].tolist(),
        "compile_seconds": max(0.0, seconds[0] - seconds[1]),
        "setting": f"{mesh.size} {mesh.devices.flat[0].platform} devices",
        "version": f"jax {jax.__version__}",
    }
    config_steps = len(configs) * epochs * (row.rows // row.batch_size)

    def measure() -> int:
        train()
        return config_steps

    return Prepared(about, measure)


def prepare_torch(row: Row, problem: Path) -> Prepared:
    """The plain loop, at the fastest of its settings."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = np.load(problem)
    x = torch.from_numpy(arrays["rows"]).to(device)
    orders = torch.from_numpy(arrays["orders"]).long().to(device)
    weights = {
        name: torch.from_numpy(arrays[name]).to(device)
        for name in ("encoder", "encoder_bias", "decoder", "decoder_bias")
    }
    configs = row.configs()

    def epochs_of_member(member: int, adam: dict[str, bool]) -> Iterator[torch.Tensor]:
        """Trains configuration `member` from its first weights, gives each epoch's mean loss."""
        config = configs[member]
        encoder = torch.nn.Linear(row.d_in, row.n_latents, device=device)
        decoder = torch.nn.Linear(row.n_latents, row.d_in, device=device)
        with torch.no_grad():
            encoder.weight.copy_(weights["encoder"][member].T)
            encoder.bias.copy_(weights["encoder_bias"][member])
            decoder.weight.copy_(weights["decoder"][member].T)
            decoder.bias.copy_(weights["decoder_bias"][member])
        parameters = [*encoder.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-3, **adam)
        for epoch in itertools.count():
            losses = []
            for positions in orders[epoch % len(orders)]:
                batch = x[positions]
                z = encoder(batch)
                if "k" in config:
                    values, indices = torch.topk(z, config["k"], dim=-1, sorted=False)
                    z = torch.zeros_like(z).scatter(-1, indices, torch.relu(values))
                    penalty = 0.0
                else:
                    z = torch.relu(z)
                    penalty = config["l1_weight"] * z.sum() / len(batch)
                loss = ((decoder(z) - batch) ** 2).sum() / len(batch) + penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            yield torch.stack(losses).mean()

    def train(seconds: float, adam: dict[str, bool]) -> int:
        """Configurations one after another, until the epoch in which the time is up."""
        end = time.perf_counter() + seconds
        config_steps = 0
        for member in itertools.cycle(range(len(configs))):
            for loss in itertools.islice(epochs_of_member(member, adam), epochs_of(row)):
                float(loss)  # an accelerator is waited for
                config_steps += orders.shape[1]
                if time.perf_counter() >= end:
                    return config_steps
        raise AssertionError

    def speed(threads: int, adam: dict[str, bool]) -> float:
        torch.set_num_threads(threads)
        train(0, adam)
        began = time.perf_counter()
        return train(seconds / 2, adam) / (time.perf_counter() - began)

    # The first two epochs, then a trial of every setting.
    seconds = QUICK_SECONDS if FLAGS.quick else FLAGS.seconds
    checked = min(CHECKED_EPOCHS, epochs_of(row))
    losses = [
        [float(loss) for loss in itertools.islice(epochs_of_member(member, {}), checked)]
        for member in (0, len(configs) - 1)
    ]
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    implementations = ({"foreach": False}, {"foreach": True}, {"fused": True})
    trials = {
        (threads, i): speed(threads, adam)
        for threads in sorted({1, cores})
        for i, adam in enumerate(implementations)
    }
    threads, best = max(trials, key=trials.__getitem__)
    torch.set_num_threads(threads)
    name = next((name for name, on in implementations[best].items() if on), "default")
    about = {
        "losses": losses,
        "setting": f"{device}, {threads} thread{'s' * (threads > 1)}, Adam {name}",
        "version": f"torch {importlib.metadata.version('torch')}",
    }
    return Prepared(about, lambda: train(seconds, implementations[best]))


# A peer: how it is prepared, and the package without which it is absent.
PEERS: dict[str, Callable[[Row, Path], Prepared]] = {"torch": prepare_torch}
PACKAGES = {"torch": "torch"}


if __name__ == "__main__":
    if any(argument.startswith("--peer=") for argument in sys.argv):
        define_flags()
        app.run(lambda _: serve())
    else:
        from experiments import cli

        cli.launch(main, define_flags)

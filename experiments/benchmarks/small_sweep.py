r"""CPU hours of the 512-configuration small sweep of Schuster's paper, extrapolated from a tenth.

    python -m experiments.benchmarks.small_sweep --out=sweep.json      (about 7 minutes, 2 cores)
    python -m experiments.benchmarks.small_sweep --quick                     (about 2 minutes)

The sweep (Table S4): hidden widths 2 to 1000 times d_in = 4, learning rates 1e-2 to 1e-5, L1
weights 1e-1 to 1e-5 for `vanilla` and `bricken`, k of 5 to 100 % for `topk_schuster`; 12000 rows,
batch 128, 500 epochs. Here all 512 train for --epochs of them (50), in 24 programs; the CPU time of
an epoch and of what comes before the first are kept apart, and the former counts 500 times.

The metrics (A.2.4), of --metrics_members of each program and counted for all: those of
`sae_jax.metrics`, redundant latents (Pearson's r with an earlier one at least .95), and for each
variable of the simulation the largest |r| and the latents with r and |r| of at least .95.
They are of dictionaries that have trained for --epochs.

Data: A ~ Poisson(2), one a row; X ~ Bernoulli(.5, .1, .9); X' = A X; Y = X' M with M of the code.
The SAEs see 4 dimensions. In the paper these are the latents of a small autoencoder of Y; here, as
only time is asked for, a fixed random linear map of Y.

It must show at most 2.5 CPU hours in total (the authors' loop: about 13 to 16, and hours more for
the metrics).
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from experiments.benchmarks import table
from experiments.simulation import data, sweep
from experiments.simulation.sweep import EPOCHS, SCALINGS

if TYPE_CHECKING:
    from sae_jax import SAEConfig
    from sae_jax.state import Params

D_IN = 4
QUICK_EPOCHS, QUICK_MEMBERS = 3, 1

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_integer("epochs", 50, "Epochs measured, of 500.", lower_bound=2)
    flags.DEFINE_integer("metrics_members", 3, "Dictionaries of each program.", lower_bound=1)
    flags.DEFINE_list("scalings", [str(s) for s in SCALINGS], "Hidden widths, times 4.")
    flags.DEFINE_bool("quick", False, f"{QUICK_EPOCHS} epochs, {QUICK_MEMBERS} member's metrics.")
    flags.DEFINE_string("out", None, "JSON file to write.")


def main() -> None:
    """Measures every program, prints seconds by width and the sum."""
    from sae_jax import InputError, files

    known = [str(scaling) for scaling in SCALINGS]
    if set(FLAGS.scalings) - set(known) or not FLAGS.scalings:
        raise InputError(f"--scalings={','.join(FLAGS.scalings)}: there are {', '.join(known)}")
    epochs = QUICK_EPOCHS if FLAGS.quick else FLAGS.epochs
    members = QUICK_MEMBERS if FLAGS.quick else FLAGS.metrics_members
    rows, variables = simulation()
    found = []
    for bucket in programs([int(scaling) for scaling in FLAGS.scalings]):
        found.append(measure(bucket, rows, variables, epochs, members))
        logging.info("%(preset)s 4 -> %(n_latents)d: %(wall_spent).1f s", found[-1])
    print(text(found))
    if FLAGS.out:
        report = {"epochs_measured": epochs, "metrics_members": members, "programs": found}
        files.write_json(FLAGS.out, report)


def simulation(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows [12000, 4] to train on, and the variables [12000, 12]: Y, X', A, X."""
    cells = data.small(seed)
    mixed = cells.y @ np.random.default_rng(seed).standard_normal((cells.y.shape[1], D_IN))
    return (mixed / np.sqrt(cells.y.shape[1])).astype(np.float32), cells.variables


def programs(scalings: Sequence[int] = SCALINGS) -> list[list["SAEConfig"]]:
    """The configurations of the sweep, by program, narrow ones first.

    At 8 latents 5, 10 and 20 % are all k = 1: 512 counts them.
    """
    found: dict[tuple[str, int], list[SAEConfig]] = {}
    for row in sweep.Grid(scalings=tuple(scalings)).rows(D_IN):
        found.setdefault((row["type"], row["scaling"]), []).append(row["config"])
    return list(found.values())


def measure(
    bucket: list["SAEConfig"], rows: np.ndarray, variables: np.ndarray, epochs: int, members: int
) -> dict[str, Any]:
    """One program: seconds of training and of metrics, as measured and as they add up."""
    from experiments.benchmarks import ours

    began = time.perf_counter()
    training, trained = ours.timed(bucket, rows, epochs)
    assert trained is not None
    chosen = np.linspace(0, len(bucket) - 1, min(members, len(bucket))).astype(int)
    some = [bucket[i] for i in chosen]
    params = ours.members(trained.params, chosen)
    for _ in range(2):  # the first compiles
        clock = time.process_time()
        found = metrics_of(some, params, rows, variables)
        seconds = time.process_time() - clock
    return {
        "preset": bucket[0].name,
        "n_latents": bucket[0].n_latents,
        "members": len(bucket),
        **training,
        "active": found["live"].tolist(),
        "redundant": found["redundant"].tolist(),
        "wall_spent": time.perf_counter() - began,
        "wall_training": training["wall_first"] + EPOCHS * training["wall_per_epoch"],
        "cpu_training": EPOCHS * training["cpu_per_epoch"],
        "cpu_metrics": seconds / len(chosen) * len(bucket),
    }


def metrics_of(
    configs: Sequence["SAEConfig"], params: "Params", rows: np.ndarray, variables: np.ndarray
) -> dict[str, Any]:
    """Metrics of members that share an architecture, params [members, ...], of rows [rows, 4]."""
    import jax

    from sae_jax import Dictionary, distributed, ensemble, metrics, redundancy

    mesh = distributed.member_mesh(len(configs))
    hyper = ensemble.stack_hyperparams(configs, mesh, np.float32)
    filled = np.arange(len(hyper.seed)).clip(max=len(configs) - 1)
    of_all = {"architecture": configs[0].architecture, "mesh": mesh}
    members = jax.tree.map(lambda leaf: leaf[filled], params)
    found = metrics.evaluate(members, hyper, rows, None, **of_all)
    repeats = redundancy.redundant(members, hyper, rows, None, **of_all)
    correlations = []
    for i, config in enumerate(configs):
        weights = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        codes = Dictionary(config, weights, None).encode(rows)
        correlations.append(sweep.correlated(codes, variables))
    return {
        **{name: value[: len(configs)] for name, value in found.items()},
        "redundant": repeats[: len(configs)].sum(axis=1),
        **{name: np.stack([each[name] for each in correlations]) for name in correlations[0]},
    }


def text(found: list[dict[str, Any]]) -> str:
    """CPU seconds of the whole sweep by width, and their sum in hours."""
    presets = list(dict.fromkeys(program["preset"] for program in found))
    head = ["latents", "configurations", *presets, "compiling", "metrics", "sum", "share"]
    total = sum(_cpu(program) for program in found)
    lines = [head]
    for width in [*dict.fromkeys(program["n_latents"] for program in found), None]:
        chosen = [program for program in found if width in (None, program["n_latents"])]
        training = [
            sum(program["cpu_training"] for program in chosen if program["preset"] == preset)
            for preset in presets
        ]
        cells = [
            *training, sum(program["cpu_first"] for program in chosen),
            sum(program["cpu_metrics"] for program in chosen), sum(map(_cpu, chosen)),
        ]  # fmt: skip
        count = sum(program["members"] for program in chosen)
        share = f"{sum(map(_cpu, chosen)) / total:.0%}"
        name = "all" if width is None else f"{width}"
        lines.append([name, f"{count}", *(f"{cell:,.1f}" for cell in cells), share])
    wall = sum(program["wall_training"] for program in found)
    count = sum(program["members"] for program in found)
    measured = min(program["epochs"] for program in found)
    return "\n".join(
        [
            f"CPU seconds of the sweep, extrapolated to {EPOCHS} epochs from {measured}",
            table.aligned(lines),
            "",
            f"{count} configurations: {total / 3600:.2f} CPU hours; their training takes "
            f"{wall / 3600:.2f} hours by the clock",
        ]
    )


def _cpu(program: dict[str, Any]) -> float:
    return program["cpu_first"] + program["cpu_training"] + program["cpu_metrics"]


if __name__ == "__main__":
    from experiments import cli

    cli.launch(main, define_flags)

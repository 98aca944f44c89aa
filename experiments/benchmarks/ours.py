"""Our side of every benchmark: configurations in, a function that trains them out."""

import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.jobs import CHECKED_EPOCHS, Job, Prepared
from sae_jax import SAEConfig, distributed, ensemble, models, steps, trainer
from sae_jax.state import Params

DATA_SEED = 0
ORDERS = 8  # orders of rows given to the peers, who go through them again and again


def normal_rows(rows: int, d_in: int) -> np.ndarray:
    """Rows [rows, d_in] to train on where what they hold does not matter."""
    return np.random.default_rng(DATA_SEED).standard_normal((rows, d_in), np.float32)


def bucket(
    configs: Sequence[SAEConfig], rows: np.ndarray, epochs: int
) -> Callable[..., trainer.Trained]:
    """`train(on_steps=...)` for configurations of one architecture, as `sae_jax.train` runs it.

    Its first call compiles. `on_steps(steps, loss)` hears of every call of the program.
    """
    mesh = distributed.member_mesh(len(configs))
    hyper = ensemble.stack_hyperparams(configs, mesh, jnp.float32)
    inputs = jnp.asarray(rows)

    def train(
        on_steps: Callable[[int, float], None] = lambda steps, loss: None,
    ) -> trainer.Trained:
        trained = trainer.train_bucket(
            hyper, inputs, architecture=configs[0].architecture, mesh=mesh, epochs=epochs,
            data_seed=DATA_SEED, on_steps=on_steps,
        )  # fmt: skip
        return jax.block_until_ready(trained)

    return train


def members(params: Params, chosen: np.ndarray) -> Params:
    """Those of a bucket's members, [chosen, ...]."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], params)


def rate(configs: Sequence[SAEConfig], rows: np.ndarray, epochs: int, repeats: int) -> dict:
    """Speed of a bucket from seeds to weights: the fastest of some repeats, compiling beside it."""
    train = bucket(configs, rows, epochs)
    config_steps = len(configs) * epochs * (len(rows) // configs[0].batch_size)
    walls, cpus = [], []
    for _ in range(1 + repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        train()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    wall, cpu = min(walls[1:]), min(cpus[1:])
    return {
        "config_steps": config_steps,
        "config_steps_per_second": config_steps / wall,
        "cpu_seconds_per_config_step": cpu / config_steps,
        "compile_seconds": max(0.0, walls[0] - wall),
    }


class _OutOfTimeError(Exception):
    pass


def timed(
    configs: Sequence[SAEConfig],
    rows: np.ndarray,
    epochs: int,
    deadline: float = math.inf,
) -> tuple[dict, trainer.Trained | None]:
    """Seconds an epoch of a bucket in ONE training, whose first chunk also compiles.

    Returns:
      In JSON's types `epochs` (done), and of each clock (wall, cpu) `<clock>_per_epoch` after the
      first chunk and `<clock>_first`, what the start and compiling took beyond that; and what was
      trained, None if it was stopped because `time.perf_counter()` reached the deadline.
    """
    train = bucket(configs, rows, epochs)
    marks = [(0, time.perf_counter(), time.process_time())]

    def on_steps(steps: int, loss: float) -> None:
        done = marks[-1][0] + steps / (len(rows) // configs[0].batch_size)
        marks.append((done, time.perf_counter(), time.process_time()))
        if marks[-1][1] > deadline and marks[-1][0] < epochs and len(marks) > 2:
            raise _OutOfTimeError

    try:
        trained = train(on_steps)
    except _OutOfTimeError:
        trained = None
    begin, first, last = (np.asarray(marks[i]) for i in (0, 1, -1))
    later = last - first if len(marks) > 2 else first - begin
    found = {"epochs": int(last[0])}
    for clock, i in (("wall", 1), ("cpu", 2)):
        found[f"{clock}_per_epoch"] = float(later[i] / later[0])
        spent = (first - begin)[i] - found[f"{clock}_per_epoch"] * first[0]
        found[f"{clock}_first"] = max(0.0, float(spent))
    return found, trained


def prepare(job: Job) -> Prepared:
    """Compiles, and writes the problem: rows, orders [epochs, steps, batch], first weights."""
    distributed.use_all_cpu_cores()
    row = job.row
    configs = [SAEConfig(**fields) for fields in row.configs()]
    architecture = configs[0].architecture
    x = normal_rows(row.rows, row.d_in)
    orders = [
        np.asarray(steps.row_order(DATA_SEED, epoch, row.rows, architecture))
        for epoch in range(min(row.epochs, ORDERS))
    ]
    first_weights = [
        models.init(jnp.uint32(config.seed), architecture, jnp.float32) for config in configs
    ]
    np.savez(
        job.problem,
        rows=x,
        orders=np.stack(orders),
        **{
            name: np.stack([np.asarray(getattr(params, name)) for params in first_weights])
            for name in ("encoder", "encoder_bias", "decoder", "decoder_bias")
        },
    )
    train = bucket(configs, x, row.epochs)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        trained = train()
        seconds.append(time.perf_counter() - began)
    devices = jax.local_devices()[: len(configs)]
    about = {
        "losses": trained.history.loss[[0, len(configs) - 1], :CHECKED_EPOCHS].tolist(),
        "compile_seconds": max(0.0, seconds[0] - seconds[1]),
        "setting": f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}",
        "version": f"jax {jax.__version__}",
    }
    config_steps = len(configs) * row.epochs * row.steps

    def measure() -> int:
        train()
        return config_steps

    return Prepared(about, measure)

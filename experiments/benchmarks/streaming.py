r"""Training on rows that are streamed from disk beside the same on rows in memory.

    python -m experiments.benchmarks.streaming                         (about 2 minutes)
    python -m experiments.benchmarks.streaming --quick                 (about 20 seconds)

512 -> 2048, batch 512, one L1 dictionary, on a .npy file four times the size that may be resident.
Both train in the chunk-shuffled order of `sae_jax.streaming.Plan`: the one by buffers that are read
while the one before is trained on, the other on all rows at once. Epochs alternate. It must show
equal losses and a ratio of at least .8.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from sae_jax import SAEConfig, data, distributed, ensemble, feeds, programs, streaming

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_bool("quick", False, "Fewer rows and epochs.")


def main() -> None:
    """Measures and prints."""
    config = SAEConfig(d_in=512, n_latents=2048, batch_size=512, l1_weight=1.0)
    count, epochs = (16 * 512, 3) if FLAGS.quick else (64 * 512, 6)
    mesh = distributed.member_mesh(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        random = np.random.default_rng(0)
        written = np.lib.format.open_memmap(file, "w+", np.float32, (count, config.d_in))
        for start in range(0, count, 4096):
            written[start : start + 4096] = random.normal(size=written[start : start + 4096].shape)
        written.flush()
        rows = data.open_rows(str(file))
        resident = rows.nbytes // 4
        size = streaming.buffer_rows(resident, 4 * config.d_in, config.batch_size)
        plan = streaming.Plan(rows=count, batch_size=512, buffer_rows=size)
        stream = feeds.Stream(rows, plan, None)
        static = {"architecture": config.architecture, "mesh": mesh}
        hyper = ensemble.stack_hyperparams([config], mesh, np.float32, epochs * plan.steps)
        # Two states, so that each goes its own way through the same epochs.
        streamed, whole = (
            programs.init_bucket(hyper, **static, dtype=np.float32) for _ in range(2)
        )
        everything = jnp.asarray(np.asarray(rows))
        advance = feeds.in_parts(stream, None, 0, 0, 0, epochs, **static)
        times: dict[str, list[float]] = {"disk": [], "memory": []}
        losses: dict[str, list[float]] = {"disk": [], "memory": []}
        for epoch in range(epochs):
            began, history = time.perf_counter(), None
            while history is None:
                done = int(streamed.step[0])
                streamed, _, history = advance(streamed, hyper, done, plan.steps)
            times["disk"].append(time.perf_counter() - began)
            losses["disk"].append(float(history.loss[0, 0]))

            order = plan.positions(epoch).astype(np.int32)
            began = time.perf_counter()
            whole = programs.train_part(whole, hyper, everything, order, 0, plan.steps, 0, **static)
            losses["memory"].append(float(jax.device_get(whole.means.loss)[0]))
            times["memory"].append(time.perf_counter() - began)
    for name, values in times.items():
        speed = plan.steps / statistics.median(values[1:])  # the first compiles
        text = " ".join(f"{loss:.6g}" for loss in losses[name])
        print(f"{name:<8}{1e3 / speed:8.1f} ms a step   losses {text}")
    ratio = statistics.median(
        memory / disk for memory, disk in zip(times["memory"][1:], times["disk"][1:], strict=True)
    )
    equal = losses["disk"] == losses["memory"]
    print(
        f"{rows.nbytes / 2**20:.0f} MiB of which {resident / 2**20:.0f} may be resident: "
        f"speed {ratio:.2f} of memory's, losses {'equal' if equal else 'DIFFER'}"
    )


if __name__ == "__main__":
    cli.launch(main, define_flags)

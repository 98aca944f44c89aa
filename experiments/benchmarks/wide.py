r"""Few wide dictionaries on several devices: side by side, sharing latents, or sharing rows.

    python -m experiments.benchmarks.wide --out=wide.json     (about 5 minutes on two CPU devices)
    python -m experiments.benchmarks.wide --quick                                (half a minute)

On all local devices (CPUs: as many as --devices), the same steps of the same dictionaries

    one      all on one device
    member   each on a device of its own; for one dictionary the same as `one`
    latent   the latents of each spread over all devices, as `sae_jax.train(latent_devices=...)` has
             it: the reconstruction, batch x d, is summed over them, and for TopK a count for each
             row of every pass that looks for the k-th largest
    batch    the rows of each batch spread over all devices, which all hold all weights: their
             gradients, 2 d n, are summed. Not for TopK, whose rows XLA would gather again on CPU

in config-steps a second, and the bytes that each device gets of what is exchanged a step, read from
the compiled program (where a count is in a loop, of as many passes as it can take at most).

It must show: nothing exchanged between members; for latents some batch x d numbers and none of the
weights, d x n; and which axis is fastest for one dictionary, two, and as many as there are devices.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import table

if TYPE_CHECKING:
    from sae_jax import SAEConfig
    from sae_jax.distributed import Collective

SHAPES = ((512, 4096, 256), (512, 16384, 256), (512, 16384, 2048))  # d_in, latents, batch
QUICK_SHAPES = ((64, 1024, 64),)
STEPS, REPEATS = 4, 3
K_SHARE = 0.016  # of the latents, as Claye et al. have it

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_integer("devices", None, "How many; all there are.", lower_bound=1)
    flags.DEFINE_bool("quick", False, "One small shape.")
    flags.DEFINE_string("out", None, "JSON file to write.")


def main() -> None:
    """Measures, and prints a table."""
    from sae_jax import InputError, files

    devices = jax.local_devices()[: FLAGS.devices]
    if len(devices) < (FLAGS.devices or 2):
        raise InputError(f"there are {len(devices)} devices; {FLAGS.devices or 2} are needed")
    lines = []
    for line in measured(devices, QUICK_SHAPES if FLAGS.quick else SHAPES):
        lines.append(line)
        logging.info(", ".join(f"{name} {value}" for name, value in line.items()))
        if FLAGS.out:
            files.write_json(FLAGS.out, {"device": devices[0].device_kind, "lines": lines})
    print(text(lines))


def measured(devices: list[Any], shapes: tuple[tuple[int, int, int], ...]) -> Iterator[dict]:
    """A line for each shape, activation, number of dictionaries and axis."""
    from sae_jax import SAEConfig

    for d, n, batch in shapes:
        for activation in ("relu", "topk"):
            varied = {"l1_weight": 0.1} if activation == "relu" else {"k": round(K_SHARE * n)}
            for members in sorted({1, 2, len(devices)}):
                configs = [
                    SAEConfig(
                        d_in=d, n_latents=n, batch_size=batch, activation=activation, seed=seed,
                        **varied,
                    )
                    for seed in range(members)
                ]  # fmt: skip
                about = {"d_in": d, "n_latents": n, "batch": batch, "activation": activation}
                for axis, mesh in meshes(devices, members).items():
                    if axis != "batch" or activation == "relu":
                        yield {**about, "members": members, "axis": axis, **one(configs, mesh)}


def meshes(devices: list[Any], members: int) -> dict[str, Mesh]:
    """What is compared, by name."""

    def mesh(across: int, along: int, second: str | None = None) -> Mesh:
        chosen = np.asarray(devices[: across * along])
        names = ("member",) if second is None else ("member", second)
        grid = chosen if second is None else chosen.reshape(across, along)
        return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))

    spread = next(k for k in range(min(members, len(devices)), 0, -1) if members % k == 0)
    return {
        "one": mesh(1, 1),
        **({"member": mesh(spread, 1)} if spread > 1 else {}),
        "latent": mesh(1, len(devices), "latent"),
        "batch": mesh(1, len(devices), "batch"),
    }


def one(configs: list["SAEConfig"], mesh: Mesh) -> dict[str, Any]:
    """The rate of STEPS steps of all, and what is exchanged in one."""
    from sae_jax import distributed, ensemble, programs

    architecture = configs[0].architecture
    hyper = ensemble.stack_hyperparams(configs, mesh, np.float32, STEPS)
    static = {"architecture": architecture, "mesh": mesh}
    states = programs.init_bucket(hyper, dtype=np.float32, **static)
    shape = (STEPS, architecture.batch_size, architecture.d_in)
    rows = np.random.default_rng(0).standard_normal(shape, np.float32)
    split = PartitionSpec(None, "batch" if "batch" in mesh.shape else None)
    batches = jax.device_put(rows, NamedSharding(mesh, split))
    compiled = jax.jit(trained(**static)).lower((states, hyper), batches).compile()
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(compiled((states, hyper), batches))
        seconds.append(time.perf_counter() - began)
    rate = len(configs) * STEPS / min(seconds[1:])
    found = distributed.collectives(compiled.as_text())
    return {"config_steps_per_second": rate, **exchanged(found)}


def trained(architecture: Any, mesh: Mesh) -> Callable[..., Any]:
    """`(states, hyper), batches [steps, batch, d]` -> states, of all members."""
    from sae_jax import ensemble, steps

    def member(pair: Any, batches: jax.Array) -> Any:
        state, hyper = pair
        step = functools.partial(steps.step, hyper=hyper, architecture=architecture)
        return lax.scan(lambda state, batch: step(state, batch=batch), state, batches)

    return ensemble.map_members(member, mesh)


def exchanged(found: list["Collective"]) -> dict[str, Any]:
    """Of ONE dictionary's step: how many exchanges, and their bytes, at most."""
    from sae_jax import activations

    passes = activations.VALUE_PASSES + jnp.finfo(jnp.float32).bits
    outer = min((each.loops for each in found), default=0)
    times = [passes if each.loops > outer else 1 for each in found]
    return {
        "exchanges": sum(times),
        "bytes_per_step": sum(n * each.size for n, each in zip(times, found, strict=True)),
        "kinds": " ".join(sorted({each.kind for each in found})),
    }


def text(lines: list[dict[str, Any]]) -> str:
    """The lines as a table; times: of the same dictionaries on one device."""
    head = ["d -> n", "batch", "activation", "members", "axis", "/s", "times", "bytes a step"]
    cells, alone = [[*head, "exchanges"]], 1.0
    for line in lines:
        rate = line["config_steps_per_second"]
        alone = rate if line["axis"] == "one" else alone
        cells.append(
            [
                f"{line['d_in']} -> {line['n_latents']}", f"{line['batch']}", line["activation"],
                f"{line['members']}", line["axis"], f"{rate:,.2f}", f"{rate / alone:.2f}",
                f"{line['bytes_per_step']:,}", f"{line['exchanges']} {line['kinds']}".strip(),
            ]
        )  # fmt: skip
    return table.aligned(cells, left=(0, 2, 4, 8))


if __name__ == "__main__":
    from experiments import cli

    cli.launch(main, define_flags)

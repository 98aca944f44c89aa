r"""What an accelerator makes of it: one command of under ten minutes for the day there is one.

    python -m experiments.benchmarks.accelerator --out=accelerator.json     (under 10 minutes)
    python -m experiments.benchmarks.accelerator --quick                    (a minute, CPU as well)

It needs what `sae_jax` needs, absl and tqdm; no matplotlib, AnnData or h5py, nothing of CUDA only.
The sections, each of which stops when its share of --budget is spent:

    rows      our side of the rows of `training`
    roofline  512 -> 5000 and 896 -> 16384 over batch sizes, L1 and TopK: useful operations a second
              of training (10 batch d n a step: five products), as a share of those of one large
              product, measured in the same run at the same matmul precision. On a GPU "bfloat16"
              may run as TF32; the share still compares like with like
    map       members side by side (vmap) and one after another (lax.map), 1 to 512 of 4 -> 400, on
              one device: what `ensemble.map_members` chooses between
    sweep     the 512-configuration small sweep (see `small_sweep`) for --epochs, and extrapolated
              to 500 where that is fewer or the time was up. Metrics are not in it

Everything measured so far is in --out after every line, so that a kill loses little.

It must show: on an accelerator `vmap` faster than `lax.map` from a few members on, and the sweep in
minutes; on CPU the reverse. For wide dictionaries and large batches L1 should reach half the
roofline.
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax import lax

from experiments.benchmarks import small_sweep, table
from experiments.benchmarks.rows import ROWS, Row

if TYPE_CHECKING:
    from sae_jax import SAEConfig

SHARES = {"rows": 0.12, "roofline": 0.28, "map": 0.15, "sweep": 0.45}  # of --budget
PRECISIONS = ("highest", "tensorfloat32", "bfloat16")
SHAPES = ((512, 5000), (896, 16384))
BATCHES, CPU_BATCHES = (256, 1024, 4096, 16384), (128, 1024)
PEAK_SIZE, CPU_PEAK_SIZE, QUICK_PEAK_SIZE = 8192, 2048, 512
STEPS = 16  # of an epoch on the roofline
MAP_STEPS = 64
MEMBERS = tuple(2**i for i in range(10))
K_SHARE = 0.016  # of the latents, as Claye et al. have it

FLAGS = flags.FLAGS
Save = Callable[[dict[str, Any]], None]  # told of every line measured


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_list("sections", list(SHARES), f"Which of {', '.join(SHARES)}.")
    flags.DEFINE_list("precisions", None, "Of matmuls on the roofline; all, or on CPU 'highest'.")
    flags.DEFINE_integer(
        "epochs", None, "Of the sweep; 500, or on CPU 3. The rest is extrapolated.", lower_bound=2
    )
    flags.DEFINE_float("budget", 540, "Seconds for everything.", lower_bound=0)
    flags.DEFINE_bool("quick", False, "The smallest cases of every section.")
    flags.DEFINE_string("out", None, "JSON file to write.")


def main() -> None:
    """Runs the sections, prints a table of each."""
    from sae_jax import InputError, files

    if set(FLAGS.sections) - set(SHARES) or not FLAGS.sections:
        raise InputError(f"--sections={','.join(FLAGS.sections)}: there are {', '.join(SHARES)}")
    if set(FLAGS.precisions or ()) - set(PRECISIONS):
        raise InputError(
            f"--precisions={','.join(FLAGS.precisions)}: there are {', '.join(PRECISIONS)}"
        )
    report: dict[str, Any] = {"device": device(), "quick": FLAGS.quick, "sections": {}}
    print(*(f"{name}: {value}" for name, value in report["device"].items()), sep="\n")

    def save(section: str, line: dict[str, Any]) -> None:
        report["sections"].setdefault(section, []).append(line)
        logging.info("%s: %s", section, brief(line))
        if FLAGS.out:
            files.write_json(FLAGS.out, report)

    left = FLAGS.budget
    shares = {name: SHARES[name] for name in SHARES if name in FLAGS.sections}
    for section in list(shares):
        began = time.perf_counter()
        deadline = began + left * shares[section] / sum(shares.values())
        run(section, deadline, functools.partial(save, section))
        left -= time.perf_counter() - began  # what it left is there for those that follow
        del shares[section]
        print(f"\n{section}\n{text(section, report['sections'].get(section, []))}", flush=True)


def device() -> dict[str, Any]:
    """What this runs on."""
    devices = jax.local_devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "memory_GiB": None if memory is None else round(memory / 2**30, 1),
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "jax": jax.__version__,
        "jaxlib": importlib.import_module("jaxlib").__version__,
    }


def run(section: str, deadline: float, save: Save) -> None:
    """One section, with what suits the device and --quick."""
    on_cpu, quick = jax.default_backend() == "cpu", FLAGS.quick
    if section == "rows":
        names = ("vanilla_64",) if quick else tuple(ROWS)
        rows({name: ROWS[name].quick() if quick else ROWS[name] for name in names}, deadline, save)
    elif section == "roofline":
        precisions = FLAGS.precisions or (PRECISIONS[:1] if on_cpu or quick else PRECISIONS)
        size = CPU_PEAK_SIZE if on_cpu else PEAK_SIZE
        batches = CPU_BATCHES if on_cpu else BATCHES
        if quick:
            roofline(precisions, ((64, 512),), (128,), QUICK_PEAK_SIZE, deadline, save)
        else:
            roofline(precisions, SHAPES, batches, size, deadline, save)
    elif section == "map":
        maps((8,) if quick else MEMBERS, deadline, save)
    else:
        epochs = FLAGS.epochs or (3 if on_cpu or quick else small_sweep.EPOCHS)
        programs = small_sweep.programs()
        sweep(programs[:1] if quick else programs, epochs, deadline, save)


def rows(chosen: dict[str, Row], deadline: float, save: Save) -> None:
    """Config-steps a second of each row, from seeds to weights on the host, compiling apart."""
    from experiments.benchmarks import ours
    from sae_jax import SAEConfig

    for name, row in _until(deadline, chosen.items()):
        configs = [SAEConfig(**fields) for fields in row.configs()]
        x = ours.normal_rows(row.rows, row.d_in)
        found = ours.rate(configs, x, row.epochs, repeats=2)
        save({"row": name, **found, "ms_per_step": _ms(found) if row.members == 1 else None})


def roofline(
    precisions: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    size: int,
    deadline: float,
    save: Save,
) -> None:
    """Training of one dictionary against one product of size x size matrices."""
    from experiments.benchmarks import ours
    from sae_jax import SAEConfig, distributed, ensemble

    peaks = {precision: peak(size, precision) for precision in precisions}
    cases = [
        (precision, shape, batch, activation)
        for shape in shapes
        for batch in reversed(batches)  # the telling ones first
        for precision in precisions
        for activation in ("relu", "topk")
    ]
    for precision, (d, n), batch, activation in _until(deadline, cases):
        varied = {"l1_weight": 0.1} if activation == "relu" else {"k": round(K_SHARE * n)}
        config = SAEConfig(d_in=d, n_latents=n, batch_size=batch, activation=activation, **varied)
        line = {"d_in": d, "n_latents": n, "batch": batch, "activation": activation}
        line |= {"precision": precision, "peak_gflops": peaks[precision] / 1e9}
        if ensemble.member_bytes(config.architecture, 4) > distributed.memory():
            save({**line, "ms_per_step": None, "gflops": None, "share": None})
            continue
        flops = 10 * batch * d * n
        epochs = int(np.clip(1.0 / (flops * STEPS / peaks[precision]), 4, 64))
        with jax.default_matmul_precision(precision):
            found, _ = ours.timed([config], ours.normal_rows(STEPS * batch, d), epochs, deadline)
        seconds = found["wall_per_epoch"] / STEPS
        line |= {"ms_per_step": 1e3 * seconds, "gflops": flops / seconds / 1e9}
        save({**line, "share": line["gflops"] / line["peak_gflops"]})


def peak(size: int, precision: str, repeats: int = 3) -> float:
    """Operations a second of one large float32 product on the first device; the best of some."""
    factor = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    factor = factor / np.float32(np.sqrt(size))  # so that products stay of the same size
    products = 8

    @jax.jit
    def multiply(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, products, lambda _, x: x @ factor, x)

    with jax.default_matmul_precision(precision):
        jax.block_until_ready(multiply(factor))
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(multiply(factor))
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 * products / min(seconds)


def maps(members: Sequence[int], deadline: float, save: Save) -> None:
    """The same steps of the same members under both maps, 4 -> 400 at batch 128."""
    from sae_jax import SAEConfig, distributed, ensemble, steps

    batches = jnp.asarray(np.random.default_rng(0).standard_normal((MAP_STEPS, 128, 4), np.float32))
    mesh = distributed.member_mesh(1)
    for count in _until(deadline, members):
        row = Row(title="", d_in=4, n_latents=400, members=count, epochs=1)
        configs = [SAEConfig(**fields) for fields in row.configs()]
        architecture = configs[0].architecture
        hyper = ensemble.stack_hyperparams(configs, mesh, jnp.float32)
        start = functools.partial(steps.init_member, architecture=architecture, dtype=jnp.float32)
        states = jax.jit(jax.vmap(start))(hyper)

        def member(pair: Any, architecture: Any = architecture) -> Any:
            state, hyper = pair

            def step(state: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
                state, metrics = steps.step(state, hyper, batch, architecture)
                return state, metrics.loss

            return lax.scan(step, state, batches)

        line = {"members": count}
        lifted = {"vmap": jax.vmap(member), "lax_map": functools.partial(lax.map, member)}
        for name, function in lifted.items():
            compiled = jax.jit(function).lower((states, hyper)).compile()
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                jax.block_until_ready(compiled((states, hyper)))
                seconds.append(time.perf_counter() - began)
            line[f"{name}_config_steps_per_second"] = count * MAP_STEPS / min(seconds)
        ratio = line["vmap_config_steps_per_second"] / line["lax_map_config_steps_per_second"]
        save({**line, "vmap_over_lax_map": ratio})


def sweep(programs: Sequence[list["SAEConfig"]], epochs: int, deadline: float, save: Save) -> None:
    """Every program of the small sweep, for `epochs` or as far as its share of the time goes."""
    from experiments.benchmarks import ours

    data, _ = small_sweep.simulation()
    for i, bucket in enumerate(_until(deadline, programs)):
        now = time.perf_counter()
        share = now + (deadline - now) / (len(programs) - i)  # narrow ones leave time to wide ones
        found, _ = ours.timed(bucket, data, epochs, share)
        whole = found["wall_first"] + small_sweep.EPOCHS * found["wall_per_epoch"]
        about = {"preset": bucket[0].name, "n_latents": bucket[0].n_latents}
        about |= {"members": len(bucket), "spent": time.perf_counter() - now}
        save({**about, **found, "seconds_500": whole})


def _until(deadline: float, items: Any) -> Iterator[Any]:
    """Items while there is time; at least one."""
    for i, item in enumerate(items):
        if i and time.perf_counter() >= deadline:
            logging.warning("the time is up: what follows is not measured")
            return
        yield item


def _ms(found: dict[str, Any]) -> float:
    return 1e3 / found["config_steps_per_second"]


def brief(line: dict[str, Any]) -> str:
    """A line of a section, for the log."""
    return ", ".join(f"{name} {_cell(value)}" for name, value in line.items())


def text(section: str, lines: list[dict[str, Any]]) -> str:
    """A section as a table."""
    if not lines:
        return "nothing measured"
    cells = [[*lines[0]], *([_cell(value) for value in line.values()] for line in lines)]
    shown = table.aligned(cells)
    if section == "sweep":
        whole = sum(line["seconds_500"] for line in lines)
        spent, count = (sum(line[name] for line in lines) for name in ("spent", "members"))
        shown += f"\n{count} configurations: {spent:.0f} s spent, {whole:.0f} s for 500 epochs"
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    from experiments import cli

    cli.launch(main, define_flags)

r"""How fast training is against members, latents and batch size; a table, JSON and a figure.

    python -m experiments.benchmarks.growth --out=runs/growth          (about 4 minutes, 2 cores)
    python -m experiments.benchmarks.growth --quick                          (under a minute)

Three sweeps of one axis each, of L1 (relu) and of TopK with k = 10 % of the latents: members 1 to
512 at 4 -> 400 and batch 128; latents 8 to 16384 of one configuration at d_in 20 and batch 128;
batch 32 to 8192 of one configuration at 4 -> 400. The rate is in config-steps a second: steps of
one configuration, so that 64 configurations doing 100 steps count 6400. Compiling is not in it.

It must show: on CPU a rate that does not fall with members, and is about as many times that of one
member as there are cores; on an accelerator one that grows with members until the device is full;
and rates that fall no faster than latents or batch grow, once products are large (the grey lines).

In --out: growth.json, growth.png, growth.pdf (no figure where matplotlib is not installed).
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from experiments.benchmarks import table
from experiments.benchmarks.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 32  # of an epoch
WORK, QUICK_WORK = 2e9, 2e8  # of a measurement, in multiply-adds of the encoder: about a second
OVERHEAD = 5e4  # of a step, in the same
REPEATS, QUICK_REPEATS = 3, 1
AXES = {
    "members": [2**i for i in range(10)],
    "n_latents": [2**i for i in range(3, 15)],
    "batch_size": [2**i for i in range(5, 14)],
}
FIXED = {
    "members": "4 → 400, batch 128",
    "n_latents": "20 → n, batch 128, one configuration",
    "batch_size": "4 → 400, one configuration",
}
LABELS = {
    "members": "configurations trained together",
    "n_latents": "latents",
    "batch_size": "batch size (rows a step)",
}
GUIDES = {
    "members": "as one alone",
    "n_latents": "inversely to latents",
    "batch_size": "inversely to batch size",
}
CORNERS = {"members": "lower right", "n_latents": "lower left", "batch_size": "lower left"}
ACTIVATIONS = {"relu": "L1", "topk": "TopK, k = 10 %"}

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_list("axes", list(AXES), f"Which of {', '.join(AXES)}.")
    flags.DEFINE_bool("quick", False, "Every third point and fewer steps.")
    flags.DEFINE_string("out", None, "Folder for the JSON and the figure.")


def main() -> None:
    """Measures every point, prints the table."""
    from sae_jax import InputError, files

    if set(FLAGS.axes) - set(AXES) or not FLAGS.axes:
        raise InputError(f"--axes={','.join(FLAGS.axes)}: there are {', '.join(AXES)}")
    points = []
    for axis in FLAGS.axes:
        for activation in ACTIVATIONS:
            for value in AXES[axis][:: 3 if FLAGS.quick else 1]:
                points.append(measure(axis, activation, value))
                logging.info(
                    "%s=%d, %s: %.0f config-steps/s", axis, value, activation,
                    points[-1]["config_steps_per_second"],
                )  # fmt: skip
    print(text(points))
    if FLAGS.out:
        files.write_json(Path(FLAGS.out) / "growth.json", {**device(), "points": points})
        if importlib.util.find_spec("matplotlib") is None:
            logging.info("no figure: matplotlib is not installed")
        else:
            from analysis import plots

            logging.info("%s", plots.save(figure(points), Path(FLAGS.out), "growth"))


def device() -> dict[str, Any]:
    """What it was measured on."""
    import jax

    devices = jax.local_devices()
    return {"device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__}


def measure(axis: str, activation: str, value: int) -> dict[str, Any]:
    """One point of a curve."""
    from experiments.benchmarks import ours
    from sae_jax import SAEConfig

    d_in = 20 if axis == "n_latents" else 4
    shape = {"members": 1, "n_latents": 400, "batch_size": 128, axis: value}
    work = shape["members"] * (d_in * shape["n_latents"] * shape["batch_size"] + OVERHEAD)
    epochs = int(np.clip((QUICK_WORK if FLAGS.quick else WORK) / (STEPS * work), 1, 64))
    row = Row(
        title="", d_in=d_in, activation=activation, epochs=epochs,
        k=max(1, shape["n_latents"] // 10) if activation == "topk" else None,
        rows=STEPS * shape["batch_size"], **shape,
    )  # fmt: skip
    configs = [SAEConfig(**fields) for fields in row.configs()]
    rows = ours.normal_rows(row.rows, d_in)
    found = ours.rate(configs, rows, epochs, QUICK_REPEATS if FLAGS.quick else REPEATS)
    return {"axis": axis, "activation": activation, "value": value, **found}


def text(points: list[dict[str, Any]]) -> str:
    """The points as a table, in config-steps a second and CPU µs a config-step."""
    head = ["axis", "value"]
    for activation in ACTIVATIONS:
        head += [f"{activation} /s", "CPU µs", "compile s"]
    lines = [head]
    for axis, value in dict.fromkeys((point["axis"], point["value"]) for point in points):
        line = [axis, f"{value}"]
        for activation in ACTIVATIONS:
            found = next(
                point for point in points
                if (point["axis"], point["value"], point["activation"]) == (axis, value, activation)
            )  # fmt: skip
            line.append(f"{found['config_steps_per_second']:,.0f}")
            line.append(f"{found['cpu_seconds_per_config_step'] * 1e6:,.0f}")
            line.append(f"{found['compile_seconds']:.2f}")
        lines.append(line)
    return table.aligned(lines)


def figure(points: list[dict[str, Any]]) -> "Figure":
    """One panel an axis, one line an activation; dotted: see `GUIDES`, through a point of L1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    figure = Figure(figsize=(4.1 * len(axes_names), 3.9), layout="constrained")
    panels = figure.subplots(1, len(axes_names), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes_names, strict=True):
        chosen = [p for p in points if (p["axis"], p["activation"]) == (axis, "relu")]
        for (activation, label), marker in zip(ACTIVATIONS.items(), "os", strict=False):
            line = [p for p in points if (p["axis"], p["activation"]) == (axis, activation)]
            panel.plot(
                [point["value"] for point in line],
                [point["config_steps_per_second"] for point in line],
                marker=marker, markersize=5, label=label,
            )  # fmt: skip
        ends = np.array([chosen[0]["value"], chosen[-1]["value"]])
        first, last = (found["config_steps_per_second"] for found in (chosen[0], chosen[-1]))
        guide = np.array([first, first]) if axis == "members" else last * ends[-1] / ends
        grey = {"color": "#888888", "linestyle": ":", "linewidth": 1.2, "zorder": 1}
        panel.plot(ends, guide, label=GUIDES[axis], **grey)
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis])
        panel.set_title(FIXED[axis], fontsize=10)
        panel.set_xscale("log", base=2)
        panel.legend(frameon=False, fontsize=9, loc=CORNERS[axis])
        panel.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        panel.grid(alpha=0.25)
    rates = [point["config_steps_per_second"] for point in points]
    panels[0].set_ylim(min(rates) / 1.5, max(rates) * 1.5)
    panels[0].set_ylabel("config-steps a second")
    return figure


if __name__ == "__main__":
    from experiments import cli

    cli.launch(main, define_flags)

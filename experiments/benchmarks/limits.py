r"""Where time and memory stop growing in proportion to what a user brings, along five axes.

    python -m experiments.benchmarks.limits --out=runs/limits        (half an hour, two quiet cores)
    python -m experiments.benchmarks.limits --quick                (the two least of every curve)

    rows      one dictionary 512 -> 2048, an epoch, by `sae_jax.train`: streamed from zarr through
              16 MiB, and of an array in memory
    latents   8 training steps of one TopK dictionary 512 -> n, and `encode` of 4,096 rows
    members   a sweep of 4 -> 64 by `sae_jax.train`: without a work directory, with one, and
              reading that again
    terms     the lens without calibration, of 256 features, 3,000 cells, 13,431 genes; and prerank
              GSEA of 16 lists
    cells     of a sparse matrix in a zarr store (13,431 genes, 5 % expressed): differential
              expression of 128 features, and the lens of them and 1,000 terms, in 1 GiB

All data are synthetic: rows, scores and activations are normal or uniform numbers, terms random
sets of the sizes of GO's. Every point is a process of its own. Seconds are those of the work, after
what is compiled; the best of three where they are few. Memory is the peak of resident memory, of
the process and, "added", beyond what it has after its imports (Linux). A slope is that between
neighbours in double logarithms, of CPU seconds and of what is added: 1 is growth in proportion; 0
none. Where one lies outside .8 .. 1.2 is told below the table. It must show: no slope of time above
1.2, and none of memory above .2 where rows are streamed and where cells stay in their store.

A point that took more than --minutes is the last of its curve, and so is one that fails; the table
tells why. In --out: limits.json (after every point), limits.md, limits.png, limits.pdf. Stores of
rows and cells (10 GB) are kept in --folder, if given.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import zarr
from absl import flags, logging
from scipy import sparse

import sae_jax
from analysis import cells, differential, groups, gsea, lens
from experiments.benchmarks import enrichment, growth, ours, out_of_core
from experiments.benchmarks.rows import Row
from sae_jax import Dictionary, InputError, SAEConfig, data, files, models

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, BATCH, STEPS, K = 512, 512, 8, 32
RESIDENT = 2**24
WARM_ROWS = 2**16  # whose programs are those of more rows as well: `metrics.pieces`
CHUNK_ROWS = 2048  # of a store, as `extract.store` has them
ENCODED = 4096
FEATURES, LISTS, LENS_CELLS = 256, 16, 3_000
CELL_FEATURES, CELL_TERMS, MEMORY = 128, 1_000, 2**30
FEW_CELLS = 2_000  # of the store that is used before the clock runs
REPEATS, SHORT = 3, 1.0  # of work of fewer CPU seconds
PROPORTIONAL = (0.8, 1.2)
COMPILED = "/jax/core/compile/backend_compile_duration"

FLAGS = flags.FLAGS
Work = Callable[[], Any]
Curve = Callable[[int, Path], tuple[Work, Work]]  # a size, a folder -> before the clock, the work
Point = dict[str, Any]


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_list("axes", list(AXES), f"Which of {', '.join(AXES)}.")
    flags.DEFINE_bool("quick", False, "The two least points of every curve.")
    flags.DEFINE_float("minutes", 5.0, "After a point that took longer a curve ends.", 0)
    flags.DEFINE_string("out", None, "Folder for the JSON, the table and the figure.")
    flags.DEFINE_string("folder", None, "Where stores are kept; default: nowhere.")
    flags.DEFINE_string("gene_sets", None, "A GMT file whose sets' sizes are taken.")
    flags.DEFINE_string("point", None, "AXIS/CURVE/SIZE alone, in --folder; prints JSON.")


def main() -> None:
    """Runs the program by its flags."""
    if FLAGS.point:
        axis, curve, size = FLAGS.point.split("/")
        print(json.dumps(measured(AXES[axis].curves[curve], int(size), Path(FLAGS.folder))))
        return
    if set(FLAGS.axes) - set(AXES) or not FLAGS.axes:
        raise InputError(f"--axes={','.join(FLAGS.axes)}: there are {', '.join(AXES)}")
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(FLAGS.folder or temporary)
        for axis in FLAGS.axes:
            sizes = AXES[axis].sizes[: 2 if FLAGS.quick else None]
            for curve in AXES[axis].curves:
                of_size = functools.partial(in_a_process, axis, curve, folder)
                for found in along(sizes, of_size, 60 * FLAGS.minutes):
                    points.append({"axis": axis, "curve": curve, **found})
                    logging.info("%s", points[-1])
                    if FLAGS.out:
                        about = {**growth.device(), "points": points}
                        files.write_json(Path(FLAGS.out) / "limits.json", about)
    print(text(points))
    if FLAGS.out:
        from analysis import plots

        (Path(FLAGS.out) / "limits.md").write_text(text(points))
        logging.info("%s", plots.save(figure(points), Path(FLAGS.out), "limits"))


def along(sizes: Sequence[int], of_size: Callable[[int], Point], longest: float) -> Iterator[Point]:
    """A curve: what each size comes to, until one takes more than `longest` seconds or fails."""
    reason = None
    for size in sizes:
        if reason is not None:
            yield {"size": size, "missing": reason}
            continue
        began = time.perf_counter()
        found = {"size": size, **of_size(size)}
        took = time.perf_counter() - began
        reason = found.get("missing")
        if reason is None and took > longest:
            reason = f"{size:,} took {took / 60:.1f} minutes, more than --minutes={longest / 60:g}"
        yield found


def in_a_process(axis: str, curve: str, folder: Path, size: int) -> Point:
    """A point, measured in a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.limits"]
    command += [f"--point={axis}/{curve}/{size}", f"--folder={folder}"]
    if FLAGS.gene_sets:
        command.append(f"--gene_sets={FLAGS.gene_sets}")
    return ran(command)


def ran(command: list[str]) -> Point:
    """The JSON that a command prints last, or why there is none."""
    # Programs that were compiled in an earlier run would be read from disk.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        return {"missing": f"its process ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measured(curve: Curve, size: int, folder: Path) -> Point:
    """Seconds of the work, by the clock and of the CPU, and of compiling; bytes at the peak."""
    compiled = []

    def heard(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    floor = out_of_core.resident("VmRSS")
    before, work = curve(size, folder)
    before()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    walls, cpus = [], []
    while len(walls) < (REPEATS if max(cpus, default=0) < SHORT else 1):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = out_of_core.resident("VmHWM")
    return {
        "seconds": min(walls), "cpu_seconds": min(cpus), "compile_seconds": sum(compiled),
        "peak_bytes": peak, "added_bytes": peak - floor,
    }  # fmt: skip


def streamed(size: int, folder: Path) -> tuple[Work, Work]:
    """An epoch of rows of which `RESIDENT` bytes are in memory."""
    path = rows_of(size, folder)

    def train(count: int) -> None:
        rows = data.open_rows(f"{path}:X")
        rows = rows if count == size else rows.take(np.arange(count))
        sae_jax.train(wide(2048), rows, epochs=1, resident_bytes=RESIDENT, progress=False)

    return functools.partial(train, min(size, WARM_ROWS)), functools.partial(train, size)


def in_memory(size: int, folder: Path) -> tuple[Work, Work]:
    """An epoch of the same rows, read before."""
    rows = np.asarray(data.open_rows(f"{rows_of(size, folder)}:X"))
    train = functools.partial(sae_jax.train, wide(2048), rows, epochs=1, progress=False)
    return train, train


def wide(latents: int, **fields: Any) -> SAEConfig:
    """The dictionary of rows and, with more fields, of latents."""
    return SAEConfig(d_in=WIDTH, n_latents=latents, batch_size=BATCH, **fields)


def rows_of(count: int, folder: Path) -> Path:
    """A store of normal rows, as an extraction leaves it."""
    path = folder / f"rows-{count}.zarr"
    if not path.exists():
        with files.write_aside(path) as fresh:
            chunk = min(count, CHUNK_ROWS)
            packed = zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=4)
            x = zarr.open_group(fresh, mode="w").create_array(
                "X", shape=(count, WIDTH), chunks=(chunk, WIDTH), dtype="float32",
                compressors=[packed, zarr.codecs.Crc32cCodec()],
            )  # fmt: skip
            rng = np.random.default_rng(0)
            for start in range(0, count, chunk):
                some = min(chunk, count - start)
                x[start : start + some] = rng.standard_normal((some, WIDTH), np.float32)
    return path


def trained(size: int, folder: Path) -> tuple[Work, Work]:
    """Steps of a dictionary of so many latents, from its seed to weights on the host."""
    config = wide(size, activation="topk", k=K)
    train = ours.bucket([config], ours.normal_rows(STEPS * BATCH, WIDTH), 1)
    return train, train


def encoded(size: int, folder: Path) -> tuple[Work, Work]:
    """Sparse codes by a dictionary of so many latents, untrained."""
    config = wide(size, activation="topk", k=K)
    params = jax.device_get(models.init(np.uint32(0), config.architecture, np.float32))
    rows = ours.normal_rows(ENCODED, WIDTH)
    encode = functools.partial(Dictionary(config, params).encode, sparse=True)
    return functools.partial(encode, rows[:1]), functools.partial(encode, rows)


def swept(size: int, folder: Path) -> tuple[Work, Work]:
    """A sweep of so many configurations, kept in memory."""
    train = sweep(size)
    return train, train


def written(size: int, folder: Path) -> tuple[Work, Work]:
    """The same into a work directory."""
    train = sweep(size)
    return train, lambda: train(workdir=Path(tempfile.mkdtemp(dir=folder)) / "run")


def read(size: int, folder: Path) -> tuple[Work, Work]:
    """A finished work directory, read again."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    before = functools.partial(sweep(size), workdir=out)
    return before, lambda: sae_jax.Run.load(out)


def sweep(size: int) -> Callable[..., sae_jax.Run]:
    """`sae_jax.train` of so many small configurations of one shape."""
    row = Row(title="", d_in=4, n_latents=64, members=size, epochs=8, rows=2048)
    configs = [SAEConfig(**fields) for fields in row.configs()]
    rows = ours.normal_rows(row.rows, row.d_in)
    return functools.partial(sae_jax.train, configs, rows, epochs=row.epochs, progress=False)


def annotated(size: int, folder: Path) -> tuple[Work, Work]:
    """The lens of so many terms."""
    expression, sets = enrichment.counts(LENS_CELLS), enrichment.terms(size)
    z = enrichment.activations(LENS_CELLS, FEATURES)

    def annotate(features: int) -> None:
        lens.annotate(z[:, :features], expression, sets, null_features=0, progress=False)

    return functools.partial(annotate, 4), functools.partial(annotate, FEATURES)


def preranked(size: int, folder: Path) -> tuple[Work, Work]:
    """Prerank GSEA of so many terms."""
    members = enrichment.terms(size).membership
    scores = np.random.default_rng(1).standard_t(4, (LISTS, members.shape[1]))
    few = functools.partial(gsea.prerank, scores[:1], members[:2], n_permutations=10)
    return few, functools.partial(gsea.prerank, scores, members)


def compared(size: int, folder: Path) -> tuple[Work, Work]:
    """Differential expression of features over so many cells."""

    def compare(z: sparse.csr_array, expression: cells.Expression) -> None:
        high, active = groups.top_cells(z)
        for _ in differential.welch_streamed(expression, high, active=active, memory_bytes=MEMORY):
            pass

    return over_cells(size, folder, compare)


def annotated_cells(size: int, folder: Path) -> tuple[Work, Work]:
    """The lens over so many cells."""
    sets = enrichment.terms(CELL_TERMS)
    settings = {"null_features": 0, "memory_bytes": MEMORY, "progress": False}
    return over_cells(size, folder, lambda z, x: lens.annotate(z, x, sets, **settings))


def over_cells(size: int, folder: Path, work: Callable[..., Any]) -> tuple[Work, Work]:
    """`work(activations, expression)` of cells that stay in their store; of few and of all."""

    def run(count: int, z: sparse.csr_array) -> None:
        store = folder / f"cells-{count}.zarr"
        work(z, cells.parts(store, "X", "counts", memory_bytes=MEMORY // 8))

    prepared = []
    for count in (FEW_CELLS, size):
        store = folder / f"cells-{count}.zarr"
        if not (store / "done").exists():
            out_of_core.write(store, count, enrichment.GENES)
        z = sparse.random_array(
            (count, CELL_FEATURES), density=out_of_core.ACTIVE, format="csr", dtype=np.float32,
            rng=np.random.default_rng(1),
        )  # fmt: skip
        prepared.append(functools.partial(run, count, z))
    return prepared[0], prepared[1]


@dataclasses.dataclass(frozen=True)
class Axis:
    """What grows: its name in the figure, its sizes, and what is measured at each of them."""

    label: str
    sizes: tuple[int, ...]
    curves: dict[str, Curve]


AXES = {
    "rows": Axis(
        "rows × 512",
        (2**14, 2**16, 2**18, 2**20),
        {"streamed": streamed, "in memory": in_memory},
    ),
    "latents": Axis(
        "latents, 512 dimensions",
        (1024, 4096, 16384, 65536),
        {"8 steps": trained, "encode": encoded},
    ),
    "members": Axis(
        "members, 4 → 64",
        (1, 4, 16, 64, 256, 1024, 4096),
        {"trained": swept, "and written": written, "read": read},
    ),
    "terms": Axis(
        "terms",
        (100, 400, 1600, 6000, 15000),
        {"lens": annotated, "prerank": preranked},
    ),
    "cells": Axis(
        "cells in a store",
        (8000, 32000, 125000, 500000),
        {"differential": compared, "lens": annotated_cells},
    ),
}
MEASURES = {"cpu_seconds": "time", "added_bytes": "memory"}
UNITS = {"cpu_seconds": 1, "added_bytes": 2**20}  # of the figure


def curves_of(points: list[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by axis and curve, those that are missing left out."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        there = curves.setdefault((point["axis"], point["curve"]), [])
        there += [point] if "missing" not in point else []
    return curves


def slopes(curve: list[Point], measure: str) -> list[float]:
    """Between neighbours in double logarithms; NaN where nothing was added."""
    return [
        math.log(after[measure] / before[measure]) / math.log(after["size"] / before["size"])
        if min(before[measure], after[measure]) > 0
        else math.nan
        for before, after in itertools.pairwise(curve)
    ]


def departures(points: list[Point]) -> list[str]:
    """Where growth is not in proportion, a line for each curve and measure."""
    lines = []
    low, high = PROPORTIONAL
    for (axis, curve), found in curves_of(points).items():
        if len(found) < 2:
            continue
        sizes = [f"{point['size']:,}" for point in found]
        for measure, name in MEASURES.items():
            told = [
                f"{sizes[i]} to {sizes[i + 1]} {slope:.2f}"
                for i, slope in enumerate(slopes(found, measure))
                if not low <= slope <= high
            ]
            lines.append(f"{axis}, {curve}, {name}: {'; '.join(told) or 'in proportion'}")
    return lines


def text(points: list[Point]) -> str:
    """The points as a table in Markdown, and below it where growth is not in proportion."""
    head = ["axis", "curve", "size", "CPU s", "slope", "s", "compile s"]
    head += ["peak MiB", "added MiB", "slope"]
    lines = [head, ["---"] * len(head)]
    for (axis, curve), found in curves_of(points).items():
        time_slopes, memory_slopes = (
            ["", *(f"{slope:.2f}" for slope in slopes(found, measure))] for measure in MEASURES
        )
        for point, of_time, of_memory in zip(found, time_slopes, memory_slopes, strict=False):
            lines.append([
                axis, curve, f"{point['size']:,}", f"{point['cpu_seconds']:.3g}", of_time,
                f"{point['seconds']:.3g}", f"{point['compile_seconds']:.1f}",
                *(f"{point[name] / 2**20:,.0f}" for name in ("peak_bytes", "added_bytes")),
                of_memory,
            ])  # fmt: skip
        lines += [
            [axis, curve, f"{point['size']:,}", point["missing"], *[""] * (len(head) - 4)]
            for point in points
            if (point["axis"], point["curve"]) == (axis, curve) and "missing" in point
        ]
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    low, high = PROPORTIONAL
    told = [f"- {line}" for line in departures(points)]
    return "\n".join([*rows, "", f"Slopes outside {low} .. {high}:", "", *told]) + "\n"


def figure(points: list[Point]) -> "Figure":
    """Two panels an axis, CPU seconds above and memory below; grey: in proportion."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    curves = curves_of(points)
    axes = list(dict.fromkeys(axis for axis, _ in curves))
    figure = Figure(figsize=(1 + 2.6 * len(axes), 6.2), layout="constrained")
    panels = figure.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, axis in zip(panels.T, axes, strict=True):
        for panel, (measure, unit) in zip(column, UNITS.items(), strict=True):
            for marker, ((of, curve), found) in zip("osos^D" * 3, curves.items(), strict=False):
                if of == axis and found:
                    sizes = np.array([point["size"] for point in found])
                    values = np.array([point[measure] for point in found]) / unit
                    panel.plot(sizes, values, marker=marker, markersize=5, label=curve)
                    panel.plot(sizes, values[-1] * sizes / sizes[-1], color="#999999",
                               linestyle=":", linewidth=1.2, zorder=1)  # fmt: skip
            panel.grid(alpha=0.25)
        column[0].legend(frameon=False, fontsize=9, loc="upper left")
        column[1].set_xlabel(AXES[axis].label)
    for measure, row in zip(UNITS, panels, strict=True):
        there = [point[measure] / UNITS[measure] for found in curves.values() for point in found]
        for panel in row:
            panel.set(xscale="log", yscale="log", ylim=(min(there) / 2, 4 * max(there)))
            for ticks in (panel.xaxis, panel.yaxis):
                ticks.set_major_locator(LogLocator(numticks=6))
                ticks.set_minor_locator(NullLocator())
                ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panels[0, 0].set_ylabel("CPU seconds")
    panels[1, 0].set_ylabel("memory added at the peak, MiB")
    return figure


if __name__ == "__main__":
    from experiments import cli

    cli.launch(main, define_flags)

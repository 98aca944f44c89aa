r"""Differential expression and enrichment of cells that stay in their file: time, peak memory.

    python -m experiments.benchmarks.out_of_core --folder=stores          (about an hour, 2 cores)
    python -m experiments.benchmarks.out_of_core --quick                       (under a minute)

Cells are synthetic counts, CSR in a zarr store of anndata, of which a share of the genes is
expressed; features are active in a share of the cells, at random; terms are random sets. For every
number of cells two processes: DGE alone (`differential.welch_streamed`) and the lens without
calibration (`lens.annotate`), in --memory_gib. What is shown beside it is the resident memory that
the work added to what the process had with the activations read, at its peak (Linux). It must show:
a peak that does not exceed the limit, and does not grow with the cells; time in proportion to them.
Stores are written to --folder and kept there, for the next call; without it they go to a temporary
folder.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
from absl import flags, logging
from scipy import sparse

from analysis import cells, differential, gene_sets, groups, lens
from experiments import cli
from experiments.benchmarks import table

FLAGS = flags.FLAGS
EXPRESSED, ACTIVE, BLOCK = 0.05, 0.02, 2000
STAGES = ("dge", "lens")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_list("cells", ["62500", "125000", "250000", "500000"], "How many.")
    flags.DEFINE_integer("genes", 20_000, "Of a cell.", 100)
    flags.DEFINE_integer("features", 1000, "Tested.", 1)
    flags.DEFINE_integer("terms", 2000, "Gene sets.", 1)
    flags.DEFINE_float("memory_gib", 2.0, "For the work.", 0)
    flags.DEFINE_string("folder", None, "Where stores are kept.")
    flags.DEFINE_bool("quick", False, "2,000 and 4,000 cells of 1,000 genes.")
    flags.DEFINE_enum("stage", None, STAGES, "Of one store, --folder, one alone; prints JSON.")


def main() -> None:
    """Measures and prints."""
    if FLAGS.stage:
        print(json.dumps(measured(Path(FLAGS.folder), FLAGS.stage)))
        return
    counts = [2000, 4000] if FLAGS.quick else [int(count) for count in FLAGS.cells]
    genes, features, terms = FLAGS.genes, FLAGS.features, FLAGS.terms
    if FLAGS.quick:
        genes, features, terms = 1000, 64, 100
    memory = 2**-5 if FLAGS.quick else FLAGS.memory_gib
    lines = [["cells", "stage", "seconds", "reading", "peak MiB", "stated MiB", "limit MiB"]]
    with tempfile.TemporaryDirectory() as temporary:
        for count in counts:
            store = Path(FLAGS.folder or temporary) / f"{count}x{genes}.zarr"
            if not (store / "done").exists():
                write(store, count, genes)
            for stage in STAGES:
                given = {
                    "stage": stage, "folder": store, "features": features, "terms": terms,
                    "memory_gib": memory,
                }  # fmt: skip
                command = [sys.executable, "-m", "experiments.benchmarks.out_of_core"]
                command += [f"--{name}={value}" for name, value in given.items()]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                lines.append([
                    f"{count:,}", stage, f"{found['seconds']:.1f}", f"{found['reading']:.1f}",
                    *(f"{found[name] / 2**20:,.1f}" for name in ("peak", "stated")),
                    f"{memory * 2**10:,.0f}",
                ])  # fmt: skip
                logging.info("%s", "  ".join(lines[-1]))
    print(table.aligned(lines))


def write(store: Path, count: int, genes: int) -> None:
    """An AnnData of synthetic counts, some cells at a time."""
    logging.info("writing %s", store)
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(index=pd.RangeIndex(count).astype(str))
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    first = block_of(rng, min(BLOCK, count), genes)
    root = zarr.open_group(store, mode="w")
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name, part in {"obs": obs, "var": var, "X": first}.items():
        anndata.io.write_elem(root, name, part)
    matrix = anndata.io.sparse_dataset(root["X"])
    for start in range(BLOCK, count, BLOCK):
        matrix.append(block_of(rng, min(BLOCK, count - start), genes))
    zarr.consolidate_metadata(root.store)
    (store / "done").touch()


def block_of(rng: np.random.Generator, count: int, genes: int) -> sparse.csr_matrix:
    """Counts of some cells; each expresses as many genes, some more often than others."""
    expressed = max(1, int(EXPRESSED * genes))
    # A step of random length through the genes, so that none comes twice in a cell.
    steps = rng.integers(1, 2 * genes // expressed, (count, expressed))
    columns = np.minimum(np.cumsum(steps, axis=1) - 1, genes - expressed + np.arange(expressed))
    indptr = np.arange(count + 1) * expressed
    values = rng.geometric(0.5, count * expressed).astype(np.float32)
    return sparse.csr_matrix((values, columns.ravel(), indptr), shape=(count, genes))


def measured(store: Path, stage: str) -> dict[str, Any]:
    """Seconds, and bytes at the peak, of one stage of one store."""
    rng = np.random.default_rng(1)
    count = len(anndata.io.read_elem(zarr.open_group(store, mode="r")["obs"]))
    z = sparse.random_array(
        (count, FLAGS.features), density=ACTIVE, format="csr", rng=rng, dtype=np.float32
    )
    warm_up(stage)
    memory = int(FLAGS.memory_gib * 2**30)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    began = time.perf_counter()
    expression = cells.parts(store, "X", "counts", memory_bytes=memory // 8)
    reading = time.perf_counter() - began
    if stage == "dge":
        high, active = groups.top_cells(z)
        for _ in differential.welch_streamed(expression, high, active=active, memory_bytes=memory):
            pass
    else:
        annotate(z, expression, memory)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM") - before
    if stage == "dge":
        stated = differential.Passes.of(expression.x, FLAGS.features, memory)
    else:
        stated = lens.passes(
            expression, FLAGS.features, FLAGS.terms, null_features=0, memory_bytes=memory
        )
    return {"seconds": seconds, "reading": reading, "peak": peak, "stated": stated.bytes}


def annotate(z: sparse.csr_array, expression: cells.Expression, memory: int) -> None:
    """The lens without calibration; sets are random."""
    rng = np.random.default_rng(2)
    sizes = np.clip(rng.lognormal(4, 0.8, FLAGS.terms).astype(int), 20, 500)
    genes = len(expression.genes)
    chosen = [np.sort(rng.choice(genes, min(size, genes // 2), replace=False)) for size in sizes]
    indptr = np.concatenate([[0], np.cumsum([len(some) for some in chosen])])
    membership = sparse.csr_array(
        (np.ones(indptr[-1]), np.concatenate(chosen), indptr), shape=(len(sizes), genes)
    )
    names = [f"term {i}" for i in range(len(sizes))]
    sets = gene_sets.GeneSets(names, membership, names, None)
    lens.annotate(z, expression, sets, null_features=0, memory_bytes=memory, progress=False)


def warm_up(stage: str) -> None:
    """What is compiled and imported, before the clock."""
    rng = np.random.default_rng(3)
    x = block_of(rng, 200, 200).log1p()
    some = cells.Expression(x, np.asarray([f"g{i}" for i in range(200)]))
    z = sparse.random_array((200, 3), density=0.3, format="csr", rng=rng, dtype=np.float32)
    if stage == "dge":
        high, active = groups.top_cells(z)
        differential.welch(x, high, active=active)
    else:
        annotate(z, some, 1 << 30)


def resident(name: str) -> int:
    """Bytes, of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not say {name}")


if __name__ == "__main__":
    cli.launch(main, define_flags)

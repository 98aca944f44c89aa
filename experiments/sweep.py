r"""A sweep: an embedding in; a dictionary per configuration, their metrics and their frontier out.

    python -m experiments.sweep --preset=vanilla,topk_schuster --data=cells.h5ad:obsm/X_pca \
        --n_latents=40,400 --l1_weight=0.1,1 --k_percent=5,10 --seeds=0,1 --epochs=100 \
        --workdir=runs/sweep                                       (or: sae-jax sweep ...)

Rows come from F.npy, F.h5ad:obsm/KEY, F.h5ad:X, or the same of a .zarr store; those that do not fit
the memory are streamed from disk. Every field of SAEConfig, k_percent too, is a flag, and its comma
list an axis; the grid is all combinations, for each preset. An axis that a preset has no use for
(k_percent for vanilla) is dropped, and said to be. --dry_run shows the grid. Instead of presets and
axes, --config=FILE names a JSON, YAML or Python file (see experiments/configurations.py):

    {"presets": {"vanilla": {"n_latents": [40, 400], "l1_weight": [0.1, 1], "seed": [0, 1]}}}

The same command again continues where an earlier one stopped or was killed; other settings are
refused in the same folder. For job arrays: --num_shards=8 --shard_index=$SLURM_ARRAY_TASK_ID, of
0 .. 7, and the same --workdir for all, in which every shard fills a folder of its own; shards know
nothing of each other, so that one lost costs the others nothing, and `sae-jax merge` joins them.

With --multihost several processes train one sweep together, on the devices of all, into one folder
that all see: they are found by Slurm (srun), Open MPI, `sae-jax launch`, or the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where one is lost all end, and the
same command goes on from the last checkpoint, on as many processes as there are then.

It takes about 20 seconds for the 16 configurations above on the 700 cells that ship with scanpy
(two cores), most of it to compile four programs. It must show the table and figures/frontier.png:
R² of the held-out rows over their L0, and which configurations nothing else beats in both.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags

from analysis import plots
from experiments import cli, configurations, jobs, sharding
from sae_jax import InputError, SAEConfig, distributed, workdir
from sae_jax.errors import counted

FLAGS = flags.FLAGS

SETTINGS = "sweep.json"  # written first: it tells a folder of ours from anybody's
FILES = {
    SETTINGS: "the flags of this run",
    "configs.json": "every configuration",
    "results.parquet": "one row a configuration: settings and metrics",
    "history.parquet": "one row per configuration and epoch: losses",
    "dictionaries": "one folder a configuration: cfg.json, sae_weights.safetensors",
    "manifest.json": "size and SHA-256 of every file",
    "figures": "frontier: PNG and PDF",
}
SHOWN = 8  # rows of the printed table


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    jobs.define_flags()
    configurations.define_flags()
    flags.DEFINE_bool("dry_run", False, "Show what would be trained, and stop.")
    flags.DEFINE_integer("num_shards", 1, "Jobs that the grid is split between.", lower_bound=1)
    flags.DEFINE_integer("shard_index", 0, "This job, from 0.", lower_bound=0)


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    jobs.join()
    index, shards = FLAGS.shard_index, FLAGS.num_shards
    out = None if FLAGS.dry_run else check_workdir(index, shards)
    axes = configurations.read_axes()
    rows = jobs.read_rows()
    configs = configurations.read_configs(axes, rows["train"].shape[1])
    rows = jobs.check(configs, rows)
    whole = len(configs)
    positions = shard(configs, shards, index, len(rows["train"]), FLAGS.epochs, out)
    configs = [configs[position] for position in positions]
    if shards > 1:
        print(f"{sharding.flags_of(index, shards)}: {len(configs)} of {whole} configurations")
    if distributed.is_first():
        print(configurations.describe(configs))
    if out is None:
        return
    with distributed.held_once(workdir.locked(out)):
        jobs.claim(out, SETTINGS, FILES, {"positions": positions} if shards > 1 else {})
        there = jobs.complete(out, FILES)

        # 2. Train. Each program's results are on disk before the next one starts.
        run = jobs.train(configs, rows, out)

        # 3. Draw, and say where everything lies.
        if not distributed.is_first():
            return
        split = "validation" if "validation" in rows else "train"
        if not there:
            plots.save(plots.frontier(run.results, split=split), out / "figures", "frontier")
            jobs.finish(out, FILES)
    print(f"\n{out}/")
    for name, what in FILES.items():
        print(f"  {name:<20} {what}")
    print(f"\nbest {split} R² at their L0")
    print(best(run.results, split))
    # A shard may well hold nothing else: what the whole is worth, the merge tells.
    if shards == 1 and (run.results["status"] == "diverged").all():
        raise SystemExit("error: every configuration diverged; lower the learning rates?")
    failed = int((run.results["status"] == "failed").sum())
    if failed:
        raise SystemExit(
            f"error: {counted(failed, 'configuration')} failed (see above); the same command tries "
            "again"
        )


def check_workdir(index: int, shards: int) -> Path:
    """The folder to fill, of this shard if there are several. Refuses one that others use."""
    if not FLAGS.workdir:
        raise InputError("--workdir is needed: the folder to fill")
    out = Path(FLAGS.workdir)
    workdir.check_writable(out)
    if shards > 1:
        check_siblings(out, index, shards)
        out = out / f"shard-{index:03d}-of-{shards:03d}"
    return jobs.check_workdir(out, SETTINGS)


def check_siblings(out: Path, index: int, shards: int) -> None:
    """Refuses a folder that holds other things than the shards of this sweep."""
    there = list(out.iterdir()) if out.is_dir() else []
    # A name that begins with a dot is of a shard that is starting.
    there = [path for path in there if not path.name.startswith(".")]
    if any(not re.fullmatch(r"shard-\d+-of-\d+", path.name) for path in there):
        raise InputError(f"{out} holds other files than shards; choose another folder")
    if other := [path.name for path in there if not path.name.endswith(f"-of-{shards:03d}")]:
        raise InputError(f"{out} holds {other[0]}: a sweep of another number of shards")
    ours = jobs.given_flags()
    for path in there:
        if path.name == f"shard-{index:03d}-of-{shards:03d}" or not (path / SETTINGS).is_file():
            continue
        theirs = sharding.read_settings(path / SETTINGS)
        if changes := sharding.difference(theirs, ours):
            raise InputError(f"{path} is a shard of another sweep:\n  {changes}")


def shard(
    configs: Sequence[SAEConfig],
    shards: int,
    index: int,
    rows: int,
    epochs: int,
    out: Path | None = None,
) -> list[int]:
    """Positions of one shard's configurations, ascending: together the shards are the whole, once.

    Those that its folder `out` notes, if it was begun (by another version, perhaps, which split the
    grid otherwise); else by `sharding.split`.
    """
    if index >= shards:
        raise InputError(f"--shard_index={index} must be less than --num_shards={shards}")
    positions = sharding.split(configs, shards, rows, epochs)[index]
    if shards == 1 or out is None:
        return positions
    begun = {
        path.parent: [at for at in sharding.read_settings(path)["positions"] if at < len(configs)]
        for path in sorted(out.parent.glob(f"shard-*/{SETTINGS}"))
    }
    if FLAGS.overwrite or out not in begun:
        begun[out] = positions
    sharding.check_apart(begun)
    return begun[out]


def best(results: pd.DataFrame, split: str) -> str:
    """The configurations that no other beats in both R² and L0: some of them, evenly, by L0."""
    l0, r2 = f"{split}_l0", f"{split}_r2"
    trained = results[results["status"] == "trained"].sort_values([l0, r2], ascending=[True, False])
    highest = trained[r2].cummax()
    front = trained[(trained[r2] == highest) & (highest > highest.shift(fill_value=-np.inf))]
    if front.empty:
        return f"  none: {len(trained)} of {len(results)} are trained, none with a finite R²"
    some = np.unique(np.linspace(0, len(front) - 1, SHOWN).round().astype(int))
    fields = [field.name for field in dataclasses.fields(SAEConfig)]
    values = results.groupby("name")[fields].nunique(dropna=False).max()
    varied = [name for name in fields if values[name] > 1]  # within a preset
    table = front.iloc[some][["member", "name", *varied, l0, r2]].astype(object)
    return table.where(table.notna(), "").to_string(index=False, float_format="{:.4g}".format)


if __name__ == "__main__":
    cli.launch(main, define_flags)

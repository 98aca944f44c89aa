r"""One dictionary: an embedding and a configuration in; weights, metrics and loss curves out.

    python -m experiments.train --preset=topk --data=cells.h5ad:obsm/X_pca --n_latents=500 --k=10 \
        --epochs=200 --workdir=runs/topk                           (or: sae-jax train ...)

Flags are those of experiments/sweep.py, but each of one value. The same command again continues
where an earlier one stopped or was killed. In the folder: what a sweep leaves of a single
configuration, and figures/training (losses and L0 by epoch).

It takes about 15 seconds on the 700 cells that ship with scanpy (two cores). It must show a loss
that falls and levels off, and the metrics of all rows.
"""

from pathlib import Path

from absl import flags

from analysis import plots
from experiments import cli, configurations, jobs
from sae_jax import InputError, distributed, workdir

FLAGS = flags.FLAGS

SETTINGS = "train.json"
FILES = {
    SETTINGS: "the flags of this run",
    "configs.json": "the configuration",
    "results.parquet": "one row: settings and metrics",
    "history.parquet": "one row an epoch: losses",
    "dictionaries": "0000/: cfg.json, sae_weights.safetensors",
    "manifest.json": "size and SHA-256 of every file",
    "figures": "training: PNG and PDF",
}


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    jobs.define_flags()
    configurations.define_flags()


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    if not FLAGS.workdir:
        raise InputError("--workdir is needed: the folder to fill")
    jobs.join()
    out = jobs.check_workdir(Path(FLAGS.workdir), SETTINGS)
    axes = configurations.read_axes()
    rows = jobs.read_rows()
    configs = configurations.read_configs(axes, rows["train"].shape[1])
    if len(configs) > 1:
        raise InputError(
            f"these flags make {len(configs)} configurations; `sae-jax sweep` trains them all"
        )
    rows = jobs.check(configs, rows)
    with distributed.held_once(workdir.locked(out)):
        jobs.claim(out, SETTINGS, FILES)
        there = jobs.complete(out, FILES)

        # 2. Train.
        run = jobs.train(configs, rows, out)

        # 3. Draw, and say where everything lies and what came out.
        if not distributed.is_first():
            return
        if not there:
            plots.save(plots.training(run.history), out / "figures", "training")
            jobs.finish(out, FILES)
    print(f"\n{out}/")
    for name, what in FILES.items():
        print(f"  {name:<20} {what}")
    row = run.results.iloc[0]
    if row["status"] != "trained":
        raise SystemExit(f"error: {row['status']} after {row['epochs']} epochs; lower the rate?")
    print(f"\n{'':<20}" + "".join(f"{split:>12}" for split in rows))
    for name in row.index:
        if name.startswith("train_") and name != "train_loss":
            metric = name.removeprefix("train_")
            print(f"{metric:<20}" + "".join(f"{row[f'{s}_{metric}']:>12.4g}" for s in rows))


if __name__ == "__main__":
    cli.launch(main, define_flags)

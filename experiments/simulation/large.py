r"""The large simulation of Schuster's paper: data, the autoencoders of Table S2, superpositions.

    python -m experiments.simulation.large --quick --workdir=runs/large_quick        (a minute)
    python -m experiments.simulation.large --cells=25000 --genes=5000 --epochs=100 \
        --models=20-2-narrow,150-2-narrow --seeds=0 --workdir=runs/large_quarter
    python -m experiments.simulation.large --workdir=runs/large          (for an accelerator)

100,000 cells of 20,000 genes, the last tenth of them held out; nothing of that size is ever held: a
batch of Y is made of X'' and M when it is needed. --models names configurations of Table S2
(latents-depth-width; all 22 by default), each trained for --seeds side by side until 20 epochs
bring no lower validation loss. --search looks for hyperparameters by Optuna instead of taking the
table's. R² (equation 7) is of least squares on the training cells, exact, measured on those held
out; A and B as vectors, as in the text, and as category numbers, as in the code.

The same command again goes on after the last finished configuration. It must show figures 1C, S1
(without the single-cell data) and S2, and the order of recovery of section 4.1: X'' > A, B, X' > X.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from experiments import cli
from experiments.simulation import folders
from sae_jax import InputError, files, workdir

if TYPE_CHECKING:
    import pandas as pd

    from experiments.simulation.autoencoder import AutoEncoder, Recipe
    from experiments.simulation.data import Cells, Large

FLAGS = flags.FLAGS

SETTINGS = "simulation_large.json"
FILES = {
    SETTINGS: "what was asked for",
    "autoencoders": "weights and losses of every seed, a file for each configuration (.npz)",
    "measured": "R² of each configuration",
    "superposition.parquet": "one row per configuration and seed: validation loss, R² of groups",
    "figures": "1C, S1, S2: PNG and PDF",
}
SETTING_FLAGS = (
    "variant", "seed", "cells", "genes", "models", "seeds", "epochs", "search", "quick",
)  # fmt: skip
HELD_OUT = 0.1
PICTURED = 3000  # cells of S1
GROUPS = ("Y", "X''", "X'", "X", "A", "B", "A_index", "B_index")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_enum("variant", "code", ("text", "code"), "Whose distributions.")
    flags.DEFINE_integer("seed", 0, "Of the data.", 0, 2**31 - 1)
    flags.DEFINE_integer("cells", 100_000, "Cells, a tenth of them held out.", lower_bound=100)
    flags.DEFINE_integer("genes", 20_000, "Genes.", lower_bound=2)
    flags.DEFINE_list("models", None, "Of Table S2, 150-2-wide say; default: all 22.")
    flags.DEFINE_list("seeds", ["0", "42", "9307"], "Of the autoencoders.")
    flags.DEFINE_integer("epochs", 10_000, "At most.", lower_bound=1)
    flags.DEFINE_bool("search", False, "Hyperparameters by Optuna, 50 trials of 100 epochs.")
    flags.DEFINE_bool("quick", False, "2,000 cells, 300 genes, four configurations, 30 epochs.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")


def main() -> None:
    """Runs the program by its flags."""
    import pandas as pd

    from analysis import plots
    from experiments.simulation import large_figures

    # 1. Refuse what is wrong before anything is written.
    if FLAGS.quick:
        take_quick_settings()
    out = folders.check(FLAGS.workdir, SETTINGS, settings(), FLAGS.overwrite)
    names, seeds = asked_models(), asked_seeds()
    simulation = asked_simulation()
    with workdir.locked(out):
        folders.claim(out, SETTINGS, settings(), FILES, FLAGS.overwrite)

        # 2. Draw the hidden variables, all that training needs beside M.
        cells = hidden(simulation)

        # 3. Train and measure each configuration; what is on disk is read.
        for number, name in enumerate(names):
            path = out / "measured" / f"{name}.parquet"
            if not path.exists():
                logging.info("configuration %d of %d: %s", number + 1, len(names), name)
                files.write_parquet(path, measure(name, simulation, cells, seeds, out))
        tables = [pd.read_parquet(out / "measured" / f"{name}.parquet") for name in names]
        table = pd.concat(tables, ignore_index=True)
        files.write_parquet(out / "superposition.parquet", table)

        # 4. Draw.
        plots.save(large_figures.fits(table), out / "figures", "figure_1c")
        plots.save(large_figures.fits_by_size(table), out / "figures", "figure_s02")
        few = dataclasses.replace(simulation, cells=min(PICTURED, simulation.cells))
        plots.save(large_figures.simulated(hidden(few), few), out / "figures", "figure_s01")
    for name, what in FILES.items():
        print(f"  {name:<22} {what}")
    columns = ["name", "seed", "validation_loss", *GROUPS]
    print(f"\nR² on held-out cells\n{table[columns].to_string(index=False, float_format='%.3f')}")
    print(f"\norder of recovery: {order(table)}\nthe paper's:       X'' > A > B > X' > X")


def order(table: "pd.DataFrame") -> str:
    """Hidden variables by mean R², the best recovered first."""
    means = table[["X''", "X'", "X", "A", "B"]].mean().sort_values(ascending=False)
    return " > ".join(f"{name} ({value:.2f})" for name, value in means.items())


def take_quick_settings() -> None:
    """Those of --quick, where nothing else was asked for."""
    quick = {
        "cells": 2000, "genes": 300, "epochs": 30, "seeds": ["0", "42"],
        "models": ["20-2-narrow", "20-2-wide", "100-2-narrow", "100-4-narrow"],
    }  # fmt: skip
    for name, value in quick.items():
        if not FLAGS[name].present:
            FLAGS[name].value = value


def settings() -> dict[str, Any]:
    """What the results depend on."""
    return {name: FLAGS[name].value for name in SETTING_FLAGS}


def asked_models() -> list[str]:
    """Names of configurations of Table S2."""
    from experiments.simulation.autoencoder import RECIPES

    known = {f"{latents}-{depth}-{width}" for latents, depth, width in RECIPES}
    names = FLAGS.models or ["-".join(map(str, key)) for key in RECIPES]
    if unknown := sorted(set(names) - known):
        raise InputError(f"--models: {unknown[0]} is not in Table S2, which has {sorted(known)}")
    return list(dict.fromkeys(names))


def asked_seeds() -> list[int]:
    """Of the autoencoders."""
    if not FLAGS.seeds or not all(seed.isdecimal() for seed in FLAGS.seeds):
        raise InputError(f"--seeds={','.join(FLAGS.seeds or [])} must be integers, at least 0")
    return [int(seed) for seed in FLAGS.seeds]


def asked_simulation() -> "Large":
    """By the flags."""
    from experiments.simulation.data import Large

    return Large(seed=FLAGS.seed, cells=FLAGS.cells, genes=FLAGS.genes, variant=FLAGS.variant)


def hidden(simulation: "Large") -> "Cells":
    """Hidden variables of all cells: 160 MB of 100,000."""
    from experiments.simulation.data import Cells

    blocks = [vars(block) for block in simulation.blocks()]
    return Cells(**{name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})


def measure(
    name: str, simulation: "Large", cells: "Cells", seeds: list[int], out: Path
) -> "pd.DataFrame":
    """One row a seed of a configuration, trained or read: validation loss and R² of every group."""
    import pandas as pd

    from experiments.simulation import autoencoder, fitting

    latents, depth, width = name.split("-")
    key = int(latents), int(depth), width
    dims = autoencoder.dims(simulation.genes, *key, FLAGS.variant)
    train = len(cells.x_active) - int(HELD_OUT * len(cells.x_active))
    parts = cells.x_active[:train], cells.x_active[train:]
    path = out / "autoencoders" / f"{name}.npz"
    if not path.exists():
        recipe = asked_recipe(dims, parts, simulation.m, autoencoder.RECIPES[key])
        fitted = fitting.fit(
            dims, *parts, recipe, seeds, readout=simulation.m, chunk=5,
            progress=f"{name}, {len(seeds)} seeds",
        )  # fmt: skip
        fitting.save(path, fitted)
    fitted = fitting.load(path, dims)
    found = []
    for seed, model, losses in zip(
        seeds, fitted.models, fitted.history["validation_loss"], strict=True
    ):
        found.append(
            {
                "name": name, "latents": key[0], "depth": key[1], "width": width, "seed": seed,
                "epochs": int(np.isfinite(losses).sum()),
                "validation_loss": float(np.nanmin(losses)),
                **recovery(model, simulation, cells, train),
            }
        )  # fmt: skip
    return pd.DataFrame(found)


def asked_recipe(
    dims: list[int], parts: tuple[np.ndarray, np.ndarray], m: np.ndarray, table: "Recipe"
) -> "Recipe":
    """Table S2's, or what the search finds; never more epochs than asked for."""
    recipe = table
    if FLAGS.search:
        from experiments.simulation.search import search

        recipe = search(dims, *parts, readout=m)
        logging.info("found by the search: %s", recipe)
    batch = min(recipe.batch_size or len(parts[0]), len(parts[0]))
    return dataclasses.replace(recipe, epochs=FLAGS.epochs, batch_size=batch)


def recovery(
    model: "AutoEncoder", simulation: "Large", cells: "Cells", train: int
) -> dict[str, float]:
    """R² of each group on held-out cells, of least squares on the others, a block at a time."""
    from experiments.simulation import autoencoder, superposition
    from experiments.simulation.data import BLOCK

    def blocks(start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for low in range(start, stop, BLOCK):
            some = slice(low, min(low + BLOCK, stop))
            y = simulation.counts(cells.x_active[some])
            variables = [y, cells.x_active[some], cells.x_noisy[some], cells.x[some], cells.a[some]]
            variables += [cells.b[some], cells.cell_type[some, None], cells.batch[some, None]]
            yield autoencoder.latents(model, y), np.hstack(variables)

    fit = superposition.least_squares(superposition.Moments.of(blocks(0, train)))
    held_out = superposition.Moments.of(blocks(train, len(cells.x)))
    r2 = superposition.r2(held_out, fit.coefficients, fit.intercept)
    programs = simulation.programs
    sizes = dict(zip(GROUPS, (simulation.genes, *[programs] * 4, 1, 1, 1), strict=True))
    ends = np.cumsum(list(sizes.values()))
    groups = {group: slice(end - sizes[group], end) for group, end in zip(sizes, ends, strict=True)}
    return superposition.by_group(r2, groups)


if __name__ == "__main__":
    cli.launch(main, define_flags)

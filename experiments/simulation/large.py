r"""The large simulation of Schuster's paper: autoencoders, superpositions, dictionaries of them.

    python -m experiments.simulation.large --quick --workdir=runs/large_quick        (a minute)
    python -m experiments.simulation.large --cells=25000 --genes=5000 --epochs=100 \
        --models=20-2-narrow,150-2-narrow --seeds=0 --scalings=20,100 --rates=1e-4,1e-5 \
        --l1_weights=1e-3,1e-4 --sae_epochs=50 --workdir=runs/large_quarter
    python -m experiments.simulation.large --workdir=runs/large          (for an accelerator)

100,000 cells of 20,000 genes, the last tenth of them held out; nothing of that size is ever held: a
batch of Y is made of X'' and M when it is needed. --models names configurations of Table S2
(latents-depth-width; all 22 by default), each trained for --seeds side by side until 20 epochs
bring no lower validation loss. --search looks for hyperparameters by Optuna instead of taking the
table's. R² (equation 7) is of least squares on the training cells, exact, measured on those held
out; A and B as vectors, as in the text, and as category numbers, as in the code.

Dictionaries (Table S4: vanilla, loss a mean as in the authors' code, batch 128, patience 20) are
trained on the latents of --sae_models, first of --seeds; beside them stand PCA, ICA and SVD. What
single latents recover and which genes they are connected to is measured on the cells held out.

The same command again goes on where an earlier one stopped, and with more --models (the same
--sae_models) takes those in. It must show figures 1C, S1 (without
the single-cell data), S2 and S13, Table S5, and the order of recovery of section 4.1: X'' > A, B,
X' > X. --page=FILE.md writes the results page.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from experiments import cli
from experiments.simulation import folders
from sae_jax import InputError, files, workdir

if TYPE_CHECKING:
    import pandas as pd

    from experiments.simulation.data import Large
    from experiments.simulation.large_saes import Grid

FLAGS = flags.FLAGS

SETTINGS = "simulation_large.json"
FILES = {
    SETTINGS: "what was asked for",
    "autoencoders": "weights and losses of every seed, a file for each configuration (.npz)",
    "measured": "R² of each configuration",
    "superposition.parquet": "one row per configuration and seed: validation loss, R² of groups",
    "embeddings": "latents of all cells, of each of --sae_models (.npy)",
    "sweep": "dictionaries and losses, a folder of sae_jax.train for each embedding",
    "recovery": "what has been measured, a file for each dictionary",
    "recovery.parquet": "one row a dictionary: settings, metrics, highest correlations",
    "baselines": "the same of PCA, ICA and SVD, a file for each embedding",
    "table_s5.csv": "Table S5, the paper's numbers beside ours",
    "structure.parquet": "coverage by percentile and X'', of one dictionary and of nulls",
    "claims.parquet": "sections 4.1, 4.3 and 6: the paper's words, our numbers",
    "figures": "1C, S1, S2, S13: PNG and PDF",
    "manifest.json": "size and SHA-256 of every file",
}
SETTING_FLAGS = (
    "variant", "seed", "cells", "genes", "models", "seeds", "epochs", "search", "sae_models",
    "sae_seeds", "sae_epochs", "scalings", "rates", "l1_weights", "quick",
)  # fmt: skip
PICTURED = 3000  # cells of S1
LEAST = 1e-12  # of rates and weights


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
    flags.DEFINE_list(
        "sae_models", None, "Of --models, whose latents dictionaries are trained on; default: "
        "those of depth 2, wide, and at most 150 latents, or all where there are none.",
    )  # fmt: skip
    flags.DEFINE_list("scalings", ["20", "100", "200", "500"], "Latents of an SAE / its inputs.")
    flags.DEFINE_list("rates", ["1e-4", "1e-5", "1e-6"], "Learning rates of the SAEs.")
    flags.DEFINE_list("l1_weights", ["1e-1", "1e-2", "1e-3", "1e-4"], "Of the SAEs.")
    flags.DEFINE_list("sae_seeds", ["0", "42", "9307"], "Of the SAEs.")
    flags.DEFINE_integer("sae_epochs", 500, "Of the SAEs, at most.", lower_bound=1)
    flags.DEFINE_bool("quick", False, "2,000 cells, 300 genes, small grids, 30 epochs.")
    flags.DEFINE_string("page", None, "Markdown file whose section of this study to write.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    if FLAGS.quick:
        take_quick_settings()
    out = folders.check(FLAGS.workdir, SETTINGS, settings(), FLAGS.overwrite, growing=["models"])
    if FLAGS.page:
        workdir.check_writable(Path(FLAGS.page).resolve().parent)
    names, seeds = asked_models(), asked_seeds("seeds")
    simulation, sae_models, grid = asked_simulation(), asked_sae_models(names), asked_grid()
    with folders.filled(out, SETTINGS, settings(), FILES, FLAGS.overwrite):
        run(out, simulation, names, seeds, sae_models, grid)
    for name, what in FILES.items():
        print(f"  {name:<22} {what}")


def run(
    out: Path,
    simulation: "Large",
    names: list[str],
    seeds: list[int],
    sae_models: list[str],
    grid: "Grid",
) -> None:
    """Every stage that is not on disk yet, and what is drawn and told of all."""
    import pandas as pd

    from experiments.simulation import large_autoencoders, large_claims, large_saes, page

    # 2. Draw the hidden variables, all that training needs beside M.
    cells, m = large_autoencoders.hidden(simulation), simulation.m
    study = large_autoencoders.Study(
        simulation, cells, tuple(seeds), FLAGS.epochs, FLAGS.search, out / "autoencoders"
    )

    # 3. Train and measure each configuration; what is on disk is read.
    for number, name in enumerate(names):
        path = out / "measured" / f"{name}.parquet"
        if not path.exists():
            logging.info("configuration %d of %d: %s", number + 1, len(names), name)
            files.write_parquet(path, study.measure(name))
    tables = [files.read_parquet(out / "measured" / f"{name}.parquet") for name in names]
    superposition = pd.concat(tables, ignore_index=True)
    files.write_parquet(out / "superposition.parquet", superposition)

    # 4. Dictionaries and baselines of the embeddings, and what they recover.
    embeddings, runs, rows, linear = [], {}, [], []
    for name in sae_models:
        first = study.fitted(name).models[0]
        path = out / "embeddings" / f"{name}.npy"
        embedding = large_saes.embed(path, name, first, simulation, cells, study.train)
        embeddings.append(embedding)
        runs[name] = large_saes.sweep(embedding, grid, out / "sweep" / name)
        rows.append(large_saes.recovered(embedding, runs[name], m, out / "recovery" / name))
        path = out / "baselines" / f"{name}.parquet"
        linear.append(large_saes.linear(embedding, m, path, FLAGS.seed))
    recovered = pd.concat(rows, ignore_index=True)
    files.write_parquet(out / "recovery.parquet", recovered)
    if (recovered["status"] != "trained").all():
        raise SystemExit("error: every dictionary diverged; see recovery.parquet")
    table_s5 = large_saes.table_s5(recovered, pd.concat(linear, ignore_index=True))
    with files.write_aside(out / "table_s5.csv") as fresh:
        table_s5.to_csv(fresh, index=False, float_format="%.4f")

    # 5. Structure, claims, figures, page.
    path = out / "structure.parquet"
    structure = large_saes.structures(embeddings, runs, recovered, m, path, FLAGS.seed)
    claims = large_claims.check(superposition, recovered, table_s5, structure)
    told = pd.DataFrame([dataclasses.asdict(each) for each in claims])
    files.write_parquet(out / "claims.parquet", told.astype({"holds": "boolean"}))
    draw(out / "figures", superposition, recovered, structure, simulation)
    if FLAGS.page:
        page.write_large(
            Path(FLAGS.page), out, settings(), superposition, table_s5, structure, claims
        )
    shown = {
        "R² on held-out cells": superposition[
            ["name", "seed", "validation_loss", *large_autoencoders.GROUPS]
        ],
        "Table S5": table_s5[["method", "rule", *large_saes.S5_GROUPS]],
        "Figure S13: coverage of M": large_saes.summary(structure),
    }
    for title, table in shown.items():
        print(f"\n{title}\n{table.to_string(index=False, float_format='%.3f')}")
    print(f"\norder of recovery: {order(superposition)}\nthe paper's:       X'' > A > B > X' > X\n")
    large_claims.tell(claims)


def draw(
    folder: Path,
    superposition: "pd.DataFrame",
    recovered: "pd.DataFrame",
    structure: "pd.DataFrame",
    simulation: "Large",
) -> None:
    """Every figure, PNG and PDF."""
    from analysis import plots
    from experiments.simulation import large_figures
    from experiments.simulation.large_autoencoders import hidden

    few = dataclasses.replace(simulation, cells=min(PICTURED, simulation.cells))
    drawn = {
        "figure_1c": large_figures.fits(superposition),
        "figure_s01": large_figures.simulated(hidden(few), few),
        "figure_s02": large_figures.fits_by_size(superposition),
        "figure_s13": large_figures.recovery_and_structure(recovered, structure),
    }
    for name, figure in drawn.items():
        plots.save(figure, folder, name)


def order(table: "pd.DataFrame") -> str:
    """Hidden variables by mean R², the best recovered first."""
    means = table[["X''", "X'", "X", "A", "B"]].mean().sort_values(ascending=False)
    return " > ".join(f"{name} ({value:.2f})" for name, value in means.items())


def take_quick_settings() -> None:
    """Those of --quick, where nothing else was asked for."""
    quick = {
        "cells": 2000, "genes": 300, "epochs": 30, "seeds": ["0", "42"],
        "models": ["20-2-narrow", "20-2-wide", "100-2-narrow", "100-4-narrow"],
        "sae_models": ["20-2-narrow", "100-2-narrow"], "sae_seeds": ["0", "42"],
        "scalings": ["2", "10"], "rates": ["1e-3"], "l1_weights": ["1e-2", "1e-3"],
        "sae_epochs": 15,
    }  # fmt: skip
    for name, value in quick.items():
        if not FLAGS[name].present:
            FLAGS[name].value = value


def settings() -> dict[str, Any]:
    """What the results depend on."""
    values = {name: FLAGS[name].value for name in SETTING_FLAGS}
    return values | {"sae_models": asked_sae_models(asked_models())}


def asked_models() -> list[str]:
    """Names of configurations of Table S2."""
    from experiments.simulation.autoencoder import RECIPES

    known = {f"{latents}-{depth}-{width}" for latents, depth, width in RECIPES}
    names = FLAGS.models or ["-".join(map(str, key)) for key in RECIPES]
    if unknown := sorted(set(names) - known):
        raise InputError(f"--models: {unknown[0]} is not in Table S2, which has {sorted(known)}")
    return list(dict.fromkeys(names))


def asked_sae_models(names: list[str]) -> list[str]:
    """Those of `names` whose latents dictionaries are trained on."""
    if FLAGS.sae_models is None:
        usual = [f"{latents}-2-wide" for latents in (20, 100, 150)]
        return [name for name in usual if name in names] or names
    if not FLAGS.sae_models or (set(FLAGS.sae_models) - set(names)):
        asked = ",".join(FLAGS.sae_models)
        raise InputError(f"--sae_models={asked} must be some of --models, {','.join(names)}")
    return list(dict.fromkeys(FLAGS.sae_models))


def asked_seeds(flag: str) -> list[int]:
    """Of the autoencoders or of the dictionaries."""
    return asked_numbers(flag, int, 0, "integers, at least 0")


def asked_grid() -> "Grid":
    """The dictionaries of an embedding, by the flags."""
    from experiments.simulation.large_saes import Grid

    return Grid(
        scalings=tuple(asked_numbers("scalings", int, 1, "integers, at least 1")),
        rates=tuple(asked_numbers("rates", float, LEAST, "numbers above 0")),
        l1_weights=tuple(asked_numbers("l1_weights", float, LEAST, "numbers above 0")),
        seeds=tuple(asked_seeds("sae_seeds")),
        epochs=FLAGS.sae_epochs,
    )


def asked_numbers(flag: str, kind: type, least: float, what: str) -> list:
    """The distinct numbers of a flag; finite, and no less than `least`."""
    given = FLAGS[flag].value or []
    try:
        numbers = [kind(each) for each in given]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number < float("inf") for number in numbers):
        raise InputError(f"--{flag}={','.join(given)} must be {what}")
    return list(dict.fromkeys(numbers))


def asked_simulation() -> "Large":
    """By the flags."""
    from experiments.simulation.data import Large

    return Large(seed=FLAGS.seed, cells=FLAGS.cells, genes=FLAGS.genes, variant=FLAGS.variant)


if __name__ == "__main__":
    cli.launch(main, define_flags)

r"""The small simulation of Schuster's paper: data, autoencoders, superpositions, 512 dictionaries.

    python -m experiments.simulation.small --quick --workdir=runs/small_quick      (1 - 2 minutes)
    python -m experiments.simulation.small --workdir=runs/small                  (about 1.5 hours)
    python -m experiments.simulation.small --variant=code --workdir=runs/small_code

Two cores; the full sweep takes some 1.8 CPU hours of it. --variant=text is Table S4: 512
configurations of 500 epochs, on 10,000 cells with 2,000 held out. --variant=code is what the
authors ran: k = 1 % as well (544), 100 to 1000 epochs by learning rate, all 12,000 cells, and
signed correlations of largest |r|. Both train on the latents of the "ideal" autoencoder, the best
of eight seeds, with the batch (128), the connectivity and the loss of the code: a mean over
dimensions and latents. --reduction=sum is equation 3 as printed, where the same L1 weight penalises
n_latents / d times as much. --quick trains every type at three widths, two rates and three
penalties, for 50 epochs, and the autoencoders for 2,000 epochs at ten times the rate.

The same command again continues where an earlier one stopped or was killed; finished stages are
read. It must show 4 latents that explain X' wholly (R² 1.00), the claims of section 4.2 each with
its numbers, and figures S3 to S12. --page=FILE.md writes the results page, and beside it the table
of results and two figures.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from experiments import cli
from experiments.simulation import folders
from sae_jax import files, workdir
from sae_jax.errors import counted

if TYPE_CHECKING:
    import pandas as pd

    from experiments.simulation.autoencoder import Recipe
    from experiments.simulation.data import Small
    from experiments.simulation.sweep import Grid

FLAGS = flags.FLAGS

SETTINGS = "simulation_small.json"  # written first: it tells a folder of ours from anybody's
FILES = {
    SETTINGS: "what was asked for",
    "autoencoders": "weights, latents and losses: compressed, ideal, overcomplete (.npz)",
    "superposition.parquet": "R² of every group of variables, exact and by gradient descent",
    "sweep": "dictionaries and losses, a folder of sae_jax.train for each number of epochs",
    "metrics": "what has been measured, a file for each program",
    "results.parquet": "one row a configuration: settings and metrics",
    "correlations.parquet": "one row per configuration and variable",
    "claims.parquet": "section 4.2: the paper's words, our numbers",
    "figures": "S3 .. S12: PNG and PDF",
    "manifest.json": "size and SHA-256 of every file",
}
SETTING_FLAGS = ("variant", "reduction", "connectivity", "seed", "quick")
LATENTS = {"compressed": 2, "ideal": 4, "overcomplete": 10}
AE_SEEDS = 8  # an output that is never above 0 stays so (ReLU): most seeds lose a variable of Y
PERFECT = 1e-2  # validation MSE below which nothing is lost
DESCENTS = {"gradient descent": "sgd", "adam": "adam"}
FIGURES = {
    "figure_s03": "superpositions in three autoencoders",
    "figure_s04": "performance of the three types",
    "figure_s05": "loss and active share by width, rate and penalty",
    "figure_s06": "active share by learning rate",
    "figure_s07": "metrics over width at rate 1e-4",
    "figure_s08": "recovery over width at rate 1e-4",
    "figure_s09": "sensitivity and specificity for X'",
    "figure_s10": "sensitivity and specificity for Y",
    "figure_s11": "correlation with A, and with X (B in the paper)",
    "figure_s12": "latents per X'",
}


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_enum("variant", "text", ("text", "code"), "Whose settings, where they differ.")
    flags.DEFINE_enum("reduction", "mean", ("mean", "sum"), "Of the SAEs' loss.")
    flags.DEFINE_enum(
        "connectivity", "fixed", ("fixed", "random"), "M of the code, or drawn as in the text."
    )
    flags.DEFINE_integer("seed", 0, "Of the data and of the SAEs.", 0, 2**31 - 1)
    flags.DEFINE_bool("quick", False, "A documented subset, in under two minutes.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_string("page", None, "Markdown file whose section of this study to write.")


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    out = folders.check(FLAGS.workdir, SETTINGS, settings(), FLAGS.overwrite)
    if FLAGS.page:
        workdir.check_writable(Path(FLAGS.page).resolve().parent)
    from experiments.simulation import data

    simulated = data.small(FLAGS.seed, connectivity=FLAGS.connectivity)
    if (simulated.m.sum(axis=1) == 0).any():
        logging.warning("an X has no Y in this M: nothing can recover it")
    with folders.filled(out, SETTINGS, settings(), FILES, FLAGS.overwrite):
        results, superposition = run(out, simulated)
    for name, what in FILES.items():
        print(f"  {name:<22} {what}")
    print(f"\nR² of linear readouts\n{superposition.to_string(index=False, float_format='%.3f')}")
    print_claims(results)


def run(out: Path, simulated: "Small") -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Every stage that is not on disk yet; returns the results and the superpositions' R²."""
    import pandas as pd

    from experiments.simulation import claims, page, sweep
    from experiments.simulation.figures import Rule

    # 2. Autoencoders, and what is in superposition in their latents.
    recipe = autoencoder_recipe()
    fitted = {name: autoencoder(out, name, simulated, recipe) for name in LATENTS}
    superposition = superpositions(out, fitted, simulated)

    # 3. Sweep dictionaries of the ideal one's latents, and measure them.
    grid = asked_grid()
    cells = fitted["ideal"]["latents"]
    rows = grid.rows(cells.shape[1], FLAGS.seed)
    train, validation = split(cells)
    programs = counted(len(sweep.programs(rows)), "program")
    logging.info("%s in %s", counted(len(rows), "configuration"), programs)
    about = {"simulation": "small", "autoencoder": "ideal", "variant": FLAGS.variant}
    runs = sweep.train(rows, train, validation, out / "sweep", about)
    failed = sum(int((each.results["status"] == "failed").sum()) for each in runs.values())
    if failed:
        raise SystemExit(
            f"error: {counted(failed, 'configuration')} failed (see above); the same command tries "
            "again"
        )
    results, correlations = sweep.measure(rows, runs, cells, simulated.variables, out / "metrics")
    files.write_parquet(out / "correlations.parquet", correlations)
    files.write_parquet(out / "results.parquet", results)

    # 4. Claims, figures, page.
    rule = Rule.of(FLAGS.variant)
    checked = claims.check(results, rule)
    table = pd.DataFrame([dataclasses.asdict(each) for each in checked])
    table["holds"] = table["holds"].astype("boolean")
    files.write_parquet(out / "claims.parquet", table)
    draw(out / "figures", results, fitted, simulated)
    if FLAGS.page:
        page.write(Path(FLAGS.page), out, settings(), results, superposition, checked)
    return results, superposition


def settings() -> dict[str, Any]:
    """What the results depend on."""
    return {name: FLAGS[name].value for name in SETTING_FLAGS}


def asked_grid() -> "Grid":
    """The configurations, by the flags."""
    from experiments.simulation.sweep import Grid

    grid = Grid.of(FLAGS.variant, FLAGS.reduction)
    if not FLAGS.quick:
        return grid
    return dataclasses.replace(
        grid, scalings=(2, 10, 50), rates=(1e-3, 1e-4), l1_weights=(1e-1, 1e-3, 1e-4),
        percents=(10, 50, 100), epochs=(50, 50),
    )  # fmt: skip


def autoencoder_recipe() -> "Recipe":
    """Of the three autoencoders, by the flags."""
    from experiments.simulation.autoencoder import SMALL

    if not FLAGS.quick:
        return SMALL
    return dataclasses.replace(SMALL, learning_rate=1e-3, epochs=2000)


def split(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Cells to train dictionaries on and those held out, none where the code has none."""
    from experiments.simulation.data import SMALL_VALIDATION

    if FLAGS.variant == "code":
        return cells, None
    return cells[:-SMALL_VALIDATION], cells[-SMALL_VALIDATION:]


def autoencoder(out: Path, name: str, simulated: "Small", recipe: "Recipe") -> dict[str, Any]:
    """One of `LATENTS`, trained or read: latents [cells, latents], losses [epochs], weights, and
    `last_losses` [seeds], of validation, of which it is the lowest."""
    from experiments.simulation import autoencoder, fitting
    from experiments.simulation.data import SMALL_VALIDATION

    path = out / "autoencoders" / f"{name}.npz"
    if not path.exists():
        # Every step takes all cells, of which some 70 differ: these, by how often they occur.
        parts = (simulated.y[:-SMALL_VALIDATION], simulated.y[-SMALL_VALIDATION:])
        distinct = [np.unique(part, axis=0, return_counts=True) for part in parts]
        fitted = fitting.fit(
            [simulated.y.shape[1], LATENTS[name]], *(cells for cells, _ in distinct), recipe,
            range(AE_SEEDS), weights=tuple(number for _, number in distinct), rectified=True,
            progress=f"{name} autoencoder, {LATENTS[name]} latents, {AE_SEEDS} seeds",
        )  # fmt: skip
        last = fitted.history["validation_loss"][:, -1]
        best = int(last.argmin())
        (encoder,), (decoder,) = fitted.models[best].encoder, fitted.models[best].decoder
        arrays = {
            "latents": autoencoder.latents(fitted.models[best], simulated.y),
            "last_losses": last,
            **{name: losses[best] for name, losses in fitted.history.items()},
            **{
                f"{part}_{leaf}": np.asarray(getattr(layer, leaf)[...])
                for part, layer in (("encoder", encoder), ("decoder", decoder))
                for leaf in ("kernel", "bias")
            },
        }
        with files.write_aside(path) as fresh:
            np.savez(fresh, **arrays)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def superpositions(
    out: Path, fitted: dict[str, dict[str, Any]], simulated: "Small"
) -> "pd.DataFrame":
    """R² of every group by autoencoder and method; adds `superposition` and `r2` of X' to each."""
    import pandas as pd

    from experiments.simulation import data, superposition

    found = []
    for name, each in fitted.items():
        z = each["latents"]
        exact = superposition.least_squares(superposition.Moments.of([(z, simulated.variables)]))
        where = data.GROUPS["X'"]
        each["superposition"] = z @ exact.coefficients[:, where]
        each["r2"] = exact.r2[where]
        methods = {"least squares": exact}
        for method, optimizer in DESCENTS.items():
            methods[method] = superposition.gradient_descent(
                z, simulated.variables, optimizer=optimizer, seed=FLAGS.seed
            )
        found += [
            {
                "autoencoder": name, "latents": z.shape[1], "method": method,
                "validation_mse": float(each["validation_loss"][-1]),
                "perfect_seeds": int((each["last_losses"] < PERFECT).sum()),
                **superposition.by_group(fit.r2, data.GROUPS),
            }
            for method, fit in methods.items()
        ]  # fmt: skip
    table = pd.DataFrame(found)
    files.write_parquet(out / "superposition.parquet", table)
    return table


def draw(
    folder: Path, results: "pd.DataFrame", fitted: dict[str, dict[str, Any]], simulated: "Small"
) -> None:
    """Every figure, PNG and PDF."""
    from analysis import plots
    from experiments.simulation import figures

    rule = figures.Rule.of(FLAGS.variant)
    trained = results[results["status"] == "trained"]
    titles = {
        "compressed": "2 latent units (compressed)",
        "ideal": "4 latent units (# variables)",
        "overcomplete": "10 latent units (overcomplete)",
    }
    performance = ("train_mse", "fraction_dead", "mean_active", f"{rule.highest}:X'")
    recovery = [f"{column}:{g}" for g in ("X'", "Y") for column in (rule.highest, rule.count)]
    recovery += [f"{rule.highest}:A", f"{rule.highest}:X"]
    drawn = (
        figures.superpositions({titles[k]: v for k, v in fitted.items()}, simulated.x_active),
        figures.overview(trained, rule),
        figures.hyperparameters(trained),
        figures.learning_rates(trained),
        figures.by_width(trained, performance, rule),
        figures.by_width(trained, recovery, rule),
        figures.sensitivity(trained, "X'", rule),
        figures.sensitivity(trained, "Y", rule),
        figures.distant(trained, rule),
        figures.redundancy(trained, rule),
    )
    for name, figure in zip(FIGURES, drawn, strict=True):
        plots.save(figure, folder, name)


def print_claims(results: "pd.DataFrame") -> None:
    """Each claim, the paper's words and ours."""
    from experiments.simulation import claims
    from experiments.simulation.figures import Rule

    failed = int((results["status"] != "trained").sum())
    print(f"\nsection 4.2, of {len(results)} configurations ({failed} diverged)")
    for each in claims.check(results, Rule.of(FLAGS.variant)):
        print(f"  {claims.VERDICTS[each.holds]:<14} {each.paper}\n{'':17}{each.ours}")


if __name__ == "__main__":
    cli.launch(main, define_flags)

"""The results page: a section a program in one Markdown file, each written by its program."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.simulation.claims import VERDICTS, Claim
from sae_jax import files

if TYPE_CHECKING:
    import pandas as pd

HEAD = """# The simulation study of Schuster's paper

Section 4 of "Can sparse autoencoders make sense of gene expression latent variable models?", run
again. The sections are written by the programs that they name.
"""
SHOWN = ("figure_s04", "figure_s12")
SHOWN_LARGE = ("figure_1c", "figure_s02", "figure_s13")
COLUMNS = [
    "type", "n_latents", "learning_rate", "l1_weight", "k_percent", "status", "epochs", "train_mse",
    "train_loss", "validation_mse", "active", "redundant", "mean_active",
    *(f"{name}:{group}"
      for group in ("Y", "X'", "A", "X")
      for name in ("highest", "highest_absolute", "latents", "latents_absolute")),
]  # fmt: skip

LARGE_COLUMNS = (
    "autoencoder", "scaling", "n_latents", "learning_rate", "l1_weight", "seed", "status", "epochs",
    "best_epoch", "validation_mse", "validation_r2", "validation_l0", "validation_live",
)  # fmt: skip


def write(
    path: Path,
    out: Path,
    settings: dict[str, Any],
    results: "pd.DataFrame",
    superposition: "pd.DataFrame",
    claims: Sequence[Claim],
) -> None:
    """The section of `small` in `path`; its figures and results as CSV beside it."""
    name = f"small_{settings['variant']}" + ("_quick" if settings["quick"] else "")
    name += "" if settings["reduction"] == "mean" else f"_{settings['reduction']}"
    prefix = f"{path.stem}_{name}"
    _copy_figures(SHOWN, out, path.parent, prefix)
    table = results[[column for column in COLUMNS if column in results]]
    with files.write_aside(path.parent / f"{prefix}.csv") as fresh:
        table.to_csv(fresh, index=False, float_format="%.5g")
    replace_section(path, name, _small(prefix, settings, results, superposition, claims))


def write_large(
    path: Path,
    out: Path,
    settings: dict[str, Any],
    superposition: "pd.DataFrame",
    table_s5: "pd.DataFrame",
    structure: "pd.DataFrame",
    claims: Sequence[Claim],
) -> None:
    """The section of `large` in `path`; its figures and recovery as CSV beside it."""
    name = f"large_{settings['variant']}" + ("_quick" if settings["quick"] else "")
    prefix = f"{path.stem}_{name}"
    _copy_figures(SHOWN_LARGE, out, path.parent, prefix)
    recovered = files.read_parquet(out / "recovery.parquet")
    columns = [column for column in recovered if column in LARGE_COLUMNS or "highest" in column]
    with files.write_aside(path.parent / f"{prefix}.csv") as fresh:
        recovered[columns].to_csv(fresh, index=False, float_format="%.5g")
    replace_section(
        path, name, _large(prefix, settings, superposition, table_s5, structure, claims)
    )


def _copy_figures(names: Sequence[str], out: Path, folder: Path, prefix: str) -> None:
    for figure in names:
        with files.write_aside(folder / f"{prefix}_{figure}.png") as fresh:
            shutil.copyfile(out / "figures" / f"{figure}.png", fresh)


def replace_section(path: Path, name: str, text: str) -> None:
    """Write a section between its two marks in `path`, at the end where there is none yet."""
    begin, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
    whole = path.read_text() if path.exists() else HEAD
    section = f"{begin}\n{text.strip()}\n{end}"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if found.search(whole):
        whole = found.sub(lambda _: section, whole)
    else:
        whole = f"{whole.rstrip()}\n\n{section}\n"
    with files.write_aside(path) as fresh:
        fresh.write_text(whole)


def markdown(table: "pd.DataFrame", form: str = "{:.3g}") -> str:
    """A Markdown table; numbers by `form`, what is missing left out."""
    import pandas as pd

    def cell(value: Any) -> str:
        if value is None or (not isinstance(value, str) and pd.isna(value)):
            return ""
        text = form.format(value) if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")  # else |r| would end a column

    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    lines = [[cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _given(settings: dict[str, Any]) -> str:
    """Settings as flags; those at False or not given left out."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False and value is not None:
            shown = ",".join(value) if isinstance(value, list) else value
            words.append(f"--{name}={shown}")
    return " ".join(words)


def _claims(claims: Sequence[Claim]) -> str:
    import pandas as pd

    table = pd.DataFrame(
        [[c.paper, c.ours, c.rule, VERDICTS[c.holds]] for c in claims],
        columns=["the paper", "ours", "rule", "verdict"],
    )
    return markdown(table)


def _small(
    prefix: str,
    settings: dict[str, Any],
    results: "pd.DataFrame",
    superposition: "pd.DataFrame",
    claims: Sequence[Claim],
) -> str:

    epochs = sorted(results["asked_epochs"].unique())
    lasted = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}, by rate"
    rule = {
        "text": "r, and latents of r ≥ .95, as in the text",
        "code": "r of largest |r|, and latents of |r| ≥ .95, as in the authors' code",
    }[settings["variant"]]
    at_rate = results[(results["learning_rate"] == 1e-4) & (results["status"] == "trained")]
    penalty = at_rate["l1_weight"].where(at_rate["type"] != "TopK", at_rate["k_percent"])
    short = at_rate.assign(penalty=penalty).groupby(["type", "penalty"], sort=False)
    columns = {
        "train_mse": "MSE", "fraction_active": "active share", "highest:X'": "r with X'",
        "latents:X'": "latents per X'", "latents_absolute:X'": "of |r|",
    }  # fmt: skip
    short = short[list(columns)].mean().reset_index().rename(columns=columns)
    diverged = int((results["status"] != "trained").sum())
    return f"""## Small simulation, settings of the {settings["variant"]}

`python -m experiments.simulation.small {_given(settings)} --workdir=DIR`: {len(results)}
configurations ({diverged} diverged), {lasted} epochs, batch 128, loss reduced by
{settings["reduction"]}. Correlations are {rule}, averaged over the variables of a group. All
configurations: [{prefix}.csv]({prefix}.csv).

### Superposition

R² of linear readouts from the latents of each autoencoder (equation 7; figure S3), exact and by
the paper's gradient descent (plain, and Adam as in the authors' code). The paper: X' is recovered
perfectly with 4 latents. Each autoencoder is the best of eight seeds; `perfect_seeds` is how many
of them reach a validation MSE below .01. In the others an output has fallen below 0 for every cell,
where its ReLU has no gradient, and stays there.

{markdown(superposition, "{:.3f}")}

### Claims of section 4.2

{_claims(claims)}

### Means over widths, learning rate 1e-4

{markdown(short)}

![loss and recovery of the three types]({prefix}_{SHOWN[0]}.png)

![latents per variable over width]({prefix}_{SHOWN[1]}.png)
"""


def _large(
    prefix: str,
    settings: dict[str, Any],
    superposition: "pd.DataFrame",
    table_s5: "pd.DataFrame",
    structure: "pd.DataFrame",
    claims: Sequence[Claim],
) -> str:
    from experiments.simulation import large_saes

    groups = ["validation_loss", "Y", *large_saes.S5_GROUPS]
    fits = superposition.groupby("name", sort=False)[groups].mean().reset_index()
    own = structure[structure["latents_of"] == "SAE"].iloc[0]
    shown = table_s5[["method", "rule", *large_saes.S5_GROUPS]].copy()
    sae = (shown["method"] == "SAE") & (shown["rule"] != "the paper")
    shown = shown.astype(dict.fromkeys(large_saes.S5_GROUPS, object))
    for group in large_saes.S5_GROUPS:
        errors = zip(
            table_s5.loc[sae, group], table_s5.loc[sae, f"sem:{group}"],
            table_s5.loc[sae, f"sem_seeds:{group}"], strict=True,
        )  # fmt: skip
        shown.loc[sae, group] = [f"{r:.2f} ± {a:.2f} (± {b:.3f})" for r, a, b in errors]
    return f"""## Large simulation, settings of the {settings["variant"]}

`python -m experiments.simulation.large {_given(settings)} --workdir=DIR`: {settings["cells"]:,}
cells of {settings["genes"]:,} genes (the paper: 100,000 of 20,000), a tenth of them held out; all
numbers are of these. At most {settings["epochs"]:,} epochs of an autoencoder and
{settings["sae_epochs"]} of a dictionary (the paper stops when 20 epochs bring nothing): Table S5,
the structure and their verdicts are of these dictionaries, whose R² and L0 tell how far they came.
The penalty is a mean over the latents, as in the authors' code, so it weighs little in a wide
dictionary. All of them: [{prefix}.csv]({prefix}.csv).

### Superposition

R² of least squares from the latents of each autoencoder, means over seeds.

{markdown(fits, "{:.3f}")}

![R² over validation loss]({prefix}_{SHOWN_LARGE[0]}.png)

![the same by latents, depth and width]({prefix}_{SHOWN_LARGE[1]}.png)

### Claims of sections 4.1, 4.3 and 6

{_claims(claims)}

### Table S5

Highest correlation of a feature with each variable, mean over variables: r; |r|; and r of the
largest |r|, as in the authors' code, where opposite signs cancel. SAEs: mean over scaling factors ±
standard error over them, as in the paper (± over seeds). Of autoencoder
{table_s5["autoencoder"].iloc[-1]}.

{markdown(shown, "{:.2f}")}

### Structure

Of one dictionary: {own["autoencoder"]}, scaling {own["scaling"]:g}, L1 weight {own["l1_weight"]:g},
learning rate {own["learning_rate"]:g}, {own["active"]:g} active latents (the paper: 150-2-wide,
100, 0.001, 1e-05, 11849); of its {own["n_latents"]:,} latents
{own["validation_l0"]:,.0f} are active in a cell, at R² {own["validation_r2"]:.4f}. `coverage`
and `median` are of X'' that some latent is matched with (`matched`); `share`: of all genes, that
the covering latents are connected to; `significant`: of the latents, by a binomial test. The
others are mean coverages where there is nothing to find: M
with its genes permuted, the activations of other cells, the dictionary before training.

{markdown(large_saes.summary(structure), "{:.2f}")}

![recovery and structure]({prefix}_{SHOWN_LARGE[2]}.png)
"""

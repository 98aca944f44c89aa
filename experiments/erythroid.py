r"""Red blood cells: the paper's story of one feature, from counts to predicted globins.

    python -m experiments.erythroid --h5ad=paul15.h5ad --workdir=runs/erythroid \
        --gene_sets=GO_Biological_Process_2021.gmt

Schuster 5.2, on other cells: mouse bone marrow (Paul 2015, GSE72857; obs paul15_clusters), for
which an scVI is trained here. Its latents (20 dimensions, negative binomial) train dictionaries of
1,000 latents, vanilla and TopK; of those with a validation L0 of at most 5 % of the latents and an
R2 of at least .9, the one of the highest R2 is taken, before any gene is looked at. The feature is
found by the rule of A.3.2 along 7MEP -> 1Ery, named by gene sets (high against silent cells), and
raised to its maximum in the MEP cells: does the decoder predict Klf1 and the globins to rise, and
more than with random features that move the cells as far?

Gene sets are of human symbols, the cells of mouse ones: these are upper-cased. Most orthologues
have the same name so, the globins have not (Hba-a2 is human HBA2); coverage is printed. Only 3,451
genes are measured, a quarter of the paper's 13,431: sets of 5 genes count, not of 20.

About 5 minutes on two cores.
"""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import sae_jax
from analysis import cells, gene_sets, lens, report
from experiments import cli, folders, perturbation, scvi_model, steering, steering_page
from experiments.perturbation import Design, Subject
from sae_jax import InputError, data, files

FLAGS = flags.FLAGS

SETTINGS = "erythroid.json"
FILES = {
    "report.html": "the story",
    "story.csv": "genes asked for: predicted before and after, beside random features",
    "terms.csv": "the best gene sets of each feature that was steered",
    "configurations.csv": "the dictionaries trained, L0 and R2; which was taken",
    "steering": "what `sae-jax steer` leaves, with its own report.html",
    "scvi": "the model, as scvi-tools saves it",
    "dictionary": "cfg.json, sae_weights.safetensors",
    "manifest.json": "size and SHA-256 of every file",
}
STAGES = ["7MEP", "6Ery", "5Ery", "4Ery", "3Ery", "2Ery", "1Ery"]
GENES = ["Klf1", "Hba-a2", "Hbb-b1", "Alas2", "Gata1", "Epor"]
MOST_L0, LEAST_R2 = 0.05, 0.9


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("h5ad", None, "AnnData file with counts in X.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_bool("resume", False, "Continue an earlier run in --workdir.")
    flags.DEFINE_string("label", "paul15_clusters", "Column of obs with the cells' types.")
    flags.DEFINE_list("stages", STAGES, "Types in order; the first is steered.")
    flags.DEFINE_list("genes", GENES, "Genes to follow.")
    flags.DEFINE_string("gene_sets", "GO_Biological_Process_2021", "GMT file or online library.")
    flags.DEFINE_integer("min_size", 5, "Smallest set in measured genes.", lower_bound=1)
    flags.DEFINE_integer("controls", 200, "Random features beside each one steered.", 1)
    flags.DEFINE_integer("seed", 0, "Of everything drawn at random.", 0, 2**31 - 2)
    flags.DEFINE_bool("quick", False, "Few epochs, to see it run; what it finds means nothing.")


def main() -> None:
    """Runs the study by its flags."""
    # 1. Refuse what is wrong before anything is written.
    out = folders.check_workdir(SETTINGS)
    scvi_model.check_installed()
    if not FLAGS.h5ad:
        raise InputError("--h5ad is needed: Paul et al. 2015, GSE72857, with paul15_clusters")
    adata, labels, expression, sets = read()
    asked = steering.check_genes(FLAGS.genes, expression.genes.tolist())
    settings = {flag.name: flag.value for flag in FLAGS.get_flags_for_module(
        FLAGS.find_module_defining_flag("quick"))}  # fmt: skip
    settings |= {"contents": folders.contents([FLAGS.h5ad, FLAGS.gene_sets])}
    with folders.filled(out, SETTINGS, settings, FILES):
        # 2. A model of the cells, a dictionary of its latents.
        model = scvi_model.trained(
            adata, out / "scvi", seed=FLAGS.seed, epochs=5 if FLAGS.quick else 120
        )
        x = model.embed(adata)["latent"]
        dictionary = trained_dictionary(x, out)
        z = dictionary.encode(x, sparse=True)

        # 3. The features that rise along the stages, their terms, and what steering them predicts.
        subject = Subject(
            dictionary=dictionary, model=model, x=x, labels=labels, sets=sets,
            names=adata.obs_names.to_numpy(str), genes=model.genes,
            library=np.asarray(adata.X.sum(axis=1, dtype=np.float64)).ravel(),
        )  # fmt: skip
        design = Design(
            stages=tuple(FLAGS.stages), cells=tuple(FLAGS.stages[:1]), direction="up",
            controls=FLAGS.controls, seed=FLAGS.seed,
        )  # fmt: skip
        ranked = perturbation.candidates(subject, z, design)
        terms = name(z, ranked, expression, sets)
        fit = steering.agreement(subject, expression, subject.rows(design.cells[0]))
        steered = out / "steering"
        steered.mkdir(exist_ok=True)
        about = [fit, str(sets.coverage)]
        changes = steering.run(subject, design, z, ranked, asked, steered, about)
        told = story(changes, files.read_parquet(steered / "controls.parquet"), asked)
        for file, table in {"terms": terms, "story": told}.items():
            with files.write_aside(out / f"{file}.csv") as fresh:
                table.to_csv(fresh, index=False)
        write_page(out, ranked, terms, told, about, len(labels))
    print(f"\n{out}/")
    for file, what in FILES.items():
        print(f"  {file:<19} {what}")
    print(f"\n{told.to_string(index=False, float_format='{:.3g}'.format)}")


def read() -> tuple[anndata.AnnData, pd.Series, cells.Expression, gene_sets.GeneSets]:
    """Counts of the genes that any cell has, labels, log expression, and sets over these genes."""
    adata = cells.read(FLAGS.h5ad)
    labels = cells.labels(adata, FLAGS.label)
    if missing := [stage for stage in FLAGS.stages if stage not in set(labels.cat.categories)]:
        raise InputError(f"--stages: obs[{FLAGS.label!r}] has no {', '.join(missing)}")
    # Of two genes that are one when upper-cased, the more expressed stands for both.
    totals = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
    human = adata.var_names.str.upper()
    most = np.argsort(-totals, kind="stable")
    keep = np.sort(most[~human[most].duplicated()])
    if len(keep) < len(human):
        left_out = adata.var_names[np.setdiff1d(np.arange(len(human)), keep)]
        logging.info("upper-cased as another gene and left out: %s", ", ".join(left_out))
    adata = adata[:, keep].copy()
    expression = cells.expression(adata, "X", "counts")
    counts = sparse.csr_matrix(adata[:, expression.genes].X, dtype=np.float32)
    if bad := int((counts.sum(axis=1) == 0).sum()):
        raise InputError(f"{bad} cells have no counts: leave them out")
    adata = anndata.AnnData(counts, obs=adata.obs, var=pd.DataFrame(index=expression.genes))
    upper = [gene.upper() for gene in expression.genes]
    sets = gene_sets.load(FLAGS.gene_sets, upper, FLAGS.min_size, 500)
    logging.info("%d cells, %d genes, upper-cased: %s", *adata.shape, sets.coverage)
    return adata, labels, expression, sets


def trained_dictionary(x: np.ndarray, out: Path) -> sae_jax.Dictionary:
    """The dictionary that the rule of this module chooses, in `out`/dictionary once it is."""
    if (out / "dictionary").exists():
        return sae_jax.Dictionary.load(out / "dictionary")
    shared = {
        "d_in": x.shape[1], "n_latents": 100 if FLAGS.quick else 1000, "learning_rate": 1e-3,
        "batch_size": 128, "input_normalization": "scalar", "seed": FLAGS.seed,
    }  # fmt: skip
    configs = sae_jax.grid("vanilla", l1_weight=[1e-1, 3e-2, 1e-2, 3e-3, 1e-3], **shared)
    if not FLAGS.quick:
        configs += sae_jax.grid("topk_schuster", k_percent=[1, 2, 5], **shared)
    train, validation = data.split(len(x), 0.1, FLAGS.seed)
    run = sae_jax.train(
        configs, x[train], x[validation], epochs=20 if FLAGS.quick else 200, data_seed=FLAGS.seed
    )
    columns = ["name", "l1_weight", "k", "n_latents", "status", "validation_l0", "validation_r2",
               "validation_dead"]  # fmt: skip
    table = run.results[[column for column in columns if column in run.results]].copy()
    known = table[table["status"] == "trained"]
    if known.empty:
        raise InputError("every dictionary diverged")
    sparse_enough = known["validation_l0"] <= MOST_L0 * known["n_latents"]
    admissible = known[sparse_enough & (known["validation_r2"] >= LEAST_R2)]
    if admissible.empty:
        logging.warning("no dictionary has L0 <= %g and R2 >= %g", MOST_L0, LEAST_R2)
        admissible = known[sparse_enough] if sparse_enough.any() else known
    best = int(admissible["validation_r2"].idxmax())
    table["taken"] = table.index == best
    with files.write_aside(out / "configurations.csv") as fresh:
        table.to_csv(fresh, index=False)
    run.dictionaries[best].save(out / "dictionary")
    return run.dictionaries[best]


def name(
    z: sparse.csr_matrix, ranked: pd.DataFrame, expression: cells.Expression,
    sets: gene_sets.GeneSets,
) -> pd.DataFrame:  # fmt: skip
    """The best gene sets that are up in each steered feature's high cells (above the 95th
    percentile, as in the paper's manual analysis) against its silent ones, by three tests."""
    live = np.flatnonzero(z.getnnz(axis=0))
    found, _ = lens.annotate(
        z[:, live], expression, sets, lens.Rule(percentile=95, direction="up"), seed=FLAGS.seed,
        null_features=30 if FLAGS.quick else 300,
    )  # fmt: skip
    tables = []
    for test in ("change", "matched", "calibrated"):
        best = found.best(test=test)
        best = best.assign(feature=live[best["feature"]], test=test)
        tables.append(best[(best["side"] == "up") & (best["rank"] < 8)])
    steered = ranked.loc[ranked["steered"], "feature"]
    return pd.concat(tables).set_index("feature").loc[steered].reset_index()


def story(changes: pd.DataFrame, others: pd.DataFrame, asked: list[str]) -> pd.DataFrame:
    """Genes asked for, one row per feature and gene, and a row for their mean log2 fold change;
    control_p of all is the share of controls that change at least as far the same way."""
    columns = ["cells", "feature", "gene", "before", "after", "log2_fold_change", "share_up",
               "control_median", "control_p"]  # fmt: skip
    rows = []
    for (label, feature), part in changes[changes["gene"].isin(asked)].groupby(
        ["cells", "feature"], sort=False
    ):
        rows.append(part[columns].set_index("gene").loc[asked].reset_index()[columns])
        drawn = steering_page.of(others, label, feature)
        drawn = drawn.groupby("control")["log2_fold_change"].mean()
        mean = part["log2_fold_change"].mean()
        beyond = drawn >= mean if mean > 0 else drawn <= mean
        rows.append(
            pd.DataFrame(
                {
                    "cells": [label], "feature": feature, "gene": "mean of these",
                    "log2_fold_change": mean, "control_median": drawn.median(),
                    "control_p": (1 + beyond.sum()) / (1 + len(drawn)),
                }
            )
        )  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def write_page(
    out: Path, ranked: pd.DataFrame, terms: pd.DataFrame, told: pd.DataFrame, about: list[str],
    n_cells: int,
) -> None:  # fmt: skip
    """The story on one page."""
    best = int(ranked.loc[ranked["steered"], "feature"].iloc[0])
    way = " -> ".join(FLAGS.stages)
    drawn = out / "steering" / "figures"
    shown = ranked[[*ranked.columns[:3], "progress", "lineage", "elsewhere",
                    *(c for c in ranked if c.startswith("mean ") )]].head(12)  # fmt: skip
    columns = ["feature", "test", "term", "size", "hits", "auc", "log10_p", "log10_q"]
    lines = [
        f"{n_cells} cells; an scVI of 20 latents trained here",
        f"features that rise along {way} and are higher there: {int(ranked['passes'].sum())}",
        f"feature {best} moves {FLAGS.stages[0]} cells farthest towards {FLAGS.stages[-1]}",
        *about,
    ]
    sections = [
        ("In short", [report.items(lines), report.table(told)]),
        (
            "Features that rise",
            [
                report.table(shown),
                report.picture(drawn / "candidates.png", "Activations, cells by type.", "45%"),
            ],
        ),
        (
            "What they are",
            [
                report.paragraph(
                    "Gene sets that are up in the feature's high cells (above the 95th percentile) "
                    "against its silent ones. matched: the genes that differ, against genes of "
                    "like expression. calibrated: all genes ranked, against permuted features."
                ),
                report.table(terms[columns]),
            ],
        ),
        (
            "What steering predicts",
            [
                report.picture(drawn / "steered.png", f"{FLAGS.stages[0]} cells steered.", "60%"),
                report.picture(drawn / "genes.png", "Blue: the feature; grey: random ones.", "70%"),
                *(report.paragraph(text) for text in steering_page.READING),
            ],
        ),
        ("Dictionaries", [report.table(pd.read_csv(out / "configurations.csv"))]),
    ]
    report.write(out / "report.html", "Red blood cells", sections)


if __name__ == "__main__":
    cli.launch(main, define_flags)

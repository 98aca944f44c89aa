r"""The main job: cells and an embedding in; a dictionary with named features out.

    python -m experiments.quickstart --workdir=runs/demo          (or: sae-jax quickstart ...)
    python -m experiments.quickstart --h5ad=cells.h5ad --embedding=X_scvi --label=cell_type \
        --expression=X --expression_is=counts --gene_sets=GO_Biological_Process_2021.gmt \
        --workdir=runs/mine

Sweeps 28 configurations (vanilla, bricken and topk_schuster, their penalties, two seeds) in three
compiled programs, chooses one, and names its features. The first command takes about a minute on
two cores and needs no network: its cells are the 700 PBMC that ship with scanpy.

The rule of choice. Admissible are configurations with a validation L0 of at most --max_l0_percent
of the latents and a validation R² of at least --min_r2 (the second condition is dropped, and said
to be, if none meets both). With --label, their best features are scored by how well they tell the
labels apart (mean over labels of the best AUROC) on one half of the cells, and the configuration of
highest validation R² within 0.01 of the best score is taken. Without labels, it is the one of
highest validation R². labels.csv is measured on the other half: cells that chose neither the
configuration nor the feature, though most of them were among those that it was trained on, without
their labels. The penalties are in units of embeddings scaled to a mean square of 1 (`scalar`).

The rule of names. A term names a feature by the lens's test `matched` alone: the genes that are up
in the feature's high cells hold more of the term's genes than genes of like expression would. Genes
are up at q < 0.01, so that a permuted feature has few; of such features of three data sets
`matched` names at most 0.7 %. The lens's second condition, that a term moves further than in
permuted features, is for its wider choice of genes: here it would cost 1 to 14 % of the names.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import sae_jax
from analysis import cells, features, gene_sets, lens, nulls, plots, stability
from experiments import cli, folders, quickstart_page, run_folder, verify
from experiments import inputs as reading
from experiments.inputs import Inputs
from sae_jax import InputError, data, files
from sae_jax.errors import counted

FLAGS = flags.FLAGS

L1_WEIGHTS = [0.5, 0.75, 1.0, 1.5, 2.0]
K_PERCENTS = [1, 2, 5, 10]
VALIDATION_SHARE = 0.1
AUROC_MARGIN = 0.01
SEEDS = 2**31 - 2
NULL_FEATURES = 500  # features, drawn at random, that the nulls are run on
SETTINGS = "quickstart.json"  # written first: it tells a folder of ours from anybody's
OUTPUTS = (
    "manifest.json", "configs.json", "results.parquet", "history.parquet", "dictionaries",
    "choice.json", "features.h5ad", "enrichment.parquet", "labels.csv", "figures", "report.html",
)  # fmt: skip


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    reading.define_flags()
    flags.DEFINE_string(
        "sweep", None, "Folder of a finished `sae-jax sweep` to choose from, instead of training."
    )
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_bool(
        "resume", False, "Continue an earlier run in --workdir, of the same settings."
    )
    flags.DEFINE_integer(
        "n_latents", None, "Latents; default: ten times the embedding's dimensions.", lower_bound=1
    )
    flags.DEFINE_integer("batch_size", 128, "Cells a step.", lower_bound=1)
    flags.DEFINE_integer("steps", 3000, "Steps of each configuration, at least.", 1)
    flags.DEFINE_integer("seeds", 2, "Initialisations of each setting.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Of the splits of the cells and of the order of training.", 0, SEEDS
    )
    flags.DEFINE_float(
        "max_l0_percent", 10.0, "Most active latents a cell, of all latents.", 0, 100
    )
    flags.DEFINE_float("min_r2", 0.8, "Least validation R².")
    flags.DEFINE_float("high_percentile", 90.0, "A cell above it is high, of all cells.", 0, 99.99)


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    out = check_workdir()
    inputs = reading.read("workdir", gene_sets.MIN_UNIVERSE)
    halves = label_halves(inputs)
    if FLAGS.sweep:
        run, train = read_sweep(inputs.embedding)
    else:
        train, validation = split_cells(len(inputs.embedding))
        configs = sweep_configs(inputs.embedding.shape[1])
    with folders.filled(out, SETTINGS, inputs.settings, OUTPUTS):
        # 2. Train all configurations, choose one.
        if not FLAGS.sweep:
            run = train_sweep(configs, inputs, train, validation, out)
        member, reason = choose(run, inputs, halves[0])
        logging.info("chosen: member %d, %s", member, reason)
        folder = f"dictionaries/{member:04d}"
        if FLAGS.sweep:
            folder = str(Path(FLAGS.sweep) / folder)
        files.write_json(
            out / "choice.json", {"member": member, "folder": folder, "reason": reason}
        )

        # 3. Name its features, and count what the same pipeline names by chance.
        z = run.dictionaries[member].encode(inputs.embedding, sparse=True)
        # What fires on held-out cells alone is noise.
        live = np.flatnonzero(z[train].getnnz(axis=0))
        z = z[:, live]
        some, sets = counted(len(live), "live feature"), counted(len(inputs.sets.names), "gene set")
        logging.info("naming %s by %s", some, sets)
        found = annotate(z, inputs.expression, inputs.sets)
        rates = null_rates(z, inputs)

        # 4. Write tables, figures and the page.
        table = features_table(z, live, found, inputs.labels)
        coordinates, axis = plots.plane(inputs.embedding)
        testable = int(found.testable().sum())
        named = int((table["top_terms"] != "").sum())
        about = run_folder.about(
            "quickstart", run.dictionaries[member], inputs.embedding,
            embedding=FLAGS.embedding or "PCA", n_live=len(live), n_testable=testable,
            n_named=named, share_named=named / testable if testable else None,
            named_by="a term of q < .05 by the test `matched`, of the testable features",
        )  # fmt: skip
        maps = {"X_umap" if axis == "UMAP" else "X_pca": coordinates}
        adata = run_folder.write_features(
            out / "features.h5ad", "quickstart", z, inputs.obs, table,
            decoder=stability.directions(run.dictionaries[member])[live],
            maps=maps | run_folder.input_maps(inputs.settings["h5ad"], inputs.obs.index),
            about=about, settings={**inputs.settings, "member": member, "folder": folder},
        )  # fmt: skip
        lens.write(found, table.index.to_numpy(), out / "enrichment.parquet")
        best = None if inputs.labels is None else label_table(z, inputs, halves, table)
        if best is not None:
            with files.write_aside(out / "labels.csv") as fresh:
                best.to_csv(fresh, index=False)
        quickstart_page.write(
            out,
            quickstart_page.Findings(
                results=run.results,
                member=member,
                reason=reason,
                limits=(FLAGS.max_l0_percent / 100, FLAGS.min_r2),
                adata=adata,
                axis=axis,
                labels=inputs.labels,
                best=best,
                coverage=inputs.sets.coverage,
                universe=len(inputs.expression.genes),
                found=found,
                null_rates=rates,
                settings=inputs.settings,
            ),
        )

    # 5. Say where everything lies.
    print(f"\n{out}/")
    for name, what in quickstart_page.FILES.items():
        if (out / name).exists():
            print(f"  {name:<20} {what}")
    print("\nbest-named features")
    for line in quickstart_page.top_lines(table):
        print(f"  {line}")


def check_workdir() -> Path:
    """The folder to fill, and numbers that are none refused."""
    for name in ("max_l0_percent", "min_r2", "high_percentile"):
        if not math.isfinite(FLAGS[name].value):
            raise InputError(f"--{name}={FLAGS[name].value} must be a finite number")
    return folders.check_workdir(SETTINGS)


def split_cells(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and validation cells; refuses fewer than a batch."""
    train, validation = data.split(count, VALIDATION_SHARE, FLAGS.seed)
    if len(train) < FLAGS.batch_size or len(validation) < 2:
        raise InputError(
            f"{count} cells leave {len(train)} for training and {len(validation)} for validation: "
            f"fewer than a batch of {FLAGS.batch_size} (--batch_size) or than 2"
        )
    return train, validation


def label_halves(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Cells that choose, and cells that measure; both need two labels, if labels are looked at."""
    halves = data.split(len(inputs.embedding), 0.5, FLAGS.seed + 1)
    for half in halves:
        if inputs.labels is not None and inputs.labels.iloc[half].nunique() < 2:
            raise InputError(
                f"obs[{inputs.labels.name!r}] has one label only in a random half of the cells: "
                "too few cells carry the others to measure anything (leave --label out)"
            )
    return halves


def sweep_configs(d_in: int) -> list[sae_jax.SAEConfig]:
    """The configurations, on embeddings scaled by one factor so that penalties carry over."""
    shared = {
        "d_in": d_in,
        "n_latents": FLAGS.n_latents or 10 * d_in,
        "input_normalization": "scalar",
        "learning_rate": 1e-3,
        "batch_size": FLAGS.batch_size,
        "seed": list(range(FLAGS.seeds)),
    }
    return [
        *sae_jax.grid("vanilla", l1_weight=L1_WEIGHTS, **shared),
        *sae_jax.grid("bricken", l1_weight=L1_WEIGHTS, **shared),
        *sae_jax.grid("topk_schuster", k_percent=K_PERCENTS, **shared),
    ]


def train_sweep(
    configs: list[sae_jax.SAEConfig],
    inputs: Inputs,
    train: np.ndarray,
    validation: np.ndarray,
    out: Path,
) -> sae_jax.Run:
    """All configurations, on the cells at the positions `train`."""
    began = time.perf_counter()
    run = sae_jax.train(
        configs,
        inputs.embedding[train],
        inputs.embedding[validation],
        epochs=math.ceil(FLAGS.steps / (len(train) // FLAGS.batch_size)),
        workdir=out,
        data_seed=FLAGS.seed,
        provenance={
            "h5ad": inputs.settings["h5ad"],
            "embedding": FLAGS.embedding or f"PCA {inputs.embedding.shape[1]}",
        },
    )
    logging.info("trained %d configurations in %.0f s", len(configs), time.perf_counter() - began)
    return run


def read_sweep(embedding: np.ndarray) -> tuple[sae_jax.Run, np.ndarray]:
    """A finished sweep, and the positions of the cells that it was trained on."""
    verify.inputs(FLAGS.sweep)
    run = sae_jax.Run.load(FLAGS.sweep)
    trained = [dictionary for dictionary in run.dictionaries if dictionary is not None]
    if not trained or "validation_r2" not in run.results:
        raise InputError(f"{FLAGS.sweep} has no trained dictionaries with validation rows")
    about, widths = trained[0].provenance, {dictionary.config.d_in for dictionary in trained}
    if widths != {embedding.shape[1]}:
        raise InputError(
            f"{FLAGS.sweep} was trained on {sorted(widths)} dimensions, the embedding has "
            f"{embedding.shape[1]}"
        )
    if "validation_share" not in about:  # split by a column of obs, say
        return run, np.arange(len(embedding))
    train, _ = data.split(len(embedding), about["validation_share"], about["data_seed"])
    if about["train"] != data.fingerprint(np.ascontiguousarray(embedding[train])):
        raise InputError(f"{FLAGS.sweep} was trained on other rows than --embedding names")
    return run, train


def choose(run: sae_jax.Run, inputs: Inputs, half: np.ndarray) -> tuple[int, str]:
    """The member to look at, and why, by the rule in this module's docstring."""
    trained = run.results[run.results["status"] == "trained"]
    if trained.empty:
        raise InputError("every configuration diverged: is the embedding on a sane scale?")
    l0_share, r2 = trained["validation_l0"] / trained["n_latents"], trained["validation_r2"]
    sparse_enough = l0_share <= FLAGS.max_l0_percent / 100
    if not sparse_enough.any():
        member = l0_share.idxmin()
        return int(member), f"the sparsest: none has L0 <= {FLAGS.max_l0_percent:g} %"
    limits = f"L0 <= {FLAGS.max_l0_percent:g} %"
    if (sparse_enough & (r2 >= FLAGS.min_r2)).any():
        admissible = trained.index[sparse_enough & (r2 >= FLAGS.min_r2)]
        limits += f" and R2 >= {FLAGS.min_r2:g}"
    else:
        admissible = trained.index[sparse_enough]
        limits += f" (none of them has R2 >= {FLAGS.min_r2:g})"
        logging.warning("no configuration with %s", limits)
    if inputs.labels is None:
        member = r2[admissible].idxmax()
        return int(member), f"highest validation R2 of {len(admissible)} with {limits}"
    x, labels = inputs.embedding[half], inputs.labels.iloc[half]
    means = pd.Series(
        {
            member: features.auroc(run.dictionaries[member].encode(x, sparse=True), labels)[1]
            .max(axis=0)
            .mean()
            for member in admissible
        }
    )
    member = r2[means.index[means >= means.max() - AUROC_MARGIN]].idxmax()
    return int(member), (
        f"mean best AUROC {means[member]:.3f} over the labels on half of the cells, of "
        f"{len(admissible)} with {limits}; highest R2 within {AUROC_MARGIN:g} of the best"
    )


def annotate(
    z: sparse.csr_matrix, expression: cells.Expression, sets: gene_sets.GeneSets
) -> lens.Lens:
    """Every feature against every gene set, by a rule for hundreds of cells and up: what is up is
    up clearly (no second stage), and a few dozen cells are high of some hundreds."""
    rule = lens.Rule(
        percentile=FLAGS.high_percentile, gene_q=0.01, fold_change=1.5, fallback_p=None,
        direction="up", pseudocount=0.1, naming=("matched",),
    )  # fmt: skip
    found, _ = lens.annotate(
        z, expression, sets, rule, null_features=0, top_genes=10, progress=False
    )
    return found


def null_rates(z: sparse.csr_matrix, inputs: Inputs) -> dict[str, dict[str, float]]:
    """Share of features that each test names when cells, or genes, mean nothing."""
    rng = np.random.default_rng(FLAGS.seed)
    some = np.sort(rng.permutation(z.shape[1])[:NULL_FEATURES])
    z, expression = z[:, some], inputs.expression
    means = np.asarray(expression.x.mean(axis=0)).ravel()
    shuffled = nulls.permuted_cells(z, FLAGS.seed)
    relabelled = nulls.relabelled_genes(inputs.sets, means, FLAGS.seed)
    found = {
        "cells permuted": annotate(shuffled, expression, inputs.sets),
        "genes relabelled": annotate(z, expression, relabelled),
    }
    return {
        name: {test: null.share_named(test) for test in null.log_p} for name, null in found.items()
    }


def features_table(
    z: sparse.csr_matrix, live: np.ndarray, found: lens.Lens, labels: pd.Series | None
) -> pd.DataFrame:
    """One row a live feature, as var of features.h5ad; a slash in a label becomes a bar there."""
    table = features.activity(z).set_index(pd.Index(lens.feature_names(live)))
    table.insert(0, "latent", live)
    table["best_label"] = _text([None] * len(live))
    if labels is not None:
        names, areas = features.auroc(z, labels)
        for name, column in zip(names, areas.T, strict=True):
            table[quickstart_page.auroc_column(name)] = column
        table["best_label"] = _text(names[areas.argmax(axis=1)])
        table["best_label_auroc"] = areas.max(axis=1)
    terms, fisher = (found.best(3, test).query("named") for test in (None, "fisher"))
    best = terms.drop_duplicates("feature").set_index("feature").reindex(range(len(live)))
    table["best_term"] = _text([None if pd.isna(term) else term for term in best["term"]])
    table["best_term_q"] = 10 ** -best["log10_q"].to_numpy(np.float64)
    table["top_terms"] = _joined(terms, "term", "; ", len(live))
    table["fisher_terms"] = _joined(fisher, "term", "; ", len(live))
    table["top_genes"] = _joined(found.top, "gene", ", ", len(live))
    return table


def _joined(rows: pd.DataFrame, column: str, between: str, count: int) -> list[str]:
    """The column's values of each of so many features, in the order of the rows."""
    lists = rows.groupby("feature", sort=False)[column].agg(list)
    return [between.join(lists.get(feature, ())) for feature in range(count)]


def _text(values: Sequence[str | None]) -> pd.Categorical:
    """Text with gaps, in the form that anndata writes even where all are gaps."""
    known = pd.Index(sorted({value for value in values if value is not None}), dtype=object)
    return pd.Categorical(values, categories=known)


def label_table(
    z: sparse.csr_matrix,
    inputs: Inputs,
    halves: tuple[np.ndarray, np.ndarray],
    table: pd.DataFrame,
) -> pd.DataFrame:
    """The best feature of every label on held-out cells, with its name, its genes and its terms."""
    best = features.best_for_labels(z, inputs.embedding, inputs.labels, *halves)
    chosen = table.iloc[best["feature"]]
    best["feature"] = chosen.index
    for column in ("best_term", "best_term_q", "top_terms", "fisher_terms", "top_genes"):
        best[column] = chosen[column].to_numpy(dtype=object)
    return best


if __name__ == "__main__":
    cli.launch(main, define_flags)

r"""Concepts of a single-cell model: dictionaries, attributed genes, terms, stability, usefulness.

    sae-jax concepts --h5ad=kang.h5ad --labels=condition --n_latents=24 \
        --k_share=0.5 --gene_sets=ReactomePathways.gmt --workdir=runs/kang
    sae-jax concepts --h5ad=cells.h5ad --labels=cell_type --model=scgpt \
        --checkpoint=scGPT_human --n_latents=1000,2000,5000 --workdir=runs/scgpt

Claye et al., whole. Cells are embedded by --model: a checkpoint of `extract`, or an scVI trained
here where none is given. TopK dictionaries of every --n_latents (k = .016 c, as in the paper, or
another --k_share) and seed are trained together on nine tenths of the cells; one width is studied.
For its concepts, and for neurons (the embedding's dimensions, either side of the median) by the
same functions: labels of the cells, genes by counterfactual attribution, GSEA of these genes.
Further: GSEA of differential expression and Table 6, deletion curves, replication over seeds, what
logistic regression learns from concepts and from neurons, semi-NMF and other methods, causal tests
in the model. A gene drives a concept by what it has or by what it lacks in the prototypes: the
concept of unstimulated cells falls when ISG15 rises.

Each stage leaves its files and is not done again with --resume. Kang's 2,000 cells of 9,015 genes:
about 10 minutes on two cores. It must show: a concept that tells stimulated from control cells
(AUROC > .9), interferon genes among those attributed to it and interferon response among its terms;
a deletion curve below those of differential expression and of random genes. A concept that is
active in 1.6 % of the cells cannot tell half of them, hence the few and dense ones.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from absl import flags, logging

import extract
import sae_jax
from analysis import cells, concept_terms, probes
from analysis.neurons import Neurons
from experiments import cli, folders, scvi_model
from experiments import concepts_study as study
from experiments import inputs as reading
from experiments.concepts_study import Subject
from sae_jax import InputError, data, files, workdir

FLAGS = flags.FLAGS

SETTINGS = "concepts.json"
FILES = {
    "report.html": "the page: everything below, to look at",
    "table_3.csv": "every dictionary: c, k, seed, R2, L0, active concepts",
    "features.parquet": "one row per live concept studied, and per neuron: cells, genes, terms",
    "attribution.parquet": "gene by gene what each feature's activation owes to it",
    "dge.parquet": "differential expression of the same features and genes",
    "gsea_attribution.parquet": "feature x term: ES, NES, p, q of the attributed genes",
    "gsea_dge.parquet": "the same of fold changes",
    "strengths.csv": "strong, weak and no annotation: concepts and neurons",
    "table_6.csv": "attribution-GSEA and DGE-GSEA compared",
    "deletion.parquet": "activation left as genes are exchanged, by order of the genes",
    "stability.parquet": "one row a concept of each seed: replication by direction, by activation",
    "methods.csv": "concepts, neurons and other methods: R2, L0, accuracy (Tables 4, 5)",
    "coefficients.csv": "the concepts that speak most for each class, with their genes",
    "causal.parquet": "ablated concepts beside random directions",
    "fidelity.parquet": "what survives a spliced reconstruction",
    "figures": "PNG and PDF",
    "sweep": "the dictionaries, a folder of sae_jax.train",
    "scvi": "the model trained here, as scvi-tools saves it",
}
KEPT = ("embedding.npy", "attribution")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("h5ad", None, "AnnData file of the cells; the model's counts are in it.")
    flags.DEFINE_string("counts", None, "Layer with the counts, or raw; default: X.")
    flags.DEFINE_string("gene_symbols", None, "Column of var with symbols; default: the var names.")
    flags.DEFINE_list("labels", None, "Columns of obs that describe cells; the first is learned.")
    flags.DEFINE_enum("model", "scvi", ["scvi", "scgpt", "geneformer"], "Whose embedding.")
    flags.DEFINE_string("checkpoint", None, "Its folder; without one an scVI is trained here.")
    flags.DEFINE_string("dictionaries", None, "Geneformer's token and gene dictionaries: a folder.")
    flags.DEFINE_string("layer", None, "Of the model; default: what its authors export.")
    flags.DEFINE_integer("d_model", 20, "Dimensions of an scVI trained here.", 2)
    flags.DEFINE_integer("model_epochs", 200, "Of an scVI trained here.", 1)
    flags.DEFINE_list("n_latents", ["100", "200", "500"], "Concepts of the dictionaries.")
    flags.DEFINE_float("k_share", 0.016, "Active concepts of a cell, of all (k of TopK).", 0, 1)
    flags.DEFINE_integer("studied", None, "Which of these; default: nearest to ten times d.", 1)
    flags.DEFINE_list("seeds", ["0", "42", "9307"], "Of the dictionaries; the first is studied.")
    flags.DEFINE_integer("epochs", 300, "Of the dictionaries.", 1)
    flags.DEFINE_float("learning_rate", 1e-3, "Of the dictionaries.")
    flags.DEFINE_integer("most", 100, "Concepts, and neurons, that are attributed, at most.", 1)
    flags.DEFINE_integer("prototypes", 10, "Top cells of a concept whose genes are exchanged.", 1)
    flags.DEFINE_integer("counterfactuals", 3, "Nearest silent cells of each.", 1)
    flags.DEFINE_integer("permutations", 1000, "Random sets of each size in GSEA.", 30)
    flags.DEFINE_list("per_class", ["6000", "2000"], "Cells a class to learn from, to be tested.")
    flags.DEFINE_integer("causal", 5, "Concepts that are ablated in the model.", 1)
    flags.DEFINE_list("follow", [], "Genes to look for among those attributed.")
    flags.DEFINE_integer("seed", 0, "Of everything else drawn at random.", 0, 2**31 - 2)
    flags.DEFINE_bool("quick", False, "Small dictionaries, few epochs: to see it run.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_bool("resume", False, "Continue an earlier run in --workdir.")
    reading.define_set_flags()


def main() -> None:
    """Runs the study by its flags."""
    # 1. Refuse what is wrong before anything is written.
    out = folders.check_workdir(SETTINGS)
    take_quick_settings()
    widths, seeds = whole_numbers("n_latents"), whole_numbers("seeds", least=0)
    per_class = whole_numbers("per_class")
    if len(per_class) != 2:
        raise InputError(f"--per_class={','.join(FLAGS.per_class)} must be two numbers of cells")
    if FLAGS.studied is not None and FLAGS.studied not in widths:
        asked = ",".join(map(str, widths))
        raise InputError(f"--studied={FLAGS.studied} must be one of --n_latents={asked}")
    if FLAGS.checkpoint is None:
        if FLAGS.model != "scvi":
            raise InputError(f"--checkpoint is needed: the folder of the {FLAGS.model}")
        scvi_model.check_installed()
        if FLAGS.counts is not None:
            raise InputError("an scVI is trained on X: leave --counts out, or give a --checkpoint")
    adata, labels, symbols = read()
    reading.load_sets(list(dict.fromkeys(symbols.values())), 100)
    probes.split(labels.iloc[:, 0], *per_class, seed=FLAGS.seed)
    loaded = None if FLAGS.checkpoint is None else loaded_model()
    settings = settings_of_flags()
    with workdir.locked(out):
        folders.claim(out, SETTINGS, settings, (*FILES, *KEPT), ("follow",))

        # 2. The model and its embedding; dictionaries of it.
        subject = embedded(adata, labels, symbols, loaded, out)
        chosen = study.configs(
            subject.x.shape[1], widths, seeds, round(len(subject.x) * (1 - study.VALIDATION)),
            FLAGS.learning_rate, FLAGS.k_share,
        )  # fmt: skip
        run, train, held_out = study.trained(
            subject.x, chosen, FLAGS.epochs, FLAGS.seed, out / "sweep"
        )
        write_csv(study.table_3(run), out / "table_3.csv")
        members = members_studied(run.results, subject.x.shape[1], widths)

        # 3. Concepts and neurons, one by one, and as a set.
        found = explain(subject, run, members, train, out)
        learned = learn(
            subject, run.dictionaries[members[0]], found, train, held_out, per_class, out
        )
        tested = test_in_model(subject, run.dictionaries[members[0]], found, out)

        # 4. The figures and the page.
        from experiments import concepts_page

        concepts_page.write(out, subject, run, members, found, learned, tested, settings)
    print(f"\n{out}/")
    for name, what in FILES.items():
        if (out / name).exists():
            print(f"  {name:<26} {what}")
    print()
    for line in concepts_page.told(found, learned, FLAGS.follow):
        print(line)


def take_quick_settings() -> None:
    """Those of --quick, where nothing else was asked for."""
    quick = {
        "n_latents": ["40"], "seeds": ["0", "1"], "epochs": 20, "model_epochs": 5, "most": 6,
        "permutations": 100, "causal": 2,
    }  # fmt: skip
    for name, value in quick.items():
        if FLAGS.quick and not FLAGS[name].present:
            FLAGS[name].value = value


def whole_numbers(flag: str, least: int = 1) -> list[int]:
    """The distinct whole numbers of a flag, in its order."""
    given = FLAGS[flag].value or []
    if not given or not all(text.strip().isdigit() and int(text) >= least for text in given):
        raise InputError(f"--{flag}={','.join(given)} must be whole numbers, at least {least}")
    return list(dict.fromkeys(int(text) for text in given))


def read() -> tuple[anndata.AnnData, pd.DataFrame, dict[str, str]]:
    """The cells, their labels, and the symbol of each gene of var."""
    if not FLAGS.h5ad:
        raise InputError("--h5ad is needed: an AnnData file with counts")
    if not FLAGS.labels:
        raise InputError("--labels is needed: columns of obs that describe the cells")
    adata = cells.read(FLAGS.h5ad)
    labels = pd.DataFrame({name: cells.labels(adata, name) for name in FLAGS.labels})
    if FLAGS.counts == "raw" and adata.raw is None:
        raise InputError(f"--counts=raw: {FLAGS.h5ad} has no raw")
    var = adata.raw.var if FLAGS.counts == "raw" else adata.var
    if FLAGS.gene_symbols is not None and FLAGS.gene_symbols not in var:
        raise InputError(f"--gene_symbols: var has no column {FLAGS.gene_symbols}")
    named = var.index if FLAGS.gene_symbols is None else var[FLAGS.gene_symbols]
    return adata, labels, dict(zip(var.index.astype(str), named.astype(str), strict=True))


def loaded_model() -> Any:
    """The model of --checkpoint."""
    more = {} if FLAGS.dictionaries is None else {"dictionaries": FLAGS.dictionaries}
    return extract.load_model(FLAGS.model, FLAGS.checkpoint, device="auto", **more)


def settings_of_flags() -> dict[str, Any]:
    """What the results depend on: every flag, and the contents of files."""
    mine = FLAGS.find_module_defining_flag("permutations")
    sets = FLAGS.find_module_defining_flag("gene_sets")
    settings = {
        flag.name: flag.value
        for module in dict.fromkeys((mine, sets))
        for flag in FLAGS.get_flags_for_module(module)
    }
    paths = [FLAGS.h5ad, FLAGS.checkpoint, FLAGS.dictionaries, FLAGS.gene_sets, FLAGS.gene_table]
    return settings | {"contents": folders.contents(paths)}


def embedded(
    adata: anndata.AnnData,
    labels: pd.DataFrame,
    symbols: dict[str, str],
    model: Any,
    out: Path,
) -> Subject:
    """The cells in the model (None: one trained here), with the genes that both know."""
    if model is None:
        model = scvi_model.trained(
            adata, out / "scvi", n_latent=FLAGS.d_model, epochs=FLAGS.model_epochs, seed=FLAGS.seed
        )
    by_symbol = model.naming == "symbol" and FLAGS.gene_symbols is not None
    options = {"genes": FLAGS.gene_symbols if by_symbol else None, "counts": FLAGS.counts}
    asked = FLAGS.layer
    layer = model.resolve(int(asked) if asked and asked.lstrip("-").isdigit() else asked)[0]
    path = out / "embedding.npy"
    if not path.exists():
        logging.info("embedding %d cells", adata.n_obs)
        x = model.embed(adata, layer, **options)[layer]
        with files.write_aside(path) as fresh, fresh.open("wb") as file:
            np.save(file, x)
    x = data.check_rows(np.load(path), "the embedding")
    # Expression by the names that the model's genes have in the file, so that it is the same gene.
    expression = cells.expression(
        adata, FLAGS.counts or "X", "counts", FLAGS.gene_symbols if by_symbol else None
    )
    measured = {gene: i for i, gene in enumerate(expression.genes)}
    total = np.asarray(expression.x.sum(axis=0)).ravel()
    exchanged = model.plan(adata, **options).genes
    known = [gene for gene in exchanged if gene in measured]
    # Of several genes with one symbol the most expressed; the order is the model's.
    symbol_of = {gene: gene if by_symbol else symbols.get(gene, gene) for gene in known}
    best: dict[str, str] = {}
    for gene in sorted(known, key=lambda gene: -total[measured[gene]]):
        best.setdefault(symbol_of[gene], gene)
    chosen = [gene for gene in known if best[symbol_of[gene]] == gene]
    if len(chosen) < 100:
        raise InputError(
            f"{len(chosen)} genes of the model have measured expression: too few for enrichment"
        )
    columns = [measured[gene] for gene in chosen]
    names = np.asarray([symbol_of[gene] for gene in chosen], object)
    return Subject(
        adata=adata, model=model, layer=layer, options=options, x=x, labels=labels,
        expression=cells.Expression(expression.x[:, columns], names),
        genes=np.asarray(chosen, object), exchanged=exchanged, sets=reading.load_sets(list(names)),
    )  # fmt: skip


def members_studied(results: pd.DataFrame, d: int, widths: Sequence[int]) -> list[int]:
    """Those of the studied width, every seed that did not diverge, in the order of the seeds."""
    width = FLAGS.studied or min(widths, key=lambda c: abs(np.log(c / (10 * d))))
    chosen = results[(results["n_latents"] == width) & (results["status"] == "trained")]
    if chosen.empty:
        raise InputError(f"every dictionary of {width} concepts diverged: lower --learning_rate")
    return chosen.index.tolist()


@dataclasses.dataclass(frozen=True, eq=False)
class Explained:
    """Concepts and neurons, and what was found of each.

    Attributes:
      features: one row a concept or neuron (index: names): `kind`, cells, labels, genes, terms.
      latents: of the attributed concepts, in the order of the tables.
      concepts, neurons: names of the attributed ones.
      attribution: [concepts then neurons, genes of the subject].
      dge: the same of log2 fold changes, of the concepts alone.
      strengths, table_6, deletion: tables, of concepts drawn at random but for the last.
      stability: of all concepts of all seeds; None of one seed.
    """

    features: pd.DataFrame
    latents: np.ndarray
    concepts: list[str]
    neurons: list[str]
    attribution: np.ndarray
    dge: np.ndarray
    strengths: pd.DataFrame
    table_6: pd.DataFrame
    deletion: pd.DataFrame
    stability: pd.DataFrame | None


def explain(
    subject: Subject, run: sae_jax.Run, members: list[int], train: np.ndarray, out: Path
) -> Explained:
    """Cells, genes, terms, stability and deletion curves of concepts and of neurons."""
    dictionary, x = run.dictionaries[members[0]], subject.x
    z = dictionary.encode(x, sparse=True)
    live = np.flatnonzero(z[train].getnnz(axis=0))
    cells_of = study.described(z[:, live], subject.labels).assign(kind="concept")
    cells_of.index = [f"concept_{i}" for i in live]
    rng = np.random.default_rng(FLAGS.seed)
    drawn = rng.permutation(live)[: FLAGS.most]
    telling = study.telling(cells_of)  # of each label, drawn or not
    latents = np.union1d(drawn, [int(name.removeprefix("concept_")) for name in telling])
    neurons = Neurons.of(x)
    sides = np.sort(rng.permutation(neurons.n_components)[: FLAGS.most])
    groups = {
        "concepts": (dictionary, latents, [f"concept_{i}" for i in latents]),
        "neurons": (neurons, sides, [neurons.names()[i] for i in sides]),
    }
    names = {kind: name for kind, (_, _, name) in groups.items()}
    logging.info("%d live concepts, %d of them attributed; %d neurons", len(live), len(latents),
                 len(sides))  # fmt: skip

    # Cells: all live concepts, and the neurons attributed.
    codes = {
        kind: coder.encode(x, sparse=True)[:, which] for kind, (coder, which, _) in groups.items()
    }
    sides_of = study.described(codes["neurons"], subject.labels).assign(kind="neuron")
    table = pd.concat([cells_of, sides_of.set_axis(names["neurons"])])
    table["drawn"] = table.index.isin([*(f"concept_{i}" for i in drawn), *names["neurons"]])
    stability = None
    if len(members) > 1:
        stability = study.kept(
            out / "stability.parquet",
            lambda: study.replicated(run, x, members, FLAGS.seed).features,
        )
        own = stability[stability["dictionary"] == 0].set_index("feature")
        for column in ("replicated_by_direction", "replicated_by_activation", "best_cosine"):
            table.loc[[f"concept_{i}" for i in live], column] = own.loc[live, column].to_numpy()

    # Genes.
    attributed = study.kept(
        out / "attribution.parquet",
        lambda: study.attributed(subject, groups, out / "attribution", **samples()),
    )
    every = [*names["concepts"], *names["neurons"]]
    scores = study.wide(attributed, "attribution", every)
    dge = study.kept(
        out / "dge.parquet",
        lambda: study.differences(subject, codes["concepts"], names["concepts"]),
    )
    fold = study.wide(dge, "log2_fold_change", names["concepts"])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    symbols = subject.expression.genes
    without = np.isnan(scores).all(axis=1)  # no cell has the concept, or all have
    table.loc[every, "n_important"] = np.where(
        without, np.nan, (scores > study.IMPORTANT).sum(axis=1)
    )
    table.loc[every, "top_genes"] = [
        ", ".join(str(symbols[g]) for g in row if scores[i, g] > 0) for i, row in enumerate(order)
    ]

    # Terms.
    n_concepts = len(names["concepts"])
    settings = {"permutations": FLAGS.permutations, "seed": FLAGS.seed}
    found = {
        "attribution": study.kept(
            out / "gsea_attribution.parquet",
            lambda: study.enriched(scores, subject, every, score_type="pos", **settings),
        ),
        "dge": study.kept(
            out / "gsea_dge.parquet",
            lambda: study.enriched(fold, subject, names["concepts"], score_type="std", **settings),
        ),
    }
    for method, terms in found.items():
        best = study.best_terms(terms)
        for column in best:
            table.loc[best.index, f"{method}:{column}"] = best[column]
    at_random = [name for name in names["concepts"] if table.loc[name, "drawn"]]
    frequent = [name for name in at_random if table.loc[name, "n_active"] >= study.ENOUGH]
    strengths = study.strengths(
        {
            "concepts, attribution": (table.loc[at_random], "attribution"),
            f"of these with {study.ENOUGH} cells": (table.loc[frequent], "attribution"),
            "neurons, attribution": (table.loc[names["neurons"]], "attribution"),
            "concepts, DGE": (table.loc[at_random], "dge"),
        },
        {method: study.tested_terms(terms) for method, terms in found.items()},
    )
    first = {"attribution": found["attribution"].iloc[: len(found["dge"])], "dge": found["dge"]}
    compared = study.compared(first, scores[:n_concepts], fold, subject, names["concepts"])
    table.loc[every, "in_no_term"] = concept_terms.share_in_no_term(
        scores > study.IMPORTANT, subject.sets.membership
    )
    table_6 = concept_terms.table_6(compared[compared["feature"].isin(at_random)])
    files.write_parquet(out / "features.parquet", table.rename_axis("feature").reset_index())
    write_csv(strengths.reset_index(), out / "strengths.csv")
    write_csv(table_6.rename_axis("quantity").reset_index(), out / "table_6.csv")

    # Deletion.
    deletion = study.kept(
        out / "deletion.parquet",
        lambda: study.deleted(
            subject,
            dictionary,
            latents,
            scores[:n_concepts],
            fold,
            study.wide(dge, "log10_p", names["concepts"]),
            FLAGS.seed,
            **samples(),
        ),
    )
    return Explained(
        table, latents, names["concepts"], names["neurons"], scores, fold, strengths, table_6,
        deletion, stability,
    )  # fmt: skip


def samples() -> dict[str, int]:
    """How many cells attribution takes of each kind."""
    return {"prototypes": FLAGS.prototypes, "counterfactuals": FLAGS.counterfactuals}


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """What can be read off concepts, neurons and others: methods, and concepts that speak.

    methods: a row per task and method. confusion: by task and of concepts or neurons.
    coefficients: the concepts that speak most for each class.
    """

    methods: pd.DataFrame
    confusion: dict[str, pd.DataFrame]
    coefficients: pd.DataFrame
    split: dict[str, Any]


def learn(
    subject: Subject,
    dictionary: sae_jax.Dictionary,
    found: Explained,
    train: np.ndarray,
    held_out: np.ndarray,
    per_class: Sequence[int],
    out: Path,
) -> Learned:
    """Tables 4 and 5: other methods, and what logistic regression learns from each."""
    coders = study.methods(subject.x, dictionary, train, FLAGS.seed, 20 if FLAGS.quick else 500)
    tasks = {FLAGS.labels[0]: subject.labels[FLAGS.labels[0]]}
    tasks |= study.phases(subject, FLAGS.seed)
    coded = study.reconstructions(coders, subject.x[held_out])
    tables, confusion, split, coefficients = [], {}, {}, []
    for task, labels in tasks.items():
        table, learned, split[task] = study.useful(
            subject, coders, labels, per_class=tuple(per_class), seed=FLAGS.seed,
            max_iter=100 if task == study.CYCLE else 50,
        )  # fmt: skip
        table = coded.join(table[["accuracy", "probe_converged"]], how="right")
        tables.append(table.rename_axis("method").reset_index().assign(task=task))
        concepts = next(iter(coders))
        confusion |= {(task, name): learned[name].confusion for name in (concepts, "neurons")}
        coefficients.append(
            study.speaking(learned[concepts], found, subject.expression.genes).assign(task=task)
        )
    methods = pd.concat(tables, ignore_index=True)
    spoken = pd.concat(coefficients, ignore_index=True)
    write_csv(methods, out / "methods.csv")
    write_csv(spoken, out / "coefficients.csv")
    return Learned(methods, confusion, spoken, split)


def test_in_model(
    subject: Subject, dictionary: sae_jax.Dictionary, found: Explained, out: Path
) -> dict[str, pd.DataFrame]:
    """Concepts ablated in the model, beside random directions; what a reconstruction keeps."""
    strongest = found.features.loc[found.concepts, "mean_activation"].to_numpy()
    features = found.latents[np.argsort(-strongest, kind="stable")[: FLAGS.causal]]
    return {
        name: study.kept(out / f"{name}.parquet", make)
        for name, make in study.causal_tests(subject, dictionary, features, FLAGS.seed).items()
    }


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    with files.write_aside(path) as fresh:
        table.to_csv(fresh, index=False)


if __name__ == "__main__":
    cli.launch(main, define_flags)

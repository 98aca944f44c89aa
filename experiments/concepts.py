r"""Concepts of a single-cell model: dictionaries, attributed genes, terms, stability, usefulness.

    sae-jax concepts --h5ad=kang.h5ad --labels=condition --n_latents=24 \
        --k_share=0.5 --gene_sets=ReactomePathways.gmt --workdir=runs/kang
    sae-jax concepts --h5ad=cells.h5ad --labels=cell_type --model=scgpt \
        --checkpoint=scGPT_human --n_latents=1000,2000,5000 --workdir=runs/scgpt

Claye et al., whole. Cells are embedded by --model: a checkpoint of `extract`, or an scVI trained
here where none is given; or their rows are taken from an extraction store (--embedding). TopK
dictionaries of every --n_latents (k = .016 c, as in the paper, or another --k_share) and seed are
trained together on nine tenths of the cells; one width is studied.
For its concepts, and for neurons (the embedding's dimensions, either side of the median) by the
same functions: labels of the cells, genes by counterfactual attribution, GSEA of these genes.
Further: GSEA of differential expression and Table 6, deletion curves, replication over seeds, what
logistic regression learns from concepts and from neurons, semi-NMF and other methods, causal tests
in the model. A gene drives a concept by what it has or by what it lacks in the prototypes: the
concept of unstimulated cells falls when ISG15 rises.

With --out_of_core counts stay in their file and are read a block of cells at a time; results are
the same. In --memory_gib are blocks and the sums of differential expression, then the genes of the
cells that labels are learned from (--per_class); held beside it is what has a row a cell: the
embedding, concepts, obs. An scVI is not trained so: scvi-tools would sort the cells of each batch
of a file, and make another model.

Each stage leaves its files and is not done again with --resume. Kang's 2,000 cells of 9,015 genes:
about 10 minutes on two cores. It must show: a concept that tells stimulated from control cells
(AUROC > .9), interferon genes among those attributed to it and interferon response among its terms;
a deletion curve below those of differential expression and of random genes. A concept that is
active in 1.6 % of the cells cannot tell half of them, hence the few and dense ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

from analysis import probes
from experiments import (
    cli,
    concepts_explained,
    concepts_inputs,
    concepts_learned,
    concepts_page,
    folders,
    replicates,
    run_folder,
    verify,
)
from experiments import concepts_study as study
from experiments import inputs as reading
from sae_jax import InputError

FLAGS = flags.FLAGS

SETTINGS = "concepts.json"
FILES = {
    "report.html": "the page: everything below, to look at",
    "table_3.csv": "every dictionary: c, k, seed, R2, L0, active concepts",
    "features.h5ad": "cells x live concepts and neurons, as sae-jax browse reads them",
    "features.parquet": "one row per live concept studied, and per neuron: cells, genes, terms",
    "attribution.parquet": "gene by gene what each feature's activation owes to it",
    "samples.parquet": "the same of single prototypes and counterfactuals, by row of the cells",
    "gene_sets.parquet": "the terms and their genes, as tested",
    "dge.parquet": "differential expression of the same features and genes",
    "gsea_attribution.parquet": "feature x term: ES, NES, p, q of the attributed genes",
    "gsea_dge.parquet": "the same of fold changes",
    "strengths.csv": "strong, weak and no annotation: concepts and neurons",
    "table_6.csv": "attribution-GSEA and DGE-GSEA compared",
    "deletion.parquet": "activation left as genes are exchanged, by order of the genes",
    "deletion_held_out.parquet": "the same in prototypes that attribution was not computed on",
    replicates.FILE: "one row a concept of each seed: replication by direction, by activation",
    replicates.CONSENSUS: "the concepts that most seeds have, as one dictionary, if --consensus",
    "methods.csv": "concepts, neurons and other methods: R2, L0, accuracy (Tables 4, 5)",
    "coefficients.csv": "the concepts that speak most for each class, with their genes",
    "causal.parquet": "ablated concepts beside random directions",
    "fidelity.parquet": "what survives a spliced reconstruction",
    "figures": "PNG and PDF",
    "dictionary": "the one studied; --dictionary of other programs takes it",
    "sweep": "all dictionaries, a folder of sae_jax.train",
    "scvi": "the model trained here, as scvi-tools saves it",
    "manifest.json": "size and SHA-256 of every file",
}
KEPT = ("embedding.npy", "attribution", run_folder.MAP)
SHOWN = ("follow", "memory_gib", "out_of_core")  # settings that change no result


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("h5ad", None, "AnnData file of the cells; the model's counts are in it.")
    flags.DEFINE_string("counts", None, "Layer with the counts, or raw; default: X.")
    flags.DEFINE_string("gene_symbols", None, "Column of var with symbols; default: the var names.")
    flags.DEFINE_list("labels", None, "Columns of obs that describe cells; the first is learned.")
    flags.DEFINE_enum(
        "model", None, ["scvi", "scgpt", "geneformer"], "Whose embedding (scvi, or the store's)."
    )
    flags.DEFINE_string("checkpoint", None, "Its folder; without one an scVI is trained here.")
    flags.DEFINE_string(
        "embedding",
        None,
        "An extraction store of these cells (layer_11.zarr): its rows are taken. "
        "To exchange genes the model is needed all the same, by --checkpoint if it has moved; "
        "without it that part of the study is left out.",
    )
    flags.DEFINE_string("dictionaries", None, "Geneformer's token and gene dictionaries: a folder.")
    flags.DEFINE_string("layer", None, "Of the model; default: what its authors export.")
    flags.DEFINE_integer("d_model", 20, "Dimensions of an scVI trained here.", 2)
    flags.DEFINE_integer("model_epochs", 200, "Of an scVI trained here.", 1)
    flags.DEFINE_list("n_latents", ["100", "200", "500"], "Concepts of the dictionaries.")
    flags.DEFINE_float("k_share", 0.016, "Active concepts of a cell, of all (k of TopK).", 0, 1)
    flags.DEFINE_integer("studied", None, "Which of these; default: nearest to ten times d.", 1)
    flags.DEFINE_list("seeds", ["0", "42", "9307"], "Of the dictionaries; the first is studied.")
    flags.DEFINE_bool("consensus", False, "Also save a dictionary of the concepts that come back.")
    flags.DEFINE_integer("epochs", 300, "Of the dictionaries.", 1)
    flags.DEFINE_float("learning_rate", 1e-3, "Of the dictionaries.")
    flags.DEFINE_integer(
        "most", 100,
        "Concepts, and neurons, drawn at random to be attributed; the concepts that tell a label "
        "best come beside them.", 1,
    )  # fmt: skip
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
    reading.define_memory_flags()
    verify.define_flag()


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
    adata, labels, symbols = concepts_inputs.read()
    reading.load_sets(list(dict.fromkeys(symbols.values())), 100)
    split = probes.split(labels.iloc[:, 0], *per_class, seed=FLAGS.seed)
    # What training would refuse: of the embedding only the width is not known yet.
    n_train = round(adata.n_obs * (1 - study.VALIDATION))
    study.configs(1, widths, seeds, n_train, FLAGS.learning_rate, FLAGS.k_share)
    source = concepts_inputs.source(adata)
    if FLAGS.out_of_core:
        phases = min(len(labels), len(probes.PHASES) * sum(per_class))
        concepts_inputs.check_memory(source, max(len(split.train) + len(split.test), phases))
    genes = concepts_inputs.genes(adata, symbols, source)
    settings = settings_of_flags()
    with folders.filled(out, SETTINGS, settings, (*FILES, *KEPT), SHOWN):
        # 2. The model and its embedding; dictionaries of it.
        subject = concepts_inputs.subject(adata, labels, source, genes, out)
        chosen = study.configs(
            subject.x.shape[1], widths, seeds, n_train, FLAGS.learning_rate, FLAGS.k_share
        )
        run, train, held_out = study.trained(
            subject.x, chosen, FLAGS.epochs, FLAGS.seed, out / "sweep"
        )
        study.write_csv(study.table_3(run), out / "table_3.csv")
        members = members_studied(run.results, subject.x.shape[1], widths)

        # 3. Concepts and neurons, one by one, and as a set.
        dictionary = run.dictionaries[members[0]]
        if not (out / "dictionary").exists():
            dictionary.save(out / "dictionary")
        found = concepts_explained.explain(subject, run, members, train, out)
        coordinates = concepts_explained.write_for_browsing(
            subject, dictionary, found, settings, out
        )
        learned = concepts_learned.learn(
            subject, dictionary, found, train, held_out, per_class, out
        )
        tested = concepts_learned.test_in_model(subject, dictionary, found, out)

        # 4. The figures and the page.
        concepts_page.write(
            out, subject, run, members, found, learned, tested, coordinates, settings
        )
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


def settings_of_flags() -> dict[str, Any]:
    """What the results depend on: flags, and the contents of files."""
    mine = FLAGS.find_module_defining_flag("permutations")
    sets = FLAGS.find_module_defining_flag("gene_sets")
    settings = {
        flag.name: flag.value
        for module in dict.fromkeys((mine, sets))
        for flag in FLAGS.get_flags_for_module(module)
        if flag.name not in folders.IGNORED
    }
    files_of = (
        "h5ad", "embedding", "checkpoint", "dictionaries", "gene_sets", "gene_table", "obo",
    )  # fmt: skip
    paths = [FLAGS[name].value for name in files_of]
    return settings | {"contents": folders.contents(paths)}


def members_studied(results: pd.DataFrame, d: int, widths: Sequence[int]) -> list[int]:
    """Those of the studied width, every seed that did not diverge, in the order of the seeds."""
    width = FLAGS.studied or min(widths, key=lambda c: abs(np.log(c / (10 * d))))
    chosen = results[(results["n_latents"] == width) & (results["status"] == "trained")]
    if chosen.empty:
        raise InputError(f"every dictionary of {width} concepts diverged: lower --learning_rate")
    return chosen.index.tolist()


if __name__ == "__main__":
    cli.launch(main, define_flags)

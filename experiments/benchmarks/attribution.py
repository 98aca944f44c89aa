r"""Counterfactual attribution: CPU seconds a concept, beside brute force in the same run.

    python -m experiments.benchmarks.attribution --scvi=MODEL --h5ad=COUNTS.h5ad     (10 minutes)
    python -m experiments.benchmarks.attribution --scgpt=MODEL --h5ad=COUNTS.h5ad --genes=symbol
    ... --quick                                                                    (2 minutes)

Brute force is equation 2 as it stands: for every concept, prototype, counterfactual and gene a
cell with one value exchanged, embedded and encoded. Two ways: by the model's `embed` of perturbed
cells, which is what one would write, timed on the genes of a few pairs; and, of scVI, densely, the
same arithmetic in one compiled program without any saving. Both are checked against ours. The
dictionary is a top-k with random weights on normalised embeddings: it costs what a trained one does
and has as many active cells. Ours is timed over all concepts, shares included, after a run on some
others that compiles. It must show at least 50 x for scVI and 5 x for scGPT.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags
from scipy import sparse

import extract
from analysis import attribution, perturbed
from analysis.counterfactuals import Pairs
from experiments import cli
from sae_jax import Dictionary, InputError, SAEConfig, models
from sae_jax.state import Normalizer

FLAGS = flags.FLAGS
DENSE = 1024  # perturbed cells at once


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("scvi", None, "Folder of an scVI model.")
    flags.DEFINE_string("scgpt", None, "Folder of an scGPT checkpoint.")
    flags.DEFINE_string("h5ad", None, "Cells with raw counts.")
    flags.DEFINE_string("genes", None, "Column of var with the model's gene names.")
    flags.DEFINE_integer("cells", 4000, "Of the file, at most.", lower_bound=20)
    flags.DEFINE_integer("most_genes", 1200, "Candidates of scGPT, the paper's number.", 10)
    flags.DEFINE_integer("latents", 500, "Of the dictionary.", lower_bound=4)
    flags.DEFINE_integer("concepts", 100, "Attributed.", lower_bound=1)
    flags.DEFINE_integer("pairs", 2, "Timed by brute force.", lower_bound=1)
    flags.DEFINE_bool("quick", False, "Fewer cells, genes and concepts.")


def main() -> None:
    """Measures and prints."""
    if not FLAGS.h5ad or not (FLAGS.scvi or FLAGS.scgpt):
        raise InputError("--h5ad is needed, and --scvi or --scgpt")
    for name in ("scvi", "scgpt"):
        if FLAGS[name].value:
            measure(name, extract.load_model(name, FLAGS[name].value))


def measure(name: str, model: Any) -> None:
    """One model: ours, brute force, and that they agree."""
    adata = anndata.read_h5ad(FLAGS.h5ad)
    first = ~pd.Index(gene_names(adata)).duplicated()
    adata = adata[:, first]
    most = min(FLAGS.cells, 600 if FLAGS.quick and name == "scvi" else FLAGS.cells, adata.n_obs)
    if FLAGS.quick and name == "scgpt":
        most = min(most, 60)
    rows = np.random.default_rng(0).choice(adata.n_obs, most, replace=False)
    adata = adata[np.sort(rows)].copy()
    options: dict[str, Any] = {"genes": FLAGS.genes, "min_gene_coverage": 0.0}
    if name == "scgpt":
        options["gene_list"] = candidates(model, adata)
    x = perturbed.embed(model, adata, options)
    coder = dictionary(x)
    active = coder.encode(x, sparse=True).getnnz(axis=0)
    live = np.flatnonzero((active > 0) & (active < len(x)))
    n = min(FLAGS.concepts, 8 if FLAGS.quick else FLAGS.concepts, len(live) - 1)
    call = {"embedding": x, "options": options, "progress": False}
    attribution.attribute(model, coder, adata, live[n:][-max(1, n // 2) :], **call)  # compiles
    seconds, found = timed(lambda: attribution.attribute(model, coder, adata, live[:n], **call))
    spent, pairs = found.forwards, found.pairs
    print(
        f"{name}: {most} cells, {len(found.genes)} genes, {n} of {FLAGS.latents} concepts, "
        f"{len(pairs.prototype)} pairs\n"
        f"  forwards   {spent.brute} by brute force, {spent.changed} of genes that change, "
        f"{spent.done} done: {spent.brute / spent.done:.1f} x fewer\n"
        f"  ours       {seconds / n:.4f} CPU s a concept"
    )
    local = pairs.local()
    some = np.flatnonzero(pairs.concept == pairs.concept[0])[: FLAGS.pairs]
    subject = perturbed.perturbed(model, coder, adata, pairs.cells, options)
    ways = {"embed": lambda: by_embed(model, coder, adata, pairs, some, options)}
    if name == "scvi":
        ways["dense"] = lambda: densely(subject, local, some)
        ways["dense"]()  # compiles
    own = attribution.attribute(
        model, coder, adata, pairs=chosen(pairs, some), options=options, samples=True,
        progress=False,
    )  # fmt: skip
    for way, work in ways.items():
        brute, scores = timed(work)
        each = brute / len(some) * len(pairs.prototype) / n
        off = np.abs(scores - own.samples.toarray()).max()
        same = "" if name == "scgpt" else f", largest difference {off:.0e}"
        print(f"  {way:<10} {each:.2f} CPU s a concept: {each / (seconds / n):.0f} x ours{same}")


def candidates(model: Any, adata: anndata.AnnData) -> list[str]:
    """The genes that vary most over the cells, as the paper took them."""
    most = min(FLAGS.most_genes, 100 if FLAGS.quick else FLAGS.most_genes)
    return model.plan(adata, FLAGS.genes, min_gene_coverage=0.0, hvg=most).genes


def gene_names(adata: anndata.AnnData) -> list[str]:
    """Of the columns, as --genes says."""
    return [str(name) for name in (adata.var[FLAGS.genes] if FLAGS.genes else adata.var_names)]


def dictionary(x: np.ndarray) -> Dictionary:
    """A top-k of random weights; k is 1.6 % of the latents, the paper's share."""
    config = SAEConfig(
        d_in=x.shape[1], n_latents=FLAGS.latents, activation="topk",
        k=max(1, round(0.016 * FLAGS.latents)), input_normalization="zscore",
    )  # fmt: skip
    params = jax.tree.map(np.asarray, models.init(0, config.architecture, np.float32))
    return Dictionary(config, params, Normalizer(x.mean(axis=0), x.std(axis=0)))


def chosen(pairs: Pairs, some: np.ndarray) -> Pairs:
    """Some pairs of the first concept that has any."""
    parts = (pairs.prototype, pairs.counterfactual, pairs.distance)
    concept = pairs.concepts[pairs.concept[some[:1]]]
    return Pairs(concept, np.zeros(len(some), np.int64), *(part[some] for part in parts))


def by_embed(
    model: Any, coder: Dictionary, adata: anndata.AnnData, pairs: Pairs, some: np.ndarray,
    options: dict[str, Any],
) -> np.ndarray:  # fmt: skip
    """Scores of pairs [pairs, genes] by perturbed cells, all genes of a pair in an AnnData."""
    concept = pairs.concepts[pairs.concept[some[0]]]
    place = {name: i for i, name in enumerate(gene_names(adata))}
    columns = [place[gene] for gene in model.plan(adata, **options).genes]
    scores = []
    for pair in some:
        p, c = pairs.prototype[pair], pairs.counterfactual[pair]
        own, other = (np.asarray(adata.X[[i]].todense()).ravel() for i in (p, c))
        cells = np.tile(own, (len(columns) + 1, 1))
        cells[np.arange(1, len(cells)), columns] = other[columns]
        many = anndata.AnnData(sparse.csr_matrix(cells), var=adata.var)
        many.obs_names = [f"{i}" for i in range(len(cells))]
        codes = coder.encode(perturbed.embed(model, many, options))[:, concept]
        scores.append(codes[0] - codes[1:])
    return np.stack(scores)


def densely(subject: perturbed.Linear, pairs: Pairs, some: np.ndarray) -> np.ndarray:
    """The same of scVI: every perturbed cell through every layer, in one compiled program."""
    concept = pairs.concepts[pairs.concept[some[0]]]
    scores = []
    for pair in some:
        p, c = pairs.prototype[pair], pairs.counterfactual[pair]
        own, other = (subject.inputs[[i]].toarray().ravel().astype(np.float32) for i in (p, c))
        codes = []
        for start in range(-1, len(own), DENSE):  # the first is the cell as it is
            genes = np.arange(start, min(start + DENSE, len(own)))
            cells = np.tile(own, (DENSE, 1))
            there = np.flatnonzero(genes >= 0)
            cells[there, genes[there]] = other[genes[there]]
            batch = np.full(DENSE, subject.batch[p])
            bias = subject.bias[p].astype(np.float32)
            found = _densely(
                cells, subject.first, bias, subject.rest, batch, subject.score.fused,
                layer_norm=subject.layer_norm, architecture=subject.score.architecture,
            )  # fmt: skip
            codes.append(np.asarray(found)[: len(genes), concept])
        flat = np.concatenate(codes)
        scores.append(flat[0] - flat[1:])
    return np.stack(scores)


@functools.partial(jax.jit, static_argnames=("layer_norm", "architecture"))
def _densely(
    cells: jax.Array, first: jax.Array, bias: jax.Array, rest: Any, batch: jax.Array, coder: Any,
    *, layer_norm: Any, architecture: Any,
) -> jax.Array:  # fmt: skip
    with jax.default_matmul_precision("highest"):
        rows = perturbed.encode_rest(rest, cells @ first + bias[None, :], batch, layer_norm)
        latents = jnp.arange(coder[0].encoder.shape[1])
        return perturbed.codes_of(*coder, rows, latents, architecture)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, all of its threads, and what came of it."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


if __name__ == "__main__":
    cli.launch(main, define_flags)

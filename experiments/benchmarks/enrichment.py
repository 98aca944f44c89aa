r"""Annotation of a dictionary: CPU seconds a feature, beside loops over SciPy and beside gseapy.

    python -m experiments.benchmarks.enrichment --gene_sets=FILE.gmt          (about 10 minutes)
    python -m experiments.benchmarks.enrichment --quick                         (about a minute)

Per feature: 13,431 genes × 5,000 terms; Welch's t, ranks, Mann-Whitney, binomial and Fisher's test,
written to parquet. The peers do the same feature by feature: SciPy's `ttest_ind`, `mannwhitneyu`,
`binomtest`, `fisher_exact` in a loop over terms; scanpy's `rank_genes_groups` (Welch's t) for the
genes and gseapy's `enrich` for the overlaps, which has no rank test.

The whole: counts of 56,000 cells × 13,431 genes at real sparsity (8 %, as CSR), 5,318 live features
with 3.5 % of the cells each in the mean (log-normal), 6,000 terms; wall time and peak memory, a
process each, without calibration and with (six sizes of groups, 300 features each). It must show at
most .020 CPU seconds a feature; 2.5 and 4 minutes; 8 GiB. Terms are random sets of the sizes of
GO's, unless --gene_sets names a file, whose sizes are taken. The test within strata of like
expression, which the paper does not have, is left out.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags
from scipy import sparse, stats

from analysis import gene_sets, lens
from analysis.cells import Expression
from analysis.groups import top_cells
from experiments import cli

FLAGS = flags.FLAGS
GENES, TERMS = 13_431, 5_000
WHOLE = {"cells": 56_000, "features": 5_318, "terms": 6_000}
ACTIVE, EXPRESSED = 0.035, 0.08


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("gene_sets", None, "A GMT file whose sets' sizes are taken.")
    flags.DEFINE_bool("quick", False, "Fewer features, peers' terms and cells; no whole run.")
    flags.DEFINE_bool("whole", True, "The runs at the size of the paper.")
    flags.DEFINE_integer("whole_of", None, "One of these alone, with so many permuted features.")


def main() -> None:
    """Measures and prints."""
    if FLAGS.whole_of is not None:
        whole(lens.Rule(), FLAGS.whole_of)
        return
    cells, features = (3_000, 64) if FLAGS.quick else (20_000, 256)
    expression, z = counts(cells), activations(cells, features)
    sets = terms(TERMS)
    rule = lens.Rule()
    call = {"null_features": 0, "progress": False, "matched": False}
    lens.annotate(z[:, :4], expression, sets, rule, **call)  # compiles
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        found, _ = lens.annotate(z, expression, sets, rule, **call)
        lens.write(found, np.arange(features).astype(str), Path(folder) / "table.parquet")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{cells} cells x {GENES} genes, {TERMS} terms, {features} features")
    print(f"  {'ours':<15} {cpu / features:.4f} CPU s, {wall / features:.4f} s a feature")
    for name, seconds in peers(expression, z, sets, found).items():
        print(
            f"  {name:<15} {seconds:.2f} CPU s a feature: {seconds / (cpu / features):.0f} x ours"
        )
    if FLAGS.quick or not FLAGS.whole:
        return
    del expression, z, found
    for null_features in (0, 300):
        command = [sys.executable, "-m", "experiments.benchmarks.enrichment",
                   f"--whole_of={null_features}"]  # fmt: skip
        if FLAGS.gene_sets:
            command.append(f"--gene_sets={FLAGS.gene_sets}")
        subprocess.run(command, check=True)


def peers(
    expression: Expression, z: sparse.csr_matrix, sets: gene_sets.GeneSets, found: lens.Lens
) -> dict[str, float]:
    """CPU seconds of each for one feature; the loops over terms from some of them."""
    groups = top_cells(z[:, :1], 99)
    high, low = groups.high.toarray()[0], ~groups.active.toarray()[0]
    some = 100 if FLAGS.quick else 500
    x = expression.x.astype(np.float64)
    began = time.process_time()
    test = stats.ttest_ind(x[high].toarray(), x[low].toarray(), equal_var=False)
    genes = time.process_time() - began
    scores = np.nan_to_num(np.round(test.statistic, 9))
    chosen = np.nan_to_num(test.pvalue, nan=1) < 0.05
    membership = sets.membership.toarray().astype(bool)
    began = time.process_time()
    for i, inside in enumerate(membership[:some]):
        u = stats.mannwhitneyu(scores[inside], scores[~inside], method="asymptotic")
        hits, size, n = int((chosen & inside).sum()), int(inside.sum()), int(chosen.sum())
        stats.binomtest(hits, n, size / GENES, "greater")
        stats.fisher_exact([[hits, n - hits], [size - hits, GENES - size - n + hits]], "greater")
        assert abs(u.statistic / (size * (GENES - size)) - found.auc[0, i]) < 1e-6
    result = {"SciPy": genes + (time.process_time() - began) / some * TERMS}
    try:
        import gseapy
        import scanpy
    except ImportError:
        return result
    both = high | low
    adata = scanpy.AnnData(expression.x[both])
    adata.obs["group"] = pd.Categorical(np.where(high[both], "high", "low"))
    began = time.process_time()
    scanpy.tl.rank_genes_groups(adata, "group", groups=["high"], reference="low", method="t-test")
    genes = time.process_time() - began
    named = {
        name: [str(g) for g in np.flatnonzero(row)]
        for name, row in zip(sets.names, membership, strict=True)
    }
    began = time.process_time()
    gseapy.enrich(
        [str(g) for g in np.flatnonzero(chosen)], named, background=[str(g) for g in range(GENES)],
        outdir=None,
    )  # fmt: skip
    return result | {"scanpy + gseapy": genes + time.process_time() - began}


def whole(rule: lens.Rule, null_features: int) -> None:
    """The paper's size; wall time, and the peak memory of this process."""
    expression = counts(WHOLE["cells"])
    z = activations(WHOLE["cells"], WHOLE["features"])
    sets = terms(WHOLE["terms"])
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        found, known = lens.annotate(
            z, expression, sets, rule, null_features=null_features, matched=False
        )
        names = np.arange(WHOLE["features"]).astype(str)
        lens.write(found, names, Path(folder) / "table.parquet")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = (Path(folder) / "table.parquet").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bins = [len(each.n_active) for each in known.values()][:1]
    print(
        f"  {WHOLE}, {bins or 'no'} sizes calibrated: {wall / 60:.2f} min, {cpu / 60:.2f} CPU min, "
        f"peak {peak:.1f} GiB, table {size / 2**20:.0f} MiB"
    )


def counts(cells: int) -> Expression:
    """log1p of counts per ten thousand, CSR float32, genes of very different abundance."""
    rng = np.random.default_rng(0)
    share = rng.beta(0.25, 0.25 / EXPRESSED - 0.25, GENES)
    blocks = []
    for start in range(0, cells, 2_000):
        size = min(2_000, cells - start)
        mask = rng.random((size, GENES), dtype=np.float32) < share
        block = sparse.csr_matrix(mask, dtype=np.float32)
        block.data = 1 + rng.poisson(share[block.indices] * 4).astype(np.float32)
        totals = np.asarray(block.sum(axis=1)).ravel()
        block.data *= np.repeat(1e4 / totals, np.diff(block.indptr)).astype(np.float32)
        blocks.append(block.log1p())
    x = sparse.vstack(blocks, format="csr")
    return Expression(x, np.asarray([f"g{i}" for i in range(GENES)]))


def activations(cells: int, features: int) -> sparse.csr_matrix:
    """Positive values in random cells, log-normally many, `ACTIVE` of all in the mean."""
    rng = np.random.default_rng(1)
    share = rng.lognormal(0, 1.2, features)
    sizes = np.clip(share / share.mean() * ACTIVE * cells, 12, cells // 2).astype(int)
    rows = np.concatenate([rng.choice(cells, size, replace=False) for size in sizes])
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    values = rng.random(len(rows)).astype(np.float32) + 0.1
    z = sparse.csc_matrix((values, rows, indptr), shape=(cells, features))
    return z.tocsr()


def terms(count: int) -> gene_sets.GeneSets:
    """Random sets of the sizes of GO's terms, 20 to 500 genes."""
    rng = np.random.default_rng(2)
    if FLAGS.gene_sets:
        lines = Path(FLAGS.gene_sets).read_text().splitlines()
        sizes = np.array([len(line.split("\t")) - 2 for line in lines])
        sizes = rng.choice(sizes[(sizes >= 20) & (sizes <= 500)], count)
    else:
        sizes = np.clip(rng.lognormal(4, 0.9, count).astype(int), 20, 500)
    names = [f"g{i}" for i in range(GENES)]
    members = {
        f"term {i}": [names[g] for g in rng.choice(GENES, size, replace=False)]
        for i, size in enumerate(sizes)
    }
    return gene_sets.from_sets(members, names, 20, 500)


if __name__ == "__main__":
    cli.launch(main, define_flags)

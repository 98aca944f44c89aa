r"""Prerank GSEA: CPU seconds a list beside gseapy and blitzGSEA, far p-values beside 10^6 draws.

    python -m experiments.benchmarks.gsea --peer_python=PYTHON_OF_BLITZGSEA     (about 10 minutes)
    python -m experiments.benchmarks.gsea --quick                                 (about a minute)

One list of 13,431 genes (t-statistics) and 5,000 random sets of GO's sizes, 1,000 permutations, of
which ours makes 1,000 a size and 800 far out; compiled before. gseapy permutes every set on its
own: it is given 20 and then 120 of the sets, and its time is 50 times the difference. blitzGSEA is
given all, in a process of its own (of the environment .bench-venv/blitzgsea, .bench-venv or
--peer_python). How far their ES are from ours is printed. Also: 500 lists in a process of its own;
20 lists in one call; the inner loop in numba and in JAX, on whatever JAX runs on; p of ten sets of
four kinds of lists, each beside the p-value from a million direct draws of its size.

It must show at most 1/300 of gseapy's and 1/30 of blitzGSEA's CPU time, and at most .5 s a list.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from absl import flags
from scipy import sparse

from analysis import gsea, gsea_kernels, gsea_null
from experiments import cli
from experiments.benchmarks import peers

FLAGS = flags.FLAGS
GENES, TERMS, PERMUTATIONS, DIRECT = 13_431, 5_000, 1_000, 1_000_000
# Kind of list, sign, size of the set and p that a set is looked for with.
FAR = (
    ("t", 1, 22, 5e-3), ("t", 1, 67, 5e-4), ("t", -1, 138, 5e-5), ("t", 1, 342, 5e-5),
    ("skewed", -1, 27, 5e-5), ("skewed", -1, 138, 5e-4), ("heavy", 1, 67, 5e-5),
    ("heavy", -1, 342, 5e-4), ("attribution", 1, 67, 5e-5), ("attribution", 1, 138, 5e-5),
)  # fmt: skip


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("peer_python", None, "Interpreter of the environment that has blitzgsea.")
    flags.DEFINE_integer("lists", 500, "Lists of the run in a process of its own.")
    flags.DEFINE_bool("quick", False, "Fewer direct draws and lists, and fewer sets for gseapy.")
    flags.DEFINE_bool("lists_alone", False, "That run and nothing else.")


def main() -> None:
    """Measures and prints."""
    members = terms()
    if FLAGS.lists_alone:
        many(members)
        return
    # First, as a process' peak of memory is not below that of the one it comes from.
    command = [sys.executable, "-m", "experiments.benchmarks.gsea", "--lists_alone",
               f"--lists={20 if FLAGS.quick else FLAGS.lists}"]  # fmt: skip
    subprocess.run(command, check=True)
    scores = lists()["t"]
    gsea.prerank(scores[None], members[:20], n_permutations=100)  # compiles
    seconds, found = ours(scores[None], members)
    print(f"{GENES} genes, {TERMS} terms, {PERMUTATIONS} permutations; CPU s a list")
    print(f"  ours, one list       {seconds:8.3f}")
    for name, (cpu, es) in peers_of(scores, members).items():
        away = np.abs(es - found.es[0, : len(es)]).max()
        print(f"  {name:<20} {cpu:8.1f}  {cpu / seconds:5.0f} x ours, ES differs by {away:.1e}")
    shuffled = np.random.default_rng(3).permuted(np.tile(scores, (20, 1)), axis=1)
    seconds, found = ours(shuffled, members)
    print(f"  ours, of 20 lists    {seconds:8.3f}")
    below = {p: float((found.p <= p).mean()) for p in (0.05, 5e-3, 5e-4, 5e-5)}
    print("  p of shuffled lists: " + ", ".join(f"{below[p]:.2g} <= {p:g}" for p in below))
    inner_loop(scores)
    far()


def ours(scores: np.ndarray, members: sparse.csr_array) -> tuple[float, gsea.Prerank]:
    """CPU seconds a list, everything included."""
    began = time.process_time()
    found = gsea.prerank(scores, members, n_permutations=PERMUTATIONS)
    return (time.process_time() - began) / len(scores), found


def peers_of(scores: np.ndarray, members: sparse.csr_array) -> dict[str, tuple[float, np.ndarray]]:
    """CPU seconds and ES of each that is installed."""
    import gseapy

    result = {}
    few, some = (5, 25) if FLAGS.quick else (20, 120)
    genes = np.array([f"g{i}" for i in range(GENES)])
    sets = np.split(members.indices, members.indptr[1:-1])
    named = {f"term {i}": list(genes[part]) for i, part in enumerate(sets[:some])}
    cpu = []
    for count in (few, some):
        began = time.process_time()
        found = gseapy.prerank(
            pd.DataFrame({"gene": genes, "score": scores}), dict(list(named.items())[:count]),
            outdir=None, no_plot=True, threads=1, permutation_num=PERMUTATIONS, min_size=1,
            max_size=GENES, seed=0,
        ).res2d  # fmt: skip
        cpu.append(time.process_time() - began)
    es = found.set_index("Term")["ES"].loc[list(named)].to_numpy()
    result[f"gseapy {gseapy.__version__}"] = (cpu[1] - cpu[0]) * TERMS / (some - few), es
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder) / "problem.npz"
        np.savez(problem, scores=scores, members=members.indices, sizes=np.diff(members.indptr),
                 permutations=PERMUTATIONS)  # fmt: skip
        given = {"": FLAGS.peer_python} if FLAGS.peer_python else {}
        command = [peers.interpreter("blitzgsea", given), "-m", "experiments.benchmarks.gsea_blitz"]
        run = subprocess.run([*command, problem], cwd=peers.ROOT, capture_output=True, text=True)
    if run.returncode:
        print(f"  blitzGSEA: not measured ({run.stderr.strip().splitlines()[-1]})")
    else:
        found = json.loads(run.stdout.splitlines()[-1])
        result[f"blitzGSEA {found['version']}"] = found["cpu"], np.asarray(found["es"])
    return result


def inner_loop(scores: np.ndarray) -> None:
    """Peak and trough of drawn sets, in numba and in JAX."""
    ranking = gsea_null.Ranking.of(scores, 1.0)
    positions = gsea_null.RandomSets.draw(GENES, 124, 20_000, 0).positions
    high, low = np.empty((2, len(positions)))

    def compiled() -> None:
        gsea_kernels.extremes(positions, ranking.weight, ranking.start, ranking.end, high, low)

    @jax.jit
    def in_jax(positions: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        hit = weight[positions]
        after = jnp.cumsum(hit, axis=1) / hit.sum(axis=1, keepdims=True)
        misses = (positions - jnp.arange(positions.shape[1])[None]) / (GENES - positions.shape[1])
        before = jnp.pad(after[:, :-1], ((0, 0), (1, 0)))
        return (after - misses).max(axis=1), (before - misses).min(axis=1)

    arrays = jnp.asarray(positions), jnp.asarray(ranking.weight, jnp.float32)
    cost = {}
    for name, call in (
        ("numba", compiled),
        (f"JAX on {jax.default_backend()}", lambda: jax.block_until_ready(in_jax(*arrays))),
    ):
        call()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(5):
            call()
        passed = np.array([time.process_time() - cpu, time.perf_counter() - wall])
        cost[name] = passed / 5 / positions.size * 1e9
    assert np.abs(np.asarray(in_jax(*arrays)[0]) - high).max() < 1e-4
    told = [f"{name} {cpu:.1f} CPU ns, {wall:.1f} ns" for name, (cpu, wall) in cost.items()]
    print("inner loop, a gene of a drawn set: " + "; ".join(told))


def far() -> None:
    """p of sets whose p-value is known from direct draws of their size."""
    n = DIRECT // 10 if FLAGS.quick else DIRECT
    print(f"p beside {n} direct draws (exceedances), with two numbers of permutations")
    positions = None
    for kind, sign, size, wanted in sorted(FAR, key=lambda each: each[2]):
        scores = lists()[kind]
        score_type = "pos" if kind == "attribution" else "std"
        ranking = gsea_null.Ranking.of(scores, 1.0)
        if positions is None or positions.shape[1] != size:
            positions = gsea_null.RandomSets.draw(GENES, size, n, 99).positions
        high, low = np.empty((2, n))
        gsea_kernels.extremes(positions, ranking.weight, ranking.start, ranking.end, high, low)
        es = high if score_type == "pos" else np.where(high > -low, high, low) * sign
        same = np.flatnonzero(es >= 0)
        order = same[np.argsort(-es[same])]
        b = max(1, round(wanted * len(order)))
        members = np.zeros((1, GENES), bool)
        members[0, ranking.order[positions[order[b - 1]]]] = True
        direct = (b + 1) / (len(order) + 1)
        told = []
        for permutations in (PERMUTATIONS, 10 * PERMUTATIONS):
            found = gsea.prerank(
                scores[None], members, n_permutations=permutations, score_type=score_type
            )
            told.append(f"{found.p[0, 0]:.2e} +- {found.p_error[0, 0]:.0e}")
        print(f"  {kind:<12}{sign:+d} size {size:3d}  {direct:.2e} ({b:5d})  {'  '.join(told)}")


def many(members: sparse.csr_array) -> None:
    """As many lists as asked for; CPU seconds, wall time and the peak of this process' memory."""
    rng = np.random.default_rng(4)
    scores = rng.standard_t(4, (FLAGS.lists, GENES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, cpu = time.perf_counter(), time.process_time()
    found = gsea.prerank(scores, members, n_permutations=PERMUTATIONS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    below = {p: float((found.p <= p).mean()) for p in (0.05, 5e-3, 5e-4, 5e-5)}
    print(
        f"{len(scores)} lists x {TERMS} terms: {cpu:.1f} CPU s, {wall:.1f} s, peak "
        f"{peak:.2f} GiB ({before:.2f} before); "
        + ", ".join(f"{below[p]:.2g} <= {p:g}" for p in below)
    )


def lists() -> dict[str, np.ndarray]:
    """Scores of four kinds, by name."""
    rng = np.random.default_rng(0)
    t = rng.standard_t(4, GENES)
    attribution = np.where(rng.random(GENES) < 0.3, rng.exponential(size=GENES) ** 2, 0.0)
    heavy = rng.standard_t(1.5, GENES)
    return {"t": t, "skewed": t - 3, "heavy": heavy, "attribution": attribution}


def terms() -> sparse.csr_array:
    """Random sets of the sizes of GO's terms, 15 to 500 genes."""
    rng = np.random.default_rng(2)
    sizes = np.clip(rng.lognormal(4, 0.9, TERMS).astype(int), 15, 500)
    members = np.concatenate([np.sort(rng.choice(GENES, size, replace=False)) for size in sizes])
    indptr = np.append(0, np.cumsum(sizes))
    return sparse.csr_array((np.ones(len(members), bool), members, indptr), (TERMS, GENES))


if __name__ == "__main__":
    cli.launch(main, define_flags)

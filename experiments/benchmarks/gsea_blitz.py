"""blitzGSEA on the list and the sets of an .npz, by the Python that has it: CPU seconds, as JSON.

`python -m experiments.benchmarks.gsea_blitz PROBLEM.npz`; `gsea` starts it. It has two processes,
as version 1.3.54 fails with one; CPU seconds are those of all. BLAS and OpenMP have a thread each.
"""

import importlib.metadata
import json
import os
import sys
import time

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np


def main() -> None:
    """Prints one line."""
    import blitzgsea
    import pandas as pd

    problem = np.load(sys.argv[1])
    genes = np.array([f"g{i}" for i in range(len(problem["scores"]))])
    signature = pd.DataFrame({"gene": genes, "score": problem["scores"]})
    sets = np.split(problem["members"], np.cumsum(problem["sizes"])[:-1])
    library = {f"term {i}": list(genes[part]) for i, part in enumerate(sets)}
    began = os.times()
    wall = time.perf_counter()
    found = blitzgsea.gsea(
        signature, library, permutations=int(problem["permutations"]), processes=2, center=False,
        signature_cache=False,
    )  # fmt: skip
    wall, ended = time.perf_counter() - wall, os.times()
    cpu = sum(ended[i] - began[i] for i in range(4))  # of its own processes too
    es = found["es"].reindex(library)
    version = importlib.metadata.version("blitzgsea")
    print(json.dumps({"cpu": cpu, "wall": wall, "version": version, "es": es.tolist()}))


if __name__ == "__main__":
    main()

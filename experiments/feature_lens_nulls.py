"""What the lens names where there is nothing to find, or no training behind it."""

from pathlib import Path

import numpy as np
import pandas as pd
from absl import flags, logging
from scipy import sparse

import sae_jax
from analysis import calibration, lens, nulls
from experiments.feature_lens_page import PERMUTED, REAL
from experiments.inputs import Inputs, memory_bytes

FLAGS = flags.FLAGS


def null_rates(
    dictionary: sae_jax.Dictionary,
    z: sparse.csr_matrix,
    testable: np.ndarray,
    inputs: Inputs,
    rule: lens.Rule,
    out: Path,
) -> pd.DataFrame:
    """Share of testable features that each test names: really, and where there is nothing, or no
    training, behind it. By the calibration of the real run; sets of other genes get their own.

    Args:
      z: activations [cells, features]. testable: bool [features]. out: the run's folder.
    """
    known = calibration.load(out / "calibration.npz")
    found = np.load(out / "named.npz")
    rows = [{"features": REAL} | dict(zip(found["tests"], found["shares"], strict=True))]
    rng = np.random.default_rng(FLAGS.seed + 1)
    some = np.sort(rng.permutation(np.flatnonzero(testable))[: FLAGS.null_sample])
    if not some.size:
        return pd.DataFrame(rows)
    part, x, sets = z[:, some], inputs.embedding, inputs.sets
    density = part.getnnz(axis=0) / part.shape[0]
    fresh = nulls.untrained(dictionary, FLAGS.seed).encode(x, sparse=True)
    fresh = fresh[:, np.flatnonzero(fresh.getnnz(axis=0))[: FLAGS.null_sample]]
    means = inputs.expression.means
    cases = {
        PERMUTED: (nulls.permuted_cells(part, FLAGS.seed + 1), sets),
        "random gene sets": (part, nulls.random_sets(sets, FLAGS.seed)),
        "genes of like expression": (part, nulls.relabelled_genes(sets, means, FLAGS.seed)),
        "random directions": (nulls.random_directions(x, density, FLAGS.seed), sets),
        "untrained dictionary": (fresh, sets),
        "single dimensions": (nulls.neurons(x), sets),
    }
    for name, (activations, some_sets) in cases.items():
        logging.info("null: %s", name)
        if not activations.nnz:
            continue
        of_terms = {"known": known} if some_sets is sets else {}
        null, _ = lens.annotate(
            activations, inputs.expression, some_sets, rule, null_features=FLAGS.null_features,
            seed=FLAGS.seed + 2, memory_bytes=memory_bytes(), progress=False,
            **of_terms,
        )  # fmt: skip
        shares = {test: null.share_named(test) for test in null.log_p}
        rows.append({"features": name, "named": null.share_named()} | shares)
    return pd.DataFrame(rows)

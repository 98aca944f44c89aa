"""Structure beside scikit-learn's cosines, numpy's quantiles and scipy's test, pair by pair."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity

from experiments.simulation import recovery, structure
from experiments.simulation.data import Large
from sae_jax import InputError

SIMULATION = Large(cells=400, genes=90, programs=6, cell_types=7)
WANTED = (20, 50, 90)


@pytest.fixture(scope="module")
def x_active() -> np.ndarray:
    return SIMULATION.block(0).x_active


def sums_of(z: np.ndarray, v: np.ndarray) -> recovery.Sums:
    return recovery.Sums.of([(z[:150], v[:150]), (z[150:], v[150:])])


@pytest.mark.parametrize("entries", [2**22, 200])
def test_it_is_what_the_whole_matrix_gives(
    x_active: np.ndarray, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "ENTRIES", entries)
    rng = np.random.default_rng(2)
    z = np.maximum(x_active @ rng.normal(size=(6, 9)), 0)
    z[:, 4] = 0  # a dead latent has no cosine
    found = structure.structure(sums_of(z, x_active), SIMULATION.m, WANTED)

    y = SIMULATION.counts(x_active)
    cosines = cosine_similarity(np.delete(z, 4, axis=1).T, y.T)
    made = structure.Cosines.of(sums_of(z, x_active), SIMULATION.m)
    assert np.concatenate(list(made.blocks())) == pytest.approx(cosines, abs=1e-6)
    m = SIMULATION.m.astype(int)
    rows = []
    for percent in WANTED:
        connected = cosines >= np.quantile(cosines, percent / 100, method="inverted_cdf") - 1e-7
        of = {}
        for latent in connected:
            hits = [(latent & (program > 0)).sum() for program in m]
            best = int(np.argmax(hits))
            if hits[best]:
                of.setdefault(best, []).append((hits[best], latent.mean()))
        for program, pairs in sorted(of.items()):
            tests = [
                6 * stats.binomtest(int(n), int(m[program].sum()), share, "greater").pvalue
                for n, share in pairs
            ]
            hits, share = max(pairs, key=lambda pair: (pair[0], -pair[1]))
            rows.append(
                {
                    "percentile": percent, "program": program, "share": share, "hits": hits,
                    "p": min(1, tests[pairs.index((hits, share))]),
                    "coverage": hits / m[program].sum(), "latents": len(pairs),
                    "significant": sum(p < 0.05 for p in tests),
                }
            )  # fmt: skip
    wanted = pd.DataFrame(rows)
    assert wanted["significant"].any()
    pd.testing.assert_frame_equal(
        found[wanted.columns], wanted, check_dtype=False, rtol=1e-4, atol=1e-12
    )


def test_latents_that_are_programs_cover_them_and_permuted_genes_do_not(
    x_active: np.ndarray,
) -> None:
    """With one latent a program, M itself is read from the cosines."""
    rng = np.random.default_rng(0)
    own = rng.exponential(size=(4000, 6)) * (rng.random((4000, 6)) < 0.1)
    simulation = Large(cells=400, genes=500, programs=6)
    sums = sums_of(own, own)
    share = int(100 * (1 - simulation.m.mean()))  # connected: as many as there are ones in M
    found = structure.structure(sums, simulation.m, [share])
    assert found["program"].tolist() == list(range(6))
    assert (found["coverage"] > 0.9).all()
    assert (found["p"] < 1e-20).all()
    null = structure.permuted(simulation.m, seed=1)
    assert sorted(map(tuple, null.T)) == sorted(map(tuple, simulation.m.T))
    chance = structure.structure(sums, simulation.m, [share], null=null)
    assert (chance["coverage"] < 0.35).all()
    assert (chance["p"] > 1e-3).all()


@pytest.mark.parametrize("wanted", [(1, 20, 50, 99, 100), (50,)])
def test_percentiles_are_numpys_ties_and_negatives_included(wanted: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    for values in (
        rng.normal(size=(101, 7)), rng.integers(-3, 3, (50, 4)) / 2, np.full((9, 9), -0.0),
        1e-4 * rng.random((1000, 3)) + 0.5,
    ):  # fmt: skip
        values = values.astype(np.float32)
        found = structure.percentiles(lambda values=values: iter(np.split(values, [3, 8])), wanted)
        truth = np.quantile(values, np.asarray(wanted) / 100, method="inverted_cdf")
        np.testing.assert_array_equal(found, truth)


def test_what_is_refused(x_active: np.ndarray) -> None:
    with pytest.raises(InputError, match="no latent is active"):
        structure.structure(sums_of(np.zeros((400, 3)), x_active), SIMULATION.m)
    with pytest.raises(InputError, match=r"percentiles \(0,\) must lie in 1 to 100"):
        structure.percentiles(lambda: iter([np.ones(3)]), [0])

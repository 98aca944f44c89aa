"""Both generators: moments, connectivity, correlations against closed forms; bytes over devices."""

import hashlib
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.simulation import data
from sae_jax import InputError

ROOT = Path(__file__).parents[2]
RATE, ON = data.ACTIVITY_RATE, np.asarray(data.ON)
ONE_DEVICE = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
from tests.experiments.test_simulation_data import digest
print(digest(), jax.device_count())
"""


def digest() -> str:
    """Of everything that is drawn."""
    large = data.Large(cells=1000, genes=40)
    parts = [data.small().variables, large.m, large.activity, *vars(large.block(0)).values()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@pytest.fixture(scope="module")
def small() -> data.Small:
    """240,000 cells: twenty seeds."""
    parts = [data.small(seed) for seed in range(20)]
    names = ("y", "x_active", "a", "x")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return data.Small(**joined, m=parts[0].m)


@pytest.fixture(scope="module")
def large() -> tuple[data.Large, data.Cells]:
    simulation = data.Large(seed=1, cells=20_000, genes=500)
    blocks = [vars(block) for block in simulation.blocks()]
    return simulation, data.Cells(
        **{name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    )


def within(found: np.ndarray, wanted: np.ndarray, variance: np.ndarray, n: int) -> None:
    """A mean of n draws of this variance, to five standard errors."""
    assert (np.abs(found - wanted) <= 5 * np.sqrt(variance / n)).all(), (found, wanted)


def test_moments_of_the_small_simulation(small: data.Small) -> None:
    n = len(small.y)
    within(small.a.mean(), RATE, RATE, n)
    within(small.x.mean(axis=0), ON, ON * (1 - ON), n)
    # X' = A X of independent A ~ Poisson(2), X ~ Bernoulli(p): mean 2 p, E[X'²] = (2 + 4) p.
    variance = (RATE + RATE**2) * ON - (RATE * ON) ** 2
    within(small.x_active.mean(axis=0), RATE * ON, variance, n)
    np.testing.assert_allclose(small.x_active.var(axis=0), variance, rtol=0.03)


def test_correlations_of_the_small_simulation(small: data.Small) -> None:
    variance = (RATE + RATE**2) * ON - (RATE * ON) ** 2
    # Two X' share A alone: covariance p q Var(A).
    covariance = RATE * np.outer(ON, ON)
    np.fill_diagonal(covariance, variance)
    found = np.corrcoef(small.x_active.T)
    wanted = covariance / np.sqrt(np.outer(variance, variance))
    np.testing.assert_allclose(found, wanted, atol=0.012)
    of_y = small.m.T.astype(float) @ covariance @ small.m
    np.testing.assert_allclose(np.cov(small.y.T), of_y, rtol=0.03, atol=0.02)
    # X' with A: covariance p Var(A).
    with_a = [np.corrcoef(small.a[:, 0], x)[0, 1] for x in small.x_active.T]
    np.testing.assert_allclose(with_a, ON * np.sqrt(RATE / variance), atol=0.01)


def test_the_small_simulation_is_the_codes(small: data.Small) -> None:
    np.testing.assert_array_equal(small.x_active, small.a * small.x)
    np.testing.assert_array_equal(small.y[:, 1], small.x_active[:, 0] + small.x_active[:, 1])
    np.testing.assert_array_equal(small.y[:, 4], small.x_active[:, 2])
    assert small.m.sum() == 7
    names = {name: small.variables[:, where] for name, where in data.GROUPS.items()}
    for name, wanted in (("Y", small.y), ("X'", small.x_active), ("A", small.a), ("X", small.x)):
        np.testing.assert_array_equal(names[name], wanted)
    assert data.small().y.shape == (12_000, 5)


def test_the_texts_connectivity_is_sparse() -> None:
    drawn = [data.small(seed, connectivity="random").m for seed in range(60)]
    assert set(np.unique(drawn)) == {0, 1}
    within(np.mean(drawn), 0.1, 0.09, 60 * 15)


def test_moments_of_the_large_simulation(large: tuple[data.Large, data.Cells]) -> None:
    _, cells = large
    n = len(cells.x)
    rates = 1 + 0.1 * np.arange(100)
    within(cells.x.mean(axis=0), rates, rates, n)
    np.testing.assert_allclose(cells.x.var(axis=0), rates, rtol=0.08)
    for batch in range(3):
        of_batch = cells.b[cells.batch == batch]
        within(of_batch.mean(), batch, 0.01, len(of_batch))
        np.testing.assert_allclose(of_batch.std(), 0.1, rtol=0.05)
        within((cells.batch == batch).mean(), 1 / 3, 2 / 9, n)
    counted = np.bincount(cells.cell_type, minlength=40) / n
    within(counted, 1 / 40, 39 / 1600, n)
    # One B is added to every program: two X' have covariance Var(B) = 2/3 + .01.
    noise = np.cov(cells.x_noisy[:, [10, 90]].T)[0, 1]
    np.testing.assert_allclose(noise, 2 / 3 + 0.01, atol=0.15)
    np.testing.assert_allclose(cells.b.var(), 2 / 3 + 0.01, rtol=0.03)


def test_connectivity_of_the_large_simulation(large: tuple[data.Large, data.Cells]) -> None:
    simulation, cells = large
    within(simulation.m.mean(), 0.1, 0.09, simulation.m.size)
    within(simulation.activity.mean(), 0.3, 0.21, simulation.activity.size)
    np.testing.assert_array_equal(cells.a, simulation.activity[cells.cell_type])
    np.testing.assert_array_equal(cells.x_noisy, cells.x + cells.b)
    np.testing.assert_array_equal(cells.x_active, cells.x_noisy * cells.a)
    of_one = simulation.counts(cells.x_active[:5])
    gene = np.flatnonzero(simulation.m[:, 7])
    np.testing.assert_allclose(of_one[:, 7], cells.x_active[:5, gene].sum(axis=1), rtol=1e-5)


def test_the_text_reaches_110() -> None:
    simulation = data.Large(variant="text", cells=1000, genes=10)
    np.testing.assert_allclose(simulation.rates, 1.1 * np.arange(1, 101), rtol=1e-6)
    np.testing.assert_array_equal(simulation.noise_means, [1, 2, 3])
    within(simulation.block(0).x[:, 99].mean(), 110, 110, 1000)


def test_a_block_depends_on_seed_and_number_alone() -> None:
    long, short = data.Large(cells=3000, genes=20), data.Large(cells=2500, genes=20)
    np.testing.assert_array_equal(long.block(2).x[:500], short.block(2).x)
    assert not (long.block(1).x == long.block(2).x).all()
    assert not (long.block(1).x == data.Large(seed=1, cells=3000, genes=20).block(1).x).all()


def test_the_same_bytes_on_one_device_and_on_two() -> None:
    assert jax.device_count() == 2
    process = subprocess.run(
        [sys.executable, "-c", ONE_DEVICE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [digest(), "1"]


def test_a_block_is_the_same_on_the_second_device() -> None:
    simulation = data.Large(cells=1000, genes=20)
    first = simulation.block(0)
    with jax.default_device(jax.devices()[-1]):
        second = simulation.block(0)
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: data.small(cells=0), "cells=0"),
        (lambda: data.Large(cells=1), "cells=1"),
        (lambda: data.Large(variant="book"), "variant='book'"),
        (lambda: data.Large(cells=1500).block(2), "no block 2"),
        (lambda: data.Large(cells=1500).block(-1), "no block -1"),
    ],
)
def test_what_is_refused(call: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()

"""Semi-NMF against its equations in NumPy, and its codes against non-negative least squares."""

import jax
import numpy as np
import pytest
from scipy.optimize import nnls
from sklearn.cluster import KMeans

from analysis import semi_nmf
from sae_jax.errors import InputError

WIDTHS = (3, 11)  # below and above d


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Rows [70, 6] of three non-negative parts in directions of any sign, and noise."""
    rng = np.random.default_rng(0)
    parts = np.maximum(rng.normal(size=(70, 3)), 0) @ rng.normal(size=(3, 6))
    return parts + 0.05 * rng.normal(size=(70, 6))


def plain(x: np.ndarray, c: int, iterations: int, ridge: float) -> tuple[np.ndarray, list[float]]:
    """The updates of Ding et al. as they are printed."""

    def plus(a: np.ndarray) -> np.ndarray:
        return (np.abs(a) + a) / 2

    def minus(a: np.ndarray) -> np.ndarray:
        return (np.abs(a) - a) / 2

    z = np.eye(c)[KMeans(c, n_init=1, random_state=0).fit(x).labels_] + 0.2
    r = ridge * (z**2).sum() / c
    f = np.linalg.inv(z.T @ z + r * np.eye(c)) @ z.T @ x
    objective = []
    for _ in range(iterations):
        up = plus(x @ f.T) + z @ minus(f @ f.T)
        down = minus(x @ f.T) + z @ plus(f @ f.T)
        z = z * np.sqrt(up / down)
        f = np.linalg.inv(z.T @ z + r * np.eye(c)) @ z.T @ x
        objective.append(((x - z @ f) ** 2).sum() + r * (f**2).sum())
    return f, objective


@pytest.mark.parametrize("c", WIDTHS)
def test_the_updates_are_those_of_the_paper_and_never_raise_the_objective(
    x: np.ndarray, c: int
) -> None:
    with jax.enable_x64(True):
        found = semi_nmf.fit(x, c, iterations=80, tolerance=0.0, ridge=1e-3)
    f, objective = plain(x, c, 80, 1e-3)
    assert found.objective.dtype == np.float64
    np.testing.assert_allclose(found.objective, objective, rtol=1e-9)
    np.testing.assert_allclose(found.decoder, f, rtol=1e-6, atol=1e-8)
    assert (np.diff(found.objective) <= 0).all()
    assert found.objective[-1] < found.objective[0] / 2


def test_without_a_ridge_it_is_the_paper_s_f(x: np.ndarray) -> None:
    with jax.enable_x64(True):
        found = semi_nmf.fit(x, 3, iterations=30, tolerance=0.0, ridge=0.0)
    np.testing.assert_allclose(found.objective, plain(x, 3, 30, 0.0)[1], rtol=1e-9)


@pytest.mark.parametrize("c", WIDTHS)
def test_codes_of_new_rows_are_non_negative_least_squares(x: np.ndarray, c: int) -> None:
    fitted = semi_nmf.fit(x[:50].astype(np.float32), c)
    z = fitted.encode(x[50:].astype(np.float32))
    assert (z >= 0).all()
    errors = np.linalg.norm(x[50:] - fitted.decode(z), axis=1)
    best = np.array([nnls(fitted.decoder.T.astype(np.float64), row)[1] for row in x[50:]])
    assert (errors >= best - 1e-5).all()
    spread = np.linalg.norm(x[50:], axis=1).mean()
    assert (errors - best).max() < (0.02 if c == 3 else 0.08) * spread


def test_what_non_negative_least_squares_leaves_out_is_0(x: np.ndarray) -> None:
    fitted = semi_nmf.fit(x.astype(np.float32), 3)
    z = fitted.encode(-x.astype(np.float32))  # rows that are far from what is coded
    best = np.array([nnls(fitted.decoder.T.astype(np.float64), -row)[0] for row in x])
    assert (best == 0).mean() > 0.5
    assert (z[best == 0] == 0).mean() > 0.9
    assert (z[best > 0.05] > 0).all()


def test_codes_do_not_depend_on_other_rows(x: np.ndarray) -> None:
    rows = x.astype(np.float32)
    fitted = semi_nmf.fit(rows, 4, iterations=60)
    whole = fitted.encode(rows)
    np.testing.assert_array_equal(fitted.encode(rows[::-1])[::-1], whole)
    np.testing.assert_array_equal(fitted.encode(rows[5:6]), whole[5:6])
    np.testing.assert_array_equal(fitted.encode(rows, sparse=True).toarray(), whole)


def test_three_parts_are_found_and_their_absence_is_0(x: np.ndarray) -> None:
    found = semi_nmf.fit(x.astype(np.float32), 3)
    error = np.square(x - found.decode(found.encode(x.astype(np.float32)))).sum()
    assert 1 - error / np.square(x - x.mean(axis=0)).sum() > 0.98
    rows = (np.array([[1.0, 0, 0], [0, 2, 0]]) @ found.decoder).astype(np.float32)
    z = found.encode(rows)
    np.testing.assert_allclose(z, [[1, 0, 0], [0, 2, 0]], atol=0.04)  # slow where it is exact


def test_it_stops_when_little_changes(x: np.ndarray) -> None:
    found = semi_nmf.fit(x.astype(np.float32), 3, tolerance=0.02)
    assert found.converged
    fall = -np.diff(found.objective) / found.objective[:-1]
    assert (fall[:-1] > 0.02).all()
    assert fall[-1] <= 0.02
    assert not semi_nmf.fit(x.astype(np.float32), 3, iterations=3).converged


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_components": 71}, "n_components=71 must lie in 1 .. 70"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"ridge": -1}, "ridge=-1"),
        ({"x": np.full((4, 2), np.nan)}, "NaN"),
    ],
)
def test_what_is_refused(x: np.ndarray, changed: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        semi_nmf.fit(**({"x": x, "n_components": 3} | changed))


def pursued(row: np.ndarray, f: np.ndarray, k: int) -> np.ndarray:
    """Non-negative matching pursuit of one row, solved by SciPy after each step."""
    chosen: list[int] = []
    z = np.zeros(len(f))
    for _ in range(k):
        gain = (row - z @ f) @ (f / np.linalg.norm(f, axis=1, keepdims=True)).T
        gain[chosen] = -np.inf
        chosen.append(int(gain.argmax()))
        z = np.zeros(len(f))
        z[chosen] = nnls(f[chosen].T, row)[0]
    return z


def test_sparse_codes_are_those_of_matching_pursuit(x: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    f = rng.normal(size=(15, 6))
    fitted = semi_nmf.SemiNMF(f.astype(np.float32), np.zeros(1), True, 1, k=5)
    z = fitted.encode(x.astype(np.float32))
    wanted = np.stack([pursued(row, f, 5) for row in x])
    assert ((wanted > 0).sum(axis=1) < 5).any()  # the limit of 0 is felt
    assert (z >= 0).all()
    assert (z > 0).sum(axis=1).max() == 5
    errors, best = (np.square(x - codes @ f).sum(axis=1) for codes in (z, wanted))
    assert np.abs(errors - best).max() < 0.005 * np.square(x).sum(axis=1).mean()
    same = ((z > 0) == (wanted > 0)).all(axis=1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(z[same], wanted[same], atol=0.15)  # of some 2
    np.testing.assert_array_equal(fitted.encode(x[::-1].astype(np.float32))[::-1], z)
    np.testing.assert_array_equal(fitted.encode(x.astype(np.float32), sparse=True).toarray(), z)


def test_a_sparse_factorisation_finds_rows_that_are_sparse() -> None:
    rng = np.random.default_rng(1)
    planted = np.zeros((120, 10))
    for row in planted:
        row[rng.permutation(10)[:2]] = rng.uniform(0.5, 2, 2)
    x = (planted @ rng.normal(size=(10, 8))).astype(np.float32)
    found = semi_nmf.fit_sparse(x, 10, 2, iterations=40, seed=0)
    z = found.encode(x)
    assert ((z > 0).sum(axis=1) <= 2).all()
    assert (z >= 0).all()
    error = np.square(x - found.decode(z)).sum()
    assert error == pytest.approx(found.objective.min(), rel=1e-4)
    assert 1 - error / np.square(x - x.mean(axis=0)).sum() > 0.9
    one = semi_nmf.fit_sparse(x, 10, 1, iterations=5)
    assert one.objective.min() > 2 * found.objective.min()
    assert ((z > 0).sum(axis=0) > 0).all()  # none is left unused


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"k": 0}, "k=0 must lie in 1 .. 4"), ({"k": 5}, "k=5 must lie"),
     ({"n_components": 71}, "n_components=71"), ({"iterations": 0}, "iterations=0")],
)  # fmt: skip
def test_what_a_sparse_fit_refuses(x: np.ndarray, changed: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        semi_nmf.fit_sparse(**({"x": x, "n_components": 4, "k": 2} | changed))

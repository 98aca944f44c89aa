"""Linear readouts against NumPy's and scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

from experiments.simulation import superposition as sp
from sae_jax import InputError

RANDOM = np.random.default_rng(0)
Z = RANDOM.normal(50, 3, (500, 4))  # far from 0: uncentred sums would lose digits
Y = np.column_stack([Z @ [1, -2, 0.5, 0] + 7, Z @ [0, 0, 1, 1] + RANDOM.normal(0, 5, 500),
                     RANDOM.normal(0, 1, 500), np.full(500, 3.0)])  # fmt: skip


def in_blocks(size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(Z[i : i + size], Y[i : i + size]) for i in range(0, 500, size)]


@pytest.mark.parametrize("size", [500, 64, 1])
def test_least_squares_in_blocks_are_those_of_lstsq(size: int) -> None:
    fit = sp.least_squares(sp.Moments.of(in_blocks(size)))
    with_ones = np.column_stack([Z, np.ones(500)])
    wanted = np.linalg.lstsq(with_ones, Y, rcond=None)[0]
    np.testing.assert_allclose(fit.coefficients, wanted[:-1], atol=1e-8)
    np.testing.assert_allclose(fit.intercept, wanted[-1], atol=1e-6)
    error = ((Y - with_ones @ wanted) ** 2).sum(axis=0)
    r2 = 1 - error[:3] / ((Y - Y.mean(axis=0)) ** 2).sum(axis=0)[:3]
    np.testing.assert_allclose(fit.r2[:3], r2, atol=1e-9)
    assert np.isnan(fit.r2[3])  # a constant
    assert fit.r2[0] == pytest.approx(1)


def test_r2_of_other_cells() -> None:
    fit = sp.least_squares(sp.Moments.of([(Z[:300], Y[:300])]))
    found = sp.r2(sp.Moments.of([(Z[300:], Y[300:])]), fit.coefficients, fit.intercept)
    model = LinearRegression().fit(Z[:300], Y[:300])
    for j in range(3):
        one = LinearRegression().fit(Z[:300], Y[:300, j])
        assert found[j] == pytest.approx(one.score(Z[300:], Y[300:, j]), abs=1e-9)
    np.testing.assert_allclose(fit.coefficients, model.coef_.T, atol=1e-8)


def test_ridge_is_scikit_learns() -> None:
    fit = sp.least_squares(sp.Moments.of(in_blocks(100)), ridge=0.3)
    wanted = Ridge(alpha=0.3 * 500).fit(Z, Y)
    np.testing.assert_allclose(fit.coefficients, wanted.coef_.T, atol=1e-8)
    np.testing.assert_allclose(fit.intercept, wanted.intercept_, atol=1e-7)


def test_repeated_latents_share() -> None:
    twice = np.column_stack([Z, Z[:, :1]])
    fit = sp.least_squares(sp.Moments.of([(twice, Y)]))
    np.testing.assert_allclose(fit.coefficients[[0, 4], 0], [0.5, 0.5], atol=1e-6)
    assert fit.r2[0] == pytest.approx(1)


def test_by_group() -> None:
    values = np.array([1.0, 0.5, np.nan, 0.0, np.nan])
    groups = {"a": slice(0, 3), "b": slice(3, 4), "c": slice(4, 5)}
    found = sp.by_group(values, groups)
    assert found["a"] == 0.75
    assert found["b"] == 0
    assert np.isnan(found["c"])


def test_gradient_descent_of_one_batch_is_the_formula() -> None:
    z, y = Z[:32] / 50, Y[:32, :2] / 50
    started = sp.gradient_descent(z, y, learning_rate=0.0, epochs=1, batch_size=32, seed=4)
    weight, bias = started.coefficients, started.intercept
    for _ in range(5):
        residual = z @ weight + bias - y
        gradient = 2 * z.T @ residual / residual.size, 2 * residual.sum(axis=0) / residual.size
        weight, bias = weight - 0.1 * gradient[0], bias - 0.1 * gradient[1]
    found = sp.gradient_descent(z, y, learning_rate=0.1, epochs=5, batch_size=32, seed=4)
    np.testing.assert_allclose(found.coefficients, weight, atol=1e-5)
    np.testing.assert_allclose(found.intercept, bias, atol=1e-5)
    prediction = z @ found.coefficients + found.intercept
    r2 = 1 - ((y - prediction) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(found.r2, r2, atol=1e-9)


def test_long_gradient_descent_nears_least_squares() -> None:
    z = (Z - Z.mean(axis=0)) / Z.std(axis=0)
    y = (Y[:, :2] - Y[:, :2].mean(axis=0)) / Y[:, :2].std(axis=0)
    exact = sp.least_squares(sp.Moments.of([(z, y)]))
    settings = {"learning_rate": 1e-2, "epochs": 200, "batch_size": 100}
    for optimizer, near in (("sgd", 0.02), ("adam", 0.02)):
        found = sp.gradient_descent(z, y, optimizer=optimizer, **settings)
        assert (found.r2 <= exact.r2[:2] + 1e-9).all()
        np.testing.assert_allclose(found.r2, exact.r2[:2], atol=near)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sp.Moments.of([]), "no cells"),
        (lambda: sp.Moments.of([(Z * np.nan, Y)]), "finite"),
        (lambda: sp.least_squares(sp.Moments.of([(Z, Y)]), ridge=-1), "ridge=-1"),
        (lambda: sp.gradient_descent(Z[:9], Y[:9]), "batch_size=128"),
        (lambda: sp.gradient_descent(Z, Y, optimizer="lion"), "lion"),
    ],
)
def test_what_is_refused(call: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()

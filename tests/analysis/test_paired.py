import warnings

import jax
import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats

from analysis import paired
from sae_jax.errors import InputError

Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def case(
    seed: int = 0, n_cells: int = 12, n_genes: int = 6, mean: float = 4, alpha: float = 0.3
) -> Case:
    """Counts before and after, and libraries; every cell has a level of its own."""
    rng = np.random.default_rng(seed)
    libraries = rng.uniform(500, 3000, (2, n_cells))
    level = mean * rng.gamma(2, 0.5, (n_cells, n_genes)) / 1500
    fold = np.exp(rng.normal(0, 0.7, n_genes))
    means = libraries[:, :, None] * level * np.stack([np.ones(n_genes), fold])[:, None]
    counts = rng.poisson(means * rng.gamma(1 / alpha, alpha, means.shape)).astype(float)
    return *counts, *libraries


def statsmodels_fit(
    y0: np.ndarray,
    y1: np.ndarray,
    library: np.ndarray,
    library_after: np.ndarray,
    alpha: float,
    pairing: str,
    robust: bool = False,
) -> tuple[float, float, float]:
    """Coefficient, standard error and p of one gene, with a dummy for each cell that has counts."""
    seen = (y0 + y1 > 0) if pairing == "cell" else np.ones(len(y0), dtype=bool)
    n = int(seen.sum())
    dummies = np.vstack([np.eye(n)] * 2) if pairing == "cell" else np.ones((2 * n, 1))
    design = np.column_stack([dummies, np.repeat([0.0, 1.0], n)])
    family = sm.families.NegativeBinomial(alpha=alpha) if alpha else sm.families.Poisson()
    y = np.concatenate([y0[seen], y1[seen]])
    offset = np.log(np.concatenate([library[seen], library_after[seen]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = sm.GLM(y, design, family=family, offset=offset).fit(
            maxiter=500, tol=1e-14, tol_criterion="params"
        )
    if robust:
        # One cluster per cell. At the optimum the scores of a cell's own intercept are zero.
        hessian = -fit.model.hessian(fit.params, observed=True)
        scores = fit.model.score_obs(fit.params).reshape(2, n, -1).sum(axis=0)
        influence = np.linalg.solve(hessian, scores.T)[-1]
        se = np.sqrt(np.sum(influence**2) * n / (n - 1))
        return fit.params[-1], se, 2 * stats.norm.sf(abs(fit.params[-1]) / se)
    return fit.params[-1], fit.bse[-1], fit.pvalues[-1]


@pytest.mark.parametrize("pairing", ["cell", "offset"])
@pytest.mark.parametrize("mean", [0.7, 5.0, 200.0])
@pytest.mark.parametrize("robust", [False, True])
def test_equals_statsmodels(pairing: str, mean: float, robust: bool) -> None:
    y0, y1, library, library_after = case(mean=mean)
    alphas = np.array([0, 1e-6, 0.05, 0.5, 2, 8])
    result = paired.negative_binomial(
        y0,
        y1,
        library,
        library_after,
        dispersion=alphas,
        pairing=pairing,
        robust=robust,
        block=4,
    )
    assert result.converged.all()
    for gene, alpha in enumerate(alphas):
        effect, se, p = statsmodels_fit(
            y0[:, gene], y1[:, gene], library, library_after, alpha, pairing, robust
        )
        np.testing.assert_allclose(result.effect[gene] * np.log(2), effect, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(result.standard_error[gene] * np.log(2), se, rtol=1e-6)
        np.testing.assert_allclose(result.p[gene], p, rtol=0, atol=1e-8)
    np.testing.assert_allclose(10**-result.minus_log10_p, result.p, rtol=1e-9)
    np.testing.assert_allclose(result.q, stats.false_discovery_control(result.p))


@pytest.mark.parametrize("pairing", ["cell", "offset"])
def test_predicted_means_equal_statsmodels(pairing: str) -> None:
    """Values of a decoder: never zero, no integers, nearly without noise."""
    rng = np.random.default_rng(1)
    library = rng.uniform(500, 3000, 15)
    y0 = library[:, None] * rng.gamma(2, 1e-3, (15, 5)) + 1e-7
    y1 = y0 * np.exp(rng.normal(0, 0.3, (15, 5)))
    result = paired.negative_binomial(y0, y1, library, dispersion=0.4, pairing=pairing)
    for gene in range(5):
        effect, se, p = statsmodels_fit(y0[:, gene], y1[:, gene], library, library, 0.4, pairing)
        np.testing.assert_allclose(result.effect[gene] * np.log(2), effect, rtol=1e-6)
        np.testing.assert_allclose(result.standard_error[gene] * np.log(2), se, rtol=1e-6)
        np.testing.assert_allclose(result.p[gene], p, rtol=0, atol=1e-8)


def test_without_dispersion_pairing_is_the_binomial_of_each_cell() -> None:
    """Poisson counts given a cell's sum: the sums of both sides decide, in closed form."""
    y0, y1, library, _ = case(n_cells=40)
    result = paired.negative_binomial(y0, y1, library, dispersion=0)
    sums0, sums1 = y0.sum(axis=0), y1.sum(axis=0)
    np.testing.assert_allclose(result.effect, np.log2(sums1 / sums0), atol=1e-12)
    expected = np.sqrt(1 / sums0 + 1 / sums1) / np.log(2)
    np.testing.assert_allclose(result.standard_error, expected, rtol=1e-12)


def test_one_cell_gives_its_own_ratio() -> None:
    for pairing in ("cell", "offset"):
        result = paired.negative_binomial(
            [[3.0]], [[12.0]], [100], [200], dispersion=0.5, pairing=pairing
        )
        np.testing.assert_allclose(result.effect, [1.0])
        variance = (1 / 3 + 0.5) + (1 / 12 + 0.5)
        np.testing.assert_allclose(result.standard_error, np.sqrt(variance) / np.log(2))
        robust = paired.negative_binomial([[3.0]], [[12.0]], [1], pairing=pairing, robust=True)
        assert robust.converged.all()
        assert np.isnan(robust.p).all()


@pytest.mark.parametrize("pairing", ["cell", "offset"])
@pytest.mark.parametrize("dispersion", [None, 0.7])
def test_genes_without_an_estimate(pairing: str, dispersion: float | None) -> None:
    y0, y1, library, library_after = case(n_genes=5)
    y0[:, 0] = y1[:, 0] = y0[:, 1] = y1[:, 2] = 0
    result = paired.negative_binomial(
        y0, y1, library, library_after, dispersion=dispersion, pairing=pairing
    )
    np.testing.assert_array_equal(result.effect[:3], [np.nan, np.inf, -np.inf])
    assert result.converged.tolist() == [False, False, False, True, True]
    for values in (result.standard_error, result.z, result.p, result.minus_log10_p, result.q):
        np.testing.assert_array_equal(np.isnan(values), ~result.converged)
    assert np.isfinite(result.dispersion).all()


def test_cells_with_zero_on_both_sides_weigh_nothing() -> None:
    y0, y1, library, library_after = case(mean=1.0)
    y0[:4] = y1[:4] = 0
    for dispersion in (0.5, None):
        whole, part = (
            paired.negative_binomial(
                y0[cells],
                y1[cells],
                library[cells],
                library_after[cells],
                dispersion=dispersion,
            )
            for cells in (slice(None), slice(4, None))
        )
        np.testing.assert_allclose(whole.effect, part.effect, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(whole.standard_error, part.standard_error, rtol=1e-9)


@given(st.integers(0, 1000), st.sampled_from(["cell", "offset"]), st.booleans())
def test_order_sides_and_format_do_not_matter(seed: int, pairing: str, estimate: bool) -> None:
    rng = np.random.default_rng(seed)
    y0, y1, library, library_after = case(seed, mean=float(rng.choice([0.3, 3, 100])))
    alpha = None if estimate else rng.choice([0, 0.1, 1, 10], 6)
    cells, genes = rng.permutation(12), rng.permutation(6)
    result = paired.negative_binomial(
        y0, y1, library, library_after, dispersion=alpha, pairing=pairing
    )
    shuffled = paired.negative_binomial(
        sparse.csr_array(y0[cells][:, genes]),
        sparse.coo_array(y1[cells][:, genes]),
        library[cells],
        library_after[cells],
        dispersion=None if alpha is None else alpha[genes],
        pairing=pairing,
    )
    swapped = paired.negative_binomial(
        y1, y0, library_after, library, dispersion=alpha, pairing=pairing
    )
    assert (result.converged == (np.isfinite(result.effect))).all()
    for name in ("effect", "standard_error", "p", "dispersion"):
        expected = getattr(result, name)
        sign = -1 if name == "effect" else 1
        options = {"rtol": 1e-7, "atol": 1e-9}
        np.testing.assert_allclose(getattr(shuffled, name), expected[genes], **options)
        np.testing.assert_allclose(sign * getattr(swapped, name), expected, **options)


def test_a_cells_own_depth_does_not_matter_to_pairs() -> None:
    y0, y1, library, library_after = case()
    scale = np.random.default_rng(1).uniform(0.1, 10, 12)
    one, other = (
        paired.negative_binomial(y0, y1, library * s, library_after * s) for s in (1, scale)
    )
    np.testing.assert_allclose(one.effect, other.effect, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(one.dispersion, other.dispersion, rtol=1e-7, atol=1e-9)


def test_far_values_converge() -> None:
    """Separations of 1e9 and dispersions far from the data, which plain Newton steps overshoot."""
    rng = np.random.default_rng(0)
    low, high = rng.uniform(1e-4, 1e-3, (30, 1)), rng.uniform(1e5, 1e6, (30, 1))
    for dispersion in (0, 1e-4, 1, 1e4):
        for pairing in ("cell", "offset"):
            result = paired.negative_binomial(
                low, high, np.ones(30), dispersion=dispersion, pairing=pairing
            )
            assert result.converged.all()
            assert 25 < result.effect[0] < 35


def test_robust_errors_are_right_where_the_intercepts_distort_the_model() -> None:
    """Counts of dispersion 3: what the docstring says of the three ways, for an effect of 1."""
    rng = np.random.default_rng(0)
    n_cells, n_genes = 200, 500
    level = 5 * rng.gamma(2, 0.5, (n_cells, n_genes))
    y0, y1 = (rng.poisson(m * rng.gamma(1 / 3, 3, m.shape)) for m in (level, 2 * level))

    def missed(**options: object) -> tuple[float, float]:
        """The mean effect, and how often the 95 % interval misses the truth."""
        result = paired.negative_binomial(y0, y1, np.ones(n_cells), **options)
        return result.effect.mean(), (abs(result.effect - 1) > 1.96 * result.standard_error).mean()

    model, model_missed = missed(dispersion=3)
    assert model > 1.05
    assert model_missed > 0.12
    for options in ({"dispersion": 0}, {"pairing": "offset"}):
        robust, robust_missed = missed(robust=True, **options)
        assert abs(robust - 1) < 0.03
        assert 0.03 < robust_missed < 0.08


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_dispersion_is_estimated_in_spite_of_an_intercept_per_cell(alpha: float) -> None:
    y0, y1, library, library_after = case(n_cells=4000, n_genes=20, alpha=alpha)
    result = paired.negative_binomial(y0, y1, library, library_after)
    assert abs(np.median(result.dispersion) / alpha - 1) < 0.1
    pooled = paired.negative_binomial(y0, y1, library, library_after, pairing="offset")
    assert (pooled.dispersion > result.dispersion).all()  # cells differ, and are not told apart


def test_dispersion_stays_within_its_bounds() -> None:
    """Means without noise, cells that never have counts twice, and wild ones."""
    y0, y1 = np.full((8, 3), 2.0), np.full((8, 3), 2.0)
    y0[:, 1], y1[:, 1] = np.tile([0, 1], 4), np.tile([1, 0], 4)
    y0[:, 2], y1[:, 2] = np.tile([0, 900], 4), np.tile([800, 0], 4)
    result = paired.negative_binomial(y0, y1, np.ones(8))
    assert result.dispersion.tolist() == [0, 0, paired.MAX_DISPERSION]
    assert result.converged.all()


def test_single_precision_stays_the_default() -> None:
    paired.negative_binomial(np.ones((2, 1)), np.ones((2, 1)), [1, 1])
    assert not jax.config.jax_enable_x64
    assert jax.numpy.ones(1).dtype == np.float32


def test_bad_input_is_refused() -> None:
    y, library = np.ones((4, 2)), np.ones(4)
    test = paired.negative_binomial
    with pytest.raises(InputError, match="pairing='donor'"):
        test(y, y, library, pairing="donor")
    with pytest.raises(InputError, match="block=0"):
        test(y, y, library, block=0)
    with pytest.raises(InputError, match=r"\(4, 2\) and after \(4, 1\)"):
        test(y, y[:, :1], library)
    with pytest.raises(InputError, match="at least one of each"):
        test(y[:, :0], y[:, :0], library)
    with pytest.raises(InputError, match="before has 1 dimensions"):
        test(y[0], y, library)
    for wrong in (-y, y * np.nan, y * np.inf, sparse.csr_array(-y)):
        with pytest.raises(InputError, match="after ranges from"):
            test(y, wrong, library)
    for wrong in (library[:3], library * 0, library * np.nan):
        with pytest.raises(InputError, match="library_after has shape"):
            test(y, y, library, wrong)
    with pytest.raises(InputError, match="one for each of the 2 genes"):
        test(y, y, library, dispersion=np.ones(3))
    for wrong in (-1, np.nan, [1, np.inf]):
        with pytest.raises(InputError, match="1 / θ"):
            test(y, y, library, dispersion=wrong)

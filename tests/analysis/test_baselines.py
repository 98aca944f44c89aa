"""Baselines: components that are known beforehand, and what is refused."""

import numpy as np
import pytest

from analysis import baselines
from sae_jax import InputError


@pytest.fixture(scope="module")
def mixed() -> tuple[np.ndarray, np.ndarray]:
    """Three skewed sources [cells, 3], and an embedding [cells, 5] in which they are mixed."""
    rng = np.random.default_rng(0)
    sources = rng.exponential(size=(3000, 3))
    return sources, (sources @ rng.normal(size=(3, 5)) + 2).astype(np.float32)


def test_pca_is_the_eigenvectors_of_the_covariance(mixed: tuple) -> None:
    x = mixed[1].astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    found = baselines.fit("PCA", x)
    assert found.n_components == 3  # 5 dimensions, 3 directions
    wanted = vectors[:, ::-1][:, :3].T
    assert np.abs((found.decoder * wanted).sum(axis=1)) == pytest.approx(1)
    z = found.encode(x)
    assert z.mean(axis=0) == pytest.approx(0, abs=1e-9)
    assert z.var(axis=0, ddof=1) == pytest.approx(values[::-1][:3])
    assert z @ found.decoder + x.mean(axis=0) == pytest.approx(x, abs=1e-5)


def test_svd_does_not_subtract_the_mean(mixed: tuple) -> None:
    x = mixed[1].astype(np.float64)
    found = baselines.fit("SVD", x, n_components=2)
    right = np.linalg.svd(x, full_matrices=False)[2][:2]
    assert np.abs((found.decoder * right).sum(axis=1)) == pytest.approx(1, abs=1e-6)
    assert np.abs(found.encode(x)) == pytest.approx(np.abs(x @ right.T), abs=1e-3)


def test_ica_finds_the_sources_pca_does_not(mixed: tuple) -> None:
    sources, x = mixed
    best = {}
    for each in baselines.fit_all(x):
        assert each.converged
        r = np.corrcoef(each.encode(x), sources, rowvar=False)
        best[each.name] = np.abs(r[: each.n_components, -3:]).max(axis=0).min()
    assert best["ICA"] > 0.99
    assert best["PCA"] < 0.95
    ica = baselines.fit("ICA", x)
    assert ica.encode(x) @ ica.decoder + x.mean(axis=0) == pytest.approx(x, abs=1e-4)


def test_no_convergence_is_told_not_warned_of(
    mixed: tuple, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(baselines, "ITERATIONS", 1)
    assert not baselines.fit("ICA", mixed[1]).converged
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "NMF"}, "'NMF' is not one of PCA, ICA, SVD"),
        ({"n_components": 4}, "n_components=4 must be at least 1, and at most the 3 directions"),
        ({"n_components": 0}, "n_components=0"),
        ({"x": np.full((4, 2), np.nan)}, "x must be finite"),
        ({"x": np.zeros(4)}, "give rows by dimensions"),
    ],
)
def test_what_is_refused(mixed: tuple, changed: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        baselines.fit(**({"name": "PCA", "x": mixed[1]} | changed))


def test_other_rows_are_refused(mixed: tuple) -> None:
    with pytest.raises(InputError, match="x has 4 dimensions, PCA has 5"):
        baselines.fit("PCA", mixed[1]).encode(mixed[1][:, :4])

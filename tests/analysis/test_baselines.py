"""Baselines: components that are known beforehand, one door for all, and what is refused."""

import jax
import numpy as np
import pytest
from scipy import sparse
from sklearn.cluster import KMeans

from analysis import baselines, nulls, semi_nmf
from sae_jax import Dictionary, InputError, SAEConfig, distributed, ensemble, metrics, models
from sae_jax.state import Normalizer


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


def test_reconstructions_lie_where_the_components_say(mixed: tuple) -> None:
    x = mixed[1].astype(np.float64)
    for each in baselines.fit_all(x, n_components=2):
        z = each.encode(x)
        bias = 0 if each.name == "SVD" else x.mean(axis=0)
        np.testing.assert_allclose(each.decode(z), z @ each.decoder + bias, atol=1e-6)
        np.testing.assert_allclose(each.decode(sparse.csr_matrix(z)), each.decode(z))
        np.testing.assert_allclose(each.encode(x, sparse=True).toarray(), z)


def test_clusters_are_one_code_a_row(mixed: tuple) -> None:
    x = mixed[1].astype(np.float64)
    found = baselines.clusters(x, 7, seed=3)
    z = found.encode(x[:50])
    np.testing.assert_array_equal(z.sum(axis=1), 1)
    distance = np.linalg.norm(x[:50, None] - found.decoder, axis=2)
    np.testing.assert_array_equal(z.argmax(axis=1), distance.argmin(axis=1))
    score = baselines.reconstruction(found, x)
    inertia = KMeans(7, n_init=1, random_state=3).fit(x).inertia_
    assert score["r2"] == pytest.approx(1 - inertia / np.square(x - x.mean(axis=0)).sum())
    assert (score["l0"], score["active"]) == (1, 7)


def test_random_directions_are_those_of_the_null(mixed: tuple) -> None:
    x = mixed[1].astype(np.float64)
    density = np.array([0.02, 0.3, 0.5, 0.5])
    found = baselines.random_directions(x, density, seed=4)
    z = found.encode(x)
    np.testing.assert_allclose(
        z, nulls.random_directions(x, density, 4).toarray(), rtol=1e-5, atol=1e-6
    )
    score = baselines.reconstruction(found, x)
    assert score["l0"] == pytest.approx(density.sum(), abs=0.01)
    # The decoder is the best there is.
    design = np.column_stack([z, np.ones(len(x))])
    error = np.square(x - design @ np.linalg.lstsq(design, x, rcond=None)[0]).sum()
    assert score["r2"] == pytest.approx(1 - error / np.square(x - x.mean(axis=0)).sum(), abs=1e-6)
    with pytest.raises(InputError, match="density must be shares above 0"):
        baselines.random_directions(x, [0.5, 0])


def test_the_door_measures_a_dictionary_as_training_does(mixed: tuple) -> None:
    x = mixed[1]
    config = SAEConfig(d_in=5, n_latents=16, input_normalization="zscore", seed=2)
    params = models.init(2, config.architecture, np.float32)
    normalizer = Normalizer(x.mean(axis=0), x.std(axis=0))
    found = baselines.reconstruction(Dictionary(config, params, normalizer), x)
    mesh = distributed.member_mesh(1)
    wanted = metrics.evaluate(
        jax.tree.map(lambda leaf: leaf[None], params),
        ensemble.stack_hyperparams([config], mesh, np.float32),
        x, normalizer, architecture=config.architecture, mesh=mesh,
    )  # fmt: skip
    for name in ("r2", "r2_scalar_mean", "l0"):
        assert found[name] == pytest.approx(wanted[name][0], rel=1e-5)
    assert found["active"] == wanted["live"][0]
    assert found["sparsity"] == pytest.approx(1 - found["l0"] / 16)


def test_the_door_does_not_depend_on_blocks(mixed: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    found = baselines.clusters(mixed[1], 5)
    whole = baselines.reconstruction(found, mixed[1])
    monkeypatch.setattr(baselines, "ROWS", 700)
    assert baselines.reconstruction(found, mixed[1]) == pytest.approx(whole)
    with pytest.raises(InputError, match="nothing to explain"):
        baselines.reconstruction(found, np.ones((5, 5)))


def test_one_table_of_all_methods(mixed: tuple) -> None:
    sources, x = mixed[0][:400], mixed[1][:400]
    rng = np.random.default_rng(5)
    labels = np.array(["low", "first", "second"])[
        np.where(sources[:, :2].max(axis=1) < 0.7, 0, 1 + sources[:, :2].argmax(axis=1))
    ]
    genes = np.log1p(rng.poisson(np.column_stack([sources, np.ones((400, 5))])))
    train, test = np.arange(250), np.arange(250, 400)
    coders = {
        "ICA": baselines.fit("ICA", x[train]),
        "semi-NMF": semi_nmf.fit(x[train], 8, iterations=30),
        "k-means": baselines.clusters(x[train], 20),
        "k-means, 2": baselines.clusters(x[train], 2),
    }
    table, probes = baselines.compare(
        coders, x[train], x[test], labels[train], labels[test], genes[train],
        sparse.csr_matrix(genes[test]), max_iter=100,
    )  # fmt: skip
    assert table.index.tolist() == [*coders, "neurons", "genes, L1 logistic", "genes, markers"]
    assert set(probes) == set(table.index)
    assert (table["rows"] == 150).all()
    assert table["accuracy"].idxmin() == "k-means, 2"
    assert table.loc[["ICA", "neurons"], "accuracy"].min() > 0.85
    assert table.loc["k-means", "r2"] > table.loc["k-means, 2", "r2"]
    assert table.loc["neurons":, "r2"].isna().all()
    assert 2 <= table.loc["genes, L1 logistic", "active"] <= 8
    row, probe = baselines.evaluate(coders["ICA"], x[train], x[test])
    assert probe is None
    assert np.isnan(row["accuracy"])
    assert row["r2"] == table.loc["ICA", "r2"]

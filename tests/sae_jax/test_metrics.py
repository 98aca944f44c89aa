from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import r2_score

from sae_jax import InputError, SAEConfig, distributed, ensemble, metrics
from sae_jax.data import open_rows
from sae_jax.dictionary import Dictionary
from sae_jax.state import Normalizer, Params

D, N = 4, 10
CONFIGS = [SAEConfig(d_in=D, n_latents=N, activation="topk", k=k) for k in (1, 4, N)]
NORMALIZER = Normalizer(mean=np.float32([3, 0, -2, 1]), scale=np.float32([2, 1, 5, 0.1]))


def weights(seed: int = 0) -> Params:
    """Three members; latents 0 and 1 never fire, latent 2 only where a row is far out."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=(len(CONFIGS), *shape)).astype(np.float32)  # noqa: E731
    params = Params(
        encoder=draw(D, N), encoder_bias=draw(N), decoder=draw(N, D) / 3, decoder_bias=draw(D),
        pre_bias=None,
    )  # fmt: skip
    params.encoder_bias[:, :2] = -1e6
    params.encoder_bias[:, 2] = -9
    return params


def data(rows: int) -> np.ndarray:
    x = np.random.default_rng(rows).normal(size=(rows, D)) * [[5, 1, 0.1, 2]] + [[50, 0, 3, -1]]
    return x.astype(np.float32)


def evaluate(params: Params, x: np.ndarray, normalizer: Normalizer | None) -> dict[str, np.ndarray]:
    mesh = distributed.member_mesh(1)
    hyper = ensemble.stack_hyperparams(CONFIGS, mesh, x.dtype)
    device = jax.tree.map(jnp.asarray, params)
    return metrics.evaluate(
        device, hyper, x, normalizer, architecture=CONFIGS[0].architecture, mesh=mesh
    )


def by_numpy(
    params: Params, member: int, x: np.ndarray, normalizer: Normalizer | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstructions in float64, from the equations."""
    mean, scale = (0, 1) if normalizer is None else (normalizer.mean[None], normalizer.scale[None])
    p = jax.tree.map(lambda leaf: leaf[member].astype(np.float64), params)
    pre = np.maximum((x - mean) / scale @ p.encoder + p.encoder_bias, 0)
    kth = np.sort(pre, axis=1)[:, [-CONFIGS[member].k]]
    z = np.where(pre >= kth, pre, 0)
    return z, (z @ p.decoder + p.decoder_bias) * scale + mean


@pytest.mark.parametrize("normalizer", [None, NORMALIZER], ids=["raw", "normalised"])
@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2050])
def test_metrics_equal_numpy_and_sklearn_around_the_batch_size(
    rows: int, normalizer: Normalizer | None
) -> None:
    params, x = weights(), data(rows)
    found = evaluate(params, x, normalizer)
    for i in range(len(CONFIGS)):
        z, y = by_numpy(params, i, x.astype(np.float64), normalizer)
        live = (z > 0).any(axis=0).sum()
        assert 0 < live < N
        total = np.square(x - x.mean(axis=0, keepdims=True, dtype=np.float64)).sum()
        total_scalar = np.square(x - x.mean(dtype=np.float64)).sum()
        expected = {
            "mse": np.square(x - y).mean(),
            "r2": r2_score(x, y, multioutput="variance_weighted"),
            "fvu": np.square(x - y).sum() / total,
            "r2_scalar_mean": 1 - np.square(x - y).sum() / total_scalar,
            "l1": z.sum(axis=1).mean(),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, rel=2e-5), name
        # A row whose k-th and next values agree to rounding may fall on either side.
        assert found["l0"][i] == pytest.approx((z > 0).sum(axis=1).mean(), abs=2.5 / rows)
        assert found["live"][i] == live
        assert found["dead"][i] == N - live
        assert found["alive_1pct"][i] == ((z > 0).mean(axis=0) >= 0.01).sum()
        norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
        cosine = ((x * y).sum(axis=1) / norms[0] / norms[1]).mean()
        assert found["cosine"][i] == pytest.approx(cosine, abs=1e-5)
        assert found["norm_ratio"][i] == pytest.approx((norms[1] / norms[0]).mean(), rel=2e-5)
    assert set(found) == {
        "mse", "r2", "fvu", "r2_scalar_mean", "l0", "l1", "live", "dead", "cosine", "norm_ratio",
        "alive_1pct",
    }  # fmt: skip


def test_r2_is_zero_for_the_mean_and_does_not_profit_from_an_offset_between_dimensions() -> None:
    """Bug of others: one mean for all dimensions gives any code of an anisotropic space R² ~ 1."""
    x = data(500)
    params = jax.tree.map(np.zeros_like, weights())
    params.decoder_bias[:] = x.mean(axis=0, keepdims=True)
    found = evaluate(params, x, None)
    np.testing.assert_allclose(found["r2"], np.zeros(3), atol=1e-4)
    assert np.all(found["r2_scalar_mean"] > 0.95)


def test_a_perfect_dictionary_has_r2_one() -> None:
    x = data(300)
    params = jax.tree.map(np.zeros_like, weights())
    params.encoder[:, :, :D], params.encoder[:, :, D : 2 * D] = np.eye(D), -np.eye(D)
    params.decoder[:, :D], params.decoder[:, D : 2 * D] = np.eye(D), -np.eye(D)
    found = evaluate(params, x, None)
    assert found["r2"][2] == pytest.approx(1)
    assert found["mse"][2] == pytest.approx(0, abs=1e-10)
    assert found["l1"][2] == pytest.approx(np.abs(x).sum(axis=1).mean(), rel=1e-5)
    assert found["l0"].tolist() == [1, 4, 4]


def test_padding_rows_count_nowhere() -> None:
    """With a bias that fires on a row of zeros: one row against 1024 copies of it."""
    params = weights()
    params.encoder_bias[:, 3:] = 10
    x = data(1)
    alone, repeated = evaluate(params, x, None), evaluate(params, x.repeat(1024, axis=0), None)
    assert np.all(alone["l0"] > 0)
    for name in ("mse", "l0", "l1", "live", "dead"):
        np.testing.assert_allclose(alone[name], repeated[name], rtol=1e-5)


def test_a_latent_that_fires_on_padding_alone_is_dead() -> None:
    params, x = jax.tree.map(np.zeros_like, weights()), data(600)
    params.encoder_bias[:] = -1e6
    params.encoder_bias[:, 3] = 10
    params.encoder[:, 0, 3] = -1e6
    assert x[:, 0].min() > 1
    found = evaluate(params, x, None)
    for name in ("l0", "l1", "live"):
        assert found[name].tolist() == [0, 0, 0]
    assert found["dead"].tolist() == [N, N, N]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("normalizer", [None, NORMALIZER], ids=["raw", "normalised"])
def test_constant_data_give_no_warning(normalizer: Normalizer | None) -> None:
    evaluate(weights(), np.full((20, D), 2, np.float32), normalizer)


@pytest.mark.filterwarnings("ignore:overflow")
def test_constant_data_do_not_crash() -> None:
    x = np.full((20, D), 2, np.float32)
    found = evaluate(weights(), x, None)
    assert np.isfinite(found["mse"]).all()
    assert np.all(found["r2"] < -1e6)
    perfect = jax.tree.map(np.zeros_like, weights())
    perfect.decoder_bias[:] = 2
    found = evaluate(perfect, x, None)
    np.testing.assert_array_equal(found["mse"], [0, 0, 0])
    assert not np.isnan(found["r2"]).any()


def test_metrics_are_those_of_the_dictionary_a_user_gets() -> None:
    params, x = weights(), data(1500)
    found = evaluate(params, x, NORMALIZER)
    for i, config in enumerate(CONFIGS):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        dictionary = Dictionary(config, one, NORMALIZER)
        z = dictionary.encode(x)
        assert found["l0"][i] == np.count_nonzero(z) / len(x)
        assert found["live"][i] == (z > 0).any(axis=0).sum()
        assert found["l1"][i] == pytest.approx(z.sum(axis=1, dtype=np.float64).mean(), rel=1e-5)
        error = np.square(dictionary.decode(z).astype(np.float64) - x)
        assert found["mse"][i] == pytest.approx(error.mean(), rel=1e-5)


def test_members_on_two_devices_are_measured_as_on_one() -> None:
    params, x = weights(), data(100)
    params = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[-1:]]), params)
    configs = [*CONFIGS, CONFIGS[-1]]
    found = []
    for devices in (1, 2):
        mesh = distributed.member_mesh(devices)
        hyper = ensemble.stack_hyperparams(configs, mesh, x.dtype)
        found.append(
            metrics.evaluate(
                jax.tree.map(jnp.asarray, params), hyper, x, None,
                architecture=CONFIGS[0].architecture, mesh=mesh,
            )
        )  # fmt: skip
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value)


def test_rows_on_disk_and_pieces_of_any_size_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, x = weights(), data(5000)
    whole = evaluate(params, x, NORMALIZER)
    np.save(tmp_path / "x.npy", x)
    from_disk = evaluate(params, open_rows(str(tmp_path / "x.npy")), NORMALIZER)
    shuffled = evaluate(params, np.random.default_rng(0).permutation(x), NORMALIZER)
    monkeypatch.setattr(metrics, "PIECE", 1)
    for other in (from_disk, shuffled, evaluate(params, x, NORMALIZER)):
        for name, value in whole.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-6, err_msg=name)


def test_cosine_of_tiny_huge_and_zero_rows() -> None:
    params = jax.tree.map(np.zeros_like, weights())
    params.encoder[:, :, :D], params.encoder[:, :, D : 2 * D] = np.eye(D), -np.eye(D)
    params.decoder[:, :D], params.decoder[:, D : 2 * D] = 0.5 * np.eye(D), -0.5 * np.eye(D)
    x = data(300)
    for scale in (1e-25, 1.0, 1e25):
        found = evaluate(params, (x * scale).astype(np.float32), None)
        assert found["cosine"][2] == pytest.approx(1, abs=1e-5)
        assert found["norm_ratio"][2] == pytest.approx(0.5, abs=1e-5)
    half = np.where(np.arange(300)[:, None] < 150, 0, x).astype(np.float32)
    assert evaluate(params, half, None)["cosine"][2] == pytest.approx(0.5, abs=1e-5)


def test_density_is_the_share_of_rows_a_latent_fires_in() -> None:
    params, x = weights(), data(1500)
    mesh = distributed.member_mesh(1)
    hyper = ensemble.stack_hyperparams(CONFIGS, mesh, x.dtype)
    found = metrics.density(params, hyper, x, None, architecture=CONFIGS[0].architecture, mesh=mesh)
    for i in range(len(CONFIGS)):
        z, _ = by_numpy(params, i, x.astype(np.float64), None)
        np.testing.assert_allclose(found[i], (z > 0).mean(axis=0), atol=2.5 / len(x))
    counts, never, edges = metrics.density_histogram(found)
    assert counts.shape == (3, 60)
    np.testing.assert_array_equal(never, (found == 0).sum(axis=1))
    np.testing.assert_array_equal(counts.sum(axis=1) + never, [N] * 3)
    own, never, _ = metrics.density_histogram(np.asarray([0, 0.01, 0.1, 0.5, 1]), [0.01, 0.1, 1])
    assert own.tolist() == [1, 3]
    assert never == 1
    with pytest.raises(InputError, match="rising"):
        metrics.density_histogram(found, [1, 0.1])
    assert edges[0] == pytest.approx(1e-6)


def test_recovery_of_permuted_and_repeated_directions() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=(5, 8))
    mixed = np.concatenate([random.normal(size=(4, 8)), 3 * truth[random.permutation(5)]])
    found = metrics.recovery(mixed, truth)
    assert found["mean_max_cosine"] == pytest.approx(1)
    assert found["mcc"] == pytest.approx(1)
    # One latent that stands for all: each finds it, but it is used once.
    truth = np.eye(3) + 1
    one = metrics.recovery(np.ones((1, 3)), truth)
    cosine = truth.sum(axis=1)[0] / np.linalg.norm(truth[0]) / np.sqrt(3)
    assert one["mean_max_cosine"] == pytest.approx(cosine)
    assert one["mcc"] == pytest.approx(cosine / 3)
    opposite = metrics.recovery(-truth, truth)
    assert opposite["mcc"] < 0
    assert metrics.recovery(-truth, truth, absolute=True)["mcc"] == pytest.approx(1)
    both = metrics.recovery(np.stack([truth, -truth]), truth)
    np.testing.assert_allclose(both["mcc"], [1, opposite["mcc"]])
    assert np.isnan(metrics.recovery(np.full((4, 3), np.nan), truth)["mcc"])
    with pytest.raises(InputError, match="must be"):
        metrics.recovery(np.ones((4, 2)), truth)


def test_rare_latents_are_in_the_first_bin() -> None:
    counts, never, _ = metrics.density_histogram(np.asarray([0, 1e-7, 1e-6, 0.5, 1.0]))
    assert (counts[0], never, counts.sum()) == (2, 1, 4)

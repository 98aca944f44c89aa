"""Training and metrics at the ends of what numbers can be: each beside a truth of its own."""

import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import (
    InputError,
    SAEConfig,
    data,
    distributed,
    ensemble,
    metrics,
    models,
    optim,
    redundancy,
    steps,
)
from sae_jax.state import Normalizer, hyperparams

RNG = np.random.default_rng(0)
ROWS = RNG.normal([0, 1, 0, 0, -2, 0], size=(80, 6)).astype(np.float32)
ROWS, HELD_OUT = ROWS[:64], ROWS[64:]
SIZE = {"d_in": 6, "n_latents": 8, "batch_size": 16}


def train(
    config: SAEConfig, rows: np.ndarray, held_out: np.ndarray | None, **more: Any
) -> tuple[Any, Any]:
    """The row of results and the dictionary."""
    run = sae_jax.train([config], rows, held_out, epochs=3, progress=False, **more)
    return run.results.iloc[0], run.dictionaries[0]


def weights(dictionary: sae_jax.Dictionary) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(dictionary.params)]


def measured(dictionary: sae_jax.Dictionary, x: np.ndarray) -> tuple[float, float]:
    """mse and r2 of a dictionary by NumPy, float64 throughout."""
    y = np.asarray(dictionary.decode(dictionary.encode(x)), np.float64)
    x = x.astype(np.float64)
    squared = np.square(y - x).sum()
    return squared / x.size, 1 - squared / np.square(x - x.mean(axis=0)).sum()


MIXED = np.exp2([-50, -30, 0, 7, 33, 50])  # about 1e-15 .. 1e15
SCALES = [
    ("zscore", [2.0**-66, 2.0**66, 2.0**100, MIXED]),
    ("scalar", [2.0**-66, 2.0**66, 2.0**100]),
]


@pytest.mark.parametrize(("normalization", "scales"), SCALES, ids=["zscore", "scalar"])
def test_a_normalised_training_knows_no_scale(normalization: str, scales: list) -> None:
    config = SAEConfig(**SIZE, l1_weight=0.01, input_normalization=normalization)
    plain, expected = train(config, ROWS, HELD_OUT)
    for scale in scales:
        factor = np.asarray(scale, np.float32)  # powers of two: nothing is rounded
        found, dictionary = train(config, ROWS * factor, HELD_OUT * factor)
        assert weights(dictionary) == weights(expected)
        for name in ("train_loss", "validation_l0", "validation_l1", "validation_live"):
            assert found[name] == plain[name]
        if np.ndim(scale) == 0:
            for name in ("r2", "r2_scalar_mean", "cosine", "norm_ratio"):
                assert found[f"train_{name}"] == pytest.approx(plain[f"train_{name}"], rel=1e-6)
            assert found["validation_mse"] == pytest.approx(
                plain["validation_mse"] * float(scale) ** 2, rel=1e-6
            )
    decimal, _ = train(config, ROWS * np.float32(1e-20), HELD_OUT * np.float32(1e-20))
    assert decimal["validation_r2"] == pytest.approx(plain["validation_r2"], abs=1e-3)


PLAIN = SAEConfig(**SIZE, l1_weight=0.01)
NO_BIAS = SAEConfig(**SIZE, activation="topk", k=2, decoder_bias="none", init="tied")


@pytest.mark.parametrize("scale", [1e-20, 1e-28])
def test_errors_whose_squares_vanish_are_measured(scale: float) -> None:
    """Such a dictionary has learned nothing, and its squared error is 0 in float32."""
    rows, held_out = (part * np.float32(scale) for part in (ROWS, HELD_OUT))
    found, dictionary = train(NO_BIAS, rows, held_out)
    assert np.float32(scale) ** 2 < np.finfo(np.float32).tiny
    mse, r2 = measured(dictionary, held_out)
    assert found["validation_mse"] == pytest.approx(mse, rel=1e-4)
    assert found["validation_r2"] == pytest.approx(r2, abs=1e-4)
    assert found["validation_r2"] < 0.95


def test_errors_whose_squares_overflow_are_measured() -> None:
    far = HELD_OUT * np.float32(1e25)
    found, dictionary = train(PLAIN, ROWS, far)
    mse, r2 = measured(dictionary, far)
    assert 1e45 < mse < np.inf
    assert found["validation_mse"] == pytest.approx(mse, rel=1e-4)
    assert found["validation_r2"] == pytest.approx(r2, rel=1e-4)


@pytest.mark.parametrize("scale", [np.float32(1e20), MIXED.astype(np.float32)], ids=["1e20", "mix"])
def test_gradients_whose_squares_overflow_are_no_training(scale: np.ndarray) -> None:
    """Adam's moments would be infinite and its steps 0 for good, at a finite loss of 1e29."""
    found, dictionary = train(PLAIN, ROWS * scale, HELD_OUT * scale)
    assert found["status"] == "diverged"
    assert dictionary is None


def test_what_float32_takes_for_zero_is_refused() -> None:
    for scale in (1e-32, 1e-40):
        with pytest.raises(InputError, match=r"train holds no value beyond .*multiply all"):
            train(PLAIN, ROWS * np.float32(scale), None)
    with pytest.raises(InputError, match=r"train holds no value beyond .*e-50"):
        train(PLAIN, ROWS.astype(np.float64) * 1e-50, None)
    with pytest.raises(InputError, match="rows holds no value beyond"):
        data.check_rows(sae_jax.streaming.Rows(ROWS * np.float32(1e-35), "rows"), "rows")
    for field, value in (("learning_rate", 1e-50), ("clip_norm", 1e39), ("l1_weight", 1e-46)):
        with pytest.raises(
            InputError, match=re.escape(f"{field}={value!r} is no number in float32")
        ):
            SAEConfig(**SIZE, **{field: value})


@pytest.mark.parametrize("value", [1e-50, 1e-39, 1e-33])
def test_a_column_that_float32_takes_for_constant_is_left_at_scale_one(value: float) -> None:
    x = ROWS.astype(np.float64)
    x[:, 3] *= value
    found = data.fit_normalizer(x, "zscore")
    assert found.scale[3] == 1
    assert np.isfinite(models.normalize(jnp.asarray(x, jnp.float32), found)).all()
    np.testing.assert_allclose(np.delete(found.scale, 3), np.delete(x.std(axis=0), 3))
    streamed = data.fit_normalizer(sae_jax.streaming.Rows(x), "zscore")
    np.testing.assert_allclose(streamed.scale, found.scale, rtol=1e-12)


@pytest.mark.parametrize("kind", ["zscore", "scalar"])
def test_squares_that_float64_does_not_hold_are_refused(kind: str) -> None:
    x = ROWS.astype(np.float64) * 1e200
    for rows in (x, sae_jax.streaming.Rows(x)):
        with pytest.raises(InputError, match=f"{kind} needs the squares"):
            data.fit_normalizer(rows, kind)


def test_rows_of_zeros_change_no_weight_that_starts_at_nothing() -> None:
    """Codes, errors and so gradients are exactly 0."""
    zeros = np.zeros_like(ROWS)
    found, dictionary = train(NO_BIAS, zeros, zeros[:16])
    start = models.init(jnp.uint32(0), NO_BIAS.architecture, jnp.float32)
    jax.tree.map(
        lambda ours, expected: np.testing.assert_allclose(ours, expected, rtol=1e-6),
        dictionary.params, start,
    )  # fmt: skip
    assert (found["train_loss"], found["train_l0"], found["train_dead"]) == (0, 0, 8)
    assert (found["train_fvu"], found["validation_mse"]) == (0, 0)


def test_dead_latents_wait_for_a_row_with_a_direction() -> None:
    config = SAEConfig(
        **SIZE, resampling="bricken", resample_every=2, dead_steps=1, init="tied",
        decoder_norm="unit",
    )  # fmt: skip
    _, dictionary = train(config, np.zeros_like(ROWS), None)
    np.testing.assert_allclose(np.linalg.norm(dictionary.params.decoder, axis=1), 1, rtol=1e-6)
    some = ROWS * (np.arange(64) % 4 == 0)[:, None].astype(np.float32) * np.float32(1e-25)
    found, dictionary = train(config, some, None)
    np.testing.assert_allclose(np.linalg.norm(dictionary.params.decoder, axis=1), 1, rtol=1e-6)
    assert found["status"] == "trained"


def test_one_latent_of_one_dimension_and_one_row_a_batch_is_adam_by_hand() -> None:
    x = np.float32([[0.5], [-1.5], [2.0]])
    config = SAEConfig(d_in=1, n_latents=1, batch_size=1, l1_weight=0.1, learning_rate=0.05)
    _, dictionary = train(config, x, None)
    start = models.init(jnp.uint32(0), config.architecture, jnp.float32)
    names = ("encoder", "encoder_bias", "decoder", "decoder_bias")
    theta = np.array([np.ravel(getattr(start, name))[0] for name in names], np.float64)
    mean, square = np.zeros((2, 4))
    order = [steps.row_order(0, epoch, 3, config.architecture) for epoch in range(3)]
    for step, row in enumerate(np.ravel(order), 1):
        w, b, v, c = theta
        some = np.float64(x[row, 0])
        z = max(w * some + b, 0)
        error = z * v + c - some
        dz = (2 * error * v + 0.1) * (z > 0)
        gradient = np.array([dz * some, dz, 2 * error * z, 2 * error])
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        rate = 0.05 / (1 - 0.9**step)
        theta = theta - rate * mean / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    assert step == 9
    ours = [np.ravel(getattr(dictionary.params, name))[0] for name in names]
    np.testing.assert_allclose(ours, theta, rtol=1e-5)


def test_a_file_that_changes_while_it_is_trained_on_is_noticed(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    file = np.load(tmp_path / "rows.npy", mmap_mode="r+")
    for value, message in ((np.nan, "holds NaN or infinite"), (7.0, "was written to while")):
        file[:] = ROWS
        rows = data.open_rows(str(tmp_path / "rows.npy"))

        def spoil(*_: Any, value: float = value) -> None:
            file[50, 2] = value

        with pytest.raises(InputError, match=message):
            train(PLAIN, rows, HELD_OUT, resident_bytes=2 * 16 * 24, on_epochs=spoil)
    for spoilt in (np.nan, np.inf):  # before it starts: by the row of the file
        file[:] = ROWS
        file[61] = spoilt
        with pytest.raises(InputError, match=r"holds 6 NaN .* in 1 of 64 rows \(rows 61\)"):
            train(PLAIN, data.open_rows(str(tmp_path / "rows.npy")), None, resident_bytes=0)


def test_a_thousand_members_are_one_program() -> None:
    """The second half, on the other device, repeats the first."""
    configs = [
        SAEConfig(d_in=2, n_latents=8, batch_size=16, l1_weight=0.1, seed=i % 500)
        for i in range(1000)
    ]
    each = ensemble.member_bytes(configs[0].architecture, 4)
    assert len(ensemble.split_to_fit(range(10**5), each, 8 << 30)) == 1
    calls = []
    run = sae_jax.train(
        configs, ROWS[:, :2], epochs=1, progress=False, on_epochs=lambda *some: calls.append(some)
    )
    assert [members.tolist() for members, _, _ in calls] == [list(range(1000))]
    found = [weights(dictionary) for dictionary in run.dictionaries]
    assert found[:500] == found[500:]
    assert len({one[0] for one in found}) == 500


@pytest.mark.parametrize("dtype", [np.float16, np.int8, ml_dtypes.bfloat16])
def test_small_types_are_their_values(dtype: Any) -> None:
    x = np.round(ROWS * 8).astype(dtype)
    for given in (x, jnp.asarray(x)):
        found = data.check_rows(given, "x")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.round(ROWS * 8))


def test_gradients_of_any_size_are_clipped_to_the_norm() -> None:
    clipped = jax.jit(optim.clipped)
    shape = SAEConfig(d_in=2, n_latents=3).architecture
    grads = jax.jit(models.init, static_argnums=(1, 2))(3, shape, np.float32)
    names = ("encoder", "encoder_bias", "decoder", "decoder_bias")
    exact = {name: np.asarray(getattr(grads, name), np.float64) for name in names}
    length = np.sqrt(sum(np.square(leaf).sum() for leaf in exact.values()))
    for scale, norm in itertools.product((0.0, 1e-30, 1.0, 1e30), (0.5, 1e6)):
        given = grads.replace(**{name: np.float32(exact[name] * scale) for name in names})
        found = clipped(given, norm)
        for name in names:
            expected = exact[name] * min(scale, norm / length)
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5)
        if scale == 1:
            theirs, _ = optax.clip_by_global_norm(norm).update(given, optax.EmptyState())
            for name in names:
                np.testing.assert_allclose(getattr(found, name), getattr(theirs, name), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_redundancy_knows_no_scale(scale: float) -> None:
    config = SAEConfig(d_in=2, n_latents=5)
    encoder = np.float32([[1, 2, 0, 1, 0], [0, 0, 1, 1, 0]])  # 1 repeats 0; the last is dead
    mesh = distributed.member_mesh(1)
    x = np.abs(ROWS[:, :2])
    found = []
    for factor in (1.0, scale):
        params = models.init(jnp.uint32(0), config.architecture, jnp.float32).replace(
            encoder=jnp.asarray(encoder * np.float32(factor)), encoder_bias=jnp.zeros(5)
        )
        member = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
        hyper = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], hyperparams(config, np.float32))
        found.append(
            redundancy.redundant(
                member, hyper, x, None, architecture=config.architecture, mesh=mesh
            )[0].tolist()
        )
    assert found == [[False, True, False, False, False]] * 2
    directions = RNG.normal(size=(5, 3))
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    exact = np.where(np.eye(5, dtype=bool), -np.inf, unit @ unit.T).max(axis=1)
    scaled = (directions * scale).astype(np.float32)
    np.testing.assert_allclose(redundancy.max_decoder_cosine(scaled), exact, atol=1e-6)


def test_a_batch_without_errors_beside_one_with_huge_ones() -> None:
    """The errors of each batch have a scale of their own."""
    config = SAEConfig(d_in=1, n_latents=1, decoder_bias="none")
    zero = models.init(jnp.uint32(0), config.architecture, jnp.float32)
    zero = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), zero)
    hyper = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], hyperparams(config, np.float32))
    x = np.zeros((2 * metrics.BATCH + 5, 1), np.float32)
    x[metrics.BATCH : metrics.BATCH + 2] = 1e30
    x[-5:] = 1e-25
    found = metrics.evaluate(
        zero, hyper, x, Normalizer(mean=np.zeros(1, np.float32), scale=np.ones(1, np.float32)),
        architecture=config.architecture, mesh=distributed.member_mesh(1),
    )  # fmt: skip
    np.testing.assert_allclose(found["mse"], np.square(x.astype(np.float64)).mean(), rtol=1e-6)

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from sae_jax import Dictionary, InputError, SAEConfig
from sae_jax.config import CHOICES
from sae_jax.state import Normalizer, Params

D, N = 6, 17
X = (np.random.default_rng(1).normal(size=(1500, D)) * 3 + 2).astype(np.float32)
FEW = X[:50]


def build(dtype: type = np.float32, **choices: Any) -> Dictionary:
    """Random weights under the given choices of a config."""
    if choices.get("activation") in ("topk", "batch_topk"):
        choices.setdefault("k", 4)
    config = SAEConfig(d_in=D, n_latents=N, **choices)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    params = Params(
        encoder=draw(D, N),
        encoder_bias=draw(N),
        decoder=draw(N, D),
        decoder_bias=draw(D) if config.decoder_bias == "free" else None,
        pre_bias=draw(D) if config.pre_bias == "free" else None,
    )
    if config.activation in ("jump_relu", "batch_topk"):
        params = params.replace(log_threshold=draw(N if config.activation == "jump_relu" else 1))
    if config.activation == "gated":
        params = params.replace(magnitude_gain=draw(N), magnitude_bias=draw(N))
    if config.decoder_norm == "unit":
        norms = np.linalg.norm(params.decoder, axis=1, keepdims=True)
        params = params.replace(decoder=params.decoder / norms)
    normalizer = None
    if config.input_normalization != "none":
        scalar = config.input_normalization == "scalar"
        normalizer = Normalizer(
            mean=np.zeros(D, dtype) if scalar else draw(D) + dtype(2),
            scale=np.full(D, 3.5, dtype) if scalar else np.abs(draw(D)) + dtype(0.5),
        )
    return Dictionary(config, params, normalizer, {"epochs": 3})


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


VARIANTS = [
    dict(
        zip(("activation", "pre_bias", "input_normalization", "decoder_bias"), values, strict=True)
    )
    for values in itertools.product(
        CHOICES["activation"],
        CHOICES["pre_bias"],
        CHOICES["input_normalization"],
        CHOICES["decoder_bias"],
    )
    if values[1::2] != ("tied", "none")
]


def name(choices: dict[str, str]) -> str:
    return "-".join(choices.values())


@pytest.mark.parametrize("choices", VARIANTS, ids=name)
@pytest.mark.parametrize("change", [{"set": 0}, {"set": [1.5, 0, 7]}, {"scale": [2, 0, 0.5]}])
def test_it_is_the_definition(choices: dict[str, str], change: dict[str, Any]) -> None:
    made = build(**choices)
    features = [11, 0, 4]
    z = made.encode(FEW)
    changed = z.copy()
    changed[:, features] = change["set"] if "set" in change else z[:, features] * change["scale"]
    after, before = made.decode(changed), made.decode(z)
    size = np.abs(after).max()
    kept = made.steer(FEW, features, **change)
    assert kept.dtype == np.float32
    assert np.abs(kept - FEW).max() > 0.1
    np.testing.assert_allclose(kept, FEW + (after - before), atol=2e-6 * size)
    assert same_bits(made.steer(FEW, features, **change, keep_error=False), after)


@pytest.mark.parametrize("choices", VARIANTS, ids=name)
def test_rows_in_which_nothing_changes_are_returned_bit_for_bit(choices: dict[str, str]) -> None:
    made = build(**choices)
    x = FEW.copy()
    x[7] = -0.0
    z = made.encode(x)
    every = np.arange(N)
    assert same_bits(made.steer(x, every, scale=1), x)
    assert same_bits(made.steer(x, [], set=3), x)
    feature = int(np.argmin(np.abs((z > 0).mean(axis=0) - 0.5)))
    steered = made.steer(x, feature, set=0)
    active = z[:, feature] > 0
    assert 0 < active.sum() < len(x)
    assert same_bits(steered[~active], x[~active])
    assert (steered[active] != x[active]).any(axis=1).all()
    assert same_bits(made.steer(x, feature, scale=0), steered)
    assert same_bits(made.steer(x[3:4], every, set=z[3]), x[3:4])


def test_the_reconstruction_error_is_not_an_effect() -> None:
    """Bug of others: decode(z') - x counts what the dictionary never reconstructed."""
    made = build()
    error = FEW - made.decode(made.encode(FEW))
    assert np.abs(error).mean() > 1
    scaled = made.steer(FEW, 2, scale=3)
    z = made.encode(FEW)
    direction = 2 * z[:, [2]] * made.params.decoder[2]
    np.testing.assert_allclose(scaled - FEW, direction, atol=1e-5 * np.abs(direction).max())
    np.testing.assert_allclose(scaled - (made.decode(z) + direction), error, atol=1e-4)


def test_by_hand() -> None:
    config = SAEConfig(d_in=2, n_latents=2, input_normalization="zscore")
    params = Params(
        encoder=np.eye(2, dtype=np.float32), encoder_bias=np.zeros(2, np.float32),
        decoder=np.array([[1, 0], [1, 1]], np.float32), decoder_bias=np.ones(2, np.float32),
        pre_bias=None,
    )  # fmt: skip
    normalizer = Normalizer(mean=np.float32([1, 2]), scale=np.float32([2, 4]))
    made = Dictionary(config, params, normalizer)
    x = np.float32([[5, 10], [-9, 10]])  # normalised [2, 2] and [-5, 2]; so are the codes, cut at 0
    np.testing.assert_array_equal(made.steer(x, [1], set=5), [[11, 22], [-3, 22]])
    np.testing.assert_array_equal(made.steer(x, [0], scale=0), [[1, 10], [-9, 10]])
    np.testing.assert_array_equal(
        made.steer(x, [0, 1], set=[0, 5], keep_error=False), [[13, 26], [13, 26]]
    )


def test_many_rows_one_row_and_other_types_of_input() -> None:
    made = build(activation="topk", input_normalization="zscore")
    for keep_error in (True, False):
        steered = made.steer(X, (3, 5), set=(1, 2), keep_error=keep_error)
        assert steered.shape == X.shape
        for i in (0, 1023, 1024, 1499):
            one = made.steer(X[i : i + 1], np.uint8([5, 3]), set=[2, 1], keep_error=keep_error)
            np.testing.assert_allclose(one, steered[i : i + 1], rtol=1e-6)
    double = X.astype(np.float64)[:5]
    assert same_bits(made.steer(double, [3], scale=1), double)
    assert made.steer(double, [3], set=1, keep_error=False).dtype == np.float64
    before = FEW.copy()
    made.steer(FEW, [3], set=9)
    assert same_bits(FEW, before)


@pytest.mark.parametrize(
    ("features", "change", "message"),
    [
        ([17], {"set": 0}, r"features 17: the dictionary has latents 0 \.\. 16"),
        ([3, -1], {"set": 0}, "features -1"),
        ([1.0], {"set": 0}, "features must be latents' numbers, found float64"),
        (np.ones(N, bool), {"set": 0}, "flatnonzero"),
        ([[1, 2]], {"set": 0}, r"of shape \(1, 2\)"),
        ("gene", {"set": 0}, "features must be"),
        ([2, 5, 2], {"set": 0}, "features holds 2 more than once"),
        ([2], {}, "exactly one of set and scale"),
        ([2], {"set": 0, "scale": 1}, "exactly one of set and scale"),
        ([2], {"set": np.nan}, "set=nan holds NaN"),
        ([2, 3], {"scale": [1, np.inf]}, "scale=.* holds NaN or infinite"),
        ([2, 3], {"set": [1, 2, 3]}, r"set has shape \(3,\); give one value or 2"),
        ([2, 3], {"set": "big"}, "set='big' must be a number"),
        ([2], {"set": 1e39}, r"set=1e\+39 makes codes beyond the range of float32"),
    ],
)
def test_it_refuses(features: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build().steer(FEW, features, **change)


def test_it_refuses_rows_that_encode_refuses() -> None:
    with pytest.raises(InputError, match="x has 5 dimensions"):
        build().steer(FEW[:, :5], [0], set=0)
    with pytest.raises(InputError, match="x holds 6 NaN"):
        build().steer(np.full((1, D), np.nan), [0], set=0)


@pytest.mark.parametrize("choices", VARIANTS, ids=name)
def test_a_folded_dictionary_is_the_same_one(choices: dict[str, str]) -> None:
    made = build(**choices)
    folded = made.fold()
    assert folded.normalizer is None
    assert folded.params.pre_bias is None
    assert (folded.config.input_normalization, folded.config.pre_bias) == ("none", "none")
    assert (folded.params.decoder_bias is None) == (folded.config.decoder_bias == "none")
    assert folded.params.encoder.dtype == np.float32
    z, theirs = made.encode(FEW), folded.encode(FEW)
    np.testing.assert_array_equal(theirs > 0, z > 0)
    np.testing.assert_allclose(theirs, z, rtol=1e-5, atol=1e-5 * z.max())
    out = made.decode(z)
    np.testing.assert_allclose(folded.decode(z), out, rtol=1e-5, atol=1e-5 * np.abs(out).max())
    steered = made.steer(FEW, [2, 3], set=1)
    np.testing.assert_allclose(folded.steer(FEW, [2, 3], set=1), steered, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("pre_bias", ["free", "tied"])
def test_a_pre_bias_that_began_at_the_median_folds_too(pre_bias: str) -> None:
    made = build(pre_bias=pre_bias, center="geometric_median")
    z, theirs = made.encode(FEW), made.fold().encode(FEW)
    np.testing.assert_allclose(theirs, z, rtol=1e-5, atol=1e-5 * z.max())


@pytest.mark.parametrize("choices", VARIANTS, ids=name)
def test_folding_is_exact_in_float64(choices: dict[str, str]) -> None:
    with jax.enable_x64(True):
        made = build(np.float64, **choices)
        x = FEW.astype(np.float64)
        z, folded = made.encode(x), made.fold()
        np.testing.assert_allclose(folded.encode(x), z, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(folded.decode(z), made.decode(z), rtol=1e-12, atol=1e-12)


def test_a_folded_dictionary_says_what_it_was(tmp_path: Any) -> None:
    made = build(input_normalization="zscore", pre_bias="tied", decoder_norm="unit")
    folded = made.fold()
    assert folded.config.decoder_norm == "free"
    assert folded.provenance == {
        "epochs": 3,
        "folded": {
            "pre_bias": "tied", "center": "none", "input_normalization": "zscore",
            "decoder_bias": "free", "decoder_norm": "unit",
        },
    }  # fmt: skip
    assert made.provenance == {"epochs": 3}
    folded.save(tmp_path / "d")
    assert same_bits(Dictionary.load(tmp_path / "d").encode(FEW), folded.encode(FEW))
    assert build(pre_bias="free", decoder_norm="unit").fold().config.decoder_norm == "unit"
    without = build(pre_bias="free", decoder_bias="none", input_normalization="scalar").fold()
    assert without.config.decoder_bias == "none"
    assert folded.fold() is folded

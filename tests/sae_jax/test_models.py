import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from sae_jax import SAEConfig, models
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Normalizer, Params, hyperparams

WIDE = Architecture(d_in=37, n_latents=300)


def init(seed: int, dtype: type = np.float32, **fields: Any) -> Params:
    architecture = dataclasses.replace(WIDE, **fields)
    return jax.tree.map(np.asarray, models.init(jnp.uint32(seed), architecture, dtype))


def hyper(k: int = 1) -> Hyperparams:
    config = SAEConfig(d_in=37, n_latents=300, activation="topk", k=k)
    return hyperparams(config, jnp.float32)


def test_shapes_are_rows_times_matrices() -> None:
    params = init(0, pre_bias="free")
    shapes = {name: leaf.shape for name, leaf in vars(params).items() if leaf is not None}
    assert shapes == {
        "encoder": (37, 300),
        "encoder_bias": (300,),
        "decoder": (300, 37),
        "decoder_bias": (37,),
        "pre_bias": (37,),
    }


def test_torch_init_is_uniform_within_the_fan_in_bound() -> None:
    """The same distribution as torch.nn.Linear's: Kolmogorov-Smirnov against the formula and it."""
    params = init(0)
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(37, 300), torch.nn.Linear(300, 37)
    for ours, theirs, fan_in in (
        (params.encoder, encoder.weight, 37),
        (params.encoder_bias, encoder.bias, 37),
        (params.decoder, decoder.weight, 300),
        (params.decoder_bias, decoder.bias, 300),
    ):
        bound = 1 / math.sqrt(fan_in)
        flat = ours.ravel()
        assert np.abs(flat).max() <= bound
        if flat.size > 1000:
            assert np.abs(flat).max() > 0.999 * bound
            assert theirs.abs().max().item() > 0.999 * bound
        uniform = scipy.stats.uniform(-bound, 2 * bound)
        assert scipy.stats.kstest(flat, uniform.cdf).pvalue > 1e-3
        assert scipy.stats.ks_2samp(flat, theirs.detach().numpy().ravel()).pvalue > 1e-3


def test_parts_of_an_initialisation_are_independent() -> None:
    params = init(0, n_latents=37)
    draws = [params.encoder, params.encoder.T, params.decoder, params.decoder.T]
    pairs = [(0, 2), (0, 3), (1, 2), (0, 1)]
    for i, j in pairs:
        assert abs(np.corrcoef(draws[i].ravel(), draws[j].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(params.encoder_bias, params.decoder_bias)[0, 1]) < 0.5


def test_tied_init_has_unit_directions_zero_biases_and_the_encoder_transposed() -> None:
    params = init(0, init="tied", pre_bias="free")
    np.testing.assert_array_equal(params.encoder, params.decoder.T)
    np.testing.assert_allclose(np.linalg.norm(params.decoder, axis=1), np.ones(300), rtol=1e-6)
    assert not params.encoder_bias.any()
    assert not params.decoder_bias.any()
    cosines = (params.decoder @ params.decoder.T)[np.triu_indices(300, 1)]
    assert abs(cosines.mean()) < 5 / math.sqrt(37 * cosines.size)
    assert abs(cosines.std() * math.sqrt(37) - 1) < 0.05


@pytest.mark.parametrize("kind", ["torch", "tied"])
def test_unit_decoders_start_with_unit_rows(kind: str) -> None:
    params = init(0, init=kind, decoder_norm="unit")
    np.testing.assert_allclose(np.linalg.norm(params.decoder, axis=1), np.ones(300), rtol=1e-6)
    if kind == "torch":
        free = init(0, init=kind)
        norm = np.linalg.norm(free.decoder, axis=1, keepdims=True)
        np.testing.assert_allclose(params.decoder, free.decoder / norm, rtol=1e-6)
        np.testing.assert_array_equal(params.encoder, free.encoder)


def test_absent_parts_are_none_and_a_free_pre_bias_starts_at_zero() -> None:
    assert init(0).pre_bias is None
    assert init(0, pre_bias="tied").pre_bias is None
    assert init(0, decoder_bias="none").decoder_bias is None
    np.testing.assert_array_equal(init(0, pre_bias="free").pre_bias, np.zeros(37))


def test_initialisation_is_a_function_of_the_seed() -> None:
    first, again, other = init(5), init(5), init(6)
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
        assert not np.any(getattr(first, name) == getattr(other, name))
    for field, value in {"batch_size": 7, "reduction": "mean", "pre_bias": "free"}.items():
        changed = init(5, **{field: value})
        np.testing.assert_array_equal(changed.encoder, first.encoder)
        np.testing.assert_array_equal(changed.decoder, first.decoder)
    assert np.isfinite(init(2**32 - 1).encoder).all()


@pytest.mark.parametrize(
    ("pre_bias", "decoder_bias"),
    [("none", "free"), ("free", "free"), ("tied", "free"), ("none", "none"), ("free", "none")],
)
def test_encode_and_decode_equal_numpy(pre_bias: str, decoder_bias: str) -> None:
    rng = np.random.default_rng(0)
    architecture = Architecture(
        d_in=3, n_latents=6, activation="topk", pre_bias=pre_bias, decoder_bias=decoder_bias
    )
    w_enc, b_enc = rng.normal(size=(3, 6)), rng.normal(size=6)
    w_dec, b_dec = rng.normal(size=(6, 3)), rng.normal(size=3)
    b_pre, x = rng.normal(size=3), rng.normal(size=(10, 3))
    shifted = x + {"none": 0, "free": b_pre, "tied": -b_dec}[pre_bias]
    pre = shifted @ w_enc + b_enc
    kth = np.sort(pre, axis=1)[:, [-2]]
    z = np.where((pre >= kth) & (pre > 0), pre, 0)
    assert 0 < (z > 0).mean() < 0.5
    reconstruction = z @ w_dec + (b_dec if decoder_bias == "free" else 0)

    with jax.enable_x64(True):
        params = Params(
            encoder=jnp.asarray(w_enc),
            encoder_bias=jnp.asarray(b_enc),
            decoder=jnp.asarray(w_dec),
            decoder_bias=jnp.asarray(b_dec) if decoder_bias == "free" else None,
            pre_bias=jnp.asarray(b_pre) if pre_bias == "free" else None,
        )
        codes = models.encode(params, hyper(k=2), jnp.asarray(x), architecture)
        np.testing.assert_allclose(codes, z, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(models.decode(params, codes), reconstruction, atol=1e-12)


def test_normalize_is_undone_by_denormalize() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    normalizer = Normalizer(mean=np.float32([1, -2, 0]), scale=np.float32([2, 0.5, 1]))
    y = models.normalize(jnp.asarray(x), normalizer)
    np.testing.assert_allclose(y, (x - [[1, -2, 0]]) / [[2, 0.5, 1]], rtol=1e-6)
    np.testing.assert_allclose(models.denormalize(y, normalizer), x, rtol=1e-6, atol=1e-6)
    assert models.normalize(x, None) is x
    assert models.denormalize(x, None) is x


def test_unit_rows_leaves_a_zero_row_alone() -> None:
    rows = models.unit_rows(jnp.asarray([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-3]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)


def test_hyperparams_of_an_architecture_without_k_name_all_latents() -> None:
    relu = hyperparams(SAEConfig(d_in=2, n_latents=7, learning_rate=0.5, l1_weight=2, seed=9), "f4")
    assert (float(relu.learning_rate), float(relu.l1_weight), int(relu.k)) == (0.5, 2, 7)
    assert int(relu.seed) == 9
    assert int(hyperparams(SAEConfig(d_in=2, n_latents=7, activation="topk", k=3), "f4").k) == 3

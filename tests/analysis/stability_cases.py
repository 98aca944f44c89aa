"""Dictionaries of which it is known what they share."""

from typing import Any

import numpy as np

from sae_jax.config import SAEConfig
from sae_jax.dictionary import Dictionary
from sae_jax.state import Normalizer, Params

D, N = 12, 20
X = np.random.default_rng(9).normal(size=(30, D)).astype(np.float32)


def directions(seed: int, n: int = N, d: int = D) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def dictionary(decoder: np.ndarray, seed: int = 0, **choices: Any) -> Dictionary:
    """With the decoder given and everything else at random, in float32."""
    rng = np.random.default_rng(seed)
    n, d = decoder.shape
    config = SAEConfig(d_in=d, n_latents=n, **choices)
    thresholds = {"jump_relu": n, "batch_topk": 1}.get(config.activation)
    gated = config.activation == "gated"
    arrays = {
        "encoder": decoder.T + 0.1 * rng.normal(size=(d, n)),
        "encoder_bias": rng.normal(size=n) - 0.3,
        "decoder": decoder,
        "decoder_bias": rng.normal(size=d) if config.decoder_bias == "free" else None,
        "pre_bias": rng.normal(size=d) if config.pre_bias == "free" else None,
        "log_threshold": rng.normal(size=thresholds) if thresholds else None,
        "magnitude_gain": 0.3 * rng.normal(size=n) if gated else None,
        "magnitude_bias": rng.normal(size=n) if gated else None,
    }
    params = Params(**{k: None if v is None else v.astype(np.float32) for k, v in arrays.items()})
    normalizer = None
    if config.input_normalization != "none":
        normalizer = Normalizer(
            mean=rng.normal(size=d).astype(np.float32),
            scale=rng.uniform(0.5, 2, d).astype(np.float32),
        )
    return Dictionary(config, params, normalizer)


def alike() -> list[np.ndarray]:
    """Three decoders that share 10 directions, in another order and with other norms, and noise."""
    rng = np.random.default_rng(3)
    core, found = directions(99, 10), []
    for seed in range(3):
        whole = np.concatenate([core + 0.05 * rng.normal(size=core.shape), directions(seed, 10)])
        found.append(whole[rng.permutation(N)] * rng.uniform(0.5, 2, (N, 1)))
    return found


def core_of(decoder: np.ndarray) -> np.ndarray:
    """For each feature the core direction that it is, or -1."""
    core = directions(99, 10)
    cosine = (decoder / np.linalg.norm(decoder, axis=1, keepdims=True)) @ (
        core / np.linalg.norm(core, axis=1, keepdims=True)
    ).T
    return np.where(cosine.max(axis=1) > 0.95, cosine.argmax(axis=1), -1)

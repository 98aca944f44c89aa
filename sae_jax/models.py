"""ONE sparse autoencoder: initialise, encode, decode. No member axis, no loop, no disk.

pre = (x + b_pre) W_enc + b_enc        b_pre: none, free, or minus b_dec
z   = activation(pre)
x'  = z W_dec + b_dec
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import activations
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Normalizer, Params

NARROW = 64


def init(seed: jax.Array, architecture: Architecture, dtype: jax.typing.DTypeLike) -> Params:
    """Fresh weights; a function of the seed, the architecture and the dtype alone.

    `torch` draws what `torch.nn.Linear` draws: uniform within 1 / sqrt(fan in) for weights and
    biases. `tied` draws unit decoder directions, sets the encoder to their transpose and the biases
    to zero (Gao et al. 2024). A free pre-bias starts at zero.
    """
    d, n = architecture.d_in, architecture.n_latents
    key = jax.random.key(seed)
    keys = jax.random.split(key, 4)
    if architecture.init == "tied":
        decoder = unit_rows(jax.random.normal(keys[2], (n, d), dtype))
        encoder, encoder_bias, decoder_bias = decoder.T, jnp.zeros(n, dtype), jnp.zeros(d, dtype)
    else:

        def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
            bound = 1 / math.sqrt(fan_in)
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        encoder = uniform(keys[0], (d, n), d)
        encoder_bias = uniform(keys[1], (n,), d)
        decoder = uniform(keys[2], (n, d), n)
        decoder_bias = uniform(keys[3], (d,), n)
        if architecture.decoder_norm == "unit":
            decoder = unit_rows(decoder)
    return Params(
        encoder=encoder,
        encoder_bias=encoder_bias,
        decoder=decoder,
        decoder_bias=decoder_bias if architecture.decoder_bias == "free" else None,
        pre_bias=jnp.zeros(d, dtype) if architecture.pre_bias == "free" else None,
    )


def normalize(x: jax.Array, normalizer: Normalizer | None) -> jax.Array:
    """Rows in the space the dictionary was trained in."""
    return x if normalizer is None else (x - normalizer.mean[None, :]) / normalizer.scale[None, :]


def denormalize(x: jax.Array, normalizer: Normalizer | None) -> jax.Array:
    """The inverse of `normalize`."""
    return x if normalizer is None else x * normalizer.scale[None, :] + normalizer.mean[None, :]


def pre_activations(params: Params, x: jax.Array, architecture: Architecture) -> jax.Array:
    """[rows, d_in] -> [rows, latents]."""
    if architecture.pre_bias == "free":
        x = x + params.pre_bias[None, :]
    elif architecture.pre_bias == "tied":
        x = x - params.decoder_bias[None, :]
    return x @ params.encoder + params.encoder_bias[None, :]


def encode(
    params: Params, hyper: Hyperparams, x: jax.Array, architecture: Architecture
) -> jax.Array:
    """[rows, d_in] -> codes [rows, latents], never negative."""
    return activate(pre_activations(params, x, architecture), hyper, architecture)


def activate(pre: jax.Array, hyper: Hyperparams, architecture: Architecture) -> jax.Array:
    """Pre-activations to codes, both [rows, latents]."""
    if architecture.activation == "topk":
        return activations.topk(pre, hyper.k)
    return activations.relu(pre)


def decode(params: Params, z: jax.Array) -> jax.Array:
    """Codes [rows, latents] -> reconstructions [rows, d_in]."""
    decoder = params.decoder
    if decoder.shape[1] <= NARROW:
        # Keeps XLA on CPU from computing the decoder's gradient as the product of z transposed,
        # which is several times slower for narrow embeddings (and faster for wide ones).
        decoder = lax.optimization_barrier(decoder.T).T
    x = z @ decoder
    return x if params.decoder_bias is None else x + params.decoder_bias[None, :]


def unit_rows(decoder: jax.Array) -> jax.Array:
    """Every latent's direction [d_in] scaled to norm 1; a zero row stays zero."""
    norm = jnp.linalg.norm(decoder, axis=1, keepdims=True)
    return decoder / jnp.where(norm > 0, norm, 1)

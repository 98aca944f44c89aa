"""ONE sparse autoencoder: initialise, encode, decode. No member axis, no loop, no disk.

pre = (x + b_pre) W_enc + b_enc        b_pre: none, free, or minus b_dec
z   = activation(pre)
x'  = z W_dec + b_dec

A gated dictionary fires where pre > 0, with the magnitude ReLU(exp(r) (pre - b_enc) + b_mag).
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sae_jax import activations, distributed
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Normalizer, Params

NARROW = 64


def init(
    seed: jax.Array,
    architecture: Architecture,
    dtype: jax.typing.DTypeLike,
    center: jax.Array | None = None,
    initial_threshold: jax.Array | float = 0.5,
) -> Params:
    """Fresh weights; a function of the seed, the architecture and the dtype alone, but for `center`
    [d_in], which the pre-bias takes from the rows at the start, and the decoder's bias adds.

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
    pre_bias = jnp.zeros(d, dtype)
    if center is not None:
        decoder_bias, pre_bias = center, -center
    gated = architecture.activation == "gated"
    thresholds = {
        "jump_relu": jnp.full(n, initial_threshold, dtype),
        "batch_topk": jnp.full(1, jnp.finfo(dtype).tiny, dtype),  # until there is an estimate
    }.get(architecture.activation)
    return Params(
        encoder=encoder,
        encoder_bias=encoder_bias,
        decoder=decoder,
        decoder_bias=decoder_bias if architecture.decoder_bias == "free" else None,
        pre_bias=pre_bias if architecture.pre_bias == "free" else None,
        log_threshold=None if thresholds is None else jnp.log(thresholds),
        magnitude_gain=jnp.zeros(n, dtype) if gated else None,
        magnitude_bias=encoder_bias if gated else None,  # it starts as a ReLU
    )


def normalize(x: jax.Array, normalizer: Normalizer | None) -> jax.Array:
    """Rows in the space the dictionary was trained in."""
    return x if normalizer is None else (x - normalizer.mean[None, :]) / normalizer.scale[None, :]


def denormalize(x: jax.Array, normalizer: Normalizer | None) -> jax.Array:
    """The inverse of `normalize`."""
    return x if normalizer is None else x * normalizer.scale[None, :] + normalizer.mean[None, :]


def encoder_input(params: Params, x: jax.Array, architecture: Architecture) -> jax.Array:
    """Rows [rows, d_in] with the pre-bias."""
    if architecture.pre_bias == "free":
        return x + params.pre_bias[None, :]
    if architecture.pre_bias == "tied":
        return x - params.decoder_bias[None, :]
    return x


def pre_activations(params: Params, x: jax.Array, architecture: Architecture) -> jax.Array:
    """[rows, d_in] -> [rows, latents]."""
    fixed = jax.tree.map(lax.stop_gradient, params)
    pre = encoder_input(fixed, x, architecture) @ params.encoder + params.encoder_bias[None, :]
    if architecture.pre_bias == "none":
        return pre
    # What is added is 0 with the pre-bias's gradient, which this way is summed over rows before the
    # product with the encoder: a vector's product instead of a batch's.
    origin = jnp.zeros((1, architecture.d_in), x.dtype)
    biased, constant = (encoder_input(some, origin, architecture) for some in (params, fixed))
    return pre + (biased - constant) @ fixed.encoder


def encode(
    params: Params, hyper: Hyperparams, x: jax.Array, architecture: Architecture
) -> jax.Array:
    """[rows, d_in] -> codes [rows, latents], never negative; each row's on its own."""
    return activate(params, hyper, pre_activations(params, x, architecture), architecture)


def activate(
    params: Params,
    hyper: Hyperparams,
    pre: jax.Array,
    architecture: Architecture,
    training: bool = False,
) -> jax.Array:
    """Pre-activations to codes, both [rows, latents]; in training batch_topk sees the batch."""
    match architecture.activation:
        case "topk":
            return activations.topk(pre, hyper.k)
        case "batch_topk" if training:
            return activations.batch_topk(pre, hyper.k)
        case "batch_topk" | "jump_relu":
            return activations.jump_relu(pre, params.log_threshold, hyper.bandwidth)
        case "gated":
            product = pre - params.encoder_bias[None, :]
            magnitude = product * jnp.exp(params.magnitude_gain)[None, :]
            magnitude = activations.relu(magnitude + params.magnitude_bias[None, :])
            return jnp.where(pre > 0, magnitude, 0)
        case _:
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


def decode_nested(params: Params, z: jax.Array, architecture: Architecture) -> list[jax.Array]:
    """Reconstructions [rows, d_in] by each of the nested dictionaries, the whole one last."""
    if len(architecture.widths) > 1 and distributed.latent_devices() > 1:
        return _decode_in_blocks(params, z, architecture)
    edges = (0, *architecture.widths)
    found = [decode(params.replace(decoder=params.decoder[: edges[1]]), z[:, : edges[1]])]
    for low, high in itertools.pairwise(edges[1:]):
        part = params.replace(decoder=params.decoder[low:high], decoder_bias=None)
        found.append(found[-1] + decode(part, z[:, low:high]))
    return found


def _decode_in_blocks(params: Params, z: jax.Array, architecture: Architecture) -> list[jax.Array]:
    """`decode_nested` where devices share the latents, which slices would move between them.

    Blocks of latents of which every device and every nested dictionary has a whole number are
    decoded by themselves, and summed. Widths are multiples of the first; no others are shared.
    """
    n, d = params.decoder.shape
    size = math.gcd(architecture.widths[0], n // distributed.latent_devices())
    parts = jnp.einsum(
        "rbn,bnd->brd", z.reshape(len(z), -1, size), params.decoder.reshape(-1, size, d)
    )
    nested = np.arange(n // size) < np.asarray(architecture.widths)[:, None] // size
    found = jnp.einsum("lb,brd->lrd", jnp.asarray(nested, z.dtype), parts)
    bias = 0 if params.decoder_bias is None else params.decoder_bias[None, None, :]
    return list(found + bias)


def unit_rows(decoder: jax.Array) -> jax.Array:
    """Every latent's direction [d_in] scaled to norm 1; a zero row stays zero."""
    norm = jnp.linalg.norm(decoder, axis=1, keepdims=True)
    return decoder / jnp.where(norm > 0, norm, 1)

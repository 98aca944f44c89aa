"""The pytrees of training. Shapes are for one dictionary; an ensemble puts members in front."""

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax.config import SAEConfig


@struct.dataclass
class Hyperparams:
    """What may differ between the members of one compiled program; scalars."""

    learning_rate: jax.Array
    l1_weight: jax.Array
    k: jax.Array
    seed: jax.Array


@struct.dataclass
class Params:
    """Weights of one dictionary, in the layout of SAELens (rows times matrices).

    encoder [d_in, latents], encoder_bias [latents], decoder [latents, d_in], decoder_bias [d_in] or
    None, pre_bias [d_in] or None.
    """

    encoder: jax.Array
    encoder_bias: jax.Array
    decoder: jax.Array
    decoder_bias: jax.Array | None
    pre_bias: jax.Array | None


@struct.dataclass
class Normalizer:
    """Statistics of the training rows: rows become (x - mean) / scale; both are [d_in]."""

    mean: jax.Array
    scale: jax.Array


@struct.dataclass
class Metrics:
    """Means over the rows of a batch, or over the batches of an epoch; scalars.

    loss in the scale of `reduction`; mse over dimensions; l1 the sum of |z|; l0 active latents.
    """

    loss: jax.Array
    mse: jax.Array
    l1: jax.Array
    l0: jax.Array


@struct.dataclass
class TrainState:
    """One member in training. `active` turns False for good once its loss is not finite."""

    params: Params
    optimizer: jax.Array | tuple
    active: jax.Array


def hyperparams(config: SAEConfig, dtype: jax.typing.DTypeLike) -> Hyperparams:
    """The traced half of a config; k is n_latents where the architecture has none."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # float64 rows without x64 mode are float32
    return Hyperparams(
        learning_rate=jnp.asarray(config.learning_rate, dtype),
        l1_weight=jnp.asarray(config.l1_weight, dtype),
        k=jnp.asarray(config.n_latents if config.k is None else config.k, jnp.int32),
        seed=jnp.asarray(config.seed, jnp.uint32),
    )

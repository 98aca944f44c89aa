"""The pytrees of training. Shapes are for one dictionary; an ensemble puts members in front."""

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax.config import SAEConfig


@struct.dataclass
class Hyperparams:
    """What may differ between the members of one compiled program; scalars.

    Fields are those of `SAEConfig`; `steps` is how long the member trains, for its schedule.
    """

    learning_rate: jax.Array
    lr_warmup: jax.Array
    l1_weight: jax.Array
    l1_warmup: jax.Array
    k: jax.Array
    k_aux: jax.Array
    aux_weight: jax.Array
    dead_steps: jax.Array
    clip_norm: jax.Array
    seed: jax.Array
    steps: jax.Array


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
class History(Metrics):
    """An epoch's means, and the loss on the validation rows after it (NaN without any)."""

    validation_loss: jax.Array


@struct.dataclass
class TrainState:
    """One member in training.

    step: scalar; steps done. idle: [latents], steps since each latent last fired; None without an
    auxiliary loss. diverged: scalar; the loss was not finite. active: scalar; False for good once
    diverged, or without improvement for as long as the run's patience. best: None without patience.
    """

    params: Params
    optimizer: jax.Array | tuple
    step: jax.Array
    idle: jax.Array | None
    diverged: jax.Array
    active: jax.Array
    best: "Best | None"


@struct.dataclass
class Best:
    """The weights of the epoch of lowest monitored loss; scalars but for params."""

    params: Params
    loss: jax.Array
    epoch: jax.Array


def hyperparams(config: SAEConfig, dtype: jax.typing.DTypeLike, steps: int = 0) -> Hyperparams:
    """The traced half of a config; k is n_latents where the architecture has none."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # float64 rows without x64 mode are float32
    reals = ("learning_rate", "l1_weight", "aux_weight", "clip_norm")
    integers = ("lr_warmup", "l1_warmup", "dead_steps")
    k_aux = 512 if config.k_aux is None else config.k_aux
    return Hyperparams(
        **{name: jnp.asarray(getattr(config, name), dtype) for name in reals},
        **{name: jnp.asarray(getattr(config, name), jnp.int32) for name in integers},
        k=jnp.asarray(config.n_latents if config.k is None else config.k, jnp.int32),
        k_aux=jnp.asarray(min(k_aux, config.n_latents), jnp.int32),
        seed=jnp.asarray(config.seed, jnp.uint32),
        steps=jnp.asarray(steps, jnp.int32),
    )

"""The pytrees of training. Shapes are for one dictionary; an ensemble puts members in front."""

import jax
import numpy as np
from flax import struct

from sae_jax.config import REALS, SAEConfig

# Which axis of ONE dictionary's leaf is its latents, by the name of the field; others have none.
LATENT_AXIS = {
    "encoder": 1, "encoder_bias": 0, "decoder": 0, "log_threshold": 0, "magnitude_gain": 0,
    "magnitude_bias": 0, "idle": 0,
}  # fmt: skip


@struct.dataclass
class Hyperparams:
    """What may differ between the members of one compiled program; scalars.

    Fields are those of `SAEConfig`; `steps` is how long the member trains, for its schedule.
    """

    learning_rate: jax.Array
    lr_warmup: jax.Array
    l1_weight: jax.Array
    l1_warmup: jax.Array
    l0_weight: jax.Array
    l0_warmup: jax.Array
    bandwidth: jax.Array
    initial_threshold: jax.Array
    k: jax.Array
    target_l0: jax.Array
    k_aux: jax.Array
    aux_weight: jax.Array
    dead_steps: jax.Array
    resample_every: jax.Array
    clip_norm: jax.Array
    weight_decay: jax.Array
    seed: jax.Array
    steps: jax.Array


@struct.dataclass
class Params:
    """Weights of one dictionary, in the layout of SAELens (rows times matrices).

    encoder [d_in, latents], encoder_bias [latents], decoder [latents, d_in]. None where the
    architecture has no use for them: decoder_bias [d_in]; pre_bias [d_in]; log_threshold, the
    logarithm of what a pre-activation must exceed, [latents] of jump_relu and [1] of batch_topk;
    magnitude_gain (its logarithm) and magnitude_bias [latents], of gated, whose encoder and
    encoder_bias are the gate's.
    """

    encoder: jax.Array
    encoder_bias: jax.Array
    decoder: jax.Array
    decoder_bias: jax.Array | None
    pre_bias: jax.Array | None
    log_threshold: jax.Array | None = None
    magnitude_gain: jax.Array | None = None
    magnitude_bias: jax.Array | None = None


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

    step: scalar; steps done. idle: [latents], steps since each latent last fired; None where no
    choice asks for it. log_factor: scalar; logarithm of what `sparsity_control` multiplies the L1
    weight by; None without. means: over the batches of its epoch so far. diverged: scalar; the loss
    was not finite. active: scalar; False for good once diverged, or without improvement for as long
    as the run's patience. best: None without patience.
    """

    params: Params
    optimizer: jax.Array | tuple
    step: jax.Array
    idle: jax.Array | None
    log_factor: jax.Array | None
    means: Metrics
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
    integers = ("lr_warmup", "l1_warmup", "l0_warmup", "dead_steps", "resample_every")
    target_l0 = config.n_latents if config.target_l0 is None else config.target_l0
    k_aux = 512 if config.k_aux is None else config.k_aux
    return Hyperparams(
        **{name: np.asarray(getattr(config, name), dtype) for name in REALS},
        **{name: np.asarray(getattr(config, name), np.int32) for name in integers},
        k=np.asarray(config.n_latents if config.k is None else config.k, np.int32),
        target_l0=np.asarray(target_l0, dtype),
        k_aux=np.asarray(min(k_aux, config.n_latents), np.int32),
        seed=np.asarray(config.seed, np.uint32),
        steps=np.asarray(steps, np.int32),
    )

"""What ONE dictionary minimises, and the one place where a reduction is defined.

    sum    L = mean over rows of ( sum_d (x - x')^2  +  l1_weight * sum_j |z_j| )
    mean   L = mean over rows of ( mean_d (x - x')^2 +  l1_weight * mean_j |z_j| )

`sum` is equation 3 of Schuster as printed; `mean` is what that paper's and Kendiukhov's code
compute. jump_relu has l0_weight and the number of active latents in the place of l1_weight and
|z|; gated has the gate's ReLU(pre); topk and batch_topk have nothing there.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import activations, models
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Metrics, Params


def loss(
    params: Params,
    hyper: Hyperparams,
    x: jax.Array,
    architecture: Architecture,
    dead: jax.Array | None = None,
    training: bool = True,
) -> tuple[jax.Array, tuple[Metrics, jax.Array, jax.Array]]:
    """Loss of a batch x [rows, d_in] (already normalised).

    Args:
      dead: [latents] bool, for the auxiliary loss; None leaves that out.
      training: False gives rows the codes that `models.encode` does, which differ for batch_topk.

    Returns:
      The loss; the metrics it passes by, the codes z [rows, latents] and the errors [rows, d_in].
    """
    pre = models.pre_activations(params, x, architecture)
    z = models.activate(params, hyper, pre, architecture, training)
    errors = [part - x for part in models.decode_nested(params, z, architecture)]
    error, rows = errors[-1], x.shape[0]
    squared = jnp.sum(error**2) / rows
    value = squared
    if len(errors) > 1:
        value = sum(jnp.sum(part**2) / rows for part in errors) / len(errors)
    # Codes are never negative. Sums over them as products with ones: XLA fuses nothing into these,
    # and they cost a third of a reduction on CPU.
    over_rows = jnp.ones((rows,), z.dtype)
    absolute = jnp.sum(over_rows @ z) / rows
    l0 = jnp.sum(over_rows @ jnp.asarray(z > 0, z.dtype)) / rows
    if architecture.reduction == "mean":
        value = value / architecture.d_in
    if architecture.activation == "relu":
        value = value + l1_penalty(absolute, hyper, architecture)
    elif architecture.activation == "gated":
        gate = activations.relu(pre)
        penalised = jnp.sum(over_rows @ gate) / rows
        value = value + l1_penalty(penalised, hyper, architecture)
        value = value + gate_reconstruction(params, gate, x, architecture)
    elif architecture.activation == "jump_relu":
        value = value + l0_penalty(params, hyper, pre, architecture)
    if dead is not None:
        value = value + hyper.aux_weight * auxk(params, hyper, pre, error, dead, architecture)
    metrics = Metrics(loss=value, mse=squared / architecture.d_in, l1=absolute, l0=l0)
    return value, (metrics, z, error)


def l1_penalty(absolute: jax.Array, hyper: Hyperparams, architecture: Architecture) -> jax.Array:
    """The L1 term, of the mean over rows of the sum of |z|."""
    scale = 1 if architecture.reduction == "sum" else architecture.n_latents
    return hyper.l1_weight * absolute / scale


def l0_penalty(
    params: Params, hyper: Hyperparams, pre: jax.Array, architecture: Architecture
) -> jax.Array:
    """What active latents cost a jump_relu dictionary; only its thresholds have a gradient.

    l0_weight * L0 (Rajamanoharan et al. 2024, JumpReLU SAEs, equation 9), in the scale of the
    reduction; or, to reach a wanted L0, l0_weight * (L0 / target_l0 - 1)^2 (the same, appendix).
    """
    above = activations.count_above(pre, params.log_threshold, hyper.bandwidth)
    l0 = jnp.sum(above) / pre.shape[0]
    if architecture.sparsity_control == "target_l0":
        return hyper.l0_weight * (l0 / hyper.target_l0 - 1) ** 2
    scale = 1 if architecture.reduction == "sum" else architecture.n_latents
    return hyper.l0_weight * l0 / scale


def gate_reconstruction(
    params: Params, gate: jax.Array, x: jax.Array, architecture: Architecture
) -> jax.Array:
    """The gate's own error (Rajamanoharan et al. 2024, Gated SAEs, equation 8): ReLU(pre) decoded
    by the decoder as it stands, which has no gradient from it, so that gates learn to fire."""
    frozen = jax.tree.map(lax.stop_gradient, params)
    squared = jnp.sum((models.decode(frozen, gate) - x) ** 2) / x.shape[0]
    return squared / (1 if architecture.reduction == "sum" else architecture.d_in)


def auxk(
    params: Params,
    hyper: Hyperparams,
    pre: jax.Array,
    error: jax.Array,
    dead: jax.Array,
    architecture: Architecture,
) -> jax.Array:
    """What dead latents leave of the reconstruction's error (Gao et al. 2024, A.2).

        L_aux = mean over rows of || (x - x') - z_aux W_dec ||^2

    z_aux are the k_aux largest positive pre-activations among the dead. The error is taken as
    given, so the gradient reaches the dead latents' encoder and decoder rows (and the encoder's
    input) and no living latent. Without dead latents it is 0.
    """
    z = activations.topk(jnp.where(dead[None, :], pre, 0), hyper.k_aux)
    left = lax.stop_gradient(error) + z @ params.decoder
    squared = jnp.sum(left**2) / left.shape[0]
    scale = 1 if architecture.reduction == "sum" else architecture.d_in
    return jnp.where(jnp.any(dead), squared / scale, 0)

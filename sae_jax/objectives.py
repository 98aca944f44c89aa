"""What ONE dictionary minimises, and the one place where a reduction is defined.

    sum    L = mean over rows of ( sum_d (x - x')^2  +  l1_weight * sum_j |z_j| )
    mean   L = mean over rows of ( mean_d (x - x')^2 +  l1_weight * mean_j |z_j| )

`sum` is equation 3 of Schuster as printed; `mean` is what that paper's and Kendiukhov's code
compute.
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
) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
    """Loss of a batch x [rows, d_in] (already normalised).

    Args:
      dead: [latents] bool, for the auxiliary loss; None leaves that out.

    Returns:
      The loss; the metrics it passes by, and the codes z [rows, latents].
    """
    pre = models.pre_activations(params, x, architecture)
    z = models.activate(pre, hyper, architecture)
    error = models.decode(params, z) - x
    value, metrics = total(error, z, hyper, architecture)
    if dead is not None:
        value = value + hyper.aux_weight * auxk(params, hyper, pre, error, dead, architecture)
        metrics = metrics.replace(loss=value)
    return value, (metrics, z)


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


def total(
    error: jax.Array, z: jax.Array, hyper: Hyperparams, architecture: Architecture
) -> tuple[jax.Array, Metrics]:
    """The loss out of errors [rows, d_in] and codes [rows, latents]."""
    rows = error.shape[0]
    # Codes are never negative. Sums over them as products with ones: XLA fuses nothing into these,
    # and they cost a third of a reduction on CPU.
    over_rows = jnp.ones((rows,), z.dtype)
    squared = jnp.sum(error**2) / rows
    absolute = jnp.sum(over_rows @ z) / rows
    mse = squared / architecture.d_in
    if architecture.reduction == "sum":
        value = squared + hyper.l1_weight * absolute
    else:
        value = mse + hyper.l1_weight * absolute / architecture.n_latents
    l0 = jnp.sum(over_rows @ jnp.asarray(z > 0, z.dtype)) / rows
    return value, Metrics(loss=value, mse=mse, l1=absolute, l0=l0)

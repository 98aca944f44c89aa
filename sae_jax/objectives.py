"""What ONE dictionary minimises, and the one place where a reduction is defined.

    sum    L = mean over rows of ( sum_d (x - x')^2  +  l1_weight * sum_j |z_j| )
    mean   L = mean over rows of ( mean_d (x - x')^2 +  l1_weight * mean_j |z_j| )

`sum` is equation 3 of Schuster as printed; `mean` is what that paper's and Kendiukhov's code
compute.
"""

import jax
import jax.numpy as jnp

from sae_jax import models
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Metrics, Params


def loss(
    params: Params, hyper: Hyperparams, x: jax.Array, architecture: Architecture
) -> tuple[jax.Array, Metrics]:
    """Loss of a batch x [rows, d_in] (already normalised), and the metrics it passes by."""
    z = models.encode(params, hyper, x, architecture)
    error = models.decode(params, z) - x
    return total(error, z, hyper, architecture)


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

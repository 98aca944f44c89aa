"""How well, and how sparsely, a dictionary codes a set of rows.

Sums run on the device, batch by batch; what is divided is divided in float64 on the host.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh

from sae_jax import ensemble, models
from sae_jax.config import Architecture
from sae_jax.state import Hyperparams, Normalizer, Params

BATCH = 1024


@struct.dataclass
class Sums:
    """Of ONE dictionary over batches: squared_error [batches] in units of the normalizer's largest
    scale, so that float32 neither overflows nor vanishes whatever the rows' own; absolute [batches]
    = sum of z; active [latents] = rows in which a latent fires."""

    squared_error: jax.Array
    absolute: jax.Array
    active: jax.Array


def sums(
    member: tuple[Params, Hyperparams],
    batches: jax.Array,
    counted: jax.Array,
    normalizer: Normalizer | None,
    architecture: Architecture,
) -> Sums:
    """ONE dictionary over batches [batches, rows, d_in]; `counted` is False for padding rows."""
    params, hyper = member

    def batch(active: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        x, counted = pair
        x = models.normalize(x, normalizer)
        z = models.encode(params, hyper, x, architecture)
        z = jnp.where(counted[:, None], z, 0)
        error = models.decode(params, z) - x
        error = jnp.where(counted[:, None], error, 0)
        active = active + jnp.sum(z > 0, axis=0, dtype=jnp.int32)
        if normalizer is not None:
            error = error * (normalizer.scale / jnp.max(normalizer.scale))[None, :]
        return active, (jnp.sum(error**2), jnp.sum(z))

    nothing = jnp.zeros(architecture.n_latents, jnp.int32)
    active, (squared_error, absolute) = lax.scan(batch, nothing, (batches, counted))
    return Sums(squared_error=squared_error, absolute=absolute, active=active)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh"))
def _sums_of_members(
    params: Params,
    hyper: Hyperparams,
    batches: jax.Array,
    counted: jax.Array,
    normalizer: Normalizer | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> Sums:
    with jax.default_matmul_precision("highest"):
        member = functools.partial(sums, architecture=architecture)
        mapped = ensemble.map_members(member, mesh)
        return mapped((params, hyper), batches, counted, normalizer)


def evaluate(
    params: Params,
    hyper: Hyperparams,
    x: np.ndarray,
    normalizer: Normalizer | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """Metrics of all members of a bucket over x [rows, d_in]; each an array [members].

    mse: mean squared error over rows and dimensions, in the units of x.
    r2: 1 - fvu; fvu = squared error / squared distance from the mean of each dimension.
    r2_scalar_mean: the form that subtracts one mean of all dimensions; on anisotropic embeddings it
      is high for any code. For comparison with libraries that print it.
    l0, l1: mean number of active latents (z > 0) a row, mean sum of z.
    live: latents active in at least one of the rows; dead: the others.
    """
    rows = len(x)
    padded = np.zeros((-(-rows // BATCH) * BATCH, x.shape[1]), x.dtype)
    padded[:rows] = x
    counted = np.arange(len(padded)) < rows
    raw = _sums_of_members(
        params, hyper, padded.reshape(-1, BATCH, x.shape[1]), counted.reshape(-1, BATCH),
        normalizer, architecture=architecture, mesh=mesh,
    )  # fmt: skip
    raw = jax.tree.map(np.asarray, raw)
    unit = 1.0 if normalizer is None else float(np.max(normalizer.scale))
    squared_error = raw.squared_error.sum(axis=1, dtype=np.float64) * unit**2
    live = (raw.active > 0).sum(axis=1)
    fvu = _ratio(squared_error, _sum_of_squares(x, x.mean(axis=0, dtype=np.float64)))
    fvu_scalar = _ratio(squared_error, _sum_of_squares(x, x.mean(dtype=np.float64)))
    return {
        "mse": squared_error / x.size,
        "r2": 1 - fvu,
        "fvu": fvu,
        "r2_scalar_mean": 1 - fvu_scalar,
        "l0": raw.active.sum(axis=1) / rows,
        "l1": raw.absolute.sum(axis=1, dtype=np.float64) / rows,
        "live": live,
        "dead": architecture.n_latents - live,
    }


def _sum_of_squares(x: np.ndarray, mean: np.ndarray | float) -> float:
    """Squared distances from a mean."""
    return sum(
        float(np.square(x[i : i + BATCH].astype(np.float64) - mean).sum())
        for i in range(0, len(x), BATCH)
    )


def _ratio(squared_error: np.ndarray, total: float) -> np.ndarray:
    """Fraction of variance unexplained; of rows without variance 0 or infinity."""
    if total > 0:
        return squared_error / total
    return np.where(squared_error > 0, np.inf, 0.0)

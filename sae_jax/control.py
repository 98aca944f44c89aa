"""What of ONE dictionary follows the codes of each batch beside its gradient, and how slowly.

`wanted_l0` moves the weight of an L1 penalty until as many latents are active as are wanted: one
number to choose that means the same for every embedding, width and reduction, where the weight does
not (Kendiukhov, section 4.4, needs weights of 1 to 10 where Schuster needs 1e-3).
`estimated_threshold` is what batch_topk encodes with when there is no batch to choose from.
"""

import jax
import jax.numpy as jnp

from sae_jax.state import Params

GAIN = 5e-3  # of the weight's logarithm a step, for an L0 that is wrong by a factor of e
MOST_WRONG = 1.0  # a wider miss moves the weight no faster
MEMORY = 100  # batches that the threshold's mean goes back to


def wanted_l0(log_factor: jax.Array, l0: jax.Array, target_l0: jax.Array) -> jax.Array:
    """The logarithm of the L1 weight's factor after a batch that had `l0` active latents a row.

    An integral controller on log(l0 / target_l0): it rests where the two are equal, whatever the
    weight that takes. Its steps are bounded, so a dense start does not drive the weight so high
    that every latent dies.
    """
    tiny = jnp.finfo(l0.dtype).tiny
    miss = jnp.log(jnp.maximum(l0, tiny)) - jnp.log(target_l0)
    return log_factor + GAIN * jnp.clip(miss, -MOST_WRONG, MOST_WRONG)


def estimated_threshold(params: Params, z: jax.Array, step: jax.Array) -> Params:
    """batch_topk's threshold after a batch of codes z [rows, latents], at a step from 0.

    The mean of the smallest code of every batch so far, which after MEMORY batches forgets the
    older ones exponentially. A batch without an active latent changes nothing.
    """
    smallest = jnp.min(jnp.where(z > 0, z, jnp.inf))
    weight = jnp.maximum(1 / (step + 1).astype(z.dtype), 1 / MEMORY)
    old = jnp.exp(params.log_threshold)
    new = old + weight * (smallest - old)
    fresh = jnp.log(jnp.maximum(new, jnp.finfo(z.dtype).tiny))
    known = jnp.isfinite(smallest)
    return params.replace(log_threshold=jnp.where(known, fresh, params.log_threshold))

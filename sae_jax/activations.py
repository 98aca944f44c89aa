"""Pre-activations to codes, for any leading shape.

`topk` takes a traced k. Selection is exact: the k-th largest value of a row is found by bisection
on the bits of its floats, whose order as integers is their order as numbers once negatives are cut
off. Ties with the k-th value are all kept, so that L0 can exceed k by them and the result never
depends on the order of the latents.
"""

import jax
import jax.numpy as jnp
from jax import lax


def relu(pre: jax.Array) -> jax.Array:
    """max(pre, 0), with gradient 0 at 0."""
    return jax.nn.relu(pre)


def topk(pre: jax.Array, k: jax.Array) -> jax.Array:
    """The k largest entries of the last axis, then ReLU (Schuster, A.1; Gao et al. 2024).

    Where fewer than k entries are positive, all of those and no others are active.
    """
    positive = relu(pre)
    threshold = lax.stop_gradient(kth_largest_bound(lax.stop_gradient(positive), k))
    return jnp.where(positive >= threshold, positive, 0)


def kth_largest_bound(values: jax.Array, k: jax.Array) -> jax.Array:
    """A bound per row that exactly the k largest entries reach, ties with the k-th included.

    Args:
      values: [..., n], all at least 0.
      k: scalar integer in 1 .. n.

    Returns:
      [..., 1]. Some value above the (k+1)-th largest and at most the k-th, or the k-th itself where
      the two tie. Rows stop being halved once as many as k entries reach their bound.
    """
    integer = {4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]
    ones = jnp.ones(values.shape[-1], values.dtype)

    def reach(bits: jax.Array) -> jax.Array:
        # Counting by a product with ones is faster than a sum of booleans, and exact below 2^24.
        bound = lax.bitcast_convert_type(bits, values.dtype)
        return jnp.asarray(values >= bound, values.dtype) @ ones

    # Invariant: at least k entries reach `low`, fewer than k reach `high`.
    top = jnp.max(values, axis=-1, keepdims=True)
    high = lax.bitcast_convert_type(top, integer) + 1
    low = jnp.zeros_like(high)
    exact = jnp.broadcast_to(k >= values.shape[-1], high.shape)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        low, high, exact = carry
        return jnp.any((high - low > 1) & ~exact)

    def halve(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, exact = carry
        middle = low + (high - low) // 2
        count = reach(middle)[..., None]
        enough = count >= k
        low = jnp.where(enough & ~exact, middle, low)
        high = jnp.where(enough | exact, high, middle)
        return low, high, exact | (count == k)

    low, _, _ = lax.while_loop(unfinished, halve, (low, high, exact))
    return lax.bitcast_convert_type(low, values.dtype)

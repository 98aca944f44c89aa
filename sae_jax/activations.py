"""Pre-activations [rows, latents] to codes of the same shape.

`topk` takes a traced k. Selection is exact: the k-th largest value of a row is found by bisection
of values first and then of the bits of the floats, whose order as integers is their order as
numbers once negatives are cut off. Ties with the k-th value are all kept, so that L0 can exceed k
by them and the result never depends on the order of the latents.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

WIDE, BLOCK = 1024, 16  # rows at least so wide are bisected so many at a time
VALUE_PASSES = 16


_Bracket = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # low, high, done, passes


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
      [..., 1]. 0 where at most k entries are positive; else some value above the (k+1)-th largest
      and at most the k-th, or the k-th itself where the two tie.
    """
    *leading, n = values.shape
    if n < WIDE or math.prod(leading) % BLOCK:
        return _bisect(values, k)
    # A block of wide rows stays in cache over all the passes that its bisection makes.
    blocks = lax.map(lambda block: _bisect(block, k), values.reshape(-1, BLOCK, n))
    return blocks.reshape(*leading, 1)


def _bisect(values: jax.Array, k: jax.Array) -> jax.Array:
    integer = {4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]
    ones = jnp.ones((values.shape[-1], 1), values.dtype)
    k = jnp.asarray(k, values.dtype)

    def bits(numbers: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(numbers, integer)

    def number(bits: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(bits, values.dtype)

    def count(reached: jax.Array) -> jax.Array:
        # A product with ones is faster than a sum of booleans, and exact below 2^24.
        return reached.astype(values.dtype) @ ones

    # Invariant: at least k entries reach `low`, fewer than k reach `high`. Rows that are done, as
    # exactly k entries reach `low` or no others are positive, stay as they are.
    high = bits(jnp.max(values, axis=-1, keepdims=True)) + 1
    low = jnp.zeros_like(high)
    done = (count(values > 0) <= k) | (k >= values.shape[-1])

    def unfinished(carry: _Bracket) -> jax.Array:
        low, high, done, _ = carry
        return jnp.any((high - low > 1) & ~done)

    def halve(carry: _Bracket) -> _Bracket:
        low, high, done, passes = carry
        # Halving the values closes in on where the entries lie; halving the bits ends for certain.
        between = bits(number(low) + (number(high) - number(low)) / 2)
        middle = jnp.where(passes < VALUE_PASSES, between, low + (high - low) // 2)
        middle = jnp.clip(middle, low + 1, high - 1)
        reach = count(values >= number(middle))
        enough = reach >= k
        low = jnp.where(enough & ~done, middle, low)
        high = jnp.where(enough | done, high, middle)
        return low, high, done | (reach == k), passes + 1

    low, *_ = lax.while_loop(unfinished, halve, (low, high, done, jnp.zeros((), jnp.int32)))
    return number(low)

"""Pre-activations [rows, latents] to codes of the same shape.

`topk` and `batch_topk` take a traced k. Selection is exact: the k-th largest value of a row is
found by bisection of values first and then of the bits of the floats, whose order as integers is
their order as numbers once negatives are cut off. Ties with the k-th value are all kept, so that L0
can exceed k by them and the result never depends on the order of the latents.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import distributed

WIDE, BLOCK = 1024, 8  # rows at least so wide are bisected so many at a time
VALUE_PASSES = 16


_Bracket = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # low, high, done, passes
_Residuals = tuple[jax.Array, jax.Array, jax.Array]  # pre, log_threshold, bandwidth


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


def batch_topk(pre: jax.Array, k: jax.Array) -> jax.Array:
    """The k * rows largest entries of the whole batch, then ReLU (Bussmann et al. 2024).

    For training: a row's codes depend on the rows beside it.
    """
    positive = relu(pre)
    wanted = jnp.asarray(k, jnp.int32) * pre.shape[0]
    threshold = _bisect(lax.stop_gradient(positive), wanted, over_rows=True)
    return jnp.where(positive >= lax.stop_gradient(threshold), positive, 0)


@jax.custom_vjp
def jump_relu(pre: jax.Array, log_threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """pre where it exceeds its threshold, else 0 (Rajamanoharan et al. 2024, JumpReLU SAEs).

    Its gradient is that of the step for `pre`, and for the threshold t that of equation 11 there:
    - t / bandwidth wherever |pre - t| < bandwidth / 2. A threshold is exp(log_threshold), so that
      it stays positive and learns at a rate that does not depend on its scale.

    Args:
      pre: [rows, latents].
      log_threshold: [latents].
      bandwidth: scalar.
    """
    return jnp.where(pre > jnp.exp(log_threshold)[None, :], pre, 0)


def _jump_relu_forward(
    pre: jax.Array, log_threshold: jax.Array, bandwidth: jax.Array
) -> tuple[jax.Array, _Residuals]:
    return jump_relu(pre, log_threshold, bandwidth), (pre, log_threshold, bandwidth)


def _jump_relu_backward(residuals: _Residuals, g: jax.Array) -> _Residuals:
    pre, log_threshold, bandwidth = residuals
    threshold = jnp.exp(log_threshold)
    near = _near(pre, threshold, bandwidth)
    of_threshold = -threshold * jnp.sum(g * near, axis=0) / bandwidth
    return (
        jnp.where(pre > threshold[None, :], g, 0),
        of_threshold * threshold,
        jnp.zeros_like(bandwidth),
    )


jump_relu.defvjp(_jump_relu_forward, _jump_relu_backward)


@jax.custom_vjp
def count_above(pre: jax.Array, log_threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """How many entries of each row exceed their thresholds, [rows]; see `jump_relu`.

    Only thresholds have a gradient (equation 12 there): - 1 / bandwidth for each entry within half
    a bandwidth of its threshold.
    """
    return jnp.sum(pre > jnp.exp(log_threshold)[None, :], axis=1, dtype=pre.dtype)


def _count_forward(
    pre: jax.Array, log_threshold: jax.Array, bandwidth: jax.Array
) -> tuple[jax.Array, _Residuals]:
    return count_above(pre, log_threshold, bandwidth), (pre, log_threshold, bandwidth)


def _count_backward(residuals: _Residuals, g: jax.Array) -> _Residuals:
    pre, log_threshold, bandwidth = residuals
    threshold = jnp.exp(log_threshold)
    of_threshold = -jnp.sum(g[:, None] * _near(pre, threshold, bandwidth), axis=0) / bandwidth
    return jnp.zeros_like(pre), of_threshold * threshold, jnp.zeros_like(bandwidth)


count_above.defvjp(_count_forward, _count_backward)


def _near(pre: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """The rectangular kernel: 1 within half a bandwidth of the threshold, else 0."""
    return jnp.asarray(jnp.abs(pre - threshold[None, :]) < bandwidth / 2, pre.dtype)


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
    if n < WIDE or math.prod(leading) % BLOCK or distributed.latent_devices() > 1:
        return _bisect(values, k)

    def blocked(values: jax.Array) -> jax.Array:
        # A block of wide rows stays in cache over all the passes that its bisection makes.
        blocks = lax.map(lambda block: _bisect(block, k), values.reshape(-1, BLOCK, n))
        return blocks.reshape(*leading, 1)

    # An accelerator has no such cache, and would do one block after another.
    return lax.platform_dependent(values, cpu=blocked, default=lambda values: _bisect(values, k))


def _bisect(values: jax.Array, k: jax.Array, over_rows: bool = False) -> jax.Array:
    """`kth_largest_bound` of every row, or with `over_rows` of [rows, n] as a whole: [1, 1]."""
    integer = {4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]
    ones = jnp.ones((values.shape[-1], 1), values.dtype)
    k = jnp.asarray(k, jnp.int32 if over_rows else values.dtype)

    def bits(numbers: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(numbers, integer)

    def number(bits: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(bits, values.dtype)

    def count(reached: jax.Array) -> jax.Array:
        # A product with ones is faster than a sum of booleans, and exact below 2^24.
        reached = reached.astype(values.dtype) @ ones
        if over_rows:
            return jnp.sum(reached.astype(jnp.int32), axis=0, keepdims=True)
        return reached

    # Invariant: at least k entries reach `low`, fewer than k reach `high`. Rows that are done, as
    # exactly k entries reach `low` or no others are positive, stay as they are.
    high = bits(jnp.max(values, axis=None if over_rows else -1, keepdims=True)) + 1
    low = jnp.zeros_like(high)
    done = (count(values > 0) <= k) | (k >= (values.size if over_rows else values.shape[-1]))

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

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

from sae_jax import activations

WIDTH = 9
jitted = jax.jit(activations.topk)
DTYPES = [np.float32, np.float64]


def brute_force(pre: np.ndarray, k: int) -> np.ndarray:
    """An entry stays where it is positive and fewer than k entries of its row are larger."""
    larger = (pre[..., None, :] > pre[..., :, None]).sum(axis=-1)
    return np.where((pre > 0) & (larger < k), pre, 0)


def topk(pre: np.ndarray, k: int) -> np.ndarray:
    with jax.enable_x64(pre.dtype == np.float64):
        z = np.asarray(jitted(pre, k))
    assert z.dtype == pre.dtype
    return z


def rows(dtype: type) -> st.SearchStrategy[np.ndarray]:
    """Values of every size, small integers (many ties), and hardly any positive value."""
    width = np.dtype(dtype).itemsize * 8
    anything = st.floats(width=width, allow_nan=False, allow_infinity=False, allow_subnormal=False)
    ties = st.integers(-2, 2).map(float)
    sparse = st.sampled_from([0.0, -0.0, -1.0, 1.5])
    elements = st.sampled_from([anything, ties, sparse])
    return elements.flatmap(lambda e: hnp.arrays(dtype, (2, WIDTH), elements=e))


ROWS = st.sampled_from(DTYPES).flatmap(rows)
HUGE = np.full((2, WIDTH), np.finfo(np.float32).max, np.float32)


@given(ROWS, st.integers(1, WIDTH))
@example(HUGE, 1)
@example(HUGE * np.linspace(0.5, 1, WIDTH, dtype=np.float32)[None], 4)
@example(np.zeros((2, WIDTH), np.float32), 1)
@example(-np.zeros((2, WIDTH), np.float32), 3)
@example(np.full((2, WIDTH), np.finfo(np.float64).max), WIDTH)
@example(np.repeat(np.arange(3.0), 3).reshape(1, WIDTH).repeat(2, axis=0), 2)
@example(np.nextafter(np.ones((2, WIDTH)), np.arange(WIDTH)[None] % 3, dtype=np.float64), 3)
def test_topk_equals_brute_force(pre: np.ndarray, k: int) -> None:
    np.testing.assert_array_equal(topk(pre, k), brute_force(pre, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_floats_are_told_apart(dtype: type) -> None:
    start = np.finfo(dtype).tiny
    for low in (start, dtype(1), np.nextafter(dtype(2), dtype(0)), dtype(1e30)):
        row = [low]
        for _ in range(WIDTH - 1):
            row.append(np.nextafter(row[-1], dtype(np.inf)))
        pre = np.asarray([row, row[::-1]], dtype)
        for k in range(1, WIDTH + 1):
            assert (topk(pre, k) > 0).sum(axis=1).tolist() == [k, k]


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_values_or_zero_and_take_no_place(dtype: type) -> None:
    """XLA flushes subnormal floats to zero on CPU; nothing else about a row may change."""
    tiny = np.finfo(dtype).smallest_subnormal
    small = np.asarray([[4, 3, 2, 1, 0, 0, -1, -2, -3]], dtype) * tiny
    for k in range(1, WIDTH + 1):
        z = topk(small.repeat(2, axis=0), k)
        assert np.isin(z, np.r_[0, small[0, :k]]).all()
        mixed = np.concatenate([small[:, :7], [[1, 2]]], axis=1, dtype=dtype)
        z = topk(mixed.repeat(2, axis=0), k)
        np.testing.assert_array_equal(z[:, 7:], [[k > 1, 2]] * 2)
        assert np.isin(z[:, :7], np.r_[0, small[0]]).all()


def test_ties_with_the_kth_are_all_kept_and_others_are_not() -> None:
    pre = np.asarray([[3, 1, 2, 2, 2, 0, -1, -1, 1], [5, 5, 5, 5, 5, 5, 5, 5, 5]], np.float32)
    np.testing.assert_array_equal(topk(pre, 2), [[3, 0, 2, 2, 2, 0, 0, 0, 0], [5] * 9])
    np.testing.assert_array_equal(topk(pre, 1), [[3, 0, 0, 0, 0, 0, 0, 0, 0], [5] * 9])


def test_fewer_than_k_positives_are_all_of_the_code() -> None:
    pre = np.asarray([[-1, 0.5, -2, 0, 0.25, -3, -4, -5, -6]], np.float32).repeat(2, axis=0)
    for k in range(2, WIDTH + 1):
        np.testing.assert_array_equal(topk(pre, k), np.maximum(pre, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 80, 2500, 4999, 5000])
def test_wide_rows_equal_a_sort(dtype: type, k: int) -> None:
    pre = np.random.default_rng(k).normal(size=(3, 5000)).astype(dtype)
    kth = np.sort(pre, axis=1)[:, -k][:, None]
    np.testing.assert_array_equal(topk(pre, k), np.where((pre >= kth) & (pre > 0), pre, 0))


def test_codes_do_not_depend_on_the_order_of_latents_or_on_other_rows() -> None:
    rng = np.random.default_rng(0)
    pre = rng.integers(-3, 9, (40, 30)).astype(np.float32)
    order = rng.permutation(30)
    whole = topk(pre, 4)
    np.testing.assert_array_equal(topk(pre[:, order], 4), whole[:, order])
    for i in range(0, 40, 7):
        np.testing.assert_array_equal(topk(pre[i : i + 1], 4), whole[i : i + 1])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    pre = np.random.default_rng(0).normal(size=(*shape, WIDTH)).astype(np.float32)
    np.testing.assert_array_equal(topk(pre, 3), brute_force(pre, 3))


@pytest.mark.parametrize("mapped", ["vmap", "lax.map"])
def test_k_may_differ_between_members_of_one_program(mapped: str) -> None:
    pre = np.random.default_rng(0).integers(-4, 9, (WIDTH, 5, WIDTH)).astype(np.float32)
    ks = np.arange(1, WIDTH + 1, dtype=np.int32)

    def members(pre: jax.Array, ks: jax.Array) -> jax.Array:
        if mapped == "vmap":
            return jax.vmap(activations.topk)(pre, ks)
        return lax.map(lambda one: activations.topk(*one), (pre, ks))

    expected = [brute_force(p, k) for p, k in zip(pre, ks, strict=True)]
    np.testing.assert_array_equal(jax.jit(members)(pre, ks), expected)


def test_gradient_reaches_the_kept_entries_only() -> None:
    rng = np.random.default_rng(0)
    pre = rng.normal(size=(6, WIDTH)).astype(np.float32)
    weight = rng.normal(size=pre.shape).astype(np.float32)
    for k in (1, 3, WIDTH):
        loss = functools.partial(lambda pre, k: jnp.sum(activations.topk(pre, k) * weight), k=k)
        expected = np.where(brute_force(pre, k) > 0, weight, 0)
        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(pre), expected)


def test_relu_and_its_gradient_at_zero() -> None:
    pre = jnp.asarray([-2.0, -0.0, 0.0, 3.0])
    np.testing.assert_array_equal(activations.relu(pre), [0, 0, 0, 3])
    gradient = jax.grad(lambda pre: jnp.sum(activations.relu(pre)))(pre)
    np.testing.assert_array_equal(gradient, [0, 0, 0, 1])

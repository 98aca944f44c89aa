import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import sparse

from sae_jax import InputError, data, models


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(3), r"^x has shape \(3,\); it must be \[rows, dimensions\]"),
        (np.zeros((3, 2, 1)), r"^x has shape \(3, 2, 1\)"),
        (3.0, r"^x has shape \(\)"),
        (np.asarray([["a", "b"]]), "^x has dtype <U1; it must hold real numbers"),
        (np.zeros((2, 2), complex), "^x has dtype complex128"),
        (np.zeros((2, 2), bool), "^x has dtype bool"),
        (np.zeros((2, 2), object), "^x has dtype object"),
        (np.zeros((0, 4)), r"^x is empty: shape \(0, 4\)"),
        (np.zeros((4, 0)), r"^x is empty: shape \(4, 0\)"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(x: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.check_rows(x, "x")


def test_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"^train has 3 dimensions, the dictionary has d_in=4"):
        data.check_rows(np.zeros((2, 3)), "train", d_in=4)
    assert data.check_rows(np.zeros((2, 4)), "train", d_in=4).shape == (2, 4)


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 2)), min_size=1, unique=True))
def test_values_that_are_not_finite_are_counted_and_their_rows_named(
    holes: list[tuple[int, int]],
) -> None:
    x = np.ones((20, 3), np.float32)
    for i, (row, column) in enumerate(holes):
        x[row, column] = [np.nan, np.inf, -np.inf][i % 3]
    rows = sorted({row for row, _ in holes})
    with pytest.raises(InputError) as caught:
        data.check_rows(x, "x")
    message = str(caught.value)
    assert f"x holds {len(holes)} NaN or infinite values in {len(rows)} of 20 rows" in message
    assert f"(rows {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''})" in message


def test_numbers_become_c_ordered_float32_unless_they_are_float64() -> None:
    for dtype in (np.int8, np.uint16, np.int64, np.float16, np.float32, ">f4"):
        x = data.check_rows(np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype)), "x")
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        np.testing.assert_array_equal(x, [[0, 1, 2], [3, 4, 5]])
    assert data.check_rows([[1.5, 2]], "x").dtype == np.float64
    assert data.check_rows(np.ones((1, 2), ">f8"), "x").dtype == np.float64
    x = np.ones((2, 2), np.float32)
    assert data.check_rows(x, "x") is x


def test_float64_values_beyond_float32_stay_and_wider_ones_are_found() -> None:
    assert data.check_rows(np.full((1, 1), 1e300), "x")[0, 0] == 1e300


def test_a_sparse_matrix_is_named_in_the_refusal() -> None:
    with pytest.raises(InputError, match="sparse"):
        data.check_rows(sparse.csr_matrix(np.eye(3)), "x")


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 5))
@example(10, 0.26, 0)
def test_a_split_is_complete_disjoint_sorted_and_deterministic(
    rows: int, fraction: float, seed: int
) -> None:
    train, held_out = data.split(rows, fraction, seed)
    assert len(held_out) == round(rows * fraction)
    assert sorted([*train, *held_out]) == list(range(rows))
    for part, again in zip((train, held_out), data.split(rows, fraction, seed), strict=True):
        np.testing.assert_array_equal(part, again)
        assert np.all(np.diff(part) > 0)


def test_a_split_depends_on_its_seed_and_is_spread_over_the_rows() -> None:
    first, second = data.split(1000, 0.2, 0)[1], data.split(1000, 0.2, 1)[1]
    assert not np.array_equal(first, second)
    assert abs(first.mean() - 499.5) < 4 * 289 / np.sqrt(200)


@given(st.lists(st.sampled_from(["train", "Train", "val", "VALID", "validation", " test "])))
def test_labels_become_positions(labels: list[str]) -> None:
    labels = ["train", *labels]
    found = data.split_by(np.asarray(labels))
    assert list(found) == ["train", "validation", "test"]
    for name, positions in found.items():
        expected = [i for i, label in enumerate(labels) if label.strip().lower()[:2] == name[:2]]
        np.testing.assert_array_equal(positions, expected)
        assert positions.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (
            ["train", "dev", "test", "dev"],
            r"found 'dev' \(2 rows\), 'test' \(1 rows\), 'train' \(1",
        ),
        (["val", "test"], r"some rows train; found 'test' \(1 rows\), 'val' \(1 rows\)$"),
        (["train", ""], r"found '' \(1 rows\), 'train'"),
        (["True", "False"], r"found 'False' \(1 rows\), 'True' \(1 rows\)$"),
        ([str(i) for i in range(12)], r"'7' \(1 rows\), \.\.\.$"),
        ([], "found none"),
    ],
)
def test_labels_that_name_no_split_are_listed(labels: list[str], found: str) -> None:
    with pytest.raises(
        InputError, match=r"named train, validation \(val, valid\) or test.*" + found
    ):
        data.split_by(labels)


ROWS = np.random.default_rng(0).normal(size=(500, 3)) * [[1, 20, 0.01]] + [[5, 0, -3]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zscore_equals_numpy(dtype: type) -> None:
    x = ROWS.astype(dtype)
    found = data.fit_normalizer(x, "zscore")
    assert found.mean.dtype == found.scale.dtype == dtype
    np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(found.scale, x.std(axis=0, dtype=np.float64), rtol=1e-6)
    y = np.asarray(models.normalize(x.astype(np.float32), found), np.float64)
    np.testing.assert_allclose(y.mean(axis=0), np.zeros(3), atol=1e-4)
    np.testing.assert_allclose(y.std(axis=0), np.ones(3), rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalar_brings_the_mean_squared_norm_to_the_dimensions(dtype: type) -> None:
    x = ROWS.astype(dtype)
    found = data.fit_normalizer(x, "scalar")
    assert found.mean.dtype == found.scale.dtype == dtype
    np.testing.assert_array_equal(found.mean, np.zeros(3))
    assert len(set(found.scale.tolist())) == 1
    y = np.asarray(models.normalize(x.astype(np.float32), found), np.float64)
    assert np.square(y).sum(axis=1).mean() == pytest.approx(3, rel=1e-5)


def test_none_normalises_nothing() -> None:
    assert data.fit_normalizer(ROWS, "none") is None


def test_statistics_are_summed_in_float64() -> None:
    x = np.full((2**16, 1), 1000.1, np.float32)
    x[::2] += np.float32(0.5)
    found = data.fit_normalizer(x, "zscore")
    assert found.scale[0] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 3.0, 0.1, -7.3, 1e-30])
@pytest.mark.parametrize("rows", [1, 10, 1001])
def test_a_constant_dimension_is_centred_and_left_at_scale_one(value: float, rows: int) -> None:
    x = np.c_[np.full(rows, value), np.arange(rows)].astype(np.float32)
    found = data.fit_normalizer(x, "zscore")
    assert found.scale[0] == 1
    assert found.mean[0] == np.float32(value)
    assert np.isfinite(np.asarray(models.normalize(x, found))).all()


def test_a_constant_dimension_in_float64_is_left_at_scale_one() -> None:
    for value in (0.1, 0.3, 7.7, -1e-3):
        for rows in (10, 100, 1001):
            assert data.fit_normalizer(np.full((rows, 1), value), "zscore").scale[0] == 1


def test_scalar_of_zeros_is_left_at_scale_one() -> None:
    np.testing.assert_array_equal(data.fit_normalizer(np.zeros((5, 2)), "scalar").scale, [1, 1])


def test_a_fingerprint_is_of_shape_dtype_and_values() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(x.tobytes()).hexdigest()
    assert data.fingerprint(x) == {"shape": [2, 3], "dtype": "float32", "sha256": expected}
    assert data.fingerprint(np.asfortranarray(x)) == data.fingerprint(x)
    others = [x.reshape(3, 2), x.astype(np.float64), x + np.float32(1e-6), x[::-1]]
    assert all(data.fingerprint(other) != data.fingerprint(x) for other in others)

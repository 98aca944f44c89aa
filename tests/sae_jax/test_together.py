"""Rows that processes read together, each its part; the processes themselves are in
test_processes."""

from typing import Any
from unittest import mock

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from sae_jax import InputError, distributed, together
from sae_jax.streaming import Rows

X = np.arange(60, dtype=np.float32).reshape(20, 3)


def as_process(i: int, count: int) -> mock._patch_dict:
    return mock.patch.multiple(jax, process_index=lambda: i, process_count=lambda: count)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    count=st.integers(2, 7),
    cuts=st.lists(st.integers(0, 20), unique=True, max_size=8).map(sorted),
)
def test_each_process_reads_its_part_and_the_parts_are_all(count: int, cuts: list[int]) -> None:
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    whole = Rows(X).read(ranges)
    rows, parts = [], []
    with mock.patch.object(distributed, "check_same"):
        for i in range(count):
            with as_process(i, count):
                rows.append(together.shared(Rows(X)))
                parts.append(rows[i].read_part(ranges))
    assert sum(map(len, parts)) == len(whole), "each row is read once"
    assert max(map(len, parts)) == -(-len(whole) // count), "no process reads more than its share"
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    each = -(-len(whole) // count)
    padded = np.stack([np.pad(part, ((0, each - len(part)), (0, 0))) for part in parts])
    for i in range(count):
        coming = iter([padded[:, first : first + 2] for first in range(0, each, 2)])

        def agree(values: np.ndarray, i: int = i, coming: Any = coming) -> np.ndarray:
            every = next(coming)
            np.testing.assert_array_equal(values, every[i])
            return every

        with (
            as_process(i, count),
            mock.patch.object(distributed, "agree", agree),
            mock.patch.object(distributed, "unless_refused", lambda function: function()),
            mock.patch.object(together, "AT_ONCE", 2 * X[0].nbytes),
        ):
            np.testing.assert_array_equal(rows[i].read(ranges), whole)


def test_chosen_rows_stay_together_and_one_process_reads_alone() -> None:
    rows = Rows(X)
    assert together.shared(rows) is rows
    with as_process(1, 2), mock.patch.object(distributed, "check_same"):
        shared = together.shared(rows)
        assert together.shared(shared) is shared
        chosen = shared.take([1, 4, 7, 19])
        assert isinstance(chosen, together.Together)
        np.testing.assert_array_equal(chosen.read_part([(0, 4)]), X[[7, 19]])


def test_a_file_of_another_shape_is_refused() -> None:
    other = np.asarray([19, 3, 4], np.int64)
    seen = [np.asarray([20, 3, 4], np.int64), other]
    found = np.stack([each.view(np.uint8) for each in seen])
    with (
        as_process(1, 2),
        mock.patch.object(distributed, "agree", return_value=found),
        pytest.raises(InputError, match="process 1 has another shape or dtype of rows than"),
    ):
        together.shared(Rows(X))

"""The wire format: back and forth, and read by hand as the browser's JavaScript reads it."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from analysis.browser import wire
from sae_jax import InputError

ARRAYS = st.sampled_from(list(wire.DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(dtype, st.integers(0, 20))
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False) | ARRAYS
)  # fmt: skip
DOCUMENTS = st.dictionaries(
    st.text().filter(lambda key: key != "$"),
    st.recursive(
        LEAVES,
        lambda held: (
            st.lists(held, max_size=4)
            | st.dictionaries(st.text().filter(lambda key: key != "$"), held, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=5,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=40)
@given(DOCUMENTS)
def test_what_is_packed_comes_back(document: dict[str, Any]) -> None:
    assert same(document, wire.unpack(wire.pack(document)))


@settings(max_examples=40)
@given(DOCUMENTS)
def test_the_layout_is_the_one_described(document: dict[str, Any]) -> None:
    packed = wire.pack(document)
    assert packed[:4] == b"SAE1"
    assert len(packed) % 8 == 0
    (length,) = struct.unpack("<I", packed[4:8])
    start = (8 + length + 7) // 8 * 8
    header = json.loads(packed[8 : 8 + length].decode("utf-8"))
    end = 0

    def walk(given: Any, held: Any) -> None:
        nonlocal end
        if isinstance(given, np.ndarray):
            name, offset, count = held["$"]
            assert name == given.dtype.str[1:]
            assert (offset, count) == (end, len(given))
            content = packed[start + offset : start + offset + given.nbytes]
            assert content == given.tobytes()
            end = (offset + given.nbytes + 7) // 8 * 8
        elif isinstance(given, dict | list):
            pairs = given.items() if isinstance(given, dict) else enumerate(given)
            for key, value in pairs:
                walk(value, held[key])

    walk(document, header)
    assert len(packed) == start + end


def test_numbers_that_json_lacks_are_null() -> None:
    document = {"a": np.nan, "b": [np.inf, np.float32(1.5), np.int64(3), np.bool_(True)]}
    assert wire.unpack(wire.pack(document)) == {"a": None, "b": [None, 1.5, 3, True]}


def test_a_column_called_as_the_mark_is_data() -> None:
    for value in ("text", None, 3, {"$": "x"}):
        assert wire.unpack(wire.pack({"$": value})) == {"$": value}


def test_big_endian_and_sliced_arrays_arrive_as_they_are() -> None:
    values = np.arange(20, dtype=np.uint32)[::3]
    found = wire.unpack(wire.pack({"x": values}))
    assert found["x"].tolist() == values.tolist()
    assert wire.unpack(wire.pack({"x": "\ud800"})) == {"x": "?"}


@pytest.mark.parametrize(
    "value",
    [np.zeros((2, 2), np.float32), np.zeros(2), np.array(["a"]), object(), {1: 2}, {"$": [1]}],
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(InputError):
        wire.pack({"x": value})


@pytest.mark.parametrize(
    "content", [b"", b"SAE1", b"SAE2" + bytes(12), b"SAE1\xff\xff\xff\xff{}", b"SAE1\2\0\0\0[}"]
)
def test_what_is_no_document_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="no packed document"):
        wire.unpack(content)

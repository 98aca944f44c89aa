"""Documents as bytes: JSON with typed arrays behind it.

A packed document is b"SAE1", the length of the header (uint32, little endian), the header (JSON in
UTF-8), zeros up to a multiple of eight, then the arrays one after another, each from a multiple of
eight on. In the header an array is {"$": [dtype, offset from the first array, length]}.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from sae_jax import InputError

MAGIC = b"SAE1"
DTYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "i4": np.int32, "f4": np.float32}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_MARK = "$"


def pack(document: Mapping[str, Any]) -> bytes:
    """A document's bytes.

    Args:
        document: of strings, numbers, booleans, None, lists and mappings with text for keys, no
            list called "$"; NumPy's scalars count as numbers; NaN and infinity become null. Arrays
            are one-dimensional, of the `DTYPES`.

    Raises:
        InputError: for anything else.
    """
    arrays: list[np.ndarray] = []
    size = 0

    def plain(value: Any) -> Any:
        nonlocal size
        if isinstance(value, np.ndarray):
            name = _NAMES.get(value.dtype)
            if value.ndim != 1 or name is None:
                raise InputError(
                    f"an array of {value.dtype} {value.shape} cannot be packed: give one dimension "
                    f"of {', '.join(DTYPES)}"
                )
            arrays.append(value)
            place, size = size, size + _padded(value.nbytes)
            return {_MARK: [name, place, len(value)]}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise InputError(f"keys must be text: {list(value)[:5]}")
            if isinstance(value.get(_MARK), list | tuple | np.ndarray):
                raise InputError(f"a list called {_MARK!r} would be read as an array")
            return {key: plain(held) for key, held in value.items()}
        if isinstance(value, list | tuple):
            return [plain(held) for held in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if value is None or isinstance(value, str | int | float):
            return value
        raise InputError(f"{type(value).__name__} cannot be packed")

    text = json.dumps(plain(document), ensure_ascii=False, separators=(",", ":"))
    header = text.encode("utf-8", "replace")  # a lone surrogate is no text
    parts = [_aligned(MAGIC + struct.pack("<I", len(header)) + header)]
    little = (array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays)
    return b"".join([*parts, *(_aligned(array.tobytes()) for array in little)])


def unpack(packed: bytes) -> dict[str, Any]:
    """The document of `pack`; its arrays are read-only views of the bytes.

    Raises:
        InputError: for bytes that are no document.
    """
    try:
        if packed[:4] != MAGIC:
            raise ValueError("it begins otherwise")
        (length,) = struct.unpack_from("<I", packed, 4)
        header = packed[8 : 8 + length]
        if len(header) < length:
            raise ValueError("it is cut off")
        start = _padded(8 + length)

        def typed(found: dict[str, Any]) -> Any:
            if not isinstance(found.get(_MARK), list):
                return found
            name, place, count = found[_MARK]
            dtype = np.dtype(DTYPES[name]).newbyteorder("<")
            return np.frombuffer(packed, dtype, count, start + place)

        return json.loads(header.decode(), object_hook=typed)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"these bytes are no packed document: {error}") from None


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _aligned(content: bytes) -> bytes:
    return content.ljust(_padded(len(content)), b"\0")

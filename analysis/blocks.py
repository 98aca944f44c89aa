"""Work in blocks of rows: slices, threads that keep the order, tables too large for memory."""

from __future__ import annotations

import concurrent.futures
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def slices(length: int, size: int) -> Iterator[slice]:
    """Of `size` rows each, the last one of what is left."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def in_order(
    pool: concurrent.futures.Executor,
    work: Callable[[Any], Any],
    items: Iterable[Any],
    ahead: int,
) -> Iterator[Any]:
    """`map` in threads that takes no more than a few items ahead of what it has given."""
    waiting: list[concurrent.futures.Future] = []
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


class Tables:
    """Arrays of one shape, in memory or, where `count` of them are more than `memory_bytes`, in
    files of the temporary folder, which go when the last user does (keep `folder` for that)."""

    def __init__(self, shape: tuple[int, int], count: int, memory_bytes: int) -> None:
        self.shape, self._made, self.folder = shape, 0, None
        if shape[0] * shape[1] * 4 * count > memory_bytes:
            self.folder = tempfile.TemporaryDirectory(prefix="sae-jax-lens-")

    def new(self, dtype: type = np.float32) -> np.ndarray:
        """Zeros."""
        if self.folder is None:
            return np.zeros(self.shape, dtype)
        self._made += 1
        path = Path(self.folder.name) / str(self._made)
        return np.memmap(path, dtype, "w+", shape=self.shape)

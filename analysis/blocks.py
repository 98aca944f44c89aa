"""Work in blocks of rows: slices, threads that keep the order, tables too large for memory."""

from __future__ import annotations

import concurrent.futures
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import disk


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
    """Arrays [rows, columns] of 4 bytes a value, in memory or, where they are more than
    `memory_bytes`, in a file of the temporary folder (TMPDIR). The file has no name and goes with
    the last of the arrays, or with the process; its place on the disk is taken at once.

    Raises:
      DiskError: there is no such place.
    """

    def __init__(self, shape: tuple[int, int], count: int, memory_bytes: int) -> None:
        self.shape, self._mapped, self._made = shape, None, 0
        size = shape[0] * shape[1] * 4 * count
        if size > memory_bytes:
            folder = Path(tempfile.gettempdir())
            with disk.named(folder, size), tempfile.TemporaryFile(dir=folder) as file:
                # Pages that a full disk has no place for would end the process when written to.
                os.posix_fallocate(file.fileno(), 0, size)
                self._mapped = np.memmap(file, np.uint8, "r+", shape=(size,))

    def new(self, dtype: type = np.float32) -> np.ndarray:
        """The next one, zeros."""
        if self._mapped is None:
            return np.zeros(self.shape, dtype)
        size = self.shape[0] * self.shape[1] * 4
        self._made += 1
        part = self._mapped[(self._made - 1) * size : self._made * size]
        return part.view(dtype).reshape(self.shape)

"""Rows that several processes read together: each reads its part, all get the whole."""

from collections.abc import Iterable

import jax
import numpy as np

from sae_jax import distributed
from sae_jax.streaming import Rows

AT_ONCE = 2**26  # bytes that a process sends at once


class Together(Rows):
    """`Rows` whose every slice is divided between the processes, who exchange what they have read.

    So the file is read once, however many they are. All must read the same slices in the same
    order, from one file that all see: of copies that differ, the parts would be mixed.
    """

    def read(self, ranges: Iterable[tuple[int, int]]) -> np.ndarray:
        """As `Rows.read`, in every process; what one refuses, all do."""
        ranges = list(ranges)
        part = distributed.unless_refused(lambda: self.read_part(ranges))
        return self.gathered(part, sum(stop - start for start, stop in ranges))

    def read_part(self, ranges: Iterable[tuple[int, int]]) -> np.ndarray:
        """Of the rows that `read` returns, those that this process reads; without the others."""
        ranges = list(ranges)
        each = _each(sum(stop - start for start, stop in ranges))
        begin = each * jax.process_index()
        return super().read(_within(ranges, begin, begin + each))

    def gathered(self, part: np.ndarray, rows: int) -> np.ndarray:
        """The parts of all processes, so many rows together."""
        each = _each(rows)
        whole = np.empty((jax.process_count(), each, part.shape[1]), part.dtype)
        size = max(1, AT_ONCE // (part.shape[1] * part.itemsize))
        for first in range(0, each, size):
            last = min(first + size, each)
            padded = np.zeros((last - first, part.shape[1]), part.dtype)
            padded[: len(part[first:last])] = part[first:last]
            whole[:, first:last] = distributed.agree(padded)
        return whole.reshape(-1, part.shape[1])[:rows]


def shared(rows: Rows) -> Rows:
    """The same rows, of several processes `Together`.

    Raises:
      InputError: in every process, where some see a file of another shape or dtype.
    """
    if jax.process_count() == 1 or isinstance(rows, Together):
        return rows
    about = np.asarray([*rows.shape, rows.dtype.itemsize], np.int64)
    distributed.check_same(about.tobytes(), f"another shape or dtype of {rows.name}")
    found = Together.__new__(Together)
    vars(found).update(vars(rows))
    return found


def _each(rows: int) -> int:
    return -(-rows // jax.process_count())


def _within(ranges: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """The ranges of the rows begin .. end among those that `ranges` make one below another."""
    found, before = [], 0
    for start, stop in ranges:
        first, last = max(begin - before, 0), min(end - before, stop - start)
        if first < last:
            found.append((start + first, start + last))
        before += stop - start
    return found

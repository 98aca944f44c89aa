"""Long parquet tables, one feature at a time: where its rows lie, and no more read than them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.browser.folder import BLOCK, reading

TEXT = ["feature", "term", "gene", "side", "kind", "order"]  # read as categories


class Rows:
    """A table with a column `feature`, whose rows of one feature follow one another.

    Attributes:
      path: of the file. columns: their names.
      span: int64 [features of the run, 2], the first row of each feature and the one after its
        last; equal where the table has none of it.
    """

    def __init__(self, path: Path, span: np.ndarray | None = None) -> None:
        self.path, self.span = path, span
        with reading(path):
            self._metadata = pq.read_metadata(path)
            groups = range(self._metadata.num_row_groups)
            sizes = [self._metadata.row_group(i).num_rows for i in groups]
            self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
            self.columns = self._metadata.schema.to_arrow_schema().names

    def __len__(self) -> int:
        return int(self._starts[-1])

    def require(self, *columns: str) -> None:
        """Refuses a file that lacks columns (KeyError in `reading`)."""
        with reading(self.path):
            if missing := [name for name in columns if name not in self.columns]:
                raise ValueError(f"it has no column {', '.join(missing)}")

    def read(self, first: int, last: int, columns: Sequence[str]) -> pa.Table:
        """Some rows of some columns, out of the row groups that hold them."""
        begin = int(np.searchsorted(self._starts, first, "right")) - 1
        end = max(begin + 1, int(np.searchsorted(self._starts, last, "left")))
        with reading(self.path), pa.OSFile(str(self.path)) as source:
            file = pq.ParquetFile(
                source, metadata=self._metadata, page_checksum_verification=True,
                read_dictionary=[name for name in columns if name in TEXT],
            )  # fmt: skip
            table = file.read_row_groups(range(begin, end), list(columns), use_threads=False)
            if len(table) != self._starts[end] - self._starts[begin]:
                raise ValueError("rows are missing")
            return table.slice(first - int(self._starts[begin]), last - first)

    def of(self, feature: int, columns: Sequence[str]) -> pd.DataFrame | None:
        """The rows of a feature; None if there are none."""
        first, last = self.span[feature].tolist()
        return None if first == last else self.read(first, last, columns).to_pandas()

    def find(self, numbers: Mapping[str, int], n_features: int) -> None:
        """Fill `span`, of a run of so many features; `numbers` has those of this folder's names.

        Raises:
          InputError: rows of a feature that are not together, or of one that is not of the run.
        """
        self.require("feature")
        changes, names, before = [], [], None
        for first, table in self.batches(["feature"]):
            with reading(self.path):
                codes, values = coded(table["feature"])
            new = np.flatnonzero(np.append(True, codes[1:] != codes[:-1]))
            if len(codes) and values[codes[0]] == before:
                new = new[1:]
            changes += (first + new).tolist()
            names += [values[code] for code in codes[new]]
            before = values[codes[-1]] if len(codes) else before
        with reading(self.path):
            if unknown := [name for name in names if name not in numbers]:
                raise ValueError(f"it has rows of {str(unknown[0])[:100]!r}, which is no feature")
            if len(set(names)) < len(names):
                raise ValueError("the rows of a feature do not follow one another")
        self.span = np.zeros((n_features, 2), np.int64)
        found = [numbers[name] for name in names]
        self.span[found, 0] = changes
        self.span[found, 1] = [*changes[1:], len(self)][: len(changes)]

    def batches(
        self, columns: Sequence[str], rows: int = BLOCK // 4
    ) -> Iterator[tuple[int, pa.Table]]:
        """The whole table in order, so many rows at a time, with the number of the first."""
        for first in range(0, len(self), rows):
            yield first, self.read(first, min(first + rows, len(self)), columns)

    def by_features(
        self, columns: Sequence[str], rows: int = BLOCK // 4
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Whole features in the file's order, about so many rows at a time.

        Yields:
          The feature of each row, int32, and the rows.
        """
        there = np.flatnonzero(self.span[:, 1] > self.span[:, 0])
        there = there[np.argsort(self.span[there, 0], kind="stable")]
        group = self.span[there, 0] // rows
        for part in np.split(there, np.flatnonzero(np.diff(group)) + 1) if len(there) else ():
            table = self.read(int(self.span[part[0], 0]), int(self.span[part[-1], 1]), columns)
            yield np.repeat(part, np.diff(self.span[part])[:, 0]).astype(np.int32), table


def coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """A column of text as codes and the values that they stand for; missing ones have none."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = column.unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # no chunk at all
        return np.empty(0, np.int64), []
    if whole.null_count:
        raise ValueError("a name is missing in it")
    values = [str(value) for value in whole.dictionary.to_pylist()]
    return whole.indices.to_numpy(zero_copy_only=False), values


def numbered(column: pa.ChunkedArray, numbers: Mapping[str, int]) -> np.ndarray:
    """The numbers of a column of names, int32."""
    codes, values = coded(column)
    return np.asarray([numbers[value] for value in values], np.int32)[codes]

"""The annotation of a dictionary as a long table on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis import enrichment
from analysis.annotated import EFFECTS, Lens
from analysis.blocks import Tables, slices
from sae_jax import files


def write(
    lens: Lens,
    names: np.ndarray,
    path: str | Path,
    block: int = 64,
    memory_bytes: int = 4 << 30,
) -> None:
    """The long table as parquet, one row per feature and term, a block of features at a time.

    Columns: feature, term, size, hits, fold, change, change_z, auc, z, calibrated_z, and for each
    test log10_p_<test>, log10_q_<test> (over the feature's terms) and log10_q_all_<test> (over
    all terms of all testable features; NaN for the others), all of them -log10.

    Args:
      memory_bytes: the columns over all terms that would take more than a quarter of it, as the
        lens's own tables may, are kept in a file of the temporary folder.

    Raises:
      DiskError: no place for that file, or for the table.
    """
    testable = np.flatnonzero(lens.testable())
    tables = Tables(lens.auc.shape, len(lens.log_p) + 2, memory_bytes // 4)
    room = tables.new(), tables.new()
    everywhere = {}
    for test, table in lens.log_p.items():
        everywhere[test] = tables.new()
        everywhere[test][:] = np.nan
        if testable.size:
            corrected = enrichment.LogQ.over(table, testable, room)
            for part in slices(len(testable), 256):
                rows = testable[part]
                everywhere[test][rows] = corrected(table[rows])
    names, terms = pa.array(list(names)), pa.array(lens.terms)
    writer = None
    with files.write_aside(path) as fresh:
        for rows in slices(len(lens.auc), block):
            count, n_terms = lens.auc[rows].shape
            feature = np.repeat(np.arange(rows.start, rows.start + count, dtype=np.int32), n_terms)
            term = np.tile(np.arange(n_terms, dtype=np.int32), count)
            columns: dict[str, Any] = {
                "feature": pa.DictionaryArray.from_arrays(pa.array(feature), names),
                "term": pa.DictionaryArray.from_arrays(pa.array(term), terms),
                "size": lens.sizes[term].astype(np.int32),
            }
            for name in ("hits", "fold", *EFFECTS):
                if (values := getattr(lens, name)) is not None:
                    columns[name] = values[rows].ravel()
            for test, table in lens.log_p.items():
                columns[f"log10_p_{test}"] = table[rows].ravel()
                columns[f"log10_q_{test}"] = lens.log_q(test, rows).astype(np.float32).ravel()
                columns[f"log10_q_all_{test}"] = everywhere[test][rows].ravel()
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(
                    fresh, table.schema, write_page_checksum=True, compression="zstd",
                    use_dictionary=["feature", "term"],
                )  # fmt: skip
            writer.write_table(table)
        if writer is not None:
            writer.close()

"""scGPT's view of a cell: which genes, in which order, with which values.

Whatever the authors' code draws at random (ties in binning, which genes stay when there are too
many) is drawn here from (seed, name of the cell, id of the gene): a cell's tokens depend neither on
its neighbours nor on the order of cells or genes.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import scipy.sparse

_TIES, _SAMPLE = np.uint64(1), np.uint64(2)


def bin_edges(values: np.ndarray, n_bins: int) -> np.ndarray:
    """Linear quantiles of non-zero values at n_bins - 1 equally spaced probabilities, float64."""
    return np.quantile(np.asarray(values, np.float64), np.linspace(0, 1, n_bins - 1))


def bin_interval(values: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest digit, 1 .. n_bins - 1, that each non-zero value may receive.

    A value that equals k edges may receive k adjacent digits; others have one.
    """
    edges = bin_edges(values, n_bins)
    below = np.searchsorted(edges, values, side="left")
    up_to = np.searchsorted(edges, values, side="right")
    return np.minimum(below + 1, up_to), up_to


def bin_values(values: np.ndarray, n_bins: int, draw: np.ndarray) -> np.ndarray:
    """Digits of non-zero values; `draw`, uniform in [0, 1), decides among those allowed."""
    low, high = bin_interval(values, n_bins)
    return low + np.floor(draw * (high - low + 1)).astype(np.int64)


def cell_keys(names: Sequence[str], seed: int) -> np.ndarray:
    """A 64-bit number for each cell, by its name and the seed."""
    digests = [hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), np.uint64)


def uniform(key: np.uint64, ids: np.ndarray, purpose: np.uint64) -> np.ndarray:
    """Numbers in [0, 1) by cell, gene and purpose: splitmix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (ids.astype(np.uint64) << np.uint64(2)) | purpose
        x = key + (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(
    values: np.ndarray, ids: np.ndarray, room: int | None, rule: str, key: np.uint64
) -> np.ndarray:
    """Ascending positions of the genes that stay: all of them if there is room.

    "top": those of the highest values (ties: the lower id). "random": a sample without replacement.
    """
    if room is None or len(ids) <= room:
        return np.arange(len(ids))
    first = -values if rule == "top" else uniform(key, ids, _SAMPLE)
    return np.sort(np.lexsort((ids, first))[:room])


def tokenize(
    block: scipy.sparse.csr_matrix,
    ids: np.ndarray,
    keys: np.ndarray,
    *,
    n_bins: int | None,
    include_zeros: bool,
    room: int | None,
    rule: str,
    descending: bool,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Gene ids (int64) and values (float32) of every cell, without special tokens.

    Args:
      block: values [cells, genes], the model's genes only, in the order wanted of tokens.
      ids: token id of each column.
      keys: of `cell_keys`.
      n_bins: digits to bin into, before anything is cut; None leaves values as they are.
      include_zeros: tokens of genes with value 0 too.
      room: most tokens a cell; None is no limit.
      rule: "top" or "random", what stays when there are more.
      descending: highest value first (ties: the lower id) instead of the columns' order.
    """
    all_ids, all_values = [], []
    for row, key in enumerate(keys):
        span = slice(block.indptr[row], block.indptr[row + 1])
        columns, raw = block.indices[span], block.data[span].astype(np.float64)
        digits = raw
        if n_bins is not None and len(raw):
            digits = bin_values(raw, n_bins, uniform(key, ids[columns], _TIES)).astype(np.float64)
        if include_zeros and len(raw):
            dense = np.zeros((2, block.shape[1]))
            dense[0, columns], dense[1, columns] = raw, digits
            columns, (raw, digits) = np.arange(block.shape[1]), dense
        chosen = choose(raw, ids[columns], room, rule, key)
        if descending:
            chosen = chosen[np.lexsort((ids[columns[chosen]], -raw[chosen]))]
        all_ids.append(ids[columns[chosen]])
        all_values.append(digits[chosen].astype(np.float32))
    return all_ids, all_values

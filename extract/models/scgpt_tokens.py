"""scGPT's view of a cell: which genes, in which order, with which values.

Whatever the authors' code draws at random (ties in binning, which genes stay when there are too
many) is drawn here from (seed, name of the cell, id of the gene): a cell's tokens depend neither on
its neighbours nor on the order of cells or genes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

from extract.models.sequences import Sequences, TokenSwaps

BINS = ("prototype", "rebin", "own")

_TIES, _SAMPLE = np.uint64(1), np.uint64(2)


def bin_edges(values: np.ndarray, n_bins: int) -> np.ndarray:
    """Linear quantiles of non-zero values at n_bins - 1 equally spaced probabilities, float64."""
    return np.quantile(np.asarray(values, np.float64), np.linspace(0, 1, n_bins - 1))


def bin_interval(values: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest digit, 1 .. n_bins - 1, that each non-zero value may receive.

    A value that equals k edges may receive k adjacent digits; others have one.
    """
    return interval_in(bin_edges(values, n_bins), values)


def interval_in(edges: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of any values; both are 0 below the first edge."""
    below = np.searchsorted(edges, values, side="left")
    up_to = np.searchsorted(edges, values, side="right")
    return np.minimum(below + 1, up_to), up_to


def bin_values(values: np.ndarray, n_bins: int, draw: np.ndarray) -> np.ndarray:
    """Digits of non-zero values; `draw`, uniform in [0, 1), decides among those allowed."""
    return digit(*bin_interval(values, n_bins), draw)


def digit(low: np.ndarray, high: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """One of the digits low .. high, int64."""
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


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """From the values of a cell to its gene tokens.

    Attributes:
      ids: token id of each column, int64 [genes]; columns in the order wanted of tokens.
      n_bins: digits to bin into, before anything is cut; None leaves values as they are.
      include_zeros: tokens of genes with value 0 too, in cells that have any other.
      room: most tokens a cell; None is no limit.
      rule: "top" or "random", what stays when there are more.
      descending: highest value first (ties: the lower id) instead of the columns' order.
    """

    ids: np.ndarray
    n_bins: int | None
    include_zeros: bool
    room: int | None
    rule: str
    descending: bool

    def digits(self, columns: np.ndarray, values: np.ndarray, key: np.uint64) -> np.ndarray:
        """What non-zero values [columns] of one cell are to the model, float64."""
        if self.n_bins is None or not len(values):
            return values
        draw = uniform(key, self.ids[columns], _TIES)
        return bin_values(values, self.n_bins, draw).astype(np.float64)

    def arrange(
        self, columns: np.ndarray, values: np.ndarray, digits: np.ndarray, key: np.uint64
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64) and digits (float32) of the tokens of one cell, non-zero values given."""
        if self.include_zeros and len(values):
            dense = np.zeros((2, len(self.ids)))
            dense[0, columns], dense[1, columns] = values, digits
            columns, (values, digits) = np.arange(len(self.ids)), dense
        ids = self.ids[columns]
        chosen = choose(values, ids, self.room, self.rule, key)
        if self.descending:
            chosen = chosen[np.lexsort((ids[chosen], -values[chosen]))]
        return ids[chosen], digits[chosen].astype(np.float32)

    def cell(
        self, block: scipy.sparse.csr_matrix, row: int, key: np.uint64
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a row of values [cells, genes]; `key` is of `cell_keys`."""
        span = slice(block.indptr[row], block.indptr[row + 1])
        columns, values = block.indices[span], block.data[span].astype(np.float64)
        return self.arrange(columns, values, self.digits(columns, values, key), key)


@dataclasses.dataclass(frozen=True)
class DigitSwaps(TokenSwaps):
    """`TokenSwaps` of scGPT; `bins` as its `exchange` says.

    Attributes:
      tokenizer: that leaves `values` as they are where these are digits already (bins="own").
      keys: of `cell_keys`.
    """

    tokenizer: Tokenizer
    keys: np.ndarray
    bins: str

    def seen(self, cell: int, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """See `TokenSwaps.seen`: with bins="prototype" a digit, else the value itself."""
        # Which tokens stay is a matter of values, not of digits, where the highest do.
        if self.bins != "prototype" or self.tokenizer.rule == "top":
            return values
        return self._among(cell, genes, values)

    def tokens(
        self, cell: int, genes: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `TokenSwaps.tokens`."""
        row = self.values[cell]
        dense = np.zeros(len(self.genes))
        dense[row.indices] = row.data
        key = self.keys[cell]
        if self.bins == "prototype":
            digits = np.zeros(len(self.genes))
            digits[row.indices] = self.tokenizer.digits(row.indices, row.data, key)
            digits[genes] = self._among(cell, genes, values)
            dense[genes] = values
            columns = np.flatnonzero(dense)
            return self.tokenizer.arrange(columns, dense[columns], digits[columns], key)
        dense[genes] = values
        columns = np.flatnonzero(dense)
        digits = self.tokenizer.digits(columns, dense[columns], key)
        return self.tokenizer.arrange(columns, dense[columns], digits, key)

    def slopes(
        self, cell: int, others: np.ndarray, steps: int,
        pull: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """Integrated gradients of a function of rows along digits, float64 [others, genes].

        From the digits that the values of each other cell have in `cell` to the cell's own, in
        `steps` midpoints. Genes of either cell have tokens all the way, at digit 0 where they are
        not expressed, and none is cut: only nearly the sequences that an exchange gives.

        Args:
          pull: rows [steps, d_model] -> the function's gradient with respect to each.
        """
        row, key = self.values[cell], self.keys[cell]
        found = np.zeros((len(others), len(self.genes)))
        shares = (np.arange(steps) + 0.5) / steps
        own = np.zeros(len(self.genes))
        own[row.indices] = self.tokenizer.digits(row.indices, row.data, key)
        for i, other in enumerate(others):
            theirs = self.values[other]
            columns = np.arange(len(self.genes))
            if not self.tokenizer.include_zeros:
                columns = np.union1d(row.indices, theirs.indices)
            value = theirs.toarray()[0, columns]
            if self.bins == "prototype":
                start = self._among(cell, columns, value)
            else:
                start = np.zeros(len(self.genes))
                start[theirs.indices] = self.tokenizer.digits(
                    theirs.indices, theirs.data, self.keys[other]
                )
                start = start[columns]
            change = own[columns] - start
            path = start + shares[:, None] * change
            ids = np.concatenate([self.before, self.tokenizer.ids[columns]]).astype(np.int64)
            values = [np.append(self.before_values, part).astype(np.float32) for part in path]
            inputs = Sequences([ids] * steps, values, len(self.before), 0, np.zeros(steps, bool))
            slope = np.mean(self.evaluate.gradients(inputs, pull), axis=0)
            found[i, columns] = change * slope[len(self.before) :]
        return found

    def _among(self, cell: int, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Digits of values in the bins of a cell's own; beyond them the lowest or the highest."""
        own, n_bins = self.values[cell].data, self.tokenizer.n_bins
        if n_bins is None or not len(own):
            return values
        draw = uniform(self.keys[cell], self.tokenizer.ids[genes], _TIES)
        low, high = interval_in(bin_edges(own, n_bins), values)
        return np.where(values == 0, 0, np.maximum(digit(low, high, draw), 1)).astype(np.float64)

"""Which genes a latent is connected to, beside the genes of each program (A.2.5, Figure S13 right).

The cosine of a latent's activations with Y over cells; connected where it is at or above a
percentile of the whole matrix [latents, genes]. A latent is matched with the X'' of which it has
most genes (hits). Coverage of an X'' is hits / its genes, of the latent matched with it that has
most.

The paper gives coverage without a null. A latent that is connected to every gene covers every X'',
so beside each coverage stands the share of all genes that its latent is connected to, and the same
is done with M's genes permuted, and by the caller with latents that know nothing.

Y = X'' M, so cosines are a product of [latents, programs] and [programs, genes], made in blocks as
often as needed. Percentiles are exact: two passes over the blocks count the cosines' bits.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy import stats

from experiments.simulation.recovery import ENTRIES, Sums
from sae_jax import InputError

if TYPE_CHECKING:
    import pandas as pd

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
LEVEL = 0.05
Blocks = Callable[[], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Cosines:
    """Of latents' activations and genes' Y over cells: left @ right, 0 for a gene that is always 0.

    left: of active latents, in units of their length [active latents, programs]. right: M in units
    of the lengths of Y [programs, genes]; both float32.
    """

    left: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, sums: Sums, m: np.ndarray) -> Self:
        """sums: of latents and X''. m: M [programs, genes].

        Raises:
          InputError: no latent is active.
        """
        if not sums.active.any():
            raise InputError("no latent is active in these cells")
        mean = sums.mean_z[sums.active]
        length_z = np.sqrt(sums.zz[sums.active] + sums.n * mean**2)
        products = sums.zv[sums.active] + sums.n * np.outer(mean, sums.mean_v)
        squares = sums.vv + sums.n * np.outer(sums.mean_v, sums.mean_v)
        m = np.asarray(m, np.float64)
        length_y = np.sqrt(np.einsum("pg,pg->g", m, squares @ m))
        right = np.divide(m, length_y[None, :], out=np.zeros_like(m), where=length_y > 0)
        return cls((products / length_z[:, None]).astype(np.float32), right.astype(np.float32))

    def blocks(self) -> Iterator[np.ndarray]:
        """Some latents after others [some, genes], the same each time."""
        size = max(1, ENTRIES // self.right.shape[1])
        for start in range(0, len(self.left), size):
            yield self.left[start : start + size] @ self.right


def percentiles(blocks: Blocks, wanted: Sequence[int]) -> np.ndarray:
    """The values at whole percentiles of all that `blocks` yields, float32 [wanted].

    Exact: of n sorted values the one at place ceil(n percent / 100), numpy's "inverted_cdf". The
    upper 16 bits of the values are counted first, the lower 16 where a percentile has been found.

    Raises:
      InputError: a percentile that is not in 1 to 100.
    """
    if not all(1 <= percent <= 100 for percent in wanted):
        raise InputError(f"percentiles {tuple(wanted)} must lie in 1 to 100")
    upper = sum(np.bincount((_bits(x) >> 16).ravel(), minlength=2**16) for x in blocks())
    ends = np.cumsum(upper)
    ranks = np.asarray([-(-int(ends[-1]) * percent // 100) for percent in wanted])  # from 1
    inside = np.searchsorted(ends, ranks)
    lower = {int(bin_): np.zeros(2**16, np.int64) for bin_ in inside}
    for x in blocks():
        bits = _bits(x).ravel()
        top = (bits >> 16).astype(np.uint16)
        for bin_, counts in lower.items():
            counts += np.bincount(bits[top == bin_] & 0xFFFF, minlength=2**16)
    found = [
        bin_ << 16 | np.searchsorted(np.cumsum(lower[bin_]), rank - ends[bin_] + upper[bin_])
        for bin_, rank in zip(inside.tolist(), ranks, strict=True)
    ]
    return _from_bits(np.asarray(found, np.uint32))


def _bits(x: np.ndarray) -> np.ndarray:
    """uint32 in the order of float32 values."""
    bits = (np.ascontiguousarray(x, np.float32) + np.float32(0)).view(np.uint32)  # -0 is 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31))


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return np.where(bits >> 31, bits & np.uint32(2**31 - 1), ~bits).view(np.float32)


def permuted(m: np.ndarray, seed: int = 0) -> np.ndarray:
    """M [programs, genes] with its genes permuted: programs keep their sizes and overlaps."""
    return m[:, np.random.default_rng(seed).permutation(m.shape[1])]


def coverage(cosines: Cosines, thresholds: np.ndarray, m: np.ndarray) -> "pd.DataFrame":
    """One row per threshold and X'' that some latent is matched with.

    Columns: threshold (its place), program, latents (matched with it), significant (those of them
    that have more of its genes than chance: one-sided binomial test, hits of n_X genes with the
    latent's share of all genes as probability, times the number of programs it was chosen from,
    below .05), hits (most of any), coverage (hits / n_X), share (of all genes, that the latent of
    most hits is connected to: what chance would cover), p (of that latent, corrected).
    """
    import pandas as pd

    sizes = m.sum(axis=1)
    transposed = np.ascontiguousarray(m.T, np.float32)
    parts = []
    for block in cosines.blocks():
        for number, threshold in enumerate(thresholds):
            connected = (block >= threshold).astype(np.float32)
            hits = connected @ transposed
            best = hits.argmax(axis=1)
            parts.append(
                pd.DataFrame(
                    {
                        "threshold": number, "program": best, "share": connected.mean(axis=1),
                        "hits": hits[np.arange(len(hits)), best].astype(np.int64),
                    }
                )
            )  # fmt: skip
    matched = pd.concat(parts, ignore_index=True)
    matched = matched[matched["hits"] > 0]
    size = sizes[matched["program"]]
    p = stats.binom.sf(matched["hits"] - 1, size, matched["share"].astype(np.float64))
    matched = matched.assign(
        p=np.minimum(p * len(m), 1), coverage=matched["hits"].to_numpy() / size
    )
    # Among latents of equal hits that with fewest genes says most.
    matched = matched.sort_values(["hits", "share"], ascending=[False, True], kind="stable")
    groups = matched.groupby(["threshold", "program"])
    found = groups.first()
    found["latents"] = groups.size()
    found["significant"] = (matched["p"] < LEVEL).groupby(
        [matched["threshold"], matched["program"]]
    ).sum()  # fmt: skip
    return found.reset_index()


def structure(
    sums: Sums, m: np.ndarray, wanted: Sequence[int] = PERCENTILES, null: np.ndarray | None = None
) -> "pd.DataFrame":
    """`coverage` at percentiles of these latents' cosines: column `percentile` for `threshold`.

    Args:
      sums: of latents and X''. m: M [programs, genes].
      null: another M to compare the connections with, `permuted` say; None: m.
    """
    cosines = Cosines.of(sums, m)
    found = coverage(cosines, percentiles(cosines.blocks, wanted), m if null is None else null)
    found.insert(0, "percentile", np.asarray(wanted)[found.pop("threshold")])
    return found

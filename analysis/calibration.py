"""What a statistic of a term is worth, by the features that have nothing to say.

Genes are co-expressed, and a Mann-Whitney test takes them for independent: with activations
permuted over the cells it still finds sets. Here its z, or any other statistic, is standardised,
for each term, by the mean and the standard deviation that permuted features of as many high cells
have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import sparse, special

from analysis import nulls
from analysis.features import as_columns
from sae_jax import files
from sae_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Calibration:
    """Of a statistic under permutation.

    n_high: number of high cells that each bin stands for, rising [bins].
    mean, sd: of the statistic [bins, terms].
    n_null: permuted features in each bin.
    """

    n_high: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    n_null: int

    def of(self, terms: slice) -> Calibration:
        """That of some terms."""
        return replace(self, mean=self.mean[:, terms], sd=self.sd[:, terms])

    def deviates(self, z: np.ndarray, n_high: np.ndarray) -> np.ndarray:
        """The statistic z [features, terms] standardised: Student's t with n_null - 1 degrees.

        Between bins mean and sd are interpolated in the logarithm of n_high [features]; beyond
        them the nearest bin's hold. NaN stays NaN.
        """
        at = np.log(np.maximum(n_high, 1))
        grid = np.log(self.n_high)
        right = np.clip(np.searchsorted(grid, at), 1, max(1, len(grid) - 1))
        if len(grid) == 1:
            mean, sd = self.mean[[0]], self.sd[[0]]
        else:
            weight = np.clip((at - grid[right - 1]) / (grid[right] - grid[right - 1]), 0, 1)[
                :, None
            ]
            mean = (1 - weight) * self.mean[right - 1] + weight * self.mean[right]
            sd = (1 - weight) * self.sd[right - 1] + weight * self.sd[right]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sd > 0, (z - mean) / (sd * np.sqrt(1 + 1 / self.n_null)), np.nan)

    def log_p(self, deviates: np.ndarray) -> np.ndarray:
        """Two-sided -log10 p of deviates [features, terms], float64."""
        df = self.n_null - 1.0
        t = np.abs(deviates)
        with np.errstate(divide="ignore"):
            # Beyond the least double the tail falls as t^-df, so it never ends in infinity.
            direct = -np.log10(2 * special.stdtr(df, -t))
        far = np.isinf(direct)
        direct[far] = 300 + df * np.log10(t[far] / special.stdtrit(df, 0.5e-300) * -1)
        return direct


def calibrate(
    activations: sparse.csr_matrix,
    n_high: np.ndarray,
    statistic: Callable[[sparse.csr_matrix], np.ndarray],
    *,
    bins: int = 6,
    per_bin: int = 300,
    block: int = 64,
    seed: int = 0,
    run: Callable[..., Iterable[np.ndarray]] = map,
) -> Calibration:
    """Permute features of like group size and take the moments of what the test says of them.

    Args:
      activations: [cells, features].
      n_high: high cells of each feature [features]; those of none are left out.
      statistic: activations of some features -> [features, terms].
      bins: numbers of high cells, quantiles of `n_high`, at which moments are taken.
      per_bin: permuted features a bin, drawn from those nearest to it.
      block: of these at once.
      run: `map`, or one that works in threads and keeps the order.

    Raises:
      InputError: fewer than 30 features a bin, or no feature with high cells.
    """
    if per_bin < 30:
        raise InputError(f"per_bin={per_bin}: at least 30 permuted features give a variance.")
    usable = np.flatnonzero(n_high > 0)
    if not usable.size:
        raise InputError("no feature has high cells: there is nothing to permute.")
    quantiles = (np.arange(bins) + 0.5) / bins
    centres = np.unique(np.quantile(n_high[usable], quantiles, method="nearest"))
    nearest = np.abs(np.log(n_high[usable])[:, None] - np.log(centres)[None, :]).argmin(axis=1)
    rng = np.random.default_rng(seed)
    columns = as_columns(activations)

    def blocks() -> Iterator[sparse.csr_matrix]:
        for i in range(len(centres)):
            chosen = rng.choice(usable[nearest == i], per_bin)
            for start in range(0, per_bin, block):
                yield nulls.permuted_cells(columns[:, chosen[start : start + block]], rng)

    found = np.concatenate(list(run(statistic, blocks()))).reshape(len(centres), per_bin, -1)
    return Calibration(
        n_high=centres, mean=found.mean(axis=1), sd=found.std(axis=1, ddof=1), n_null=per_bin
    )


def save(path: str | Path, known: Mapping[str, Calibration]) -> None:
    """To an .npz file, whole or not at all."""
    with files.write_aside(path) as fresh:
        np.savez(
            fresh, **{f"{test}/{f}": x for test, c in known.items() for f, x in asdict(c).items()}
        )


def load(path: str | Path) -> dict[str, Calibration]:
    """What `save` wrote."""
    stored = np.load(path)
    tests = {name.split("/")[0] for name in stored}
    fields = ("n_high", "mean", "sd")
    return {
        test: Calibration(*(stored[f"{test}/{f}"] for f in fields), int(stored[f"{test}/n_null"]))
        for test in tests
    }

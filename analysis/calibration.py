"""What a statistic of a term is worth, by the features that have nothing to say.

Genes are co-expressed, and a Mann-Whitney test takes them for independent: with activations
permuted over the cells it still finds sets. Here its z, or any other statistic, is standardised,
for each term, by the mean and the standard deviation that permuted features have of as many high
and as many silent cells. Terms share genes and the statistic is no normal deviate, least of all for
few high cells; so deviates are then divided by what it takes that at most one in fifty of the
permuted features itself would be named at q < .05: others, which it has not seen, are then below
one in twenty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from scipy import sparse, special

from analysis.groups import Groups
from sae_jax import files
from sae_jax.errors import InputError
from sae_jax.reading import check_file, reading

LEVEL = 0.05  # of q
NAMED = 0.02  # share of the permuted features that may be named at it


@dataclass(frozen=True, eq=False)
class Calibration:
    """Of a statistic under permutation.

    n_cells: of all.
    n_active: active cells of the permuted features of each bin, rising [bins].
    mean, sd: of the statistic [bins, terms].
    inflation: by which deviates are divided, at least 1 [bins].
    n_null: permuted features in each bin.
    """

    n_cells: int
    n_active: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    inflation: np.ndarray
    n_null: int

    @classmethod
    def of_null(cls, n_cells: int, n_active: np.ndarray, null: np.ndarray) -> Calibration:
        """From the statistic of permuted features [bins, features, terms]."""
        return cls(
            n_cells=n_cells, n_active=n_active, mean=null.mean(axis=1),
            sd=null.std(axis=1, ddof=1), inflation=np.array([_inflation(some) for some in null]),
            n_null=null.shape[1],
        )  # fmt: skip

    def deviates(self, z: np.ndarray, n_active: np.ndarray) -> np.ndarray:
        """The statistic z [features, terms] standardised: Student's t with n_null - 1 degrees.

        Between bins mean, sd and inflation are interpolated in the log odds of n_active [features]
        to the silent cells: the percentile makes both groups' sizes of it. Beyond the bins the
        nearest one's hold. NaN stays NaN.
        """
        at, grid = self._log_odds(n_active), self._log_odds(self.n_active)
        right = np.clip(np.searchsorted(grid, at), min(1, len(grid) - 1), len(grid) - 1)
        left = np.maximum(right - 1, 0)
        width = np.where(right > left, grid[right] - grid[left], 1.0)
        weight = np.clip((at - grid[left]) / width, 0, 1)[:, None]

        def between(values: np.ndarray) -> np.ndarray:
            return (1 - weight) * values[left] + weight * values[right]

        mean, sd = between(self.mean), between(self.sd)
        spread = sd * np.sqrt(1 + 1 / self.n_null) * between(self.inflation[:, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(sd > 0, (z - mean) / spread, np.nan)

    def _log_odds(self, n_active: np.ndarray) -> np.ndarray:
        n = np.clip(n_active, 0.5, self.n_cells - 0.5)
        return np.log(n / (self.n_cells - n))

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


def permuted(
    n_cells: int,
    n_high: np.ndarray,
    n_active: np.ndarray,
    statistic: Callable[[Groups], np.ndarray],
    *,
    bins: int = 6,
    per_bin: int = 300,
    block: int = 64,
    seed: int = 0,
    run: Callable[..., Iterable[np.ndarray]] = map,
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of cells drawn at random: what a statistic says where there is nothing to say.

    Only the sizes of the features' groups matter, neither their order nor their cells.

    Args:
      n_high, n_active: high and active cells of the features that can be named [features].
      statistic: groups of some features -> [features, terms].
      bins: numbers of active cells at which it is done, from the least to the most frequent
        feature at even quantiles; equal ones once.
      per_bin: features drawn at each.
      block: of these at once.
      run: `map`, or one that works in threads and keeps the order.

    Returns:
      The numbers of active cells [bins], and the statistic [bins, per_bin, terms]: for
      `Calibration.of_null`.

    Raises:
      InputError: fewer than 30 features a bin, no feature, or no bin.
    """
    if bins < 1 or block < 1:
        raise InputError(f"bins={bins}, block={block}: give at least 1 of each.")
    if per_bin < 30:
        raise InputError(f"per_bin={per_bin}: at least 30 permuted features give a variance.")
    if not len(n_active):
        raise InputError("no feature has cells enough: there is nothing to permute.")
    sizes = np.unique(np.quantile(n_active, np.linspace(0, 1, bins), method="nearest"))
    rng = np.random.default_rng(seed)

    def blocks() -> Iterator[Groups]:
        for size in sizes:
            high = int(np.median(n_high[n_active == size]))
            for start in range(0, per_bin, block):
                yield _random_groups(n_cells, size, high, min(block, per_bin - start), rng)

    found = np.concatenate(list(run(statistic, blocks()))).reshape(len(sizes), per_bin, -1)
    return sizes, found


def _random_groups(
    n_cells: int, n_active: int, n_high: int, features: int, rng: np.random.Generator
) -> Groups:
    cells = [rng.choice(n_cells, n_active, replace=False) for _ in range(features)]
    high = np.concatenate([np.arange(n_active) < n_high] * features)
    indptr = np.arange(features + 1) * n_active
    shape = (features, n_cells)
    top = sparse.csr_array((high, np.concatenate(cells), indptr), shape=shape)
    top.sort_indices()
    active = sparse.csr_array((np.ones_like(top.data), top.indices, top.indptr), shape=shape)
    top = top.copy()
    top.eliminate_zeros()
    return Groups(high=top, active=active)


def _inflation(null: np.ndarray) -> float:
    """Of permuted features [features, terms]: see `Calibration`.

    Each is standardised by the others: its externally studentised residual. A feature is named at
    q < LEVEL if for some k its k-th largest deviate passes Student's quantile at LEVEL k / terms;
    so the largest ratio of the two is what it must be divided by not to be named.
    """
    n = len(null)
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = (null - null.mean(axis=0)) / (null.std(axis=0, ddof=1) * np.sqrt(1 - 1 / n))
        outer = inner * np.sqrt((n - 2) / (n - 1 - inner**2))
    tested = np.isfinite(outer).all(axis=0)
    if not tested.any():
        return 1.0
    largest = -np.sort(-np.abs(outer[:, tested]), axis=1)
    rank = np.arange(1, largest.shape[1] + 1)
    needed = (largest / -special.stdtrit(n - 1.0, LEVEL * rank / len(rank) / 2)).max(axis=1)
    spare = int(NAMED * (n + 1))  # features that may be named
    return max(1.0, float(np.sort(needed)[n - 1 - spare]) * (1 + 1e-9))  # that one just fails


def save(path: str | Path, known: Mapping[str, Calibration]) -> None:
    """To an .npz file, whole or not at all."""
    with files.write_aside(path) as fresh:
        np.savez(
            fresh, **{f"{test}/{f}": x for test, c in known.items() for f, x in asdict(c).items()}
        )


def load(path: str | Path) -> dict[str, Calibration]:
    """What `save` wrote.

    Raises:
      InputError: no such file, or a damaged one.
    """
    with reading(path), np.load(check_file(path)) as stored:
        tests = {name.split("/")[0] for name in stored}
        return {
            test: Calibration(
                **{f.name: stored[f"{test}/{f.name}"][()] for f in fields(Calibration)}
            )
            for test in sorted(tests)
        }

"""How well single latents recover the variables of the large simulation (section 4.3, Table S5).

A variable's recovery is the largest Pearson correlation of any latent with it, over cells. These
are read once, in blocks, into float64 sums with the hidden variables. Y is never made: it is X'' M,
so its products with the latents are those of X'' times M, exactly, and what is held is [latents,
variables] of 401 hidden variables, beside a block of latents by genes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Self

import numpy as np

from experiments.simulation.data import Cells
from sae_jax import InputError
from sae_jax.redundancy import CONSTANT

COLUMNS = ("highest", "highest_absolute", "highest_signed")
HIDDEN = ("X''", "X'", "X", "A", "B")
GROUPS = ("Y", *HIDDEN)
ENTRIES = 2**22  # of a block: 32 MiB in float64
CODES = 2**25  # of cells by latents, encoded at a time: 128 MiB in float32


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Over cells, of latents z and variables v, float64.

    n: cells. mean_z, mean_v [latents], [variables]. zz [latents], zv [latents, variables] and vv
    [variables, variables]: products about the means. Any reading of v that is linear follows.
    """

    n: int
    mean_z: np.ndarray
    mean_v: np.ndarray
    zz: np.ndarray
    zv: np.ndarray
    vv: np.ndarray

    @classmethod
    def of(cls, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Self:
        """Of blocks (z [cells, latents], v [cells, variables]), read once.

        Raises:
          InputError: fewer than two cells, or values that are not finite.
        """
        n, sums, shift = 0, None, None
        for z, v in blocks:
            z, v = np.asarray(z, np.float64), np.asarray(v, np.float64)
            if not (np.isfinite(z).all() and np.isfinite(v).all()):
                raise InputError("latents and variables must be finite")
            if shift is None:  # near the means: squares of what is far from 0 lose digits
                shift = z.mean(axis=0), v.mean(axis=0)
            z, v = z - shift[0], v - shift[1]
            more = (z.sum(0), v.sum(0), np.einsum("nl,nl->l", z, z), z.T @ v, v.T @ v)
            n += len(z)
            if sums is None:
                sums = list(more)
            else:
                for total, each in zip(sums, more, strict=True):
                    total += each
        if n < 2:
            raise InputError(f"{n} cells have no correlation")
        z, v = sums[0] / n, sums[1] / n
        return cls(
            n, shift[0] + z, shift[1] + v, np.maximum(sums[2] - n * z**2, 0),
            sums[3] - n * np.outer(z, v), sums[4] - n * np.outer(v, v),
        )  # fmt: skip

    def of_variables(self, which: slice) -> Self:
        """The same of some variables."""
        return dataclasses.replace(
            self, mean_v=self.mean_v[which], zv=self.zv[:, which], vv=self.vv[which, which]
        )

    @property
    def active(self) -> np.ndarray:
        """Latents that are above 0 in some cell, bool [latents]; of latents that are never below
        0."""
        return self.mean_z > 0

    @property
    def varies(self) -> np.ndarray:
        """Latents that do, bool [latents]: not dead, and by more than rounding."""
        return self.zz > self.n * (CONSTANT * self.mean_z) ** 2


def highest(sums: Sums, readout: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Recovery of the variables, or of v @ readout [variables, genes]; each [genes].

    highest: the largest r of any latent (the text's A.2.4). highest_absolute: the largest |r|.
    highest_signed: r of that latent, whose mean is Table S5's -.54 of A: the authors' code. NaN
    where a variable does not vary; latents that do not vary correlate with nothing.
    """
    length_z = np.where(sums.varies, np.sqrt(sums.zz), np.inf)
    genes = len(sums.mean_v) if readout is None else readout.shape[1]
    found = {name: np.zeros(genes) for name in COLUMNS}
    width = max(1, ENTRIES // max(len(length_z), 1))
    for start in range(0, genes, width):
        some = slice(start, start + width)
        if readout is None:
            zy, yy = sums.zv[:, some], np.diagonal(sums.vv)[some]
            mean = sums.mean_v[some]
        else:
            part = np.asarray(readout[:, some], np.float64)
            zy, yy = sums.zv @ part, np.einsum("vg,vg->g", part, sums.vv @ part)
            mean = sums.mean_v @ part
        varies = yy > sums.n * np.maximum((CONSTANT * mean) ** 2, 1e-20)
        length_y = np.sqrt(np.where(varies, yy, np.nan))
        r = np.clip(zy / length_z[:, None] / length_y[None, :], -1, 1)
        top, bottom = r.max(axis=0), r.min(axis=0)
        found["highest"][some] = top
        found["highest_absolute"][some] = np.maximum(top, -bottom)
        found["highest_signed"][some] = np.where(top >= -bottom, top, bottom)
    return found


def hidden_variables(cells: Cells) -> tuple[np.ndarray, dict[str, slice]]:
    """X'', X', X, A and B side by side [cells, 4 programs + 1], and where each lies."""
    parts = dict(
        zip(HIDDEN, (cells.x_active, cells.x_noisy, cells.x, cells.a, cells.b), strict=True)
    )
    ends = np.cumsum([part.shape[1] for part in parts.values()])
    places = {
        name: slice(int(end) - part.shape[1], int(end))
        for (name, part), end in zip(parts.items(), ends, strict=True)
    }
    return np.hstack(list(parts.values())), places


def by_group(sums: Sums, places: dict[str, slice], m: np.ndarray) -> dict[str, dict[str, float]]:
    """Means over the variables of each of `GROUPS`: of r, |r|, and r of the largest |r|.

    sums, places: of `hidden_variables`. m: M [programs, genes].
    """
    found = {"Y": highest(sums.of_variables(places["X''"]), m)}
    found |= {name: highest(sums.of_variables(where)) for name, where in places.items()}
    return {
        group: {name: float(np.nanmean(values)) for name, values in each.items()}
        for group, each in found.items()
    }


def encoded(
    encode: Callable[[np.ndarray], np.ndarray], x: np.ndarray, v: np.ndarray, latents: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of cells for `Sums.of`: codes of x [cells, d], and variables v [cells, variables]."""
    size = max(1, CODES // latents)
    for start in range(0, len(x), size):
        yield encode(x[start : start + size]), v[start : start + size]

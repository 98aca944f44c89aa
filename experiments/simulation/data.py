"""The two generators of the study, seeded: every variable of a cell, hidden ones too.

Schuster, section 4 and appendix A.2.1 (equations 4, 5 and 6). Where the paper's text and its code
disagree there is a `variant`, "text" or "code". All draws are JAX's (threefry), which do not depend
on how many devices there are, nor on which of them draws.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import InputError

Variant = Literal["text", "code"]
VARIANTS = ("text", "code")

SMALL_CELLS = 12_000  # 10,000 to train on and 2,000 held out
SMALL_VALIDATION = 2_000
ACTIVITY_RATE = 2.0
ON = (0.5, 0.1, 0.9)  # probability of each X
CONNECTIVITY = np.array([[0, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1]], np.float32)
GROUPS = {"Y": slice(0, 5), "X'": slice(5, 8), "A": slice(8, 9), "X": slice(9, 12)}

BLOCK = 1000  # cells of the large simulation that are drawn together


@dataclasses.dataclass(frozen=True, eq=False)
class Small:
    """The small simulation (equation 6), float32: X' = A X, Y = X' M.

    Attributes:
      y: observables [cells, 5], counts.
      x_active: X' [cells, 3]. The authors' code calls it `tf`, their figures X.
      a: A [cells, 1], Poisson. `activity` in the code.
      x: X [cells, 3], 0 or 1. `accessibility` in the code; their figures call it B.
      m: M [3, 5], 0 or 1.
    """

    y: np.ndarray
    x_active: np.ndarray
    a: np.ndarray
    x: np.ndarray
    m: np.ndarray

    @property
    def variables(self) -> np.ndarray:
        """Y, X', A and X side by side [cells, 12]; `GROUPS` says where each lies."""
        return np.hstack([self.y, self.x_active, self.a, self.x])


def small(
    seed: int = 0, cells: int = SMALL_CELLS, connectivity: Literal["fixed", "random"] = "fixed"
) -> Small:
    """The small simulation: A ~ Poisson(2), X ~ Bernoulli(.5, .1, .9), a row each.

    Args:
      connectivity: "fixed", the M of the authors' code; "random", the text's Bernoulli(.1), which
        leaves some X without any Y nine times in ten.

    Raises:
      InputError: no cells.
    """
    if cells < 1:
        raise InputError(f"cells={cells} must be at least 1")
    keys = jax.random.split(jax.random.key(seed), 3)
    a = np.asarray(jax.random.poisson(keys[0], ACTIVITY_RATE, (cells, 1)), np.float32)
    on = jnp.asarray(ON)[None, :]
    x = np.asarray(jax.random.bernoulli(keys[1], on, (cells, len(ON))), np.float32)
    m = CONNECTIVITY
    if connectivity == "random":
        m = np.asarray(jax.random.bernoulli(keys[2], 0.1, CONNECTIVITY.shape), np.float32)
    return Small(y=(a * x) @ m, x_active=a * x, a=a, x=x, m=m)


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """Hidden variables of cells of the large simulation, float32 but for the categories.

    Attributes:
      x: X [cells, programs], Poisson counts.
      b: B [cells, 1], the one draw that is added to all programs of a cell.
      x_noisy: X' = X + B [cells, programs].
      a: A [cells, programs], 0 or 1: the activities of the cell's type.
      x_active: X'' = X' A [cells, programs].
      cell_type, batch: [cells], integers.
    """

    x: np.ndarray
    b: np.ndarray
    x_noisy: np.ndarray
    a: np.ndarray
    x_active: np.ndarray
    cell_type: np.ndarray
    batch: np.ndarray


@dataclasses.dataclass(frozen=True)
class Large:
    """The large simulation (equations 4 and 5): what it is made of, not the cells themselves.

    Cells are drawn in blocks of 1000, each a function of (seed, block) alone, so that nothing needs
    to be kept: X'' of 100,000 cells takes 40 MB, their Y = X'' M 8 GB. A simulation of fewer cells
    is the beginning of one of more.

    Attributes:
      variant: "code": X_j ~ Poisson(1 + .1 j), j from 0, and B of means 0, 1, 2. "text":
        Poisson(1.1 j), j from 1, and means 1, 2, 3 (equation 5).

    Raises:
      InputError: fewer than two cells or genes, or an unknown variant.
    """

    seed: int = 0
    cells: int = 100_000
    genes: int = 20_000
    programs: int = 100
    cell_types: int = 40
    batches: int = 3
    variant: Variant = "code"

    def __post_init__(self) -> None:
        for name in ("cells", "genes", "programs"):
            if getattr(self, name) < 2:
                raise InputError(f"{name}={getattr(self, name)} must be at least 2")
        if self.variant not in VARIANTS:
            raise InputError(f"variant={self.variant!r} is not one of {', '.join(VARIANTS)}")

    @property
    def rates(self) -> np.ndarray:
        """Of X_j [programs]: its mean, and its variance."""
        j = np.arange(self.programs)
        return (1 + 0.1 * j if self.variant == "code" else 1.1 * (j + 1)).astype(np.float32)

    @property
    def noise_means(self) -> np.ndarray:
        """Of B in each batch [batches]."""
        return (np.arange(self.batches) + (self.variant == "text")).astype(np.float32)

    @functools.cached_property
    def m(self) -> np.ndarray:
        """M [programs, genes], Bernoulli(.1): which program each gene follows."""
        return self._matrix(1, 0.1, (self.programs, self.genes))

    @functools.cached_property
    def activity(self) -> np.ndarray:
        """A [cell types, programs], Bernoulli(.3): the programs that a type has."""
        return self._matrix(2, 0.3, (self.cell_types, self.programs))

    def _matrix(self, stream: int, p: float, shape: tuple[int, int]) -> np.ndarray:
        key = jax.random.fold_in(jax.random.key(self.seed), stream)
        return np.asarray(jax.random.bernoulli(key, p, shape), np.float32)

    def block(self, number: int) -> Cells:
        """Cells 1000 * number and on, at most 1000."""
        rows = min(BLOCK, self.cells - number * BLOCK)
        if number < 0 or rows < 1:
            raise InputError(f"there is no block {number} of {self.cells} cells")
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), 0), number)
        drawn = _draw(key, self.rates, self.noise_means, self.activity)
        return Cells(*(np.asarray(each)[:rows] for each in drawn))

    def blocks(self) -> Iterator[Cells]:
        """All cells, a block at a time."""
        return (self.block(number) for number in range(-(-self.cells // BLOCK)))

    def counts(self, x_active: np.ndarray) -> np.ndarray:
        """Y = X'' M [cells, genes], not integers where B is added."""
        return x_active @ self.m


@jax.jit
def _draw(
    key: jax.Array, rates: jax.Array, noise_means: jax.Array, activity: jax.Array
) -> tuple[jax.Array, ...]:
    """A block: the fields of `Cells`, in their order."""
    of_x, of_type, of_batch, of_noise = jax.random.split(key, 4)
    x = jax.random.poisson(of_x, rates[None, :], (BLOCK, len(rates))).astype(jnp.float32)
    cell_type = jax.random.randint(of_type, (BLOCK,), 0, len(activity))
    batch = jax.random.randint(of_batch, (BLOCK,), 0, len(noise_means))
    b = (noise_means[batch] + 0.1 * jax.random.normal(of_noise, (BLOCK,)))[:, None]
    a = activity[cell_type]
    return x, b, x + b, a, (x + b) * a, cell_type, batch

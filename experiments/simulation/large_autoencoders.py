"""The autoencoders of the large study: trained, read, and what lies in superposition in them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from absl import logging

from experiments.simulation import autoencoder, fitting, superposition
from experiments.simulation.autoencoder import AutoEncoder, Recipe
from experiments.simulation.data import BLOCK, Cells, Large
from experiments.simulation.fitting import Fitted

HELD_OUT = 0.1
GROUPS = ("Y", "X''", "X'", "X", "A", "B", "A_index", "B_index")


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Autoencoders of one simulation.

    Attributes:
      simulation, cells: what is simulated, and the hidden variables of its cells.
      seeds: of each configuration's autoencoders, trained side by side.
      epochs: at most.
      search: for hyperparameters by Optuna, instead of taking Table S2's.
      folder: of weights, a file a configuration.
    """

    simulation: Large
    cells: Cells
    seeds: tuple[int, ...]
    epochs: int
    search: bool
    folder: Path

    @property
    def train(self) -> int:
        """How many cells are trained on, the first ones."""
        return len(self.cells.x_active) - int(HELD_OUT * len(self.cells.x_active))

    def fitted(self, name: str) -> Fitted:
        """The autoencoders of a configuration (latents-depth-width), trained or read."""
        key = _key(name)
        dims = autoencoder.dims(self.simulation.genes, *key, self.simulation.variant)
        path = self.folder / f"{name}.npz"
        if not path.exists():
            x_active, m = self.cells.x_active, self.simulation.m
            parts = x_active[: self.train], x_active[self.train :]
            found = fitting.fit(
                dims, *parts, self._recipe(dims, parts, autoencoder.RECIPES[key]), self.seeds,
                readout=m, chunk=5, progress=f"{name}, {len(self.seeds)} seeds",
            )  # fmt: skip
            fitting.save(path, found)
        return fitting.load(path, dims)

    def _recipe(
        self, dims: list[int], parts: tuple[np.ndarray, np.ndarray], table: Recipe
    ) -> Recipe:
        """Table S2's, or what the search finds; never more epochs than asked for."""
        recipe = table
        if self.search:
            from experiments.simulation.search import search

            recipe = search(dims, *parts, readout=self.simulation.m)
            logging.info("found by the search: %s", recipe)
        batch = min(recipe.batch_size or len(parts[0]), len(parts[0]))
        return dataclasses.replace(recipe, epochs=self.epochs, batch_size=batch)

    def measure(self, name: str) -> pd.DataFrame:
        """One row a seed of a configuration: validation loss and R² of every group."""
        latents, depth, width = _key(name)
        trained = self.fitted(name)
        found = []
        for seed, model, losses in zip(
            self.seeds, trained.models, trained.history["validation_loss"], strict=True
        ):
            found.append(
                {
                    "name": name, "latents": latents, "depth": depth, "width": width, "seed": seed,
                    "epochs": int(np.isfinite(losses).sum()),
                    "validation_loss": float(np.nanmin(losses)),
                    **self.explained(model),
                }
            )  # fmt: skip
        return pd.DataFrame(found)

    def explained(self, model: AutoEncoder) -> dict[str, float]:
        """R² of each group on held-out cells, of least squares on the others, a block at a time."""
        simulation, cells = self.simulation, self.cells

        def blocks(start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for low in range(start, stop, BLOCK):
                some = slice(low, min(low + BLOCK, stop))
                y = simulation.counts(cells.x_active[some])
                variables = [
                    y, cells.x_active[some], cells.x_noisy[some], cells.x[some], cells.a[some],
                    cells.b[some], cells.cell_type[some, None], cells.batch[some, None],
                ]  # fmt: skip
                yield autoencoder.latents(model, y), np.hstack(variables)

        fit = superposition.least_squares(superposition.Moments.of(blocks(0, self.train)))
        held_out = superposition.Moments.of(blocks(self.train, len(cells.x)))
        r2 = superposition.r2(held_out, fit.coefficients, fit.intercept)
        sizes = dict(
            zip(GROUPS, (simulation.genes, *[simulation.programs] * 4, 1, 1, 1), strict=True)
        )
        ends = np.cumsum(list(sizes.values()))
        groups = {
            group: slice(end - sizes[group], end) for group, end in zip(sizes, ends, strict=True)
        }
        return superposition.by_group(r2, groups)


def hidden(simulation: Large) -> Cells:
    """Hidden variables of all cells: 160 MB of 100,000."""
    blocks = [vars(block) for block in simulation.blocks()]
    return Cells(**{name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})


def _key(name: str) -> tuple[int, int, str]:
    """Of Table S2: latents, depth and width."""
    latents, depth, width = name.split("-")
    return int(latents), int(depth), width

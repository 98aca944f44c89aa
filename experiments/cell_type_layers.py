"""The layers that `cell_type_programs` looks at: of extraction stores, or one embedding.

A store of the cells' vectors, one of their gene tokens, or both make a layer; which a store is, its
pooling says. Where there are tokens only, a cell's vector is the mean of its tokens' (equation 1).
"""

import dataclasses
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from extract import store
from extract.manifest import Level
from sae_jax import InputError, data

ROWS = 8192  # tokens read and encoded at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Hidden states of gene tokens, on disk.

    stored: their store. cell, gene: positions of each token's, int [tokens]; cell is -1 of a cell
    that is not looked at. genes: names.
    """

    stored: store.Store
    cell: np.ndarray
    gene: np.ndarray
    genes: np.ndarray

    def sample(self, cells: np.ndarray, most: int, seed: int) -> np.ndarray:
        """Rows [tokens, d] of so many tokens of these cells, drawn at random, in their order."""
        of = np.flatnonzero(np.isin(self.cell, cells))
        chosen = np.random.default_rng(seed).permutation(of)[:most]
        if not chosen.size:
            raise InputError(
                f"{self.stored.path} has no tokens of the cells to train or to measure on"
            )
        wanted = np.zeros(len(self.cell), bool)
        wanted[chosen] = True
        return np.concatenate([x for x, _ in self._read(wanted)])

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """x [tokens, d] and the positions of their cells and genes, of the cells looked at."""
        for x, at in self._read(self.cell >= 0):
            yield x, self.cell[at], self.gene[at]

    def _read(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows where `wanted` is true, and their positions; whole chunks are read in order."""
        for start in range(0, len(wanted), ROWS):
            at = start + np.flatnonzero(wanted[start : start + ROWS])
            if at.size:
                x = np.asarray(self.stored.X[start : start + ROWS], np.float32)[at - start]
                yield data.check_rows(x, str(self.stored.path), positions=at), at


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer: vectors of cells [cells, d], float32, and tokens if there are any.

    provenance: what the dictionaries of it say about their rows.
    """

    name: str
    cells: np.ndarray
    tokens: Tokens | None
    provenance: dict[str, Any]

    @property
    def with_tokens(self) -> np.ndarray:
        """Sorted positions of the cells that have tokens."""
        return np.unique(self.tokens.cell[self.tokens.cell >= 0])


@dataclasses.dataclass(frozen=True)
class Found:
    """Stores of a layer, unread but for what they are of."""

    name: str
    cells: store.Store | None
    tokens: store.Store | None


def find(
    folders: Sequence[str], wanted: Sequence[str] | None, level: Level = "size"
) -> list[Found]:
    """The layers of all stores in folders, in order of their names; `wanted` of them, if given.

    level: how the stores' files are checked, as `extract.store.open` does.

    Raises:
      InputError: no stores, two of one layer and kind, damaged ones, or a layer that is not there.
    """
    there: dict[str, dict[str, store.Store]] = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.zarr")):
            opened = store.open(path, level)
            kind = "tokens" if opened.extraction["pooling"] == "tokens" else "cells"
            if kind in there.setdefault(path.stem, {}):
                raise InputError(
                    f"{path} and {there[path.stem][kind].path} are both {path.stem} of {kind}: "
                    "name one of the folders"
                )
            there[path.stem][kind] = opened
    if not there:
        raise InputError(f"--stores: {', '.join(folders)} holds no extraction stores (*.zarr)")
    names = sorted(there)
    if wanted:
        names = [store.layer_name(int(name)) if name.isdigit() else name for name in wanted]
        if missing := [name for name in names if name not in there]:
            raise InputError(
                f"--layers: there is no {', '.join(missing)} among {', '.join(sorted(there))}"
            )
    return [Found(name, there[name].get("cells"), there[name].get("tokens")) for name in names]


def cell_names(found: Sequence[Found]) -> pd.Index:
    """The cells that the stores are of: of their vectors, or else of their tokens.

    Raises:
      InputError: stores of different cells.
    """
    names: list[pd.Index] = []
    for layer in found:
        if layer.cells is not None:
            names.append(pd.Index(layer.cells.obs.index.astype(str)))
        else:
            names.append(pd.Index(token_cells(layer.tokens)))
    for layer, other in zip(found, names, strict=True):
        if not other.equals(names[0]):
            raise InputError(f"the stores of {layer.name} and {found[0].name} are of other cells")
    return names[0]


def read(found: Found, names: pd.Index) -> Layer:
    """A layer, its rows in the order of the cells `names`.

    Raises:
      InputError: tokens of none of the cells; vectors that are not finite, as an empty cell's.
    """
    tokens = None
    if found.tokens is not None:
        obs = found.tokens.obs
        place = names.get_indexer(obs["cell"].cat.categories.astype(str))
        cell = np.append(place, -1)[obs["cell"].cat.codes]
        if not (cell >= 0).any():
            raise InputError(f"{found.tokens.path} has no tokens of these cells")
        tokens = Tokens(
            found.tokens, cell, obs["gene"].cat.codes.to_numpy(np.int64),
            obs["gene"].cat.categories.to_numpy(str),
        )  # fmt: skip
    if found.cells is not None:
        at = found.cells.obs.index.astype(str).get_indexer(names)
        cells = np.asarray(found.cells.X[:], np.float32)[at]
    else:
        cells = means(tokens, len(names))
    about = (found.cells or found.tokens).path
    cells = data.check_rows(cells, str(about))
    return Layer(found.name, cells, tokens, {**data.provenance(str(about)), "data": str(about)})


def means(tokens: Tokens, n_cells: int) -> np.ndarray:
    """The mean of each cell's tokens, float32 [cells, d]; NaN of a cell without any."""
    total = None
    counts = np.bincount(tokens.cell[tokens.cell >= 0], minlength=n_cells)
    for x, cell, _ in tokens.blocks():
        total = np.zeros((n_cells, x.shape[1])) if total is None else total
        ones = (np.ones(len(cell)), (cell, np.arange(len(cell))))
        total += sparse.csr_array(ones, shape=(n_cells, len(cell))) @ x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (total / counts[:, None]).astype(np.float32)


def extracted(out: Path, arguments: Sequence[str], n_cells: int, n_tokens: int) -> list[str]:
    """Run `sae-jax-extract` for the vectors of the first cells, and the tokens of the first ones.

    Finished stores stay as they are. If tokens of all these cells are asked for, the vectors are
    their means, and are not extracted again.

    Args:
      out: folder to fill: mean and tokens in it.
      arguments: of the program, but for the pooling, the number of cells and the output.
      n_cells, n_tokens: cells whose vectors, and whose tokens, are wanted.

    Returns:
      The folders.

    Raises:
      SystemExit: the program failed; it has said why.
    """
    wanted = _wanted(n_cells, n_tokens)
    for pooling, given in wanted.items():
        _run([*arguments, *given, f"--output={out / pooling}"])
    return [str(out / pooling) for pooling in wanted]


def check(out: Path, arguments: Sequence[str], n_cells: int, n_tokens: int) -> None:
    """What `extracted` would do, as `sae-jax-extract --dry_run` tells it; nothing is written.

    Of what an earlier run has begun there is nothing to tell.

    Raises:
      SystemExit: the model, its options or the cells were refused; it has said why.
    """
    for pooling, given in _wanted(n_cells, n_tokens).items():
        if not (out / pooling).exists():
            _run([*arguments, *given, "--dry_run", "--batch_size=8"])


def _wanted(n_cells: int, n_tokens: int) -> dict[str, list[str]]:
    """Arguments by pooling."""
    wanted = {"tokens": n_tokens} if n_tokens >= n_cells else {"mean": n_cells, "tokens": n_tokens}
    return {
        pooling: [f"--pooling={pooling}", f"--limit={limit}"]
        for pooling, limit in wanted.items() if limit
    }  # fmt: skip


def _run(arguments: Sequence[str]) -> None:
    """In a process of its own: torch and its memory are gone when training begins."""
    process = multiprocessing.get_context("spawn").Process(target=_extract, args=(arguments,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def _extract(arguments: Sequence[str]) -> None:
    from extract import main

    sys.argv = ["sae-jax-extract", *arguments]
    main.cli()


def token_cells(tokens: store.Store) -> list[str]:
    """Names of the cells, in order of their first token."""
    column = tokens.obs["cell"]
    return column.cat.categories.astype(str)[pd.unique(column.cat.codes.to_numpy())].tolist()

"""SHA-256 of files, of names, of the rows of a store."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(str(name).encode() + b"\0")
    return digest.hexdigest()


def rows_hash(obs: "pd.DataFrame", pooling: str) -> str:
    """SHA-256 of the names of rows; under "tokens" of the cells' names and the rows of each.

    Tokens are many (1e8): their rows have numbers for names, and each cell's follow one another.
    """
    if pooling != "tokens":
        return names_hash(obs.index)
    codes = obs["cell"].cat.codes.to_numpy()
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    cells = obs["cell"].cat.categories[codes[first]]
    counts = np.diff(first, append=len(codes))
    return names_hash(f"{cell}\0{count}" for cell, count in zip(cells, counts, strict=True))


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""One run folder: what its program was told, its features, and what lies in features.h5ad."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from sae_jax import InputError, files
from sae_jax.reading import check_file
from sae_jax.reading import reading as errors_of

PROGRAMS = ("lens", "concepts", "quickstart")
# The files that the browser reads; a run is known by their contents.
READ = (
    *(f"{program}.json" for program in PROGRAMS), "features.h5ad", "features.parquet",
    "feature_space.parquet", "top_terms.parquet", "enrichment.parquet", "named.npz",
    "genes.parquet", "nulls.csv", "attribution.parquet", "samples.parquet", "dge.parquet",
    "gsea_attribution.parquet", "gsea_dge.parquet", "deletion.parquet", "deletion_held_out.parquet",
    "gene_sets.parquet",
)  # fmt: skip
SETTINGS = {"label": str, "labels": str, "percentile": (int, float)}  # that are used; one or more
BLOCK = 1 << 20  # entries of a matrix, or rows of a table, that are held at once


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What libraries raise at a damaged file, as an InputError that names the file."""
    if Path(path).exists() or Path(path).is_symlink():
        check_file(path)
    advice = "; it is damaged or of another kind: make it again with the program that wrote it."
    try:
        with errors_of(path, advice=advice):
            yield
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise InputError(f"{path} is missing: is this the folder of a finished run?") from None
        raise


@dataclass(frozen=True, eq=False)
class Folder:
    """A run folder, opened to read.

    Attributes:
      path: of the folder. program: one of `PROGRAMS`.
      settings: what the program was told. about: what it says of the dictionary.
      table: one row a feature (index: names), the columns of features.parquet, with `kind`
        ("concept" or "neuron") and `latent` (-1: not known).
      cells: names of the cells; None where there is no features.h5ad.
      decoder: [features, d] or None.
    """

    path: Path
    program: str
    settings: dict[str, Any]
    about: dict[str, Any]
    table: pd.DataFrame
    cells: pd.Index | None
    decoder: np.ndarray | None

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Reads all but the large tables.

        Raises:
          InputError: no run folder, or a damaged one.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"there is no folder {path}: give the --workdir of a run.")
        stored, h5ad = path / "features.parquet", path / "features.h5ad"
        if not any(file.exists() or file.is_symlink() for file in (stored, h5ad)):
            raise InputError(
                f"{path} has neither features.h5ad nor features.parquet: give the --workdir of a "
                "finished `sae-jax lens`, `concepts` or `quickstart`."
            )
        table = None
        if stored.exists():
            with reading(stored):
                table = files.read_parquet(stored).set_index("feature")
        uns, cells, decoder = {}, None, None
        if h5ad.exists():
            with reading(h5ad), h5py.File(h5ad) as file:
                var = read_elem(file["var"])
                uns = {name: read_elem(file["uns"][name]) for name in ("about", *PROGRAMS)
                       if name in file.get("uns", {})}  # fmt: skip
                cells = _index(file["obs"])
                if "decoder" in file.get("varm", {}):
                    decoder = np.asarray(file["varm"]["decoder"][:], np.float32)
                    if decoder.ndim != 2 or len(decoder) != len(var):
                        raise ValueError(f"varm['decoder'] has shape {decoder.shape}")
            table = _together(table, var, path)
        if not len(table):
            raise InputError(f"{h5ad if h5ad.exists() else stored} has no features to show.")
        with reading(stored if stored.exists() else h5ad):
            table = _identified(table)
        program, settings = _settings(path, uns)
        about = _json(uns.get("about", "{}"), h5ad)
        return cls(path, program, settings, about, table, cells, decoder)

    @contextlib.contextmanager
    def h5ad(self) -> Iterator[h5py.File]:
        """features.h5ad, while it is read."""
        path = self.path / "features.h5ad"
        with reading(path), h5py.File(path) as file:
            yield file

    def labels(self) -> list[str]:
        """Columns of the cells that the program took for labels."""
        label, labels = self.settings.get("label"), self.settings.get("labels")
        told = [label, *(labels if isinstance(labels, list) else [labels])]
        return [name for name in told if name is not None]

    def obs(self) -> pd.DataFrame:
        """The metadata of the cells; without any where there is no features.h5ad."""
        if self.cells is None:
            return pd.DataFrame(index=pd.Index([], dtype=object))
        with self.h5ad() as file:
            return read_elem(file["obs"])

    def maps(self) -> Iterator[tuple[str, np.ndarray]]:
        """Names and coordinates, float32 [cells, 2], of the maps in obsm: those called X_*, numbers
        in two columns or more, of which the first two count."""
        if self.cells is None:
            return
        with self.h5ad() as file:
            for name, held in file.get("obsm", {}).items():
                array = isinstance(held, h5py.Dataset) and held.ndim == 2 and held.shape[1] > 1
                if name.startswith("X_") and array and held.dtype.kind in "fiu":
                    yield name, np.asarray(held[:, :2], np.float32)

    @contextlib.contextmanager
    def activations(self) -> Iterator[Activations]:
        """X of features.h5ad, read a part at a time."""
        with self.h5ad() as file:
            x = file["X"]
            if isinstance(x, h5py.Dataset):
                indptr = np.arange(len(x) + 1, dtype=np.int64) * len(self.table)
            elif x.attrs["encoding-type"] != "csr_matrix":
                raise ValueError(f"X is a {x.attrs['encoding-type']}, not CSR")
            else:
                indptr = np.asarray(x["indptr"], np.int64)
            if len(indptr) != len(self.cells) + 1 or (np.diff(indptr) < 0).any():
                raise ValueError(f"X has {len(indptr) - 1} rows for {len(self.cells)} cells")
            yield Activations(self.path / "features.h5ad", x, indptr, len(self.table))


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations [cells, features] in a file that is open; `indptr` bounds the entries of rows."""

    path: Path
    x: h5py.Group | h5py.Dataset
    indptr: np.ndarray
    n_features: int

    def rows(self, first: int, last: int) -> sparse.csr_array:
        """Some rows, float32, without zeros, features rising.

        Raises:
          InputError: for activations that are negative or not finite.
        """
        with reading(self.path):
            if isinstance(self.x, h5py.Dataset):
                block = sparse.csr_array(np.asarray(self.x[first:last], np.float32))
            else:
                some = slice(int(self.indptr[first]), int(self.indptr[last]))
                own = self.indptr[first : last + 1] - self.indptr[first]
                parts = (self.x["data"][some].astype(np.float32), self.x["indices"][some], own)
                block = sparse.csr_array(parts, shape=(last - first, self.n_features))
                block.check_format()
                block.sum_duplicates()
            if not (np.isfinite(block.data).all() and (block.data >= 0).all()):
                raise ValueError("X holds activations that are negative or not finite")
            block.eliminate_zeros()
            return block


def _index(obs: h5py.Group) -> pd.Index:
    return pd.Index(read_elem(obs[obs.attrs["_index"]])).astype(str)


def _together(table: pd.DataFrame | None, var: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table in the order of var, of which come the columns that it lacks."""
    if table is None:
        return var
    if len(table) != len(var) or set(table.index) != set(var.index):
        raise InputError(
            f"{path / 'features.parquet'} and {path / 'features.h5ad'} are of different features: "
            "they are of different runs; run the program again with --resume."
        )
    table = table.loc[var.index]
    more = [name for name in ("kind", "latent") if name in var and name not in table]
    return table.assign(**{name: var[name].to_numpy() for name in more})


def _identified(table: pd.DataFrame) -> pd.DataFrame:
    """With text for names, and `kind` and `latent` of every feature."""
    table = table.set_axis(table.index.astype(str)).rename_axis("feature")
    if not table.index.is_unique:
        again = table.index[table.index.duplicated()][0]
        raise ValueError(f"two features are called {again[:100]!r}")
    if "kind" not in table:
        table["kind"] = "concept"
    if "latent" not in table:
        told = [re.fullmatch(r"(?:feature|concept)_(\d{1,9})", name) for name in table.index]
        table["latent"] = [-1 if match is None else int(match[1]) for match in told]
    table["latent"] = table["latent"].fillna(-1).astype(np.int64)
    return table


def _settings(path: Path, uns: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The program, and its settings: those in its file, or else in features.h5ad."""
    for program in PROGRAMS:
        stored = path / f"{program}.json"
        if stored.exists() or stored.is_symlink():
            with reading(stored):
                return program, _checked(_json(stored.read_text(), stored))
        if program in uns:
            with reading(path / "features.h5ad"):
                return program, _checked(_json(uns[program], path / "features.h5ad"))
    raise InputError(
        f"{path} is no run folder of ours: it has none of "
        + ", ".join(f"{program}.json" for program in PROGRAMS)
    )


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings, where those that are used are of their type."""
    for name, kinds in SETTINGS.items():
        value = settings.get(name)
        parts = value if name == "labels" and isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, kinds) for part in parts):
            raise ValueError(f"its setting {name} is {str(value)[:50]}")
    return settings


def _json(text: Any, path: Path) -> dict[str, Any]:
    with reading(path):
        found = json.loads(str(text))
        if not isinstance(found, dict):
            raise ValueError("its settings are no object")
        return found

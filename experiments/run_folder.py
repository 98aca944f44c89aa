"""What programs that describe features leave alike, for `sae-jax browse` to read.

features.h5ad: X activations, CSR float32 [cells, features]; obs of the cells; var the table of the
    features; obsm maps of the cells, [cells, 2] each: X_umap of the embedding (X_pca without
    umap-learn) and those that the input has; varm["decoder"] [features, d], what an activation of
    1 adds to the embedding; uns["about"] and uns[program], JSON.
gene_sets.parquet: term, gene. Tables with rows for each feature lie in the features' order, a few
    whole features a row group, so that those of one feature are read without the others'.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from anndata.experimental import write_dispatched
from scipy import sparse

import sae_jax
from analysis import baselines, plots
from analysis.gene_sets import GeneSets
from sae_jax import files
from sae_jax.reading import reading

ROW_GROUP = 8  # features
MAP = "map.npz"  # of the cells: a minute for a hundred thousand of them, so it is kept


def write_features(
    path: Path,
    program: str,
    z: sparse.csr_matrix,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    *,
    decoder: np.ndarray,
    maps: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> anndata.AnnData:
    """Write features.h5ad, and return it.

    Args:
      path: of the file. program: the name in uns of its `settings`.
      z: [cells, features]. obs: a row a cell. var: a row a feature, by name.
      decoder: [features, d]. maps: by name, [cells, 2].
      about: of the dictionary, as `about` has it.
    """
    adata = anndata.AnnData(
        sparse.csr_matrix(z, dtype=np.float32), obs=plain_columns(obs), var=plain_columns(var),
        obsm=dict(maps), varm={"decoder": np.asarray(decoder, np.float32)},
        uns={"about": json.dumps(dict(about)), program: json.dumps(dict(settings))},
    )  # fmt: skip
    write_h5ad(path, adata)
    return adata


def write_h5ad(path: Path, adata: anndata.AnnData) -> None:
    """An .h5ad file, compressed, every chunk of numbers with a checksum (fletcher32).

    HDF5 makes the file in memory, as large as it will be on disk: on a full disk it can neither
    put away what it holds nor give it up, and ends the process (a segmentation fault).
    """
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        write_dispatched(file, "/", adata, _with_checksum)
    with files.write_aside(path) as fresh:
        fresh.write_bytes(image.getbuffer())


def _with_checksum(
    write: Callable[..., None], group: h5py.Group, key: str, value: Any, *, iospec: Any, **_: Any
) -> None:
    """Of each part of an AnnData; HDF5 has no checksums of text of any length."""
    options = {"compression": "gzip"}
    if "string" not in iospec.encoding_type:
        options["fletcher32"] = True
    write(group, key, value, dataset_kwargs=options)


def about(
    program: str, dictionary: sae_jax.Dictionary, x: np.ndarray, **more: Any
) -> dict[str, Any]:
    """What the browser tells of a dictionary: its kind and size, R² and L0 on the rows x [cells, d]
    of this folder; `more` is added (model, layer, n_live, n_named, share_named, ...)."""
    config = dictionary.config
    coded = baselines.reconstruction(dictionary, x)
    return {
        "program": program, "d_in": config.d_in, "n_latents": config.n_latents, "k": config.k,
        "activation": config.activation, "preset": config.name, "seed": config.seed,
        "n_cells": len(x), "r2": coded["r2"], "l0": coded["l0"], **more,
    }  # fmt: skip


def cell_maps(folder: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    """`X_umap`, or `X_pca`, of the embedding x [cells, d]; kept in the folder's `MAP`."""
    path = folder / MAP
    if not path.exists():
        coordinates, axis = plots.plane(x)
        with files.write_aside(path) as fresh:
            np.savez(fresh, **{{"UMAP": "X_umap", "PC": "X_pca"}[axis]: coordinates})
    with np.load(path) as stored:
        return dict(stored)


def input_maps(path: str | Path, names: pd.Index) -> dict[str, np.ndarray]:
    """The coordinates [cells, 2] in obsm of an h5ad file, of the cells of these names.

    Where a program of ours has a map of the same name, theirs is `..._of_input`.
    """
    if not h5py.is_hdf5(path):
        return {}
    # These arrays alone: anndata would read all of obsm and of the layers.
    with reading(path), h5py.File(path) as file:
        held, at = file.get("obsm", {}), _cell_names(file["obs"]).get_indexer(names)
        if isinstance(held, h5py.Dataset):  # one table, of the first versions of anndata
            held = {key: held[key] for key in held.dtype.names}
        found = {
            key: np.asarray(value[()], np.float32)[at] for key, value in held.items()
            if not isinstance(value, h5py.Group) and value.ndim == 2 and value.shape[1] == 2
            and value.dtype.kind in "fiu"
        }  # fmt: skip
    maps = {}
    for key, coordinates in found.items():
        if not np.isfinite(coordinates).all():
            logging.warning("obsm[%r] has cells without coordinates and is no map", key)
            continue
        name = f"X_{key.removeprefix('X_')}"
        maps[f"{name}_of_input" if name in ("X_umap", "X_pca") else name] = coordinates
    return maps


def _cell_names(obs: h5py.Group | h5py.Dataset) -> pd.Index:
    if isinstance(obs, h5py.Group):
        return pd.Index(anndata.io.read_elem(obs[obs.attrs["_index"]])).astype(str)
    names = obs[obs.dtype.names[0]]  # one table, of the first versions of anndata
    return pd.Index([name.decode() if isinstance(name, bytes) else name for name in names])


def write_by_feature(path: Path, parts: pd.DataFrame | Iterable[pd.DataFrame]) -> None:
    """Parquet of a long table whose rows of one `feature` follow one another; page checksums.

    Args:
      parts: the table; or parts of it of some whole features each, one row group a part.
    """
    schema = writer = None
    with files.write_aside(path) as fresh:
        for part in by_features(parts) if isinstance(parts, pd.DataFrame) else parts:
            rows = pa.Table.from_pandas(_lean(part), preserve_index=False)
            if schema is None:
                schema = pa.schema([_wide(column) for column in rows.schema])
                writer = pq.ParquetWriter(
                    fresh, schema, write_page_checksum=True, compression="zstd"
                )
            writer.write_table(rows.cast(schema), row_group_size=max(1, len(part)))
        writer.close()


def by_features(table: pd.DataFrame, features: int = ROW_GROUP) -> Iterator[pd.DataFrame]:
    """A table's rows, some features at a time; one part without rows if there are none."""
    named = table["feature"].astype(str).to_numpy()
    starts = np.flatnonzero(np.append(True, named[1:] != named[:-1]))[: len(table)]
    bounds = [*starts[::features], len(table)] if len(table) else [0, 0]
    return (table.iloc[part] for part in map(slice, bounds[:-1], bounds[1:]))


def _lean(part: pd.DataFrame) -> pd.DataFrame:
    """Text as categories, those alone that occur: a row group holds a copy of them."""
    text = part.select_dtypes(["object", "category"])
    lean = {name: text[name].astype("category").cat.remove_unused_categories() for name in text}
    return part.assign(**lean)


def _wide(column: pa.Field) -> pa.Field:
    """The same with room for other parts' categories."""
    if not pa.types.is_dictionary(column.type):
        return column
    return column.with_type(pa.dictionary(pa.int32(), pa.string()))


def write_gene_sets(path: Path, sets: GeneSets, genes: np.ndarray) -> None:
    """The sets as they were tested: a row a term and gene that was measured."""
    rows = sparse.csr_array(sets.membership)
    term = np.repeat(np.asarray(sets.names, object), np.diff(rows.indptr))
    gene = np.asarray(genes, object)[rows.indices]
    files.write_parquet(path, pd.DataFrame({"term": term, "gene": gene}).astype("category"))


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The same with columns that HDF5 can hold.

    A slash in a name would be a path and becomes a bar; of columns with one name the later are
    numbered; text with gaps, or of mixed kinds, becomes categories.
    """
    table = table.copy()
    names: list[str] = []
    for name in (str(column).replace("/", "|") for column in table):
        again = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({again + 1})" if name in names else name)
    table.columns = names
    table.index = table.index.astype(str).rename(None)
    for name in names:
        column = table[name]
        if column.dtype.kind == "O" and not isinstance(column.dtype, pd.CategoricalDtype):
            table[name] = column.map(str, na_action="ignore").astype("category")
        elif isinstance(column.dtype, pd.CategoricalDtype):
            table[name] = column.cat.rename_categories(column.cat.categories.astype(str))
    return table

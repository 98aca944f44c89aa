"""Rows to train on: checks, splits and normalisation."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from sae_jax.errors import InputError
from sae_jax.state import Normalizer


def check_rows(x: Any, name: str, *, d_in: int | None = None) -> np.ndarray:
    """`x` as a C-ordered floating array [rows, d_in]; float32 unless it is float64 already.

    Raises:
      InputError: not two-dimensional, not numbers, of another width than d_in, empty, or with NaN
        or infinite values (how many, in which rows first).
    """
    if scipy.sparse.issparse(x):
        raise InputError(f"{name} is sparse; give a dense array, {name}.toarray() say")
    x = np.asarray(x)
    if x.ndim != 2:
        raise InputError(f"{name} has shape {x.shape}; it must be [rows, dimensions]")
    if not (np.issubdtype(x.dtype, np.number) and np.isrealobj(x)):
        raise InputError(f"{name} has dtype {x.dtype}; it must hold real numbers")
    if d_in is not None and x.shape[1] != d_in:
        raise InputError(f"{name} has {x.shape[1]} dimensions, the dictionary has d_in={d_in}")
    if x.size == 0:
        raise InputError(f"{name} is empty: shape {x.shape}")
    x = np.ascontiguousarray(x, x.dtype if x.dtype == np.float64 else np.float32)
    finite = np.isfinite(x)
    if not finite.all():
        raise not_finite(name, np.nonzero(~finite)[0], len(x))
    return x


def not_finite(name: str, positions: np.ndarray, rows: int) -> InputError:
    """The refusal of values that are NaN or infinite; `positions` has the row of each."""
    where = np.unique(positions)
    first = ", ".join(map(str, where[:5])) + (", ..." if len(where) > 5 else "")
    return InputError(
        f"{name} holds {len(positions)} NaN or infinite values in {len(where)} of "
        f"{rows} rows (rows {first}); remove or repair those rows"
    )


def split(rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of train and held-out rows; the held-out ones are round(rows * fraction)."""
    order = np.random.default_rng(seed).permutation(rows)
    held_out = round(rows * fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def fit_normalizer(x: np.ndarray, kind: str) -> Normalizer | None:
    """Statistics of `input_normalization`, in float64 over the rows of x [rows, d_in].

    A dimension (or a matrix) without variation is left at scale 1.
    """
    if kind == "none":
        return None
    if kind == "zscore":
        mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        # The rounded mean of a constant leaves a deviation of 1e-17 that must not be divided by.
        scale = np.where(x.max(axis=0) > x.min(axis=0), scale, 1)
    else:
        mean = np.zeros(x.shape[1])
        scale = np.full(x.shape[1], np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    scale = np.where(scale > 0, scale, 1)
    return Normalizer(mean=mean.astype(x.dtype), scale=scale.astype(x.dtype))


def fingerprint(x: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array's values, in JSON's types."""
    digest = hashlib.sha256(np.ascontiguousarray(x)).hexdigest()
    return {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": digest}


def load(source: str) -> np.ndarray:
    """Rows from a file: `F.npy`, `F.h5ad:obsm/KEY`, `F.h5ad:X`, or the same of a `.zarr` store.

    Read through numpy, h5py and zarr, without anndata; sparse matrices become dense. Pickled arrays
    are refused.

    Raises:
      InputError: no such file or array (those there are, are listed), or values that `check_rows`
        refuses.
    """
    path, _, inside = source.partition(":")
    if not Path(path).exists():
        raise InputError(f"there is no file {path}")
    if path.endswith(".npy"):
        try:
            return check_rows(np.load(path, allow_pickle=False), source)
        except (ValueError, EOFError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is no readable .npy file: {error}") from error
    try:
        root = _open_store(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    inside = inside or "X"
    there = {name: root[name] for name in ("X",) if name in root}
    obsm = root.get("obsm", {})
    names = getattr(getattr(obsm, "dtype", None), "names", None)  # one table, before anndata 0.7
    there |= {f"obsm/{key}": obsm[key] for key in (names or obsm)}
    node = there[inside] if inside in there else root.get(inside)
    if node is None:
        raise InputError(f"{path} has no {inside!r}; there are {', '.join(there) or 'none'}")
    return check_rows(_dense(node), source)


def _open_store(path: str) -> Any:
    """The root group of an h5ad or zarr file."""
    if path.endswith(".h5ad"):
        import h5py

        return h5py.File(path, "r")
    if path.rstrip("/").endswith(".zarr"):
        import zarr

        return zarr.open_group(path, mode="r")
    raise InputError(f"{path}: rows are read from .npy, .h5ad or .zarr")


def _dense(node: Any) -> np.ndarray:
    """An array node, or a sparse matrix in anndata's encoding, as a NumPy array."""
    if isinstance(node, np.ndarray):
        return node
    encoding = str(node.attrs.get("encoding-type", ""))
    if encoding in ("csr_matrix", "csc_matrix"):
        make = scipy.sparse.csr_matrix if encoding == "csr_matrix" else scipy.sparse.csc_matrix
        parts = tuple(np.asarray(node[name]) for name in ("data", "indices", "indptr"))
        try:
            matrix = make(parts, shape=tuple(node.attrs["shape"]))
            matrix.check_format(full_check=True)  # SciPy would follow a wild index out of memory
        except (ValueError, KeyError) as error:
            raise InputError(f"{node.name} is damaged: {error}") from None
        return matrix.toarray()
    if not hasattr(node, "shape"):
        raise InputError(f"{node.name} is {encoding or 'a group'}, not a matrix")
    return np.asarray(node)

"""Rows to train on: where they are read from, checks, splits and normalisation."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from sae_jax import pulse
from sae_jax.errors import InputError
from sae_jax.reading import check_file, reading
from sae_jax.state import Normalizer
from sae_jax.streaming import Csr, Npy, Rows, check_matrix, encoding, float_dtype

LEAST = float(np.finfo(np.float32).tiny / np.finfo(np.float32).eps)  # in full float32 precision

_SPLITS = {name: name for name in ("train", "validation", "test")}
_SPLITS |= {"val": "validation", "valid": "validation"}


def check_rows(
    x: Any, name: str, *, d_in: int | None = None, positions: np.ndarray | None = None
) -> Any:
    """`x` as a C-ordered floating array [rows, d_in]; float32 unless it is float64 already.

    `Rows` are looked through by `scan` and stay what they are. `positions` are the rows of the file
    that these are, for messages.

    Raises:
      InputError: not two-dimensional, not numbers, of another width than d_in, empty, with values
        that are NaN or infinite (how many, in which rows first), or all so small that float32 takes
        them for 0.
    """
    if not (isinstance(x, Rows) or scipy.sparse.issparse(x)):
        x = np.asarray(x)
    check_matrix(x, name, d_in)
    if isinstance(x, Rows):
        _check_size(scan(x, name).largest, name)
        return x
    x = np.ascontiguousarray(x, float_dtype(x.dtype))
    finite = np.isfinite(x)
    if not finite.all():
        bad = np.nonzero(~finite)[0]
        raise not_finite(name, bad if positions is None else positions[bad], len(x))
    _check_size(max(-float(x.min()), float(x.max())), name)
    return x


def _check_size(largest: float, name: str) -> None:
    if 0 < largest < LEAST:
        raise InputError(
            f"{name} holds no value beyond {largest:.2g}: float32 computes with such as if they "
            "were 0; multiply all by one factor"
        )


def not_finite(name: str, positions: np.ndarray, rows: int) -> InputError:
    """The refusal of values that are NaN or infinite; `positions` has the row of each."""
    where = np.unique(positions)
    return _not_finite(name, len(positions), len(where), where[:5], rows)


def _not_finite(name: str, values: int, bad: int, first: Any, rows: int) -> InputError:
    where = ", ".join(map(str, first)) + (", ..." if bad > 5 else "")
    return InputError(
        f"{name} holds {values} NaN or infinite values in {bad} of "
        f"{rows} rows (rows {where}); remove or repair those rows"
    )


def split(rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of train and held-out rows; the held-out ones are round(rows * fraction)."""
    order = np.random.default_rng(seed).permutation(rows)
    held_out = round(rows * fraction)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def split_by(labels: Any) -> dict[str, np.ndarray]:
    """Sorted positions of "train", "validation" and "test" by a label for each row [rows].

    Case does not matter; val and valid mean validation; what no row is named is empty.

    Raises:
      InputError: another label (those there are, are listed), or no row to train on.
    """
    found, kind, counts = np.unique(
        np.asarray(labels, str), return_inverse=True, return_counts=True
    )
    splits = [_SPLITS.get(label.strip().lower()) for label in found.tolist()]
    if None in splits or "train" not in splits:
        there = [f"'{label}' ({count} rows)" for label, count in zip(found, counts, strict=True)]
        listed = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
        raise InputError(
            "splits must be named train, validation (val, valid) or test, and some rows train; "
            f"found {listed or 'none'}"
        )
    each = np.asarray(splits)[kind]
    return {name: np.flatnonzero(each == name) for name in ("train", "validation", "test")}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one pass over rows finds out: `fingerprint`, the largest absolute value, and of each
    dimension, float64 [d_in], the mean, the sum of squared deviations from it, and whether it
    varies at all (bool)."""

    fingerprint: dict[str, Any]
    largest: float
    mean: np.ndarray
    deviation: np.ndarray
    varies: np.ndarray


def scan(rows: Rows, name: str | None = None) -> Summary:
    """The summary of rows, all read once in blocks; found at the first call and kept.

    Moments are float64, those of blocks are merged (Chan, Golub and LeVeque 1979).

    Raises:
      InputError: NaN or infinite values; rows are counted as in the file.
    """
    if rows.summary is not None:
        return rows.summary
    digest = hashlib.sha256()
    mean, deviation = np.zeros((2, rows.shape[1]))
    low, high = np.full((2, rows.shape[1]), [[np.inf], [-np.inf]])
    values, bad, first = 0, 0, []
    for start in range(0, len(rows), rows.block_rows):
        pulse.beat(f"reading {rows.name}")
        block = rows[start : start + rows.block_rows]
        digest.update(block)
        wrong = np.count_nonzero(~np.isfinite(block), axis=1)
        if wrong.any() or values:  # no moments any more, but the count of all of them
            where = start + np.flatnonzero(wrong)
            first += where[: 5 - len(first)].tolist()
            values, bad = values + wrong.sum(), bad + len(where)
            continue
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
        block = block.astype(np.float64)
        shift = block.mean(axis=0) - mean
        with np.errstate(over="ignore", invalid="ignore"):  # squares that float64 has not
            deviation += np.square(block - block.mean(axis=0)).sum(axis=0)
            deviation += np.square(shift) * (start * len(block) / (start + len(block)))
        mean += shift * (len(block) / (start + len(block)))
    if values:
        where = first if rows.positions is None else rows.positions[first]
        raise _not_finite(name or rows.name, values, bad, where, len(rows))
    about = {"shape": list(rows.shape), "dtype": str(rows.dtype), "sha256": digest.hexdigest()}
    largest = max(-float(low.min()), float(high.max()))
    rows.summary = Summary(about, largest, mean, deviation, high > low)
    return rows.summary


def fit_normalizer(x: np.ndarray | Rows, kind: str) -> Normalizer | None:
    """Statistics of `input_normalization`, in float64 over the rows of x [rows, d_in].

    A dimension (or a matrix) without variation is left at scale 1, as is one whose variation
    float32 takes for 0.

    Raises:
      InputError: values whose squares float64 cannot hold.
    """
    if kind == "none":
        return None
    with np.errstate(over="ignore"):
        if isinstance(x, Rows):
            found = scan(x)
            mean, variance, varies = found.mean, found.deviation / len(x), found.varies
            scale, power = np.sqrt(variance), np.mean(variance + np.square(mean))
        elif kind == "zscore":
            mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
            varies = x.max(axis=0) > x.min(axis=0)
        else:
            power = np.mean(np.square(x, dtype=np.float64))
    if kind == "zscore":
        # The rounded mean of a constant leaves a deviation of 1e-17 that must not be divided by.
        scale = np.where(varies, scale, 1)
    else:
        mean, scale = np.zeros(x.shape[1]), np.full(x.shape[1], np.sqrt(power))
    if not np.isfinite(scale).all():
        raise InputError(f"{kind} needs the squares of values so large that float64 has none")
    scale = np.where(scale >= LEAST, scale, 1)
    return Normalizer(mean=mean.astype(x.dtype), scale=scale.astype(x.dtype))


def fingerprint(x: np.ndarray | Rows) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array's values, in JSON's types."""
    if isinstance(x, Rows):
        return scan(x).fingerprint
    digest = hashlib.sha256(np.ascontiguousarray(x)).hexdigest()
    return {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": digest}


def load(source: str) -> np.ndarray:
    """All rows of `open_rows`, by `check_rows`; also of a matrix that is stored by columns."""
    node = _find(source)
    with reading(source):
        if encoding(node) != "csc_matrix":
            return check_rows(np.asarray(Rows(node, source)), source)
        across = Csr(node, tuple(node.attrs["shape"])[::-1])
        check_matrix(across, source)
        return check_rows(across[0 : across.shape[0]].T, source)


def open_rows(source: str) -> Rows:
    """Rows of a file, unread: `F.npy`, `F.h5ad:obsm/KEY`, `F.h5ad` (its X), the same of a `.zarr`.

    Read through numpy, h5py and zarr, without anndata; CSR matrices become dense as they are read.
    Pickled arrays are refused.

    Raises:
      InputError: no such file or array (those there are, are listed), damage, what `Rows` refuses.
    """
    return Rows(_find(source), source)


def load_obs(source: str, column: str) -> np.ndarray:
    """A column of `obs` of an h5ad or zarr file as text [rows]; missing entries are "".

    Categories, text, booleans (True, False) and numbers; files of every anndata version. What
    follows a colon in `source` is ignored.

    Raises:
      InputError: no such file, or column (those there are, are listed).
    """
    path, _ = _parts(source)
    if path.endswith(".npy"):
        raise InputError(f"{path} has no obs; name an .h5ad or .zarr file")
    root = _open_store(path)
    with reading(f"{path}: obs"):
        obs = root.get("obs")
        names = getattr(getattr(obs, "dtype", None), "names", None)  # one table, before anndata 0.7
        there = set(names or obs or ()) - {"__categories"}
        if column not in there:
            listed = ", ".join(sorted(there)) or "none"
            raise InputError(f"{path} has no column {column!r} in obs; there are {listed}")
        node, missing, categories = obs[column], False, None
        if encoding(node) == "categorical":
            node, categories = node["codes"], node["categories"]
        elif hasattr(node, "keys"):  # a nullable column
            node, missing = node["values"], node["mask"][:]
        elif names:
            categories = root.get(f"uns/{column}_categories")
        elif "__categories" in obs:  # anndata 0.7
            categories = obs["__categories"].get(column)
        if categories is None:
            return np.where(missing, "", _text(node))
        return np.append(_text(categories), "")[np.asarray(node[:], np.int64)]  # -1 is missing


def provenance(source: str) -> dict[str, Any]:
    """`uns/extraction` of an h5ad or zarr file in JSON's types; {} where there is none.

    What follows a colon in `source` is ignored.
    """
    path, _ = _parts(source)
    if path.endswith(".npy"):
        return {}
    root = _open_store(path)
    with reading(f"{path}: uns/extraction"):
        node = root.get("uns/extraction")
        return {} if node is None else _plain(node)


def _plain(node: Any) -> Any:
    """A nested group as a dict; arrays as lists."""
    if hasattr(node, "keys"):
        return {name: _plain(node[name]) for name in node}
    if encoding(node) == "null" or node.shape is None:
        return None
    value = np.asarray(node[()])
    if value.dtype.kind == "f":  # JSON has no NaN
        return np.where(np.isfinite(value), value.astype(object), None).tolist()
    return (value if value.dtype.kind in "biu" else _text(value)).tolist()


def _text(values: Any) -> np.ndarray:
    """An array of numbers or text in any encoding as NumPy text of the same shape."""
    values = np.asarray(values[()])
    if values.dtype.kind in "biuf":
        return values.astype(str)
    text = [v.decode() if isinstance(v, bytes) else str(v) for v in values.ravel().tolist()]
    return np.asarray(text, str).reshape(values.shape)


def _parts(source: str) -> tuple[str, str]:
    """The file, which exists, and what of it is meant."""
    path, _, inside = source.partition(":")
    if not Path(path).exists():
        raise InputError(f"there is no file {path}")
    return path, inside or "X"


def _find(source: str) -> Any:
    """The array or group that a source names."""
    path, inside = _parts(source)
    if path.endswith(".npy"):
        if ":" in source:
            raise InputError(f"{source}: an .npy file is one array; leave out what follows it")
        # Of the format alone: np.load would take a zip archive or a pickle.
        with reading(path, "is no readable .npy file"):
            return Npy(check_file(path))
    root = _open_store(path)
    with reading(path):
        obsm = root.get("obsm", {})
        table = getattr(getattr(obsm, "dtype", None), "names", None)  # before anndata 0.7
        if table and inside.removeprefix("obsm/") in table:
            return obsm[inside.removeprefix("obsm/")]
        node = None if table and inside.startswith("obsm/") else root.get(inside)
        if node is None:
            there = ["X"] * ("X" in root) + [f"obsm/{key}" for key in table or obsm]
            raise InputError(f"{path} has no {inside!r}; there are {', '.join(there) or 'none'}")
    return node


def _open_store(path: str) -> Any:
    """The root group of an h5ad or zarr file."""
    with reading(path):
        if path.endswith(".h5ad"):
            import h5py

            return h5py.File(check_file(path), "r")
        if path.rstrip("/").endswith(".zarr"):
            import zarr

            return zarr.open_group(path, mode="r")
    raise InputError(f"{path}: rows are read from .npy, .h5ad or .zarr")

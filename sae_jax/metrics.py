"""How well, and how sparsely, a dictionary codes a set of rows.

Rows are read piece by piece, so they may lie on disk (`sae_jax.data.open_rows`). Sums of a batch
run on the device in float32, those over batches and all divisions on the host in float64.
"""

import functools
import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from flax import struct
from jax import lax
from jax.sharding import Mesh

from sae_jax import ensemble, models, pulse
from sae_jax.config import Architecture
from sae_jax.data import scan
from sae_jax.errors import InputError
from sae_jax.state import Hyperparams, Normalizer, Params
from sae_jax.streaming import Rows

BATCH = 1024
PIECE = 64  # batches on the device at a time,
PIECE_BYTES = 2**26  # or fewer, of rows so wide
ALIVE = 0.01  # share of the rows that a latent must fire in to be alive (Kendiukhov, table 2)


@struct.dataclass
class Sums:
    """Of ONE dictionary over batches: squared_error [batches] in units of the square of
    largest_error [batches], which is in units of the normalizer's largest scale, so that float32
    neither overflows nor vanishes whatever the rows' own; absolute, cosine and norm_ratio
    [batches], sums over rows; active [latents], rows in which a latent fires."""

    squared_error: jax.Array
    largest_error: jax.Array
    absolute: jax.Array
    cosine: jax.Array
    norm_ratio: jax.Array
    active: jax.Array


def sums(
    member: tuple[Params, Hyperparams],
    batches: jax.Array,
    counted: jax.Array,
    normalizer: Normalizer | None,
    architecture: Architecture,
) -> Sums:
    """ONE dictionary over batches [batches, rows, d_in]; `counted` is False for padding rows."""
    params, hyper = member

    def batch(active: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        raw, counted = pair
        x = models.normalize(raw, normalizer)
        z = models.encode(params, hyper, x, architecture)
        z = jnp.where(counted[:, None], z, 0)
        y = models.decode(params, z)
        error = jnp.where(counted[:, None], y - x, 0)
        active = active + jnp.sum(z > 0, axis=0, dtype=jnp.int32)
        if normalizer is not None:
            error = error * (normalizer.scale / jnp.max(normalizer.scale))[None, :]
        cosine, ratio = _compared(raw, models.denormalize(y, normalizer))
        cosine, ratio = (jnp.sum(jnp.where(counted, each, 0)) for each in (cosine, ratio))
        largest = jnp.max(jnp.abs(error))
        error = error / jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
        return active, (jnp.sum(error**2), largest, jnp.sum(z), cosine, ratio)

    nothing = jnp.zeros(architecture.n_latents, jnp.int32)
    active, found = lax.scan(batch, nothing, (batches, counted))
    return Sums(*found, active)


def _compared(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row cos(x, y) and |y| / |x|, 0 where a norm is; no square over- or underflows."""

    def unit(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        most = jnp.max(jnp.abs(rows), axis=1)
        scaled = rows / jnp.where(most > 0, most, 1)[:, None]
        norm = jnp.linalg.norm(scaled, axis=1)
        return scaled / jnp.where(norm > 0, norm, 1)[:, None], norm * most

    (x, x_norm), (y, y_norm) = unit(x), unit(y)
    ratio = jnp.where(x_norm > 0, y_norm / jnp.where(x_norm > 0, x_norm, 1), 0)
    return jnp.sum(x * y, axis=1), ratio


@functools.partial(jax.jit, static_argnames=("architecture", "mesh"))
def _sums_of_members(
    params: Params,
    hyper: Hyperparams,
    batches: jax.Array,
    counted: jax.Array,
    normalizer: Normalizer | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> Sums:
    with jax.default_matmul_precision("highest"):
        member = functools.partial(sums, architecture=architecture)
        mapped = ensemble.map_members(member, mesh)
        return mapped((params, hyper), batches, counted, normalizer)


def evaluate(
    params: Params,
    hyper: Hyperparams,
    x: np.ndarray | Rows,
    normalizer: Normalizer | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """Metrics of a bucket over x [rows, d_in]; each an array [members], of this process's.

    params: [members, ...], in NumPy those of this process.

    mse: mean squared error over rows and dimensions, in the units of x.
    r2: 1 - fvu; fvu = squared error / squared distance from the mean of each dimension.
    r2_scalar_mean: the form that subtracts one mean of all dimensions; on anisotropic embeddings it
      is high for any code. For comparison with libraries that print it.
    cosine, norm_ratio: means over rows of cos(x, x') and |x'| / |x|, in the embedding's own space;
      a row or reconstruction of norm 0 counts as 0.
    l0, l1: mean number of active latents (z > 0) a row, mean sum of z.
    live: latents active in at least one of the rows; dead: the others.
    alive_1pct: latents active in at least 1 % of the rows.
    """
    raw = _totals(params, hyper, x, normalizer, architecture, mesh)
    rows = len(x)
    unit = 1.0 if normalizer is None else float(np.max(normalizer.scale))
    squared_error = raw.squared_error * unit**2
    live = (raw.active > 0).sum(axis=1)
    by_dimension, by_scalar = _sums_of_squares(x)
    fvu = _ratio(squared_error, by_dimension)
    return {
        "mse": squared_error / (rows * x.shape[1]),
        "r2": 1 - fvu,
        "fvu": fvu,
        "r2_scalar_mean": 1 - _ratio(squared_error, by_scalar),
        "cosine": raw.cosine / rows,
        "norm_ratio": raw.norm_ratio / rows,
        "l0": raw.active.sum(axis=1) / rows,
        "l1": raw.absolute / rows,
        "live": live,
        "dead": architecture.n_latents - live,
        "alive_1pct": (raw.active >= ALIVE * rows).sum(axis=1),
    }


def density(
    params: Params,
    hyper: Hyperparams,
    x: np.ndarray | Rows,
    normalizer: Normalizer | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
) -> np.ndarray:
    """The share of rows x [rows, d_in] in which each latent fires (z > 0), [members, latents]."""
    return _totals(params, hyper, x, normalizer, architecture, mesh).active / len(x)


def density_histogram(
    densities: np.ndarray, edges: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents by their density, on a logarithmic scale.

    Args:
      densities: [..., latents], from `density`.
      edges: of the bins, rising, of densities; None for ten to a decade from 1e-6 to 1.

    Returns:
      Counts [..., bins], a density on an edge in the bin above it, 1 in the last, and what is below
      the first edge in the first; the number that never fire [...]; the edges.

    Raises:
      InputError: edges that do not rise.
    """
    edges = np.logspace(-6, 0, 61) if edges is None else np.asarray(edges, np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise InputError("edges must be a list of at least two rising numbers")
    flat = np.asarray(densities, np.float64).reshape(-1, np.shape(densities)[-1])
    inside = np.maximum(flat, edges[0]) if edges[0] > 0 else flat
    counts = np.stack(
        [np.histogram(x[of > 0], edges)[0] for x, of in zip(inside, flat, strict=True)]
    )
    leading = np.shape(densities)[:-1]
    return counts.reshape(*leading, -1), (flat == 0).sum(axis=1).reshape(leading), edges


def recovery(
    decoder: np.ndarray, truth: np.ndarray, absolute: bool = False
) -> dict[str, np.ndarray]:
    """How well latents' directions match known ones.

    Args:
      decoder: [latents, d], or [members, latents, d]; its norms do not matter.
      truth: [variables, d].
      absolute: |cosine| instead of the cosine.

    Returns:
      mean_max_cosine: the mean over variables of the largest cosine with any latent, which one
      latent may be of several. mcc: the mean where every latent is used once, by the assignment of
      the greatest sum (Hungarian); variables beyond the latents count as 0. Scalars, or [members].

    Raises:
      InputError: shapes that do not fit.
    """
    decoder, truth = np.asarray(decoder, np.float64), np.asarray(truth, np.float64)
    if decoder.ndim not in (2, 3) or truth.ndim != 2 or decoder.shape[-1] != truth.shape[1]:
        raise InputError(
            f"decoder {decoder.shape} must be [latents, d] or [members, latents, d], truth "
            f"{truth.shape} [variables, d]"
        )
    cosines = np.einsum("vd,...nd->...vn", _unit(truth), _unit(decoder))
    cosines = np.abs(cosines) if absolute else cosines
    matched = np.asarray([_assigned(each) for each in cosines.reshape(-1, *cosines.shape[-2:])])
    return {
        "mean_max_cosine": cosines.max(axis=-1).mean(axis=-1),
        "mcc": matched.reshape(cosines.shape[:-2])[()],
    }


def _assigned(cosines: np.ndarray) -> float:
    if not np.isfinite(cosines).all():
        return np.nan
    pairs = scipy.optimize.linear_sum_assignment(cosines, maximize=True)
    return float(cosines[pairs].sum() / len(cosines))


def _unit(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def _totals(
    params: Params,
    hyper: Hyperparams,
    x: np.ndarray | Rows,
    normalizer: Normalizer | None,
    architecture: Architecture,
    mesh: Mesh,
) -> Sums:
    """Over all rows: float64 [members], and active int64 [members, latents]."""
    total, params = None, ensemble.put(params, mesh)
    normalizer = ensemble.replicate(normalizer, mesh)
    for piece in pieces(x):
        pulse.beat("evaluation")
        batches, counted = ensemble.replicate(piece, mesh)
        found = _sums_of_members(
            params, hyper, batches, counted, normalizer, architecture=architecture, mesh=mesh
        )
        found = jax.tree.map(lambda leaf: leaf.astype(np.float64), ensemble.local(found))
        found = found.replace(squared_error=found.squared_error * found.largest_error**2)
        summed = {
            name: value if name == "active" else value.sum(axis=1)
            for name, value in vars(found).items()
        }
        total = summed if total is None else {k: total[k] + v for k, v in summed.items()}
    return Sums(**{**total, "active": total["active"].astype(np.int64)})


def pieces(x: np.ndarray | Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """x [rows, d_in] as batches [batches, BATCH, d_in], of two shapes at most, and which rows of
    them count; the others fill the last batch.

    Raises:
      InputError: rows of a file that are others than when they were scanned.
    """
    known, digest = getattr(x, "summary", None), hashlib.sha256()
    batch_bytes = BATCH * x.shape[1] * x.dtype.itemsize
    size = BATCH * max(1, min(PIECE, PIECE_BYTES // batch_bytes))
    for start in range(0, len(x), size):
        part = np.asarray(x[start : start + size])
        if known is not None:
            digest.update(part)
        counted = np.arange(-(-len(part) // BATCH) * BATCH) < len(part)
        padded = np.zeros((len(counted), part.shape[1]), part.dtype)
        padded[: len(part)] = part
        yield padded.reshape(-1, BATCH, part.shape[1]), counted.reshape(-1, BATCH)
    if known is not None and digest.hexdigest() != known.fingerprint["sha256"]:
        raise InputError(
            f"{x.name} was written to while it was in use: what was trained is of no one file"
        )


def _sums_of_squares(x: np.ndarray | Rows) -> tuple[float, float]:
    """Squared distances from the mean of each dimension, and from the mean of all."""
    if isinstance(x, Rows):
        found = scan(x)
        mean, deviation = found.mean, found.deviation
    else:
        mean = x.mean(axis=0, dtype=np.float64)
        deviation = sum(
            np.square(x[i : i + BATCH].astype(np.float64) - mean).sum(axis=0)
            for i in range(0, len(x), BATCH)
        )
    within = float(np.sum(deviation))
    return within, within + len(x) * float(np.square(mean - mean.mean()).sum())


def _ratio(squared_error: np.ndarray, total: float) -> np.ndarray:
    """Fraction of variance unexplained; of rows without variance 0 or infinity."""
    if total > 0:
        return squared_error / total
    return np.where(squared_error > 0, np.inf, 0.0)


def forget() -> None:
    """Let go of everything compiled here so far."""
    _sums_of_members.clear_cache()

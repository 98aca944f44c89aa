"""Where a pre-bias starts: the geometric median of the training rows."""

import numpy as np

from sae_jax.state import Normalizer

SAMPLE = 65_536  # rows at most that it is taken of, evenly spaced
ITERATIONS, TOLERANCE = 500, 1e-7
BLOCK = 8192


def geometric_median(rows: np.ndarray, normalizer: Normalizer | None) -> np.ndarray:
    """The point [d_in] of least summed distance to rows [rows, d_in], in the normalised space.

    Unlike the mean it is not drawn by outliers (Bricken et al. 2023 start the pre-bias there).
    Weiszfeld's iteration in the form of Vardi and Zhang (2000), which does not stop on a row it
    happens to meet, in float64. Rows: anything that is sliced; of more than SAMPLE, so many.

    Returns:
      In the dtype of the rows.
    """
    x = _sample(rows)
    if normalizer is not None:
        x = (x - normalizer.mean) / normalizer.scale
    point = np.median(x, axis=0)
    scale = np.linalg.norm(x.std(axis=0))
    for _ in range(ITERATIONS):
        moved = _weiszfeld(x, point)
        near = np.linalg.norm(moved - point) <= TOLERANCE * scale
        point = moved
        if near:
            break
    return point.astype(rows.dtype)


def _sample(rows: np.ndarray) -> np.ndarray:
    every = max(1, -(-len(rows) // SAMPLE))
    # A block a time, since rows may lie on disk; a multiple of the spacing, so that it stays even.
    block = every * max(1, BLOCK // every)
    parts = [
        np.asarray(rows[i : i + block][::every], np.float64) for i in range(0, len(rows), block)
    ]
    return np.concatenate(parts)


def _weiszfeld(x: np.ndarray, point: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(x - point, axis=1)
    here = distance == 0
    if here.all():
        return point
    weight = np.where(here, 0, 1 / np.where(here, 1, distance))
    target = weight @ x / weight.sum()
    if not here.any():
        return target
    pull = np.linalg.norm(weight @ (x - point))
    stay = min(1.0, here.sum() / pull) if pull > 0 else 1.0
    return (1 - stay) * target + stay * point

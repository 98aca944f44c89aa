"""Superpositions: which linear combination of latents is each variable (appendix A.2.3).

Least squares, exact and in float64, from sums over blocks of cells, so that neither the latents nor
the variables need to be held together; and, beside it, the linear layer trained by gradient descent
that the paper uses for its large simulation. Closed-form least squares is the most that any linear
readout can reach on the cells it is fitted to.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sae_jax import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A linear readout: prediction = z @ coefficients + intercept.

    Attributes:
      coefficients: superposition vectors [latents, variables].
      intercept: [variables].
      r2: coefficient of determination on the cells it was fitted to [variables] (equation 7); NaN
        for a variable that does not vary.
    """

    coefficients: np.ndarray
    intercept: np.ndarray
    r2: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sums over cells of latents z and variables y, float64, about a shift near their means.

    n: cells. shift_z [latents], shift_y [variables]. z [latents], y [variables]: sums. zz [latents,
    latents], zy [latents, variables]: sums of products; yy [variables]: of squares.
    """

    n: int
    shift_z: np.ndarray
    shift_y: np.ndarray
    z: np.ndarray
    y: np.ndarray
    zz: np.ndarray
    zy: np.ndarray
    yy: np.ndarray

    @classmethod
    def of(
        cls,
        blocks: Iterable[tuple[np.ndarray, np.ndarray]],
        shift: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Self:
        """Of blocks (z [cells, latents], y [cells, variables]), read once.

        `shift`: what is subtracted from z and y before squares are taken; None for the means of the
        first block. Any gives the same result but for rounding.

        Raises:
          InputError: no cells, or values that are not finite.
        """
        n, sums = 0, None
        for z, y in blocks:
            z, y = np.asarray(z, np.float64), np.asarray(y, np.float64)
            if not (np.isfinite(z).all() and np.isfinite(y).all()):
                raise InputError("latents and variables must be finite")
            if shift is None:
                shift = z.mean(axis=0), y.mean(axis=0)
            z, y = z - shift[0], y - shift[1]
            more = (z.sum(0), y.sum(0), z.T @ z, z.T @ y, np.einsum("nv,nv->v", y, y))
            n += len(z)
            sums = more if sums is None else tuple(a + b for a, b in zip(sums, more, strict=True))
        if sums is None or n == 0:
            raise InputError("no cells to fit")
        return cls(n, *shift, *sums)

    def centred(self) -> tuple[np.ndarray, ...]:
        """Means of z and of y, and centred zz, zy, yy."""
        z, y = self.z / self.n, self.y / self.n
        return (
            self.shift_z + z,
            self.shift_y + y,
            self.zz - self.n * np.outer(z, z),
            self.zy - self.n * np.outer(z, y),
            self.yy - self.n * y**2,
        )


def least_squares(moments: Moments, ridge: float = 0.0) -> Fit:
    """The readout of least squared error, with intercept; of least norm where latents repeat.

    Args:
      ridge: added to the variance of each latent, in its units squared; 0 for none.

    Raises:
      InputError: a negative ridge.
    """
    if not ridge >= 0:
        raise InputError(f"ridge={ridge} must be at least 0")
    mean_z, mean_y, zz, zy, _ = moments.centred()
    gram = zz + ridge * moments.n * np.eye(len(zz))
    # Relative to the largest; a gram matrix squares the condition number of the latents.
    coefficients = np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ zy
    intercept = mean_y - mean_z @ coefficients
    return Fit(coefficients, intercept, r2(moments, coefficients, intercept))


def r2(moments: Moments, coefficients: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """Equation 7 [variables] of a readout on the cells that `moments` are of; below 0 if it is
    worse than their mean, NaN for a variable that does not vary."""
    mean_z, mean_y, zz, zy, yy = moments.centred()
    off = mean_y - mean_z @ coefficients - intercept
    products = np.einsum("lv,lv->v", coefficients, zz @ coefficients - 2 * zy)
    error = np.maximum(yy + products + moments.n * off**2, 0)  # which rounding may leave below
    varies = yy > 1e-12 * moments.n * np.maximum(1, mean_y**2)
    return np.where(varies, 1 - error / np.where(varies, yy, 1), np.nan)


def by_group(values: np.ndarray, groups: Mapping[str, slice]) -> dict[str, float]:
    """The mean over the variables of each group, those that vary."""
    found = {name: values[..., where] for name, where in groups.items()}
    return {
        name: float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")
        for name, each in found.items()
    }


def gradient_descent(
    z: np.ndarray,
    y: np.ndarray,
    *,
    optimizer: Literal["sgd", "adam"] = "sgd",
    learning_rate: float = 1e-4,
    epochs: int = 100,
    batch_size: int = 128,
    seed: int = 0,
) -> Fit:
    """The paper's readout: a linear layer, mean squared error, float32.

    z [cells, latents], y [cells, variables]. The text has plain gradient descent ("sgd"), the
    authors' code Adam; both 1e-4 and 100 epochs. Neither converges where latents are small, which
    lowers R² for a reason that has nothing to do with superposition. The last partial batch of an
    epoch is left out. Weights start as torch's do: uniform in ±1/√latents.

    Raises:
      InputError: fewer cells than a batch, or another optimizer.
    """
    if len(z) < batch_size:
        raise InputError(f"batch_size={batch_size} is more than the {len(z)} cells")
    if optimizer not in ("sgd", "adam"):
        raise InputError(f"optimizer={optimizer!r} is neither sgd nor adam")
    found = _descend(
        jnp.asarray(z, jnp.float32), jnp.asarray(y, jnp.float32), jnp.float32(learning_rate),
        jax.random.key(seed), optimizer=optimizer, epochs=epochs, batch_size=batch_size,
    )  # fmt: skip
    weight, bias = (np.asarray(each, np.float64) for each in found)
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = r2(Moments.of([(z, y)]), weight, bias)
    return Fit(weight, bias, fitted)


@functools.partial(jax.jit, static_argnames=("optimizer", "epochs", "batch_size"))
def _descend(
    z: jax.Array,
    y: jax.Array,
    learning_rate: jax.Array,
    key: jax.Array,
    *,
    optimizer: str,
    epochs: int,
    batch_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Weight [latents, variables] and bias [variables]."""
    rule = optax.scale_by_adam() if optimizer == "adam" else optax.identity()
    bound = z.shape[1] ** -0.5
    of_weight, of_bias, of_order = jax.random.split(key, 3)
    uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    params = (uniform(of_weight, (z.shape[1], y.shape[1])), uniform(of_bias, (y.shape[1],)))
    steps = len(z) // batch_size

    def loss(params: tuple[jax.Array, jax.Array], rows: jax.Array) -> jax.Array:
        return jnp.mean((z[rows] @ params[0] + params[1][None, :] - y[rows]) ** 2)

    def step(carry: tuple, rows: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        updates, state = rule.update(jax.grad(loss)(params, rows), state)
        return (jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), state), None

    def epoch(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        order = jax.random.permutation(jax.random.fold_in(of_order, number), len(z))
        order = order[: steps * batch_size].reshape(steps, batch_size)
        return lax.scan(step, carry, order)[0], None

    with jax.default_matmul_precision("highest"):
        return lax.scan(epoch, (params, rule.init(params)), jnp.arange(epochs))[0][0]

"""Latents that say what others say: by their codes, and by their directions.

Both compare all pairs of latents as products of matrices, in blocks: the published loop over pairs
takes 14 minutes at 4000 latents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from sae_jax import ensemble, models
from sae_jax.config import Architecture
from sae_jax.metrics import pieces
from sae_jax.state import Hyperparams, Normalizer, Params
from sae_jax.streaming import Rows

ENTRIES = 2**24  # of a block of correlations, 64 MiB in float32
CONSTANT = 1e-6  # a latent that departs less from its mean, relatively, does not vary: rounding
BLOCK = 1024  # directions compared at a time

Member = tuple[Params, Hyperparams]


def redundant(
    params: Params,
    hyper: Hyperparams,
    x: np.ndarray | Rows,
    normalizer: Normalizer | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
    threshold: float = 0.95,
) -> np.ndarray:
    """Latents whose codes repeat an earlier latent's, bool [members, latents].

    Latent j is one if some i < j has a Pearson correlation of at least `threshold` with it over the
    rows x [rows, d_in] (Schuster, A.2.4); so one of every group is left. Latents that do not vary,
    dead ones among them, are none and make none. A member whose weights are not finite has none.
    """
    members, n = len(hyper.seed), architecture.n_latents
    size = max(1, min(n, ENTRIES // n))
    found = np.zeros((members, n), bool)
    static = {"architecture": architecture, "mesh": mesh}
    for first in range(0, members, mesh.size):  # one member a device: a block is large
        chosen = slice(first, first + mesh.size)
        some = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], (params, hyper))
        parts = functools.partial(_accumulated, some, x, normalizer, **static)
        mean = parts(_sums_of_codes) / len(x)
        mean = mean.astype(x.dtype)
        # In units of their means, whose squares neither overflow nor vanish.
        deviation = parts(_deviations, mean)
        varies = deviation > len(x) * CONSTANT**2
        for low in range(0, n, size):
            low = min(low, n - size)  # the last block overlaps: one compiled shape
            products = parts(_products, mean, np.full(len(mean), low), size=size)
            with np.errstate(invalid="ignore"):
                limit = threshold * np.sqrt(
                    deviation[:, :, None] * deviation[:, None, low : low + size]
                )
                high = (products >= limit) & varies[:, :, None]
            earlier = np.arange(n)[:, None] < np.arange(low, low + size)
            repeats = (high & earlier).any(axis=1) & varies[:, low : low + size]
            found[chosen, low : low + size] = repeats
    return found


def _accumulated(
    members: Member,
    x: np.ndarray | Rows,
    normalizer: Normalizer | None,
    function: object,
    *own: np.ndarray,
    **static: object,
) -> np.ndarray:
    """A sum over the batches of x, of each member and what is its own, in float64."""
    total: np.ndarray | float = 0.0
    for batches, counted in pieces(x):
        total = total + np.asarray(
            _of_members(members, own, batches, counted, normalizer, function=function, **static),
            np.float64,
        )
    return total


@functools.partial(jax.jit, static_argnames=("function", "architecture", "mesh", "size"))
def _of_members(
    members: Member,
    own: tuple[jax.Array, ...],
    batches: jax.Array,
    counted: jax.Array,
    normalizer: Normalizer | None,
    *,
    function: object,
    architecture: Architecture,
    mesh: Mesh,
    size: int = 0,
) -> jax.Array:
    def member(
        member: tuple[Member, tuple[jax.Array, ...]], batches: jax.Array, counted: jax.Array
    ) -> jax.Array:
        (params, hyper), own = member

        def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            z = models.encode(params, hyper, models.normalize(pair[0], normalizer), architecture)
            return total + function(z, pair[1], *own, size=size), None

        shape = jax.eval_shape(lambda: add(0, (batches[0], counted[0]))[0])
        zeros = jnp.zeros(shape.shape, shape.dtype)
        return lax.scan(add, zeros, (batches, counted))[0]

    with jax.default_matmul_precision("highest"):
        return ensemble.map_members(member, mesh)((members, own), batches, counted)


def _sums_of_codes(z: jax.Array, counted: jax.Array, *, size: int) -> jax.Array:
    return jnp.sum(jnp.where(counted[:, None], z, 0), axis=0)


def _deviations(z: jax.Array, counted: jax.Array, mean: jax.Array, *, size: int) -> jax.Array:
    return jnp.sum(_centred(z, counted, mean) ** 2, axis=0)


def _products(
    z: jax.Array, counted: jax.Array, mean: jax.Array, low: jax.Array, *, size: int
) -> jax.Array:
    """Of the centred codes of all latents with those of a block, [latents, size]."""
    centred = _centred(z, counted, mean)
    return centred.T @ lax.dynamic_slice_in_dim(centred, low, size, axis=1)


def _centred(z: jax.Array, counted: jax.Array, mean: jax.Array) -> jax.Array:
    """Relative to their means; those of latents that are dead are 0."""
    relative = (z - mean[None, :]) / jnp.where(mean > 0, mean, 1)[None, :]
    return jnp.where(counted[:, None], relative, 0)


@functools.partial(jax.jit, static_argnames="block")
def _largest_cosines(directions: jax.Array, counted: jax.Array, block: int) -> jax.Array:
    """ONE decoder [latents, d], latents a multiple of `block`; -inf where nothing compares."""
    n = len(directions)
    unit = models.unit_rows(directions)
    places = jnp.arange(n)

    def of_block(start: jax.Array) -> jax.Array:
        mine = lax.dynamic_slice_in_dim(unit, start, block)
        others = (start + jnp.arange(block))[:, None] != places[None, :]
        return jnp.max(jnp.where(others & counted[None, :], mine @ unit.T, -jnp.inf), axis=1)

    with jax.default_matmul_precision("highest"):
        return lax.map(of_block, jnp.arange(0, n, block)).reshape(n)


def max_decoder_cosine(decoder: np.ndarray, live: np.ndarray | None = None) -> np.ndarray:
    """The largest cosine of each latent's direction with another's.

    Args:
      decoder: [latents, d] or [members, latents, d].
      live: bool [latents] or [members, latents]: which count; None for all.

    Returns:
      [latents] or [members, latents]; NaN for those that do not count or have no other.
    """
    decoder = np.asarray(decoder)
    live = np.ones(decoder.shape[:-1], bool) if live is None else np.asarray(live)
    *leading, n, d = decoder.shape
    block = min(BLOCK, n)
    padded = -n % block
    found = []
    for one, counted in zip(decoder.reshape(-1, n, d), live.reshape(-1, n), strict=True):
        largest = np.abs(one).max(axis=1, keepdims=True)
        one = one / np.where(largest > 0, largest, 1)  # whose squares neither overflow nor vanish
        one, counted = np.pad(one, ((0, padded), (0, 0))), np.pad(counted, (0, padded))
        largest = np.array(_largest_cosines(one, counted, block))[:n]
        largest[~counted[:n] | np.isinf(largest)] = np.nan
        found.append(largest)
    return np.stack(found).reshape(*leading, n)

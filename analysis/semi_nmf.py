"""Semi-nonnegative matrix factorisation, Ding, Li and Jordan 2010, by multiplicative updates.

    X ~ Z F, Z >= 0        rows X [n, d] of any sign, codes Z [n, c], directions F [c, d]
    F = (Z'Z + r I)^-1 Z'X
    Z = Z * sqrt(((XF')+ + Z (FF')-) / ((XF')- + Z (FF')+)),   A+ = max(A, 0), A- = max(-A, 0)

The paper's F is that of r = 0; here r is a small constant, so that c > d and components that vanish
are well posed. Each of the two steps lowers |X - ZF|^2 + r |F|^2 or leaves it. Nothing asks for
sparse codes: with c > d most are above 0, and rows are reconstructed almost exactly.

To compare at equal sparsity, `fit_sparse` allows a row k codes above 0. Then Z is found by
non-negative orthogonal matching pursuit (Bruckstein, Elad and Zibulevsky 2008: k times the
direction along which most is left is added, and all codes so far are solved for again, not below
0), F by least squares as above. Pruning the multiplicative updates instead does not do: a row on
its own does not find the codes that it had in the fit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import linalg
from scipy import sparse as sparse_matrices
from scipy.linalg import solve
from sklearn.cluster import KMeans

from analysis.blocks import slices
from analysis.features import Matrix
from sae_jax import data
from sae_jax.errors import InputError

RIDGE = 1e-6  # r, as a share of the mean square of a code at the start
OFFSET = 0.2  # added to the cluster indicators that Z starts from (Ding et al., step S0)
ROWS = 1024  # encoded at a time: one compiled shape
SWEEPS = 8  # of coordinate descent, after each direction that is added
NOTHING = 1e-6  # a code that adds less than this of its row's norm is the update's slow way to 0


@dataclass(frozen=True, eq=False)
class SemiNMF:
    """A fitted factorisation; codes of new rows by the same update with F fixed.

    decoder: F [components, d].
    objective: |X - ZF|^2 + r |F|^2 after each iteration [iterations].
    converged: whether it still fell by less than the tolerance at the end.
    iterations: of `encode`.
    k: codes of a row that may be above 0; None: any number of them.
    """

    decoder: np.ndarray
    objective: np.ndarray
    converged: bool
    iterations: int
    k: int | None = None
    name: str = "semi-NMF"

    @property
    def n_components(self) -> int:
        """How many there are."""
        return len(self.decoder)

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [rows, components] of embedding rows x [rows, d], never negative.

        Every row starts from equal codes and gets the same number of updates, so its codes do not
        depend on the rows beside it. The problem is convex, and the update approaches its optimum,
        non-negative least squares, from the inside: codes that go to 0 get there in the limit.
        Those that add less than 1e-6 of the row's norm to its reconstruction are set to 0. With a k
        the codes are those of matching pursuit instead.
        """
        x = data.check_rows(x, "x", d_in=self.decoder.shape[1])
        if self.k is not None:
            z = _pursued(x, self.decoder.astype(x.dtype), self.k)
            return z if sparse else z.toarray()
        size = np.linalg.norm(self.decoder.astype(np.float64), axis=1)
        parts = []
        for rows in slices(len(x), ROWS):
            piece = np.zeros((ROWS, x.shape[1]), x.dtype)
            piece[: rows.stop - rows.start] = x[rows]
            z = np.array(_encode(piece, self.decoder.astype(x.dtype), self.iterations))
            norm = np.linalg.norm(piece.astype(np.float64), axis=1)
            z[z * size <= NOTHING * norm[:, None]] = 0
            z = z[: rows.stop - rows.start]
            parts.append(sparse_matrices.csr_matrix(z) if sparse else z)
        return sparse_matrices.vstack(parts, "csr") if sparse else np.concatenate(parts)

    def decode(self, z: Matrix) -> np.ndarray:
        """Reconstructions [rows, d] of codes z [rows, components]."""
        return z @ self.decoder


def fit(
    x: np.ndarray,
    n_components: int,
    *,
    iterations: int = 500,
    tolerance: float = 1e-5,
    ridge: float = RIDGE,
    seed: int = 0,
) -> SemiNMF:
    """Factorise rows x [rows, d]; Z starts from the indicators of k-means clusters, plus 0.2.

    Z and a few matrices of its size are held on the device: 4 bytes x rows x components each.

    Args:
        n_components: c, below or above d; at most the number of rows.
        iterations: at most; and, of `encode`, exactly.
        tolerance: it stops when an iteration lowers the objective by less than this share of it.
        ridge: r over the mean square of the codes at the start; 0 for the paper's F.
        seed: of k-means.

    Raises:
        InputError: rows that are not finite, or numbers out of their range.
    """
    x = data.check_rows(x, "x")
    if not 1 <= n_components <= len(x):
        raise InputError(f"n_components={n_components} must lie in 1 .. {len(x)}, the rows of x")
    if iterations < 1 or tolerance < 0 or ridge < 0:
        raise InputError(
            f"iterations={iterations} must be at least 1, tolerance={tolerance} and ridge={ridge} "
            "at least 0"
        )
    label = KMeans(n_components, n_init=1, random_state=seed).fit(x).labels_
    z = np.full((len(x), n_components), OFFSET, x.dtype)
    z[np.arange(len(x)), label] += 1
    r = ridge * float(np.square(z, dtype=np.float64).sum()) / n_components
    f, objective, done = _fit(x, z, r, tolerance, iterations)
    objective = np.asarray(objective)[: int(done)]
    if not np.isfinite(objective).all():
        raise InputError(f"the factorisation with ridge={ridge} is not finite: give a larger ridge")
    converged = len(objective) > 1 and bool(
        objective[-2] - objective[-1] <= tolerance * objective[-2]
    )
    return SemiNMF(np.asarray(f), objective, converged, iterations)


def fit_sparse(
    x: np.ndarray,
    n_components: int,
    k: int,
    *,
    iterations: int = 30,
    tolerance: float = 1e-3,
    ridge: float = RIDGE,
    seed: int = 0,
) -> SemiNMF:
    """Factorise rows x [rows, d] with at most k codes above 0 in each; F starts from k-means.

    A component that no row uses is set to a row that is reconstructed worst (as in K-SVD). Greedy
    codes do not always get better with F, so the F of the smallest error is kept.

    Args:
        n_components: c, below or above d; at most the number of rows.
        k: 1 .. c.
        iterations: at most. tolerance: it stops when one lowers the error by less than this share.
        ridge: r over the mean square of a component's codes.
        seed: of k-means.

    Returns:
        The factorisation; `objective` is |X - ZF|^2 of each F's own codes.

    Raises:
        InputError: rows that are not finite, or numbers out of their range.
    """
    x = data.check_rows(x, "x")
    if not 1 <= n_components <= len(x):
        raise InputError(f"n_components={n_components} must lie in 1 .. {len(x)}, the rows of x")
    if not 1 <= k <= n_components:
        raise InputError(f"k={k} must lie in 1 .. {n_components}, the components")
    if iterations < 1 or tolerance < 0 or ridge < 0:
        raise InputError(
            f"iterations={iterations} must be at least 1, tolerance={tolerance} and ridge={ridge} "
            "at least 0"
        )
    start = KMeans(n_components, n_init=1, random_state=seed).fit(x).cluster_centers_
    f = best = start.astype(x.dtype)
    errors: list[float] = []
    converged = False
    for _ in range(iterations):
        z = _pursued(x, f, k)
        left = np.square(x - z @ f, dtype=np.float64).sum(axis=1)
        errors.append(float(left.sum()))
        if errors[-1] == min(errors):
            best = f
        before = errors[-2] if len(errors) > 1 else np.inf
        converged = before - errors[-1] <= tolerance * before < np.inf
        if converged:
            break
        gram = (z.T @ z).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += max(ridge * np.trace(gram) / len(gram), 1e-300)
        f = solve(gram, z.T @ x, assume_a="pos").astype(x.dtype)
        unused = np.flatnonzero(z.getnnz(axis=0) == 0)
        f[unused] = x[np.argsort(-left, kind="stable")[: len(unused)]]
    return SemiNMF(best, np.array(errors), converged, iterations, k)


def _pursued(x: np.ndarray, f: np.ndarray, k: int) -> sparse_matrices.csr_matrix:
    """Codes of rows x [rows, d] by matching pursuit; a row's do not depend on the others."""
    parts = []
    for rows in slices(len(x), ROWS):
        piece = np.zeros((ROWS, x.shape[1]), x.dtype)
        piece[: rows.stop - rows.start] = x[rows]
        chosen, codes = (np.array(part)[: rows.stop - rows.start] for part in _pursue(piece, f, k))
        starts = np.arange(0, chosen.size + 1, k)
        shape = (len(chosen), len(f))
        part = sparse_matrices.csr_matrix((codes.ravel(), chosen.ravel(), starts), shape=shape)
        part.eliminate_zeros()
        part.sort_indices()
        parts.append(part)
    return sparse_matrices.vstack(parts, "csr")


@functools.partial(jax.jit, static_argnames="k")
def _pursue(x: jax.Array, f: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The components chosen and their codes, both [rows, k]."""
    size = jnp.linalg.norm(f, axis=1)
    size = jnp.where(size > 0, size, 1)
    unit, rows = f / size[:, None], jnp.arange(len(x))

    def add(step: jax.Array, state: tuple) -> tuple:
        chosen, z, rest = state
        there = jnp.where(jnp.arange(k) < step, -jnp.inf, 0).astype(x.dtype)
        gain = (rest @ unit.T).at[rows[:, None], chosen].add(there[None, :])
        chosen = chosen.at[:, step].set(jnp.argmax(gain, axis=1).astype(chosen.dtype))
        atoms = unit[chosen]

        def solve_one(i: jax.Array, state: tuple) -> tuple:
            z, rest = state
            at = i % (step + 1)
            atom = jax.lax.dynamic_index_in_dim(atoms, at, axis=1, keepdims=False)
            new = jnp.maximum(z[:, at] + jnp.sum(rest * atom, axis=1), 0)
            return z.at[:, at].set(new), rest + (z[:, at] - new)[:, None] * atom

        z, rest = jax.lax.fori_loop(0, SWEEPS * (step + 1), solve_one, (z, rest))
        return chosen, z, rest

    with jax.default_matmul_precision("highest"):
        start = (jnp.zeros((len(x), k), jnp.int32), jnp.zeros((len(x), k), x.dtype), x)
        chosen, z, _ = jax.lax.fori_loop(0, k, add, start)
    return chosen, z / size[chosen]


def _update(x: jax.Array, z: jax.Array, f: jax.Array) -> jax.Array:
    """The next Z. With G = FF', G+ = (|G| + G) / 2 and Z G = (Z F) F': one product with [c, c]."""
    gram = f @ f.T
    direct, crossed = z @ jnp.abs(gram), (z @ f) @ f.T
    towards = x @ f.T
    numerator = jnp.maximum(towards, 0) + (direct - crossed) / 2
    denominator = jnp.maximum(-towards, 0) + (direct + crossed) / 2
    numerator, denominator = jnp.maximum(numerator, 0), jnp.maximum(denominator, 0)  # rounding
    ratio = numerator / jnp.where(denominator > 0, denominator, 1)
    return z * jnp.where(denominator > 0, jnp.sqrt(ratio), 1)


def _directions(x: jax.Array, z: jax.Array, r: jax.Array) -> jax.Array:
    gram = z.T @ z + r * jnp.eye(z.shape[1], dtype=z.dtype)
    return linalg.cho_solve(linalg.cho_factor(gram), z.T @ x)


@functools.partial(jax.jit, static_argnames="iterations")
def _fit(
    x: jax.Array, z: jax.Array, r: jax.Array, tolerance: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F of the last Z, the objective after each iteration, and how many there were."""

    def goes_on(state: tuple) -> jax.Array:
        _, _, objective, i = state
        last, before = objective[i - 1], objective[i - 2]
        return (i < iterations) & ((i < 2) | (before - last > tolerance * before))

    def step(state: tuple) -> tuple:
        z, f, objective, i = state
        z = _update(x, z, f)
        f = _directions(x, z, r)
        value = jnp.sum((x - z @ f) ** 2) + r * jnp.sum(f**2)
        return z, f, objective.at[i].set(value), i + 1

    with jax.default_matmul_precision("highest"):
        objective = jnp.full(iterations, jnp.nan, x.dtype)
        start = (z, _directions(x, z, r), objective, 0)
        _, f, objective, done = jax.lax.while_loop(goes_on, step, start)
    return f, objective, done


@functools.partial(jax.jit, static_argnames="iterations")
def _encode(x: jax.Array, f: jax.Array, iterations: int) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        z = jnp.ones((len(x), len(f)), x.dtype)
        return jax.lax.fori_loop(0, iterations, lambda _, z: _update(x, z, f), z)

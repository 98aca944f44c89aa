"""Training of autoencoders: seeds side by side (vmap), a compiled program for a chunk of epochs."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from tqdm import tqdm

from experiments.simulation.autoencoder import AutoEncoder, Recipe
from sae_jax import InputError, files


class Fitted(NamedTuple):
    """Trained autoencoders of one architecture.

    models: one a seed. history: train_loss and validation_loss [seeds, epochs], mean squared errors
    of an epoch (of its batches as they were trained on, and after it), NaN once a seed has stopped.
    best_epoch: [seeds], from 0: that of the weights.
    """

    models: list[AutoEncoder]
    history: dict[str, np.ndarray]
    best_epoch: np.ndarray


class _State(NamedTuple):
    """Of ONE seed. waited: epochs since the lowest loss; stopped at `patience`."""

    params: Any
    moments: Any
    best: Any
    best_loss: jax.Array
    best_epoch: jax.Array
    waited: jax.Array


def fit(
    dims: Sequence[int],
    train: np.ndarray,
    validation: np.ndarray,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    weights: tuple[np.ndarray, np.ndarray] | None = None,
    readout: np.ndarray | None = None,
    rectified: bool = False,
    data_seed: int = 0,
    chunk: int = 500,
    progress: str | None = None,
) -> Fitted:
    """Train an autoencoder per seed; the order of cells is the same for all.

    Args:
      dims: see `AutoEncoder`.
      train, validation: cells [cells, dims[0]]; or, with `readout` M [hidden, dims[0]], their
        hidden variables [cells, hidden], of which each batch is made (Y = X'' M) when it is needed.
      weights: what each cell of train and of validation counts in the means, above 0. With all
        cells in a step, distinct ones with their numbers give the gradients of all.
      chunk: epochs in one compiled program, after which the host hears of it.
      progress: what to call the bar on stderr; None for none.

    Raises:
      InputError: rows that do not fit the dimensions, too few for a batch, or not finite.
    """
    n_in = (train if readout is None else readout).shape[1]
    if n_in != dims[0]:
        raise InputError(f"cells have {n_in} variables, the autoencoder takes {dims[0]}")
    if not (np.isfinite(train).all() and np.isfinite(validation).all()):
        raise InputError("cells must be finite")
    batch = recipe.batch_size or len(train)
    if not 1 <= batch <= len(train) or len(validation) < 1:
        raise InputError(
            f"batch_size={batch} of {len(train)} cells to train on and {len(validation)} held out"
        )

    if weights is None:
        weights = np.ones(len(train)), np.ones(len(validation))

    def create(seed: int) -> AutoEncoder:
        rngs = nnx.Rngs(seed)
        return AutoEncoder(dims, dropout=recipe.dropout, rectified=rectified, rngs=rngs)

    graph = nnx.split(create(0))[0]
    starts = [nnx.state(create(seed), nnx.Param) for seed in seeds]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    n = len(seeds)
    state = _State(
        params, jax.vmap(optax.scale_by_adam().init)(params), jax.tree.map(jnp.copy, params),
        jnp.full(n, jnp.inf, jnp.float32), jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.int32),
    )  # fmt: skip
    arrays = [
        tuple(jnp.asarray(each, jnp.float32) for each in pair)
        for pair in zip((train, validation), weights, strict=True)
    ]
    arrays.append(None if readout is None else jnp.asarray(readout, jnp.float32))
    rates = jnp.float32(recipe.learning_rate), jnp.float32(recipe.weight_decay)
    run = functools.partial(_epochs, graph=graph, batch=batch, patience=recipe.patience)
    losses = []
    with tqdm(total=recipe.epochs, unit=" epochs", desc=progress, disable=progress is None) as bar:
        done = 0
        while done < recipe.epochs:
            length = min(chunk, recipe.epochs - done)
            state, found = run(
                state, *arrays, rates, jnp.asarray(seeds), jnp.int32(data_seed), jnp.int32(done),
                length=length,
            )  # fmt: skip
            losses.append(jax.tree.map(np.asarray, found))
            done += length
            bar.update(length)
            bar.set_postfix(validation=f"{float(jnp.min(state.best_loss)):.3g}", refresh=False)
            if recipe.patience is not None and bool((state.waited >= recipe.patience).all()):
                break
    models = []
    for i in range(n):
        model = create(seeds[i])
        nnx.update(model, jax.tree.map(lambda leaf, i=i: leaf[i], state.best))
        models.append(model)
    history = {
        name: np.concatenate([chunk[k] for chunk in losses], axis=1)
        for k, name in enumerate(("train_loss", "validation_loss"))
    }
    return Fitted(models, history, np.asarray(state.best_epoch))


@functools.partial(
    jax.jit, static_argnames=("graph", "batch", "patience", "length"), donate_argnames=("states",)
)
def _epochs(
    states: _State,
    train: tuple[jax.Array, jax.Array],
    validation: tuple[jax.Array, jax.Array],
    readout: jax.Array | None,
    rates: tuple[jax.Array, jax.Array],
    seeds: jax.Array,
    data_seed: jax.Array,
    first: jax.Array,
    *,
    graph: Any,
    batch: int,
    patience: int | None,
    length: int,
) -> tuple[_State, tuple[jax.Array, jax.Array]]:
    """Epochs `first` .. `first + length` of all seeds; their two losses [seeds, length].

    train, validation: cells and their weights.
    """
    n = len(train[0])
    steps = n // batch
    learning_rate, weight_decay = rates
    rule = optax.chain(optax.add_decayed_weights(weight_decay), optax.scale_by_adam())

    def error(params: Any, cells: jax.Array, weights: jax.Array, key: Any = None) -> jax.Array:
        """Sum over cells of their weighted squared errors, each a mean over variables."""
        y = cells if readout is None else cells @ readout
        return weights @ jnp.mean((nnx.merge(graph, params)(y, key) - y) ** 2, axis=1)

    def loss(params: Any, cells: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array:
        return error(params, cells, weights, key) / jnp.sum(weights)

    def held_out(params: Any) -> jax.Array:
        pieces = jax.tree.map(
            lambda each: _pieces(each, min(batch, len(validation[0]))), validation
        )
        errors = lax.map(lambda piece: error(params, *piece), pieces)
        return jnp.sum(errors) / jnp.sum(validation[1])

    def of_seed(state: _State, seed: jax.Array) -> tuple[_State, tuple[jax.Array, jax.Array]]:
        def step(carry: tuple, number_and_rows: tuple) -> tuple[tuple, jax.Array]:
            params, moments = carry
            number, rows = number_and_rows
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), number)
            chosen = train if batch == n else jax.tree.map(lambda each: each[rows], train)
            value, grads = jax.value_and_grad(loss)(params, *chosen, key)
            updates, (_, moments) = rule.update(grads, (optax.EmptyState(), moments), params)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
            return (params, moments), value

        def epoch(state: _State, number: jax.Array) -> tuple[_State, tuple]:
            order = jnp.arange(n)
            if batch < n:  # a mean over all cells has no order
                key = jax.random.fold_in(jax.random.key(data_seed), number)
                order = jax.random.permutation(key, order)
            order = order[: steps * batch].reshape(steps, batch)
            numbers = number * steps + jnp.arange(steps)
            trained, values = lax.scan(step, (state.params, state.moments), (numbers, order))
            losses = jnp.mean(values), held_out(trained[0])
            better = (losses[1] < state.best_loss) if patience is not None else jnp.bool(True)
            fresh = _State(
                *trained,
                _where(better, trained[0], state.best),
                jnp.where(better, losses[1], state.best_loss),
                jnp.where(better, number, state.best_epoch),
                jnp.where(better, 0, state.waited + 1),
            )
            if patience is None:
                return fresh, losses
            stopped = state.waited >= patience
            shown = jax.tree.map(lambda each: jnp.where(stopped, jnp.nan, each), losses)
            return _where(stopped, state, fresh), shown

        return lax.scan(epoch, state, first + jnp.arange(length))

    return jax.vmap(of_seed)(states, seeds)


def _pieces(cells: jax.Array, size: int) -> jax.Array:
    """[pieces, size, ...], so that Y of all is never made at once; zeros, weights too, fill it."""
    pieces = -(-len(cells) // size)
    filled = [(0, pieces * size - len(cells)), *[(0, 0)] * (cells.ndim - 1)]
    return jnp.pad(cells, filled).reshape(pieces, size, *cells.shape[1:])


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def save(path: Path, fitted: Fitted) -> None:
    """Write `path`, an .npz: weights of every seed, losses and best epochs."""
    weights = {
        f"weights_{i}_{j}": np.asarray(leaf)
        for i, model in enumerate(fitted.models)
        for j, leaf in enumerate(jax.tree.leaves(nnx.state(model, nnx.Param)))
    }
    with files.write_aside(path) as fresh:
        np.savez(fresh, **weights, **fitted.history, best_epoch=fitted.best_epoch)


def load(path: Path, dims: Sequence[int], rectified: bool = False) -> Fitted:
    """What `save` wrote, of autoencoders of these dimensions.

    Raises:
      InputError: weights of other shapes.
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    models = []
    for i in range(len(arrays["best_epoch"])):
        model = AutoEncoder(dims, rectified=rectified, rngs=nnx.Rngs(0))
        leaves, form = jax.tree.flatten(nnx.state(model, nnx.Param))
        found = [arrays[f"weights_{i}_{j}"] for j in range(len(leaves))]
        if [leaf.shape for leaf in found] != [leaf.shape for leaf in leaves]:
            raise InputError(f"{path} holds an autoencoder of other dimensions than {list(dims)}")
        nnx.update(model, jax.tree.unflatten(form, [jnp.asarray(leaf) for leaf in found]))
        models.append(model)
    history = {name: arrays[name] for name in ("train_loss", "validation_loss")}
    return Fitted(models, history, arrays["best_epoch"])

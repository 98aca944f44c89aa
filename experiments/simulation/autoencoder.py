"""The autoencoders whose latents the dictionaries are trained on, and their training.

Architectures: Schuster, appendix A.2.2 and tables S2, S3; layers as in the authors' code: Linear,
dropout, ReLU for hidden ones, a plain Linear to the latents. Seeds train side by side (vmap), a
chunk of epochs in one compiled program.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from tqdm import tqdm

from sae_jax import InputError

SEEDS = (0, 42, 9307)  # of the large simulation (Table S3)
DEPTHS, LATENTS, WIDTHS = (2, 4, 6), (20, 100, 150, 1000), ("narrow", "wide")


class AutoEncoder(nnx.Module):
    """Mirrored encoder and decoder.

    Args:
      dims: of the input, every hidden layer and the latents, at least two numbers.
      dropout: share of hidden units set to zero while training, in [0, 1).
      rectified: ReLU on the output, as the small simulation's decoder has (counts are at least 0).
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        dropout: float = 0.0,
        rectified: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.encoder = nnx.List(_layers(dims, rngs))
        self.decoder = nnx.List(_layers(dims[::-1], rngs))
        self.dropout = nnx.Dropout(dropout)
        self.rectified = rectified

    def encode(self, y: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Latents [cells, latents] of y [cells, variables]; `key` of the dropout, None for none."""
        return self._run(self.encoder, y, key)

    def decode(self, z: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Reconstructions [cells, variables] of latents z [cells, latents]."""
        y = self._run(self.decoder, z, key)
        return jax.nn.relu(y) if self.rectified else y

    def __call__(self, y: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Reconstructions [cells, variables]."""
        keys = (None, None) if key is None else jax.random.split(key)
        return self.decode(self.encode(y, keys[0]), keys[1])

    def _run(self, layers: Sequence[nnx.Linear], x: jax.Array, key: jax.Array | None) -> jax.Array:
        *hidden, last = layers
        for number, layer in enumerate(hidden):
            x = layer(x)
            if key is not None and self.dropout.rate:
                x = self.dropout(
                    x, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.fold_in(key, number))
                )
            x = jax.nn.relu(x)
        return last(x)


def _layers(dims: Sequence[int], rngs: nnx.Rngs) -> list[nnx.Linear]:
    """Linear layers that start as torch's: weights and biases uniform in ±1/√inputs."""

    def uniform(bound: float) -> Callable[..., jax.Array]:
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)

    return [
        nnx.Linear(
            n_in, n_out, kernel_init=uniform(n_in**-0.5), bias_init=uniform(n_in**-0.5), rngs=rngs
        )
        for n_in, n_out in itertools.pairwise(dims)
    ]


def dims(
    genes: int,
    latents: int,
    depth: int,
    width: Literal["narrow", "wide"],
    variant: Literal["text", "code"] = "code",
) -> list[int]:
    """Dimensions of an encoder of the large simulation, from the genes to the latents (A.2.2).

    "narrow": hidden layers [max(1000, 2 d), max(150, 2 d), ...], at depth 2 only max(150, 2 d).
    "wide": equidistant from the genes to d; the authors' code starts from half of them, which is
    where the 5075 hidden units of appendix A.2.5 come from.

    Raises:
      InputError: a depth below 2, or an unknown width.
    """
    if depth < 2:
        raise InputError(f"depth={depth} must be at least 2")
    if width == "narrow":
        rest = max(150, 2 * latents)
        hidden = [rest] if depth == 2 else [max(1000, 2 * latents), *[rest] * (depth - 2)]
    elif width == "wide":
        first = int(0.5 * genes) if variant == "code" else genes
        hidden = [int(each) for each in np.linspace(latents, first, depth + 1)[::-1][1:-1]]
    else:
        raise InputError(f"width={width!r} is neither narrow nor wide")
    return [genes, *hidden, latents]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an autoencoder is trained: Adam on the mean squared error.

    Attributes:
      learning_rate, weight_decay: of Adam, the decay added to the gradient as in torch's Adam.
      batch_size: cells a step; None for all of them. The last partial batch is left out.
      dropout: see `AutoEncoder`.
      epochs: at most.
      patience: epochs without a lower validation loss after which a seed stops; None: never. The
        weights of the lowest validation loss are kept with patience, else the last.
    """

    learning_rate: float = 1e-4
    batch_size: int | None = 128
    weight_decay: float = 0.0
    dropout: float = 0.0
    epochs: int = 10_000
    patience: int | None = 20


SMALL = Recipe(batch_size=None, epochs=20_000, patience=None)  # as in the code; S3 says batch 1
# Table S2: latents, depth, width -> learning rate, weight decay, batch size. No dropout in any.
_S2 = {
    (20, 2, "narrow"): (1e-4, 1e-3, 128), (20, 2, "wide"): (1e-5, 1e-3, 128),
    (20, 4, "narrow"): (1e-4, 0, 128), (20, 4, "wide"): (1e-5, 1e-5, 128),
    (20, 6, "narrow"): (1e-5, 1e-5, 128), (20, 6, "wide"): (1e-6, 1e-5, 512),
    (100, 2, "narrow"): (1e-4, 1e-5, 128), (100, 2, "wide"): (1e-5, 1e-5, 128),
    (100, 4, "narrow"): (1e-4, 1e-7, 128), (100, 4, "wide"): (1e-5, 1e-5, 128),
    (150, 2, "narrow"): (1e-4, 1e-5, 128), (150, 2, "wide"): (1e-5, 1e-5, 128),
    (150, 4, "narrow"): (1e-4, 1e-7, 128), (150, 4, "wide"): (1e-5, 1e-5, 128),
    (150, 6, "narrow"): (1e-4, 1e-5, 512), (150, 6, "wide"): (1e-5, 0.1, 256),
    (1000, 2, "narrow"): (1e-5, 1e-5, 128), (1000, 2, "wide"): (1e-5, 1e-5, 128),
    (1000, 4, "narrow"): (1e-4, 0, 128), (1000, 4, "wide"): (1e-5, 1e-7, 128),
    (1000, 6, "narrow"): (1e-6, 0, 512), (1000, 6, "wide"): (1e-5, 1e-7, 512),
}  # fmt: skip
RECIPES = {
    name: Recipe(learning_rate=rate, weight_decay=decay, batch_size=batch)
    for name, (rate, decay, batch) in _S2.items()
}


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
        jnp.full(n, jnp.inf), jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.int32),
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
        pieces = jax.tree.map(lambda each: _pieces(each, batch), validation)
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


def _pieces(rows: jax.Array, size: int) -> jax.Array:
    """[pieces, rows, ...] of equal size, at most `size`: so that Y of all is never made at once."""
    pieces = next(k for k in range(-(-len(rows) // size), len(rows) + 1) if len(rows) % k == 0)
    return rows.reshape(pieces, -1, *rows.shape[1:])


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def latents(model: AutoEncoder, cells: np.ndarray) -> np.ndarray:
    """Latents [cells, latents] of cells [cells, variables], without dropout, float32."""
    return np.asarray(_encode(model, jnp.asarray(cells, jnp.float32)))


@nnx.jit
def _encode(model: AutoEncoder, cells: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return model.encode(cells)

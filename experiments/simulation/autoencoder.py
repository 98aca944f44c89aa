"""The autoencoders whose latents the dictionaries are trained on; `fitting` trains them.

Architectures and hyperparameters: Schuster, appendix A.2.2 and tables S2, S3; layers as in the
authors' code: Linear, dropout, ReLU for hidden ones, a plain Linear to the latents.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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


def latents(model: AutoEncoder, cells: np.ndarray) -> np.ndarray:
    """Latents [cells, latents] of cells [cells, variables], without dropout, float32."""
    return np.asarray(_encode(model, jnp.asarray(cells, jnp.float32)))


@nnx.jit
def _encode(model: AutoEncoder, cells: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return model.encode(cells)

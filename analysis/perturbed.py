"""Codes of cells in which some genes have other values, by whatever way the model offers.

Three ways, from the general to the fast; all give the same numbers:
- any object that embeds is given an AnnData of the perturbed cells;
- a model whose `swaps` exchanges tokens builds the perturbed sequences itself, with the bins or
  ranks that an AnnData could not hold still;
- a model whose `swaps` gives its encoder in arrays starts from the first layer's output of the
  cell as it is: another value of gene g adds W[:, g] (f(v') - f(v)), so that the genes cost
  nothing, and the rest of the encoder and the dictionary run in one JAX program.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy import sparse

from analysis import chunked
from analysis.blocks import slices
from analysis.features import Matrix
from sae_jax import Dictionary, models
from sae_jax.config import Architecture
from sae_jax.errors import InputError
from sae_jax.state import Params, hyperparams

ROWS = 256  # what a compiled program takes at once; the rest of the last piece is padding
FEW = 4  # concepts of a top-k up to which their ranks are counted, instead of finding the k-th
BYTES = 2**27  # of dense perturbed cells at once
CELLS = 4096  # given at once to a model out of a file
NEURONS = "neurons"


class Embedder(Protocol):
    """A model: whatever embeds cells. May have a method `swaps`, as extract's readers do."""

    def embed(self, adata: anndata.AnnData, **options: Any) -> Any:
        """Rows [cells, d], or a mapping with one such, under the name of its layer."""


class Coder(Protocol):
    """A dictionary: `sae_jax.Dictionary`, a baseline, `analysis.neurons.Neurons`."""

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [rows, latents] of embedding rows x [rows, d]; each row's on its own."""


class Perturbed(Protocol):
    """Some cells of a model with a dictionary; their genes can be given other values.

    Attributes:
      genes: names.
      values: of the cells as they are, CSR float64 [cells, genes].
      score: the dictionary.
    """

    genes: list[str]
    values: sparse.csr_array
    score: Score

    def seen(self, cell: int, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What the model sees of the value of each gene in a cell: equal numbers, equal codes."""

    def codes(
        self, cells: np.ndarray, starts: np.ndarray, genes: np.ndarray, values: np.ndarray,
        concepts: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """Codes [rows, concepts] of cells [rows], positions in `values`, after exchanges.

        Row i takes entries starts[i] .. starts[i + 1] of `genes` and `values`.
        """


def perturbed(
    model: Embedder,
    dictionary: Coder | str,
    adata: anndata.AnnData,
    cells: np.ndarray,
    options: Mapping[str, Any] | None = None,
    exchange: Mapping[str, Any] | None = None,
) -> Perturbed:
    """Some cells, ready to be perturbed in the fastest way that the model offers.

    Args:
        model: see `Embedder`.
        dictionary: see `Coder`; "neurons" are the embedding's own dimensions.
        cells: positions in `adata`, int64.
        options: of `embed`: layers, pooling, genes, counts and the model's own preprocessing.
        exchange: of `swaps` alone: `bins` of scGPT.

    Raises:
        InputError: whatever the model refuses; an `exchange` for a model without `swaps`.
    """
    score = Score(dictionary)
    if (swaps := getattr(model, "swaps", None)) is None:
        if exchange:
            raise InputError(f"this model has no `swaps`, so no {', '.join(exchange)} can be given")
        return AnyModel(model, score, adata, cells, options or {})
    found = swaps(adata, cells, **(options or {}), **(exchange or {}))
    return Linear(found, score) if hasattr(found, "encoder") else Tokens(found, score)


def embed(
    model: Embedder, adata: anndata.AnnData, options: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Rows [cells, d] of the one layer that the options name.

    Of an AnnData in a file or of dask arrays a model without `swaps`, of which each cell's rows are
    its own, is given some cells at a time; one with `swaps` reads them so itself.

    Raises:
        InputError: several layers, or another number of rows than cells.
    """
    if not in_memory(adata) and not hasattr(model, "swaps"):
        parts = slices(adata.n_obs, CELLS)
        return np.concatenate([embed(model, _read(adata, rows), options) for rows in parts])
    found = model.embed(adata, **(options or {}))
    if isinstance(found, Mapping):
        if len(found) != 1:
            raise InputError(f"the model gave layers {list(found)}: name one of them by `layers`.")
        (found,) = found.values()
    rows = np.asarray(found)
    if rows.ndim != 2 or len(rows) != adata.n_obs or not np.isfinite(rows).all():
        raise InputError(
            f"the model gave {rows.shape} for {adata.n_obs} cells: one row of finite numbers for "
            "each cell is wanted."
        )
    return rows


def in_memory(adata: anndata.AnnData) -> bool:
    """Whether it is: not in a file, nor of dask arrays or a lazy obs."""
    matrices = [adata.X, *adata.layers.values()] if not adata.isbacked else []
    return not (
        adata.isbacked
        or any(map(chunked.is_dask, matrices))
        or not isinstance(adata.obs, pd.DataFrame)
    )


def _read(adata: anndata.AnnData, rows: slice | np.ndarray) -> anndata.AnnData:
    """Some cells in memory. `to_memory` would close the file, for all who read it."""
    some = adata[rows]
    if not adata.isbacked:
        return some.to_memory()
    copies = {
        name: {key: value.copy() for key, value in getattr(some, name).items()}
        for name in ("obsm", "varm", "layers")
    }
    found = anndata.AnnData(some.X, some.obs.copy(), some.var.copy(), adata.uns, **copies)
    if adata.raw is not None:
        found.raw = anndata.AnnData(some.raw.X, some.obs.copy(), some.raw.var.copy())
    return found


class Score:
    """Codes of some latents alone, from embedding rows."""

    def __init__(self, dictionary: Coder | str) -> None:
        if isinstance(dictionary, str) and dictionary != NEURONS:
            raise InputError(f"dictionary={dictionary!r}: give a dictionary, or {NEURONS!r}.")
        self.dictionary = dictionary
        self.fused: tuple[Any, ...] | None = None
        self.architecture: Architecture | None = None
        if isinstance(dictionary, Dictionary):
            self.architecture = dictionary.config.architecture
            self.fused = (
                jax.tree.map(jnp.asarray, dictionary.params),
                hyperparams(dictionary.config, np.float32),
                dictionary.normalizer,
            )

    def encode(self, x: np.ndarray) -> Matrix:
        """All codes [rows, latents], sparse where that is what the dictionary gives."""
        if isinstance(self.dictionary, str):
            return np.asarray(x)
        return self.dictionary.encode(np.asarray(x), sparse=True)

    def __call__(self, x: np.ndarray, concepts: np.ndarray) -> np.ndarray:
        """Codes [rows, concepts]."""
        if self.fused is None:
            codes = x if isinstance(self.dictionary, str) else self.dictionary.encode(x)
            return np.asarray(codes)[:, concepts]
        padded, parts = _padded(concepts), []
        for rows in slices(len(x), ROWS):
            piece = _filled(np.asarray(x[rows], np.float32))
            codes = _score(*self.fused, piece, padded, architecture=self.architecture)
            parts.append(np.asarray(codes)[: rows.stop - rows.start, : len(concepts)])
        return np.concatenate(parts)


class AnyModel:
    """`Perturbed` by `embed` alone: the columns of an AnnData are the genes.

    The perturbed cells keep their obs and have names of their own. Of matrices only the one that is
    perturbed goes with them, X or the layer that `counts` names.
    """

    def __init__(
        self, model: Embedder, score: Score, adata: anndata.AnnData, cells: np.ndarray,
        options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._layer = options.get("counts")
        if self._layer == "raw" or (self._layer is not None and self._layer not in adata.layers):
            raise InputError(f"counts={self._layer!r}: genes are exchanged in X or in a layer.")
        if not in_memory(adata):  # these cells alone are
            adata, cells = _read(adata, cells), np.arange(len(cells))
        matrix = adata.X if self._layer is None else adata.layers[self._layer]
        if matrix is None:
            raise InputError("the AnnData has no X: name the layer to exchange genes in by counts.")
        some = matrix[cells]
        self._model, self.score, self._options = model, score, options
        self._dtype, self._sparse = some.dtype, sparse.issparse(some)
        self._obs, self._var = adata.obs.iloc[cells], adata.var
        names = adata.var_names if (column := options.get("genes")) is None else adata.var[column]
        self.genes = [str(name) for name in names]
        self.values = sparse.csr_array(some).astype(np.float64)
        self.values.sum_duplicates()
        self.values.eliminate_zeros()

    def seen(self, cell: int, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """See `Perturbed`: the value itself."""
        return values

    def codes(
        self, cells: np.ndarray, starts: np.ndarray, genes: np.ndarray, values: np.ndarray,
        concepts: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """See `Perturbed`."""
        parts = []
        for rows in slices(len(cells), max(1, BYTES // (8 * max(1, len(self.genes))))):
            some = cells[rows]
            dense = self.values[some].toarray()
            entries = slice(starts[rows.start], starts[rows.stop])
            row = np.repeat(np.arange(len(some)), np.diff(starts[rows.start : rows.stop + 1]))
            dense[row, genes[entries]] = values[entries]
            embedded = embed(self._model, self._adata(dense, some, rows.start), self._options)
            parts.append(self.score(embedded, concepts))
        return np.concatenate(parts)

    def _adata(self, dense: np.ndarray, cells: np.ndarray, first: int) -> anndata.AnnData:
        obs = self._obs.iloc[cells].copy()
        obs.index = [f"{name}/{first + i}" for i, name in enumerate(obs.index)]
        x = dense.astype(self._dtype)
        x = sparse.csr_matrix(x) if self._sparse else x
        if self._layer is None:
            return anndata.AnnData(x, obs, self._var)
        return anndata.AnnData(None, obs, self._var, layers={self._layer: x})


class Tokens:
    """`Perturbed` by a model that exchanges tokens: extract's scGPT and Geneformer."""

    def __init__(self, swaps: Any, score: Score) -> None:
        self.swaps, self.score = swaps, score
        self.genes, self.values = swaps.genes, sparse.csr_array(swaps.values)
        self.seen = swaps.seen

    def codes(
        self, cells: np.ndarray, starts: np.ndarray, genes: np.ndarray, values: np.ndarray,
        concepts: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """See `Perturbed`."""
        return self.score(self.swaps.embed(cells, starts, genes, values), concepts)


class Linear:
    """`Perturbed` by an encoder whose first layer is linear, in arrays: extract's scVI.

    Attributes:
      inputs: of the first layer, CSR float64 [cells, genes]; batch: rows of later biases [cells].
      first, first64: its weights [genes, hidden]; bias: what it adds, batch included [cells,
        hidden]; start: its outputs, float64 [cells, hidden].
      rest: weights and biases of the other layers; layer_norm: as extract's `Encoder`.
    """

    def __init__(self, swaps: Any, score: Score) -> None:
        encoder = swaps.encoder
        self.score, self.batch = score, np.asarray(swaps.batch, np.int32)
        self.genes, self.values = swaps.genes, sparse.csr_array(swaps.values)
        self._log1p, self.layer_norm = encoder.log1p, encoder.layer_norm
        first = encoder.weights[0].T.astype(np.float64)  # [genes, hidden]
        self.inputs = self.values.log1p() if encoder.log1p else self.values
        self.first64, self.bias = first, encoder.biases[0][self.batch]
        self.start = self.inputs @ first + self.bias
        rest = [(w.T, b) for w, b in zip(encoder.weights[1:], encoder.biases[1:], strict=True)]
        self.first, self.rest = jax.tree.map(jnp.asarray, (encoder.weights[0].T, rest))

    def seen(self, cell: int, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """See `Perturbed`: the value itself."""
        return values

    def codes(
        self, cells: np.ndarray, starts: np.ndarray, genes: np.ndarray, values: np.ndarray,
        concepts: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """See `Perturbed`."""
        some, row = np.unique(np.repeat(cells, np.diff(starts)), return_inverse=True)
        delta = np.log1p(values) if self._log1p else values
        delta = delta - self.inputs[some].toarray()[row, genes]
        single = len(genes) == len(cells) and bool((np.diff(starts) == 1).all())
        start = self.start[cells]
        if not single:
            shape = (len(cells), len(self.genes))
            start = start + sparse.csr_array((delta, genes, starts), shape=shape) @ self.first64
        fused, padded, parts = self.score.fused, _padded(concepts), []
        for rows in slices(len(cells), ROWS):
            swap = (genes[rows].astype(np.int32), delta[rows].astype(np.float32))
            found = np.asarray(
                _vectors(
                    self.first, self.rest, _filled(start[rows].astype(np.float32)),
                    tuple(_filled(part) for part in swap) if single else None,
                    _filled(self.batch[cells[rows]]), fused, padded,
                    layer_norm=self.layer_norm, architecture=self.score.architecture,
                )
            )[: rows.stop - rows.start]  # fmt: skip
            codes = self.score(found, concepts) if fused is None else found[:, : len(concepts)]
            parts.append(codes)
        return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("layer_norm", "architecture"))
def _vectors(
    first: jax.Array,
    rest: list[tuple[jax.Array, jax.Array]],
    start: jax.Array,
    swap: tuple[jax.Array, jax.Array] | None,
    batch: jax.Array,
    coder: tuple[Any, ...] | None,
    concepts: jax.Array,
    *,
    layer_norm: tuple[float | None, ...],
    architecture: Architecture | None,
) -> jax.Array:
    """Codes [rows, concepts], or latents [rows, d] without a coder, of first-layer outputs.

    `start` [rows, hidden] are those of the cells as they are; `swap` says which gene [rows] has how
    much more of the encoder's input [rows].
    """
    with jax.default_matmul_precision("highest"):
        hidden = start if swap is None else start + first[swap[0]] * swap[1][:, None]
        rows = encode_rest(rest, hidden, batch, layer_norm)
        return rows if coder is None else codes_of(*coder, rows, concepts, architecture)


def encode_rest(
    rest: list[tuple[jax.Array, jax.Array]],
    hidden: jax.Array,
    batch: jax.Array,
    layer_norm: tuple[float | None, ...],
) -> jax.Array:
    """Latents [rows, d] of the first layer's outputs [rows, hidden], of batches [rows]."""
    for (weight, bias), epsilon in zip(rest, layer_norm, strict=True):
        if epsilon is not None:
            centred = hidden - hidden.mean(axis=1, keepdims=True)
            hidden = centred / jnp.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon)
        hidden = jax.nn.relu(hidden) @ weight + bias[batch]
    return hidden


def codes_of(
    params: Params,
    hyper: Any,
    normalizer: Any,
    rows: jax.Array,
    concepts: jax.Array,
    architecture: Architecture,
) -> jax.Array:
    """Codes [rows, concepts] of embedding rows [rows, d]; others are computed only if they must."""
    x = models.normalize(rows, normalizer)
    if architecture.activation == "topk":  # a code depends on the row's others
        if len(concepts) > FEW:
            return models.encode(params, hyper, x, architecture)[:, concepts]
        # Of the k largest, ties with the k-th included, are those that fewer than k exceed.
        every = jax.nn.relu(models.pre_activations(params, x, architecture))
        wanted = every[:, concepts]
        above = (every[:, None, :] > wanted[:, :, None]).sum(axis=2)
        return jnp.where(above < hyper.k, wanted, 0)
    n_latents = params.encoder.shape[1]

    def of_concepts(part: jax.Array | None) -> jax.Array | None:
        return part[concepts] if part is not None and part.shape == (n_latents,) else part

    some = params.replace(
        encoder=params.encoder[:, concepts],
        encoder_bias=params.encoder_bias[concepts],
        log_threshold=of_concepts(params.log_threshold),
        magnitude_gain=of_concepts(params.magnitude_gain),
        magnitude_bias=of_concepts(params.magnitude_bias),
    )
    return models.encode(some, hyper, x, architecture)


@functools.partial(jax.jit, static_argnames="architecture")
def _score(
    params: Params,
    hyper: Any,
    normalizer: Any,
    rows: jax.Array,
    concepts: jax.Array,
    *,
    architecture: Architecture,
) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return codes_of(params, hyper, normalizer, rows, concepts, architecture)


def _filled(rows: np.ndarray) -> np.ndarray:
    """Rows with zeros after them, so that programs are compiled for one shape."""
    return np.concatenate([rows, np.zeros((ROWS - len(rows), *rows.shape[1:]), rows.dtype)])


def _padded(concepts: np.ndarray) -> np.ndarray:
    """The first one again and again, up to a power of four, for the same reason."""
    size = next(4**i for i in itertools.count() if 4**i >= len(concepts))
    found = np.full(size, concepts[0], np.int32)
    found[: len(concepts)] = concepts
    return found

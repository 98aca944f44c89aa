"""A trained dictionary: encode, decode, save, load."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import scipy.sparse

from sae_jax import data, files, models
from sae_jax.config import Architecture, SAEConfig
from sae_jax.errors import InputError
from sae_jax.state import Hyperparams, Normalizer, Params, hyperparams

FORMAT_VERSION = 1
ROWS_AT_A_TIME = 1024  # one compiled shape; short pieces are padded to it

# Names on disk are those that SAELens' readers know: rows times matrices.
_TENSORS = {
    "encoder": "W_enc",
    "encoder_bias": "b_enc",
    "decoder": "W_dec",
    "decoder_bias": "b_dec",
    "pre_bias": "b_pre",
}
_CFG_TYPES = {"format_version": int, "dtype": str, "config": dict, "provenance": dict}


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """Latents of an embedding, and what they were trained with.

    Attributes:
      config: the configuration it was trained by.
      params: NumPy arrays: encoder [d_in, latents], encoder_bias [latents], decoder [latents,
        d_in], decoder_bias and pre_bias [d_in] or None.
      normalizer: statistics of the rows it was trained on, or None; `encode` applies them and
        `decode` undoes them, so both speak in the embedding's own units.
      provenance: what else is known, in JSON's types: rows, epochs, data_seed, versions, ...

    Example:
      >>> dictionary = Dictionary.load("run/dictionaries/0003")  # doctest: +SKIP
      >>> z = dictionary.encode(embedding, sparse=True)  # doctest: +SKIP
    """

    config: SAEConfig
    params: Params
    normalizer: Normalizer | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, x: np.ndarray, sparse: bool = False) -> np.ndarray | scipy.sparse.csr_matrix:
        """Codes [rows, latents] of embedding rows x [rows, d_in].

        Args:
          x: raw rows, as the embedding gave them; normalisation is done here.
          sparse: CSR instead of a dense array; 56,000 rows of 10,000 latents are 2.2 GB dense.

        Raises:
          InputError: another width than d_in, or NaN or infinite values.
        """
        x = data.check_rows(x, "x", d_in=self.config.d_in)
        run = functools.partial(
            _encode,
            jax.tree.map(jnp.asarray, self.params),
            hyperparams(self.config, x.dtype),
            self.normalizer,
            architecture=self.config.architecture,
        )
        if sparse:
            pieces = [scipy.sparse.csr_matrix(piece) for piece in _piecewise(run, x)]
            return scipy.sparse.vstack(pieces, "csr")
        return np.concatenate(list(_piecewise(run, x)))

    def decode(self, z: np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix) -> np.ndarray:
        """Reconstructions [rows, d_in] of codes z [rows, latents], dense or sparse.

        Raises:
          InputError: another width than n_latents, or NaN or infinite values.
        """
        if scipy.sparse.issparse(z):
            z = z.tocsr()
            bad = np.flatnonzero(~np.isfinite(z.data))
            if len(bad):
                rows = np.searchsorted(z.indptr, bad, side="right") - 1
                raise data.not_finite("z", rows, z.shape[0])
            pieces = [
                self.decode(z[i : i + ROWS_AT_A_TIME].toarray())
                for i in range(0, z.shape[0], ROWS_AT_A_TIME)
            ]
            return np.concatenate(pieces or [self.decode(z.toarray())])
        z = data.check_rows(z, "z")
        if z.shape[1] != self.config.n_latents:
            raise InputError(
                f"z has {z.shape[1]} columns, the dictionary has {self.config.n_latents} latents"
            )
        run = functools.partial(_decode, jax.tree.map(jnp.asarray, self.params), self.normalizer)
        return np.concatenate(list(_piecewise(run, z)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: cfg.json and sae_weights.safetensors.

        Raises:
          InputError: `path` exists.
        """
        if Path(path).exists():
            raise InputError(f"{path} exists; a dictionary is saved to a new folder")
        tensors = {name: getattr(self.params, field) for field, name in _TENSORS.items()}
        if self.normalizer is not None:
            tensors |= {"input_mean": self.normalizer.mean, "input_scale": self.normalizer.scale}
        tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}
        cfg = {
            "format": "sae_jax.Dictionary",
            "format_version": FORMAT_VERSION,
            "d_in": self.config.d_in,
            "d_sae": self.config.n_latents,
            "dtype": str(tensors["W_enc"].dtype),
            "config": self.config.to_dict(),
            "provenance": self.provenance,
        }
        with files.write_aside(path) as folder:
            folder.mkdir()
            text = json.dumps(cfg, indent=1, allow_nan=False)
            (folder / "cfg.json").write_text(text + "\n")
            safetensors.numpy.save_file(tensors, folder / "sae_weights.safetensors")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a folder that `save` wrote. Encoding with it is bit-identical.

        Raises:
          InputError: not such a folder, a newer format, a damaged file, or tensors that are missing
            or of other shapes than cfg.json says.
        """
        path = Path(path)
        for name in ("cfg.json", "sae_weights.safetensors"):
            if not (path / name).is_file():
                raise InputError(f"{path} holds no saved dictionary: {path / name} is missing")
        try:
            cfg = json.loads((path / "cfg.json").read_text())
            tensors = safetensors.numpy.load_file(path / "sae_weights.safetensors")
        except (json.JSONDecodeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} holds a damaged dictionary: {error}") from None
        if not isinstance(cfg, dict) or cfg.get("format") != "sae_jax.Dictionary":
            raise InputError(f"{path / 'cfg.json'} was not written by sae_jax")
        for key, kind in _CFG_TYPES.items():
            if not isinstance(cfg.get(key), kind):
                raise InputError(f"{path / 'cfg.json'} is damaged: {key} is {cfg.get(key)!r}")
        if cfg["format_version"] > FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {cfg['format_version']}, this sae_jax reads up to "
                f"{FORMAT_VERSION}: update it"
            )
        config = SAEConfig.from_dict(cfg["config"])
        _check_tensors(tensors, config, cfg["dtype"], path)
        normalizer = None
        if config.input_normalization != "none":
            normalizer = Normalizer(mean=tensors["input_mean"], scale=tensors["input_scale"])
        params = Params(**{field: tensors.get(name) for field, name in _TENSORS.items()})
        return cls(config, params, normalizer, cfg["provenance"])


@functools.partial(jax.jit, static_argnames="architecture")
def _encode(
    params: Params,
    hyper: Hyperparams,
    normalizer: Normalizer | None,
    x: jax.Array,
    *,
    architecture: Architecture,
) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return models.encode(params, hyper, models.normalize(x, normalizer), architecture)


@jax.jit
def _decode(params: Params, normalizer: Normalizer | None, z: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return models.denormalize(models.decode(params, z), normalizer)


def _piecewise(run: Any, rows: np.ndarray) -> Iterator[np.ndarray]:
    """`run` over pieces of one shape: how many rows there are does not change a row's result."""
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        piece = rows[start : start + ROWS_AT_A_TIME]
        padded = np.zeros((ROWS_AT_A_TIME, rows.shape[1]), rows.dtype)
        padded[: len(piece)] = piece
        yield np.asarray(run(padded))[: len(piece)]


def _check_tensors(
    tensors: dict[str, np.ndarray], config: SAEConfig, dtype: str, path: Path
) -> None:
    d, n = config.d_in, config.n_latents
    expected: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d)}
    if config.decoder_bias == "free":
        expected["b_dec"] = (d,)
    if config.pre_bias == "free":
        expected["b_pre"] = (d,)
    if config.input_normalization != "none":
        expected |= {"input_mean": (d,), "input_scale": (d,)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        raise InputError(
            f"{path / 'sae_weights.safetensors'} holds {found}, its cfg.json asks for {expected}"
        )
    dtypes = {name: str(tensors[name].dtype) for name in _TENSORS.values() if name in tensors}
    if set(dtypes.values()) != {dtype}:
        raise InputError(
            f"{path / 'sae_weights.safetensors'} holds {dtypes}, its cfg.json asks for {dtype}"
        )

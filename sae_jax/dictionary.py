"""A trained dictionary: encode, decode, steer, fold, save, load."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import scipy.sparse

from sae_jax import data, files, models
from sae_jax.config import Architecture, SAEConfig
from sae_jax.errors import InputError, brief
from sae_jax.reading import read_object, reading
from sae_jax.state import Hyperparams, Normalizer, Params, hyperparams

FORMAT_VERSION = 2  # 1 had no hash of cfg.json
ROWS_AT_A_TIME = 1024  # one compiled shape; short pieces are padded to it

# Names on disk are those that SAELens' readers know: rows times matrices.
_TENSORS = {
    "encoder": "W_enc",
    "encoder_bias": "b_enc",
    "decoder": "W_dec",
    "decoder_bias": "b_dec",
    "pre_bias": "b_pre",
    "log_threshold": "log_threshold",
    "magnitude_gain": "r_mag",
    "magnitude_bias": "b_mag",
}
_CFG_TYPES = {
    "format_version": int, "dtype": str, "config": dict, "provenance": dict, "weights_sha256": str,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """Latents of an embedding, and what they were trained with.

    Attributes:
      config: the configuration it was trained by.
      params: NumPy arrays: encoder [d_in, latents], encoder_bias [latents], decoder [latents,
        d_in], decoder_bias and pre_bias [d_in] or None, and what jump_relu, batch_topk and gated
        have beside (see `sae_jax.state.Params`).
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
        if sparse:
            pieces = [scipy.sparse.csr_matrix(piece) for piece in self._codes(x)]
            return scipy.sparse.vstack(pieces, "csr")
        return np.concatenate(list(self._codes(x)))

    def _codes(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """Codes of checked rows x [rows, d_in], ROWS_AT_A_TIME of them at a time."""
        run = functools.partial(
            _encode,
            jax.tree.map(jnp.asarray, self.params),
            hyperparams(self.config, x.dtype),
            self.normalizer,
            architecture=self.config.architecture,
        )
        return _piecewise(run, x)

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

    def steer(
        self,
        x: np.ndarray,
        features: int | Sequence[int] | np.ndarray,
        *,
        set: float | Sequence[float] | np.ndarray | None = None,
        scale: float | Sequence[float] | np.ndarray | None = None,
        keep_error: bool = True,
    ) -> np.ndarray:
        """Rows [rows, d_in] as they were if `features` had other codes.

        With z = encode(x) and z' the same but for `features`, the result is
        x + decode(z') - decode(z): what the dictionary does not reconstruct stays in the row and
        never counts as an effect. A row whose codes do not change is returned bit for bit. The
        other codes stay as they are; a top-k is not taken again.

        Args:
          x: rows [rows, d_in], in the embedding's own units.
          features: latents, each once.
          set: the code they get, one for all or one per feature; 0 ablates. Negative codes are
            allowed, though `encode` gives none.
          scale: the factor their codes get instead; only rows in which they are active change.
          keep_error: False gives decode(z'), as Schuster's code does; it differs from x by the
            reconstruction error even where no code changes.

        Raises:
          InputError: not exactly one of set and scale; features that the dictionary does not have;
            NaN or infinite values; a number of values that is not the number of features.

        Example:
          >>> without = dictionary.steer(embedding, [3, 14], set=0)  # doctest: +SKIP
        """
        x = data.check_rows(x, "x", d_in=self.config.d_in)
        chosen = _check_features(features, self.config.n_latents)
        if (set is None) == (scale is None):
            raise InputError("steer needs exactly one of set and scale")
        name, given = ("set", set) if scale is None else ("scale", scale)
        values = _check_values(name, given, len(chosen))
        # The decoder is linear: only the changed codes' directions are needed for a difference.
        directions = np.asarray(self.params.decoder, np.float64)[chosen]
        if self.normalizer is not None:
            directions = directions * np.asarray(self.normalizer.scale, np.float64)
        steered = np.empty_like(x)
        for number, piece in enumerate(self._codes(x)):
            rows = slice(number * ROWS_AT_A_TIME, number * ROWS_AT_A_TIME + len(piece))
            old = piece[:, chosen].astype(np.float64)
            with np.errstate(over="ignore"):
                new = (values if scale is None else old * values).astype(piece.dtype)
            if not np.isfinite(new).all():
                raise InputError(f"{name}={given!r} makes codes beyond the range of {piece.dtype}")
            if keep_error:
                difference = new - old
                changed = (difference != 0).any(axis=1, keepdims=True)
                steered[rows] = np.where(changed, x[rows] + difference @ directions, x[rows])
            else:
                codes = piece.copy()
                codes[:, chosen] = new
                steered[rows] = self.decode(codes)
        return steered

    def fold(self) -> "Dictionary":
        """The same dictionary with its normalisation and pre-bias inside the weights.

        `encode` and `decode` of the two agree to rounding (where two pre-activations tie to
        rounding, a top-k may choose the other); its config says input_normalization="none" and
        pre_bias="none", so other libraries can run it. Decoder rows lose their unit norm to the
        normalisation's scale, and input whose mean is many times its spread loses digits: that
        difference is then taken after the product in float32, not before.
        """
        config, params = self.config, self.params
        if self.normalizer is None and config.pre_bias == "none":
            return self
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        zeros = np.zeros(config.d_in)
        mean, scale = zeros, zeros + 1
        if self.normalizer is not None:
            mean = np.asarray(self.normalizer.mean, np.float64)
            scale = np.asarray(self.normalizer.scale, np.float64)
        decoder_bias = zeros if double.decoder_bias is None else double.decoder_bias
        shift = {"none": zeros, "free": double.pre_bias, "tied": -decoder_bias}[config.pre_bias]
        folded = {
            "encoder": double.encoder / scale[:, None],
            "encoder_bias": double.encoder_bias + (shift - mean / scale) @ double.encoder,
            "decoder": double.decoder * scale[None, :],
            "decoder_bias": decoder_bias * scale + mean,
        }
        dtype = params.encoder.dtype
        arrays = {field: value.astype(dtype) for field, value in folded.items()}
        if config.decoder_bias == "none" and not mean.any():
            arrays["decoder_bias"] = None
        changed = {
            "pre_bias": "none",
            "center": "none",
            "input_normalization": "none",
            "decoder_bias": "none" if arrays["decoder_bias"] is None else "free",
            "decoder_norm": config.decoder_norm if self.normalizer is None else "free",
        }
        before = {field: getattr(config, field) for field in changed}
        if config.activation == "gated":
            # The gate's pre-activations stay, the product by which magnitudes come loses its shift.
            gain = np.exp(double.magnitude_gain)
            moved = (folded["encoder_bias"] - double.encoder_bias) * gain
            arrays["magnitude_bias"] = (double.magnitude_bias + moved).astype(dtype)
        # Thresholds speak of pre-activations, which folding leaves as they are.
        return Dictionary(
            dataclasses.replace(config, **changed),
            params.replace(**arrays, pre_bias=None),
            None,
            {**self.provenance, "folded": before},
        )

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
            # SAELens would load an unnamed architecture as its standard one, with other codes: this
            # name it refuses. `interop.to_saelens` writes what it reads.
            "architecture": "sae_jax",
            "format_version": FORMAT_VERSION,
            "d_in": self.config.d_in,
            "d_sae": self.config.n_latents,
            "dtype": str(tensors["W_enc"].dtype),
            "config": self.config.to_dict(),
            "provenance": self.provenance,
        }
        with files.write_aside(path) as folder:
            folder.mkdir()
            content = safetensors.numpy.save(tensors)  # whose file writer hides why it failed
            (folder / "sae_weights.safetensors").write_bytes(content)
            cfg["weights_sha256"] = _sha256(folder / "sae_weights.safetensors")
            cfg["cfg_sha256"] = hashlib.sha256(files.to_json(cfg).encode()).hexdigest()
            (folder / "cfg.json").write_text(files.to_json(cfg))

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
        cfg = read_object(path / "cfg.json")
        with reading(path / "sae_weights.safetensors"):
            tensors = safetensors.numpy.load_file(path / "sae_weights.safetensors")
        if cfg.get("format") != "sae_jax.Dictionary":
            raise InputError(f"{path / 'cfg.json'} was not written by sae_jax")
        for key, kind in _CFG_TYPES.items():
            if not isinstance(cfg.get(key), kind):
                raise InputError(f"{path / 'cfg.json'} is damaged: {key} is {brief(cfg.get(key))}")
        if cfg["format_version"] > FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {cfg['format_version']}, this sae_jax reads up to "
                f"{FORMAT_VERSION}: update it"
            )
        if cfg["weights_sha256"] != _sha256(path / "sae_weights.safetensors"):
            raise InputError(f"{path / 'sae_weights.safetensors'} is not what was saved: damaged?")
        with reading(path / "cfg.json"):
            config = SAEConfig.from_dict(cfg["config"])
        _check_tensors(tensors, config, cfg["dtype"], path)
        if cfg["format_version"] != 1:
            _check_cfg(path / "cfg.json")
        normalizer = None
        if config.input_normalization != "none":
            normalizer = Normalizer(mean=tensors["input_mean"], scale=tensors["input_scale"])
        params = Params(**{field: tensors.get(name) for field, name in _TENSORS.items()})
        return cls(config, params, normalizer, cfg["provenance"])

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "Dictionary":
        """Read a folder of `save`, of SAELens or of dictionary_learning, whichever it is.

        See `sae_jax.interop` for what is read of the other two.

        Raises:
          InputError: none of the three, or one that cannot be represented.
        """
        from sae_jax import interop  # which imports this module

        return interop.from_pretrained(path)


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


def _check_features(features: Any, n_latents: int) -> np.ndarray:
    """Latents [features] as integers; each exists and comes once."""
    chosen = np.atleast_1d(np.asarray(features))
    if chosen.size == 0:
        chosen = np.zeros(0, np.int64)
    if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise InputError(
            f"features must be latents' numbers, found {chosen.dtype} of shape {chosen.shape}; "
            "of a mask give np.flatnonzero(mask)"
        )
    unknown = chosen[(chosen < 0) | (chosen >= n_latents)]
    if len(unknown):
        listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise InputError(f"features {listed}: the dictionary has latents 0 .. {n_latents - 1}")
    once, times = np.unique(chosen, return_counts=True)
    if len(once) < len(chosen):
        raise InputError(f"features holds {once[times > 1][0]} more than once")
    return chosen


def _check_values(name: str, given: Any, features: int) -> np.ndarray:
    """One value, or one per feature, as [1 row, features]."""
    try:
        values = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}={given!r} must be a number or one number per feature") from None
    if values.shape not in ((), (features,)):
        raise InputError(f"{name} has shape {values.shape}; give one value or {features}")
    if not np.isfinite(values).all():
        raise InputError(f"{name}={given!r} holds NaN or infinite values")
    return np.broadcast_to(values, (1, features))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_cfg(path: Path) -> None:
    """Every byte of cfg.json is as it was saved: its own hash is that of all that comes before."""
    text = path.read_text()
    cfg = json.loads(text)
    written, digest = files.to_json(cfg), cfg.pop("cfg_sha256", None)
    if text != written or digest != hashlib.sha256(files.to_json(cfg).encode()).hexdigest():
        raise InputError(f"{path} is not what was saved: damaged, or edited?")


def _check_tensors(
    tensors: dict[str, np.ndarray], config: SAEConfig, dtype: str, path: Path
) -> None:
    d, n = config.d_in, config.n_latents
    expected: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d)}
    if config.decoder_bias == "free":
        expected["b_dec"] = (d,)
    if config.pre_bias == "free":
        expected["b_pre"] = (d,)
    if config.activation in ("jump_relu", "batch_topk"):
        expected["log_threshold"] = (n if config.activation == "jump_relu" else 1,)
    if config.activation == "gated":
        expected |= {"r_mag": (n,), "b_mag": (n,)}
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

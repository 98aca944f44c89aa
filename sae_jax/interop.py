"""Dictionaries of SAELens and of dictionary_learning, read and (SAELens) written.

Only what this package computes in the same way is read; anything else is refused by name. Fields of
`SAEConfig` that only training uses keep their defaults: how a foreign dictionary was trained stands
in its provenance, as the other library recorded it.

Both libraries break ties at the k-th pre-activation arbitrarily; here ties are all kept.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from sae_jax import files
from sae_jax.config import SAEConfig
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError, brief
from sae_jax.reading import check_file, read_object, reading
from sae_jax.state import Params

# SAELens takes a cfg.json without a version for one of before 6.0 and drops its metadata.
SAELENS_VERSION = "6.0.0"
# What a batch_topk dictionary does with a row is what a jumprelu one does with equal thresholds.
SAELENS_ARCHITECTURES = {
    "relu": "standard", "topk": "topk", "batch_topk": "jumprelu", "jump_relu": "jumprelu",
    "gated": "gated",
}  # fmt: skip

# dictionary_learning: the activation, the name of the decoder's bias, and scalars beside.
_LEARNED: dict[str, tuple[str, str, set[str]]] = {
    "AutoEncoder": ("relu", "bias", set()),
    "AutoEncoderTopK": ("topk", "b_dec", {"k", "threshold"}),
    "BatchTopKSAE": ("batch_topk", "b_dec", {"k", "threshold"}),
    "GatedAutoEncoder": ("gated", "decoder_bias", set()),
}


def from_pretrained(path: str | os.PathLike[str]) -> Dictionary:
    """Read a folder of `Dictionary.save`, of SAELens or of dictionary_learning.

    A folder with ae.pt is dictionary_learning's; of the others cfg.json says which it is.

    Raises:
      InputError: none of the three, or one that cannot be represented.
    """
    path = Path(path)
    if (path / "ae.pt").is_file():
        return from_dictionary_learning(path)
    if not (path / "cfg.json").is_file():
        raise InputError(
            f"{path} holds no dictionary: neither cfg.json with sae_weights.safetensors (sae_jax, "
            "SAELens) nor ae.pt with config.json (dictionary_learning)"
        )
    if _is_ours(_read_json(path / "cfg.json")):
        return Dictionary.load(path)
    return from_saelens(path)


def to_saelens(dictionary: Dictionary, path: str | os.PathLike[str]) -> None:
    """Write the folder `path` for `sae_lens.SAE.load_from_disk`.

    The dictionary is folded first (see `Dictionary.fold`), so that SAELens, too, takes raw rows and
    gives the same codes. Its config and provenance are written as metadata.

    Args:
      dictionary: of any activation: relu is SAELens' "standard", batch_topk and jump_relu are its
        "jumprelu".
      path: of a new folder: cfg.json and sae_weights.safetensors with W_enc [d_in, latents], b_enc
        [latents], W_dec [latents, d_in] and b_dec [d_in], zeros where the dictionary has none;
        threshold [latents] of jumprelu; of gated b_gate, b_mag and r_mag [latents] for b_enc.

    Raises:
      InputError: `path` exists.
    """
    if Path(path).exists():
        raise InputError(f"{path} exists; a dictionary is written to a new folder")
    config = dictionary.config
    params = dictionary.fold().params
    decoder_bias = params.decoder_bias
    if decoder_bias is None:
        decoder_bias = np.zeros(config.d_in, params.decoder.dtype)
    tensors = {"W_enc": params.encoder, "W_dec": params.decoder, "b_dec": decoder_bias}
    if config.activation == "gated":
        tensors |= {"b_gate": params.encoder_bias, "b_mag": params.magnitude_bias}
        tensors["r_mag"] = params.magnitude_gain
    else:
        tensors["b_enc"] = params.encoder_bias
    if params.log_threshold is not None:
        threshold = np.exp(params.log_threshold)
        tensors["threshold"] = np.broadcast_to(threshold, config.n_latents)
    cfg = {
        "architecture": SAELENS_ARCHITECTURES[config.activation],
        "d_in": config.d_in,
        "d_sae": config.n_latents,
        "dtype": str(params.encoder.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "sae_jax": {"config": config.to_dict(), "provenance": dictionary.provenance},
        },
    }
    if config.activation == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    with files.write_aside(path) as folder:
        folder.mkdir()
        (folder / "cfg.json").write_text(json.dumps(cfg, indent=1, allow_nan=False) + "\n")
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            folder / "sae_weights.safetensors",
        )


def from_saelens(path: str | os.PathLike[str]) -> Dictionary:
    """Read a folder that SAELens wrote, of version 6 or before: "standard", "topk", "jumprelu" and
    "gated".

    apply_b_dec_to_input becomes pre_bias="tied"; rescale_acts_by_decoder_norm is folded into the
    weights. Rows of a hook_z dictionary are given flat, [rows, heads times head dimensions].
    float16 and bfloat16 weights become float32, which is exact.

    Raises:
      InputError: another architecture or activation function; activations normalised on the way in
        (fold it in SAELens first); missing, unknown, misshapen or damaged tensors.
    """
    path = Path(path)
    cfg = _read_json(path / "cfg.json")
    if _is_ours(cfg):
        raise InputError(f"{path} was written by sae_jax: use Dictionary.load")
    with reading(path / "cfg.json"):
        fields = _saelens_fields(cfg, path / "cfg.json")
    weights = path / "sae_weights.safetensors"
    if not weights.is_file():
        raise InputError(f"{path} holds no saved dictionary: {weights} is missing")
    with reading(weights):
        tensors = safetensors.numpy.load_file(weights)
    # Some versions wrote a factor per latent that fine-tuning may have changed.
    if not np.all(np.asarray(tensors.pop("scaling_factor", 1), np.float64) == 1):
        raise InputError(f"{weights} has a scaling_factor other than 1, which is not read")
    d, n = fields["d_in"], fields["n_latents"]
    beside = {"gated": ("b_gate", "b_mag", "r_mag"), "jump_relu": ("b_enc", "threshold")}
    expected = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)}
    expected |= dict.fromkeys(beside.get(fields["activation"], ("b_enc",)), (n,))
    tensors = _checked(tensors, expected, weights)
    params = Params(
        encoder=tensors["W_enc"],
        encoder_bias=tensors["b_gate" if fields["activation"] == "gated" else "b_enc"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
        pre_bias=None,
        log_threshold=_log(tensors.get("threshold")),
        magnitude_gain=tensors.get("r_mag"),
        magnitude_bias=tensors.get("b_mag"),
    )
    if cfg.get("rescale_acts_by_decoder_norm", False):
        params = _unit_decoder(params)
    return _dictionary(fields, params, {"library": "SAELens", "cfg": cfg})


def from_dictionary_learning(
    path: str | os.PathLike[str], normalize_decoder: bool = True
) -> Dictionary:
    """Read a folder of dictionary_learning: ae.pt and config.json; needs torch.

    AutoEncoder, AutoEncoderTopK, BatchTopKSAE and GatedAutoEncoder are read; all subtract the
    decoder's bias from the input (pre_bias="tied"). BatchTopKSAE encodes with its threshold, as
    that library does by default. AutoEncoderTopK's `threshold` is left out: it serves
    encode(use_threshold=True) only, which stands in for the top-k where k may vary from row to row;
    that library's own `encode` and `forward` take the top-k unless told otherwise.

    Args:
      path: of the folder.
      normalize_decoder: of an AutoEncoder: latents' directions are scaled to norm 1 and codes by
        the inverse, as `AutoEncoder.from_pretrained` does by default; reconstructions stay.

    Raises:
      InputError: another dict_class; missing, unknown, misshapen or damaged tensors; no torch.
    """
    path = Path(path)
    config = _read_json(path / "config.json")
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise InputError(f"{path / 'config.json'} has no trainer: not dictionary_learning's")
    kind = trainer.get("dict_class")
    if kind not in _LEARNED:
        raise InputError(
            f"{path / 'config.json'} has dict_class {kind!r}; {', '.join(_LEARNED)} are read"
        )
    activation, bias, beside = _LEARNED[kind]
    weights = path / "ae.pt"
    tensors = _load_torch(weights)
    extra = {name: tensors.pop(name) for name in beside & set(tensors)}
    if np.ndim(tensors.get("encoder.weight")) != 2:
        raise InputError(f"{weights} has no matrix encoder.weight, it holds {sorted(tensors)}")
    n, d = tensors["encoder.weight"].shape
    for name, size in (("activation_dim", d), ("dict_size", n)):
        if trainer.get(name, size) != size:
            raise InputError(f"{path}: config.json has {name}={trainer[name]!r}, ae.pt {size}")
    own = ("gate_bias", "mag_bias", "r_mag") if activation == "gated" else ("encoder.bias",)
    expected = {"encoder.weight": (n, d), "decoder.weight": (d, n), bias: (d,)}
    tensors = _checked(tensors, expected | dict.fromkeys(own, (n,)), weights)
    fields = {"d_in": d, "n_latents": n, "pre_bias": "tied", "name": "dictionary_learning"}
    fields["activation"] = activation
    if "k" in beside:
        k = trainer.get("k", extra["k"].item() if "k" in extra else None)
        if "k" in extra and extra["k"].item() != k:
            raise InputError(f"{path}: config.json has k={k!r}, ae.pt {extra['k'].item()}")
        fields["k"] = k
    threshold = None
    if activation == "batch_topk":
        if "threshold" not in extra:
            raise InputError(f"{weights} has no threshold, by which a BatchTopKSAE encodes")
        threshold = np.asarray(extra["threshold"], tensors["encoder.weight"].dtype).reshape(1)
    params = Params(
        encoder=np.ascontiguousarray(tensors["encoder.weight"].T),
        encoder_bias=tensors[own[0]],
        decoder=np.ascontiguousarray(tensors["decoder.weight"].T),
        decoder_bias=tensors[bias],
        pre_bias=None,
        log_threshold=_log(threshold),
        magnitude_gain=tensors.get("r_mag"),
        magnitude_bias=tensors.get("mag_bias"),
    )
    if kind == "AutoEncoder" and normalize_decoder:
        params = _unit_decoder(params)
    return _dictionary(fields, params, {"library": "dictionary_learning", "config": config})


def _saelens_fields(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config's fields that SAELens' cfg.json decides; versions before 6 had other names."""
    architecture = cfg.get("architecture", "standard")
    function = cfg.get("activation_fn_str", cfg.get("activation_fn"))
    if architecture == "standard" and function == "topk":
        architecture = "topk"
    activations = {name: activation for activation, name in SAELENS_ARCHITECTURES.items()}
    if architecture not in activations:
        raise InputError(
            f"{path} has architecture {architecture!r}; {', '.join(activations)} are read"
        )
    if function not in (None, "relu", "topk"):
        raise InputError(f"{path} has the activation function {function!r}, which is not read")
    if cfg.get("normalize_activations") not in (None, False, "none"):
        raise InputError(
            f"{path} has normalize_activations={cfg['normalize_activations']!r}, which is not "
            "read; fold it into the weights in SAELens and save again"
        )
    if cfg.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise InputError(f"{path} has reshape_activations={cfg['reshape_activations']!r}")
    tied = cfg.get("apply_b_dec_to_input", True)
    if not isinstance(tied, bool):
        raise InputError(f"{path} has apply_b_dec_to_input={tied!r}; it must be true or false")
    absent = [key for key in ("d_in", "d_sae") if key not in cfg]
    if absent:
        raise InputError(f"{path} has no {' and no '.join(absent)}: not SAELens'")
    fields = {
        "d_in": cfg["d_in"],
        "n_latents": cfg["d_sae"],
        "activation": activations[architecture],
        "pre_bias": "tied" if tied else "none",
        "name": "saelens",
    }
    if architecture == "topk":
        fields["k"] = cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k"))
    return SAEConfig.from_dict(fields).to_dict()


def _log(threshold: np.ndarray | None) -> np.ndarray | None:
    """Of what codes must exceed; ReLU goes before it, so 0 and less are the same."""
    if threshold is None:
        return None
    return np.log(np.maximum(threshold, np.finfo(threshold.dtype).tiny))


def _dictionary(fields: dict[str, Any], params: Params, source: dict[str, Any]) -> Dictionary:
    norms = np.linalg.norm(params.decoder.astype(np.float64), axis=1)
    norm = "unit" if np.allclose(norms, 1, rtol=0, atol=1e-5) else "free"
    config = SAEConfig.from_dict({**fields, "decoder_norm": norm})
    return Dictionary(config, params, None, {"source": source})


def _unit_decoder(params: Params) -> Params:
    """Directions of norm 1 and the encoder times the norms; latents without one stay as is."""
    decoder = params.decoder.astype(np.float64)
    norms = np.linalg.norm(decoder, axis=1)
    norms = np.where(norms > 0, norms, 1)
    dtype = params.decoder.dtype
    return params.replace(
        encoder=(params.encoder * norms[None, :]).astype(dtype),
        encoder_bias=(params.encoder_bias * norms).astype(dtype),
        decoder=(decoder / norms[:, None]).astype(dtype),
    )


def _checked(
    tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]], path: Path
) -> dict[str, np.ndarray]:
    """Exactly these tensors, of these shapes, finite; float64 if one of them is, else float32."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        raise InputError(f"{path} holds {found}, expected are {expected}")
    double = any(tensor.dtype == np.float64 for tensor in tensors.values())
    dtype = np.float64 if double else np.float32
    tensors = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise InputError(f"{path} holds NaN or infinite values in {name}")
    return tensors


def _is_ours(cfg: dict[str, Any]) -> bool:
    return cfg.get("format") == "sae_jax.Dictionary"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. NaN, which other libraries write, is read as the string "NaN"."""
    if not path.is_file():
        raise InputError(f"{path.parent} holds no saved dictionary: {path} is missing")
    return read_object(path, parse_constant=str)


def _load_torch(path: Path) -> dict[str, np.ndarray]:
    """A state dict as NumPy arrays; no pickled code is run."""
    try:
        import torch
    except ImportError:
        raise InputError(f"{path} is read with torch: pip install torch") from None
    try:
        state = torch.load(check_file(path), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{path} is damaged, or holds more than tensors: {brief(error)}") from None
    if not (
        isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise InputError(f"{path} holds no state dict of tensors")
    narrow = (torch.float16, torch.bfloat16)
    with reading(path):  # sparse and quantised tensors are no arrays
        return {
            name: (value.float() if value.dtype in narrow else value).detach().numpy()
            for name, value in state.items()
        }

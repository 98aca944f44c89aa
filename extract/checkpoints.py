"""Weights from files that others wrote: no pickle is executed, every mismatch is named."""

import codecs
import collections
import json
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from extract.errors import InputError, check_file, listed, one_line, reading
from extract.hashing import sha256

_LARGEST_JSON = 2**28  # bytes; the largest of the authors', of a vocabulary, has some millions


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A flat state_dict of a `.safetensors` or torch file, on the CPU.

    Raises:
      InputError: no such file, damage, a pickle that holds more than tensors, not a state_dict.
    """
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it holds more than tensors, or is damaged ({_reason(error)})"
        ) from None
    except Exception as error:  # a damaged file raises nearly anything
        raise InputError(f"{path} is damaged or no torch file: {_reason(error)}") from None
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors")
    tensors = {str(name): v for name, v in found.items() if isinstance(v, torch.Tensor)}
    if odd := [name for name, v in tensors.items() if v.layout != torch.strided or v.is_quantized]:
        raise InputError(f"{path} holds sparse or quantised tensors: {listed(odd)}")
    return tensors


def _reason(error: Exception) -> str:
    text = str(error)
    for line in text.splitlines():
        if "GLOBAL" in line or "Unsupported" in line or "Can only" in line:
            return one_line(line)
    return one_line((text.splitlines() or [""])[0]) or one_line(error)


def filled(
    build: Callable[[], torch.nn.Module],
    weights: Mapping[str, torch.Tensor],
    path: Path,
    settings: Path,
    *,
    layers: Any = 1,
    quiet: str | tuple[str, ...] = (),
) -> torch.nn.Module:
    """What `build` makes, with weights of exactly its names and shapes; extra names are warned of.

    It is built without memory first: the sizes that `settings` gives may be any.

    Args:
      path: of the weights. settings: the file that sizes come from.
      layers: how many of them `build` will make: no more than there are weights.
      quiet: prefixes of names that are known to be of no use here, not worth a warning.

    Raises:
      InputError: names that are missing, shapes that differ, values that are not finite (all of
        them are named).
    """
    if isinstance(layers, int) and layers > len(weights):
        raise InputError(f"{settings} asks for {layers} layers, {path} has {len(weights)} tensors")
    with torch.device("meta"), reading(settings, "is refused"):
        wanted = build().state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in weights]
    for name, tensor in wanted.items():
        if name not in weights:
            continue
        found = weights[name]
        if found.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(found.shape)}, not {tuple(tensor.shape)}")
        elif found.is_floating_point() and not torch.isfinite(found).all():
            wrong.append(f"{name} holds NaN or infinite values")
    if wrong:
        raise InputError(f"{path} does not fit the model: {'; '.join(wrong)}")
    extra = [name for name in weights if name not in wanted and not name.startswith(quiet)]
    if extra:
        warnings.warn(f"{path}: not used: {listed(extra, 10)}", stacklevel=3)
    module = build()
    module.load_state_dict({name: weights[name] for name in wanted})
    return module


class Inert:
    """What stands in an unpickled structure for an object that is not wanted (a pandas frame)."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _DType:
    """What a pickle says of a dtype: numbers, text or objects, and the byte order.

    NumPy's own would believe a pickle that lays objects over bytes, as its `ndarray` does: pointers
    of the file's choice.
    """

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufcSU]\d+|O8?", code):
            raise pickle.UnpicklingError(f"it holds an array of the dtype '{code}'")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array out of a pickle; NumPy checks that there is data of its dtype and shape."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, *data = state
        super().__setstate__((version, shape, getattr(dtype, "dtype", dtype), *data))


def _no_array_yet(*_: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, 0, np.int8)


def _scalar(dtype: _DType, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0]


def _buffer(data: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


# Everything that arrays of numbers and text need, by the names NumPy 1 and 2 gave it.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): None,  # only ever an argument; who calls it is refused
    ("_codecs", "encode"): codecs.encode,
} | {
    (f"numpy.{core}.{module}", name): value
    for core in ("core", "_core")
    for module, name, value in (
        ("multiarray", "_reconstruct", _no_array_yet),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _buffer),
    )
}
_ALLOWED |= {
    (module, name): value
    for module in ("builtins", "__builtin__")
    for name, value in {
        "dict": dict, "list": list, "set": set, "bytes": bytes, "slice": slice, "int": int,
    }.items()
}  # fmt: skip
_TORCH = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}


class _Unpickler(pickle.Unpickler):
    """Arrays, numbers and text; anything else is refused by name."""

    inert: tuple[str, ...] = ()
    tensors = False

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.split(".")[0] in self.inert:
            return Inert
        if self.tensors and (
            (module, name) in _TORCH or (module == "torch" and name.endswith("Storage"))
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not on the allow-list")


def read_pickle(path: Path) -> Any:
    """A pickle of dictionaries, lists, numbers, text and NumPy arrays, and nothing else.

    Raises:
      InputError: no such file, damage, or anything beyond that allow-list (it is named).
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{path} is refused: {_reason(error)}") from None


def read_torch_allowing(path: Path, inert: Iterable[str]) -> Any:
    """A torch file whose pickle also holds NumPy arrays; objects of `inert` packages are skipped.

    No code of the file runs: tensors, NumPy arrays and plain containers are built, objects of the
    packages in `inert` become `Inert`, and any other name is refused.

    Raises:
      InputError: no such file, damage, a name beyond the allow-list.
    """
    check_file(path)
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no torch file of today's format (a zip), or is truncated")
    with reading(path), zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise InputError(f"{path} is refused: it is a TorchScript program, not weights")
    unpickler = type("Unpickler", (_Unpickler,), {"inert": tuple(inert), "tensors": True})
    module = types.SimpleNamespace(
        Unpickler=unpickler, load=None, UnpicklingError=pickle.UnpicklingError, __name__="allowed"
    )
    try:
        return torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
    except Exception as error:  # as above
        raise InputError(f"{path} is refused: {_reason(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: no such file, more than 256 MiB, not JSON, not an object.
    """
    check_file(path)
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise InputError(
            f"{path} has {size / 2**20:.3g} MiB: too much for settings or a dictionary of genes"
        )
    with reading(path, "is no JSON"):
        found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of some files of a folder, by name."""
    return {name: sha256(folder / name) for name in names}


def dtype_of(name: str) -> torch.dtype:
    """float32, float64, bfloat16 or float16."""
    if name not in ("float32", "float64", "bfloat16", "float16"):
        raise InputError(f"dtype must be float32, float64, bfloat16 or float16, not '{name}'")
    return getattr(torch, name)

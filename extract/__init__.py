"""Foundation models to arrays (PyTorch). Talks to the other packages through files only.

`load_model` reads a checkpoint, `model.embed` cells; `store.open` what the program wrote.
"""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.errors import InputError, listed

if TYPE_CHECKING:
    from extract.models.base import Model

# Reader classes by name; a module is imported when its model is asked for.
MODELS: dict[str, str] = {
    "scgpt": "extract.models.scgpt:ScGPT",
    "geneformer": "extract.models.geneformer:Geneformer",
    "scvi": "extract.models.scvi:ScVI",
    "multidgd": "extract.models.multidgd:MultiDGD",
    "callable": "extract.models.callable:Callable",
}


def __getattr__(name: str) -> Any:
    """`extract.store` without importing it first; it takes a second for anndata."""
    if name == "store":
        return importlib.import_module("extract.store")
    raise AttributeError(f"module 'extract' has no attribute {name!r}")


def register(name: str, reader: str | type) -> None:
    """Add a model of your own: a class, or "package.module:Class"."""
    MODELS[name] = reader


def load_model(
    name: str,
    checkpoint: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    **options: Any,
) -> "Model":
    """A reader of the model `name` with the weights in `checkpoint`.

    Args:
      name: one of `MODELS`, or "package.module:Class", a reader of your own.
      checkpoint: the folder that the model's authors' code wrote (for "callable": a torch module).
      device: "cpu", "cuda", "cuda:1", "auto".
      dtype: of the computation, "float32", or "bfloat16" for accelerators.
      **options: the reader's own.

    Raises:
      InputError: no such model or folder, options that are unknown or missing, files that are
        missing, damaged or do not fit together.
    """
    reader = find_reader(name)
    known = options_of(reader)
    if unknown := [option for option in options if option not in known]:
        raise InputError(
            f"{name} has no option {listed(unknown)}; it has {listed(known, 20) or 'none'}"
        )
    needed = [key for key, option in known.items() if option.default is option.empty]
    if missing := [option for option in needed if option not in options]:
        raise InputError(f"{name} needs the options {listed(missing)}")
    if getattr(reader, "of_folder", True):
        if not isinstance(checkpoint, str | Path):
            raise InputError(f"{name} reads a folder, not a {type(checkpoint).__name__}")
        checkpoint = Path(checkpoint)
        if not checkpoint.is_dir():
            raise InputError(f"the checkpoint {checkpoint} is not a folder")
    return reader(checkpoint, device=device, dtype=dtype, **options)


def find_reader(name: str) -> Callable[..., "Model"]:
    """The class that `load_model` calls.

    Raises:
      InputError: no such model, or it cannot be imported.
    """
    if name not in MODELS and ":" not in name:
        raise InputError(f"there is no model '{name}'; there are {listed(MODELS, 20)}")
    reader = MODELS.get(name, name)
    if isinstance(reader, str):
        module, _, attribute = reader.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f"the model '{name}' cannot be imported: {error}") from None
    return reader


def options_of(reader: Callable[..., "Model"]) -> dict[str, inspect.Parameter]:
    """What a reader takes beside its checkpoint, device and dtype, by name."""
    _, *parameters = inspect.signature(reader).parameters.values()
    return {
        one.name: one
        for one in parameters
        if one.kind is not one.VAR_KEYWORD and one.name not in ("device", "dtype")
    }

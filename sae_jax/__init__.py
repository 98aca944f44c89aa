"""Sparse autoencoders for embeddings of single cells, hundreds of them in one compiled program."""

import importlib
from typing import TYPE_CHECKING, Any

from sae_jax.errors import InputError

if TYPE_CHECKING:
    from sae_jax.config import PRESETS, Architecture, SAEConfig
    from sae_jax.dictionary import Dictionary
    from sae_jax.sweep import Run, grid, train

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Architecture",
    "Dictionary",
    "InputError",
    "Run",
    "SAEConfig",
    "grid",
    "train",
]

# Imported when first asked for: who only reads what a run left pays neither JAX's second nor its
# memory.
_HOMES = {
    "PRESETS": "config", "Architecture": "config", "SAEConfig": "config",
    "Dictionary": "dictionary", "Run": "sweep", "grid": "sweep", "train": "sweep",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Sparse autoencoders for embeddings of single cells, hundreds of them in one compiled program."""

from sae_jax.config import PRESETS, Architecture, SAEConfig
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError
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

"""Where rows come from: all that they depend on, its hash, and what differs between two."""

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from absl import flags

from extract.errors import listed
from extract.hashing import names_hash, rows_hash, sha256

if TYPE_CHECKING:
    from extract.models.base import Model, Plan

FLAGS = flags.FLAGS
# What may differ between two extractions of the same rows: where files lie, what only led to the
# choice of cells and genes (which have hashes of their own), and where it ran.
FREE = (
    "checkpoint", "input", "coverage", "min_gene_coverage", "obs_filter", "versions", "device",
    "identity", "layer",
)  # fmt: skip


def describe(
    model: "Model",
    plan: "Plan",
    pooling: str,
    empty: np.ndarray,
    obs: pd.DataFrame,
) -> dict[str, Any]:
    """All that the rows `obs` depend on, in JSON's types, and its hash `identity`.

    Args:
      empty: which cells of the plan express no gene of the model, bool [cells].
    """
    apart = ("coverage", "min_gene_coverage")
    about = {
        "model": model.name,
        "checkpoint": FLAGS.checkpoint,
        "checkpoint_sha256": model.checkpoint or {"all": _input_hash(Path(FLAGS.checkpoint))},
        "input": FLAGS.h5ad,
        "input_sha256": _input_hash(Path(FLAGS.h5ad)),
        "counts": FLAGS.counts or "X",
        "genes": FLAGS.genes or "var_names",
        "genes_sha256": names_hash(model.genes),
        "pooling": pooling,
        "preprocessing": {k: v for k, v in plan.settings.items() if k not in apart},
        "coverage": plan.settings.get("coverage", {}),
        "min_gene_coverage": FLAGS.min_gene_coverage,
        "obs_filter": FLAGS.obs_filter or "",
        "cells": len(plan.names),
        "cells_sha256": names_hash(plan.names),
        "obs_names_sha256": rows_hash(obs, pooling),
        "empty_cells": [plan.names[i] for i in np.flatnonzero(empty)],
        "dtype": FLAGS.dtype or "float32",
        "store_dtype": FLAGS.store_dtype,
        "device": str(model.device),
        "versions": _versions(),
    }
    if not type(model).__module__.startswith("extract."):  # ours say all of it in their settings
        about["options"] = sorted(FLAGS.option)
    return about | {"identity": identity(about)}


def identity(about: dict[str, Any]) -> str:
    """SHA-256 of all that the rows depend on: equal for equal rows."""
    fixed = {key: value for key, value in about.items() if key not in FREE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """What of two extractions is not the same, for a message: "pooling 'cls', not 'mean'"."""
    return listed(_differences(found, asked), 4) or "its settings are not known"


def _differences(found: Any, asked: Any, where: str = "") -> list[str]:
    if not (isinstance(found, dict) and isinstance(asked, dict)):
        return [] if found == asked else [f"{where} {found!r}, not {asked!r}"]
    lines = []
    for key in {**found, **asked}:
        if where or key not in FREE:
            here, there = _plain(found.get(key)), _plain(asked.get(key))
            lines += _differences(here, there, f"{where}.{key}".strip("."))
    return lines


def _plain(value: Any) -> Any:
    """What anndata made of JSON's types, as these again."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def _input_hash(path: Path) -> str:
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return names_hash(f"{p.relative_to(path)} {sha256(p)}" for p in files)


def _versions() -> dict[str, str]:
    """Of this library and of those in use that rows may depend on."""
    used = [name for name in ("numpy", "torch", "transformers", "scanpy") if name in sys.modules]
    return {name: importlib.metadata.version(name) for name in ("sae-jax", *used)}

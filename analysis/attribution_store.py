"""Finished blocks of an attribution on disk, so that what was begun can be gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from scipy import sparse

from analysis.counterfactuals import Pairs
from analysis.perturbed import Coder, Embedder, Perturbed
from sae_jax import Dictionary, files, manifest
from sae_jax.errors import InputError, counted
from sae_jax.reading import read_object


@dataclasses.dataclass(frozen=True)
class Forwards:
    """Cells that went through the model, and that would have.

    Attributes:
      brute: genes times pairs, of all concepts: equation 2 as it stands.
      changed: the same without genes that an exchange leaves as they are.
      done: distinct exchanges, and each prototype once.
    """

    brute: int = 0
    changed: int = 0
    done: int = 0

    def __add__(self, other: Forwards) -> Forwards:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Forwards(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def __str__(self) -> str:
        by = counted(self.brute, "cell")
        return f"{self.done:,} of {by} through the model, {self.saved:.1%} saved"

    @property
    def saved(self) -> float:
        """The share of `brute` that was not done."""
        return 1 - self.done / max(self.brute, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Of a block of concepts what `attribution.Attribution` has of all."""

    scores: np.ndarray
    samples: sparse.csr_array | None
    forwards: Forwards


class Store:
    """A folder with attribution.json, which says what the scores are of, a file a block, and a
    manifest that grows with them.

    Raises:
        InputError: the folder holds other files, or blocks of something else.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        path = self._folder / "attribution.json"
        if path.exists():
            before = read_object(path, "; give a new folder.")
            names = sorted({*before, *settings})
            if other := [name for name in names if before.get(name) != settings.get(name)]:
                raise InputError(
                    f"{folder} holds an attribution of other {', '.join(other)}: give the same "
                    "call again, or another folder."
                )
        elif self._folder.exists() and any(self._folder.iterdir()):
            raise InputError(f"{folder} holds other files: give a new folder.")
        else:
            files.write_json(path, dict(settings))
        files.remove_leftovers(self._folder)
        if manifest.differs(self._folder, path.name):  # begun just now, or killed then
            manifest.add(self._folder, path.name)

    def load(self, number: int) -> Part | None:
        """A block, if it is there and, byte for byte, what was saved."""
        if not (path := self._path(number)).exists():
            return None
        if (told := manifest.differs(self._folder, path.name)) is not None:
            logging.warning("%s: %s; it is computed again", self._folder, told)
            return None
        with np.load(path) as stored:
            samples = None
            if "indptr" in stored:
                parts = (stored["data"], stored["indices"], stored["indptr"])
                samples = sparse.csr_array(parts, shape=tuple(stored["shape"]))
            return Part(stored["scores"], samples, Forwards(*stored["forwards"].tolist()))

    def save(self, number: int, part: Part) -> None:
        """Keep a block, whole or not at all."""
        arrays = {"scores": part.scores, "forwards": dataclasses.astuple(part.forwards)}
        if (samples := part.samples) is not None:
            arrays |= {"data": samples.data, "indices": samples.indices}
            arrays |= {"indptr": samples.indptr, "shape": samples.shape}
        path = self._path(number)
        with files.write_aside(path) as fresh:
            np.savez(fresh, **arrays)
        manifest.add(self._folder, path.name)

    def _path(self, number: int) -> Path:
        return self._folder / f"block_{number:05}.npz"


def identity(
    model: Embedder,
    dictionary: Coder | str,
    found: Perturbed,
    pairs: Pairs,
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """What scores depend on, each as a hash: the weights, the cells, their genes, the settings.

    Of a model it is the `checkpoint` that readers have, the precision it computes in and the
    batches that it takes the cells for, of a dictionary that is none of ours its decoder, of others
    the name of the class alone. What a model without `swaps` reads of obs is not looked at.
    """
    # Where they are as in most models they are left out: so folders of before still go on.
    more = {}
    if (dtype := getattr(model, "dtype", "float32")) != "float32":
        more["dtype"] = str(dtype)
    if np.any(batch := getattr(found, "batch", 0)):
        more["batch"] = _sha256([batch])
    return more | {
        "model": repr(getattr(model, "checkpoint", type(model).__name__)),
        "dictionary": _sha256(_weights(dictionary)),
        "pairs": _sha256([pairs.concepts, pairs.concept, pairs.prototype, pairs.counterfactual]),
        "values": _sha256([found.values.data, found.values.indices, found.values.indptr]),
        "genes": _sha256([np.array(found.genes)]),
        **{name: repr(value) for name, value in settings.items()},
    }


def _weights(dictionary: Coder | str) -> list[np.ndarray]:
    if isinstance(dictionary, Dictionary):
        config = json.dumps(dictionary.config.to_dict(), sort_keys=True)
        return [np.array(config), *jax.tree.leaves((dictionary.params, dictionary.normalizer))]
    name = dictionary if isinstance(dictionary, str) else type(dictionary).__name__
    held = vars(dictionary) if dataclasses.is_dataclass(dictionary) else {}
    told = [np.asarray(value) for _, value in sorted(held.items()) if _is_data(value)]
    return [np.array(name), np.asarray(getattr(dictionary, "decoder", 0)), *told]


def _is_data(value: Any) -> bool:
    """Whether what a coder holds is numbers or text, rather than an object of some library."""
    return isinstance(value, np.ndarray | jax.Array | str | int | float)


def _sha256(parts: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in map(np.asarray, parts):
        digest.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
    return digest.hexdigest()

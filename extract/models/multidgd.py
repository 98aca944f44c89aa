"""multiDGD, read without its package: representations by cell name, and the decoder.

There is no encoder: a cell that the model was not fitted on has no representation. The modules are
`Decoder`, `OutputModule` and `NB_Layer` of multiDGD 0.0.1 (src/multiDGD/nn).
"""

import itertools
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch

from extract.checkpoints import filled, read_json, read_weights, sha256
from extract.errors import InputError, check_file, listed, reading
from extract.models.base import Edited, Layer, Model, Plan, device_of, only_known, whole_number
from extract.models.vectors import CHUNK, Vectors, check_latents, edit_all

# The names of the weights with the representations of a split, and with its covariate latents.
_SPLITS = {
    "train": ("representation.z", "correction_rep.z"),
    "validation": ("validation_rep.z", "correction_val_rep.z"),
    "test": ("test_rep.z", "correction_test_rep.z"),
}


class _Output(torch.nn.Module):
    """From the shared hidden units to the fractions of one modality."""

    def __init__(self, n_in: int, n_out: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        n_layers, units = settings["n_hidden_modality"], settings["n_units"]
        wide = settings.get("decoder_width", 1)
        # The last hidden layer is as wide as the root of the features, at least.
        last = wide * max(units, round(n_out**0.5))
        hidden = [wide * units] * max(n_layers - 2, 0) + [last] * (n_layers > 1)
        self.fc = _mlp([n_in, *hidden, n_out])[:-1]
        self.distribution = torch.nn.ParameterDict({"log_r": torch.zeros(1, n_out)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden units [cells, n_in] -> fractions [cells, n_out] that sum to 1."""
        return torch.softmax(self.fc(hidden), dim=-1)


class _Decoder(torch.nn.Module):
    """Shared layers, then an output module a modality, by the names of multiDGD's weights."""

    def __init__(self, n_in: int, n_features: Sequence[int], settings: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [n_in] + [settings["n_units"]] * settings["n_hidden"]
        self.main = _mlp(widths)
        self.out_modules = torch.nn.ModuleList(
            _Output(widths[-1], n_out, settings) for n_out in n_features
        )

    def forward(self, x: torch.Tensor, modalities: Sequence[int]) -> list[torch.Tensor]:
        """Latents with covariate latents [cells, n_in] -> the fractions of some modalities."""
        hidden = self.main(x)
        return [self.out_modules[i](hidden) for i in modalities]


def _mlp(widths: Sequence[int]) -> torch.nn.Sequential:
    """Linear and ReLU in turn."""
    layers = [
        part
        for n_in, n_out in itertools.pairwise(widths)
        for part in (torch.nn.Linear(n_in, n_out), torch.nn.ReLU())
    ]
    return torch.nn.Sequential(*layers)


class MultiDGD(Model):
    """A multiDGD model: `<name>.pt`, `<name>_hyperparameters.json` and the `*_obs.csv` beside them.

    Cells are found by name among those that the model was fitted on; no expression is read, so
    `genes=` and `counts=` of `embed` have no effect. There is no preprocessing.

    Args:
      checkpoint: the folder with the three files, of one model.
      device: see `load_model`.
      dtype: "float32" alone.
      genes: names of the features of the first modality, or of all; the files do not hold them.

    Attributes:
      genes: names of the first modality's features; empty if they were not given.
      modalities: their names; multiDGD puts the RNA first.
      n_features: of each modality.
      covariates: the columns of obs that the model corrects for; none: no covariate latents.
      cells: the names of the cells with a representation, in the order of the obs file.

    Raises:
      InputError: files that are missing, damaged or do not fit together.
    """

    name = "multidgd"
    poolings = ("latent",)
    outputs = types.MappingProxyType({"fractions": "cell"})
    n_layers = 0

    def __init__(
        self,
        checkpoint: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        genes: Sequence[str] | None = None,
    ) -> None:
        if dtype != "float32":
            raise InputError(f"multidgd computes in float32, not {dtype}")
        self.device = device_of(device)
        json_path = _only(checkpoint, "*_hyperparameters.json")
        obs_path = _only(checkpoint, "*_obs.csv")
        path = checkpoint / f"{json_path.name.removesuffix('_hyperparameters.json')}.pt"
        with reading(json_path):
            settings = _hyperparameters(json_path)
            self.modalities: list[str] = list(settings["modalities"])
            self.n_features = _features(settings, json_path)
            self.covariates: list[str] = list(settings.get("correction_variable") or [])
        weights = read_weights(path)
        self.d_model = settings["latent_dimension"]
        self.genes = self._gene_names(genes)
        self.cells, self._latents, self._covariates = self._representations(weights, path, obs_path)
        n_in = self.d_model + self._covariates.shape[1]
        used = {name: weights[name] for name in weights if name.startswith("decoder.")}
        whole = filled(
            lambda: torch.nn.ModuleDict({"decoder": _Decoder(n_in, self.n_features, settings)}),
            used, path, json_path, layers=settings["n_hidden"] + settings["n_hidden_modality"],
        )  # fmt: skip
        self._decoder = whole["decoder"].requires_grad_(False).eval().to(self.device)
        self._position = {name: i for i, name in enumerate(self.cells)}
        self.checkpoint = {file.name: sha256(file) for file in (path, json_path, obs_path)}

    def plan(
        self,
        adata: anndata.AnnData,
        genes: str | None = None,
        counts: str | None = None,
        *,
        min_gene_coverage: float = 0.5,
        **preprocessing: Any,
    ) -> Plan:
        """See `Model.plan`; of `adata` only obs_names is read.

        Raises:
          InputError: cells that the model has no representation of, names that occur twice.
        """
        only_known(preprocessing, (), self.name)
        positions = self._positions(adata)

        def read(rows: slice | np.ndarray) -> Vectors:
            some = positions[rows]
            return Vectors((self._latents[some], self._covariates[some]))

        settings = {
            "cells": "by name",
            "model_cells": len(self.cells),
            "modalities": self.modalities,
            "covariates": self.covariates,
        }
        return Plan([str(name) for name in adata.obs_names], read, settings)

    def swaps(self, adata: anndata.AnnData, cells: np.ndarray, **options: Any) -> Any:
        """Refused, as there is no encoder.

        Raises:
          InputError: always.
        """
        raise InputError(
            "multidgd has no encoder: a cell's representation was fitted, not computed from its "
            "genes, so no gene can be exchanged before it. Change the representation and look at "
            "the genes that `decode` predicts instead (analysis.steering, `sae-jax steer`)"
        )

    def forward(
        self,
        inputs: Vectors,
        layers: Sequence[Layer],
        pooling: str,
        edited: Edited | None = None,
        outputs: Sequence[str] = (),
    ) -> tuple[dict[Layer, torch.Tensor], dict[str, torch.Tensor]]:
        """See `Model.forward`; "fractions", of the first modality, is the decoded latent, after any
        edit, with each cell's own covariate latent."""
        latent = torch.as_tensor(inputs.parts[0], device=self.device)
        if edited is not None:
            latent = edit_all(edited, latent)
        beside = torch.as_tensor(inputs.parts[1], device=self.device)
        more = {
            name: self._decoder(torch.cat((latent, beside), dim=-1), [0])[0] for name in outputs
        }
        return dict.fromkeys(layers, latent), more

    def covariate_latents(self, adata: anndata.AnnData) -> np.ndarray:
        """The covariate latents of cells, float32 [cells, d_cov], in the order of `adata`.

        Raises:
          InputError: a model without covariates, unknown cells.
        """
        if not self.covariates:
            raise InputError("the model was trained without covariates: there are no such latents")
        return self._covariates[self._positions(adata)]

    def decode(
        self,
        latents: np.ndarray,
        batch: None = None,
        covariates: np.ndarray | None = None,
        modality: int | str = 0,
    ) -> np.ndarray | dict[str, np.ndarray]:
        """The share of each feature in a cell's expected counts, float32 [cells, features], sum 1.

        Args:
          latents: [cells, d_model].
          batch: none here; see the reader of scVI.
          covariates: covariate latents [cells, d_cov], needed where the model has them.
          modality: a position, a name, or "all" for a dictionary of every modality by name.

        Raises:
          InputError: another width, values that are not finite, covariates that are missing or that
            the model does not have, an unknown modality.
        """
        if batch is not None:
            raise InputError("multidgd knows no batches: give covariate latents by covariates=")
        chosen = self._chosen(modality)
        rows = [check_latents(latents, self.d_model)]
        n_cov = self._covariates.shape[1]
        if covariates is None and n_cov:
            raise InputError(
                f"the model was trained with covariates ({listed(self.covariates)}): give their "
                f"latents [cells, {n_cov}] by covariates=; covariate_latents(adata) has those of "
                "cells"
            )
        if covariates is not None:
            if not n_cov:
                raise InputError("the model was trained without covariates: leave covariates out")
            rows.append(check_latents(covariates, n_cov, "covariates"))
            if len(rows[1]) != len(rows[0]):
                raise InputError(f"{len(rows[1])} rows of covariates for {len(rows[0])} latents")
        both = np.concatenate(rows, axis=1)
        found = [np.empty((len(both), self.n_features[i]), np.float32) for i in chosen]
        with torch.inference_mode():
            for at in range(0, len(both), CHUNK):
                part = slice(at, at + CHUNK)
                chunk = torch.as_tensor(both[part], device=self.device)
                for into, fractions in zip(found, self._decoder(chunk, chosen), strict=True):
                    into[part] = fractions.cpu().numpy()
        if modality == "all":
            return dict(zip(self.modalities, found, strict=True))
        return found[0]

    @property
    def dispersion(self) -> np.ndarray:
        """Inverse dispersion of the first modality's features, float32 [features]."""
        return self.dispersions[self.modalities[0]]

    @property
    def dispersions(self) -> dict[str, np.ndarray]:
        """Inverse dispersion, exp(log_r) + 1, by modality, float32 [features]."""
        modules = zip(self.modalities, self._decoder.out_modules, strict=True)
        return {
            name: (module.distribution["log_r"][0].exp() + 1).cpu().numpy()
            for name, module in modules
        }

    def _positions(self, adata: anndata.AnnData) -> np.ndarray:
        """Where the cells of `adata` are among the model's, int64 [cells]."""
        names = [str(name) for name in adata.obs_names]
        if unknown := [name for name in names if name not in self._position]:
            raise InputError(
                f"{len(unknown)} of {len(names)} cells are none of the {len(self.cells)} that the "
                f"model has a representation of ({listed(unknown)}; the model names its cells "
                f"{listed(self.cells, 3)}): multiDGD has no encoder, so new cells cannot be "
                "embedded; fit them with its own predict_new, or leave them out"
            )
        if not adata.obs_names.is_unique:
            twice = adata.obs_names[adata.obs_names.duplicated()].unique()
            raise InputError(f"{len(twice)} cell names occur more than once ({listed(twice)})")
        return np.array([self._position[name] for name in names], np.int64)

    def _chosen(self, modality: int | str) -> list[int]:
        everything = list(range(len(self.modalities)))
        if modality == "all":
            return everything
        if modality in everything:
            return [int(modality)]
        if modality in self.modalities:
            return [self.modalities.index(modality)]
        raise InputError(
            f"there is no modality {modality!r}; there are {listed(self.modalities)}, their "
            'positions, and "all"'
        )

    def _gene_names(self, genes: Sequence[str] | None) -> list[str]:
        if genes is None:
            return []
        first, every = self.n_features[0], sum(self.n_features)
        if len(genes) not in (first, every):
            raise InputError(
                f"genes has {len(genes)} names; the model's first modality has {first} features"
                + (f", all have {every}" if every > first else "")
            )
        return [str(name) for name in genes[:first]]

    def _representations(
        self, weights: Mapping[str, torch.Tensor], path: Path, obs_path: Path
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names, latents and covariate latents of the cells, split by split put in obs order."""
        names, splits = _obs(obs_path)
        n_cov = 0
        if self.covariates:
            if "correction_rep.z" not in weights:
                raise InputError(f"{path} has no correction_rep.z, the latents of its covariates")
            n_cov = weights["correction_rep.z"].shape[1]
        latents = np.full((len(names), self.d_model), np.nan, np.float32)
        covariates = np.full((len(names), n_cov), np.nan, np.float32)
        held = np.zeros(len(names), bool)
        for split, keys in _SPLITS.items():
            rows = np.flatnonzero(splits == split)
            if keys[0] not in weights:
                continue  # a test split that was never fitted
            if not len(rows):
                warnings.warn(
                    f"{path}: {keys[0]} is not used: {obs_path.name} names no cell of this split",
                    stacklevel=4,
                )
                continue
            held[rows] = True
            for key, into in zip(keys, (latents, covariates), strict=True):
                if into.shape[1]:
                    into[rows] = _block(weights, key, (len(rows), into.shape[1]), path)
        return [names[i] for i in np.flatnonzero(held)], latents[held], covariates[held]


def _block(
    weights: Mapping[str, torch.Tensor], key: str, shape: tuple[int, int], path: Path
) -> np.ndarray:
    if key not in weights:
        raise InputError(f"{path} has no {key}")
    found = weights[key].float().numpy()
    if found.shape != shape:
        raise InputError(
            f"{path}: {key} is {found.shape}, not {shape}, the cells of its split in the obs file "
            "and the width in the hyper-parameters"
        )
    if not np.isfinite(found).all():
        raise InputError(f"{path}: {key} holds NaN or infinite values")
    return found


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        there = listed(sorted(path.name for path in folder.iterdir()), 10) or "nothing"
        raise InputError(f"{folder} must hold one {pattern}, of one model; it holds {there}")
    return found[0]


def _hyperparameters(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    numbers = ("latent_dimension", "n_hidden", "n_hidden_modality", "n_units")
    if lacking := [key for key in (*numbers, "modalities") if settings.get(key) is None]:
        raise InputError(f"{path} lacks {listed(lacking)}")
    for key in numbers:
        whole_number(f"{path}: {key}", settings[key], 0)
    return settings


def _features(settings: Mapping[str, Any], path: Path) -> list[int]:
    """Features a modality; `modality_switch`, where the second begins, may be null."""
    total, switch = settings.get("n_features"), settings.get("modality_switch")
    if not (features := settings.get("n_features_per_modality")):
        features = [switch, total - switch] if total and switch else [total]
    if len(features) != len(settings["modalities"]) or None in features:
        raise InputError(f"{path} does not say how many features each modality has")
    return [whole_number(f"{path}: n_features", n, 1) for n in features]


def _obs(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and splits of the cells, in order."""
    check_file(path)
    with reading(path, "is no table of cells"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "train_val_test" not in table:
        raise InputError(f"{path} has no column train_val_test; it has {listed(table.columns, 9)}")
    names, splits = table.iloc[:, 0], table["train_val_test"].to_numpy(object)
    if unknown := sorted(set(splits) - set(_SPLITS)):
        raise InputError(
            f"{path}: train_val_test must be of {listed(_SPLITS)}, not {listed(unknown)}"
        )
    if not names.is_unique:
        raise InputError(f"{path} names cells twice ({listed(names[names.duplicated()].unique())})")
    return names.tolist(), splits

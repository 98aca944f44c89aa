"""scVI of scvi-tools 1.x, read without it: `model.pt`, its encoder and its decoder in PyTorch.

The latent is the posterior mean; scvi-tools' modules `FCLayers`, `Encoder` and `DecoderSCVI` say
which layer does what (scvi/nn/_base_components.py of 1.4.2).
"""

import collections
import logging
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse
import torch

from extract.cells import Expression, check_values, in_memory
from extract.checkpoints import filled, read_torch_allowing, sha256
from extract.errors import InputError, listed, reading
from extract.genes import align, naming_of
from extract.models.base import Edited, Layer, Model, Plan, device_of, only_known
from extract.models.vectors import CHUNK, Encoder, Vectors, VectorSwaps, check_latents, edit_all

# What scvi-tools 1.x takes where a model was made without saying.
_DEFAULTS: dict[str, Any] = {
    "n_hidden": 128,
    "n_latent": 10,
    "n_layers": 1,
    "dispersion": "gene",
    "gene_likelihood": "zinb",
    "latent_distribution": "normal",
    "log_variational": True,
    "encode_covariates": False,
    "deeply_inject_covariates": True,
    "batch_representation": "one-hot",
    "use_batch_norm": "both",
    "use_layer_norm": "none",
}
# Weights that neither the posterior mean nor the mean expression needs.
_UNUSED = (
    "l_encoder.",
    "z_encoder.var_encoder.",
    "decoder.px_r_decoder.",
    "decoder.px_dropout_decoder.",
    "px_r",
    "library_log_",
)


class _Layers(torch.nn.Module):
    """Linear, norms, ReLU, `n_layers` times; the one-hot batch [cells, n_batch] goes beside the
    input of the first layer, or of each."""

    def __init__(self, n_in: int, settings: Mapping[str, Any], n_batch: int, part: str) -> None:
        super().__init__()
        self.deep = bool(settings["deeply_inject_covariates"])
        width = settings["n_hidden"]
        here = ("both", part)

        def layer(inputs: int) -> torch.nn.Sequential:
            return torch.nn.Sequential(
                torch.nn.Linear(inputs, width),
                torch.nn.BatchNorm1d(width, eps=1e-3)
                if settings["use_batch_norm"] in here
                else torch.nn.Identity(),
                torch.nn.LayerNorm(width, elementwise_affine=False)
                if settings["use_layer_norm"] in here
                else torch.nn.Identity(),
                torch.nn.ReLU(),
            )

        later = width + n_batch * self.deep
        inputs = [n_in + n_batch] + [later] * (settings["n_layers"] - 1)
        self.fc_layers = torch.nn.Sequential(
            collections.OrderedDict((f"Layer {i}", layer(n)) for i, n in enumerate(inputs))
        )

    def forward(self, x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Rows [cells, n_in] -> [cells, n_hidden]; `batch` [cells, n_batch], no column: none."""
        for i, layer in enumerate(self.fc_layers):
            x = layer(torch.cat((x, batch), dim=-1) if i == 0 or self.deep else x)
        return x


class _Network(torch.nn.Module):
    """Encoder and decoder, by the names that scvi-tools gives their weights."""

    def __init__(
        self, n_genes: int, n_batch: int, n_encoded: int, settings: Mapping[str, Any]
    ) -> None:
        super().__init__()
        hidden, latent = settings["n_hidden"], settings["n_latent"]
        self.z_encoder = torch.nn.ModuleDict(
            {
                "encoder": _Layers(n_genes, settings, n_encoded, "encoder"),
                "mean_encoder": torch.nn.Linear(hidden, latent),
            }
        )
        self.decoder = torch.nn.ModuleDict(
            {
                "px_decoder": _Layers(latent, settings, n_batch, "decoder"),
                "px_scale_decoder": torch.nn.Sequential(
                    torch.nn.Linear(hidden, n_genes), torch.nn.Softmax(dim=-1)
                ),
            }
        )

    def encode(self, x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Values [cells, genes] -> posterior means [cells, n_latent]."""
        return self.z_encoder["mean_encoder"](self.z_encoder["encoder"](x, batch))

    def decode(self, latents: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Latents [cells, n_latent] -> fractions [cells, genes]."""
        return self.decoder["px_scale_decoder"](self.decoder["px_decoder"](latents, batch))


class ScVI(Model):
    """An SCVI model of scvi-tools >= 1.0, as `model.save` wrote it.

    Preprocessing: raw counts of the model's genes, those that the file lacks are zero; log1p if the
    model takes it. `batch` names the column of obs with the batches, by default the one that the
    model was trained with. A model that gives batches to its decoder alone embeds cells of any
    batch, but for cells of batches it does not know there are no "fractions".

    Args:
      checkpoint: the folder with `model.pt`, or with one file that ends so (a prefix).
      device: see `load_model`.
      dtype: "float32" alone.

    Attributes:
      batches: the categories of the batch, in the order of their codes; one: no effect.
      batch_key: the column of obs that the model was trained with, or None.

    Raises:
      InputError: no such file, another class than SCVI, an older scvi-tools, covariates or a latent
        that this reader does not know, weights that are missing or misshaped.
    """

    name = "scvi"
    poolings = ("latent",)
    outputs = types.MappingProxyType({"fractions": "cell"})
    n_layers = 0
    values = "counts"

    def __init__(self, checkpoint: Path, *, device: str = "cpu", dtype: str = "float32") -> None:
        if dtype != "float32":
            raise InputError(f"scvi computes in float32, not {dtype}")
        self.device = device_of(device)
        path = _model_file(checkpoint)
        with reading(path):
            found = read_torch_allowing(path, inert=("pandas",))
            state = _entry(found, path, "model_state_dict")
            registry, settings = _supported(found, path)
            self.genes = _gene_names(found, path)
            self.naming = naming_of(self.genes)
            batch = _entry(registry, path, "field_registries", "batch", "state_registry")
            self.batches = [str(name) for name in _entry(batch, path, "categorical_mapping")]
            arguments = registry.get("setup_args") or {}
            self.batch_key: str | None = arguments.get("batch_key")
            self._size_factor: str | None = arguments.get("size_factor_key")
            self._settings = settings
            self.d_model = int(settings["n_latent"])
            # Columns of the one-hot batch beside the latent, and beside the expression. One batch
            # alone is no information: scvi-tools gives it none.
            self._n_batch = len(self.batches) if len(self.batches) > 1 else 0
            self._n_encoded = self._n_batch if settings["encode_covariates"] else 0
            weights = {
                name: tensor
                for name, tensor in state.items()
                if isinstance(tensor, torch.Tensor) and not name.startswith(_UNUSED)
            }
            network = filled(
                lambda: _Network(len(self.genes), self._n_batch, self._n_encoded, settings),
                weights, path, path, layers=settings["n_layers"],
            )  # fmt: skip
        self._network = network.requires_grad_(False).eval().to(self.device)
        self._px_r = state.get("px_r")
        self.checkpoint = {path.name: sha256(path)}

    def plan(
        self,
        adata: anndata.AnnData,
        genes: str | None = None,
        counts: str | None = None,
        *,
        min_gene_coverage: float = 0.5,
        **preprocessing: Any,
    ) -> Plan:
        """See `Model.plan`.

        Args:
          preprocessing: `batch`, as the class says; `duplicates`, "refuse" or "sum": columns that
            name one gene.
        """
        only_known(preprocessing, ("batch", "duplicates"), self.name)
        duplicates = preprocessing.get("duplicates", "refuse")
        known = {gene: i for i, gene in enumerate(self.genes)}
        expression = Expression(adata, counts)
        alignment = align(
            expression,
            genes,
            known,
            n_genes=len(known),
            of="model",
            min_coverage=min_gene_coverage,
            naming=self.naming,
            duplicates=duplicates,
        )
        if alignment.coverage < 1:
            absent = np.delete(np.array(self.genes, object), alignment.index)
            logging.warning(
                "%d of the model's %d genes are not in the file and count as zero: %s",
                len(absent),
                len(known),
                listed(absent),
            )
        column, codes = self._batch_of(adata, preprocessing.get("batch"))

        def counted(rows: slice | np.ndarray) -> scipy.sparse.csr_matrix:
            block = expression.rows(rows)
            check_values(block, self.values, expression.where, self.name)
            return alignment.select(block)

        def read(rows: slice | np.ndarray) -> Vectors:
            block = counted(rows)
            return Vectors((block, codes[rows]), np.diff(block.indptr) == 0)

        there = np.unique(alignment.index)

        def values(rows: slice | np.ndarray) -> scipy.sparse.csr_matrix:
            return counted(rows)[:, there].astype(np.float64)

        settings = {
            "genes": genes,
            "counts": counts,
            "min_gene_coverage": min_gene_coverage,
            "duplicates": duplicates,
            "coverage": alignment.describe(),
            "log1p": bool(self._settings["log_variational"]),
            "batch": column,
            "batch_encoded": self._n_encoded > 0,
        }
        names = [self.genes[i] for i in there]
        return Plan(expression.names, read, settings, genes=names, values=values)

    def forward(
        self,
        inputs: Vectors,
        layers: Sequence[Layer],
        pooling: str,
        edited: Edited | None = None,
        outputs: Sequence[str] = (),
    ) -> tuple[dict[Layer, torch.Tensor], dict[str, torch.Tensor]]:
        """See `Model.forward`; "fractions" is the decoded latent, after any edit."""
        counts, batch = inputs.parts
        x = torch.as_tensor(counts.toarray(), dtype=torch.float32, device=self.device)
        if self._settings["log_variational"]:
            x = torch.log1p(x)
        latent = self._network.encode(x, self._one_hot(batch, self._n_encoded))
        if edited is not None:
            latent = edit_all(edited, latent)
        more = {name: self._decode(latent, batch) for name in outputs}
        return dict.fromkeys(layers, latent), more

    def decode(
        self,
        latents: np.ndarray,
        batch: str | Sequence[str] | None = None,
        covariates: np.ndarray | None = None,
    ) -> np.ndarray:
        """The share of each gene in a cell's expected counts, float32 [cells, genes], sum 1.

        Args:
          latents: [cells, d_model].
          batch: a category, or one a cell; needed where the model was trained with several.
          covariates: none here; see the reader of multiDGD.

        Raises:
          InputError: another width, values that are not finite, no or unknown batches.
        """
        if covariates is not None:
            raise InputError("scvi decodes without covariate latents: leave covariates out")
        rows = check_latents(latents, self.d_model)
        codes = self._codes_to_decode(batch, len(rows))
        fractions = np.empty((len(rows), len(self.genes)), np.float32)
        with torch.inference_mode():
            for at in range(0, len(rows), CHUNK):
                part = slice(at, at + CHUNK)
                chunk = torch.as_tensor(rows[part], device=self.device)
                fractions[part] = self._decode(chunk, codes[part]).cpu().numpy()
        return fractions

    @property
    def dispersion(self) -> np.ndarray:
        """Inverse dispersion of the negative binomial, float32 [genes]; [genes, batches] or [genes,
        labels] where the model has one for each of these.

        Raises:
          InputError: one of each cell ("gene-cell"), or a likelihood without one.
        """
        likelihood = self._settings["gene_likelihood"]
        if likelihood not in ("nb", "zinb"):
            raise InputError(f"this model has the likelihood '{likelihood}': no dispersion")
        if self._settings["dispersion"] == "gene-cell" or self._px_r is None:
            raise InputError("this model has a dispersion of each gene in each cell, none of genes")
        return np.exp(self._px_r.float().numpy())

    def first_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's first linear layer, float32: weight [hidden, genes], bias [hidden].

        What one gene more or less changes there is its column: a change of rank one.
        """
        linear = self._network.z_encoder["encoder"].fc_layers[0][0]
        return linear.weight[:, : len(self.genes)].cpu().numpy(), linear.bias.cpu().numpy()

    def swaps(
        self,
        adata: anndata.AnnData,
        cells: np.ndarray,
        layers: Layer | Sequence[Layer] | None = None,
        pooling: str | None = None,
        genes: str | None = None,
        counts: str | None = None,
        *,
        batch_size: int = 64,
        empty_cells: str = "refuse",
        **preprocessing: Any,
    ) -> VectorSwaps:
        """Some cells and the encoder, for whoever exchanges counts of single genes.

        Args:
          cells: positions in `adata`, int64.
          layers, pooling, genes, counts, batch_size, empty_cells, preprocessing: as of `embed`.

        Raises:
          InputError: as `embed`.
        """
        self.resolve(layers)
        self.pooling(pooling)
        plan = self.plan(adata, genes, counts, **preprocessing)
        known = {gene: i for i, gene in enumerate(self.genes)}
        encoder = self._encoder([known[gene] for gene in plan.genes])
        batch = plan.read(cells).parts[1] if self._n_encoded else np.zeros(len(cells), np.int64)
        return VectorSwaps(plan.genes, plan.values(cells), batch, encoder)

    def _encoder(self, genes: Sequence[int]) -> Encoder:
        """The encoder in float32 arrays, of some genes, with what is affine folded in."""
        weights, biases, normed = [], [], []
        width = len(self.genes)
        no_batch = torch.zeros(max(self._n_encoded, 1), 1, device=self.device)
        for linear, batch_norm, layer_norm, _ in self._network.z_encoder["encoder"].fc_layers:
            weight, bias = linear.weight.double(), linear.bias.double()
            if isinstance(batch_norm, torch.nn.BatchNorm1d):
                scale = batch_norm.weight / torch.sqrt(batch_norm.running_var + batch_norm.eps)
                weight = weight * scale[:, None]
                bias = (bias - batch_norm.running_mean) * scale + batch_norm.bias
            # What stands beside the width is the one-hot batch: a bias of each.
            of_batch = weight[:, width:].T if weight.shape[1] > width else no_batch
            weights.append(weight[:, :width])
            biases.append(bias + of_batch)
            is_normed = isinstance(layer_norm, torch.nn.LayerNorm)
            normed.append(layer_norm.eps if is_normed else None)
            width = len(weight)
        mean = self._network.z_encoder["mean_encoder"]
        weights[0] = weights[0][:, genes]
        of_mean = mean.bias.expand(len(no_batch), -1)
        arrays = [
            [part.float().cpu().numpy() for part in parts]
            for parts in ([*weights, mean.weight], [*biases, of_mean])
        ]
        return Encoder(*arrays, tuple(normed), bool(self._settings["log_variational"]))

    def _decode(self, latents: torch.Tensor, batch: np.ndarray) -> torch.Tensor:
        if self._size_factor:
            raise InputError(
                f"the model scales by obs['{self._size_factor}'] (size_factor_key): its decoder "
                "gives no fractions"
            )
        return self._network.decode(latents, self._one_hot(batch, self._n_batch))

    def _one_hot(self, codes: np.ndarray, n_batch: int) -> torch.Tensor:
        """Float32 [cells, n_batch]; without columns where no batch is wanted."""
        if n_batch and (codes < 0).any():
            raise InputError(
                f"{int((codes < 0).sum())} cells are of no batch that the model knows "
                f"({listed(self.batches, 20)}), so they cannot be decoded; name the column of obs "
                "with their batches by batch="
            )
        return torch.as_tensor(
            codes[:, None] == np.arange(n_batch), dtype=torch.float32, device=self.device
        )

    def _batch_of(
        self, adata: anndata.AnnData, column: str | None
    ) -> tuple[str | None, np.ndarray]:
        """The column of obs that is read, if any, and the code of each cell's batch, int64."""
        if column is not None and self.batch_key is None:
            raise InputError(f"the model was trained without batches: leave out batch='{column}'")
        needed = column is not None or self._n_encoded > 0
        column = column or self.batch_key
        obs = in_memory(adata.obs)
        if column in obs:
            return column, self._codes(obs[column], f"obs['{column}']", strict=needed)
        if needed:
            raise InputError(
                f"there is no obs['{column}'], and the model wants the batch of each cell "
                f"({listed(self.batches, 20)}): name the column with batch="
            )
        return None, np.full(adata.n_obs, -1, np.int64)

    def _codes(self, names: Iterable[Any], where: str, *, strict: bool = True) -> np.ndarray:
        """The code of each batch, int64; those the model does not know are refused, or -1."""
        position = {name: i for i, name in enumerate(self.batches)}
        texts = [str(name) for name in names]
        unknown = dict.fromkeys(text for text in texts if text not in position)
        if strict and unknown:
            raise InputError(
                f"{where} has {len(unknown)} batches that the model was not trained on "
                f"({listed(unknown)}); it knows {listed(self.batches, 20)}"
            )
        return np.array([position.get(text, -1) for text in texts], np.int64)

    def _codes_to_decode(self, batch: str | Sequence[str] | None, n: int) -> np.ndarray:
        if batch is None:
            if self._n_batch:
                raise InputError(
                    "the model was trained with several batches; give batch=, one of "
                    f"{listed(self.batches, 20)}, or one a cell"
                )
            return np.zeros(n, np.int64)
        if self.batch_key is None:
            raise InputError("the model was trained without batches: leave out batch=")
        names = [batch] * n if np.ndim(batch) == 0 else list(batch)
        if len(names) != n:
            raise InputError(f"batch has {len(names)} entries for {n} latents: one, or one a cell")
        return self._codes(names, "batch")


def _model_file(folder: Path) -> Path:
    if (folder / "model.pt").is_file():
        return folder / "model.pt"
    found = sorted(folder.glob("*model.pt"))
    if len(found) != 1:
        there = listed(sorted(path.name for path in folder.iterdir()), 10) or "nothing"
        raise InputError(
            f"{folder} must hold model.pt, or one file whose name ends so; it holds {there}"
        )
    return found[0]


def _entry(structure: Any, path: Path, *keys: str) -> Any:
    for i, key in enumerate(keys):
        if not isinstance(structure, Mapping) or key not in structure:
            raise InputError(
                f"{path} has no {'.'.join(keys[: i + 1])}: it is no model that scvi-tools saved"
            )
        structure = structure[key]
    return structure


def _gene_names(found: Any, path: Path) -> list[str]:
    names = _entry(found, path, "var_names")
    if not isinstance(names, np.ndarray | list):
        raise InputError(f"{path} names its genes by a {type(names).__name__}, not by a list")
    genes = [str(name) for name in names]
    if len(set(genes)) < len(genes):
        raise InputError(f"{path} has gene names that occur twice: genes cannot be matched by name")
    return genes


def _supported(found: Any, path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The registry of a model, and the settings of its network.

    Raises:
      InputError: what this reader does not support.
    """
    attributes = _entry(found, path, "attr_dict")
    registry = attributes.get("registry_")
    version = str(registry.get("scvi_version", "")) if isinstance(registry, Mapping) else ""
    major = version.split(".")[0]
    if not major.isdigit() or int(major) < 1:
        raise InputError(
            f"{path} was saved by scvi-tools {version or '(no registry_, so an old one)'}; this "
            "reader wants 1.0 or later: load the model there and save it again"
        )
    if (kind := registry.get("model_name")) != "SCVI":
        raise InputError(f"{path} is a model of the class {kind}; this reader knows SCVI alone")
    if (method := registry.get("setup_method_name", "setup_anndata")) != "setup_anndata":
        raise InputError(f"{path} was set up by {method}; this reader knows setup_anndata alone")
    for argument in ("categorical_covariate_keys", "continuous_covariate_keys"):
        if keys := (registry.get("setup_args") or {}).get(argument):
            raise InputError(
                f"{path} was trained with {argument} {listed(keys)}, which this reader does not "
                "support (a batch_key it does)"
            )
    given = _entry(attributes, path, "init_params_")
    settings = {**_DEFAULTS, **given.get("non_kwargs", {})}
    for name, value in given.get("kwargs", {}).items():  # {"kwargs": {...}}, by the ** argument
        settings.update(value if isinstance(value, Mapping) else {name: value})
    for name, wanted in (("latent_distribution", "normal"), ("batch_representation", "one-hot")):
        if settings[name] != wanted:
            raise InputError(f"{path} has {name} '{settings[name]}'; this reader knows '{wanted}'")
    for name in ("extra_encoder_kwargs", "extra_decoder_kwargs"):
        if settings.get(name):
            raise InputError(f"{path} was made with {name}, which this reader does not support")
    return registry, settings

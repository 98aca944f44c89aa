"""Any torch module, read at its submodules: for models that have no reader here."""

from collections.abc import Callable as Function
from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import torch

from extract.cells import Expression
from extract.errors import InputError, listed
from extract.models.base import Edited, Layer, Model, Plan, device_of, only_known
from extract.models.vectors import Vectors


class Callable(Model):
    """`load_model("callable", module, hooks=["encoder.0", "encoder.1"], inputs=function)`.

    Layer i is the output of the i-th hook: a tensor [cells, d], or [cells, tokens, d], whose tokens
    are averaged ("mean") or of which the first is taken ("first"). All tokens count: a module that
    pads needs a reader of its own.

    Args:
      module: called with what `inputs` returns, without gradients, in eval mode.
      hooks: names of submodules, as in `named_modules`, in the order in which they run.
      inputs: an AnnData of some cells -> the tensor, or tuple of tensors, for `module`; each cell's
        must depend on that cell alone.
      genes: names of the genes, if there are any.

    Raises:
      InputError: no such submodule.
    """

    name = "callable"
    poolings = ("mean", "first")

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        hooks: Sequence[str],
        inputs: Function[[anndata.AnnData], Any],
        genes: Sequence[str] = (),
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        there = dict(module.named_modules())
        if unknown := [hook for hook in hooks if hook not in there]:
            raise InputError(f"no submodule {listed(unknown)}; there are {listed(there, 30)}")
        if dtype != "float32":
            raise InputError("convert the module yourself: dtype is not for models of your own")
        self.device = device_of(device)
        self.module = module.to(self.device).eval()
        self.hooks = [there[hook] for hook in hooks]
        self.inputs, self.genes = inputs, list(genes)
        self.n_layers, self.d_model, self.checkpoint = len(hooks), 0, {}

    @property
    def all_layers(self) -> list[Layer]:
        """The hooks, by position."""
        return list(range(self.n_layers))

    def plan(
        self,
        adata: anndata.AnnData,
        genes: str | None = None,
        counts: str | None = None,
        *,
        min_gene_coverage: float = 0.5,
        **preprocessing: Any,
    ) -> Plan:
        """Only names are checked: `inputs` says what genes and counts are."""
        only_known(preprocessing, (), self.name)
        names = Expression(adata, counts).names

        def read(rows: slice | np.ndarray) -> Vectors:
            made = self.inputs(adata[rows])
            tensors = made if isinstance(made, tuple) else (made,)
            if any(len(tensor) != len(np.arange(len(names))[rows]) for tensor in tensors):
                raise InputError("inputs must return one row for each cell of the AnnData given")
            return Vectors(tensors)

        return Plan(names, read, {})

    def forward(
        self,
        inputs: Vectors,
        layers: Sequence[Layer],
        pooling: str,
        edited: Edited | None = None,
        outputs: Sequence[str] = (),
    ) -> tuple[dict[Layer, torch.Tensor], dict[str, torch.Tensor]]:
        """See `Model.forward`."""
        found: dict[Layer, torch.Tensor] = {}

        def hook(layer: int) -> Function[..., Any]:
            def visit(_: torch.nn.Module, __: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                if edited is not None and edited.layer == layer:
                    rows = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
                    hidden = edited.apply(hidden, rows)
                if layer in layers:
                    pooled = hidden
                    if hidden.ndim == 3:
                        pooled = hidden[:, 0] if pooling == "first" else hidden.mean(dim=1)
                    found[layer] = pooled
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return visit

        handles = [part.register_forward_hook(hook(i)) for i, part in enumerate(self.hooks)]
        try:
            self.module(*(tensor.to(self.device) for tensor in inputs.parts))
        finally:
            for handle in handles:
                handle.remove()
        return found, {}

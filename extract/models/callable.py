"""Any torch module, read at its submodules: for models that have no reader here."""

from collections.abc import Callable as Function
from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import torch

from extract.cells import Expression, loader
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
      hooks: names of submodules, as in `named_modules`, in the order in which they run. Each must
        give a tensor, or a tuple that begins with one.
      inputs: an AnnData of some cells, in memory wherever they are -> the tensor, or tuple of
        tensors, for `module`; each cell's must depend on that cell alone.
      genes: names of the genes, if there are any.

    Raises:
      InputError: no torch module, no such submodule, `inputs` that is no function.
    """

    name = "callable"
    poolings = ("mean", "first")
    of_folder = False

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
        if not isinstance(module, torch.nn.Module):
            raise InputError(f"callable reads a torch module, not a {type(module).__name__}")
        if isinstance(hooks, str) or not hooks or not all(isinstance(hook, str) for hook in hooks):
            raise InputError(f"hooks must be a list of names of submodules, not {hooks!r}")
        if not callable(inputs):
            raise InputError(
                f"inputs must be a function of an AnnData, not a {type(inputs).__name__}"
            )
        there = dict(module.named_modules())
        if unknown := [hook for hook in hooks if hook not in there]:
            raise InputError(f"no submodule {listed(unknown)}; there are {listed(there, 30)}")
        if dtype != "float32":
            raise InputError("convert the module yourself: dtype is not for models of your own")
        self.device = device_of(device)
        self.module = module.to(self.device).eval()
        self.hooks = {hook: there[hook] for hook in hooks}
        self.inputs, self.genes = inputs, list(genes)
        self.n_layers, self.d_model, self.checkpoint = len(self.hooks), 0, {}

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
        names, load = Expression(adata, counts).names, loader(adata)

        def read(rows: slice | np.ndarray) -> Vectors:
            made = self.inputs(load(rows))
            tensors = made if isinstance(made, tuple) else (made,)
            if strange := [type(part).__name__ for part in tensors if not torch.is_tensor(part)]:
                raise InputError(f"inputs must return tensors, not {listed(strange)}")
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
        """See `Model.forward`.

        Raises:
          InputError: a hook that did not run, or whose output is not as `Callable` says.
        """
        found: dict[Layer, torch.Tensor] = {}
        n_cells = len(inputs.lengths)

        def hook(layer: int, name: str) -> Function[..., Any]:
            def visit(_: torch.nn.Module, __: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) and output else output
                shape = tuple(hidden.shape) if torch.is_tensor(hidden) else type(hidden).__name__
                if not torch.is_tensor(hidden) or hidden.ndim not in (2, 3) or shape[0] != n_cells:
                    raise InputError(
                        f"the output of {name} must be a tensor [{n_cells} cells, d] or "
                        f"[{n_cells} cells, tokens, d], not {shape}"
                    )
                if edited is not None and edited.layer == layer:
                    rows = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
                    hidden = edited.apply(hidden, rows)
                if layer in layers:
                    pooled = hidden
                    if hidden.ndim == 3:
                        pooled = hidden[:, 0] if pooling == "first" else hidden.mean(dim=1)
                    found[layer] = pooled.clone()  # what follows may work in place
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return visit

        handles = [
            part.register_forward_hook(hook(i, name))
            for i, (name, part) in enumerate(self.hooks.items())
        ]
        try:
            self.module(*(tensor.to(self.device) for tensor in inputs.parts))
        finally:
            for handle in handles:
                handle.remove()
        names = list(self.hooks)
        if missed := [names[layer] for layer in layers if layer not in found]:
            raise InputError(f"{listed(missed)} did not run: the module does not call it")
        return found, {}

"""What every reader of a foundation model is: one protocol, one loop over cells."""

import abc
import dataclasses
import logging
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import torch

from extract.errors import InputError, listed
from extract.tokens import token_table

LATENT, EMBEDDING = "latent", "embedding"
BLOCK_CELLS = 4096  # read and run at once by `embed`
Layer = int | str
Edit = Callable[[np.ndarray], np.ndarray]


class Inputs(Protocol):
    """What a model reads of some cells, ready to be batched.

    Attributes:
      lengths: tokens a cell, int64 [cells]; all ones where a cell is one vector.
      empty: cells without any count in a gene of the model, bool [cells].
    """

    lengths: np.ndarray
    empty: np.ndarray

    def take(self, positions: np.ndarray) -> "Inputs":
        """The same of some cells."""
        ...

    def rows(self, pooling: str) -> np.ndarray:
        """Rows of output a cell, int64 [cells]: one, or its gene tokens under "tokens"."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cells and genes checked against a model; expression is read by `read` alone.

    Attributes:
      names: of the cells, in the file's order.
      read: rows (a slice or positions) -> Inputs; each cell's depend on that cell alone.
      settings: all of the preprocessing, for provenance, in JSON's types.
      cls: whether a cell that is a sequence begins with <cls>.
      genes: names of the genes that are read of the file, or None where no gene is.
      values: rows -> what inputs are made of, CSR float64 [cells, genes]: of each cell alone.
    """

    names: list[str]
    read: Callable[[slice | np.ndarray], Any]
    settings: dict[str, Any]
    cls: bool = True
    genes: list[str] | None = None
    values: Callable[[slice | np.ndarray], scipy.sparse.csr_matrix] | None = None


@dataclasses.dataclass(frozen=True)
class Edited:
    """Which hidden states to exchange on the way: those of `layer`, through `edit`.

    Attributes:
      tokens: "all", "genes" or "cls": which rows `edit` sees; the others stay as they are.
    """

    layer: Layer
    edit: Edit
    tokens: str = "all"

    def apply(self, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """`hidden` [.., d] with the rows where `chosen` [..] is true exchanged.

        Raises:
          InputError: `edit` returned another shape, or values that are not finite.
        """
        before = hidden[chosen]
        after = np.asarray(self.edit(before.detach().float().cpu().numpy()))
        if after.shape != tuple(before.shape) or not np.isfinite(after).all():
            raise InputError(
                f"edit was given rows {tuple(before.shape)} and must return as many finite ones; "
                f"it returned {after.shape}"
            )
        hidden = hidden.clone()
        hidden[chosen] = torch.as_tensor(after).to(hidden)
        return hidden


@dataclasses.dataclass(frozen=True)
class Run:
    """A forward pass: `hidden` {layer: [rows, d_model]}, `outputs` {name: [rows, ...]}."""

    hidden: dict[Layer, np.ndarray]
    outputs: dict[str, np.ndarray]


class Model(abc.ABC):
    """A reader. Subclasses say what they want, make inputs of cells, and run a batch.

    Attributes:
      name: in the registry.
      genes: the names of the genes that the model knows, in its order.
      n_layers: blocks; layers are 0 .. n_layers-1, their OUTPUTS, and "embedding", the input of
        block 0. A model of one layer has "latent" alone.
      d_model: width of a hidden state.
      poolings: hidden states of a cell to its row(s); the first is what the authors export.
      outputs: what `run` can give beside hidden states, and of what a row is: "token" or "cell".
      checkpoint: SHA-256 of the weights, by file. dtype: it computes in this precision.
      naming: what its genes are named by: "symbol", "ensembl", or "any".
      values: what it wants of expression by default: "counts", "log1p", or "any".
      of_folder: whether its checkpoint is a folder, rather than a Python object.
    """

    name: ClassVar[str]
    poolings: ClassVar[tuple[str, ...]]
    of_folder: ClassVar[bool] = True
    naming: str = "any"
    values: str = "any"
    dtype: str = "float32"
    outputs: Mapping[str, str] = types.MappingProxyType({})
    genes: list[str]
    n_layers: int
    d_model: int
    device: torch.device
    checkpoint: dict[str, str]
    _most_cells: int | None = None  # of a batch, since memory ran out

    @property
    def default_layer(self) -> Layer:
        """What the authors export."""
        return self.n_layers - 1 if self.n_layers else LATENT

    @abc.abstractmethod
    def plan(
        self,
        adata: anndata.AnnData,
        genes: str | None = None,
        counts: str | None = None,
        *,
        min_gene_coverage: float = 0.5,
        **preprocessing: Any,
    ) -> Plan:
        """Check names, genes and keywords; see the reader for its preprocessing.

        `adata` has the cells wanted and no others (`cells.restrict`): what a reader computes over
        cells, such as variable genes, it computes over all that are there.
        """

    def check(  # noqa: B027 - nothing to refuse where a cell is one vector
        self, plan: Plan, pooling: str, tokens: str = "all", outputs: Sequence[str] = ()
    ) -> None:
        """Refuse what the cells of `plan` cannot give; nothing is read or computed for it.

        `embed` and `run` call it. So must whoever reads and evaluates block by block, after `plan`.

        Args:
          pooling: of `poolings`.
          tokens: those to be edited, as in `run`.
          outputs: of the model's `outputs`.

        Raises:
          InputError: one of these needs a <cls> token, and cells have none.
        """

    @abc.abstractmethod
    def forward(
        self,
        inputs: Any,
        layers: Sequence[Layer],
        pooling: str,
        edited: Edited | None = None,
        outputs: Sequence[str] = (),
    ) -> tuple[dict[Layer, torch.Tensor], dict[str, torch.Tensor]]:
        """One batch: rows of each layer, cell after cell, and the outputs asked for.

        An output has a row for each cell, or for each gene token as `inputs.rows("tokens")` says.
        """

    def resolve(self, layers: Layer | Sequence[Layer] | None) -> list[Layer]:
        """Layers as the keys of `embed`: indices counted from 0, names.

        Raises:
          InputError: a layer that the model has not.
        """
        if layers is None:
            return [self.default_layer]
        if isinstance(layers, str) and layers == "all":
            return self.all_layers
        some = [layers] if isinstance(layers, int | str) else list(layers)
        there = self.all_layers
        if not some:
            raise InputError(f"layers is empty; {self.name} has {listed(there, 50)}")
        found: list[Layer] = []
        for layer in some:
            if isinstance(layer, int | np.integer) and -self.n_layers <= layer < 0:
                layer = int(layer) + self.n_layers
            if layer not in there:
                raise InputError(f"{self.name} has no layer {layer!r}; it has {listed(there, 50)}")
            found.append(layer if isinstance(layer, str) else int(layer))
        return list(dict.fromkeys(found))

    @property
    def all_layers(self) -> list[Layer]:
        """Every key of `embed`: "embedding" and the blocks, or "latent"."""
        return [EMBEDDING, *range(self.n_layers)] if self.n_layers else [LATENT]

    def pooling(self, pooling: str | None) -> str:
        """A pooling of this model's, by default the authors' own."""
        if pooling is not None and pooling not in self.poolings:
            raise InputError(
                f"{self.name} has no pooling {pooling!r}; it has {listed(self.poolings, 9)}"
            )
        return pooling or self.poolings[0]

    def embed(
        self,
        adata: anndata.AnnData,
        layers: Layer | Sequence[Layer] | None = None,
        pooling: str | None = None,
        genes: str | None = None,
        counts: str | None = None,
        *,
        batch_size: int = 64,
        empty_cells: str = "refuse",
        min_gene_coverage: float = 0.5,
        **preprocessing: Any,
    ) -> dict[Layer, np.ndarray]:
        """Hidden states of cells, float32 [cells, d_model] a layer, in the order of `adata`.

        Under pooling "tokens" the rows are gene tokens, cell after cell; `tokens` names them. Cells
        are read and run some thousands at a time, so those of an AnnData in a file, or of
        `anndata.experimental.read_lazy`, need no more memory than their hidden states and what is
        made of one block; but a matrix that is stored by columns (CSC) is read whole.

        Args:
          layers: block outputs, 0 .. n_layers-1 or negative, "embedding", a list of these, "all";
            None: what the authors export.
          pooling: one of `poolings`; None: the first, the authors' own.
          genes: the column of var with the model's gene names; None: var_names.
          counts: the layer that holds the expression; None: X; "raw": `adata.raw`, with its genes.
          batch_size: cells of like length that run together; no result depends on it but by
            rounding (1e-6). Halved when memory runs out, for later calls too.
          empty_cells: "refuse", or "nan" for a row of NaN, where no gene of the model is expressed.
          min_gene_coverage: the share of genes found by name, under which it is refused.
          **preprocessing: the reader's own keywords; their defaults are official.

        Raises:
          InputError: whatever of the input does not fit; before anything is computed.
        """
        layers, pooling = self.resolve(layers), self.pooling(pooling)
        preprocessing["min_gene_coverage"] = min_gene_coverage
        plan = self.plan(adata, genes, counts, **preprocessing)
        self.check(plan, pooling)
        blocks = [
            slice(start, start + BLOCK_CELLS) for start in range(0, len(plan.names), BLOCK_CELLS)
        ]
        if len(blocks) < 2:
            inputs = plan.read(slice(None))
            refuse_empty(inputs.empty, plan.names, empty_cells)
            return self.evaluate(inputs, layers, pooling, batch_size=batch_size).hidden
        empty, n_rows = [], []
        for inputs in map(plan.read, blocks):
            empty.append(inputs.empty)
            n_rows.append(int(inputs.rows(pooling).sum()))
        refuse_empty(np.concatenate(empty), plan.names, empty_cells)
        hidden: dict[Layer, np.ndarray] = {}
        for block, end in zip(blocks, np.cumsum(n_rows).tolist(), strict=True):
            part = self.evaluate(plan.read(block), layers, pooling, batch_size=batch_size).hidden
            for layer, rows in part.items():  # at once in their place: never are all there twice
                if layer not in hidden:
                    hidden[layer] = np.empty((sum(n_rows), *rows.shape[1:]), np.float32)
                hidden[layer][end - len(rows) : end] = rows
        return hidden

    def run(
        self,
        adata: anndata.AnnData,
        layer: Layer,
        edit: Edit | None,
        layers: Layer | Sequence[Layer] | None = None,
        pooling: str | None = None,
        genes: str | None = None,
        counts: str | None = None,
        *,
        tokens: str = "all",
        outputs: Sequence[str] = (),
        batch_size: int = 64,
        empty_cells: str = "refuse",
        min_gene_coverage: float = 0.5,
        **preprocessing: Any,
    ) -> Run:
        """`embed` with the hidden states of `layer` replaced by edit(hidden) on the way.

        What comes after `layer` is computed from the edited states: a reconstruction, an ablation,
        a steered latent is judged by what it does there.

        Args:
          edit: float32 [rows, d_model] -> the same shape; real tokens of some cells, never pads.
            None changes nothing.
          tokens: which rows are given to `edit`: "all", "genes" or "cls".
          outputs: of the model's `outputs`.

        Raises:
          InputError: as `embed`; an `edit` that returns another shape or NaN, or of a layer after
            all that are asked for, without outputs: it would change nothing.
        """
        (layer,), layers = self.resolve(layer), self.resolve(layers)
        pooling = self.pooling(pooling)
        if unknown := [name for name in outputs if name not in self.outputs]:
            raise InputError(
                f"{self.name} has no output {listed(unknown)}; it has {listed(self.outputs) or '-'}"
            )
        position = self.all_layers.index
        if edit is not None and not outputs and position(layer) > max(map(position, layers)):
            raise InputError(
                f"edit is of layer {layer}, and layers {listed(layers)} come before it: ask for "
                "later layers, or for outputs"
            )
        edited = None if edit is None else Edited(layer, edit, tokens)
        preprocessing["min_gene_coverage"] = min_gene_coverage
        _, inputs = self._inputs(
            adata, genes, counts, preprocessing, empty_cells, pooling, tokens, outputs
        )
        return self.evaluate(inputs, layers, pooling, edited, outputs, batch_size=batch_size)

    def tokens(
        self,
        adata: anndata.AnnData,
        genes: str | None = None,
        counts: str | None = None,
        *,
        empty_cells: str = "refuse",
        **preprocessing: Any,
    ) -> pd.DataFrame:
        """What the rows of pooling "tokens" are: columns `cell` and `gene`, names, a row each.

        Args as those of `embed`.

        Raises:
          InputError: a model without tokens; as `embed`.
        """
        pooling = self.pooling("tokens")
        plan, inputs = self._inputs(adata, genes, counts, preprocessing, empty_cells, pooling)
        return token_table(plan.names, inputs.rows(pooling), inputs.gene_ids(), self.gene_names)

    def _inputs(
        self,
        adata: anndata.AnnData,
        genes: str | None,
        counts: str | None,
        preprocessing: dict[str, Any],
        empty_cells: str,
        *wanted: Any,
    ) -> tuple[Plan, Any]:
        """The plan, and the inputs of every cell; `wanted` is what `check` takes."""
        plan = self.plan(adata, genes, counts, **preprocessing)
        self.check(plan, *wanted)
        inputs = plan.read(slice(None))
        refuse_empty(inputs.empty, plan.names, empty_cells)
        return plan, inputs

    def evaluate(
        self,
        inputs: Any,
        layers: Sequence[Layer],
        pooling: str,
        edited: Edited | None = None,
        outputs: Sequence[str] = (),
        *,
        batch_size: int = 64,
    ) -> Run:
        """`forward` over batches of cells of like length; rows come back in the order of `inputs`.

        Empty cells have NaN rows (under "tokens": none).
        """
        batch_size = whole_number("batch_size", batch_size, 1)
        per_cell = {"cell": np.ones(len(inputs.lengths), np.int64), "row": inputs.rows(pooling)}
        if outputs:
            per_cell["token"] = inputs.rows("tokens")
        start = {kind: np.cumsum(rows) - rows for kind, rows in per_cell.items()}
        hidden: dict[Layer, np.ndarray] = {}
        found: dict[str, np.ndarray] = {}

        def place(
            into: dict[Any, np.ndarray], key: Any, rows: torch.Tensor, cells: np.ndarray, kind: str
        ) -> None:
            if key not in into:
                shape = (int(per_cell[kind].sum()), *rows.shape[1:])
                into[key] = np.full(shape, np.nan, np.float32)
            counts = per_cell[kind][cells]
            where = np.repeat(start[kind][cells] - (np.cumsum(counts) - counts), counts)
            into[key][where + np.arange(counts.sum())] = rows.float().cpu().numpy()

        for cells, (rows, more) in self._batches(
            inputs, batch_size, lambda batch: self.forward(batch, layers, pooling, edited, outputs)
        ):
            for layer in layers:
                place(hidden, layer, rows[layer], cells, "row")
            for name, value in more.items():
                place(found, name, value, cells, self.outputs[name])
        if not hidden:  # no cell but empty ones
            nothing = np.full((int(per_cell["row"].sum()), self.d_model), np.nan, np.float32)
            hidden = {layer: nothing.copy() for layer in layers}
        return Run(hidden, found)

    def _batches(
        self, inputs: Any, size: int, work: Callable[[Any], Any]
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """(positions, work of them), longest first so that memory runs out at once if at all."""
        order = np.argsort(-inputs.lengths, kind="stable")
        order = order[~inputs.empty[order]]
        at = 0
        while at < len(order):
            cells = order[at : at + min(size, self._most_cells or size)]
            done = None
            try:
                with torch.inference_mode():
                    done = work(inputs.take(cells))
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or len(cells) == 1:
                    raise
            if done is None:  # here the error holds no tensor of the failed batch any more
                self._most_cells = len(cells) // 2
                logging.warning("out of memory: batches of %d cells from now on", self._most_cells)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            yield cells, done
            at += len(cells)


def _out_of_memory(error: Exception) -> bool:
    """Whether it is that; PyTorch says so of its CPU memory in the words of the system."""
    words = r"(out of|not enough|can't allocate|cannot allocate) memory"
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or bool(re.search(words, str(error), re.IGNORECASE))


def refuse_empty(empty: np.ndarray, names: Sequence[str], rule: str) -> None:
    """Raise InputError for empty cells unless the rule is "nan"."""
    if rule not in ("refuse", "nan"):
        raise InputError(f"empty_cells must be refuse or nan, not '{rule}'")
    if rule == "refuse" and empty.any():
        which = [names[i] for i in np.flatnonzero(empty)]
        raise InputError(
            f"{len(which)} cells express no gene of the model ({listed(which)}); remove them, or "
            'give empty_cells="nan" for a row of NaN each'
        )


def only_known(given: dict[str, Any], known: Sequence[str], name: str) -> None:
    """Refuse keywords of preprocessing that the reader does not have."""
    if unknown := [key for key in given if key not in known]:
        raise InputError(
            f"{name} has no preprocessing {listed(unknown)}; it has {listed(known, 30) or 'none'}"
        )


def whole_number(name: str, value: Any, least: int) -> int:
    """`value`, a keyword of that name.

    Raises:
      InputError: no whole number, or one below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be a whole number, at least {least}, not {value!r}")
    return int(value)


def device_of(name: str) -> torch.device:
    """A device of this machine; "auto" is the accelerator if there is one.

    Raises:
      InputError: one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device '{name}': {str(error).splitlines()[0]}") from None
    return torch.device(name)

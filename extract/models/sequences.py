"""Cells as sequences of gene tokens: padding, pooling, edits; what transformers share."""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import anndata
import numpy as np
import scipy.sparse
import torch

from extract.errors import InputError
from extract.models.base import Edited, Layer, Model, Plan

CLS_POOLINGS = ("cls", "cls_raw")  # of position 0


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Tokens of cells.

    Attributes:
      ids: vocabulary positions, one int64 array a cell, special tokens included.
      values: what goes with each token, float32, or None where the order says it all.
      before, after: special tokens at either end of every cell; those between are genes.
      empty: cells without a gene token, bool [cells].
    """

    ids: list[np.ndarray]
    values: list[np.ndarray] | None
    before: int
    after: int
    empty: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a cell, special ones included, int64 [cells]."""
        return np.array([len(ids) for ids in self.ids], np.int64)

    def take(self, positions: np.ndarray) -> "Sequences":
        """The same of some cells."""
        return dataclasses.replace(
            self,
            ids=[self.ids[i] for i in positions],
            values=None if self.values is None else [self.values[i] for i in positions],
            empty=self.empty[positions],
        )

    def rows(self, pooling: str) -> np.ndarray:
        """Rows of output a cell: one, or its gene tokens under "tokens", int64 [cells]."""
        if pooling != "tokens":
            return np.ones(len(self.ids), np.int64)
        return np.where(self.empty, 0, self.lengths - self.before - self.after)

    def gene_ids(self) -> np.ndarray:
        """Vocabulary positions of the rows under "tokens", int64 [tokens]."""
        parts = [
            ids[self.before : len(ids) - self.after]
            for ids, empty in zip(self.ids, self.empty, strict=True)
            if not empty
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])


@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded sequences on a device: `ids` [cells, tokens], `values` the same or None, `real` and
    `gene` bool [cells, tokens]: no pad; neither pad nor special token."""

    ids: torch.Tensor
    values: torch.Tensor | None
    real: torch.Tensor
    gene: torch.Tensor


def pad(cells: Sequences, pad_id: int, pad_value: float, device: torch.device) -> Batch:
    """Sequences as arrays, padded to the longest of them."""
    lengths = cells.lengths
    longest = int(lengths.max())
    real = np.arange(longest) < lengths[:, None]
    gene = real & (np.arange(longest) >= cells.before)
    gene &= np.arange(longest) < (lengths - cells.after)[:, None]
    ids = np.full(real.shape, pad_id, np.int64)
    ids[real] = np.concatenate(cells.ids)
    values = None
    if cells.values is not None:
        filled = np.full(real.shape, pad_value, np.float32)
        filled[real] = np.concatenate(cells.values)
        values = torch.as_tensor(filled, device=device)
    to = {"device": device}
    return Batch(
        torch.as_tensor(ids, **to), values, torch.as_tensor(real, **to), torch.as_tensor(gene, **to)
    )


def pool(hidden: torch.Tensor, batch: Batch, pooling: str) -> torch.Tensor:
    """Rows of a layer's hidden states [cells, tokens, d]; pads never count.

    "cls" is L2-normalised position 0, "cls_raw" the same as it is, "mean" over gene tokens,
    "mean_with_special" over all tokens, "tokens" every gene token.
    """
    if pooling == "tokens":
        return hidden[batch.gene].float()
    if pooling in CLS_POOLINGS:
        first = hidden[:, 0].clone().float()  # a view would keep all of `hidden`
        return torch.nn.functional.normalize(first, dim=-1) if pooling == "cls" else first
    chosen = (batch.gene if pooling == "mean" else batch.real).unsqueeze(-1)
    return (hidden.float() * chosen).sum(dim=1) / chosen.sum(dim=1)


Visit = Callable[[Layer, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Sequences to hidden states, float32 [cells, d_model], of one layer and one pooling."""

    model: "SequenceModel"
    layer: Layer
    pooling: str
    batch_size: int

    def __call__(self, inputs: Sequences) -> np.ndarray:
        """Rows of cells that have gene tokens."""
        run = self.model.evaluate(inputs, [self.layer], self.pooling, batch_size=self.batch_size)
        return run.hidden[self.layer]

    def gradients(
        self, inputs: Sequences, pull: Callable[[np.ndarray], np.ndarray]
    ) -> list[np.ndarray]:
        """Slopes of a function of rows along the values of tokens, float32, an array a cell.

        Args:
          inputs: with values.
          pull: rows [cells, d_model] -> the function's gradient with respect to each, the same.
        """
        found = []
        for start in range(0, len(inputs.ids), self.batch_size):
            cells = np.arange(start, min(start + self.batch_size, len(inputs.ids)))
            found += self._gradients(inputs.take(cells), pull)
        return found

    def _gradients(
        self, inputs: Sequences, pull: Callable[[np.ndarray], np.ndarray]
    ) -> list[np.ndarray]:
        """`gradients` of one batch."""
        model, rows = self.model, []
        batch = pad(inputs, model.pad_id, model.pad_value, model.device)
        batch.values.requires_grad_(True)

        def visit(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
            if layer == self.layer:
                rows.append(pool(hidden, batch, self.pooling))
            return hidden

        with torch.enable_grad():
            model.blocks(batch, visit, self.layer, self.pooling in CLS_POOLINGS)
            slope = pull(rows[0].detach().cpu().numpy())
            rows[0].backward(torch.as_tensor(slope).to(rows[0]))
        slopes = batch.values.grad.cpu().numpy()
        return [row[:n] for row, n in zip(slopes, inputs.lengths, strict=True)]


@dataclasses.dataclass(frozen=True)
class TokenSwaps(abc.ABC):
    """Cells of which the values of some genes are exchanged before they become tokens.

    Attributes:
      genes: names.
      values: what tokens are made of, CSR float64 [cells, genes].
      names: of the cells.
      before, after: ids of the special tokens at either end.
      before_values: what goes with `before`, float32; None where the order says it all.
      evaluate: what embeds their sequences.
    """

    genes: list[str]
    values: scipy.sparse.csr_matrix
    names: list[str]
    before: list[int]
    after: list[int]
    before_values: list[float] | None
    evaluate: Rows

    @abc.abstractmethod
    def seen(self, cell: int, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What the model sees of each value of a gene in a cell, all of the others being its own.

        Numbers, one for each of `genes`; where two of the same gene are equal, so are the tokens.
        """

    @abc.abstractmethod
    def tokens(
        self, cell: int, genes: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and values of a cell's gene tokens where `genes` have `values`."""

    def sequences(
        self, cells: np.ndarray, starts: np.ndarray, genes: np.ndarray, values: np.ndarray
    ) -> Sequences:
        """Tokens of cells in which some genes have other values; arguments as of `embed`."""
        ids, numbers = [], []
        for cell, (start, end) in zip(cells, itertools.pairwise(starts), strict=True):
            some, number = self.tokens(cell, genes[start:end], values[start:end])
            ids.append(np.concatenate([self.before, some, self.after]).astype(np.int64))
            if self.before_values is not None:
                numbers.append(np.concatenate([self.before_values, number]).astype(np.float32))
        special = len(self.before) + len(self.after)
        empty = np.array([len(some) == special for some in ids], bool)
        return Sequences(
            ids, None if self.before_values is None else numbers, len(self.before), len(self.after),
            empty,
        )  # fmt: skip

    def embed(
        self, cells: np.ndarray, starts: np.ndarray, genes: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Hidden states, float32 [rows, d_model], of cells in which some genes have other values.

        Args:
          cells: the cell that each row starts from, int64 [rows].
          starts: where the exchanges of each row begin in the next two, int64 [rows + 1].
          genes, values: exchanges; a gene comes once a row.

        Raises:
          InputError: a cell that is left without any gene.
        """
        found = self.sequences(cells, starts, genes, values)
        if found.empty.any():
            name = self.names[cells[np.flatnonzero(found.empty)[0]]]
            raise InputError(
                f"an exchange leaves cell '{name}' without any gene: leave out cells that express "
                "so few"
            )
        return self.evaluate(found)


class SequenceModel(Model, abc.ABC):
    """A transformer over gene tokens; subclasses run the blocks.

    Attributes:
      pad_id, pad_value: what stands where a cell of a batch has no token.
      cls_outputs: those of `outputs` that read the hidden state of <cls>.
    """

    pad_id: int
    pad_value: float = 0.0
    cls_outputs: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def blocks(self, batch: Batch, visit: Visit, last: Layer, first_only: bool) -> None:
        """Run to layer `last` and, after each layer, go on with visit(layer, hidden).

        `hidden` is [cells, tokens, d_model]; its pads are anything. `first_only` says that of
        `last` position 0 alone is wanted: [cells, 1, d_model] will do there.
        """

    @abc.abstractmethod
    def gene_names(self, ids: np.ndarray) -> np.ndarray:
        """Names of token ids, text [tokens]."""

    def heads(self, hidden: torch.Tensor, batch: Batch, name: str) -> torch.Tensor:
        """The output `name`: rows of gene tokens, from the last block's hidden states."""
        raise NotImplementedError

    def check(
        self, plan: Plan, pooling: str, tokens: str = "all", outputs: Sequence[str] = ()
    ) -> None:
        """See `Model.check`."""
        self._refuse(plan.cls, pooling, tokens, outputs)

    def _refuse(self, cls: bool, pooling: str, tokens: str, outputs: Sequence[str]) -> None:
        """Raise InputError for what would take the first gene for <cls>."""
        if tokens not in ("all", "genes", "cls"):
            raise InputError(f"tokens must be all, genes or cls, not '{tokens}'")
        needs = [f"pooling '{pooling}'"] * (pooling in CLS_POOLINGS)
        needs += [f"output '{name}'" for name in outputs if name in self.cls_outputs]
        needs += ["an edit of 'cls'"] * (tokens == "cls")
        if needs and not cls:
            raise InputError(
                f"{needs[0]} wants the <cls> token, and these cells have none (their first token "
                "is a gene); take another, or cells with <cls>"
            )

    def exchange(
        self,
        plan: Plan,
        cells: np.ndarray,
        evaluate: Rows,
        **own: Any,
    ) -> TokenSwaps:
        """The `TokenSwaps` of some cells of a plan; `own` are the reader's keywords of `swaps`.

        Raises:
          InputError: a model without such.
        """
        raise InputError(f"{self.name} does not say how a gene's value is exchanged")

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
        bins: str | None = None,
        **preprocessing: Any,
    ) -> TokenSwaps:
        """Some cells, for whoever exchanges values of single genes and embeds what that gives.

        Args:
          cells: positions in `adata`, int64.
          layers, pooling, genes, counts, batch_size, empty_cells, preprocessing: as of `embed`; one
            layer.
          bins: of scGPT, what an exchanged value is binned by; see its `exchange`.

        Raises:
          InputError: as `embed`; several layers; rows that are tokens, not cells.
        """
        wanted, pooling = self.resolve(layers), self.pooling(pooling)
        if len(wanted) > 1 or pooling == "tokens":
            raise InputError("genes are exchanged for one layer and for one row a cell: name both")
        plan = self.plan(adata, genes, counts, **preprocessing)
        self.check(plan, pooling)
        own = {} if bins is None else {"bins": bins}
        return self.exchange(plan, cells, Rows(self, wanted[0], pooling, batch_size), **own)

    def forward(
        self,
        inputs: Sequences,
        layers: Sequence[Layer],
        pooling: str,
        edited: Edited | None = None,
        outputs: Sequence[str] = (),
    ) -> tuple[dict[Layer, torch.Tensor], dict[str, torch.Tensor]]:
        """See `Model.forward`."""
        self._refuse(inputs.before > 0, pooling, edited.tokens if edited else "all", outputs)
        batch = pad(inputs, self.pad_id, self.pad_value, self.device)
        found: dict[Layer, torch.Tensor] = {}
        more: dict[str, torch.Tensor] = {}
        last = self.all_layers[-1] if outputs else max(layers, key=self.all_layers.index)

        def visit(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
            if edited is not None and layer == edited.layer:
                hidden = edited.apply(hidden, self._chosen(batch, edited.tokens))
            if layer in layers:
                found[layer] = pool(hidden, batch, pooling)
            if layer == last:
                more.update({name: self.heads(hidden, batch, name) for name in outputs})
            return hidden

        edits_last = edited is not None and edited.layer == last
        first_only = pooling in ("cls", "cls_raw") and not outputs and not edits_last
        self.blocks(batch, visit, last, first_only)
        return found, more

    def _chosen(self, batch: Batch, tokens: str) -> torch.Tensor:
        if tokens == "all":
            return batch.real
        if tokens == "genes":
            return batch.gene
        first = torch.zeros_like(batch.real)
        first[:, 0] = True
        return first

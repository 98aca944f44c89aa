"""Geneformer: Hugging Face's BERT over the genes of a cell, ranked by expression."""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import torch
import transformers

from extract.cells import Expression, check_values, in_memory, totals_of
from extract.checkpoints import dtype_of, filled, read_json, read_weights, sha256
from extract.errors import InputError, listed, one_line
from extract.genes import align
from extract.models.base import EMBEDDING, Edited, Layer, Plan, device_of, only_known, whole_number
from extract.models.geneformer_tokens import RankSwaps, read_vocabulary
from extract.models.sequences import Batch, Rows, SequenceModel, Sequences, TokenSwaps, Visit

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Geneformer(SequenceModel):
    """Any Geneformer, of 2021 (no <cls>) or later.

    Layers are block outputs. The authors' emb_layer 0 is our layer n_layers-1, their -1 (which is
    their default and ours) our n_layers-2.

    Poolings: "mean" over gene tokens, without <cls>, <eos> and pads; "cls", position 0, of models
    that have it; "mean_with_special"; "tokens". The output "logits" is the masked-LM head's, float
    [gene tokens, vocabulary].

    Args:
      checkpoint: a folder with config.json and model.safetensors or pytorch_model.bin.
      dictionaries: the folder of the authors' dictionaries, JSON or pickle (no code in a pickle
        runs); None: the checkpoint's, or `dictionaries` in it. Of several the ones that fit.
      token_dictionary, gene_median, ensembl_mapping, gene_name_id: files, instead of those found.
        The last two need not be there. Those beside a token dictionary that is named come first.

    Raises:
      InputError: files that are missing, damaged, refused or do not fit together.
    """

    name = "geneformer"
    poolings: ClassVar[tuple[str, ...]] = ("mean", "cls", "mean_with_special", "tokens")
    outputs = types.MappingProxyType({"logits": "token"})
    naming = "ensembl"
    values = "counts"

    def __init__(
        self,
        checkpoint: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        dictionaries: str | Path | None = None,
        token_dictionary: str | Path | None = None,
        gene_median: str | Path | None = None,
        ensembl_mapping: str | Path | None = None,
        gene_name_id: str | Path | None = None,
    ) -> None:
        self.device, self.dtype = device_of(device), dtype
        folders = [checkpoint, checkpoint / "dictionaries"]
        if dictionaries is not None:
            folders = [Path(dictionaries)]
            if not folders[0].is_dir():
                raise InputError(f"dictionaries={dictionaries} is not a folder")
        config = _read_config(checkpoint / "config.json")
        self._vocabulary = read_vocabulary(
            folders,
            config.vocab_size,
            {
                "token_dictionary": token_dictionary,
                "gene_median": gene_median,
                "ensembl_mapping": ensembl_mapping,
                "gene_name_id": gene_name_id,
            },
        )
        self.genes = self._vocabulary.genes
        self.token_names = self._vocabulary.tokens
        self.pad_id = self._vocabulary.pad
        self.n_layers, self.d_model = config.num_hidden_layers, config.hidden_size
        self.max_length = config.max_position_embeddings

        path = next((checkpoint / name for name in _WEIGHTS if (checkpoint / name).is_file()), None)
        if path is None:
            there = listed(sorted(p.name for p in checkpoint.iterdir()), 10)
            raise InputError(f"{checkpoint} has no {' or '.join(_WEIGHTS)}; it holds {there}")
        self._net, has_head = _build(config, path)
        self._net.to(self.device, dtype_of(dtype))
        self.checkpoint = {p.name: sha256(p) for p in (path, checkpoint / "config.json")}
        # What this one cannot do is not on its lists.
        if not has_head:
            self.outputs = types.MappingProxyType({})
        if self._vocabulary.cls is None:
            self.poolings = tuple(name for name in self.poolings if name != "cls")

    @property
    def default_layer(self) -> Layer:
        """The last block but one: the authors' emb_layer -1."""
        return self.n_layers - 2 if self.n_layers > 1 else EMBEDDING

    def pooling(self, pooling: str | None) -> str:
        """See `Model.pooling`."""
        if pooling == "cls" and pooling not in self.poolings:
            raise InputError(
                "this Geneformer has no <cls> token, so no pooling 'cls' (position 0 is the top "
                f"gene); it has {listed(self.poolings)}"
            )
        return super().pooling(pooling)

    def gene_names(self, ids: np.ndarray) -> np.ndarray:
        """Names of token ids: str, in the shape of `ids`."""
        return np.array(self.token_names)[ids]

    def plan(
        self,
        adata: anndata.AnnData,
        genes: str | None = None,
        counts: str | None = None,
        *,
        min_gene_coverage: float = 0.5,
        n_counts: str | None = None,
        naming: str = "ensembl",
        max_length: int | None = None,
        duplicates: str = "sum",
        **unknown: Any,
    ) -> Plan:
        """See `Model.plan`. Every cell has its row: obs['filter_pass'] is not heeded.

        Args:
          n_counts: the column of obs with each cell's total count over all genes that were
            measured; None: 'n_counts' if there is one, else sums over all columns of the file.
          naming: what the file's names are, "ensembl" ids (upper-cased, mapped from former ids,
            version suffixes dropped) or "symbol".
          max_length: tokens a cell, special ones included; None: the model's most.
          duplicates: columns of one gene are added up ("sum") or refused ("refuse").
        """
        only_known(unknown, ("n_counts", "naming", "max_length", "duplicates"), self.name)
        words, special = self._vocabulary, self._n_special
        if naming not in ("ensembl", "symbol"):
            raise InputError(f"naming must be ensembl or symbol, not '{naming}'")
        max_length = self.max_length if max_length is None else max_length
        if whole_number("max_length", max_length, 2 * special + 1) > self.max_length:
            raise InputError(
                f"max_length must be at most {self.max_length}, the model's most, not {max_length}"
            )
        known, translate = words.by_id() if naming == "ensembl" else words.by_symbol()
        kinds = {"ensembl": 'Ensembl id, or gene symbol by naming="symbol"', "symbol": "symbol"}
        expression = Expression(adata, counts)
        alignment = align(
            expression,
            genes,
            known,
            n_genes=len(self.genes),
            of="smaller",
            min_coverage=min_gene_coverage,
            naming=kinds[naming],
            duplicates=duplicates,
            translate=translate,
        )
        if n_counts is None and "n_counts" in adata.obs:
            n_counts = "n_counts"
        given = None if n_counts is None else _totals(in_memory(adata.obs), n_counts)

        def counted(
            which: slice | np.ndarray,
        ) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
            block = expression.rows(which)
            check_values(block, self.values, expression.where, "Geneformer")
            totals = totals_of(block)
            if given is not None:
                without = (given[which] == 0) & (totals > 0)
                if without.any():
                    cells = np.asarray(expression.names, object)[which][without]
                    raise InputError(
                        f"obs['{n_counts}'] is 0 in {len(cells)} cells that have counts "
                        f"({listed(cells)})"
                    )
                totals = given[which]
            return alignment.select(block.astype(np.float64)), totals

        def read(which: slice | np.ndarray) -> Sequences:
            chosen, totals = counted(which)
            ids = words.rank(chosen, totals, max_length)
            return Sequences(ids, None, special, special, np.diff(chosen.indptr) == 0)

        there = np.unique(alignment.index)

        def values(which: slice | np.ndarray) -> scipy.sparse.csr_matrix:
            return words.unusual(*counted(which))[:, there]

        settings = {
            "genes": genes,
            "counts": counts,
            "min_gene_coverage": min_gene_coverage,
            "n_counts": n_counts,
            "n_counts_from": f"sums of {expression.where} over all columns"
            if n_counts is None
            else f"obs['{n_counts}']",
            "naming": naming,
            "max_length": int(max_length),
            "duplicates": duplicates,
            "dictionaries": words.files,
            "coverage": alignment.describe(),
        }
        found = [self.genes[i] for i in there]
        return Plan(expression.names, read, settings, words.cls is not None, found, values)

    def exchange(self, plan: Plan, cells: np.ndarray, evaluate: Rows) -> TokenSwaps:
        """See `SequenceModel.exchange`, and `RankSwaps` for what an exchange is."""
        words, (before, after) = self._vocabulary, self._vocabulary.special
        place = {gene: i for i, gene in enumerate(self.genes)}
        ids = words.gene_tokens[[place[gene] for gene in plan.genes]]
        most = plan.settings["max_length"] - len(before) - len(after)
        names = [plan.names[i] for i in cells]
        return RankSwaps(
            plan.genes, plan.values(cells), names, before, after, None, evaluate, ids, most
        )

    @property
    def _n_special(self) -> int:
        """Special tokens at either end of a cell."""
        return 0 if self._vocabulary.cls is None else 1

    def forward(
        self,
        inputs: Sequences,
        layers: Sequence[Layer],
        pooling: str,
        edited: Edited | None = None,
        outputs: Sequence[str] = (),
    ) -> tuple[dict[Layer, torch.Tensor], dict[str, torch.Tensor]]:
        """See `Model.forward`."""
        # The authors do not normalise position 0.
        pooling = "cls_raw" if pooling == "cls" else pooling
        return super().forward(inputs, layers, pooling, edited, outputs)

    def blocks(self, batch: Batch, visit: Visit, last: Layer, first_only: bool) -> None:
        """See `SequenceModel.blocks`."""
        bert = self._net.bert
        # True where attention goes, [cells, 1, 1, tokens]; no mask lets faster kernels run.
        mask = None if bool(batch.real.all()) else batch.real[:, None, None, :]
        hidden = visit(EMBEDDING, bert.embeddings(input_ids=batch.ids))
        for layer, block in enumerate(bert.encoder.layer):
            if last == EMBEDDING or layer > last:
                return
            done = block(hidden, attention_mask=mask)
            # A tuple before transformers 5.
            hidden = visit(layer, done[0] if isinstance(done, tuple) else done)

    def heads(self, hidden: torch.Tensor, batch: Batch, name: str) -> torch.Tensor:
        """See `SequenceModel.heads`: "logits" [gene tokens, vocabulary]."""
        return self._net.cls(hidden[batch.gene])


def _read_config(path: Path) -> transformers.BertConfig:
    found = read_json(path)
    if (kind := found.get("model_type")) != "bert":
        raise InputError(f"{path} is of a model '{kind}'; Geneformer is a 'bert'")
    try:
        return transformers.BertConfig.from_dict(found, attn_implementation="sdpa")
    except Exception as error:  # transformers checks fields by exceptions of its own
        raise InputError(f"{path} is refused: {one_line(error)}") from None


def _build(config: transformers.BertConfig, path: Path) -> tuple[torch.nn.Module, bool]:
    """The network with the weights of `path`, and whether they include the masked-LM head."""
    weights = read_weights(path)
    if not any(name.startswith(("bert.", "cls.")) for name in weights):
        weights = {f"bert.{name}": value for name, value in weights.items()}  # a plain BertModel
    has_head = any(name.startswith("cls.predictions.") for name in weights)
    if has_head:
        _tie(weights, config.tie_word_embeddings)

    def build() -> torch.nn.Module:
        net = transformers.BertForMaskedLM(config)
        if not has_head:
            net.cls = torch.nn.Identity()
        return net

    net = filled(
        build, weights, path, path.parent / "config.json", layers=config.num_hidden_layers,
        quiet="bert.embeddings.position_ids",
    )  # fmt: skip
    return net.eval(), has_head


def _tie(weights: dict[str, torch.Tensor], words: bool) -> None:
    """Give tied weights both of their names; files hold them under one or under both."""
    bias, decoder = "cls.predictions.bias", "cls.predictions.decoder"
    embedding = "bert.embeddings.word_embeddings.weight"
    if words and embedding in weights:
        weights[f"{decoder}.weight"] = weights[embedding]
    for here, there in ((bias, f"{decoder}.bias"), (f"{decoder}.bias", bias)):
        if here in weights:
            weights.setdefault(there, weights[here])


def _totals(obs: pd.DataFrame, column: str) -> np.ndarray:
    """Total counts of cells, float64 [cells], as obs[column] has them."""
    if column not in obs:
        raise InputError(f"there is no obs['{column}']; obs has {listed(obs.columns, 20)}")
    try:
        totals = np.asarray(obs[column], np.float64)
    except (TypeError, ValueError):
        raise InputError(f"obs['{column}'] holds no numbers; total counts are wanted") from None
    bad = ~np.isfinite(totals) | (totals < 0)
    if bad.any():
        raise InputError(
            f"obs['{column}'] must hold total counts, but {bad.sum()} cells have NaN, infinite or "
            f"negative ones ({listed(np.asarray(obs.index)[bad])}); name another column by "
            "n_counts="
        )
    return totals

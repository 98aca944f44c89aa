"""scGPT (Cui et al. 2024) from the authors' files: args.json, vocab.json, best_model.pt.

    h = LN(E[gene]) + LN(W2 relu(W1 min(value, 512) + b1) + b2)
    h = LN1(h + attention(h));  h = LN2(h + W4 relu(W3 h + b3) + b4)     in every block

No positions, no final norm, LayerNorm eps 1e-5, pads masked as keys.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse
import torch
from torch import nn
from torch.nn import functional

from extract import cells, checkpoints, variable
from extract.errors import InputError, listed
from extract.genes import Alignment, align
from extract.models import scgpt_tokens
from extract.models.base import EMBEDDING, Layer, Plan, device_of, only_known, whole_number
from extract.models.sequences import Batch, Rows, SequenceModel, Sequences, TokenSwaps, Visit

_HIGHEST_VALUE = 512
# What is supported of args.json; `input_style` are the `values` that a model was trained on.
_STYLES = {"input_style": ("binned", "log1p"), "input_emb_style": ("continuous",)}
# What `values` want of the expression they are made of.
_WANTED = {"binned": "any", "log1p": "counts", "given": "log1p"}
_PREPROCESSING: dict[str, Any] = {
    "values": None,
    "n_bins": None,
    "select": "random",
    "max_length": 1200,
    "hvg": None,
    "hvg_flavor": None,
    "gene_list": None,
    "include_zeros": False,
    "order": "file",
    "cls": True,
    "cls_value": None,
    "duplicates": "refuse",
    "seed": 0,
}


class _Attention(nn.Module):
    """Multi-head self-attention under the names of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads = heads

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, queries: slice
    ) -> torch.Tensor:
        width = hidden.shape[-1]
        if queries == slice(None):
            q, k, v = functional.linear(hidden, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            of_q, of_kv = self.in_proj_weight.split((width, 2 * width))
            bias_q, bias_kv = self.in_proj_bias.split((width, 2 * width))
            q = functional.linear(hidden[:, queries], of_q, bias_q)
            k, v = functional.linear(hidden, of_kv, bias_kv).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """One post-norm encoder block; `queries` are the positions whose output is wanted."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, queries: slice
    ) -> torch.Tensor:
        hidden = self.norm1(hidden[:, queries] + self.self_attn(hidden, mask, queries))
        return self.norm2(hidden + self.linear2(functional.relu(self.linear1(hidden))))


class _GeneEncoder(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.enc_norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.enc_norm(self.embedding(ids))


class _ValueEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(1, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = values.clamp(max=_HIGHEST_VALUE).unsqueeze(-1).to(self.linear1.weight.dtype)
        return self.norm(self.linear2(functional.relu(self.linear1(values))))


class _ValueDecoder(nn.Module):
    """The masked-value head: hidden state of a gene -> its value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(),
            nn.Linear(width, 1),
        )  # fmt: skip


class _CellDecoder(nn.Module):
    """The head of masked values by cell: <cls> and a gene -> its value (inner product)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(width, width)
        self.W = nn.Linear(width, width, bias=False)


class Network(nn.Module):
    """The parts under the authors' names, so that their state_dict fits."""

    def __init__(self, vocabulary: int, args: dict[str, Any], heads: Sequence[str]) -> None:
        super().__init__()
        width = args["embsize"]
        self.encoder = _GeneEncoder(vocabulary, width)
        self.value_encoder = _ValueEncoder(width)
        self.transformer_encoder = nn.Module()
        self.transformer_encoder.layers = nn.ModuleList(
            _Block(width, args["nheads"], args["d_hid"]) for _ in range(args["nlayers"])
        )
        if "mlm" in heads:
            self.decoder = _ValueDecoder(width)
        if "mvc" in heads:
            self.mvc_decoder = _CellDecoder(width)


class ScGPT(SequenceModel):
    """A checkpoint of scGPT.

    Outputs of `run`, one number a gene token: "mlm", the masked-value head, and "mvc", the head
    that reads <cls>.

    Raises:
      InputError: files that are missing, damaged, of another kind of model, or that do not fit
        together (all missing and misshaped weights are named; extra ones are warned of).
    """

    name = "scgpt"
    poolings = ("cls", "cls_raw", "mean", "mean_with_cls", "tokens")
    cls_outputs = ("mvc",)
    naming = "symbol"

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: str = "float32") -> None:
        self.device, self.dtype = device_of(device), dtype
        self.args = _read_args(folder / "args.json")
        self.vocabulary = _read_vocabulary(folder / "vocab.json", self.args["pad_token"])
        self.token_names = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        self.genes = [name for name in self.token_names if not _special(name)]
        self.values = _WANTED[self.args["input_style"]]
        self.n_layers, self.d_model = self.args["nlayers"], self.args["embsize"]
        self.pad_id = self.vocabulary[self.args["pad_token"]]
        self.pad_value = self.args["pad_value"]

        path = folder / "best_model.pt"
        weights = _plain_names(checkpoints.read_weights(path))
        if strange := [key for key in weights if key.split(".")[0] in ("dsbn", "bn")]:
            raise InputError(f"{path} normalises by batch ({listed(strange)}): not supported")
        rows = weights.get("encoder.embedding.weight", torch.empty(0)).shape[:1]
        if rows and rows[0] != len(self.vocabulary):
            raise InputError(
                f"vocab.json has {len(self.vocabulary)} tokens (special ones included), the "
                f"embedding in {path} has {rows[0]} rows: they are of different models"
            )
        heads = [
            head for head, part in (("mlm", "decoder.fc."), ("mvc", "mvc_decoder.gene2query."))
            if any(key.startswith(part) for key in weights)
        ]  # fmt: skip
        self.outputs = dict.fromkeys(heads, "token")
        self.network = checkpoints.filled(
            lambda: Network(len(self.vocabulary), self.args, heads), weights, path,
            folder / "args.json", layers=self.n_layers, quiet="cls_decoder.",
        )  # fmt: skip
        self.network.to(self.device, checkpoints.dtype_of(dtype)).eval().requires_grad_(False)
        self.checkpoint = checkpoints.hashes(folder, ("args.json", "vocab.json", path.name))

    def plan(
        self,
        adata: anndata.AnnData,
        genes: str | None = None,
        counts: str | None = None,
        *,
        min_gene_coverage: float = 0.5,
        **preprocessing: Any,
    ) -> Plan:
        """Check cells and genes against the vocabulary.

        Args:
          values: "binned": digits 1 .. n_bins - 1 by the cell's own quantiles, of counts or of any
            monotone function of them. "log1p": log(1 + count / total * 1e4), computed from raw
            counts, the total over all columns of the file. "given": X is that already. None: what
            the checkpoint was trained on, "binned" of all that the authors published.
          n_bins: None takes the checkpoint's.
          select: what stays when a cell has more genes than fit: "random" (official), "top", or
            "all", which cuts nothing.
          max_length: tokens a cell, <cls> included.
          hvg: the number of highly variable genes, over the cells of `adata`, that are candidates
            at all; gene_list: names of candidates, instead.
          hvg_flavor: scanpy's: "seurat_v3", of raw counts (official), or "seurat", of log1p values,
            computed from counts but for values="given", where it is the default.
          include_zeros: genes that a cell does not express are tokens too, of value 0.
          order: "file", the columns' (official), or "descending" by value.
          cls, cls_value: whether <cls> comes first, and its value; None is the pad value, -2
            (`embed_data`; the authors' tokenize_and_pad_batch gives it 0).
          duplicates: columns of one gene are refused ("refuse") or, if they are counts, added up
            before anything else ("sum").
          seed: of ties in binning and of select="random", with the cell's name.

        Raises:
          InputError: an unknown keyword or value, genes that do not match, values of X that are
            not what `values` wants.
        """
        only_known(preprocessing, list(_PREPROCESSING), self.name)
        settings = _check({**_PREPROCESSING, **preprocessing}, self.args)
        expression = cells.Expression(adata, counts)
        known = {name: i for i, name in enumerate(self.genes)}
        alignment = align(
            expression, genes, known, n_genes=len(known), of="smaller",
            min_coverage=min_gene_coverage, naming=self.naming, duplicates=settings["duplicates"],
        )  # fmt: skip
        token_ids = np.array([self.vocabulary[name] for name in self.genes], np.int64)
        wanted, what = _WANTED[settings["values"]], f"scGPT with values='{settings['values']}'"
        if wanted == "any" and settings["duplicates"] == "sum":
            wanted, what = "counts", "duplicates='sum'"

        def prepared(rows: slice | np.ndarray) -> scipy.sparse.csr_matrix:
            block = expression.rows(rows)
            cells.check_values(block, wanted, expression.where, what)
            selected = alignment.select(block)
            if settings["values"] == "log1p":
                selected = cells.log1p_per_10k(selected, cells.totals_of(block))
            return selected

        candidates = self._candidates(settings, alignment, expression)
        columns = _first_columns(alignment, candidates)
        candidates = candidates[np.argsort(columns, kind="stable")]
        ids = token_ids[candidates]

        def values(rows: slice | np.ndarray) -> scipy.sparse.csr_matrix:
            block = prepared(rows)[:, candidates].astype(np.float64)
            block.sort_indices()
            return block

        def read(rows: slice | np.ndarray) -> Sequences:
            names = np.asarray(expression.names, object)[rows]
            return self._sequences(values(rows), ids, names, settings)

        described = {
            **settings,
            "gene_list": None if settings["gene_list"] is None else len(settings["gene_list"]),
            "candidates": len(ids),
            "candidates_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
            "coverage": alignment.describe(),
        }
        genes = [self.genes[i] for i in candidates]
        return Plan(expression.names, read, described, settings["cls"], genes, values)

    def _candidates(
        self, settings: dict[str, Any], alignment: Alignment, expression: cells.Expression
    ) -> np.ndarray:
        """Positions in `genes` of those that may become tokens, ascending."""
        found = np.unique(alignment.index)
        if settings["gene_list"] is not None:
            known = {name: i for i, name in enumerate(self.genes)}
            if unknown := [name for name in settings["gene_list"] if name not in known]:
                raise InputError(f"gene_list: {listed(unknown)} are not in the vocabulary")
            return np.intersect1d(found, [known[name] for name in settings["gene_list"]])
        if settings["hvg"] is None:
            return found
        if settings["hvg"] > len(found):
            raise InputError(f"hvg must be in 1 .. {len(found)} genes, not {settings['hvg']}")
        flavor = settings["hvg_flavor"]
        wanted = "log1p" if settings["values"] == "given" else "counts"

        def blocks() -> Iterator[scipy.sparse.csr_matrix]:
            for block in expression.all_rows():
                cells.check_values(block, wanted, expression.where, "the choice of variable genes")
                selected = alignment.select(block)[:, found]
                if wanted == "counts" and flavor == "seurat":
                    selected = cells.log1p_per_10k(selected, cells.totals_of(block))
                yield selected.astype(np.float32)

        return found[variable.highly_variable(blocks, len(found), settings["hvg"], flavor)]

    def _sequences(
        self,
        block: scipy.sparse.csr_matrix,
        ids: np.ndarray,
        names: Sequence[str],
        settings: dict[str, Any],
    ) -> Sequences:
        cls = int(settings["cls"])
        tokenizer = _tokenizer(ids, settings)
        keys = scgpt_tokens.cell_keys(names, settings["seed"])
        tokens = [tokenizer.cell(block, row, key) for row, key in enumerate(keys)]
        gene_ids, values = [some for some, _ in tokens], [value for _, value in tokens]
        empty = np.array([len(some) == 0 for some in gene_ids], bool)
        if cls:
            first = np.array([self.vocabulary["<cls>"]])
            value = np.array([settings["cls_value"]], np.float32)
            gene_ids = [np.concatenate([first, some]) for some in gene_ids]
            values = [np.concatenate([value, some]) for some in values]
        return Sequences(gene_ids, values, cls, 0, empty)

    def exchange(
        self,
        plan: Plan,
        cells: np.ndarray,
        evaluate: Rows,
        *,
        bins: str = "prototype",
    ) -> TokenSwaps:
        """See `SequenceModel.exchange`.

        A gene of value 0 has no token (but with include_zeros): it vanishes or appears. Values are
        exchanged before binning. Truncation is done anew; what stays is drawn by cell and gene, so
        it is the same sample but for the gene itself and the one that it makes room for.

        Args:
          bins: what a value of another cell is binned by. "prototype": the bins of the cell that
            receives it; its other genes keep their digits. "rebin": the cell is binned anew as if
            measured so. "own": the bins of the cell that it comes from, a digit for a digit.

        Raises:
          InputError: other bins, or "own" of values that are not binned or with select="top".
        """
        settings = plan.settings
        if bins not in scgpt_tokens.BINS:
            raise InputError(f"bins must be one of {listed(scgpt_tokens.BINS)}, not {bins!r}")
        if bins == "own" and (settings["n_bins"] is None or settings["select"] == "top"):
            raise InputError(
                "bins='own' exchanges digits: for values='binned', and without select='top'"
            )
        names = [plan.names[i] for i in cells]
        ids = np.array([self.vocabulary[name] for name in plan.genes], np.int64)
        tokenizer, values = _tokenizer(ids, settings), plan.values(cells)
        keys = scgpt_tokens.cell_keys(names, settings["seed"])
        if bins == "own":
            for row, key in enumerate(keys):
                span = slice(values.indptr[row], values.indptr[row + 1])
                columns = values.indices[span]
                values.data[span] = tokenizer.digits(columns, values.data[span], key)
            tokenizer = dataclasses.replace(tokenizer, n_bins=None)
        cls = int(settings["cls"])
        return scgpt_tokens.DigitSwaps(
            plan.genes, values, names, [self.vocabulary["<cls>"]] * cls, [],
            [settings["cls_value"]] * cls, evaluate, tokenizer, keys, bins,
        )  # fmt: skip

    def gene_names(self, ids: np.ndarray) -> np.ndarray:
        """See `SequenceModel.gene_names`."""
        return np.array(self.token_names, object)[ids]

    def blocks(self, batch: Batch, visit: Visit, last: Layer, first_only: bool) -> None:
        """See `SequenceModel.blocks`."""
        network = self.network
        hidden = network.encoder(batch.ids) + network.value_encoder(batch.values)
        hidden = visit(EMBEDDING, hidden)
        mask = None if bool(batch.real.all()) else batch.real[:, None, None, :]
        for layer, block in enumerate(network.transformer_encoder.layers):
            if last == EMBEDDING or layer > last:
                return
            queries = slice(0, 1) if first_only and layer == last else slice(None)
            hidden = visit(layer, block(hidden, mask, queries))

    def heads(self, hidden: torch.Tensor, batch: Batch, name: str) -> torch.Tensor:
        """See `SequenceModel.heads`."""
        if name == "mlm":
            return self.network.decoder.fc(hidden).squeeze(-1)[batch.gene]
        head = self.network.mvc_decoder
        query = torch.sigmoid(head.gene2query(self.network.encoder(batch.ids)))
        return torch.einsum("ctd,cd->ct", head.W(query), hidden[:, 0])[batch.gene]


def _first_columns(alignment: Alignment, candidates: np.ndarray) -> np.ndarray:
    """The first column of the file that holds each candidate."""
    index, first = np.unique(alignment.index, return_index=True)
    return alignment.columns[first][np.searchsorted(index, candidates)]


def _tokenizer(ids: np.ndarray, settings: dict[str, Any]) -> scgpt_tokens.Tokenizer:
    room = settings["max_length"] - int(settings["cls"])
    return scgpt_tokens.Tokenizer(
        ids, settings["n_bins"], settings["include_zeros"],
        None if settings["select"] == "all" else room, settings["select"],
        settings["order"] == "descending",
    )  # fmt: skip


def _check(settings: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """Complete settings with what the checkpoint says; refuse what is not one of them."""
    if settings["values"] is None:
        settings["values"] = args["input_style"]
    binned, given = settings["values"] == "binned", settings["values"] == "given"
    if settings["hvg_flavor"] is None and settings["hvg"] is not None:
        settings["hvg_flavor"] = "seurat" if given else "seurat_v3"
    choices = {
        "values": tuple(_WANTED),
        "select": ("random", "top", "all"),
        "order": ("file", "descending"),
        "hvg_flavor": (None, *variable.FLAVORS),
        "include_zeros": (True, False),
        "cls": (True, False),
        "duplicates": ("refuse", "sum"),
    }
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise InputError(f"{key} must be one of {listed(allowed)}, not {settings[key]!r}")
    if settings["n_bins"] is not None and not binned:
        raise InputError("n_bins is for values='binned'")
    if binned and settings["n_bins"] is None:
        settings["n_bins"] = args["n_bins"]
    for key, least in {"n_bins": 3, "max_length": 2, "hvg": 1, "seed": 0}.items():
        if settings[key] is not None:
            settings[key] = whole_number(key, settings[key], least)
    names = settings["gene_list"]
    if names is not None:
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InputError(f"gene_list must be a list of names, not {names!r}")
        settings["gene_list"] = [str(name) for name in names]
        if settings["hvg"] is not None:
            raise InputError("give hvg or gene_list, not both")
    if given and settings["hvg_flavor"] == "seurat_v3":
        raise InputError("hvg_flavor='seurat_v3' wants raw counts, and values='given' has none")
    if given and settings["duplicates"] == "sum":
        raise InputError(
            "duplicates='sum' adds up counts, and values='given' has none: keep one column of each "
            "gene, or give counts with values='log1p'"
        )
    if settings["cls_value"] is None:
        settings["cls_value"] = args["pad_value"]
    if not isinstance(settings["cls_value"], int | float):
        raise InputError(f"cls_value must be a number, not {settings['cls_value']!r}")
    return settings


def _special(name: str) -> bool:
    return name.startswith("<") and name.endswith(">")


def _read_args(path: Path) -> dict[str, Any]:
    args = checkpoints.read_json(path)
    defaults = {"pad_token": "<pad>", "pad_value": -2, "n_bins": 51}
    args = defaults | {key: supported[0] for key, supported in _STYLES.items()} | args
    for key in ("embsize", "nheads", "d_hid", "nlayers", "n_bins"):
        whole_number(f"{path}: {key}", args.get(key), 1)
    if args["embsize"] % args["nheads"]:
        raise InputError(
            f"{path}: embsize {args['embsize']} is no multiple of {args['nheads']} heads"
        )
    if not isinstance(args["pad_value"], int | float) or not isinstance(args["pad_token"], str):
        raise InputError(f"{path}: pad_value must be a number, and pad_token text")
    for key, supported in _STYLES.items():
        if args[key] not in supported:
            raise InputError(
                f"{path}: {key} {args[key]!r} is not supported, only {listed(supported)}: this "
                "reader has no other way to read a gene's value"
            )
    if args.get("pre_norm"):
        raise InputError(f"{path}: pre_norm is not supported")
    return args


def _read_vocabulary(path: Path, pad: str) -> dict[str, int]:
    """Token -> id; special tokens that are missing are appended, as the authors do."""
    vocabulary = checkpoints.read_json(path)
    if strange := [name for name, i in vocabulary.items() if type(i) is not int]:
        raise InputError(f"{path}: {listed(strange)} have no whole number for an id")
    for token in (pad, "<cls>", "<eoc>"):
        vocabulary.setdefault(token, len(vocabulary))
    ids = sorted(vocabulary.values())
    if ids != list(range(len(ids))):
        raise InputError(f"{path}: the ids are not 0 .. {len(ids) - 1}, each once")
    return vocabulary


def _plain_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of flash-attention checkpoints as the plain ones: Wqkv holds q, k, v in this order."""
    renamed = {}
    for key, value in weights.items():
        key = key.removeprefix("module.").replace("self_attn._impl.", "self_attn.")
        renamed[key.replace("self_attn.Wqkv.", "self_attn.in_proj_")] = value
    return renamed

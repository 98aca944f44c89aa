"""A small scGPT of random weights in the authors' format, and cells for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse
import torch

import extract

GENES = [f"G{i}" for i in range(40)]
Program = Callable[..., Path]  # flags -> the output folder


def write_checkpoint(
    folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None
) -> Path:
    """A small random scGPT in the authors' format, of the parts that `change` may alter."""
    torch.manual_seed(0)
    width, inner, layers = 16, 24, 3
    args = {"embsize": width, "nheads": 2, "d_hid": inner, "nlayers": layers, "n_bins": 51}
    vocabulary = {name: i for i, name in enumerate([*GENES, "<pad>", "<cls>", "<eoc>"])}
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embedding.weight": (len(vocabulary), width),
        "encoder.enc_norm.weight": (width,), "encoder.enc_norm.bias": (width,),
        "value_encoder.linear1.weight": (width, 1), "value_encoder.linear1.bias": (width,),
        "value_encoder.linear2.weight": (width, width), "value_encoder.linear2.bias": (width,),
        "value_encoder.norm.weight": (width,), "value_encoder.norm.bias": (width,),
    }  # fmt: skip
    for i in range(layers):
        block = f"transformer_encoder.layers.{i}."
        shapes |= {
            block + "self_attn.in_proj_weight": (3 * width, width),
            block + "self_attn.in_proj_bias": (3 * width,),
            block + "self_attn.out_proj.weight": (width, width),
            block + "self_attn.out_proj.bias": (width,),
            block + "linear1.weight": (inner, width), block + "linear1.bias": (inner,),
            block + "linear2.weight": (width, inner), block + "linear2.bias": (width,),
            block + "norm1.weight": (width,), block + "norm1.bias": (width,),
            block + "norm2.weight": (width,), block + "norm2.bias": (width,),
        }  # fmt: skip
    weights = {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}
    parts = {"args": args, "vocab": vocabulary, "weights": weights}
    change(parts)
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(parts["args"]))
    (folder / "vocab.json").write_text(json.dumps(parts["vocab"]))
    torch.save(parts["weights"], folder / "best_model.pt")
    return folder


def some_cells(n: int = 12, seed: int = 0, genes: int = 30) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.4, 3, size=genes), size=(n, genes)).astype(np.float32)
    counts[:, 0] += 1
    cells = anndata.AnnData(scipy.sparse.csr_matrix(counts))
    cells.obs_names = [f"cell{i}" for i in range(n)]
    cells.var_names = GENES[:genes]
    return cells


CELLS = some_cells()


def expected(
    layers: Any, pooling: str, checkpoint: Path, cells: Any = CELLS, **options: Any
) -> Any:
    return extract.load_model("scgpt", checkpoint).embed(cells, layers, pooling, **options)

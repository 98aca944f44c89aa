"""A run folder of any size, as `sae-jax lens` leaves it, of random numbers: to measure and to test.

Cells of a label share features; nothing else in it means anything. All is written a part at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata.io import write_elem

from sae_jax import files

PART = 1 << 20  # entries, or rows of a table, that are made at once
TOP_GENES, TOP_TERMS = 50, 10


def write(
    folder: str | Path,
    n_features: int = 10_000,
    n_cells: int = 50_000,
    *,
    k: int = 64,
    n_labels: int = 12,
    n_genes: int = 2_000,
    n_terms: int = 500,
    attributed: int = 100,
    d: int = 64,
    seed: int = 0,
) -> Path:
    """Writes a run folder, and returns its path.

    Args:
      folder: a new one.
      n_features, n_cells: of the activations; k features are active in every cell, two of them as
        densely as a neuron.
      n_labels: of the column cell_type, which some cells lack; donor has six, n_counts numbers.
      n_genes, n_terms: of 10 to 200 genes each. attributed: features with attribution, GSEA and
        deletion curves.
      d: of the decoder.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    genes = np.asarray([f"GENE{i}" for i in range(n_genes)], object)
    terms = np.asarray([f"process {i} of cells (GO:{i:07d})" for i in range(n_terms)], object)
    with files.write_aside(folder) as fresh:
        fresh.mkdir()
        table = _write_h5ad(fresh / "features.h5ad", n_features, n_cells, k, n_labels, d, rng)
        names = table.index.to_numpy()
        named = rng.random(n_features) < 0.4
        size = rng.integers(10, max(11, min(200, n_genes // 4)), n_terms)
        _write_lens(fresh, names, named, genes, terms, size, rng)
        table["kind_text"] = np.where(rng.random(n_features) < 0.2, "local", "global")
        table = table.join(_best_terms(fresh / "top_terms.parquet"))
        best = genes[rng.integers(0, n_genes, (n_features, 3))]
        table["top_genes"] = [", ".join(row) for row in best]
        table["technical"] = rng.random(n_features) < 0.05
        table["replicated_by_direction"] = rng.integers(0, 3, n_features) / 2
        files.write_parquet(fresh / "features.parquet", table.reset_index())
        place = np.where(named[:, None], rng.normal(size=(n_features, 2)) * 5, np.nan)
        space = pd.DataFrame({"feature": names, "umap_1": place[:, 0], "umap_2": place[:, 1]})
        files.write_parquet(fresh / "feature_space.parquet", space)
        chosen = [rng.permutation(n_genes)[:n] for n in size]
        sets = pd.DataFrame({"term": np.repeat(terms, size), "gene": genes[np.concatenate(chosen)]})
        files.write_parquet(fresh / "gene_sets.parquet", sets.astype("category"))
        _write_concepts(fresh, names[:attributed], n_cells, genes, terms, rng)
        nulls = {"features": ["the dictionary's", "cells permuted"], "named": [named.mean(), 0.0]}
        pd.DataFrame(nulls).to_csv(fresh / "nulls.csv", index=False)
        told = {"h5ad": "synthetic.h5ad", "n_latents": n_features, "percentile": 99.0}
        (fresh / "lens.json").write_text(json.dumps(told))
    return folder


def _write_h5ad(
    path: Path, n_features: int, n_cells: int, k: int, n_labels: int, d: int,
    rng: np.random.Generator,
) -> pd.DataFrame:  # fmt: skip
    """features.h5ad; the table of its features.

    Features are dealt into k hands, two into the first; a cell has one of each, mostly early ones,
    from a place on that its label tells.
    """
    edges = np.concatenate([[0], np.linspace(2, n_features, k).astype(np.int64)])
    hand = np.diff(edges)
    label = rng.integers(0, n_labels, n_cells)
    count, total = np.zeros(n_features, np.int64), np.zeros(n_features)
    highest = np.zeros(n_features, np.float32)
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0",
                        "shape": np.array([n_cells, n_features])})  # fmt: skip
        x["indptr"] = np.arange(n_cells + 1, dtype=np.int64) * k
        indices = x.create_dataset("indices", n_cells * k, np.int32)
        data = x.create_dataset("data", n_cells * k, np.float32)
        for first in range(0, n_cells, PART // k):
            last = min(first + PART // k, n_cells)
            drawn = (rng.random((last - first, k)) ** 3 * hand).astype(np.int64)
            shift = label[first:last, None] * hand // n_labels
            feature = (edges[:-1] + (drawn + shift) % hand).ravel()
            value = rng.gamma(2, 1, len(feature)).astype(np.float32) + np.float32(0.01)
            indices[first * k : last * k], data[first * k : last * k] = feature, value
            count += np.bincount(feature, minlength=n_features)
            total += np.bincount(feature, value, minlength=n_features)
            np.maximum.at(highest, feature, value)
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical.from_codes(
                    np.where(rng.random(n_cells) < 0.01, -1, label),
                    [f"type {i}" for i in range(n_labels)],
                ),
                "donor": pd.Categorical.from_codes(
                    rng.integers(0, 6, n_cells), [f"donor {i}" for i in range(6)]
                ),
                "n_counts": rng.gamma(3, 1000, n_cells),
            },
            index=pd.Index([f"CELL{i:08d}-1" for i in range(n_cells)], dtype=object),
        )
        names = pd.Index([f"feature_{i}" for i in range(n_features)], dtype=object, name="feature")
        seen = np.maximum(count, 1)
        table = pd.DataFrame(
            {
                "latent": np.arange(n_features), "n_active": count, "density": count / n_cells,
                "mean_active": np.where(count > 0, total / seen, np.nan), "max_activation": highest,
            },
            index=names,
        )  # fmt: skip
        angle = 2 * np.pi * label / n_labels
        centre = 8 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        maps = {name: (centre + spread * rng.normal(size=centre.shape)).astype(np.float32)
                for name, spread in {"X_umap": 1.0, "X_tsne": 2.5}.items()}  # fmt: skip
        decoder = rng.normal(size=(n_features, d)).astype(np.float32)
        about = {"program": "lens", "model": "none", "d_in": d, "n_latents": n_features, "l0": k}
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        parts: dict[str, Any] = {
            "obs": obs, "var": table.rename_axis(None), "obsm": maps, "varm": {"decoder": decoder},
            "uns": {"about": json.dumps(about)}, "layers": {}, "obsp": {}, "varp": {},
        }  # fmt: skip
        for name, held in parts.items():
            write_elem(file, name, held)
    return table


def _write_lens(
    folder: Path, names: np.ndarray, named: np.ndarray, genes: np.ndarray, terms: np.ndarray,
    size: np.ndarray, rng: np.random.Generator,
) -> None:  # fmt: skip
    """genes, top_terms and enrichment: the three tables by features."""

    def top_genes(some: np.ndarray) -> dict[str, Any]:
        n = min(TOP_GENES, len(genes))
        which = np.argsort(rng.random((len(some), len(genes))), axis=1)[:, :n].ravel()
        t = np.sort(rng.gamma(4, 4, (len(some), n)))[:, ::-1].ravel()
        return {"feature": (np.repeat(some, n), names), "gene": (which, genes), "t": t,
                "log2_fold_change": rng.gamma(2, 1, len(t)), "log10_p": t,
                "q": np.minimum(1, 10.0 ** (5 - t))}  # fmt: skip

    def best_terms(some: np.ndarray) -> dict[str, Any]:
        n = min(2 * TOP_TERMS, len(terms))
        which = np.argsort(rng.random((len(some), len(terms))), axis=1)[:, :n].ravel()
        rank = np.tile(np.arange(n), len(some))
        feature = np.repeat(some, n)
        return {
            "feature": (feature, names), "side": (rank % 2, np.array(["up", "down"], object)),
            "rank": rank // 2, "term": (which, terms), "size": size[which], "hits": rank,
            "change": rng.normal(size=len(rank)), "auc": rng.random(len(rank)),
            "log10_p": 20.0 - rank, "log10_q": 18.0 - rank, "named": named[feature] & (rank < 3),
        }  # fmt: skip

    def every_term(some: np.ndarray) -> dict[str, Any]:
        n = len(some) * len(terms)
        which = np.tile(np.arange(len(terms)), len(some))
        floats = ("change", "change_z", "auc", "z", "log10_p_change", "log10_q_change")
        return {
            "feature": (np.repeat(some, len(terms)), names), "term": (which, terms),
            "size": size[which], "hits": rng.integers(0, 5, n),
            **{name: rng.random(n, np.float32) for name in floats},
        }  # fmt: skip

    every = np.arange(len(names))
    _write_long(folder / "genes.parquet", every, top_genes)
    _write_long(folder / "top_terms.parquet", every, best_terms)
    _write_long(folder / "enrichment.parquet", every, every_term)


def _best_terms(path: Path) -> pd.DataFrame:
    """The first term up of each feature that one names."""
    columns = ["feature", "side", "rank", "term", "named", "log10_q"]
    rows = files.read_parquet(path, columns=columns, filters=[("rank", "==", 0)])
    first = rows[rows["named"] & (rows["side"] == "up")].set_index("feature")
    found = first[["term", "log10_q"]]
    return found.set_axis(["best_term", "best_term_log10_q"], axis=1)


def _write_concepts(
    folder: Path, names: np.ndarray, n_cells: int, genes: np.ndarray, terms: np.ndarray,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """What `sae-jax concepts` leaves of some features."""

    def of_genes(make: Callable[[int], dict[str, Any]]) -> Callable[[np.ndarray], dict[str, Any]]:
        return lambda some: {
            "feature": (np.repeat(some, len(genes)), names),
            "gene": (np.tile(np.arange(len(genes)), len(some)), genes),
            **make(len(some) * len(genes)),
        }

    def samples(some: np.ndarray) -> dict[str, Any]:
        own = np.argsort(rng.random((len(some), 30, len(genes))), axis=2)[..., :100]
        cells = np.repeat(rng.integers(0, n_cells, (len(some), 40)), 3000, axis=0)
        pair = np.tile(np.repeat(np.arange(30), 100), len(some))
        rows = np.arange(len(pair))
        return {
            "feature": (np.repeat(some, 3000), names), "gene": (own.ravel(), genes),
            "prototype": cells[rows, pair // 3], "counterfactual": cells[rows, 10 + pair],
            "attribution": rng.normal(0, 0.05, len(pair)),
        }  # fmt: skip

    def gsea(some: np.ndarray) -> dict[str, Any]:
        n = len(some) * len(terms)
        p = rng.random(n) ** 3
        nes = rng.normal(0, 1, n)
        return {"feature": (np.repeat(some, len(terms)), names),
                "term": (np.tile(np.arange(len(terms)), len(some)), terms),
                "es": np.tanh(nes), "nes": nes, "p": p, "q": p**0.5}  # fmt: skip

    every = np.arange(len(names))
    attribution = of_genes(
        lambda n: {"attribution": rng.normal(0, 0.05, n) * (rng.random(n) < 0.5)}
    )
    dge = of_genes(
        lambda n: {
            "t": rng.normal(0, 5, n),
            "log2_fold_change": rng.normal(0, 1, n),
            "log10_p": rng.gamma(2, 2, n),
        }
    )
    makers = {"attribution": attribution, "dge": dge, "samples": samples,
              "gsea_attribution": gsea, "gsea_dge": gsea}  # fmt: skip
    for name, make in makers.items():
        _write_long(folder / f"{name}.parquet", every, make, features=8)
    steps = np.array([0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 75, 100])
    rows = [
        pd.DataFrame({"kind": kind, "order": order, "concept": i, "n_genes": steps,
                      "activation": np.exp(-steps / rng.gamma(2, 20))})
        for kind in ("deletion", "insertion") for order in ("attribution", "DGE", "random")
        for i in every
    ]  # fmt: skip
    files.write_parquet(folder / "deletion.parquet", pd.concat(rows))


def _write_long(
    path: Path,
    every: np.ndarray,
    make: Callable[[np.ndarray], dict[str, Any]],
    features: int = 64,
) -> None:
    """A long table, so many features a row group; texts are pairs of codes and values."""
    writer = None
    for first in range(0, len(every), features):
        columns = {
            name: pa.DictionaryArray.from_arrays(pa.array(held[0], pa.int32()), pa.array(held[1]))
            if isinstance(held, tuple) else held
            for name, held in make(every[first : first + features]).items()
        }  # fmt: skip
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(
            path, table.schema, write_page_checksum=True, compression="zstd"
        )
        writer.write_table(table)
    writer.close()

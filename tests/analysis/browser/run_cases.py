"""Small run folders: a random one, the second program's of the same dictionary, a hostile one."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from analysis.browser import synthetic

HOSTILE = (
    "<img src=x onerror=alert(1)>", "a/b/../../c", "two\nlines", "x" * 10_000, "'\"&;", "$",
    "ünïcödé ☃", "..",
)  # fmt: skip
GENE_INFO = (
    "#tax_id\tGeneID\tSymbol\tSynonyms\tdbXrefs\tdescription\tSymbol_from_nomenclature_authority\n"
    "9606\t931\tMS4A1\tCD20|LEU-16\tHGNC:1|Ensembl:ENSG00000156738\tmembrane spanning <b>\tMS4A1\n"
    "9606\t54474\tKRT20\tCD20|K20\tEnsembl:ENSG00000171431\tkeratin 20\tKRT20\n"
    "9606\t4069\tLYZ\tLZM\tEnsembl:ENSG00000090382\tlysozyme\tLYZ\n"
    "9606\t7\tOTHER\tALIAS\t-\t-\tOTHER\n"
)


def lens(folder: Path, seed: int = 0) -> Path:
    """A run with every analysis: 96 features, 400 cells, 120 genes, 30 terms."""
    return synthetic.write(
        folder, 96, 400, k=8, n_labels=4, n_genes=120, n_terms=30, attributed=10, d=5, seed=seed
    )


CONCEPT_TABLES = (
    "attribution", "samples", "gsea_attribution", "gsea_dge", "dge", "deletion", "gene_sets"
)  # fmt: skip


def split(whole: Path, lens_folder: Path, concepts_folder: Path) -> None:
    """A run as those of two programs: the concepts' lacks a few features and has a neuron."""
    shutil.copytree(whole, lens_folder)
    concepts_folder.mkdir()
    for name in CONCEPT_TABLES:
        (lens_folder / f"{name}.parquet").rename(concepts_folder / f"{name}.parquet")
        table = pd.read_parquet(concepts_folder / f"{name}.parquet")
        if "feature" in table:
            table["feature"] = table["feature"].astype(str).str.replace("feature", "concept")
            table.to_parquet(concepts_folder / f"{name}.parquet", index=False)
    adata = anndata.read_h5ad(whole / "features.h5ad")
    kept = adata[:, :90].copy()
    kept.var_names = [f"concept_{i}" for i in range(90)]
    neuron = anndata.AnnData(
        np.linspace(0, 2, adata.n_obs, dtype=np.float32)[:, None], obs=adata.obs,
        var=pd.DataFrame({"latent": [0]}, index=["neuron_0+"]),
    )  # fmt: skip
    kept.var["kind"], neuron.var["kind"] = "concept", "neuron"
    neuron.varm["decoder"] = np.ones((1, 5), np.float32)
    both = anndata.concat([kept, neuron], axis=1, merge="first")
    both.varm["decoder"] = np.concatenate([kept.varm["decoder"], neuron.varm["decoder"]])
    both.X = both.X.tocsr() if hasattr(both.X, "tocsr") else both.X
    both.obs = adata.obs
    both.write_h5ad(concepts_folder / "features.h5ad")
    table = both.var[["latent", "kind"]].copy()
    table["cell_type:best"], table["cell_type:auroc"] = "type 1", np.linspace(0.5, 1, len(table))
    table["top_genes"] = "GENE1, GENE2"
    table.rename_axis("feature").reset_index().to_parquet(concepts_folder / "features.parquet")
    (concepts_folder / "concepts.json").write_text(json.dumps({"labels": ["cell_type"]}))


def hostile(folder: Path) -> Path:
    """A small run whose features, genes, terms, labels, columns and cells have names to fear."""
    lens(folder)
    adata = anndata.read_h5ad(folder / "features.h5ad")
    names = [*HOSTILE, *adata.var_names[len(HOSTILE) :]]
    rename = dict(zip(adata.var_names, names, strict=True))
    adata.var_names = names
    adata.obs_names = [*HOSTILE, *adata.obs_names[len(HOSTILE) :]]
    fear = pd.Categorical.from_codes(np.arange(adata.n_obs) % len(HOSTILE), list(HOSTILE))
    adata.obs = adata.obs.assign(**{"<b>": fear, "$": fear})
    adata.write_h5ad(folder / "features.h5ad")
    for path in folder.glob("*.parquet"):
        table = pd.read_parquet(path)
        for column, names in {
            "feature": rename,
            "gene": {f"GENE{i}": name for i, name in enumerate(HOSTILE)},
            "term": {f"process {i} of cells (GO:{i:07d})": name for i, name in enumerate(HOSTILE)},
        }.items():
            if column in table:
                old = table[column].astype(object)
                table[column] = old.map(lambda name, names=names: names.get(name, name))
        table.to_parquet(path, index=False)
    return folder

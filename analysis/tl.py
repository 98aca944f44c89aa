"""The feature lens on an AnnData, as scanpy's tools work: results go into the object.

    from analysis import tl

    tl.encode(adata, dictionary, "X_scvi")
    tl.characterise(adata, "cell_type", technical=["n_counts"])
    tl.annotate(adata, "GO_Biological_Process_2021.gmt", expression_is="counts")
    features = tl.features(adata)              # cells x live features, var names them

Everything is under one key, by default "sae": `obsm["X_sae"]` has the activations, `uns["sae"]` the
tables. All of it can be written to h5ad and read back. The AnnData may be in a file
(`anndata.read_h5ad(backed="r")`) or lazy (`anndata.experimental.read_lazy`): expression then stays
there, and is read a block of cells at a time; results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from analysis import cells, characterisation, gene_sets, lens
from analysis.steering import Codebook
from sae_jax.errors import InputError


def encode(
    adata: anndata.AnnData, dictionary: Codebook, use_rep: str, *, key_added: str = "sae"
) -> None:
    """Codes of the cells' embedding; latents that no cell activates are left out.

    Adds `obsm["X_<key>"]`, CSR [cells, live latents], and `uns["<key>"]` with `latents`, their
    numbers in the dictionary, and `use_rep`. What lay under the key before is replaced.

    Args:
      use_rep: the key of obsm that holds the embedding on which the dictionary was trained.

    Raises:
      InputError: no such embedding, one that does not fit, or a dictionary dead on these cells.
    """
    z = sparse.csr_matrix(dictionary.encode(cells.embedding(adata, use_rep), sparse=True))
    live = np.flatnonzero(z.getnnz(axis=0))
    if not live.size:
        raise InputError("the dictionary is dead on these cells: no latent is active in any")
    adata.obsm[f"X_{key_added}"] = z[:, live]
    adata.uns[key_added] = {"use_rep": use_rep, "latents": live}


def characterise(
    adata: anndata.AnnData,
    groupby: str | None = None,
    technical: Sequence[str] = (),
    *,
    key: str = "sae",
) -> pd.DataFrame:
    """What each feature does, by `characterisation.summary`; also in `uns["<key>"]["features"]`.

    Args:
      groupby: a column of obs with labels of the cells, cell types say.
      technical: columns of obs that count as technical.

    Raises:
      InputError: `encode` was not run, or a column is missing.
    """
    z, found = _encoded(adata, key)
    labels = None if groupby is None else cells.labels(adata, groupby)
    obs = cells.in_memory(adata.obs)
    if missing := [name for name in technical if name not in obs]:
        raise InputError(f"obs has no {', '.join(missing)}")
    table = characterisation.summary(z, labels, obs[list(technical)])
    table.index = lens.feature_names(found["latents"])
    found["features"] = table
    return table


def annotate(
    adata: anndata.AnnData,
    sets: str | Path | gene_sets.GeneSets,
    *,
    expression_is: str,
    source: str = "X",
    gene_symbols: str | None = None,
    min_size: int = 20,
    max_size: int = 500,
    gene_table: str | Path | None = None,
    rule: lens.Rule | None = None,
    key: str = "sae",
    **options: Any,
) -> lens.Lens:
    """Genes and gene sets of every feature, by `lens.annotate`.

    Adds to `uns["<key>"]`: `genes` and `terms`, the best of each feature (as `Lens.top`, `best`),
    `coverage` of the gene sets, and `named`, CSR [features, `term_names`], 1 where a term names a
    feature.

    Args:
      sets: what `gene_sets.load` reads, or gene sets over the genes of `cells.expression`.
      min_size, max_size, gene_table: as in `gene_sets.load`.
      expression_is, source, gene_symbols: as `kind`, `source`, `symbols` of `cells.expression`.
      options: of `lens.annotate`: `null_features`, `seed`, `top_genes`, `memory_bytes`, ...

    Returns:
      The annotation with all of its tables; AnnData keeps the best of it.

    Raises:
      InputError: `encode` was not run; whatever the functions named above refuse.
    """
    z, found = _encoded(adata, key)
    expression = cells.expression(adata, source, expression_is, gene_symbols)
    if not isinstance(sets, gene_sets.GeneSets):
        sets = gene_sets.load(
            sets, expression.genes, min_size, max_size, gene_table=gene_table,
            min_universe=gene_sets.MIN_UNIVERSE,
        )  # fmt: skip
    annotated, _ = lens.annotate(z, expression, sets, rule, **options)
    names = lens.feature_names(found["latents"])
    for name, table in {"genes": annotated.top, "terms": annotated.best()}.items():
        columns = {"feature": pd.Categorical(names[table["feature"]], categories=names)}
        found[name] = table.assign(**columns).reset_index(drop=True)
    found["coverage"] = str(sets.coverage)
    found["term_names"] = np.asarray(annotated.terms, object)
    found["named"] = sparse.csr_matrix(annotated.named(), dtype=np.int8)
    found["named_by"] = list(annotated.naming)
    return annotated


def features(adata: anndata.AnnData, *, key: str = "sae") -> anndata.AnnData:
    """Cells x live features: X the activations, obs and obsm yours, var one row a feature.

    Of what was run before: `characterise` gives the columns of var, `annotate` the columns
    `n_terms`, `best_term` (up), `best_term_down`, `top_genes`, and varm["terms"] with uns["terms"].

    Raises:
      InputError: `encode` was not run.
    """
    z, found = _encoded(adata, key)
    names = lens.feature_names(found["latents"])
    var = pd.DataFrame({"latent": found["latents"]}, index=names)
    if "features" in found:
        var = var.join(found["features"])
    others = {name: values for name, values in adata.obsm.items() if name != f"X_{key}"}
    result = anndata.AnnData(z.copy(), cells.in_memory(adata.obs).copy(), var, obsm=others)
    if "named" in found:
        named = sparse.csr_matrix(found["named"])
        result.varm["terms"] = named
        result.uns["terms"] = found["term_names"]
        result.var["n_terms"] = named.getnnz(axis=1)
        for side, column in {"up": "best_term", "down": "best_term_down"}.items():
            terms = found["terms"]
            terms = terms[terms["named"] & (terms["side"] == side)].drop_duplicates("feature")
            result.var[column] = pd.Categorical(terms.set_index("feature")["term"].reindex(names))
        up = found["genes"][found["genes"]["t"] > 0].groupby("feature", observed=True)["gene"]
        top = up.agg(lambda some: ", ".join(some[:10])).reindex(names)
        result.var["top_genes"] = pd.Categorical(top)
    return result


def _encoded(adata: anndata.AnnData, key: str) -> tuple[sparse.csr_matrix, dict[str, Any]]:
    if f"X_{key}" not in adata.obsm or "latents" not in adata.uns.get(key, {}):
        raise InputError(f"there are no activations under {key!r}: run tl.encode first")
    return sparse.csr_matrix(adata.obsm[f"X_{key}"]), adata.uns[key]

"""The lens on an AnnData gives what the functions give, and survives a file."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from analysis import cells, characterisation, features, gene_sets, lens, tl
from sae_jax import InputError

RNG = np.random.default_rng(0)
N_CELLS, N_GENES, N_LATENTS = 300, 160, 12


class Dictionary:
    """ReLU of a fixed map; latent 4 is dead."""

    def __init__(self, d: int = 5) -> None:
        self.w = RNG.normal(size=(d, N_LATENTS))
        self.w[:, 4] = 0

    def encode(self, x: np.ndarray, sparse: bool = False) -> object:
        return np.maximum(x @ self.w - 1, 0)


@pytest.fixture
def adata() -> anndata.AnnData:
    counts = RNG.poisson(1.0, (N_CELLS, N_GENES)).astype(np.float32)
    kind = RNG.integers(0, 3, N_CELLS)
    counts[kind == 0, :25] += RNG.poisson(4, ((kind == 0).sum(), 25))
    x = RNG.normal(size=(N_CELLS, 5)) + np.eye(5)[kind] * 3
    return anndata.AnnData(
        sparse.csr_matrix(counts),
        pd.DataFrame(
            {"kind": pd.Categorical(np.array(list("abc"))[kind]), "depth": counts.sum(axis=1)},
            index=[f"cell{i}" for i in range(N_CELLS)],
        ),
        pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]),
        obsm={"X_rep": x},
    )


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    lines = ["first\t\t" + "\t".join(f"G{i}" for i in range(25))]
    for k in range(6):
        some = RNG.choice(N_GENES, 30, replace=False)
        lines.append(f"random {k}\t\t" + "\t".join(f"G{i}" for i in some))
    (tmp_path / "sets.gmt").write_text("\n".join(lines))
    return tmp_path / "sets.gmt"


def test_results_are_those_of_the_functions_and_survive_a_file(
    adata: anndata.AnnData, sets: Path, tmp_path: Path
) -> None:
    dictionary = Dictionary()
    tl.encode(adata, dictionary, "X_rep", key_added="k")
    z = dictionary.encode(adata.obsm["X_rep"].astype(np.float32))
    live = [i for i in range(N_LATENTS) if i != 4]
    np.testing.assert_allclose(adata.obsm["X_k"].toarray(), z[:, live])

    table = tl.characterise(adata, "kind", ["depth"], key="k")
    assert list(table.index) == [f"feature_{i}" for i in live]
    pd.testing.assert_frame_equal(
        table.reset_index(drop=True),
        characterisation.summary(z[:, live], adata.obs["kind"], adata.obs[["depth"]]).reset_index(
            drop=True
        ),
    )
    np.testing.assert_allclose(
        table["best_label_auroc"], features.auroc(z[:, live], adata.obs["kind"])[1].max(axis=1)
    )

    options = {"null_features": 40, "seed": 3, "progress": False}
    rule = lens.Rule(percentile=90, cells=5)
    found = tl.annotate(adata, sets, expression_is="counts", rule=rule, key="k", **options)
    expression = cells.expression(adata, "X", "counts")
    expected, _ = lens.annotate(
        sparse.csr_matrix(z[:, live]), expression, gene_sets.read(sets, expression.genes), rule,
        **options,
    )  # fmt: skip
    np.testing.assert_array_equal(found.log_p["change"], expected.log_p["change"])
    assert found.named()[:, 0].any()

    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = anndata.read_h5ad(tmp_path / "cells.h5ad")
    for some in (adata, again):
        by_feature = tl.features(some, key="k")
        by_feature.write_h5ad(tmp_path / "features.h5ad")
        assert by_feature.shape == (N_CELLS, len(live))
        assert by_feature.var["latent"].tolist() == live
        named = expected.named()
        np.testing.assert_array_equal(by_feature.varm["terms"].toarray(), named)
        for i, name in enumerate(by_feature.var_names):
            for column, sign in {"best_term": 1, "best_term_down": -1}.items():
                some = np.flatnonzero(named[i] & (np.sign(expected.change[i]) == sign))
                term = by_feature.var[column][name]
                best = expected.log_p["change"][i][some]
                assert term == expected.terms[some[best.argmax()]] if len(some) else pd.isna(term)
        assert by_feature.var["top_genes"].notna().all()
        assert set(by_feature.obsm) == {"X_rep"}


def test_order_and_bad_names_are_refused(adata: anndata.AnnData) -> None:
    for call in (tl.characterise, tl.features):
        with pytest.raises(InputError, match=r"run tl\.encode first"):
            call(adata)
    with pytest.raises(InputError, match="obsm has no 'X_other'"):
        tl.encode(adata, Dictionary(), "X_other")
    dead = Dictionary()
    dead.w[:] = 0
    with pytest.raises(InputError, match="dead on these cells"):
        tl.encode(adata, dead, "X_rep")
    tl.encode(adata, Dictionary(), "X_rep")
    with pytest.raises(InputError, match="obs has no batch"):
        tl.characterise(adata, technical=["batch"])

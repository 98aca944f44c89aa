"""The study of concepts as a program, on a real model and a few of its real cells."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

import extract
import sae_jax
from analysis import attribution
from experiments import concepts, concepts_page, concepts_study
from sae_jax import InputError

SMALL = {
    "labels": ["subpop"], "n_latents": ["30"], "seeds": ["0", "1"], "epochs": 60, "most": 4,
    "permutations": 60, "causal": 1, "prototypes": 3, "counterfactuals": 2, "quick": True,
    "min_size": 5, "learning_rate": 1e-2, "gene_symbols": "symbol",
}  # fmt: skip


def launch(**settings: Any) -> Path:
    """Runs the program in this process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["concepts"])
    with flagsaver.flagsaver():  # which forgets the flags defined within
        concepts.define_flags()
        for name, value in settings.items():
            flags.FLAGS[name].present = 1
            setattr(flags.FLAGS, name, value)
        concepts.main()
    return Path(settings["workdir"])


@pytest.fixture(scope="module")
def settings(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run with 400 cells of the test data's scVI."""
    folder = tmp_path_factory.mktemp("concepts")
    golden = data_folder / "golden" / "scvi"
    adata = anndata.read_h5ad(golden / "counts_hvg.h5ad")[::9].copy()
    adata.write_h5ad(folder / "cells.h5ad")
    symbols = adata.var["symbol"].astype(str).tolist()
    lines = ["\t".join([f"set {i}", "", *symbols[i * 20 : i * 20 + 25]]) for i in range(40)]
    (folder / "sets.gmt").write_text("\n".join(lines))
    return SMALL | {
        "h5ad": str(folder / "cells.h5ad"), "gene_sets": str(folder / "sets.gmt"),
        "checkpoint": str(golden / "model"), "workdir": str(folder / "run"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any]) -> Path:
    """What a run leaves."""
    return launch(**settings)


def test_what_is_left_agrees(finished: Path, settings: dict[str, Any]) -> None:
    assert {path.name for path in finished.iterdir()} >= set(concepts.FILES) - {"scvi"}
    adata = anndata.read_h5ad(settings["h5ad"])
    model = extract.load_model("scvi", settings["checkpoint"])
    x = model.embed(adata)["latent"]
    np.testing.assert_allclose(np.load(finished / "embedding.npy"), x, atol=1e-6)
    dictionary = sae_jax.Dictionary.load(finished / "sweep/dictionaries/0000")
    z = dictionary.encode(x)

    table = pd.read_parquet(finished / "features.parquet").set_index("feature")
    studied = table[table["n_important"].notna() & (table["kind"] == "concept")].index
    assert table.loc[studied, "drawn"].sum() == SMALL["most"]
    assert (table["kind"] == "neuron").sum() == SMALL["most"]
    concepts_of = table[table["kind"] == "concept"]
    for label in adata.obs["subpop"].unique():  # whose best concept is studied, drawn or not
        best = concepts_of.loc[concepts_of["subpop:best"] == label, "subpop:auroc"]
        assert best.empty or best.idxmax() in studied
    latents = [int(name.removeprefix("concept_")) for name in studied]
    np.testing.assert_allclose(table.loc[studied, "density"], (z[:, latents] > 0).mean(axis=0))

    # Attribution is that of the library, terms are of the genes attributed.
    wanted = attribution.attribute(
        model, dictionary, adata, latents, prototypes=3, counterfactuals=2, progress=False
    ).frame()
    long = pd.read_parquet(finished / "attribution.parquet")
    found = long[long["feature"].isin(studied)].pivot(
        index="feature", columns="gene", values="attribution"
    )
    by_symbol = dict(zip(adata.var_names, adata.var["symbol"].astype(str), strict=True))
    wanted = wanted.rename(columns=by_symbol)
    wanted = wanted.loc[:, ~wanted.columns.duplicated()][found.columns]
    np.testing.assert_allclose(found.loc[studied].to_numpy(), wanted.to_numpy(), atol=1e-5)
    best = found.loc[studied[0]].idxmax()
    assert table.loc[studied[0], "top_genes"].split(", ")[0] == best
    gsea = pd.read_parquet(finished / "gsea_attribution.parquet")
    first = gsea[gsea["feature"] == studied[0]].set_index("term")
    assert table.loc[studied[0], "attribution:p"] == first["p"].min()
    assert set(gsea["feature"]) == set(table.index[table["n_important"].notna()])

    strengths = pd.read_csv(finished / "strengths.csv").set_index("kind")
    assert strengths.loc["concepts, attribution", "n"] == SMALL["most"]
    assert strengths.loc["neurons, attribution", "terms"] == 40
    methods = pd.read_csv(finished / "methods.csv").set_index(["task", "method"])
    three = pd.read_csv(finished / "table_3.csv")
    own = methods.loc[("subpop", "TopK SAE (30)")]
    assert own["r2"] == pytest.approx(three["validation_r2"][0], abs=1e-4)  # of held-out cells
    causal = pd.read_parquet(finished / "causal.parquet").set_index("place")
    assert causal.loc[["layer latent"], "p"].isna().all()
    assert causal.loc[["output fractions"], "p"].notna().all()

    # Exchanging genes best first leaves less than at random.
    curves = pd.read_parquet(finished / "deletion.parquet").query("kind == 'deletion'")
    left = curves.groupby(["order", "n_genes"])["activation"].mean()
    assert left["attribution"].mean() < left["random"].mean()
    assert left["attribution"][0] == pytest.approx(1)
    page = (finished / "report.html").read_text()
    assert page.count("<h2") == 9
    assert page.count("<img") == 6


def test_a_run_goes_on(
    finished: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in finished.glob("*.parquet")}
    (finished / "gsea_dge.parquet").write_bytes(b"damaged")
    monkeypatch.setattr(concepts_page, "draw", lambda *_: dict.fromkeys(FIGURES, pixel(finished)))
    launch(**settings, resume=True)
    again = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in again} == {"gsea_dge.parquet", "features.parquet"}
    with pytest.raises(InputError, match="run of other settings"):
        launch(**settings | {"permutations": 61}, resume=True)
    with pytest.raises(InputError, match="earlier run"):
        launch(**settings)


FIGURES = ("cells", "attributed", "strengths", "deletion", "confusion", "replication")


def pixel(folder: Path) -> Path:
    """Any file that stands for a picture."""
    (folder / "figures/pixel.png").write_bytes(b"\x89PNG")
    return folder / "figures/pixel.png"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"labels": None}, "--labels is needed"),
        ({"labels": ["nothing"]}, "no column 'nothing'"),
        ({"n_latents": ["30", "x"]}, "whole numbers"),
        ({"per_class": ["3"]}, "two numbers"),
        ({"model": "scgpt", "checkpoint": None}, "--checkpoint is needed"),
        ({"studied": 31}, "must be one of --n_latents=30"),
        ({"gene_symbols": None}, "Ensembl ids"),
    ],
)
def test_what_is_refused(
    given: dict[str, Any], said: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        launch(**settings | {"workdir": str(tmp_path / "out")} | given)


def test_the_best_term_has_the_smallest_p_then_the_largest_nes() -> None:
    table = pd.DataFrame(
        {
            "feature": pd.Categorical(["a"] * 3 + ["b"] * 3, categories=["a", "b"]),
            "term": ["x", "y", "z"] * 2, "nes": [1.0, 3.0, 2.0, np.nan, 1.0, -1.5],
            "p": [0.01, 0.001, 0.001, np.nan, 0.5, 0.5], "q": [0.1] * 6,
        }
    )  # fmt: skip
    best = concepts_study.best_terms(table)
    assert best["term"].tolist() == ["y", "z"]
    assert best["strength"].tolist() == ["weak", "none"]

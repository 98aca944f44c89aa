"""The study of concepts as a program, on a real model and a few of its real cells."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver
from anndata._core.sparse_dataset import BaseCompressedSparseDataset
from scipy import sparse

import extract
import sae_jax
from analysis import attribution, stability
from analysis.counterfactuals import Pairs
from analysis.neurons import Neurons
from experiments import (
    concepts,
    concepts_inputs,
    concepts_learned,
    concepts_page,
    concepts_study,
)
from extract import main as extraction
from extract import store
from extract.errors import InputError as ExtractionError
from sae_jax import InputError, data, files
from tests.experiments import quick
from tests.experiments.damage import check_every_file

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


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quick.use(patch)
        patch.setattr(concepts_learned, "CAUSAL_CELLS", 50)
        patch.setattr(concepts_learned, "DRAWS", 5)
        yield


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
    there = {path.name for path in finished.iterdir()}
    assert there >= set(concepts.FILES) - {"scvi", "consensus"}
    check_every_file(finished)
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
    assert page.count("<img") == 7
    few = (concepts_of["n_active"] < 10).sum()
    assert f"{few} of the {len(concepts_of)} live concepts are active in fewer than 10" in page
    assert "those tested are cells that no dictionary" in page
    assert methods.loc[("subpop", "semi-NMF (30), 1 a cell"), "l0"] <= 1


def test_what_a_browser_reads(finished: Path, settings: dict[str, Any]) -> None:
    adata = anndata.read_h5ad(settings["h5ad"])
    found = anndata.read_h5ad(finished / "features.h5ad")
    table = pd.read_parquet(finished / "features.parquet").set_index("feature")
    assert found.obs_names.tolist() == adata.obs_names.tolist()
    assert found.obs.columns[0] == "subpop"
    assert found.var_names.tolist() == table.index.tolist()
    pd.testing.assert_series_equal(
        found.var["subpop:auroc"], table["subpop:auroc"], check_names=False
    )
    assert found.var["top_genes"].isna().sum() == table["n_important"].isna().sum() > 0
    x = np.load(finished / "embedding.npy")
    dictionary = sae_jax.Dictionary.load(finished / "dictionary")
    coders = {"concept": dictionary, "neuron": Neurons.of(x)}
    for kind, coder in coders.items():
        own = found.var["kind"] == kind
        latents = found.var.loc[own, "latent"]
        np.testing.assert_allclose(
            found[:, own].X.toarray(), coder.encode(x)[:, latents], rtol=1e-6
        )
        np.testing.assert_allclose(
            found.varm["decoder"][own], stability.directions(coder)[latents], rtol=1e-6
        )
    assert found.obsm["X_umap"].shape == (adata.n_obs, 2)
    about = json.loads(found.uns["about"])
    assert about["n_latents"] == 30
    assert about["r2"] == pytest.approx(
        1 - ((x - dictionary.decode(dictionary.encode(x))) ** 2).sum()
        / ((x - x.mean(axis=0)) ** 2).sum(), abs=1e-4,
    )  # fmt: skip
    assert about["n_live"] == (table["kind"] == "concept").sum()
    named = table[(table["kind"] == "concept") & (table["attribution:least_q"] <= 0.05)]
    assert about["n_named"] == len(named)
    assert json.loads(found.uns["concepts"])["most"] == SMALL["most"]

    # The mean of the single samples is the attribution.
    samples = pd.read_parquet(finished / "samples.parquet")
    means = pd.read_parquet(finished / "attribution.parquet").set_index(["feature", "gene"])
    first = samples[samples["feature"] == samples["feature"].iloc[0]]
    n_pairs = len(first[["prototype", "counterfactual"]].drop_duplicates())
    for name, gene in list(zip(first["feature"], first["gene"], strict=True))[::50]:
        total = first.loc[first["gene"] == gene, "attribution"].sum() / n_pairs
        assert total == pytest.approx(means.loc[(name, gene), "attribution"], abs=1e-6)
    column = found.var_names.get_loc(first["feature"].iloc[0])
    codes = found.X[:, column].toarray().ravel()
    assert set(first["prototype"]) <= set(np.argsort(-codes, kind="stable")[:3])
    assert (codes[first["counterfactual"].unique()] == 0).all()
    sets = pd.read_parquet(finished / "gene_sets.parquet")
    lines = Path(settings["gene_sets"]).read_text().split("\n")
    assert sets["term"].nunique() == 40
    for line in lines[:2]:
        name, _, *genes = line.split("\t")
        assert set(sets.loc[sets["term"] == name, "gene"]) <= set(genes)


def test_held_out_prototypes_are_the_next_ones(finished: Path) -> None:
    curves = pd.read_parquet(finished / "deletion_held_out.parquet")
    found = anndata.read_h5ad(finished / "features.h5ad")
    for latent in curves["concept"].unique():
        active = (found[:, f"concept_{latent}"].X > 0).sum()
        assert active > SMALL["prototypes"]
    inside = pd.read_parquet(finished / "deletion.parquet")
    assert set(curves["concept"]) < set(inside["concept"])
    assert (curves.query("n_genes == 0 and kind == 'deletion'")["activation"] == 1).all()


def test_tested_cells_are_unseen_where_there_are_enough() -> None:
    rng = np.random.default_rng(0)
    labels = pd.Series(rng.permutation(["a"] * 200 + ["b"] * 300 + ["c"] * 5)).astype("category")
    _, held_out = data.split(505, 0.2, 0)
    found = concepts_learned.cells_of(labels, 6000, 30, held_out=held_out, seed=1)
    split, names = found.split, labels.to_numpy()
    assert found.unseen
    assert set(split.test) <= set(held_out)
    assert not set(split.train) & set(held_out)
    for cells, n in ((split.test, split.n_test), (split.train, split.n_train)):
        assert pd.Series(names[cells]).value_counts().to_dict() == {"a": n, "b": n}
    assert split.n_test == min(30, (names[held_out] == "a").sum())
    assert split.left_out.to_dict() == {"c": 5}
    few = concepts_learned.cells_of(labels, 50, 30, held_out=held_out[:20], seed=1)
    assert not few.unseen
    assert few.split.n_test == 30
    assert set(few.split.test) - set(held_out)


def test_single_samples_are_those_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([[0.0, 1, -3, 0.5], [0, 0, 2, 0], [4, 0.1, 0, 0.2]])
    pairs = Pairs(
        np.array([3, 7]), np.array([0, 0, 1]), np.array([9, 8, 9]), np.array([1, 2, 1]), np.ones(3)
    )
    found = attribution.Attribution(
        np.zeros((2, 4)), list("abcd"), pairs, sparse.csr_array(values), attribution.Forwards()
    )
    genes = np.array(["D", "C", "A"], object)  # some of them, in another order
    monkeypatch.setattr(concepts_study, "SAMPLED", 1)
    table = concepts_study.single_samples(found, np.array([3, 2, 0]), ["p", "q"], genes)
    assert table.to_numpy().tolist() == [["p", 9, 1, "C", -3.0], ["p", 8, 2, "C", 2.0],
                                         ["q", 9, 1, "A", 4.0]]  # fmt: skip
    monkeypatch.setattr(concepts_study, "SAMPLED", 9)
    every = concepts_study.single_samples(found, np.array([3, 2, 0]), ["p", "q"], genes)
    assert len(every) == 5
    assert (every["attribution"] != 0).all()


def test_few_cells_are_counted_beside_the_shares() -> None:
    table = pd.DataFrame(
        {"attribution:p": [1e-6, 0.5, np.nan], "attribution:strength": ["strong", "none", None],
         "attribution:least_q": [0.01, 0.9, np.nan], "n_active": [9, 10, 1]}
    )  # fmt: skip
    row = concepts_study.strengths({"all": (table, "attribution")}, {"attribution": 3}).loc["all"]
    assert row[["n", "few_cells", "untested", "q"]].tolist() == [2, 1, 1, 0.5]


def test_the_page_of_a_run_without_held_out_prototypes_says_so(finished: Path) -> None:
    empty = pd.read_parquet(finished / "deletion_held_out.parquet").iloc[:0]
    found = dataclasses.make_dataclass("Found", ["held_out"])(empty)
    assert "No concept has as many" in concepts_page._held_out(found, {}, 3)[0]


def test_a_run_goes_on(
    finished: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in finished.glob("*.parquet")}
    (finished / "gsea_dge.parquet").write_bytes(b"damaged")
    monkeypatch.setattr(concepts_page, "draw", lambda *_: dict.fromkeys(FIGURES, pixel(finished)))
    launch(**settings, resume=True)
    again = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    written = {"gsea_dge.parquet", "features.parquet", "gene_sets.parquet"}
    assert {path.name for path in again} == written
    with pytest.raises(InputError, match="run of other settings"):
        launch(**settings | {"permutations": 61}, resume=True)
    with pytest.raises(InputError, match="earlier run"):
        launch(**settings)


def test_counts_that_stay_in_their_file_give_the_same(
    finished: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run without what is made of counts goes on with them in their file."""
    again, read = tmp_path / "again", []
    shutil.copytree(finished, again)
    kept = {*NO_COUNTS, "report.html", "manifest.json", "features.h5ad", "figures"}
    for path in again.iterdir():
        if path.name not in kept:
            files.remove(path)
    take = BaseCompressedSparseDataset.__getitem__

    def counted(dataset: Any, index: Any) -> Any:
        rows = take(dataset, index)
        read.append(rows.shape[0])
        return rows

    monkeypatch.setattr(BaseCompressedSparseDataset, "__getitem__", counted)
    monkeypatch.setattr("extract.models.base.BLOCK_CELLS", 128)  # of batches of 64
    monkeypatch.setattr(concepts_page, "draw", lambda *_: dict.fromkeys(FIGURES, pixel(again)))
    monkeypatch.setattr(concepts_learned, "methods", lambda x, made, *_: {"TopK SAE (30)": made})
    given = {"out_of_core": True, "memory_gib": 0.006, "resume": True, "workdir": str(again)}
    launch(**settings | given)
    n_cells = len(np.load(finished / "embedding.npy"))
    assert sum(read) > 5 * n_cells
    assert max(read) < n_cells / 2
    np.testing.assert_array_equal(*(np.load(out / "embedding.npy") for out in (finished, again)))
    for name in {path.name for path in finished.glob("*.parquet")} - NO_COUNTS:
        tables = [pd.read_parquet(out / name) for out in (finished, again)]
        pd.testing.assert_frame_equal(*tables)
    for name in ("strengths.csv", "table_6.csv", "coefficients.csv"):
        assert (finished / name).read_text() == (again / name).read_text()
    one, two = (pd.read_csv(out / "methods.csv").set_index(["task", "method"])
                for out in (finished, again))  # fmt: skip
    assert len(two) == 4 * two.index.get_level_values("task").nunique()
    pd.testing.assert_frame_equal(one.loc[two.index], two)

    by_genes = anndata.read_h5ad(settings["h5ad"])
    by_genes.X = by_genes.X.tocsc()
    by_genes.write_h5ad(tmp_path / "by_genes.h5ad")
    with pytest.raises(InputError, match=r"stored by genes \(CSC\)"):
        source_of(settings | given | {"h5ad": str(tmp_path / "by_genes.h5ad")})


NO_COUNTS = {"concepts.json", "sweep", "dictionary", "map.npz", "table_3.csv", "stability.parquet",
             "gsea_attribution.parquet", "gsea_dge.parquet"}  # fmt: skip
FIGURES = ("cells", "attributed", "strengths", "deletion", "confusion", "replication",
           "deletion_held_out")  # fmt: skip


def pixel(folder: Path) -> Path:
    """Any file that stands for a picture."""
    (folder / "figures").mkdir(exist_ok=True)
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
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be finite and above 0"),
        ({"layer": "3"}, "scvi has no layer 3"),
        ({"layer": "3", "checkpoint": None}, "--layer=3: an scVI has latent alone"),
        ({"out_of_core": True, "checkpoint": None}, "with --out_of_core give a trained one"),
        ({"out_of_core": True, "memory_gib": 0.003}, "up to 4.. cells, .*lower --per_class"),
        ({"out_of_core": True, "memory_gib": 1e-6}, "a row of .* takes up to"),
    ],
)
def test_what_is_refused(
    given: dict[str, Any], said: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((InputError, ExtractionError), match=said):
        launch(**settings | {"workdir": str(tmp_path / "out")} | given)
    assert not (tmp_path / "out").exists()


def test_cells_that_share_too_few_genes_with_the_model_are_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    adata = anndata.read_h5ad(settings["h5ad"])
    x = adata.X.toarray()
    x[:, np.argsort(x.sum(axis=0))[-90:-1]] += 1  # no cell is empty
    x[:, np.argsort(x.sum(axis=0))[:-90]] = 0  # in the file, but in no cell
    adata.X = sparse.csr_matrix(x)
    adata.write_h5ad(tmp_path / "few.h5ad")
    given = {"h5ad": str(tmp_path / "few.h5ad"), "workdir": str(tmp_path / "out")}
    with pytest.raises(InputError, match="90 genes of the model have measured expression"):
        launch(**settings | given)
    assert not (tmp_path / "out").exists()


def test_a_gene_without_a_symbol_keeps_its_own_name(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    adata = anndata.read_h5ad(settings["h5ad"])
    symbols = adata.var["symbol"].astype(object)
    symbols.iloc[[2, 5]] = np.nan
    symbols.iloc[7] = " "
    adata.var["symbol"] = symbols
    adata.write_h5ad(tmp_path / "some.h5ad")
    known = genes_of(settings | {"h5ad": str(tmp_path / "some.h5ad")})
    own = adata.var_names[[2, 5, 7]]
    measured = own[np.asarray(adata[:, own].X.sum(axis=0)).ravel() > 0]
    assert len(measured)
    assert set(measured) <= set(known.expression.genes)
    assert not {"nan", " "} & set(known.expression.genes)


def test_an_scvi_to_be_trained_will_know_the_genes_in_the_order_of_the_file(
    settings: dict[str, Any],
) -> None:
    """The model of the test data was trained on a file of these genes."""
    trained, to_be = (genes_of(settings | given) for given in ({}, {"checkpoint": None}))
    assert to_be.exchanged == trained.exchanged
    np.testing.assert_array_equal(to_be.genes, trained.genes)


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


@pytest.fixture(scope="module")
def extracted(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same cells, made with a copy of the model."""
    folder = tmp_path_factory.mktemp("extracted")
    shutil.copytree(settings["checkpoint"], folder / "model")
    with flagsaver.flagsaver():
        extraction.define_flags()
        flags.FLAGS.model, flags.FLAGS.h5ad = "scvi", settings["h5ad"]
        flags.FLAGS.checkpoint, flags.FLAGS.output = str(folder / "model"), str(folder)
        extraction.main()
    return folder / "latent.zarr"


def source_of(given: dict[str, Any], change: Any = None) -> tuple[Any, concepts_inputs.Source]:
    """The cells, and where their embedding comes from, by these flags."""
    with flagsaver.flagsaver():
        concepts.define_flags()
        for name, value in given.items():
            setattr(flags.FLAGS, name, value)
        adata = concepts_inputs.read()[0]
        adata = adata if change is None else change(adata)
        return adata, concepts_inputs.source(adata)


def genes_of(given: dict[str, Any]) -> concepts_inputs.Genes:
    """What is known of genes before the model is."""
    with flagsaver.flagsaver():
        concepts.define_flags()
        for name, value in given.items():
            setattr(flags.FLAGS, name, value)
        adata, _, symbols = concepts_inputs.read()
        return concepts_inputs.genes(adata, symbols, concepts_inputs.source(adata))


def test_the_rows_of_a_store_are_taken(
    extracted: Path, settings: dict[str, Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings | {"embedding": str(extracted), "checkpoint": None, "model": None}
    _, found = source_of(given)
    np.testing.assert_allclose(found.x, np.load(finished / "embedding.npy"), atol=1e-6)
    assert (found.name, found.layer, found.genes, found.counts) == ("scvi", "latent", None, None)
    assert found.model is not None  # by the folder that the store names
    _, moved = source_of(given | {"checkpoint": settings["checkpoint"]})
    assert moved.model.checkpoint == found.model.checkpoint
    adata, fewer = source_of(given, lambda adata: adata[[7, 3, 200]].copy())
    np.testing.assert_array_equal(fewer.x, found.x[[7, 3, 200]])
    assert adata.n_obs == 3
    anndata.read_h5ad(settings["h5ad"]).write_zarr(extracted.parent / "cells.zarr")
    stays = {"h5ad": str(extracted.parent / "cells.zarr"), "out_of_core": True}
    adata, there = source_of(given | stays)
    assert isinstance(adata.X, BaseCompressedSparseDataset)
    np.testing.assert_array_equal(there.x, found.x)

    def renamed(adata: anndata.AnnData) -> anndata.AnnData:
        adata.obs_names = ["other", *adata.obs_names[1:]]
        return adata

    def recounted(adata: anndata.AnnData) -> anndata.AnnData:
        return anndata.AnnData(adata.X[::-1].copy(), adata.obs, adata.var)

    with pytest.raises(InputError, match=r"lacks 1 of the .* cells .*other first.*other cells"):
        source_of(given, renamed)
    with pytest.raises(InputError, match="other rows than the model gives"):
        source_of(given, recounted)
    for name, other in {"model": "scgpt", "counts": "some", "layer": "3"}.items():
        with pytest.raises(InputError, match=f"--{name}={other}, but"):
            source_of(given | {name: other})

    real = store.open(extracted)
    for changed, said in {
        "checkpoint_sha256": ({"model.pt": "0" * 64}, "extracted with other weights"),
        "preprocessing": ({"odd": 1}, "other settings than the model's own.*odd"),
        "pooling": ("tokens", "concepts are of cells"),
    }.items():
        value, message = said if isinstance(said, tuple) else (said, "")
        altered = dataclasses.replace(real, extraction=real.extraction | {changed: value})
        monkeypatch.setattr(store, "open", lambda *_, altered=altered: altered)
        with pytest.raises(InputError, match=message):
            source_of(given)


def test_without_the_model_what_needs_none_is_done(
    extracted: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(extracted.parent / "model")
    picture = pixel(tmp_path)
    monkeypatch.setattr(
        concepts_page,
        "draw",
        lambda *_: dict.fromkeys(("cells", "strengths", "confusion"), picture),
    )
    monkeypatch.setattr(concepts_learned, "methods", lambda x, made, *_: {"TopK": made})
    monkeypatch.setattr(concepts_learned, "phases", lambda *_: {})
    out = launch(
        **settings | {
            "embedding": str(extracted), "checkpoint": None, "workdir": str(tmp_path / "out"),
            "seeds": ["0"], "most": 3,
        }
    )  # fmt: skip
    needs_model = {"attribution.parquet", "samples.parquet", "gsea_attribution.parquet", "scvi",
                   "deletion.parquet", "deletion_held_out.parquet", "table_6.csv", "causal.parquet",
                   "fidelity.parquet"}  # fmt: skip
    of_seeds = {"stability.parquet", "consensus"}
    missing = set(concepts.FILES) - {path.name for path in out.iterdir()}
    assert missing == needs_model | of_seeds | {"figures"}
    assert "Left out, since the model" in (out / "report.html").read_text()
    table = pd.read_parquet(out / "features.parquet").set_index("feature")
    dge = pd.read_parquet(out / "dge.parquet")
    name = dge["feature"].iloc[0]
    best = dge[dge["feature"] == name].set_index("gene")["t"].idxmax()
    assert table.loc[name, "top_genes"].split(", ")[0] == best
    assert not [column for column in table if column.startswith("attribution:")]
    assert pd.read_csv(out / "strengths.csv")["kind"].tolist() == ["concepts, DGE"]
    about = json.loads(anndata.read_h5ad(out / "features.h5ad").uns["about"])
    assert about["model"] == "scvi"
    assert "dge" in about["named_by"]

"""The feature lens as a program: what it leaves agrees with itself and with what was put in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver
from scipy import sparse

import sae_jax
from analysis import cells as reading
from analysis import differential, groups, stability
from analysis.consensus import consensus
from experiments import feature_lens, feature_lens_figures
from sae_jax import InputError
from tests.experiments import quick
from tests.experiments.damage import check_every_file

GENES, CELLS, PROGRAM = 240, 480, 24
SMALL = {
    "n_latents": 24, "epochs": 40, "learning_rate": 0.01, "l1_weight": 0.05, "percentile": 90.0,
    "null_features": 30, "null_sample": 10, "min_size": 5, "direction": "up",
}  # fmt: skip


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Three kinds of cells; each expresses a program of genes, and lies in a corner, of its own."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, CELLS)
    rate = np.full((CELLS, GENES), 0.4)
    for k in range(3):
        rate[kind == k, k * PROGRAM : (k + 1) * PROGRAM] = 3.0
    counts = rng.poisson(rate).astype(np.float32)
    return anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {"kind": np.asarray(["kind A", "kind B", "kind C"])[kind], "dose": kind * 1.0,
             "depth": counts.sum(1)},
            index=[f"cell{i}" for i in range(CELLS)],
        ),
        var=pd.DataFrame(index=[f"G{g}" for g in range(GENES)]),
        obsm={"X_some": 4 * np.eye(3)[kind] + rng.normal(size=(CELLS, 3)) * 0.5},
    )  # fmt: skip


@pytest.fixture
def run(cells: anndata.AnnData, tmp_path: Path) -> Callable[..., Path]:
    """Runs the program in this process: `run(flag=value, change=function of the AnnData)`."""
    sets = {f"program {'ABC'[k]}": range(k * PROGRAM, (k + 1) * PROGRAM) for k in range(3)}
    sets |= {f"random {i}": range(72 + 12 * i, 72 + 12 * (i + 1)) for i in range(14)}
    lines = ["\t".join([name, "", *(f"G{g}" for g in some)]) for name, some in sets.items()]
    (tmp_path / "sets.gmt").write_text("\n".join(lines))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["lens"])

    def call(change: Callable[[anndata.AnnData], Any] | None = None, **given: Any) -> Path:
        adata = cells.copy()
        if change is not None:
            adata = change(adata) or adata
        adata.write_h5ad(tmp_path / "cells.h5ad")
        settings = {
            "h5ad": str(tmp_path / "cells.h5ad"), "expression_is": "counts", "label": "kind",
            "embedding": "X_some", "gene_sets": str(tmp_path / "sets.gmt"),
            "workdir": str(tmp_path / "out"), **SMALL, **given,
        }  # fmt: skip
        with flagsaver.flagsaver():  # which forgets the flags defined within
            feature_lens.define_flags()
            for name, value in settings.items():
                setattr(flags.FLAGS, name, value)
            feature_lens.main()
        return Path(settings["workdir"])

    return call


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick.use(monkeypatch)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's figures, which other tests draw, take most of a run's time."""
    monkeypatch.setattr(feature_lens_figures, "draw", lambda *args, **kwargs: {})


def test_what_is_left_agrees(run: Callable[..., Path], cells: anndata.AnnData) -> None:
    out = run(technical=["depth"], numeric=["dose"])
    missing = set(feature_lens.FILES) - {path.name for path in out.iterdir()}
    assert missing <= set(feature_lens.MAYBE)  # of too few features with terms
    check_every_file(out)

    dictionary = sae_jax.Dictionary.load(out / "dictionary")
    found = anndata.read_h5ad(out / "features.h5ad")
    z = dictionary.encode(cells.obsm["X_some"].astype(np.float32))
    assert found.var["latent"].tolist() == np.flatnonzero((z > 0).any(axis=0)).tolist()
    np.testing.assert_allclose(found.X.toarray(), z[:, found.var["latent"]], rtol=1e-6)
    np.testing.assert_allclose(found.var["density"], (z > 0).mean(0)[found.var["latent"]])

    long = pd.read_parquet(out / "enrichment.parquet")
    assert len(long) == found.n_vars * 17
    table = pd.read_parquet(out / "features.parquet").set_index("feature")
    testable = table.index[table["testable"]]
    rates = pd.read_csv(out / "nulls.csv", index_col="features")
    found_by = {
        test: (long[f"log10_q_{test}"] > -np.log10(0.05)) & long["feature"].isin(testable)
        for test in ("change", "matched", "fisher")
    }
    named = long[found_by["change"] & found_by["matched"]]
    share = {"named": named, "fisher": long[found_by["fisher"]]}
    for column, rows in share.items():
        expected = rows["feature"].nunique() / len(testable)
        assert rates.loc["the dictionary's", column] == pytest.approx(expected)
    assert table["n_terms"].sum() == len(named)
    either = table["best_term"].notna() | table["best_term_down"].notna()
    assert either.sum() == named["feature"].nunique()
    assert rates.loc["cells permuted", "named"] <= 0.2

    # The best feature of a kind is named by its program, and dose was the kind.
    for k, name in enumerate("ABC"):
        best = table[table["best_label"] == f"kind {name}"]["best_label_auroc"].idxmax()
        terms = long[long["feature"] == best].set_index("term")
        assert table.loc[best, "best_term"] == f"program {name}"
        assert terms["log10_p_fisher"].idxmax() == f"program {name}"
        assert table.loc[best, "dose_high"] == pytest.approx(k, abs=0.1)
    assert (out / "report.html").read_text().count("<h2") >= 6
    assert "depth" in set(table["technical_column"].dropna().astype(str))


def test_a_run_goes_on_where_it_was(
    run: Callable[..., Path], tmp_path: Path, undrawn: None
) -> None:
    out = run()
    kept = {name: (out / name).stat().st_mtime_ns for name in ("enrichment.parquet", "nulls.csv")}
    weights = (out / "dictionary/sae_weights.safetensors").stat().st_mtime_ns
    table = pd.read_parquet(out / "features.parquet")
    for name in ("features.parquet", "report.html", "features.h5ad"):
        (out / name).unlink()
    run(resume=True)
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}
    assert weights == (out / "dictionary/sae_weights.safetensors").stat().st_mtime_ns
    pd.testing.assert_frame_equal(table, pd.read_parquet(out / "features.parquet"))
    assert (out / "report.html").exists()
    with pytest.raises(InputError, match=r"other settings[\s\S]*seed"):
        run(resume=True, seed=5)
    with pytest.raises(InputError, match="--overwrite replaces it"):
        run()
    # A saved dictionary gives what the one that was trained gave.
    other = run(dictionary=str(out / "dictionary"), workdir=str(tmp_path / "other"))
    again = pd.read_parquet(other / "features.parquet")
    pd.testing.assert_frame_equal(table, again)
    assert not (other / "dictionary").exists()


def _save(path: Path, bias: float, d: int = 3) -> str:
    """A dictionary whose latents all have this bias."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(d, 4)).astype(np.float32)
    params = sae_jax.state.Params(
        encoder=weights, encoder_bias=np.full(4, bias, np.float32), decoder=weights.T.copy(),
        decoder_bias=np.zeros(d, np.float32), pre_bias=None,
    )  # fmt: skip
    sae_jax.Dictionary(sae_jax.SAEConfig(d_in=d, n_latents=4), params).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"percentile": 99.0}, "leaves 5 of 480 cells high.*give --percentile=97"),
        ({"percentile": float("nan")}, "--percentile=nan must be a finite number"),
        ({"learning_rate": 0.0}, "--learning_rate=0 must be above 0"),
        ({"within": "kind D"}, "no cell is labelled --within=kind D; there are kind A, kind B"),
        ({"within": "kind A", "label": None}, "say by --label"),
        ({"technical": ["batch"]}, "--technical: obs has no batch"),
        ({"numeric": ["kind"]}, "--numeric: kind of obs holds no numbers"),
        ({"top_level": "none.obo"}, "there is no ontology file none.obo"),
        ({"dictionary": "nowhere"}, "nowhere"),
        ({"replicates": ["nowhere"]}, "--replicates are of a saved --dictionary"),
        ({"dictionary": "nowhere", "seeds": 2}, "name the others: --replicates"),
        ({"consensus": True}, "--consensus is of several dictionaries"),
        ({"workdir": None}, "--workdir is needed"),
        ({"min_size": 60}, "none of the 17 sets"),
        ({"change": lambda adata: adata[:, :90].copy()}, "fewer than 100"),
        ({"change": lambda adata: setattr(adata, "X", -adata.X)}, "negative"),
        (
            {"change": lambda adata: setattr(adata, "var_names", [str(i) for i in range(GENES)])},
            "genes have no names, only the numbers",
        ),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_left(
    run: Callable[..., Path], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(**given)
    assert not (tmp_path / "out").exists()


def test_dictionaries_that_do_not_fit_are_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of 5 dimensions, the embedding of 3"):
        run(dictionary=_save(tmp_path / "five", 0, d=5))
    good = _save(tmp_path / "good", 0)
    with pytest.raises(InputError, match=r"relu of 5 dimensions, .*good is relu of 3"):
        run(dictionary=good, replicates=[str(tmp_path / "five")])
    with pytest.raises(InputError, match="dead on these cells"):
        run(dictionary=_save(tmp_path / "dead", -1e6))
    assert not (tmp_path / "out").exists()


def test_what_was_changed_or_damaged_is_not_taken_for_a_result(
    run: Callable[..., Path], tmp_path: Path, undrawn: None
) -> None:
    saved = _save(tmp_path / "dictionary", 0)
    out = run(dictionary=saved)
    with pytest.raises(InputError, match="--highlight: feature_99 is no live feature"):
        run(dictionary=saved, resume=True, highlight=["feature_99"])
    expected = pd.read_parquet(out / "genes.parquet")
    for name in ("genes.parquet", "named.npz", "nulls.csv"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])
    flipped = bytearray((out / "top_terms.parquet").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (out / "top_terms.parquet").write_bytes(flipped)
    (out / "enrichment.parquet").unlink()
    (tmp_path / "slim.obo").write_text(
        "format-version: 1.2\n\n[Term]\nid: GO:0000001\nname: root\n"
    )
    shown = {"top": 1, "words": ["program"], "top_level": str(tmp_path / "slim.obo")}
    run(dictionary=saved, resume=True, **shown)  # flags of what is shown
    pd.testing.assert_frame_equal(pd.read_parquet(out / "genes.parquet"), expected)
    assert pd.read_csv(out / "nulls.csv")["features"].iloc[-1] == "single dimensions"
    with pytest.raises(InputError, match=r"other settings[\s\S]*contents"):
        run(dictionary=saved, resume=True, change=lambda adata: adata[::-1].copy())


def test_a_dictionary_of_which_no_feature_can_be_named(
    run: Callable[..., Path], tmp_path: Path, undrawn: None
) -> None:
    """A few cells a feature: the page says so, with no share of nothing."""
    out = run(dictionary=_save(tmp_path / "rare", -6.5))
    assert not pd.read_parquet(out / "features.parquet")["testable"].any()
    assert "none of the testable ones" in (out / "report.html").read_text()


def test_within_one_label_only_its_cells_are_compared(
    run: Callable[..., Path], cells: anndata.AnnData, tmp_path: Path, undrawn: None
) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 4))  # those of _save
    saved = _save(tmp_path / "dictionary", -4 * weights[1].max())  # active in half of the kind B
    chosen = cells.obs["kind"] == "kind B"
    out = run(dictionary=saved, within="kind B")
    alone = run(
        dictionary=saved, workdir=str(tmp_path / "alone"), label=None,
        change=lambda adata: adata[chosen.to_numpy()].copy(),
    )  # fmt: skip
    found = anndata.read_h5ad(out / "features.h5ad")
    assert list(found.obs_names) == list(cells.obs_names[chosen])
    expected = pd.read_parquet(alone / "genes.parquet").set_index(["feature", "gene"])["t"]
    ours = pd.read_parquet(out / "genes.parquet").set_index(["feature", "gene"])["t"]
    shared = ours.index.intersection(expected.index)
    assert len(shared) > 0.9 * len(expected)  # ties at the end of a list of fifty
    np.testing.assert_allclose(ours[shared], expected[shared], rtol=1e-5)


def test_seeds_train_together_and_say_what_comes_back(
    run: Callable[..., Path], cells: anndata.AnnData, tmp_path: Path, undrawn: None
) -> None:
    out = run(seeds=3, consensus=True, every_gene=True)
    paths = [out / "dictionary", out / "replicates/0001", out / "replicates/0002"]
    made = [sae_jax.Dictionary.load(path) for path in paths]
    assert [each.config.seed for each in made] == [0, 1, 2]
    x = cells.obsm["X_some"].astype(np.float32)
    codes = [each.encode(x, sparse=True) for each in made]
    wanted = stability.replication(made, codes, embedding=x, seed=0).of(0)
    table = pd.read_parquet(out / "features.parquet").set_index("feature")
    for name in ("replicated_by_direction", "replicated_by_activation", "best_cosine"):
        np.testing.assert_allclose(table[name], wanted.loc[table["latent"], name])
    assert (table["replicated_by_direction"] > 0).any()
    page = (out / "report.html").read_text()
    assert "come back in another seed" in page
    assert "replicated_by_direction" in page
    agreed = sae_jax.Dictionary.load(out / "consensus")
    assert agreed.provenance == {"consensus_of_seeds": [0, 1, 2]}

    np.testing.assert_array_equal(
        agreed.encode(x), consensus(made, stability.replication(made, codes)).dictionary().encode(x)
    )

    # Of a saved dictionary and its replicates the same.
    again = run(
        dictionary=str(paths[0]), replicates=[str(path) for path in paths[1:]],
        workdir=str(tmp_path / "again"),
    )  # fmt: skip
    pd.testing.assert_frame_equal(pd.read_parquet(again / "features.parquet"), table.reset_index())

    # What was begun goes on with the same seeds, and all genes are those of the test.
    weights = paths[2].joinpath("sae_weights.safetensors").stat().st_mtime_ns
    (out / "stability.parquet").unlink()
    (out / "features.parquet").unlink()
    run(seeds=3, consensus=True, every_gene=True, resume=True)
    assert weights == paths[2].joinpath("sae_weights.safetensors").stat().st_mtime_ns
    pd.testing.assert_frame_equal(pd.read_parquet(out / "features.parquet"), table.reset_index())
    every = pd.read_parquet(out / "dge.parquet")
    expression = reading.expression(cells, "X", "counts")
    found = groups.top_cells(codes[0][:, table["latent"]], SMALL["percentile"])
    welch = differential.welch(expression.x, found.high, active=found.active)
    assert every["feature"].tolist() == np.repeat(table.index, GENES).tolist()
    assert every["gene"].tolist()[:GENES] == expression.genes.tolist()
    np.testing.assert_allclose(every["t"], welch.t.ravel(), rtol=1e-5)
    np.testing.assert_allclose(every["log10_p"], -np.log10(welch.p).ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        every["log2_fold_change"], welch.log2_fold_change.ravel(), rtol=1e-4, atol=1e-6
    )


def test_what_the_browser_reads(
    run: Callable[..., Path], cells: anndata.AnnData, tmp_path: Path, undrawn: None
) -> None:
    saved = _save(tmp_path / "dictionary", 0)
    maps = np.random.default_rng(0).normal(size=(CELLS, 2))
    out = run(dictionary=saved, change=lambda adata: adata.obsm.update(spatial=maps))
    found = anndata.read_h5ad(out / "features.h5ad")
    np.testing.assert_allclose(found.obsm["X_spatial"], maps, rtol=1e-6)
    assert found.obsm["X_umap"].shape == (CELLS, 2)
    dictionary = sae_jax.Dictionary.load(saved)
    np.testing.assert_allclose(
        found.varm["decoder"], dictionary.params.decoder[found.var["latent"]], rtol=1e-6
    )
    about, x = json.loads(found.uns["about"]), cells.obsm["X_some"]
    assert about["n_latents"] == 4
    assert about["l0"] == pytest.approx((dictionary.encode(x.astype(np.float32)) > 0).sum(1).mean())
    assert about["n_named"] == (found.var["n_terms"] > 0).sum()
    assert json.loads(found.uns["lens"])["label"] == "kind"
    sets = pd.read_parquet(out / "gene_sets.parquet")
    assert sets["term"].nunique() == 17
    assert not (out / "dge.parquet").exists()


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_expression_that_stays_in_its_file_gives_the_same(
    run: Callable[..., Path], cells: anndata.AnnData, tmp_path: Path, undrawn: None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    one = run(workdir=str(tmp_path / "one"), every_gene=True)
    cells.write_zarr(tmp_path / "cells.zarr")
    with caplog.at_level("INFO", logger="absl"):
        two = run(
            h5ad=str(tmp_path / "cells.zarr"), dictionary=str(one / "dictionary"),
            out_of_core=True, memory_gib=0.02, every_gene=True, workdir=str(tmp_path / "two"),
        )  # fmt: skip
    told = [line for line in caplog.messages if line.startswith("DGE: 480 cells x 240 genes")]
    assert len(told) == len(set(told)) == 2  # of the features and the nulls; of every gene
    for name in ("enrichment", "genes", "top_terms", "features", "dge"):
        tables = [pd.read_parquet(out / f"{name}.parquet") for out in (one, two)]
        pd.testing.assert_frame_equal(*tables)
    assert (one / "nulls.csv").read_text() == (two / "nulls.csv").read_text()
    for wrong, message in (
        ({"embedding": None}, "PCA needs the expression of all cells"),
        ({"within": "kind A"}, "without --out_of_core"),
        ({"memory_gib": 1e-6}, "a row of .*takes up to"),
        ({"memory_gib": 1e-4}, "--memory_gib=0.0001: expression of 480 cells"),
        ({"memory_gib": 1e-4, "dictionary": str(one / "dictionary")}, "--memory_gib=0.0001: "),
    ):
        with pytest.raises(InputError, match=message):
            run(out_of_core=True, **wrong)
    assert not (tmp_path / "out").exists()

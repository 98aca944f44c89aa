import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver
from scipy import sparse

import extract
import sae_jax
from analysis import plots
from experiments import inputs as reading
from experiments import quickstart, quickstart_page
from extract import store
from sae_jax import InputError, data
from tests.experiments.damage import check_every_file

GENES, CELLS, PROGRAM = 240, 360, 20
SMALL = {"n_latents": 100, "steps": 600, "seeds": 1, "pca": 6, "min_size": 5}


@pytest.fixture(scope="module", autouse=True)
def plain_pictures() -> Iterator[None]:
    """Few panels, and no UMAP, which compiles for half a minute (test_pictures draws it)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plane", lambda x: (x[:, :2], "UMAP"))
        patch.setattr(quickstart_page, "PANELS", 2)
        yield


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Three kinds of cells; each expresses a program of twenty genes of its own."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, CELLS)
    rate = np.full((CELLS, GENES), 0.4)
    for k in range(3):
        rate[kind == k, k * PROGRAM : (k + 1) * PROGRAM] = 4.0
    counts = rng.poisson(rate).astype(np.float32)
    log = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    return anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {"kind": [f"kind {'ABC'[k]}/x" for k in kind], "size": counts.sum(1)},
            index=[f"cell{i}" for i in range(CELLS)],
        ),
        var=pd.DataFrame({"symbol": [f"S{g}" for g in range(GENES)]},
                         index=[f"G{g}" for g in range(GENES)]),
        layers={"log": sparse.csr_matrix(log)},
        obsm={"X_some": rng.normal(3 * np.eye(6)[kind]), "X_bad": np.full((CELLS, 4), np.nan)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def inputs(cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cells.h5ad; sets.gmt, their three programs and twelve sets of others; symbols.gmt, the same
    by the genes' other names."""
    folder = tmp_path_factory.mktemp("inputs")
    cells.write_h5ad(folder / "cells.h5ad")
    lines = [
        "\t".join([f"program {'ABC'[k]}", "made", *[f"G{k * PROGRAM + g}" for g in range(PROGRAM)]])
        for k in range(3)
    ]
    lines += ["\t".join([f"random {i}", "made", *[f"G{60 + 15 * i + g}" for g in range(15)]])
              for i in range(12)]  # fmt: skip
    text = "\n".join(lines) + "\n"
    (folder / "sets.gmt").write_text(text)
    (folder / "symbols.gmt").write_text(text.replace("\tG", "\tS"))
    return folder


def program(inputs: Path, out: Path, **given: Any) -> Path:
    """Runs the program in this process, with the settings `given` and, for all others, `SMALL`."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["quickstart"])
    settings = {
        "h5ad": str(inputs / "cells.h5ad"), "expression_is": "counts", "label": "kind",
        "gene_sets": str(inputs / "sets.gmt"), "workdir": str(out), **SMALL, **given,
    }  # fmt: skip
    with flagsaver.flagsaver():  # which forgets the flags defined within
        quickstart.define_flags()
        for name, value in settings.items():
            setattr(flags.FLAGS, name, value)
        quickstart.main()
    return out


@pytest.fixture
def run(cells: anndata.AnnData, inputs: Path, tmp_path: Path) -> Callable[..., Path]:
    """`run(flag=value, change=function of the AnnData)`, into a folder of the test's own."""

    def call(change: Callable[[anndata.AnnData], Any] | None = None, **given: Any) -> Path:
        if change is not None:
            adata = cells.copy()
            adata = change(adata) or adata
            adata.write_h5ad(tmp_path / "cells.h5ad")
            given["h5ad"] = str(tmp_path / "cells.h5ad")
        return program(inputs, tmp_path / "out", **given)

    return call


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run by all defaults, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        out = program(inputs, tmp_path_factory.mktemp("finished") / "out")
    return out, printed.getvalue()


@pytest.fixture
def earlier(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """The same, in the folder that `run` fills."""
    return shutil.copytree(finished[0], tmp_path / "out")


def test_every_file_is_there_and_names_the_planted_programs(
    finished: tuple[Path, str], cells: anndata.AnnData
) -> None:
    out, printed = finished
    results = pd.read_parquet(out / "results.parquet")
    assert len(results) == 14  # five penalties each of two presets, four k of the third, one seed
    assert len(list((out / "dictionaries").iterdir())) == 14
    check_every_file(out)

    found = anndata.read_h5ad(out / "features.h5ad")
    assert list(found.obs_names) == list(cells.obs_names)
    assert sparse.isspmatrix_csr(found.X) or isinstance(found.X, sparse.csr_array)
    pd.testing.assert_frame_equal(
        found.obs.astype({"kind": str}), cells.obs.astype({"kind": str}), check_dtype=False
    )
    wanted = {"density", "mean_activation", "best_label", "best_term", "auroc:kind A|x"}
    assert wanted <= set(found.var)
    np.testing.assert_allclose(found.var["density"], found.X.getnnz(axis=0) / CELLS)
    assert found.obsm["X_umap"].shape == (CELLS, 2)
    assert found.varm["decoder"].shape == (found.n_vars, 6)
    about = json.loads(found.uns["about"])
    assert about["n_named"] == (found.var["top_terms"] != "").sum() > 0
    assert about["n_live"] == found.n_vars

    labels = pd.read_csv(out / "labels.csv").set_index("label")
    for number, letter in enumerate("ABC"):
        row = labels.loc[f"kind {letter}/x"]
        assert row["best_term"] == f"program {letter}"
        assert row["auroc"] > 0.85
        feature = found.var.loc[row["feature"]]
        assert feature["best_term"] == f"program {letter}"
        assert feature["top_terms"].split("; ")[0] == f"program {letter}"
        genes = [int(gene.removeprefix("G")) for gene in feature["top_genes"].split(", ")]
        assert len(genes) == 10
        assert {gene // PROGRAM for gene in genes} == {number}

    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page  # self-contained: nothing is fetched
    assert str(out) in printed
    assert "program A" in printed


def test_the_long_table_says_what_names_a_feature(finished: tuple[Path, str]) -> None:
    table = pd.read_parquet(finished[0] / "enrichment.parquet")
    var = anndata.read_h5ad(finished[0] / "features.h5ad").var
    effects = ["size", "hits", "fold", "change", "auc", "z"]
    tests = ["mann_whitney", "fisher", "binomial", "matched"]
    logs = [f"log10_{kind}_{test}" for test in tests for kind in ("p", "q", "q_all")]
    assert list(table) == ["feature", "term", *effects, *logs]
    assert len(table) == len(var) * 15
    assert set(table["feature"]) == set(var.index)
    best = table.sort_values("log10_p_matched", ascending=False, kind="stable")
    best = best.drop_duplicates("feature").set_index("feature").loc[var.index]
    named = var["best_term"].notna()
    assert 0 < named.sum() < len(named)
    assert (var["best_term"][named].astype(str) == best["term"][named].astype(str)).all()
    q = 10.0 ** -best["log10_q_matched"]
    np.testing.assert_allclose(var["best_term_q"][named], q[named], rtol=1e-5)
    assert q[named].max() < 0.05
    assert (var["top_terms"][~named] == "").all()


def _twice(names: list[str]) -> list[str]:
    return [names[1], *names[1:]]


def _with_nan(adata: anndata.AnnData) -> None:
    adata.obsm["X_some"][[3, 17], 0] = np.nan


def _negative(adata: anndata.AnnData) -> None:
    adata.X = adata.X - sparse.csr_matrix(np.eye(CELLS, GENES, dtype=np.float32) * 9)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"h5ad": "nowhere.h5ad"}, "no file nowhere.h5ad"),
    "missing key": ({"embedding": "X_scvi"}, "no 'X_scvi'; it has X_bad, X_some"),
    "all NaN": ({"embedding": "X_bad"}, r"1440 NaN or infinite values in 360 of 360 rows"),
    "some NaN": (
        {"embedding": "X_some", "change": _with_nan},
        r"obsm\['X_some'\] holds 2 NaN or infinite values in 2 of 360 rows \(rows 3, 17\)",
    ),
    "fewer cells than a batch": ({"batch_size": 330}, "fewer than a batch of 330"),
    "label absent": ({"label": "celltype"}, "no column 'celltype'; it has kind, size"),
    "label of numbers": (
        {"label": "size", "change": lambda a: a.obs.update(a.obs["size"] / 3)},
        "holds numbers, not labels",
    ),
    "symbol column absent": ({"gene_symbols": "name"}, "no column 'name'; it has symbol"),
    "no gene in common": ({"gene_symbols": "symbol"}, "G0.*S0"),
    "not counts": ({"expression": "log"}, "not integers"),
    "not log1p": ({"expression_is": "log1p"}, "all are integers"),
    "kind not said": ({"expression_is": None}, "--expression_is is needed"),
    "negative": ({"change": _negative}, "negative values"),
    "no such layer": ({"expression": "spliced"}, "no layer 'spliced'; there are X, raw and log"),
    "no raw": ({"expression": "raw"}, "no raw"),
    "cells twice": (
        {"change": lambda a: setattr(a, "obs_names", _twice(list(a.obs_names)))},
        "1 cell names occur twice.*cell1",
    ),
    "genes twice": (
        {"change": lambda a: setattr(a, "var_names", _twice(list(a.var_names)))},
        "1 gene names occur twice.*G1",
    ),
    "sets too large": ({"min_size": 100}, "size"),
    "few genes": ({"change": lambda a: a[:, :90]}, "90 genes"),
    "no workdir": ({"workdir": None}, "--workdir is needed"),
}


@pytest.mark.filterwarnings("ignore:.*names are not unique.*")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(
    run: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    given, message = BAD[case]
    with pytest.raises(InputError, match=f"(?s){message}"):
        run(**given)
    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_refused_or_continued(run: Callable[..., Path], earlier: Path) -> None:
    first = pd.read_parquet(earlier / "results.parquet")
    with pytest.raises(InputError, match="--overwrite replaces it, --resume continues it"):
        run()
    with pytest.raises(InputError, match=r"other settings(?s:.*)steps: 600 there, 61 asked for"):
        run(resume=True, steps=61)
    (earlier / "report.html").unlink()
    run(resume=True)
    assert (earlier / "report.html").exists()
    pd.testing.assert_frame_equal(pd.read_parquet(earlier / "results.parquet"), first)


def test_a_run_replaces_another_and_needs_no_labels(
    run: Callable[..., Path], earlier: Path, inputs: Path, cells: anndata.AnnData
) -> None:
    """Nor counts, nor a PCA, nor names that are symbols."""
    first = pd.read_parquet(earlier / "results.parquet")
    assert (earlier / "labels.csv").exists()
    out = run(
        overwrite=True, label=None, embedding="X_some", expression="log", expression_is="log1p",
        gene_symbols="symbol", gene_sets=str(inputs / "symbols.gmt"),
    )  # fmt: skip
    assert out == earlier
    assert not pd.read_parquet(out / "results.parquet").equals(first)
    assert not (out / "labels.csv").exists()
    found = anndata.read_h5ad(out / "features.h5ad")
    assert not [column for column in found.var if column.startswith("auroc:")]
    assert set(found.var["best_term"].dropna()) == {f"program {letter}" for letter in "ABC"}
    genes = (
        found.var["top_genes"].astype(object).replace("", np.nan).dropna()
    )  # few cells, and none can be told
    assert len(genes) > 3
    assert genes.str.fullmatch(r"S\d+(, S\d+)*").all()
    member = json.loads(found.uns["quickstart"])["member"]
    dictionary = sae_jax.Dictionary.load(out / "dictionaries" / f"{member:04d}")
    z = dictionary.encode(cells.obsm["X_some"].astype(np.float32))
    np.testing.assert_array_equal(found.X.toarray(), z[:, found.var["latent"]])


def test_a_folder_of_somebody_else_is_never_touched(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("everything")
    for given in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match="holds other files"):
            run(**given)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_console_script_ignores_folders_of_our_packages_names(tmp_path: Path) -> None:
    for name in ("analysis", "experiments", "sae_jax"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own')")
    script = Path(sys.executable).parent / "sae-jax"
    done = subprocess.run(
        [script, "quickstart", "--h5ad=none.h5ad", "--expression_is=counts", "--workdir=out"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "error: there is no file none.h5ad"
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def swept(cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store with the cells in another order, and a sweep on their programs' totals."""
    folder = tmp_path_factory.mktemp("swept")
    totals = np.stack([cells.X[:, i : i + 10].sum(axis=1).A1 for i in range(0, 60, 10)], axis=1)
    order = np.random.default_rng(1).permutation(CELLS)
    about = {
        "identity": "i", "pooling": "latent", "empty_cells": [],
        "obs_names_sha256": store.rows_hash(cells.obs.iloc[order], "latent"),
    }  # fmt: skip
    writer = store.Writer(folder, {"latent": "latent"}, cells.obs.iloc[order], 6, about, "float32")
    writer.write(0, slice(0, CELLS), {"latent": totals[order].astype(np.float32)})
    (path,) = writer.finish()
    train, validation = data.split(CELLS, 0.1, 0)
    configs = sae_jax.grid(  # as in `finished`, whose compiled program serves again
        "vanilla", d_in=6, n_latents=100, l1_weight=quickstart.L1_WEIGHTS, learning_rate=1e-3,
        input_normalization="scalar", batch_size=128,
    )  # fmt: skip
    rows = totals.astype(np.float32)
    sae_jax.train(
        configs, rows[train], rows[validation], epochs=300, workdir=folder / "sweep",
        provenance={"validation_share": 0.1}, progress=False,
    )  # fmt: skip
    return path, folder / "sweep"


def test_a_store_and_a_finished_sweep(run: Callable[..., Path], swept: tuple[Path, Path]) -> None:
    path, sweep = map(str, swept)
    out = run(embedding=path, sweep=sweep)
    choice = json.loads((out / "choice.json").read_text())
    assert choice["folder"] == f"{sweep}/dictionaries/{choice['member']:04d}"
    assert not (out / "dictionaries").exists()
    found = anndata.read_h5ad(out / "features.h5ad")
    dictionary = sae_jax.Dictionary.load(choice["folder"])
    stored = anndata.read_zarr(path)
    z = dictionary.encode(stored[found.obs_names].X)
    np.testing.assert_array_equal(found.X.toarray(), z[:, found.var["latent"]])
    assert pd.read_csv(out / "labels.csv")["auroc"].min() > 0.8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embedding": "nowhere.zarr"}, "no extraction store"),
        ({"sweep": "nowhere"}, "no file nowhere/results.parquet"),
        ({"embedding": "X_some"}, "was trained on other rows"),
        (
            {"embedding": None, "pca": 8},
            r"was trained on \[6\] dimensions, the embedding has 8",
        ),
    ],
)
def test_stores_and_sweeps_that_do_not_fit(
    run: Callable[..., Path], swept: tuple[Path, Path], given: dict[str, Any], message: str
) -> None:
    path, sweep = map(str, swept)
    with pytest.raises((InputError, extract.InputError), match=message):
        run(**{"embedding": path, "sweep": sweep, **given})


def test_rows_of_a_file_are_counted(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    np.testing.assert_array_equal(reading.rows_of(str(tmp_path / "rows.npy"), 7), rows)
    with pytest.raises(InputError, match="has 7 rows, of 8 cells"):
        reading.rows_of(str(tmp_path / "rows.npy"), 8)


def test_a_store_that_lacks_cells(run: Callable[..., Path], swept: tuple[Path, Path]) -> None:
    def more(adata: anndata.AnnData) -> None:
        adata.obs_names = ["stranger", *adata.obs_names[1:]]

    with pytest.raises(InputError, match=r"lacks 1 of the 360 cells \(stranger first\)"):
        run(more, embedding=str(swept[0]), sweep=str(swept[1]))

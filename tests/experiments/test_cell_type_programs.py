"""The cell-type study as a program: what it leaves agrees with itself and with what was put in."""

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
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

import sae_jax
from analysis import cell_types, plots
from experiments import (
    cell_type_figures,
    cell_type_layers,
    cell_type_programs,
    cell_type_tables,
    random_scgpt,
)
from extract import store
from sae_jax import InputError
from tests.experiments.damage import check_every_file
from tests.extract.small import some_cells, write_checkpoint

CELLS, GENES, PROGRAM, D, TOKENS = 240, 160, 20, 6, 5
WITH_TOKENS = 150
SMALL = {
    "expression_is": "counts", "label": "kind", "min_size": 5, "max_size": 200, "steps": 150,
    "l1_weights": ["0.1", "1"], "expansions": ["2"], "learning_rate": 0.01, "batch_size": 64,
    "top_genes": 15, "metadata_cells": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Three kinds of cells, each with a program of genes of its own."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, CELLS)
    rate = np.full((CELLS, GENES), 0.4)
    for k in range(3):
        rate[kind == k, k * PROGRAM : (k + 1) * PROGRAM] = 3.0
    return anndata.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame(
            {"kind": np.asarray(["A", "B", "C"])[kind],
             "tissue": np.where(kind == 2, "lung", "blood")},
            index=[f"cell{i}" for i in range(CELLS)],
        ),
        var=pd.DataFrame(index=[f"G{g}" for g in range(GENES)]),
        obsm={"X_some": (4 * np.eye(3)[kind] + rng.normal(size=(CELLS, 3)) * 0.5)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def states(cells: anndata.AnnData) -> dict[str, tuple[np.ndarray, pd.DataFrame]]:
    """Hidden states of tokens of two layers: a gene's direction; in the second the kind's too."""
    rng = np.random.default_rng(1)
    n = WITH_TOKENS * TOKENS
    cell = np.repeat(np.arange(WITH_TOKENS), TOKENS)
    gene = rng.integers(0, 12, n)
    kind = pd.Categorical(cells.obs["kind"]).codes[cell]
    plain = np.eye(D)[gene % 3] * (1 + gene[:, None] / 12) + rng.normal(size=(n, D)) * 0.1
    obs = pd.DataFrame(
        {"cell": pd.Categorical.from_codes(cell, cells.obs_names[:WITH_TOKENS]),
         "gene": pd.Categorical.from_codes(gene, [f"G{g}" for g in range(12)])},
        index=[str(i) for i in range(n)],
    )  # fmt: skip
    return {"layer_00": (plain, obs), "layer_01": (plain + 3 * np.eye(D)[3 + kind], obs)}


def write_stores(folder: Path, rows: dict[str, np.ndarray], obs: pd.DataFrame, pooling: str) -> str:
    about = {
        "identity": pooling, "pooling": pooling, "empty_cells": [],
        "obs_names_sha256": store.rows_hash(obs, pooling),
    }  # fmt: skip
    folder.mkdir()
    layers = {name: int(name.split("_")[1]) for name in rows}
    writer = store.Writer(folder, layers, obs, D, about, "float32")
    values = {name: x.astype(np.float32) for name, x in rows.items()}
    for block in writer.blocks:
        part = {name: x[block.rows] for name, x in values.items()}
        writer.write(block.number, block.rows, part)
    writer.finish()
    return str(folder)


@pytest.fixture
def stores(
    cells: anndata.AnnData, states: dict[str, tuple[np.ndarray, pd.DataFrame]], tmp_path: Path
) -> dict[str, str]:
    """Tokens of the first cells; vectors of all cells, of which those without tokens are noise."""
    rng = np.random.default_rng(2)
    vectors = {}
    for name, (x, _) in states.items():
        means = x.reshape(WITH_TOKENS, TOKENS, D).mean(axis=1)
        vectors[name] = np.concatenate([means, rng.normal(size=(CELLS - WITH_TOKENS, D))])
    obs = states["layer_00"][1]
    return {
        "tokens": write_stores(
            tmp_path / "tokens", {name: x for name, (x, _) in states.items()}, obs, "tokens"
        ),
        "cells": write_stores(tmp_path / "vectors", vectors, cells.obs, "mean"),
    }


@pytest.fixture
def run(cells: anndata.AnnData, tmp_path: Path) -> Callable[..., Path]:
    """Runs the program in this process, with these flags."""
    sets = {f"program {'ABC'[k]}": range(k * PROGRAM, (k + 1) * PROGRAM) for k in range(3)}
    sets |= {f"random {i}": range(60 + 10 * i, 70 + 10 * i) for i in range(8)}
    lines = ["\t".join([name, "", *(f"G{g}" for g in some)]) for name, some in sets.items()]
    (tmp_path / "sets.gmt").write_text("\n".join(lines))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["programs"])

    def call(**given: Any) -> Path:
        if not (tmp_path / "cells.h5ad").exists():
            cells.write_h5ad(tmp_path / "cells.h5ad")
        settings = {
            "h5ad": str(tmp_path / "cells.h5ad"), "gene_sets": str(tmp_path / "sets.gmt"),
            "workdir": str(tmp_path / "out"), **SMALL, **given,
        }  # fmt: skip
        with flagsaver.flagsaver():  # which forgets the flags defined within
            cell_type_programs.define_flags()
            for name, value in settings.items():
                setattr(flags.FLAGS, name, value)
            cell_type_programs.main()
        return Path(settings["workdir"])

    return call


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures take most of a small run's time."""
    monkeypatch.setattr(cell_type_figures, "draw", lambda *args: None)
    monkeypatch.setattr(cell_type_programs.cell_type_page, "write", lambda *args: None)


def test_one_embedding_of_cells(
    run: Callable[..., Path],
    cells: anndata.AnnData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All pieces, against the dictionaries that were saved."""
    monkeypatch.setattr(plots, "plane", lambda x: (x[:, :2], "PC"))  # UMAP takes seconds to load
    cells = cells.copy()
    cells.obs["tissue"] = cells.obs["tissue"].where(np.arange(CELLS) % 3 > 0)
    cells.obs["lab"] = "one"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    out = run(embedding="X_some", metadata=["lab", "tissue"], reductions=["mean"])
    missing = set(cell_type_programs.FILES) - {path.name for path in out.iterdir()}
    assert missing == {"extraction", "tokens.parquet"}
    check_every_file(out)
    layers = pd.read_csv(out / "layers.csv")
    latents = layers[layers["features"] == "latents"]
    assert len(latents) == 2  # as many penalties
    labels, features = (pd.read_parquet(out / f"{n}.parquet") for n in ("labels", "features"))
    choose, measure = cell_types.split(cells.obs["kind"], 0.3, 0)
    x = cells.obsm["X_some"].astype(np.float32)
    expression = np.log1p(cells.X.toarray() / cells.X.sum(axis=1) * 1e4)
    expression = np.asarray(expression)
    member = int(latents["member"].iloc[1])
    dictionary = sae_jax.Dictionary.load(out / f"training/X_some/cells/dictionaries/{member:04d}")
    assert dictionary.config.reduction == latents["reduction"].iloc[1]
    z = dictionary.encode(x)
    own = features[features["member"] == member].set_index("feature")
    np.testing.assert_array_equal(own["n_active"], (z != 0).sum(axis=0)[own.index])
    assert set(own["lab_verdict"]) == {"not enough data"}, "all cells are of one"

    # AUROC of the best latent of every kind, chosen here and measured there, and the mean of them.
    def area(cells_: np.ndarray, feature: int, kind: str) -> float:
        return roc_auc_score(cells.obs["kind"].iloc[cells_] == kind, z[cells_, feature])

    rows = labels[(labels["member"] == member) & (labels["sides"] == "one") & labels["held_out"]]
    for _, row in rows.iterrows():
        chosen = [area(choose, feature, row["label"]) for feature in range(z.shape[1])]
        assert row["auroc_chosen"] == pytest.approx(max(chosen))
        assert row["auroc"] == pytest.approx(area(measure, row["feature"], row["label"]))
    summary = latents.set_index("member").loc[member]
    assert summary["auroc_one"] == pytest.approx(rows["auroc"].mean())
    assert summary["auroc_one"] > 0.9
    assert summary["alive"] == (np.count_nonzero(z, axis=0) >= 0.01 * CELLS).sum()

    # Components are of the cells to choose on, too; theirs may be the other side.
    fitted = PCA(3, random_state=0).fit(x[choose].astype(np.float64))
    known = labels[(labels["features"] == "components") & labels["held_out"]]
    for _, row in known[known["sides"] == "two"].iterrows():
        along = fitted.transform(x)[measure, row["feature"]]
        area_of = roc_auc_score(cells.obs["kind"].iloc[measure] == row["label"], along)
        assert row["auroc"] == pytest.approx(area_of if row["higher"] else 1 - area_of)

    # The genes of a feature, and what its active cells are.
    genes = pd.read_parquet(out / "genes.parquet")
    best = int(rows.set_index("label").at["A", "feature"])
    of = genes[(genes["member"] == member) & (genes["feature"] == best) & (genes["side"] == "up")]
    for _, row in of.iterrows():
        gene = cells.var_names.get_loc(row["gene"])
        for column, some in (("r", choose), ("r_held_out", measure)):
            expected = stats.pearsonr(z[some, best], expression[some, gene]).statistic
            assert row[column] == pytest.approx(expected, abs=1e-5)
    about = features[(features["member"] == member)].set_index("feature").loc[best]
    assert about["marker_sets"] == "program A"
    active = cells.obs["tissue"][z[:, best] > 0].value_counts(normalize=True)
    assert about["tissue_label"] == active.index[0]
    assert about["tissue_share"] == pytest.approx(active.iloc[0])
    assert about["n_active"] == (z[:, best] > 0).sum()

    # Reconstruction of held-out cells; what is compared stands beside.
    errors = np.square(dictionary.decode(z)[measure] - x[measure]).sum()
    total = np.square(x[measure] - x[measure].mean(axis=0)).sum()
    assert summary["r2_cells"] == pytest.approx(1 - errors / total, rel=1e-4)
    table = pd.read_csv(out / "table_2.csv")
    row = table[(table["l1_weight"] == summary["l1_weight"])
                & (table["reduction"] == summary["reduction"])
                & (table["n_latents"] == summary["n_latents"])].iloc[0]  # fmt: skip
    assert row["r2"] == pytest.approx(summary["r2_cells"], rel=1e-3)
    assert row["alive"] + row["dead"] == row["alive_cells"] + row["dead_cells"] == row["n_latents"]
    assert row["l1_weight_as_sum"] == pytest.approx(
        row["l1_weight"] * (3 / row["n_latents"] if row["reduction"] == "mean" else 1)
    )
    compared = pd.read_csv(out / "table_4.csv")
    assert compared["features"].value_counts().to_dict() == {
        "latents": 2, "components": 1, "dimensions": 1,
    }  # fmt: skip
    assert pd.read_csv(out / "table_1.csv")["cells"].sum() == CELLS
    assert (out / "report.html").read_text().count("<h2") >= 8
    # Of several widths there is a figure more.
    layers["n_latents"] *= np.where(layers["member"] == member, 2, 1)
    table["n_latents"] *= np.where(table.index == row.name, 2, 1)
    figure = cell_type_figures.widths({"layers": layers, "table_2": table}, dict(summary))
    assert [len(panel.lines) for panel in figure.axes] == [2, 2, 2]


def test_layers_of_stores_with_tokens(
    run: Callable[..., Path], stores: dict[str, str], undrawn: None,
    states: dict[str, tuple[np.ndarray, pd.DataFrame]], cells: anndata.AnnData,
) -> None:  # fmt: skip
    """The mean of a cell's tokens' codes; the authors' way; dictionaries of held-in tokens only."""
    given = {
        "stores": list(stores.values()), "cell_features": ["mean", "pooled"],
        "reductions": ["mean"], "l1_weights": ["0.1", "1", "100000"],
    }  # fmt: skip
    out = run(**given)
    layers = pd.read_csv(out / "layers.csv")
    assert layers.groupby(["layer", "cell_features"]).size().to_dict() == {
        (layer, way): 5 for layer in states for way in ("mean", "pooled")
    }
    # The kind is in the second layer alone.
    found = layers[(layers["features"] == "latents") & (layers["cell_features"] == "mean")]
    found = found.groupby("layer")["auroc_one"].max()
    assert found["layer_01"] > 0.95 > 0.8 > found["layer_00"]
    means = layers[layers["cell_features"] == "mean"]
    dead = means[means["l1_weight"] == 100000]
    assert dead["alive"].tolist() == dead["annotated_two"].tolist() == [0, 0]
    assert dead["auroc_two"].tolist() == [0.5, 0.5]
    assert set(means["n_cells"]) == {WITH_TOKENS}
    assert set(layers[layers["cell_features"] == "pooled"]["n_cells"]) == {CELLS}

    # Codes of a cell, by hand.
    x, obs = states["layer_01"]
    choose, _ = cell_types.split(cells.obs["kind"], 0.3, 0)
    dictionary = sae_jax.Dictionary.load(out / "training/layer_01/tokens/dictionaries/0000")
    held_in = np.isin(obs["cell"].cat.codes, choose)
    np.testing.assert_allclose(dictionary.normalizer.mean, x[held_in].mean(axis=0), atol=1e-5)
    z = dictionary.encode(x.astype(np.float32))
    of_cells = z.reshape(WITH_TOKENS, TOKENS, -1).mean(axis=1)
    summary = means[(means["layer"] == "layer_01") & (means["member"] == 0)].iloc[0]
    assert summary["l0"] == pytest.approx(np.count_nonzero(of_cells, axis=1).mean())
    tokens = pd.read_parquet(out / "tokens.parquet")
    tokens = tokens[(tokens["layer"] == "layer_01") & (tokens["member"] == 0)]
    expected = pd.DataFrame(z).groupby(obs["gene"].to_numpy()).mean()
    for _, row in tokens.iterrows():
        assert row["mean"] == pytest.approx(expected.at[row["gene"], row["feature"]], rel=1e-5)
    first = tokens[tokens["rank"] == 0].set_index("feature")["gene"]
    counts = obs["gene"].value_counts()
    frequent = expected.loc[[gene for gene in expected.index if counts[gene] >= 10]]
    assert first.to_dict() == frequent.idxmax()[first.index].to_dict()

    # The same command again does nothing anew, and other settings are refused.
    before = (out / "studied/layer_00/mean/summary.parquet").stat().st_mtime_ns
    run(**given, resume=True, shown_layer="layer_00")
    assert before == (out / "studied/layer_00/mean/summary.parquet").stat().st_mtime_ns
    pd.testing.assert_frame_equal(layers, pd.read_csv(out / "layers.csv"))
    with pytest.raises(InputError, match=r"other settings[\s\S]*universe"):
        run(**given, resume=True, universe="markers")


def test_where_there_are_tokens_only_a_cells_vector_is_their_mean(
    stores: dict[str, str], states: dict[str, tuple[np.ndarray, pd.DataFrame]]
) -> None:
    (found,) = cell_type_layers.find([stores["tokens"]], ["1"])
    names = cell_type_layers.cell_names([found])
    assert names.tolist() == [f"cell{i}" for i in range(WITH_TOKENS)]
    x = states["layer_01"][0]
    order = names[::-1]
    layer = cell_type_layers.read(found, order)
    means = x.reshape(WITH_TOKENS, TOKENS, D).mean(axis=1)[::-1]
    np.testing.assert_allclose(layer.cells, means, atol=1e-6)
    sample = layer.tokens.sample(np.array([0, 3]), 1000, 0)  # the last cell, and three before it
    np.testing.assert_allclose(sample, np.concatenate([x[-20:-15], x[-5:]]), rtol=1e-6)
    assert layer.provenance["data"].endswith("layer_01.zarr")


def test_from_a_checkpoint(
    run: Callable[..., Path], tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are extracted as the authors' code does; vectors are means of tokens."""
    adata = some_cells(24)
    adata.obs["kind"] = ["A", "B"] * 12
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "sets.gmt").write_text("some\t\t" + "\t".join(adata.var_names[:6]))
    checkpoint = write_checkpoint(tmp_path / "scgpt")
    monkeypatch.setattr(cell_type_programs.cell_type_inputs.gene_sets, "MIN_UNIVERSE", 1)
    settings = {
        "checkpoint": str(checkpoint), "layers": ["-1"], "limit": 20, "token_cells": 20,
        "device": "cpu", "min_label_cells": 2, "steps": 5, "batch_size": 32, "reductions": ["sum"],
    }  # fmt: skip
    with pytest.raises(SystemExit):  # of the extraction, which has said why
        run(**settings, option=["values=odd"])
    assert not (tmp_path / "out").exists()
    out = run(**settings)
    names = [path.name for path in sorted((out / "extraction/tokens").glob("*.zarr"))]
    assert names == ["layer_02.zarr"]
    about = store.open(out / "extraction/tokens/layer_02.zarr").extraction
    wanted = {"values": "log1p", "cls": False, "order": "descending", "select": "top"}
    assert {key: about["preprocessing"][key] for key in wanted} == wanted
    assert set(pd.read_csv(out / "layers.csv")["n_cells"]) == {20}
    with pytest.raises(InputError, match="--shown_layer=layer_00 is not one of layer_02"):
        run(**settings, shown_layer="layer_00", resume=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embedding": "X_some", "stores": ["some"]}, "give one of --stores"),
        ({"embedding": "X_some", "layers": ["0"]}, "--layers are of --stores"),
        ({"stores": ["nowhere"]}, "nowhere holds no extraction stores"),
        ({"embedding": "X_some", "learning_rate": 0.0}, "--learning_rate=0 must be above 0"),
        ({"checkpoint": "nowhere"}, "--checkpoint=nowhere is no folder"),
        ({"embedding": "X_some", "shown_layer": "layer_03"}, "--shown_layer=.* one of X_some"),
        ({"embedding": "X_some", "label": None}, "--label is needed"),
        ({"embedding": "X_some", "metadata": ["donor"]}, "obs has no donor"),
        ({"embedding": "X_some", "l1_weights": ["1", "x"]}, "--l1_weights=1,x: numbers above 0"),
        ({"embedding": "X_some", "reductions": ["median"]}, "'median' is neither mean nor sum"),
        ({"embedding": "X_some", "cell_features": ["all"]}, "'all' is not one of cells, mean"),
        ({"embedding": "X_some", "cell_features": ["mean"]}, "has no tokens"),
        ({"embedding": "X_some", "min_label_cells": 90}, "0 labels have 90 cells or more"),
        ({"embedding": "X_some", "gene_sets": "embedded"}, "genes"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_left(
    run: Callable[..., Path], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(**given)
    assert not (tmp_path / "out").exists()


def test_stores_that_do_not_fit(
    run: Callable[..., Path], stores: dict[str, str], cells: anndata.AnnData, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no layer_07 among layer_00, layer_01"):
        run(stores=list(stores.values()), layers=["7"])
    write_stores(tmp_path / "twice", {"layer_00": np.zeros((CELLS, D))}, cells.obs, "mean")
    with pytest.raises(InputError, match="are both layer_00 of cells"):
        run(stores=[stores["cells"], str(tmp_path / "twice")])
    other = cells.obs.iloc[:50]
    write_stores(tmp_path / "fewer", {"layer_05": np.zeros((50, D))}, other, "mean")
    with pytest.raises(InputError, match="layer_05 and layer_00 are of other cells"):
        run(stores=[stores["cells"], str(tmp_path / "fewer")])
    renamed = other.set_axis([f"other{i}" for i in range(50)])
    write_stores(tmp_path / "others", {"layer_05": np.zeros((50, D))}, renamed, "mean")
    with pytest.raises(InputError, match=r"lacks 50 of the 50 cells of the stores \(other0 first"):
        run(stores=[str(tmp_path / "others")])


def test_the_papers_numbers_stand_beside_the_same_setting_only() -> None:
    table = pd.DataFrame(
        {"layer": ["layer_11", "layer_11", "layer_11", "layer_03", "X_pca"],
         "reduction": ["mean", "sum", "mean", "mean", "mean"], "l1_weight": [3.0] * 5,
         "n_latents": [2048, 2048, 512, 2048, 2048]}
    )  # fmt: skip
    found = cell_type_tables.beside(table, cell_type_tables.TABLE_2)
    assert found["paper_l0"].notna().tolist() == [True, False, False, False, False]
    assert found.iloc[0][["paper_l0", "paper_r2", "paper_alive"]].tolist() == [219, 0.934, 2029]
    assert "paper_l0" not in cell_type_tables.beside(table[1:], cell_type_tables.TABLE_2)
    four = table.assign(features=["latents"] * 4 + ["components"])
    four.loc[4, ["layer", "reduction", "l1_weight", "n_latents"]] = [
        "layer_11",
        None,
        np.nan,
        np.nan,
    ]
    found = cell_type_tables.beside(four, cell_type_tables.TABLE_4)
    assert found["paper_auroc"].fillna(0).tolist() == [0.772, 0, 0, 0, 0.819]


def test_a_checkpoint_of_random_weights_is_read(tmp_path: Path) -> None:
    import extract

    (tmp_path / "vocab.json").write_text(json.dumps({f"G{i}": i for i in range(30)}))
    with flagsaver.flagsaver():
        random_scgpt.define_flags()
        flags.FLAGS(["random", f"--vocab={tmp_path / 'vocab.json'}", "--blocks=2", "--width=16",
                     f"--checkpoint={tmp_path / 'scgpt'}"])  # fmt: skip
        random_scgpt.main()
        with pytest.raises(InputError, match="exists; choose a new folder"):
            random_scgpt.main()
    model = extract.load_model("scgpt", tmp_path / "scgpt")
    assert (model.n_layers, model.d_model, len(model.vocabulary)) == (2, 16, 33)
    assert cell_type_layers.store is store

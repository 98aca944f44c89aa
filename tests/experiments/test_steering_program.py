"""A dictionary and a decoder so simple that every shift is known; and the study of red blood."""

import importlib.util
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
from anndata._core.sparse_dataset import BaseCompressedSparseDataset
from scipy import sparse

import extract
from analysis import cells, paired
from experiments import erythroid, steering
from sae_jax import Dictionary, InputError, SAEConfig
from sae_jax.state import Params
from tests.experiments.damage import check_every_file

D, LATENTS, GENES = 4, 6, 150
KINDS = np.repeat(["A", "B", "C", "other"], [12, 10, 9, 15])
RISING = [f"G{g}" for g in range(10)]  # the genes that dimension 0 raises
INVERSE_DISPERSION = np.linspace(1, 5, GENES)


class Softmax:
    """Expected shares: softmax of a linear map; genes 0 to 9 rise along dimension 0."""

    genes = [f"G{g}" for g in range(GENES)]  # noqa: RUF012
    d_model = D

    def __init__(self, checkpoint: Path, *, device: str = "cpu", dtype: str = "float32") -> None:
        weight = np.random.default_rng(3).normal(0, 0.1, (D, GENES))
        weight[0, :10], weight[1, 10:20] = 2.0, 2.0
        self.weight = weight

    def decode(self, latents: np.ndarray, batch: Any = None, covariates: Any = None) -> np.ndarray:
        assert batch is None
        assert covariates is None
        shares = np.exp(latents.astype(np.float64) @ self.weight)
        return shares / shares.sum(axis=1, keepdims=True)

    @property
    def dispersion(self) -> np.ndarray:
        return INVERSE_DISPERSION


class NoDecoder:
    """A model that embeds only."""

    def __init__(
        self, checkpoint: Path, *, device: str = "cpu", dtype: str = "float32"
    ) -> None: ...


class Nameless(Softmax):
    """A model that knows its genes by position."""

    genes = ()


def latents() -> np.ndarray:
    """Dimension 0 rises A, B, C and is low elsewhere; 1 and 3 fall; 2 rises, more so elsewhere."""
    level = {"A": (0.5, 3, 1.0, 1.5), "B": (1.5, 2, 1.2, 1.2), "C": (2.5, 1, 1.4, 1.0),
             "other": (0.2, 2, 4.0, 1.1)}  # fmt: skip
    noise = np.random.default_rng(1).uniform(-0.05, 0.05, (len(KINDS), D))
    return (np.array([level[kind] for kind in KINDS]) + noise).astype(np.float32)


def dictionary() -> Dictionary:
    """Latents 0 to 3 are the dimensions; 4 looks along -0.1 of dimension 1; 5 is dead."""
    eye = np.eye(D, dtype=np.float32)
    fourth = np.array([[0, 1, 0, 0]], np.float32)
    return Dictionary(
        SAEConfig(d_in=D, n_latents=LATENTS),
        Params(
            encoder=np.concatenate([eye, 0.1 * fourth, fourth]).T.copy(),
            encoder_bias=np.array([0, 0, 0, 0, 0, -100], np.float32),
            decoder=np.concatenate([eye, -fourth, -fourth]),
            decoder_bias=np.full(D, 0.1, np.float32),
            pre_bias=None,
        ),
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs the program: `run(flag=value, change=function of the AnnData)`; gives its workdir.

    The page is drawn with draw=True alone: it takes longer than all the rest.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["steering"])
    monkeypatch.setitem(extract.MODELS, "softmax", Softmax)
    monkeypatch.setitem(extract.MODELS, "blind", NoDecoder)
    monkeypatch.setitem(extract.MODELS, "nameless", Nameless)
    counts = np.random.default_rng(0).poisson(3, (len(KINDS), GENES)).astype(np.float32)
    adata = anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame({"kind": KINDS, "total": 100.0 + np.arange(len(KINDS))},
                         index=[f"cell{i}" for i in range(len(KINDS))]),
        var=pd.DataFrame({"symbol": [f"S{g}" for g in range(GENES)]}, index=Softmax.genes),
        obsm={"X_model": latents(), "X_narrow": latents()[:, :3]},
        layers={"log": sparse.csr_matrix(np.log1p(counts) + 0.5)},
    )  # fmt: skip
    lines = ["\t".join(["rising", "", *RISING])]
    lines += ["\t".join([f"set {i}", "", *[f"G{10 + 10 * i + g}" for g in range(10)]])
              for i in range(12)]  # fmt: skip
    (tmp_path / "sets.gmt").write_text("\n".join(lines) + "\n")
    (tmp_path / "model").mkdir()
    dictionary().save(tmp_path / "dictionary")

    def call(
        change: Callable[[anndata.AnnData], Any] | None = None, draw: bool = False, **given: Any
    ) -> Path:
        if not draw:
            monkeypatch.setattr(steering.steering_page, "write", lambda *_: None)
        changed = adata.copy()
        if change is not None:
            changed = change(changed) or changed
        changed.write_h5ad(tmp_path / "cells.h5ad")
        settings = {
            "h5ad": str(tmp_path / "cells.h5ad"), "expression_is": "counts", "label": "kind",
            "embedding": "X_model", "gene_sets": str(tmp_path / "sets.gmt"), "min_size": 5,
            "dictionary": str(tmp_path / "dictionary"), "decoder": f"softmax:{tmp_path}/model",
            "stages": ["A", "B", "C"], "workdir": str(tmp_path / "out"), **given,
        }  # fmt: skip
        with flagsaver.flagsaver():  # which forgets the flags defined within
            steering.define_flags()
            for name, value in settings.items():
                setattr(flags.FLAGS, name, value)
            steering.main()
        return Path(settings["workdir"])

    return call


def test_shifts_and_predictions_are_those_of_the_closed_form(run: Callable[..., Path]) -> None:
    out = run(genes=["G1", "G50"], controls=3, draw=True)
    ranked = pd.read_csv(out / "candidates.csv")
    assert ranked["feature"].tolist() == [0]  # of 1 to 5 none rises and is higher in the lineage
    assert ranked["steered"].all()
    x, a, c = latents().astype(np.float64), KINDS == "A", KINDS == "C"
    assert ranked["level"][0] == pytest.approx(x[:, 0].max())
    np.testing.assert_allclose(
        ranked[["mean A", "mean B", "mean C"]].to_numpy()[0],
        [x[kind == KINDS, 0].mean() for kind in "ABC"], rtol=1e-5,
    )  # fmt: skip

    # The level replaces dimension 0, and nothing else moves.
    shift = pd.read_parquet(out / "shift.parquet")
    assert shift["cell"].tolist() == [f"cell{i}" for i in range(12)]
    np.testing.assert_allclose(shift["norm"], x[:, 0].max() - x[a, 0], rtol=1e-5)
    line = x[c].mean(axis=0) - x[a].mean(axis=0)
    np.testing.assert_allclose(
        shift["progress"], shift["norm"] * line[0] / (line**2).sum(), rtol=1e-4
    )

    after = x[a].copy()
    after[:, 0] = x[:, 0].max()
    model = Softmax(Path())
    before, after = model.decode(x[a]) * 1e4, model.decode(after) * 1e4
    found = pd.read_parquet(out / "expression.parquet")
    assert found["gene"].tolist() == Softmax.genes
    np.testing.assert_allclose(found["before"], before.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["after"], after.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found["share_up"], (after > before).mean(axis=0))
    np.testing.assert_allclose(
        found["log2_fold_change"],
        np.log2((after.mean(axis=0) + 0.01) / (before.mean(axis=0) + 0.01)), atol=1e-4,
    )  # fmt: skip
    assert (found["share_up"][:10] == 1).all()

    # Expected counts at the cells' own libraries, with the model's dispersion.
    library = anndata.read_h5ad(out.parent / "cells.h5ad").X.sum(axis=1)
    library = np.asarray(library, np.float64).ravel()[a]
    test = paired.negative_binomial(
        before / 1e4 * library[:, None], after / 1e4 * library[:, None], library,
        dispersion=1 / INVERSE_DISPERSION,
    )  # fmt: skip
    np.testing.assert_allclose(found["z"], test.z, rtol=1e-3, atol=1e-4)
    assert found["q"][:10].max() < found["q"][10:].min()

    terms = pd.read_parquet(out / "terms.parquet").set_index("term")
    assert terms.index[0] == "rising"
    assert terms.loc["rising", "specific"]
    changed = found["gene"].isin(RISING) & (found["q"] < 1e-5) & (found["effect"].abs() >= 1)
    assert terms.loc["rising", "hits"] == changed.sum() > 5
    assert (out / "report.html").stat().st_size > 10_000
    assert {path.name for path in (out / "figures").glob("*.png")} == {
        "candidates.png", "steered.png", "volcano.png", "genes.png"
    }  # fmt: skip


@pytest.mark.parametrize("place", ["X", "raw", "layer"])
def test_expression_that_stays_in_its_file_gives_the_same(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    read: list[int] = []
    take = BaseCompressedSparseDataset.__getitem__

    def counted(dataset: Any, index: Any) -> Any:
        rows = take(dataset, index)
        read.append(rows.shape[0])
        return rows

    def moved(adata: anndata.AnnData) -> None:
        adata.layers["layer"] = adata.X.copy()
        adata.raw = adata.copy()

    monkeypatch.setattr(BaseCompressedSparseDataset, "__getitem__", counted)
    given = {"controls": 3, "expression": place, "change": moved}
    one = run(workdir=str(tmp_path / "one"), **given)
    assert not read
    two = run(workdir=str(tmp_path / "two"), out_of_core=True, memory_gib=7e-4, **given)
    assert sum(read) > 2 * len(KINDS)
    assert max(read) < len(KINDS) / 2
    for name in ("shift", "expression", "terms", "controls"):
        tables = [pd.read_parquet(out / f"{name}.parquet") for out in (one, two)]
        pd.testing.assert_frame_equal(*tables)


def test_controls_move_cells_equally_far_along_other_features(run: Callable[..., Path]) -> None:
    out = run(genes=["G1", "G15"], controls=10)
    drawn = pd.read_parquet(out / "controls.parquet")
    assert sorted(drawn["control"].unique()) == [1, 2, 3, 4]  # 0 is steered, 5 is dead
    x, a, model = latents().astype(np.float64), KINDS == "A", Softmax(Path())
    norm = x[:, 0].max() - x[a, 0]
    before = model.decode(x[a]).mean(axis=0) * 1e4
    change = {}
    for control, (dimension, sign) in {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (1, -1)}.items():
        moved = x[a].copy()
        moved[:, dimension] += sign * norm
        after = model.decode(moved).mean(axis=0) * 1e4
        change[control] = np.log2((after + 0.01) / (before + 0.01))
    for row in drawn.itertuples():
        expected = change[row.control][Softmax.genes.index(row.gene)]
        assert row.log2_fold_change == pytest.approx(expected, abs=1e-3)
    found = pd.read_parquet(out / "expression.parquet").set_index("gene")
    assert found.loc["G1", "control_p"] == pytest.approx(1 / 5)  # none raises it as much
    ours = found.loc["G15", "log2_fold_change"]
    more = sum(values[15] >= ours if ours > 0 else values[15] <= ours for values in change.values())
    assert found.loc["G15", "control_p"] == pytest.approx((1 + more) / 5)


def test_each_label_is_an_experiment_and_shared_terms_are_marked(run: Callable[..., Path]) -> None:
    out = run(cells=["other", "A"], features=["0", "feature_1"], most_cells=13, library="total")
    shift = pd.read_parquet(out / "shift.parquet")
    counts = shift.groupby(["cells", "feature"]).size()
    assert counts.to_dict() == {
        ("A", 0): 12, ("A", 1): 12, ("other", 0): 13, ("other", 1): 13
    }  # fmt: skip
    terms = pd.read_parquet(out / "terms.parquet").set_index(["feature", "term"]).sort_index()
    assert (terms.loc[(0, "rising"), "experiments"] == 2).all()
    assert (terms.loc[(1, "rising"), "experiments"] == 0).all()
    ranked = pd.read_csv(out / "candidates.csv").set_index("feature")
    assert ranked["passes"].to_dict() == {0: True, 1: False}


def test_levels_by_the_target_and_without_the_error(run: Callable[..., Path]) -> None:
    out = run(**{"raise": "target_mean", "factor": 1.5, "keep_error": False, "controls": 0})
    x = latents().astype(np.float64)
    level = 1.5 * x[KINDS == "C", 0].mean()
    assert pd.read_csv(out / "candidates.csv")["level"][0] == pytest.approx(level, rel=1e-5)
    # decode(z'): dimension 1 loses latent 4, a tenth of it, and each gets the bias.
    x = x[KINDS == "A"]
    moved = np.stack([level - x[:, 0], -0.1 * x[:, 1], 0 * x[:, 0], 0 * x[:, 0]], axis=1) + 0.1
    shift = pd.read_parquet(out / "shift.parquet")
    np.testing.assert_allclose(shift["norm"], np.linalg.norm(moved, axis=1), rtol=1e-4)
    assert "control_p" not in pd.read_parquet(out / "expression.parquet")


def test_a_model_without_dispersion_is_tested_by_the_cells_disagreement(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Softmax, "dispersion")
    found = pd.read_parquet(run() / "expression.parquet")
    x, a, model = latents().astype(np.float64), KINDS == "A", Softmax(Path())
    after = x[a].copy()
    after[:, 0] = x[:, 0].max()
    ratio = np.log2(model.decode(after) / model.decode(x[a]))
    # Cells differ in their changes by little: so small is the standard error of their mean.
    spread = ratio.std(axis=0, ddof=1) / np.sqrt(a.sum())
    assert (found["standard_error"] / spread).between(0.8, 1.25).all()


def test_a_lens_names_its_dictionary(tmp_path: Path) -> None:
    assert steering.dictionary_folder(str(tmp_path)) == tmp_path
    (tmp_path / "lens.json").write_text(json.dumps({"dictionary": "some/where"}))
    assert steering.dictionary_folder(str(tmp_path)) == Path("some/where")
    (tmp_path / "dictionary").mkdir()
    assert steering.dictionary_folder(str(tmp_path)) == tmp_path / "dictionary"
    (tmp_path / "dictionary").rmdir()
    (tmp_path / "lens.json").write_text(json.dumps({"dictionary": None}))
    with pytest.raises(InputError, match="is of a lens run that has no dictionary yet"):
        steering.dictionary_folder(str(tmp_path))


def without_counts(adata: anndata.AnnData) -> None:
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(len(KINDS)) != 3)[:, None])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workdir": None}, "--workdir is needed"),
        ({"stages": ["A"]}, "--stages is needed"),
        ({"stages": ["A", "B", "Z"]}, "no cell is labelled 'Z'"),
        ({"stages": ["C", "B", "A", "other"]}, "leaves other labels"),
        ({"stages": ["B", "A", "C"]}, "no feature rises along B -> A -> C at every step"),
        ({"cells": ["A", "nothing"]}, "--cells: no cell is labelled 'nothing'"),
        ({"cells": ["A", "A"]}, "--cells holds one twice"),
        ({"features": ["one"]}, "--features=one: give numbers"),
        ({"features": ["6"]}, "--features: there is no 6; there are 0 to 5"),
        ({"features": ["5"]}, "--features: 5 is dead on these cells"),
        ({"factor": float("nan")}, "--factor=nan must be a finite number"),
        ({"label": None}, "--label is needed"),
        ({"embedding": None}, "--embedding is needed"),
        ({"dictionary": "nowhere"}, "holds no saved dictionary"),
        ({"decoder": "softmax"}, "--decoder=softmax: give MODEL:FOLDER"),
        ({"decoder": "unheard:/tmp"}, "there is no model 'unheard'"),
        ({"decoder": "blind:/tmp"}, "--decoder: blind has no decoder"),
        (
            {"embedding": "X_narrow"},
            "of 4 dimensions, --embedding of 3, the decoder's latents of 4",
        ),
        ({"genes": ["G1", "HBB"]}, "--genes: the decoder has no HBB"),
        ({"batch": "lane"}, "obs has no column 'lane'"),
        ({"library": "depth"}, "--library: obs has no column 'depth'"),
        ({"expression": "log", "expression_is": "log1p"}, "--library is needed"),
        ({"change": without_counts}, "1 of 46 cells have no counts in the decoder's genes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    run: Callable[..., Path], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, extract.InputError), match=message) as raised:
        run(**given)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_replaced_only_if_told(run: Callable[..., Path]) -> None:
    out = run(controls=2)
    first = pd.read_parquet(out / "expression.parquet")
    assert json.loads((out / "steering.json").read_text())["controls"] == 2
    with pytest.raises(InputError, match=r"holds an earlier run: --overwrite replaces it$"):
        run(controls=2)
    (out / ".writing-shift.parquet.x").mkdir()  # as a killed run leaves it
    run(controls=2, overwrite=True)
    assert not list(out.glob(".writing*"))
    pd.testing.assert_frame_equal(first, pd.read_parquet(out / "expression.parquet"))
    run(controls=0, overwrite=True, genes=["G1"])
    assert "control_p" not in pd.read_parquet(out / "expression.parquet")
    (out / "steering.json").unlink()
    with pytest.raises(InputError, match="holds other files"):
        run(overwrite=True)


def test_symbols_where_the_decoder_has_other_names(run: Callable[..., Path]) -> None:
    var = pd.DataFrame({"symbol": ["one", "two", "two", "", None]}, index=list("abcde"))
    assert steering.gene_names(list("abcdef"), var, "symbol") == ["one", "two", "c", "d", "e", "f"]
    assert steering.gene_names(["a"], var, None) == ["a"]

    def named(adata: anndata.AnnData) -> None:
        adata.var["symbol"] = [f"G{g}" for g in reversed(range(GENES))]

    out = run(named, gene_symbols="symbol", genes=["G149"], controls=0)
    found = pd.read_parquet(out / "expression.parquet")
    assert found["gene"].tolist() == [f"G{g}" for g in reversed(range(GENES))]
    assert found["share_up"][:10].tolist() == [1] * 10  # now called G149 to G140


@pytest.mark.skipif(importlib.util.find_spec("scvi") is None, reason="needs scvi-tools")
def test_the_study_of_red_blood_runs(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["erythroid"])

    def call(**given: Any) -> None:
        with flagsaver.flagsaver():
            erythroid.define_flags()
            for name, value in (settings | given).items():
                setattr(flags.FLAGS, name, value)
            erythroid.main()

    # Three cells in four go: what the study finds is another matter, and takes minutes.
    path = data_folder / "data" / "counts" / "paul15_mouse_2730x3451.h5ad"
    adata = cells.read(path)[::4]
    adata = adata[adata.X.sum(axis=1) > 0].copy()
    adata.write_h5ad(tmp_path / "some.h5ad")
    settings = {
        "h5ad": str(tmp_path / "some.h5ad"), "workdir": str(tmp_path / "out"), "quick": True,
        "stages": ["7MEP", "2Ery"], "controls": 5, "min_size": 20, "genes": ["Klf1", "Hba-a2"],
        "gene_sets": str(data_folder / "data" / "genesets" / "GO_Biological_Process_2021.gmt"),
    }  # fmt: skip
    call()
    out = tmp_path / "out"
    assert set(erythroid.FILES) <= {path.name for path in out.iterdir()}
    check_every_file(out)
    told = pd.read_csv(out / "story.csv")
    assert told["gene"].head(3).tolist() == ["Klf1", "Hba-a2", "mean of these"]
    assert pd.read_csv(out / "configurations.csv")["taken"].sum() == 1
    (out / "story.csv").unlink()
    trained = {path: path.stat().st_mtime_ns for path in out.glob("*/*model.pt")}
    trained |= {path: path.stat().st_mtime_ns for path in out.glob("dictionary/*")}
    monkeypatch.setattr(steering.steering_page, "write", lambda *_: None)  # it takes long
    call(resume=True)
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    assert len(trained) == 3
    pd.testing.assert_frame_equal(told, pd.read_csv(out / "story.csv"))
    with pytest.raises(InputError, match="other settings:\n  controls: 5 there, 6 asked for"):
        call(resume=True, controls=6)
    with pytest.raises(InputError, match="has no 9Ery"):
        call(overwrite=True, stages=["7MEP", "9Ery"])

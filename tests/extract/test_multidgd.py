"""multiDGD: its own package's numbers, cells by name, both modalities, and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st

import extract
from extract.errors import InputError
from extract.models.multidgd import MultiDGD

COVARIATE = "variants/covariate_two_modalities"


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> Path:
    return data_folder / "golden" / "multidgd"


@pytest.fixture(scope="module")
def rna(golden: Path) -> MultiDGD:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return extract.load_model("multidgd", golden / "model")


@pytest.fixture(scope="module")
def both(golden: Path) -> MultiDGD:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return extract.load_model("multidgd", golden / COVARIATE / "model")


def cells_of(model: MultiDGD) -> anndata.AnnData:
    """The model's cells without any expression."""
    return anndata.AnnData(obs=pd.DataFrame(index=model.cells))


def test_golden(golden: Path, rna: MultiDGD) -> None:
    official = pd.read_csv(golden / "representation_obs.csv")
    assert rna.cells == official["obs_name"].tolist()
    latent = rna.embed(cells_of(rna))["latent"]
    assert latent.dtype == np.float32
    np.testing.assert_array_equal(latent, np.load(golden / "representation_all.npy"))
    expected = np.load(golden / "expected_decoder.npz")
    fractions = rna.decode(expected["representation"])
    assert fractions.dtype == np.float32
    np.testing.assert_allclose(fractions, expected["mean_fraction_mod0"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(fractions.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rna.dispersion, expected["dispersion_mod0"], rtol=1e-5)
    some = cells_of(rna)[expected["cell_index"]]
    ran = rna.run(some, "latent", None, outputs=("fractions",))
    np.testing.assert_allclose(ran.outputs["fractions"], fractions, rtol=0, atol=2e-6)


def test_golden_with_covariates_and_two_modalities(golden: Path, both: MultiDGD) -> None:
    folder = golden / COVARIATE
    cells = anndata.read_h5ad(folder / "data.h5ad")
    np.testing.assert_array_equal(
        both.embed(cells, "latent")["latent"], np.load(folder / "representation_all.npy")
    )
    beside = both.covariate_latents(cells)
    np.testing.assert_array_equal(beside, np.load(folder / "covariate_representation_all.npy"))
    expected = np.load(folder / "expected_decoder.npz")
    given = {"covariates": expected["covariate_representation"]}
    every = both.decode(expected["representation"], modality="all", **given)
    assert list(every) == both.modalities == ["rna", "atac"]
    for i, name in enumerate(both.modalities):
        fractions = expected[f"mean_fraction_mod{i}"]
        np.testing.assert_allclose(every[name], fractions, rtol=0, atol=2e-6)
        np.testing.assert_allclose(every[name].sum(axis=1), 1, atol=1e-5)
        for modality in (i, name):
            one = both.decode(expected["representation"], modality=modality, **given)
            np.testing.assert_array_equal(one, every[name])
        np.testing.assert_allclose(
            both.dispersions[name], expected[f"dispersion_mod{i}"], rtol=1e-5
        )
    ran = both.run(cells[expected["cell_index"]], "latent", None, outputs=("fractions",))
    np.testing.assert_allclose(
        ran.outputs["fractions"], expected["mean_fraction_mod0"], rtol=0, atol=2e-6
    )


def test_what_a_model_says_of_itself(rna: MultiDGD, both: MultiDGD) -> None:
    assert (rna.name, rna.n_layers, rna.d_model, rna.genes) == ("multidgd", 0, 20, [])
    assert rna.all_layers == rna.resolve(None) == ["latent"]
    assert sorted(rna.checkpoint) == [
        "_obs.csv", "dgd_shared.pt", "dgd_shared_hyperparameters.json",
    ]  # fmt: skip
    assert both.plan(cells_of(both)).settings == {
        "cells": "by name",
        "model_cells": 600,
        "modalities": ["rna", "atac"],
        "covariates": ["covariate_site"],
    }


@hypothesis.given(seed=st.integers(0, 2**32 - 1), batch_size=st.integers(1, 80))
@hypothesis.settings(max_examples=8)
def test_rows_are_in_the_order_of_the_file(both: MultiDGD, seed: int, batch_size: int) -> None:
    rng = np.random.default_rng(seed)
    some = cells_of(both)[rng.choice(600, size=70, replace=False)]
    positions = [both.cells.index(name) for name in some.obs_names]
    ran = both.run(
        some, "latent", lambda rows: 2 * rows, outputs=("fractions",), batch_size=batch_size
    )
    everything = both.embed(cells_of(both))["latent"]
    np.testing.assert_array_equal(ran.hidden["latent"], 2 * everything[positions])
    expected = both.decode(2 * everything[positions], covariates=both.covariate_latents(some))
    np.testing.assert_allclose(ran.outputs["fractions"], expected, rtol=0, atol=2e-6)


def test_names_of_genes(golden: Path) -> None:
    folder = golden / COVARIATE / "model"
    names = [f"gene{i}" for i in range(120)]
    for given in (names, names[:60]):
        assert extract.load_model("multidgd", folder, genes=given).genes == names[:60]
    with pytest.raises(InputError, match=r"has 7 names; .* has 60 features, all have 120"):
        extract.load_model("multidgd", folder, genes=names[:7])


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_are_refused(rna: MultiDGD, both: MultiDGD) -> None:
    strange = anndata.AnnData(obs=pd.DataFrame(index=[*rna.cells[:3], "x1", "x2"]))
    with pytest.raises(InputError, match=r"2 of 5 cells .* 3774 .*\(x1, x2;.*has no encoder"):
        rna.embed(strange)
    twice = anndata.AnnData(obs=pd.DataFrame(index=rna.cells[:2] * 2))
    with pytest.raises(InputError, match="2 cell names occur more than once"):
        rna.embed(twice)
    with pytest.raises(InputError, match="without covariates: there are no such latents"):
        rna.covariate_latents(cells_of(rna))
    with pytest.raises(InputError, match="has no preprocessing batch"):
        rna.embed(cells_of(rna), batch="site")
    with pytest.raises(InputError, match="'cls' are none"):
        rna.run(cells_of(rna), "latent", lambda rows: rows, tokens="cls")


def test_decode_refuses(rna: MultiDGD, both: MultiDGD) -> None:
    latents, beside = np.zeros((3, 6)), np.zeros((3, 2))
    for wrong, message in (
        ({}, r"trained with covariates \(covariate_site\): .*\[cells, 2\] by covariates="),
        ({"covariates": beside[:, :1]}, r"covariates must be \[cells, 2\], not \[3, 1\]"),
        ({"covariates": beside[:2]}, "2 rows of covariates for 3 latents"),
        ({"covariates": beside + np.inf}, "covariates hold NaN or infinite"),
        ({"covariates": beside, "batch": "b0"}, "knows no batches"),
        ({"covariates": beside, "modality": 2}, r"no modality 2; there are rna, atac"),
        ({"covariates": beside, "modality": "adt"}, "no modality 'adt'"),
    ):
        with pytest.raises(InputError, match=message):
            both.decode(latents, **wrong)
    with pytest.raises(InputError, match="without covariates: leave covariates out"):
        rna.decode(np.zeros((3, 20)), covariates=beside)
    with pytest.raises(InputError, match=r"latents must be \[cells, 20\], not \[3, 6\]"):
        rna.decode(latents)


Change = Callable[[dict[str, Any], dict[str, Any], pd.DataFrame], Any]


def changed(golden: Path, to: Path, change: Change) -> Path:
    """A copy of the model with covariates; `change` gets weights, hyper-parameters and obs."""
    folder = golden / COVARIATE / "model"
    weights = torch.load(folder / "dgd_shared_cov.pt")
    settings = json.loads((folder / "dgd_shared_cov_hyperparameters.json").read_text())
    obs = pd.read_csv(folder / "_obs.csv", index_col=0)
    change(weights, settings, obs)
    torch.save(weights, to / "m.pt")
    (to / "m_hyperparameters.json").write_text(json.dumps(settings))
    obs.to_csv(to / "m_obs.csv")
    return to


def other_split(_: dict, __: dict, obs: pd.DataFrame) -> None:
    obs.loc[obs.index[0], "train_val_test"] = "held out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, s, o: s.pop("n_units"), "lacks n_units"),
        (lambda w, s, o: s.update(n_hidden="two"), "n_hidden must be a whole number"),
        (lambda w, s, o: s.update(n_features_per_modality=[120]),
         "how many features each modality has"),
        (lambda w, s, o: w.pop("correction_rep.z"), r"has no correction_rep\.z"),
        (lambda w, s, o: w.pop("correction_val_rep.z"), r"has no correction_val_rep\.z"),
        (lambda w, s, o: w.update({"test_rep.z": torch.zeros(9, 6)}),
         r"test_rep\.z is \(9, 6\), not \(60, 6\)"),
        (lambda w, s, o: w["representation.z"].fill_(float("nan")), r"representation\.z holds NaN"),
        (lambda w, s, o: w.pop("decoder.main.0.bias"), r"decoder\.main\.0\.bias is missing"),
        (lambda w, s, o: s.update(n_units=25), r"main\.0\.weight is \(24, 8\), not \(25, 8\)"),
        (lambda w, s, o: o.pop("train_val_test"), "has no column train_val_test"),
        (other_split, "train_val_test must be of train, validation, test, not held out"),
        (lambda w, s, o: o.rename(index={o.index[1]: o.index[0]}, inplace=True),
         "names cells twice"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(golden: Path, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract.load_model("multidgd", changed(golden, tmp_path, change))


def test_older_hyper_parameters(golden: Path, both: MultiDGD, tmp_path: Path) -> None:
    # Features by the switch between two modalities, or one modality of them all.
    change: Change = lambda w, s, o: s.pop("n_features_per_modality")  # noqa: E731
    model = extract.load_model("multidgd", changed(golden, tmp_path, change))
    assert model.n_features == [60, 60]
    np.testing.assert_array_equal(model.dispersion, both.dispersion)


def test_cells_of_a_split_that_was_not_fitted(golden: Path, tmp_path: Path) -> None:
    def change(weights: dict, _: dict, __: pd.DataFrame) -> None:
        del weights["test_rep.z"], weights["correction_test_rep.z"]

    model = extract.load_model("multidgd", changed(golden, tmp_path, change))
    obs = pd.read_csv(tmp_path / "m_obs.csv", index_col=0)
    fitted = obs["train_val_test"] != "test"
    assert model.cells == obs.index[fitted].tolist()
    with pytest.raises(InputError, match="60 of 600 cells are none of the 540"):
        model.embed(anndata.AnnData(obs=obs))
    official = np.load(golden / COVARIATE / "representation_all.npy")
    found = model.embed(anndata.AnnData(obs=obs[fitted]))["latent"]
    np.testing.assert_array_equal(found, official[fitted])


def test_representations_of_cells_without_names_are_warned_of(golden: Path, tmp_path: Path) -> None:
    def change(_: dict, __: dict, obs: pd.DataFrame) -> None:
        obs.drop(obs.index[obs["train_val_test"] == "test"], inplace=True)

    with pytest.warns(UserWarning, match=r"test_rep\.z is not used: m_obs\.csv names no cell"):
        model = extract.load_model("multidgd", changed(golden, tmp_path, change))
    assert len(model.cells) == 540


def test_files_are_found(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden / COVARIATE / "model", folder)
    with pytest.raises(InputError, match=r"must hold one \*_hyperparameters\.json.*holds model"):
        extract.load_model("multidgd", tmp_path)
    (folder / "second_obs.csv").touch()
    with pytest.raises(InputError, match=r"must hold one \*_obs\.csv.*_obs\.csv, dgd_shared_cov"):
        extract.load_model("multidgd", folder)
    (folder / "_obs.csv").unlink()
    with pytest.raises(InputError, match=r"second_obs\.csv is no table of cells"):
        extract.load_model("multidgd", folder)
    (folder / "dgd_shared_cov_hyperparameters.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        extract.load_model("multidgd", folder)
    (folder / "dgd_shared_cov_hyperparameters.json").rename(folder / "x_hyperparameters.json")
    (folder / "x_hyperparameters.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list, not an object"):
        extract.load_model("multidgd", folder)
    with pytest.raises(InputError, match="float32, not bfloat16"):
        extract.load_model("multidgd", folder, dtype="bfloat16")

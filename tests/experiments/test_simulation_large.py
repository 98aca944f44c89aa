"""The large study, on a few cells: recovery beside scikit-learn's, the program, the search."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.figure import Figure
from sklearn.linear_model import LinearRegression

from analysis import plots
from experiments.simulation import (
    autoencoder,
    fitting,
    large,
    large_autoencoders,
    large_claims,
    large_saes,
    search,
)
from experiments.simulation.data import Large
from sae_jax import InputError, Run
from tests.experiments.damage import check_every_file

CELLS, GENES, HELD_OUT = 1300, 40, 130


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs the program in this process on 1300 cells of 40 genes."""

    def coarse(figure: Figure, folder: Path, name: str) -> None:
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=20)

    monkeypatch.setattr(plots, "save", coarse)
    monkeypatch.setattr(large, "PICTURED", 300)
    given = {
        "workdir": str(tmp_path / "out"), "cells": CELLS, "genes": GENES, "epochs": 3,
        "models": "20-2-narrow", "seeds": "0,42", "scalings": "2,5", "rates": "1e-3",
        "l1_weights": "1e-3", "sae_seeds": "0,1", "sae_epochs": 4,
        "page": str(tmp_path / "page.md"),
    }  # fmt: skip

    def call(**changed: object) -> Path:
        words = [f"--{name}={value}" for name, value in (given | changed).items()]
        with flagsaver.flagsaver():
            large.define_flags()
            flags.FLAGS(["large", *words])
            large.main()
        return tmp_path / "out"

    return call


def test_recovery_is_what_scikit_learn_finds_and_a_second_run_trains_nothing(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = run()
    assert "order of recovery" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(large.FILES)
    check_every_file(out)
    drawn = sorted(path.name for path in (out / "figures").iterdir())
    assert drawn == ["figure_1c.png", "figure_s01.png", "figure_s02.png", "figure_s13.png"]
    table = pd.read_parquet(out / "superposition.parquet")
    assert table["seed"].tolist() == [0, 42]
    assert table["epochs"].tolist() == [3, 3]

    simulation = Large(cells=CELLS, genes=GENES)
    cells = large_autoencoders.hidden(simulation)
    y = simulation.counts(cells.x_active)
    dims = autoencoder.dims(GENES, 20, 2, "narrow")
    assert dims == [40, 150, 20]
    fitted = fitting.load(out / "autoencoders" / "20-2-narrow.npz", dims)
    z = autoencoder.latents(fitted.models[1], y)
    train, rest = slice(0, CELLS - HELD_OUT), slice(CELLS - HELD_OUT, None)
    truth = {"Y": y, "X''": cells.x_active, "X'": cells.x_noisy, "X": cells.x, "B": cells.b,
             "A_index": cells.cell_type[:, None]}  # fmt: skip
    for group, values in truth.items():
        model = LinearRegression().fit(z[train].astype(float), values[train].astype(float))
        error = ((values[rest] - model.predict(z[rest])) ** 2).sum(axis=0)
        total = ((values[rest] - values[rest].mean(axis=0)) ** 2).sum(axis=0)
        wanted = (1 - error[total > 0] / total[total > 0]).mean()
        assert table[group][1] == pytest.approx(wanted, abs=2e-3), group
    loss = np.mean((np.asarray(fitted.models[1](y[rest])) - y[rest]) ** 2)
    assert table["validation_loss"][1] == pytest.approx(loss, rel=1e-3)

    measured = pd.read_parquet(out / "recovery.parquet")
    assert measured["scaling"].tolist() == [2, 2, 5, 5]
    assert measured["seed"].tolist() == [0, 1, 0, 1]
    codes = (
        Run.load(out / "sweep" / "20-2-narrow")
        .dictionaries[3]
        .encode(autoencoder.latents(fitted.models[0], y[rest]))
    )
    codes = codes[:, codes.std(axis=0) > 0].astype(float)
    for group, values in truth.items():
        if group != "A_index":
            values = values[rest][:, values[rest].std(axis=0) > 0]
            r = np.corrcoef(codes, values, rowvar=False)[: codes.shape[1], codes.shape[1] :]
            wanted = r.max(axis=0).mean()
            assert measured[f"highest:{group}"][3] == pytest.approx(wanted, abs=1e-4), group

    shown = pd.read_csv(out / "table_s5.csv").set_index(["method", "rule"])
    assert shown.loc[("SAE", "the paper"), "A"] == -0.54
    by_seed = measured.groupby("seed")["highest:A"].mean()
    assert shown.loc[("SAE", "highest"), "A"] == pytest.approx(by_seed.mean(), abs=1e-4)
    assert shown.loc[("SAE", "highest"), "sem_seeds:A"] == pytest.approx(by_seed.sem(), abs=1e-4)
    first = measured.loc[measured["seed"] == 0, "highest:A"]
    assert shown.loc[("SAE", "highest"), "sem:A"] == pytest.approx(first.sem(), abs=1e-4)

    covered = pd.read_parquet(out / "structure.parquet")
    assert set(covered["latents_of"]) == {"SAE", "permuted M", "other cells", "untrained"}
    assert (covered["scaling"] == 5).all()  # the nearest to 100
    text = out.with_name("page.md").read_text()
    assert text.count("| 20-2-narrow | ") == 1
    for each in large_claims.CLAIMS:
        assert each.__doc__ in text

    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(fitting, "fit", no)
    with monkeypatch.context() as patch:
        for name in ("by_group", "encoded"):
            patch.setattr(large_saes.recovery, name, no)
        patch.setattr(large_saes.baselines, "fit", no)
        patch.setattr(large, "draw", lambda *_: None)
        (out / "measured" / "20-2-narrow.parquet").unlink()  # measured again from the weights
        run()
    assert out.with_name("page.md").read_text() == text
    pd.testing.assert_frame_equal(pd.read_parquet(out / "superposition.parquet"), table)
    with pytest.raises(InputError, match="genes: 40 there, 41 asked for"):
        run(genes=41)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"models": "30-2-narrow"}, "30-2-narrow is not in Table S2"),
        ({"seeds": "0,one"}, "--seeds=0,one must be integers"),
        ({"workdir": ""}, "--workdir is needed"),
        ({"sae_models": "20-2-wide"}, "--sae_models=20-2-wide must be some of --models"),
        ({"sae_models": ""}, "--sae_models= must be some of"),
        ({"scalings": "2,0"}, "--scalings=2,0 must be integers, at least 1"),
        ({"rates": "0"}, "--rates=0 must be numbers above 0"),
        ({"l1_weights": "nan"}, "--l1_weights=nan must be numbers above 0"),
    ],
)
def test_what_is_refused_before_the_folder_is_made(
    run: Callable[..., Path], tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(**changed)
    assert not (tmp_path / "out").exists()


def test_the_order_of_recovery() -> None:
    table = pd.DataFrame({"X''": [1, 0.8], "X'": [0.2, 0.2], "X": 0.1, "A": 0.7, "B": 0.5})
    assert large.order(table) == "X'' (0.90) > A (0.70) > B (0.50) > X' (0.20) > X (0.10)"


def test_what_the_dictionaries_of_the_paper_are() -> None:
    configs = large_saes.Grid().configs(150, 90_000)
    assert len(configs) == 48  # Table S4
    assert {config.n_latents for config in configs} == {3000, 15_000, 30_000, 75_000}
    assert {(config.batch_size, config.reduction) for config in configs} == {(128, "mean")}


def tables(**changed: Any) -> list[pd.DataFrame]:
    """All that the claims are computed from, as the paper has it."""
    superposition = pd.DataFrame(
        [
            {
                "name": f"{latents}-{depth}-{width}", "latents": latents, "depth": depth,
                "width": width, "validation_loss": loss, "Y": 1 - loss / 10,
                "X''": 0.95 - loss / 20 + (width == "wide") / 100, "A": 0.8 + loss / 20,
                "B": 0.7 + loss / 20, "X'": 0.4 + loss / 20, "X": 0.2 + loss / 20,
            }
            for latents in (20, 100) for depth in (2, 4) for width in ("narrow", "wide")
            for loss in [1 - depth / 10 - (width == "wide") * 0.1 - latents / 1e3]
        ]
    )  # fmt: skip
    superposition.loc[superposition["validation_loss"].idxmin(), "Y"] = 0.999
    recovered = pd.DataFrame(
        {
            "autoencoder": "150-2-wide", "d_in": 150, "status": "trained", "learning_rate": 1e-5,
            "l1_weight": 1e-3, "scaling": [20, 100, 200], "highest:Y": [0.9, 0.92, 0.95],
            "highest:X''": [0.85, 0.9, 0.91],
        }
    )  # fmt: skip
    rows = [
        {"method": method, "rule": "highest_absolute", **{
            group: abs(r) for group, r in zip(large_saes.S5_GROUPS, values, strict=True)
        }, **{f"sem:{group}": 0.4 for group in large_saes.S5_GROUPS}}
        for method, values in large_saes.TABLE_S5.items()
    ]  # fmt: skip
    covered = pd.DataFrame(
        [("SAE", 20, 0.95), ("SAE", 70, 0.75), ("permuted M", 20, 0.8), ("permuted M", 70, 0.3)],
        columns=["latents_of", "percentile", "coverage"],
    )
    given = {"superposition": superposition, "recovered": recovered, "s5": pd.DataFrame(rows),
             "covered": covered}  # fmt: skip
    return list((given | changed).values())


def test_every_claim_holds_of_what_the_paper_reports_but_for_the_two_that_contradict() -> None:
    """Distant variables cannot both fall in wide models and improve with width."""
    verdicts = {each.paper: each.holds for each in large_claims.check(*tables())}
    assert [paper for paper, holds in verdicts.items() if not holds] == [
        "Recovery improves with model width (6)."
    ]


def test_claims_fail_where_they_should_and_are_not_tested_where_they_cannot_be() -> None:
    superposition, recovered, _, covered = tables()
    chance = covered.assign(latents_of=["SAE", "SAE", "other cells", "other cells"])
    chance["coverage"] = [0.95, 0.75, 0.93, 0.7]
    found = large_claims.check(*tables(
        superposition=superposition[superposition["width"] == "wide"],
        recovered=recovered.assign(**{"highest:X''": [0.6, 0.5, 0.4]}), covered=chance,
    ))  # fmt: skip
    verdicts = {each.paper.split(" (")[0]: each.holds for each in found}
    assert verdicts["Recovery improves with model width"] is None
    assert verdicts["Y and X'' are recovered nearly perfectly by single SAE features"] is False
    assert verdicts["The larger the hidden dimensionality of the SAE, the better"] is False
    structure = "The connectivity of features and observables tells of the generating structure"
    assert verdicts[structure] is False


def test_the_search_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Optuna, which tries what it is told to."""
    rates = [1e-6, 1e-3, 1e-5]

    class Study:
        def optimize(self, objective: Callable, n_trials: int, show_progress_bar: bool) -> None:
            tried = []
            for rate in rates[:n_trials]:
                chosen = {"learning_rate": rate, "weight_decay": 0.0, "dropout": 0.0,
                          "batch_size": 32}  # fmt: skip
                trial = types.SimpleNamespace(
                    suggest_float=lambda name, *_, chosen=chosen, **__: chosen[name],
                    suggest_categorical=lambda name, _, chosen=chosen: chosen[name],
                )
                tried.append((objective(trial), chosen))
            self.best_params = min(tried, key=lambda pair: pair[0])[1]

    stand_in = types.SimpleNamespace(
        logging=types.SimpleNamespace(set_verbosity=lambda _: None, WARNING=30),
        samplers=types.SimpleNamespace(TPESampler=lambda seed: seed),
        create_study=lambda sampler: Study(),
    )
    monkeypatch.setitem(sys.modules, "optuna", stand_in)
    rows = np.random.default_rng(0).poisson(3, (100, 5)).astype(np.float32)
    found = search.search([5, 4, 2], rows[:80], rows[80:], trials=3, epochs=20)
    assert found == autoencoder.Recipe(learning_rate=1e-3, batch_size=32)
    with pytest.raises(InputError, match="fewer than the smallest batch"):
        search.search([5, 4, 2], rows[:9], rows[80:])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"sae-jax\[search\]"):
        search.search([5, 4, 2], rows[:80], rows[80:])

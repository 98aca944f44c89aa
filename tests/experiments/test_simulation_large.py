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
from experiments.simulation import autoencoder, fitting, large, search
from experiments.simulation.data import Large
from sae_jax import InputError

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
        "models": "20-2-narrow", "seeds": "0,42",
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
    drawn = sorted(path.name for path in (out / "figures").iterdir())
    assert drawn == ["figure_1c.png", "figure_s01.png", "figure_s02.png"]
    table = pd.read_parquet(out / "superposition.parquet")
    assert table["seed"].tolist() == [0, 42]
    assert table["epochs"].tolist() == [3, 3]

    simulation = Large(cells=CELLS, genes=GENES)
    cells = large.hidden(simulation)
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

    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(fitting, "fit", no)
    run()
    (out / "measured" / "20-2-narrow.parquet").unlink()
    run()  # measured again from the weights
    pd.testing.assert_frame_equal(pd.read_parquet(out / "superposition.parquet"), table)
    with pytest.raises(InputError, match="genes: 40 there, 41 asked for"):
        run(genes=41)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"models": "30-2-narrow"}, "30-2-narrow is not in Table S2"),
        ({"seeds": "0,one"}, "--seeds=0,one must be integers"),
        ({"workdir": ""}, "--workdir is needed"),
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

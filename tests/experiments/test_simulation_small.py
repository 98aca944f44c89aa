"""The small study: Table S4, metrics of dictionaries made by hand, claims, the program."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.figure import Figure

from analysis import plots
from experiments.simulation import autoencoder, claims, figures, fitting, page, small, sweep
from sae_jax import Dictionary, InputError, SAEConfig, redundancy, trainer
from sae_jax.state import Params
from tests.experiments.damage import check_every_file

ROOT = Path(__file__).parents[2]
TINY = sweep.Grid(
    scalings=(2,), rates=(1e-3, 1e-4), l1_weights=(1e-1, 1e-3), percents=(5, 20, 50), epochs=(2, 2)
)


def test_table_s4() -> None:
    text, code = (sweep.Grid.of(variant).rows(4) for variant in ("text", "code"))
    assert len(text) == 512
    assert len(code) == 544
    by_type = pd.DataFrame(text).groupby("type").size()
    assert by_type.to_dict() == {"Vanilla": 160, "ReLU": 160, "TopK": 192}
    assert len(sweep.programs(text)) == 24
    assert {row["asked_epochs"] for row in text} == {500}
    assert {row["config"].n_latents for row in text} == {8, 20, 40, 80, 200, 400, 800, 4000}
    assert {(row["config"].learning_rate, row["asked_epochs"]) for row in code} == {
        (1e-2, 100), (1e-3, 500), (1e-4, 750), (1e-5, 1000),
    }  # fmt: skip
    assert all(row["config"].batch_size == 128 for row in text + code)
    # k of 5, 10 and 20 % of 8 latents is 1: they share a dictionary, not a row.
    shared = [row["config"] for row in text if row["scaling"] == 2 and row["k_percent"] < 25]
    assert len(shared) == 12
    assert len(set(shared)) == 4
    assert sum(map(len, sweep.by_epochs(text).values())) == 504
    summed = sweep.Grid.of("text", "sum").rows(4)
    assert {row["config"].reduction for row in summed} == {"sum"}


def by_hand() -> tuple[Dictionary, np.ndarray, np.ndarray]:
    """Latents x0, 2 x0, one that is dead, x1, and a constant; variables x0, -x1, a constant."""
    config = SAEConfig.preset("vanilla", d_in=2, n_latents=5, l1_weight=0.1)
    encoder = np.array([[1, 2, 0, 0, 0], [0, 0, 0, 1, 0]], np.float32)
    bias = np.array([0, 0, -5, 0, 3], np.float32)
    decoder = np.zeros((5, 2), np.float32)
    params = Params(encoder, bias, decoder, np.zeros(2, np.float32), None)
    x = np.random.default_rng(0).random((3000, 2), np.float32)
    return Dictionary(config, params), x, np.column_stack([x[:, 0], -x[:, 1], np.ones(3000)])


def test_recovery_of_latents_made_by_hand() -> None:
    dictionary, x, variables = by_hand()
    z = dictionary.encode(x)
    np.testing.assert_array_equal(z[:, 2], 0)
    found = sweep.correlated(z, variables)
    between = np.corrcoef(x.T)[0, 1]  # of x0 and x1: near 0
    np.testing.assert_allclose(found["highest"], [1, max(-between, 0), 0], atol=1e-6)
    np.testing.assert_allclose(found["highest_absolute"], [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(found["highest_signed"], [1, -1, 0], atol=1e-6)
    np.testing.assert_array_equal(found["latents"], [2, 0, 0])
    np.testing.assert_array_equal(found["latents_absolute"], [2, 1, 0])


def test_correlations_are_numpys() -> None:
    random = np.random.default_rng(1)
    z, variables = random.random((5000, 7)).astype(np.float32) + 20, random.random((5000, 3))
    z[:, 0] += variables[:, 1]
    found = sweep.correlated(z, variables)
    r = np.corrcoef(z.T.astype(float), variables.T)[:7, 7:]
    np.testing.assert_allclose(found["highest"], r.max(axis=0), atol=1e-6)
    np.testing.assert_allclose(found["highest_absolute"], np.abs(r).max(axis=0), atol=1e-6)


def test_metrics_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, x, variables = by_hand()
    monkeypatch.setattr(sweep, "VARIABLES", ["a", "b", "c"])
    monkeypatch.setattr(sweep, "GROUP_OF", ["A", "B", "C"])
    found = sweep._metrics_of([None, dictionary, dictionary, dictionary], x, variables)
    assert found["place"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert set(found["redundant"]) == {1}  # 2 x0 repeats x0; the constant and the dead repeat none
    assert len(sweep._metrics_of([None], x, variables)) == 0


def results(table: Callable[..., dict[str, float]]) -> pd.DataFrame:
    """Rows of the whole grid, with the metrics that `table(type, scaling, rate, penalty)` gives."""
    lines = []
    for row in sweep.Grid().rows(4):
        config = row["config"]
        penalty = row["k_percent"] if row["type"] == "TopK" else config.l1_weight
        given = table(row["type"], row["scaling"], config.learning_rate, penalty)
        lines.append(
            {"status": "trained", **row, **config.to_dict(), "k_percent": row["k_percent"]} | given
        )
    return pd.DataFrame(lines)


def as_the_paper_says(kind: str, scaling: int, rate: float, penalty: float) -> dict[str, float]:
    best = {"Vanilla": 1e-3, "ReLU": 1e-4, "TopK": None}[kind]
    topk = kind == "TopK"
    share = min(1, penalty / 50) if topk else (1.0 if penalty < 5e-3 else 0.2)
    right_rate = np.isclose(rate, 1e-4)
    in_box = right_rate and best is not None and np.isclose(penalty, best) and scaling <= 50
    in_box |= right_rate and kind == "Vanilla" and scaling <= 10
    slope = 1 if topk else {1e-1: 0.1, 1e-2: 0.3, 1e-3: 0.5, 1e-4: 1, 1e-5: 1.5}[penalty]
    count = 3 if in_box else 6 * scaling**slope
    lost = 0.4 if topk and scaling == 2 else 0.0
    return {
        "train_mse": (1e-3 if right_rate else 1e-2) * (10 ** (penalty / 25) if topk else 1),
        "fraction_active": share * (0.4 if rate == 1e-2 else 1.0),
        **{f"highest:{g}": 0.97 - lost for g in ("X'", "Y", "A", "X")},
        **{f"latents:{g}": float(count) for g in ("X'", "Y", "A", "X")},
    }


def test_claims_hold_where_the_paper_is_right() -> None:
    found = claims.check(results(as_the_paper_says), figures.Rule())
    assert len(found) == len(claims.CLAIMS) == 12
    assert [each.paper for each in found if not each.holds] == []
    assert all(each.ours and each.rule for each in found)


def test_no_claim_holds_of_configurations_that_are_all_alike() -> None:
    def alike(*_: Any) -> dict[str, float]:
        groups = ("X'", "Y", "A", "X")
        return {
            "train_mse": 1e-3, "fraction_active": 0.5,
            **{f"highest:{g}": 0.5 for g in groups}, **{f"latents:{g}": 9.0 for g in groups},
        }  # fmt: skip

    found = claims.check(results(alike), figures.Rule())
    assert [each.paper for each in found if each.holds is not False] == []


def test_claims_of_a_subset_are_not_tested() -> None:
    table = results(as_the_paper_says)
    found = claims.check(table[table["learning_rate"] > 5e-3], figures.Rule())
    untested = [each for each in found if each.holds is None]
    assert len(untested) >= 8
    assert all("not in these results" in each.ours for each in untested)


def test_sections_of_the_page_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    page.replace_section(path, "one", r"first \1")
    page.replace_section(path, "two", "second")
    page.replace_section(path, "one", "third")
    text = path.read_text()
    assert text.startswith("# The simulation study")
    assert "first" not in text
    assert text.index("third") < text.index("second")
    table = pd.DataFrame({"of |r|": [0.12345, np.nan], "n": [3, 4]})
    assert page.markdown(table).splitlines() == [
        r"| of \|r\| | n |", "| --- | --- |", "| 0.123 | 3 |", "|  | 4 |",
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs the program in this process on a subset of the subset."""
    recipe = autoencoder.Recipe(learning_rate=1e-2, batch_size=None, epochs=60, patience=None)
    monkeypatch.setattr(small, "asked_grid", lambda: TINY)
    monkeypatch.setattr(small, "autoencoder_recipe", lambda: recipe)
    monkeypatch.setattr(small, "LATENTS", {"compressed": 2, "ideal": 4})
    monkeypatch.setattr(small, "DESCENTS", {"gradient descent": "sgd"})

    def coarse(figure: Figure, folder: Path, name: str) -> None:
        """Drawn, but in a tenth of the time."""
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=20)

    monkeypatch.setattr(plots, "save", coarse)

    def call(**given: str) -> Path:
        words = [f"--{name}={value}" for name, value in given.items()]
        with flagsaver.flagsaver():
            small.define_flags()
            flags.FLAGS(["small", "--quick", f"--workdir={tmp_path / 'out'}", *words])
            small.main()
        return tmp_path / "out"

    return call


def test_the_program_goes_on_where_it_was_killed(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 1. Killed in the metrics of the second program.
    calls, redundant = itertools.count(), redundancy.redundant

    def killed(*args: Any, **named: Any) -> np.ndarray:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return redundant(*args, **named)

    monkeypatch.setattr(redundancy, "redundant", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    out = tmp_path / "out"
    assert len(list((out / "metrics").iterdir())) == 1
    assert not (out / "results.parquet").exists()

    # 2. Other settings are refused, and nothing is touched by that.
    with pytest.raises(InputError, match="variant: 'text' there, 'code' asked for"):
        run(variant="code")

    # 3. The same again trains nothing, measures what is left, and writes everything.
    def no(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(fitting, "fit", no)
    monkeypatch.setattr(trainer, "train_bucket", no)
    counted: list[int] = []
    monkeypatch.setattr(
        redundancy, "redundant", lambda *a, **n: (counted.append(1), redundant(*a, **n))[1]
    )
    path = tmp_path / "docs" / "simulation.md"
    run(page=str(path))
    assert len(counted) == 2
    assert sorted(p.name for p in out.iterdir()) == sorted(small.FILES)
    check_every_file(out)
    drawn = {p.name for p in (out / "figures").iterdir()}
    assert drawn == {f"{name}.png" for name in small.FIGURES}
    table = pd.read_parquet(out / "results.parquet")
    assert len(table) == len(TINY.rows(4)) == 14
    assert (table["status"] == "trained").all()
    assert table["highest:X'"].between(-1, 1).all()
    assert (table["active"] <= table["n_latents"]).all()
    # 5 and 20 % of 8 latents are one dictionary and two rows.
    twins = table[table["k_percent"].isin([5, 20])].groupby("learning_rate")["train_mse"]
    assert (twins.nunique() == 1).all()
    assert (twins.size() == 2).all()
    each = pd.read_parquet(out / "correlations.parquet")
    assert len(each) == 14 * 12
    mean = each[each["group"] == "Y"].groupby("configuration")["highest"].mean()
    np.testing.assert_allclose(table["highest:Y"], mean)
    with np.load(out / "autoencoders" / "ideal.npz") as stored:
        assert stored["latents"].shape == (12_000, 4)
        assert stored["last_losses"].shape == (small.AE_SEEDS,)
    exact = pd.read_parquet(out / "superposition.parquet")
    assert exact.loc[exact["method"] == "least squares", "Y"].between(0, 1).all()
    text = path.read_text()
    assert "14 configurations (0 diverged), 2 epochs" in " ".join(text.split())
    assert len(list(path.parent.iterdir())) == 4  # the page, its table, two figures
    assert "section 4.2, of 14 configurations" in capsys.readouterr().out
    assert json.loads((out / small.SETTINGS).read_text())["variant"] == "text"


def test_what_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        run(overwrite="true")
    with pytest.raises(InputError, match="--workdir is needed"):
        run(workdir="")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_importing_the_program_is_light() -> None:
    script = (
        "import sys; import experiments.simulation.small; heavy = {'matplotlib', 'pandas', 'torch',"
        " 'sklearn', 'optuna', 'anndata'}; print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"

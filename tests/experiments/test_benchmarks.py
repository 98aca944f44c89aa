"""The benchmark of training: it runs, its JSON is whole, and the peers compute what ours computes.

Nothing here looks at how fast anything is.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import training

ROOT = Path(__file__).parents[2]
TORCH = importlib.util.find_spec("torch") is not None


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.benchmarks.training", "--quick", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("benchmark") / "training.json"
    process = run("--rows=vanilla_1,topk_16", f"--out={out}")
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(out.read_text())


def test_ours_is_measured(finished: tuple[str, dict[str, Any]]) -> None:
    _, report = finished
    assert [found["row"] for found in report["rows"]] == ["vanilla_1", "topk_16"]
    for found in report["rows"]:
        row = training.ROWS[found["row"]]
        steps = row.members * training.QUICK_EPOCHS * (row.rows // row.batch_size)
        assert found["ours"]["config_steps"] == steps
        assert found["ours"]["config_steps_per_second"] > 0
        assert found["ours"]["cpu_seconds_per_config_step"] > 0
        assert found["ours"]["compile_seconds"] >= 0


def test_the_table_shows_every_row(finished: tuple[str, dict[str, Any]]) -> None:
    table, report = finished
    head, *lines = table.strip().splitlines()
    assert "ratio" in head
    assert [line.split()[0] for line in lines] == [found["row"] for found in report["rows"]]


@pytest.mark.skipif(not TORCH, reason="needs torch")
def test_torch_has_a_ratio_and_the_loss_of_ours(finished: tuple[str, dict[str, Any]]) -> None:
    table, report = finished
    for found in report["rows"]:
        torch = found["peers"]["torch"]
        assert torch["status"] == "measured"
        assert torch["loss_difference"] <= training.TOLERANCE
        assert all(math.isfinite(torch[name]) for name in ("ratio", "cpu_ratio"))
        assert f"{torch['ratio']:.2f}" in table
        assert len(torch["losses"]) == 2
        assert len(torch["losses"][0]) == training.CHECKED_EPOCHS


@pytest.mark.skipif(TORCH, reason="torch is installed")
def test_without_torch_it_is_absent(finished: tuple[str, dict[str, Any]]) -> None:
    table, report = finished
    assert all(found["peers"]["torch"]["status"] == "absent" for found in report["rows"])
    assert "absent" in table


def test_the_process_that_compares_loads_no_torch() -> None:
    code = (
        "import sys, experiments.benchmarks.training; "
        "sys.exit('torch' in sys.modules or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_absent_peer_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = run("--rows=vanilla_1")
    assert process.returncode == 0, process.stderr
    assert "absent" in process.stdout


def test_a_row_that_does_not_exist_is_refused() -> None:
    process = run("--rows=vanilla_1,vanilla_2")
    assert process.returncode == 2
    assert "vanilla_2" in process.stderr
    assert "vanilla_64" in process.stderr


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    ours = [{"config_steps": 100, "wall": wall, "cpu": 1.0} for wall in (1.0, 2.0, 4.0)]
    peer = [{"config_steps": 10, "wall": wall, "cpu": 2.0} for wall in (1.0, 2.0, 1.0)]
    assert training.ratio(ours, peer, "wall") == 10.0
    assert training.ratio(ours, peer, "cpu") == 20.0

"""The benchmarks: they run, their JSON is whole, and `torch` computes what ours computes.

Nothing here looks at how fast anything is.
"""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.benchmarks import accelerator, growth, peers, rows, small_sweep, table, training
from experiments.benchmarks.jobs import CHECKED_EPOCHS, Job
from sae_jax import SAEConfig

ROOT = Path(__file__).parents[2]
TORCH = importlib.util.find_spec("torch") is not None
HERE = f"torch={sys.executable}"  # whatever .bench-venv there is
LIBRARIES = [peer for peer in peers.PEERS if peer != "torch"]


def run(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"experiments.benchmarks.{program}", "--quick", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("benchmark") / "training.json"
    process = run(
        "training", "--rows=vanilla_1", "--peers=torch", f"--peer_python={HERE}",
        f"--out={out}",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(out.read_text())


def test_ours_is_measured(finished: tuple[str, dict[str, Any]]) -> None:
    _, report = finished
    assert [found["row"] for found in report["rows"]] == ["vanilla_1"]
    for found in report["rows"]:
        row = rows.ROWS[found["row"]].quick()
        assert found["ours"]["config_steps"] == row.members * row.epochs * row.steps
        assert found["ours"]["config_steps_per_second"] > 0
        assert found["ours"]["cpu_seconds_per_config_step"] > 0
        assert found["ours"]["compile_seconds"] >= 0


def test_the_table_shows_every_row(finished: tuple[str, dict[str, Any]]) -> None:
    shown, report = finished
    head, *lines = shown.strip().splitlines()
    assert "ratio" in head
    named = [line.split()[0] for line in lines if "sae_jax" in line]
    assert named == [found["row"] for found in report["rows"]]
    alone = [line.split()[4] for line in lines if line.startswith("vanilla_1 ")]
    assert float(alone[0]) > 0  # ms a step


@pytest.mark.skipif(not TORCH, reason="needs torch")
def test_torch_has_a_ratio_and_the_loss_of_ours(finished: tuple[str, dict[str, Any]]) -> None:
    shown, report = finished
    for found in report["rows"]:
        torch = found["peers"]["torch"]
        assert torch["status"] == "same loss"
        assert torch["loss_difference"] <= training.TOLERANCE
        assert all(math.isfinite(torch[name]) for name in ("ratio", "cpu_ratio"))
        assert f"{found['row']}: {torch['ratio']:.2f} times the best peer (torch)" in shown
        assert len(torch["losses"]) == 2
        assert len(torch["losses"][0]) == CHECKED_EPOCHS


@pytest.mark.skipif(TORCH, reason="torch is installed")
def test_without_torch_it_is_absent(finished: tuple[str, dict[str, Any]]) -> None:
    shown, report = finished
    assert all(found["peers"]["torch"]["status"] == "absent" for found in report["rows"])
    assert "absent" in shown


def test_the_processes_load_only_what_they_measure() -> None:
    code = (
        "import sys, experiments.benchmarks.training, experiments.benchmarks.worker; "
        "sys.exit(bool({'torch', 'jax', 'sae_jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def worker(peer: str, python: str = sys.executable, **environment: str) -> dict[str, Any]:
    """What the process of a peer says of a problem that is not there."""
    job = Job(peer, rows.ROWS["vanilla_1"].quick(), "no problem", 0.0)
    command = [python, "-m", "experiments.benchmarks.worker", job.to_json()]
    process = subprocess.run(
        command, cwd=ROOT, input="", capture_output=True, text=True, check=False,
        env={"PATH": "", **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_an_absent_peer_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    found = worker("torch", PYTHONPATH=str(tmp_path))
    assert found == {"status": "absent", "reason": "no torch"}


def test_a_peer_that_breaks_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('no such operator')\n")
    found = worker("torch", PYTHONPATH=str(tmp_path))
    assert found == {"status": "failed", "reason": "RuntimeError: no such operator"}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--rows=vanilla_1,vanilla_2", "vanilla_64"),
        ("--peer_python=torch=/no/such/python", "/no/such/python"),
    ],
)
def test_bad_flags_of_training_are_refused(flag: str, said: str) -> None:
    process = run("training", flag)
    assert process.returncode == 2
    assert flag in process.stderr
    assert said in process.stderr


def test_the_interpreter_is_found_by_convention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "BENCH_VENV", tmp_path)
    assert peers.interpreter("torch", {}) == sys.executable
    for folder in (tmp_path, tmp_path / "sae_lens"):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()
    assert peers.interpreter("torch", {}) == str(tmp_path / "bin" / "python")
    assert peers.interpreter("sae_lens", {}) == str(tmp_path / "sae_lens" / "bin" / "python")
    assert peers.interpreter("torch", {"": "a", "sae_lens": "b"}) == "a"
    assert peers.interpreter("sae_lens", {"": "a", "sae_lens": "b"}) == "b"


@pytest.mark.skipif(not (peers.BENCH_VENV / "installed").exists(), reason="needs `make bench`")
def test_every_library_trains_and_its_loss_falls(tmp_path: Path) -> None:
    """In one process, as importing them takes most of the time."""
    random = np.random.default_rng(0)
    problem = tmp_path / "problem.npz"
    shapes = {"encoder": (4, 24), "encoder_bias": (24,), "decoder": (24, 4), "decoder_bias": (4,)}
    np.savez(
        problem,
        rows=random.standard_normal((1024, 4), np.float32),
        orders=np.stack([random.permutation(1024).reshape(32, 32) for _ in range(2)]),
        **{name: random.standard_normal((2, *shape), np.float32) for name, shape in shapes.items()},
    )
    code = f"""
import json, sys
from experiments.benchmarks import rows, worker
from experiments.benchmarks.jobs import Job
row = dict(title="", d_in=4, n_latents=24, members=2, epochs=2, batch_size=32, rows=1024)
found = []
for peer in {LIBRARIES}:
    for kind in (dict(activation="relu"), dict(activation="topk", k=8)):
        job = Job(peer, rows.Row(**row, **kind), {str(problem)!r}, 0.0)
        prepared = worker.prepare(job)
        if isinstance(prepared, dict):
            found.append([peer, prepared])
        else:
            found.append([peer, prepared.about, prepared.measure()])
assert not {{"jax", "sae_jax"}} & set(sys.modules)
print(json.dumps(found))
"""
    command = [str(peers.BENCH_VENV / "bin" / "python"), "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.strip().splitlines()[-1])
    assert len(found) == 2 * len(LIBRARIES)
    for peer, about, *steps in found:
        if about.get("status"):
            assert (peer, about["status"]) == ("sparsify", "not offered"), about
            continue
        assert training.check(peer, about["losses"], [[1, 1], [1, 1]])["status"] == "own recipe"
        assert steps == [8]


def test_losses_decide_the_status() -> None:
    ours = [[2.0, 1.0], [3.0, 2.0]]
    assert training.check("torch", ours, ours)["status"] == "same loss"
    assert training.check("torch", [[2.0, 1.0], [3.0, 2.1]], ours)["status"] == "other loss"
    assert training.check("sae_lens", [[5.0, 4.0], [3.0, 2.9]], ours)["status"] == "own recipe"
    assert training.check("sae_lens", [[5.0, 4.0], [3.0, 3.0]], ours)["status"] == (
        "loss does not fall"
    )
    assert training.check("sae_lens", [[5.0, math.nan], [3.0, 2.0]], ours) == {
        "status": "loss does not fall"
    }


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    ours = [{"config_steps": 100, "wall": wall, "cpu": 1.0} for wall in (1.0, 2.0, 4.0)]
    peer = [{"config_steps": 10, "wall": wall, "cpu": 2.0} for wall in (1.0, 2.0, 1.0)]
    assert table.ratio(ours, peer, "wall") == 10.0
    assert table.ratio(ours, peer, "cpu") == 20.0


def test_the_best_peer_is_the_one_with_the_lowest_ratio() -> None:
    measured = {
        name: {"ratio": value, "cpu_ratio": 2 * value} for name, value in (("a", 3.0), ("b", 2.0))
    }
    assert table.best({**measured, "c": {"status": "absent"}}) == {
        "peer": "b", "ratio": 2.0, "cpu_ratio": 4.0,
    }  # fmt: skip
    assert table.best({"c": {"status": "absent"}}) is None


def test_every_row_is_a_bucket_of_distinct_configurations() -> None:
    for row in rows.ROWS.values():
        configs = [SAEConfig(**fields) for fields in row.configs()]
        assert len(set(configs)) == row.members
        assert len({config.architecture for config in configs}) == 1
        assert row.rows % row.batch_size == 0
        assert row.quick().epochs >= CHECKED_EPOCHS


def test_a_job_survives_json() -> None:
    job = Job("torch", rows.ROWS["topk_5000"], "problem.npz", 0.5)
    assert Job.from_json(job.to_json()) == job


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick points of one curve."""
    monkeypatch.setattr(growth, "ACTIVATIONS", {"relu": "L1"})
    monkeypatch.setattr(growth, "WORK", 1e6)
    monkeypatch.setattr(growth, "REPEATS", 1)


@pytest.mark.usefixtures("small")
def test_growth_measures_each_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growth, "FLAGS", dataclasses.make_dataclass("F", ["quick"])(quick=False))
    point = growth.measure("members", "relu", 2)
    assert point["config_steps"] % (2 * growth.STEPS) == 0
    points = [point, {**point, "value": 4}]
    shown = growth.text(points).splitlines()
    assert [line.split()[:2] for line in shown[1:]] == [["members", "2"], ["members", "4"]]
    if importlib.util.find_spec("matplotlib"):
        from analysis import plots

        plots.save(growth.figure(points), tmp_path, "growth")
        assert {path.name for path in tmp_path.iterdir()} == {"growth.png", "growth.pdf"}


def test_the_small_sweep_is_the_one_of_the_paper() -> None:
    programs = small_sweep.programs()
    configs = [config for program in programs for config in program]
    assert len(programs) == 24
    assert len(configs) == 512
    assert {config.n_latents for config in configs} == {4 * s for s in small_sweep.SCALINGS}
    assert all(len({config.architecture for config in program}) == 1 for program in programs)
    rows, variables = small_sweep.simulation()
    assert rows.shape == (12000, 4)
    assert rows.dtype == np.float32
    assert variables.shape == (12000, 12)


def test_a_program_of_the_small_sweep_adds_up() -> None:
    bucket = small_sweep.programs([2])[0]
    data, variables = small_sweep.simulation()
    found = small_sweep.measure(bucket, data, variables, epochs=3, members=2)
    assert found["members"] == len(bucket) == 20
    assert found["epochs"] == 3
    assert len(found["active"]) == len(found["redundant"]) == 2
    assert found["cpu_training"] == pytest.approx(500 * found["cpu_per_epoch"])
    total = found["cpu_first"] + found["cpu_training"] + found["cpu_metrics"]
    shown = small_sweep.text([found])
    assert f"20 configurations: {total / 3600:.2f} CPU hours" in shown


def test_a_timed_training_stops_at_its_deadline() -> None:
    from experiments.benchmarks import ours

    config = SAEConfig(d_in=4, n_latents=8, l1_weight=0.1, batch_size=32)
    x = ours.normal_rows(64, 4)
    found, trained = ours.timed([config], x, 5)
    assert found["epochs"] == 5
    assert trained is not None
    assert all(found[f"{clock}_{part}"] >= 0 for clock in ("wall", "cpu")
               for part in ("first", "per_epoch"))  # fmt: skip
    found, trained = ours.timed([config], x, 100_000, deadline=time.perf_counter())
    assert 2 <= found["epochs"] < 100_000
    assert trained is None


def test_the_accelerator_program_runs_whole(tmp_path: Path) -> None:
    out = tmp_path / "accelerator.json"
    process = run("accelerator", f"--out={out}")
    assert process.returncode == 0, process.stderr
    report = json.loads(out.read_text())
    assert report["device"]["devices"] >= 1
    assert list(report["sections"]) == list(accelerator.SHARES)
    for line in report["sections"]["roofline"]:
        assert line["share"] == pytest.approx(line["gflops"] / line["peak_gflops"])
    assert sum(line["members"] for line in report["sections"]["sweep"]) == 20
    assert all(name in process.stdout for name in accelerator.SHARES)


def test_without_time_each_section_measures_one_line() -> None:
    lines: list[dict[str, Any]] = []
    accelerator.maps((1, 2), time.perf_counter(), lines.append)
    assert [line["members"] for line in lines] == [1]


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        ("growth", "--axes=time"),
        ("small_sweep", "--scalings=3"),
        ("accelerator", "--sections=all"),
    ],
)
def test_bad_flags_are_refused(program: str, flag: str) -> None:
    process = run(program, flag)
    assert process.returncode == 2
    assert f"error: {flag}: there are" in process.stderr

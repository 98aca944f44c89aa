"""`train` and what it shares with `sweep`: rows, splits, files of configurations, processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags, logging
from absl.testing import flagsaver

import sae_jax
from experiments import configurations, jobs, sweep, train
from sae_jax import InputError, SAEConfig, distributed, files, lock, workdir
from tests.experiments.damage import check_every_file

ROWS = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
FLAGS = {"preset": "vanilla", "n_latents": "8", "l1_weight": "0.1", "batch_size": "32"}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Runs a program in this process; None takes a flag away."""
    np.save(tmp_path / "rows.npy", ROWS)

    def call(program: Any = train, **given: str | None) -> Path:
        settings = {
            "data": str(tmp_path / "rows.npy"), "workdir": str(tmp_path / "out"), "epochs": "3",
            **FLAGS, **given,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        with flagsaver.flagsaver():
            program.define_flags()
            flags.FLAGS(["program", *words])
            program.main()
        return Path(settings["workdir"])

    return call


def test_one_configuration_and_its_files(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run()
    assert sorted(path.name for path in out.iterdir()) == sorted(train.FILES)
    check_every_file(out)
    assert {path.name for path in (out / "figures").iterdir()} == {"training.png", "training.pdf"}
    printed = capsys.readouterr().out
    row = pd.read_parquet(out / "results.parquet").iloc[0]
    assert f"{row['validation_r2']:.4g}" in printed
    dictionary = sae_jax.Dictionary.load(out / "dictionaries/0000")
    assert dictionary.provenance["validation_share"] == 0.1
    assert dictionary.provenance["data"].endswith("rows.npy")


def test_several_are_for_a_sweep(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 configurations; `sae-jax sweep`"):
        run(n_latents="8,16")
    assert not (tmp_path / "out").exists()


def test_one_that_diverges_ends_with_an_error(run: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="diverged after 1 epochs"):
        run(learning_rate="1e30")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_column_of_obs_splits_the_rows(
    run: Callable[..., Path], tmp_path: Path, suffix: str
) -> None:
    part = np.repeat(["train", "val", "test"], [300, 60, 40])
    order = np.random.default_rng(1).permutation(400)
    obs = pd.DataFrame({"part": part[order]}, index=[f"c{i}" for i in range(400)])
    cells = anndata.AnnData(ROWS, obs=obs)
    getattr(cells, "write_h5ad" if suffix == ".h5ad" else "write_zarr")(tmp_path / f"cells{suffix}")
    out = run(data=str(tmp_path / f"cells{suffix}"), split="part")
    dictionary = sae_jax.Dictionary.load(out / "dictionaries/0000")
    row = pd.read_parquet(out / "results.parquet").iloc[0]
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        x = ROWS[part[order] == name]
        error = np.square(x - dictionary.decode(dictionary.encode(x))).mean()
        assert row[f"{split}_mse"] == pytest.approx(error, rel=1e-4)
    assert dictionary.provenance["split"] == "part"
    with pytest.raises(InputError, match="leave out --validation"):
        run(data=str(tmp_path / f"cells{suffix}"), split="part", validation="0.2")


def test_rows_beyond_the_memory_are_streamed_to_the_same_end_each_time(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    gib = str(3 * 2 * 32 * 16 / 2**30)  # three buffers of two batches
    streamed = [
        run(resident_gib=gib, workdir=str(tmp_path / name), patience="2", epochs="5")
        for name in ("a", "b")
    ]
    weights = [(out / "dictionaries/0000/sae_weights.safetensors").read_bytes() for out in streamed]
    assert weights[0] == weights[1]
    provenance = sae_jax.Dictionary.load(streamed[0] / "dictionaries/0000").provenance
    assert provenance["resident_bytes"] == 3 * 2 * 32 * 16
    resident = run(workdir=str(tmp_path / "c"))
    losses = [pd.read_parquet(out / "history.parquet")["loss"] for out in (streamed[0], resident)]
    np.testing.assert_allclose(losses[0].iloc[:3], losses[1], rtol=0.1)
    with pytest.raises(InputError, match="do not hold two batches"):
        run(resident_gib="1e-8", workdir=str(tmp_path / "d"))
    assert not (tmp_path / "d/configs.json").exists()


def test_scalars_for_tensorboard(run: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboardX")
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    out = run(sweep, n_latents="8,16", tensorboard="true")
    assert sorted(p.name for p in (out / "tensorboard").iterdir()) == ["0000", "0001"]
    history = pd.read_parquet(out / "history.parquet").query("member == 1")
    (file,) = (out / "tensorboard/0001").iterdir()
    content, values, at = file.read_bytes(), {}, 0
    while at < len(content):  # records: length, its checksum, the event, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
        values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        at += 16 + size
    for _, row in history.iterrows():
        assert values["loss", row["epoch"]] == pytest.approx(row["loss"])
        assert values["l0", row["epoch"]] == pytest.approx(row["l0"])


YAML = """
presets:
  vanilla: {n_latents: [8, 12], l1_weight: [1e-3, 0.1], seed: 3}
  topk: {n_latents: 8, k: [2, 3]}
"""
PYTHON = """
from sae_jax import SAEConfig, grid
def configs(d_in):
    return [SAEConfig(d_in=d_in, n_latents=5 * d_in, l1_weight=0.1), *grid(
        "topk", d_in=d_in, n_latents=8, k=[2, 3])]
"""


def test_files_of_configurations(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(YAML)
    found = configurations.configs_from_file(tmp_path / "c.yaml", 4)
    expected = sae_jax.grid(
        "vanilla", d_in=4, n_latents=[8, 12], l1_weight=[1e-3, 0.1], seed=3
    ) + sae_jax.grid("topk", d_in=4, n_latents=8, k=[2, 3])
    assert found == expected
    (tmp_path / "c.py").write_text(PYTHON)
    found = configurations.configs_from_file(tmp_path / "c.py", 4)
    assert found[0] == SAEConfig(d_in=4, n_latents=20, l1_weight=0.1)
    assert found[1:] == expected[4:]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "presets: [1, 2", "cannot be read as YAML"),
        ("c.yaml", "a: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("c.yaml", "presets: {vanilla: {n_latents: 8, l1_weight: high}}", "l1_weight='high'"),
        ("c.py", "configs = 3", "must define `configs`"),
        ("c.py", "1 / 0", "ZeroDivisionError"),
        ("c.py", "configs = []", "holds no configurations"),
        ("d.py", None, "there is no file"),
        ("c.json", "[", "no JSON"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        configurations.configs_from_file(tmp_path / name, 4)


def test_multihost_alone_is_refused(run: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no other processes are found"):
        run(sweep, multihost="true")


@pytest.mark.parametrize("first", [True, False])
def test_what_all_processes_would_tell_the_first_tells(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "join", lambda: None)
    monkeypatch.setattr(distributed, "is_first", lambda: first)
    with flagsaver.flagsaver():  # of which --verbosity is one
        sweep.define_flags()
        flags.FLAGS(["sweep", "--multihost"])
        logging.set_verbosity(logging.INFO)
        jobs.join()
        assert logging.level_info() == first
        assert logging.level_warning()


def test_bad_rows_leave_nothing_and_overwrite_nothing(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    bad = ROWS.copy()
    bad[7, 1] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(InputError, match=r"holds 1 NaN .* in 1 of"):
        run(data=str(tmp_path / "bad.npy"))
    assert not (tmp_path / "out").exists()
    out = run()
    before = (out / "results.parquet").read_bytes()
    with pytest.raises(InputError, match="NaN"):
        run(data=str(tmp_path / "bad.npy"), overwrite="true")
    with pytest.raises(InputError, match="patience compares losses"):
        run(preset="target_l0", l1_weight="0.1", target_l0="3", patience="1", overwrite="true")
    with pytest.raises(InputError, match="do not hold two batches"):
        run(resident_gib="0", overwrite="true")
    assert (out / "results.parquet").read_bytes() == before


@pytest.mark.parametrize("program", [sweep, train], ids=["sweep", "train"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint_seconds": "inf"}, "--checkpoint_seconds=inf must be a finite"),
        ({"resident_gib": "nan"}, "--resident_gib=nan must be a finite"),
        ({"validation": "nan"}, "--validation=nan must be a share"),
        ({"epochs": "800000000"}, "are more than"),
        ({"data": "rows.npy:foo"}, "leave out what follows"),
    ],
)
def test_what_is_refused_leaves_an_earlier_run(
    run: Callable[..., Path], program: Any, given: dict[str, str], message: str, tmp_path: Path
) -> None:
    out = run(program)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    if "data" in given:
        given = {"data": str(tmp_path / given["data"])}
    with pytest.raises(InputError, match=message):
        run(program, overwrite="true", **given)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_in_progress_is_not_overwritten(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run()
    with workdir.locked(out):
        monkeypatch.setattr(lock, "_held", set())
        with pytest.raises(InputError, match="filled by another process"):
            run(overwrite="true")
    assert (out / "results.parquet").exists()


def test_a_kill_while_overwriting_leaves_what_can_be_overwritten(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def remove(path: Path) -> None:
        if path.name == "figures":
            raise Killed
        real(path)

    out, real = run(), files.remove
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", remove)
        with pytest.raises(Killed):
            run(overwrite="true")
    assert not (out / "configs.json").exists()
    run(overwrite="true")
    assert (out / "results.parquet").exists()


def test_links_are_unlinked_and_not_followed(run: Callable[..., Path], tmp_path: Path) -> None:
    out = run()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    (out / "tensorboard").symlink_to(tmp_path / "elsewhere")
    run(overwrite="true")
    assert (tmp_path / "elsewhere/kept").exists()
    assert not (out / "tensorboard").exists()


def test_shards_of_another_sweep_are_refused(run: Callable[..., Path]) -> None:
    grid = {"n_latents": "8,16,24", "num_shards": "2"}
    out = run(sweep, shard_index="0", **grid)
    with pytest.raises(InputError, match="a sweep of another number of shards"):
        run(sweep, shard_index="0", **{**grid, "num_shards": "3"})
    with pytest.raises(InputError, match=r"is a shard of another sweep:\n  epochs: 3 there, 4"):
        run(sweep, shard_index="1", epochs="4", **grid)
    (out / ".writable.x").mkdir()  # the trial of one that starts now
    run(sweep, shard_index="1", **grid)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "aliases"),
        ("- {n_latents: 16, 3: 4}", "3 is no name of a field"),
        ("presets: {vanilla: {3: 4}}", "3 is no name of a field"),
        ("!!python/object/apply:os.system ['touch executed']", "cannot be read as YAML"),
    ],
)
def test_strange_yaml(
    run: Callable[..., Path], text: str, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    none = dict.fromkeys(FLAGS)
    with pytest.raises(InputError, match=message):
        run(sweep, **none, config=str(tmp_path / "c.yaml"))
    assert not (tmp_path / "executed").exists()


def test_a_python_config_that_exits(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError, match=r"SystemExit.*3"):
        run(sweep, **dict.fromkeys(FLAGS), config=str(tmp_path / "c.py"))


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.endswith(".lock")}


def test_a_refused_command_leaves_a_finished_folder_as_it_is(run: Callable[..., Path]) -> None:
    out = run()
    before = contents(out)
    with pytest.raises(InputError, match="other settings"):
        run(epochs="2")
    assert contents(out) == before
    run()
    assert contents(out) == before, "nor is anything drawn again"


def test_a_finished_folder_that_is_damaged_is_no_longer_taken_for_one(
    run: Callable[..., Path],
) -> None:
    out = run()
    before = contents(out)
    (out / "figures/training.png").write_bytes(b"")
    damaged = contents(out)
    with pytest.raises(
        InputError, match=r"training\.png has 0 bytes .* --overwrite trains it anew"
    ):
        run()
    assert contents(out) == damaged
    run(overwrite="true")
    assert contents(out).keys() == before.keys()


def test_a_name_that_looks_like_an_address_is_one_of_a_folder(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(workdir="s3:out")
    assert (tmp_path / "s3:out/results.parquet").is_file()

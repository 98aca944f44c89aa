import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

import sae_jax
from analysis import plots
from experiments import configurations, sweep
from sae_jax import InputError, SAEConfig, data, trainer

ROWS = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
GRID = {
    "preset": "vanilla,topk_schuster", "n_latents": "8,12", "l1_weight": "0.1,1",
    "k_percent": "25,50", "seeds": "0,1", "batch_size": "32", "epochs": "2",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Runs the program in this process: `run(flag=text)`; None takes a flag of GRID away."""
    np.save(tmp_path / "rows.npy", ROWS)

    def call(**given: str | None) -> Path:
        settings = {
            "data": str(tmp_path / "rows.npy"), "workdir": str(tmp_path / "out"), **GRID, **given,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        with flagsaver.flagsaver():  # which forgets the flags defined within
            sweep.define_flags()
            flags.FLAGS(["sweep", *words])
            sweep.main()
        return tmp_path / "out"

    return call


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The latents of every program that is trained, as it happens."""
    programs: list[int] = []
    train_bucket = trainer.train_bucket

    def watched(*args: Any, architecture: sae_jax.Architecture, **more: Any) -> Any:
        programs.append(architecture.n_latents)
        return train_bucket(*args, architecture=architecture, **more)

    monkeypatch.setattr(trainer, "train_bucket", watched)
    return programs


def test_every_file_is_there_and_the_same_command_trains_nothing_again(
    run: Callable[..., Path], trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run()
    printed = capsys.readouterr().out
    assert "16 configurations -> 4 programs" in printed
    assert str(out) in printed
    assert "best validation R² at their L0" in printed
    assert sorted(path.name for path in out.iterdir()) == sorted(sweep.FILES)
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        "frontier.pdf", "frontier.png",
    ]  # fmt: skip

    results = pd.read_parquet(out / "results.parquet")
    shared = {"d_in": 4, "n_latents": [8, 12], "batch_size": 32, "seed": [0, 1]}
    wanted = [
        *sae_jax.grid("vanilla", l1_weight=[0.1, 1], **shared),
        *sae_jax.grid("topk_schuster", k_percent=[25, 50], **shared),
    ]
    asked = json.loads((out / "configs.json").read_text())["configs"]
    assert {SAEConfig.from_dict(fields) for fields in asked} == set(wanted)
    assert list(results["name"]) == ["vanilla"] * 8 + ["topk_schuster"] * 8
    assert results["validation_r2"].notna().all()
    assert set(pd.read_parquet(out / "history.parquet")["epoch"]) == {0, 1}
    dictionary = sae_jax.Dictionary.load(out / "dictionaries" / "0015")
    assert dictionary.provenance["data"].endswith("rows.npy")

    assert len(trained) == 4
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    run()
    assert len(trained) == 4
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), results)
    assert before == {path: path.read_bytes() for path in out.rglob("*.safetensors")}


def test_an_embedding_of_an_h5ad_and_no_validation(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = anndata.AnnData(np.ones((120, 2), np.float32), obsm={"X_some": ROWS})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    out = run(data=f"{tmp_path / 'cells.h5ad'}:obsm/X_some", preset="vanilla", validation="0")
    results = pd.read_parquet(out / "results.parquet")
    assert not [column for column in results if column.startswith("validation")]
    assert json.loads((out / "configs.json").read_text())["train"] == data.fingerprint(ROWS)
    assert "best train R² at their L0" in capsys.readouterr().out


def test_held_out_rows_are_those_of_the_seed(run: Callable[..., Path]) -> None:
    out = run(preset="vanilla", n_latents="8", validation="0.25", data_seed="3")
    settings = json.loads((out / "configs.json").read_text())
    train, held_out = data.split(len(ROWS), 0.25, 3)
    assert settings["train"] == data.fingerprint(ROWS[train])
    assert settings["validation"] == data.fingerprint(ROWS[held_out])
    assert settings["data_seed"] == 3


def test_other_settings_are_refused_or_replace_what_is_there(run: Callable[..., Path]) -> None:
    out = run(preset="vanilla", n_latents="8")
    first, settings = (out / "configs.json").read_text(), (out / "sweep.json").read_text()
    with pytest.raises(InputError, match="epochs: 2 there, 3 asked for"):
        run(preset="vanilla", n_latents="8", epochs="3")
    assert (out / "configs.json").read_text() == first
    assert (out / "sweep.json").read_text() == settings
    run(preset="vanilla", n_latents="8", epochs="3", overwrite="true")
    assert set(pd.read_parquet(out / "results.parquet")["epochs"]) == {3}
    assert json.loads((out / "sweep.json").read_text())["epochs"] == 3


def test_a_folder_of_somebody_else_is_never_touched(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "configs.json").write_text("{}")
    for given in ({}, {"overwrite": "true"}, {"num_shards": "2"}):
        with pytest.raises(InputError, match="holds other files"):
            run(**given)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["configs.json"]


def test_a_crash_keeps_the_programs_before_it(
    run: Callable[..., Path], trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = trainer.train_bucket

    def crashes(*args: Any, architecture: sae_jax.Architecture, **more: Any) -> Any:
        if architecture.n_latents == 12:
            raise RuntimeError("out of memory")
        return watched(*args, architecture=architecture, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_bucket", crashes)
        with pytest.raises(SystemExit, match="4 configurations failed"):
            run(preset="vanilla")
    assert trained == [8]
    run(preset="vanilla")
    assert trained == [8, 12]


def test_dry_run_shows_the_axes_and_writes_nothing(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(dry_run="true", workdir=None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["16", "configurations", "->", "4", "programs"]
    assert ["l1_weight", "0.1,", "1"] in lines
    assert ["k", "2,", "4,", "3,", "6"] in lines
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_shards_fill_folders_of_their_own(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    for index in range(2):
        out = run(preset="vanilla", n_latents="8", num_shards="2", shard_index=str(index))
        names.append(f"shard-{index:03d}-of-002")
        found = pd.read_parquet(out / names[-1] / "results.parquet")
        assert len(found) == 2
        told = f"--num_shards=2 --shard_index={index}: 2 of 4 configurations\n"
        assert capsys.readouterr().out.startswith(f"{told}2 configurations -> 1 program\n")
    assert sorted(path.name for path in out.iterdir()) == names
    tables = [pd.read_parquet(out / name / "results.parquet") for name in names]
    settings = pd.concat(tables)[["l1_weight", "seed"]]
    assert set(settings.itertuples(index=False, name=None)) == {(w, s) for w in (0.1, 1.0)
                                                                for s in (0, 1)}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "kinds", "values"),
    [
        (["8", " 40"], (int,), [8, 40]),
        (["1e-3", "1"], (float,), [0.001, 1.0]),
        (["none", "5"], (int, type(None)), [None, 5]),
        (["none"], (str,), ["none"]),
        (["true", "False"], (bool,), [True, False]),
    ],
)
def test_words_become_values_of_the_fields_type(
    words: list[str], kinds: tuple[type, ...], values: list[Any]
) -> None:
    found = configurations.parse_axis("x", words, kinds)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_every_field_but_three_is_an_axis() -> None:
    fields = set(SAEConfig.__dataclass_fields__) - {"d_in", "seed", "name"}
    assert set(configurations.axis_types()) == fields | {"k_percent"}


BAD: dict[str, tuple[dict[str, str | None], str]] = {
    "text for a number": ({"n_latents": "8,abc"}, "--n_latents: 'abc' is not an integer"),
    "a share for a whole": ({"n_latents": "8.5"}, "--n_latents: '8.5' is not an integer"),
    "a gap": ({"l1_weight": "1,,2"}, "--l1_weight: '' is not a number"),
    "an empty axis": ({"l1_weight": ""}, "--l1_weight is empty"),
    "seeds": ({"seeds": "a"}, "--seeds: 'a' is not an integer"),
    "a value out of range": ({"l1_weight": "-1"}, "l1_weight=-1.0 must be"),
    "an unknown choice": ({"activation": "tanh"}, "activation='tanh' is not one of"),
    "an unknown preset": ({"preset": "vanila"}, "unknown preset 'vanila'"),
    "no preset": ({"preset": None}, "--preset is needed"),
    "a field left out": ({"l1_weight": None}, "preset 'vanilla' needs l1_weight"),
    "no data": ({"data": None}, "--data is needed"),
    "a missing file": ({"data": "none.npy"}, "there is no file none.npy"),
    "no workdir": ({"workdir": None}, "--workdir is needed"),
    "a batch above the rows": ({"batch_size": "109"}, "batch_size=109 is more than the 108 rows"),
    "all held out": ({"validation": "1"}, "leaves 0 to train on"),
    "one held out": ({"validation": "0.01"}, "1 held out"),
    "no such shard": ({"num_shards": "2", "shard_index": "2"}, "--shard_index=2 must be less"),
    "shards without work": ({"num_shards": "17"}, "more than the 16 configurations"),
    "both ways": ({"config": "x.json"}, "leave out --preset, --seeds, --n_latents"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(
    run: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    given, message = BAD[case]
    with pytest.raises(InputError, match=f"(?s){message}"):
        run(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


NO_AXES = dict.fromkeys(("preset", "n_latents", "l1_weight", "k_percent", "seeds", "batch_size"))
VANILLA = {"n_latents": 8, "l1_weight": 1, "batch_size": 32}


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ({"presets": {"vanilla": {**VANILLA, "n_latents": [8, 12], "seed": [0, 1]},
                      "topk_schuster": {"n_latents": 8, "k_percent": [25, 50],
                                        "batch_size": 32}}}, 6),
        ([VANILLA, {**VANILLA, "activation": "topk", "k": 2, "l1_weight": 0}, VANILLA], 2),
    ],
)  # fmt: skip
def test_a_file_of_configurations(
    run: Callable[..., Path], tmp_path: Path, content: Any, count: int
) -> None:
    (tmp_path / "grid.json").write_text(json.dumps(content))
    out = run(**NO_AXES, config=str(tmp_path / "grid.json"), epochs="1", validation="0.1")
    assert len(pd.read_parquet(out / "results.parquet")) == count


BAD_FILES: dict[str, tuple[str, str]] = {
    "no JSON": ("presets: vanilla", "no JSON"),
    "a number": ("3", "must be a list of configurations, or"),
    "another key": ('{"grid": {}}', "must be a list of configurations, or"),
    "axes that are none": ('{"presets": {"vanilla": 3}}', "must be a list of configurations, or"),
    "nothing": ("[]", "holds no configurations"),
    "an unknown axis": ('{"presets": {"vanilla": {"seeds": 1}}}', " vanilla: .*no axis seeds"),
    "an unknown field": ('[{"n_latents": 8}, {"n_latent": 8}]', r"\[1\]: .*no field n_latent"),
    "another width": ('[{"n_latents": 8, "d_in": 5}]', "says d_in=5; the data has 4"),
    "a name that is none": ('[{"n_latents": 8, "name": 3}]', "name=3 must be text"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_of_configurations(
    run: Callable[..., Path], tmp_path: Path, case: str
) -> None:  # fmt: skip
    content, message = BAD_FILES[case]
    (tmp_path / "grid.json").write_text(content)
    with pytest.raises(InputError, match=rf"(?s)grid\.json.*{message}"):
        run(**NO_AXES, config=str(tmp_path / "grid.json"))
    assert not (tmp_path / "out").exists()


def test_the_table_has_what_nothing_beats() -> None:
    results = pd.DataFrame(
        [{**SAEConfig(d_in=4, n_latents=8, l1_weight=l0 / 10).to_dict(), "member": i,
          "status": "trained" if i else "diverged", "t_l0": l0, "t_r2": r2}
         for i, (l0, r2) in enumerate([(1.0, np.nan), (3.0, 0.5), (2.0, 0.6), (4.0, 0.9)])]
    )  # fmt: skip
    lines = sweep.best(results, "t").splitlines()
    assert [int(line.split()[0]) for line in lines[1:]] == [2, 3]
    assert "l1_weight" in lines[0]
    assert "n_latents" not in lines[0]
    assert "0 of 1 are trained" in sweep.best(results.iloc[:1], "t")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("r2", [0.5, np.nan])
def test_a_frontier_of_many_presets_and_no_choice(tmp_path: Path, r2: float) -> None:
    count = len(plots.PRESET_STYLE) + 3
    results = pd.DataFrame(
        {"name": [f"preset {i}" for i in range(count)], "n_latents": 10, "train_l0": 2 * r2,
         "train_r2": r2}
    )  # fmt: skip
    figure = plots.frontier(results, split="train")
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == list(results["name"])
    plots.save(figure, tmp_path, "frontier")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    script = Path(sys.executable).parent / "sae-jax"
    for words, message in {
        ("--data=rows.npy", "--preset=vanilla", "--n_latents=abc", "--workdir=out"):
            "--n_latents: 'abc' is not an integer",
        ("--epochs=0",): "flag --epochs=0: 0 is not a positive integer",
    }.items():  # fmt: skip
        done = subprocess.run([script, "sweep", *words], cwd=tmp_path, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.strip() == f"error: {message}"
    shown = subprocess.run([script, "sweep", "--help"], capture_output=True, text=True).stdout
    assert shown.lstrip().startswith("A sweep:")
    assert "--n_latents" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]

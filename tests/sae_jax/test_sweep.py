"""`grid` and `train`: what is asked, what comes back, what lies in the work directory."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from jax.sharding import AxisType, Mesh

import sae_jax
from sae_jax import (
    Dictionary,
    InputError,
    Run,
    SAEConfig,
    bucket,
    distributed,
    grid,
    lock,
    sweep,
    trainer,
    workdir,
)
from sae_jax.data import fingerprint
from sae_jax.workdir import check_writable, difference

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(50, 4)).astype(np.float32)
VALIDATION = RNG.normal(size=(20, 4)).astype(np.float32)
SIZE = {"d_in": 4, "n_latents": 9, "batch_size": 16}
# Two buckets, in turns; member 2 diverges.
CONFIGS = [
    SAEConfig.preset("vanilla", **SIZE, l1_weight=0.1, learning_rate=0.01),
    SAEConfig.preset("topk_schuster", **SIZE, k_percent=30, input_normalization="zscore"),
    SAEConfig.preset("vanilla", **SIZE, l1_weight=0.1, learning_rate=1e15),
    SAEConfig.preset(
        "topk_schuster", **SIZE, k_percent=50, input_normalization="zscore", seed=4
    ),
    SAEConfig.preset("vanilla", **SIZE, l1_weight=0.2, seed=1),
]  # fmt: skip
METRICS = [
    "mse", "r2", "fvu", "r2_scalar_mean", "cosine", "norm_ratio", "l0", "l1", "live", "dead",
    "alive_1pct",
]  # fmt: skip
FILES = {"configs.json", "history.parquet", "results.parquet", "dictionaries", "manifest.json"}


def train(workdir: Path | None = None, **changes: Any) -> Run:
    call = {
        "configs": CONFIGS, "train": ROWS, "validation": VALIDATION, "epochs": 3, "data_seed": 2,
        "progress": False, "workdir": workdir,
    }  # fmt: skip
    return sae_jax.train(**{**call, **changes})


@pytest.fixture(scope="module")
def plain() -> Run:
    return train()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "new" / "run"
    train(path)
    return path


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def assert_equal_runs(found: Run, expected: Run) -> None:
    pd.testing.assert_frame_equal(found.results, expected.results, check_exact=True)
    pd.testing.assert_frame_equal(found.history, expected.history, check_exact=True)
    assert_equal_dictionaries(found, expected)


def assert_equal_dictionaries(found: Run, expected: Run) -> None:
    for a, b in zip(found.dictionaries, expected.dictionaries, strict=True):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        assert a.config == b.config
        assert a.provenance == b.provenance
        mine, theirs = ((d.params, d.normalizer) for d in (a, b))
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
            assert x.dtype == y.dtype


# -- grid ------------------------------------------------------------------------------------------


def test_grid_is_the_product_of_its_axes_in_order() -> None:
    made = grid("vanilla", d_in=4, n_latents=[8, 40], l1_weight=(0.1, 0.01), seed=[0, 1])
    expected = [
        SAEConfig.preset("vanilla", d_in=4, n_latents=n, l1_weight=l1, seed=seed)
        for n, l1, seed in itertools.product([8, 40], [0.1, 0.01], [0, 1])
    ]
    assert made == expected


def test_grid_drops_axes_without_a_use() -> None:
    both = {"l1_weight": [0.1, 0.01], "k_percent": [10, 50]}
    made = grid("vanilla", **SIZE, **both, k=[1, 2])
    assert made == grid("vanilla", **SIZE, l1_weight=[0.1, 0.01])
    made = grid("topk_schuster", **SIZE, **both, k=[1, 2, 3])
    assert made == grid("topk_schuster", **SIZE, k_percent=[10, 50])
    assert [config.k for config in made] == [1, 4]
    assert all(config.l1_weight == 0 for config in made)


def test_grid_says_what_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    from absl import logging

    with caplog.at_level("INFO", logger=logging.get_absl_logger().name):
        grid("bricken", **SIZE, l1_weight=0.1, k=[1, 2])
    assert "preset bricken has no use for k: that axis is dropped" in caplog.text


def test_grid_merges_duplicates_in_order() -> None:
    made = grid("topk_schuster", d_in=4, n_latents=10, k_percent=[50, 1, 5, 10, 50])
    assert [config.k for config in made] == [5, 1]


def test_grid_refuses_what_a_preset_does_not_know() -> None:
    with pytest.raises(InputError, match="unknown preset"):
        grid("relu", **SIZE)
    with pytest.raises(InputError, match="no field width"):
        grid("vanilla", **SIZE, l1_weight=0.1, width=[1, 2])
    with pytest.raises(InputError, match="needs l1_weight"):
        grid("vanilla", **SIZE)


def test_grid_takes_an_array_for_an_axis() -> None:
    made = grid("vanilla", **SIZE, l1_weight=np.logspace(-3, -1, 3))
    assert [config.l1_weight for config in made] == pytest.approx([1e-3, 1e-2, 1e-1])


# -- train -----------------------------------------------------------------------------------------


def test_rows_of_results_are_in_the_order_given_across_buckets(plain: Run) -> None:
    results = plain.results
    assert results["member"].tolist() == [0, 1, 2, 3, 4]
    for i, config in enumerate(CONFIGS):
        for name, value in config.to_dict().items():
            found = results[name][i]
            assert found == value or (value is None and pd.isna(found))
        dictionary = plain.dictionaries[i]
        assert (dictionary is None) == (i == 2)
        assert dictionary is None or dictionary.config == config
    assert results["status"].tolist() == ["trained", "trained", "diverged", "trained", "trained"]
    assert str(results["k"].dtype) == "Int64"


def test_every_field_and_metric_is_a_column(plain: Run) -> None:
    expected = [
        "member", *(f.name for f in dataclasses.fields(SAEConfig)), "status", "epochs",
        "best_epoch", "train_loss",
        *(f"{split}_{m}" for split in ("train", "validation") for m in METRICS),
    ]  # fmt: skip
    assert sorted(plain.results.columns) == sorted(expected)
    columns = [f"{split}_{m}" for split in ("train", "validation") for m in METRICS]
    assert plain.results.loc[2, columns].isna().all()
    assert plain.results.loc[[0, 1, 3, 4], columns].notna().all(axis=None)


def test_metrics_are_of_the_dictionaries_and_rows(plain: Run) -> None:
    for i in (0, 1, 3, 4):
        dictionary, row = plain.dictionaries[i], plain.results.loc[i]
        assert dictionary is not None
        for split, x in (("train", ROWS), ("validation", VALIDATION)):
            z = dictionary.encode(x)
            error = np.square(dictionary.decode(z) - x.astype(np.float64))
            total = np.square(x - x.mean(axis=0, keepdims=True, dtype=np.float64))
            assert row[f"{split}_mse"] == pytest.approx(error.mean(), rel=1e-5)
            assert row[f"{split}_r2"] == pytest.approx(1 - error.sum() / total.sum(), rel=1e-4)
            assert row[f"{split}_l0"] == np.count_nonzero(z) / len(x)
            assert row[f"{split}_live"] == z.any(axis=0).sum()


def test_history_has_a_row_per_member_and_epoch(plain: Run) -> None:
    history = plain.history
    assert list(history.columns) == [
        "member",
        "epoch",
        "loss",
        "mse",
        "l1",
        "l0",
        "validation_loss",
    ]
    pairs = [(i, epoch) for i in range(5) for epoch in range(1 if i == 2 else 3)]
    assert list(zip(history["member"], history["epoch"], strict=True)) == pairs
    last = history.groupby("member").tail(1)["loss"].to_numpy()
    np.testing.assert_array_equal(last, plain.results["train_loss"].to_numpy())
    assert history.query("member != 2")["loss"].notna().all()


def test_provenance_names_the_run(plain: Run) -> None:
    provenance = plain.dictionaries[0].provenance
    assert provenance["epochs"] == 3
    assert provenance["data_seed"] == 2
    assert provenance["train"] == fingerprint(ROWS)
    assert provenance["versions"]["jax"] == jax.__version__
    json.dumps(provenance)


def test_normalisation_is_of_the_training_rows(plain: Run) -> None:
    assert plain.dictionaries[0].normalizer is None
    normalizer = plain.dictionaries[1].normalizer
    np.testing.assert_allclose(normalizer.mean, ROWS.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(normalizer.scale, ROWS.std(axis=0), rtol=1e-4)


def test_a_sweep_on_one_device_equals_one_on_two(
    plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Mesh(np.asarray(jax.devices()[:1]), ("member",), axis_types=(AxisType.Auto,))
    monkeypatch.setattr(distributed, "member_mesh", lambda *_: one)
    found = train()
    # Weights and history are promised bit for bit. The metrics' float32 sums are fused in another
    # way, so they agree to rounding.
    assert_equal_dictionaries(found, plain)
    pd.testing.assert_frame_equal(found.history, plain.history, check_exact=True)
    pd.testing.assert_frame_equal(found.results, plain.results, rtol=1e-6, atol=1e-6)


def test_validation_rows_change_no_training(plain: Run) -> None:
    without = train(validation=None)
    assert not [c for c in without.results if c.startswith("validation")]
    assert without.history["validation_loss"].isna().all()
    rest = [column for column in plain.history if column != "validation_loss"]
    pd.testing.assert_frame_equal(without.history[rest], plain.history[rest])
    columns = list(without.results.columns)
    pd.testing.assert_frame_equal(without.results, plain.results[columns])


def test_progress_counts_the_steps_of_all_members(capsys: pytest.CaptureFixture[str]) -> None:
    train(progress=True)
    printed = capsys.readouterr()
    assert "45.0/45.0" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configs": []}, "no configurations"),
        ({"epochs": 0}, "epochs=0 must be an integer in 1 "),
        ({"train": ROWS[:, :3], "validation": None}, "d_in=4, train has 3 dimensions"),
        ({"train": ROWS[:15]}, "batch_size=16 is more than the 15 rows"),
        ({"train": np.where(ROWS > 2, np.nan, ROWS)}, "train holds .* NaN"),
        ({"validation": VALIDATION[:, :3]}, "validation has 3 dimensions"),
        ({"validation": np.full((2, 4), np.inf)}, "validation holds 8 NaN or infinite"),
    ],
)
def test_bad_input_is_refused_before_a_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"epochs": 1.5}, {"epochs": "3"}, {"data_seed": 0.5}, {"data_seed": -1}]
)
def test_epochs_and_seeds_that_are_no_integers_are_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        train(tmp_path / "run", configs=CONFIGS[:1], **changes)
    assert list(tmp_path.iterdir()) == []


# -- work directory --------------------------------------------------------------------------------


def test_a_work_directory_holds_what_came_back(finished: Path, plain: Run) -> None:
    assert {p.name for p in finished.iterdir()} == FILES
    folders = sorted(p.name for p in (finished / "dictionaries").iterdir())
    assert folders == ["0000", "0001", "0003", "0004"]
    results = pd.read_parquet(finished / "results.parquet")
    pd.testing.assert_frame_equal(results, plain.results, check_exact=True)
    history = pd.read_parquet(finished / "history.parquet")
    pd.testing.assert_frame_equal(history, plain.history, check_exact=True)
    for i in (0, 1, 3, 4):
        tensors = safetensors.numpy.load_file(
            finished / f"dictionaries/{i:04d}/sae_weights.safetensors"
        )
        np.testing.assert_array_equal(tensors["W_enc"], plain.dictionaries[i].params.encoder)
        loaded = Dictionary.load(finished / f"dictionaries/{i:04d}")
        np.testing.assert_array_equal(loaded.encode(ROWS), plain.dictionaries[i].encode(ROWS))
    asked = json.loads((finished / "configs.json").read_text())
    assert [SAEConfig.from_dict(fields) for fields in asked["configs"]] == CONFIGS
    assert asked["epochs"] == 3
    assert asked["train"] == fingerprint(ROWS)


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("trained again")


def test_a_second_call_trains_nothing_and_returns_the_same(
    run_folder: Path, plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(trainer, "train_bucket", forbidden)
    again = train(run_folder)
    assert_equal_runs(again, plain)
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before


OTHER_ROWS = np.where(np.arange(4) == 3, -ROWS, ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 4}, "epochs: 3 there, 4 asked for"),
        ({"data_seed": 9}, "data_seed: 2 there, 9 asked for"),
        ({"configs": CONFIGS[:4]}, "configs: 5 there, 4 asked for"),
        (
            {"configs": [*CONFIGS[:4], dataclasses.replace(CONFIGS[4], seed=3, l1_weight=0.5)]},
            r"configs\[4\].l1_weight: 0.2 there, 0.5 asked for\n +configs\[4\].seed: 1 there, 3",
        ),
        ({"configs": CONFIGS[::-1]}, r"configs\[0\].* there.*\n  \.\.\. and \d+ more"),
        ({"train": OTHER_ROWS}, "train.sha256: '"),
        ({"train": ROWS[:48]}, r"train.shape\[0\]: 50 there, 48 asked for"),
        ({"train": ROWS.astype(np.float64)}, "train.dtype: 'float32' there, 'float64' asked"),
        ({"validation": None}, "validation: {.*} there, None asked for"),
        ({"validation": VALIDATION[::-1]}, "validation.sha256"),
    ],
)
def test_other_settings_or_data_are_refused_with_the_difference(
    run_folder: Path, changes: dict[str, Any], message: str
) -> None:
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=f"(?s)holds a run of other settings:.*{message}"):
        train(run_folder, **changes)
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before


class PreemptedError(BaseException):
    pass


@pytest.mark.parametrize("order", [CONFIGS, CONFIGS[1:] + CONFIGS[:1]], ids=["relu", "topk"])
def test_a_run_that_died_between_buckets_continues(
    order: list[SAEConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(configs=order)
    calls = 0
    real = trainer.train_bucket

    def dies(*args: Any, **kwargs: Any) -> trainer.Trained:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise PreemptedError
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_bucket", dies)
        with pytest.raises(PreemptedError):
            train(tmp_path / "run", configs=order)
        first = [i for i, c in enumerate(order) if c.architecture == order[0].architecture]
        half = pd.read_parquet(tmp_path / "run/results.parquet")
        assert half["member"].tolist() == first
        assert_equal_runs(train(tmp_path / "run", configs=order), undisturbed)
        assert calls == 3, "the first bucket is not trained again"
    whole = pd.read_parquet(tmp_path / "run/results.parquet")
    pd.testing.assert_frame_equal(whole, undisturbed.results, check_exact=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES


@pytest.mark.parametrize("dies_in", ["save", "write_parquet"])
def test_a_run_that_died_while_writing_continues(
    dies_in: str, tmp_path: Path, plain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    owner = Dictionary if dies_in == "save" else sweep.Workdir.write.__globals__["files"]
    real = getattr(owner, dies_in)

    def dies(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise PreemptedError
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, dies_in, dies)
        with pytest.raises(PreemptedError):
            train(tmp_path / "run")
    assert not (tmp_path / "run/results.parquet").exists()
    assert_equal_runs(train(tmp_path / "run"), plain)


def test_a_damaged_dictionary_is_not_passed_on(run_folder: Path) -> None:
    weights = run_folder / "dictionaries/0003/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"0003.*is damaged"):
        train(run_folder)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "run"):
        with pytest.raises(InputError, match="file is no folder; a folder is needed"):
            train(path)
    assert (tmp_path / "file").read_text() == "mine"


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """os.access answers for the real user; root may write everywhere."""
    if os.getuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o777)
        with nobody():
            check_writable(path / "run")
        path.chmod(0o555)
        for run in (path, path / "run", path / "deep" / "run"):
            with nobody(), pytest.raises(InputError, match="cannot be written to"):
                train(run)
        assert list(path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "not json"])
def test_a_damaged_configs_file_is_refused(run_folder: Path, text: str) -> None:
    (run_folder / "configs.json").write_text(text)
    with pytest.raises(InputError, match=r"configs\.json"):
        train(run_folder)


@pytest.mark.parametrize("name", ["results.parquet", "history.parquet"])
def test_a_damaged_table_is_refused(run_folder: Path, name: str) -> None:
    (run_folder / name).write_bytes((run_folder / name).read_bytes()[:-100])
    with pytest.raises(InputError, match=name):
        train(run_folder)


def test_results_without_their_settings_are_not_taken_over(run_folder: Path) -> None:
    (run_folder / "configs.json").unlink()
    with pytest.raises(InputError):
        train(run_folder, epochs=4)


def test_a_member_trained_again_replaces_what_an_unfinished_run_left(
    run_folder: Path, plain: Run
) -> None:
    """On accelerators a second training is not the same bit for bit; table and weights must fit."""
    for name in ("results.parquet", "history.parquet"):
        (run_folder / name).unlink()
    weights = run_folder / "dictionaries/0000/sae_weights.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file({k: v + np.float32(1) for k, v in tensors.items()}, weights)
    assert_equal_runs(train(run_folder), plain)
    assert_equal_runs(train(run_folder), plain)


@pytest.mark.parametrize("changes", [{"epochs": np.int64(3)}, {"data_seed": np.int64(2)}])
def test_numpy_integers_are_integers(changes: dict[str, Any], tmp_path: Path, plain: Run) -> None:
    assert_equal_runs(train(tmp_path / "run", **changes), plain)


def test_difference_names_the_first_places() -> None:
    assert difference({"a": 1}, {"a": 1}) == ""
    assert difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == (
        "a.b[1]: 2 there, 3 asked for"
    )
    assert difference({"a": [1]}, {"a": [1, 2]}) == "a: 1 there, 2 asked for"
    assert difference({"a": 1}, {"b": 2}).splitlines() == [
        "a: 1 there, None asked for", "  b: None there, 2 asked for"
    ]  # fmt: skip
    many = difference(dict.fromkeys(range(9), 0), dict.fromkeys(range(9), 1))
    assert len(many.splitlines()) == 6
    assert many.endswith("... and 4 more")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts Linux' memory maps")
def test_many_programs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux grants a process 65,530 maps; past them the compiler dies of a segmentation fault."""
    monkeypatch.setattr(bucket, "KEPT_PROGRAMS", 2)
    counts = []
    for n_latents in range(10, 16):
        config = SAEConfig(d_in=4, n_latents=n_latents, batch_size=16)
        sae_jax.train([config], ROWS, epochs=1, progress=False)
        counts.append(len(Path("/proc/self/maps").read_text().splitlines()))
    assert max(counts[3:]) < max(counts[:3]) + 300


@pytest.mark.parametrize("provenance", [{"coverage": float("nan")}, {"layer": np.int64(7)}])
def test_provenance_that_cannot_be_written_is_refused_first(
    provenance: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="provenance must be of JSON's types"):
        train(tmp_path / "w", provenance=provenance)
    assert not (tmp_path / "w").exists()


def test_a_folder_that_another_process_fills_is_refused(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workdir.locked(run_folder):
        train(run_folder)  # the same process may
        monkeypatch.setattr(lock, "_held", set())
        with pytest.raises(InputError, match="filled by another process"):
            train(run_folder)
        assert (run_folder / "results.parquet").exists()
    train(run_folder)


def test_what_a_callback_raises_is_no_failed_program(tmp_path: Path) -> None:
    def raises(*_: Any) -> None:
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        train(tmp_path / "w", on_epochs=raises)


def test_a_failed_program_lets_go_of_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    held, real = [], bucket.train

    class Large:
        pass

    def fails(chosen: list[SAEConfig], *args: Any, **kwargs: Any) -> Any:
        if chosen[0].activation == "relu":
            large = Large()
            held.append(weakref.ref(large))
            raise MemoryError(f"no room for {large}")
        assert held[0]() is None
        return real(chosen, *args, **kwargs)

    monkeypatch.setattr(bucket, "train", fails)
    configs = sorted(CONFIGS, key=lambda config: config.activation)
    status = train(configs=configs).results["status"]
    assert set(status) == {"trained", "failed"}


def test_a_monitored_loss_that_is_never_finite_has_no_best_weights() -> None:
    far = np.full_like(VALIDATION, 1e25)
    results = train(validation=far, patience=2).results
    assert set(results["status"]) == {"diverged"}


def test_patience_is_not_fooled_by_a_warm_up() -> None:
    configs = sae_jax.grid("vanilla", **SIZE, l1_weight=1.0, l1_warmup=20)
    with pytest.raises(InputError, match="warm-up of the penalty"):
        train(configs=configs, validation=None, patience=2)
    with pytest.raises(InputError, match="warm-up of the penalty"):
        train(
            configs=configs, validation=None, test=VALIDATION, patience=2
        )  # which is not looked at
    train(configs=configs, patience=2)
    revived = sae_jax.grid("topk", **SIZE, k=2)
    with pytest.raises(InputError, match="auxk, which sets in as latents die"):
        train(configs=revived, validation=None, patience=2)


def test_held_out_rows_of_another_precision_are_cast() -> None:
    with jax.enable_x64(True):
        found = train(validation=VALIDATION.astype(np.float64), patience=np.int64(2))
    assert set(found.results["status"]) == {"trained", "diverged"}


def test_a_choice_beside_a_preset_keeps_what_the_preset_requires() -> None:
    (config,) = sae_jax.grid("vanilla", d_in=4, n_latents=8, l1_weight=0.1, activation="topk", k=2)
    assert (config.activation, config.k) == ("topk", 2)


def test_a_finished_run_is_loaded_whole(finished: Path, plain: Run) -> None:
    found = Run.load(finished)
    assert_equal_runs(found, plain)
    with pytest.raises(InputError, match=r"results\.parquet"):
        Run.load(finished / "dictionaries")


def test_folders_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/1000").mkdir(parents=True)
    (tmp_path / "notes/.writing-thesis").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds other files \(checkpoints, notes\)"):
        train(tmp_path)
    assert (tmp_path / "checkpoints/1000").is_dir()
    assert (tmp_path / "notes/.writing-thesis").is_dir()
    with pytest.raises(InputError, match="workdir is empty"):
        train("")


def test_what_made_the_rows_is_not_forgotten() -> None:
    versions = {"torch": "2.0", "sae_jax": "0"}
    run = train(provenance={"versions": versions, "layer": 3})
    (kept,) = {json.dumps(d.provenance["versions"]) for d in run.dictionaries if d is not None}
    assert json.loads(kept).keys() == {"torch", "sae_jax", "jax", "flax", "optax"}
    assert json.loads(kept)["sae_jax"] == sae_jax.__version__


def test_a_run_goes_on_in_its_own_precision(tmp_path: Path) -> None:
    rows = ROWS.astype(np.float64)
    train(tmp_path, train=rows)
    with jax.enable_x64(True), pytest.raises(InputError, match="dtype: None there, 'float64'"):
        train(tmp_path, train=rows)


def test_rows_of_a_file_are_named_as_in_the_file(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[[7, 31]] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    opened = sae_jax.data.open_rows(str(tmp_path / "rows.npy"))
    some = opened.take(np.arange(3, 50, 2))
    for given in ({"train": some}, {"train": some, "resident_bytes": 600}, {"validation": some}):
        with pytest.raises(InputError, match=r"in 2 of 24 rows \(rows 7, 31\)"):
            train(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": np.full((50, 4), 1e39)}, "train, as float32, holds 200"),
        ({"validation": VALIDATION[:1]}, "validation has one row"),
        ({"epochs": 2**31 - 1}, "epochs=2147483647 of 3 steps are more than"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds=nan"),
        ({"resident_bytes": float("inf")}, "resident_bytes=inf must be a number"),
    ],
)
def test_numbers_beyond_what_is_computed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(**given)


def test_swapped_dictionaries_are_found(run_folder: Path) -> None:
    folder = run_folder / "dictionaries"
    (folder / "0000").rename(folder / "aside")
    (folder / "0004").rename(folder / "0000")
    (folder / "aside").rename(folder / "0004")
    with pytest.raises(InputError, match="0000 is not of configuration 0"):
        train(run_folder)


@pytest.mark.parametrize("name", ["results", "history"])
def test_a_flipped_bit_in_a_table_is_found(run_folder: Path, name: str) -> None:
    path = run_folder / f"{name}.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start + column.total_compressed_size - 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.parquet is missing or damaged"):
        train(run_folder)

"""Rows that are streamed train as rows in memory do, in the same order."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import sae_jax
from sae_jax import (
    SAEConfig,
    bucket,
    data,
    distributed,
    ensemble,
    feeds,
    models,
    programs,
    steps,
    streaming,
    trainer,
)
from sae_jax.checkpoint import Checkpoints

ROWS = (np.random.default_rng(0).normal(size=(1000, 6)) * 3 + 1).astype(np.float32)
HELD_OUT = ROWS[:90]
SIZE = {"d_in": 6, "n_latents": 16, "batch_size": 32, "input_normalization": "zscore"}
CONFIGS = [SAEConfig(**SIZE, l1_weight=w, activation="relu") for w in (0.1, 1.0, 0.3)]


def test_the_weights_are_those_of_memory_bit_for_bit(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    rows = data.check_rows(data.open_rows(str(tmp_path / "x.npy")), "train")
    architecture, mesh = CONFIGS[0].architecture, distributed.member_mesh(3)
    normalizer = data.fit_normalizer(rows, "zscore")
    plan = streaming.Plan(rows=1000, batch_size=32, block=64, buffer_rows=96, data_seed=3)
    hyper = ensemble.stack_hyperparams(CONFIGS, mesh, np.float32, 3 * plan.steps)
    inputs, held_out = (models.normalize(jnp.asarray(x), normalizer) for x in (ROWS, HELD_OUT))
    trained = trainer.train_bucket(
        hyper, feeds.Stream(rows, plan, normalizer), architecture=architecture, mesh=mesh,
        epochs=3, data_seed=3, on_steps=lambda *_: None, validation=held_out,
    )  # fmt: skip
    epoch = jax.jit(
        lambda state, own, order: steps.take_steps(state, own, inputs, order, architecture)
    )
    for i in range(3):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], hyper)
        state = steps.init_member(own, architecture, np.float32)
        for number in range(3):
            state = epoch(state, own, plan.positions(number).astype(np.int32))
            assert trained.history.loss[i, number] == state.means.loss
            expected = steps.validation_loss(state.params, own, held_out, architecture)
            found = trained.history.validation_loss[i, number]
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        for name, value in vars(state.params).items():
            if value is not None:
                assert getattr(trained.params, name)[i].tobytes() == np.asarray(value).tobytes()


def test_rows_that_are_streamed_keep_their_precision(tmp_path: Path) -> None:
    """In a thread of its own, which knows nothing of the caller's mode."""
    rows = np.random.default_rng(1).normal(size=(200, 6))
    np.save(tmp_path / "x.npy", rows)
    plan = streaming.Plan(rows=200, batch_size=32, block=64, buffer_rows=96, data_seed=3)
    with jax.enable_x64(True):
        opened = data.check_rows(data.open_rows(str(tmp_path / "x.npy")), "train")
        stream = feeds.Stream(opened, plan, data.fit_normalizer(opened, "zscore"))
        found = np.concatenate([np.asarray(x)[order.ravel()] for x, order in stream.buffers(0, 1)])
        dtype = stream.dtype
    wanted = ((rows - rows.mean(axis=0)) / rows.std(axis=0))[plan.positions(0).ravel()]
    assert found.dtype == dtype == np.float64
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_an_epoch_that_is_cut_anywhere_resumes_bit_for_bit(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after checkpoints in the middle of a buffer, at its end, and at that of an epoch."""
    monkeypatch.setattr(bucket, "LONG_EPOCH", 0)
    wild = dataclasses.replace(CONFIGS[0], learning_rate=0.5)
    call = {
        "configs": [*CONFIGS, wild], "train": ROWS, "validation": HELD_OUT, "epochs": 5,
        "patience": 1, "progress": False,
        "resident_bytes": 10 * 32 * 24 if where == "disk" else None,  # buffers of five batches
    }  # fmt: skip
    expected = sae_jax.train(**call)
    assert expected.results["epochs"].nunique() > 1, "some stop early"
    monkeypatch.setattr(trainer, "CALL_SECONDS", 0)  # a batch a call

    class Killed(BaseException):
        pass

    kills = [1, 7, 30, 31, 34, 62, 90, 95]  # batches; 31 make an epoch
    began, save = [], Checkpoints.save

    def saved(self: Checkpoints, step: int, *more: Any) -> None:
        save(self, step, *more)
        kills.remove(step)
        raise Killed

    train_part = programs.train_part

    def part(*args: Any, **static: Any) -> Any:
        began.append(int(np.max(args[0].step)))
        return train_part(*args, **static)

    monkeypatch.setattr(Checkpoints, "save", saved)
    monkeypatch.setattr(Checkpoints, "due", lambda self: began[-1] + 1 in kills)
    monkeypatch.setattr(programs, "train_part", part)
    monkeypatch.setattr(programs, "forget", lambda: None)
    while kills:
        with pytest.raises(Killed):
            sae_jax.train(**call, workdir=tmp_path / "run")
    found = sae_jax.train(**call, workdir=tmp_path / "run")
    assert began == list(range(len(began))), "nothing was trained twice"
    assert found.results.equals(expected.results)
    assert found.history.equals(expected.history)
    for ours, theirs in zip(found.dictionaries, expected.dictionaries, strict=True):
        for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
            assert a.tobytes() == b.tobytes()


def test_rows_in_other_chunks_come_in_another_order_and_are_another_run(tmp_path: Path) -> None:
    call = {"configs": CONFIGS[:1], "epochs": 1, "progress": False, "workdir": tmp_path / "run"}
    rows = streaming.Rows(ROWS)
    rows.chunk_rows = 500
    sae_jax.train(train=rows, resident_bytes=6 * 32 * 24, **call)
    with pytest.raises(sae_jax.InputError, match="block: 500 there, None asked for"):
        sae_jax.train(train=streaming.Rows(ROWS), resident_bytes=6 * 32 * 24, **call)


def test_epochs_in_parts_are_those_trained_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"configs": CONFIGS, "train": ROWS, "validation": HELD_OUT, "epochs": 3, "patience": 2}
    whole = sae_jax.train(**call, progress=False)
    monkeypatch.setattr(bucket, "LONG_EPOCH", 0)
    parts = sae_jax.train(**call, progress=False)
    pd.testing.assert_frame_equal(parts.history, whole.history, rtol=1e-6)
    for ours, theirs in zip(parts.dictionaries, whole.dictionaries, strict=True):
        for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_members_that_stop_early_end_the_reading(tmp_path: Path) -> None:
    configs = [SAEConfig(**SIZE, learning_rate=1e30, l1_weight=0.1)]
    run = sae_jax.train(configs, ROWS, epochs=50, progress=False, resident_bytes=6 * 32 * 24)
    assert run.results["status"].tolist() == ["diverged"]
    assert run.results["epochs"].tolist() == [1]


def test_what_fits_is_read_into_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    rows = data.open_rows(str(tmp_path / "x.npy"))
    from_file = sae_jax.train(CONFIGS, rows, epochs=2, progress=False)
    from_array = sae_jax.train(CONFIGS, ROWS, epochs=2, progress=False)
    for ours, theirs in zip(from_file.dictionaries, from_array.dictionaries, strict=True):
        assert ours.params.encoder.tobytes() == theirs.params.encoder.tobytes()
        assert "resident_bytes" not in ours.provenance

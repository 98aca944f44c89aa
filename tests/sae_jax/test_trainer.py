"""Epochs, batches and chunks of `trainer.train_bucket`."""

import dataclasses
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import (
    InputError,
    SAEConfig,
    distributed,
    ensemble,
    feeds,
    models,
    programs,
    steps,
    trainer,
)
from sae_jax.workdir import Member, tables

CONFIGS = [
    SAEConfig(d_in=3, n_latents=7, batch_size=8, l1_weight=l1, seed=seed, learning_rate=0.01)
    for l1, seed in ((0.0, 0), (0.1, 1), (0.01, 0))
]
ROWS = np.random.default_rng(0).normal(size=(45, 3)).astype(np.float32)
NAMES = ("loss", "mse", "l1", "l0")


def train(
    configs: list[SAEConfig] = CONFIGS,
    rows: np.ndarray = ROWS,
    *,
    epochs: int = 7,
    data_seed: int = 0,
    told: list[int] | None = None,
) -> trainer.Trained:
    mesh = distributed.member_mesh(1)
    trained = trainer.train_bucket(
        ensemble.stack_hyperparams(configs, mesh, rows.dtype),
        jnp.asarray(rows),
        architecture=configs[0].architecture,
        mesh=mesh,
        epochs=epochs,
        data_seed=data_seed,
        on_steps=lambda done, loss: None if told is None else told.append(done),
    )
    return jax.tree.map(np.asarray, trained)


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def test_histories_that_the_host_does_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    size = trainer.history_bytes(3, 1000, 4)
    monkeypatch.setattr(distributed, "host_memory", lambda: 2 * size)
    trainer.check_histories(3, 1000, 4)
    with pytest.raises(InputError, match=r"epochs=1001 of 3 configurations .* fewer epochs"):
        trainer.check_histories(3, 1001, 4)


def _tables_of_histories(members: int, epochs: int) -> None:
    blank = steps.blank_history((), "f")
    history = jax.tree.map(lambda _: np.zeros((members, epochs), np.float32), blank)
    trained = [
        Member(None, {"k": 1}, jax.tree.map(lambda leaf, i=i: leaf[i], history))
        for i in range(members)
    ]
    tables(dict(enumerate(trained)))


def test_histories_take_what_is_stated() -> None:
    members, epochs = 2, 200_000
    _tables_of_histories(members, 1)  # imports pandas
    tracemalloc.start()  # NumPy and pandas tell it what they allocate
    try:
        _tables_of_histories(members, epochs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stated = trainer.history_bytes(members, epochs, 4)
    assert 0.9 * stated < peak < 1.05 * stated


def test_histories_are_not_on_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    real = trainer._blank_copy
    monkeypatch.setattr(
        trainer, "_blank_copy", lambda leaf, count: given.append(leaf) or real(leaf, count)
    )
    history = train(epochs=5).history
    assert history.loss.shape == (3, 5)
    assert not any(isinstance(leaf, jax.Array) for leaf in given if leaf.shape == (3, 5))
    assert len([leaf for leaf in given if leaf.shape == (3, 5)]) == 5


@pytest.mark.parametrize("rows", [8, 15, 45])
def test_an_epoch_takes_every_row_at_most_once_and_full_batches_only(rows: int) -> None:
    architecture = CONFIGS[0].architecture
    seen = []
    for epoch in range(3):
        order = np.asarray(steps.row_order(3, epoch, rows, architecture))
        assert order.shape == (rows // 8, 8)
        assert len(np.unique(order)) == order.size
        assert order.min() >= 0
        assert order.max() < rows
        seen.append(order.tobytes())
    assert len(set(seen)) == 3


def test_the_order_of_rows_depends_on_the_data_seed_and_the_epoch_alone() -> None:
    architecture = CONFIGS[0].architecture
    order = np.asarray(steps.row_order(3, 5, 45, architecture)).ravel()
    for other in (
        dataclasses.replace(architecture, n_latents=900, activation="topk", d_in=17),
        dataclasses.replace(architecture, batch_size=5),
    ):
        changed = np.asarray(steps.row_order(3, 5, 45, other)).ravel()
        np.testing.assert_array_equal(changed[: order.size], order[: changed.size])
    with jax.enable_x64(True):
        wide = np.asarray(steps.row_order(3, 5, 45, architecture)).ravel()
    np.testing.assert_array_equal(wide, order)
    for seed, epoch in ((4, 5), (3, 6), (5, 3)):
        changed = np.asarray(steps.row_order(seed, epoch, 45, architecture)).ravel()
        assert np.any(changed != order)


def test_rows_that_are_left_out_differ_between_epochs() -> None:
    architecture = CONFIGS[0].architecture
    taken = [set(np.ravel(steps.row_order(0, e, 45, architecture)).tolist()) for e in range(20)]
    assert all(len(rows) == 40 for rows in taken)
    assert set.union(*taken) == set(range(45))


@pytest.mark.parametrize("data_seed", [0, 1])
def test_training_itself_takes_each_row_once_and_drops_the_rest(data_seed: int) -> None:
    """Rows of sizes 1, 5, 25, ...: how often each was taken can be read off the sum of errors."""
    n_rows, epochs = 9, 6
    direction = np.random.default_rng(0).normal(size=3)
    rows = direction[None] * 5.0 ** np.arange(n_rows)[:, None]
    configs = [
        dataclasses.replace(
            c, batch_size=4, learning_rate=1e-30, init="tied", decoder_bias="none", l1_weight=0.0
        )
        for c in CONFIGS[:2]
    ]
    with jax.enable_x64(True):
        trained = train(configs, rows, epochs=epochs, data_seed=data_seed)
        left_out = []
        for i, config in enumerate(configs):
            params = models.init(np.uint32(config.seed), config.architecture, np.float64)
            z = np.maximum(rows @ np.asarray(params.encoder), 0)
            error = np.square(z @ np.asarray(params.decoder) - rows).sum(axis=1)
            totals = trained.history.loss[i] * 8 / error[0]  # base 25, one digit a row
            digits = [np.floor(totals / 25.0**row + 1e-3) % 25 for row in range(n_rows)]
            np.testing.assert_array_equal(np.sum(digits, axis=0), np.full(epochs, 8))
            assert np.max(digits) == 1
            left_out.append(np.argmin(digits, axis=0).tolist())
    assert left_out[0] == left_out[1], "all members see the same batches"
    assert len(set(left_out[0])) > 1


def test_another_data_seed_gives_another_training_and_the_same_one_the_same() -> None:
    first, again, other = train(), train(), train(data_seed=1)
    assert_same_bits(again, first)
    assert np.all(first.history.loss != other.history.loss)


@pytest.mark.parametrize(
    ("longest", "seconds", "chunks"),
    [(1, 1.0, [1] * 7), (3, 1e9, [1, 3, 3]), (64, 0.0, [1] * 7), (64, 1e9, [1, 6]), (5, 1e9, None)],
)
def test_chunks_change_nothing(
    longest: int, seconds: float, chunks: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = train()
    monkeypatch.setattr(feeds, "MAX_CHUNK_EPOCHS", longest)
    monkeypatch.setattr(trainer, "CALL_SECONDS", seconds)
    told: list[int] = []
    trained = train(told=told)
    assert sum(told) == 7 * 5
    assert chunks is None or told == [5 * epochs for epochs in chunks]
    assert_same_bits(trained, usual)
    assert all(getattr(trained.history, name).shape == (3, 7) for name in NAMES)


def test_a_shorter_training_is_the_beginning_of_a_longer_one() -> None:
    short, long = train(epochs=3), train(epochs=7)
    for name in NAMES:
        beginning = getattr(long.history, name)[:, :3]
        np.testing.assert_array_equal(getattr(short.history, name), beginning)


def test_every_member_counts_its_own_steps_and_a_frozen_one_stops() -> None:
    mesh = distributed.member_mesh(1)
    configs = [*CONFIGS[:2], dataclasses.replace(CONFIGS[0], learning_rate=1e15)]
    hyper = ensemble.stack_hyperparams(configs, mesh, np.float32)
    architecture = CONFIGS[0].architecture
    states = programs.init_bucket(hyper, architecture=architecture, mesh=mesh, dtype=jnp.float32)
    assert states.optimizer.count.tolist() == [0, 0, 0]
    states, metrics = programs.train_chunk(
        states,
        hyper,
        jnp.asarray(ROWS),
        None,
        0,
        0,
        4,
        0,
        architecture=architecture,
        mesh=mesh,
        size=7,
    )
    assert states.optimizer.count.tolist() == [20, 20, 5]
    assert states.active.tolist() == [True, True, False]
    assert np.isfinite(metrics.loss[:2, :4]).all()
    frozen = jax.tree.map(lambda leaf: np.asarray(leaf)[2], states.params)
    states, _ = programs.train_chunk(
        states,
        hyper,
        jnp.asarray(ROWS),
        None,
        0,
        4,
        7,
        0,
        architecture=architecture,
        mesh=mesh,
        size=7,
    )
    assert states.optimizer.count.tolist() == [55, 55, 5]
    assert_same_bits(jax.tree.map(lambda leaf: np.asarray(leaf)[2], states.params), frozen)


def test_training_lowers_the_loss_and_l1_lowers_the_codes() -> None:
    configs = [dataclasses.replace(CONFIGS[0], l1_weight=l1) for l1 in (0.0, 1.0, 3.0)]
    history = train(configs, epochs=60).history
    assert np.all(history.loss[:, -1] < history.loss[:, 0])
    assert np.all(np.diff(history.l1[:, -1]) < 0)
    assert np.all(np.diff(history.mse[:, -1]) > 0)


@pytest.mark.filterwarnings("error")
def test_float64_training_warns_of_nothing() -> None:
    with jax.enable_x64(True):
        rows = ROWS[:44].astype(np.float64)
        assert train(CONFIGS, rows, epochs=2).params.encoder.dtype == np.float64

"""Warm-ups, schedules, clipping; early stopping and compaction."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sae_jax
from sae_jax import SAEConfig, ensemble, optim
from sae_jax.config import Architecture
from sae_jax.state import hyperparams

SIZE = {"d_in": 4, "n_latents": 12}
ROWS = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32)
HELD_OUT = np.random.default_rng(1).normal(size=(33, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        ("constant", lambda steps: optax.constant_schedule(1e-2)),
        ("linear", lambda steps: optax.linear_schedule(1e-2, 0, steps)),
        ("cosine", lambda steps: optax.cosine_decay_schedule(1e-2, steps)),
    ],
)
def test_schedules_are_those_of_optax(schedule: str, decay: object) -> None:
    config = SAEConfig(
        **SIZE, learning_rate=1e-2, lr_warmup=5, l1_weight=3.0, l1_warmup=10, schedule=schedule
    )
    hyper = hyperparams(config, jnp.float32, steps=40)
    after = decay(35)
    for step in range(40):
        now = optim.scheduled(hyper, jnp.int32(step), config.architecture)
        rate = 1e-2 * (step + 1) / 5 if step < 5 else float(after(step - 5))
        assert float(now.learning_rate) == pytest.approx(rate, rel=1e-5, abs=1e-8)
        assert float(now.l1_weight) == pytest.approx(3 * min(1, (step + 1) / 10), rel=1e-6)


def test_large_gradients_are_scaled_to_the_norm_and_small_ones_are_not() -> None:
    config = SAEConfig(**SIZE, clipping="norm", clip_norm=1.0)
    hyper = hyperparams(config, jnp.float32)
    params = sae_jax.models.init(jnp.uint32(0), config.architecture, jnp.float32)
    large = sae_jax.state.Params(*(p if p is None else p * 0 + 7 for p in vars(params).values()))
    moments = []
    for factor in (1.0, 1e-4):
        scaled = large.replace(
            **{k: None if v is None else v * factor for k, v in vars(large).items()}
        )
        _, state = optim.update(params, optim.ADAM.init(params), scaled, hyper, config.architecture)
        moments.append(np.sqrt(sum(float(np.sum(np.square(m / 0.1))) for m in
                                   vars(state.mu).values() if m is not None)))  # fmt: skip
    count = 4 * 12 * 2 + 12 + 4
    assert moments[0] == pytest.approx(1.0, rel=1e-4)
    assert moments[1] == pytest.approx(7e-4 * np.sqrt(count), rel=1e-4)


AXES = {"l1_weight": [0.1, 1.0], "seed": [0, 1, 2, 3], "learning_rate": [0.3, 3e-3]}  # by turns
CONFIGS = sae_jax.grid("vanilla", **SIZE, batch_size=16, **AXES)


def test_stopped_members_keep_their_best_weights() -> None:
    run = sae_jax.train(CONFIGS, ROWS, HELD_OUT, epochs=60, patience=4, progress=False)
    for i, row in run.results.iterrows():
        losses = run.history.query("member == @i")["validation_loss"].to_numpy()
        best = int(np.argmin(losses))
        assert row["best_epoch"] == best
        assert row["epochs"] == len(losses) == min(60, best + 4 + 1)
        dictionary, config = run.dictionaries[i], CONFIGS[i]
        z = dictionary.encode(HELD_OUT)
        error = np.square(dictionary.decode(z) - HELD_OUT).sum() + config.l1_weight * z.sum()
        assert error / len(HELD_OUT) == pytest.approx(losses[best], rel=1e-5)
    assert run.results["epochs"].nunique() > 2


def test_without_validation_the_training_loss_is_watched() -> None:
    run = sae_jax.train(CONFIGS[-2:], ROWS, epochs=60, patience=3, progress=False)
    losses = run.history.groupby("member")["loss"].apply(lambda loss: loss.to_numpy().argmin())
    assert run.results["best_epoch"].tolist() == losses.tolist()


def test_compaction_changes_nothing_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_jax.feeds, "MAX_CHUNK_EPOCHS", 3)
    sizes = []
    real = ensemble.take
    monkeypatch.setattr(
        ensemble, "take", lambda tree, rows, mesh: sizes.append(len(rows)) or real(tree, rows, mesh)
    )
    shrunk = sae_jax.train(CONFIGS, ROWS, HELD_OUT, epochs=60, patience=4, progress=False)
    assert sizes
    assert min(sizes) <= len(CONFIGS) / 2
    monkeypatch.setattr(ensemble, "compacted", lambda *args: None)
    whole = sae_jax.train(CONFIGS, ROWS, HELD_OUT, epochs=60, patience=4, progress=False)
    for a, b in zip(shrunk.dictionaries, whole.dictionaries, strict=True):
        assert a.params.encoder.tobytes() == b.params.encoder.tobytes()
        assert a.params.decoder.tobytes() == b.params.decoder.tobytes()
    assert shrunk.results.equals(whole.results)


@pytest.mark.parametrize("alive", range(1, 17))
def test_compacted_rows_hold_every_active_one(alive: int) -> None:
    active = np.zeros(16, bool)
    active[np.random.default_rng(alive).choice(16, alive, replace=False)] = True
    rows = ensemble.compacted(active, alive, 2)
    if alive > 8:
        assert rows is None
    else:
        assert set(rows) - {-1} == set(np.flatnonzero(active))
        assert len(rows) <= 8
        assert len(rows) % 2 == 0
        assert len(rows) < 2 * max(alive, 2)


def test_new_presets_are_as_published() -> None:
    topk = SAEConfig.preset("topk", **SIZE, k=3)
    assert (topk.pre_bias, topk.decoder_norm, topk.init) == ("tied", "unit", "tied")
    assert topk.auxiliary == "auxk"
    kendiukhov = SAEConfig.preset("kendiukhov", **SIZE, l1_weight=3)
    assert kendiukhov.architecture == Architecture(
        **SIZE, activation="relu", pre_bias="tied", decoder_norm="unit", reduction="mean",
        input_normalization="zscore", schedule="cosine", clipping="norm", batch_size=512,
    )  # fmt: skip
    assert (kendiukhov.learning_rate, kendiukhov.clip_norm) == (3e-4, 1.0)
    claye = SAEConfig.preset("claye", d_in=50, n_latents=1000, k=16)
    assert (claye.decoder_bias, claye.pre_bias, claye.k_aux) == ("none", "none", 512)
    assert claye.batch_size == 1024
    assert dataclasses.replace(claye, batch_size=8).architecture.batch_size == 8

"""Autoencoders of the simulation beside a plain torch loop; early stopping, seeds, shapes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.simulation import autoencoder as ae
from experiments.simulation import fitting
from sae_jax import InputError

ROWS = np.random.default_rng(0).poisson(2, (60, 6)).astype(np.float32)
TRAIN, HELD_OUT = ROWS[:48], ROWS[48:]
RECIPE = ae.Recipe(learning_rate=1e-2, batch_size=16, weight_decay=1e-2, epochs=4, patience=None)


def start(dims: list[int], seed: int, rectified: bool = False) -> ae.AutoEncoder:
    return ae.AutoEncoder(dims, rectified=rectified, rngs=nnx.Rngs(seed))


def arrays(model: ae.AutoEncoder) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize(
    ("dims", "recipe", "rectified"),
    [
        ([6, 3], dataclasses.replace(RECIPE, batch_size=None, weight_decay=0.0, epochs=8), True),
        ([6, 5, 4, 2], RECIPE, False),
    ],
)
def test_training_is_that_of_a_torch_loop(
    dims: list[int], recipe: ae.Recipe, rectified: bool
) -> None:
    torch = pytest.importorskip("torch")
    fitted = fitting.fit(
        dims, TRAIN, HELD_OUT, recipe, [3], rectified=rectified, data_seed=7, chunk=2
    )

    modules = []
    for part in ("encoder", "decoder"):
        layers = list(getattr(start(dims, 3, rectified), part))
        for number, layer in enumerate(layers):
            linear = torch.nn.Linear(*layer.kernel.shape)
            with torch.no_grad():
                linear.weight.copy_(torch.tensor(np.asarray(layer.kernel[...])).T)
                linear.bias.copy_(torch.tensor(np.asarray(layer.bias[...])))
            modules += [linear] + [torch.nn.ReLU()] * (number < len(layers) - 1)
    model = torch.nn.Sequential(*modules, *([torch.nn.ReLU()] * rectified))
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    loss_of = torch.nn.MSELoss()
    losses = []
    for epoch in range(recipe.epochs):
        order = np.arange(48)
        if recipe.batch_size is not None:
            key = jax.random.fold_in(jax.random.key(7), epoch)
            order = np.asarray(jax.random.permutation(key, order))
        batches = []
        for rows in np.split(order, 48 // (recipe.batch_size or 48)):
            y = torch.tensor(TRAIN[rows])
            optimizer.zero_grad()
            loss = loss_of(model(y), y)
            loss.backward()
            optimizer.step()
            batches.append(loss.item())
        with torch.no_grad():
            y = torch.tensor(HELD_OUT)
            losses.append((np.mean(batches), loss_of(model(y), y).item()))
    found = [fitted.history[name][0] for name in ("train_loss", "validation_loss")]
    np.testing.assert_allclose(np.stack(found, axis=1), losses, rtol=2e-4)
    with torch.no_grad():
        wanted = model(torch.tensor(HELD_OUT)).numpy()
    np.testing.assert_allclose(fitted.models[0](jnp.asarray(HELD_OUT)), wanted, atol=2e-4)


def test_seeds_side_by_side_are_seeds_alone() -> None:
    together = fitting.fit([6, 4, 2], TRAIN, HELD_OUT, RECIPE, [0, 1])
    alone = fitting.fit([6, 4, 2], TRAIN, HELD_OUT, RECIPE, [1])
    np.testing.assert_allclose(
        together.history["train_loss"][1], alone.history["train_loss"][0], rtol=1e-5
    )
    assert not np.allclose(together.history["train_loss"][0], together.history["train_loss"][1])


def test_distinct_cells_with_their_numbers_are_all_cells() -> None:
    whole, held_out = np.repeat(TRAIN[:5], 4, axis=0), np.repeat(HELD_OUT[:3], 2, axis=0)
    recipe = dataclasses.replace(RECIPE, batch_size=None, epochs=6)
    plain = fitting.fit([6, 3], whole, held_out, recipe, [0])
    weights = (np.full(5, 4), np.full(3, 2))
    weighted = fitting.fit([6, 3], TRAIN[:5], HELD_OUT[:3], recipe, [0], weights=weights)
    for name, losses in plain.history.items():
        np.testing.assert_allclose(weighted.history[name], losses, rtol=1e-4)


def test_hidden_variables_and_their_connectivity_are_the_cells() -> None:
    random = np.random.default_rng(1)
    hidden, m = random.random((60, 3), np.float32), (random.random((3, 6)) < 0.5).astype(np.float32)
    made = fitting.fit([6, 4, 2], hidden[:48], hidden[48:], RECIPE, [0], readout=m)
    given = fitting.fit([6, 4, 2], (hidden @ m)[:48], (hidden @ m)[48:], RECIPE, [0])
    for name, losses in given.history.items():
        np.testing.assert_allclose(made.history[name], losses, rtol=1e-3)


def test_early_stopping_keeps_the_best_weights() -> None:
    # Held-out cells that contradict those trained on: the loss rises at some point.
    recipe = dataclasses.replace(RECIPE, epochs=200, patience=3, weight_decay=0.0)
    fitted = fitting.fit([6, 8, 4], TRAIN, HELD_OUT[::-1] * 2, recipe, [0, 1], chunk=10)
    for i in range(2):
        losses = fitted.history["validation_loss"][i]
        best = int(np.nanargmin(losses))
        assert fitted.best_epoch[i] == best
        trained = int(np.isfinite(losses).sum())
        assert trained == best + 1 + recipe.patience or trained == 200
        y = HELD_OUT[::-1] * 2
        value = np.mean((np.asarray(fitted.models[i](jnp.asarray(y))) - y) ** 2)
        np.testing.assert_allclose(value, losses[best], rtol=1e-4)
    assert np.isnan(fitted.history["validation_loss"]).any()


def test_dropout_is_for_training_alone() -> None:
    model = ae.AutoEncoder([6, 50, 2], dropout=0.5, rngs=nnx.Rngs(0))
    y = jnp.asarray(ROWS)
    np.testing.assert_array_equal(model(y), model(y))
    one, two = (model(y, jax.random.key(i)) for i in (0, 1))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(one, model(y, jax.random.key(0)))
    recipe = dataclasses.replace(RECIPE, dropout=0.1)
    dropped = fitting.fit([6, 4, 2], TRAIN, HELD_OUT, recipe, [0])
    whole = fitting.fit([6, 4, 2], TRAIN, HELD_OUT, RECIPE, [0])
    assert not np.allclose(dropped.history["train_loss"], whole.history["train_loss"])


def test_layers_start_as_torchs() -> None:
    model = start([400, 30, 5], 0)
    kernel = np.asarray(model.encoder[0].kernel[...])
    assert np.abs(kernel).max() <= 1 / 20
    np.testing.assert_allclose(kernel.std(), (1 / 20) / np.sqrt(3), rtol=0.02)
    assert 0 < np.abs(np.asarray(model.encoder[0].bias[...])).max() <= 1 / 20
    assert [leaf.shape for leaf in arrays(model) if leaf.ndim == 2] == [
        (5, 30), (30, 400), (400, 30), (30, 5),
    ]  # fmt: skip


def test_saved_and_loaded_are_the_same(tmp_path: Path) -> None:
    fitted = fitting.fit([6, 4, 2], TRAIN, HELD_OUT, RECIPE, [0, 1])
    fitting.save(tmp_path / "ae.npz", fitted)
    found = fitting.load(tmp_path / "ae.npz", [6, 4, 2])
    for one, two in zip(fitted.models, found.models, strict=True):
        np.testing.assert_array_equal(ae.latents(one, ROWS), ae.latents(two, ROWS))
    for name, losses in fitted.history.items():
        np.testing.assert_array_equal(found.history[name], losses)
    with pytest.raises(InputError, match="other dimensions"):
        fitting.load(tmp_path / "ae.npz", [6, 5, 2])


def test_the_papers_architectures() -> None:
    assert ae.dims(20_000, 150, 2, "wide") == [20_000, 5075, 150]  # 5075: appendix A.2.5
    assert ae.dims(20_000, 150, 2, "wide", "text") == [20_000, 10_075, 150]
    assert ae.dims(20_000, 20, 2, "narrow") == [20_000, 150, 20]
    assert ae.dims(20_000, 20, 6, "narrow") == [20_000, 1000, 150, 150, 150, 150, 20]
    assert ae.dims(20_000, 1000, 4, "narrow") == [20_000, 2000, 2000, 2000, 1000]
    assert ae.dims(20_000, 100, 4, "wide") == [20_000, 7525, 5050, 2575, 100]
    assert len(ae.RECIPES) == 22
    assert ae.RECIPES[150, 6, "wide"] == ae.Recipe(1e-5, 256, 0.1)
    assert {len(key) for key in ae.RECIPES} == {3}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ae.dims(100, 5, 1, "wide"), "depth=1"),
        (lambda: ae.dims(100, 5, 2, "broad"), "width='broad'"),
        (lambda: fitting.fit([5, 2], TRAIN, HELD_OUT, RECIPE, [0]), "6 variables"),
        (lambda: fitting.fit([6, 2], TRAIN[:9], HELD_OUT, RECIPE, [0]), "batch_size=16 of 9"),
        (lambda: fitting.fit([6, 2], TRAIN * np.nan, HELD_OUT, RECIPE, [0]), "finite"),
    ],
)
def test_what_is_refused(call: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()

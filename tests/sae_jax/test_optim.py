"""Training steps against PyTorch: its modules, its autograd, its Adam."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import torch

import sae_jax
from sae_jax import SAEConfig, models, optim, trainer
from sae_jax.config import CHOICES, Architecture
from sae_jax.state import Hyperparams, Params, TrainState, hyperparams

torch.set_num_threads(1)

D, N, K, ROWS, BATCH, STEPS = 4, 11, 3, 48, 8, 50
L1 = {"sum": 0.02, "mean": 0.05}
NAMES = ("activation", "pre_bias", "decoder_norm", "decoder_bias", "reduction", "init")
COMBINATIONS = [
    choice
    for choice in itertools.product(*(CHOICES[name] for name in NAMES))
    if not (choice[1] == "tied" and choice[3] == "none")
]


class TorchSAE(torch.nn.Module):
    """Written from the papers, in PyTorch's layout (weights [out, in])."""

    def __init__(self, params: Params, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        n, d = params.decoder.shape
        self.encoder = torch.nn.Linear(d, n, dtype=torch.float64)
        self.decoder = torch.nn.Linear(
            n, d, bias=config.decoder_bias == "free", dtype=torch.float64
        )
        with torch.no_grad():
            self.encoder.weight.copy_(torch.tensor(params.encoder.T))
            self.encoder.bias.copy_(torch.tensor(params.encoder_bias))
            self.decoder.weight.copy_(torch.tensor(params.decoder.T))
            if config.decoder_bias == "free":
                self.decoder.bias.copy_(torch.tensor(params.decoder_bias))
        if config.pre_bias == "free":
            self.pre_bias = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.pre_bias == "free":
            pre = self.encoder(x + self.pre_bias)
        elif self.config.pre_bias == "tied":
            pre = self.encoder(x - self.decoder.bias)
        else:
            pre = self.encoder(x)
        if self.config.activation == "topk":
            values, positions = torch.topk(pre, self.config.k, dim=-1)
            pre = torch.zeros_like(pre).scatter(-1, positions, values)
        z = torch.relu(pre)
        return self.decoder(z), z

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        reconstruction, z = self(x)
        if self.config.reduction == "mean":
            error = torch.nn.functional.mse_loss(reconstruction, x)
            return error + self.config.l1_weight * z.abs().mean()
        error = (reconstruction - x).pow(2).sum(dim=1).mean()
        return error + self.config.l1_weight * z.abs().sum(dim=1).mean()

    def params(self) -> dict[str, np.ndarray]:
        found = {
            "encoder": self.encoder.weight.T,
            "encoder_bias": self.encoder.bias,
            "decoder": self.decoder.weight.T,
            "decoder_bias": self.decoder.bias,
            "pre_bias": getattr(self, "pre_bias", None),
        }
        return {k: v.detach().numpy() for k, v in found.items() if v is not None}


def train_in_torch(
    params: Params, config: SAEConfig, rows: np.ndarray, order: np.ndarray
) -> tuple[dict[str, np.ndarray], list[float]]:
    model = TorchSAE(params, config)
    adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    losses = []
    for positions in order:
        adam.zero_grad()
        loss = model.loss(torch.tensor(rows[positions]))
        loss.backward()
        losses.append(loss.item())
        weight = model.decoder.weight  # [d_in, latents]: a latent's direction is a column
        if config.decoder_norm == "unit":
            with torch.no_grad():
                weight.grad -= (weight.grad * weight).sum(dim=0, keepdim=True) * weight
        adam.step()
        if config.decoder_norm == "unit":
            with torch.no_grad():
                weight /= weight.norm(dim=0, keepdim=True)
    return model.params(), losses


def found_params(params: Params) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in vars(params).items() if v is not None}


# Quick to compile: what is computed stays the same, how fast does not matter here.
@functools.partial(
    jax.jit,
    static_argnames="architecture",
    compiler_options={"xla_backend_optimization_level": 0},
)
def train_here(
    state: TrainState,
    hyper: Hyperparams,
    rows: np.ndarray,
    order: np.ndarray,
    architecture: Architecture,
) -> tuple[TrainState, jax.Array]:
    state, metrics = jax.lax.scan(
        lambda state, at: trainer.step(state, hyper, rows[at], architecture), state, order
    )
    return state, metrics.loss


@pytest.mark.parametrize("choice", COMBINATIONS, ids="-".join)
def test_fifty_steps_equal_pytorch(choice: tuple[str, ...]) -> None:
    config = SAEConfig(
        d_in=D,
        n_latents=N,
        k=K if choice[0] == "topk" else None,
        l1_weight=L1[choice[4]],
        learning_rate=0.01,
        batch_size=BATCH,
        seed=1,
        **dict(zip(NAMES, choice, strict=True)),
    )
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, D)) @ rng.normal(size=(D, D)) + 0.5
    order = rng.integers(0, ROWS, (STEPS, BATCH))
    with jax.enable_x64(True):
        hyper = hyperparams(config, np.float64)
        begin = trainer.init_member(hyper, config.architecture, np.float64)
        # The start is all that `init` decides: leaving it out spares every second compilation.
        program = dataclasses.replace(config.architecture, init="torch")
        state, losses = train_here(begin, hyper, rows, order, architecture=program)
        start, params = jax.tree.map(np.asarray, (begin.params, state.params))
    assert int(state.optimizer.count) == STEPS
    expected, expected_losses = train_in_torch(start, config, rows, order)
    found = found_params(params)
    assert set(found) == set(expected)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    before = found_params(start)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-9, err_msg=name)
        assert np.abs(value - before[name]).max() > 0.05, f"{name} was hardly trained"
    norms = np.linalg.norm(params.decoder, axis=1)
    if config.decoder_norm == "unit":
        np.testing.assert_allclose(norms, np.ones(N), rtol=1e-12)
    else:
        assert np.abs(norms - 1).max() > 0.01


def test_the_first_step_of_adam_has_the_size_of_the_learning_rate() -> None:
    """The bias correction of a first step: m / sqrt(v) is the sign of the gradient."""
    config = SAEConfig(d_in=2, n_latents=3, learning_rate=0.25)
    params = Params(
        encoder=np.zeros((2, 3), np.float32),
        encoder_bias=np.zeros(3, np.float32),
        decoder=np.zeros((3, 2), np.float32),
        decoder_bias=np.zeros(2, np.float32),
        pre_bias=None,
    )
    gradient = jax.tree.map(lambda p: np.full(p.shape, -3.0, p.dtype), params)
    hyper = hyperparams(config, np.float32)
    updated, state = optim.update(
        params, optim.ADAM.init(params), gradient, hyper, config.architecture
    )
    for leaf in jax.tree.leaves(updated):
        np.testing.assert_allclose(leaf, np.full(leaf.shape, 0.25), rtol=1e-4)
    assert int(state.count) == 1


def test_a_unit_decoder_keeps_the_radial_gradient_out_of_the_moments() -> None:
    config = SAEConfig(d_in=2, n_latents=2, decoder_norm="unit", learning_rate=0.1)
    decoder = np.asarray([[1, 0], [0.6, 0.8]], np.float32)
    params = Params(
        encoder=np.zeros((2, 2), np.float32),
        encoder_bias=np.zeros(2, np.float32),
        decoder=decoder,
        decoder_bias=np.zeros(2, np.float32),
        pre_bias=None,
    )
    zero = jax.tree.map(np.zeros_like, params)
    hyper = hyperparams(config, np.float32)
    radial = zero.replace(decoder=decoder * 7)
    updated, state = optim.update(
        params, optim.ADAM.init(params), radial, hyper, config.architecture
    )
    np.testing.assert_allclose(state.mu.decoder, np.zeros((2, 2)), atol=1e-6)
    tangent = zero.replace(decoder=np.asarray([[5, 2], [-1.6, 1.2]], np.float32))
    updated, state = optim.update(
        params, optim.ADAM.init(params), tangent, hyper, config.architecture
    )
    np.testing.assert_allclose(state.mu.decoder, 0.1 * np.asarray([[0, 2], [-1.6, 1.2]]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(updated.decoder, axis=1), [1, 1], rtol=1e-6)


def test_members_of_a_sweep_equal_pytorch_on_the_same_batches() -> None:
    """The whole way through `sae_jax.train`; every member is given the batches of `row_order`."""
    configs = [
        SAEConfig(
            d_in=D, n_latents=N, activation="topk", batch_size=BATCH, learning_rate=rate, k=k,
            seed=seed, l1_weight=l1, input_normalization="zscore",
        )
        for k, l1, rate, seed in ((K, 0, 1e-2, 0), (7, 0.1, 1e-3, 7), (N, 0.01, 3e-2, 7))
    ]  # fmt: skip
    rows = np.random.default_rng(0).normal(size=(43, D)) * [1, 2, 3, 4] + 5
    epochs, steps = 4, 43 // BATCH
    with jax.enable_x64(True):
        architecture = configs[0].architecture
        run = sae_jax.train(configs, rows, epochs=epochs, data_seed=11, progress=False)
        orders = [np.asarray(trainer.row_order(11, e, 43, architecture)) for e in range(epochs)]
        starts = [models.init(np.uint32(c.seed), architecture, np.float64) for c in configs]
    normal = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    for i, (config, start) in enumerate(zip(configs, starts, strict=True)):
        start = jax.tree.map(np.asarray, start)
        expected, losses = train_in_torch(start, config, normal, np.concatenate(orders))
        dictionary = run.dictionaries[i]
        assert dictionary is not None
        found = found_params(dictionary.params)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-9, err_msg=name)
        means = np.reshape(losses, (epochs, steps)).mean(axis=1)
        history = run.history.query("member == @i").sort_values("epoch")
        np.testing.assert_allclose(history["loss"], means, rtol=1e-9)
        assert run.results["train_loss"][i] == pytest.approx(means[-1], rel=1e-9)

"""Training steps against PyTorch: its modules, its autograd, its Adam, in float64."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
import torch

import sae_jax
from sae_jax import SAEConfig, models, steps
from sae_jax.config import CHOICES, Architecture
from sae_jax.state import Hyperparams, Params, TrainState, hyperparams
from tests.sae_jax.covering import covering

torch.set_num_threads(1)

D, N, K, ROWS, BATCH, STEPS = 4, 11, 3, 48, 8, 50
WEIGHT = {"sum": 0.02, "mean": 0.05}
THRESHOLD, WIDTH, DEAD_AFTER = 0.2, 0.4, 2
NAMES = ("activation", "pre_bias", "decoder_norm", "decoder_bias", "reduction", "auxiliary")
COMBINATIONS = [
    choice
    for choice in itertools.product(*(CHOICES[name] for name in NAMES))
    if not (choice[1] == "tied" and choice[3] == "none")
    and not (choice[0] == "gated" and choice[5] == "auxk")
]
COMBINATIONS = covering(COMBINATIONS, strength=3)


class JumpReLU(torch.autograd.Function):
    """Rajamanoharan et al. 2024, appendix J, from their pseudo-code."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, threshold = ctx.saved_tensors
        rectangle = ((x - threshold) / WIDTH > -0.5) & ((x - threshold) / WIDTH < 0.5)
        return (x > threshold) * g, (-(threshold / WIDTH) * rectangle * g).sum(dim=0)


class Step(torch.autograd.Function):
    """1 above the threshold; the same place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, threshold)
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, threshold = ctx.saved_tensors
        rectangle = ((x - threshold) / WIDTH > -0.5) & ((x - threshold) / WIDTH < 0.5)
        return torch.zeros_like(x), (-(1 / WIDTH) * rectangle * g).sum(dim=0)


def keep_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    top = torch.topk(values, k, dim=-1)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)


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
        for name in ("pre_bias", "log_threshold", "magnitude_gain", "magnitude_bias"):
            value = getattr(params, name)
            if value is not None:
                setattr(self, name, torch.nn.Parameter(torch.tensor(value)))
        self.idle = torch.zeros(n, dtype=torch.int64)
        self.smallest: list[float] = []

    def pre(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.pre_bias == "free":
            return self.encoder(x + self.pre_bias)
        if self.config.pre_bias == "tied":
            return self.encoder(x - self.decoder.bias)
        return self.encoder(x)

    def codes(self, pre: torch.Tensor) -> torch.Tensor:
        match self.config.activation:
            case "topk":
                return torch.relu(keep_largest(pre, self.config.k))
            case "batch_topk":
                flat = keep_largest(torch.relu(pre).flatten(), self.config.k * len(pre))
                return flat.reshape(pre.shape)
            case "jump_relu":
                return JumpReLU.apply(pre, self.log_threshold.exp())
            case "gated":  # magnitudes by the same directions, rescaled: exp(r) * W
                product = pre - self.encoder.bias
                magnitude = torch.relu(self.magnitude_gain.exp() * product + self.magnitude_bias)
                return (pre > 0) * magnitude
            case _:
                return torch.relu(pre)

    def reconstructions(self, z: torch.Tensor) -> list[torch.Tensor]:
        if self.config.nesting == "none":
            return [self.decoder(z)]
        found = []
        for level in reversed(range(self.config.levels)):
            first = torch.arange(N) < -(-N // 2**level)
            found.append(self.decoder(torch.where(first, z, 0.0)))
        return found

    def loss(self, x: torch.Tensor, l1_weight: float | None = None) -> torch.Tensor:
        config, rows = self.config, len(x)
        l1_weight = config.l1_weight if l1_weight is None else l1_weight
        d, n = (D, N) if config.reduction == "mean" else (1, 1)
        pre = self.pre(x)
        z = self.codes(pre)
        errors = [(x - part).pow(2).sum() / rows / d for part in self.reconstructions(z)]
        loss = sum(errors) / len(errors)
        if config.activation == "relu":
            loss = loss + l1_weight * z.abs().sum() / rows / n
        if config.activation == "gated":
            gate = torch.relu(pre)
            loss = loss + l1_weight * gate.sum() / rows / n
            weight, bias = self.decoder.weight.detach(), self.decoder.bias
            bias = None if bias is None else bias.detach()
            through_gate = torch.nn.functional.linear(gate, weight, bias)
            loss = loss + (x - through_gate).pow(2).sum() / rows / d
        if config.activation == "jump_relu":
            l0 = Step.apply(pre, self.log_threshold.exp()).sum() / rows
            if config.sparsity_control == "target_l0":
                loss = loss + config.l0_weight * (l0 / config.target_l0 - 1) ** 2
            else:
                loss = loss + config.l0_weight * l0 / n
        dead = self.idle >= config.dead_steps
        if config.auxiliary == "auxk" and dead.any():
            alone = keep_largest(torch.where(dead, torch.relu(pre), 0.0), config.k_aux)
            left = (x - self.decoder(z)).detach() - alone @ self.decoder.weight.T
            loss = loss + config.aux_weight * left.pow(2).sum() / rows / d
        fired = (z > 0).any(dim=0)
        self.idle = torch.where(fired, 0, self.idle + 1)
        self.smallest.append(z[z > 0].min().item())
        self.l0 = (z > 0).sum().item() / rows
        return loss

    def params(self) -> dict[str, np.ndarray]:
        found = {
            "encoder": self.encoder.weight.T,
            "encoder_bias": self.encoder.bias,
            "decoder": self.decoder.weight.T,
            "decoder_bias": self.decoder.bias,
        }
        for name in ("pre_bias", "log_threshold", "magnitude_gain", "magnitude_bias"):
            found[name] = getattr(self, name, None)
        found = {k: v.detach().numpy() for k, v in found.items() if v is not None}
        if self.config.activation == "batch_topk":  # fewer batches than it goes back to: their mean
            found["log_threshold"] = np.log([np.mean(self.smallest)])
        return found


def train_in_torch(
    params: Params, config: SAEConfig, rows: np.ndarray, order: np.ndarray
) -> tuple[dict[str, np.ndarray], list[float]]:
    model = TorchSAE(params, config)
    matrices = [model.encoder.weight, model.decoder.weight]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others}]
    adam = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)
    losses, log_factor = [], 0.0
    for positions in order:
        adam.zero_grad()
        loss = model.loss(torch.tensor(rows[positions]), config.l1_weight * np.exp(log_factor))
        loss.backward()
        losses.append(loss.item())
        if config.sparsity_control == "target_l0":
            log_factor += 0.005 * np.clip(np.log(model.l0 / config.target_l0), -1, 1)
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
        lambda state, at: steps.step(state, hyper, rows[at], architecture), state, order
    )
    return state, metrics.loss


def assert_equal_to_torch(config: SAEConfig) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, D)) @ rng.normal(size=(D, D)) + 0.5
    # No row twice in a batch: ties at the k-th largest are kept here and broken there.
    order = np.stack([rng.permutation(ROWS)[:BATCH] for _ in range(STEPS)])
    with jax.enable_x64(True):
        hyper = hyperparams(config, np.float64)
        begin = steps.init_member(hyper, config.architecture, np.float64)
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


def config_of(**fields: object) -> SAEConfig:
    activation, reduction = fields["activation"], fields.get("reduction", "sum")
    weight = {"relu": "l1_weight", "gated": "l1_weight", "jump_relu": "l0_weight"}.get(activation)
    if activation in ("topk", "batch_topk"):
        fields["k"] = K
    if fields.get("auxiliary") == "auxk":
        fields |= {"k_aux": 2, "dead_steps": DEAD_AFTER, "aux_weight": 0.5}
    if weight is not None:
        fields[weight] = WEIGHT[reduction]
    size = {"d_in": D, "n_latents": N, "batch_size": BATCH, "learning_rate": 0.01, "seed": 1}
    kernel = {"bandwidth": WIDTH, "initial_threshold": THRESHOLD}
    return SAEConfig(**size, **kernel, **fields)


@pytest.mark.parametrize("choice", COMBINATIONS, ids="-".join)
def test_fifty_steps_equal_pytorch(choice: tuple[str, ...]) -> None:
    init = ("torch", "tied")[COMBINATIONS.index(choice) % 2]
    assert_equal_to_torch(config_of(init=init, **dict(zip(NAMES, choice, strict=True))))


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "relu", "decay": "decoupled", "weight_decay": 0.3},
        {"activation": "relu", "nesting": "matryoshka", "levels": 3},
        {"activation": "batch_topk", "nesting": "matryoshka", "levels": 4, "reduction": "mean"},
        {"activation": "topk", "nesting": "matryoshka", "levels": 3, "auxiliary": "auxk"},
        {"activation": "relu", "sparsity_control": "target_l0", "target_l0": 1.5},
        {"activation": "gated", "sparsity_control": "target_l0", "target_l0": 2.5},
        {"activation": "jump_relu", "sparsity_control": "target_l0", "target_l0": 2.0},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_fifty_steps_with_other_choices_equal_pytorch(fields: dict[str, object]) -> None:
    assert_equal_to_torch(config_of(**fields))


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
    epochs, batches = 4, 43 // BATCH
    with jax.enable_x64(True):
        architecture = configs[0].architecture
        run = sae_jax.train(configs, rows, epochs=epochs, data_seed=11, progress=False)
        orders = [np.asarray(steps.row_order(11, e, 43, architecture)) for e in range(epochs)]
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
        means = np.reshape(losses, (epochs, batches)).mean(axis=1)
        history = run.history.query("member == @i").sort_values("epoch")
        np.testing.assert_allclose(history["loss"], means, rtol=1e-9)
        assert run.results["train_loss"][i] == pytest.approx(means[-1], rel=1e-9)

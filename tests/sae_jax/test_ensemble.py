"""Who trains beside a member changes nothing about it: bit for bit under `lax.map`."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sae_jax import SAEConfig, distributed, ensemble, steps, trainer
from sae_jax.config import CHOICES, Architecture
from sae_jax.state import Hyperparams, Params, TrainState
from tests.sae_jax.covering import covering

EPOCHS = 5

ROWS = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32)
SIZE = {"d_in": 5, "n_latents": 12, "batch_size": 16}
RATES, SEEDS = [1e-2, 3e-3, 1e-2, 1e-3, 5e-2], [0, 0, 1, 2, 3]
MEMBERS = {
    "relu": [
        SAEConfig(**SIZE, learning_rate=rate, l1_weight=l1, seed=seed, pre_bias="free")
        for rate, l1, seed in zip(RATES, [0, 0.1, 1e-3, 1.0, 0.01], SEEDS, strict=True)
    ],
    "topk": [
        SAEConfig(
            **SIZE, activation="topk", k=k, learning_rate=rate, seed=seed, pre_bias="tied",
            decoder_norm="unit",
        )
        for rate, k, seed in zip(RATES, [1, 3, 12, 5, 2], SEEDS, strict=True)
    ],
}  # fmt: skip
NAMES = ("activation", "pre_bias", "decoder_norm", "auxiliary")


EVERY = [
    dict(zip(NAMES, choice, strict=True))
    for choice in covering(
        [
            choice
            for choice in itertools.product(*(CHOICES[name] for name in NAMES))
            if not (choice[0] == "gated" and choice[3] == "auxk")
        ],
        strength=2,
    )
]
EVERY += [
    {"activation": "batch_topk", "nesting": "matryoshka", "levels": 3, "clipping": "norm"},
    {"activation": "relu", "resampling": "bricken", "decoder_norm": "unit", "schedule": "cosine"},
    {"activation": "gated", "sparsity_control": "target_l0", "decay": "decoupled"},
    {"activation": "relu", "pre_bias": "tied", "center": "geometric_median"},
    {"activation": "jump_relu", "sparsity_control": "target_l0", "resampling": "bricken"},
]
every_choice = pytest.mark.parametrize(
    "choice", EVERY, ids=lambda c: "-".join(map(str, c.values()))
)


def members(choice: dict[str, Any]) -> list[SAEConfig]:
    """Three that differ in all that may be traced and that the choice has a use for."""
    traced: dict[str, list[Any]] = {"learning_rate": [1e-2, 3e-3, 3e-2], "seed": [0, 1, 2]}
    activation = choice["activation"]
    if activation in ("topk", "batch_topk"):
        traced["k"] = [1, 5, 3]
    elif activation == "jump_relu":
        traced |= {"l0_weight": [0.1, 0.01, 1.0], "initial_threshold": [0.3, 0.5, 0.1]}
    else:
        traced["l1_weight"] = [0.1, 1e-3, 1.0]
    if choice.get("auxiliary") == "auxk":
        traced |= {"k_aux": [3, 2, 5], "dead_steps": [2, 1, 3], "aux_weight": [0.1, 0.5, 1.0]}
    if choice.get("resampling") == "bricken":
        traced |= {"resample_every": [3, 5, 2], "dead_steps": [1, 2, 1]}
    if "sparsity_control" in choice:
        traced["target_l0"] = [2.0, 4.0, 3.0]
    if "decay" in choice:
        traced["weight_decay"] = [0.1, 1e-3, 1.0]
    return [
        SAEConfig(**SIZE, **choice, **dict(zip(traced, values, strict=True)))
        for values in zip(*traced.values(), strict=True)
    ]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """So many programs are compiled here that all together they would exhaust the memory's maps."""
    yield
    jax.clear_caches()


everywhere = pytest.mark.parametrize("kind", MEMBERS)


def cpus(devices: int) -> Mesh:
    assert len(jax.devices("cpu")) == 2, "conftest.py asks JAX for two devices"
    chosen = np.asarray(jax.devices("cpu")[:devices])
    return Mesh(chosen, ("member",), axis_types=(AxisType.Auto,))


def train(
    configs: Sequence[SAEConfig],
    mesh: Mesh | None = None,
    rows: np.ndarray = ROWS,
    on_steps: Callable[[int, float], None] = lambda done, loss: None,
    **changes: Any,
) -> trainer.Trained:
    """The bucket on the host, without the members that fill up the devices."""
    mesh = cpus(1) if mesh is None else mesh
    trained = trainer.train_bucket(
        ensemble.stack_hyperparams(configs, mesh, rows.dtype),
        jax.numpy.asarray(rows),
        architecture=configs[0].architecture,
        mesh=mesh,
        on_steps=on_steps,
        **{"epochs": EPOCHS, "data_seed": 4, **changes},
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(configs)], trained)


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def member(trained: trainer.Trained, i: int) -> trainer.Trained:
    return jax.tree.map(lambda leaf: leaf[i], trained)


@everywhere
@pytest.mark.parametrize("devices", [1, 2])
def test_alone_equals_in_company_bit_for_bit(kind: str, devices: int) -> None:
    configs = MEMBERS[kind]
    together = train(configs, cpus(devices))
    for i, config in enumerate(configs):
        assert_same_bits(member(together, i), member(train([config]), 0))
    weights = [member(together, i).params.encoder.tobytes() for i in range(len(configs))]
    assert len(set(weights)) == len(configs)
    assert not together.diverged.any()


@every_choice
@pytest.mark.usefixtures("forgotten")
def test_every_choice_alone_equals_in_company_bit_for_bit(choice: dict[str, Any]) -> None:
    configs = members(choice)
    together = train(configs, cpus(2))
    for i, config in enumerate(configs):
        assert_same_bits(member(together, i), member(train([config]), 0))
    weights = [member(together, i).params.encoder.tobytes() for i in range(len(configs))]
    assert len(set(weights)) == len(configs)
    assert not together.diverged.any()


# Quick to compile, which is most of the time here; what is computed stays the same.
quick = functools.partial(
    jax.jit,
    static_argnames=("architecture", "how"),
    compiler_options={"xla_backend_optimization_level": 0},
)


@quick
def mapped_steps(
    hyper: Hyperparams, rows: jax.Array, order: jax.Array, architecture: Architecture, how: str
) -> TrainState:
    def one(hyper: Hyperparams) -> TrainState:
        state = steps.init_member(hyper, architecture, rows.dtype)
        return steps.take_steps(state, hyper, rows, order, architecture)

    return jax.vmap(one)(hyper) if how == "vmap" else jax.lax.map(one, hyper)


@pytest.mark.parametrize("choice", EVERY[::2], ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.usefixtures("forgotten")
def test_every_choice_under_vmap_equals_lax_map_in_float64(choice: dict[str, Any]) -> None:
    """Forty steps of all members; 1e-9."""
    configs = members(choice)
    random = np.random.default_rng(0)
    order = np.stack([random.permutation(len(ROWS))[:16] for _ in range(40)])
    with jax.enable_x64(True):
        rows = jax.numpy.asarray(ROWS, np.float64)
        hyper = ensemble.stack_hyperparams(configs, cpus(1), np.float64, 40)
        both = [
            mapped_steps(hyper, rows, order, configs[0].architecture, how)
            for how in ("vmap", "map")
        ]
    for found, expected in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@everywhere
def test_order_of_members_does_not_matter(kind: str) -> None:
    configs = MEMBERS[kind]
    forward, backward = train(configs, cpus(2)), train(configs[::-1], cpus(2))
    for i in range(len(configs)):
        assert_same_bits(member(forward, i), member(backward, len(configs) - 1 - i))


@everywhere
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("position", [0, 4])
def test_a_diverging_member_is_frozen_and_the_others_do_not_notice(
    kind: str, devices: int, position: int
) -> None:
    configs = MEMBERS[kind]
    calm = train(configs, cpus(devices))
    wild = list(configs)
    wild[position] = dataclasses.replace(wild[position], learning_rate=1e15)
    trained = train(wild, cpus(devices))
    assert trained.diverged.tolist() == [i == position for i in range(5)]
    for i in range(5):
        if i != position:
            assert_same_bits(member(trained, i), member(calm, i))
    for values in vars(trained.history).values():
        assert np.isnan(values[position, 1:]).all()
    assert not np.isfinite(trained.history.loss[position, 0])


def test_all_members_may_diverge() -> None:
    configs = [dataclasses.replace(c, learning_rate=1e15) for c in MEMBERS["relu"]]
    assert train(configs).diverged.all()


@pytest.mark.filterwarnings("error")
def test_nobody_is_warned_of_an_empty_mean_when_all_diverge() -> None:
    configs = [dataclasses.replace(c, learning_rate=1e15) for c in MEMBERS["relu"]]
    train(configs)


def test_twins_are_equal_and_a_seed_is_of_the_initialisation_only() -> None:
    first = MEMBERS["relu"][0]
    other = dataclasses.replace(first, seed=9, name="another name")
    trained = train([first, first, other, first, other])
    assert_same_bits(member(trained, 1), member(trained, 0))
    assert_same_bits(member(trained, 3), member(trained, 0))
    assert_same_bits(member(trained, 4), member(trained, 2))
    assert np.any(trained.params.encoder[0] != trained.params.encoder[2])


def test_vmap_equals_lax_map_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = MEMBERS["topk"]
    rows = ROWS.astype(np.float64)
    with jax.enable_x64(True):
        mapped = train(configs, cpus(1), rows)
        jax.clear_caches()
        with monkeypatch.context() as patch:  # as an accelerator does
            patch.setattr(ensemble, "one_by_one", lambda mesh: False)
            patch.setattr(jax.lax, "map", None)
            vectorised = train(configs, cpus(1), rows)
        jax.clear_caches()
    assert not mapped.diverged.any()
    assert not vectorised.diverged.any()
    for name, value in vars(mapped.params).items():
        if value is not None:
            assert value.dtype == np.float64
            found = getattr(vectorised.params, name)
            np.testing.assert_allclose(found, value, rtol=0, atol=1e-9)
    np.testing.assert_allclose(vectorised.history.loss, mapped.history.loss, rtol=1e-9)


def test_buckets_gather_equal_architectures_in_order_of_appearance() -> None:
    relu, topk = MEMBERS["relu"], MEMBERS["topk"]
    mixed = [topk[0], relu[0], relu[1], topk[1], dataclasses.replace(relu[0], batch_size=8)]
    found = ensemble.buckets(mixed)
    assert list(found.values()) == [[0, 3], [1, 2], [4]]
    assert list(found) == [topk[0].architecture, relu[0].architecture, mixed[4].architecture]


def test_hyperparameters_are_filled_up_to_the_devices_with_the_last_member() -> None:
    hyper = ensemble.stack_hyperparams(MEMBERS["topk"], cpus(2), np.float32)
    assert hyper.k.tolist() == [1, 3, 12, 5, 2, 2]
    assert hyper.seed.tolist() == [0, 0, 1, 2, 3, 3]
    np.testing.assert_array_equal(hyper.learning_rate, np.float32([*RATES, RATES[-1]]))
    assert ensemble.stack_hyperparams(MEMBERS["topk"][:4], cpus(2), np.float32).k.shape == (4,)


def test_map_members_gives_each_member_its_own_and_all_the_shared() -> None:
    mesh = cpus(2)
    lifted = ensemble.map_members(lambda own, shared: (own["a"] + own["b"]) * shared, mesh)
    members = {"a": np.arange(6.0), "b": np.arange(6.0) * 10}
    found = jax.jit(lifted)(members, np.asarray([1.0, 2.0]))
    np.testing.assert_allclose(found, np.arange(6)[:, None] * [[11, 22]])


def test_a_mesh_has_no_more_devices_than_members() -> None:
    assert [distributed.member_mesh(n).size for n in (1, 2, 5)] == [1, 2, 2]


def test_params_of_a_bucket_have_the_member_axis_in_front() -> None:
    params: Params = train(MEMBERS["relu"], cpus(2)).params
    assert params.encoder.shape == (5, 5, 12)
    assert params.decoder.shape == (5, 12, 5)

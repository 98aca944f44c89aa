"""Dictionaries whose latents several devices share: the same numbers, and what is exchanged."""

import collections
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from jax.sharding import Mesh

import sae_jax
from sae_jax import InputError, SAEConfig, distributed, ensemble, metrics, programs
from sae_jax.config import Architecture
from sae_jax.distributed import Collective
from sae_jax.state import History, Hyperparams, TrainState

D, ROWS = 8, 16  # dimensions, rows of a batch
X = np.random.default_rng(0).normal(size=(80, D))
ORDER = np.random.default_rng(1).permutation(np.tile(np.arange(80), 2)).reshape(10, ROWS)

# Between them every choice that exchanges something, or must not.
CHOICES: dict[str, dict[str, Any]] = {
    "relu": {
        "activation": "relu", "l1_weight": 0.1, "sparsity_control": "target_l0", "target_l0": 3.0,
        "pre_bias": "tied", "decoder_norm": "unit", "init": "tied", "resampling": "bricken",
        "resample_every": 3, "dead_steps": 1,
    },
    "topk": {
        "activation": "topk", "k": 5, "pre_bias": "free", "auxiliary": "auxk", "k_aux": 3,
        "dead_steps": 2, "clipping": "norm", "decay": "decoupled", "weight_decay": 0.1,
        "n_latents": 1024,  # so wide that CPUs alone take its rows in blocks
    },
    "batch_topk": {"activation": "batch_topk", "k": 5, "nesting": "matryoshka", "levels": 3},
    "jump_relu": {
        "activation": "jump_relu", "l0_weight": 0.1, "sparsity_control": "target_l0",
        "target_l0": 4.0, "reduction": "mean",
    },
    "gated": {"activation": "gated", "l1_weight": 0.1, "decoder_bias": "none"},
}  # fmt: skip

# What is exchanged beyond single numbers: kind, entries -> how often. The reconstruction in all of
# them; the pre-bias's gradient D; L0 ROWS; of each bisection the largest, the positive, and a count
# in its loop, ROWS each.
EXCHANGED = {
    "relu": {
        ("all-reduce", ROWS * D): 1,
        ("all-reduce", D): 1,
        ("all-gather", 32): 1,  # which latents are dead, whose ranks decide on their rows
    },
    "topk": {
        ("all-reduce", ROWS * D): 2,  # what the dead make of the error
        ("all-reduce", D): 1,
        ("all-reduce", ROWS): 6,
    },
    "batch_topk": {("all-reduce", 3 * ROWS * D): 1, ("all-reduce", ROWS): 2},
    "jump_relu": {("all-reduce", ROWS * D): 1, ("all-reduce", ROWS): 1},
    # The gate's own reconstruction; and both again of the validation: of a batch, and of the 8 rows
    # that it leaves.
    "gated": {("all-reduce", ROWS * D): 4, ("all-reduce", 8 * D): 2},
}

# A device for each of two members; both devices for each of them.
MESHES = distributed.member_mesh(2), distributed.member_mesh(2, 2)

# Quick to compile; what is computed and exchanged stays the same.
QUICK = {"xla_backend_optimization_level": 0}


def members(choice: str) -> list[SAEConfig]:
    fields = {"n_latents": 32, **CHOICES[choice]}
    return [
        SAEConfig(d_in=D, batch_size=ROWS, learning_rate=rate, seed=seed, **fields)
        for seed, rate in enumerate((1e-2, 3e-2))
    ]


def started(choice: str, dtype: Any) -> tuple[TrainState, Hyperparams]:
    """Before the first step, on the host."""
    configs, mesh = members(choice), distributed.member_mesh(1)
    hyper = ensemble.stack_hyperparams(configs, mesh, dtype, len(ORDER))
    lowered = programs.init_bucket.lower(
        hyper, architecture=configs[0].architecture, mesh=mesh, dtype=dtype
    )
    return ensemble.local((lowered.compile(QUICK)(hyper), hyper))


def entries(collective: Collective) -> int:
    sizes = collective.shape.partition("[")[2].rstrip("]")
    return int(np.prod([int(size) for size in sizes.split(",") if size]))


def beyond_numbers(found: list[Collective]) -> dict[tuple[str, int], int]:
    kinds = {each.kind for each in found if entries(each) == 1}
    assert kinds <= {"all-reduce"}, "a single number is summed, never sent about"
    counted = collections.Counter((each.kind, entries(each)) for each in found)
    return {(kind, many): times for (kind, many), times in counted.items() if many > 1}


def lowered(choice: str, placed: Any, mesh: Mesh) -> tuple[Any, tuple]:
    """A buffer of a stream; for gated a chunk of epochs, with validation rows."""
    static = {"architecture": members(choice)[0].architecture, "mesh": mesh}
    if choice == "gated":
        given = (*placed, X, X[:24], *map(np.asarray, (0, 0, 2, 2)))
        return programs.train_chunk.lower(*given, size=2, **static), given
    given = (*placed, X, ORDER, *map(np.asarray, (0, len(ORDER), 0)))
    return programs.train_part.lower(*given, **static), given


@pytest.mark.parametrize("choice", CHOICES)
def test_shared_latents_train_alike_and_exchange_what_they_must(choice: str) -> None:
    """Ten steps in float64 against a device for each member, which exchange nothing; 1e-9."""
    results, exchanged = [], []
    with jax.enable_x64(True):
        states, hyper = started(choice, np.float64)
        for mesh in MESHES:
            program, given = lowered(choice, ensemble.put((states, hyper), mesh), mesh)
            compiled = program.compile(QUICK)
            found = compiled(*given)
            results.append(ensemble.local(found))
            exchanged.append(distributed.collectives(compiled.as_text()))
    trained = found[0] if choice == "gated" else found
    lies = trained.params.encoder.addressable_shards[0].data
    assert lies.shape == (2, D, members(choice)[0].n_latents // 2)
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert np.abs(ensemble.local(trained.params.decoder) - states.params.decoder).max() > 0.01
    assert exchanged[0] == []
    assert beyond_numbers(exchanged[1]) == EXCHANGED[choice]


def test_metrics_exchange_a_reconstruction_of_shared_latents_and_nothing_of_members() -> None:
    batches, counted = X.astype(np.float32).reshape(5, ROWS, D), np.ones((5, ROWS), bool)
    architecture = members("gated")[0].architecture
    exchanged = []
    for mesh in MESHES:
        states, hyper = ensemble.put(started("gated", np.float32), mesh)
        program = metrics._sums_of_members.lower(
            states.params, hyper, batches, counted, None, architecture=architecture, mesh=mesh
        )
        exchanged.append(distributed.collectives(program.compile(QUICK).as_text()))
    assert exchanged[0] == []
    assert beyond_numbers(exchanged[1]) == {("all-reduce", ROWS * D): 1}


def test_a_mesh_of_latents_gives_neighbours_to_a_dictionary() -> None:
    mesh = distributed.member_mesh(3, 2)
    assert dict(mesh.shape) == {"member": 1, "latent": 2}
    assert mesh.devices[0].tolist() == jax.devices()
    assert distributed.member_mesh(3, 1).axis_names == ("member",)


def test_exchanges_are_read_from_a_program() -> None:
    text = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%step (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %all-reduce.1 = (f32[16,8]{1,0}, f64[]) all-reduce(%x, %y), channel_id=1, to_apply=%sum
}

%until (p: (s32[], f32[16,8])) -> pred[] {
  %any = pred[16]{0} all-reduce-start(%p), channel_id=2, to_apply=%or
}

ENTRY %main.1 (p: f32[16,8]) -> f32[16,8] {
  %gathered = bf16[4,2]{0,1} all-gather(%p), channel_id=3, dimensions={0}
  %named.all-reduce = f32[2]{0} add(%gathered, %gathered)
  %while = (s32[], f32[16,8]) while(%t), condition=%until, body=%step
}
"""
    assert distributed.collectives(text) == [
        Collective("all-gather", "bf16[4,2]", 16, 0),
        Collective("all-reduce", "f32[16,8]", 512, 1),
        Collective("all-reduce", "f64[]", 8, 1),
        Collective("all-reduce", "pred[16]", 16, 1),
    ]


class StoppedError(Exception):
    """By the user."""


def swept(folder: Path, devices: int, stop_at: int | None = None) -> sae_jax.Run:
    configs = members("gated")

    def on_epochs(positions: np.ndarray, first: int, history: History) -> None:
        if stop_at is not None and first >= stop_at:
            raise StoppedError

    return sae_jax.train(
        configs, X.astype(np.float32), epochs=4, progress=False, workdir=folder,
        checkpoint_seconds=0, latent_devices=devices, on_epochs=on_epochs,
    )  # fmt: skip


def test_a_run_that_stopped_goes_on_with_shared_latents(tmp_path: Path) -> None:
    """Twenty steps in float32, 1e-5, of weights, losses and metrics."""
    whole = swept(tmp_path / "whole", 1)
    with pytest.raises(StoppedError):
        swept(tmp_path / "broken", 1, stop_at=1)
    found = swept(tmp_path / "broken", 2)
    for ours, theirs in zip(found.dictionaries, whole.dictionaries, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(found.history, whole.history, rtol=1e-5)
    pd.testing.assert_frame_equal(found.results, whole.results, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "devices", "said"),
    [
        ({}, 3, "latent_devices=3 must be an integer that divides the 2 devices of a process"),
        ({}, 0, "latent_devices=0 must be"),
        ({}, True, "latent_devices=True must be"),
        ({"n_latents": 31}, 2, "31 latents cannot be divided equally"),
        ({"nesting": "matryoshka", "levels": 4, "n_latents": 36}, 2, "take a multiple of 8"),
    ],
)
def test_what_cannot_be_shared_is_refused(fields: dict[str, Any], devices: Any, said: str) -> None:
    config = SAEConfig(**{"d_in": D, "n_latents": 32, "batch_size": ROWS, **fields})
    with pytest.raises(InputError, match=said):
        sae_jax.train(config, X.astype(np.float32), epochs=1, latent_devices=devices)


def test_it_is_decided_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = SAEConfig(d_in=512, n_latents=1024, batch_size=128).architecture
    wide = SAEConfig(d_in=512, n_latents=16384, batch_size=1024).architecture
    odd = SAEConfig(d_in=512, n_latents=16385, batch_size=1024).architecture

    def decided(architecture: Architecture, members: int, each: int = 1) -> int:
        return ensemble.devices_each(architecture, members, each, memory=80)

    assert [decided(wide, 1), decided(wide, 1, each=79)] == [1, 1]  # CPUs
    monkeypatch.setattr(distributed, "memories", lambda devices=1: 8 // devices)
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    monkeypatch.setattr(jax, "device_count", lambda: 16)  # of two processes
    assert [decided(narrow, members) for members in (1, 100)] == [1, 1]
    assert [decided(wide, members) for members in (1, 2, 3, 4, 8, 9, 100)] == [8, 8, 4, 4, 2, 1, 1]
    assert decided(odd, 1) == 1
    # One that a device of 10 bytes does not hold is shared, as widely as it must be.
    assert [decided(narrow, 100, each) for each in (10, 11, 40, 41, 81)] == [1, 2, 4, 8, 8]
    assert len(ensemble.split_to_fit(range(7), 11, 80, 1, memories=4)) == 2
    with pytest.raises(InputError, match="a dictionary of this size"):
        ensemble.split_to_fit([0], 11, 80, 1, memories=8)

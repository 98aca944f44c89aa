"""Shards of a grid by their cost, beside the best of all ways to split it."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from experiments import sharding
from sae_jax import InputError, SAEConfig

ROWS, EPOCHS = 1000, 5
SHAPES = [
    SAEConfig(d_in=8, n_latents=8, batch_size=16),
    SAEConfig(d_in=8, n_latents=4000),
    SAEConfig(d_in=8, n_latents=50_000),
    SAEConfig(d_in=8, n_latents=40_000, activation="topk", k=3),
    SAEConfig(d_in=8, n_latents=90_000, activation="topk", k=3, auxiliary="auxk", batch_size=1024),
]
GRIDS = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=30)


def ends(parts: list[list[int]], configs: list[SAEConfig]) -> list[float]:
    """When each shard ends: its programs compiled, its configurations trained."""
    return [
        sharding.COMPILE * len({configs[i].architecture for i in part})
        + sum(sharding.seconds(configs[i], ROWS, EPOCHS) for i in part)
        for part in parts
    ]


@given(GRIDS, st.integers(1, 30))
def test_every_configuration_is_in_one_shard_and_every_shard_has_some(
    configs: list[SAEConfig], shards: int
) -> None:
    if shards > len(configs):
        with pytest.raises(InputError, match=f"--num_shards={shards} is more than the"):
            sharding.split(configs, shards, ROWS, EPOCHS)
        return
    parts = sharding.split(configs, shards, ROWS, EPOCHS)
    assert len(parts) == shards
    assert all(part and part == sorted(part) for part in parts)
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(len(configs)))
    assert parts == sharding.split(configs, shards, ROWS, EPOCHS)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(SHAPES), min_size=3, max_size=6), st.integers(2, 3))
def test_no_other_way_ends_much_sooner(configs: list[SAEConfig], shards: int) -> None:
    found = max(ends(sharding.split(configs, shards, ROWS, EPOCHS), configs))
    best = min(
        max(ends([[i for i, at in enumerate(way) if at == s] for s in range(shards)], configs))
        for way in itertools.product(range(shards), repeat=len(configs))
    )
    assert best * (1 - 1e-9) <= found <= 1.25 * best


def test_programs_are_kept_together_where_compiling_them_takes_longest() -> None:
    configs = sae_jax.grid(
        "vanilla", d_in=4, n_latents=[8, 9, 10, 11, 12, 13, 14, 15], l1_weight=[0.1, 1],
        seed=[0, 1, 2, 3, 4, 5],
    )  # fmt: skip
    parts = sharding.split(configs, 4, ROWS, 1)
    held = [{configs[i].n_latents for i in part} for part in parts]
    assert [len(part) for part in parts] == [24] * 4
    assert sum(map(len, held)) == 8
    assert set.union(*held) == {8, 9, 10, 11, 12, 13, 14, 15}


def test_a_program_is_cut_evenly_where_training_it_takes_longest() -> None:
    configs = sae_jax.grid("vanilla", d_in=4, n_latents=4000, l1_weight=1, seed=list(range(12)))
    for shards in (2, 3, 4, 6, 12):
        parts = sharding.split(configs, shards, ROWS, 1000)
        assert [len(part) for part in parts] == [12 // shards] * shards


# Config-steps a second in docs/benchmarks.md, of configurations that fill two cores.
MEASURED = [
    (SAEConfig(d_in=4, n_latents=400), 31_363),
    (SAEConfig(d_in=4, n_latents=400, activation="topk", k=40), 10_392),
    (SAEConfig(d_in=20, n_latents=10_000), 1 / 3.02e-3),
    (SAEConfig(d_in=20, n_latents=4096, activation="topk", k=410), 339),
    (SAEConfig(d_in=512, n_latents=2048, batch_size=512), 1 / 21.3e-3),
    (SAEConfig(d_in=512, n_latents=5000, batch_size=1024, activation="topk", k=80), 1 / 114e-3),
    (SAEConfig(d_in=4, n_latents=400, batch_size=2048), 534),
]


def test_costs_are_those_that_were_measured() -> None:
    for config, rate in MEASURED:
        step = sharding.seconds(config, config.batch_size, 1)
        assert 1 / 2 < step * rate < 2, config


def test_shards_that_share_a_configuration_are_named() -> None:
    a, b, c = (Path(f"shard-00{i}-of-003") for i in range(3))
    sharding.check_apart({a: [0, 2], b: [1], c: [3]})
    with pytest.raises(InputError, match=r"000-of-003 and shard-002-of-003 both have .* 2"):
        sharding.check_apart({a: [0, 2], b: [1], c: [3, 2]})

import dataclasses
import json
import math
from typing import Any

import pytest

from sae_jax import PRESETS, Architecture, InputError, SAEConfig
from sae_jax.config import CHOICES, preset_fields

SIZE = {"d_in": 4, "n_latents": 20}
# Written out by hand: the fields that decide which program is compiled, and those that do not.
STATIC = {
    "d_in": 5,
    "n_latents": 21,
    "activation": "topk",
    "pre_bias": "free",
    "decoder_norm": "unit",
    "decoder_bias": "none",
    "init": "tied",
    "reduction": "mean",
    "input_normalization": "zscore",
    "center": "geometric_median",
    "nesting": "matryoshka",
    "levels": 2,
    "auxiliary": "auxk",
    "resampling": "bricken",
    "schedule": "cosine",
    "clipping": "norm",
    "decay": "decoupled",
    "batch_size": 64,
}
TRACED = {
    "learning_rate": 0.5, "lr_warmup": 3, "l1_weight": 0.5, "l1_warmup": 4, "k": 7, "k_aux": 5,
    "aux_weight": 0.1, "dead_steps": 9, "clip_norm": 2.0, "seed": 3, "name": "other",
    "l0_weight": 0.2, "l0_warmup": 3, "bandwidth": 0.1, "initial_threshold": 0.1,
    "resample_every": 7, "weight_decay": 0.1,
}  # fmt: skip
# A choice that k rules out, and its field.
CONTROL = {"sparsity_control": "target_l0", "target_l0": 2.5}


def config(**fields: Any) -> SAEConfig:
    return SAEConfig(**{**SIZE, **fields})


def test_vanilla_is_relu_without_pre_bias_norm_or_schedule() -> None:
    made = SAEConfig.preset("vanilla", **SIZE, l1_weight=0.1)
    assert made == config(
        activation="relu", pre_bias="none", decoder_norm="free", decoder_bias="free",
        init="torch", input_normalization="none", l1_weight=0.1, name="vanilla",
    )  # fmt: skip


def test_bricken_adds_a_free_pre_bias_to_vanilla() -> None:
    made = SAEConfig.preset("bricken", **SIZE, l1_weight=0.1)
    vanilla = SAEConfig.preset("vanilla", **SIZE, l1_weight=0.1)
    assert made == dataclasses.replace(vanilla, pre_bias="free", name="bricken")


def test_topk_schuster_has_no_l1() -> None:
    made = SAEConfig.preset("topk_schuster", **SIZE, k_percent=50)
    assert made == config(
        activation="topk", k=10, l1_weight=0.0, pre_bias="none", decoder_norm="free",
        decoder_bias="free", init="torch", name="topk_schuster",
    )  # fmt: skip


@pytest.mark.parametrize("n_latents", [1, 8, 20, 33, 199, 4000])
@pytest.mark.parametrize("percent", [0.1, 1, 5, 10, 20, 33.3, 50, 75, 100])
def test_k_percent_is_truncated_and_at_least_one(n_latents: int, percent: float) -> None:
    made = SAEConfig.preset("topk_schuster", d_in=4, n_latents=n_latents, k_percent=percent)
    assert made.k == max(1, int(n_latents * percent / 100))
    assert made.k == max(1, math.floor(n_latents * percent / 100))
    assert type(made.k) is int


@pytest.mark.parametrize("preset", ["claye", "topk", "topk_schuster", "batch_topk"])
def test_an_activation_without_k_needs_none(preset: str) -> None:
    made = SAEConfig.preset(preset, **SIZE, activation="relu", l1_weight=0.1)
    assert (made.activation, made.k) == ("relu", None)


@pytest.mark.parametrize("preset", PRESETS)
def test_any_field_may_be_given_beside_a_preset(preset: str) -> None:
    values = {"k_percent": 10, "k": 2, "l1_weight": 0.1, "l0_weight": 0.1, "target_l0": 3}
    needed = {name: values[name] for name in preset_fields(preset)[1]}
    made = SAEConfig.preset(preset, **SIZE, **needed, seed=9, decoder_norm="unit", batch_size=7)
    assert (made.seed, made.decoder_norm, made.batch_size) == (9, "unit", 7)


@pytest.mark.parametrize(
    ("preset", "fields", "message"),
    [
        ("vanila", {}, "unknown preset 'vanila'; there are vanilla, bricken, topk_schuster"),
        ("vanilla", {"d_in": 4, "n_latents": 8}, "'vanilla' needs l1_weight"),
        ("vanilla", {"n_latents": 8, "l1_weight": 0.1}, "'vanilla' needs d_in"),
        ("bricken", {"d_in": 4}, "'bricken' needs n_latents, l1_weight"),
        ("topk_schuster", SIZE, "'topk_schuster' needs k_percent"),
        ("topk_schuster", {**SIZE, "k": 3}, "'topk_schuster' needs k_percent"),
        ("topk_schuster", {**SIZE, "k_percent": 0}, "k_percent=0"),
        ("topk_schuster", {**SIZE, "k_percent": 101}, "k_percent=101"),
        ("topk_schuster", {**SIZE, "k_percent": math.nan}, "k_percent=nan"),
        ("vanilla", {**SIZE, "l1_weight": 0.1, "k": 3}, "k=3 has no meaning"),
        ("vanilla", {**SIZE, "l1_weight": 0.1, "l1": 3}, "no field l1;"),
        ("vanilla", {**SIZE, "l1_weight": 0.1, "k_percent": 3}, "no field k_percent;"),
    ],
)
def test_presets_refuse(preset: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SAEConfig.preset(preset, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({field: "nonsense"}, f"^{field}='nonsense' is not one of") for field in CHOICES],
        ({"activation": ["relu"]}, "^activation="),
        *[
            ({field: value}, f"^{field}={value!r} must be an integer at least 1")
            for field in ("d_in", "n_latents", "batch_size")
            for value in (0, -1, 2.0, "3", True, None)
        ],
        *[({"seed": value}, f"^seed={value!r}") for value in (-1, 2**32, 0.5, False, None)],
        *[
            ({"learning_rate": value}, "^learning_rate=.* must be finite and above 0")
            for value in (0, -1e-3, math.nan, math.inf)
        ],
        *[
            ({"l1_weight": value}, "^l1_weight=.* must be finite and at least 0")
            for value in (-1e-3, math.nan, math.inf)
        ],
        ({"activation": "topk"}, "needs k"),
        *[
            ({"activation": "topk", "k": value}, f"^k={value!r} must be an integer in 1 .. 20")
            for value in (0, 21, 2.0, True, "2")
        ],
        ({"k": 3}, "^k=3 has no meaning for activation='relu'"),
        ({"activation": "batch_topk"}, "activation='batch_topk' needs k"),
        ({"target_l0": 3}, "^target_l0=3 has no meaning for sparsity_control='none'"),
        *[
            ({**CONTROL, "l1_weight": 1, "target_l0": value}, "target_l0")
            for value in (None, 0, -1, 21, math.nan, "3", True)
        ],
        (CONTROL, "needs l1_weight above 0"),
        ({**CONTROL, "activation": "jump_relu"}, "needs l0_weight above 0"),
        ({**CONTROL, "activation": "topk", "k": 3}, "k decides the L0"),
        ({"center": "geometric_median"}, "center='geometric_median'.*there is none"),
        ({"activation": "gated", "auxiliary": "auxk"}, "auxk is not defined"),
        ({"nesting": "matryoshka", "levels": 6}, "levels=6: 20 latents .* at most 5"),
        ({"bandwidth": 0}, "^bandwidth=0.0 must be finite and above 0"),
        ({"resample_every": 0}, "^resample_every=0 must be an integer at least 1"),
        ({"pre_bias": "tied", "decoder_bias": "none"}, "pre_bias='tied'.*decoder_bias is 'none'"),
        ({"name": 3}, "^name=3 must be text"),
        ({"name": "a\ud800"}, r"^name='a\\ud800' holds half of a character"),
    ],
)
def test_configs_refuse_and_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**fields)


@pytest.mark.parametrize("field", ["learning_rate", "l1_weight"])
@pytest.mark.parametrize("value", ["1e-3", None])
def test_rates_that_are_no_numbers_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        config(**{field: value})


def test_k_beside_k_percent_is_refused() -> None:
    with pytest.raises(InputError, match="k"):
        SAEConfig.preset("topk_schuster", **SIZE, k_percent=50, k=3)


def test_bounds_are_inclusive() -> None:
    made = config(activation="topk", k=20, seed=2**32 - 1, l1_weight=0, batch_size=1)
    assert (made.k, made.seed) == (20, 2**32 - 1)
    assert config(d_in=1, n_latents=1, activation="topk", k=1).k == 1


@pytest.mark.parametrize(
    "made",
    [
        config(),
        config(**{**STATIC, **TRACED}),
        config(l1_weight=0.1, **CONTROL),
        SAEConfig.preset("topk_schuster", **SIZE, k_percent=7),
        SAEConfig.preset("bricken", **SIZE, l1_weight=1e-17),
    ],
)
def test_dictionary_of_fields_round_trips_through_json(made: SAEConfig) -> None:
    fields = json.loads(json.dumps(made.to_dict()))
    assert set(fields) == {*STATIC, *TRACED, *CONTROL}
    again = SAEConfig.from_dict(fields)
    assert again == made
    assert hash(again) == hash(made)


def test_from_dict_refuses_unknown_and_absent_fields() -> None:
    with pytest.raises(InputError, match=r"no field l1, wdith; it has d_in, "):
        SAEConfig.from_dict({**SIZE, "wdith": 3, "l1": 1})
    with pytest.raises(InputError, match="needs d_in and n_latents"):
        SAEConfig.from_dict({})


def test_architecture_holds_the_static_fields_and_no_others() -> None:
    base = config(activation="topk", k=3)
    assert {field.name for field in dataclasses.fields(base.architecture)} == {
        *STATIC,
        "sparsity_control",
    }
    assert type(base.architecture) is Architecture
    for field, value in TRACED.items():
        with_aux = dataclasses.replace(base, auxiliary="auxk")
        other = dataclasses.replace(with_aux, **{field: value})
        assert other != with_aux
        assert other.architecture == with_aux.architecture
        assert hash(other.architecture) == hash(with_aux.architecture)
    for field, value in STATIC.items():
        changes = {"activation": {"activation": "relu", "k": None}}.get(field, {field: value})
        if field == "center":
            changes["pre_bias"] = "free"
        other = dataclasses.replace(base, **changes)
        assert other.architecture != base.architecture


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().k = 3
    with pytest.raises(TypeError):
        SAEConfig(4, 20)


def test_preset_fields_lists_what_is_set_and_what_is_needed() -> None:
    assert preset_fields("topk_schuster") == ({"activation": "topk"}, ("k_percent",))

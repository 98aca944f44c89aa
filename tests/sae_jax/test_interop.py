import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from sae_jax import Dictionary, InputError, SAEConfig, interop
from sae_jax.config import CHOICES
from sae_jax.state import Normalizer, Params

D, N = 6, 17
X = (np.random.default_rng(1).normal(size=(200, D)) * 3 + 2).astype(np.float32)

# By hand: two rows of width 2, three latents.
HAND = {
    "W_enc": np.float32([[1, 0, 2], [0, 1, -1]]),
    "b_enc": np.float32([0, -1, 1]),
    "W_dec": np.float32([[1, 0], [0, 2], [3, 4]]),
    "b_dec": np.float32([1, 2]),
}
HAND_CFG = {
    "architecture": "standard", "d_in": 2, "d_sae": 3, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_pre"},
}  # fmt: skip
ROWS = np.float32([[1, 4], [3, 1]])


def build(**choices: Any) -> Dictionary:
    config = SAEConfig(d_in=D, n_latents=N, **choices)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    params = Params(
        encoder=draw(D, N),
        encoder_bias=draw(N),
        decoder=draw(N, D),
        decoder_bias=draw(D) if config.decoder_bias == "free" else None,
        pre_bias=draw(D) if config.pre_bias == "free" else None,
    )
    if config.activation in ("jump_relu", "batch_topk"):
        params = params.replace(log_threshold=draw(N if config.activation == "jump_relu" else 1))
    if config.activation == "gated":
        params = params.replace(magnitude_gain=draw(N), magnitude_bias=draw(N))
    normalizer = None
    if config.input_normalization != "none":
        normalizer = Normalizer(mean=draw(D), scale=np.abs(draw(D)) + np.float32(0.5))
    return Dictionary(config, params, normalizer, {"epochs": 3})


def write_saelens(folder: Path, tensors: dict[str, np.ndarray] = HAND, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(HAND_CFG | changes))
    safetensors.numpy.save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def write_learned(folder: Path, state: dict[str, Any], **trainer: Any) -> Path:
    torch = pytest.importorskip("torch")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    state = {
        name: torch.tensor(value) if isinstance(value, int | float) else torch.from_numpy(value)
        for name, value in state.items()
    }
    torch.save(state, folder / "ae.pt")
    return folder


VARIANTS = [
    {"activation": activation, "pre_bias": pre_bias, "input_normalization": normal, **extra}
    for activation, pre_bias, normal in itertools.product(
        CHOICES["activation"], ("none", "free", "tied"), ("none", "zscore")
    )
    for extra in ({}, {"decoder_bias": "none"})
    if not (extra and pre_bias == "tied")
]


def of(choices: dict[str, str]) -> Dictionary:
    return build(**choices, k=4 if choices["activation"] in ("topk", "batch_topk") else None)


@pytest.mark.parametrize("choices", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_to_saelens_and_back(choices: dict[str, str], tmp_path: Path) -> None:
    made = of(choices)
    interop.to_saelens(made, tmp_path / "d")
    back = interop.from_saelens(tmp_path / "d")
    folded = made.fold()
    z = folded.encode(X)
    if made.params.log_threshold is None:
        np.testing.assert_array_equal(back.encode(X), z)
    else:  # a threshold is written as itself, and kept as its logarithm
        np.testing.assert_allclose(back.encode(X), z, rtol=1e-6)
    np.testing.assert_array_equal(back.decode(z), folded.decode(z))
    np.testing.assert_allclose(z, made.encode(X), rtol=1e-5, atol=1e-5 * z.max())


def test_what_is_written_for_saelens(tmp_path: Path) -> None:
    made = build(activation="topk", k=4, decoder_bias="none")
    interop.to_saelens(made, tmp_path / "d")
    files = sorted(file.name for file in (tmp_path / "d").iterdir())
    assert files == ["cfg.json", "sae_weights.safetensors"]
    assert json.loads((tmp_path / "d/cfg.json").read_text()) == {
        "architecture": "topk", "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "none", "k": 4, "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": "6.0.0", "sae_lens_training_version": None,
            "sae_jax": {"config": made.config.to_dict(), "provenance": {"epochs": 3}},
        },
    }  # fmt: skip
    tensors = safetensors.numpy.load_file(tmp_path / "d/sae_weights.safetensors")
    assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    np.testing.assert_array_equal(tensors["W_enc"], made.params.encoder)
    np.testing.assert_array_equal(tensors["b_enc"], made.params.encoder_bias)
    np.testing.assert_array_equal(tensors["W_dec"], made.params.decoder)
    np.testing.assert_array_equal(tensors["b_dec"], np.zeros(D, np.float32))
    with pytest.raises(InputError, match="exists; a dictionary is written to a new folder"):
        interop.to_saelens(made, tmp_path / "d")


def test_a_folded_dictionary_written_for_saelens_by_hand(tmp_path: Path) -> None:
    params = Params(HAND["W_enc"], HAND["b_enc"], HAND["W_dec"], HAND["b_dec"], None)
    config = SAEConfig(d_in=2, n_latents=3, pre_bias="tied", input_normalization="zscore")
    made = Dictionary(config, params, Normalizer(np.float32([1, -1]), np.float32([2, 4])))
    interop.to_saelens(made, tmp_path / "d")
    tensors = safetensors.numpy.load_file(tmp_path / "d/sae_weights.safetensors")
    # b_enc - (mean / scale + b_dec) W_enc = [0, -1, 1] - [1.5, 1.75] W_enc
    np.testing.assert_array_equal(tensors["W_enc"], [[0.5, 0, 1], [0, 0.25, -0.25]])
    np.testing.assert_array_equal(tensors["b_enc"], [-1.5, -2.75, -0.25])
    np.testing.assert_array_equal(tensors["W_dec"], [[2, 0], [0, 8], [6, 16]])
    np.testing.assert_array_equal(tensors["b_dec"], [3, 7])


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, [[1, 3, 0], [3, 0, 6]]),
        ({"apply_b_dec_to_input": True}, [[0, 1, 0], [2, 0, 6]]),
        ({"architecture": "topk", "k": 1}, [[0, 3, 0], [0, 0, 6]]),
        # Pre-activations times the decoder's norms 1, 2, 5, then the largest.
        (
            {"architecture": "topk", "k": 1, "rescale_acts_by_decoder_norm": True},
            [[0, 6, 0], [0, 0, 30]],
        ),
    ],
)
def test_saelens_folders_by_hand(
    changes: dict[str, Any], codes: list[list[int]], tmp_path: Path
) -> None:
    read = Dictionary.from_pretrained(write_saelens(tmp_path / "d", **changes))
    np.testing.assert_allclose(read.encode(ROWS), codes, rtol=1e-6)
    unscaled = np.float32(codes)
    if "rescale_acts_by_decoder_norm" in changes:
        unscaled = unscaled / np.float32([1, 2, 5])
        assert read.config.decoder_norm == "unit"
    expected = unscaled @ HAND["W_dec"] + HAND["b_dec"]
    np.testing.assert_allclose(read.decode(np.float32(codes)), expected, rtol=1e-6)
    source = read.provenance["source"]
    assert source["library"] == "SAELens"
    assert source["cfg"]["metadata"]["hook_name"] == "blocks.3.hook_resid_pre"


def test_folders_of_saelens_before_6(tmp_path: Path) -> None:
    old = {
        "d_in": 2, "d_sae": 3, "dtype": "torch.float32", "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 1}, "normalize_activations": False, "sparsity": float("nan"),
    }  # fmt: skip
    folder = write_saelens(tmp_path / "d", HAND | {"scaling_factor": np.ones(3, np.float32)})
    (folder / "cfg.json").write_text(json.dumps(old))
    read = Dictionary.from_pretrained(folder)
    assert (read.config.activation, read.config.k, read.config.pre_bias) == ("topk", 1, "tied")
    np.testing.assert_array_equal(read.encode(ROWS), [[0, 1, 0], [0, 0, 6]])
    read.save(tmp_path / "ours")
    assert Dictionary.load(tmp_path / "ours").provenance == read.provenance


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    half = {name: value.astype(np.float16) for name, value in HAND.items()}
    read = Dictionary.from_pretrained(write_saelens(tmp_path / "d", half, dtype="float16"))
    assert read.params.encoder.dtype == np.float32
    np.testing.assert_array_equal(read.encode(ROWS), [[1, 3, 0], [3, 0, 6]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "transcoder"}, "'transcoder'; standard, topk, jumprelu, gated are"),
        ({"architecture": "jumprelu"}, "expected are .*threshold"),
        ({"architecture": "gated"}, "expected are .*b_gate"),
        ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu'"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"normalize_activations": True}, "normalize_activations=True"),
        ({"reshape_activations": "other"}, "reshape_activations='other'"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input='no'"),
        ({"architecture": "topk"}, "needs k"),
        ({"architecture": "topk", "k": 4}, "k=4 must be an integer in 1 .. 3"),
        ({"d_in": 3}, "expected are"),
        ({"d_sae": "3"}, "n_latents='3'"),
        ({"format": "sae_jax.Dictionary"}, "use Dictionary.load"),
    ],
)
def test_saelens_folders_that_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        interop.from_saelens(write_saelens(tmp_path / "d", **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_enc"), "expected are"),
        (lambda t: t.update(threshold=t["b_enc"]), "threshold"),
        (lambda t: t.update(W_dec=t["W_enc"]), "expected are"),
        (lambda t: t.update(scaling_factor=t["b_enc"]), "scaling_factor other than 1"),
        (lambda t: t.update(b_dec=np.float32([0, np.nan])), "NaN or infinite values in b_dec"),
    ],
)
def test_saelens_tensors_that_are_refused(
    change: Callable[[dict[str, np.ndarray]], Any], message: str, tmp_path: Path
) -> None:
    tensors = dict(HAND)
    change(tensors)
    with pytest.raises(InputError, match=message):
        interop.from_saelens(write_saelens(tmp_path / "d", tensors))


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither cfg\.json .* nor ae\.pt"):
        Dictionary.from_pretrained(tmp_path)
    folder = write_saelens(tmp_path / "d")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match="damaged"):
        Dictionary.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"sae_weights\.safetensors is missing"):
        Dictionary.from_pretrained(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(InputError, match=r"cfg\.json is damaged"):
        Dictionary.from_pretrained(folder)


def test_from_pretrained_reads_ours(tmp_path: Path) -> None:
    made = build(activation="topk", k=3, pre_bias="free", input_normalization="zscore")
    made.save(tmp_path / "d")
    read = Dictionary.from_pretrained(tmp_path / "d")
    assert read.config == made.config
    np.testing.assert_array_equal(read.encode(X), made.encode(X))


# dictionary_learning keeps matrices as torch.nn.Linear does: outputs times inputs.
LEARNED = {
    "encoder.weight": np.ascontiguousarray(HAND["W_enc"].T),
    "encoder.bias": HAND["b_enc"],
    "decoder.weight": np.ascontiguousarray(HAND["W_dec"].T),
}


def test_autoencoder_by_hand(tmp_path: Path) -> None:
    state = LEARNED | {"bias": HAND["b_dec"]}
    folder = write_learned(tmp_path / "d", state, dict_class="AutoEncoder", dict_size=3, lr=1e-3)
    plain = interop.from_dictionary_learning(folder, normalize_decoder=False)
    codes = np.float32([[0, 1, 0], [2, 0, 6]])
    np.testing.assert_array_equal(plain.encode(ROWS), codes)
    np.testing.assert_array_equal(plain.decode(codes), codes @ HAND["W_dec"] + HAND["b_dec"])
    assert plain.config.pre_bias == "tied"
    read = Dictionary.from_pretrained(folder)  # directions of norm 1, 2, 5 become unit
    np.testing.assert_allclose(read.encode(ROWS), codes * [1, 2, 5], rtol=1e-6)
    np.testing.assert_allclose(read.decode(read.encode(ROWS)), plain.decode(codes), rtol=1e-6)
    assert (plain.config.decoder_norm, read.config.decoder_norm) == ("free", "unit")
    assert read.provenance["source"]["config"]["trainer"]["lr"] == 1e-3


def test_autoencoder_topk_by_hand(tmp_path: Path) -> None:
    state = LEARNED | {"b_dec": HAND["b_dec"], "k": 1, "threshold": 0.7}
    trainer = {"dict_class": "AutoEncoderTopK", "k": 1, "activation_dim": 2}
    read = Dictionary.from_pretrained(write_learned(tmp_path / "d", state, **trainer))
    np.testing.assert_array_equal(read.encode(ROWS), [[0, 1, 0], [0, 0, 6]])
    old = LEARNED | {"b_dec": HAND["b_dec"]}  # versions that kept k in config.json only
    read = Dictionary.from_pretrained(write_learned(tmp_path / "old", old, **trainer))
    assert read.config.k == 1


@pytest.mark.parametrize(
    ("extra", "trainer", "message"),
    [
        ({}, {"dict_class": "GatedAutoEncoder"}, "expected are"),
        (
            {},
            {"dict_class": "JumpReluAutoEncoder"},
            "'JumpReluAutoEncoder'; AutoEncoder, AutoEncoderTopK",
        ),
        ({}, {"dict_class": "AutoEncoder"}, "expected are"),
        ({"bias": HAND["b_enc"]}, {"dict_class": "AutoEncoder"}, "expected are"),
        ({"bias": HAND["b_dec"]}, {"dict_class": "AutoEncoder", "dict_size": 4}, "dict_size=4"),
        ({"b_dec": HAND["b_dec"]}, {"dict_class": "AutoEncoderTopK"}, "needs k"),
        ({"b_dec": HAND["b_dec"], "k": 2}, {"dict_class": "AutoEncoderTopK", "k": 1}, "ae.pt 2"),
    ],
)
def test_dictionary_learning_folders_that_are_refused(
    extra: dict[str, Any], trainer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        Dictionary.from_pretrained(write_learned(tmp_path / "d", LEARNED | extra, **trainer))


def test_no_pickled_code_is_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    folder = write_learned(tmp_path / "d", LEARNED, dict_class="AutoEncoder")
    torch.save({"encoder.weight": Bomb()}, folder / "ae.pt")
    for content in (None, b"", b"not a zip"):
        if content is not None:
            (folder / "ae.pt").write_bytes(content)
        with pytest.raises(InputError, match="damaged, or holds more than tensors"):
            Dictionary.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], folder / "ae.pt")
    with pytest.raises(InputError, match="no state dict"):
        Dictionary.from_pretrained(folder)


def test_importing_it_loads_no_torch() -> None:
    command = "import sys, sae_jax.interop; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=120)


@pytest.mark.parametrize("choices", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_saelens_itself_gives_the_same_codes(choices: dict[str, str], tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    torch = pytest.importorskip("torch")
    made = of(choices)
    interop.to_saelens(made, tmp_path / "d")
    sae = sae_lens.SAE.load_from_disk(str(tmp_path / "d"))
    assert sae.cfg.metadata["sae_jax"]["config"] == made.config.to_dict()
    with torch.no_grad():
        codes = sae.encode(torch.from_numpy(X))
        out = sae.decode(codes).numpy()
    z = made.encode(X)
    np.testing.assert_allclose(codes.numpy(), z, rtol=1e-5, atol=1e-5 * z.max())
    ours = made.decode(z)
    np.testing.assert_allclose(out, ours, rtol=1e-5, atol=1e-5 * np.abs(ours).max())


def test_a_threshold_of_zero_or_less_is_a_relu(tmp_path: Path) -> None:
    tensors = HAND | {"threshold": np.float32([0, -1, 2])}
    made = interop.from_saelens(write_saelens(tmp_path / "d", tensors, architecture="jumprelu"))
    pre = ROWS @ HAND["W_enc"] + HAND["b_enc"]
    expected = np.where(pre > [[0, 0, 2]], pre, 0)
    np.testing.assert_allclose(made.encode(ROWS), expected)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "GatedAutoEncoder"])
def test_others_of_dictionary_learning_by_their_equations(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    tensors = {"encoder.weight": draw(N, D), "decoder.weight": draw(D, N)}
    if kind == "BatchTopKSAE":
        tensors |= {"encoder.bias": draw(N), "b_dec": draw(D)}
        scalars = {"threshold": 0.7, "k": 3}
        pre = (X - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
        expected, bias = np.where(pre > 0.7, pre, 0), tensors["b_dec"]
        folder = write_learned(tmp_path / "d", tensors | scalars, dict_class=kind, k=3)
    else:
        own = {name: draw(N) for name in ("r_mag", "gate_bias", "mag_bias")}
        tensors |= {**own, "decoder_bias": draw(D)}
        product = (X - tensors["decoder_bias"]) @ tensors["encoder.weight"].T
        magnitude = np.maximum(np.exp(own["r_mag"]) * product + own["mag_bias"], 0)
        expected = np.where(product + own["gate_bias"] > 0, magnitude, 0)
        bias = tensors["decoder_bias"]
        folder = write_learned(tmp_path / "d", tensors, dict_class=kind)
    made = Dictionary.from_pretrained(folder)
    np.testing.assert_allclose(made.encode(X), expected, rtol=1e-4, atol=1e-4)
    out = expected @ tensors["decoder.weight"].T + bias
    np.testing.assert_allclose(made.decode(expected), out, rtol=1e-4, atol=1e-3)

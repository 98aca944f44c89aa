import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from scipy import sparse

import sae_jax
from sae_jax import Dictionary, InputError, SAEConfig, dictionary
from sae_jax.config import CHOICES, PRESETS, preset_fields
from sae_jax.state import Normalizer, Params

D, N = 6, 17
X = (np.random.default_rng(1).normal(size=(1500, D)) * 3 + 2).astype(np.float32)


def build(dtype: type = np.float32, preset: str = "vanilla", **fields: Any) -> Dictionary:
    """Random weights: what is saved and loaded need not be trained."""
    values = {"k_percent": 20, "k": 3, "l1_weight": 0.01, "l0_weight": 0.1, "target_l0": 3}
    needed = {name: values[name] for name in preset_fields(preset)[1]}
    config = SAEConfig.preset(preset, d_in=D, n_latents=N, **needed, **fields)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

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
        normalizer = Normalizer(mean=draw(D), scale=np.abs(draw(D)) + dtype(0.5))
    return Dictionary(config, params, normalizer, {"epochs": 3, "note": "ü"})


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


VARIANTS = [
    {"preset": preset, "input_normalization": normalization, **extra}
    for preset, normalization in itertools.product(PRESETS, CHOICES["input_normalization"])
    for extra in ({}, {"decoder_bias": "none"}, {"pre_bias": "tied"}, {"decoder_norm": "unit"})
    if {"pre_bias": "none", **PRESETS[preset][0], **extra}["pre_bias"] != "tied"
    or {"decoder_bias": "free", **PRESETS[preset][0], **extra}["decoder_bias"] != "none"
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_saved_and_loaded_it_is_the_same_bit_for_bit(
    variant: dict[str, str], tmp_path: Path
) -> None:
    made = build(**variant)
    made.save(tmp_path / "d")
    loaded = Dictionary.load(tmp_path / "d")
    assert loaded.config == made.config
    assert loaded.provenance == made.provenance
    for ours, theirs in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(made.params), strict=True
    ):
        assert_same_bits(ours, theirs)
    for name, leaf in vars(made.params).items():
        assert (getattr(loaded.params, name) is None) == (leaf is None)
    z = made.encode(X[:40])
    assert 0 < np.count_nonzero(z) < z.size
    assert_same_bits(loaded.encode(X[:40]), z)
    assert_same_bits(loaded.decode(z), made.decode(z))


def by_numpy(made: Dictionary, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstructions in the embedding's units, by hand, in float64."""
    p, y = jax.tree.map(np.float64, made.params), x.astype(np.float64)
    if made.normalizer is not None:
        y = (y - made.normalizer.mean[None]) / made.normalizer.scale[None]
    if p.pre_bias is not None:
        y = y + p.pre_bias
    if made.config.pre_bias == "tied":
        y = y - p.decoder_bias
    pre = y @ p.encoder + p.encoder_bias
    if made.config.activation == "topk":
        pre = np.where(pre >= np.sort(pre, axis=1)[:, [-made.config.k]], pre, 0)
    elif p.log_threshold is not None:
        pre = np.where(pre > np.exp(p.log_threshold), pre, 0)
    elif made.config.activation == "gated":
        magnitude = (y @ p.encoder) * np.exp(p.magnitude_gain) + p.magnitude_bias
        pre = np.where(pre > 0, magnitude, 0)
    z = np.maximum(pre, 0)
    out = z @ p.decoder + (0 if p.decoder_bias is None else p.decoder_bias)
    if made.normalizer is not None:
        out = out * made.normalizer.scale[None] + made.normalizer.mean[None]
    return z, out


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=lambda v: "-".join(v.values()))
def test_raw_rows_go_in_and_come_out(variant: dict[str, str]) -> None:
    """Bug of others: normalisation lost between training and use."""
    made = build(**variant)
    z, out = by_numpy(made, X[:40])
    found = made.encode(X[:40])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made.decode(found), out, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("normalization", ["none", "zscore"])
def test_float64_weights_are_saved_and_used_in_float64(normalization: str, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        made = build(np.float64, input_normalization=normalization)
        made.save(tmp_path / "d")
        assert json.loads((tmp_path / "d/cfg.json").read_text())["dtype"] == "float64"
        x = X[:40].astype(np.float64)
        z, out = by_numpy(made, x)
        found = Dictionary.load(tmp_path / "d").encode(x)
        assert_same_bits(found, made.encode(x))
        np.testing.assert_allclose(found, z, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(made.decode(found), out, rtol=1e-12, atol=1e-12)


def test_disk_layout_is_the_one_that_saelens_reads(tmp_path: Path) -> None:
    made = build(preset="bricken", input_normalization="zscore")
    made.save(tmp_path / "d")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "cfg.json", "sae_weights.safetensors"
    ]  # fmt: skip
    tensors = safetensors.numpy.load_file(tmp_path / "d/sae_weights.safetensors")
    expected = {
        "W_enc": made.params.encoder, "b_enc": made.params.encoder_bias,
        "W_dec": made.params.decoder, "b_dec": made.params.decoder_bias,
        "b_pre": made.params.pre_bias,
        "input_mean": made.normalizer.mean, "input_scale": made.normalizer.scale,
    }  # fmt: skip
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert_same_bits(tensors[name], value)
    cfg = json.loads((tmp_path / "d/cfg.json").read_text())
    digest = hashlib.sha256((tmp_path / "d/sae_weights.safetensors").read_bytes()).hexdigest()
    assert cfg.pop("weights_sha256") == digest
    of_cfg = cfg.pop("cfg_sha256")
    with_weights = json.dumps(cfg | {"weights_sha256": digest}, indent=1) + "\n"
    assert of_cfg == hashlib.sha256(with_weights.encode()).hexdigest()
    assert cfg == {
        "format": "sae_jax.Dictionary", "architecture": "sae_jax", "format_version": 2,
        "d_in": D, "d_sae": N,
        "dtype": "float32", "config": made.config.to_dict(), "provenance": made.provenance,
    }  # fmt: skip


def test_weights_that_are_views_are_saved_right(tmp_path: Path) -> None:
    made = build()
    turned = made.params.replace(encoder=np.asfortranarray(made.params.encoder))
    Dictionary(made.config, turned).save(tmp_path / "d")
    loaded = Dictionary.load(tmp_path / "d")
    np.testing.assert_array_equal(loaded.params.encoder, made.params.encoder)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 1500])
def test_sparse_codes_equal_dense_ones(preset: str, rows: int) -> None:
    made = build(preset=preset)
    dense, csr = made.encode(X[:rows]), made.encode(X[:rows], sparse=True)
    assert sparse.issparse(csr)
    assert csr.format == "csr"
    assert csr.dtype == np.float32
    assert csr.shape == dense.shape == (rows, N)
    assert csr.nnz == np.count_nonzero(dense)
    assert csr.has_sorted_indices
    np.testing.assert_array_equal(csr.toarray(), dense)
    for z in (csr, sparse.csr_array(csr), csr.tocsc(), sparse.coo_array(csr)):
        assert_same_bits(made.decode(z), made.decode(dense))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_does_not_depend_on_the_others(preset: str) -> None:
    """Bug of others: batch top-k at inference. Neither values, number nor place of rows matter."""
    made = build(preset=preset, input_normalization="zscore")
    z = made.encode(X)
    back = made.decode(z)
    for i in (0, 1, 7, 500, 1023, 1024, 1025, 1499):
        assert_same_bits(made.encode(X[i : i + 1]), z[i : i + 1])
        assert_same_bits(made.decode(z[i : i + 1]), back[i : i + 1])
    assert_same_bits(made.encode(X[::-1])[::-1].copy(), z)
    assert_same_bits(
        made.encode(X[:1400] * np.float32(1e3))[5:6], made.encode(X[5:6] * np.float32(1e3))
    )


def test_rows_of_wide_dictionaries_do_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(0)
    config = SAEConfig(d_in=64, n_latents=700, activation="topk", k=20)
    params = Params(
        encoder=rng.normal(size=(64, 700)).astype(np.float32),
        encoder_bias=np.zeros(700, np.float32),
        decoder=rng.normal(size=(700, 64)).astype(np.float32),
        decoder_bias=np.zeros(64, np.float32),
        pre_bias=None,
    )
    made = Dictionary(config, params)
    x = rng.normal(size=(1100, 64)).astype(np.float32)
    z = made.encode(x)
    assert (z > 0).sum(axis=1).tolist() == [20] * 1100
    back = made.decode(z)
    for i in (0, 13, 1022, 1023, 1024, 1099):
        assert_same_bits(made.encode(x[i : i + 1]), z[i : i + 1])
        assert_same_bits(made.decode(z[i : i + 1]), back[i : i + 1])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:3, :5], "x has 5 dimensions, the dictionary has d_in=6"),
        (X[0], r"x has shape \(6,\)"),
        (X[:0], "x is empty"),
        (np.where(np.arange(6) == 2, np.nan, X[:3]), "x holds 3 NaN or infinite values in 3 of 3"),
    ],
)
def test_encode_refuses(x: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build().encode(x)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_array])
def test_decode_refuses(kind: Callable) -> None:
    made = build()
    with pytest.raises(InputError, match="z has 6 columns, the dictionary has 17 latents"):
        made.decode(kind(X[:3]))
    with pytest.raises(InputError, match="z is empty"):
        made.decode(kind(np.zeros((0, N), np.float32)))
    z = np.zeros((4, N), np.float32)
    z[2, 1] = np.inf
    with pytest.raises(InputError, match=r"z holds 1 NaN or infinite values in 1 of 4 .*rows 2\)"):
        made.decode(kind(z))


def test_decode_names_the_bad_row_of_a_long_sparse_matrix() -> None:
    z = sparse.csr_matrix(([np.nan], ([1300], [0])), shape=(1500, N), dtype=np.float32)
    with pytest.raises(InputError, match=r"1 of 1500 rows \(rows 1300\)"):
        build().decode(z)


@pytest.mark.parametrize("existing", ["file", "folder", "full folder"])
def test_save_refuses_an_existing_path_and_leaves_it(existing: str, tmp_path: Path) -> None:
    path = tmp_path / "d"
    if existing == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        if existing == "full folder":
            (path / "cfg.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="exists; a dictionary is saved to a new folder"):
        build().save(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_left_where_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        real(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            build().save(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []
    build().save(tmp_path / "d")
    assert Dictionary.load(tmp_path / "d").config == build().config


def test_provenance_that_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    made = build()
    made.provenance["bad"] = float("nan")
    with pytest.raises(ValueError, match="Out of range float"):
        made.save(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build(preset="bricken", input_normalization="zscore").save(tmp_path / "saved")
    return tmp_path / "saved"


def edit_cfg(saved: Path, **changes: Any) -> None:
    cfg = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps(cfg | changes))


def edit_tensors(saved: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = safetensors.numpy.load_file(saved / "sae_weights.safetensors")
    change(tensors)
    weights = saved / "sae_weights.safetensors"
    safetensors.numpy.save_file(tensors, weights)
    edit_cfg(saved, weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest())


def test_a_changed_byte_is_refused(saved: Path) -> None:
    weights = saved / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="not what was saved"):
        Dictionary.load(saved)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1, -100])
def test_truncated_weights_are_refused(saved: Path, length: int) -> None:
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(InputError, match="damaged"):
        Dictionary.load(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"not json", b"\xff\xfe\x00"])
def test_a_cfg_that_is_no_json_is_refused(saved: Path, text: bytes) -> None:
    (saved / "cfg.json").write_bytes(text)
    with pytest.raises(InputError, match="damaged"):
        Dictionary.load(saved)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"architecture": "standard"}'])
def test_the_cfg_of_another_library_is_refused(saved: Path, text: str) -> None:
    (saved / "cfg.json").write_text(text)
    with pytest.raises(InputError, match=r"is damaged|not written by sae_jax"):
        Dictionary.load(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    edit_cfg(saved, format_version=dictionary.FORMAT_VERSION + 1)
    with pytest.raises(InputError, match="format version 3, this sae_jax reads up to 2"):
        Dictionary.load(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"later_field": 3}, "SAEConfig has no field later_field"),
        ({"activation": "jump"}, "activation='jump'"),
        ({"k": 3}, "k=3 has no meaning"),
        ({"n_latents": 18}, "its cfg.json asks for"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    saved: Path, fields: dict[str, Any], message: str
) -> None:
    cfg = json.loads((saved / "cfg.json").read_text())
    edit_cfg(saved, config=cfg["config"] | fields)
    with pytest.raises(InputError, match=message):
        Dictionary.load(saved)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "b_pre", "input_mean"])
def test_tensors_that_are_absent_extra_or_of_another_shape_are_refused(
    saved: Path, name: str
) -> None:
    whole = (saved / "sae_weights.safetensors").read_bytes()
    changes: list[Callable[[dict[str, np.ndarray]], Any]] = [
        lambda tensors: tensors.pop(name),
        lambda tensors: tensors.update({name: tensors[name][:-1].copy()}),
        lambda tensors: tensors.update({name: tensors[name][None].copy()}),
        lambda tensors: tensors.update({"b_other": tensors[name]}),
    ]
    if name.startswith("W"):
        changes.append(lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    for change in changes:
        (saved / "sae_weights.safetensors").write_bytes(whole)
        edit_tensors(saved, change)
        with pytest.raises(InputError, match=r"sae_weights.safetensors holds .*asks for"):
            Dictionary.load(saved)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_an_incomplete_folder_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(InputError, match=r"holds no saved dictionary: .* is missing"):
        Dictionary.load(saved)


def test_the_missing_weights_are_named(saved: Path) -> None:
    (saved / "sae_weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"sae_weights\.safetensors is missing"):
        Dictionary.load(saved)


def test_a_missing_folder_is_refused_and_the_file_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/cfg\.json is missing"):
        Dictionary.load(tmp_path / "nowhere")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("x")
    with pytest.raises(InputError):
        Dictionary.load(tmp_path / "d")


@pytest.mark.parametrize("key", ["format_version", "config", "provenance"])
def test_a_cfg_without_one_of_its_keys_is_refused(saved: Path, key: str) -> None:
    cfg = json.loads((saved / "cfg.json").read_text())
    del cfg[key]
    (saved / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(InputError, match=key):
        Dictionary.load(saved)


@pytest.mark.parametrize("changes", [{"config": 3}, {"format_version": "1"}])
def test_a_cfg_with_values_of_other_types_is_refused(saved: Path, changes: dict) -> None:
    edit_cfg(saved, **changes)
    with pytest.raises(InputError):
        Dictionary.load(saved)


@pytest.mark.parametrize("value", [np.int32, np.float16])
def test_weights_of_another_dtype_than_cfg_says_are_refused(saved: Path, value: type) -> None:
    edit_tensors(saved, lambda tensors: tensors.update(W_enc=tensors["W_enc"].astype(value)))
    with pytest.raises(InputError, match="float32"):
        Dictionary.load(saved)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_a_unit_decoder_has_unit_rows_after_training_and_after_loading(
    activation: str, tmp_path: Path
) -> None:
    """Bug of others: the decoder normalised along the wrong axis."""
    config = SAEConfig(
        d_in=D, n_latents=N, activation=activation, k=3 if activation == "topk" else None,
        decoder_norm="unit", learning_rate=0.01, batch_size=50, input_normalization="zscore",
    )  # fmt: skip
    trained = sae_jax.train([config], X, epochs=2, progress=False).dictionaries[0]
    assert trained is not None
    trained.save(tmp_path / "d")
    loaded = Dictionary.load(tmp_path / "d")
    for decoder in (trained.params.decoder, loaded.params.decoder):
        assert decoder.shape == (N, D)
        np.testing.assert_allclose(np.linalg.norm(decoder, axis=1), np.ones(N), rtol=1e-6)
        assert np.abs(np.linalg.norm(decoder, axis=0) - 1).max() > 0.1
    assert_same_bits(loaded.encode(X), trained.encode(X))
    np.testing.assert_allclose(loaded.normalizer.mean, X.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(loaded.normalizer.scale, X.std(axis=0), rtol=1e-4)


@pytest.mark.filterwarnings("error")
def test_float64_rows_are_encoded_as_float32_without_a_warning() -> None:
    made = build()
    assert_same_bits(made.encode(X[:9].astype(np.float64)), made.encode(X[:9]))

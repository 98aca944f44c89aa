"""`sae-jax verify`, and --verify of the programs that read what others have left."""

import json
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import verify
from sae_jax import Dictionary, InputError, SAEConfig, files, manifest
from sae_jax.state import Params
from tests.experiments.damage import check_every_file, verified


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder like that of a run, with a dictionary in it."""
    folder = tmp_path / "run"
    config = SAEConfig.preset("vanilla", d_in=3, n_latents=4, l1_weight=0.1)
    rng = np.random.default_rng(0)
    params = Params(
        encoder=rng.normal(size=(3, 4)).astype(np.float32), encoder_bias=np.zeros(4, np.float32),
        decoder=rng.normal(size=(4, 3)).astype(np.float32), decoder_bias=np.zeros(3, np.float32),
        pre_bias=None,
    )  # fmt: skip
    Dictionary(config, params, None, {"é": [1e-5, None]}).save(folder / "dictionaries" / "0000")
    files.write_json(folder / "settings.json", {"a": 1})
    (folder / "empty.csv").touch()
    manifest.write(folder)
    return folder


def test_damage_of_every_file_is_found(run: Path) -> None:
    check_every_file(run)


def test_many_folders_are_told_of_and_the_status_is_of_the_worst(run: Path, tmp_path: Path) -> None:
    dictionary = run / "dictionaries" / "0000"
    assert verified(dictionary, run)[0] == 0
    (run / "settings.json").write_text("{}")
    (tmp_path / "other").mkdir()
    settings = run / "settings.json"
    status, printed = verified(tmp_path / "other", dictionary, run, tmp_path / "gone", settings)
    lines = printed.splitlines()
    assert status == 1
    assert len(lines) == 5
    assert lines[0].startswith(f"{tmp_path / 'other'} has no manifest.json: it was not finished")
    assert lines[1] == f"{dictionary}: 2 files as they were left"
    assert "settings.json has 2 bytes of 12" in lines[2]
    assert lines[3].startswith(f"{tmp_path / 'gone'} is not there: give folders")
    assert lines[4].startswith(f"{settings} is a file: give folders")
    with pytest.raises(InputError, match="give folders"):
        verify.main([])


def test_every_byte_of_a_dictionary_counts(run: Path) -> None:
    """On its own: of the run that it is copied out of nothing is asked."""
    folder = run / "dictionaries" / "0000"
    for name in ("cfg.json", "sae_weights.safetensors"):
        path = folder / name
        content = path.read_bytes()
        places = np.random.default_rng(1).permutation(len(content))[:50]
        version = content.find(b'"format_version": 2')
        for place in {*places.tolist(), *(range(version, version + 20) if version > 0 else ())}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            with pytest.raises(InputError):
                Dictionary.load(folder)
        path.write_bytes(content)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(InputError, match=r"cfg\.json is not what was saved: damaged, or edited"):
        Dictionary.load(folder)
    del cfg["cfg_sha256"]  # as before there was such a hash
    (folder / "cfg.json").write_text(json.dumps(cfg | {"format_version": 1}))
    assert Dictionary.load(folder).provenance == {"é": [1e-5, None]}


@pytest.mark.parametrize("level", manifest.LEVELS)
def test_inputs_are_looked_at(
    run: Path, tmp_path: Path, level: manifest.Level, caplog: pytest.LogCaptureFixture
) -> None:
    with flagsaver.flagsaver():
        if "verify" not in flags.FLAGS:
            verify.define_flag()
        flags.FLAGS(["program", f"--verify={level}"])
        verify.inputs(None, run, run / "settings.json", run / "dictionaries/0000", "nowhere")
        damaged = bytearray((run / "settings.json").read_bytes())
        damaged[3] ^= 1
        (run / "settings.json").write_bytes(damaged)
        if level == "full":
            with pytest.raises(InputError, match=r"settings\.json has other contents"):
                verify.inputs(run)
        else:
            verify.inputs(run)
        (run / "settings.json").unlink()
        with pytest.raises(InputError, match=r"settings\.json is missing"):
            verify.inputs(run)
        (tmp_path / "old").mkdir()
        if level == "full":
            with pytest.raises(InputError, match=r"has no manifest\.json"):
                verify.inputs(tmp_path / "old")
        else:
            verify.inputs(tmp_path / "old")
            assert "was not checked for damage" in caplog.text

"""`sae-jax verify`, and --verify of the programs that read what others have left."""

import json
from pathlib import Path
from typing import Literal

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import verify
from extract import provenance, store
from extract.hashing import rows_hash
from sae_jax import Dictionary, InputError, SAEConfig, data, files, manifest
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


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_stores_that_were_joined_are_read_as_anybodys(
    tmp_path: Path, zarr_format: Literal[2, 3]
) -> None:
    """As docs/multihost.md has it; and some of the cells of one."""
    parts = {}
    for name in ("a", "b"):
        obs = pd.DataFrame(index=[f"{name}{i}" for i in range(4)])
        about = {"pooling": "cls", "empty_cells": [], "obs_names_sha256": rows_hash(obs, "cls"),
                 "input": name, "model": "scgpt", "store_dtype": "float32"}  # fmt: skip
        about |= {"identity": provenance.identity(about)}
        writer = store.Writer(tmp_path / name, {"layer_06": 6}, obs, 3, about, "float32")
        for block in writer.blocks:
            writer.write(block.number, block.rows, {"layer_06": np.ones((4, 3), np.float32)})
        writer.finish()
        parts[name] = anndata.read_zarr(tmp_path / name / "layer_06.zarr")
    with flagsaver.flagsaver():
        if "verify" not in flags.FLAGS:
            verify.define_flag()
        flags.FLAGS(["program", "--verify=full"])
        verify.inputs(tmp_path / "a/layer_06.zarr")
        with anndata.settings.override(zarr_write_format=zarr_format):
            anndata.concat(parts, uns_merge="same").write_zarr(tmp_path / "joined.zarr")
            parts["a"][:2].copy().write_zarr(tmp_path / "some.zarr")
        for name, rows in {"joined": 8, "some": 2}.items():
            verify.inputs(tmp_path / f"{name}.zarr")
            assert len(data.open_rows(str(tmp_path / f"{name}.zarr"))) == rows
            assert data.provenance(str(tmp_path / f"{name}.zarr"))["model"] == "scgpt"
        content = (tmp_path / "a/layer_06.zarr/zarr.json").read_text()
        (tmp_path / "a/layer_06.zarr/zarr.json").write_text(
            content.replace("-manifest", "-manifesu")
        )
        with pytest.raises(ValueError, match="was not finished"):
            verify.inputs(tmp_path / "a/layer_06.zarr")


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

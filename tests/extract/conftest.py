"""The program on a small scGPT, for all files that run it."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

from extract import main, store
from tests.extract.small import CELLS, Program, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "scgpt")


@pytest.fixture(scope="module")
def cells_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = CELLS.copy()
    cells.obs["kind"] = pd.Categorical(["a", "b", "c"] * 4)
    cells.obs["filter_pass"] = [0, *[1] * 11]
    cells.layers["counts"] = cells.X.copy()
    path = tmp_path_factory.mktemp("h") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture
def program(
    checkpoint: Path, cells_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Program:
    """Runs it on flags, three cells a block; returns the output folder."""
    monkeypatch.setattr(store, "BLOCK_CELLS", 3)

    def run(**given: Any) -> Path:
        call = {"model": "scgpt", "checkpoint": checkpoint, "h5ad": cells_file, "device": "cpu"}
        call |= {"output": tmp_path / "out"} | given
        words = []
        for name, value in call.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}={one}" for one in values if one is not None]
        with flagsaver.flagsaver():
            main.define_flags()
            flags.FLAGS(["program", *words])
            main.main()
        return Path(call["output"])

    return run

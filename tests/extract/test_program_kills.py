"""`python -m extract.main`, killed or out of room: the same command goes on."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from extract import InputError, lock, main, store
from tests.extract.small import Program


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["first write", "third write", "between layers", "renaming"])
def test_a_killed_extraction_goes_on(
    program: Program, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = program(output=tmp_path / "whole", layers="0,1")
    real_write, real_save = store.Writer.write, store.Writer._save_progress
    calls = []

    def write(self: store.Writer, *args: Any) -> None:
        calls.append(args[0])
        if len(calls) == {"first write": 1, "third write": 3}.get(moment, 0):
            raise Killed
        real_write(self, *args)

    def save(self: store.Writer) -> None:
        if moment == "between layers" and len(calls) == 2:
            raise Killed
        real_save(self)

    def rename(self: Path, target: Path) -> Path:
        if moment == "renaming" and self.name == "layer_01.zarr":
            raise Killed
        return real_rename(self, target)

    real_rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "write", write)
        patch.setattr(store.Writer, "_save_progress", save)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            program(layers="0,1")
    written: list[int] = []
    monkeypatch.setattr(
        store.Writer, "write", lambda self, *a: (written.append(a[0]), real_write(self, *a))
    )
    out = program(layers="0,1")
    done = {"first write": 0, "third write": 2, "between layers": 1, "renaming": 4}[moment]
    assert written == list(range(done, 4))
    for path in whole.glob("*.zarr"):
        again = store.open(out / path.name)
        again.verify()
        np.testing.assert_array_equal(again.X[:], store.open(path).X[:])
    assert not (out / ".extracting").exists()


def test_a_process_that_is_killed_goes_on(
    program: Program, checkpoint: Path, cells_file: Path, tmp_path: Path
) -> None:
    whole = program(output=tmp_path / "whole", pooling="tokens")
    out = tmp_path / "out"
    code = (
        "import sys, time\nfrom extract import main, store\nstore.BLOCK_CELLS = 3\n"
        "write = store.Writer.write\n"
        "store.Writer.write = lambda self, *a: (write(self, *a), time.sleep(.3))\n"
        f"sys.argv = ['x', '--model=scgpt', '--checkpoint={checkpoint}', '--h5ad={cells_file}',"
        f" '--output={out}', '--pooling=tokens', '--device=cpu']\nmain.cli()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    progress = out / ".extracting/progress.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if progress.exists() and len(json.loads(progress.read_text())["done"]) >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "layer_02.zarr").exists()
    program(output=out, pooling="tokens")
    again, plain = (store.open(folder / "layer_02.zarr") for folder in (out, whole))
    np.testing.assert_array_equal(again.X[:], plain.X[:])
    pd.testing.assert_frame_equal(again.obs, plain.obs)


def test_the_same_command_again_does_nothing_and_another_is_refused(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = program(layers="1")
    before = (out / "layer_01.zarr/zarr.json").stat().st_mtime_ns
    monkeypatch.setattr(main, "fill", lambda *_: pytest.fail("ran"))
    program(layers="1")
    program(layers="1", overwrite=True, min_gene_coverage=0.1)
    with pytest.raises(InputError, match=r"another extraction \(pooling 'cls', not 'mean'\)"):
        program(layers="1", pooling="mean")
    assert (out / "layer_01.zarr/zarr.json").stat().st_mtime_ns == before
    monkeypatch.undo()


def test_more_layers_later_and_overwriting(program: Program) -> None:
    out = program(layers="1")
    program(layers="0,1")
    assert store.open(out / "layer_00.zarr").extraction["pooling"] == "cls"
    program(layers="1", pooling="mean", overwrite=True)
    assert store.open(out / "layer_01.zarr").extraction["pooling"] == "mean"


def test_an_unfinished_one_of_other_settings_is_refused(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "finish", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            program()
    with pytest.raises(InputError, match=r"other settings \(pooling 'cls', not 'mean'\)"):
        program(pooling="mean")
    program(min_gene_coverage=0.1)  # of the same rows


def test_two_processes_do_not_share_a_folder(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.locked(tmp_path / "out"):
        monkeypatch.setattr(lock, "_held", set())
        with pytest.raises(InputError, match=rf"by another process \({os.getpid()} on "):
            program()


def test_a_full_disk_loses_nothing(
    program: Program, checkpoint: Path, cells_file: Path, tmp_path: Path
) -> None:
    whole = program(output=tmp_path / "whole", pooling="tokens", layers="0,1")
    out = tmp_path / "out"
    code = "from extract import main, store; store.BLOCK_CELLS = 3; main.cli()"
    argv = [
        "--model=scgpt", f"--checkpoint={checkpoint}", f"--h5ad={cells_file}", f"--output={out}",
        "--pooling=tokens", "--layers=0,1", "--device=cpu",
    ]  # fmt: skip
    full = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )  # fmt: skip
    assert full.returncode == 1, full.stderr
    assert re.search(
        r"error: .*layer_0\d\.zarr.* cannot be written: .* bytes are wanted", full.stderr
    )
    assert "Make room and give the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(out.glob("*.zarr"))
    program(pooling="tokens", layers="0,1", output=out)
    for path in whole.glob("*.zarr"):
        np.testing.assert_allclose(
            store.open(out / path.name).X[:], store.open(path).X[:], atol=1e-6
        )


def test_a_kill_at_the_very_end_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: Any) -> None:
        if (path / "progress.json").exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            program()
    assert (tmp_path / "out/.extracting").exists()
    program()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["layer_02.zarr"]

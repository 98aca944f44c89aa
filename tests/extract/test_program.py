"""`python -m extract.main`: what it leaves, how it goes on, what it refuses."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

import extract
from extract import InputError, main, store
from tests.extract.small import CELLS, GENES, write_checkpoint

Program = Callable[..., Path]


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
    monkeypatch.setattr(main, "BLOCK", 3)

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


def expected(
    layers: Any, pooling: str, checkpoint: Path, cells: Any = CELLS, **options: Any
) -> Any:
    return extract.load_model("scgpt", checkpoint).embed(cells, layers, pooling, **options)


def test_stores_of_all_layers(program: Program, checkpoint: Path) -> None:
    out = program(layers="all", export="npy")
    plain = expected("all", "cls", checkpoint)
    assert {p.name for p in out.glob("*.zarr")} == {
        "embedding.zarr", "layer_00.zarr", "layer_01.zarr", "layer_02.zarr",
    }  # fmt: skip
    assert not (out / ".extracting").exists()
    for layer, states in plain.items():
        path = out / f"{store.layer_name(layer)}.zarr"
        found = store.open(path)
        found.verify()
        np.testing.assert_allclose(found.X[:], states, atol=1e-6)
        assert found.extraction["layer"] == layer
        cells = anndata.read_zarr(path)
        np.testing.assert_array_equal(cells.X, found.X[:])
        assert cells.obs_names.tolist() == CELLS.obs_names.tolist()
        assert cells.obs["kind"].tolist() == ["a", "b", "c"] * 4
        np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), cells.X)
        assert path.with_suffix(".names.txt").read_text().split() == CELLS.obs_names.tolist()


def test_training_reads_it_without_torch(program: Program) -> None:
    path = program(layers="1") / "layer_01.zarr"
    code = (
        "import sys, numpy as np, sae_jax\n"
        "from sae_jax import data\n"
        f"rows = data.open_rows({str(path)!r})\n"
        "about = data.provenance(%r)\n"
        % str(path)
        + f"obs = data.load_obs({str(path)!r}, 'kind')\n"
        "assert rows.shape == (12, 16) and obs[1] == 'b', (rows.shape, obs)\n"
        "assert about['model'] == 'scgpt' and about['layer'] == 1 and about['pooling'] == 'cls'\n"
        "assert 'torch' not in sys.modules and 'extract' not in sys.modules\n"
        "configs = sae_jax.grid('vanilla', d_in=16, n_latents=8, l1_weight=.1, batch_size=4)\n"
        "run = sae_jax.train(configs, rows, epochs=2, provenance=about, progress=False)\n"
        "assert run.dictionaries[0].provenance['checkpoint_sha256']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_narrow_stores(program: Program, checkpoint: Path, dtype: str, tolerance: float) -> None:
    out = program(store_dtype=dtype)
    found = store.open(out / "layer_02.zarr").X[:]
    plain = expected(None, "cls", checkpoint)[2]
    np.testing.assert_allclose(found, plain, rtol=tolerance, atol=1e-6)
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        rounded = torch.as_tensor(plain).bfloat16().float().numpy()
        assert np.mean(found == rounded) > 0.99  # batches may round the last bit before


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32) ** 9
    values[:4] = [np.nan, np.inf, -np.inf, 0]
    np.testing.assert_array_equal(
        store.to_bfloat16(values), torch.as_tensor(values).bfloat16().float().numpy()
    )


def test_tokens_carry_cell_and_gene(program: Program, checkpoint: Path) -> None:
    out = program(pooling="tokens", layers="0,-1")
    plain = expected([0, 2], "tokens", checkpoint)
    for layer, states in plain.items():
        found = store.open(out / f"layer_{layer:02d}.zarr")
        np.testing.assert_allclose(found.X[:], states, atol=1e-6)
        counts = CELLS.X.toarray()
        names = [
            (cell, GENES[j])
            for i, cell in enumerate(CELLS.obs_names)
            for j in counts[i].nonzero()[0]
        ]
        assert list(zip(found.obs["cell"], found.obs["gene"], strict=True)) == names


def test_some_cells_and_options(program: Program, checkpoint: Path) -> None:
    out = program(
        obs_filter="filter_pass == 1 and kind != 'c'", limit=5, counts="counts",
        option=["max_length=7", "select=top", "cls=False", 'order="descending"'], pooling="mean",
    )  # fmt: skip
    chosen = CELLS[[1, 3, 4, 6, 7]].copy()
    found = store.open(out / "layer_02.zarr")
    assert found.obs.index.tolist() == chosen.obs_names.tolist()
    options = {"max_length": 7, "select": "top", "cls": False, "order": "descending"}
    np.testing.assert_allclose(
        found.X[:], expected(None, "mean", checkpoint, chosen, **options)[2], atol=1e-6
    )


def test_a_dry_run_writes_nothing(
    program: Program, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="absl"):
        out = program(dry_run=True, layers="all")
    assert not out.exists()
    text = capsys.readouterr().out
    assert "12 x 16 a layer" in text
    assert "cells/s" in text
    assert "coverage 1.0" in caplog.text
    assert "tokens a cell" in caplog.text


# Going on


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["first write", "third write", "between layers", "renaming"])
def test_a_killed_extraction_goes_on(
    program: Program, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = program(output=tmp_path / "whole", layers="all")
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
            program(layers="all")
    written: list[int] = []
    monkeypatch.setattr(
        store.Writer, "write", lambda self, *a: (written.append(a[0]), real_write(self, *a))
    )
    out = program(layers="all")
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
        "import sys, time\nfrom extract import main, store\nmain.BLOCK = 3\n"
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
    with pytest.raises(InputError, match="of another extraction"):
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
    with pytest.raises(InputError, match=r"unfinished extraction of other settings \(extraction"):
        program(pooling="mean")
    program()


def test_two_processes_do_not_share_a_folder(program: Program, tmp_path: Path) -> None:
    with store.locked(tmp_path / "out"), pytest.raises(InputError, match="by another process"):
        program()


def test_a_full_disk_loses_nothing(
    program: Program, checkpoint: Path, cells_file: Path, tmp_path: Path
) -> None:
    whole = program(output=tmp_path / "whole", pooling="tokens", layers="all")
    out = tmp_path / "out"
    argv = [
        sys.executable, "-m", "extract.main", "--model=scgpt", f"--checkpoint={checkpoint}",
        f"--h5ad={cells_file}", f"--output={out}", "--pooling=tokens", "--layers=all",
        "--device=cpu",
    ]  # fmt: skip
    full = subprocess.run(
        argv, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )  # fmt: skip
    assert full.returncode == 1, full.stderr
    assert "make room and give the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(out.glob("*.zarr"))
    subprocess.run(argv, check=True, capture_output=True)
    for path in whole.glob("*.zarr"):
        np.testing.assert_allclose(
            store.open(out / path.name).X[:], store.open(path).X[:], atol=1e-6
        )


# Damage and refusals


@pytest.mark.parametrize("damage", ["delete", "cut", "flip", "obs", "unfinished"])
def test_a_damaged_store_is_not_opened(program: Program, damage: str) -> None:
    path = program(pooling="tokens") / "layer_02.zarr"
    chunk = next(p for p in (path / "X").rglob("*") if p.is_file() and p.name != "zarr.json")
    content = bytearray(chunk.read_bytes())
    if damage == "delete":
        chunk.unlink()
    elif damage == "cut":
        chunk.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
    elif damage == "obs":
        names = next(p for p in (path / "obs/_index").rglob("*") if p.name != "zarr.json")
        names = names if names.is_file() else next(p for p in names.rglob("*") if p.is_file())
        names.write_bytes(names.read_bytes()[::-1])
    else:
        meta = json.loads((path / "zarr.json").read_text())
        del meta["attributes"]["extraction-manifest"]
        (path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"layer_02\.zarr"):
        store.open(path)
    with pytest.raises(InputError):
        program(pooling="tokens")
    shutil.rmtree(path)


def test_a_store_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no extraction store"):
        store.open(tmp_path)


def test_empty_cells(program: Program, tmp_path: Path) -> None:
    cells = CELLS.copy()
    values = cells.X.toarray()
    values[4] = 0
    cells.X = values
    cells.write_h5ad(tmp_path / "e.h5ad")
    with pytest.raises(InputError, match=r"1 cells express no gene of the model \(cell4\)"):
        program(h5ad=tmp_path / "e.h5ad")
    assert not list((tmp_path / "out").glob("*"))
    out = program(h5ad=tmp_path / "e.h5ad", empty_cells="nan")
    found = store.open(out / "layer_02.zarr")
    assert np.flatnonzero(np.isnan(found.X[:]).any(axis=1)).tolist() == [4]
    assert list(found.extraction["empty_cells"]) == ["cell4"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "--model is needed"),
        ({"h5ad": "nowhere.h5ad"}, "nowhere.h5ad cannot be read"),
        ({"checkpoint": "nowhere"}, "the checkpoint nowhere is not a folder"),
        ({"layers": "7"}, "no layer 7"),
        ({"layers": "last"}, "no layer 'last'"),
        ({"pooling": "max"}, "no pooling 'max'"),
        ({"counts": "raw"}, r"no layers\['raw'\]; layers: counts"),
        ({"genes": "symbol"}, r"no var\['symbol'\]"),
        ({"option": ["lenght=3"]}, "no preprocessing lenght"),
        ({"option": ["max_length"]}, "KEY=VALUE is wanted"),
        ({"obs_filter": "celltype == 1"}, "--obs_filter=celltype == 1"),
        ({"obs_filter": "filter_pass + 1"}, "not true or false"),
        ({"obs_filter": "filter_pass == 5"}, "no cell is left"),
        ({"dictionaries": "there"}, "scgpt has no option dictionaries"),
        ({"device": "cuda:77"}, "no device 'cuda:77'"),
    ],
)
def test_bad_flags(program: Program, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        program(**given)
    assert not (tmp_path / "out").exists()


def test_a_cut_file_of_cells(program: Program, cells_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.h5ad"
    content = cells_file.read_bytes()
    for size in (10, len(content) // 2, len(content) - 100):
        cut.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"cut\.h5ad cannot be read"):
            program(h5ad=cut)


@pytest.mark.parametrize("kind", ["zarr", "dense zarr", "csc", "dense", "csc zarr"])
def test_other_forms_of_cells(
    program: Program, checkpoint: Path, kind: str, tmp_path: Path
) -> None:
    cells = CELLS.copy()
    if "csc" in kind:
        cells.X = cells.X.tocsc()
    elif "dense" in kind:
        cells.X = cells.X.toarray()
    cells.obs["kind"] = ["a", "b", "c"] * 4
    path = tmp_path / ("c.zarr" if "zarr" in kind else "c.h5ad")
    (cells.write_zarr if "zarr" in kind else cells.write_h5ad)(path)
    plain = expected(None, "cls", checkpoint)[2]
    found = store.open(program(h5ad=path) / "layer_02.zarr").X[:]
    np.testing.assert_allclose(found, plain, atol=1e-6)
    some = program(h5ad=path, output=tmp_path / "some", obs_filter="kind != 'b'")
    found = store.open(some / "layer_02.zarr").X[:]
    np.testing.assert_allclose(found, plain[np.arange(12) % 3 != 1], atol=1e-6)

"""What a process holds after `import extract`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import extract

ROOT = Path(extract.__file__).parents[1]
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for path in (ROOT / "extract").rglob("[!_]*.py")
)


@pytest.mark.parametrize(
    ("modules", "foreign"),
    [
        (["extract"], "torch transformers anndata zarr sae_jax analysis experiments"),
        (["extract", "extract.store"], "torch transformers sae_jax analysis experiments jax"),
        (MODULES, "sae_jax analysis experiments jax scvi scanpy"),
    ],
)
def test_it_loads_neither_its_siblings_nor_more_than_it_needs(
    modules: list[str], foreign: str
) -> None:
    code = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
print([name for name in {foreign.split()} if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_store_is_there_without_importing_it() -> None:
    assert extract.store.open
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = extract.nothing

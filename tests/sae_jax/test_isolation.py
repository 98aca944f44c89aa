"""What a process holds after `import sae_jax`, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sae_jax

ROOT = Path(sae_jax.__file__).parents[1]


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("modules", ["sae_jax", "sae_jax with all of its modules"])
def test_importing_the_package_loads_arrays_only(modules: str) -> None:
    names = ["sae_jax"]
    if modules != "sae_jax":
        names += [f"sae_jax.{p.stem}" for p in (ROOT / "sae_jax").glob("[!_]*.py")]
        assert len(names) > 10
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
foreign = "torch pandas anndata scanpy sklearn matplotlib analysis extract experiments".split()
print([name for name in foreign if name in sys.modules])
"""
    assert python(code) == "[]"


def test_importing_the_package_does_not_start_jax() -> None:
    """A program may still choose its devices afterwards."""
    code = """
import sae_jax
from sae_jax import distributed
import jax, os
distributed.use_all_cpu_cores()
print(jax.device_count() == len(os.sched_getaffinity(0)), jax.config.jax_enable_x64)
"""
    assert python(code) == "True False"


def test_every_public_name_is_there() -> None:
    for name in sae_jax.__all__:
        assert hasattr(sae_jax, name)
    assert sae_jax.__version__

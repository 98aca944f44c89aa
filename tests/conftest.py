"""Strict settings for every test; they hold before JAX touches a device."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# What is promised bitwise is promised of CPUs; JAX_PLATFORMS=cuda runs the tests elsewhere.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
# jax_numpy_dtype_promotion="strict" is not possible: optax.scale_by_adam itself breaks it.

# A first example compiles, so it has no deadline; the same examples at every run.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public test data that SAE_JAX_DATA names."""
    root = os.environ.get("SAE_JAX_DATA")
    if not root:
        pytest.skip("SAE_JAX_DATA does not name the test data")
    return Path(root)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Compiled programs of a module are of no use to the next: 2 GB by the end otherwise."""
    yield
    jax.clear_caches()

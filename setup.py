"""One distribution, `sae-jax`; run `make demo` or `make test` instead of this file."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sae_jax/__init__.py").read_text()).group(1)

EXTRAS = {
    "single-cell": ["scanpy>=1.10", "scikit-misc>=0.5", "statsmodels>=0.14", "umap-learn>=0.5.6"],
    "extract": ["torch>=2.4", "transformers>=4.44"],
    "concepts": ["torch>=2.4", "transformers>=4.44", "scvi-tools>=1.2"],
    "tensorboard": ["tensorboardX>=2.6"],
    "search": ["optuna>=4"],
    "out-of-core": ["dask[array,distributed]>=2025.9", "xarray>=2025.6"],
    "browser": [
        "jinja2>=3.1",
        "plotly>=6",
        "starlette>=0.45",
        "statsmodels>=0.14",
        "uvicorn>=0.30",
    ],
    "cuda": ["jax[cuda13]"],
}
EXTRAS["dev"] = [
    *EXTRAS["single-cell"],
    *EXTRAS["browser"],
    *EXTRAS["tensorboard"],
    *EXTRAS["extract"],
    *EXTRAS["out-of-core"],
    "scvi-tools>=1.2",
    "build",
    "httpx2",
    "hypothesis",
    "playwright",
    "pytest",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",
]

setup(
    name="sae-jax",
    version=VERSION,
    description="Sparse autoencoders that name what single-cell foundation models know.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{suffix}"
            for name in ("sae_jax", "extract", "analysis", "experiments")
            for suffix in ("", ".*")
        ]
    ),
    package_data={"analysis": ["data/*", "browser/static/*", "browser/templates/*"]},
    install_requires=[
        "absl-py>=2.1",
        "anndata>=0.12",
        "flax>=0.10",
        "gseapy>=1.1.3",
        "h5py>=3.11",
        "jax>=0.10",
        "matplotlib>=3.9",
        "networkx>=3",
        "numba>=0.60",
        "numpy>=2.0",
        "obonet>=1.1",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.11",
        "pandas>=2.2",
        "pyarrow>=17",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "tqdm>=4.66",
        "zarr>=3.0",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["sae-jax = experiments.cli:main", "sae-jax-extract = extract.main:cli"]
    },
)

"""Which faults make sense of a file, by its format."""

import random
from collections.abc import Callable
from pathlib import Path

from tests.hostile.arrays import of_npy, of_npz, of_pickle, of_safetensors, of_torch
from tests.hostile.faults import Fault, of_bytes, of_paths
from tests.hostile.stores import of_h5, of_parquet, of_zarr
from tests.hostile.texts import of_gzip, of_json, of_text

TEXT = (".gmt", ".obo", ".gaf", ".tsv", ".csv", ".txt", ".yaml")


def of(path: Path, seed: int = 0, thorough: bool = False) -> list[Fault]:
    """The faults that make sense of a valid file, by its format; `thorough` takes no sample."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    packed = path.suffix == ".gz"
    random_ = random.Random(f"{path.name}{seed}")
    found = [*of_paths(), *of_bytes(random_, 40 if thorough else 6)] if path.is_file() else []
    makers: dict[str, Callable[[Path], list[Fault]]] = {
        ".json": of_json, ".npy": lambda _: of_npy(), ".npz": of_npz, ".pt": of_torch,
        ".safetensors": of_safetensors, ".parquet": of_parquet, ".h5ad": of_h5,
        ".pkl": lambda _: of_pickle(), ".bin": of_torch,
    }  # fmt: skip
    if packed:
        found += of_gzip()
    elif suffix in TEXT:
        found += of_text(path)
    elif suffix in makers:
        found += makers[suffix](path)
    elif path.is_dir():
        found += of_zarr(path)
    return _sampled(found, random_, thorough)


def _sampled(found: list[Fault], random_: random.Random, thorough: bool) -> list[Fault]:
    """All faults but those whose name begins with "any": of these some."""
    if thorough:
        return found
    many = [fault for fault in found if fault.name.startswith("any")]
    rest = [fault for fault in found if not fault.name.startswith("any")]
    return rest + random_.sample(many, min(len(many), 16))

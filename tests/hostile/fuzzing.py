"""One file of a reader's valid input replaced by bytes, in a folder of its own."""

import shutil
from pathlib import Path

from tests.hostile import corpus, faults
from tests.hostile.readers import READERS, Reader

PLACES = [
    (reader, file)
    for reader in READERS
    for file in reader.files
    if not file.endswith((".zarr", ".sqlite"))
]


def attempt(reader: Reader, file: str, content: bytes, scratch: Path) -> corpus.Outcome:
    """What the reader makes of its input with this content in one file."""
    fault = faults.Fault("fuzz", "bytes", faults.put(content))
    try:
        return corpus.run(reader, file, fault, scratch)
    finally:
        for each in scratch.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()


def went_well(reader: Reader, file: str, outcome: corpus.Outcome) -> bool:
    """As `corpus.allowed`, of bytes that may be anything."""
    return corpus.allowed(reader, file, faults.Fault("fuzz", "bytes", lambda _: None), outcome)

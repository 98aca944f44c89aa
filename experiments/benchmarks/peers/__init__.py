"""The libraries that ours is measured beside, one file each; `driver` runs any of them.

A peer's file has `DISTRIBUTION`, the name it is installed by; `settings(config)`, by name what may
be chosen without changing what is computed; and `Member(config, weights, device, **setting)`, one
configuration in training. Every library trains by its own step, nothing of it is written again.
Only `plain_torch` computes exactly what ours computes. The others have their own recipes (initial
weights, clipping, normalised decoders, bookkeeping of dead latents), set as near to ours as they
allow; each file says what still differs. Of them the benchmark checks that the loss is finite and
falls.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[3]
BENCH_VENV = ROOT / ".bench-venv"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer: its file here, the package without which it is absent, whether its loss is ours."""

    file: str
    package: str
    same_loss: bool = False

    @property
    def module(self) -> str:
        """Importable name of the file."""
        return f"{__name__}.{self.file}"


PEERS = {
    "torch": Peer("plain_torch", "torch", same_loss=True),
    "sae_lens": Peer("sae_lens", "sae_lens"),
    "dictionary_learning": Peer("dictionary_learning", "dictionary_learning"),
    "overcomplete": Peer("overcomplete", "overcomplete"),
    "sparsify": Peer("sparsify", "sparsify"),
}


class NotOfferedError(Exception):
    """The library cannot train such a dictionary."""


def interpreter(peer: str, given: Mapping[str, str]) -> str:
    """The Python that has the peer: of `given` (by peer, "" for all), else by convention.

    The convention is .bench-venv/<peer>, else .bench-venv, else the environment of this process.
    """
    chosen = given.get(peer, given.get(""))
    if chosen:
        return chosen
    for folder in (BENCH_VENV / peer, BENCH_VENV):
        python = folder / "bin" / "python"
        if python.exists():
            return str(python)
    return sys.executable

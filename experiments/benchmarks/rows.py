"""What is trained in each line of the benchmark of training.

Nothing of jax, sae_jax or torch here: ours and every peer read it, each in its own environment.
"""

import dataclasses
from typing import Any

import numpy as np

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: what is trained, and on how many rows for how many epochs.

    `k` is of a TopK row of one configuration; several spread theirs from 1 to 50 % of the latents.
    """

    title: str
    d_in: int
    n_latents: int
    members: int
    epochs: int
    batch_size: int = 128
    activation: str = "relu"
    k: int | None = None
    rows: int = 4096

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.rows // self.batch_size

    def configs(self) -> list[dict[str, Any]]:
        """Each configuration, by the names of SAEConfig."""
        names = ("d_in", "n_latents", "batch_size", "activation")
        shape = {name: getattr(self, name) for name in names}
        if self.k is not None:
            varied = [{"k": self.k}] * self.members
        elif self.activation == "topk":
            ks = np.linspace(max(1, self.n_latents // 100), self.n_latents // 2, self.members)
            varied = [{"k": int(k)} for k in ks]
        else:
            varied = [{"l1_weight": float(w)} for w in np.geomspace(0.1, 1, self.members)]
        rate = {"learning_rate": LEARNING_RATE}
        return [{**shape, **rate, **member, "seed": seed} for seed, member in enumerate(varied)]

    def quick(self) -> "Row":
        """The same for fewer epochs."""
        return dataclasses.replace(self, epochs=min(self.epochs, max(2, self.epochs // 8)))


ROWS = {
    "vanilla_1": Row(
        title="one configuration 4 -> 400, batch 128, L1",
        d_in=4, n_latents=400, members=1, epochs=256,
    ),
    "vanilla_64": Row(
        title="64 configurations of 4 -> 400, batch 128, L1 (vanilla)",
        d_in=4, n_latents=400, members=64, epochs=16,
    ),
    "topk_16": Row(
        title="TopK 4 -> 400, batch 128, k traced, 16 configurations",
        d_in=4, n_latents=400, members=16, epochs=8, activation="topk",
    ),
    "wide_10000": Row(
        title="20 -> 10000, batch 128, L1, one configuration",
        d_in=20, n_latents=10000, members=1, epochs=4,
    ),
    "dense_2048": Row(
        title="512 -> 2048, batch 512, L1, one configuration",
        d_in=512, n_latents=2048, members=1, epochs=4, batch_size=512,
    ),
    "topk_5000": Row(
        title="512 -> 5000, batch 1024, TopK with k = 80, one configuration",
        d_in=512, n_latents=5000, members=1, epochs=8, batch_size=1024, activation="topk", k=80,
    ),
}  # fmt: skip

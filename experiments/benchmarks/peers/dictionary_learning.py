"""dictionary_learning: StandardTrainer and TopKTrainer, by `update`.

What differs from ours: decoder columns are held at norm 1 (the gradient along them is removed, they
are normalised after each step); the decoder's bias is subtracted before the encoder; initial
weights; TopKTrainer clips gradients to norm 1, counts rows since a latent fired, and after a
thousand steps keeps a threshold for later use. Set as ours: no warm-up of the learning rate or the
penalty, no resampling, no auxiliary loss.
"""

from typing import Any

import torch
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer

DISTRIBUTION = "dictionary-learning"


def settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Nothing to choose."""
    return {"": {}}


class Member:
    """One configuration in training."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], device: str
    ) -> None:
        common = {
            "steps": 10**9, "activation_dim": config["d_in"], "dict_size": config["n_latents"],
            "lr": config["learning_rate"], "warmup_steps": 0, "seed": config["seed"],
            "device": device, "layer": 0, "lm_name": "none",
        }  # fmt: skip
        if "k" in config:
            self.trainer = TopKTrainer(**common, k=config["k"], auxk_alpha=0)
        else:
            self.trainer = StandardTrainer(
                **common, l1_penalty=config["l1_weight"], sparsity_warmup_steps=None
            )
        self.step = 0

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Its own."""
        with torch.no_grad():
            return self.trainer.loss(batch, step=self.step)

    def epoch(self, batches: torch.Tensor) -> None:
        """A step on each batch."""
        for batch in batches:
            self.trainer.update(self.step, batch)
            self.step += 1

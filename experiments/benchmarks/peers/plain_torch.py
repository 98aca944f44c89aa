"""A plain loop: two nn.Linear and torch.optim.Adam, with the fastest of Adam's implementations.

Same initial weights, same loss as ours.
"""

from typing import Any

import torch

DISTRIBUTION = "torch"


def settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Implementations of Adam."""
    implementations = {"Adam default": {"foreach": False}, "Adam foreach": {"foreach": True}}
    return {**implementations, "Adam fused": {"fused": True}}


class Member:
    """One configuration in training."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], device: str, **adam: bool
    ) -> None:
        self.config = config
        self.encoder = torch.nn.Linear(config["d_in"], config["n_latents"], device=device)
        self.decoder = torch.nn.Linear(config["n_latents"], config["d_in"], device=device)
        with torch.no_grad():
            self.encoder.weight.copy_(weights["encoder"].T)
            self.encoder.bias.copy_(weights["encoder_bias"])
            self.decoder.weight.copy_(weights["decoder"].T)
            self.decoder.bias.copy_(weights["decoder_bias"])
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=config["learning_rate"], **adam)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Squared error summed over dimensions and the penalty, both averaged over the batch."""
        z = self.encoder(batch)
        if "k" in self.config:
            values, indices = torch.topk(z, self.config["k"], dim=-1, sorted=False)
            z = torch.zeros_like(z).scatter(-1, indices, torch.relu(values))
            penalty = 0.0
        else:
            z = torch.relu(z)
            penalty = self.config["l1_weight"] * z.sum() / len(batch)
        return ((self.decoder(z) - batch) ** 2).sum() / len(batch) + penalty

    def epoch(self, batches: torch.Tensor) -> None:
        """A step on each batch."""
        for batch in batches:
            loss = self.loss(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

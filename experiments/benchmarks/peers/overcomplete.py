"""Overcomplete: SAE and TopKSAE, by `train_sae`, called once an epoch.

What differs from ours: a dictionary has no bias; initial weights; the loss is ours divided by d_in
(a mean over dimensions), which Adam does not notice; it notes which latents fired. Set as ours: no
normalisation of the dictionary, no clipping, no monitoring; the optimiser, which its users bring,
is torch's Adam in the faster of two implementations.

The package imports readers of vision models, though not to train: where torchvision is missing, an
empty module takes its place in this process (not in one that only looks for the package).
"""

import functools
import importlib.util
import sys
import types
from typing import Any

import torch

if importlib.util.find_spec("overcomplete") and importlib.util.find_spec("torchvision") is None:
    stand_in = types.ModuleType("torchvision")
    stand_in.transforms = types.ModuleType("torchvision.transforms")
    sys.modules |= {"torchvision": stand_in, "torchvision.transforms": stand_in.transforms}

from overcomplete.sae import SAE, TopKSAE, mse_l1, train_sae

DISTRIBUTION = "overcomplete"


def settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Implementations of Adam."""
    return {"Adam default": {"foreach": False}, "Adam fused": {"fused": True}}


def squared_error(x: torch.Tensor, x_hat: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """A loss of its form without a penalty."""
    return (x - x_hat).square().mean()


class Member:
    """One configuration in training."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], device: str, **adam: bool
    ) -> None:
        torch.manual_seed(config["seed"])
        shape = {
            "input_shape": config["d_in"], "nb_concepts": config["n_latents"], "device": device,
            "dictionary_params": {"normalization": "identity"},
        }  # fmt: skip
        self.device = device
        if "k" in config:
            self.sae = TopKSAE(**shape, top_k=config["k"])
            self.criterion = squared_error
        else:
            self.sae = SAE(**shape)
            penalty = config["l1_weight"] / (config["d_in"] * config["batch_size"])
            self.criterion = functools.partial(mse_l1, penalty=penalty)
        parameters = self.sae.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=config["learning_rate"], **adam)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """The criterion of a batch."""
        with torch.no_grad():
            pre_codes, codes, x_hat = self.sae(batch)
            return self.criterion(batch, x_hat, pre_codes, codes, self.sae.get_dictionary())

    def epoch(self, batches: torch.Tensor) -> None:
        """Its loop over the batches."""
        train_sae(
            self.sae, batches, self.criterion, self.optimizer, nb_epochs=1, clip_grad=0,
            monitoring=0, device=self.device,
        )  # fmt: skip

"""Sparsify (eai-sparsify): SparseCoder, TopK only, with the optimisers of its Trainer.

Its `Trainer.fit` hangs on a language model that computes the activations, so the lines below are
those of `fit` that train: normalise the decoder, forward, backward, remove the gradient along the
decoder, step; all by methods of the library.

What differs from ours: the loss is the fraction of variance unexplained; decoder rows are held at
norm 1; the decoder's bias starts at the mean of the first batch and is subtracted before the
encoder; initial weights; the codes are never spread to all latents. Its default optimiser
(schedule-free sign descent) is tried beside Adam. Left out: what `fit` counts and logs.
"""

from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD

from experiments.benchmarks.peers import NotOfferedError

DISTRIBUTION = "eai-sparsify"


def settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Optimisers that its trainer has."""
    if "k" not in config:
        raise NotOfferedError("no L1")
    return {"signum": {"adam": False}, "Adam": {"adam": True}}


class Member:
    """One configuration in training."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], device: str, adam: bool
    ) -> None:
        torch.manual_seed(config["seed"])
        shape = SparseCoderConfig(num_latents=config["n_latents"], k=config["k"])
        self.sae = SparseCoder(config["d_in"], shape, device, dtype=torch.float32)
        if adam:
            self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config["learning_rate"])
        else:  # the learning rate is its default, and depends on the width
            rate = 5e-3 / (self.sae.num_latents / 2**14) ** 0.5
            signs = SignSGD([{"params": self.sae.parameters(), "lr": rate}])
            self.optimizer = ScheduleFreeWrapper(signs, momentum=0.95)
            self.optimizer.train()
        self.started = False

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Fraction of variance unexplained."""
        with torch.no_grad():
            return self.sae(batch).fvu

    def epoch(self, batches: torch.Tensor) -> None:
        """A step on each batch."""
        for batch in batches:
            if not self.started:
                self.sae.b_dec.data = batch.mean(0)
                self.started = True
            self.sae.set_decoder_norm_to_unit_norm()
            self.sae(batch).fvu.backward()
            self.sae.remove_gradient_parallel_to_decoder_directions()
            self.optimizer.step()
            self.optimizer.zero_grad()

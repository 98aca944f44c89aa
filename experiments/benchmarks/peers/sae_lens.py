"""SAELens: StandardTrainingSAE and TopKTrainingSAE, by `SAETrainer.step`.

What differs from ours: the L1 term weighs a code by the norm of its decoder row; gradients are
clipped to norm 1; decoder rows start at norm .1; it counts how often each latent fires. Set as
ours: no pre-bias, no warm-up, in TopK no rescaling by decoder norms and no auxiliary loss. Its
sparse TopK codes are tried beside its dense ones.
"""

from typing import Any

import torch
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

DISTRIBUTION = "sae-lens"


def settings(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kinds of codes that TopK offers."""
    if "k" in config:
        return {"dense codes": {"sparse": False}, "sparse codes": {"sparse": True}}
    return {"": {}}


class Member:
    """One configuration in training."""

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, torch.Tensor],
        device: str,
        sparse: bool = False,
    ) -> None:
        torch.manual_seed(config["seed"])
        shape = {"d_in": config["d_in"], "d_sae": config["n_latents"], "device": device}
        shape["apply_b_dec_to_input"] = False
        if "k" in config:
            self.sae = TopKTrainingSAE(
                TopKTrainingSAEConfig(
                    **shape, k=config["k"], use_sparse_activations=sparse,
                    rescale_acts_by_decoder_norm=False, aux_loss_coefficient=0.0,
                )
            )  # fmt: skip
        else:
            self.sae = StandardTrainingSAE(
                StandardTrainingSAEConfig(**shape, l1_coefficient=config["l1_weight"])
            )
        trainer = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=config["batch_size"],
            lr=config["learning_rate"], lr_end=config["learning_rate"], device=device,
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        self.trainer = SAETrainer(trainer, self.sae, data_provider=iter(()))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Its forward pass."""
        given = TrainStepInput(
            sae_in=batch, dead_neuron_mask=None, coefficients=self.trainer.get_coefficients(),
            n_training_steps=self.trainer.n_training_steps, is_logging_step=False,
        )  # fmt: skip
        with torch.no_grad():
            return self.sae.training_forward_pass(given).loss

    def epoch(self, batches: torch.Tensor) -> None:
        """What `SAETrainer.fit` does with each batch, without logs and checkpoints."""
        for batch in batches:
            self.trainer.maybe_reset_sparsity()
            self.trainer.step(batch)
            self.trainer.n_training_steps += 1

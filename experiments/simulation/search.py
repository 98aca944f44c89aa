"""Optuna's search for an autoencoder's hyperparameters (appendix A.2.2); Optuna is optional."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.simulation import fitting
from experiments.simulation.autoencoder import Recipe
from sae_jax import InputError

TRIALS, EPOCHS = 50, 100
LEARNING_RATES = (1e-6, 1e-3)
WEIGHT_DECAYS = (0.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
DROPOUTS = (0.0, 0.1)
BATCH_SIZES = (32, 64, 128, 256, 512)


def search(
    dims: Sequence[int],
    train: np.ndarray,
    validation: np.ndarray,
    *,
    readout: np.ndarray | None = None,
    trials: int = TRIALS,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> Recipe:
    """The recipe of the lowest validation loss; arguments as of `fitting.fit`.

    Learning rates in 1e-6 .. 1e-3 (logarithmic), weight decays 0 and 1e-7 .. 1e-1, dropout in
    0 .. .1, batches of 32 .. 512, as many as there are cells for. The recipe returned has the
    epochs and the patience of `Recipe`.

    Raises:
      InputError: Optuna is not installed, or fewer cells than the smallest batch.
    """
    try:
        import optuna
    except ImportError:
        raise InputError("the search needs Optuna: pip install 'sae-jax[search]'") from None
    sizes = [size for size in BATCH_SIZES if size <= len(train)]
    if not sizes:
        raise InputError(f"{len(train)} cells are fewer than the smallest batch, {BATCH_SIZES[0]}")

    def loss(trial: "optuna.Trial") -> float:
        recipe = Recipe(
            learning_rate=trial.suggest_float("learning_rate", *LEARNING_RATES, log=True),
            weight_decay=trial.suggest_categorical("weight_decay", WEIGHT_DECAYS),
            dropout=trial.suggest_float("dropout", *DROPOUTS),
            batch_size=trial.suggest_categorical("batch_size", sizes),
            epochs=epochs,
            patience=None,
        )
        fitted = fitting.fit(dims, train, validation, recipe, [seed], readout=readout)
        last = float(fitted.history["validation_loss"][0, -1])
        return last if np.isfinite(last) else float("inf")

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(loss, n_trials=trials, show_progress_bar=True)
    return dataclasses.replace(Recipe(), **study.best_params)

"""An scVI trained on a study's own cells by scvi-tools, and read by `extract` like any other."""

import importlib.util
import logging as python_logging
import warnings
from pathlib import Path

import anndata
from absl import logging

import extract
from extract.models.base import Model
from sae_jax import InputError, files


def check_installed() -> None:
    """Raises InputError without scvi-tools."""
    if importlib.util.find_spec("scvi") is None:
        raise InputError(
            "scvi-tools is not installed, and a model is trained here: pip install scvi-tools "
            "(it is in 'sae-jax[dev]')"
        )


def trained(
    adata: anndata.AnnData,
    folder: Path,
    *,
    n_latent: int = 20,
    epochs: int = 120,
    seed: int = 0,
    early_stopping: bool = False,
) -> Model:
    """An scVI (negative binomial, one layer of 128) of the counts in X, in `folder` once trained.

    Early stopping holds out a tenth of the cells. What lies in `folder` already is read.
    """
    if not folder.exists():
        with warnings.catch_warnings():  # of how many workers load data, and of versions to come
            warnings.simplefilter("ignore")
            import scvi

            for chatty in ("lightning.pytorch", "lightning.fabric"):
                python_logging.getLogger(chatty).setLevel(python_logging.ERROR)
            scvi.settings.verbosity = python_logging.ERROR
            scvi.settings.seed = seed
            ours = adata.copy()  # setup_anndata writes into it
            scvi.model.SCVI.setup_anndata(ours)
            model = scvi.model.SCVI(ours, n_latent=n_latent, gene_likelihood="nb")
            logging.info("training an scVI of %d cells", adata.n_obs)
            model.train(
                max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
                early_stopping=early_stopping, enable_progress_bar=False,
                enable_checkpointing=False, enable_model_summary=False,
            )  # fmt: skip
            with files.write_aside(folder) as fresh:
                model.save(fresh)
    return extract.load_model("scvi", folder)

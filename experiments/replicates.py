"""Which features come back in dictionaries that differ in their seeds, and a dictionary of those
that do: what the programs that describe features leave of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from absl import logging

import sae_jax
from analysis import stability
from analysis.consensus import consensus
from experiments import folders
from sae_jax import InputError, files
from sae_jax.errors import counted

SCORES = (
    "replicated_by_direction", "replicated_by_activation", "best_cosine", "best_correlation"
)  # fmt: skip
FILE, CONSENSUS = "stability.parquet", "consensus"


def replicated(
    dictionaries: Sequence[sae_jax.Dictionary],
    x: np.ndarray,
    out: Path,
    seed: int,
    *,
    agreed: bool = False,
) -> pd.DataFrame:
    """A row a feature of each dictionary, as `stability.Replication.features`; kept in `FILE`.

    Args:
      dictionaries: of the embedding x [cells, d]; the first is the one described.
      agreed: also save the consensus of all, `CONSENSUS`: features with a counterpart, by
        direction, in half of the other dictionaries.
    """
    path, folder = out / FILE, out / CONSENSUS
    if folders.readable(path) and (folder.exists() or not agreed):
        return files.read_parquet(path)
    codes = [dictionary.encode(x, sparse=True) for dictionary in dictionaries]
    found = stability.replication(dictionaries, codes, embedding=x, seed=seed)
    files.write_parquet(path, found.features)
    if agreed and not folder.exists():
        try:
            made = consensus(dictionaries, found).dictionary(x)
        except InputError as error:  # nothing comes back, which is a result
            logging.warning("no consensus dictionary: %s", error)
        else:
            made.save(folder)
            some = counted(made.config.n_latents, "feature")
            logging.info("%d dictionaries agree on %s", len(codes), some)
    return found.features


def scores(table: pd.DataFrame, live: np.ndarray) -> pd.DataFrame:
    """`SCORES` of the first dictionary's live latents, in their order: columns for their table."""
    own = table[table["dictionary"] == 0].set_index("feature")
    return own.loc[live, [name for name in SCORES if name in own]].reset_index(drop=True)


def of(described: pd.DataFrame) -> list[str]:
    """The shares among the columns of a table, to be shown beside names."""
    return [name for name in SCORES[:2] if name in described]


def told(described: pd.DataFrame) -> str:
    """A sentence on the features of a table that has `SCORES`."""
    ways = []
    for name in of(described):
        share = described[name].dropna()
        way = name.removeprefix("replicated_").replace("_", " ")
        ways.append(f"{way} {(share > 0).mean():.0%}, in all of them {(share == 1).mean():.0%}")
    return "come back in another seed, beyond what random directions reach: " + "; ".join(ways)


def check_alike(dictionaries: Sequence[sae_jax.Dictionary], names: Sequence[str]) -> None:
    """Refuse dictionaries of another embedding, or of another kind, than the first's."""
    first = dictionaries[0].config
    for name, dictionary in zip(names, dictionaries, strict=True):
        config = dictionary.config
        if (config.d_in, config.activation) != (first.d_in, first.activation):
            raise InputError(
                f"{name} is {config.activation} of {config.d_in} dimensions, {names[0]} is "
                f"{first.activation} of {first.d_in}: replicates differ in their seeds"
            )

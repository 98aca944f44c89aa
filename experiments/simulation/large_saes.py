"""The second half of the large study: dictionaries of the autoencoders' embeddings, and measures.

Each function is a stage of `large`; it reads what an earlier call left on disk and goes on from
there. Dictionaries are trained on the cells of the autoencoder and measured on those held out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from tqdm import tqdm

import sae_jax
from analysis import baselines, nulls
from experiments.simulation import autoencoder, recovery, structure
from experiments.simulation.autoencoder import AutoEncoder
from experiments.simulation.data import BLOCK, Cells, Large
from experiments.simulation.recovery import COLUMNS, GROUPS, Sums
from experiments.simulation.sweep import BAR, BATCH
from sae_jax import SAEConfig, files
from sae_jax.errors import counted

if TYPE_CHECKING:
    import pandas as pd

PATIENCE = 20
CHOSEN = {"scaling": 100, "l1_weight": 1e-3, "learning_rate": 1e-5}  # appendix A.2.5
TABLE_S5 = {  # of an autoencoder of 150 latents
    "PCA": (0.72, 0.36, 0.35, -0.12, 0.56), "ICA": (0.54, 0.50, 0.50, 0.02, -0.01),
    "SVD": (0.66, 0.41, 0.32, -0.09, 0.62), "SAE": (0.74, 0.43, 0.19, -0.54, 0.65),
}  # fmt: skip
S5_GROUPS = ("X''", "X'", "X", "A", "B")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which dictionaries of an embedding. The defaults are Table S4's, vanilla SAEs with a loss
    that is a mean over cells and dimensions, as in the authors' code.

    Attributes:
      epochs: at most; training stops when 20 have brought no lower validation loss.
    """

    scalings: tuple[int, ...] = (20, 100, 200, 500)
    rates: tuple[float, ...] = (1e-4, 1e-5, 1e-6)
    l1_weights: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    seeds: tuple[int, ...] = (0,)
    epochs: int = 500

    def configs(self, d_in: int, rows: int) -> list[SAEConfig]:
        """One a combination, narrow ones first, for a training set of so many rows."""
        return sae_jax.grid(
            "vanilla", d_in=d_in, n_latents=[d_in * scaling for scaling in self.scalings],
            learning_rate=list(self.rates), l1_weight=list(self.l1_weights),
            seed=list(self.seeds), batch_size=min(BATCH, rows), reduction="mean",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """Latents of an autoencoder.

    name: of the autoencoder. z: latents [cells, d], float32. train: the first so many are trained
    on. variables: `recovery.hidden_variables` of those held out; places: where each lies.
    """

    name: str
    z: np.ndarray
    train: int
    variables: np.ndarray
    places: dict[str, slice]

    def sums(self, encode: Callable, latents: int, seed: int | None = None) -> Sums:
        """Of codes and hidden variables over held-out cells; with a seed, of other cells than the
        codes."""
        v = self.variables
        if seed is not None:
            v = v[np.random.default_rng(seed).permutation(len(v))]
        return Sums.of(recovery.encoded(encode, self.z[self.train :], v, latents))


def embed(
    path: Path, name: str, model: AutoEncoder, simulation: Large, cells: Cells, train: int
) -> Embedding:
    """Latents of all cells, made or read from `path`."""
    if not path.exists():
        parts = []
        for low in tqdm(range(0, len(cells.x), BLOCK), desc=f"{name}, latents", bar_format=BAR):
            y = simulation.counts(cells.x_active[low : low + BLOCK])
            parts.append(autoencoder.latents(model, y))
        with files.write_aside(path) as fresh, fresh.open("wb") as out:
            np.save(out, np.concatenate(parts))
    held_out = Cells(**{key: each[train:] for key, each in vars(cells).items()})
    return Embedding(name, np.load(path), train, *recovery.hidden_variables(held_out))


def sweep(embedding: Embedding, grid: Grid, out: Path) -> sae_jax.Run:
    """A dictionary for every configuration, in `out`."""
    z, train = embedding.z, embedding.train
    run = sae_jax.train(
        grid.configs(z.shape[1], train), z[:train], z[train:], epochs=grid.epochs, workdir=out,
        patience=PATIENCE, provenance={"simulation": "large", "autoencoder": embedding.name},
    )  # fmt: skip
    if failed := int((run.results["status"] == "failed").sum()):
        raise SystemExit(
            f"error: {counted(failed, 'configuration')} failed (see above); the same command tries "
            "again"
        )
    return run


def recovered(embedding: Embedding, run: sae_jax.Run, m: np.ndarray, out: Path) -> "pd.DataFrame":
    """One row a dictionary: its results, and `highest:Y` and so on (see `recovery.highest`)."""
    import pandas as pd

    rows = []
    costs = run.results["n_latents"].tolist()
    with tqdm(total=sum(costs), desc=f"{embedding.name}, recovery", bar_format=BAR) as bar:
        for position, dictionary in enumerate(run.dictionaries):
            path = out / f"{position:04d}.parquet"
            if dictionary is not None and not path.exists():
                sums = embedding.sums(dictionary.encode, dictionary.config.n_latents)
                files.write_parquet(path, pd.DataFrame([_row(embedding, sums, m)]))
            found = {} if dictionary is None else files.read_parquet(path).iloc[0].to_dict()
            rows.append(run.results.iloc[position].to_dict() | found)
            bar.update(costs[position])
    table = pd.DataFrame(rows)
    table.insert(0, "scaling", table["n_latents"] // table["d_in"])
    table.insert(0, "autoencoder", embedding.name)
    return table


def linear(embedding: Embedding, m: np.ndarray, path: Path, seed: int) -> "pd.DataFrame":
    """One row for each of `baselines.METHODS`, by the same measure."""
    import pandas as pd

    if not path.exists():
        rows = []
        for each in baselines.fit_all(embedding.z[: embedding.train], seed=seed):
            if not each.converged:
                logging.warning("%s of %s did not converge", each.name, embedding.name)
            sums = embedding.sums(each.encode, each.n_components)
            rows.append(
                {
                    "autoencoder": embedding.name, "method": each.name,
                    "components": each.n_components, "converged": each.converged,
                    **_row(embedding, sums, m),
                }
            )  # fmt: skip
        files.write_parquet(path, pd.DataFrame(rows))
    return files.read_parquet(path)


def _row(embedding: Embedding, sums: Sums, m: np.ndarray) -> dict[str, float]:
    found = recovery.by_group(sums, embedding.places, m)
    return {f"{name}:{group}": found[group][name] for group in GROUPS for name in COLUMNS}


def chosen(table: "pd.DataFrame") -> "pd.DataFrame":
    """Rows of the settings of appendix A.2.5, or of those nearest to them that there are, but for
    the scaling: learning rate 1e-5, L1 weight 1e-3, of autoencoders of 150 latents."""
    table = table[table["status"] == "trained"]
    table = table[_nearest(table["d_in"], 150)]
    table = table[_nearest(table["learning_rate"], CHOSEN["learning_rate"])]
    return table[_nearest(table["l1_weight"], CHOSEN["l1_weight"])]


def _nearest(values: "pd.Series", wanted: float) -> "pd.Series":
    distance = np.log(values / wanted).abs()
    return distance <= distance.min() + 1e-9


def table_s5(table: "pd.DataFrame", linear: "pd.DataFrame") -> "pd.DataFrame":
    """Table S5: a row for each method and column of `recovery.highest`, the paper's first.

    SAE: those of `chosen`, mean over hidden scaling factors; `sem` over these, as the paper has it,
    (of the first seed) and `sem_seeds`, over seeds (of means over scalings); NaN of one.
    """
    import pandas as pd

    rows = []
    saes = chosen(table)
    name = saes["autoencoder"].iloc[0]
    saes = saes[saes["autoencoder"] == name]
    linear = linear[linear["autoencoder"] == name].set_index("method")
    for method, numbers in TABLE_S5.items():
        paper = dict(zip(S5_GROUPS, numbers, strict=True))
        rows.append({"method": method, "rule": "the paper", "autoencoder": "150 latents", **paper})
        for rule in COLUMNS:
            columns = {f"{rule}:{group}": group for group in S5_GROUPS}
            row: dict[str, Any] = {"method": method, "rule": rule, "autoencoder": name}
            if method != "SAE":
                rows.append(row | linear.loc[method, list(columns)].rename(columns).to_dict())
                continue
            part = saes[[*columns, "seed"]].rename(columns=columns)
            by_seed = part.groupby("seed").mean()
            first = part[part["seed"] == part["seed"].iloc[0]].drop(columns="seed")
            rows.append(row | by_seed.mean().to_dict())
            rows[-1] |= {f"sem:{group}": first[group].sem() for group in S5_GROUPS}
            rows[-1] |= {f"sem_seeds:{group}": by_seed[group].sem() for group in S5_GROUPS}
    return pd.DataFrame(rows)


def structures(
    embeddings: Sequence[Embedding],
    runs: dict[str, sae_jax.Run],
    table: "pd.DataFrame",
    m: np.ndarray,
    path: Path,
    seed: int,
) -> "pd.DataFrame":
    """Coverage by percentile and program of the dictionary nearest to that of appendix A.2.5.

    Column `latents_of`: "SAE"; "permuted M", the same connections against an M whose genes are
    permuted; "other cells", the SAE's activations in permuted cells; "untrained", the dictionary
    before training. The last three are nulls, which the paper lacks.
    """
    import pandas as pd

    if path.exists():
        return files.read_parquet(path)
    rows = chosen(table)
    row = rows[_nearest(rows["scaling"], CHOSEN["scaling"])].iloc[0]
    embedding = next(each for each in embeddings if each.name == row["autoencoder"])
    of_one = table[table["autoencoder"] == row["autoencoder"]]
    position = int(np.flatnonzero(of_one.index == row.name)[0])
    dictionary = runs[embedding.name].dictionaries[position]
    latents, where = dictionary.config.n_latents, embedding.places["X''"]

    def sums(dictionary: sae_jax.Dictionary, seed: int | None = None) -> Sums:
        return embedding.sums(dictionary.encode, latents, seed).of_variables(where)

    trained = sums(dictionary)
    kinds: dict[str, tuple[Callable[[], Sums], np.ndarray | None]] = {
        "SAE": (lambda: trained, None),
        "permuted M": (lambda: trained, structure.permuted(m, seed)),
        "other cells": (lambda: sums(dictionary, seed), None),
        "untrained": (lambda: sums(nulls.untrained(dictionary, dictionary.config.seed)), None),
    }
    found = []
    for kind, (made, null) in tqdm(kinds.items(), desc="structure", bar_format=BAR):
        part = structure.structure(made(), m, null=null)
        found.append(part.assign(latents_of=kind, active=int(trained.active.sum())))
    measured = ("n_latents", "validation_r2", "validation_l0")
    about = {name: row[name] for name in ("autoencoder", "seed", *CHOSEN, *measured)}
    whole = pd.concat(found, ignore_index=True).assign(**about)
    files.write_parquet(path, whole)
    return whole


def summary(covered: "pd.DataFrame") -> "pd.DataFrame":
    """One row a percentile: the SAE's mean coverage, what chance covers at its latents' shares of
    genes, the X'' matched, and the mean coverage of each null."""
    import pandas as pd

    own = covered[covered["latents_of"] == "SAE"].groupby("percentile")
    table = pd.DataFrame(
        {
            "coverage": own["coverage"].mean(), "median": own["coverage"].median(),
            "matched": own.size(), "share": own["share"].mean(),
            "significant": own["significant"].sum() / own["latents"].sum(),
        }
    )  # fmt: skip
    others = covered[covered["latents_of"] != "SAE"]
    means = others.pivot_table(index="percentile", columns="latents_of", values="coverage")
    return table.join(means).reset_index()

"""The small sweep: Table S4's dictionaries, and the metrics of appendix A.2.4.

`train` and `measure` go on where an earlier call was killed; both show the time that is left, for
which a configuration counts as much as it costs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

import sae_jax
from experiments.simulation import data
from sae_jax import Dictionary, SAEConfig, distributed, ensemble, files, redundancy
from sae_jax.state import History

if TYPE_CHECKING:
    import pandas as pd

SCALINGS = (2, 5, 10, 20, 50, 100, 200, 1000)
RATES = (1e-2, 1e-3, 1e-4, 1e-5)
L1_WEIGHTS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PERCENTS = (5, 10, 20, 50, 75, 100)
PRESETS = {"vanilla": "Vanilla", "bricken": "ReLU", "topk_schuster": "TopK"}  # in the paper's words
EPOCHS = 500
CODE_EPOCHS = {1e-2: 100, 1e-3: 500, 1e-4: 750, 1e-5: 1000}
CODE_PERCENTS = (1, *PERCENTS)
BATCH = 128  # the code's; Table S4 names it for the large simulation only
HIGH = 0.95
MEANS = ("highest", "highest_absolute", "highest_signed", "latents", "latents_absolute")
GROUP_OF = [group for group, at in data.GROUPS.items() for _ in range(at.stop - at.start)]
VARIABLES = [
    f"{group}_{number + 1}"
    for group, at in data.GROUPS.items()
    for number in range(at.stop - at.start)
]
BAR = "{l_bar}{bar}| {elapsed} gone, {remaining} left"
CELLS = 2048  # whose codes are held at a time


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which configurations, and how long they train. The defaults are Table S4.

    Attributes:
      epochs: by learning rate.
      reduction: of the loss; see `sae_jax.SAEConfig`. The authors' code has "mean", and Table S4's
        L1 weights are of that scale; equation 3 as printed is "sum".
    """

    scalings: tuple[int, ...] = SCALINGS
    rates: tuple[float, ...] = RATES
    l1_weights: tuple[float, ...] = L1_WEIGHTS
    percents: tuple[int, ...] = PERCENTS
    epochs: tuple[int, ...] = (EPOCHS,) * len(RATES)
    reduction: Literal["mean", "sum"] = "mean"

    @classmethod
    def of(cls, variant: data.Variant, reduction: Literal["mean", "sum"] = "mean") -> "Grid":
        """The text's 512 configurations of 500 epochs, or the code's 544, k = 1 % and epochs by
        learning rate among them."""
        if variant == "text":
            return cls(reduction=reduction)
        epochs = tuple(CODE_EPOCHS[rate] for rate in RATES)
        return cls(percents=CODE_PERCENTS, epochs=epochs, reduction=reduction)

    def rows(self, d_in: int, seed: int = 0) -> list[dict[str, Any]]:
        """One a configuration, narrow ones first: type, scaling, k_percent (NaN but for TopK),
        asked_epochs and its SAEConfig, which 5, 10 and 20 % of 8 latents, the same k, share."""
        return [
            {
                "type": PRESETS[preset], "scaling": scaling, "asked_epochs": epochs,
                "k_percent": penalty.get("k_percent", np.nan),
                "config": SAEConfig.preset(
                    preset, d_in=d_in, n_latents=d_in * scaling, batch_size=BATCH,
                    reduction=self.reduction, learning_rate=rate, seed=seed, **penalty,
                ),
            }
            for scaling in self.scalings
            for preset in PRESETS
            for rate, epochs in zip(self.rates, self.epochs, strict=True)
            for penalty in self._penalties(preset)
        ]  # fmt: skip

    def _penalties(self, preset: str) -> list[dict[str, float]]:
        if preset == "topk_schuster":
            return [{"k_percent": percent} for percent in self.percents]
        return [{"l1_weight": weight} for weight in self.l1_weights]


START = 18_000  # of a configuration: its share of compiling a program, in units of `cost`


def cost(config: SAEConfig) -> float:
    """Of an epoch, relatively; on CPUs a selection costs three times the rest."""
    return 30 + config.n_latents * (3 if config.activation == "topk" else 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """Configurations that train in one program: equal in architecture and epochs."""

    epochs: int
    positions: list[int]  # in the run of these epochs
    configs: list[SAEConfig]

    @property
    def name(self) -> str:
        """Of a file."""
        return f"{self.epochs:04d}_{self.configs[0].name}_{self.configs[0].n_latents}"


def by_epochs(rows: Sequence[dict[str, Any]]) -> dict[int, list[SAEConfig]]:
    """Distinct configurations by how long they train."""
    found: dict[int, dict[SAEConfig, None]] = {}
    for row in rows:
        found.setdefault(row["asked_epochs"], {})[row["config"]] = None
    return {epochs: list(configs) for epochs, configs in found.items()}


def programs(rows: Sequence[dict[str, Any]]) -> list[Program]:
    """What `train` compiles, in its order."""
    return [
        Program(epochs, positions, [configs[i] for i in positions])
        for epochs, configs in by_epochs(rows).items()
        for positions in ensemble.buckets(configs).values()
    ]


def folder(out: Path, epochs: int) -> Path:
    """Where those that train so many epochs lie."""
    return out / f"epochs_{epochs:04d}"


def train(
    rows: Sequence[dict[str, Any]],
    cells: np.ndarray,
    validation: np.ndarray | None,
    out: Path,
    provenance: dict[str, Any] | None = None,
) -> dict[int, sae_jax.Run]:
    """A dictionary per distinct configuration of `rows`, by epochs; each in its `folder`.

    cells, validation: latents of the autoencoder [cells, d_in].
    """
    todo = by_epochs(rows)
    costs = {epochs: np.asarray([cost(c) for c in configs]) for epochs, configs in todo.items()}
    done = {epochs: np.zeros(len(configs)) for epochs, configs in todo.items()}
    for epochs in todo:
        done[epochs][_finished(folder(out, epochs))] = epochs

    def spent() -> float:
        return float(
            sum(done[epochs] @ costs[epochs] + START * (done[epochs] > 0).sum() for epochs in todo)
        )

    total = float(sum((epochs * costs[epochs] + START).sum() for epochs in todo))
    runs = {}
    with tqdm(total=total, initial=spent(), desc="sweep", bar_format=BAR) as bar:
        for epochs, configs in todo.items():

            def on_epochs(
                positions: np.ndarray, first: int, history: History, epochs: int = epochs
            ) -> None:
                done[epochs][positions] = first + history.loss.shape[1]
                bar.n = spent()
                bar.refresh()

            runs[epochs] = sae_jax.train(
                configs, cells, validation, epochs=epochs, workdir=folder(out, epochs),
                progress=False, provenance=provenance, on_epochs=on_epochs,
            )  # fmt: skip
            done[epochs][:] = epochs  # all there are, those that diverged too
            bar.n = spent()
    return runs


def _finished(run: Path) -> list[int]:
    """Positions that an earlier call has finished, as a run's results say."""
    if not (run / "results.parquet").exists():
        return []
    return files.read_parquet(run / "results.parquet", columns=["member"])["member"].tolist()


def measure(
    rows: Sequence[dict[str, Any]],
    runs: dict[int, sae_jax.Run],
    cells: np.ndarray,
    variables: np.ndarray,
    out: Path,
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Results, one row a configuration, and correlations, one per configuration and variable.

    Args:
      cells: all latents of the autoencoder [cells, d_in]; variables: `data.Small.variables`.
      out: folder of what has been measured, a file for each program.
    """
    todo = programs(rows)
    parts = {}
    with tqdm(total=sum(map(_measuring_cost, todo)), desc="metrics", bar_format=BAR) as bar:
        for program in todo:
            path = out / f"{program.name}.parquet"
            if not path.exists():
                dictionaries = [runs[program.epochs].dictionaries[i] for i in program.positions]
                files.write_parquet(path, _metrics_of(dictionaries, cells, variables))
            parts[program.name] = files.read_parquet(path)
            bar.update(_measuring_cost(program))
    return _tables(rows, todo, runs, parts)


def _measuring_cost(program: Program) -> int:
    """Redundancy compares all pairs of latents."""
    return sum(config.n_latents * (config.n_latents + 100) for config in program.configs)


def _metrics_of(
    dictionaries: Sequence[Dictionary | None], cells: np.ndarray, variables: np.ndarray
) -> "pd.DataFrame":
    """Of a program's dictionaries: one row per place in it and variable; none of the diverged."""
    import jax
    import pandas as pd

    alive = {i: each for i, each in enumerate(dictionaries) if each is not None}
    if not alive:
        return pd.DataFrame({"place": [], "variable": []})
    members = list(alive.values())
    configs = [each.config for each in members]
    mesh = distributed.member_mesh(len(members))
    hyper = ensemble.stack_hyperparams(configs, mesh, cells.dtype)
    members += members[-1:] * (len(hyper.seed) - len(members))
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *(each.params for each in members))
    repeats = redundancy.redundant(
        params, hyper, cells, None, architecture=configs[0].architecture, mesh=mesh, threshold=HIGH
    )
    found = [
        pd.DataFrame(
            {
                "place": place,
                "variable": VARIABLES,
                "group": GROUP_OF,
                **correlated(dictionary.encode(cells), variables),
                "redundant": int(repeated.sum()),
            }
        )
        for (place, dictionary), repeated in zip(alive.items(), repeats, strict=False)
    ]
    return pd.concat(found, ignore_index=True)


def correlated(z: np.ndarray, variables: np.ndarray) -> dict[str, np.ndarray]:
    """Recovery of variables [cells, variables] by codes z [cells, latents]; each [variables].

    highest: the largest Pearson correlation with a latent (the text's A.2.4); highest_absolute: the
    largest |r|; highest_signed: r of that latent, which is what the authors' code averages, so that
    opposite signs cancel. latents, latents_absolute: how many latents have r, |r| of at least .95.
    Figures S9 and S10 call the former sensitivity, and the latter, where it is small, specificity.
    Latents that do not vary correlate with nothing.
    """
    n = len(z)
    y, y_length = _centred(np.asarray(variables, np.float64))
    mean = z.mean(axis=0, dtype=np.float64)
    products, squares = np.zeros((z.shape[1], y.shape[1])), np.zeros(z.shape[1])
    for start in range(0, n, CELLS):  # in pieces: float64 of 4000 latents would take 384 MB
        part = z[start : start + CELLS] - mean
        products += part.T @ y[start : start + CELLS]
        squares += np.einsum("nl,nl->l", part, part)
    length = np.sqrt(np.where(squares > n * (redundancy.CONSTANT * mean) ** 2, squares, 0))
    norm = length[:, None] * y_length[None, :]
    r = np.clip(np.divide(products, norm, out=np.zeros_like(products), where=norm > 0), -1, 1)
    size = np.abs(r)
    return {
        "highest": r.max(axis=0),
        "highest_absolute": size.max(axis=0),
        "highest_signed": r[size.argmax(axis=0), np.arange(r.shape[1])],
        "latents": (r >= HIGH).sum(axis=0),
        "latents_absolute": (size >= HIGH).sum(axis=0),
    }


def _centred(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns about their means, and their lengths."""
    x = x - x.mean(axis=0, keepdims=True)
    return x, np.linalg.norm(x, axis=0)


def _tables(
    rows: Sequence[dict[str, Any]],
    todo: Sequence[Program],
    runs: dict[int, sae_jax.Run],
    parts: dict[str, "pd.DataFrame"],
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Results and correlations; see `measure`."""
    import pandas as pd

    places = {
        (program.epochs, config): (program, place, position)
        for program in todo
        for place, (position, config) in enumerate(
            zip(program.positions, program.configs, strict=True)
        )
    }
    results, correlations = [], []
    for number, row in enumerate(rows):
        program, place, position = places[row["asked_epochs"], row["config"]]
        found = runs[program.epochs].results.iloc[position].drop("member").to_dict()
        line = {"configuration": number, **row, **found}
        del line["config"]
        part = parts[program.name]
        part = part[part["place"] == place]
        if len(part):
            line |= {
                "active": int(found["train_live"]),
                "fraction_active": found["train_live"] / found["n_latents"],
                "mean_active": found["train_l0"],
                "redundant": int(part["redundant"].iloc[0]),
            }
            means = part.groupby("group")[list(MEANS)].mean()
            line |= {f"{name}:{group}": means.loc[group, name]
                     for group in data.GROUPS for name in MEANS}  # fmt: skip
            part = part.drop(columns=["place", "redundant"]).assign(configuration=number)
            correlations.append(part)
        results.append(line)
    table = pd.DataFrame(results)
    table["k"] = table["k"].astype("Int64")
    return table, pd.concat(correlations, ignore_index=True)

"""How any PyTorch peer is measured: its loss checked, its fastest setting tried, then trained."""

import importlib.metadata
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from experiments.benchmarks.jobs import CHECKED_EPOCHS, Job, Prepared

PARTS = 4  # of an epoch, between which a peer looks at the clock


class Member(Protocol):
    """One configuration in training, as every file of a peer defines it."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], device: str, **setting: Any
    ) -> None: ...

    def epoch(self, batches: torch.Tensor) -> None:
        """A step on each of batches [steps, batch, d_in]."""

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Of a batch [batch, d_in], without a step."""


def prepare(job: Job, library: ModuleType) -> Prepared:
    """The library at the fastest of its settings, with one thread or with all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = np.load(job.problem)
    x = torch.from_numpy(arrays["rows"]).to(device)
    orders = torch.from_numpy(arrays["orders"]).long().to(device)
    configs = job.row.configs()

    def start(member: int, setting: dict[str, Any]) -> Member:
        names = ("encoder", "encoder_bias", "decoder", "decoder_bias")
        weights = {name: torch.from_numpy(arrays[name][member]).to(device) for name in names}
        return library.Member(configs[member], weights, device, **setting)

    def mean_losses(member: int, setting: dict[str, Any]) -> list[float]:
        """Of each of the first epochs."""
        training = start(member, setting)
        means = []
        for order in orders[: min(CHECKED_EPOCHS, job.row.epochs)]:
            losses = []
            for batch in x[order]:
                losses.append(training.loss(batch).item())
                training.epoch(batch[None])
            means.append(statistics.fmean(losses))
        return means

    def parts(setting: dict[str, Any]) -> Iterator[int]:
        """Trains configurations one after another for ever, stops after each part of an epoch."""
        for member in itertools.cycle(range(len(configs))):
            training = start(member, setting)
            for epoch in range(job.row.epochs):
                for batches in torch.tensor_split(x[orders[epoch % len(orders)]], PARTS):
                    training.epoch(batches)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    yield len(batches)

    def train(training: Iterator[int], seconds: float) -> int:
        """Goes on for so long; config-steps done."""
        end = time.perf_counter() + seconds
        config_steps = next(training)
        while time.perf_counter() < end:
            config_steps += next(training)
        return config_steps

    def speed(threads: int, setting: dict[str, Any]) -> float:
        torch.set_num_threads(threads)
        training = parts(setting)
        next(training)  # allocates
        began = time.perf_counter()
        return train(training, job.seconds / 4) / (time.perf_counter() - began)

    settings = library.settings(configs[0])
    losses = [
        mean_losses(member, next(iter(settings.values()))) for member in (0, len(configs) - 1)
    ]
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    trials = list(itertools.product(sorted({1, cores}), settings))
    speeds = [{t: speed(t[0], settings[t[1]]) for t in trials} for _ in range(2)]
    # Fast once may be luck: threads wait for each other, and for whatever else a machine does.
    threads, best = max(trials, key=lambda trial: min(found[trial] for found in speeds))
    torch.set_num_threads(threads)
    chosen = [device, f"{threads} thread{'s' * (threads > 1)}", best]
    versions = {
        name: importlib.metadata.version(name)
        for name in dict.fromkeys(("torch", library.DISTRIBUTION))
    }
    about = {
        "losses": losses,
        "setting": ", ".join(filter(None, chosen)),
        "version": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    training = parts(settings[best])
    next(training)
    return Prepared(about, lambda: train(training, job.seconds))

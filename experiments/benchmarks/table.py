"""What the rounds of the benchmark of training amount to, as numbers and as a table."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.benchmarks.jobs import OURS

Rounds = list[dict[str, float]]


def rates(rounds: Rounds) -> dict[str, float]:
    """Medians over the rounds."""
    per_second = [found["config_steps"] / found["wall"] for found in rounds]
    cpu = [found["cpu"] / found["config_steps"] for found in rounds]
    return {
        "config_steps_per_second": statistics.median(per_second),
        "cpu_seconds_per_config_step": statistics.median(cpu),
        "config_steps": rounds[0]["config_steps"],
    }


def ratio(ours: Rounds, peer: Rounds, clock: str) -> float:
    """How many times the peer's config-steps ours does in a second of `clock`: wall or cpu."""
    return statistics.median(
        (a["config_steps"] / a[clock]) / (b["config_steps"] / b[clock])
        for a, b in zip(ours, peer, strict=True)
    )


def best(peers: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The peer that ours has the lowest ratio to; None if none was measured."""
    measured = [peer for peer, found in peers.items() if "ratio" in found]
    if not measured:
        return None
    peer = min(measured, key=lambda peer: peers[peer]["ratio"])
    return {"peer": peer, "ratio": peers[peer]["ratio"], "cpu_ratio": peers[peer]["cpu_ratio"]}


def training(results: list[dict[str, Any]]) -> str:
    """Rates are config-steps a second, CPU is µs a config-step; ms a step of single ones."""
    head = ("row", "", "/s", "CPU µs", "ms a step", "ratio", "CPU ratio", "", "setting")
    lines: list[tuple[str, ...]] = [head]
    for result in results:
        alone = result["members"] == 1
        ours = result["ours"]
        compiled = f"compiled in {ours['compile_seconds']:.2f} s"
        setting = f"{ours['setting']}, {compiled}"
        lines.append((result["row"], OURS, *_speed(ours, alone), "", "", "", setting))
        for peer, found in result["peers"].items():
            if "ratio" in found:
                ratios = (f"{found['ratio']:.2f}", f"{found['cpu_ratio']:.2f}")
                told = (*_speed(found, alone), *ratios, found["status"], found["setting"])
            else:
                told = ("", "", "", "", "", found["status"], found["reason"].splitlines()[0])
            lines.append(("", peer, *told))
    summary = []
    for result in results:
        if result["best"]:
            found = result["best"]
            summary.append(
                f"{result['row']}: {found['ratio']:.2f} times the best peer ({found['peer']}), "
                f"{found['cpu_ratio']:.2f} times by CPU"
            )
    return "\n".join([aligned(lines, left=(0, 1, 7, 8)), "", *summary]).rstrip()


def _speed(found: dict[str, Any], alone: bool) -> tuple[str, str, str]:
    rate, cpu = found["config_steps_per_second"], found["cpu_seconds_per_config_step"] * 1e6
    return f"{rate:,.0f}", f"{cpu:,.0f}", f"{1e3 / rate:.3f}" if alone else ""


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Cells in columns, those of `left` flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

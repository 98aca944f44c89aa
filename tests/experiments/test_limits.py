"""`experiments.benchmarks.limits`: the pieces of it that are quick. Nothing here looks at how fast
anything is."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import limits


def curve(axis: str, name: str, power: float, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {"axis": axis, "curve": name, "size": size, "cpu_seconds": 1e-3 * size**power,
         "seconds": 1.0, "compile_seconds": 0.5, "added_bytes": 2**20, "peak_bytes": 2**28}
        for size in sizes
    ]  # fmt: skip


def test_slopes_are_the_powers_of_growth() -> None:
    for power in (0.0, 0.5, 1.0, 2.0):
        found = limits.slopes(curve("rows", "streamed", power, (10, 40, 1000)), "cpu_seconds")
        assert found == pytest.approx([power, power])
    nothing = [{**point, "added_bytes": 0} for point in curve("rows", "streamed", 1, (10, 40))]
    assert math.isnan(limits.slopes(nothing, "added_bytes")[0])


def test_departures_are_told_and_nothing_else() -> None:
    bent = curve("rows", "streamed", 1, (10, 40)) + curve("rows", "streamed", 1.5, (160,))
    straight = curve("terms", "lens", 1.1, (10, 40, 160))
    alone = curve("cells", "lens", 1, (10,))  # of which nothing is known
    told = limits.departures([*bent, *straight, *alone])
    assert len(told) == 4
    steep = math.log(160**1.5 / 40) / math.log(4)
    assert told[0] == f"rows, streamed, time: 40 to 160 {steep:.2f}"
    assert told[1] == "rows, streamed, memory: 10 to 40 0.00; 40 to 160 0.00"
    assert told[2] == "terms, lens, time: in proportion"


def test_a_curve_ends_after_what_took_too_long_and_says_so() -> None:
    took = iter([{"cpu_seconds": 1.0}, {"cpu_seconds": 4.0}])
    found = list(limits.along((1, 4), lambda size: next(took), longest=60))
    assert [point["size"] for point in found] == [1, 4]
    assert not any("missing" in point for point in found)
    found = list(limits.along((1, 4, 16), lambda size: {"cpu_seconds": 1.0}, longest=0))
    assert [point["size"] for point in found] == [1, 4, 16]
    assert found[0]["cpu_seconds"] == 1.0
    assert all(point["missing"].startswith("1 took 0.0 minutes") for point in found[1:])


def test_a_process_that_fails_ends_its_curve() -> None:
    def of_size(size: int) -> dict[str, Any]:
        return limits.ran([sys.executable, "-c", f"print('{{\"size\": 4}}'); exit({size})"])

    assert list(limits.along((0,), of_size, longest=60)) == [{"size": 4}]
    found = list(limits.along((3, 5), of_size, longest=60))
    assert [point["missing"] for point in found] == ["its process ended with status 3"] * 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read as on Linux")
def test_what_the_work_adds_is_measured(tmp_path: Path) -> None:
    size, kept, calls = 2**26, [], []

    def made(size: int, folder: Path) -> tuple[limits.Work, limits.Work]:
        return lambda: bytearray(b"1") * (4 * size), work  # what goes before the work is not its

    def work() -> None:
        calls.append(size)
        kept[:] = [bytearray(b"1") * size]

    found = limits.measured(made, size, tmp_path)
    assert 1 <= len(calls) <= limits.REPEATS  # three, unless the machine is very busy
    assert size <= found["added_bytes"] < 2 * size + 2**25
    assert found["peak_bytes"] > found["added_bytes"]
    assert 0 < found["cpu_seconds"] < 60


def test_the_work_is_what_is_named(tmp_path: Path) -> None:
    before, work = limits.encoded(64, tmp_path)
    assert before().shape == (1, 64)
    assert work().shape == (limits.ENCODED, 64)
    configs = limits.sweep(16).args[0]
    assert len({config.l1_weight for config in configs}) == 16
    assert len({config.architecture for config in configs}) == 1


def test_rows_are_written_once(tmp_path: Path) -> None:
    path = limits.rows_of(8, tmp_path)
    first = path.stat().st_mtime_ns
    assert limits.rows_of(8, tmp_path).stat().st_mtime_ns == first
    rows = limits.data.open_rows(f"{path}:X")
    assert rows.shape == (8, limits.WIDTH)
    assert abs(float(rows[:].std()) - 1) < 0.1


def test_the_table_and_the_figure_show_every_point(tmp_path: Path) -> None:
    points = [
        *curve("rows", "streamed", 1, (10, 40)), *curve("rows", "in memory", 1, (10,)),
        {"axis": "rows", "curve": "in memory", "size": 40, "missing": "no room"},
        *curve("cells", "lens", 1, (5, 20)),
    ]  # fmt: skip
    lines = [line for line in limits.text(points).splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    shown = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines[2:]]
    assert shown == [(p["axis"], p["curve"], str(p["size"])) for p in points]
    assert any("no room" in line for line in lines)
    if importlib.util.find_spec("matplotlib"):
        drawn = limits.figure(points)
        assert [axes.get_xlabel() for axes in drawn.axes[2:]] == ["rows × 512", "cells in a store"]
        drawn.savefig(tmp_path / "limits.png")


def test_every_axis_grows_by_about_four() -> None:
    for axis in limits.AXES.values():
        ratios = [after / before for before, after in zip(axis.sizes, axis.sizes[1:], strict=False)]
        assert all(2 < ratio < 5 for ratio in ratios)

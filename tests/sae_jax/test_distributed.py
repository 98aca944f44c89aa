"""What processes are told of each other and of the machine; processes that run are in
test_processes."""

import dataclasses
from pathlib import Path

import jax
import pytest

from sae_jax import InputError, distributed

PLENTY = distributed.host_memory()


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def of_processes(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """As many devices of each process."""
    owners = [process for process, count in enumerate(counts) for _ in range(count)]
    devices = [Device(i, owner) for i, owner in enumerate(owners)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: len(counts))
    monkeypatch.setattr(jax, "local_device_count", lambda: counts[0])


@pytest.mark.parametrize(
    ("members", "latent", "expected"),
    [
        (1, 1, [0, 4, 8]),
        (3, 1, [0, 4, 8]),
        (4, 1, [0, 1, 4, 5, 8, 9]),
        (99, 1, list(range(12))),
        (3, 2, [0, 1, 4, 5, 8, 9]),
        (4, 2, list(range(12))),
        (1, 4, list(range(12))),
    ],
)
def test_no_process_has_more_devices_than_members_of_its_own(
    members: int, latent: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_processes(monkeypatch, 4, 4, 4)
    monkeypatch.setattr(distributed, "Mesh", lambda devices, *_, **__: devices)
    grid = distributed.member_mesh(members, latent)
    assert [device.id for device in grid.reshape(-1)] == expected
    for row in grid.reshape(-1, latent):
        assert len({device.process_index for device in row}) == 1


def test_processes_of_unequal_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of_processes(monkeypatch, 8, 16)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    with pytest.raises(InputError, match="process 0 has 8, process 1 has 16"):
        distributed.join()


@pytest.mark.parametrize(
    ("about", "limits", "expected"),
    [
        ("0::/\n", {}, PLENTY),
        ("0::/job/step\n", {"job/memory.max": "5000", "job/step/memory.max": "max"}, 5000),
        ("0::/job/step\n", {"job/memory.max": "5000", "job/step/memory.max": "3000"}, 3000),
        ("0::/of/the/host\n", {"memory.max": "7000"}, 7000),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "6000"}, 6000),
        ("4:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(2**63 - 4096)}, PLENTY),
        ("3:cpu,cpuacct:/job\n", {"memory/job/memory.limit_in_bytes": "6000"}, PLENTY),
    ],
)
def test_memory_is_what_the_control_group_allows(
    about: str, limits: dict[str, str], expected: int, tmp_path: Path
) -> None:
    files = {"proc/self/cgroup": about} | {f"sys/fs/cgroup/{k}": v for k, v in limits.items()}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert distributed.host_memory(tmp_path) == expected


def test_without_control_groups_memory_is_the_machines(tmp_path: Path) -> None:
    assert distributed.host_memory(tmp_path) == PLENTY

"""A command on a disk that is really full: a tmpfs of 4 MB, mounted in a namespace of its own."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from sae_jax import files
from tests.durability import children, kills
from tests.durability.stages import Stage

SIZE = 4 << 20
ASIDE = (files.ASIDE, ".exporting")  # not what is kept to go on with: .extracting, checkpoints
NEW_USER, NEW_MOUNTS, PRIVATE = 0x10000000, 0x00020000, (1 << 18) | (1 << 14)  # of Linux


@dataclasses.dataclass(frozen=True)
class Full:
    """What a command did in so many free bytes.

    Attributes:
      status: 0: it had enough. said: its last line. traceback: whether there was one.
      partial: what it left under a final name with other contents than a whole run's (but whole
        tables of the programs that a sweep had finished), and what it was writing aside.
      wrong: what is not as it should be once there is room and the command is given again.
    """

    free: int
    status: int
    said: str
    traceback: bool
    partial: list[str]
    wrong: list[str]


def used(out: Path) -> int:
    """Bytes that a folder takes of a tmpfs, in its blocks of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in out.rglob("*") if path.is_file())


def tried(stage: Stage, base: Path, expected: dict[str, str], free: int) -> Full:
    """Give the command where so many bytes are free, make room, and give it again.

    Raises:
      RuntimeError: this system gives no namespaces.
    """
    folder = kills.place(base, f"full-{free}")
    (folder / "small").mkdir()
    found = Full(**children.ask(lambda: _tried(stage, folder, expected, free), folder))
    if not (found.wrong or found.traceback):
        shutil.rmtree(folder)
    return found


def _tried(stage: Stage, folder: Path, expected: dict[str, str], free: int) -> dict[str, Any]:
    small, filler = folder / "small", folder / "small/filler"
    _mount(small)
    (small / "inputs").symlink_to((folder / "inputs").resolve())
    room = os.statvfs(small)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - free)
    status = children.run(lambda: stage.run(False), small, "../said_full")
    told = (folder / "said_full").read_text(errors="replace")
    os.chdir(small)
    there = kills.contents(stage) if status else {}
    partial = [
        name
        for name, digest in there.items()
        if digest not in (kills.EMPTY, expected.get(name))
        and (any(aside in name for aside in ASIDE) or name in expected)
        and not _of_finished_programs(Path("out") / name)
    ]
    filler.unlink()
    again = children.run(lambda: stage.run(True), small, "../said_again")
    if again:
        last = (folder / "said_again").read_text(errors="replace").strip().splitlines()[-1:]
        wrong = [f"status {again}: {' '.join(last)}"]
    else:
        wrong = kills.differences(expected, kills.outcome(stage, small))
    said = [line for line in told.replace("\r", "\n").splitlines() if line.strip()]
    return {
        "free": free, "status": status, "said": said[-1] if said else "",
        "traceback": "Traceback" in told, "partial": partial, "wrong": wrong,
    }  # fmt: skip


def _of_finished_programs(path: Path) -> bool:
    """Whether it is a table that grows with each program of a sweep, and can be read."""
    if path.name not in ("results.parquet", "history.parquet"):
        return False
    try:
        return len(files.read_parquet(path)) > 0
    except (OSError, ValueError):
        return False


def _mount(folder: Path) -> None:
    """The tmpfs, which nobody else sees and which ends with this process."""
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _check(system.unshare(NEW_USER | NEW_MOUNTS))
    for name, text in (
        ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")
    ):  # fmt: skip
        Path(f"/proc/self/{name}").write_text(text)
    _check(system.mount(b"none", b"/", None, PRIVATE, None))
    _check(system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=%d" % SIZE))


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

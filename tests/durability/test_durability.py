"""The whole of it takes hours (see main.py); here one stage, a few kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.durability import order, tracing
from tests.durability.tracing import Event

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(not tracing.available(), reason="strace cannot trace here")
def test_killed_commands_go_on(tmp_path: Path) -> None:
    argv = ["--stage=browse", "--checks=kills", "--most=1", "--real=1", "--random=1", "--jobs=1"]

    def study() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.durability.main", *argv, f"--folder={tmp_path}"],
            capture_output=True, text=True, cwd=REPOSITORY, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.endswith("nothing is wrong\n")
        return (tmp_path / "browse/done").read_text().splitlines()

    first = study()
    (tmp_path / "browse/done").write_text("".join(f"{line}\n" for line in first[:-2]))
    again = study()  # as if it had been killed
    assert again[:-2] == first[:-2]
    assert [json.loads(line)[0] for line in again] == [json.loads(line)[0] for line in first]


def test_lines_of_strace() -> None:
    cases = {
        '7 write(3</o/a>, ""..., 9) = 9': Event("write", "/o/a"),
        '7 pwrite64(3</o/a b>, ""..., 9, 0 <unfinished ...>': Event("pwrite64", "/o/a b"),
        '7 rename("a", "/o/b") = 0': Event("rename", "/w/a", "/o/b"),
        '7 renameat(4</o>, "a", AT_FDCWD</w>, "b") = 0': Event("renameat", "/o/a", "/w/b"),
        '7 unlinkat(5</o/d>, "x", 0) = 0': Event("unlinkat", "/o/d/x"),
        '7 openat(AT_FDCWD</w>, "out/x", O_WRONLY|O_CREAT, 0666) = 3</w/out/x>': Event(
            "openat", "/w/out/x"
        ),
        '7 openat(AT_FDCWD</w>, "out/x", O_RDONLY) = 3</w/out/x>': None,
        '7 unlink("/o/a") = -1 ENOENT (No such file or directory)': None,
        "7 <... fsync resumed>) = 0": None,
        "7 +++ exited with 0 +++": None,
    }
    assert {line: tracing.parse(line, "/w") for line in cases} == cases


OUT = Path("/o")
SAFE = [
    Event("mkdir", "/o"), Event("mkdir", "/o/.writing-a.x"), Event("openat", "/o/.writing-a.x/a"),
    Event("write", "/o/.writing-a.x/a"), Event("fsync", "/o/.writing-a.x/a"),
    Event("rename", "/o/.writing-a.x/a", "/o/a"), Event("fsync", "/o"),
]  # fmt: skip
FOLDER = [
    Event("mkdir", "/o"), Event("mkdir", "/o/.writing-d.x"), Event("mkdir", "/o/.writing-d.x/d"),
    Event("openat", "/o/.writing-d.x/d/f"), Event("fsync", "/o/.writing-d.x/d/f"),
    Event("fsync", "/o/.writing-d.x/d"), Event("rename", "/o/.writing-d.x/d", "/o/d"),
    Event("fsync", "/o"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("events", "left_out", "said"),
    [
        (SAFE, None, None),
        (SAFE, 4, ".writing-a.x/a is renamed before its fsync"),
        (SAFE, 6, ". is not fsynced at the end"),
        (FOLDER, None, None),
        (FOLDER, 4, ".writing-d.x/d/f is renamed before its fsync"),
        (FOLDER, 5, ".writing-d.x/d is renamed before its fsync"),
    ],
)
def test_the_order_of_fsyncs(events: list[Event], left_out: int | None, said: str | None) -> None:
    some = [event for i, event in enumerate(events) if i != left_out]
    found = order.checked(some, OUT)
    assert found.violations == ([] if said is None else [said])
    assert found.renamed == 1

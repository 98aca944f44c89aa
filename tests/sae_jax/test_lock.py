"""The lock of a folder: who holds it is named, the kernel gives it back, and hostile files."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import extract.disk
import extract.lock
from sae_jax import InputError, disk, lock, workdir

HOLDER = """
import sys, time
from pathlib import Path
from sae_jax import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen:
    """Another process, once it holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), "--name=two words"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_who_holds_it_is_named_and_a_kill_gives_it_back(tmp_path: Path) -> None:
    other = holder(tmp_path)
    try:
        with pytest.raises(InputError) as told, workdir.locked(tmp_path):
            pass
        assert (
            f"being filled by another process ({other.pid} on {socket.gethostname()}, since 20"
            in (str(told.value))
        )
        assert f"{tmp_path} '--name=two words'" in str(told.value)
        # Another package's programs keep to the same lock.
        with pytest.raises(extract.InputError, match=str(other.pid)), extract.lock.held(tmp_path):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / lock.NAME).exists()
    with workdir.locked(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_may_hold_a_folder_within_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workdir.locked(tmp_path), workdir.locked(tmp_path / ".." / tmp_path.name):
        monkeypatch.setattr(lock, "_held", set())  # another one may not
        with pytest.raises(InputError, match="by another process"), lock.held(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_one_that_gives_it_up_while_another_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who got the lock of a file that is gone holds nothing, and tries again."""
    flock, tried = fcntl.flock, []

    def late(handle: int, kind: int) -> None:
        tried.append(os.fstat(handle).st_ino)
        if len(tried) == 1:  # it was given up, and another took it, between open and lock
            (tmp_path / lock.NAME).unlink()
            (tmp_path / lock.NAME).touch()
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.held(tmp_path):
        assert len(tried) == 2
        assert (tmp_path / lock.NAME).stat().st_ino == tried[1]


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A file system without locks; called, it makes of what this process holds another's."""

    def unsupported(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    return lambda: monkeypatch.setattr(lock, "_held", set())


def test_where_there_are_no_locks_the_file_is_one(
    tmp_path: Path, lockless: Callable[[], None]
) -> None:
    with lock.held(tmp_path):
        lockless()
        told = rf"process \({os.getpid()} on .*\); wait for it"
        with pytest.raises(InputError, match=told), lock.held(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def gone() -> int:
    """The number of a process that was."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left(folder: Path, **changes: object) -> None:
    """The lock of a process of this machine, this one but for the changes."""
    with lock.held(folder):
        content = json.loads((folder / lock.NAME).read_text())
    (folder / lock.NAME).write_text(json.dumps(content | changes))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which process it was")
@pytest.mark.usefixtures("lockless")
def test_of_a_dead_process_of_this_machine_it_is_taken_over(tmp_path: Path) -> None:
    unburied = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    known = {"pid": unburied.pid, "began": lock._began(unburied.pid)}
    unburied.stdin.close()
    os.waitid(os.P_PID, unburied.pid, os.WEXITED | os.WNOWAIT)
    # The number of the second has been given to another process since.
    for changes in ({"pid": gone()}, {"began": "1"}, known):
        left(tmp_path, **changes)
        with lock.held(tmp_path):
            assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []
    unburied.wait()


@pytest.mark.parametrize("machine", ["another", None, 1])
@pytest.mark.usefixtures("lockless")
def test_of_a_process_of_another_machine_it_is_for_a_person_to_delete(
    tmp_path: Path, machine: object
) -> None:
    left(tmp_path, pid=gone(), machine=machine)
    with (
        pytest.raises(InputError, match=r"cannot be told from here: if it does not, delete"),
        lock.held(tmp_path),
    ):
        pass
    (tmp_path / lock.NAME).unlink()
    with lock.held(tmp_path):
        pass


def test_of_those_that_find_it_dead_one_takes_it_over(
    tmp_path: Path, lockless: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another has it already when we come to delete what we had found dead."""
    runs = lock._runs

    def late(handle: int) -> bool | None:
        found = runs(handle)
        if found is False:
            (tmp_path / lock.NAME).unlink()
            left(tmp_path)
            lockless()
        return found

    left(tmp_path, began="1")
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_runs", late)
        with pytest.raises(InputError, match=r"wait for it"), lock.held(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
    (tmp_path / f"{lock.NAME}.taken").touch()  # of one that was killed in between
    (tmp_path / lock.NAME).unlink()
    left(tmp_path, began="1")
    with pytest.raises(InputError, match=r"delete that file"), lock.held(tmp_path):
        pass
    (tmp_path / lock.NAME).unlink()
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"pid": 1}', b'{"pid": {}, "host": 2}',
     *(json.dumps({"pid": pid, "machine": lock._machine(), "began": None}).encode()
       for pid in (2**70, -1, 0, "1", None, {})),
     b'{"pid": "1\\n2", "host": "\\u001b[31m", "since": "", "command": "%s"}' % (b"c" * 10_000)],
)  # fmt: skip
@pytest.mark.parametrize("locks", [True, False])
def test_whatever_the_file_says_is_told_in_one_line(
    tmp_path: Path, content: bytes, locks: bool, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if not locks:
        request.getfixturevalue("lockless")
    with lock.held(tmp_path):
        (tmp_path / lock.NAME).write_bytes(content)
        monkeypatch.setattr(lock, "_held", set())
        with pytest.raises(InputError) as told, lock.held(tmp_path):
            pass
    assert "filled by another process" in str(told.value)
    assert len(str(told.value)) < 1000
    assert str(told.value).isprintable()


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_is_no_lock_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "link":
        (tmp_path / lock.NAME).symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / lock.NAME).mkdir()
    with pytest.raises(InputError, match=r"\.lock is no lock .*: delete it"), lock.held(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("ours", "theirs"), [(lock, extract.lock), (disk, extract.disk)])
def test_extract_has_the_same(ours: object, theirs: object) -> None:
    """It imports nothing of sae_jax, so it has a copy."""
    text = Path(ours.__file__).read_text()
    assert Path(theirs.__file__).read_text() == text.replace("from sae_jax.", "from extract.")

"""The launcher of several processes: who was lost is named, and nothing is left running."""

import dataclasses
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import given
from hypothesis import strategies as st

from experiments import cli, launch, lost, supervisor
from experiments.lost import Process
from experiments.registry import Registry
from sae_jax import InputError, pulse

FAKE = Path(__file__).with_name("fake_process.py")
PATIENCE = 60  # seconds that a test waits for what must come at once

# A launcher in a process of its own, as users have it: signals and its death are tested.
DRIVER = """
import json, sys
from pathlib import Path
from experiments.child import Command
from experiments.registry import Registry
from experiments.supervisor import launch
given = json.loads(sys.argv[1])
folder = given.pop("folder", None)
if folder is not None:
    given["registry"] = Registry(Path(folder), "a run", renewed=0.2, silent=1)
commands = [Command([sys.executable, *words]) for words in given.pop("commands")]
sys.exit(launch(commands, **given))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a launcher of fake processes, each told what to do; they hold `held`, by number."""
    begun = []

    def started(*todo: list[str], number: int = 0, **options: object) -> subprocess.Popen:
        commands = [
            [str(FAKE), f"hold:{tmp_path / str(number + i)}", *words]
            for i, words in enumerate(todo)
        ]
        options = {"grace_seconds": 0.2, "stall_seconds": 0, "number": number} | options
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", DRIVER, json.dumps({"commands": commands, **options})],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                # Of a shell's background job they are ignored, which a launcher keeps to.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )  # fmt: skip
        return begun[-1]

    yield started
    for launcher in begun:
        launcher.kill()
        launcher.communicate()


def ended(launcher: subprocess.Popen) -> tuple[int, str, str]:
    """Its exit status, what it wrote to stdout, and to stderr."""
    out, err = launcher.communicate(timeout=PATIENCE)
    return launcher.returncode, out.decode(), err.decode()


def is_gone(path: Path) -> bool:
    """Whether nobody holds the lock, after some time."""
    deadline = time.monotonic() + PATIENCE
    with path.open("a") as opened:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.05)
    return False


def read_until(launcher: subprocess.Popen, text: str) -> None:
    """Waits until it has written this."""
    assert launcher.stderr is not None
    for line in launcher.stderr:
        if text in line.decode():
            return
    pytest.fail(f"{text!r} was not said")


def test_a_killed_process_is_named_and_the_others_are_ended(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    deaf = ["deaf", "err:x", "sleep:99"]
    status, _, err = ended(start(deaf, deaf, ["beat:chunk 12", "sleep:.3", "signal:9"]))
    assert status == 128 + 9
    assert re.search(
        r"^process 2 of 3 \(\S+, pid \d+\) was lost: killed by SIGKILL.*, last seen at 'chunk 12' "
        r"\S+ s ago; the others are ended; the same command goes on from the last checkpoint$",
        err, re.MULTILINE,
    )  # fmt: skip
    assert err.endswith("from the last checkpoint\n")
    assert is_gone(tmp_path / "0")


def test_one_that_ends_by_itself_is_named_with_what_it_printed(
    start: Callable[..., subprocess.Popen],
) -> None:
    told = "out:first\\nlast\\n"
    status, out, err = ended(start([told, "sleep:99"], [told, "sleep:.3", "exit:3"], ["exit:0"]))
    assert status == 3
    assert "process 1 of 3" in err
    assert "was lost: exit status 3" in err
    assert "[1] first\n[1] last\n" in err
    assert out == "first\nlast\n"


@pytest.mark.parametrize("echo", ["exit:1", "signal:6"])
def test_who_ends_because_of_another_is_not_named(
    echo: str, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    follows = [f"await:{tmp_path / '1'}", echo]
    status, _, err = ended(start(follows, ["signal:11"], grace_seconds=30))
    assert "process 1 of 2" in err
    assert "killed by SIGSEGV" in err
    assert "process 0" not in err
    assert status == 128 + 11


def test_refused_input_is_not_called_a_loss(start: Callable[..., subprocess.Popen]) -> None:
    status, _, err = ended(start(*[["err:error: no\\n", "exit:2"]] * 2))
    assert status == 2
    assert "[1] error: no\n" in err
    assert re.search(r"process \d of 2 .* refused its input, see above", err)
    assert "lost" not in err


def test_all_is_well(start: Callable[..., subprocess.Popen]) -> None:
    assert ended(start(["out:x"], ["out:y"])) == (0, "x", "")


def test_sigterm_is_passed_on_once_and_waited_for(start: Callable[..., subprocess.Popen]) -> None:
    launcher = start(*[["obey:told", "err:ready\\n", "sleep:99"]] * 2)
    read_until(launcher, "ready")
    read_until(launcher, "ready")
    launcher.send_signal(signal.SIGTERM)
    read_until(launcher, "told")
    launcher.send_signal(signal.SIGTERM)
    status, _, err = ended(launcher)
    assert status == 143
    assert err in ("", "[0] told\n", "[1] told\n")  # of the other, if it was not read before


def test_a_second_interrupt_kills(start: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    launcher = start(["deaf", "err:ready\\n", "sleep:99"])
    read_until(launcher, "ready")
    for _ in range(2):
        launcher.send_signal(signal.SIGINT)
        time.sleep(1)  # two at once are one
    status, _, err = ended(launcher)
    assert (status, err) == (128 + 9, "")
    assert is_gone(tmp_path / "0")


@pytest.mark.parametrize(
    ("phase", "stopped"),
    [("chunk 4", "sleep:99"), ("chunk 4", f"signal:{signal.SIGSTOP}"),
     ("waiting", f"signal:{signal.SIGSTOP}")],
)  # fmt: skip
def test_one_without_progress_is_named_and_ended(
    phase: str, stopped: str, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    waits = ["beat:chunk 3", "beat:waiting", "sleep:99"]
    stuck = ["deaf", "beat:chunk 3", f"beat:{phase}", stopped]
    status, _, err = ended(start(waits, stuck, waits, stall_seconds=2))
    assert status == 128 + 9
    assert re.search(rf"progress for 2 s of process 1 of 3 \(.*\), last seen at '{phase}'", err)
    assert all(is_gone(tmp_path / str(number)) for number in range(3))


def test_progress_is_let_be(start: Callable[..., subprocess.Popen]) -> None:
    moves = [word for i in range(10) for word in (f"beat:chunk {i}", "sleep:.5")]
    assert ended(start(moves, ["beat:waiting", "sleep:3.5"], stall_seconds=2.5))[0] == 0


def test_what_passed_while_the_launcher_was_stopped_is_no_stall(
    start: Callable[..., subprocess.Popen],
) -> None:
    """As all of a job is that Slurm suspends."""
    launcher = start(["beat:chunk 1", "err:ready\\n", "sleep:4"], stall_seconds=3)
    read_until(launcher, "ready")
    launcher.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    launcher.send_signal(signal.SIGCONT)
    assert ended(launcher)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it, on Linux")
def test_no_process_outlives_a_launcher_that_is_killed(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    launcher = start(*[["deaf", "err:ready\\n", "sleep:99"]] * 2)
    read_until(launcher, "ready")
    read_until(launcher, "ready")
    launcher.kill()
    assert is_gone(tmp_path / "0")
    assert is_gone(tmp_path / "1")


def test_lines_have_their_process_and_only_the_first_has_a_bar(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    bar = "err:one\\n\\r 50%\\r100%\\ntwo"
    _, _, err = ended(start([bar], [f"await:{tmp_path / '0'}", bar]))
    assert err.startswith("[0] one\n\r[0]  50%\r[0] 100%\n")
    assert "[0] two\n" in err
    assert re.findall(r"\[1\].*\n", err) == ["[1] one\n", "[1] 100%\n", "[1] two\n"]


def test_a_process_alone_writes_as_it_is(start: Callable[..., subprocess.Popen]) -> None:
    assert ended(start(["err:one\\n\\r 50%\\r100%\\ntwo\\n"]))[2] == "one\n\r 50%\r100%\ntwo\n"


def on_two_machines(
    start: Callable[..., subprocess.Popen], folder: Path, first: list[str], second: list[str]
) -> list[subprocess.Popen]:
    options = {"processes": 2, "folder": str(folder)}
    return [start(first, **options), start(second, number=1, **options)]


def test_launchers_name_what_was_lost_elsewhere(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    follows = [f"await:{tmp_path / '1'}", "sleep:1", "signal:6"]
    launchers = on_two_machines(start, tmp_path / "folder", follows, ["beat:saved", "signal:9"])
    for launcher in launchers:
        status, _, err = ended(launcher)
        assert re.search(r"^process 1 of 2 \(.*\) was lost: killed by SIGKILL.*'saved'", err)
        assert "process 0" not in err
        assert status == 128 + 9
    [path] = tmp_path.glob("folder/*/1.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["phase"]) == (-9, "saved")


def test_a_machine_that_is_gone_is_named(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    first, second = on_two_machines(
        start, folder,
        ["err:ready\\n", f"await:{tmp_path / 'gone'}", "sleep:1.5", "signal:6"],
        ["beat:chunk 7", "err:ready\\n", "sleep:99"],
    )  # fmt: skip
    with (tmp_path / "gone").open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        print("held", file=opened, flush=True)
        for launcher in (first, second):
            read_until(launcher, "ready")
        while not any("chunk 7" in path.read_text() for path in folder.glob("*/1.json")):
            time.sleep(0.05)
        second.kill()
    status, _, err = ended(first)
    assert re.search(r"process 1 of 2 .* not been heard of since [\d:]+, last seen at 'chunk", err)
    assert status == 128 + 6


def test_one_that_never_came_is_named(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    status, _, err = ended(start(["exit:2"], processes=3, folder=str(tmp_path / "folder")))
    assert "nothing is known of process 1, 2" in err
    assert status == 2


def test_one_stuck_elsewhere_is_ended_by_its_launcher(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    options = {"processes": 2, "folder": str(tmp_path / "folder"), "stall_seconds": 1.5}
    waits = start(["beat:waiting", f"await:{tmp_path / '1'}", "sleep:1", "exit:1"], **options)
    stuck = start(["beat:chunk 2", "sleep:99"], number=1, **options)
    assert "no progress for 2 s of process 1 of 2" in ended(stuck)[2]
    status, _, err = ended(waits)
    assert re.search("^process 1 of 2 .* was lost: no progress for 2 s", err)
    assert status == 128 + 9


def test_the_registry_is_removed_when_all_went_well(
    start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    (Registry(folder, "a run").folder / "7.json").write_text("{damaged")
    for launcher in on_two_machines(start, folder, ["sleep:.5"], ["sleep:1"]):
        assert ended(launcher) == (0, "", "")
    assert not folder.exists()


def test_runs_side_by_side_have_each_their_own_records(tmp_path: Path) -> None:
    """As an array's, whose shards are runs on several machines each, into one folder."""
    (one, other), (lost, waits) = (
        [Registry(tmp_path / "folder", run, renewed=0) for _ in range(2)] for run in "ab"
    )

    def known(registry: Registry, number: int, status: int | None) -> list[Process]:
        return registry.exchange([Process(number, 2, "host", 1, status=status)], True, False)

    known(lost, 0, None)
    known(one, 0, 0)
    assert [found.status for found in known(other, 1, 0)] == [0, 0]
    assert [found.status for found in known(waits, 1, None)] == [None, None]
    for registry in (one, other):
        registry.leave()
    assert not one.folder.exists()
    known(lost, 0, -9)
    assert [found.status for found in known(waits, 1, 143)] == [-9, 143]
    waits.leave()
    assert len(list(waits.folder.glob("[01].json"))) == 2, "what was lost can be read"


def process(number: int = 0, **known: object) -> Process:
    return Process(number, 3, "host", 1, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "named"),
    [
        ([("chunk 1", 5, 99), ("waiting", 6, 98), ("waiting", 6, 98)], [0]),
        ([("waiting", 6, 99), ("chunk 1", 5, 9), ("waiting", 6, 99)], []),  # one still works
        ([("chunk 1", 5, 99), ("chunk 9", 9, 1), ("waiting", 9, 1)], [0]),
        ([("chunk 2", 6, 98), ("chunk 1", 5, 99), ("chunk 2", 6, 98)], [1]),
        ([("waiting", 6, 98), ("waiting", 5, 99), ("waiting", 6, 98)], [1]),
        ([("chunk 2", 6, 97), ("chunk 2", 6, 99), ("waiting", 7, 99)], [1, 0]),  # cannot be told
        ([("waiting", 6, 99), ("waiting", 6, 99)], []),  # of the third nothing is known
        ([("waiting", 6, 99), ("chunk 2", 6, 99)], [1]),
        ([], []),
    ],
)
def test_who_is_stuck(seen: list[tuple[str, int, float]], named: list[int]) -> None:
    known = [
        process(i, phase=phase, count=count, idle=idle)
        for i, (phase, count, idle) in enumerate(seen)
    ]
    assert [found.number for found in lost.stuck(known, 90)] == named


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        ([(None, 0), (0, 1), (143, 2)], None),
        ([(1, 5.0), (-9, 5.1), (-6, 4.9)], 1),  # at about the same time: who was killed
        ([(1, 5.0), (-6, 25.0), (-9, 40.0)], 0),  # the others followed
        ([(-6, 5.0), (1, 5.2), (0, 0)], 0),
    ],
)
def test_who_was_lost_first(ends: list[tuple[int | None, float]], named: int | None) -> None:
    known = [process(i, status=status, ended=when) for i, (status, when) in enumerate(ends)]
    found = lost.first_lost(known)
    assert (None if found is None else found.number) == named


def test_who_does_not_answer_is_lost_and_not_who_was_aborted_for_it() -> None:
    waited = process(0, phase="waiting", idle=19, status=-6, ended=5)
    stopped, late = process(1, phase="chunk 2", idle=20), process(1, phase="chunk 3", idle=2)
    found = lost.first_lost([waited, stopped, process(2, phase="waiting", idle=19)])
    assert found is not None
    assert re.search("process 1 .* was lost: it did not answer", lost.told(found))
    assert lost.first_lost([waited, late]) == waited
    late = process(1, phase="waiting", idle=10, stopped=True)  # the first, say, of which JAX
    at_work = dataclasses.replace(waited, phase="chunk 2")  # expects an answer sooner
    assert "lost: stopped (SIGSTOP?), it did not" in lost.told(lost.first_lost([at_work, late]))
    assert lost.first_lost([dataclasses.replace(waited, phase="chunk 2"), stopped]).number == 0


def test_what_was_asked_for_is_no_loss() -> None:
    assert process(status=-15).lost
    assert not process(status=-15, sent=(15,)).lost
    assert process(status=-9, sent=(15,)).lost


def test_pulse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pulse"
    monkeypatch.delenv(pulse.VARIABLE, raising=False)
    pulse.beat("nobody watches")
    for bad in (tmp_path, tmp_path / "none"):
        monkeypatch.setenv(pulse.VARIABLE, str(bad))
        pulse.beat("it cannot be written")
    path.write_bytes(pulse.record(0, "starting"))
    monkeypatch.setenv(pulse.VARIABLE, str(path))
    with path.open("rb") as opened:
        counts = []
        for phase in ("chunk 1", "€\n\0" * 200, "\U0001f600" * 200, "", "waiting"):
            pulse.beat(phase)
            found = pulse.read(opened.fileno())
            assert found is not None
            assert path.stat().st_size == pulse.SIZE
            assert found.monotonic == pytest.approx(time.monotonic(), abs=PATIENCE)
            counts.append(found.count)
    assert found.phase == "waiting"
    assert counts == list(range(counts[0], counts[0] + 5))
    path.write_bytes(b"{")
    with path.open("rb") as opened:
        assert pulse.read(opened.fileno()) is None


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_of_cores_are_equal(cores: int, processes: int) -> None:
    found = launch.shares(range(100, 100 + cores), processes)
    if processes == 1:
        assert found == [None]
        return
    each = max(1, cores // processes)
    assert [len(set(share)) for share in found] == [each] * processes
    if cores >= processes:
        assert len({core for share in found for core in share}) == each * processes


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """What `sae-jax launch` of a command line would start, in this environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMIX_", "JAX_", "CUDA_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "GPUS", Path("/nowhere"))
    monkeypatch.setattr(launch, "allowed_cores", lambda: [4, 5, 6, 7, 8])
    monkeypatch.setattr(sys, "argv", ["/bin/sae-jax", "launch"])

    def main(*arguments: str, **environment: str) -> dict:
        seen: dict = {}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            supervisor, "launch", lambda commands, **more: seen.update(more, commands=commands) or 0
        )
        with flagsaver.flagsaver():
            launch.define_flags()
            try:
                rest = flags.FLAGS(["launch", *arguments])[1:]
            finally:
                flags.FLAGS.set_gnu_getopt()
            with pytest.raises(SystemExit) as end:
                launch.main(rest)
        assert end.value.code == 0
        return seen

    return main


def test_processes_of_one_machine(launched: Callable[..., dict]) -> None:
    seen = launched("--processes=2", "--stall_minutes=1", "--", "sweep", "--epochs=3")
    start = [sys.executable, "/bin/sae-jax", "sweep", "--epochs=3", "--multihost"]
    assert [command.words for command in seen["commands"]] == [start] * 2
    first, second = (command.environment for command in seen["commands"])
    assert first["JAX_COORDINATOR_ADDRESS"] == second["JAX_COORDINATOR_ADDRESS"]
    assert [one["JAX_PROCESS_ID"] for one in (first, second)] == ["0", "1"]
    assert first["JAX_NUM_PROCESSES"] == "2"
    assert [command.cores for command in seen["commands"]] == [[4, 5], [6, 7]]
    assert "CUDA_VISIBLE_DEVICES" not in first
    assert (seen["registry"], seen["stall_seconds"]) == (None, 60)


def test_gpus_are_shared_out(launched: Callable[..., dict]) -> None:
    asked = ("--processes=2", "--", "sweep", "--multihost=true")
    seen = launched(*asked, CUDA_VISIBLE_DEVICES="3,5,GPU-a,7")
    assert seen["commands"][0].words[-1] == "--multihost=true"
    found = [command.environment for command in seen["commands"]]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["3,5", "GPU-a,7"]
    assert [one["JAX_LOCAL_DEVICE_IDS"] for one in found] == ["0,1", "0,1"]
    found = launched(*asked, CUDA_VISIBLE_DEVICES="3")["commands"]
    assert "CUDA_VISIBLE_DEVICES" not in found[0].environment


SLURM = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip


def test_a_place_that_slurm_gives(launched: Callable[..., dict], tmp_path: Path) -> None:
    asked = ("--", "sweep", f"--workdir={tmp_path}/new")
    seen = launched(*asked, **SLURM, CUDA_VISIBLE_DEVICES="0,1")
    [command] = seen["commands"]
    assert (seen["number"], seen["processes"], command.cores) == (2, 4, None)
    assert command.words[-1] == "--multihost"
    assert command.environment == {"JAX_LOCAL_DEVICE_IDS": "0,1"}  # JAX would take the first alone
    assert seen["registry"].folder.parent == tmp_path / "new/.processes"
    seen = launched(*asked, SLURM_STEP_NUM_NODES="2")
    assert seen["commands"][0].environment == {}  # they share a machine: as JAX has it
    with pytest.raises(InputError, match="leave it out"):
        launched("--processes=2", *asked)
    with pytest.raises(InputError, match="--registry is needed"):
        launched("--", "sweep")


def test_alone(launched: Callable[..., dict]) -> None:
    seen = launched("train", "--workdir=x")
    assert seen["commands"][0].words[2:] == ["train", "--workdir=x"]
    assert (seen["number"], seen["processes"], seen["registry"]) == (0, 1, None)
    assert launched("--", "sweep")["commands"][0].words[2:] == ["sweep"]
    for words in (["--", "launch"], ["lens"], ["--", "--data=x"], []):
        with pytest.raises(InputError, match="give the command, of train or sweep"):
            launched(*words)


def test_only_programs_for_several_processes_are_launched() -> None:
    """Others give no signs of life, and would be ended as stuck."""
    found = []
    for name in cli.PROGRAMS:
        program = importlib.import_module(f"experiments.{cli.MODULES.get(name, name)}")
        with flagsaver.flagsaver():
            program.define_flags()
            found += [name] if "multihost" in flags.FLAGS else []
        flags.FLAGS.set_gnu_getopt()
    assert sorted(found) == sorted(launch.PROGRAMS)


def test_the_launcher_loads_no_jax() -> None:
    code = "import experiments.launch, sys; sys.exit(len({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

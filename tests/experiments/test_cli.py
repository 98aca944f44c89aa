"""How every program ends: one line, a status, and of several processes without the others."""

import subprocess
import sys

import pytest

# Of a program that is one of several processes, as far as the console script can see.
PROGRAM = """
import sys, types
from experiments import cli
from sae_jax import InputError
several = types.SimpleNamespace(leave=lambda *told: print("left", *told))
sys.modules["sae_jax.distributed"] = several
def program(arguments):
    raise {error}
cli.launch(program, lambda: None, ["program"], "ARGUMENTS")
"""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("KeyboardInterrupt", 130, "interrupted"),
        ("InputError('no rows')", 2, "error: no rows"),
        ("OSError(28, 'No space left on device', 'x')", 1, "error: "),
        ("ZeroDivisionError", 1, "Traceback"),
    ],
)
def test_who_ends_early_waits_for_nobody(error: str, status: int, said: str) -> None:
    code = PROGRAM.format(error=error)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == status
    assert ended.stdout == f"left {status} {status == 1 and said == 'Traceback'}\n"
    assert ended.stderr.startswith(said)


def test_a_message_begins_a_line_below_a_bar_that_was_left() -> None:
    bar = "import tqdm; bar = tqdm.tqdm(total=9); bar.update(3)\n    raise {error}"
    code = PROGRAM.replace("raise {error}", bar).format(error="InputError('no rows')")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "3/9" in ended.stderr
    assert ended.stderr.endswith("\nerror: no rows\n")


@pytest.mark.parametrize("module", ["experiments.browse", "extract.main"])
def test_help_is_no_failure(module: str) -> None:
    command = [sys.executable, "-m", module]
    ended = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stdout.startswith("Concept browser" if "browse" in module else "Hidden states")
    assert ended.stderr == ""
    wrong = subprocess.run([*command, "--nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2


def test_the_programs_are_listed_with_the_one_that_extracts() -> None:
    command = [sys.executable, "-c", "from experiments import cli; cli.main()"]
    ended = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert "sae-jax-extract" in ended.stdout
    assert subprocess.run(command, capture_output=True).returncode == 2

"""The scripts in docs/slurm are shell, and give our programs flags that they have."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import cli

DOCS = Path(__file__).parents[2] / "docs"
SCRIPTS = sorted((DOCS / "slurm").glob("*.sbatch"))


def commands(script: str) -> list[list[str]]:
    """The words of every command of ours: what a variable holds is taken to be 1."""
    lines = [line for line in script.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = re.findall(r"\bsae-jax(?:-extract)? [^\n&|;]*", joined)
    return [shlex.split(re.sub(r"\$\{?\w+\}?|\$\([^)]*\)", "1", line)) for line in found]


def parse(words: list[str]) -> None:
    """Raises absl's error for flags that the program has not, or values that they refuse."""
    if words[0] == "sae-jax-extract":
        from extract import main as program

        rest = words[1:]
    else:
        program = importlib.import_module(f"experiments.{cli.MODULES.get(words[1], words[1])}")
        rest = words[2:]
    with flagsaver.flagsaver():
        program.define_flags()
        try:
            left = flags.FLAGS(["program", *rest])[1:]
        finally:
            flags.FLAGS.set_gnu_getopt()
    if words[1:2] == ["launch"]:
        parse(["sae-jax", *left])
    else:
        assert left == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_is_shell_and_its_flags_exist(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    found = commands(path.read_text())
    assert found
    for words in found:
        parse(words)


def test_a_flag_that_is_not_there_is_seen() -> None:
    [words] = commands("srun x sae-jax launch -- sweep \\\n  --no_such_flag=$A &\n")
    assert words == ["sae-jax", "launch", "--", "sweep", "--no_such_flag=1"]
    with pytest.raises(flags.Error, match="no_such_flag"):
        parse(words)


def test_every_script_is_documented() -> None:
    text = (DOCS / "multihost.md").read_text()
    assert set(re.findall(r"\(slurm/(.*?)\)", text)) == {path.name for path in SCRIPTS}

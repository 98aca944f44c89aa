"""The folder of a program whose input is refused when it has begun."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import folders
from extract.errors import InputError as ExtractionError
from sae_jax import InputError

SETTINGS = "some.json"


@pytest.fixture(autouse=True)
def program() -> Iterator[None]:
    """One that can continue and overwrite."""
    with flagsaver.flagsaver():
        for name in ("overwrite", "resume"):
            flags.DEFINE_bool(name, False, "")
        flags.FLAGS(["program"])
        yield


def refused(out: Path, *leaves: str, error: type[ValueError] = InputError) -> None:
    """A body that leaves so much, then refuses its input."""

    def fill() -> None:
        with folders.filled(out, SETTINGS, {"epochs": 3}, (SETTINGS, "table.csv")):
            for name in leaves:
                (out / name).write_text("a,b")
            raise error("too late")

    with pytest.raises(error, match="too late"):
        fill()


def test_nothing_stays_where_nothing_was_made(tmp_path: Path) -> None:
    refused(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", error=ExtractionError)
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_was_made_stays_and_goes_on(tmp_path: Path) -> None:
    refused(tmp_path / "out", "table.csv")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SETTINGS, "table.csv"}
    flags.FLAGS.resume = True
    refused(tmp_path / "out")
    assert json.loads((tmp_path / "out" / SETTINGS).read_text()) == {"epochs": 3}


def test_an_earlier_runs_settings_stay(tmp_path: Path) -> None:
    """A run that was killed before it left anything is not undone by one that goes on with it."""
    (tmp_path / SETTINGS).write_text(json.dumps({"epochs": 3}))
    flags.FLAGS.resume = True
    refused(tmp_path)
    assert (tmp_path / SETTINGS).exists()

"""Damage to what a program has left: a flipped bit of every file, and every file gone."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import verify
from sae_jax import manifest


def verified(*folders: Path) -> tuple[int, str]:
    """The exit status of `sae-jax verify`, and what it prints."""
    printed = io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(printed):
        if "level" not in flags.FLAGS:
            verify.define_flags()
        flags.FLAGS(["verify"])
        try:
            verify.main(list(map(str, folders)))
        except SystemExit as stopped:
            return int(stopped.code), printed.getvalue()
    return 0, printed.getvalue()


def check_every_file(folder: Path) -> None:
    """A manifest has every file of a run, and `sae-jax verify` finds each one that is damaged."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    ours = [p for p in paths if not any(s.startswith(".") for s in p.relative_to(folder).parts)]
    told = f"{folder}: {len(ours) - 1} files as they were left\n"
    assert verified(folder) == (0, told)
    rng = np.random.default_rng(0)
    for path in ours:
        content = path.read_bytes()
        damaged = bytearray(content)
        if damaged:
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            status, printed = verified(folder)
            assert status == 1, path
            assert path.name in printed or path.name == manifest.NAME  # what it says is then wrong
        path.unlink()
        with pytest.raises(ValueError, match=path.name):
            verify.look(folder, "size")
        path.write_bytes(content)
    assert manifest.check(folder, "full") == len(ours) - 1

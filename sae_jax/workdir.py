"""What a run leaves on disk, and what a second call finds there.

configs.json                what was asked: every configuration, epochs, seeds, the data's hash
dictionaries/<member>/      cfg.json and sae_weights.safetensors; none where it diverged
history.parquet             one row per member and epoch
results.parquet             one row per finished member; written last, so what it names is whole
checkpoints/<member>/       of the program in training whose first member this is
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_jax import files, manifest
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError
from sae_jax.files import check_writable
from sae_jax.state import History

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Member:
    """A finished member: dictionary (None: diverged), its row of results, history [epochs]."""

    dictionary: Dictionary | None
    row: dict[str, Any]
    history: History


SETTINGS = ("quickstart.json", "sweep.json", "train.json")  # of programs, that come first
_locked: set[Path] = set()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process fills the folder meanwhile; it ends with the process, however that ends.

    A process may lock a folder within itself again. Where the file system has no such locks,
    nothing is locked.

    Raises:
      InputError: another process fills it, or it cannot be written.
    """
    check_writable(path)
    path.mkdir(parents=True, exist_ok=True)
    key = path.resolve()
    if key in _locked:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path} is being filled by another process; wait for it") from None
        except OSError:
            pass
        _locked.add(key)
        yield
    finally:
        _locked.discard(key)
        os.close(handle)


class Workdir:
    """The folder of one run.

    Raises:
      InputError: the folder holds something else, or a run of other settings (which are shown), or
        cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        check_writable(path)
        config_file = path / "configs.json"
        if config_file.exists():
            try:
                found = json.loads(config_file.read_text())
            except (ValueError, RecursionError) as error:
                raise InputError(f"{config_file} is damaged: {error}") from None
            if found != settings:
                raise InputError(
                    f"{path} holds a run of other settings:\n  {difference(found, settings)}\n"
                    "Give another folder, or the same settings to continue that run."
                )
        else:
            refuse_others(path)
            files.write_json(config_file, settings)
        files.remove_leftovers(path, path / "dictionaries")
        self.configs = settings["configs"]

    def finished(self) -> dict[int, Member]:
        """Members of an earlier call, by position."""
        members = read_members(self.path) if (self.path / "results.parquet").exists() else {}
        for position, member in members.items():
            asked = self.configs[position] if position < len(self.configs) else None
            found = None if member.dictionary is None else member.dictionary.config.to_dict()
            if {name: member.row.get(name) for name in ("seed", "n_latents")} != {
                name: asked and asked[name] for name in ("seed", "n_latents")
            } or (found is not None and found != asked):
                raise InputError(f"{self.folder(position)} is not of configuration {position}")
        for position in range(len(self.configs)):  # what a killed run left; it is trained again
            if position not in members and self.folder(position).exists():
                shutil.rmtree(self.folder(position))
        return members

    def write(self, members: dict[int, Member]) -> None:
        """Bring the folder up to date with the finished members, by position."""
        for position, member in members.items():
            folder = self.folder(position)
            if member.dictionary is not None and not folder.exists():
                member.dictionary.save(folder)
        results, history = tables(members)
        files.write_parquet(self.path / "history.parquet", history)
        files.write_parquet(self.path / "results.parquet", results)

    def begin(self) -> None:
        """Say that the folder is being filled: it has no manifest until `finish`."""
        files.remove(self.path / manifest.NAME)

    def finish(self) -> None:
        """Note every file in the manifest, unless it is there since an earlier call."""
        if not (self.path / manifest.NAME).exists():
            ours = {"configs.json", "results.parquet", "history.parquet", "dictionaries"}
            others = {path.name for path in self.path.iterdir()} - ours
            manifest.write(self.path, without=tuple(others))

    def folder(self, position: int) -> Path:
        """Where a member's dictionary lies."""
        return dictionary_folder(self.path, position)

    def checkpoints(self, first: int) -> Path:
        """Where those of the program lie whose first member is at this position."""
        return self.path / "checkpoints" / f"{first:04d}"

    def keep_checkpoints(self, firsts: list[int]) -> None:
        """Delete those of all other programs: killed after they finished."""
        kept = {self.checkpoints(first) for first in firsts}
        for folder in set((self.path / "checkpoints").glob("*")) - kept:
            if folder.name.isdigit():
                shutil.rmtree(folder, ignore_errors=True)


def dictionary_folder(path: Path, position: int) -> Path:
    """Where a member's dictionary lies in a run's folder."""
    return path / "dictionaries" / f"{position:04d}"


def read_members(path: Path) -> dict[int, Member]:
    """The finished members in a run's folder, by position.

    Raises:
      InputError: tables that are missing, damaged or disagree; a damaged dictionary.
    """
    results = _read_parquet(path / "results.parquet")
    history = _read_parquet(path / "history.parquet")
    if "member" not in results or not set(results["member"]) <= set(history.get("member", ())):
        raise InputError(f"{path}: results.parquet and history.parquet disagree")
    history = dict(iter(history.groupby("member")))
    return {
        row["member"]: Member(
            Dictionary.load(dictionary_folder(path, row["member"]))
            if row["status"] == "trained"
            else None,
            row,
            History(
                **{
                    field.name: history[row["member"]][field.name].to_numpy()
                    for field in dataclasses.fields(History)
                }
            ),
        )
        for row in results.to_dict("records")
    }


def refuse_others(path: Path) -> None:
    """Raises InputError where a folder without configs.json holds what no program of ours began."""
    there = path.iterdir() if path.is_dir() else ()
    others = [p.name for p in there if p.name not in SETTINGS and not p.name.startswith(".")]
    if others:
        listed = ", ".join(sorted(others)[:5]) + (", ..." if len(others) > 5 else "")
        raise InputError(
            f"{path} holds other files ({listed}) and no configs.json of a run; choose an empty or "
            "a new folder"
        )


def tables(members: dict[int, Member]) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Results, one row a member, and history, one row per member and epoch."""
    import pandas as pd

    members = dict(sorted(members.items()))
    results = pd.DataFrame([{"member": i} | member.row for i, member in members.items()])
    results["k"] = results["k"].astype("Int64")
    history = [
        pd.DataFrame(
            {"member": i, "epoch": np.arange(len(member.history.loss))} | vars(member.history)
        )
        for i, member in members.items()
    ]
    return results, pd.concat(history, ignore_index=True)


def _read_parquet(path: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        return pd.read_parquet(path, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from None


def difference(found: Any, asked: Any, where: str = "") -> str:
    """The first places in which two JSON values differ, one line each, five at most."""
    lines = list(_differences(found, asked, where))
    more = [f"... and {len(lines) - 5} more"] if len(lines) > 5 else []
    return "\n  ".join(lines[:5] + more)


def _differences(found: Any, asked: Any, where: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in {**found, **asked}:
            yield from _differences(found.get(key), asked.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(found, list) and isinstance(asked, list) and len(found) == len(asked):
        for i, (a, b) in enumerate(zip(found, asked, strict=True)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif isinstance(found, list) and isinstance(asked, list):
        yield f"{where}: {len(found)} there, {len(asked)} asked for"
    elif found != asked:
        yield f"{where}: {found!r} there, {asked!r} asked for"

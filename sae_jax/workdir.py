"""What a run leaves on disk, and what a second call finds there.

configs.json                what was asked: every configuration, epochs, seeds, the data's hash
dictionaries/<member>/      cfg.json and sae_weights.safetensors; none where it diverged
history.parquet             one row per member and epoch
results.parquet             one row per finished member; written last, so what it names is whole
checkpoints/<member>/       of the program in training whose first member this is
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from sae_jax import checkpoint, files, lock, manifest
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError, brief
from sae_jax.files import check_writable
from sae_jax.reading import check_file, read_json, reading
from sae_jax.state import History

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Member:
    """A finished member: dictionary (None: diverged, on disk, or in another process), its row of
    results, history [epochs]."""

    dictionary: Dictionary | None
    row: dict[str, Any]
    history: History


OURS = ("configs.json", "results.parquet", "history.parquet", "dictionaries")
FOLDERS = ("dictionaries", "checkpoints", "figures")  # of a run, and of the programs that draw
_HISTORY = tuple(field.name for field in dataclasses.fields(History))
SETTINGS = ("quickstart.json", "sweep.json", "train.json")  # of programs, that come first


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process fills the folder meanwhile, and it stays where it is: see `lock.held`.

    Raises:
      InputError: another process fills it, which is named, or it cannot be written.
    """
    check_writable(path)
    files.make_folder(path)
    with lock.held(path), files.pinned(path):
        yield


class Workdir:
    """The folder of one run.

    Raises:
      InputError: the folder holds something else, or a run of other settings (which are shown), or
        cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        check_writable(path)
        for folder in (path / name for name in FOLDERS):
            if os.path.lexists(folder) and not folder.is_dir():
                raise InputError(f"{folder} is a file where a folder is wanted: move it away")
        config_file = path / "configs.json"
        if config_file.exists():
            found = read_json(config_file)
            if found != settings:
                raise InputError(
                    f"{path} holds a run of other settings:\n  {difference(found, settings)}\n"
                    "Give another folder, or the same settings to continue that run."
                )
        else:
            refuse_others(path)
            files.write_json(config_file, settings)
        files.remove_leftovers(path, path / "dictionaries", path / "checkpoints")
        self.configs = settings["configs"]

    def finished(self) -> dict[int, Member]:
        """Members of an earlier call, by position."""
        there = (self.path / "results.parquet").exists()
        members = read_members(self.path, self.configs) if there else {}
        for position, member in members.items():
            asked = self.configs[position] if position < len(self.configs) else {}
            if any(member.row.get(name) != asked.get(name) for name in ("seed", "n_latents")):
                raise InputError(f"{self.folder(position)} is not of configuration {position}")
        for position in range(len(self.configs)):  # what a killed run left; it is trained again
            if position not in members and self.folder(position).exists():
                shutil.rmtree(self.folder(position))
        return members

    def write(self, members: dict[int, Member]) -> None:
        """Bring the folder up to date with the finished members, by position."""
        for position, member in members.items():
            self.write_dictionary(position, member)
        results, history = tables(members)
        files.write_parquet(self.path / "history.parquet", history)
        files.write_parquet(self.path / "results.parquet", results)

    def write_dictionary(self, position: int, member: Member) -> None:
        """That of one member, if it has one that is not there yet."""
        folder = self.folder(position)
        if member.dictionary is not None and not folder.exists():
            member.dictionary.save(folder)

    def begin(self) -> None:
        """Say that the folder is being filled: it has no manifest until `finish`."""
        manifest.remove(self.path)

    def finish(self) -> None:
        """Note every file in the manifest, unless it is there since an earlier call."""
        if not (self.path / manifest.NAME).exists():
            manifest.write(self.path, OURS)

    def folder(self, position: int) -> Path:
        """Where a member's dictionary lies."""
        return dictionary_folder(self.path, position)

    def checkpoints(self, first: int) -> Path:
        """Where those of the program lie whose first member is at this position."""
        return self.path / "checkpoints" / f"{first:04d}"

    def begin_program(self, positions: list[int]) -> None:
        """Note which members train together, so that they do when they go on elsewhere."""
        folder = self.checkpoints(positions[0])
        files.make_folder(folder.parent)
        files.write_json(folder.with_suffix(".json"), {"members": positions})

    def begun(self, todo: Collection[int]) -> list[list[int]]:
        """The programs that were in training, all of whose members are still to be trained."""
        found, free = [], set(todo)
        for file in sorted((self.path / "checkpoints").glob("[0-9]*.json")):
            # A damaged note is as good as none.
            with contextlib.suppress(InputError, LookupError, TypeError):
                members = read_json(file)["members"]
                whole = {member for member in members if type(member) is int and member in free}
                if len(whole) == len(members) > 0 and self.checkpoints(members[0]).is_dir():
                    found.append(members)
                    free -= whole
        return found

    def keep_checkpoints(self, firsts: list[int]) -> None:
        """Delete those of all other programs: killed after they finished."""
        kept = {self.checkpoints(first).name for first in firsts}
        for path in (self.path / "checkpoints").glob("[0-9]*"):
            name = path.name.removesuffix(".json").removesuffix(".skipped")
            if not name.isdigit() or name in kept:  # of a user's, who has renamed it, say
                continue
            if path.is_dir():
                checkpoint.remove(path)
            else:
                files.remove(path)
        with contextlib.suppress(OSError):  # others are there, or none ever were
            (self.path / "checkpoints").rmdir()


def dictionary_folder(path: Path, position: int) -> Path:
    """Where a member's dictionary lies in a run's folder."""
    return path / "dictionaries" / f"{position:04d}"


class Stored(Sequence["Dictionary | None"]):
    """The dictionaries of a run's folder, each of which is read when it is asked for."""

    def __init__(self, path: Path, members: dict[int, Member]) -> None:
        self._path = path
        self._trained = {i: member.row["status"] == "trained" for i, member in members.items()}
        self._positions = sorted(self._trained)

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, key: int) -> Dictionary | None: ...

    @overload
    def __getitem__(self, key: slice) -> list[Dictionary | None]: ...

    def __getitem__(self, key: int | slice) -> Dictionary | list[Dictionary | None] | None:
        if isinstance(key, slice):
            return [self[i] for i in range(len(self))[key]]
        position = self._positions[key]
        there = self._trained[position]
        return Dictionary.load(dictionary_folder(self._path, position)) if there else None

    def __repr__(self) -> str:
        there = sum(self._trained.values())
        return f"<{there} dictionaries of {len(self)} configurations in {self._path}>"


def read_members(path: Path, configs: Sequence[dict[str, Any]] | None = None) -> dict[int, Member]:
    """The finished members in a run's folder, by position; their dictionaries are checked, and stay
    on disk.

    Args:
      configs: what each position must hold.

    Raises:
      InputError: tables that are missing, damaged or disagree; a damaged dictionary, or one of
        another configuration.
    """
    results = _read_parquet(path / "results.parquet")
    history = _read_parquet(path / "history.parquet")
    wanted = {"results": ("member", "status", "k"), "history": ("member", *_HISTORY)}
    for name, table in (("results", results), ("history", history)):
        if missing := [column for column in wanted[name] if column not in table]:
            raise InputError(f"{path / name}.parquet has no column {', '.join(missing)}: damaged?")
    if not len(results) or not set(results["member"]) <= set(history["member"]):
        raise InputError(f"{path}: results.parquet and history.parquet disagree")
    if odd := sorted(set(map(str, results["status"])) - {"trained", "diverged"}):
        raise InputError(f"{path}/results.parquet: {brief(odd[0])} is no status of a member")
    history = dict(iter(history.groupby("member")))
    members = {}
    for row in results.to_dict("records"):
        position = row["member"]
        if row["status"] == "trained":
            folder = dictionary_folder(path, position)
            found = Dictionary.load(folder).config.to_dict()
            if configs is not None and found not in configs[position : position + 1]:
                raise InputError(f"{folder} is not of configuration {position}")
        epochs = {name: history[position][name].to_numpy() for name in _HISTORY}
        members[position] = Member(None, row, History(**epochs))
    return members


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
    with reading(path, "is missing or damaged"):
        return files.read_parquet(check_file(path))


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

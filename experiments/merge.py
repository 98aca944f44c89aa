r"""The shards of a sweep, gathered into one run.

    sae-jax sweep ... --num_shards=8 --shard_index=$SLURM_ARRAY_TASK_ID --workdir=runs/sweep
    sae-jax merge --workdir=runs/sweep --output=runs/whole

Every shard is checked against its manifest first, byte for byte. One that is missing or was not
finished is named with the command that trains it; --partial gathers the rest. The output is a run
like one of a single job: `sae_jax.Run.load` reads it, and the same sweep without shards finds
nothing left to train in it.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from absl import flags

from analysis import plots
from experiments import cli, sharding, sweep
from sae_jax import InputError, files, manifest, workdir
from sae_jax.errors import counted
from sae_jax.reading import read_object

FLAGS = flags.FLAGS

NAME = re.compile(r"shard-(\d+)-of-(\d+)")
TABLES = ("results", "history")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("workdir", None, "The folder of the shards, --workdir of their sweep.")
    flags.DEFINE_string("output", None, "New folder for the whole.")
    flags.DEFINE_bool("partial", False, "Gather what is finished, though shards are missing.")


def main() -> None:
    """Runs the program by its flags."""
    if not FLAGS.workdir or not FLAGS.output:
        raise InputError("--workdir and --output are needed: the folder of the shards, a new one")
    out = Path(FLAGS.output)
    workdir.check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--output={out} is there already: give a new folder")
    finished, missing = look(Path(FLAGS.workdir))
    for told in missing:
        print(told)
    if not finished or (missing and not FLAGS.partial):
        raise InputError(
            f"{counted(len(missing), 'shard')} missing or not finished: give the commands above, "
            "or --partial"
        )
    files.remove_leftovers_of(out)
    results = gather(finished, out, draw)
    split = split_of(results)
    many = counted(len(results), "configuration")
    print(f"{out}/: {many} of {counted(len(finished), 'shard')}")
    print(f"\nbest {split} R² at their L0")
    print(sweep.best(results, split))


def look(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Finished shards with their settings, and what is said of the others.

    Raises:
      InputError: no shards, those of several sweeps, or a shard that is damaged.
    """
    there = list(folder.iterdir()) if folder.is_dir() else []
    found = {path: match for path in sorted(there) if (match := NAME.fullmatch(path.name))}
    if not found:
        raise InputError(f"{folder} holds no shards (shard-000-of-008, ...) of a sweep")
    counts = {int(match[2]) for match in found.values()}
    if len(counts) > 1:
        raise InputError(f"{folder} holds shards of {sorted(counts)}: of several sweeps")
    [count] = counts
    places = [folder / f"shard-{index:03d}-of-{count:03d}" for index in range(count)]
    if strange := sorted(set(found) - set(places)):
        raise InputError(
            f"{strange[0]} is none of --shard_index=0 .. {count - 1} of --num_shards={count}: take "
            "it away"
        )
    # One that was killed before it noted what it was asked for has nothing visible in it.
    begun = [path for path in found if any(path.glob("[!.]*"))]
    settings = {path: sharding.read_settings(path / sweep.SETTINGS) for path in begun}
    if not settings:
        raise InputError(f"no shard in {folder} has begun: start them again")
    first = sharding.alike(next(iter(settings.values())))
    for path, other in settings.items():
        if changes := sharding.difference(first, other):
            raise InputError(f"{path} is a shard of another sweep:\n  {changes}")
    sharding.check_apart({path: each["positions"] for path, each in settings.items()})
    finished, missing = {}, []
    for index, path in enumerate(places):
        again = command(first, index, count, folder)
        if not (path / manifest.NAME).exists():
            state = "was not finished" if path in found else "is missing"
            missing.append(f"{sharding.flags_of(index, count)} {state}: {again}")
            continue
        try:
            manifest.check(path, "full")  # the whole gets a manifest of its own
        except InputError as error:
            raise InputError(f"{error}; {again} --overwrite") from None
        finished[path] = settings[path]
    trained = sorted(place for each in finished.values() for place in each["positions"])
    if not missing and trained != list(range(len(trained))):
        raise InputError(f"the shards in {folder} are not the whole: they were split differently")
    return finished, missing


def command(settings: dict[str, Any], index: int, count: int, folder: Path) -> str:
    """The command that trains a shard, for a shell."""
    given = settings | {"num_shards": count, "shard_index": index, "workdir": str(folder)}
    words = [f"--{name}={_text(value)}" for name, value in given.items()]
    return shlex.join(["sae-jax", "sweep", *words])


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def gather(
    shards: dict[Path, dict[str, Any]],
    out: Path,
    more: Callable[[pd.DataFrame, Path], None] | None = None,
) -> pd.DataFrame:
    """One run of all; its results. Of some shards it is a run of their configurations alone.

    more: adds to the folder, of the results, before it takes its place.
    """
    places = sorted(place for settings in shards.values() for place in settings["positions"])
    member = {place: i for i, place in enumerate(places)}
    configs: list[Any] = [None] * len(places)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    training: list[dict[str, Any]] = []
    with files.write_aside(out) as fresh:
        (fresh / "dictionaries").mkdir(parents=True)
        for path, settings in shards.items():
            asked = read_object(path / "configs.json")
            own = [member[place] for place in settings["positions"]]
            if len(own) != len(asked["configs"]):
                raise InputError(f"{path}: {sweep.SETTINGS} and configs.json disagree")
            training.append({key: value for key, value in asked.items() if key != "configs"})
            if changes := workdir.difference(training[0], training[-1]):
                raise InputError(f"{path} was trained on other rows or otherwise:\n  {changes}")
            for i, config in enumerate(asked["configs"]):
                configs[own[i]] = config
                if (dictionary := workdir.dictionary_folder(path, i)).exists():
                    shutil.copytree(dictionary, workdir.dictionary_folder(fresh, own[i]))
            for name in TABLES:
                table = files.read_parquet(path / f"{name}.parquet")
                tables[name].append(table.assign(member=[own[i] for i in table["member"]]))
        whole = {
            name: pd.concat(parts).sort_values("member", kind="stable", ignore_index=True)
            for name, parts in tables.items()
        }
        for name, table in whole.items():
            files.write_parquet(fresh / f"{name}.parquet", table)
        files.write_json(fresh / "configs.json", {"configs": configs} | training[0])
        files.write_json(fresh / sweep.SETTINGS, sharding.alike(settings))
        if more is not None:
            more(whole["results"], fresh)
        manifest.write(fresh)
    return whole["results"]


def draw(results: pd.DataFrame, folder: Path) -> None:
    """The figure of a sweep, of the whole."""
    frontier = plots.frontier(results, split=split_of(results))
    plots.save(frontier, folder / "figures", "frontier")


def split_of(results: pd.DataFrame) -> str:
    """The rows whose metrics are told: held out, if there are any."""
    return "validation" if "validation_r2" in results else "train"


if __name__ == "__main__":
    cli.launch(main, define_flags)

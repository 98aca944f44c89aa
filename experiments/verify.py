r"""Whether what our programs left is still as they left it.

    sae-jax verify runs/lens runs/sweep layers/layer_11.zarr dictionaries/0003

Of each folder: how many files are as they were, in every byte (--level=size: of their size alone,
at once), or which are missing or differ. Runs and attributions have a manifest.json, extraction
stores one in their zarr.json, dictionaries a hash in their cfg.json. What others added to a folder
is not looked at. Exit status 1 if anything is not as it was left.

Programs that read such folders look at the size of every file before they begin, and by
--verify=full at every byte.
"""

import json
import re
from pathlib import Path

from absl import flags, logging

from experiments import cli
from sae_jax import InputError, manifest
from sae_jax.errors import counted

FLAGS = flags.FLAGS

ARGUMENTS = "DIR ..."


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_enum("level", "full", manifest.LEVELS, "Every byte, or the size of every file.")


def define_flag() -> None:
    """Of programs that read what ours have left: how `inputs` checks it."""
    flags.DEFINE_enum(
        "verify", "size", manifest.LEVELS, "Of files that our programs left: sizes, or every byte."
    )


def main(folders: list[str]) -> None:
    """Runs the program by its flags."""
    if not folders:
        raise InputError("give folders that our programs left: sae-jax verify DIR")
    bad = 0
    for folder in map(Path, folders):
        try:
            print(f"{folder}: {counted(look(folder, FLAGS.level), 'file')} as they were left")
        except ValueError as error:  # of either package
            print(f"{error}" if str(folder) in str(error) else f"{folder}: {error}")
            bad += 1
    if bad:
        raise SystemExit(1)


def inputs(*paths: str | Path | None) -> None:
    """Check by --verify what another of our programs left and this one is to read.

    Nothing is said of files, of zarr stores that are no extraction's and of dictionaries, which are
    checked where they are loaded. A run without a manifest is said to have none, and is refused
    under --verify=full.

    Raises:
      InputError: something is missing or not as it was left.
    """
    for path in (Path(re.sub(r"(\.zarr):[^:]*$", r"\1", str(path))) for path in paths if path):
        of_zarr = any((path / name).is_file() for name in ("zarr.json", ".zgroup"))
        foreign = of_zarr and not _is_extraction(path)
        if not path.is_dir() or foreign or (path / "cfg.json").is_file():
            continue
        if (path / manifest.NAME).is_file() or _is_extraction(path) or FLAGS.verify == "full":
            look(path, FLAGS.verify)
        else:
            logging.warning(
                "%s has no manifest (it was not finished, or is of an older version) and was not "
                "checked for damage", path,
            )  # fmt: skip


def look(folder: Path, level: manifest.Level) -> int:
    """How many files of a folder are as they were left.

    Raises:
      InputError: of either package: some are not, or there is nothing to compare them with.
    """
    if (folder / manifest.NAME).is_file():
        return manifest.check(folder, level)
    if _is_extraction(folder):
        import extract.manifest

        return extract.manifest.check(folder, level)
    if (folder / "cfg.json").is_file():
        from sae_jax import Dictionary

        Dictionary.load(folder)
        return 2
    if not folder.is_dir():
        there = "is a file" if folder.exists() else "is not there"
        raise InputError(
            f"{folder} {there}: give folders that our programs left, of a run, an extraction store "
            "(layer_11.zarr) or a dictionary"
        )
    raise InputError(
        f"{folder} has no {manifest.NAME}: it was not finished (give its command again), is of an "
        "older version, or not of ours"
    )


def _is_extraction(folder: Path) -> bool:
    """Whether a store is one that `sae-jax-extract` left, damaged or not.

    What anndata writes of such, of some of its cells or of several stores, keeps the record of them
    too, but has no attributes at its root but anndata's own: it is nobody's.
    """
    if not (folder / "uns" / "extraction").is_dir() or (folder / ".zgroup").is_file():
        return False
    try:
        attributes = set(json.loads((folder / "zarr.json").read_bytes())["attributes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True
    return not attributes <= {"encoding-type", "encoding-version"}


if __name__ == "__main__":
    cli.launch(main, define_flags, arguments=ARGUMENTS)

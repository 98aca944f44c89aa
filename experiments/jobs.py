"""A training job from flags: rows and their split, a folder to fill, `sae_jax.train`.

What `sweep` and `train` have in common.
"""

import collections
import contextlib
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

import sae_jax
from experiments import verify
from sae_jax import (
    InputError,
    SAEConfig,
    data,
    distributed,
    files,
    manifest,
    planning,
    together,
    workdir,
)
from sae_jax.errors import counted
from sae_jax.state import History
from sae_jax.streaming import Rows

FLAGS = flags.FLAGS

OPEN_WRITERS = 128  # of TensorBoard: each is a file, of which a process may have some 1000
KEPT = (
    "manifest.json", "configs.json", "results.parquet", "history.parquet", "dictionaries",
    "checkpoints",
)  # fmt: skip


def define_flags() -> None:
    """Of the rows, the folder and the training."""
    flags.DEFINE_string("data", None, "Rows: F.npy, F.h5ad:obsm/KEY, F.h5ad:X, F.zarr:obsm/KEY.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_integer("epochs", 100, "Passes over the rows.", lower_bound=1)
    flags.DEFINE_integer(
        "patience", None, "Epochs without a lower loss after which one stops.", lower_bound=1
    )
    flags.DEFINE_float("validation", 0.1, "Share of rows held out; 0: none.", 0, 1)
    flags.DEFINE_string(
        "split",
        None,
        "Column of obs that says train, validation or test of each row, instead of --validation.",
    )
    flags.DEFINE_integer("data_seed", 0, "Of the rows held out and of the order of training.", 0)
    flags.DEFINE_float(
        "resident_gib",
        None,
        "Rows beyond so many GiB are streamed from disk (default: 2, whatever the machine).",
        lower_bound=0,
    )
    flags.DEFINE_float("checkpoint_seconds", 60, "Between checkpoints.", lower_bound=0)
    flags.DEFINE_integer(
        "latent_devices",
        None,
        "Devices that share the latents of each dictionary (default: as few as hold it, or more "
        "where accelerators would be idle).",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "tensorboard",
        False,
        "Losses of every configuration for TensorBoard, in WORKDIR/tensorboard.",
    )
    flags.DEFINE_bool("multihost", False, "This is one of several processes started together.")
    verify.define_flag()


def join() -> None:
    """Become one of several processes, with --multihost.

    Raises:
      InputError: in every process, where some were given other flags.
    """
    if FLAGS.multihost:
        distributed.join()
        asked = json.dumps(given_flags(), sort_keys=True).encode()
        distributed.check_same(hashlib.sha256(asked).digest(), "other flags")
        if not distributed.is_first():
            logging.set_verbosity(logging.WARNING)  # what all have to tell, the first tells


def check_workdir(out: Path, settings: str) -> Path:
    """The folder, if it may be filled: empty, new, or with a file `settings` of ours in it."""
    workdir.check_writable(out)
    there = list(out.iterdir()) if out.is_dir() else []
    if any(not path.name.startswith(".") for path in there) and not (out / settings).is_file():
        raise InputError(f"{out} holds other files; choose an empty or a new folder")
    return out


def claim(
    out: Path, settings: str, produced: Sequence[str], more: dict[str, Any] | None = None
) -> None:
    """Make the folder ours: clear what --overwrite replaces, and note the flags, and `more`."""
    distributed.once(lambda: _claim(out, settings, produced, more))


def _claim(out: Path, settings: str, produced: Sequence[str], more: dict[str, Any] | None) -> None:
    if FLAGS.overwrite:
        # What tells that the folder is ours goes last: a kill leaves one that can be overwritten.
        for name in [*KEPT, *(n for n in produced if n != settings), "tensorboard", settings]:
            files.remove(out / name)
        manifest.remove(out)
    elif (out / manifest.NAME).exists():  # it stays until training has accepted the folder
        try:
            manifest.check(out, "full")
        except InputError as error:
            raise InputError(f"{error}; --overwrite trains it anew") from None
    files.remove_leftovers(out / "figures")
    if not (out / "configs.json").exists():
        files.write_json(out / settings, given_flags() | (more or {}))


def complete(out: Path, produced: Sequence[str]) -> bool:
    """Whether an earlier call has left all of this, which `claim` has found to be as it was."""
    tops = {name.partition("/")[0] for name in manifest.names(out)}
    return tops >= set(produced) - {manifest.NAME}


def finish(out: Path, produced: Sequence[str]) -> None:
    """Note in the manifest of a finished training what the program left beside it."""
    if (out / manifest.NAME).exists():  # none while members failed
        manifest.add(out, *(name for name in produced if name not in workdir.OURS))


def given_flags() -> dict[str, Any]:
    """What was asked for, but for the folder."""
    given = {
        flag.name: flag.value
        for module in (FLAGS.find_module_defining_flag(name) for name in ("data", "preset"))
        for flag in FLAGS.get_flags_for_module(module)
        if flag.value is not None
    }
    for name in ("workdir", "overwrite", "dry_run", "multihost", "latent_devices"):
        given.pop(name, None)
    return given


def read_rows() -> dict[str, Rows]:
    """Rows by split: train, and validation and test where there are any; unread as yet."""
    if not FLAGS.data:
        raise InputError("--data is needed: F.npy, F.h5ad:obsm/KEY or F.zarr:obsm/KEY")
    rows = together.shared(data.open_rows(FLAGS.data))
    if FLAGS.split:
        if FLAGS["validation"].present:
            raise InputError("--split says which rows are held out; leave out --validation")
        labels = data.load_obs(FLAGS.data, FLAGS.split)
        if len(labels) != len(rows):
            raise InputError(f"obs has {len(labels)} rows, {FLAGS.data} has {len(rows)}")
        positions = data.split_by(labels)
    elif not math.isfinite(FLAGS.validation):
        raise InputError(f"--validation={FLAGS.validation} must be a share in 0 .. 1")
    elif FLAGS.validation == 0:
        return {"train": rows}
    else:
        train, held_out = data.split(len(rows), FLAGS.validation, FLAGS.data_seed)
        if len(train) < 1 or len(held_out) < 2:
            raise InputError(
                f"--validation={FLAGS.validation:g} of {len(rows)} rows leaves {len(train)} to "
                f"train on and {len(held_out)} held out; at least 2 are held out, or 0 is given "
                "for none"
            )
        positions = {"train": train, "validation": held_out}
    return {name: rows.take(chosen) for name, chosen in positions.items() if len(chosen)}


def check(configs: Sequence[SAEConfig], rows: dict[str, Rows]) -> dict[str, np.ndarray | Rows]:
    """Refuses all that training would, before the folder is touched.

    Returns:
      The rows as training takes them: read, or still to be streamed.
    """
    if FLAGS.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise InputError("--tensorboard needs tensorboardX: pip install 'sae-jax[tensorboard]'")
    for name in ("checkpoint_seconds", "resident_gib"):
        if FLAGS[name].value is not None and not math.isfinite(FLAGS[name].value * 2**30):
            raise InputError(f"--{name}={FLAGS[name].value} must be a finite number")
    distributed.once(lambda: verify.inputs(FLAGS.data))
    data.provenance(FLAGS.data)  # which training reads after the folder has been cleared
    held_out = {name: part for name, part in rows.items() if name != "train"}
    train, held_out = planning.check(
        list(configs), rows["train"], held_out, FLAGS.epochs, FLAGS.data_seed, FLAGS.patience,
        _resident_bytes(), FLAGS.latent_devices,
    )  # fmt: skip
    return {"train": train, **held_out}


def _resident_bytes() -> int | None:
    return None if FLAGS.resident_gib is None else int(FLAGS.resident_gib * 2**30)


def train(
    configs: Sequence[SAEConfig], rows: dict[str, np.ndarray | Rows], out: Path
) -> sae_jax.Run:
    """`sae_jax.train` by the flags."""
    began = time.perf_counter()
    share = {"split": FLAGS.split} if FLAGS.split else {"validation_share": FLAGS.validation}
    try:
        with _tensorboard(out / "tensorboard") as on_epochs:
            run = sae_jax.train(
                configs,
                rows["train"],
                rows.get("validation"),
                test=rows.get("test"),
                epochs=FLAGS.epochs,
                workdir=out,
                data_seed=FLAGS.data_seed,
                patience=FLAGS.patience,
                provenance={**data.provenance(FLAGS.data), "data": FLAGS.data, **share},
                checkpoint_seconds=FLAGS.checkpoint_seconds,
                resident_bytes=_resident_bytes(),
                on_epochs=on_epochs,
                latent_devices=FLAGS.latent_devices,
            )
    except InputError:
        raise
    except BaseException:
        logging.error("stopped; the same command continues from what %s holds", out)
        raise
    done = counted(len(configs), "configuration")
    logging.info("%s in %.0f s", done, time.perf_counter() - began)
    return run


@contextlib.contextmanager
def _tensorboard(
    folder: Path,
) -> Iterator[Callable[[np.ndarray, int, History], None] | None]:
    """What writes the scalars of each configuration, `0003` say, with --tensorboard."""
    if not FLAGS.tensorboard:
        yield None
        return
    import tensorboardX

    writers: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def write(positions: np.ndarray, first: int, history: History) -> None:
        for row, position in enumerate(positions.tolist()):
            if position not in writers:
                writers[position] = tensorboardX.SummaryWriter(str(folder / f"{position:04d}"))
            if len(writers) > OPEN_WRITERS:
                writers.popitem(last=False)[1].close()
            for name, values in vars(history).items():
                for epoch, value in enumerate(values[row].tolist()):
                    if np.isfinite(value):
                        writers[position].add_scalar(name, value, first + epoch)

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()

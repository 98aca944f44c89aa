"""Grid to configs to trained dictionaries and a table of results; the front door of training."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax
import jax
import numpy as np
import optax
from absl import logging
from tqdm import tqdm

import sae_jax
from sae_jax import bucket, data, distributed, ensemble, pulse, together
from sae_jax.checkpoint import Checkpoints, Preempted, Preemption
from sae_jax.config import MOST, Architecture, SAEConfig, preset_fields, unused_fields
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError
from sae_jax.state import History
from sae_jax.streaming import Rows
from sae_jax.workdir import Member, Stored, Workdir, locked, read_members, tables

if TYPE_CHECKING:
    import pandas as pd

# Of an open file, unless the caller says otherwise. The order of rows depends on it, so it must not
# depend on the machine: a run may go on elsewhere, and shards of several machines are merged.
RESIDENT_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class Run:
    """What `train` returns.

    Attributes:
      dictionaries: one per configuration, in the order given; None where training diverged
        or failed. Of a run with a workdir each is read from there when it is asked for.
      results: a pandas DataFrame, one row per configuration in the same order: every field of the
        config, `status` (trained, diverged, failed), `epochs` (trained), `best_epoch` (that of the
        weights, from 0), `train_loss` (mean of the last epoch), and each metric of
        `sae_jax.metrics.evaluate` with prefix `train_` and, where validation rows were given,
        `validation_`. Others than trained have NaN.
      history: a pandas DataFrame, one row per configuration and epoch: member, epoch; loss, mse,
        l1, l0 (means over the epoch's batches, in the normalised space); validation_loss.
    """

    dictionaries: Sequence[Dictionary | None]
    results: "pd.DataFrame"
    history: "pd.DataFrame"

    @classmethod
    def load(cls, workdir: str | os.PathLike[str]) -> "Run":
        """What `train` left in a folder; of an unfinished run, the members that are finished.

        Raises:
          InputError: no such folder, or a damaged one.
        """
        members = dict(sorted(read_members(Path(workdir)).items()))
        return cls(Stored(Path(workdir), members), *tables(members))


def grid(preset: str, **axes: Any) -> list[SAEConfig]:
    """Every combination of a preset with the given fields, in the order given, duplicates merged.

    A list, tuple or array is an axis, anything else is the same for all. An axis that the preset
    has no use for (k for vanilla, l1_weight for a TopK preset) is dropped, and said to be.

    Example:
      >>> configs = grid("vanilla", d_in=4, n_latents=[8, 40], l1_weight=[1e-3, 1e-4], seed=[0, 1])
      >>> len(configs)
      8
    """
    lists = {
        name: list(values) if isinstance(values, list | tuple | np.ndarray) else [values]
        for name, values in axes.items()
    }
    configs, used = {}, set()
    for values in itertools.product(*lists.values()):
        given = dict(zip(lists, values, strict=True))
        unused = unused_fields(preset, given) - set(preset_fields(preset)[1])
        given = {name: value for name, value in given.items() if name not in unused}
        used |= set(given)
        configs[SAEConfig.preset(preset, **given)] = None  # duplicates merge
    for name in sorted(set(axes) - used):
        logging.info("preset %s has no use for %s: that axis is dropped", preset, name)
    return list(configs)


def train(
    configs: Sequence[SAEConfig],
    train: np.ndarray | Rows,
    validation: np.ndarray | Rows | None = None,
    *,
    epochs: int,
    workdir: str | os.PathLike[str] | None = None,
    data_seed: int = 0,
    patience: int | None = None,
    progress: bool = True,
    provenance: dict[str, Any] | None = None,
    checkpoint_seconds: float = 60,
    resident_bytes: int | None = None,
    test: np.ndarray | Rows | None = None,
    on_epochs: Callable[[np.ndarray, int, History], None] | None = None,
    latent_devices: int | None = None,
) -> Run:
    """Train a dictionary per configuration, all that share an architecture in one program.

    Args:
      configs: any mixture; see `Architecture` for what shapes a program.
      train: rows [rows, d_in], float32 (float64 with jax's x64 mode); an array, or
        `sae_jax.data.open_rows(file)` of which only what is needed is read.
      validation: further rows [rows, d_in]; measured, never trained on; held in memory.
      epochs: passes over the rows; the rows after the last full batch of a pass are left out of it.
      workdir: a folder to fill: configs.json, dictionaries/<member>/, results.parquet,
        history.parquet, and checkpoints/ of the program in training. The same call again goes on
        from what is there, on CPUs bit for bit as if it had not been stopped, and trains no
        finished member again. On SIGTERM a checkpoint is written and SystemExit(143) raised.
      data_seed: the order of rows depends on it and on the epoch alone.
      patience: a member stops when so many epochs brought no lower loss (on the validation rows,
        where there are any), and its best weights are kept; None: all train all epochs, and the
        last weights are kept.
      progress: a bar on stderr.
      provenance: where the rows come from (file, key, model, layer, ...), in JSON's types; it
        travels with every dictionary.
      checkpoint_seconds: between checkpoints of a program.
      resident_bytes: training rows beyond so many are streamed: read in shuffled blocks, a buffer
        of half that size in use and the next read meanwhile (see `sae_jax.streaming.Plan`, whose
        order depends on that size). Each device holds as much. None: 2 GiB for open
        files, wherever it runs, and no limit for arrays.
      test: as `validation`, but measured once, at the end; nothing is chosen by it.
      on_epochs: told while it trains: positions of configurations, a first epoch, and their
        `History` [configurations, epochs] from there on.
      latent_devices: how many devices of a process share the latents of each dictionary; the same
        numbers to rounding. 1: none do, and members are spread over all devices. None: as few as
        hold a dictionary, or, of accelerators that would be idle, more (`ensemble.devices_each`).

    A program that fails (memory, say) does not end the others: its members have status `failed`
    and no dictionary, are not written to the workdir, and the same call again tries them anew.

    Raises:
      InputError: before any work: no configs, rows that are not finite, of another width or fewer
        than a batch, provenance that is not JSON, or a workdir that holds other settings or that
        another process fills.
      Exception: what the first program raised, if every one failed; what `on_epochs` raised.
    """
    configs = [configs] if isinstance(configs, SAEConfig) else list(configs)
    if workdir is not None and not os.fspath(workdir):
        raise InputError("workdir is empty; name a folder, or give None for none")
    if workdir is None and jax.process_count() > 1:
        raise InputError("several processes meet in a workdir: name a folder that all of them see")
    if not 0 <= checkpoint_seconds < float("inf"):
        raise InputError(f"checkpoint_seconds={checkpoint_seconds} must be a number, at least 0")
    train, validation, test = (
        together.shared(x) if isinstance(x, Rows) else x for x in (train, validation, test)
    )
    resident_bytes = _limit(train, resident_bytes)
    held_out = {"validation": validation, "test": test}
    rows, held_out = check(
        configs, train, held_out, epochs, data_seed, patience, resident_bytes, latent_devices
    )
    epochs, data_seed = int(epochs), int(data_seed)
    patience = None if patience is None else int(patience)
    resident_bytes = None if resident_bytes is None else int(resident_bytes)
    settings = {
        "configs": [config.to_dict() for config in configs],
        "epochs": epochs,
        "data_seed": data_seed,
        "patience": patience,
        "train": data.fingerprint(rows),
        **{name: data.fingerprint(x) for name, x in held_out.items()},
    }
    if isinstance(rows, Rows):
        settings["resident_bytes"] = resident_bytes
    kept = ("epochs", "data_seed", "patience", "train", "resident_bytes")
    about = {
        **(provenance or {}),
        **{name: settings[name] for name in kept if name in settings},
        "versions": {module.__name__: module.__version__ for module in (sae_jax, jax, flax, optax)},
    }
    _check_json(about)
    distributed.check_same(_digest(settings), "other rows, configurations or settings")
    folder = None if workdir is None else Path(workdir)
    with contextlib.nullcontext() if folder is None else distributed.held_once(locked(folder)):
        out = None if folder is None else distributed.first(lambda: Workdir(folder, settings))
        members = {} if out is None else distributed.first(out.finished)
        if out is not None and len(members) < len(configs):
            distributed.once(out.begin)
        failed = _train_programs(
            configs, rows, held_out, about, members, out, progress, checkpoint_seconds, on_epochs,
            latent_devices,
        )  # fmt: skip
        if out is not None and not failed:
            distributed.once(out.finish)
    everyone = members | failed
    if folder is not None:
        return Run(Stored(folder, everyone), *tables(everyone))
    return Run([everyone[i].dictionary for i in range(len(configs))], *tables(everyone))


def _train_programs(
    configs: list[SAEConfig],
    rows: np.ndarray | Rows,
    held_out: dict[str, np.ndarray],
    about: dict[str, Any],
    members: dict[int, Member],
    out: Workdir | None,
    progress: bool,
    checkpoint_seconds: float,
    on_epochs: Callable[[np.ndarray, int, History], None] | None,
    latent_devices: int | None,
) -> dict[int, Member]:
    """Fill `members` with those not in it yet, a program at a time; returns those that failed."""
    todo = [position for position in range(len(configs)) if position not in members]
    programs = _programs(
        configs, todo, [] if out is None else distributed.first(lambda: out.begun(todo)),
        rows, held_out, about.get("resident_bytes"), latent_devices,
    )  # fmt: skip
    steps = [about["epochs"] * (len(rows) // configs[i].batch_size) for i in todo]
    preemption, failed, failures = Preemption(), {}, []
    silent = not (progress and distributed.is_first())
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=sum(steps), unit=" steps", unit_scale=True, disable=silent)
        )
        if out is not None:
            distributed.first(
                lambda: out.keep_checkpoints([positions[0] for positions, _ in programs])
            )
            stack.enter_context(preemption.watched())
        for number, (positions, devices) in enumerate(programs):
            chosen = [configs[position] for position in positions]
            shape = f"{chosen[0].name} {chosen[0].d_in} -> {chosen[0].n_latents}"
            bar.set_description(f"program {number + 1}/{len(programs)}: {shape}")
            checkpoints = None
            if out is not None:
                distributed.once(functools.partial(out.begin_program, positions))
                folder = out.checkpoints(positions[0])
                checkpoints = Checkpoints(folder, positions, checkpoint_seconds, preemption)
            try:
                trained = bucket.train(
                    chosen, rows, held_out, about, bar, checkpoints, _placed(on_epochs, positions),
                    devices,
                )  # fmt: skip
            except InputError:
                raise
            except _CallbackError as error:
                raise error.__cause__ from None
            except Exception as error:
                if jax.process_count() > 1:
                    raise  # the others wait for this one
                # As text: the traceback holds the arrays that the other programs need room for.
                trace = traceback.format_exc()
                logging.error(
                    "program %d, %s, failed; the others go on\n%s", number + 1, shape, trace
                )
                error.__context__ = error.__cause__ = None
                failures.append(error.with_traceback(None))
                failed |= {position: bucket.failed(configs[position]) for position in positions}
                continue
            members |= dict(zip(positions, trained, strict=True))
            if out is not None:
                _write(out, members, positions)
                distributed.once(checkpoints.remove)
            if distributed.agree(preemption.asked).any():
                logging.warning(
                    "SIGTERM: stopped after program %d of %d; the same call goes on",
                    number + 1, len(programs),
                )  # fmt: skip
                raise Preempted
    if failures and not members:
        raise failures[0]
    return failed


def _write(out: Workdir, members: dict[int, Member], positions: list[int]) -> None:
    """A program's members to disk: each process the dictionaries it has, the first the tables."""
    pulse.beat("writing")
    for position in positions:
        out.write_dictionary(position, members[position])
    distributed.agree(0)  # all are there
    distributed.once(lambda: out.write(members))
    for position in positions:  # there may be more of them than memory holds
        members[position] = dataclasses.replace(members[position], dictionary=None)


def _digest(settings: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()


def _check_json(provenance: dict[str, Any]) -> None:
    """It is written with every dictionary, after the training: too late to find out."""
    try:
        json.dumps(provenance, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance must be of JSON's types, without NaN: {error}") from None


class _CallbackError(Exception):
    """`on_epochs` raised its cause: a fault of the caller's, not of a program."""


def _placed(
    on_epochs: Callable[[np.ndarray, int, History], None] | None, positions: list[int]
) -> Callable[[np.ndarray, int, History], None] | None:
    """`on_epochs` for a bucket, which counts its members from 0."""
    if on_epochs is None:
        return None
    places = np.asarray(positions)

    def on_history(members: np.ndarray, first: int, history: History) -> None:
        try:
            on_epochs(places[members], first, history)
        except Exception as error:
            raise _CallbackError from error

    return on_history


def _programs(
    configs: list[SAEConfig],
    todo: list[int],
    begun: list[list[int]],
    rows: np.ndarray | Rows,
    held_out: dict[str, np.ndarray],
    resident_bytes: int | None,
    latent_devices: int | None,
) -> list[tuple[list[int], int]]:
    """Positions of `todo` by the program that trains them, each of which fits the memory, and how
    many devices share each of its dictionaries. Those `begun` stay as they are: their checkpoints
    are of these members."""
    programs = []
    begun = [part for part in begun if len({configs[i].architecture for i in part}) == 1]
    fits = functools.partial(
        _fitting, rows=rows, held_out=held_out, resident_bytes=resident_bytes,
        latent_devices=latent_devices,
    )  # fmt: skip
    for part in begun:
        parts, devices = fits(configs[part[0]].architecture, part)
        if len(parts) > 1:
            raise InputError(
                f"{len(part)} configurations trained together where there was more memory: start as"
                " many processes as then, or delete checkpoints/ of the workdir to train them anew"
            )
        programs.append((part, devices))
    rest = sorted(set(todo).difference(*begun))
    buckets = ensemble.buckets([configs[position] for position in rest])
    for architecture, chosen in buckets.items():
        parts, devices = fits(architecture, chosen)
        programs += [([rest[i] for i in part], devices) for part in parts]
    logging.info("%d configurations -> %d programs", len(todo), len(begun) + len(buckets))
    if len(programs) > len(begun) + len(buckets):
        logging.info("in %d parts, each of which fits the memory", len(programs))
    return programs


def _limit(train: Any, resident_bytes: int | None) -> int | None:
    """Bytes of training rows beyond which they are streamed; None: never."""
    if resident_bytes is None and isinstance(train, Rows):
        return RESIDENT_BYTES
    return resident_bytes


def _checked(x: Any, name: str, d_in: int | None) -> np.ndarray | Rows:
    """`data.check_rows`, which counts the rows of a file as the file does."""
    read, positions = x, None
    if isinstance(x, _Read):
        read, positions = x.array, x.rows.positions
    elif isinstance(x, Rows) and d_in is not None:
        read, positions = np.asarray(x), x.positions
    read = data.check_rows(read, name, d_in=d_in, positions=positions)
    if isinstance(read, np.ndarray) and read.dtype == np.float64 and not jax.config.jax_enable_x64:
        with np.errstate(
            over="ignore"
        ):  # it is float32 that trains; what it cannot hold is refused
            data.check_rows(read.astype(np.float32), f"{name}, as float32,", positions=positions)
    return read


@dataclasses.dataclass(frozen=True)
class _Read:
    """Rows of a file, in memory."""

    array: np.ndarray
    rows: Rows


def _resident_or_not(train: Any, resident_bytes: int | None) -> Any:
    """What may lie in memory as it was read, `Rows` of what may not."""
    if isinstance(train, Rows):
        return train if train.nbytes > resident_bytes else _Read(np.asarray(train), train)
    if resident_bytes is not None and np.asarray(train).nbytes > resident_bytes:
        return Rows(np.asarray(train), "train")
    return train


def check(
    configs: list[SAEConfig],
    train: np.ndarray | Rows,
    held_out: dict[str, np.ndarray | Rows | None],
    epochs: int,
    data_seed: int,
    patience: int | None,
    resident_bytes: int | None,
    latent_devices: int | None = None,
) -> tuple[np.ndarray | Rows, dict[str, np.ndarray]]:
    """Refuses what `train` does before any work, of which these are arguments.

    Returns:
      The rows as it goes on with them, an array or `Rows` to stream; and those held out.
    """
    resident_bytes = _limit(train, resident_bytes)
    train = _resident_or_not(train, resident_bytes)
    if not configs:
        raise InputError("no configurations to train")
    counts = [("epochs", epochs, 1), ("data_seed", data_seed, 0)]
    counts += [] if patience is None else [("patience", patience, 1)]
    if resident_bytes is not None and not float(resident_bytes) >= 0:
        raise InputError(f"resident_bytes={resident_bytes!r} must be at least 0")
    for name, value, low in counts:
        integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (integer and low <= value <= MOST):
            raise InputError(f"{name}={value!r} must be an integer in {low} .. {MOST}")
    rows = _checked(train, "train", None)
    given = {name: x for name, x in held_out.items() if x is not None}
    for name, x in given.items():
        x = _checked(x, name, rows.shape[1])
        if len(x) < 2:
            raise InputError(f"{name} has one row; its variance is needed, so give two or more")
        given[name] = x.astype(rows.dtype, copy=False)
    for config in configs:
        if config.d_in != rows.shape[1]:
            raise InputError(
                f"a configuration has d_in={config.d_in}, train has {rows.shape[1]} dimensions"
            )
        if config.batch_size > len(rows):
            raise InputError(
                f"batch_size={config.batch_size} is more than the {len(rows)} rows of train"
            )
        if epochs * (len(rows) // config.batch_size) > MOST:
            raise InputError(
                f"epochs={epochs} of {len(rows) // config.batch_size} steps are more than {MOST}"
            )
        controlled = config.sparsity_control != "none" and config.activation != "jump_relu"
        if controlled and patience is not None:
            raise InputError(
                "patience compares losses, and sparsity_control='target_l0' changes what the loss "
                f"is while {config.name} trains: leave one out"
            )
        if patience is not None and not given and (config.l1_warmup or config.l0_warmup):
            raise InputError(
                "patience compares training losses where there are no validation rows, and a "
                f"warm-up of the penalty raises those of {config.name}: give validation rows, or "
                "leave one of the two out"
            )
    for architecture, chosen in ensemble.buckets(configs).items():
        if isinstance(rows, Rows):
            bucket.buffer_rows(rows, resident_bytes, architecture)
        _fitting(architecture, chosen, rows, given, resident_bytes, latent_devices)
    return rows, given


def _fitting(
    architecture: Architecture,
    positions: list[int],
    rows: np.ndarray | Rows,
    held_out: dict[str, np.ndarray],
    resident_bytes: int | None,
    latent_devices: int | None,
) -> tuple[list[list[int]], int]:
    """A bucket in parts that fit the memory, and how many devices share each dictionary.

    Raises:
      InputError: as many as are asked for cannot share one, or not even one fits.
    """
    each = ensemble.member_bytes(architecture, rows.dtype.itemsize)
    room = _room(rows, held_out, resident_bytes)
    devices = ensemble.devices_each(architecture, len(positions), each, room, latent_devices)
    memories = distributed.memories(devices)
    parts = ensemble.split_to_fit(positions, each, room, jax.process_count(), memories)
    return parts, devices


def _room(
    rows: np.ndarray | Rows, held_out: dict[str, np.ndarray], resident_bytes: int | None
) -> int:
    """Bytes of the devices that are left for members beside what each of them holds alike: rows
    and their order, or the buffers of a stream; and validation rows."""
    shared = rows.nbytes + len(rows) * 4 if isinstance(rows, np.ndarray) else resident_bytes
    shared += sum(x.nbytes for name, x in held_out.items() if name == "validation")
    memories, memory = distributed.memories(), distributed.memory()
    if shared >= memory // memories:
        raise InputError(
            f"rows take {shared / 2**30:.1f} GiB of each device's {memory / memories / 2**30:.1f} "
            "before any dictionary: let fewer be resident (resident_bytes, --resident_gib), hold "
            "out fewer, or take a larger machine"
        )
    return memory - shared * memories

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
from sae_jax import bucket, data, distributed, planning, pulse, streaming, together
from sae_jax.checkpoint import Checkpoints, Preempted, Preemption
from sae_jax.config import SAEConfig, preset_fields, unused_fields
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError
from sae_jax.state import History
from sae_jax.streaming import Rows
from sae_jax.workdir import Member, Stored, Workdir, locked, read_members, tables

if TYPE_CHECKING:
    import pandas as pd


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
        `validation_`. Others than trained have NaN for these and for `train_loss`.
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
      data_seed: the order of rows depends on it and on the epoch alone; where they are streamed,
        on the size of the file's chunks and of the resident rows too.
      patience: a member stops when so many epochs brought no lower loss (on the validation rows,
        where there are any; needed with a warm-up and with auxk, which raise the training loss),
        and its best weights are kept; None: all train all epochs, and the last weights are kept.
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
    resident_bytes = planning.resident_limit(train, resident_bytes)
    held_out = {"validation": validation, "test": test}
    rows, held_out = planning.check(
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
        if (block := bucket.block_rows(rows)) != streaming.BLOCK:
            settings["block"] = block
    if (dtype := str(jax.dtypes.canonicalize_dtype(rows.dtype))) != "float32":
        settings["dtype"] = dtype
    kept = ("epochs", "data_seed", "patience", "train", "resident_bytes")
    about = {
        **(provenance or {}),
        **{name: settings[name] for name in kept if name in settings},
        "versions": _versions((provenance or {}).get("versions")),
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
    programs = planning.programs(
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
            distributed.once(
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


def _versions(of_rows: Any) -> dict[str, str]:
    """Of what trains, beside those of what made the rows, if these say so."""
    ours = {module.__name__: module.__version__ for module in (sae_jax, jax, flax, optax)}
    return {**of_rows, **ours} if isinstance(of_rows, dict) else ours


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

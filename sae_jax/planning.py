"""What a sweep does before any work: refuses what would fail, and says who trains together.

Configurations of one architecture are one program, in parts where the memory does not hold all.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import numpy as np
from absl import logging

from sae_jax import bucket, data, distributed, ensemble, trainer
from sae_jax.config import MOST, Architecture, SAEConfig
from sae_jax.errors import InputError, counted
from sae_jax.streaming import Rows

# Of an open file, unless the caller says otherwise. The order of rows depends on it, so it must not
# depend on the machine: a run may go on elsewhere, and shards of several machines are merged.
RESIDENT_BYTES = 2**31


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
    resident_bytes = resident_limit(train, resident_bytes)
    train = _resident_or_not(train, resident_bytes)
    if not configs:
        raise InputError("no configurations to train")
    counts = [("epochs", epochs, 1), ("data_seed", data_seed, 0)]
    counts += [] if patience is None else [("patience", patience, 1)]
    if resident_bytes is not None and not 0 <= float(resident_bytes) < float("inf"):
        raise InputError(f"resident_bytes={resident_bytes!r} must be a number, at least 0")
    for name, value, low in counts:
        integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (integer and low <= value <= MOST):
            raise InputError(f"{name}={value!r} must be an integer in {low} .. {MOST}")
    if jax.process_count() > 1:  # before what they exchange depends on it
        asked = [[config.to_dict() for config in configs], int(epochs), int(data_seed)]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
        distributed.check_same(digest, "other configurations")
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
        if patience is not None and "validation" not in given and (what := _raises_loss(config)):
            raise InputError(
                f"patience compares training losses where there are no validation rows, and {what} "
                f"raises those of {config.name}: give validation rows, or leave one of the two out"
            )
    trainer.check_histories(len(configs), int(epochs), rows.dtype.itemsize)
    for architecture, chosen in ensemble.buckets(configs).items():
        if isinstance(rows, Rows):
            bucket.buffer_rows(rows, resident_bytes, architecture)
        _fitting(architecture, chosen, rows, given, resident_bytes, latent_devices)
    return rows, given


def _raises_loss(config: SAEConfig) -> str | None:
    """What adds to a training loss as training goes on, if anything."""
    if config.l1_warmup or config.l0_warmup:
        return "a warm-up of the penalty"
    return "auxk, which sets in as latents die," if config.auxiliary == "auxk" else None


def programs(
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
    if 0 < len(todo) < len(configs):
        whole = counted(len(configs), "configuration")
        logging.info("%s of %s are left to train", f"{len(todo):,}", whole)
    if len(programs) > len(begun) + len(buckets):
        parts = counted(len(programs), "part")
        logging.info("in %s, each of which fits the memory", parts)
    return programs


def resident_limit(train: Any, resident_bytes: int | None) -> int | None:
    """Bytes of training rows beyond which they are streamed; None: never."""
    if resident_bytes is None and isinstance(train, Rows):
        return RESIDENT_BYTES
    return resident_bytes


def _resident_or_not(train: Any, resident_bytes: int | None) -> Any:
    """What may lie in memory as it was read, `Rows` of what may not."""
    if isinstance(train, Rows):
        return train if train.nbytes > resident_bytes else _Read(np.asarray(train), train)
    if resident_bytes is not None and np.asarray(train).nbytes > resident_bytes:
        return Rows(np.asarray(train), "train")
    return train


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

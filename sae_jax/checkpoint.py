"""Where a bucket stands, on disk while it trains; the only file that knows Orbax.

<folder>/<step>/     one checkpoint: the leaves of a pytree by name, and what they were saved of

Of several processes each writes the rows it has, a part of the whole, and whatever their number
when it is read, each reads the parts that its members are in. Orbax writes a checkpoint aside and
renames it, but it detects no damage: so each carries the SHA-256 of every part, and what cannot be
read is skipped, with a warning, for the one before it.
"""

import asyncio
import contextlib
import hashlib
import logging as python_logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from jax.sharding import Mesh

from sae_jax import disk, distributed, ensemble, files, pulse
from sae_jax.config import MOST
from sae_jax.errors import brief
from sae_jax.reading import read_json

KEPT = 2  # of each bucket: the latest, and one to fall back on
BESIDE = 2**18  # bytes that Orbax writes beside the arrays, at most
LEFT_SECONDS = 60  # for what Orbax has begun when something failed
_OURS = re.compile(r"(0|[1-9]\d*)(-\d+|\.orbax-checkpoint-tmp.*)?")  # in a folder of checkpoints


class Preempted(SystemExit):
    """The process was asked to end, and what it had done is on disk. Exits as SIGTERM does."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Preemption:
    """Whether SIGTERM has come since `watched` began."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def watched(self) -> Iterator["Preemption"]:
        """Takes SIGTERM, where nobody else does (other handlers and other threads are let be)."""
        ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )
        if ours:
            signal.signal(signal.SIGTERM, self._note)
        try:
            yield self
        finally:
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _note(self, *_: Any) -> None:
        self.asked = True


class _NoRoomError(Exception):
    """The disk has no room for a checkpoint, as all processes know."""


class Checkpoints:
    """Those of ONE bucket.

    Args:
      folder: theirs alone.
      members: positions of the bucket's configurations in the run, which checkpoints must agree in.
      every: seconds between them.
      preemption: on SIGTERM one is written at once, and `Preempted` raised.
    """

    def __init__(
        self, folder: Path, members: list[int], every: float, preemption: Preemption
    ) -> None:
        self.folder = folder
        self.positions = members
        self.every = every
        self.preemption = preemption
        self.last = time.monotonic()
        self.saved: int | None = None  # the step of the newest that is known to be there

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return self.preemption.asked or time.monotonic() - self.last >= self.every

    def save(self, step: int, tree: Any, mesh: Mesh) -> None:
        """Writes one. If the disk refuses, that is said and training goes on; of several processes,
        which wait for each other within Orbax, it ends.

        Args:
          tree: leaves [rows, ...] in NumPy, those of this process; as many in every process.
          mesh: of the members.

        Raises:
          Preempted: in every process, after it is written, if SIGTERM has come to one.
          Exception: of several processes, what Orbax raises.
          DiskError: the work directory is no longer where it was.
        """
        pulse.beat(f"checkpoint {step}")
        files.check_pinned(self.folder)  # Orbax would make it anew, elsewhere
        leaves = _named(tree)
        digests = distributed.agree(np.frombuffer(_digest(leaves), np.uint8))
        whole = leaves if jax.process_count() == 1 else ensemble.put(leaves, mesh)
        about = {
            "step": step,
            "members": self.positions,
            "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in whole.items()},
            "sha256": [digest.tobytes().hex() for digest in digests],
        }
        content = ocp.args.Composite(
            leaves=ocp.args.StandardSave(whole), about=ocp.args.JsonSave(about)
        )
        try:
            self._check_room(sum(leaf.nbytes for leaf in leaves.values()))
            with _quiet(), self._manager() as manager:
                manager.save(step, args=content, force=True)
                manager.wait_until_finished()
            self.saved = step
        except Exception as error:  # Orbax raises many kinds, of which none may end a sweep
            number, reason = disk.refused(error), brief(error)
            if number is not None:
                reason = f"{os.strerror(number)}; {disk.room(self.folder)}"
            logging.warning("no checkpoint could be written to %s: %.200s", self.folder, reason)
            if jax.process_count() > 1 and not isinstance(error, _NoRoomError):
                raise
            for begun in self.folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(begun, ignore_errors=True)
        self.last = time.monotonic()
        if distributed.agree(self.preemption.asked).any():
            logging.warning(
                "SIGTERM: stopped after %d steps of this program; it can go on from %s", step,
                "there" if self.saved == step
                else "its start, none could be written" if self.saved is None
                else f"{self.saved}, the last that could be written",
            )  # fmt: skip
            raise Preempted

    def _check_room(self, size: int) -> None:
        """Orbax does not end well on a disk that fills up.

        size: bytes of this process.

        Raises:
          _NoRoomError: in every process.
        """
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        sizes, free = distributed.agree([size, shutil.disk_usage(there).free]).T
        if free.min() < (wanted := int(sizes.sum()) + BESIDE):
            raise _NoRoomError(f"{wanted:,} bytes are wanted and {free.min():,} are free")

    def latest(
        self, template: Any, own: range | None = None, counted: str = ""
    ) -> tuple[int, Any, int] | None:
        """The newest that can be read, and its step; None if there is none.

        Args:
          template: whose structure it has.
          own: members whose parts are read; None: all.
          counted: the name of a leaf that has a row for every member, in their order.

        Returns:
          Its step; the rows of those parts; the first member of them.
        """
        if not distributed.agree(self.folder.is_dir()).all():
            return None
        names = [jax.tree_util.keystr(path) for path, _ in _paths(template)]
        if distributed.is_first():
            for path in sorted(self.folder.iterdir()):
                if not _OURS.fullmatch(path.name):
                    logging.warning("%s is none of our names: it is not looked at", path)
        with _quiet(), self._manager() as manager:
            for step in self._steps(manager):
                refused = ""
                try:
                    leaves, first = self._read(manager, step, own, counted)
                    if set(names) != set(leaves):
                        raise ValueError("it is of another version")
                except Exception as error:  # as above
                    refused = str(error).splitlines()[0] if str(error) else type(error).__name__
                    logging.warning(
                        "checkpoint %s/%d is skipped: %.200s", self.folder, step, refused
                    )
                if not distributed.agree(bool(refused)).any():
                    structure, self.saved = jax.tree.structure(template), step
                    if distributed.is_first():
                        logging.info("goes on from step %d of %s", step, self.folder)
                    found = jax.tree.unflatten(structure, [leaves[name] for name in names])
                    return step, found, first
                if distributed.is_first():
                    self._put_aside(step)
        return None

    def _steps(self, manager: ocp.CheckpointManager) -> list[int]:
        """Those the first process sees, the newest first."""
        there = np.full(2 * KEPT, -1)
        steps = [step for step in manager.all_steps() if step <= MOST]
        newest = sorted(steps, reverse=True)[: len(there)]
        there[: len(newest)] = newest
        seen = distributed.agree(there)[0]
        return seen[seen >= 0].tolist()

    def _put_aside(self, step: int) -> None:
        """Out of the way, else it would be kept as the latest and those of this run deleted; it is
        not deleted, since the reason may have been the disk's or the version's."""
        aside = self._aside()
        with contextlib.suppress(OSError):
            aside.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside / f"{step}-{time.time_ns()}")

    def _aside(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.skipped")

    def _read(
        self, manager: ocp.CheckpointManager, step: int, own: range | None, counted: str
    ) -> tuple[dict[str, np.ndarray], int]:
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]
        if about["members"] != self.positions:
            raise ValueError("it is of other configurations")
        if about.get("step", step) != step:
            raise ValueError(f"it is of step {about['step']}, somebody has renamed it")
        parts, each = len(about["sha256"]), 0
        wanted = range(parts)
        if own is not None:
            each = about["leaves"][counted][0][0] // parts
            wanted = range(min(own.start // each, parts - 1), min(-(-own.stop // each), parts))
        folder = self.folder.absolute() / str(step) / "leaves"
        leaves = _slices(folder, {
            name: slice(*(shape[0] // parts * i for i in (wanted.start, wanted.stop)))
            for name, (shape, _) in about["leaves"].items()
        })  # fmt: skip
        for i, digest in enumerate(about["sha256"][wanted.start : wanted.stop]):
            part = {name: _part(leaf, i, len(wanted)) for name, leaf in leaves.items()}
            if _digest(part).hex() != digest:
                raise ValueError("its values are not those that were saved")
        return leaves, wanted.start * each

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, create=True
        )
        return ocp.CheckpointManager(self.folder.absolute(), options=options)

    def remove(self) -> None:
        """When the bucket's results are on disk."""
        remove(self.folder)
        remove(self._aside())
        self.folder.with_suffix(".json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others may be there
            self.folder.parent.rmdir()


def _slices(folder: Path, rows: dict[str, slice]) -> dict[str, np.ndarray]:
    """These rows of every leaf that Orbax has written. It would itself read whole leaves, or parts
    of equal size, which are not those of another number of processes."""
    kind = "zarr3" if read_json(folder / "_METADATA")["use_zarr3"] else "zarr"
    base = {"driver": "file", "path": f"{folder}/"}
    found = {}
    for name, which in rows.items():
        place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        leaf = tensorstore.open({"driver": kind, "kvstore": place}, open=True).result()
        found[name] = leaf[which].read()
    return {name: reading.result() for name, reading in found.items()}


def remove(folder: Path) -> None:
    """Delete the checkpoints of a folder, and it if nothing else is there: what a user has renamed
    is not ours to delete."""
    for path in folder.glob("*"):
        if _OURS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A failure is told by its exception alone.

    Of all that Orbax writes or reads at once the first that fails is raised, and the event loop is
    closed under the others, of each of which tensorstore prints a traceback when it ends: so loops
    wait for them. And the thread of an operation logs the traceback of what it then raises to us.
    """
    new_event_loop = asyncio.new_event_loop
    asyncio.new_event_loop = lambda: _closing_last(new_event_loop())
    logging.get_absl_logger().addFilter(_is_raised_too)
    try:
        yield
    finally:
        logging.get_absl_logger().removeFilter(_is_raised_too)
        asyncio.new_event_loop = new_event_loop


def _is_raised_too(record: python_logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised" not in str(record.msg)


def _closing_last(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The loop, which does not close before what it has begun has ended."""
    close = loop.close

    def close_last() -> None:
        if begun := asyncio.all_tasks(loop):
            ended = asyncio.gather(*begun, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                loop.run_until_complete(asyncio.wait_for(ended, LEFT_SECONDS))
        close()

    loop.close = close_last
    return loop


def _paths(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _named(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in _paths(tree)}


def _part(leaf: np.ndarray, i: int, parts: int) -> np.ndarray:
    """The rows that the i-th process wrote."""
    each = len(leaf) // parts
    return leaf[i * each : (i + 1) * each]


def _digest(leaves: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(leaves):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaves[name]))
    return digest.digest()

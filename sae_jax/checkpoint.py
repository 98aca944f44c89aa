"""Where a bucket stands, on disk while it trains; the only file that knows Orbax.

<folder>/<step>/     one checkpoint: the leaves of a pytree by name, and what they were saved of

Of several processes each writes the rows it has, and whatever their number when it is read, each
takes those of its members. Orbax writes a checkpoint aside and renames it, but it detects no
damage, and raises where a file is cut: so each carries the SHA-256 of what every process wrote, and
what cannot be read whole is skipped, with a warning, for the one before it.
"""

import contextlib
import hashlib
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
from absl import logging
from jax.sharding import Mesh

from sae_jax import distributed, ensemble, files, pulse
from sae_jax.config import MOST
from sae_jax.errors import brief

KEPT = 2  # of each bucket: the latest, and one to fall back on
BESIDE = 2**18  # bytes that Orbax writes beside the arrays, at most


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
            "members": self.positions,
            "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in whole.items()},
            "sha256": [digest.tobytes().hex() for digest in digests],
        }
        content = ocp.args.Composite(
            leaves=ocp.args.StandardSave(whole), about=ocp.args.JsonSave(about)
        )
        try:
            self._check_room(sum(leaf.nbytes for leaf in leaves.values()))
            with self._manager() as manager:
                manager.save(step, args=content, force=True)
                manager.wait_until_finished()
            self.saved = step
        except Exception as error:  # Orbax raises many kinds, of which none may end a sweep
            logging.warning(
                "no checkpoint could be written to %s: %.200s", self.folder, brief(error)
            )
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

    def latest(self, template: Any) -> tuple[int, Any] | None:
        """The newest that can be read, and its step; None if there is none.

        Returns:
          What was saved, in the structure of `template`: the rows of all processes.
        """
        if not distributed.agree(self.folder.is_dir()).all():
            return None
        names = [jax.tree_util.keystr(path) for path, _ in _paths(template)]
        with self._manager() as manager:
            for step in self._steps(manager):
                refused = ""
                try:
                    leaves = self._read(manager, step)
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
                    return step, jax.tree.unflatten(structure, [leaves[name] for name in names])
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

    def _read(self, manager: ocp.CheckpointManager, step: int) -> dict[str, np.ndarray]:
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]
        if about["members"] != self.positions:
            raise ValueError("it is of other configurations")
        target = {
            name: np.empty(shape, np.dtype(dtype))
            for name, (shape, dtype) in about["leaves"].items()
        }
        content = ocp.args.Composite(leaves=ocp.args.StandardRestore(target))
        leaves = manager.restore(step, args=content)["leaves"]
        leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        parts = len(about["sha256"])
        for i, digest in enumerate(about["sha256"]):
            part = {name: _part(leaf, i, parts) for name, leaf in leaves.items()}
            if _digest(part).hex() != digest:
                raise ValueError("its values are not those that were saved")
        return leaves

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, create=True
        )
        return ocp.CheckpointManager(self.folder.absolute(), options=options)

    def remove(self) -> None:
        """When the bucket's results are on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._aside(), ignore_errors=True)
        self.folder.with_suffix(".json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others may be there
            self.folder.parent.rmdir()


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

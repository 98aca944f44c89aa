"""Devices and processes: how many there are, the mesh over all of them, what they agree on.

Several processes run the same program, each on its own devices, and meet only where they must:
members are divided between them, and between two chunks of epochs they exchange a few numbers.
With one process, every function here is as cheap as it looks.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sae_jax import pulse
from sae_jax.errors import InputError

HEARTBEAT_SECONDS = 20  # after which a process that is lost ends the others
JOIN_SECONDS = 300  # how long the first waits for the last
PART_SECONDS = 120  # how long one that has ended waits for the others, who draw, say
MESSAGE_BYTES = 2048  # of what the first process refuses, as the others hear it
EXCHANGES = (
    "all-reduce", "all-gather", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip

T = TypeVar("T")

agreed_bytes = 0  # that have come from all processes so far, for those who measure


def use_all_cpu_cores() -> None:
    """Let JAX see one CPU device a core, so that members of a sweep train side by side.

    For programs, before their first JAX computation (JAX then refuses the change); a library call
    must not decide this. Results do not depend on it. Accelerators are not affected.
    """
    # What this process may use, where the system tells (Linux), else all there are.
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    jax.config.update("jax_num_cpu_devices", len(allowed))


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the same shapes compile once and not once a run.

    For programs. In `$XDG_CACHE_HOME/sae_jax` (`~/.cache/sae_jax`), unless JAX is told another
    folder (JAX_COMPILATION_CACHE_DIR) or none (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "sae_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def join() -> tuple[int, int]:
    """Become one of the processes that were started together; which, and of how many.

    jax.distributed finds out: from Slurm, Open MPI, a pod of TPUs, or JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. From here on `sae_jax.train` runs on the devices of all,
    and must be called by all with the same arguments. Where one is lost the others end within
    HEARTBEAT_SECONDS, by an abort that Python cannot catch (see `sae-jax launch`, which tells who).

    For programs, before their first JAX computation.

    Raises:
      InputError: nothing says who the others are, they do not come, or they have other numbers of
        devices.
    """
    number = {
        name: int(os.environ[variable])
        for name, variable in (
            ("num_processes", "JAX_NUM_PROCESSES"),
            ("process_id", "JAX_PROCESS_ID"),
        )
        if variable in os.environ
    }
    pulse.beat("joining")
    try:
        jax.distributed.initialize(
            **number,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=PART_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--multihost: no other processes are found ({reason}); start them with srun, mpirun "
            "or `sae-jax launch`, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID"
        ) from None
    # The runtime has taken SIGTERM for itself and would do nothing at it.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    counts = [len(devices) for devices in _by_process()]
    if len(set(counts)) > 1:
        listed = ", ".join(f"process {i} has {count}" for i, count in enumerate(counts[:8]))
        raise InputError(
            f"--multihost: processes must have equally many devices; {listed}: give each as many "
            "GPUs, or start on CPUs with taskset or `sae-jax launch`"
        )
    pulse.beat("joined")
    return jax.process_index(), jax.process_count()


def _by_process() -> list[list[jax.Device]]:
    """The devices of each process."""
    found: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        found.setdefault(device.process_index, []).append(device)
    return [found[index] for index in sorted(found)]


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agree(values: Any) -> np.ndarray:
    """What every process has said, [processes, ...]: exact, in the order of their numbers.

    values: of the same shape and dtype in all. Waits for the last of them.
    """
    global agreed_bytes
    values = np.ascontiguousarray(values)
    if jax.process_count() == 1:
        return values[None]
    pulse.beat("waiting")
    devices = [each[0] for each in _by_process()]
    mesh = Mesh(np.asarray(devices), ("process",))
    # As bytes: JAX would make float32 of float64.
    raw = jax.device_put(values.reshape(-1).view(np.uint8)[None], devices[jax.process_index()])
    whole = jax.make_array_from_single_device_arrays(
        (len(devices), raw.size), NamedSharding(mesh, PartitionSpec("process")), [raw]
    )
    found = np.asarray(_everywhere(whole, mesh=mesh).addressable_data(0))
    agreed_bytes += found.nbytes
    pulse.beat("together")
    return found.reshape(-1).view(values.dtype).reshape(-1, *values.shape)


@functools.partial(jax.jit, static_argnames="mesh")
def _everywhere(x: jax.Array, *, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def unless_refused(function: Callable[[], T]) -> T:
    """`function()` in every process.

    Raises:
      InputError: in every process, where some raise it: the others what the first of them says.
    """
    try:
        value, refused = function(), ""
    except InputError as error:
        if jax.process_count() == 1:
            raise
        value, refused = None, str(error) or "no reason given"
    said = _said(refused)
    if refused:
        raise InputError(refused)
    for i, reason in enumerate(said):
        if reason:
            raise InputError(f"refused by process {i}: {reason}")
    return value


def first(function: Callable[[], T]) -> T:
    """`function()` in the first process, and then in the others: for what the first must do alone,
    such as making a folder that the others find.

    Raises:
      Exception: what the first raises; in the others InputError with what it says.
    """
    if jax.process_count() == 1:
        return function()
    if not is_first():
        if refused := _said("")[0]:
            raise InputError(f"refused by process 0: {refused}")
        return function()
    try:
        value = function()
    except Exception as error:
        _said(str(error) or type(error).__name__)
        raise
    _said("")
    return value


def once(function: Callable[[], None]) -> None:
    """`function()` in the first process alone; the others wait until it is done.

    Raises:
      Exception: as `first`.
    """
    first(lambda: function() if is_first() else None)


@contextlib.contextmanager
def held_once(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """The first process enters the context, for all: a lock that it takes, say."""
    with contextlib.ExitStack() as stack:
        once(lambda: stack.enter_context(context))
        yield


def leave(status: int, trace: bool = False) -> None:
    """End this process at once if it is one of several: an orderly end would wait for the others,
    who wait for it. `trace`: of the exception in hand, first."""
    if jax.distributed.is_initialized():
        for say in (traceback.print_exc if trace else None, sys.stdout.flush, sys.stderr.flush):
            with contextlib.suppress(OSError, ValueError):  # it may be a file of a full disk
                if say is not None:
                    say()
        os._exit(status)


def _said(message: str) -> list[str]:
    """What each process has said, cut to MESSAGE_BYTES."""
    said = np.zeros(MESSAGE_BYTES, np.uint8)
    text = message.encode()[:MESSAGE_BYTES]
    said[: len(text)] = np.frombuffer(text, np.uint8)
    return [each.tobytes().rstrip(b"\0").decode(errors="ignore") for each in agree(said)]


def check_same(digest: bytes, what: str) -> None:
    """Refuses to go on where processes were given different things.

    Raises:
      InputError: in every process, naming those that differ from the first.
    """
    found = agree(np.frombuffer(digest, np.uint8))
    others = np.flatnonzero((found != found[0]).any(axis=1))
    if others.size:
        listed = ", ".join(map(str, others[:5])) + (", ..." if others.size > 5 else "")
        raise InputError(f"process {listed} has {what} than process 0; all must be the same")


def memory() -> int:
    """Bytes that the local devices have together, of the process that has least; of CPU devices,
    half of what this machine or the job's control group allows, divided among the processes."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        room = host_memory() // 2
        # Where each has its share of the cores (`sae-jax launch`), it has its share of the memory.
        here = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
        if jax.process_count() > 1:
            room = room * len(here) // (os.cpu_count() or 1)
    else:
        limit = (device.memory_stats() or {}).get("bytes_limit", 2**33)
        room = limit * len(jax.local_devices())
    return int(agree(np.int64(room)).min())


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's, or less in a job or a container."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            two = not controllers
            if not two and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("" if two else "memory")
            own = top / path.lstrip("/")
            # A container sees its own group as the top, under a path that is not there.
            for folder in (own, *own.parents) if own.is_dir() else (top,):
                with contextlib.suppress(OSError, ValueError):
                    name = "memory.max" if two else "memory.limit_in_bytes"
                    found.append(int((folder / name).read_text()))
    return min(found)


def memories(latent_devices: int = 1) -> int:
    """Into how many equal parts `memory` falls, for dictionaries that so many devices share each;
    CPU devices have it in common."""
    if jax.local_devices()[0].platform == "cpu":
        return 1
    return jax.local_device_count() // latent_devices


def member_mesh(members: int, latent_devices: int = 1) -> Mesh:
    """The devices of all processes in one axis named `member`, never more of any process than
    members need.

    With several `latent_devices` a second axis, `latent`, has so many neighbours of one process,
    which share every dictionary that is theirs.
    """
    each = max(1, -(-members // jax.process_count()))
    each = min(each, jax.local_device_count() // latent_devices) * latent_devices
    devices = np.asarray([here[:each] for here in _by_process()])
    if latent_devices == 1:
        return Mesh(devices.reshape(-1), ("member",), axis_types=(AxisType.Auto,))
    grid = devices.reshape(-1, latent_devices)
    return Mesh(grid, ("member", "latent"), axis_types=(AxisType.Auto,) * 2)


def latent_devices() -> int:
    """How many devices share the latents of the dictionary whose program is being traced."""
    return jax.sharding.get_abstract_mesh().shape.get("latent", 1)


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One exchange between devices in a compiled program.

    Attributes:
      kind: `all-reduce`, `all-gather`, ...
      shape: of what each device gets, as XLA writes it: f32[128,512].
      size: bytes of that.
      loops: how many loops of the program it lies within.
    """

    kind: str
    shape: str
    size: int
    loops: int


def collectives(program: str) -> list[Collective]:
    """Every exchange between devices in the text of a compiled program, sorted.

    Those that XLA has made one of are counted as what they are made of.
    """
    found: list[tuple[str, str, str]] = []  # computation, kind, shapes
    callers: dict[str, list[tuple[str, bool]]] = {}
    name = ""
    for line in program.splitlines():
        if begin := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = begin[1]
        for role, called in re.findall(r"(\w+)=\{?((?:%[\w.-]+(?:, )?)+)", line):
            for each in re.findall(r"%([\w.-]+)", called):
                callers.setdefault(each, []).append((name, role in ("body", "condition")))
        if match := re.search(rf"= (.*?) ({'|'.join(EXCHANGES)})(?:-start)?\(", line):
            found.append((name, match[2], match[1]))

    def loops(computation: str) -> int:
        return max((loops(by) + looped for by, looped in callers.get(computation, [])), default=0)

    return sorted(
        Collective(kind, f"{dtype}[{shape}]", _bytes(dtype, shape), loops(name))
        for name, kind, shapes in found
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8

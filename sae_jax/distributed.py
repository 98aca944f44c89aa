"""Devices: how many this process computes on, and the mesh that members are spread over."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sae_jax.errors import InputError


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


def one_of_many() -> tuple[int, int]:
    """Which of the processes that were started together this is, and how many they are.

    jax.distributed finds out: from Slurm, Open MPI, a pod of TPUs, or JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Then the processes part again, each with its own devices:
    members of a sweep need nothing of each other, and so a process that is lost ends no other.

    Raises:
      InputError: nothing says so, or the others do not come.
    """
    number = {
        name: int(os.environ[variable])
        for name, variable in (
            ("num_processes", "JAX_NUM_PROCESSES"),
            ("process_id", "JAX_PROCESS_ID"),
        )
        if variable in os.environ
    }
    try:
        jax.distributed.initialize(**number)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--multihost: no other processes are found ({reason}); start them with srun or "
            "mpirun, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    state = jax._src.distributed.global_state
    found = state.process_id, state.num_processes
    jax.distributed.shutdown()
    return found


def memory() -> int:
    """Bytes that the local devices have together; of CPU devices, half of the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit = (device.memory_stats() or {}).get("bytes_limit", 2**33)
    return limit * len(jax.local_devices())


def member_mesh(members: int) -> Mesh:
    """The local devices in one axis named `member`; never more of them than members."""
    devices = jax.local_devices()[: max(1, members)]
    return Mesh(np.asarray(devices), ("member",), axis_types=(AxisType.Auto,))

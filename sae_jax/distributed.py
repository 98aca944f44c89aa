"""Devices: how many this process computes on, and the mesh that members are spread over."""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


def use_all_cpu_cores() -> None:
    """Let JAX see one CPU device a core, so that members of a sweep train side by side.

    For programs, before their first JAX computation (JAX then refuses the change); a library call
    must not decide this. Results do not depend on it. Accelerators are not affected.
    """
    # What this process may use, where the system tells (Linux), else all there are.
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    jax.config.update("jax_num_cpu_devices", len(allowed))


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

"""Members to buckets to one mapped program. The only file that knows of a member axis.

Members whose architectures are equal form a bucket and share one compiled program. Inside it they
are spread over the devices by `shard_map`, and on each device mapped by `lax.map` on CPU, where one
small member at a time stays in cache, or by `vmap` on accelerators, which want wide products.

Under `lax.map` a member's arithmetic does not depend on who trains beside it, bit for bit. Under
`vmap` the shape of a product changes its rounding: float32 results agree to rounding only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax.config import Architecture, SAEConfig
from sae_jax.errors import InputError
from sae_jax.state import Hyperparams, hyperparams


def buckets(configs: Sequence[SAEConfig]) -> dict[Architecture, list[int]]:
    """Positions of the configs that share each architecture, in order of first appearance."""
    positions: dict[Architecture, list[int]] = {}
    for position, config in enumerate(configs):
        positions.setdefault(config.architecture, []).append(position)
    return positions


def member_bytes(architecture: Architecture, itemsize: int) -> int:
    """About what ONE member takes while it trains: weights, two moments, gradient, a copy on the
    host, and the best weights; and a batch of pre-activations, codes and their gradients."""
    weights = (2 * architecture.d_in + 1) * architecture.n_latents
    return itemsize * (6 * weights + 4 * architecture.batch_size * architecture.n_latents)


def split_to_fit(positions: Sequence[int], each: int, memory: int) -> list[list[int]]:
    """Positions in as few equal parts as fit `memory` bytes at `each` bytes a member.

    Raises:
      InputError: not even one member fits.
    """
    if each > memory:
        raise InputError(
            f"a dictionary of this size takes about {each / 2**30:.1f} GiB to train, and there are "
            f"{memory / 2**30:.1f}: fewer latents, or a smaller batch"
        )
    parts = -(-len(positions) // (memory // each))
    return [list(part) for part in np.array_split(np.asarray(positions), parts)]


def stack_hyperparams(
    configs: Sequence[SAEConfig], mesh: Mesh, dtype: Any, steps: int = 0
) -> Hyperparams:
    """Hyperparams [members, ...], the last member repeated up to a multiple of the devices.

    `steps`: how long they train, for schedules.
    """
    surplus = -len(configs) % mesh.size
    members = [hyperparams(config, dtype, steps) for config in [*configs, *[configs[-1]] * surplus]]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def map_members(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(member, *shared)` for ONE member, lifted to `lifted(members, *shared)`.

    `members` is a pytree whose leaves have the member axis in front, its length a multiple of the
    mesh; `shared` is the same for all.
    """

    def on_device(members: Any, shared: tuple[Any, ...]) -> Any:
        if mesh.devices.flat[0].platform == "cpu":
            return lax.map(lambda member: function(member, *shared), members)
        return jax.vmap(lambda member: function(member, *shared))(members)

    member, replicated = PartitionSpec("member"), PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(member, replicated),
        out_specs=member,
        check_vma=False,
    )
    return lambda members, *shared: mapped(members, shared)


def compacted(active: np.ndarray, mesh: Mesh) -> np.ndarray | None:
    """Rows to go on with when others have stopped; None while that saves too little.

    The sizes are powers of two times the devices, so that few are ever compiled; spare rows repeat
    the last active one.
    """
    alive, size = np.flatnonzero(active), mesh.size
    while size < len(alive):
        size *= 2
    if 2 * size > len(active):
        return None
    return np.pad(alive, (0, size - len(alive)), mode="edge")


def take(tree: Any, rows: np.ndarray, mesh: Mesh) -> Any:
    """These rows of every leaf [members, ...], spread over the mesh again."""
    return put(jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree), mesh)


def put(tree: Any, mesh: Mesh) -> Any:
    """Every leaf [members, ...] on the devices, spread over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("member")))

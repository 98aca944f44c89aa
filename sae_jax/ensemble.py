"""Members to buckets to one mapped program. The only file that knows of a member axis.

Members whose architectures are equal form a bucket and share one compiled program. Inside it they
are spread over the devices by `shard_map`, and on each device mapped by `lax.map` on CPU, where one
small member at a time stays in cache, or by `vmap` on accelerators, which want wide products.

With several processes each has rows of its own on the host, those of the members on its devices,
from the first epoch to the last: no member moves between processes.

Under `lax.map` a member's arithmetic does not depend on who trains beside it, bit for bit. Under
`vmap` the shape of a product changes its rounding: float32 results agree to rounding only.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax import distributed
from sae_jax.config import Architecture, SAEConfig
from sae_jax.errors import InputError
from sae_jax.state import LATENT_AXIS, Hyperparams, hyperparams

SHARED_WORK = 2**33  # multiply-adds of a step's product from which accelerators share it


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


def split_to_fit(
    positions: Sequence[int], each: int, memory: int, processes: int = 1, memories: int = 1
) -> list[list[int]]:
    """Positions in as few equal parts as fit `memory` bytes of each process at `each` bytes a
    member, where it falls into so many equal `memories`, of which a member needs one.

    Raises:
      InputError: not even one member fits.
    """
    room = memory // memories
    if each > room:
        raise InputError(
            f"a dictionary of this size takes about {each / 2**30:.1f} GiB to train, and there are "
            f"{room / 2**30:.1f}: fewer latents, or a smaller batch"
        )
    parts = -(-len(positions) // (room // each * memories * processes))
    return [list(part) for part in np.array_split(np.asarray(positions), parts)]


def devices_each(
    architecture: Architecture, members: int, each: int, memory: int, asked: int | None = None
) -> int:
    """How many devices share the latents of each dictionary of a bucket; what decides is here.

    As many as `asked` for. Else one on CPU, where XLA spreads a wide product over the cores by
    itself, and a dictionary alone has the bits of one in company. On accelerators as few as hold
    `each` bytes of it; and where members leave devices idle, all of these, if a product is so wide
    (SHARED_WORK) that a part of it takes longer than what they exchange (see docs/benchmarks.md).

    memory: of a process, of all its devices.

    Raises:
      InputError: `asked` for what is not possible.
    """
    here = jax.local_device_count()
    if asked is not None:
        _check_shared(architecture, asked, here)
        return int(asked)
    possible = [
        devices
        for devices in range(1, here + 1)
        if here % devices == 0 and not _unshared(architecture, devices)
    ]
    holding = [d for d in possible if each <= memory // distributed.memories(d)] or possible[-1:]
    work = architecture.batch_size * architecture.d_in * architecture.n_latents
    if distributed.memories() == 1 or work < SHARED_WORK:
        return holding[0]
    return max([holding[0], *(d for d in holding if d * members <= jax.device_count())])


def _check_shared(architecture: Architecture, asked: Any, here: int) -> None:
    integer = isinstance(asked, int | np.integer) and not isinstance(asked, bool)
    if not integer or asked < 1 or here % asked:
        raise InputError(
            f"latent_devices={asked!r} must be an integer that divides the {here} devices of a "
            "process"
        )
    if reason := _unshared(architecture, int(asked)):
        raise InputError(f"latent_devices={asked}: {reason}")


def _unshared(architecture: Architecture, devices: int) -> str:
    """Why so many devices cannot share such a dictionary; nothing if they can."""
    n, widths = architecture.n_latents, architecture.widths
    if n % devices:
        return f"{n} latents cannot be divided equally; take a multiple"
    if devices > 1 and any(width % widths[0] for width in widths):
        halvings = len(widths) - 1
        return f"{n} latents cannot be halved {halvings} times; take a multiple of {2**halvings}"
    return ""


def own(total: int, mesh: Mesh) -> range:
    """The positions, among `total` members spread over the mesh, of those that this process holds.

    `total` is a multiple of the mesh's member axis.
    """
    devices = mesh.devices.reshape(mesh.shape["member"], -1)
    mine = [i for i, row in enumerate(devices) if row[0].process_index == jax.process_index()]
    each = total // len(devices)
    return range(mine[0] * each, (mine[-1] + 1) * each)


def least(mesh: Mesh) -> int:
    """Of how many members this process must hold a multiple: one for each of its devices, or for
    those that share a dictionary."""
    return len(own(mesh.shape["member"], mesh))


def stack_hyperparams(
    configs: Sequence[SAEConfig], mesh: Mesh, dtype: Any, steps: int = 0
) -> Hyperparams:
    """Hyperparams [members, ...] on the mesh, the last member repeated up to a multiple of it.

    `steps`: how long they train, for schedules.
    """
    surplus = -len(configs) % mesh.shape["member"]
    every = [*configs, *[configs[-1]] * surplus]
    members = [hyperparams(every[i], dtype, steps) for i in own(len(every), mesh)]
    return put(jax.tree.map(lambda *leaves: np.stack(leaves), *members), mesh)


def one_by_one(mesh: Mesh) -> bool:
    """Whether a device takes its members in turn, and not side by side."""
    return mesh.devices.flat[0].platform == "cpu"


def map_members(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(member, *shared)` for ONE member, lifted to `lifted(members, *shared)`.

    `members` is a pytree whose leaves have the member axis in front, its length a multiple of the
    mesh; `shared` is the same for all.
    """

    def on_device(members: Any, shared: tuple[Any, ...]) -> Any:
        if one_by_one(mesh):
            return lax.map(lambda member: function(member, *shared), members)
        return jax.vmap(lambda member: function(member, *shared))(members)

    member, replicated = PartitionSpec("member"), PartitionSpec()
    # An axis of latents is left to the compiler, which finds out what must be exchanged.
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(member, replicated),
        out_specs=member,
        axis_names={"member"},
        check_vma=False,
    )
    return lambda members, *shared: _placed(mapped(_placed(members, mesh), shared), mesh)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How every leaf [members, ...] lies on the mesh: its members are spread over it, and so are,
    where the mesh has an axis for them, the latents of fields that `LATENT_AXIS` names."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = re.findall(r"\w+", jax.tree_util.keystr(path))[-1:]
        axis = LATENT_AXIS.get("".join(name))
        spec = PartitionSpec("member")
        # A threshold of batch_topk has one entry for all latents.
        if "latent" in mesh.shape and axis is not None and leaf.shape[1 + axis] > 1:
            spec = PartitionSpec("member", *[None] * axis, "latent")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _placed(tree: Any, mesh: Mesh) -> Any:
    """In a program: the same, with its latents spread over the mesh."""
    if "latent" not in mesh.shape:
        return tree

    def placed(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        # Where no field has a name, the compiler knows best.
        if "latent" not in sharding.spec:
            return leaf
        return lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(placed, tree, shardings(tree, mesh))


def compacted(active: np.ndarray, most: int, devices: int) -> np.ndarray | None:
    """Rows to go on with when others have stopped; None while that saves too little.

    active: [rows], of this process. most: the most that are active in any process. devices: of this
    process. The sizes are powers of two times the devices, so that few are ever compiled; spare
    rows are -1.
    """
    alive, size = np.flatnonzero(active), devices
    while size < most:
        size *= 2
    if 2 * size > len(active):
        return None
    return np.pad(alive, (0, size - len(alive)), constant_values=-1)


def take(tree: Any, rows: np.ndarray, mesh: Mesh) -> Any:
    """These of this process's rows of every leaf [members, ...], on its devices again."""
    return put(jax.tree.map(lambda leaf: leaf[rows], local(tree)), mesh)


def put(tree: Any, mesh: Mesh) -> Any:
    """Every leaf [members of this process, ...] on the mesh, as the whole of all processes."""
    places = shardings(tree, mesh)
    if NamedSharding(mesh, PartitionSpec()).is_fully_addressable:
        return jax.device_put(tree, places)
    here = least(mesh)

    def whole(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        total = len(leaf) // here * mesh.shape["member"]
        begin = own(total, mesh).start

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(total)
            return leaf[(slice(first - begin, last - begin), *index[1:])]

        return jax.make_array_from_callback((total, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(whole, tree, places)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf, which all processes hold alike, on every device of the mesh; those of one CPU
    share its memory."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if one_by_one(mesh):  # not copied where NumPy's memory is aligned, as that of a jax.Array is
        tree = jax.tree.map(np.asarray, tree)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def everywhere(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(everywhere, tree)


def local(tree: Any) -> Any:
    """Every leaf [members, ...] of this process's members, in NumPy."""

    def rows(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        shards = [(shard.index, shard.data) for shard in leaf.addressable_shards]
        bounds = [index[0].indices(len(leaf))[:2] for index, _ in shards]
        begin, end = min(bounds)[0], max(bounds)[1]
        found = np.empty((end - begin, *leaf.shape[1:]), leaf.dtype)
        for (first, last), (index, data) in zip(bounds, shards, strict=True):
            found[(slice(first - begin, last - begin), *index[1:])] = data
        return found

    return jax.tree.map(rows, tree)


def gathered(tree: Any) -> Any:
    """Every leaf [members of this process, ...] of all processes, [members, ...] in NumPy."""

    def every(leaf: Any) -> np.ndarray:
        found = distributed.agree(np.asarray(leaf))
        return found.reshape(-1, *found.shape[2:])

    return jax.tree.map(every, tree)

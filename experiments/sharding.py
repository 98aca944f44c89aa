"""The shards of a grid: which of its configurations each job of an array trains.

Jobs shall end together, and a program is compiled anew by every job that has some of its members.
So programs are kept together, and cut only where all jobs then end sooner: MULTIFIT (Coffman, Garey
and Johnson 1978, SIAM J. Comput. 7:1) finds by bisection the least time in which the longest first,
each put where it fits, all find a place.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_jax import InputError, SAEConfig, ensemble, workdir
from sae_jax.reading import check_file

# Of two CPU cores, fitted to docs/benchmarks.md; only their ratios matter.
COMPILE = 2.0  # seconds, of a program
RATE = 25e9  # multiplications with what goes along with them, a second
ELEMENTWISE, SELECTION = 25, 50  # as many of them a code costs beside its products, a top-k more
UPDATE = 40  # and as many an entry of the embedding's width and latent a step, whatever the batch

OF_SHARD = ("num_shards", "shard_index", "positions")  # settings that differ between shards
OF_MACHINE = ("resident_gib", "checkpoint_seconds", "tensorboard")  # that may: no result does

Program = tuple[float, list[int]]  # seconds of each member, their positions


def seconds(config: SAEConfig, rows: int, epochs: int) -> float:
    """About how long one configuration trains."""
    selections = (config.activation in ("topk", "batch_topk")) + (config.auxiliary == "auxk")
    decoded_again = config.activation == "gated" or config.auxiliary == "auxk"
    code = config.d_in * (1.5 if decoded_again else 1) + ELEMENTWISE + SELECTION * selections
    step = config.n_latents * (config.batch_size * code + UPDATE * config.d_in)
    return epochs * max(1, rows // config.batch_size) * step / RATE


def split(configs: Sequence[SAEConfig], shards: int, rows: int, epochs: int) -> list[list[int]]:
    """Positions of each shard's configurations, ascending: together the shards are all, once.

    Every shard has some. It depends on the arguments alone.

    Raises:
      InputError: more shards than configurations.
    """
    if shards > len(configs):
        raise InputError(f"--num_shards={shards} is more than the {len(configs)} configurations")
    programs = [
        (seconds(configs[positions[0]], rows, epochs), positions)
        for positions in ensemble.buckets(configs).values()
    ]
    programs.sort(key=lambda program: (-program[0], -len(program[1]), program[1][0]))
    low, high = 0.0, sum(COMPILE + each * len(members) for each, members in programs)
    parts = _filled(programs, shards, high)
    while high - low > 1e-3 * high:
        most = (low + high) / 2
        if (found := _filled(programs, shards, most)) is None:
            low = most
        else:
            high, parts = most, found
    _give_to_the_idle(parts)
    return [sorted(position for _, some in part for position in some) for part in parts]


def _filled(programs: list[Program], shards: int, most: float) -> list[list[Program]] | None:
    """Programs, or parts of them, by shard; None if they do not fit `most` seconds each."""
    room = [most * (1 + 1e-9)] * shards
    parts: list[list[Program]] = [[] for _ in range(shards)]
    for each, members in programs:
        left = members
        while left:
            whole = COMPILE + each * len(left)
            fitting = [place for place in range(shards) if room[place] >= whole]
            place = fitting[0] if fitting else room.index(max(room))
            count = len(left) if fitting else int((room[place] - COMPILE) / each)
            if count < 1:
                return None
            parts[place].append((each, left[:count]))
            room[place] -= COMPILE + each * count
            left = left[count:]
    return parts


def _give_to_the_idle(parts: list[list[Program]]) -> None:
    """Half of the longest shard's largest program to each that has nothing."""
    for idle in (part for part in parts if not part):
        several = [part for part in parts if sum(len(members) for _, members in part) > 1]
        longest = max(several, key=lambda part: sum(each * len(some) for each, some in part))
        largest = max(range(len(longest)), key=lambda i: longest[i][0] * len(longest[i][1]))
        each, members = longest.pop(largest)
        kept = len(members) // 2
        longest += [(each, members[:kept])] if kept else []
        idle.append((each, members[kept:]))


def flags_of(index: int, shards: int) -> str:
    """Which shard, as a command names it."""
    return f"--num_shards={shards} --shard_index={index}"


def read_settings(path: Path) -> dict[str, Any]:
    """What a shard was asked for, and which places its configurations have in the whole.

    Raises:
      InputError: there is no such file, or it is damaged.
    """
    try:
        found = json.loads((check_file(path) if path.exists() else path).read_bytes())
        found["positions"] = [int(each) for each in found["positions"]]
        return found
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is no shard of a sweep") from None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from None


def alike(settings: dict[str, Any]) -> dict[str, Any]:
    """What all shards of a sweep are asked for alike."""
    return {name: value for name, value in settings.items() if name not in OF_SHARD}


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What shards of two settings are asked for otherwise, if anything."""
    without = dict.fromkeys(OF_MACHINE)
    return workdir.difference(alike(one) | without, alike(other) | without)


def check_apart(positions: Mapping[Path, Sequence[int]]) -> None:
    """Refuses shards, folder by folder, of which two train the same configuration.

    Raises:
      InputError: naming both.
    """
    owner: dict[int, Path] = {}
    for folder, places in positions.items():
        for place in places:
            if (other := owner.setdefault(place, folder)) != folder:
                raise InputError(
                    f"{other} and {folder} both have configuration {place}: they were split by "
                    "different versions; train all shards again, in a new folder"
                )

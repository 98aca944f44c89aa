r"""Several processes of one training, watched: the one that is lost or stuck is named.

    sae-jax launch --processes=4 -- sweep --data=rows.npy --workdir=runs/sweep ...   (one machine)
    srun sae-jax launch -- sweep --data=rows.npy --workdir=runs/sweep ...            (several)

On one machine it starts the processes, gives each an equal share of the cores (and of the GPUs, if
there are as many) and tells them where to meet. Under srun or mpirun it starts one, at the place
that these give it. `--multihost` is added to the command where it is missing.

A process that ends otherwise than well is named with its host, how it ended and what it did last;
the others end by JAX's own heartbeat after 20 seconds, or are ended. One that makes no progress for
--stall_minutes is named and ended too. The exit status is that of the process that was lost, 128
and its signal if it was killed. SIGTERM and Ctrl-C make all processes agree on a checkpoint, write
it and end (143); a second Ctrl-C kills them. In every case the same command goes on from there.

Launchers on several machines find what happened elsewhere in --registry, a folder on a file system
that they share; what is there of a run is removed when all has ended well. docs/multihost.md has a
script for each shape of job.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli, supervisor
from experiments.child import Command
from experiments.registry import Registry, this_run
from sae_jax import InputError, files

FLAGS = flags.FLAGS

ARGUMENTS = "-- PROGRAM --its_flags"
# Those with --multihost. Only they give signs of life, without which one would be taken for stuck.
PROGRAMS = ("train", "sweep")
# By scheduler: how many processes, which of them this is, how many on this machine. Slurm's are
# those of a step (srun): the script itself is no process of the job.
PLACES = (
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"),
)
GPUS = Path("/proc/driver/nvidia/gpus")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    FLAGS.set_gnu_getopt(False)  # what follows the command is its own, also without --
    flags.DEFINE_integer("processes", 1, "To start on this machine.", 1)
    flags.DEFINE_float("grace_seconds", 30, "For the others to end, once one is lost.", 0)
    flags.DEFINE_float("stall_minutes", 30, "Without progress until one is ended; 0: never.", 0)
    flags.DEFINE_string(
        "registry", None, "Folder in which launchers meet; default: WORKDIR/.processes."
    )


def main(arguments: list[str]) -> None:
    """Runs the program by its flags."""
    if not arguments or arguments[0] not in PROGRAMS:
        given = f", not {arguments[0]}" if arguments else ""
        raise InputError(
            f"give the command, of {' or '.join(PROGRAMS)}{given} (no other trains as several "
            "processes): sae-jax launch --processes=4 -- sweep --data=..."
        )
    number, processes = place()
    if FLAGS.processes > 1 and processes > 1:
        raise InputError(
            f"--processes={FLAGS.processes} is for one machine, and this is one of {processes} "
            "processes already (srun, mpirun or JAX_NUM_PROCESSES): leave it out"
        )
    words = program(arguments, multihost=max(FLAGS.processes, processes) > 1)
    if processes > 1:
        commands = [Command(words, own_devices())]
    else:
        processes = FLAGS.processes
        commands = [
            Command(words, environment, cores)
            for environment, cores in zip(
                environments(processes), shares(allowed_cores(), processes), strict=True
            )
        ]
    folder = registry_folder(arguments, shared=processes > len(commands))
    raise SystemExit(
        supervisor.launch(
            commands,
            number=number,
            processes=processes,
            grace_seconds=FLAGS.grace_seconds,
            stall_seconds=60 * FLAGS.stall_minutes,
            registry=None if folder is None else Registry(folder, this_run()),
        )
    )


def place() -> tuple[int, int]:
    """Which process this is, and of how many, by who started it: 0 of 1 if nobody says so."""
    for count, number, needed in PLACES:
        if all(name in os.environ for name in (count, number, needed)):
            try:
                return int(os.environ[number]), int(os.environ[count])
            except ValueError:
                raise InputError(f"{number} and {count} must be numbers") from None
    return 0, 1


def program(arguments: Sequence[str], multihost: bool) -> list[str]:
    """The words that start a program of ours as this one was started."""
    name, *rest = arguments
    script = Path(sys.argv[0])
    by_module = ["-m", f"experiments.{cli.MODULES.get(name, name)}"]
    start = by_module if script.suffix == ".py" else [str(script), name]
    given = {word.lstrip("-").split("=")[0] for word in rest}
    joined = ["--multihost"] if multihost and not {"multihost", "nomultihost"} & given else []
    return [sys.executable, *start, *rest, *joined]


def environments(processes: int) -> list[dict[str, str]]:
    """Where the processes of this machine meet, and which GPUs each has, if there are enough."""
    if processes == 1:
        return [{}]
    address = f"127.0.0.1:{free_port()}"
    meeting = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # else it listens to the whole network
        "JAX_NUM_PROCESSES": str(processes),
    }
    gpus = visible_gpus()
    found = []
    for number in range(processes):
        one = {**meeting, "JAX_PROCESS_ID": str(number)}
        if len(gpus) >= processes:
            each = len(gpus) // processes
            one["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * each : (number + 1) * each])
            one["JAX_LOCAL_DEVICE_IDS"] = numbers(each)
        found.append(one)
    return found


def own_devices() -> dict[str, str]:
    """Which GPUs are those of a process whose place a scheduler has given.

    JAX takes only one, by the number of the process on its machine: of a process that has a machine
    to itself these are all, of one that sees a single GPU it is that.
    """
    gpus = visible_gpus()
    alone = (
        os.environ.get("SLURM_STEP_NUM_NODES") == os.environ.get("SLURM_NTASKS")
        if "SLURM_STEP_NODELIST" in os.environ
        else os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or not gpus or not (alone or len(gpus) == 1):
        return {}
    return {"JAX_LOCAL_DEVICE_IDS": numbers(len(gpus))}


def visible_gpus() -> list[str]:
    """Names of those that CUDA shows here, as CUDA_VISIBLE_DEVICES has them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i, _ in enumerate(GPUS.iterdir())] if GPUS.is_dir() else []


def numbers(count: int) -> str:
    """0 to count - 1, as a list for JAX."""
    return ",".join(map(str, range(count)))


def allowed_cores() -> list[int] | None:
    """Those that this process may use; None where the system does not tell."""
    tell = getattr(os, "sched_getaffinity", None)
    return None if tell is None else sorted(tell(0))


def shares(cores: Sequence[int] | None, processes: int) -> list[list[int] | None]:
    """An equal share of the cores for each process; with too few, some share one.

    Equal, since JAX has a device a core: a remainder is left to the system.
    """
    if cores is None or processes == 1:
        return [None] * processes
    each = max(1, len(cores) // processes)
    return [
        [cores[(number * each + i) % len(cores)] for i in range(each)]
        for number in range(processes)
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def registry_folder(arguments: Sequence[str], shared: bool) -> Path | None:
    """Where launchers meet: --registry, or in --workdir of the command if there are several."""
    named = FLAGS.registry
    if named is None:
        if not shared:
            return None
        if not (workdirs := values_of("workdir", arguments)):
            raise InputError("--registry is needed: a folder on a file system that all share")
        named = Path(workdirs[-1]) / ".processes"
    files.check_writable(Path(named))
    return Path(named)


def values_of(flag: str, arguments: Sequence[str]) -> list[str]:
    """What a command line gives a flag, as --flag=value or --flag value."""
    found = []
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            found.append(value if equals else after)
    return found


if __name__ == "__main__":
    cli.launch(main, define_flags, arguments=ARGUMENTS)

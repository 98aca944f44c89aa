"""The process that measures ours or a peer: it tells about itself first, then answers.

`python -m experiments.benchmarks.worker JOB` with a `Job` as JSON; `training` starts it, a peer's
with the interpreter of the environment in which that peer is installed. Hence nothing but Python
and NumPy is imported here, and a peer's process imports that peer alone. Answers are lines of JSON
on stdout; whatever a library prints goes to stderr.
"""

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

from experiments.benchmarks import peers
from experiments.benchmarks.jobs import OURS, Job, Prepared


def prepare(job: Job) -> Prepared | dict[str, str]:
    """What the job is about, ready; or for a peer that cannot be measured `status` and `reason`."""
    if job.peer == OURS:
        return importlib.import_module("experiments.benchmarks.ours").prepare(job)
    peer = peers.PEERS[job.peer]
    try:
        driver = importlib.import_module("experiments.benchmarks.peers.driver")
        return driver.prepare(job, importlib.import_module(peer.module))
    except peers.NotOfferedError as error:
        return {"status": "not offered", "reason": str(error)}
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("torch", peer.package):
            return {"status": "absent", "reason": str(error)}
        return _failed(error)
    except Exception as error:  # of a library that we do not control: the others go on
        return _failed(error)


def _failed(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answers every line of stdin with one measurement, until stdin ends."""
    job = Job.from_json(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    prepared = prepare(job)
    if not isinstance(prepared, Prepared):
        answer(prepared)
        return
    answer(prepared.about)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        config_steps = prepared.measure()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        answer({"config_steps": config_steps, "wall": wall, "cpu": cpu})


if __name__ == "__main__":
    main()

r"""Kills, full disks and the order of fsyncs, over five stages of the work.

    python -m tests.durability.main --stage=all --table=docs/durability.md     (Linux with strace)

Each stage is a small command on real formats (see stages.py). It is run unbroken; then

- kills: strace stops it after every system call that changes its folder. What lies there is what a
  `kill -9` there would leave: it is copied, and the same command must go on from the copy to the
  same weights, tables and stores, bit for bit. All calls before and after which what has its final
  place differs are taken, and --most of each kind among those that write aside (0: all).
- real: processes are killed there, and --random further ones at any time.
- order: every file that takes its final name was fsynced before, its folder after, and nothing that
  a manifest lists is touched after the manifest.
- full: the command on a tmpfs of 4 MB with little room: one line says so, nothing partial stays,
  and with room the same command goes on.

It must show: identical in all lines, no violations. With --most=3 about an hour on two cores, with
--most=0 some three hours; given again with the same --folder, it goes on where it was killed.
"""

import functools
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.durability import stages

stages.settle()

from absl import flags  # noqa: E402

from tests.durability import full, kills, order, tracing  # noqa: E402
from tests.durability.begun import Begun, begin  # noqa: E402
from tests.durability.stages import OUT, STAGES, Stage  # noqa: E402

FLAGS = flags.FlagValues()  # of its own: the commands define theirs in this process

TOLD = {
    "sampled": """## What was sampled
Each stage is a small command (`tests/durability/stages.py`), not the work of a user. A kill can
come at any moment. Tried are all calls before and after which what has its final place differs, and
of those that write aside so many of each kind, or all; of the states found there so many; so many
processes killed there, and at random times, all drawn with this seed; and disks with so much room,
of what a run takes.""",
    "kills": """## Kills
System calls that change the folder of a run that is let be, by kind; after how many of them the
process was stopped (all before and after which what has its final place differs, and of those that
write aside what the first table says); and of how many different states found there, of processes
killed there, and of processes killed at random times, the same command went on to the very same
files.""",
    "order": """## Order of fsyncs
Files that took their final name, those in folders renamed whole too. A violation: one that was not
fsynced after its last write and before; a folder not fsynced after a name in it changed; a file
touched after the manifest that lists it.""",
    "full": """## Full disks
The command on a tmpfs of 4 MB with so much room, what it said last, how many partial files stayed,
and whether it went on once there was room.""",
}
ABOUT = """Written by `python -m tests.durability.main --table=docs/durability.md`, of the stages
and with the flags that the first table names; it must show: identical in all lines, no violations,
no partial files, and a single line that names the path. Stages are run one by one: the rows of one
stay until it is run again, so they may be of an older state of the code (where seconds are missing,
of an older state of the program too). What lies on a disk that loses power is not tried: the order
of fsyncs is shown, and whether the disk keeps to it is its own affair."""
ASKED = ("checks", "most", "states", "real", "random", "seed")
FILLED = (0, 0.1, 0.3, 0.6, 0.9)  # free room, of what a whole run takes


def define_flags() -> None:
    """Of this program."""
    own = {"flag_values": FLAGS}
    flags.DEFINE_list("stage", ["all"], f"Some of {', '.join(STAGES)}.", **own)
    flags.DEFINE_list("checks", ["kills", "order", "full"], "Some of these.", **own)
    flags.DEFINE_integer(
        "most", 20, "Calls of a kind, of those that write aside; 0: all.", 0, **own
    )
    flags.DEFINE_integer("states", 0, "Of those found to go on from, drawn; 0: all.", 0, **own)
    flags.DEFINE_integer("real", 5, "Processes of a stage killed by strace after a call.", 0, **own)
    flags.DEFINE_integer("random", 20, "Processes of a stage killed at random times.", 0, **own)
    flags.DEFINE_integer("jobs", 2, "Processes side by side.", 1, **own)
    flags.DEFINE_integer("seed", 0, "Of what is drawn at random.", 0, **own)
    flags.DEFINE_string("table", None, "Markdown file to write the tables to, too.", **own)
    flags.DEFINE_string(
        "folder",
        None,
        "For runs, to look at what went wrong, and to go on in; default: temporary.",
        **own,
    )


def main() -> None:
    """Runs the checks by the flags; exit status 1 if anything is not as promised."""
    if not tracing.available():
        sys.exit("error: strace is needed, and the right to trace one's own processes")
    names = list(STAGES) if FLAGS.stage == ["all"] else FLAGS.stage
    if unknown := set(names) - set(STAGES):
        sys.exit(f"error: --stage={','.join(sorted(unknown))} is none of {', '.join(STAGES)}")
    folder = Path(FLAGS.folder or tempfile.mkdtemp(prefix="durability-")).resolve()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    wrong: list[str] = []
    for name in names:
        base, stage = folder / name, STAGES[name]
        stage.load()
        begun = begin(stage, base, {flag: FLAGS[flag].value for flag in ASKED})
        run = begun.run
        found: dict[str, list[dict[str, Any]]] = {"sampled": [sampled(stage)]}
        if "kills" in FLAGS.checks:
            found["kills"] = [killed(stage, base, begun, wrong)]
        if "order" in FLAGS.checks:
            found["order"] = [ordered(stage, base, run, wrong)]
        if "full" in FLAGS.checks:
            found["full"] = filled(stage, base, run, wrong)
        (base / "rows.json").write_text(json.dumps(found))
    text = tables(folder)
    print(text)
    print("\n".join(f"wrong: {each}" for each in wrong) or "nothing is wrong")
    if FLAGS.table:
        Path(FLAGS.table).write_text(text)
    if not FLAGS.folder and not wrong:
        shutil.rmtree(folder)
    sys.exit(bool(wrong))


def sampled(stage: Stage) -> dict[str, Any]:
    """A row of the table of what was asked of a stage: no run is of all there is."""
    kills_asked = "kills" in FLAGS.checks
    return {
        "stage": stage.name, "checks": ", ".join(FLAGS.checks),
        "calls of a kind": (FLAGS.most or "all") if kills_asked else "",
        "states": (FLAGS.states or "all") if kills_asked else "",
        "killed by strace": FLAGS.real if kills_asked else "",
        "at random": FLAGS.random if kills_asked else "",
        "seed": FLAGS.seed,
        "of its room": ", ".join(map(str, FILLED)) if "full" in FLAGS.checks else "",
    }  # fmt: skip


def killed(stage: Stage, base: Path, begun: Begun, wrong: list[str]) -> dict[str, Any]:
    """A row of the first table."""
    run, chance = begun.run, random.Random(FLAGS.seed)
    at = [chance.uniform(0, run.seconds) for _ in range(FLAGS.random)]
    tasks = {
        "frozen": [functools.partial(kills.resume, stage, Path(frozen), run.outcome, told)
                   for told, frozen in begun.frozen.values()],
        "by strace": [functools.partial(kills.kill_after_event, stage, base, run.outcome, number)
                      for number in begun.some],
        "at random": [functools.partial(kills.kill_after_seconds, stage, base, run.outcome, t, i)
                      for i, t in enumerate(at)],
    }  # fmt: skip
    every = kills.share([task for group in tasks.values() for task in group], base, FLAGS.jobs)
    results = every
    row: dict[str, Any] = {"stage": stage.name, "calls": len(run.events)}
    row |= kills.counted(run.events) | {"stopped after": begun.stopped}
    for name, group in tasks.items():
        own, results = results[: len(group)], results[len(group) :]
        row[name] = f"{sum(not each.wrong for each in own)} of {len(own)}"
        wrong += [f"{stage.name}, {name}, {each.at}: {each.wrong}" for each in own if each.wrong]
    row["empty folders left"] = sum(bool(each.husks) for each in every)
    return row | {
        "seconds a run": f"{run.seconds:.1f}",
        "seconds of all": round(sum(each.seconds for each in every)),
    }


def ordered(stage: Stage, base: Path, run: kills.Unbroken, wrong: list[str]) -> dict[str, Any]:
    """A row of the second table."""
    found = order.checked(run.events, base / "traced" / OUT)
    wrong += [f"{stage.name}: {each}" for each in found.violations]
    return {
        "stage": stage.name, "fsyncs": kills.counted(run.events)["fsync"],
        "files renamed into place": found.renamed, "violations": len(found.violations),
        "last": found.last,
    }  # fmt: skip


def filled(stage: Stage, base: Path, run: kills.Unbroken, wrong: list[str]) -> list[dict[str, Any]]:
    """Rows of the third table."""
    rows = []
    for share in FILLED:
        free = int(share * full.used(base / "traced" / OUT)) // 4096 * 4096
        found = full.tried(stage, base, run.outcome, free)
        problems = list(found.wrong)
        if found.status:
            if found.traceback:
                problems.append("a traceback")
            if not found.said.startswith("error:"):
                problems.append(f"said {found.said!r}")
            problems += [f"{name} is partial" for name in found.partial]
        wrong += [f"{stage.name}, {free} bytes free: {each}" for each in problems]
        rows.append(
            {
                "stage": stage.name,
                "KiB free": free // 1024,
                "status": found.status,
                "said": found.said if found.status else "",
                "partial": len(found.partial),
                "with room": "identical" if not found.wrong else "wrong",
            }
        )
    return rows


def tables(folder: Path) -> str:
    """Markdown of all stages that were run in a folder, now or earlier."""
    stored = [folder / name / "rows.json" for name in STAGES]
    found = [json.loads(path.read_text()) for path in stored if path.exists()]
    text = ["# Killed, out of room, out of power", ABOUT]
    for name, told in TOLD.items():
        rows = [row for each in found for row in each.get(name, [])]
        if rows:
            lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
            table = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
            text += [told, "\n".join(table)]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    define_flags()
    FLAGS(sys.argv)
    main()

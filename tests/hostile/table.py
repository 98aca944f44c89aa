r"""The corpus as a table in Markdown: what was said of each fault, and what lay on disk.

    python -m tests.hostile.table > corpus.md              # a row a case
    python -m tests.hostile.table --summary                # a row a reader
    python -m tests.hostile.table --thorough --reader=GMT  # every fault instead of a sample

The exit status is 2 wherever a command meets an InputError (`experiments.cli`, `extract.main`).
"""

import itertools
import logging
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from absl import app, flags

from tests.hostile import corpus
from tests.hostile.readers import READERS

FLAGS = flags.FLAGS

flags.DEFINE_bool("summary", False, "A row a reader instead of a row a case.")
flags.DEFINE_bool("thorough", False, "Every fault, not a sample.")
flags.DEFINE_string("reader", "", "Only readers whose name holds this.")
flags.DEFINE_integer("seed", 0, "Of the sample and of the bits that flip.", lower_bound=0)
STATUS = {"refused": "2", "same": "0", "other": "0"}
VERDICTS = {"refused": "refused", "same": "read, the same", "other": "read for what it holds"}


def main(_: list[str]) -> None:
    """Runs the program by its flags."""
    warnings.simplefilter("ignore")
    logging.disable()
    head = ["reader", "files", "cases", *VERDICTS.values(), "wrong"]
    head = head if FLAGS.summary else ["reader", "file", "fault", "exit status", "said", "left"]
    print(_row(head))
    print(_row(["---"] * len(head)))
    total: Counter[str] = Counter()
    for reader in READERS:
        if FLAGS.reader in reader.name:
            counted = of_reader(reader)
            total += counted
            if FLAGS.summary:
                print(_counted(reader.name, str(len(reader.files)), counted), flush=True)
    if FLAGS.summary:
        print(_counted("all", "", total))


def of_reader(reader: corpus.Reader) -> Counter[str]:
    """Runs its cases; prints them unless --summary; how many went which way."""
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        numbers = itertools.count()
        for file, fault in corpus.cases(reader, FLAGS.seed, FLAGS.thorough):
            scratch = Path(home) / str(next(numbers))
            scratch.mkdir()
            outcome = corpus.run(reader, file, fault, scratch)
            left = corpus.leftovers(reader, outcome)
            well = corpus.allowed(reader, file, fault, outcome) and not left
            counted[outcome.verdict if well else "wrong"] += 1
            if not FLAGS.summary:
                said = outcome.said or VERDICTS.get(outcome.verdict, outcome.verdict)
                print(_row([reader.name, file, str(fault), STATUS.get(outcome.verdict, "**1**"),
                            said[:200], ", ".join(left) or "nothing"]))  # fmt: skip
    return counted


def _counted(name: str, files: str, counted: Counter[str]) -> str:
    numbers = [str(counted[verdict]) for verdict in (*VERDICTS, "wrong")]
    return _row([name, files, str(sum(counted.values())), *numbers])


def _row(cells: list[str]) -> str:
    shown = (cell.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(shown)} |"


if __name__ == "__main__":
    app.run(main)

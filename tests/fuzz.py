r"""Readers on broken bytes for as long as one likes; what no reader may do is kept.

    python -m tests.fuzz --minutes=10 --seed=1 --reader=GMT --out=crashes

Each crash is a file of bytes, named by its reader and file, and a line on the screen. One that was
repaired belongs into tests/hostile/found.py by a name that says what was wrong.
"""

import hashlib
import logging
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import hypothesis
from absl import app, flags

from tests.hostile import corpus, fuzzing, strategies

FLAGS = flags.FLAGS

flags.DEFINE_float("minutes", 10, "How long.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0)
flags.DEFINE_string("reader", "", "Only readers whose name holds this.")
flags.DEFINE_string("out", None, "Folder for the bytes that a reader could not stand.")


def main(_: list[str]) -> None:
    """Runs the program by its flags."""
    warnings.simplefilter("ignore")
    logging.disable()
    places = [place for place in fuzzing.PLACES if FLAGS.reader in place[0].name]
    end, rounds = time.monotonic() + 60 * FLAGS.minutes, 0
    seen: set[str] = set()
    verdicts: Counter[str] = Counter()
    while time.monotonic() < end:
        for number, (reader, file) in enumerate(places):
            if time.monotonic() > end:
                break
            whole = (corpus.valid(reader.name)[0] / file).read_bytes()
            seed = (FLAGS.seed * 1000 + rounds) * 1000 + number
            for content in drawn(whole, seed, 3 if reader.slow else 40):
                with tempfile.TemporaryDirectory() as scratch:
                    outcome = fuzzing.attempt(reader, file, content, Path(scratch))
                verdicts[outcome.verdict] += 1
                kind = f"{reader.name}/{file}: {outcome.verdict} {outcome.said[:60]}"
                if not fuzzing.went_well(reader, file, outcome) and kind not in seen:
                    seen.add(kind)
                    print(
                        f"{reader.name} | {file} | {outcome.verdict} | {outcome.said[:300]!r}",
                        flush=True,
                    )
                    keep(reader.name, file, content)
        rounds += 1
    print(f"{rounds} rounds, {sum(verdicts.values())} files: {dict(verdicts)}; {len(seen)} crashes")


def drawn(whole: bytes, seed: int, n: int) -> list[bytes]:
    """Some contents of the strategy that the tests use."""
    found: list[bytes] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=n, database=None, deadline=None, phases=[hypothesis.Phase.generate]
    )
    @hypothesis.given(strategies.contents(whole))
    def collect(content: bytes) -> None:
        found.append(content)

    collect()
    return found


def keep(reader: str, file: str, content: bytes) -> None:
    """The bytes of a crash, in a file of --out."""
    if FLAGS.out:
        out = Path(FLAGS.out)
        out.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(content).hexdigest()[:8]
        name = f"{reader} {file} {digest}".replace("/", "_").replace(" ", "_")
        (out / name).write_bytes(content)


if __name__ == "__main__":
    app.run(main)

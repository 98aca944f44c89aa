"""Broken and hostile files: refused in one line that names them, or read for what they hold."""

import gzip
import os
import pickle
import time
from pathlib import Path

import pytest

from analysis import gene_names
from sae_jax import InputError
from sae_jax.errors import MOST, brief
from sae_jax.reading import check_file, read_json, reading
from tests.hostile import corpus, faults, found
from tests.hostile.faults import MARKER
from tests.hostile.readers import READERS, Reader

# What says the same in other bytes is read.
HARMLESS = {
    "encoding-crlf", "encoding-no-newline", "encoding-spaces", "encoding-plain",
    "encoding-two-members",
}  # fmt: skip
NOT_OF = (  # compared byte for byte
    "manifest.check", "study", "Dictionary.load", "sae-jax merge", "an extraction that was killed",
)  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_fault_is_told_in_a_line(reader: Reader, tmp_path: Path) -> None:
    wrong, kinds = [], set()
    for number, (file, fault) in enumerate(corpus.cases(reader)):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        outcome = corpus.run(reader, file, fault, scratch)
        kinds.add(outcome.verdict)
        harmless = str(fault) in HARMLESS and reader.name not in NOT_OF
        ours = corpus.leftovers(reader, outcome)
        if (
            not corpus.allowed(reader, file, fault, outcome)
            or ours
            or (harmless and outcome.verdict != "same")
        ):
            wrong.append(f"{file}: {fault}: {outcome.verdict}: {outcome.said[:300]!r} {ours}")
    assert not wrong, "\n".join(wrong)
    assert kinds != {"same"}


@pytest.mark.parametrize(("reader", "file", "content"), found.FOUND.values(), ids=found.FOUND)
def test_what_was_found_once(reader: str, file: str, content: bytes, tmp_path: Path) -> None:
    which = corpus.by_name(reader)
    fault = faults.Fault("found", "bytes", faults.put(content))
    assert corpus.run(which, file, fault, tmp_path).verdict == "refused"


@pytest.mark.parametrize("name", ["protocol-0", "protocol-2", "eval", "in-array", "nested"])
def test_the_pickles_do_harm_where_nothing_stops_them(name: str) -> None:
    # Otherwise no test would see that one was run.
    pickle.loads(faults.bombs()[name])
    assert MARKER.is_dir()
    MARKER.rmdir()


def test_the_corpus_sees_a_reader_that_does_wrong(tmp_path: Path) -> None:
    good = corpus.by_name("browser's secret")

    def outcome(read: object) -> corpus.Outcome:
        scratch = tmp_path / str(time.monotonic_ns())
        scratch.mkdir()
        expected = corpus.valid(good.name)[1]
        case = scratch / "case"
        case.mkdir()
        return corpus.read(Reader("bad", good.make, read, ("secret",)), "secret", case, expected)

    def refuse(message: str) -> object:
        def read(_: Path) -> None:
            raise InputError(message)

        return read

    def leave(folder: Path) -> None:
        (folder / "partial").touch()
        raise InputError("secret is damaged")

    assert outcome(refuse("secret is damaged")).verdict == "refused"
    assert outcome(refuse("it is damaged")).verdict == "names no file"
    assert outcome(refuse("secret is\ndamaged")).verdict == "not one line"
    assert outcome(lambda _: 1 / 0).verdict == "raised"
    assert outcome(lambda _: bytes(400 << 20)).verdict == "raised"
    assert outcome(lambda _: pickle.loads(faults.bombs()["protocol-2"])).verdict == "ran code"
    assert outcome(leave).left == ("case/partial 0",)
    assert outcome(lambda _: "other").verdict == "other"
    corpus.SECONDS, before = 0.2, corpus.SECONDS
    try:
        assert outcome(lambda _: time.sleep(5)).verdict == "slow"
    finally:
        corpus.SECONDS = before


def test_a_message_is_printable_and_bounded() -> None:
    told = str(InputError("a\x1b[2Jb\ud800\x00" + "é" * 10_000))
    assert told.startswith(r"a\x1b[2Jb\ud800\x00é")
    assert len(told) == MOST - 1
    assert told.encode()
    assert brief(ValueError("two\nlines\x07")) == r"two lines\x07"
    assert brief(ValueError()) == "ValueError"
    assert len(brief("x" * 1000)) < 201


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"),
                       (tmp_path / "none", "there is no file"),
                       (tmp_path / ("x" * 300), "cannot be read|there is no file")):  # fmt: skip
        with pytest.raises(InputError, match=told):
            check_file(path)
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 2**29)  # of zeros, and takes no room
    with pytest.raises(InputError, match=r"large\.json is damaged, no JSON: its 512 MiB"):
        read_json(tmp_path / "large.json")
    with pytest.raises(InputError, match="here: what"), reading("here"):
        raise InputError("what")


def test_unpacked_text_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gene_names, "LARGEST_TEXT", 2**20)
    path = tmp_path / "sets.gmt.gz"
    path.write_bytes(gzip.compress(b"T\t\tCD3D\n" * 200_000))
    with pytest.raises(InputError, match=r"sets\.gmt\.gz holds more than"):
        gene_names.read_text(path, "gene set", "gene sets in GMT format")

import itertools
import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.browser.answers import Answers, NotSavedError, create
from sae_jax import InputError

NAMES = (f"save-{i:04d}" for i in itertools.count())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create(tmp_path / "a.sqlite", ["ann", "bob"], ["1", "2"])
    return tmp_path / "a.sqlite"


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=12))
@settings(max_examples=20)
def test_saves_and_undos_equal_a_stack(
    tmp_path_factory: pytest.TempPathFactory, done: list[int | None]
) -> None:
    path = tmp_path_factory.mktemp("answers") / "a.sqlite"
    create(path, ["ann"], ["1"])
    answers = Answers(path)
    ann, stack, version, told = answers.of("ann"), [], 0, []
    for each in done:
        if each is None:
            found = ann.undo("1", version, next(NAMES))
            if stack:
                stack.pop()
                told.append(stack[-1] if stack else {})
        else:
            stack.append({"x": each})
            told.append(stack[-1])
            found = ann.save("1", stack[-1], version, next(NAMES))
        version = found.version
        assert found.answer == ann.get("1").answer == (stack[-1] if stack else {})
        assert found.can_undo == ann.get("1").can_undo == bool(stack)
        assert found.other is None
    history = answers.history()
    assert [row["answer"] for row in history] == told
    assert [row["version"] for row in history] == list(range(1, len(told) + 1))
    answers.close()


def test_a_repeated_request_adds_nothing(path: Path) -> None:
    ann = Answers(path).of("ann")
    first = ann.save("1", {"x": 1}, 0, "save-a")
    assert ann.save("1", {"x": 1}, 0, "save-a") == first
    assert ann.save("1", {"x": 2}, 1, "save-b").version == 2
    assert ann.save("1", {"x": 1}, 0, "save-a") == first  # a late copy does not win
    assert ann.get("1").answer == {"x": 2}
    undone = ann.undo("1", 2, "undo-a")
    assert ann.undo("1", 2, "undo-a") == undone
    assert ann.get("1").answer == {"x": 1}


def test_of_two_windows_nothing_is_lost_and_the_later_is_told(path: Path) -> None:
    ann = Answers(path).of("ann")
    ann.save("1", {"x": "one"}, 0, "window-1")
    told = ann.save("1", {"x": "two"}, 0, "window-2")
    assert (told.version, told.answer, told.other["answer"]) == (2, {"x": "two"}, {"x": "one"})
    assert ann.save("1", {"x": "two"}, 0, "window-2") == told
    assert ann.undo("1", 2, "window-2-undo").answer == {"x": "one"}
    assert ann.save("1", {"x": "one"}, 1, "window-1-again").other is None  # the same: no conflict


def test_raters_have_rows_of_their_own(path: Path) -> None:
    answers = Answers(path)
    ann, bob = answers.of("ann"), answers.of("bob")
    ann.save("1", {"x": 1}, 0, "the-same-name")
    assert bob.get("1").version == 0
    assert bob.all() == {}
    assert bob.undo("1", 0, "undo-nothing").version == 0
    bob.save("1", {"x": 2}, 0, "the-same-name")
    assert (ann.all(), bob.all()) == ({"1": {"x": 1}}, {"1": {"x": 2}})
    assert [(row["rater"], row["answer"]) for row in answers.current()] == [
        ("ann", {"x": 1}), ("bob", {"x": 2}),
    ]  # fmt: skip
    with pytest.raises(InputError, match="'eve' is no rater"):
        answers.of("eve")
    with pytest.raises(InputError, match="no item '3'"):
        ann.save("3", {}, 0, "save-x")


def test_the_history_only_grows(path: Path) -> None:
    answers = Answers(path)
    answers.of("ann").save("1", {"x": 1}, 0, "save-a")
    with sqlite3.connect(path) as other:
        for statement in ("UPDATE change SET answer = '{}'", "DELETE FROM change"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                other.execute(statement)
    other.close()
    assert answers.history()[0]["answer"] == {"x": 1}
    assert answers.history()[0]["at"].endswith("+00:00")


def test_what_is_acknowledged_is_on_the_disk(path: Path) -> None:
    answers = Answers(path)
    settings = {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 10000}
    for name, value in settings.items():
        assert tuple(answers.rows(f"PRAGMA {name}")[0]) == (value,)


def test_two_programs_on_one_file_lose_nothing(path: Path) -> None:
    both, n = [Answers(path), Answers(path)], 20

    def work(k: int) -> None:
        mine = both[k % 2].of(("ann", "bob")[k // 2])
        for i in range(n):
            mine.save("1", {"x": [k, i]}, 0, f"{k}-{i:06d}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = [tuple(row["answer"]["x"]) for row in both[0].history()]
    assert sorted(found) == [(k, i) for k in range(4) for i in range(n)]
    for k in range(4):
        assert [i for j, i in found if j == k] == list(range(n))


def test_a_change_that_fails_leaves_nothing(path: Path) -> None:
    answers = Answers(path)
    with pytest.raises(TypeError):
        answers.of("ann").save("1", {"x": object()}, 0, "save-a")
    assert answers.history() == []
    assert answers.of("ann").save("1", {"x": 1}, 0, "save-b").version == 1


def test_a_full_disk_takes_nothing_and_is_read_on(path: Path) -> None:
    answers = Answers(path)
    ann = answers.of("ann")
    ann.save("1", {"x": "old"}, 0, "save-old")
    (pages,) = answers.rows("PRAGMA page_count")[0]
    answers.rows(f"PRAGMA max_page_count = {pages}")  # as if the disk ended here: SQLITE_FULL
    with pytest.raises(NotSavedError, match="full"):
        ann.save("1", {"x": "new" * 9000}, 1, "save-new")
    assert ann.get("1").answer == {"x": "old"}
    assert len(answers.history()) == 1
    answers.rows("PRAGMA max_page_count = 100000")
    assert ann.save("1", {"x": "new" * 9000}, 1, "save-new").version == 2


def test_an_error_that_is_not_of_the_disk_is_not_called_one(path: Path) -> None:
    answers = Answers(path)
    with pytest.raises(sqlite3.OperationalError, match="no such table"):  # noqa: SIM117
        with answers.writing() as connection:
            connection.execute("INSERT INTO absent VALUES (1)")


def test_files_that_cannot_be_trusted_are_refused(path: Path, tmp_path: Path) -> None:
    answers = Answers(path)
    for i in range(200):
        answers.of("ann").save("1", {"x": "long " * 50}, i, f"save-{i:04d}")
    answers.close()
    with pytest.raises(InputError, match="there is no file"):
        Answers(tmp_path / "b.sqlite")
    assert not (tmp_path / "b.sqlite").exists()
    whole = path.read_bytes()
    for damaged in (whole[:8192] + b"\xff" * 4096 + whole[12288:], b"no database " * 500):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            Answers(path)
    path.write_bytes(whole)
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 2")
    other.close()
    with pytest.raises(InputError, match="version 2"):
        Answers(path)

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.browser import absent, study, study_draw, study_panels
from sae_jax import InputError
from tests.analysis.browser.study_cases import N_CONCEPTS, SECRETS, Documents

DRAW = {"concepts": 8, "neurons": 6, "repeats": 4, "raters": ("ann", "bob"), "n_genes": 10}


def make(documents: Documents | None = None, **settings: Any) -> tuple:
    return study_draw.make(documents or Documents(), name="first", **{**DRAW, **settings})


@given(st.integers(6, 60), st.data(), st.integers(0, 5))
@settings(max_examples=60)
def test_an_order_holds_every_item_once_and_repeats_come_late(
    n: int, data: st.DataObject, seed: int
) -> None:
    repeats = data.draw(st.integers(0, n // 2))
    items = [study.Item(str(i), i, f"f{i}", "concept") for i in range(n - repeats)]
    items += [study.Item(str(100 + i), i, f"f{i}", "concept", str(i)) for i in range(repeats)]
    found = study_draw.order(items, np.random.default_rng(seed))
    assert sorted(found) == sorted(each.number for each in items)
    for each in items[n - repeats :]:
        assert found.index(each.number) - found.index(each.repeat_of) >= n // 3


def test_orders_are_shuffled_and_repeats_do_not_follow_the_first_showings() -> None:
    items = [study.Item(str(i), i, "f", "concept") for i in range(60)]
    items += [study.Item(str(100 + i), i, "f", "concept", str(i)) for i in range(12)]
    rng = np.random.default_rng(0)
    orders = [study_draw.order(items, rng) for _ in range(300)]
    # An item that is not repeated is at every place equally often: mean (n - 1) / 2 = 35.5, and
    # the mean of 300 places has a standard error of 20.8 / sqrt(300) = 1.2. Repeats come late.
    places = np.array([[each.index(str(i)) for i in range(12, 60)] for each in orders])
    np.testing.assert_allclose(places.mean(axis=0), 35.5, atol=5)
    crossed = [
        np.corrcoef(
            [o.index(str(i)) for i in range(12)], [o.index(str(100 + i)) for i in range(12)]
        )
        for o in orders
    ]
    assert np.mean([each[0, 1] for each in crossed]) < 0.9


def test_a_draw_has_what_was_asked_for() -> None:
    drawn, content, tokens = make()
    first = [each for each in drawn.items if each.repeat_of is None]
    again = [each for each in drawn.items if each.repeat_of]
    documents = Documents()
    assert [sum(each.kind == kind for each in first) for kind in study.KINDS] == [8, 6]
    assert len({each.feature for each in first}) == 14
    assert {each.kind == "neuron" for each in first if each.feature >= N_CONCEPTS} == {True}
    assert all(documents.names[each.feature] == each.name for each in drawn.items)
    assert [sum(each.kind == kind for each in again) for kind in study.KINDS] == [2, 2]
    for each in again:
        assert drawn.item[each.repeat_of].feature == each.feature
    assert set(content) == {each.number for each in first}
    assert all(len(each.number) == 6 for each in drawn.items)
    assert drawn.rater["ann"].order != drawn.rater["bob"].order
    assert [study.hashed(token) for _, token in tokens] == [each.token for each in drawn.raters]
    assert drawn.run == "f00d"


def test_the_seed_fixes_everything_but_the_tokens() -> None:
    (a, shown_a, tokens_a), (b, shown_b, tokens_b), (c, _, _) = make(), make(), make(seed=1)
    assert (a.items, [r.order for r in a.raters]) == (b.items, [r.order for r in b.raters])
    assert shown_a == shown_b
    assert tokens_a != tokens_b
    assert {each.name for each in a.items} != {each.name for each in c.items}


def test_the_kinds_are_mixed_in_items_and_numbers() -> None:
    drawn, _, _ = make(repeats=0)
    kinds = [each.kind for each in drawn.items]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))
    by_number = [each.kind for each in sorted(drawn.items, key=lambda each: each.number)]
    assert by_number not in (sorted(kinds), sorted(kinds, reverse=True))


def test_only_features_that_fill_the_panels_are_drawn() -> None:
    drawn, _, _ = make(concepts=N_CONCEPTS - 1, neurons=10, repeats=0)
    features = {each.feature for each in drawn.items}
    assert features == set(range(26)) - {3, 20, 21}
    assert drawn.passed_over["concept"] in (
        0,
        1,
    )  # the last one is not looked at when all are found
    with pytest.raises(InputError, match="11 neurons are asked for, and 10 of the run's 12"):
        make(neurons=11)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"repeats": 15}, "15 repeats of 14 features"),
        ({"concepts": 2, "neurons": 2, "repeats": 1}, "six or more items"),
        ({"concepts": 0, "neurons": 0, "repeats": 0}, "0 features"),
        ({"concepts": -1}, "concepts=-1"),
        ({"raters": ()}, "at least one"),
        ({"raters": ("ann", "ann ")}, "each name once"),
        ({"raters": ("a\nb",)}, "printable"),
        ({"panels": ("map",)}, "'map' is no panel"),
        ({"panels": ()}, "nothing to rate"),
        ({"panels": ("cells", "samples")}, "belong to attribution"),
        ({"metadata": ("organ",)}, "no column 'organ'"),
        ({"n_genes": 41}, "fewer than 41 genes"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make(**settings)


@pytest.mark.parametrize("name", ["", "../up", "a b", "a" * 65, ".hidden", "a/b"])
def test_a_name_that_is_no_folders_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a study"):
        study_draw.make(Documents(), name=name, **DRAW)


def test_panels_are_those_the_run_has() -> None:
    drawn, content, _ = make(Documents(gene_info=False, samples=False))
    assert drawn.panels == ("attribution", "cells")
    assert {frozenset(each) for each in content.values()} == {
        frozenset(("genes", "average", "cells"))
    }
    assert not any("description" in gene for each in content.values() for gene in each["genes"])
    for panel in ("samples", "descriptions"):
        with pytest.raises(InputError, match=f"the panel '{panel}' cannot be shown"):
            make(Documents(gene_info=False, samples=False), panels=("attribution", panel))


def test_a_run_without_attribution_or_neurons_says_which_command_makes_them() -> None:
    bare = Documents()
    bare._attribution = lambda feature: {"absent": absent.RUN["attribution"]}
    with pytest.raises(
        InputError, match=r"'attribution' cannot be shown.*`sae-jax concepts --h5ad"
    ):
        make(bare)
    documents = Documents()
    table = {"names": documents.names[:N_CONCEPTS], "columns": {}}

    def without_neurons(key: str) -> dict[str, Any]:
        return table if key == "features" else documents(key)

    wanted = r"the run has no neurons: give --neurons=0.*`sae-jax concepts --h5ad"
    with pytest.raises(InputError, match=wanted):
        make(without_neurons)
    assert len(make(without_neurons, neurons=0)[0].items) == 12


def test_a_run_without_the_cells_activations_says_so() -> None:
    drawn, content, _ = make(Documents(cells=False))
    assert drawn.panels == ("attribution", "samples", "descriptions")
    assert not any("cells" in each for each in content.values())
    with pytest.raises(InputError, match=r"'cells' cannot be shown.*features\.h5ad.*--resume"):
        make(Documents(cells=False), panels=("attribution", "cells"))


def test_a_projection_equals_a_plain_loop() -> None:
    documents = Documents()
    panels, metadata = study_panels.PANELS, ("celltype", "n_counts")
    shown = study_panels.project(
        documents, 2, panels, metadata, n_genes=10, links=lambda gene: ["of", gene]
    )
    found = documents("feature/2/attribution")

    def bars(values: np.ndarray) -> list[tuple[str, float]]:
        best = sorted(range(len(values)), key=lambda gene: -values[gene])[:10]
        largest = max(abs(values[g]) for g in best)
        return [(found["names"][g], round(values[g] / largest, 3) + 0.0) for g in best]

    def named(rows: list) -> list[tuple[str, float]]:
        return [(shown["genes"][gene]["name"], value) for gene, value in rows]

    assert named(shown["average"]) == bars(documents.values[2])
    assert shown["titles"][2:4] == ["cell 1, counterfactual 3", "cell 2, counterfactual 1"]
    study_panels.level([shown])  # alone, an item keeps all genes of its lists
    for row, expected in zip(shown["samples"], documents.samples_of[2], strict=True):
        assert named(row["bars"]) == bars(expected)
    for gene in shown["genes"]:
        place = found["names"].index(gene["name"])
        assert gene["description"] == found["descriptions"][place]
        assert gene["links"] == ["of", place]
    rows = documents("feature/2/page")["bands"][0]["rows"]
    assert shown["cells"] == [[row["metadata"]["celltype"], "1235"] for row in rows[:10]]


def test_nothing_but_content_tells_items_apart() -> None:
    _, content, _ = make()
    sizes = {
        (len(c["genes"]), len(c["average"]), len(c["samples"]), len(each["bars"]), len(c["cells"]))
        for c in content.values()
        for each in c["samples"]
    }
    assert len(sizes) == 1
    assert {each["average"][0][1] for each in content.values()} == {1.0}
    assert len({tuple(each["title"] for each in c["samples"]) for c in content.values()}) == 1
    _, rescaled, _ = make(Documents(scale=1000.0))
    assert rescaled == content
    text = json.dumps(content).lower()
    assert not [secret for secret in SECRETS if secret in text]


def test_samples_are_cut_to_what_every_item_has() -> None:
    drawn, content, _ = make(concepts=N_CONCEPTS - 1, repeats=0)  # concept 0 has five samples
    assert drawn.n_samples == 5
    assert {len(each["samples"]) for each in content.values()} == {5}
    items = [
        {"genes": ["g"], "average": [[0, 1.0]], "samples": np.ones((2, 1)), "titles": titles}
        for titles in (["a", "b"], ["a", "c"])
    ]
    assert study_panels.level(items) == 2
    assert {tuple(each["title"] for each in item["samples"]) for item in items} == {
        ("sample 1", "sample 2")
    }


def test_items_name_as_many_genes_as_the_one_with_the_fewest() -> None:
    """Lists of two of six genes; the item with the fewest names three, the other all of its six."""
    few = np.array([[9.0, 8, 0, 0, 0, 0], [9, 0, 8, 0, 0, 0]])[:, :3]
    many = np.array([[0, 0, 90.0, 45, 0, 0], [1, 0, 3, 2, 20, 18]])
    items = [
        {"genes": list("abcdef")[: values.shape[1]], "average": [[0, 1.0], [1, 0.5]],
         "samples": values, "titles": ["x", "y"]}
        for values in (few, many)
    ]  # fmt: skip
    assert study_panels.level(items) == 2
    assert items[0]["genes"] == ["a", "b", "c"]
    # a and b are the average's; of c (1), d (.5), e (1), f (.9) the first of the strongest stays.
    assert items[1]["genes"] == ["a", "b", "c"]
    assert items[1]["average"] == [[0, 1.0], [1, 0.5]]
    assert [each["bars"] for each in items[1]["samples"]] == [
        [[2, 1.0], [0, 0.0]],  # the second of the three in the order of the average
        [[2, 1.0], [0, 0.333]],
    ]


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_number_of_genes_tells_no_kind(seed: int) -> None:
    """Concepts whose samples differ, and neurons whose samples are all alike."""
    documents = Documents()
    documents.samples_of[N_CONCEPTS:, 1:] = documents.samples_of[N_CONCEPTS:, :1]
    _, content, _ = make(documents, seed=seed, repeats=0)
    assert len({len(each["genes"]) for each in content.values()}) == 1
    for each in content.values():
        lists = [each["average"], *(sample["bars"] for sample in each["samples"])]
        assert {len(row) for row in lists} == {10}
        named = {gene for row in lists for gene, _ in row}
        assert named == set(range(len(each["genes"])))  # none is sent that is not listed


def test_a_study_on_the_disk_is_the_one_that_was_drawn(tmp_path: Path) -> None:
    tokens = study.write(tmp_path, *make())
    found = study.load(tmp_path, "first")
    drawn, content, _ = make()
    assert (found.items, found.questions) == (drawn.items, drawn.questions)
    assert study.content(tmp_path, found) == content
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [token for _, token in tokens if token.encode() in written]
    home = tmp_path / "studies" / "first"
    assert home.stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="there is a study 'first'"):
        study.write(tmp_path, *make())
    with pytest.raises(InputError, match=r"no study 'second' in .*: there are first"):
        study.load(tmp_path, "second")
    (ann, token), _ = tokens
    assert study.rater_of_token(tmp_path, token) == (found, found.rater["ann"])
    fresh = study.new_token(tmp_path, "first", ann)
    assert study.rater_of_token(tmp_path, token) is None
    assert study.rater_of_token(tmp_path, fresh)[1].name == "ann"
    for nobody in ("", "x", "\ud800", token[:-1]):
        assert study.rater_of_token(tmp_path, nobody) is None


def test_what_a_killed_program_left_goes_when_the_next_study_is_made(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from sae_jax import files; from analysis.browser import study\n"
        "with study._making(pathlib.Path(sys.argv[1])), "
        "files.write_aside(pathlib.Path(sys.argv[1]) / 'first') as fresh:\n"
        " fresh.mkdir(); print('here', flush=True); os.kill(os.getpid(), 9)"
    )
    home = tmp_path / "studies"
    killed = subprocess.run([sys.executable, "-c", script, str(home)], check=False)
    assert killed.returncode == -9
    assert list(home.glob(".writing-*"))
    study.write(tmp_path, *make())
    assert not list(home.glob(".writing-*"))


def test_two_programs_make_studies_one_after_the_other(tmp_path: Path) -> None:
    """The later one waits: it would remove what the other is writing."""
    done: list[str] = []

    def other() -> None:
        study.write(tmp_path, *make())
        done.append("other")

    with study._making(tmp_path / "studies"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.5)
        assert not done
        assert not (tmp_path / "studies" / "first").exists()
    thread.join()
    assert done == ["other"]


def test_answers_that_were_restored_are_those_that_are_used(tmp_path: Path) -> None:
    study.write(tmp_path, *make())
    found = study.load(tmp_path, "first")
    home, number = tmp_path / "studies" / "first", found.items[0].number
    before = study.open_answers(tmp_path, found)
    assert study.open_answers(tmp_path, found) is before
    copy = home / "copy"
    shutil.copy(home / "answers.sqlite", copy)
    before.of("ann").save(number, {"tissue": "yes"}, 0, "save-a")
    for log in home.glob("answers.sqlite-*"):
        log.unlink()
    copy.rename(home / "answers.sqlite")
    assert study.open_answers(tmp_path, found).history() == []
    (home / "answers.sqlite").unlink()
    with pytest.raises(InputError, match="no file of answers"):
        study.open_answers(tmp_path, found)


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    study.write(tmp_path, *make())
    home = tmp_path / "studies" / "first"
    found = study.load(tmp_path, "first")
    with (home / "panels.json").open("a") as file:
        file.write(" ")
    with pytest.raises(InputError, match="not what this study was made with"):
        study.content(tmp_path, found)
    design = json.loads((home / "study.json").read_text())
    for change, told in (
        ({"schema": 2}, "version 2"),
        ({"raters": [design["raters"][0] | {"order": ["1"]}]}, "not of its items"),
        ({"items": "none"}, "no study's file"),
    ):
        (home / "study.json").write_text(json.dumps(design | change))
        with pytest.raises(InputError, match=told):
            study.load(tmp_path, "first")


def test_an_answer_is_one_that_the_form_can_send() -> None:
    drawn, _, _ = make()
    whole = {"cell_type": "yes", "cell_type_words": "B", "tissue": "no", "process": "unclear"}
    found = drawn.check_answer(whole)
    assert found == {**whole, "tissue_words": "", "process_words": ""}
    assert drawn.is_complete(found)
    assert not drawn.is_complete(drawn.check_answer({"cell_type": "yes"}))
    for wrong in (
        None, [], {"kind": "concept"}, {"tissue": "unclear"}, {"tissue_words": 3},
        {"tissue_words": "x" * 5001}, {"tissue_words": "\ud800"}, {"tissue": ["no"]},
    ):  # fmt: skip
        with pytest.raises(InputError):
            drawn.check_answer(wrong)


def test_a_study_is_drawn_from_a_real_run(tmp_path: Path) -> None:
    from analysis.browser import synthetic
    from analysis.browser.run import Run

    folder = synthetic.write(
        tmp_path / "run", n_features=30, n_cells=300, k=20, n_genes=120, n_terms=5, attributed=30
    )
    run = Run.open([folder], tmp_path / "state")
    try:
        (rater, token), *_ = study.create(
            tmp_path, run, "real", concepts=5, neurons=0, repeats=1, raters=["ann"], n_genes=5
        )
        found = study.load(tmp_path, "real")
        assert study.rater_of_token(tmp_path, token)[1].name == rater == "ann"
        assert found.run == run.fingerprint
        assert "attribution" in found.panels
        assert len(study.content(tmp_path, found)) == 5
    finally:
        run.close()

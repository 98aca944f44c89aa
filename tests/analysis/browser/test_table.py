"""The table of features: sorted, filtered and paged as pandas and matplotlib do it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon

from analysis.browser import table
from analysis.browser.run import Run
from sae_jax import InputError
from tests.analysis.browser import run_cases


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("table")
    folder = run_cases.lens(root / "run")
    features = pd.read_parquet(folder / "features.parquet")
    features["remark"] = [None, "b", "A", "a", "B10", "B9"] * 16
    features["sparse"] = np.where(np.arange(96) % 5, np.nan, np.arange(96) % 7)
    features["sometimes"] = pd.array([True, False, None] * 32, "boolean")
    features.to_parquet(folder / "features.parquet")
    return Run.open([folder], root / "state")


def rows(run: Run, **parameters: str) -> list[int]:
    found = table.query(run, {"size": "1000", **parameters})
    assert found["total"] == len(found["rows"])
    json.dumps(found, allow_nan=False)
    return found["rows"]


NUMBERS = ("auroc", "sparse", "density", "n_terms", "term_q")


@settings(max_examples=40)
@given(
    column=st.sampled_from(NUMBERS), desc=st.booleans(), page=st.integers(0, 20),
    size=st.integers(1, 30), bound=st.sampled_from(NUMBERS), low=st.floats(0, 1),
)  # fmt: skip
def test_pages_are_those_of_pandas(
    run: Run, column: str, desc: bool, page: int, size: int, bound: str, low: float
) -> None:
    frame = run.features.reset_index(drop=True)
    kept = frame[frame[bound] >= low]
    kept = kept.sort_values(column, ascending=not desc, kind="stable", na_position="last")
    found = table.query(
        run,
        {"sort": column, "desc": str(int(desc)), "page": str(page), "size": str(size),
         f"{bound}_min": repr(low)},
    )  # fmt: skip
    assert found["total"] == len(kept)
    assert found["rows"] == kept.index[page * size : (page + 1) * size].tolist()
    for name, values in found["values"].items():
        truth = run.names if name == "name" else frame[name].astype(object).tolist()
        told = [None if pd.isna(truth[i]) else truth[i] for i in found["rows"]]
        assert values == told, name


def test_texts_sort_as_one_reads_them(run: Run) -> None:
    remarks = run.features["remark"].tolist()
    for desc in ("0", "1"):
        found = [remarks[i] for i in rows(run, sort="remark", desc=desc)]
        groups = ["A", "a", "b", "B9", "B10"]
        known = [groups.index(remark) if remark != "a" else 0 for remark in found[:80]]
        assert known == sorted(known, reverse=desc == "1")
        assert found[80:] == [None] * 16
    assert [run.names[i] for i in rows(run, sort="name")] == [f"feature_{i}" for i in range(96)]
    ties = rows(run, sort="remark", remark="A")
    assert ties == sorted(ties)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=3, max_size=8, unique=True
    ),
    st.integers(0, 2**16),
)  # fmt: skip
def test_the_lasso_is_matplotlibs(corners: list[tuple[float, float]], seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(200, 2)) * 2
    polygon = np.asarray(corners)
    truth = np.zeros(200, bool)
    for k in range(1, len(corners) - 1):  # the even-odd rule, triangle by triangle
        truth ^= Polygon(polygon[[0, k, k + 1]]).contains_points(points)
    found = table.within(points, polygon)
    assert (found != truth).mean() < 0.02  # points on an edge, to rounding


def test_a_square_and_what_has_no_place(run: Run) -> None:
    square = "-2,-3;4,-3;4,3;-2,3"
    x, y = run.feature_map.T
    inside = (x > -2) & (x < 4) & (y > -3) & (y < 3)
    assert rows(run, lasso=square) == np.flatnonzero(inside).tolist()
    assert rows(run, lasso="-1e9,-1e9;1e9,-1e9;1e9,1e9;-1e9,1e9") == np.flatnonzero(
        ~np.isnan(x)
    ).tolist()  # fmt: skip


def test_words_light_up_features_by_their_terms(run: Run) -> None:
    terms = pd.Series(run.terms).str.lower()
    carried = run.feature_terms.toarray()
    for words in ("process 1", "PROCESS 7 , process 12", "nothing", "nothing,cells"):
        chosen = [any(w.strip().lower() in t for w in words.split(",")) for t in terms]
        assert rows(run, words=words) == np.flatnonzero(carried[:, chosen].any(axis=1)).tolist()
    assert rows(run, words=",") == []
    assert rows(run, words="process 1," * 15) == rows(run, words="process 1")
    assert rows(run, q="x" * 200) == []
    assert rows(run, lasso="1,2;" * 2000) == []


def test_filters_hold_together(run: Run) -> None:
    frame = run.features.reset_index(drop=True)
    label = frame["label"].iloc[0]
    truth = frame[(frame["label"] == label) & frame["technical"] & (frame["n_active"] <= 60)]
    assert rows(run, label=label, technical="1", n_active_max="60") == truth.index.tolist()
    assert rows(run, technical="0", q="") == frame[~frame["technical"]].index.tolist()
    gene = frame["top_genes"].iloc[3].split(", ")[1]
    holding = frame["top_genes"].str.contains(gene) | frame["label"].str.contains(gene)
    assert rows(run, q=gene.lower()) == frame[holding].index.tolist()
    assert rows(run, q="feature_1") == [1, *range(10, 20)]
    assert rows(run, name="feature_7") == [7]
    assert rows(run, sparse="3") == frame[frame["sparse"] == 3].index.tolist()
    assert rows(run, sometimes="1") == list(range(0, 96, 3))
    assert rows(run, sometimes="false") == list(range(1, 96, 3))
    n = str(frame["n_active"].iloc[0])
    same = frame[frame["n_active"] == int(n)].index.tolist()
    assert rows(run, n_active_min=n, n_active_max=n) == rows(run, n_active=n) == same
    assert len(rows(run, sparse_min="-inf")) == frame["sparse"].notna().sum()


def test_numbers_alone_of_all_rows(run: Run) -> None:
    found = table.query(run, {"values": "none", "size": "3", "sort": "auroc", "desc": "1"})
    assert found["values"] == {}
    assert found["rows"] == rows(run, sort="auroc", desc="1")


@pytest.mark.parametrize(
    "parameters",
    [
        {"sort": "nothing"}, {"page": "-1"}, {"page": "1.5"}, {"size": "0"}, {"size": "x" * 99},
        {"page": "9" * 10}, {"nothing": "1"}, {"auroc_min": "nan"}, {"auroc_max": "x"},
        {"label_min": "3"}, {"technical": "perhaps"}, {"lasso": "1,2;3,4"}, {"lasso": "1,2;3;4,5"},
        {"lasso": "a,b;c,d;e,f"}, {"q": "x" * 201}, {"words": "x" * 201},
        {"words": ",".join("abcdefghijklmnopqrstu")}, {"lasso": "1,2;" * 2001},
        {"auroc": "high"}, {"page": "٣"}, {"__class__": "x"},
    ],
)  # fmt: skip
def test_what_is_refused(run: Run, parameters: dict[str, str]) -> None:
    with pytest.raises(InputError):
        table.query(run, parameters)


def test_a_run_without_a_map(run: Run, tmp_path: Path) -> None:
    folder = run_cases.lens(tmp_path / "run")
    (folder / "feature_space.parquet").unlink()
    other = Run.open([folder], tmp_path / "state")
    with pytest.raises(InputError, match="no feature map"):
        table.query(other, {"lasso": "0,0;1,0;1,1"})

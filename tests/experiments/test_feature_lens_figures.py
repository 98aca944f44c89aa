"""Which figures are drawn of what is given; what they show is tested where they are made."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from analysis import feature_space
from experiments import feature_lens_figures

ALWAYS = {"features", "activity", "term_counts", "embedding", "cells"}
OF_LABELS = {"activations", "local_features", "firing"}
MAPPED = {"feature_space", "feature_space_terms", "highlighted", "probing"}
NAMES = [["T cell", "NK cell"], ["B cell"], [], ["T cell"]]
LABELS = pd.Series(pd.Categorical(["x", "y"] * 10), name="kind")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Four features, named for `NAMES`; umap-learn is not installed."""
    monkeypatch.setitem(sys.modules, "umap", None)
    return pd.DataFrame(
        {
            "n_active": [9, 8, 7, 6], "mean_activation": [0.1, 0.4, 0.3, 0.2],
            "max_activation": 1.0,
            "kind_text": pd.Categorical(["local", "global", "global", "local"]),
            "local_label_text": pd.Categorical(["x", None, None, "y"]),
            "best_label": pd.Categorical(["x", "y", "x", "y"]),
            "best_label_auroc": [0.7, 0.9, 0.8, 0.6],
            "best_term": pd.Categorical(["T cell", "B cell", None, "T cell"]),
        },
        index=pd.Index([f"feature_{i}" for i in (3, 5, 6, 8)], name="feature"),
    )  # fmt: skip


def draw(out: Path, table: pd.DataFrame, **given: object) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    z = sparse.csr_matrix(rng.random((20, 4)) * (rng.random((20, 4)) < 0.5))
    annotated = feature_space.from_names(NAMES)
    return feature_lens_figures.draw(
        out, x=rng.normal(size=(20, 3)), z=z, table=table, annotated=annotated, **given
    )


def test_without_labels_map_or_history(tmp_path: Path, table: pd.DataFrame) -> None:
    of_labels = [name for name in table if "label" in name or "kind" in name]
    pictures = draw(tmp_path, table.drop(columns=of_labels), labels=None, coordinates=None)
    assert {path.stem for path in pictures.values()} == ALWAYS


def test_with_everything_in_the_order_of_the_paper(tmp_path: Path, table: pd.DataFrame) -> None:
    history = pd.DataFrame(
        {"member": 0, "epoch": [0, 1], "loss": [2.0, 1.0], "validation_loss": [2.0, 1.5]}
    )
    pictures = draw(
        tmp_path, table, labels=LABELS, coordinates=np.arange(8.0).reshape(4, 2), history=history,
        words=["T"], highlight=["feature_3", "feature_5"], category={"T cell": "BP"},
        top_terms=feature_space.from_names([["cells"]] * 3),
    )  # fmt: skip
    order = [path.stem for path in pictures.values()]
    assert set(order) == ALWAYS | OF_LABELS | MAPPED | {"training"}
    assert order.index("features") < order.index("training") < order.index("embedding")
    for path in pictures.values():
        assert path.parent == tmp_path / "figures"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".pdf").is_file()


def test_panels_are_of_the_best_feature_of_each_label_or_of_the_strongest(
    table: pd.DataFrame,
) -> None:
    telling = pd.DataFrame({"label": list("xyz"), "feature": [2, 1, 2], "auroc": [0.7, 0.9, 0.8]})
    assert feature_lens_figures.best_features(table, telling) == ["feature_5", "feature_6"]
    strongest = ["feature_5", "feature_6", "feature_8", "feature_3"]
    assert feature_lens_figures.best_features(table, None) == strongest
    assert feature_lens_figures.title("feature_5", table) == "5: B cell"
    assert feature_lens_figures.title("feature_6", table) == "feature_6"

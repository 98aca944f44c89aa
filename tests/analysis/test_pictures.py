from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from scipy import sparse

from analysis import plots, report


def test_page_escapes_what_users_wrote_and_embeds_pictures(tmp_path: Path) -> None:
    results = pd.DataFrame(
        {"name": ["a", "b"], "n_latents": [10, 10], "validation_l0": [1.0, 2.0],
         "validation_r2": [0.9, -3.0], "k": pd.array([1, None], dtype="Int64")}
    )  # fmt: skip
    picture = plots.save(plots.frontier(results, 0, 0.1, 0.8), tmp_path, "frontier")
    assert imread(picture).shape[0] > 400
    assert (tmp_path / "frontier.pdf").read_bytes().startswith(b"%PDF")
    pieces = [
        report.paragraph("<script>alert(1)</script>"),
        report.items(["<b>"]),
        report.table(pd.DataFrame({"<i>": ["<img src=x>"], "n": [1e-9]})),
        report.table(results),
        report.picture(picture, 'a "caption"'),
    ]
    report.write(tmp_path / "page.html", "<title>", [("<h>", pieces)])
    page = (tmp_path / "page.html").read_text()
    for raw in ("<script>", "<b>", "<i>", "<img src=x>", "<h>", 'alt="a "', "NA&gt;", "NaN"):
        assert raw not in page
    assert page.count("data:image/png;base64,") == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_cells_figure_has_a_panel_a_feature(labelled: bool) -> None:
    rng = np.random.default_rng(0)
    z = sparse.random_array((50, 3), density=0.3, rng=rng, format="csr")
    z[:, [2]] = 0  # a silent feature must not break the figure
    labels = pd.Series(rng.choice(["x", "y"], 50), name="kind").astype("category")
    figure = plots.cells_by_feature(
        rng.normal(size=(50, 2)), "UMAP", z, ["one", "two", "none"], labels if labelled else None
    )
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == (["kind"] if labelled else []) + ["one", "two", "none"]


def test_plane_is_two_coordinates_and_repeats() -> None:
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    first, name = plots.plane(x)
    assert first.shape == (40, 2)
    assert name in ("UMAP", "PC")
    np.testing.assert_array_equal(first, plots.plane(x)[0])

"""What takes most of a program's time and is tested on its own: UMAP's compilation, figures."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import sparse
from sklearn.decomposition import PCA

from analysis import plots


class Plane:
    """Stands for umap.UMAP: the first two principal components."""

    def __init__(self, **_: Any) -> None:
        pass

    def fit_transform(self, x: Any) -> np.ndarray:
        x = x.toarray() if sparse.issparse(x) else np.asarray(x)
        return PCA(2, random_state=0).fit_transform(x)


def save(figure: Figure, folder: Path, name: str) -> Path:
    """As `plots.save`, with few pixels and without the search for a layout."""
    folder.mkdir(exist_ok=True)
    figure.set_layout_engine("none")
    figure.savefig(folder / f"{name}.png", dpi=20)
    return folder / f"{name}.png"


def use(patch: pytest.MonkeyPatch) -> None:
    """Both, while the patch lasts."""
    patch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Plane))
    patch.setattr(plots, "save", save)

import numpy as np
import pandas as pd
import pytest

from analysis import token_features as tf
from sae_jax.errors import InputError

N_CELLS, N_GENES = 6, 10


class Halves:
    """Two features of a row x [1]: its positive and its negative part."""

    def encode(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(np.concatenate([x, -x], axis=1), 0)


def tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of cells 0 .. 4 and genes 0 .. 7, and one of gene 8: one cell and one gene have none."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 1)).astype(np.float32)
    cell, gene = rng.integers(0, N_CELLS - 1, 90), rng.integers(0, N_GENES - 2, 90)
    x[0], gene[0] = 50, 8
    x[gene == 4] = np.abs(x[gene == 4]) + 3
    return x, cell, gene


def blocks(size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    x, cell, gene = tokens()
    return [(x[i : i + size], cell[i : i + size], gene[i : i + size]) for i in range(0, 90, size)]


@pytest.mark.parametrize("size", [7, 90])
def test_means_by_cell_and_by_gene_whatever_the_blocks(size: int) -> None:
    x, cell, gene = tokens()
    found = tf.pool(Halves(), blocks(size), N_CELLS, N_GENES)
    z = pd.DataFrame(Halves().encode(x)).astype(np.float64)
    for means, counts, codes, n in (
        (found.cells, found.n_cell, cell, N_CELLS), (found.genes, found.n_gene, gene, N_GENES),
    ):  # fmt: skip
        expected = z.groupby(codes).mean().reindex(range(n))
        np.testing.assert_allclose(means, expected, rtol=1e-12)
        assert counts.tolist() == [int((codes == i).sum()) for i in range(n)]
    assert np.isnan(found.cells[-1]).all()
    np.testing.assert_array_equal(found.active, (z > 0).sum())
    np.testing.assert_allclose(found.density, (z > 0).mean())


def test_the_tokens_that_a_feature_is_most_active_on() -> None:
    x, _, gene = tokens()
    found = tf.pool(Halves(), blocks(20), N_CELLS, N_GENES)
    names = np.asarray([f"G{i}" for i in range(N_GENES)])
    least = 8
    table = tf.top_tokens(found, names, n=3, least=least)
    z = Halves().encode(x).astype(np.float64)
    assert table["feature"].unique().tolist() == [0, 1]
    for feature, rows in table.groupby("feature"):
        means = pd.Series(z[:, feature]).groupby(gene).agg(["mean", "size", "sum"])
        means = means[(means["size"] >= least) & (means["mean"] > 0)]
        means = means.sort_values("mean", ascending=False).head(3)
        assert rows["gene"].tolist() == [f"G{i}" for i in means.index]
        assert rows["tokens"].tolist() == means["size"].tolist()
        np.testing.assert_allclose(rows["mean"], means["mean"])
        np.testing.assert_allclose(rows["share"], means["sum"] / z[:, feature].sum())
        assert rows["rank"].tolist() == list(range(len(rows)))
    assert table[table["feature"] == 0]["gene"].iloc[0] == "G4"
    assert tf.top_tokens(found, names, n=3, least=1)["gene"].iloc[0] == "G8"
    assert "G4" not in set(table[table["feature"] == 1]["gene"])


def test_no_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="no tokens"):
        tf.pool(Halves(), [], N_CELLS, N_GENES)

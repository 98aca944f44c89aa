import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats

from analysis import gene_associations as ga
from sae_jax.errors import InputError


def example(seed: int = 0, cells: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Activations with a dead and a constant feature; expression with an absent and a flat gene."""
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.normal(size=(cells, 7)), 0)
    z[:, 2], z[:, 5] = 0, 1.7
    x = np.log1p(rng.poisson(0.8, (cells, 30))).astype(np.float64)
    x[:, 3], x[:, 11] = 0, 0.4
    x[:, 8] += z[:, 0]
    return z, x


def all_of(*args: object, **kwargs: object) -> np.ndarray:
    return np.concatenate([r for _, r in ga.correlations(*args, **kwargs)])


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_array])
@pytest.mark.parametrize("signed", [False, True])
def test_correlations_equal_scipy(form: type, signed: bool) -> None:
    z, x = example()
    if signed:
        z = z - 3
        z[:, 2] = -3
    r = all_of(form(z), form(x), block=3)
    for feature in range(z.shape[1]):
        for gene in range(x.shape[1]):
            if feature in (2, 5) or gene in (3, 11):
                assert np.isnan(r[feature, gene])
            else:
                expected = stats.pearsonr(z[:, feature], x[:, gene]).statistic
                assert r[feature, gene] == pytest.approx(expected, abs=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    z, x = example()
    np.testing.assert_allclose(all_of(z + 1e6, x), all_of(z, x), atol=1e-8)


@given(st.permutations(range(40)), st.integers(1, 9))
def test_neither_blocks_nor_the_order_of_cells_matter(order: list[int], block: int) -> None:
    z, x = example()
    found, other = ga.top_genes(z, x, 6), ga.top_genes(z[order], x[order], 6, block=block)
    for side in ("up", "down"):
        np.testing.assert_array_equal(found[side].genes, other[side].genes)
        np.testing.assert_allclose(found[side].r, other[side].r, atol=1e-12)


def test_top_genes_are_the_strongest_of_each_sign() -> None:
    z, x = example()
    x[:, 20] = x[:, 8]  # a tie: the first gene comes first
    other_z, other_x = example(1, 25)
    found = ga.top_genes(z, x, 12, held_out=(other_z, other_x), block=4)
    r, beside = all_of(z, x), all_of(other_z, other_x)
    for side, sign in {"up": 1, "down": -1}.items():
        selected = found[side].selected(x.shape[1]).toarray()
        for feature in range(z.shape[1]):
            ranked = sorted(
                (round(-sign * value, 12), gene)
                for gene, value in enumerate(r[feature]) if sign * value > 0
            )[:12]  # fmt: skip
            genes = [gene for _, gene in ranked]
            at = found[side].genes[feature]
            assert at[at >= 0].tolist() == genes
            assert (at[len(genes) :] == -1).all()
            np.testing.assert_allclose(found[side].r[feature, : len(genes)], r[feature, genes])
            held_out = found[side].r_held_out[feature, : len(genes)]
            np.testing.assert_allclose(held_out, beside[feature, genes])
            assert np.isnan(found[side].r[feature, len(genes) :]).all()
            assert np.flatnonzero(selected[feature]).tolist() == sorted(genes)
    assert found["up"].genes[0, :2].tolist() == [8, 20]
    assert (found["up"].genes[[2, 5]] == -1).all()
    assert np.isnan(ga.top_genes(z, x, 3)["up"].r_held_out).all()


def test_presence_and_genes_that_are_expressed() -> None:
    x = sparse.csr_matrix(np.array([[0, 2.5, 0], [1, 3, 0], [0, 0, 9]]))
    x.data[-1] = 0.0  # stored, and still not expressed
    assert ga.presence(x).toarray().tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert x.nnz == 4
    assert ga.expressed(x, 2).tolist() == [1]
    assert ga.expressed(x, 1).tolist() == [0, 1]


def test_what_does_not_fit_is_refused() -> None:
    z, x = example()
    for some, other, message in (
        (z[:9], x, "the same cells"),
        (z[:2], x[:2], "three at least"),
        (np.where(z > 1, np.nan, z), x, "activations hold NaN"),
        (z, np.where(x > 1, np.inf, x), "expression hold NaN or infinite"),
    ):
        with pytest.raises(InputError, match=message):
            ga.top_genes(some, other)
    with pytest.raises(InputError, match="n=0"):
        ga.top_genes(z, x, 0)
    with pytest.raises(InputError, match="other features or genes"):
        ga.top_genes(z, x, held_out=(z[:, :3], x))

import numpy as np
import pytest
from scipy import sparse, stats
from statsmodels.stats.multitest import multipletests

from analysis import gene_sets, markers
from sae_jax.errors import InputError

GENES = [f"G{i}" for i in range(60)]
SETS = {"first": GENES[:6], "second": GENES[4:12], "third": GENES[20:23]}


def some_sets() -> gene_sets.GeneSets:
    return gene_sets.from_sets(SETS, GENES, 2, 60)


def selections() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {side: rng.random((5, 60)) < 0.2 for side in ("up", "down")}
    found["up"][0] = np.arange(60) < 6  # the first set itself
    found["up"][3] = False
    return found


def fisher(selected: np.ndarray, universe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SciPy's, in loops: hits and p."""
    hits, p = np.zeros((2, len(selected), len(SETS)))
    for feature, row in enumerate(selected):
        for at, members in enumerate(SETS.values()):
            inside = np.isin(GENES, members)[universe]
            chosen = row[universe]
            table = [[(chosen & inside).sum(), (chosen & ~inside).sum()],
                     [(~chosen & inside).sum(), (~chosen & ~inside).sum()]]  # fmt: skip
            hits[feature, at] = table[0][0]
            p[feature, at] = stats.fisher_exact(table, "greater").pvalue
    return hits, p


@pytest.mark.parametrize("universe", markers.UNIVERSES)
def test_fisher_and_the_correction_over_features_and_sets(universe: str) -> None:
    selected = selections()
    inside = np.ones(60, bool)
    if universe == "markers":
        inside = np.isin(GENES, [gene for members in SETS.values() for gene in members])
    found = markers.mark(sparse.csr_array(selected["up"]), some_sets(), universe)
    hits, p = fisher(selected["up"], inside)
    np.testing.assert_array_equal(found.hits, hits)
    np.testing.assert_allclose(found.p, p, rtol=1e-10)
    q = multipletests(p.ravel(), method="fdr_bh")[1].reshape(p.shape)
    np.testing.assert_allclose(found.q, q, rtol=1e-10)
    np.testing.assert_array_equal(found.annotated, (q < 0.05).any(axis=1))
    assert found.annotated[0]
    assert found.p[3].tolist() == [1, 1, 1]
    table = found.table()
    assert len(table) == (q < 0.05).sum()
    assert table.iloc[0].drop(["p", "q", "effect"]).tolist() == [0, "first", 6]
    assert found.counts().to_dict() == dict(zip(SETS, (q < 0.05).sum(axis=0), strict=True))


def test_two_sides_are_one_family() -> None:
    selected = selections()
    found = markers.mark_sides(selected, some_sets())
    p = np.stack([fisher(selected[side], np.ones(60, bool))[1] for side in ("up", "down")])
    q = multipletests(p.ravel(), method="fdr_bh")[1].reshape(p.shape)
    for side, expected in zip(("up", "down"), q, strict=True):
        np.testing.assert_allclose(found[side].q, expected, rtol=1e-10)


def test_the_universe_of_markers_alone_finds_less_in_the_same_hits() -> None:
    """With three of four chosen markers hit, chance is small among all genes, not among markers."""
    selected = np.zeros((1, 60), bool)
    selected[0, [0, 1, 2, 21, 30, 31, 32, 33]] = True
    p = {name: markers.mark(selected, some_sets(), name).p[0, 0] for name in markers.UNIVERSES}
    assert p["measured"] == pytest.approx(stats.hypergeom.sf(2, 60, 6, 8))
    assert p["markers"] == pytest.approx(stats.hypergeom.sf(2, 15, 6, 4))
    with pytest.raises(InputError, match="universe='all'"):
        markers.mark(selected, some_sets(), "all")


def test_the_papers_sets_are_among_those_packaged() -> None:
    genes = ["CD79A", "MS4A1", "CD3D", "CD3E", "CD68", "CD14", "NKG7", "GNLY", "S100A8", "S100A9"]
    genes += ["HBB", "HBA1", "JCHAIN", "IGKC", "HLA-DRA", "CD74", "LCK", "ZAP70", "TLR4", "MYD88"]
    sets = markers.of_paper(gene_sets.load(gene_sets.EMBEDDED, genes, 2, 2000))
    members = {
        name: {genes[i] for i in sets.membership[[at]].indices}
        for at, name in enumerate(sets.names)
    }
    assert members["B cell markers"] == {"CD79A", "MS4A1"}
    assert members["Monocyte markers"] == {"CD14", "S100A8", "S100A9"}
    assert members["Erythrocyte markers"] == {"HBB", "HBA1"}
    assert {"Antigen presentation", "TCR signalling", "Innate immunity"} <= set(members)
    with pytest.raises(InputError, match="none of the paper's marker sets"):
        markers.of_paper(some_sets())

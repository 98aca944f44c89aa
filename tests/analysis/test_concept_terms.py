"""Strength of annotations and Table 6, against loops over sets as the paper writes them."""

import numpy as np
import pytest
from scipy import sparse

from analysis import concept_terms
from sae_jax import InputError


def test_strengths_by_the_best_term() -> None:
    p = np.array([[1e-6, 0.5], [5e-5, 1], [6e-5, 1], [5e-3, 1], [6e-3, 1], [np.nan, 1e-4]])
    found = concept_terms.strengths(np.vstack([p, [[np.nan, np.nan]]]))
    assert found.tolist() == ["strong", "strong", "weak", "weak", "none", "weak", "none"]
    table = concept_terms.shares({"concepts": found, "neurons": found[:2]})
    assert table.loc["concepts"].to_dict() == pytest.approx(
        {"strong": 2 / 7, "weak": 3 / 7, "none": 2 / 7, "n": 7}
    )
    assert table.loc["neurons", "strong"] == 1
    with pytest.raises(InputError, match="no list of neurons"):
        concept_terms.shares({"neurons": []})


def test_table_6_is_the_paper_s_sets() -> None:
    rng = np.random.default_rng(0)
    concepts, terms, genes = 40, 12, 30
    membership = rng.random((terms, genes)) < 0.15
    fold, scores = rng.normal(size=(2, concepts, genes))
    fold[rng.random(fold.shape) < 0.1] = np.nan
    found = {name: rng.random((concepts, terms)) < 0.12 for name in ("attribution", "dge")}
    table = concept_terms.compare(found, sparse.csr_array(membership), fold, scores)
    for i in range(concepts):
        sets = {name: set(np.flatnonzero(some[i])) for name, some in found.items()}
        inside = {
            name: {g for t in some for g in np.flatnonzero(membership[t])}
            for name, some in sets.items()
        }
        for name, some in inside.items():
            known = [abs(fold[i, g]) for g in some if not np.isnan(fold[i, g])]
            wanted = max(known, default=np.nan)
            np.testing.assert_equal(table.loc[i, f"max_fold_change:{name}"], wanted)
            wanted = max((scores[i, g] for g in some), default=np.nan)
            np.testing.assert_equal(table.loc[i, f"max_attribution:{name}"], wanted)
        for what, both in {"iou_terms": sets, "iou_genes": inside}.items():
            a, b = both["attribution"], both["dge"]
            wanted = len(a & b) / len(a | b) if sets["attribution"] and sets["dge"] else np.nan
            np.testing.assert_allclose(table.loc[i, what], wanted)
    counted = table[(table["n:attribution"] > 0) & (table["n:dge"] > 0)]
    assert 5 < len(counted) < concepts
    six = concept_terms.table_6(table)
    assert six.loc["compared", "dge"] == len(counted)
    assert six.loc["enriched", "dge"] == found["dge"].any(axis=1).sum()
    assert six.loc["max_fold_change", "dge"] == counted["max_fold_change:dge"].mean()
    assert six.loc["iou_terms sd", "attribution"] == counted["iou_terms"].std()


def test_genes_that_no_term_knows() -> None:
    membership = np.array([[1, 1, 0, 0], [0, 1, 0, 0]])
    important = np.array([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(
        concept_terms.share_in_no_term(important, membership), [2 / 3, 0, np.nan]
    )


def test_what_does_not_fit_is_refused() -> None:
    ones = np.ones((2, 3), bool)
    with pytest.raises(InputError, match="concepts by terms"):
        concept_terms.compare({"attribution": ones, "dge": ones}, np.ones((3, 4)), ones, ones)
    with pytest.raises(InputError, match="give attribution and dge"):
        concept_terms.compare({"attribution": ones}, np.ones((3, 3)), ones, ones)

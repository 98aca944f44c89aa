"""Masks and selections come as booleans or as 0 and 1, in whatever holds them."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from analysis import differential, enrichment
from sae_jax import InputError

HIGH = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
X = np.log1p(np.random.default_rng(0).poisson(2.0, (6, 9)))
FORMS = [
    lambda m: m, lambda m: m.astype(bool), lambda m: m.tolist(), lambda m: m.astype(float),
    pd.DataFrame, sparse.csr_matrix, sparse.coo_array, lambda m: sparse.csc_matrix(m.astype(bool)),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: object) -> None:
    expected = differential.welch(X, HIGH.astype(bool), active=HIGH.astype(bool))
    found = differential.welch(X, form(HIGH), active=form(HIGH))
    np.testing.assert_array_equal(found.t, expected.t)

    sets = np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0]])
    for test in (enrichment.hypergeometric, enrichment.binomial):
        reference = test(HIGH.astype(bool), sets.astype(bool))
        np.testing.assert_array_equal(test(form(HIGH), form(sets)).p, reference.p)
    scores = X[:2, :6]
    reference = enrichment.mann_whitney(scores, sets).p
    np.testing.assert_array_equal(enrichment.mann_whitney(scores, form(sets)).p, reference)


def test_other_numbers_are_refused() -> None:
    for wrong in (HIGH * 2, HIGH - 1, HIGH * np.nan):
        with pytest.raises(InputError, match="give booleans"):
            enrichment.hypergeometric(wrong, HIGH)


def test_strata_may_have_any_numbers() -> None:
    sets = np.array([[1, 0, 1, 0, 1, 0]])
    p = [
        enrichment.matched_overlap(HIGH, sets, strata).p
        for strata in ([0, 0, 0, 1, 1, 1], [-5, -5, -5, 10**9, 10**9, 10**9])
    ]
    np.testing.assert_array_equal(*p)

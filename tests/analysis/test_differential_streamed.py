"""Expression read a part at a time gives the tests of the whole."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy import sparse

from analysis import differential
from analysis.groups import top_n
from sae_jax import InputError

RNG = np.random.default_rng(0)
X = np.log1p(RNG.poisson(0.7, (60, 12)) * RNG.uniform(0.5, 2, (60, 1)))
X[:, 3] = 0
Z = sparse.csr_array(RNG.exponential(1, (60, 7)) * (RNG.random((60, 7)) < 0.4))
HIGH, ACTIVE = top_n(Z, 8)


def _parts(*sizes: int, dense: bool = False) -> Callable[[], Iterator]:
    ends = np.cumsum(sizes)
    return lambda: (
        X[end - size : end] if dense else sparse.csr_matrix(X[end - size : end])
        for size, end in zip(sizes, ends, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("by", ["active", "low"])
@pytest.mark.parametrize("memory_bytes", [6_000, 18_000, 1 << 30])
def test_parts_are_the_whole(dense: bool, by: str, memory_bytes: int) -> None:
    other = {"active": ACTIVE, "low": sparse.csr_array(ACTIVE.toarray() < 1)}[by]
    whole = differential.welch(X, HIGH, **{by: other})
    passes = list(
        differential.welch_streamed(
            _parts(25, 1, 34, dense=dense), HIGH, **{by: other}, memory_bytes=memory_bytes
        )
    )
    assert len(passes) == {6_000: 7, 18_000: 7, 1 << 30: 1}[memory_bytes]
    for name in ("t", "df", "p", "log2_fold_change", "var_low", "detected_high", "n_low"):
        found = np.concatenate([getattr(part, name) for part in passes])
        np.testing.assert_allclose(found, getattr(whole, name), rtol=1e-9, atol=1e-12)
    assert np.isnan(passes[0].t[0, 3])  # a gene that no cell has


def test_parts_that_are_not_these_cells_are_refused() -> None:
    with pytest.raises(InputError, match="60 cells and the parts 59"):
        list(differential.welch_streamed(_parts(25, 34), HIGH, active=ACTIVE))
    with pytest.raises(InputError, match="60 cells and the parts more"):
        list(differential.welch_streamed(lambda: (X, X[:1]), HIGH, active=ACTIVE))
    with pytest.raises(InputError, match="12 and 11 genes"):
        list(differential.welch_streamed(lambda: (X[:30], X[30:, :11]), HIGH, active=ACTIVE))
    with pytest.raises(InputError, match="exactly one"):
        list(differential.welch_streamed(_parts(60), HIGH))

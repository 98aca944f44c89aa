"""Latents that repeat others, against NumPy's correlations and loops over pairs."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from sae_jax import SAEConfig, distributed, ensemble, models, redundancy
from sae_jax.redundancy import max_decoder_cosine
from sae_jax.state import Params

D, N, ROWS = 4, 12, 1500
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(ROWS, D)).astype(np.float32)


def members() -> Params:
    """Three: latents 3 and 7 are copies of 1, 9 nearly one of 4; 5 is constant, 6 dead."""
    encoder = RANDOM.normal(size=(3, D, N)).astype(np.float32)
    bias = RANDOM.normal(size=(3, N)).astype(np.float32)
    encoder[:, :, 3], bias[:, 3] = 2 * encoder[:, :, 1], 2 * bias[:, 1]
    encoder[:, :, 7], bias[:, 7] = 0.1 * encoder[:, :, 1], 0.1 * bias[:, 1]
    encoder[:, :, 9] = encoder[:, :, 4] + 0.1 * RANDOM.normal(size=(3, D))
    bias[:, 9] = bias[:, 4]
    encoder[:, :, 5], bias[:, 5] = 0, 3
    encoder[:, :, 6], bias[:, 6] = 0, -3
    encoder[:, :, 8], bias[:, 8] = 0, 7.123
    decoder = RANDOM.normal(size=(3, N, D)).astype(np.float32)
    return Params(encoder, bias, decoder, np.zeros((3, D), np.float32), None)


PARAMS = members()


def found(params: Params, x: np.ndarray = X, **changes: Any) -> np.ndarray:
    configs = [SAEConfig(d_in=D, n_latents=N)] * len(params.encoder_bias)
    mesh = distributed.member_mesh(1)
    hyper = ensemble.stack_hyperparams(configs, mesh, x.dtype)
    return redundancy.redundant(
        params, hyper, x, None, architecture=configs[0].architecture, mesh=mesh, **changes
    )


def by_loop(z: np.ndarray, threshold: float) -> list[bool]:
    repeats = []
    for j in range(z.shape[1]):
        earlier = [
            np.corrcoef(z[:, i], z[:, j])[0, 1]
            for i in range(j)
            if z[:, i].std() > 1e-6 and z[:, j].std() > 1e-6
        ]
        repeats.append(any(r >= threshold for r in earlier))
    return repeats


@pytest.mark.parametrize("threshold", [0.95, 0.5])
@pytest.mark.parametrize("entries", [redundancy.ENTRIES, 5 * N])
def test_it_equals_the_loop_over_pairs(
    threshold: float, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redundancy, "ENTRIES", entries)
    repeats = found(PARAMS, threshold=threshold)
    for i in range(3):
        p = jax.tree.map(lambda leaf, i=i: leaf[i].astype(np.float64), PARAMS)
        z = np.maximum(X @ p.encoder + p.encoder_bias, 0)
        assert repeats[i].tolist() == by_loop(z, threshold)
    assert repeats[:, [3, 7]].all()
    assert not repeats[:, [1, 5, 6, 8]].any()


@hypothesis.settings(max_examples=5)
@hypothesis.given(st.permutations(range(N)))
def test_a_group_counts_the_same_in_any_order(order: list[int]) -> None:
    """Of copies all but one; which one depends on the order."""
    member = jax.tree.map(lambda leaf: leaf[:1], PARAMS)
    permuted = member.replace(
        encoder=member.encoder[:, :, order],
        encoder_bias=member.encoder_bias[:, order],
        decoder=member.decoder[:, order],
    )
    assert found(permuted).sum() == found(member).sum()


def test_order_of_rows_and_a_shift_of_the_codes_do_not_matter() -> None:
    expected = found(PARAMS)
    np.testing.assert_array_equal(found(PARAMS, RANDOM.permutation(X)), expected)
    high = PARAMS.replace(encoder_bias=PARAMS.encoder_bias + 1000)  # dense, with a large mean
    z = X.astype(np.float64) @ PARAMS.encoder[0].astype(np.float64)
    assert found(high)[0].tolist() == by_loop(z, 0.95)


def test_weights_that_are_not_finite_have_none() -> None:
    broken = PARAMS.replace(encoder=PARAMS.encoder.copy())
    broken.encoder[1] = np.nan
    repeats = found(broken)
    assert not repeats[1].any()
    np.testing.assert_array_equal(repeats[[0, 2]], found(PARAMS)[[0, 2]])


def test_largest_cosines_equal_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = RANDOM.normal(size=(2, 23, 5)).astype(np.float32)
    decoder[0, 3] = 0
    live = RANDOM.random((2, 23)) < 0.7
    unit = np.asarray(models.unit_rows(decoder[0])), np.asarray(models.unit_rows(decoder[1]))
    for block in (5, 1024):
        monkeypatch.setattr(redundancy, "BLOCK", block)
        cosines = max_decoder_cosine(decoder, live)
        for i in range(2):
            for j in range(23):
                others = [unit[i][k] @ unit[i][j] for k in range(23) if k != j and live[i, k]]
                if live[i, j]:
                    assert cosines[i, j] == pytest.approx(max(others), abs=1e-6)
                else:
                    assert np.isnan(cosines[i, j])
    single = max_decoder_cosine(decoder[0], np.arange(23) == 4)
    assert np.isnan(single).all()
    assert max_decoder_cosine(decoder[1]).shape == (23,)

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from analysis import steering
from sae_jax.config import SAEConfig
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError
from sae_jax.state import Normalizer, Params

D, N = 5, 12


class Plain:
    """A dictionary in float64, as simple as can be: what Dictionary does, by its definition."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.encoder, self.decoder = rng.normal(size=(D, N)), rng.normal(size=(N, D))
        self.bias = rng.normal(size=D)

    def encode(self, x: np.ndarray, sparse: bool = False) -> Any:
        codes = np.maximum(x @ self.encoder - 0.5, 0)
        codes[:, 3] = 0  # dead
        return as_csr(codes) if sparse else codes

    def decode(self, z: Any) -> np.ndarray:
        return z @ self.decoder + self.bias

    def steer(
        self, x: np.ndarray, features: int | Sequence[int], *, set: Any = None, scale: Any = None,
        keep_error: bool = True,
    ) -> np.ndarray:  # fmt: skip
        z = self.encode(x)
        changed = z.copy()
        changed[:, features] = z[:, features] * scale if set is None else set
        return self.decode(changed) + (x - self.decode(z) if keep_error else 0)


def as_csr(codes: np.ndarray) -> sparse.csr_matrix:
    return sparse.csr_matrix(codes)


class Softmax:
    """A decoder; it wants to be given what scVI and multiDGD want."""

    def decode(self, latents: np.ndarray, *, batch: Any, covariates: Any) -> np.ndarray:
        weight = np.random.default_rng(9).normal(size=(D, 7))
        logits = latents @ weight + (0 if batch is None else batch[:, None] * np.arange(7))
        shares = np.exp(logits + (0 if covariates is None else covariates))
        return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def cells(seed: int, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D)) + seed


def real_dictionary() -> Dictionary:
    rng = np.random.default_rng(4)
    config = SAEConfig(d_in=D, n_latents=N, input_normalization="zscore")
    return Dictionary(
        config,
        Params(
            encoder=rng.normal(size=(D, N)).astype(np.float32),
            encoder_bias=rng.normal(size=N).astype(np.float32),
            decoder=rng.normal(size=(N, D)).astype(np.float32),
            decoder_bias=rng.normal(size=D).astype(np.float32),
            pre_bias=None,
        ),
        Normalizer(
            mean=rng.normal(size=D).astype(np.float32),
            scale=rng.uniform(0.5, 2, D).astype(np.float32),
        ),
    )


def test_levels_are_the_mean_and_the_maximum() -> None:
    z = np.array([[0, 2, -1.0], [0, 4, -3], [0, 0, -2]])
    for codes in (z, sparse.csr_matrix(z)):
        assert steering.levels(codes, "target_mean").tolist() == [0, 2, -2]
        assert steering.levels(codes, "target_mean", factor=1.5).tolist() == [0, 3, -3]
        assert steering.levels(codes).tolist() == [0, 4, -1]
    with pytest.raises(InputError, match="target_mean, maximum"):
        steering.levels(z, "mean")
    with pytest.raises(InputError, match="at least one cell"):
        steering.levels(z[:0])


@pytest.mark.parametrize("features", [2, [2], [7, 3, 1]])
@pytest.mark.parametrize("keep_error", [True, False])
def test_raise_to_decodes_the_raised_codes_and_keeps_the_error(
    features: int | list[int], keep_error: bool
) -> None:
    dictionary, x, target = Plain(), cells(0), cells(1)
    after = steering.raise_to(dictionary, x, features, target, "target_mean", 1.5, keep_error)
    z = dictionary.encode(x)
    raised = z.copy()
    raised[:, features] = 1.5 * dictionary.encode(target)[:, features].mean(axis=0)
    expected = dictionary.decode(raised)
    if keep_error:
        expected += x - dictionary.decode(z)
    np.testing.assert_allclose(after, expected, rtol=1e-12)


def test_raise_to_refuses_features_that_are_not_there() -> None:
    for features in (N, [0, -1]):
        with pytest.raises(InputError, match="the dictionary has 0 to 11"):
            steering.raise_to(Plain(), cells(0), features, cells(1))


def test_a_shift_by_all_of_the_way_is_progress_1() -> None:
    before, target = cells(0), cells(1)
    way = target.mean(axis=0) - before.mean(axis=0)
    across = np.linalg.svd(way[None])[2][1]  # orthogonal to the way
    table = steering.latent_shift(before, before + way + 3 * across, target)
    np.testing.assert_allclose(table["progress"], 1)
    np.testing.assert_allclose(table["towards"], np.linalg.norm(way))
    np.testing.assert_allclose(table["norm"], np.hypot(np.linalg.norm(way), 3))
    assert list(steering.latent_shift(before, target)) == ["norm"]
    with pytest.raises(InputError, match="no way towards it"):
        steering.latent_shift(before, before, before)
    with pytest.raises(InputError, match="same cells"):
        steering.latent_shift(before, before[1:])
    with pytest.raises(InputError, match="at least one cell in each"):
        steering.latent_shift(before, before, target[:0])


@given(st.integers(0, 50), st.booleans(), st.sampled_from(steering.RULES))
def test_ranking_equals_steering_each_candidate(seed: int, keep_error: bool, rule: str) -> None:
    dictionary, x, target = Plain(seed), cells(0), cells(1)
    candidates = np.array([4, 0, 3, 11])
    level = steering.levels(dictionary.encode(target), rule)[candidates]
    table = steering.rank_candidates(dictionary, x, target, candidates, level, keep_error)
    assert (np.diff(table["towards"]) <= 0).all()
    assert sorted(table["feature"]) == sorted(candidates)
    for row in table.itertuples():
        after = dictionary.steer(x, row.feature, set=row.level, keep_error=keep_error)
        shift = steering.latent_shift(x, after, target).mean()
        found = [row.norm, row.towards, row.progress]
        np.testing.assert_allclose(found, shift[["norm", "towards", "progress"]], atol=1e-10)
        change = row.level - dictionary.encode(x)[:, row.feature].mean()
        assert row.mean_change == pytest.approx(change, abs=1e-12)


@pytest.mark.parametrize("keep_error", [True, False])
def test_ranking_holds_for_a_trained_dictionarys_normalisation(keep_error: bool) -> None:
    dictionary = real_dictionary()
    x, target = (cells(seed).astype(np.float32) for seed in (0, 1))
    candidates = np.arange(N)
    level = steering.levels(dictionary.encode(target, sparse=True))
    table = steering.rank_candidates(dictionary, x, target, candidates, level, keep_error)
    for row in table.itertuples():
        after = dictionary.steer(x, row.feature, set=row.level, keep_error=keep_error)
        shift = steering.latent_shift(x, after, target).mean()
        found = [row.norm, row.towards]
        np.testing.assert_allclose(found, shift[["norm", "towards"]], rtol=1e-4, atol=1e-4)


def test_a_feature_already_at_its_level_moves_nothing() -> None:
    dictionary, x, target = Plain(), cells(0), cells(1)
    table = steering.rank_candidates(dictionary, x, target, [3], [0.0])
    assert table.loc[0, ["mean_change", "norm", "towards"]].tolist() == [0, 0, 0]


def test_ranking_refuses_what_does_not_fit() -> None:
    dictionary, x, target = Plain(), cells(0), cells(1)
    with pytest.raises(InputError, match="one level for each"):
        steering.rank_candidates(dictionary, x, target, [1, 2], [1.0])
    with pytest.raises(InputError, match="feature 12: the dictionary has 0 to 11"):
        steering.rank_candidates(dictionary, x, target, [12], [1.0])


def test_predicted_expression_and_its_change() -> None:
    before, after = cells(0), cells(0) + 0.3
    batch, covariates = np.arange(40) % 2, np.linspace(0, 1, 7)
    predicted = steering.predict(Softmax(), before, after, batch, covariates)
    expected = Softmax().decode(after, batch=batch, covariates=covariates)
    np.testing.assert_array_equal(predicted.after, expected)
    table = steering.expression_shift(predicted, list("abcdefg"), pseudocount=2)
    old, new = (
        getattr(predicted, side).astype(float).mean(axis=0) * 1e4 for side in ("before", "after")
    )
    np.testing.assert_allclose(table["log2_fold_change"], np.log2((new + 2) / (old + 2)))
    assert table["before"].sum() == pytest.approx(1e4, rel=1e-5)
    assert table.index.name == "gene"
    np.testing.assert_allclose(table["share_up"], (predicted.after > predicted.before).mean(axis=0))
    assert (steering.expression_shift(steering.predict(Softmax(), before, before), list("abcdefg"))
            [["log2_fold_change", "share_up"]] == 0).all(axis=None)  # fmt: skip
    with pytest.raises(InputError, match="name each"):
        steering.expression_shift(predicted, ["a"])
    with pytest.raises(InputError, match="above 0"):
        steering.expression_shift(predicted, list("abcdefg"), pseudocount=0)

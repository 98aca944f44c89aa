"""Causal tests on linear models, where every effect is known in closed form."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pytest
from scipy import sparse

import extract
from analysis import causal
from analysis.causal import Site
from sae_jax.errors import InputError

D, N = 5, 12


class Plain:
    """A dictionary in float64, as simple as can be; feature 3 is dead."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.encoder, self.decoder = rng.normal(size=(D, N)), rng.normal(size=(N, D))
        self.bias = rng.normal(size=D)

    def encode(self, x: np.ndarray, sparse: bool = False) -> Any:
        codes = np.maximum(x @ self.encoder - 0.5, 0)
        codes[:, 3] = 0
        return as_csr(codes) if sparse else codes

    def decode(self, z: Any) -> np.ndarray:
        return z @ self.decoder + self.bias

    def steer(
        self, x: np.ndarray, features: Sequence[int], *, set: Any = None, scale: Any = None,
        keep_error: bool = True,
    ) -> np.ndarray:  # fmt: skip
        z = self.encode(x)
        changed = z.copy()
        changed[:, features] = z[:, features] * scale if set is None else set
        return (x if keep_error else self.decode(z)) + (changed - z) @ self.decoder


def as_csr(codes: np.ndarray) -> sparse.csr_matrix:
    return sparse.csr_matrix(codes)


@dataclasses.dataclass
class Run:
    hidden: dict
    outputs: dict


class Linear:
    """Layer 0 is x, layer 1 is x A, and the output "genes" is layer 1 times B; in batches."""

    def __init__(self, a: np.ndarray, b: np.ndarray | None = None) -> None:
        self.a, self.b = a, np.ones((a.shape[1], 2)) if b is None else b
        self.runs = 0

    def run(
        self, adata: np.ndarray, layer: int, edit: Any, layers: Any = None, *, tokens: str = "all",
        outputs: Sequence[str] = (), batch_size: int = 100,
    ) -> Run:  # fmt: skip
        assert (layer, tokens) == (0, "all")
        self.runs += 1
        parts = [adata[i : i + batch_size] for i in range(0, len(adata), batch_size)]
        zero = np.concatenate([part if edit is None else edit(part.copy()) for part in parts])
        one = zero @ self.a
        hidden = {0: zero, 1: one}
        chosen = [1] if layers is None else layers
        return Run({i: hidden[i] for i in chosen}, dict.fromkeys(outputs, one @ self.b))


X = np.random.default_rng(1).normal(size=(40, D)) + 1
A = np.random.default_rng(2).normal(size=(D, 4))
ONE, OTHER = np.argsort((Plain().encode(X) > 0).mean(axis=0))[[-1, -4]]  # active in many cells


def test_fidelity_is_the_share_of_the_error_that_is_not_there() -> None:
    model, dictionary = Linear(A), Plain()
    site = Site(model, X, 0, layers=[0, 1], outputs=["genes"], options={"batch_size": 7})
    found = causal.fidelity(site, dictionary)
    assert found.index.tolist() == ["layer 0", "layer 1", "output genes"]
    rebuilt = dictionary.decode(dictionary.encode(X))
    for place, onwards in (("layer 0", np.eye(D)), ("layer 1", A), ("output genes", A @ model.b)):
        row = found.loc[place]

        def error(instead: np.ndarray, onwards: np.ndarray = onwards) -> float:
            return np.square((instead - X) @ onwards).sum(axis=1).mean()

        of = error(rebuilt), error(np.zeros_like(X)), error(X.mean(axis=0))
        assert row["error_reconstruction"] == pytest.approx(of[0])
        assert row["error_zero"] == pytest.approx(of[1])
        assert row["error_mean"] == pytest.approx(of[2])
        assert row["recovered_of_zero"] == pytest.approx(1 - of[0] / of[1])
        assert row["recovered_of_mean"] == pytest.approx(1 - of[0] / of[2])
        before, after = X @ onwards, rebuilt @ onwards
        cosine = (before * after).sum(axis=1) / np.sqrt(
            np.square(before).sum(axis=1) * np.square(after).sum(axis=1)
        )
        assert row["cosine"] == pytest.approx(cosine.mean())
    assert model.runs == 4


def test_a_perfect_dictionary_recovers_all_and_a_constant_nothing() -> None:
    class Perfect(Plain):
        def decode(self, z: Any) -> np.ndarray:
            return self.seen

        def encode(self, x: np.ndarray, sparse: bool = False) -> Any:
            self.seen = x
            return None

    class Constant(Plain):
        def decode(self, z: Any) -> np.ndarray:
            return np.broadcast_to(X.mean(axis=0), (z.shape[0], D))

    site = Site(Linear(A), X, 0)
    assert causal.fidelity(site, Perfect()).loc["layer 1", "recovered_of_mean"] == 1
    assert causal.fidelity(site, Constant()).loc["layer 1", "recovered_of_mean"] == pytest.approx(0)


@pytest.mark.parametrize(("how", "factor"), [({"set": 0}, -1.0), ({"scale": 3.0}, 2.0)])
@pytest.mark.parametrize("keep_error", [True, False])
def test_effects_in_closed_form(how: dict, factor: float, keep_error: bool) -> None:
    dictionary, model = Plain(), Linear(A)
    site = Site(model, X, 0, layers=[1], outputs=["genes"], options={"batch_size": 16})
    found = causal.effects(
        site, dictionary, [ONE, OTHER], **how, draws=6, keep_error=keep_error, seed=5
    ).set_index(["feature", "place"])
    z = dictionary.encode(X)
    rebuilt = dictionary.decode(z)
    base = X if keep_error else rebuilt
    assert model.runs == 2 + 2 * 7
    for feature in (ONE, OTHER):
        by = factor * z[:, feature]
        size = np.linalg.norm(dictionary.decoder[feature])
        rng = np.random.default_rng([5, feature])
        random = rng.normal(size=(6, D))
        random /= np.linalg.norm(random, axis=1, keepdims=True)
        for place, onwards in (("layer 1", A), ("output genes", A @ model.b)):
            row = found.loc[(feature, place)]
            along = np.linalg.norm(dictionary.decoder[feature] @ onwards)
            assert row["moved"] == pytest.approx(np.abs(by).mean() * size)
            assert row["norm"] == pytest.approx(np.abs(by).mean() * along)
            before = base @ onwards
            after = before + by[:, None] * (dictionary.decoder[feature] @ onwards)
            norms = np.linalg.norm(before, axis=1)
            assert row["relative"] == pytest.approx(row["norm"] / norms.mean())
            cosine = (before * after).sum(axis=1) / norms / np.linalg.norm(after, axis=1)
            assert row["cosine"] == pytest.approx(cosine.mean())
            chance = np.abs(by).mean() * size * np.linalg.norm(random @ onwards, axis=1)
            assert row["random_norm"] == pytest.approx(chance.mean())
            assert row["random_sd"] == pytest.approx(chance.std(ddof=1))
            assert row["ratio"] == pytest.approx(row["norm"] / chance.mean())
            assert row["p"] == pytest.approx((1 + (chance >= row["norm"]).sum()) / 7)
            if keep_error:  # else rounding is in the difference of two ways to decode
                assert row["share_changed"] == (by != 0).mean()
            alone = np.linalg.norm((rebuilt - X) @ onwards, axis=1).mean()
            assert row["reconstruction_norm"] == pytest.approx(alone)


def test_a_direction_that_the_model_reads_beats_random_ones() -> None:
    dictionary = Plain()
    read = dictionary.decoder[[ONE]].T
    found = causal.effects(Site(Linear(read), X, 0), dictionary, [ONE], set=0, draws=19)
    assert found["p"].item() == 0.05
    assert found["ratio"].item() > 1
    across = np.eye(D) - read @ read.T / (read**2).sum()  # reads everything but this
    found = causal.effects(Site(Linear(across), X, 0), dictionary, [ONE], set=0, draws=19)
    assert found["p"].item() == 1
    assert found["norm"].item() == pytest.approx(0, abs=1e-9)


def test_a_feature_that_moves_nothing_has_no_effect() -> None:
    model = Linear(A)
    row = causal.effects(Site(model, X, 0), Plain(), [3], set=0, draws=5).iloc[0]
    assert (row["moved"], row["norm"], row["share_changed"], row["p"]) == (0, 0, 0, 1)
    assert np.isnan(row["ratio"])
    assert model.runs == 3


def test_every_feature_may_have_a_code_of_its_own() -> None:
    site, dictionary = Site(Linear(A), X, 0), Plain()
    both = causal.effects(site, dictionary, [1, 2], set={1: 2.0, 2: 5.0}, draws=2)
    for feature, code in ((1, 2.0), (2, 5.0)):
        one = causal.effects(site, dictionary, [feature], set=code, draws=2)
        assert both[both["feature"] == feature].iloc[0].to_dict() == one.iloc[0].to_dict()


def test_a_reader_of_extract_will_do() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, D), torch.nn.ReLU(), torch.nn.Linear(D, 4))
    model = extract.load_model(
        "callable", module, hooks=["0", "2"],
        inputs=lambda cells: torch.as_tensor(np.asarray(cells.X, np.float32)),
    )  # fmt: skip
    cells = np.random.default_rng(3).normal(size=(20, 3)).astype(np.float32)
    adata = anndata.AnnData(cells)
    with torch.no_grad():
        h = module[0](torch.as_tensor(cells))

        def onwards(rows: np.ndarray) -> np.ndarray:
            return module[2](torch.relu(torch.as_tensor(rows, dtype=torch.float32))).numpy()

        h = h.numpy()
        dictionary = Plain(1)
        site = Site(model, adata, 0, layers=[1], options={"batch_size": 8})
        found = causal.effects(site, dictionary, [0], set=1.5, draws=3).iloc[0]
        change = onwards(dictionary.steer(h, [0], set=1.5)) - onwards(h)
        assert found["norm"] == pytest.approx(np.linalg.norm(change, axis=1).mean(), rel=1e-4)
        row = causal.fidelity(site, dictionary).loc["layer 1"]
        error = onwards(dictionary.decode(dictionary.encode(h))) - onwards(h)
        assert row["error_reconstruction"] == pytest.approx(
            np.square(error).sum(axis=1).mean(), rel=1e-4
        )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"set": None}, "exactly one of set and scale"),
        ({"scale": 1.0}, "exactly one of set and scale"),
        ({"draws": 0}, "draws=0"),
        ({"features": []}, "0 features"),
        ({"features": [12]}, "feature 12: the dictionary has 0 to 11"),
        ({"set": {2: 1.0}}, "set has no code for feature 1"),
    ],
)
def test_what_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        causal.effects(
            **({"site": Site(Linear(A), X, 0), "dictionary": Plain(), "features": [1], "set": 0.0}
               | changed)
        )  # fmt: skip

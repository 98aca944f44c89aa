"""Recovery beside numpy's correlations of whole matrices."""

import numpy as np
import pytest

from experiments.simulation import recovery, sweep
from experiments.simulation.data import Cells, Large
from sae_jax import InputError

SIMULATION = Large(cells=600, genes=70, programs=8, cell_types=5)


@pytest.fixture(scope="module")
def cells() -> Cells:
    return SIMULATION.block(0)


@pytest.fixture(scope="module")
def codes(cells: Cells) -> np.ndarray:
    """12 latents: mixtures, one program alone, one against a type's activity, one dead, one
    constant."""
    rng = np.random.default_rng(1)
    z = np.maximum(cells.x_active @ rng.normal(size=(8, 8)), 0)
    own = [cells.x_active[:, 2], 5 - 4 * cells.a[:, 3], np.zeros(600), np.full(600, 7.3)]
    return np.column_stack([z, *own]).astype(np.float32)


def of_all(z: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    """By numpy.corrcoef: z and v must vary."""
    r = np.corrcoef(z, v, rowvar=False)[: z.shape[1], z.shape[1] :]
    best = np.abs(r).argmax(axis=0)
    return {
        "highest": r.max(axis=0),
        "highest_absolute": np.abs(r).max(axis=0),
        "highest_signed": r[best, np.arange(r.shape[1])],
    }


@pytest.mark.parametrize("entries", [2**22, 30])
def test_it_is_numpys_in_any_blocks(
    cells: Cells, codes: np.ndarray, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ENTRIES", entries)
    monkeypatch.setattr(recovery, "CODES", 37 * codes.shape[1])
    v, places = recovery.hidden_variables(cells)
    assert v.shape == (600, 33)
    blocks = recovery.encoded(lambda x: x, codes, v, codes.shape[1])
    sums = recovery.Sums.of(blocks)
    assert sums.varies.tolist() == [True] * 10 + [False] * 2
    assert sums.active.tolist() == [True] * 10 + [False, True]
    assert sums.mean_z == pytest.approx(codes.mean(axis=0, dtype=float))

    alive = codes[:, :10].astype(float)
    y = SIMULATION.counts(cells.x_active)
    constant = y.std(axis=0) == 0
    assert constant.any()  # genes of no program: neither refused nor counted
    found = recovery.highest(sums.of_variables(places["X''"]), SIMULATION.m)
    for name, wanted in of_all(alive, y[:, ~constant]).items():
        assert found[name][~constant] == pytest.approx(wanted, abs=1e-6), name
        assert np.isnan(found[name][constant]).all()

    truth = {"X''": cells.x_active, "X'": cells.x_noisy, "X": cells.x, "A": cells.a, "B": cells.b}
    means = recovery.by_group(sums, places, SIMULATION.m)
    assert list(means) == list(recovery.GROUPS)
    for group, values in truth.items():
        values = values[:, values.std(axis=0) > 0]
        for name, wanted in of_all(alive, values).items():
            assert means[group][name] == pytest.approx(wanted.mean(), abs=1e-6), (group, name)
    own = recovery.highest(sums.of_variables(places["X''"]))
    assert own["highest"][2] == pytest.approx(1)
    against = {name: values[3] for name, values in
               recovery.highest(sums.of_variables(places["A"])).items()}  # fmt: skip
    assert against["highest_signed"] == pytest.approx(-1)
    assert against["highest_absolute"] == pytest.approx(1)
    assert against["highest"] < 1


def test_it_is_what_the_small_sweep_measures(cells: Cells, codes: np.ndarray) -> None:
    sums = recovery.Sums.of([(codes, cells.x)])
    found, wanted = recovery.highest(sums), sweep.correlated(codes, cells.x)
    for name in recovery.COLUMNS:
        assert found[name] == pytest.approx(wanted[name], abs=1e-9), name


def test_far_from_zero_nothing_is_lost() -> None:
    """Values of 1e5 that vary by 1: float32 sums, or raw squares, would not tell."""
    rng = np.random.default_rng(3)
    v = rng.normal(size=(500, 2))
    z = 1e5 + v + rng.normal(size=(500, 2))
    sums = recovery.Sums.of([(z[:10], v[:10] - 1e5), (z[10:], v[10:] - 1e5)])
    wanted = of_all(z, v)["highest"]
    assert recovery.highest(sums)["highest"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([], "0 cells"),
        ([(np.ones((1, 2)), np.ones((1, 2)))], "1 cells"),
        ([(np.full((3, 2), np.nan), np.ones((3, 2)))], "finite"),
    ],
)
def test_what_is_refused(blocks: list, said: str) -> None:
    with pytest.raises(InputError, match=said):
        recovery.Sums.of(blocks)

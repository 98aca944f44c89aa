"""Two and more finished runs side by side, against a recomputation by sets and by brute force."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver
from scipy import sparse, stats

import sae_jax
from analysis import feature_space
from experiments import feature_lens_compare as program
from sae_jax import InputError, files
from sae_jax.state import Params
from tests.experiments.damage import check_every_file

A = [["T cell", "NK cell"], ["B cell"], [], ["T cell"], ["B cell", "monocyte", "T cell"]]
B = [["monocyte"], ["T cell", "B cell"], ["T cell"], ["neuron"], ["B cell"], ["T cell", "NK cell"]]


def a_table(terms: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Columns of the lens' features.parquet that are read, by feature."""
    kind = pd.Categorical(["local", *["global"] * (len(terms) - 1)], ["local", "global", "dead"])
    return pd.DataFrame(
        {
            "kind_text": kind, "kind_code": kind,
            "n_terms": [len(names) for names in terms],
            "best_term": pd.Categorical([names[0] if names else None for names in terms]),
        },
        index=pd.Index([f"feature_{10 * i}" for i in range(len(terms))], name="feature"),
    )  # fmt: skip


def write_run(
    path: Path, terms: Sequence[Sequence[str]], seed: int | None = None, n_latents: int = 9
) -> Path:
    """A finished run of the lens, with the files that a comparison reads."""
    annotated = feature_space.from_names(terms)
    files.write_json(path / "lens.json", {"h5ad": "cells.h5ad", "label": "kind", "seed": 0})
    files.write_parquet(path / "features.parquet", a_table(terms).reset_index())
    matrix = sparse.csr_matrix(annotated.matrix)
    np.savez(
        path / "named.npz", indptr=matrix.indptr, indices=matrix.indices, shape=matrix.shape,
        terms=np.asarray(annotated.terms, str),
    )  # fmt: skip
    (path / "report.html").write_text("finished")
    if seed is not None:
        config = sae_jax.SAEConfig.preset(
            "vanilla", d_in=2, n_latents=n_latents, seed=seed, l1_weight=0.1, batch_size=32
        )
        matrix, bias = np.ones((2, n_latents), np.float32), np.zeros(2, np.float32)
        params = Params(matrix, np.zeros(n_latents, np.float32), matrix.T.copy(), bias, None)
        sae_jax.Dictionary(config, params, None, {}).save(path / "dictionary")
    return path


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., Path]:
    """Runs the program in this process."""

    def call(*runs: Path, **given: str) -> Path:
        settings = {"runs": ",".join(map(str, runs)), "workdir": str(tmp_path / "out"), **given}
        with flagsaver.flagsaver():
            program.define_flags()
            flags.FLAGS(["program", *(f"--{name}={value}" for name, value in settings.items())])
            program.main()
        return Path(settings["workdir"])

    return call


def jaccard(a: Sequence[str], b: Sequence[str]) -> float:
    return len({*a} & {*b}) / len({*a} | {*b})


def test_pairs_and_terms_of_two_runs(compare: Callable[..., Path], tmp_path: Path) -> None:
    out = compare(write_run(tmp_path / "one", A), write_run(tmp_path / "two", B))
    check_every_file(out)
    pairs = pd.read_parquet(out / "pairs.parquet")
    left = {f"feature_{10 * i}": names for i, names in enumerate(A) if names}
    right = {f"feature_{10 * i}": names for i, names in enumerate(B) if names}
    for row in pairs.to_dict("records"):
        names = left[row["feature_a"]], right[row["feature_b"]]
        assert row["jaccard"] == pytest.approx(jaccard(*names))
        assert (row["best_term_a"], row["n_terms_b"]) == (names[0][0], len(names[1]))
    # No assignment of the four to four of the six is better.
    best = max(
        sum(jaccard(one, right[name]) for one, name in zip(left.values(), chosen, strict=True))
        for chosen in itertools.permutations(right, len(left))
    )
    assert pairs["jaccard"].sum() == pytest.approx(best)
    assert (len(pairs), pairs["feature_b"].nunique()) == (4, 4)
    assert pairs["jaccard"].is_monotonic_decreasing

    counts = {
        name: (sum(name in n for n in A), sum(name in n for n in B))
        for name in {*itertools.chain(*A, *B)}
    }
    table = pd.read_csv(out / "terms.csv").set_index("term")
    assert {term: tuple(row) for term, row in table.iterrows()} == counts
    shared = np.array([both for both in counts.values() if all(both)])
    row = pd.read_csv(out / "comparisons.csv").iloc[0]
    assert row["mean_jaccard"] == pytest.approx(best / 4)
    assert 0 < row["by_chance"] <= 1
    assert (row["shared_terms"], row["only_a"], row["only_b"]) == (4, 0, 1)
    assert row["pearson"] == pytest.approx(stats.pearsonr(*shared.T)[0])
    assert row["spearman"] == pytest.approx(stats.spearmanr(*shared.T)[0])

    runs = pd.read_csv(out / "runs.csv").set_index("run")
    assert runs.loc["one", ["live", "local (text)", "global (code)", "annotated"]].tolist() == [
        5, 1, 4, 4
    ]  # fmt: skip
    assert runs.loc["two", "terms a feature"] == pytest.approx(8 / 6)
    assert runs["latents"].isna().all()  # no dictionary lies there
    assert not (out / "seeds.csv").exists()
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "Only two: neuron (1)." in page


def test_chance_keeps_how_often_a_term_occurs_and_takes_the_rest() -> None:
    names = [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]] * 5
    run = program.LensRun("one", {}, a_table(names), feature_space.from_names(names), None)
    found = program.compare(run, run)
    assert found.found.mean == 1
    assert found.chance < 0.8
    every = [["a", "b"]] * 6  # frequency alone makes these the same
    same = program.LensRun("two", {}, a_table(every), feature_space.from_names(every), None)
    assert program.compare(same, same).chance == 1


def test_seeds_of_one_configuration_give_table_s6(
    compare: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [
        write_run(tmp_path / f"seed{seed}", [*A, ["T cell"]][: 4 + seed], seed) for seed in range(3)
    ]
    out = compare(*runs)
    assert len(pd.read_csv(out / "comparisons.csv")) == 3
    table = pd.read_csv(out / "seeds.csv").set_index(["rule", "kind"])
    for rule in ("text", "code"):
        for kind, counts in {"live": [4, 5, 6], "global": [3, 4, 5], "dead": [5, 4, 3]}.items():
            row = table.loc[rule, kind]
            assert (row["mean"], row["n"]) == (np.mean(counts), 3)
            assert row["sem"] == pytest.approx(stats.sem(counts))
            assert row["sem_paper"] == pytest.approx(np.std(counts) / 3**0.5)
    assert "Table S6" in (out / "report.html").read_text()
    # One of another width among them: no table of seeds.
    other = write_run(tmp_path / "wide", A, 7, n_latents=12)
    out = compare(runs[0], runs[1], other, overwrite="true")
    assert not (out / "seeds.csv").exists()
    assert pd.read_csv(out / "runs.csv")["latents"].tolist() == [9, 9, 12]


def test_what_is_no_finished_run_is_refused_before_anything_is_written(
    compare: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = write_run(tmp_path / "one", A), write_run(tmp_path / "two", B)
    with pytest.raises(InputError, match="two or more different"):
        compare(one, tmp_path / "two/../one")
    (two / "report.html").unlink()
    with pytest.raises(InputError, match=r"two \(lacks report.html\); .*nowhere \(lacks lens.json"):
        compare(one, two, tmp_path / "nowhere")
    with pytest.raises(InputError, match="no feature has a term"):
        compare(one, write_run(tmp_path / "empty", [[], []]))
    (two / "report.html").touch()
    files.write_parquet(two / "features.parquet", a_table(A).reset_index())
    with pytest.raises(InputError, match="disagree"):
        compare(one, two)
    (two / "lens.json").write_text("{")
    with pytest.raises(InputError, match=r"two.*is damaged"):
        compare(one, two)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_ours_is_replaced_only_when_told(
    compare: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [write_run(tmp_path / "a/lens", A), write_run(tmp_path / "b/lens", B)]
    out = compare(*runs)
    names = pd.read_csv(out / "runs.csv")["run"]
    assert names.tolist() == [str(path) for path in runs]  # one name twice would tell nothing
    with pytest.raises(InputError, match="--overwrite replaces it"):
        compare(*runs)
    (out / "mine.txt").touch()
    compare(*reversed(runs), overwrite="true")
    assert pd.read_csv(out / "runs.csv")["run"].tolist() == [str(path) for path in runs[::-1]]
    assert (out / "mine.txt").exists()
    assert json.loads((out / "compare.json").read_text())["runs"] == [str(p) for p in runs[::-1]]

r"""Finished runs of the feature lens side by side: what the same terms name in two dictionaries.

    python -m experiments.feature_lens_compare --runs=runs/multidgd,runs/geneformer \
        --workdir=runs/compared                                  (or: sae-jax lens-compare ...)

Schuster A.3.8 and Figure S32. For every two runs: features paired by the Jaccard similarity of
their terms (Hungarian algorithm), terms that both or one of them have, and how alike the counts of
the shared terms are. Three or more runs that differ by the seed of training only also give Table
S6, the spread of live, local and global features. Seconds for a few hundred features a run, a
minute or two for five thousand.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags

import sae_jax
from analysis import characterisation, feature_space, lens_plots, matching, plots, report
from experiments import cli, feature_lens, feature_lens_tables, folders, verify
from sae_jax import InputError, files
from sae_jax.reading import check_file, read_object, reading

FLAGS = flags.FLAGS

SETTINGS = "compare.json"
FILES = {
    "report.html": "the page: everything below, to look at",
    "runs.csv": "one row a run: live, local, global and annotated features",
    "comparisons.csv": "one row a pair of runs: mean similarity, shared terms, correlations",
    "pairs.parquet": "one row a pair of features: similarity, what each is named for",
    "terms.csv": "one row a term: features that it names in each run",
    "seeds.csv": "Table S6, of runs that differ by the seed only",
    "figures": "shared_terms: PNG and PDF",
    "manifest.json": "size and SHA-256 of every file",
}
NEEDED = (feature_lens.SETTINGS, "features.parquet", "named.npz", "report.html")
OF_CELLS = ("h5ad", "embedding", "pca", "label")  # settings that seeds must have in common
SHOWN = 15  # rows of a table on the page


@dataclasses.dataclass(frozen=True, eq=False)
class LensRun:
    """A finished run. config: of its dictionary; None where that is no longer to be found."""

    name: str
    settings: dict[str, Any]
    table: pd.DataFrame
    annotated: feature_space.FeatureTerms
    config: sae_jax.SAEConfig | None


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """Two runs, their matching, and the mean similarity that chance alone gives."""

    a: LensRun
    b: LensRun
    found: matching.AnnotationMatching
    chance: float


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_list("runs", None, "Folders of finished runs of the lens, two or more.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    verify.define_flag()


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    out = folders.check_workdir(SETTINGS)
    runs = read_runs(FLAGS.runs or [])
    with folders.filled(out, SETTINGS, {"runs": FLAGS.runs}, FILES):
        # 2. Every two of them.
        compared = [compare(a, b) for a, b in itertools.combinations(runs, 2)]
        tables = {"runs": overview(runs), "comparisons": pd.DataFrame(map(summary, compared)),
                  "terms": terms(runs).reset_index()}  # fmt: skip
        if differ_by_seed(runs):
            tables["seeds"] = seeds(runs)
        for name, table in tables.items():
            with files.write_aside(out / f"{name}.csv") as fresh:
                table.to_csv(fresh, index=False)
        pairs = pd.concat(map(matched_pairs, compared), ignore_index=True)
        files.write_parquet(out / "pairs.parquet", pairs)

        # 3. The page, last.
        write_page(out, compared, tables, pairs)
    print(f"\n{out}/")
    for name, what in FILES.items():
        if (out / name).exists():
            print(f"  {name:<18} {what}")
    print(f"\n{tables['comparisons'].to_string(index=False, float_format='{:.3f}'.format)}")


def read_runs(paths: Sequence[str]) -> list[LensRun]:
    """The runs in these folders, each with a name of its own.

    Raises:
        InputError: fewer than two folders, one given twice, some that hold no finished run of the
            lens (all of them are told), or a run in which no feature has a term.
    """
    given = [Path(path) for path in paths]
    if len(given) < 2 or len({path.resolve() for path in given}) < len(given):
        raise InputError("--runs: give two or more different folders of finished runs of the lens")
    unfinished = [
        f"{path} (lacks {', '.join(missing)})"
        for path in given
        if (missing := [name for name in NEEDED if not (path / name).is_file()])
    ]
    if unfinished:
        raise InputError(f"no finished run of the lens: {'; '.join(unfinished)}")
    alone = len({path.name for path in given}) == len(given)
    verify.inputs(*given)
    return [read_run(path, path.name if alone else str(path)) for path in given]


def read_run(path: Path, name: str) -> LensRun:
    """One finished run."""
    settings = read_object(path / feature_lens.SETTINGS)
    with reading(path / "features.parquet", "is damaged"):
        table = files.read_parquet(check_file(path / "features.parquet")).set_index("feature")
    with reading(path / "named.npz", "is damaged"):
        annotated = feature_space.feature_terms(*feature_lens_tables.read_named(path))
    if annotated.matrix.shape[0] != len(table):
        raise InputError(f"{path} is damaged: features.parquet and named.npz disagree")
    if not annotated.annotated().size:
        raise InputError(f"{path}: no feature has a term, so there is nothing to compare")
    try:
        config = sae_jax.Dictionary.load(settings.get("dictionary") or path / "dictionary").config
    except (InputError, TypeError, ValueError):  # settings may say anything
        config = None
    return LensRun(name, settings, table, annotated, config)


def compare(a: LensRun, b: LensRun) -> Compared:
    """Match two runs; by chance: after each term of b has moved to as many features at random."""
    found = matching.match_annotations(a.annotated, b.annotated)
    own = b.annotated.matrix[b.annotated.annotated()].toarray()
    moved = np.random.default_rng(0).permuted(own, axis=0)
    mixed = feature_space.feature_terms(moved, b.annotated.terms)
    return Compared(a, b, found, matching.match_annotations(a.annotated, mixed).mean)


def overview(runs: Sequence[LensRun]) -> pd.DataFrame:
    """One row a run: its features by kind, how many of them have terms, and how many terms."""
    rows = []
    for run in runs:
        n_terms = np.diff(run.annotated.matrix.indptr)
        annotated = n_terms[n_terms > 0]
        row = {"run": run.name, "latents": run.config and run.config.n_latents}
        row["live"] = len(run.table)
        for rule in ("text", "code"):
            if f"kind_{rule}" in run.table:
                kinds = run.table[f"kind_{rule}"].value_counts()
                row |= {f"{k} ({rule})": int(kinds.get(k, 0)) for k in ("local", "global")}
        row |= {
            "annotated": len(annotated), "share of live": len(annotated) / len(run.table),
            "terms": int((run.annotated.matrix.sum(axis=0) > 0).sum()),
            "terms a feature": annotated.mean(),
            "sem": annotated.std(ddof=1) / len(annotated) ** 0.5 if len(annotated) > 1 else np.nan,
        }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def summary(pair: Compared) -> dict[str, Any]:
    """One row of comparisons.csv."""
    found = pair.found
    return {
        "a": pair.a.name, "b": pair.b.name, "annotated_a": found.n_a, "annotated_b": found.n_b,
        "matched": len(found.pairs), "mean_jaccard": found.mean, "by_chance": pair.chance,
        "shared_terms": found.n_shared, "only_a": found.n_only_a, "only_b": found.n_only_b,
        "pearson": found.pearson, "spearman": found.spearman,
    }  # fmt: skip


def matched_pairs(pair: Compared) -> pd.DataFrame:
    """One row a pair of features, the most similar first, with what each is named for."""
    columns: dict[str, Any] = {"run_a": pair.a.name, "run_b": pair.b.name}
    for side, run in (("a", pair.a), ("b", pair.b)):
        rows = run.table.iloc[pair.found.pairs[side]]
        columns |= {f"feature_{side}": rows.index, f"n_terms_{side}": rows["n_terms"].to_numpy(),
                    f"best_term_{side}": rows["best_term"].astype(object).to_numpy()}  # fmt: skip
    return pd.DataFrame(columns | {"jaccard": pair.found.pairs["similarity"].to_numpy()})


def terms(runs: Sequence[LensRun]) -> pd.DataFrame:
    """Features that each term names in each run [terms, runs], the most frequent terms first."""
    counts = [feature_space.term_frequencies(run.annotated)["n_features"] for run in runs]
    table = pd.concat(counts, axis=1, keys=[run.name for run in runs])
    table = table.fillna(0).astype(np.int64).sort_index().rename_axis("term")
    return table.loc[table.sum(axis=1).sort_values(ascending=False, kind="stable").index]


def differ_by_seed(runs: Sequence[LensRun]) -> bool:
    """Whether these are three or more dictionaries of one configuration, cells and labels."""
    configs = [run.config for run in runs]
    if len(runs) < 3 or None in configs or any("kind_text" not in run.table for run in runs):
        return False
    first = runs[0]
    alike = all(
        dataclasses.replace(run.config, seed=first.config.seed) == first.config
        and all(run.settings.get(name) == first.settings.get(name) for name in OF_CELLS)
        for run in runs
    )
    return alike and len({config.seed for config in configs}) == len(runs)


def seeds(runs: Sequence[LensRun]) -> pd.DataFrame:
    """Table S6 by both rules: `sem` divides by n - 1, `sem_paper` by n, as the paper's must."""
    parts = []
    for rule in ("text", "code"):
        kinds = [
            pd.DataFrame(
                {
                    "kind": [
                        *run.table[f"kind_{rule}"],
                        *["dead"] * (run.config.n_latents - len(run.table)),
                    ]
                }
            )
            for run in runs
        ]
        part = characterisation.seed_robustness(kinds)
        part.insert(2, "sem_paper", characterisation.seed_robustness(kinds, ddof=0)["sem"])
        part.insert(0, "rule", rule)
        parts.append(part.reset_index())
    return pd.concat(parts, ignore_index=True)


def write_page(
    out: Path, compared: Sequence[Compared], tables: dict[str, pd.DataFrame], pairs: pd.DataFrame
) -> None:
    """Draw the figures and write `out`/report.html."""
    common = tables["terms"].head(SHOWN)
    sections = [
        ("Runs", [report.table(tables["runs"])]),
        ("Every two of them", [report.table(tables["comparisons"])]),
        ("Most frequent terms (Table S7)", [report.table(common)]),
    ]
    if "seeds" in tables:
        note = (
            "Mean and standard error over seeds of training, by the text's and the code's rule for "
            "local features. The paper's errors are those that divide by n (sem_paper)."
        )
        sections.append(
            ("Seeds (Table S6)", [report.paragraph(note), report.table(tables["seeds"])])
        )
    for number, pair in enumerate(compared):
        found, a, b = pair.found, pair.a.name, pair.b.name
        text = (
            f"{len(found.pairs)} pairs of features, mean Jaccard similarity of their terms "
            f"{found.mean:.3f} (0: no term in common, 1: the same terms). Pairs are chosen for "
            f"their similarity, so chance is not 0: it is {pair.chance:.3f} after each term of {b} "
            "has moved to as many other features, drawn at random."
        )
        pieces = [report.paragraph(text)]
        if found.n_shared:
            drawn = lens_plots.shared_term_counts(found, a, b)
            path = plots.save(drawn, out / "figures", f"shared_terms_{number}")
            pieces.append(report.picture(path, "Features that a shared term names (Fig. S32).",
                                         "60%"))  # fmt: skip
        own = pairs[(pairs["run_a"] == a) & (pairs["run_b"] == b)].drop(columns=["run_a", "run_b"])
        pieces.append(report.table(own.head(SHOWN)))
        for name, mine, other in ((a, "a", "b"), (b, "b", "a")):
            alone = found.terms[found.terms[other] == 0][mine].nlargest(SHOWN)
            if len(alone):
                text = ", ".join(f"{term} ({n})" for term, n in alone.items())
                pieces.append(report.paragraph(f"Only {name}: {text}."))
        sections.append((f"{a} and {b}", pieces))
    report.write(out / "report.html", "Feature lens: runs compared", sections)


if __name__ == "__main__":
    cli.launch(main, define_flags)

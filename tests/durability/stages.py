"""Five commands, small but whole: what each reads, how a user gives it again, what it must leave.

All run in the folder that holds `inputs`, and fill `out`; their paths are relative, so that two
runs in different places have the same settings.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

OUT = Path("out")
GENES, CELLS, TERMS = 110, 150, 8

TRAIN = [
    "--data=inputs/rows.npy", "--preset=vanilla,topk", "--n_latents=8", "--l1_weight=0.05",
    "--k=2", "--seeds=0", "--learning_rate=1e-3,1e30", "--batch_size=32", "--epochs=2",
    "--checkpoint_seconds=0", "--workdir=out",
]  # fmt: skip
EXTRACT = [
    "--model=scgpt", "--checkpoint=inputs/model", "--h5ad=inputs/cells.h5ad", "--output=out",
    "--layers=0,1", "--device=cpu", "--export=npy",
]  # fmt: skip
SETS = ["--gene_sets=inputs/sets.gmt", "--min_size=5"]
LENS = [
    "--h5ad=inputs/cells.h5ad", "--expression_is=counts", "--label=kind", "--embedding=X_some",
    *SETS, "--n_latents=12", "--epochs=300", "--learning_rate=0.02", "--l1_weight=0.05",
    "--percentile=70", "--null_features=30", "--null_sample=10", "--direction=up", "--seeds=2",
    "--consensus", "--every_gene", "--workdir=out",
]  # fmt: skip
CONCEPTS = [
    "--h5ad=inputs/cells.h5ad", "--labels=kind", "--d_model=4", "--model_epochs=2", *SETS,
    "--quick", "--n_latents=12", "--k_share=0.25", "--seeds=0,1", "--epochs=20",
    "--learning_rate=0.01", "--most=2", "--permutations=40", "--causal=1", "--prototypes=2",
    "--counterfactuals=1", "--per_class=20,8", "--consensus", "--workdir=out",
]  # fmt: skip
BROWSE = [
    "inputs/run", "--state=out", "--new_study=first", "--concepts=6", "--neurons=0",
    "--repeats=1", "--raters=ann,bob",
]  # fmt: skip
BLOCK_CELLS = 50  # of an extraction: three blocks


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
      run: gives it, in this process; `again`: after an earlier one was killed.
      prepare: writes what it reads into a new folder.
      modules: what it imports, to be loaded once.
      contents: what is compared of the files of a pattern; of the others every byte is.
      unkept: of a folder in which it was killed: what it had told was done, and is not there.
    """

    name: str
    run: Callable[[bool], None]
    prepare: Callable[[Path], None]
    modules: tuple[str, ...]
    contents: Mapping[str, Callable[[Path], Any]] = dataclasses.field(default_factory=dict)
    unkept: Callable[[Path], list[str]] = lambda folder: []

    def load(self) -> None:
        """Import all of it, and put stand-ins where time goes that has no part in what is shown:
        the compilation of UMAP, and the drawing of figures, whose files are blank instead."""
        for name in self.modules:
            importlib.import_module(name)
        if "matplotlib" in sys.modules:
            _blank_figures()
        if "jax" in sys.modules:
            _cached_programs()

    def verify(self, out: Path) -> None:
        """Everything that can be, against its manifest."""
        from sae_jax import manifest

        for found in out.rglob(manifest.NAME):
            manifest.check(found.parent, "full")
        for path in out.glob("*.zarr"):
            from extract import store

            store.open(path).verify()


def program(name: str, arguments: list[str]) -> None:
    """`sae-jax NAME ...`, as its console script gives it."""
    from experiments import cli

    sys.argv = ["sae-jax", name, *arguments]
    cli.main()


def train(again: bool) -> None:
    """Two programs of two members, of which one diverges; a checkpoint after every epoch."""
    program("sweep", TRAIN)


def extract(again: bool) -> None:
    """Two layers of a scGPT, as plain arrays too."""
    from extract import main, store

    store.BLOCK_CELLS = BLOCK_CELLS
    sys.argv = ["sae-jax-extract", *EXTRACT]
    main.cli()


def feature_lens(again: bool) -> None:
    """Trained here, of two seeds, with everything that it can leave."""
    program("lens", LENS + ["--resume"] * again)


def concepts(again: bool) -> None:
    """With an scVI trained here."""
    program("concepts", CONCEPTS + ["--resume"] * again)


def browse(again: bool) -> None:
    """The index and a study by the command, unless it says that there is that study; then two
    raters, who send what was not acknowledged again, as their pages do."""
    from analysis.browser import study

    if "first" not in (held.name for held in study.load_all(OUT)):
        try:
            program("browse", BROWSE)
        except SystemExit as ended:
            if ended.code:
                raise
    design = study.load(OUT, "first")
    held = study.open_answers(OUT, design)
    for rater in design.raters:
        mine = held.of(rater.name)
        for i, number in enumerate(rater.order[:3]):
            answer = {"process": "yes", "process_words": f"{rater.name} says {i}"}
            mine.save(number, answer, 0, f"save-{i:04d}")
            print(f"acknowledged {rater.name} save-{i:04d}", flush=True)
        mine.undo(rater.order[0], 1, "undo-0000")
    held.close()


def write_rows(folder: Path) -> None:
    """128 rows of 6 dimensions."""
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(128, 6)).astype(np.float32)
    np.save(folder / "rows.npy", rows)


def write_cells(folder: Path) -> None:
    """Three kinds of cells with genes of their own, a map, gene sets, a scGPT of these genes."""
    import anndata
    import pandas as pd
    from scipy import sparse

    folder.mkdir()
    rng = np.random.default_rng(0)
    kind, own = np.arange(CELLS) % 3, GENES // 4
    rate = np.full((CELLS, GENES), 0.5)
    for k in range(3):
        rate[kind == k, k * own : (k + 1) * own] = 3.0
    names = [f"G{g}" for g in range(GENES)]
    labels = np.asarray(["kind A", "kind B", "kind C"])[kind]
    anndata.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame({"kind": labels}, index=[f"cell{i}" for i in range(CELLS)]),
        var=pd.DataFrame(index=names),
        obsm={"X_some": 4 * np.eye(3)[kind] + rng.normal(size=(CELLS, 3)) * 0.5},
    ).write_h5ad(folder / "cells.h5ad")
    sets = {f"kind {'ABC'[k]}": names[k * own : (k + 1) * own] for k in range(3)}
    sets |= {f"random {i}": list(rng.permutation(names)[:15]) for i in range(TERMS - 3)}
    lines = ["\t".join([term, "", *genes]) for term, genes in sets.items()]
    (folder / "sets.gmt").write_text("\n".join(lines))


def write_cells_and_model(folder: Path) -> None:
    """And a scGPT of random weights that knows these genes."""
    import torch

    from tests.extract import small

    def widen(parts: dict[str, Any]) -> None:
        names = [*(f"G{g}" for g in range(GENES)), "<pad>", "<cls>", "<eoc>"]
        parts["vocab"] = {name: i for i, name in enumerate(names)}
        width = parts["args"]["embsize"]
        parts["weights"]["encoder.embedding.weight"] = torch.randn(len(names), width) * 0.5

    write_cells(folder)
    small.write_checkpoint(folder / "model", widen)


def write_run(folder: Path) -> None:
    """What a lens leaves, of random numbers."""
    from analysis.browser import synthetic

    folder.mkdir()
    synthetic.write(
        folder / "run", 24, 100, k=4, n_labels=3, n_genes=120, n_terms=30, attributed=10, d=5
    )


def without(*names: str) -> Callable[[Path], Any]:
    """Of a JSON file all but some keys, wherever they are."""

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pruned(each) for key, each in value.items() if key not in names}
        return [pruned(each) for each in value] if isinstance(value, list) else value

    return lambda path: json.dumps(pruned(json.loads(path.read_text())), sort_keys=True)


def weights(path: Path) -> Any:
    """Of a saved scVI all but a random id and the time in its name."""
    import torch

    saved = torch.load(path, weights_only=False)
    state = saved["model_state_dict"].items()
    values = {name: np.asarray(each).tobytes() for name, each in state if torch.is_tensor(each)}
    return values, list(saved["var_names"])


def answers(path: Path) -> Any:
    """Of raters' answers all but when they were given."""
    with sqlite3.connect(path) as file:
        found = file.execute(
            "SELECT id, rater, item, version, base, source, before, answer, save FROM change"
        ).fetchall()
    file.close()
    return found


def unkept_answers(folder: Path) -> list[str]:
    """Answers that raters were told are saved, and are not in the file."""
    said = folder / "said"
    told = re.findall(
        r"^acknowledged (\w+) (\S+)$", said.read_text() if said.exists() else "", re.M
    )
    if not told:
        return []
    with tempfile.TemporaryDirectory() as copy:  # reading would mend what was killed
        for path in (folder / OUT / "studies/first").glob("answers.sqlite*"):
            shutil.copy(path, copy)
        with sqlite3.connect(f"{copy}/answers.sqlite") as file:
            kept = file.execute("SELECT rater, save FROM change").fetchall()
        file.close()
    return [f"{rater} lost {save}" for rater, save in told if (rater, save) not in kept]


def _blank_figures() -> None:
    from matplotlib.figure import Figure

    from analysis import plots
    from sae_jax import files
    from tests.experiments import quick

    def save(figure: Figure, folder: Path, name: str) -> Path:
        for suffix in (".pdf", ".png"):
            with files.write_aside(folder / f"{name}{suffix}") as fresh:
                Figure((0.1, 0.1)).savefig(fresh)
        return folder / f"{name}.png"

    plots.save = save
    sys.modules["umap"] = SimpleNamespace(UMAP=quick.Plane)


def _cached_programs() -> None:
    """However short their compilation is, in the folder that JAX was told."""
    import jax

    from sae_jax import distributed

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    distributed.use_compilation_cache = lambda: None


def settle() -> None:
    """Before anything is imported: one thread for what would take all, and a fixed date in PDFs."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ |= {"SOURCE_DATE_EPOCH": "0", "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}


FIGURES = ("matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("train", train, write_rows, ("experiments.sweep", *FIGURES)),
        Stage("extract", extract, write_cells_and_model, ("extract.main",)),
        Stage(
            "feature_lens", feature_lens, write_cells, ("experiments.feature_lens", *FIGURES),
        ),
        Stage(
            "concepts", concepts, write_cells, ("experiments.concepts", "scvi", *FIGURES),
            {
                "out/scvi/model.pt": weights,
                "attribution.json": without("model"),  # a hash of that file
                "manifest.json": without(
                    "scvi/model.pt", "attribution.json",
                    *(f"attribution/{of}/{name}" for of in ("concepts", "neurons")
                      for name in ("attribution.json", "manifest.json")),
                ),
            },
        ),
        Stage(
            "browse", browse, write_run,
            ("experiments.browse", "analysis.browser.run", "analysis.browser.study_draw",
             "analysis.browser.documents"),
            {"answers.sqlite": answers, "study.json": without("token", "made")}, unkept_answers,
        ),
    )
}  # fmt: skip

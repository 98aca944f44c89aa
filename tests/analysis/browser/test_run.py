"""Opening run folders: what they are together, what is refused, what is damaged, what is hidden."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from analysis.browser import columns, documents, index, rows, wire
from analysis.browser.run import Run
from sae_jax import InputError
from tests.analysis.browser import run_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_cases.lens(tmp_path_factory.mktemp("run") / "whole")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return Run.open([folder], folder.parent / "state")


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Path, Path]:
    found = (folder.parent / "lens", folder.parent / "concepts")
    run_cases.split(folder, *found)
    return found


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_the_process_stays_without_jax(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from analysis.browser import documents, search, table, wire;"
        "from analysis.browser.run import Run;"
        f"run = Run.open([{str(folder)!r}], {str(tmp_path)!r});"
        "[wire.pack(documents.document(run, key)) for key in ('about', 'feature/0/page')];"
        "print(sorted({'jax', 'torch', 'flax', 'orbax', 'matplotlib'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_table_is_the_folders(run: Run, folder: Path) -> None:
    table = pd.read_parquet(folder / "features.parquet").set_index("feature")
    assert run.features.index.tolist() == table.index.tolist()
    for name in ("latent", "n_active", "density", "mean_active", "max_activation", "technical"):
        assert np.allclose(run.features[name].astype(float), table[name], equal_nan=True), name
    assert (run.features["scope"] == table["kind_text"]).all()
    assert (run.features["replication"] == table["replicated_by_direction"]).all()
    assert (run.features["kind"] == "concept").all()
    assert [column.name for column in run.columns] == ["name", *run.features.columns]
    named = pd.read_parquet(folder / "top_terms.parquet").query("named")[["feature", "term"]]
    gsea = pd.read_parquet(folder / "gsea_attribution.parquet").query("q <= 0.05")
    both = pd.concat([named, gsea[["feature", "term"]]]).astype(str)
    count = both.groupby("feature")["term"].nunique().reindex(table.index)
    assert (run.features["n_terms"] == count.fillna(0)).all()


def test_rows_of_a_feature_are_those_of_the_table(run: Run, folder: Path) -> None:
    for name in ("genes", "attribution", "samples", "gsea_dge", "enrichment"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        columns = [column for column in table if column != "feature"][:3]
        for feature in (0, 7, 9, 10, 95):
            truth = table.loc[table["feature"] == f"feature_{feature}", columns]
            found = run.rows(name, feature, columns)
            if truth.empty:
                assert found is None
                continue
            for column in columns:
                assert found[column].tolist() == truth[column].tolist()


@pytest.mark.parametrize("size", [1, 7, 120, 10**6])
def test_whole_features_come_in_parts_of_any_size(folder: Path, size: int) -> None:
    table = rows.Rows(folder / "attribution.parquet")
    table.find({f"feature_{i}": i for i in range(96)}, 96)
    truth = pd.read_parquet(folder / "attribution.parquet")
    found = list(table.by_features(["gene", "attribution"], size))
    feature = np.concatenate([part for part, _ in found])
    assert np.array_equal(feature, truth["feature"].astype(str).str[8:].astype(int))
    values = np.concatenate([part["attribution"].to_numpy() for _, part in found])
    assert np.array_equal(values, truth["attribution"])
    parts = [part for _, part in table.batches(["feature"], size)]
    assert sum(map(len, parts)) == len(truth)


def test_the_fingerprint_is_of_the_contents(run: Run, copy: Path, tmp_path: Path) -> None:
    other = Run.open([copy], tmp_path / "state")
    assert other.fingerprint == run.fingerprint
    (made,) = (tmp_path / "state" / "index").glob("*/meta.json")
    before = made.stat()
    Run.open([copy], tmp_path / "state").close()
    assert made.stat() == before
    table = pd.read_parquet(copy / "features.parquet").assign(new=1.5)
    table.to_parquet(copy / "features.parquet")
    changed = Run.open([copy], tmp_path / "state")
    assert changed.fingerprint != run.fingerprint
    assert len(list((tmp_path / "state" / "index").glob("*/meta.json"))) == 2
    assert changed.features["new"].tolist() == [1.5] * 96


def test_a_run_shows_its_own_numbers_whatever_else_uses_its_state(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    running = Run.open([folder], state)
    for seed in range(1, 5):  # so many that the first's index would be removed if none held it
        other = run_cases.lens(tmp_path / f"other {seed}", seed=seed)
        Run.open([other], state).close()
    assert len(list((state / "index").iterdir())) == index.KEPT + 1
    for key in ("feature/3/activation", "cell/5", "label/0/0", "gene/7"):
        one, same = (wire.pack(documents.document(each, key)) for each in (running, run))
        assert one == same, key


def test_nothing_is_written_to_the_run(run: Run, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    for key in ("about", "feature/3/page", "feature/3/gsea/dge", "gene/3", "term/3"):
        documents.document(run, key)
    assert {path.name for path in folder.iterdir()} == names
    assert not any(name.startswith(".") for name in names)


def test_two_programs_of_one_dictionary_are_one_run(
    run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    both = Run.open(pair, tmp_path)
    assert both.names == [*run.names, "neuron_0+"]
    assert both.feature("concept_7") == both.feature("feature_7") == 7
    assert both.feature("neuron_0+") == 96
    assert both.feature("concept_95") is None
    assert both.features["kind"].tolist() == ["concept"] * 96 + ["neuron"]
    for feature in (0, 5, 89, 95):
        for side, held in enumerate(run.index.entries("by_feature", feature)):
            assert np.array_equal(both.index.entries("by_feature", feature)[side], held)
    assert np.isclose(both.index.entries("by_feature", 96)[1].max(), 2)
    for key in ("feature/3/attribution", "feature/3/gsea/attribution", "feature/3/deletion"):
        one, other = documents.document(run, key), documents.document(both, key)
        assert one.keys() == other.keys()
    a, b = (documents.document(each, "feature/3/attribution") for each in (run, both))
    assert a["values"].tolist() == b["values"].tolist()
    assert a["names"] == b["names"]
    assert both.features["attributed_genes"].tolist()[:2] == ["GENE1, GENE2"] * 2
    about = documents.document(both, "about")
    assert about["kinds"] == {"concept": 96, "neuron": 1}
    assert about["programs"] == ["lens", "concepts"]
    flipped = Run.open(pair[::-1], tmp_path / "flipped")
    assert flipped.names[:2] == ["concept_0", "concept_1"]
    assert flipped.n_features == 97
    for name in ("top_genes", "attributed_genes"):  # by what they come of, whichever is first
        of_both = [run.features[name].tolist()[:90] for run in (both, flipped)]
        assert of_both[0] == of_both[1]


def change_cells(adata: anndata.AnnData) -> None:
    adata.obs_names = [*adata.obs_names[1:], "another"]


def change_decoder(adata: anndata.AnnData) -> None:
    adata.varm["decoder"] = adata.varm["decoder"] + 0.1


@pytest.mark.parametrize(
    ("change", "message"), [(change_cells, "different cells"), (change_decoder, "decoders differ")]
)
def test_folders_that_do_not_belong_together(
    folder: Path, copy: Path, tmp_path: Path,
    change: Callable[[anndata.AnnData], None], message: str,
) -> None:  # fmt: skip
    adata = anndata.read_h5ad(copy / "features.h5ad")
    change(adata)
    adata.write_h5ad(copy / "features.h5ad")
    with pytest.raises(InputError, match=message):
        Run.open([folder, copy], tmp_path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("features.h5ad", truncated), ("features.parquet", truncated), ("lens.json", truncated),
        ("attribution.parquet", truncated), ("genes.parquet", flipped),
        ("gene_sets.parquet", truncated), ("deletion.parquet", truncated),
        ("attribution.parquet", flipped),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(
    copy: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / name)
    with pytest.raises(InputError, match=name):
        Run.open([copy], tmp_path / "state")
    assert not list((tmp_path / "state").glob("index/*"))


def test_wrong_contents_are_named(copy: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(copy / "genes.parquet")
    for broken, message in (
        (table.sample(frac=1, random_state=0), "do not follow one another"),
        (table.assign(feature="feature_1234"), "is no feature"),
        (table.drop(columns="t"), "no column t"),
    ):
        broken.to_parquet(copy / "genes.parquet", index=False)
        with pytest.raises(InputError, match=rf"genes\.parquet.*{message}"):
            Run.open([copy], tmp_path / "state")
    (copy / "genes.parquet").unlink()
    adata = anndata.read_h5ad(copy / "features.h5ad")
    adata.X.data[3] = np.nan
    adata.write_h5ad(copy / "features.h5ad")
    with pytest.raises(InputError, match=r"features\.h5ad.*not finite"):
        Run.open([copy], tmp_path / "state")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        Run.open([tmp_path / "nowhere"], tmp_path)
    with pytest.raises(InputError, match="neither"):
        Run.open([tmp_path], tmp_path)
    with pytest.raises(InputError, match="at least one"):
        Run.open([], tmp_path)


@pytest.mark.parametrize(
    "settings", [{"label": ["x"]}, {"labels": {"a": 1}}, {"labels": [["x"]]}, {"percentile": "x"}]
)
def test_settings_of_another_type_are_named(
    copy: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    (copy / "lens.json").write_text(json.dumps(settings))
    for shown in (None, ["donor"]):
        with pytest.raises(InputError, match=rf"lens\.json .*{next(iter(settings))}"):
            Run.open([copy], tmp_path / "state", columns=shown)


def test_a_run_without_features_is_refused(copy: Path, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(copy / "features.h5ad")
    adata[:, :0].copy().write_h5ad(copy / "features.h5ad")
    for path in copy.glob("*.parquet"):
        path.unlink()
    with pytest.raises(InputError, match=r"features\.h5ad has no features"):
        Run.open([copy], tmp_path / "state")


def test_best_labels_of_all_features_are_of_the_same_columns(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    both = [Path(shutil.copytree(path, tmp_path / path.name)) for path in pair]
    (both[0] / "lens.json").write_text(json.dumps({"label": "cell_type"}))
    (both[1] / "concepts.json").write_text(json.dumps({"labels": ["donor"]}))
    told = pd.read_parquet(both[0] / "features.parquet")
    told["best_label"], told["best_label_auroc"] = "type 1", 0.123
    told.to_parquet(both[0] / "features.parquet", index=False)
    table = pd.read_parquet(both[1] / "features.parquet")
    table["donor:best"], table["donor:auroc"] = "donor 1", 0.999
    table.to_parquet(both[1] / "features.parquet", index=False)
    adata = anndata.read_h5ad(both[0] / "features.h5ad")
    x = np.c_[adata.X.toarray(), np.linspace(0, 2, adata.n_obs, dtype=np.float32)]
    for folders, column in ((both, "cell_type"), (both[::-1], "donor")):
        run = Run.open(folders, tmp_path / "state")
        assert set(run.features["label_column"]) == {column}
        known = adata.obs[column].notna().to_numpy()
        values = adata.obs[column][known]
        for name in (run.names[0], run.names[50], "neuron_0+"):
            place = 96 if name == "neuron_0+" else int(name.rpartition("_")[2])
            areas = {value: roc_auc_score(values == value, x[known, place])
                     for value in values.unique()}  # fmt: skip
            row = run.features.loc[name]
            assert row["label"] == max(areas, key=areas.get)
            assert row["auroc"] == pytest.approx(max(areas.values()), abs=1e-6)


def test_another_file_for_gene_info_is_named(folder: Path, tmp_path: Path) -> None:
    for name, content in (
        ("table.tsv", b"gene\tvalue\nA\t1\n"), ("mouse.tsv", b"#tax_id\tGeneID\tSymbol\t"
         b"Synonyms\tdbXrefs\n10090\t1\tA\t-\t-\n"), ("binary", bytes(range(256))),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / name))} "):
            Run.open([folder], tmp_path / "state", tmp_path / name)


def test_columns_of_another_rule_are_explained(folder: Path) -> None:
    table = pd.DataFrame({"kind_code": ["local"], "local_label_code": ["a"]})
    told = {column.name: column.description for column in columns.describe(table)}
    assert "published code" in told["kind_code"]
    assert "authors' code" in told["local_label_code"]


def test_a_table_alone_is_a_run(copy: Path, tmp_path: Path) -> None:
    for path in copy.iterdir():
        if path.name not in ("features.parquet", "lens.json"):
            path.unlink()
    run = Run.open([copy], tmp_path / "state")
    assert (run.n_cells, run.n_features) == (0, 96)
    about = documents.document(run, "about")
    absent = {name for name, told in about["panels"].items() if told}
    assert absent == set(run.PANELS)
    for key in documents.keys(run):
        found = documents.document(run, key)
        if key.startswith("feature/") and not key.endswith("page"):
            assert "sae-jax" in found["absent"] or "--resume" in found["absent"], key


def test_what_is_not_shown_is_nowhere(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in pair:
        settings = json.loads(next(path.glob("*.json")).read_text())
        next(path.glob("*.json")).write_text(json.dumps(settings | {"label": "cell_type"}))
    table = pd.read_parquet(pair[0] / "features.parquet")
    told = table.assign(best_label="type 1", best_label_auroc=0.9)
    told.to_parquet(pair[0] / "features.parquet", index=False)
    # As the quickstart has it, a column for each label.
    told.assign(**{"auroc:type 1": 0.9}).to_parquet(pair[0] / "features.parquet", index=False)
    run = Run.open(pair, tmp_path, columns=["donor"])
    assert not {"scope", "auroc:type 1"} & set(run.features)
    for key in [*list(documents.keys(run))[:60], "term/3", "gene/3", "label/0/1", "cell/3"]:
        said = repr(documents.document(run, key))
        assert "cell_type" not in said, key
        assert "'type 1'" not in said, key
        assert "n_counts" not in said, key
    whole = Run.open(pair, tmp_path)
    assert "cell_type" in repr(documents.document(whole, "about"))
    shown = [held["name"] for _, held in run.metadata]
    assert shown == ["donor"]
    one, other = (documents.document(each, f"label/{c}/0") for each, c in ((run, 0), (whole, 1)))
    assert one["column"] == other["column"] == "donor"
    assert [row["auroc"] for row in one["features"]] == [row["auroc"] for row in other["features"]]
    with pytest.raises(InputError, match="no column batch"):
        Run.open(pair, tmp_path, columns=["donor", "batch"])


def test_row_groups_of_a_feature_alone_are_read(folder: Path, run: Run) -> None:
    read = []
    original = pq.ParquetFile.read_row_groups

    def noted(self: pq.ParquetFile, groups: range, *args: object, **kwargs: object) -> object:
        read.append(list(groups))
        return original(self, groups, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read_row_groups", noted)
        documents.document(run, "feature/9/attribution")
    assert read == [[1], [1]]  # of attribution and of samples

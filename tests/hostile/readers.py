"""Every reader of ours, each with a small valid input that we write and what it makes of it."""

import dataclasses
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import anndata
import numpy as np
import pandas as pd
import safetensors.torch
import scipy.sparse
import torch

import extract
from analysis import calibration, cells, gene_names, gene_sets, ontology
from analysis.attribution_store import Forwards, Part, Store
from analysis.browser import safety, study
from analysis.browser.folder import Folder
from analysis.browser.run import Run as BrowserRun
from experiments import (
    configurations,
    feature_lens_compare,
    folders,
    inputs,
    merge,
    run_folder,
    steering,
)
from extract import cells as extract_cells
from extract import checkpoints, hashing, provenance, store
from extract.models import multidgd, scvi
from sae_jax import Dictionary, SAEConfig, data, interop, manifest
from sae_jax import Run as TrainedRun
from sae_jax.state import History, Normalizer, Params
from sae_jax.workdir import Member, Stored, Workdir
from tests.analysis.browser import study_cases
from tests.extract import small, test_geneformer

N, D = 12, 4  # rows and dimensions
GENES = [f"GENE{i}" for i in range(8)]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader, by what a user calls.

    make: writes valid input into an empty folder. read: of that folder; all that it makes of it.
    files: those that faults are put into. named: what a message may name instead of the file.
    checked: files of which no changed byte may go unnoticed (they are ours, with checksums).
    light: only faults of bytes and paths, and few of them: the format has its own reader above.
    slow: some 100 ms a case. makes: how names begin of what reading leaves by design.
    """

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    named: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    light: bool = False
    slow: bool = False
    makes: tuple[str, ...] = ("case/.nothing",)


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- dictionaries ---------------------------------------------------------------------------------


def dictionary(seed: int = 0) -> Dictionary:
    """Small, with a tensor of most kinds."""
    n = 6
    config = SAEConfig(
        d_in=D, n_latents=n, activation="jump_relu", pre_bias="free", l0_weight=0.1,
        input_normalization="zscore", seed=seed,
    )  # fmt: skip
    params = Params(
        encoder=_random(D, n, seed=seed), encoder_bias=_random(n), decoder=_random(n, D),
        decoder_bias=_random(D), pre_bias=_random(D), log_threshold=_random(n),
    )  # fmt: skip
    return Dictionary(config, params, Normalizer(_random(D), np.abs(_random(D)) + 1), {"epochs": 3})


def _read_dictionary(found: Dictionary) -> Any:
    return [found.config, found.params, found.normalizer, found.provenance]


def _learned(folder: Path) -> None:
    """A dictionary of dictionary_learning."""
    state = {"encoder.weight": _random(6, D), "encoder.bias": _random(6), "b_dec": _random(D),
             "decoder.weight": _random(D, 6), "k": 2, "threshold": 0.1}  # fmt: skip
    torch.save({name: torch.as_tensor(value) for name, value in state.items()}, folder / "ae.pt")
    told = {"dict_class": "BatchTopKSAE", "k": 2, "activation_dim": D, "dict_size": 6, "lr": 0.1}
    (folder / "config.json").write_text(json.dumps({"trainer": told, "buffer": {"n": 3}}))


def _run(folder: Path) -> None:
    """A finished run of two members."""
    members = {}
    configs = [dictionary(seed).config for seed in range(2)]
    settings = {"configs": [config.to_dict() for config in configs], "epochs": 2, "data_seed": 0}
    made = Workdir(folder, settings)
    for i, config in enumerate(configs):
        fields = {field.name: np.array([1.0, 0.5]) for field in dataclasses.fields(History)}
        row = config.to_dict() | {"status": "trained", "train_r2": 0.5, "validation_r2": 0.4}
        members[i] = Member(dictionary(i), row, History(**fields))
    made.write(members)
    made.finish()


def _loaded(folder: Path) -> Any:
    run = TrainedRun.load(folder)
    return [*map(_read_dictionary, run.dictionaries), run.results, run.history]


def _resume(folder: Path) -> Any:
    configs = [dictionary(seed).config.to_dict() for seed in range(2)]
    found = Workdir(folder, {"configs": configs, "epochs": 2, "data_seed": 0}).finished()
    rows = [(member.row, member.history) for member in found.values()]
    return [*map(_read_dictionary, Stored(folder, found)), rows]


def _shards(folder: Path) -> None:
    """A sweep in one shard."""
    shard = folder / "shard-000-of-001"
    shard.mkdir()
    (shard / "sweep.json").write_text(json.dumps({"positions": [0, 1], "preset": ["vanilla"]}))
    _run(shard)
    manifest.write(shard)


def _merge(folder: Path) -> Any:
    finished, missing = merge.look(folder)
    return missing, merge.gather(finished, folder.with_name("merged")) if finished else None


# --- rows and cells -------------------------------------------------------------------------------


def adata() -> anndata.AnnData:
    """Counts of cells with all that our readers look for."""
    counts = np.random.default_rng(0).poisson(2, (N, len(GENES))).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {"kind": pd.Categorical(["a", "b", None] * 4), "depth": np.arange(N) / 2,
         "split": ["train", "test"] * 6, "maybe": pd.array([1, None, 3] * 4, dtype="Int64")},
        index=[f"cell{i}" for i in range(N)],
    )  # fmt: skip
    return anndata.AnnData(
        scipy.sparse.csr_matrix(counts), obs=obs,
        var=pd.DataFrame({"symbol": [f"S{i}" for i in range(8)]}, index=GENES),
        obsm={"X_pca": _random(N, D), "X_umap": _random(N, 2)}, layers={"dense": counts},
        uns={"extraction": {"model": "scgpt", "layer": 2, "empty_cells": [], "x": {"y": 0.5}}},
    )  # fmt: skip


def _h5ad(folder: Path) -> None:
    adata().write_h5ad(folder / "cells.h5ad")


def _zarr(folder: Path) -> None:
    with anndata.settings.override(zarr_write_format=3):
        adata().write_zarr(folder / "cells.zarr")


def _rows(name: str) -> Callable[[Path], Any]:
    """All that sae_jax reads of a file of cells."""

    def read(folder: Path) -> Any:
        path = str(folder / name)
        return [
            data.load(path), np.asarray(data.open_rows(f"{path}:obsm/X_pca")[2:5]),
            *(data.load_obs(path, column) for column in ("kind", "depth", "split", "maybe")),
            data.provenance(path),
        ]  # fmt: skip

    return read


def _expression(name: str) -> Callable[[Path], Any]:
    """All that extract reads of a file of cells."""

    def read(folder: Path) -> Any:
        backed = extract_cells.open_backed(str(folder / name), None)
        expression = extract_cells.Expression(backed, None)
        return [expression.names, backed.obs, list(backed.var_names), *expression.all_rows()]

    return read


def _cells(folder: Path) -> Any:
    """All that analysis reads of a file of cells."""
    path = folder / "cells.h5ad"
    found = cells.read(path)
    by_parts = cells.parts(path, "X", "counts")
    return [
        cells.labels(found, "kind"), cells.embedding(found, "X_pca"),
        cells.expression(found, "X", "counts", "symbol").x, by_parts.genes, *by_parts(),
        run_folder.input_maps(path, found.obs_names),
    ]  # fmt: skip


def _annotations(name: str) -> Callable[[Path], Any]:
    """All that analysis reads of a file of cells whose matrices stay there."""

    def read(folder: Path) -> Any:
        found = cells.annotations(folder / name)
        return [found.obs, found.var, dict(found.obsm)]

    return read


def _writer(folder: Path) -> store.Writer:
    """Of ten rows, in five chunks and three blocks."""
    obs = pd.DataFrame({"kind": list("abcdefghij")}, index=[f"c{i}" for i in range(10)])
    about = {"pooling": "cls", "empty_cells": [], "store_dtype": "float32", "layer": 0,
             "obs_names_sha256": hashing.rows_hash(obs, "cls")}  # fmt: skip
    about |= {"identity": provenance.identity(about)}
    with mock.patch.multiple(store, _CHUNK_BYTES=2 * D * 4, BLOCK_CELLS=4):
        return store.Writer(folder, {"layer_00": 0}, obs, D, about, "float32")


def _fill(writer: store.Writer, blocks: int) -> store.Writer:
    for block in writer.blocks[:blocks]:
        if block.number not in writer.done:
            writer.write(block.number, block.rows, {"layer_00": _random(10, D)[block.rows]})
    return writer


def _extraction(folder: Path) -> None:
    """A finished store."""
    _fill(_writer(folder), 3).finish()


def _goes_on(folder: Path) -> Any:
    """The same command after a kill."""
    with store.locked(folder):
        _fill(_writer(folder), 3).finish()
    return _read_store(folder)


def _read_store(folder: Path) -> Any:
    found = store.open(folder / "layer_00.zarr")
    found.verify()
    return [found.X[:], found.obs, sorted(found.extraction.items())]  # folders have no order


# --- models ---------------------------------------------------------------------------------------


def _described(model: Any) -> Any:
    network = next(value for value in vars(model).values() if isinstance(value, torch.nn.Module))
    return [list(model.genes), model.d_model, network.state_dict()]


def _geneformer(folder: Path) -> None:
    test_geneformer.save(folder)
    state = torch.load(folder / "pytorch_model.bin")
    safetensors.torch.save_file(
        {name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    (folder / "pytorch_model.bin").unlink()
    path = folder / "dictionaries/gene_median_dictionary.json"
    path.with_suffix(".pkl").write_bytes(pickle.dumps(json.loads(path.read_text())))
    path.unlink()


def _scvi(folder: Path) -> None:
    settings = scvi._DEFAULTS | {"n_hidden": 4, "n_latent": 2}
    torch.manual_seed(0)
    network = scvi._Network(len(GENES), 0, 0, settings)
    registry = {
        "scvi_version": "1.4.2", "model_name": "SCVI", "setup_method_name": "setup_anndata",
        "setup_args": {"batch_key": None},
        "field_registries": {"batch": {"state_registry": {
            "categorical_mapping": np.array(["all"], object)}}},
    }  # fmt: skip
    given = {"non_kwargs": {"n_hidden": 4, "n_latent": 2}, "kwargs": {"kwargs": {}}}
    torch.save(
        {"model_state_dict": network.state_dict(), "var_names": np.array(GENES, object),
         "attr_dict": {"registry_": registry, "init_params_": given}},
        folder / "model.pt",
    )  # fmt: skip


def _multidgd(folder: Path) -> None:
    settings = {"latent_dimension": 2, "n_hidden": 1, "n_hidden_modality": 2, "n_units": 4,
                "modalities": ["rna"], "n_features": 8, "modality_switch": None,
                "correction_variable": None}  # fmt: skip
    torch.manual_seed(0)
    decoder = multidgd._Decoder(2, [8], settings)
    weights = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    weights["representation.z"] = torch.randn(3, 2)
    torch.save(weights, folder / "small.pt")
    (folder / "small_hyperparameters.json").write_text(json.dumps(settings))
    (folder / "small_obs.csv").write_text(
        "cell,train_val_test\n" + "".join(f"cell{i},train\n" for i in range(3))
    )


# --- text -----------------------------------------------------------------------------------------

GMT = "T cells\tabout\tGENE0\tGENE1,1.0\tGENE2\nB cells\t\tGENE3\tGENE4\n"
OBO = """format-version: 1.2
subsetdef: goslim_generic "Generic GO slim"

[Term]
id: GO:0000001
name: root
namespace: biological_process

[Term]
id: GO:0000002
name: child
namespace: biological_process
alt_id: GO:0000009
subset: goslim_generic
def: "What it is." [PMID:1]
is_a: GO:0000001 ! root

[Term]
id: GO:0000003
name: part
namespace: biological_process
relationship: part_of GO:0000002 ! child

[Typedef]
id: part_of
name: part of
is_transitive: true
"""
GAF = "!gaf-version: 2.2\n" + "".join(
    f"UniProtKB\tP{i}\tGENE{i}\tinvolved_in\tGO:000000{i % 2 + 2}\tPMID:1\tIDA\t\tP\tname\tsyn\t"
    "protein\ttaxon:9606\t20200101\tUniProt\t\t\n"
    for i in range(6)
)
GENE_INFO = (
    "#tax_id\tGeneID\tSymbol\tSynonyms\tdbXrefs\tdescription\tSymbol_from_nomenclature_authority\n"
    "9606\t931\tMS4A1\tCD20|LEU-16\tHGNC:1|Ensembl:ENSG00000156738\tmembrane\tMS4A1\n"
    "9606\t4069\tLYZ\tLZM\tEnsembl:ENSG00000090382\tlysozyme\tLYZ\n"
)
PAIRS = "source\ttarget\tweight\n" + "".join(
    f"set {i % 2}\tGENE{i}\t1\n" for i in range(6)
)  # fmt: skip
CLOSURE = "source_id,target_id,type,experimental\n" + "".join(
    f"GENE{i},GO:000000{i % 2},direct,True\n" for i in range(6)
)  # fmt: skip


def _text(name: str, content: str) -> Callable[[Path], Any]:
    """Writes text, or gzip of it."""
    packed = name.endswith(".gz")
    raw = gzip.compress(content.encode(), mtime=0) if packed else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def _sets(name: str, **options: Any) -> Callable[[Path], Any]:
    """Gene sets out of a file."""

    def read(folder: Path) -> Any:
        more = {key: folder / value for key, value in options.items()}
        found = gene_sets.load(folder / name, GENES, 1, 10, min_universe=0, **more)
        return [found.names, found.membership, found.descriptions, found.coverage]

    return read


def _pairs(folder: Path) -> None:
    rows = [line.split("\t") for line in PAIRS.splitlines()[1:]]
    pd.DataFrame(rows, columns=["source", "target", "weight"]).to_parquet(folder / "p.parquet")


def _ontology(folder: Path) -> Any:
    found = ontology.read_obo(folder / "go.obo")
    return [found.names, found.parents, found.alternatives, found.subsets, found.namespaces]


def _gene_info(folder: Path) -> Any:
    table = gene_names.read(folder / "gene_info.tsv")
    return [table.symbol, table.ensembl, table.current, table.synonyms]


# --- results --------------------------------------------------------------------------------------


def _attribution(folder: Path) -> None:
    made = Store(folder, {"model": "m", "pairs": "p"})
    samples = scipy.sparse.csr_array(np.eye(3))
    made.save(0, Part(_random(3, 4), samples, Forwards(9, 6, 3)))


def _read_attribution(folder: Path) -> Any:
    part = Store(folder, {"model": "m", "pairs": "p"}).load(0)
    return None if part is None else [part.scores, part.samples, part.forwards]


def _calibration(folder: Path) -> None:
    made = calibration.Calibration(
        50, np.array([3, 9]), _random(2, 4), np.abs(_random(2, 4)), np.ones(2), 7
    )
    calibration.save(folder / "calibration.npz", {"change": made, "auc": made})


def _lens(folder: Path, gene_info: bool = True) -> None:
    """A run folder of the lens, with few rows of every table."""
    names = [f"feature_{i}" for i in range(3)]
    genes, terms = [f"GENE{i}" for i in range(4)], ["term 0 (GO:0000001)", "term 1"]
    x = scipy.sparse.csr_matrix(np.abs(_random(N, 3)) * (_random(N, 3, seed=1) > 0))
    var = pd.DataFrame({"latent": range(3), "n_active": x.getnnz(axis=0)}, index=names)
    obs = adata().obs.drop(columns="maybe")
    run_folder.write_features(
        folder / "features.h5ad", "lens", x, obs, var, decoder=_random(3, D),
        maps={"X_umap": _random(N, 2)}, about={"program": "lens", "d_in": D},
        settings={"h5ad": "cells.h5ad", "label": "kind", "percentile": 99},
    )  # fmt: skip
    table = var.rename_axis("feature").reset_index()
    table["best_label"], table["top_genes"] = ["a", "b", None], "GENE0, GENE1"
    table.to_parquet(folder / "features.parquet", index=False)
    (folder / "lens.json").write_text(json.dumps({"label": "kind", "percentile": 99, "h5ad": "c"}))
    every = pd.DataFrame({"feature": np.repeat(names, 4), "gene": genes * 3, "t": 1.5,
                          "log2_fold_change": 0.5, "log10_p": 3.0, "q": 0.01})  # fmt: skip
    run_folder.write_by_feature(folder / "genes.parquet", every)
    best = pd.DataFrame({"feature": np.repeat(names, 2), "side": "up", "rank": [0, 1] * 3,
                         "term": terms * 3, "size": 5, "hits": 2, "change": 0.5, "auc": 0.7,
                         "log10_p": 4.0, "log10_q": 3.0, "named": True})  # fmt: skip
    run_folder.write_by_feature(folder / "top_terms.parquet", best)
    tested = pd.DataFrame({"feature": np.repeat(names, 2), "term": terms * 3, "size": 5, "hits": 2,
                           "change": 0.5, "change_z": 1.0, "auc": 0.7, "z": 1.0,
                           "log10_p_change": 3.0, "log10_q_change": 2.0})  # fmt: skip
    run_folder.write_by_feature(folder / "enrichment.parquet", tested)
    sets = pd.DataFrame({"term": np.repeat(terms, 2), "gene": genes}).astype("category")
    sets.to_parquet(folder / "gene_sets.parquet", index=False)
    space = pd.DataFrame({"feature": names, "umap_1": [0.0, 1, 2], "umap_2": 0.5})
    space.to_parquet(folder / "feature_space.parquet", index=False)
    np.savez(folder / "named.npz", indptr=np.array([0, 1, 2, 2]), indices=np.array([0, 1]),
             shape=np.array([3, 2]), terms=np.array(terms), counts=np.ones((3, 5)))  # fmt: skip
    pd.DataFrame({"features": ["own", "permuted"], "named": [0.6, 0.0]}).to_csv(
        folder / "nulls.csv", index=False
    )
    if gene_info:
        _text("gene_info.tsv", GENE_INFO)(folder)


def _folder(folder: Path) -> Any:
    found = Folder.open(folder)
    with found.activations() as held:
        rows = held.rows(0, N)
    return [found.settings, found.about, found.table, found.cells, found.decoder, found.labels(),
            found.obs(), list(found.maps()), rows]  # fmt: skip


def _browsed(folder: Path) -> Any:
    """The run, and every document of it."""
    from analysis.browser import documents

    run = BrowserRun.open([folder], folder.with_name("state"), folder / "gene_info.tsv")
    return [run.nulls, run.features, *(documents.document(run, key) for key in documents.keys(run))]


def _study(folder: Path) -> None:
    study_cases.create(folder, concepts=4, neurons=3, repeats=1, raters=["ann"], seed=0)
    made = study.load(folder, "first")
    held = study.open_answers(folder, made)
    number = made.items[0].number
    held.of("ann").save(number, {"cell_type": "yes", "cell_type_words": "B"}, 0, "a")
    held.close()
    study._answers.cache_clear()


def _read_study(folder: Path) -> Any:
    for cache in (study._read, study._content, study._answers):
        cache.cache_clear()
    found = study.load(folder, "first")
    held = study.open_answers(folder, found)
    try:
        return [found, study.content(folder, found), study.progress(found, held), held.history()]
    finally:
        held.close()


def _secret(folder: Path) -> None:
    safety.secret(folder)


JSON_CONFIG = {"presets": {"vanilla": {"n_latents": [8, 16], "l1_weight": 0.1, "seed": [0, 1]}}}
LIST_CONFIG = [{"n_latents": 8, "activation": "topk", "k": 2, "learning_rate": 1e-3, "name": "a"}]
YAML_CONFIG = "presets:\n  vanilla:\n    n_latents: [8, 16]\n    l1_weight: 1e-1\n"
PYTHON_CONFIG = (
    "import sae_jax\nconfigs = sae_jax.grid('vanilla', d_in=4, n_latents=8, l1_weight=1)\n"
)


def _configs(name: str) -> Callable[[Path], Any]:
    return lambda folder: configurations.configs_from_file(folder / name, D)


def _dump(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(json.dumps(value))


def _compared(folder: Path) -> Any:
    found = feature_lens_compare.read_run(folder, "run")
    return [found.settings, found.table, found.annotated]


WEIGHTS = "sae_weights.safetensors"
READERS = (
    Reader("Dictionary.load", lambda f: dictionary().save(f / "d"),
           lambda f: _read_dictionary(Dictionary.load(f / "d")),
           ("d/cfg.json", f"d/{WEIGHTS}"), checked=(f"d/{WEIGHTS}",)),
    Reader("from_pretrained (SAELens)", lambda f: interop.to_saelens(dictionary(), f / "d"),
           lambda f: _read_dictionary(Dictionary.from_pretrained(f / "d")),
           ("d/cfg.json", f"d/{WEIGHTS}")),
    Reader("from_pretrained (dictionary_learning)", _learned,
           lambda f: _read_dictionary(Dictionary.from_pretrained(f)), ("ae.pt", "config.json")),
    Reader("Run.load", _run, _loaded, ("results.parquet", "history.parquet"), light=True),
    Reader("train (resumed)", _run, _resume, ("configs.json",), named=("case",)),
    Reader("manifest.check", _run, lambda f: manifest.check(f, "full"),
           ("manifest.json", "results.parquet", "configs.json"), named=("case",),
           checked=("results.parquet", "configs.json")),
    Reader("sae-jax merge", _shards, _merge,
           ("shard-000-of-001/sweep.json", "shard-000-of-001/configs.json",
            "shard-000-of-001/manifest.json", "shard-000-of-001/results.parquet"),
           checked=("shard-000-of-001/sweep.json", "shard-000-of-001/configs.json",
                    "shard-000-of-001/results.parquet"), light=True),
    Reader("rows (.npy)", lambda f: np.save(f / "rows.npy", _random(N, D)),
           lambda f: data.load(str(f / "rows.npy")), ("rows.npy",)),
    Reader("rows (.npy, lens)", lambda f: np.save(f / "rows.npy", _random(N, D)),
           lambda f: inputs.rows_of(str(f / "rows.npy"), N), ("rows.npy",), light=True),
    Reader("rows (.h5ad)", _h5ad, _rows("cells.h5ad"), ("cells.h5ad",)),
    Reader("rows (.zarr)", _zarr, _rows("cells.zarr"), ("cells.zarr",)),
    Reader("expression (.h5ad)", _h5ad, _expression("cells.h5ad"), ("cells.h5ad",), named=("X ",)),
    Reader("expression (.zarr)", _zarr, _expression("cells.zarr"), ("cells.zarr",), named=("X ",)),
    Reader("cells (.h5ad)", _h5ad, _cells, ("cells.h5ad",), named=("X ", "obsm", "obs ")),
    Reader("annotations (.h5ad)", _h5ad, _annotations("cells.h5ad"), ("cells.h5ad",),
           named=("obs", "var", "X_")),
    Reader("annotations (.zarr)", _zarr, _annotations("cells.zarr"), ("cells.zarr",),
           named=("obs", "var", "X_"), light=True),
    Reader("an extraction that was killed", lambda f: _fill(_writer(f), 2), _goes_on,
           (".extracting/progress.json",), checked=(".extracting/progress.json",)),
    Reader("extract.store", _extraction, _read_store, ("layer_00.zarr",),
           checked=("layer_00.zarr",)),
    Reader("scgpt", lambda f: small.write_checkpoint(f / "m"),
           lambda f: _described(extract.load_model("scgpt", f / "m")),
           ("m/args.json", "m/vocab.json", "m/best_model.pt")),
    Reader("geneformer", _geneformer, lambda f: _described(extract.load_model("geneformer", f)),
           ("config.json", "model.safetensors", "dictionaries/token_dictionary.json",
            "dictionaries/gene_median_dictionary.pkl"), named=("dictionaries", "config.json")),
    Reader("scvi", _scvi, lambda f: _described(extract.load_model("scvi", f)), ("model.pt",)),
    Reader("multidgd", _multidgd, lambda f: _described(extract.load_model("multidgd", f)),
           ("small.pt", "small_hyperparameters.json", "small_obs.csv"), named=("small.pt",)),
    Reader("read_weights", _learned, lambda f: checkpoints.read_weights(f / "ae.pt"), ("ae.pt",)),
    Reader("gene sets (GMT)", _text("sets.gmt", GMT), _sets("sets.gmt"), ("sets.gmt",)),
    Reader("gene sets (GMT, gzip)", _text("s.gmt.gz", GMT), _sets("s.gmt.gz"), ("s.gmt.gz",)),
    Reader("gene sets (TSV)", _text("pairs.tsv", PAIRS), _sets("pairs.tsv"), ("pairs.tsv",)),
    Reader("gene sets (parquet)", _pairs, _sets("p.parquet"), ("p.parquet",)),
    Reader("gene sets (closure)", _text("c.csv", CLOSURE), _sets("c.csv"), ("c.csv",)),
    Reader("gene sets (GAF)", lambda f: [_text("a.gaf", GAF)(f), _text("go.obo", OBO)(f)],
           _sets("a.gaf", obo="go.obo"), ("a.gaf", "go.obo"), named=("a.gaf",)),
    Reader("ontology (OBO)", _text("go.obo", OBO), _ontology, ("go.obo",)),
    Reader("gene names (gene_info)", _text("gene_info.tsv", GENE_INFO), _gene_info,
           ("gene_info.tsv",)),
    Reader("attribution blocks", _attribution, _read_attribution,
           ("attribution.json", "block_00000.npz"), named=("case",)),
    Reader("calibration", _calibration, lambda f: calibration.load(f / "calibration.npz"),
           ("calibration.npz",)),
    Reader("run folder (lens)", _lens, _folder,
           ("features.h5ad", "features.parquet", "lens.json")),
    Reader("sae-jax browse", _lens, _browsed,
           ("genes.parquet", "top_terms.parquet", "enrichment.parquet", "gene_sets.parquet",
            "feature_space.parquet", "named.npz", "nulls.csv", "gene_info.tsv"),
           light=True, slow=True,
           named=("valid", "case"), makes=("state",)),
    Reader("sae-jax lens-compare", _lens, _compared,
           ("named.npz", "features.parquet", "lens.json")),
    Reader("study", _study, _read_study,
           ("studies/first/study.json", "studies/first/panels.json",
            "studies/first/answers.sqlite"), checked=("studies/first/panels.json",),
           makes=("case/studies/first/answers.sqlite",)),
    Reader("browser's secret", _secret, safety.secret, ("secret",)),
    Reader("configurations (JSON)", _dump("c.json", JSON_CONFIG), _configs("c.json"), ("c.json",)),
    Reader("configurations (JSON, list)", lambda f: (f / "c.json").write_text(
           json.dumps(LIST_CONFIG)), _configs("c.json"), ("c.json",)),
    Reader("configurations (YAML)", _text("c.yaml", YAML_CONFIG), _configs("c.yaml"), ("c.yaml",)),
    Reader("configurations (Python)", _text("c.py", PYTHON_CONFIG), _configs("c.py"), ("c.py",)),
    Reader("settings of a lens", _dump("lens.json", {"dictionary": "runs/d"}),
           lambda f: str(steering.dictionary_folder(str(f))), ("lens.json",)),
    Reader("finished figures and tables", _lens, lambda f: [
           folders.readable(f / name) for name in ("genes.parquet", "named.npz", "nulls.csv")],
           ("genes.parquet", "named.npz", "nulls.csv"), light=True),
)  # fmt: skip

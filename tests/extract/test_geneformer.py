"""Geneformer against the authors' code (golden files) and against transformers' own forward."""

import json
import pickle
import warnings
from pathlib import Path

import anndata
import hypothesis
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scipy.sparse
import torch
import transformers
from hypothesis import strategies as st

import extract
from extract.errors import InputError
from extract.models.geneformer import Geneformer
from extract.models.geneformer_tokens import read_vocabulary

N_GENES = 60
GENES = [f"ENSG{i:011d}" for i in range(N_GENES)]
SPECIAL = {True: ["<pad>", "<mask>", "<cls>", "<eos>"], False: ["<pad>", "<mask>"]}


def save(folder: Path, *, special: bool = True, seed: int = 0) -> transformers.BertForMaskedLM:
    """A small random Geneformer in `folder`, with its dictionaries; the network itself."""
    rng = np.random.default_rng(seed)
    names = SPECIAL[special] + [GENES[i] for i in rng.permutation(N_GENES)]
    config = transformers.BertConfig(
        vocab_size=len(names),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=30,
        hidden_act="relu",
        layer_norm_eps=1e-12,
    )
    torch.manual_seed(seed)
    net = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # the usual start hides swapped and unused weights
            parameter.add_(torch.randn_like(parameter) * 0.2)
    dictionaries = folder / "dictionaries"
    dictionaries.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    dump(dictionaries / "token_dictionary.json", {name: i for i, name in enumerate(names)})
    medians = {gene: float(rng.integers(1, 6)) / 2 for gene in GENES}
    dump(dictionaries / "gene_median_dictionary.json", medians)
    dump(dictionaries / "gene_name_id_dict.json", {f"SYM{i}": g for i, g in enumerate(GENES)})
    dump(dictionaries / "ensembl_mapping_dict.json", {"ENSG99999999999": GENES[0]})
    return net


def dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def table(folder: Path, name: str) -> dict:
    return json.loads((folder / "dictionaries" / f"{name}.json").read_text())


def random_cells(seed: int = 0, n: int = 9) -> anndata.AnnData:
    """Counts with many ties; 8 columns are of genes that no model knows."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.uniform(0.05, 1.5, (n, 1)), (n, N_GENES + 8))
    counts[:, 0] += 1
    names = [*GENES, *(f"ENSG8{i:010d}" for i in range(8))]
    adata = anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.int32)))
    adata.var_names = names
    adata.obs_names = [f"cell{i}" for i in range(n)]
    return adata


def naive_tokens(adata: anndata.AnnData, folder: Path, most: int) -> list[list[int]]:
    """The rule, gene by gene."""
    ids, medians = table(folder, "token_dictionary"), table(folder, "gene_median_dictionary")
    cells = []
    for row in adata.X.toarray().astype(float):
        ranked = sorted(
            (-(count / row.sum() * 1e4 / medians[name]), ids[name])
            for name, count in zip(adata.var_names, row, strict=True)
            if count and name in ids and name in medians
        )
        tokens = [token for _, token in ranked]
        if "<cls>" in ids:
            cells.append([ids["<cls>"], *tokens[: most - 2], ids["<eos>"]])
        else:
            cells.append(tokens[:most])
    return cells


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("geneformer")
    return folder, save(folder)


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, save(folder, special=False, seed=1)


@pytest.fixture(scope="module")
def model(checkpoint: tuple[Path, torch.nn.Module]) -> Geneformer:
    return extract.load_model("geneformer", checkpoint[0])


@pytest.fixture(scope="module")
def plain(plain_checkpoint: tuple[Path, torch.nn.Module]) -> Geneformer:
    return extract.load_model("geneformer", plain_checkpoint[0])


@pytest.fixture
def cells() -> anndata.AnnData:
    return random_cells()


class TestTokens:
    @pytest.mark.parametrize("special", [True, False])
    @pytest.mark.parametrize("most", [None, 5])
    def test_are_those_of_the_rule(
        self,
        special: bool,
        most: int | None,
        checkpoint: tuple[Path, torch.nn.Module],
        plain_checkpoint: tuple[Path, torch.nn.Module],
        cells: anndata.AnnData,
    ) -> None:
        folder = (checkpoint if special else plain_checkpoint)[0]
        model = extract.load_model("geneformer", folder)
        found = model.plan(cells, max_length=most).read(slice(None))
        wanted = naive_tokens(cells, folder, most or 30)
        assert [list(ids) for ids in found.ids] == wanted
        assert max(found.lengths) == (most or 30)  # so the cut was tested, too
        some = model.plan(cells, max_length=most).read(np.array([5, 2]))
        assert [list(ids) for ids in some.ids] == [wanted[5], wanted[2]]

    def test_have_names(self, model: Geneformer, cells: anndata.AnnData) -> None:
        tokens = model.plan(cells).read(slice(None))
        names = model.gene_names(tokens.ids[0])
        assert names[0] == "<cls>"
        assert names[-1] == "<eos>"
        assert set(names[1:-1]) <= set(model.genes)
        by_id = [name for name in model.token_names if not name.startswith("<")]
        assert model.genes == by_id

    def test_names_of_a_file_are_brought_to_the_models(
        self, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        wanted = model.plan(cells).read(slice(None))
        cells.var_names = [
            "ensg99999999999.3",
            *(f"{name.lower()}.12" for name in cells.var_names[1:]),
        ]
        found = model.plan(cells).read(slice(None))
        assert all(map(np.array_equal, found.ids, wanted.ids))

    def test_symbols(self, model: Geneformer, cells: anndata.AnnData) -> None:
        wanted = model.plan(cells).read(slice(None))
        cells.var["symbol"] = [*(f"SYM{i}" for i in range(N_GENES)), *"abcdefgh"]
        plan = model.plan(cells, genes="symbol", naming="symbol")
        assert plan.settings["coverage"]["columns_matched"] == N_GENES
        assert all(map(np.array_equal, plan.read(slice(None)).ids, wanted.ids))
        with pytest.raises(InputError, match=r"wants Ensembl ids.*genes="):
            model.plan(cells, genes="symbol")
        cells.var["symbol"] = cells.var["symbol"].str.capitalize()
        with pytest.raises(InputError, match="0 genes are in both, of 68 in the file"):
            model.plan(cells, genes="symbol", naming="symbol")

    def test_symbols_need_their_dictionary(self, tmp_path: Path, cells: anndata.AnnData) -> None:
        save(tmp_path)
        (tmp_path / "dictionaries/gene_name_id_dict.json").unlink()
        model = extract.load_model("geneformer", tmp_path)
        with pytest.raises(InputError, match="gene_name_id="):
            model.plan(cells, naming="symbol")

    def test_genes_without_a_median_are_not_used(
        self, tmp_path: Path, cells: anndata.AnnData
    ) -> None:
        save(tmp_path)
        medians = table(tmp_path, "gene_median_dictionary")
        del medians[GENES[0]]
        dump(tmp_path / "dictionaries/gene_median_dictionary.json", medians)
        model = extract.load_model("geneformer", tmp_path)
        assert GENES[0] not in model.genes
        found = model.plan(cells).read(slice(None))
        assert [list(ids) for ids in found.ids] == naive_tokens(cells, tmp_path, 30)

    def test_columns_of_one_gene_are_summed(
        self, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        counts = cells.X.toarray()
        counts[:, [0, -1]] = 128
        twice = anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.uint8)))  # 256 would wrap
        twice.var_names = [*cells.var_names[:-1], "ENSG99999999999"]
        counts[:, 0], counts[:, -1] = 256, 0
        once = anndata.AnnData(scipy.sparse.csr_matrix(counts), var=cells.var.copy())
        found, wanted = (model.plan(adata).read(slice(None)) for adata in (twice, once))
        assert all(map(np.array_equal, found.ids, wanted.ids))
        with pytest.raises(InputError, match=r"1 genes occur more than once.*ENSG99999999999"):
            model.plan(twice, duplicates="refuse")

    def test_settings_say_where_totals_come_from(
        self, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        settings = model.plan(cells).settings
        assert settings["n_counts"] is None
        assert "sums of X" in settings["n_counts_from"]
        cells.obs["n_counts"] = 1000
        settings = model.plan(cells).settings
        assert settings["n_counts_from"] == "obs['n_counts']"
        assert set(settings["dictionaries"]) == {
            "token_dictionary", "gene_median", "ensembl_mapping", "gene_name_id",
        }  # fmt: skip
        json.dumps(settings)

    @pytest.mark.parametrize(
        ("totals", "message"),
        [
            ([np.nan] + [9.0] * 8, "NaN"),
            ([-1] + [9] * 8, "cell0"),
            (["many"] * 9, "no numbers"),
        ],
    )
    def test_totals_that_are_none(
        self, totals: list, message: str, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        cells.obs["depth"] = totals
        with pytest.raises(InputError, match=message):
            model.plan(cells, n_counts="depth")

    def test_a_total_of_zero_in_a_cell_with_counts(
        self, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        cells.obs["n_counts"] = [9] * 8 + [0]
        with pytest.raises(InputError, match=r"is 0 in 1 cells.*cell8"):
            model.plan(cells).read(slice(None))


class TestHiddenStates:
    @pytest.mark.parametrize("special", [True, False])
    def test_are_those_of_transformers(
        self,
        special: bool,
        checkpoint: tuple[Path, torch.nn.Module],
        plain_checkpoint: tuple[Path, torch.nn.Module],
        cells: anndata.AnnData,
    ) -> None:
        folder, net = checkpoint if special else plain_checkpoint
        model = extract.load_model("geneformer", folder)
        found = model.run(cells, 0, None, "all", "tokens", outputs=["logits"])
        pooled = {name: model.embed(cells, "all", name) for name in model.poolings[:-1]}
        end = 0
        for i, ids in enumerate(model.plan(cells).read(slice(None)).ids):
            with torch.inference_mode():
                out = net(torch.as_tensor(ids)[None], output_hidden_states=True)
            genes = slice(1, -1) if special else slice(None)
            start, end = end, end + len(ids[genes])
            for layer, states in zip(model.all_layers, out.hidden_states, strict=True):
                wanted = states[0].numpy()
                np.testing.assert_allclose(found.hidden[layer][start:end], wanted[genes], atol=2e-5)
                for name, of in {
                    "mean": wanted[genes].mean(0),
                    "mean_with_special": wanted.mean(0),
                    "cls": wanted[0],
                }.items():
                    if name in pooled:
                        np.testing.assert_allclose(pooled[name][layer][i], of, atol=1e-5)
            logits = out.logits[0, genes].numpy()
            np.testing.assert_allclose(found.outputs["logits"][start:end], logits, atol=5e-5)
        assert end == len(found.outputs["logits"])

    def test_defaults_are_the_authors(self, model: Geneformer, cells: anndata.AnnData) -> None:
        assert model.default_layer == model.n_layers - 2
        ((layer, found),) = model.embed(cells).items()
        assert layer == 1
        assert np.array_equal(found, model.embed(cells, 1, "mean")[1])

    def test_no_cls_in_the_older_models(self, plain: Geneformer, cells: anndata.AnnData) -> None:
        assert "cls" not in plain.poolings
        with pytest.raises(InputError, match="no <cls> token"):
            plain.embed(cells, pooling="cls")
        plan = plain.plan(cells)
        with pytest.raises(InputError, match="wants the <cls> token"):
            plain.check(plan, "cls")
        with pytest.raises(InputError, match="wants the <cls> token"):
            plain.evaluate(plan.read(slice(None)), [0], "cls")
        with pytest.raises(InputError, match="cls"):
            plain.run(cells, 0, lambda rows: rows, tokens="cls")

    @hypothesis.settings(max_examples=6)
    @hypothesis.given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 3, 64]))
    def test_do_not_depend_on_neighbours(self, model: Geneformer, seed: int, size: int) -> None:
        cells = random_cells(seed)
        rng = np.random.default_rng(seed)
        order = rng.permutation(cells.n_obs)
        mixed = cells[order, rng.permutation(cells.n_vars)].copy()
        for pooling in ("mean", "cls"):
            wanted = model.embed(cells, "all", pooling)
            found = model.embed(mixed, "all", pooling, batch_size=size)
            for layer in wanted:
                np.testing.assert_allclose(found[layer], wanted[layer][order], atol=1e-5)

    def test_later_blocks_do_not_run(self, model: Geneformer, cells: anndata.AnnData) -> None:
        ran = []
        hooks = [
            block.register_forward_hook(lambda *_, i=i: ran.append(i))
            for i, block in enumerate(model._net.bert.encoder.layer)
        ]
        model.embed(cells, "embedding")
        model.embed(cells, [1, 0])
        for hook in hooks:
            hook.remove()
        assert ran == [0, 1]

    def test_in_bfloat16(
        self, checkpoint: tuple[Path, torch.nn.Module], model: Geneformer, cells: anndata.AnnData
    ) -> None:
        half = extract.load_model("geneformer", checkpoint[0], dtype="bfloat16")
        found, wanted = half.embed(cells)[1], model.embed(cells)[1]
        assert found.dtype == np.float32
        assert 1e-4 < np.abs(found - wanted).max() < 0.2
        with pytest.raises(InputError, match="dtype"):
            extract.load_model("geneformer", checkpoint[0], dtype="int8")


class TestEdits:
    def test_identity_changes_nothing(self, model: Geneformer, cells: anndata.AnnData) -> None:
        wanted = model.embed(cells, "all")
        for layer in model.all_layers:
            found = model.run(cells, layer, lambda rows: rows, "all")
            for key in wanted:
                assert np.array_equal(found.hidden[key], wanted[key])

    @pytest.mark.parametrize("tokens", ["all", "genes", "cls"])
    def test_what_follows_is_computed_from_the_edited(
        self,
        tokens: str,
        checkpoint: tuple[Path, torch.nn.Module],
        model: Geneformer,
        cells: anndata.AnnData,
    ) -> None:
        net = checkpoint[1]
        shift = np.linspace(-1, 1, model.d_model, dtype=np.float32)
        rows = {"all": slice(None), "genes": slice(1, -1), "cls": slice(0, 1)}[tokens]

        def swap(_module: object, _given: object, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[:, rows] = -out[:, rows] + torch.as_tensor(shift)
            return out

        sequences = model.plan(cells).read(slice(None)).ids
        for layer, module in zip(
            model.all_layers, [net.bert.embeddings, *net.bert.encoder.layer], strict=True
        ):
            found = model.run(
                cells, layer, lambda some: shift - some, [2], "tokens", tokens=tokens,
                outputs=["logits"],
            )  # fmt: skip
            hook = module.register_forward_hook(swap)
            with torch.inference_mode():
                inputs = [torch.as_tensor(ids)[None] for ids in sequences]
                last = [net.bert(ids).last_hidden_state[0, 1:-1] for ids in inputs]
                logits = [net(ids).logits[0, 1:-1] for ids in inputs]
            hook.remove()
            np.testing.assert_allclose(found.hidden[2], torch.cat(last), atol=3e-5)
            np.testing.assert_allclose(found.outputs["logits"], torch.cat(logits), atol=1e-4)


class TestCellsThatDoNotFit:
    def test_normalised(self, model: Geneformer, cells: anndata.AnnData) -> None:
        cells.layers["counts"] = cells.X.copy()
        cells.X = cells.X.astype(np.float32).log1p()
        with pytest.raises(InputError, match=r"raw counts for Geneformer.*counts="):
            model.embed(cells)
        assert len(model.embed(cells, counts="counts")[1]) == cells.n_obs

    def test_coverage(self, model: Geneformer, cells: anndata.AnnData) -> None:
        few = cells[:, [*range(5), *range(N_GENES, N_GENES + 8)]].copy()
        message = (
            r"5 genes are in both, of 13 in the file and 60 of the model \(38\.5% .*coverage=0.5"
        )
        with pytest.raises(InputError, match=message):
            model.embed(few)
        assert len(model.embed(few, min_gene_coverage=0.3)[1]) == cells.n_obs

    def test_genes_beyond_the_models_are_no_lack(
        self, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        more = anndata.AnnData(scipy.sparse.csr_matrix((9, 200), dtype=np.int32))
        more.obs_names = cells.obs_names
        more.var_names = [f"ENSG7{i:010d}" for i in range(200)]
        both = anndata.concat([cells, more], axis=1)
        coverage = model.plan(both).settings["coverage"]
        assert (coverage["columns"], coverage["model_genes"]) == (268, 60)
        assert coverage["genes_matched"] == 60
        assert coverage["coverage"] == 1
        assert model.plan(cells[:, 30:]).settings["coverage"]["coverage"] == pytest.approx(30 / 38)

    def test_empty_cells(self, model: Geneformer, plain: Geneformer) -> None:
        cells = random_cells()
        counts = cells.X.toarray()
        counts[4, :N_GENES] = 0
        counts[6] = 0
        cells.X = scipy.sparse.csr_matrix(counts)
        full = [i for i in range(9) if i not in (4, 6)]
        for each in (model, plain):
            with pytest.raises(InputError, match=r"2 cells express no gene.*cell4, cell6"):
                each.embed(cells)
            found = each.embed(cells, 1, empty_cells="nan")[1]
            assert np.isnan(found[[4, 6]]).all()
            np.testing.assert_allclose(found[full], each.embed(cells[full], 1)[1], atol=1e-5)
            tokens = each.embed(cells, 1, "tokens", empty_cells="nan")[1]
            assert len(tokens) == len(each.plan(cells).read(slice(None)).gene_ids())

    def test_cell_names_twice(self, model: Geneformer, cells: anndata.AnnData) -> None:
        cells.obs_names = ["a"] * 2 + list(cells.obs_names[2:])
        with pytest.raises(InputError, match="more than once"):
            model.embed(cells)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"naming": "entrez"}, "naming must be"),
            ({"max_length": 2}, "max_length must be a whole number, at least 3, not 2"),
            ({"max_length": "abc"}, "max_length must be a whole number, at least 3, not 'abc'"),
            ({"max_length": 31}, "max_length must be at most 30, the model's most, not 31"),
            ({"n_counts": "depth"}, r"no obs\['depth'\]"),
            ({"duplicates": "max"}, "duplicates must be"),
            ({"bins": 51}, "no preprocessing bins"),
        ],
    )
    def test_keywords(
        self, keywords: dict, message: str, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        with pytest.raises(InputError, match=message):
            model.embed(cells, **keywords)


class TestWeights:
    def load(self, folder: Path, weights: dict[str, torch.Tensor]) -> Geneformer:
        torch.save(weights, folder / "pytorch_model.bin")
        return extract.load_model("geneformer", folder)

    def test_under_either_name_of_what_is_tied(
        self, tmp_path: Path, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        weights = save(tmp_path).state_dict()
        wanted = model.run(cells, 0, None, outputs=["logits"]).outputs["logits"]
        decoder = "cls.predictions.decoder"
        for without in ([f"{decoder}.weight", f"{decoder}.bias"], ["cls.predictions.bias"]):
            some = {name: value for name, value in weights.items() if name not in without}
            some["bert.embeddings.position_ids"] = torch.arange(30)[None]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = self.load(tmp_path, some)
            assert np.array_equal(
                found.run(cells, 0, None, outputs=["logits"]).outputs["logits"], wanted
            )

    def test_untied_where_the_config_says_so(
        self, tmp_path: Path, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        weights = dict(save(tmp_path).state_dict())
        config = json.loads((tmp_path / "config.json").read_text())
        dump(tmp_path / "config.json", config | {"tie_word_embeddings": False})
        weights["cls.predictions.decoder.weight"] = weights["cls.predictions.decoder.weight"] * 2
        found = self.load(tmp_path, weights).run(cells, 0, None, outputs=["logits"])
        tied = model.run(cells, 0, None, outputs=["logits"])
        assert np.array_equal(found.hidden[1], tied.hidden[1])
        assert not np.allclose(found.outputs["logits"], tied.outputs["logits"])
        del weights["cls.predictions.decoder.weight"]
        with pytest.raises(InputError, match=r"decoder\.weight is missing"):
            self.load(tmp_path, weights)

    @pytest.mark.parametrize("prefix", ["bert.", ""])
    def test_without_the_head(
        self, prefix: str, tmp_path: Path, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        weights = {
            name.replace("bert.", prefix): value
            for name, value in save(tmp_path).state_dict().items()
            if name.startswith("bert.")
        }
        weights[f"{prefix}pooler.dense.bias"] = torch.zeros(16)
        with pytest.warns(UserWarning, match="not used: bert.pooler"):
            found = self.load(tmp_path, weights)
        assert np.array_equal(found.embed(cells)[1], model.embed(cells)[1])
        with pytest.raises(InputError, match="no output logits"):
            found.run(cells, 0, None, outputs=["logits"])

    def test_safetensors_come_first(self, tmp_path: Path, model: Geneformer) -> None:
        weights = save(tmp_path).state_dict()
        weights = {name: value.clone() for name, value in weights.items()}
        safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
        found = extract.load_model("geneformer", tmp_path)
        assert set(found.checkpoint) == {"model.safetensors", "config.json"}

    def test_every_wrong_name_is_said(self, tmp_path: Path) -> None:
        weights = dict(save(tmp_path).state_dict())
        del weights["bert.encoder.layer.1.output.dense.bias"]
        del weights["cls.predictions.transform.dense.bias"]
        weights["bert.embeddings.position_embeddings.weight"] = torch.zeros(31, 16)
        with pytest.raises(InputError) as error:
            self.load(tmp_path, weights)
        for part in (
            "layer.1.output.dense.bias is missing",
            "transform.dense.bias is missing",
            "position_embeddings.weight is (31, 16), not (30, 16)",
        ):
            assert part in str(error.value)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
    def test_truncated(self, name: str, tmp_path: Path) -> None:
        weights = {key: value.clone() for key, value in save(tmp_path).state_dict().items()}
        path = tmp_path / name
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(weights, path)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(InputError, match="damaged"):
            extract.load_model("geneformer", tmp_path)

    def test_none_there(self, tmp_path: Path) -> None:
        save(tmp_path)
        (tmp_path / "pytorch_model.bin").unlink()
        with pytest.raises(InputError, match=r"has no model\.safetensors or pytorch_model\.bin"):
            extract.load_model("geneformer", tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "gpt2"}, "Geneformer is a 'bert'"),
            ({"num_attention_heads": 3}, "config.json is refused"),
            ({"hidden_act": "what"}, "config.json is refused"),
        ],
    )
    def test_config(self, change: dict, message: str, tmp_path: Path) -> None:
        save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        dump(tmp_path / "config.json", config | change)
        with pytest.raises(InputError, match=message):
            extract.load_model("geneformer", tmp_path)


class Malicious:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "run")


class TestDictionaries:
    def test_no_code_of_a_pickle_runs(self, tmp_path: Path) -> None:
        save(tmp_path)
        mark, bad = tmp_path / "mark", tmp_path / "bad_token_dictionary.pkl"
        bad.write_bytes(pickle.dumps({"<pad>": Malicious(mark)}))
        with pytest.raises(InputError, match="allow-list"):
            extract.load_model("geneformer", tmp_path, token_dictionary=bad)
        bad.unlink()
        torch.save({"bert.x": Malicious(mark)}, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="refused"):
            extract.load_model("geneformer", tmp_path)
        assert not mark.exists()

    def test_the_one_that_fits_is_found(
        self, tmp_path: Path, model: Geneformer, cells: anndata.AnnData
    ) -> None:
        save(tmp_path)
        folder = tmp_path / "dictionaries"
        ids = table(tmp_path, "token_dictionary")
        (folder / "token_dictionary.json").rename(folder / "geneformer_token_dictionary_gc1M.json")
        other = {name: i for i, name in enumerate(SPECIAL[False] + GENES)}
        dump(folder / "token_dictionary_gc2M.json", other)
        # Of one name JSON is read, of one generation the medians are taken.
        (folder / "token_dictionary_gc2M.pkl").write_bytes(b"not read")
        (folder / "gene_median_dictionary.json").rename(folder / "gene_median_dictionary_gc1M.json")
        dump(folder / "gene_median_dictionary_gc2M.json", dict.fromkeys(GENES, 1.0))
        found = extract.load_model("geneformer", tmp_path)
        assert found.token_names == sorted(ids, key=ids.__getitem__)
        assert np.array_equal(found.embed(cells)[1], model.embed(cells)[1])
        files = found.plan(cells).settings["dictionaries"]
        assert files["gene_median"]["file"] == "gene_median_dictionary_gc1M.json"
        dump(folder / "token_dictionary_copy.json", ids)
        with pytest.raises(InputError, match=r"gc1M.*copy.*token_dictionary="):
            extract.load_model("geneformer", tmp_path)

    def test_those_beside_the_one_that_is_named(
        self, tmp_path: Path, cells: anndata.AnnData
    ) -> None:
        save(tmp_path)
        here, other = tmp_path / "dictionaries", tmp_path / "other"
        other.mkdir()
        for name in ("token_dictionary", "gene_median_dictionary"):
            (other / f"{name}_gc30M.json").write_bytes((here / f"{name}.json").read_bytes())
            (here / f"{name}.json").rename(here / f"{name}_gc104M.json")
        dump(other / "gene_median_dictionary_gc30M.json", dict.fromkeys(GENES, 1.0))
        named = {"token_dictionary": other / "token_dictionary_gc30M.json"}

        def used(**files: Path) -> dict[str, str]:
            model = extract.load_model("geneformer", tmp_path, **files)
            files = model.plan(cells).settings["dictionaries"]
            return {option: about["file"] for option, about in files.items()}

        assert used()["gene_median"] == "gene_median_dictionary_gc104M.json"
        assert used(**named) == {
            "token_dictionary": "token_dictionary_gc30M.json",
            "gene_median": "gene_median_dictionary_gc30M.json",
            "ensembl_mapping": "ensembl_mapping_dict.json",
            "gene_name_id": "gene_name_id_dict.json",
        }
        # Of two generations: only where every file is named.
        (other / "gene_median_dictionary_gc30M.json").unlink()
        with pytest.raises(
            InputError, match=r"different generations \(_gc104M, _gc30M\).*gene_median="
        ):
            used(**named)
        named["gene_median"] = here / "gene_median_dictionary_gc104M.json"
        with pytest.raises(InputError, match="different generations"):
            used(**named)
        named["ensembl_mapping"] = here / "ensembl_mapping_dict.json"
        named["gene_name_id"] = here / "gene_name_id_dict.json"
        assert used(**named)["gene_median"] == "gene_median_dictionary_gc104M.json"

    def test_several_medians(self, tmp_path: Path, cells: anndata.AnnData) -> None:
        save(tmp_path)
        folder = tmp_path / "dictionaries"
        other = folder / "gene_median_rounded.json"
        dump(other, dict.fromkeys(GENES, 1.0))

        def used(**files: Path) -> str:
            model = extract.load_model("geneformer", tmp_path, **files)
            return model.plan(cells).settings["dictionaries"]["gene_median"]["file"]

        assert used() == "gene_median_dictionary.json"
        assert used(gene_median=other) == other.name
        (folder / "gene_median_dictionary.json").rename(folder / "gene_median_mine.json")
        with pytest.raises(
            InputError, match=r"gene_median_mine.*gene_median_rounded.*gene_median="
        ):
            used()

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("token_dictionary", lambda d: d | {"EXTRA": 64}, "has 65 tokens and largest id 64"),
            ("token_dictionary", lambda d: d | {GENES[0]: 1}, "has 64 tokens"),
            ("token_dictionary", lambda d: d | {GENES[0]: 1.5}, "no dictionary for this use"),
            (
                "token_dictionary",
                list,
                "holds a list, not an object",
            ),
            (
                "token_dictionary",
                lambda d: {{"<eos>": "<end>"}.get(name, name): i for name, i in d.items()},
                "both <cls> and <eos>",
            ),
            ("gene_median_dictionary", lambda d: d | {GENES[3]: 0.0}, GENES[3]),
            ("gene_median_dictionary", lambda _: {"TP53": 1.0}, "do not belong together"),
        ],
    )
    def test_that_do_not_fit(self, name: str, change: object, message: str, tmp_path: Path) -> None:
        save(tmp_path)
        dump(tmp_path / "dictionaries" / f"{name}.json", change(table(tmp_path, name)))
        with pytest.raises(InputError, match=message):
            extract.load_model("geneformer", tmp_path)

    @pytest.mark.parametrize("name", ["token_dictionary", "gene_median_dictionary"])
    def test_that_are_not_there(self, name: str, tmp_path: Path) -> None:
        save(tmp_path)
        path = tmp_path / "dictionaries" / f"{name}.json"
        path.write_text("{")
        with pytest.raises(InputError, match="is no JSON"):
            extract.load_model("geneformer", tmp_path)
        path.unlink()
        with pytest.raises(InputError, match=r"there is no file named.*dictionaries="):
            extract.load_model("geneformer", tmp_path)
        with pytest.raises(InputError, match="is not a folder"):
            extract.load_model("geneformer", tmp_path, dictionaries=tmp_path / "none")

    def test_of_the_authors(self, data_folder: Path) -> None:
        words = read_vocabulary([data_folder / "data/tokens"], 25426, {})
        assert len(words.genes) == len(words.medians) == 25424
        assert words.cls is None
        known, translate = words.by_symbol()
        assert words.genes[known[translate("GATA1")]] == "ENSG00000102145"


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> Path:
    return data_folder / "golden/geneformer"


@pytest.fixture(scope="module")
def golden_cells(golden: Path) -> anndata.AnnData:
    return anndata.read_h5ad(golden / "cells_counts.h5ad")


@pytest.fixture(scope="module", params=["special", "plain"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden_model(golden: Path, kind: str) -> Geneformer:
    return extract.load_model(
        "geneformer", golden / f"model_{kind}", dictionaries=golden / "dictionaries"
    )


class TestGolden:
    def test_tokens(
        self, golden: Path, kind: str, golden_model: Geneformer, golden_cells: anndata.AnnData
    ) -> None:
        expected = np.load(golden / "tokens_expected.npz")
        plan = golden_model.plan(golden_cells, "ensembl_id")
        assert plan.names == list(expected["obs_names"])
        found = plan.read(slice(None)).ids
        assert np.array_equal([len(ids) for ids in found], expected[f"{kind}_length"])
        for ids, row in zip(found, expected[f"{kind}_input_ids"], strict=True):
            assert np.array_equal(ids, row[: len(ids)])
        assert plan.settings["coverage"]["columns_matched"] == 5200
        symbols = golden_model.plan(golden_cells, "symbol", naming="symbol")
        assert symbols.settings["coverage"]["columns_matched"] > 4500

    def test_all_tokens_of_a_cell(
        self, golden: Path, kind: str, golden_model: Geneformer, golden_cells: anndata.AnnData
    ) -> None:
        words = read_vocabulary(
            [golden / "dictionaries"],
            len(golden_model.token_names),
            {
                option: golden / "dictionaries" / f"{name}.pkl"
                for option, name in {
                    "token_dictionary": f"token_dictionary_{kind}",
                    "gene_median": "gene_median_dictionary",
                    "ensembl_mapping": "ensembl_mapping_dict",
                    "gene_name_id": "gene_name_id_dict",
                }.items()
            },
        )
        assert words.tokens == golden_model.token_names  # pickles hold the same as JSON
        column = {gene: i for i, gene in enumerate(golden_cells.var["ensembl_id"])}
        there = [i for i, gene in enumerate(words.genes) if gene in column]
        counts = scipy.sparse.lil_matrix((golden_cells.n_obs, len(words.genes)))
        counts[:, there] = golden_cells.X[:, [column[words.genes[i]] for i in there]]
        found = words.rank(counts.tocsr(), golden_cells.obs["n_counts"].to_numpy(float), 10**6)
        expected = np.load(golden / "tokens_expected.npz")[f"full_untruncated_{kind}_dict"]
        for ids, row in zip(found, expected, strict=True):
            genes = ids[1:-1] if kind == "special" else ids
            assert np.array_equal(genes, row[row >= 0])

    def test_ties(self, golden: Path, kind: str, golden_cells: anndata.AnnData) -> None:
        folder = golden / "dictionaries"
        model = extract.load_model(
            "geneformer",
            golden / f"model_{kind}",
            dictionaries=folder,
            gene_median=folder / "gene_median_rounded.pkl",
        )
        found = model.plan(golden_cells, "ensembl_id").read(slice(None))
        expected = np.load(golden / "tokens_tied_medians.npz")
        official = np.load(golden / "tokens_expected.npz")
        renumber = {  # the file has ids of the special dictionary
            int(a): int(b)
            for a, b in zip(
                official["full_untruncated_special_dict"].ravel(),
                official[f"full_untruncated_{kind}_dict"].ravel(),
                strict=True,
            )
        }
        n_tied = 0
        for i, real in enumerate(expected["official_tokens"] >= 0):
            ids = found.take(np.array([i])).gene_ids()
            tokens = [renumber[int(token)] for token in expected["official_tokens"][i, real]]
            groups, values = expected["tie_group"][i, real], expected["normalised_values"][i, real]
            group = dict(zip(tokens, groups, strict=True))
            assert [group[token] for token in ids] == list(groups[: len(ids)])
            # A group is tied within 1e-9; what is tied to the last bit goes by token id.
            value = dict(zip(tokens, values, strict=True))
            ours = np.array([value[token] for token in ids])
            assert (np.diff(ours) <= 0).all()
            tied = np.flatnonzero(np.diff(ours) == 0)
            assert (ids[tied] < ids[tied + 1]).all()
            n_tied += len(tied)
        assert n_tied > 1000

    def test_former_ids(self, golden: Path) -> None:
        model = extract.load_model(
            "geneformer", golden / "model_special", dictionaries=golden / "dictionaries"
        )
        cells = anndata.read_h5ad(golden / "cells_alias_ids.h5ad")
        plan = model.plan(cells, "ensembl_id")
        expected = np.load(golden / "tokens_alias_ids.npz")
        for ids, row, length in zip(
            plan.read(slice(None)).ids,
            expected["special_input_ids"],
            expected["special_length"],
            strict=True,
        ):
            assert np.array_equal(ids, row[:length])
        counts = plan.settings["coverage"]
        assert counts["columns_matched"] == counts["genes_matched"] + 15

    def test_embeddings(
        self, golden: Path, kind: str, golden_model: Geneformer, golden_cells: anndata.AnnData
    ) -> None:
        expected = np.load(golden / f"embeddings_{kind}.npz")
        n_layers = golden_model.n_layers
        for pooling in ("mean", "cls") if kind == "special" else ("mean",):
            mode = {"mean": "cell", "cls": "cls"}[pooling]
            found = golden_model.embed(golden_cells, "all", pooling, "ensembl_id", batch_size=7)
            for layer, emb_layer in ((n_layers - 2, "-1"), (n_layers - 1, "0")):
                wanted = expected[f"{mode}_layer{emb_layer}"]
                np.testing.assert_allclose(found[layer], wanted, atol=1e-5, rtol=0)
                # The authors' table has its rows by length; by name they are ours.
                official = pd.DataFrame(
                    expected[f"{mode}_layer{emb_layer}_official_order"],
                    index=expected["official_row_order"],
                )
                by_name = official.loc[golden_cells.obs_names].to_numpy()
                np.testing.assert_allclose(found[layer], by_name, atol=1e-5, rtol=0)
                assert np.abs(found[layer] - official.to_numpy()).max() > 0.1

    def test_hidden_states_and_logits(
        self, golden: Path, kind: str, golden_model: Geneformer, golden_cells: anndata.AnnData
    ) -> None:
        expected = np.load(golden / f"hidden_{kind}.npz")
        genes = slice(1, -1) if kind == "special" else slice(None)
        n_first = 4 if kind == "special" else 5
        both = golden_model.run(
            golden_cells[[0, 9]], 0, None, "all", "tokens", "ensembl_id", outputs=["logits"]
        )
        start = 0
        for cell in (0, 9):
            states = expected[f"hidden_{cell}"][:, genes]
            end = start + states.shape[1]
            for layer, wanted in zip(golden_model.all_layers, states, strict=True):
                found = both.hidden[layer][start:end]
                np.testing.assert_allclose(found, wanted, atol=3e-5, rtol=0)
            wanted = expected[f"logits_{cell}_first5"][-n_first:]
            found = both.outputs["logits"][start : start + n_first]
            np.testing.assert_allclose(found, wanted, atol=3e-5, rtol=0)
            start = end

"""scVI: scvi-tools' own numbers, genes by name, batches, and what is refused."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import hypothesis
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import strategies as st

import extract
from extract.errors import InputError
from extract.models.scvi import ScVI

MAIN = "model"
VARIANTS = ("batch_nb", "batch_encoded_deep", "layernorm", "no_log_variational")


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> Path:
    return data_folder / "golden" / "scvi"


@pytest.fixture(scope="module")
def cells(golden: Path) -> anndata.AnnData:
    return anndata.read_h5ad(golden / "counts_hvg.h5ad")


def folder_of(golden: Path, variant: str) -> Path:
    return golden if variant == MAIN else golden / "variants" / variant


def load(golden: Path, variant: str = MAIN) -> ScVI:
    return extract.load_model("scvi", folder_of(golden, variant) / "model")


def saved(
    golden: Path, variant: str, to: Path, change: Callable[[dict], Any] | None = None
) -> Path:
    """A copy of a model's file, changed."""
    found = torch.load(folder_of(golden, variant) / "model" / "model.pt", weights_only=False)
    if change is not None:
        change(found)
    torch.save(found, to / "model.pt")
    return to


@pytest.mark.parametrize("variant", [MAIN, *VARIANTS])
def test_golden(golden: Path, cells: anndata.AnnData, variant: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every weight is needed, or known to be of no use
        model = load(golden, variant)
    folder = folder_of(golden, variant)
    latent = model.embed(cells, "latent")["latent"]
    assert latent.dtype == np.float32
    np.testing.assert_allclose(latent, np.load(folder / "latent_mean.npy"), rtol=0, atol=1e-5)
    expected = np.load(folder / "expected_decoder.npz")
    at = expected["cell_index"]
    own = cells.obs["split_batch"].iloc[at].tolist() if "batch" in variant else None
    fractions = model.decode(expected["latent_mean"], batch=own)
    assert fractions.dtype == np.float32
    np.testing.assert_allclose(fractions, expected["px_scale_at_mean"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(fractions.sum(axis=1), 1, atol=1e-5)
    ran = model.run(cells[at], "latent", None, outputs=("fractions",))
    np.testing.assert_allclose(
        ran.outputs["fractions"], expected["px_scale_at_mean"], rtol=0, atol=2e-6
    )


def test_what_a_model_says_of_itself(golden: Path, cells: anndata.AnnData) -> None:
    model = load(golden)
    assert model.genes == (golden / "hvg.txt").read_text().split()
    assert (model.name, model.n_layers, model.d_model) == ("scvi", 0, 20)
    assert model.all_layers == model.resolve(None) == model.resolve("all") == ["latent"]
    assert list(model.checkpoint) == ["model.pt"]
    assert (model.naming, model.values) == ("ensembl", "counts")
    state = torch.load(golden / "model" / "model.pt", weights_only=False)["model_state_dict"]
    np.testing.assert_allclose(model.dispersion, np.exp(state["px_r"].numpy()))
    settings = load(golden, "batch_encoded_deep").plan(cells).settings
    assert settings["batch"] == "split_batch"
    assert settings["batch_encoded"]
    assert settings["log1p"]
    assert settings["coverage"]["coverage"] == 1
    assert not load(golden, "no_log_variational").plan(cells).settings["log1p"]


@pytest.mark.parametrize("variant", [MAIN, "batch_encoded_deep"])
def test_one_gene_is_one_column_of_the_first_layer(
    golden: Path, cells: anndata.AnnData, variant: str
) -> None:
    model = load(golden, variant)
    weight, bias = model.first_layer()
    assert weight.shape == (len(bias), len(model.genes))
    some = cells[:3, model.genes].copy()
    inputs = model.plan(some).read(slice(None))
    x = np.log1p(inputs.parts[0].toarray())
    linear = model._network.z_encoder["encoder"].fc_layers[0][0]
    beside = model._one_hot(inputs.parts[1], model._n_encoded)
    direct = linear(torch.cat((torch.as_tensor(x, dtype=torch.float32), beside), dim=1)).numpy()
    batch = linear.weight[:, len(model.genes) :].numpy() @ beside.numpy().T
    np.testing.assert_allclose(x @ weight.T + bias + batch.T, direct, atol=1e-5)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), batch_size=st.integers(1, 60))
@hypothesis.settings(max_examples=8)
def test_order_and_batches_do_not_matter(
    golden: Path, cells: anndata.AnnData, seed: int, batch_size: int
) -> None:
    model = load(golden, "batch_encoded_deep")
    rng = np.random.default_rng(seed)
    some = cells[:50]
    rows, columns = rng.permutation(some.n_obs), rng.permutation(some.n_vars)
    expected = model.embed(some)["latent"]
    found = model.embed(some[rows][:, columns], batch_size=batch_size)["latent"]
    np.testing.assert_allclose(found, expected[rows], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_that_the_file_lacks_are_zero_and_reported(
    golden: Path, cells: anndata.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(golden)
    some = cells[:20].copy()
    dense = some.X.toarray()
    dense[:, :500] = 0
    zeroed = anndata.AnnData(dense, some.obs, some.var)
    expected = model.embed(zeroed)["latent"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found = model.embed(some[:, 500:])["latent"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "500 of the model's 2000 genes are not in the file" in caplog.text
    assert model.plan(some[:, 500:]).settings["coverage"]["coverage"] == 0.75
    with pytest.raises(InputError, match=r"1500 genes are in both, .* 2000 of the model \(75"):
        model.embed(some[:, 500:], min_gene_coverage=0.8)
    twice = anndata.concat([some, some], axis=1)
    with pytest.raises(InputError, match="2000 genes occur more than once"):
        model.embed(twice)
    doubled = anndata.AnnData(some.X * 2, some.obs, some.var)
    expected = model.embed(doubled)["latent"]
    np.testing.assert_allclose(model.embed(twice, duplicates="sum")["latent"], expected, atol=1e-6)
    halves = anndata.AnnData(twice.X * 0.5, twice.obs, twice.var)  # whole numbers once summed
    with pytest.raises(InputError, match="must be raw counts for scvi"):
        model.embed(halves, duplicates="sum")


def test_an_edited_latent_is_what_is_decoded(golden: Path, cells: anndata.AnnData) -> None:
    model = load(golden, "batch_nb")
    some = cells[:70]
    latent = model.embed(some)["latent"]
    ran = model.run(some, "latent", lambda rows: -2 * rows, outputs=("fractions",), batch_size=32)
    np.testing.assert_allclose(ran.hidden["latent"], -2 * latent, atol=1e-5)
    own = some.obs["split_batch"].tolist()
    decoded = model.decode(-2 * latent, batch=own)
    np.testing.assert_allclose(ran.outputs["fractions"], decoded, atol=2e-6)
    for name in model.batches:
        assert not np.allclose(model.decode(-2 * latent, batch=name), decoded, atol=1e-6)
    with pytest.raises(InputError, match="'genes' are none"):
        model.run(some, "latent", lambda rows: rows, tokens="genes")
    with pytest.raises(InputError, match="has no output genes; it has fractions"):
        model.run(some, "latent", None, outputs=("genes",))


def test_batches(golden: Path, cells: anndata.AnnData) -> None:
    encoded, decoded = load(golden, "batch_encoded_deep"), load(golden, "batch_nb")
    some = cells[:9].copy()
    expected = {model: model.embed(some)["latent"] for model in (encoded, decoded)}
    some.obs["site"] = some.obs.pop("split_batch")
    for model, latent in expected.items():
        found = model.run(some, "latent", None, batch="site", outputs=("fractions",))
        np.testing.assert_array_equal(found.hidden["latent"], latent)
    # Without them: refused where the encoder wants them, and where the decoder does.
    with pytest.raises(InputError, match=r"no obs\['split_batch'\].*\(b0, b1\)"):
        encoded.embed(some)
    np.testing.assert_array_equal(decoded.embed(some)["latent"], expected[decoded])
    with pytest.raises(InputError, match=r"9 cells are of no batch that the model knows \(b0, b1"):
        decoded.run(some, "latent", None, outputs=("fractions",))
    some.obs["site"] = ["b0"] * 8 + ["b7"]
    for model in expected:
        with pytest.raises(InputError, match=r"obs\['site'\] has 1 batches .*\(b7\).*b0, b1"):
            model.embed(some, batch="site")
    with pytest.raises(InputError, match=r"no obs\['nowhere'\]"):
        decoded.embed(some, batch="nowhere")
    with pytest.raises(InputError, match="trained without batches"):
        load(golden).embed(some, batch="site")
    with pytest.raises(InputError, match="has no preprocessing site; it has batch, duplicates"):
        decoded.embed(some, site="site")


def test_decode_refuses(golden: Path) -> None:
    plain, model = load(golden), load(golden, "batch_nb")
    latents = np.zeros((3, 8), np.float32)
    same = model.decode(latents, batch=["b0", "b0", "b0"])
    np.testing.assert_array_equal(model.decode(latents, batch="b0"), same)
    assert model.decode(latents[:0], batch=[]).shape == (0, 400)
    for wrong, message in (
        ({}, "several batches; give batch=, one of b0, b1"),
        ({"batch": "b9"}, r"batch has 1 batches .*\(b9\); it knows b0, b1"),
        ({"batch": ["b0", "b1"]}, "batch has 2 entries for 3 latents"),
        ({"batch": "b0", "covariates": latents}, "leave covariates out"),
    ):
        with pytest.raises(InputError, match=message):
            model.decode(latents, **wrong)
    with pytest.raises(InputError, match="leave out batch="):
        plain.decode(np.zeros((3, 20)), batch="b0")
    with pytest.raises(InputError, match=r"latents must be \[cells, 20\], not \[3, 8\]"):
        plain.decode(latents)
    with pytest.raises(InputError, match="latents hold NaN"):
        plain.decode(np.full((3, 20), np.nan))


def test_expression_is_refused(golden: Path, cells: anndata.AnnData) -> None:
    model = load(golden)
    some = cells[:5].copy()
    some.X = some.X.astype(np.float32)
    some.layers["logged"] = some.X.log1p()
    some.layers["negative"] = -some.X
    some.layers["empty"] = scipy.sparse.csr_matrix(some.shape, dtype=np.float32)
    with pytest.raises(InputError, match=r"layers\['logged'\] must be raw counts for scvi"):
        model.embed(some, counts="logged")
    with pytest.raises(InputError, match="negative"):
        model.embed(some, counts="negative")
    with pytest.raises(InputError, match="5 cells express no gene of the model"):
        model.embed(some, counts="empty")
    assert np.isnan(model.embed(some, counts="empty", empty_cells="nan")["latent"]).all()
    with pytest.raises(InputError, match="has no layer 0; it has latent"):
        model.embed(some, 0)
    with pytest.raises(InputError, match="float32, not bfloat16"):
        extract.load_model("scvi", golden / "model", dtype="bfloat16")


def of_registry(**changes: Any) -> Callable[[dict], None]:
    return lambda found: found["attr_dict"]["registry_"].update(changes)


def of_setup(**changes: Any) -> Callable[[dict], None]:
    return lambda found: found["attr_dict"]["registry_"]["setup_args"].update(changes)


def of_init(**changes: Any) -> Callable[[dict], None]:
    return lambda found: found["attr_dict"]["init_params_"]["kwargs"]["kwargs"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["attr_dict"].pop("registry_"), r"\(no registry_, so an old one\)"),
        (of_registry(scvi_version="0.20.3"), "scvi-tools 0.20.3; this reader wants 1.0"),
        (of_registry(model_name="SCANVI"), "class SCANVI; this reader knows SCVI alone"),
        (of_registry(setup_method_name="setup_datamodule"), "set up by setup_datamodule"),
        (of_setup(categorical_covariate_keys=["donor"]), "categorical_covariate_keys donor"),
        (of_setup(continuous_covariate_keys=["age"]), "continuous_covariate_keys age"),
        (of_init(latent_distribution="ln"), "latent_distribution 'ln'; .* knows 'normal'"),
        (of_init(batch_representation="embedding"), "batch_representation 'embedding'"),
        (of_init(extra_encoder_kwargs={"bias": False}), "made with extra_encoder_kwargs"),
        (lambda found: found.update(var_names={"rna": []}), "names its genes by a dict"),
        (lambda found: found["var_names"].fill("A"), "gene names that occur twice"),
        (lambda found: found.pop("model_state_dict"), "has no model_state_dict"),
        (of_registry(field_registries={}), r"no field_registries\.batch: it is no model"),
    ],
)
def test_models_that_are_not_supported(
    golden: Path, tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        extract.load_model("scvi", saved(golden, "batch_nb", tmp_path, change))


def test_weights_that_do_not_fit_are_all_named(golden: Path, tmp_path: Path) -> None:
    def change(found: dict) -> None:
        state = found["model_state_dict"]
        del state["z_encoder.mean_encoder.bias"]
        state["decoder.px_scale_decoder.0.weight"] = torch.zeros(3, 3)
        state["z_encoder.encoder.fc_layers.Layer 0.0.bias"].fill_(float("nan"))

    with pytest.raises(InputError, match="does not fit the model") as caught:
        extract.load_model("scvi", saved(golden, MAIN, tmp_path, change))
    for wrong in (
        "z_encoder.mean_encoder.bias is missing",
        "decoder.px_scale_decoder.0.weight is (3, 3), not (2000, 128)",
        "z_encoder.encoder.fc_layers.Layer 0.0.bias holds NaN or infinite values",
    ):
        assert wrong in str(caught.value)


def test_the_file_is_found(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold model\.pt.*it holds nothing"):
        extract.load_model("scvi", tmp_path)
    (saved(golden, MAIN, tmp_path) / "model.pt").rename(tmp_path / "pbmc_model.pt")
    assert list(extract.load_model("scvi", tmp_path).checkpoint) == ["pbmc_model.pt"]
    (tmp_path / "other_model.pt").touch()
    with pytest.raises(InputError, match=r"it holds other_model\.pt, pbmc_model\.pt"):
        extract.load_model("scvi", tmp_path)


def test_what_a_decoder_may_lack(golden: Path, cells: anndata.AnnData, tmp_path: Path) -> None:
    # Each of these embeds cells all the same.
    some, latents = cells[:4], np.zeros((4, 8))
    model = extract.load_model("scvi", saved(golden, "layernorm", tmp_path, of_init()))
    expected = model.embed(some)["latent"]
    cell = of_init(dispersion="gene-cell")
    model = extract.load_model("scvi", saved(golden, "layernorm", tmp_path, cell))
    np.testing.assert_array_equal(model.embed(some)["latent"], expected)
    with pytest.raises(InputError, match="dispersion of each gene in each cell"):
        _ = model.dispersion
    with pytest.raises(InputError, match="likelihood 'poisson': no dispersion"):
        _ = load(golden, "no_log_variational").dispersion
    scaled = of_setup(size_factor_key="size")
    model = extract.load_model("scvi", saved(golden, "layernorm", tmp_path, scaled))
    np.testing.assert_array_equal(model.embed(some)["latent"], expected)
    with pytest.raises(InputError, match=r"obs\['size'\] \(size_factor_key\).*no fractions"):
        model.decode(latents)


def made(seed: int = 0) -> anndata.AnnData:
    """Counts of 200 cells in two batches."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1, 2, size=100), size=(200, 100)).astype(np.float32)
    cells = anndata.AnnData(scipy.sparse.csr_matrix(counts))
    cells.obs["lane"] = np.where(np.arange(200) % 3 == 0, 1, 0)
    return cells


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments",
    [
        {"dispersion": "gene-batch"},
        {"n_layers": 2, "encode_covariates": True, "deeply_inject_covariates": False},
        {"n_layers": 2, "use_layer_norm": "encoder", "use_batch_norm": "decoder"},
    ],
)
def test_scvi_tools_itself(tmp_path: Path, arguments: dict[str, Any]) -> None:
    scvi = pytest.importorskip("scvi")
    scvi.settings.verbosity = logging.ERROR
    cells = made()
    scvi.model.SCVI.setup_anndata(cells, batch_key="lane")
    theirs = scvi.model.SCVI(cells, n_latent=5, n_hidden=16, **arguments)
    theirs.train(
        max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=False, batch_size=64
    )
    theirs.save(tmp_path / "saved", prefix="tiny_")
    ours = extract.load_model("scvi", tmp_path / "saved")
    latent = theirs.get_latent_representation()
    np.testing.assert_allclose(ours.embed(cells)["latent"], latent, rtol=0, atol=1e-5)
    lanes = torch.as_tensor(cells.obs["lane"].to_numpy()).unsqueeze(1)
    with torch.inference_mode():
        scale = (
            theirs.module.cpu()
            .eval()
            .generative(z=torch.as_tensor(latent), library=torch.ones(200, 1), batch_index=lanes)[
                "px"
            ]
            .scale
        )
    fractions = ours.decode(latent, batch=cells.obs["lane"].tolist())
    np.testing.assert_allclose(fractions, scale.numpy(), rtol=0, atol=2e-6)
    shape = (100, 2) if "dispersion" in arguments else (100,)
    assert ours.dispersion.shape == shape

    # What was minified holds the same weights.
    cells.obsm["X_latent_qzm"], cells.obsm["X_latent_qzv"] = theirs.get_latent_representation(
        return_dist=True
    )
    counts = made()
    theirs.minify_adata()
    theirs.save(tmp_path / "minified")
    again = extract.load_model("scvi", tmp_path / "minified").embed(counts)["latent"]
    np.testing.assert_allclose(again, latent, rtol=0, atol=1e-5)

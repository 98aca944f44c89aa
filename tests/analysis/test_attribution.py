"""Attribution: planted genes, brute force, plain loops; what must change nothing; resuming."""

import dataclasses
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp
from scipy.spatial.distance import cdist

import extract
from analysis import attribution, attribution_store, counterfactuals, perturbed, swaps
from analysis.attribution import attribute, find_pairs
from analysis.baselines import fit
from analysis.counterfactuals import choose
from analysis.neurons import Neurons
from sae_jax import manifest
from sae_jax.errors import InputError
from tests.analysis.attribution_cases import (
    GENES,
    Planted,
    Threshold,
    brute_force,
    dictionary,
    some_cells,
)

CELLS = some_cells()
QUIET: dict[str, Any] = {"progress": False}


# Prototypes and counterfactuals


@given(
    seed=st.integers(0, 2**16), n=st.integers(2, 30), top=st.integers(1, 5), near=st.integers(1, 4),
    shift=st.sampled_from([0.0, 1e4]),
)  # fmt: skip
@settings(max_examples=40)
def test_pairs_are_those_of_a_plain_loop(
    seed: int, n: int, top: int, near: int, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (n, 2)).astype(float) + shift  # many cells equally far
    z = np.where(rng.random((n, 5)) < 0.5, 0, rng.integers(1, 4, (n, 5))).astype(float)
    z[:, 0], z[:, 1] = 0, 1  # dead, and never silent
    z[0, 2], z[1, 2] = 1, 0
    distance = cdist(x, x)
    found = choose(sp.csr_matrix(z), x, prototypes=top, counterfactuals=near)
    rows = []
    for latent in range(5):
        silent = [c for c in range(n) if z[c, latent] == 0]
        for p in sorted(np.flatnonzero(z[:, latent]), key=lambda c: (-z[c, latent], c))[:top]:
            for c in sorted(silent, key=lambda c: (distance[p, c], c))[:near]:
                rows.append((latent, p, c, distance[p, c]))
    table = found.frame()
    assert list(table["concept"]) == [row[0] for row in rows]
    assert list(table["prototype"]) == [row[1] for row in rows]
    assert list(table["counterfactual"]) == [row[2] for row in rows]
    np.testing.assert_allclose(table["distance"], [row[3] for row in rows], rtol=1e-12, atol=1e-9)
    assert found.count[:2].tolist() == [0, 0]


def test_near_ones_are_told_apart_beyond_float32() -> None:
    """Two tight clusters far apart: float32 squares round by more than distances differ."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.05, (200, 5)) + np.where(np.arange(200) < 100, 1000, -1000)[:, None]
    z = np.zeros((200, 1))
    z[:5] = 1
    found = choose(z, x, counterfactuals=4)
    expected = 5 + np.argsort(cdist(x[:5], x[5:]), axis=1)[:, :4]
    np.testing.assert_array_equal(found.counterfactual.reshape(5, 4), expected)


def test_dense_codes_have_a_quantile() -> None:
    rng = np.random.default_rng(0)
    z, x = rng.normal(size=(50, 3)), rng.normal(size=(50, 2))
    found = choose(z, x, [2, 0], prototypes=4, counterfactuals=2, quantile=0.3)
    assert found.concepts.tolist() == [2, 0]
    for i, latent in enumerate((2, 0)):
        some = found.of([i])
        low = np.quantile(z[:, latent], 0.3)
        assert (z[some.counterfactual, latent] <= low).all()
        assert set(some.prototype) == set(np.argsort(-z[:, latent])[:4])
    with pytest.raises(InputError, match="is negative"):
        choose(z, x)
    with pytest.raises(InputError, match=r"no concept has both .* give quantile=0\.05"):
        choose(np.abs(z), x)
    assert set(choose(z, x, [1], quantile=0.5).counterfactual) <= set(
        np.flatnonzero(z[:, 1] <= np.median(z[:, 1]))
    )


# Distinct exchanges


@given(seed=st.integers(0, 2**16), others=st.integers(1, 80))
@settings(max_examples=30)
def test_distinct_exchanges_are_those_of_a_plain_loop(seed: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.poisson(0.7, (others + 1, 6)).astype(float)
    found = swaps.distinct(
        sp.csr_array(values), lambda _, genes, new: np.minimum(new, 2), 0, np.arange(1, others + 1)
    )
    asked: dict[tuple[int, float], set[int]] = {}
    for c in range(others):
        for gene in range(6):
            if min(values[c + 1, gene], 2) != min(values[0, gene], 2):
                asked.setdefault((gene, min(values[c + 1, gene], 2)), set()).add(c)
    uses = found.uses.toarray()
    assert len(found.genes) == len(asked)
    for gene, value, row in zip(found.genes, found.values, uses, strict=True):
        assert set(np.flatnonzero(row)) == asked[gene, min(value, 2)]
    assert (np.diff(found.genes) >= 0).all()


# Scores


def test_a_planted_encoder_gives_exactly_its_genes() -> None:
    model = Planted()
    found = attribute(model, Threshold(), CELLS, **QUIET)
    read = np.isin(GENES, Planted.READ)
    assert found.genes == GENES
    assert not found.scores[:, ~read].any()
    # Dimension 0 does not read g20 in the mixing's second column: the rows of the matrix say which.
    mixes = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1]], bool)
    np.testing.assert_array_equal(found.scores[:, read] != 0, mixes)
    best = found.important(most=3)
    assert set(best["gene"]) <= set(Planted.READ)
    assert (best["score"] > 0.05).all()
    # Every exchange once, every prototype once, beside the embedding of all cells; the genes that
    # nobody reads are exchanged too, since this object does not say which it reads.
    assert model.cells == CELLS.n_obs + found.forwards.done
    assert found.forwards.brute == len(found.pairs.prototype) * len(GENES)
    assert found.forwards.done < found.forwards.changed < found.forwards.brute
    done, brute = f"{found.forwards.done:,}", f"{found.forwards.brute:,}"
    assert str(found.forwards).startswith(f"{done} of {brute} cells through the model, ")


@pytest.mark.parametrize("samples", [False, True])
def test_brute_force_of_any_object(samples: bool) -> None:
    model, coder = Planted(), Threshold()
    found = attribute(
        model, coder, CELLS, [2, 0], prototypes=3, counterfactuals=2, samples=samples, **QUIET
    )
    for i, concept in enumerate((2, 0)):
        some = found.pairs.of([i])
        expected = brute_force(model, coder, CELLS, some, GENES, concept)
        np.testing.assert_allclose(found.scores[i], expected.mean(axis=0), atol=1e-12)
        if samples:
            rows = found.samples[np.flatnonzero(found.pairs.concept == i)]
            np.testing.assert_allclose(rows.toarray(), expected, atol=1e-12)
    if samples:
        x = CELLS.X.toarray()
        differ = x[found.pairs.prototype] != x[found.pairs.counterfactual]
        stored = found.samples.copy()
        stored.data[:] = 1
        np.testing.assert_array_equal(stored.toarray() > 0, differ)


def test_signs_are_kept() -> None:
    """A drop is positive; dimension 0 rises when g8 is taken away, as its weight is negative."""
    x = np.zeros((2, len(GENES)))
    x[0, [3, 8, 20, 5]] = [6, 4, 3, 9]
    cells = anndata.AnnData(x, var=CELLS.var)
    found = attribute(Planted(), Threshold(), cells, 0, **QUIET)
    score = found.frame().loc[0]
    t = np.tanh(np.log1p([6, 4, 3]) * [0.3, 0.5, 0.4])
    z = t @ [1, -0.3, 0.5] - 0.3
    taken = {"g3": t[0], "g8": -0.3 * t[1], "g20": 0.5 * t[2], "g5": 0}
    expected = [z - max(z - part, 0) for part in taken.values()]
    np.testing.assert_allclose([score[gene] for gene in taken], expected, atol=1e-12)
    ranks = found.important(-np.inf)
    assert list(ranks["gene"][:2]) == ["g3", "g20"]
    assert ranks["gene"].iloc[-1] == "g8"
    assert list(ranks["gene"][2:5]) == ["g0", "g1", "g2"]  # equal ones in the genes' order
    assert list(found.important(0.1)["gene"]) == ["g3", "g20"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "relu", "k": None, "l1_weight": 0.1},
        {"activation": "jump_relu", "k": None, "l0_weight": 0.1, "pre_bias": "tied"},
        {"activation": "batch_topk", "k": 4},
        {"activation": "gated", "k": None, "l1_weight": 0.1},
    ],
    ids=lambda fields: fields.get("activation", "topk"),
)
def test_codes_of_some_latents_are_those_of_the_dictionary(fields: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    coder = dictionary(x, **fields)
    rng = np.random.default_rng(1)
    names = [f for f in ("log_threshold", "magnitude_gain", "magnitude_bias", "encoder_bias")
             if getattr(coder.params, f) is not None]  # fmt: skip
    changed = {f: rng.normal(size=getattr(coder.params, f).shape).astype(np.float32) * 0.3
               for f in names}  # fmt: skip
    coder = dataclasses.replace(coder, params=coder.params.replace(**changed))
    encoder = coder.params.encoder.copy()
    encoder[:, 12], bias = encoder[:, 7], coder.params.encoder_bias.copy()
    bias[12] = bias[7]  # latents that tie, with the last of the k now and then
    params = coder.params.replace(encoder=encoder, encoder_bias=bias)
    coder = dataclasses.replace(coder, params=params)
    for concepts in (np.array([7, 0, 39, 12, 5]), np.array([12, 30, 7])):
        found = perturbed.Score(coder)(x, concepts)
        np.testing.assert_allclose(found, coder.encode(x)[:, concepts], atol=1e-6)
        assert found.any(axis=0).mean() > 0.5


@pytest.fixture(scope="module")
def pbmc(data_folder: Path) -> anndata.AnnData:
    folder = data_folder / "golden/scvi"
    cells = anndata.read_h5ad(folder / "counts_hvg.h5ad")[::60]
    genes = (folder / "variants/genes.txt").read_text().split()  # of the variants, and some more
    cells = cells[:, np.isin(cells.var_names, genes) | (np.arange(cells.n_vars) < 150)].copy()
    cells.obs = cells.obs[["split_batch"]]
    return cells


@pytest.mark.parametrize("variant", ["", "batch_encoded_deep", "layernorm", "no_log_variational"])
def test_brute_force_of_scvi(data_folder: Path, pbmc: anndata.AnnData, variant: str) -> None:
    folder = data_folder / "golden/scvi"
    folder = folder / "variants" / variant if variant else folder
    model = extract.load_model("scvi", folder / "model")
    options = {"min_gene_coverage": 0.1}
    x = model.embed(pbmc, **options)["latent"]
    relu = {"activation": "relu", "k": None, "l1_weight": 0.1} if variant == "layernorm" else {}
    coder = dictionary(x, **relu)
    call: dict[str, Any] = {"options": options, **QUIET}
    found = attribute(model, coder, pbmc, [3, 11, 20], prototypes=2, counterfactuals=2, **call)
    assert found.forwards.done < found.forwards.brute / 4
    assert np.abs(found.scores).max() > 0.01
    # The same model without what makes it fast.
    plain = type("Plain", (), {"embed": staticmethod(model.embed)})()
    slow = attribute(plain, coder, pbmc, pairs=found.pairs, **call)
    known = [slow.genes.index(gene) for gene in found.genes]
    np.testing.assert_allclose(found.scores, slow.scores[:, known], atol=1e-5)
    # Single cells by hand: the best gene, the worst, and one that hardly any cell has.
    order = attribution.descending(found.scores[0])
    some = order[[0, 1, -1, len(order) // 2]]
    genes = [found.genes[i] for i in some]
    expected = brute_force(model, coder, pbmc, found.pairs.of([0]), genes, 3, **options)
    np.testing.assert_allclose(found.scores[0, some], expected.mean(axis=0), atol=1e-5)


@pytest.fixture(scope="module")
def small_gpt(data_folder: Path) -> tuple[Any, anndata.AnnData]:
    folder = data_folder / "golden/scgpt"
    cells = anndata.read_h5ad(folder / "cells_counts.h5ad")
    cells = cells[:12, np.flatnonzero(cells.var["in_vocab"])[:60]].copy()
    cells.var_names = cells.var["feature_name"].astype(str)
    return extract.load_model("scgpt", folder / "model"), cells


@pytest.mark.parametrize("bins", ["rebin", "prototype"])
def test_brute_force_of_scgpt(small_gpt: tuple[Any, anndata.AnnData], bins: str) -> None:
    model, cells = small_gpt
    options = {"pooling": "cls", "min_gene_coverage": 0.0}
    x = model.embed(cells, **options)[2]
    coder = dictionary(x, 12, activation="relu", k=None, l1_weight=0.1)
    found = attribute(
        model, coder, cells, [1, 4, 9], prototypes=2, counterfactuals=2, embedding=x,
        options=options, exchange={"bins": bins}, samples=True, **QUIET,
    )  # fmt: skip
    assert found.forwards.done < found.forwards.brute / 2
    if bins == "rebin":
        row, x = 3, cells.X.toarray()
        p, c = found.pairs.prototype[row], found.pairs.counterfactual[row]
        kinds = [x[p] > 0, x[c] > 0, x[p] == x[c]]  # vanish or change, appear or change, stay
        genes = np.concatenate([np.flatnonzero(kind)[:2] for kind in kinds])
        pair = dataclasses.replace(found.pairs, prototype=[p], counterfactual=[c])
        names = [found.genes[i] for i in genes]
        concept = found.pairs.concepts[found.pairs.concept[row]]
        expected = brute_force(model, coder, cells, pair, names, concept, **options)[0]
        np.testing.assert_allclose(found.samples[[row]].toarray()[0, genes], expected, atol=1e-5)
        return
    # All genes of a pair, one at a time, none skipped and none shared.
    reader = model.swaps(cells, np.arange(12), bins=bins, **options)
    row = 5
    p, c = found.pairs.prototype[row], found.pairs.counterfactual[row]
    n, concept = len(found.genes), found.pairs.concepts[found.pairs.concept[row]]
    rows = reader.embed(
        np.full(n, p), np.arange(n + 1), np.arange(n), reader.values[c].toarray().ravel()
    )
    expected = coder.encode(x)[p, concept] - coder.encode(rows)[:, concept]
    np.testing.assert_allclose(found.samples[[row]].toarray()[0], expected, atol=1e-5)


def test_what_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, coder = Planted(), Threshold()
    whole = attribute(model, coder, CELLS, **QUIET)
    for block in (1, 2):
        found = attribute(model, coder, CELLS, block=block, **QUIET)
        np.testing.assert_array_equal(found.scores, whole.scores)
        assert found.forwards.done >= whole.forwards.done
    monkeypatch.setattr(attribution, "SWAPS", 5)
    monkeypatch.setattr(perturbed, "BYTES", 800)
    monkeypatch.setattr(swaps, "CELLS", 2)
    monkeypatch.setattr(counterfactuals, "BYTES", 700)
    found = attribute(model, coder, CELLS, samples=True, **QUIET)
    np.testing.assert_allclose(found.scores, whole.scores, atol=1e-15)
    count = found.pairs.count
    mean = sp.csr_array(
        (1 / count[found.pairs.concept], (found.pairs.concept, np.arange(count.sum())))
    )
    np.testing.assert_allclose((mean @ found.samples).toarray(), whole.scores, atol=1e-15)
    # Genes and cells in another order: the same scores, by name.
    rng = np.random.default_rng(0)
    other = CELLS[rng.permutation(CELLS.n_obs)][:, rng.permutation(CELLS.n_vars)].copy()
    pairs = whole.pairs
    place = other.obs_names.get_indexer(CELLS.obs_names)
    moved = dataclasses.replace(
        pairs, prototype=place[pairs.prototype], counterfactual=place[pairs.counterfactual]
    )
    again = attribute(model, coder, other, pairs=moved, **QUIET)
    np.testing.assert_allclose(again.frame()[GENES], whole.frame(), atol=1e-12)


def test_in_a_layer_dense_or_sparse() -> None:
    class OfLayer(Planted):
        def embed(self, adata: anndata.AnnData, counts: str | None = None) -> np.ndarray:
            assert counts == "raw_counts"
            return super().embed(anndata.AnnData(adata.layers[counts], adata.obs, adata.var))

    cells = CELLS.copy()
    cells.layers["raw_counts"] = cells.X.toarray()
    del cells.X
    found = attribute(OfLayer(), Threshold(), cells, options={"counts": "raw_counts"}, **QUIET)
    expected = attribute(Planted(), Threshold(), CELLS, **QUIET)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-12)
    np.testing.assert_array_equal(cells.layers["raw_counts"], CELLS.X.toarray())


@pytest.mark.parametrize("kind", ["neurons", "Neurons", "PCA"])
def test_what_has_codes_is_attributed(kind: str) -> None:
    model = Planted()
    x = model.embed(CELLS)
    coder = {"neurons": lambda: "neurons", "Neurons": lambda: Neurons.of(x),
             "PCA": lambda: fit("PCA", x)}[kind]()  # fmt: skip
    rule = {} if kind == "Neurons" else {"quantile": 0.25}
    found = attribute(model, coder, CELLS, **rule, **QUIET)
    read = np.isin(GENES, Planted.READ)
    assert not found.scores[:, ~read].any()
    assert found.scores[:, read].any(axis=1).all()
    if kind == "neurons":
        x_of = type("X", (), {"encode": staticmethod(lambda x, sparse=False: x)})()
        expected = brute_force(model, x_of, CELLS, found.pairs.of([1]), GENES, 1)
        np.testing.assert_allclose(found.scores[1], expected.mean(axis=0), atol=1e-12)


def test_a_concept_without_pairs_is_nan(caplog: pytest.LogCaptureFixture) -> None:
    class OneDead(Threshold):
        def encode(self, x: np.ndarray, sparse: bool = False) -> Any:
            z = super().encode(x)
            z[:, 1] = 0
            return sp.csr_matrix(z) if sparse else z

    found = attribute(Planted(), OneDead(), CELLS, samples=True, **QUIET)
    assert np.isnan(found.scores[1]).all()
    assert np.isfinite(found.scores[[0, 2]]).all()
    assert "1 concept without prototypes or without counterfactuals: NaN" in caplog.text
    assert 1 not in set(found.important(-np.inf)["concept"])


# Resuming


def test_a_coder_of_other_numbers_is_another_one(tmp_path: Path) -> None:
    x = Planted().embed(CELLS)
    coder = Neurons.of(x)
    pairs = find_pairs(Planted(), coder, CELLS)
    attribute(Planted(), coder, CELLS, pairs=pairs, folder=tmp_path / "kept", **QUIET)
    other = Neurons(coder.median + np.float32(0.01))
    with pytest.raises(InputError, match="holds an attribution of other dictionary"):
        attribute(Planted(), other, CELLS, pairs=pairs, folder=tmp_path / "kept", **QUIET)


def test_another_precision_and_other_batches_are_other_scores(tmp_path: Path) -> None:
    model, pairs = Planted(), find_pairs(Planted(), Threshold(), CELLS)
    call = {"pairs": pairs, "folder": tmp_path / "kept", **QUIET}
    attribute(model, Threshold(), CELLS, **call)
    model.dtype = "float32"
    attribute(model, Threshold(), CELLS, **call)  # which is what is meant where none is named
    model.dtype = "bfloat16"
    with pytest.raises(InputError, match="holds an attribution of other dtype"):
        attribute(model, Threshold(), CELLS, **call)
    found = perturbed.perturbed(Planted(), Threshold(), CELLS, pairs.cells)
    before = attribution_store.identity(Planted(), Threshold(), found, pairs.local(), {})
    found.batch = np.zeros(len(pairs.cells), np.int32)  # one alone
    assert attribution_store.identity(Planted(), Threshold(), found, pairs.local(), {}) == before
    found.batch[-1] = 1
    after = attribution_store.identity(Planted(), Threshold(), found, pairs.local(), {})
    assert set(after) - set(before) == {"batch"}


def test_finished_blocks_are_not_done_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coder, folder = Threshold(), tmp_path / "kept"
    call: dict[str, Any] = {"folder": folder, "block": 2, "samples": True, **QUIET}
    whole = attribute(Planted(), coder, CELLS, block=2, samples=True, **QUIET)

    class Dies(Planted):
        def embed(self, adata: anndata.AnnData) -> np.ndarray:
            if len(list(folder.glob("block_*"))) == 1:
                raise KeyboardInterrupt
            return super().embed(adata)

    with pytest.raises(KeyboardInterrupt):
        attribute(Dies(), coder, CELLS, **call)
    left = ["attribution.json", "block_00000.npz", "manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == left
    dies = type("Dies", (Planted,), {})()  # by the name of its class the same model
    found = attribute(dies, coder, CELLS, **call)
    np.testing.assert_array_equal(found.scores, whole.scores)
    np.testing.assert_array_equal(found.samples.toarray(), whole.samples.toarray())
    assert found.forwards == whole.forwards
    assert dies.cells < CELLS.n_obs + whole.forwards.done
    before = dies.cells
    again = attribute(dies, coder, CELLS, **call)
    assert dies.cells == before + CELLS.n_obs  # pairs are chosen again
    np.testing.assert_array_equal(again.scores, whole.scores)
    assert manifest.check(folder, "full") == 1 + len(list(folder.glob("block_*")))
    damaged = bytearray((folder / "block_00001.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "block_00001.npz").write_bytes(damaged)
    (folder / "block_00000.npz").unlink()
    np.testing.assert_array_equal(attribute(dies, coder, CELLS, **call).scores, whole.scores)
    assert "block_00001.npz has other contents; it is computed again" in caplog.text
    manifest.check(folder, "full")
    changed = CELLS.copy()
    changed.X = changed.X * 2
    for other in ({"block": 1}, {"samples": False}, {"prototypes": 4}, {"concepts": [0, 2]}):
        with pytest.raises(InputError, match="holds an attribution of other"):
            attribute(dies, coder, CELLS, **call | other)
    with pytest.raises(InputError, match="holds an attribution of other pairs, values"):
        attribute(dies, coder, changed, **call)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        attribute(dies, coder, CELLS, **call | {"folder": tmp_path / "mine"})


def test_another_dictionary_is_refused(tmp_path: Path) -> None:
    model = Planted()
    x = model.embed(CELLS).astype(np.float32)
    pairs = find_pairs(model, dictionary(x), CELLS)
    call: dict[str, Any] = {"pairs": pairs, "folder": tmp_path / "f", **QUIET}
    attribute(model, dictionary(x), CELLS, **call)
    with pytest.raises(InputError, match="of other dictionary:"):
        attribute(model, dictionary(x, seed=1), CELLS, **call)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"concepts": [0, 0]}, "each of them once"),
        ({"concepts": 3}, r"latents 0 \.\. 2"),
        ({"concepts": [0.5]}, "numbers of latents"),
        ({"prototypes": 0}, "at least 1 cell"),
        ({"quantile": 1.5}, "between 0 and 1"),
        ({"block": 0}, "at least 1 concept"),
        ({"embedding": np.zeros((4, 3))}, "4 rows for 60 cells"),
        ({"embedding": np.full((60, 3), np.nan)}, "finite"),
        ({"dictionary": "pca"}, "give a dictionary, or 'neurons'"),
        ({"exchange": {"bins": "own"}}, "has no `swaps`, so no bins"),
        ({"options": {"counts": "there"}}, "in X or in a layer"),
    ],
)
def test_the_refused(change: dict[str, Any], words: str) -> None:
    call: dict[str, Any] = {"concepts": None, "dictionary": Threshold()} | change
    coder, concepts = call.pop("dictionary"), call.pop("concepts")

    class Lenient(Planted):
        def embed(self, adata: anndata.AnnData, **_: Any) -> np.ndarray:
            return super().embed(adata)

    with pytest.raises((InputError, ValueError), match=words):
        attribute(Lenient(), coder, CELLS, concepts, **call, **QUIET)


def test_an_embedding_of_something_else_is_refused() -> None:
    model = Planted()
    x = model.embed(CELLS)
    found = attribute(model, Threshold(), CELLS, embedding=x, **QUIET)
    np.testing.assert_array_equal(
        found.scores, attribute(model, Threshold(), CELLS, **QUIET).scores
    )
    with pytest.raises(InputError, match="is not what the model gives of these cells"):
        attribute(model, Threshold(), CELLS, embedding=x[::-1], **QUIET)
    pairs = found.pairs
    with pytest.raises(InputError, match="leave concepts and embedding out"):
        attribute(model, Threshold(), CELLS, [0], pairs=pairs, **QUIET)
    with pytest.raises(InputError, match=r"cells 0 \.\. 9"):
        attribute(model, Threshold(), CELLS[:10], pairs=pairs, **QUIET)


def test_a_model_of_two_layers_or_of_nan_is_refused() -> None:
    two = {0: np.zeros((60, 2)), 1: np.zeros((60, 2))}
    for rows, words in ((two, "name one of them"), (np.full((60, 3), np.nan), "finite numbers")):
        model = type("Odd", (), {"embed": staticmethod(lambda adata, rows=rows: rows)})()
        with pytest.raises(InputError, match=words):
            attribute(model, Threshold(), CELLS, **QUIET)

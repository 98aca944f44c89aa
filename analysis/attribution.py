"""Counterfactual gene attribution (Claye, section 3.2): the genes that make a concept fire.

    a_gene = z(prototype) - z(prototype with the gene's value of a counterfactual)   (equation 2)

averaged over the counterfactuals of each prototype and over prototypes. A score is positive where
the concept falls when the gene takes the value that it has in a like cell without the concept, and
negative where it rises; signs are kept. The numbers are exact: what is saved is computing anything
twice (`swaps`) and what a model allows (`perturbed`).

What an exchange is, is the model's matter. scVI: the count; the cell's total does not matter to its
encoder. scGPT: the value before binning; the prototype's bins are kept, so that its other genes
keep their digits, or the cell is binned anew, or a digit is exchanged for a digit
(`exchange={"bins": ...}`); a gene that becomes 0 loses its token, one that becomes positive gets
one. Geneformer: the gene is taken out of the ranking and put where the counterfactual's value
belongs. multiDGD has no encoder and refuses. Any other object: the values of an AnnData. A model
that was loaded with dtype="bfloat16" computes in it, which moves scores by some hundredths of a
prototype's code at most, and most of them by less than one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from tqdm import tqdm

from analysis import perturbed
from analysis.attribution_store import Forwards, Part, Store, identity
from analysis.counterfactuals import COUNTERFACTUALS, PROTOTYPES, Pairs, choose
from analysis.perturbed import Coder, Embedder, Perturbed, Score
from analysis.swaps import distinct
from sae_jax.errors import InputError, counted

IMPORTANT = 0.05  # of the paper
SWAPS = 1024  # evaluated at once
BLOCK = 128  # concepts that are kept together in a folder
MISFIT = 0.1  # of the codes, by which the embedding given may differ from the model's own


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """What each gene does to each concept.

    Attributes:
      scores: float64 [concepts, genes]; a row of NaN for a concept without pairs (one that no cell
        activates, or every one).
      genes: names.
      pairs: the cells that scores are averaged over; the concepts are `pairs.concepts`.
      samples: with samples=True the scores of single pairs, CSR [pairs, genes]; what is stored are
        the genes that were exchanged. Their mean over a concept's pairs is its row of `scores`.
      forwards: what it cost.
    """

    scores: np.ndarray
    genes: list[str]
    pairs: Pairs
    samples: sparse.csr_array | None
    forwards: Forwards

    def frame(self) -> pd.DataFrame:
        """Scores, a row a concept, a column a gene."""
        index = pd.Index(self.pairs.concepts, name="concept")
        return pd.DataFrame(self.scores, index, pd.Index(self.genes, name="gene"))

    def important(self, threshold: float = IMPORTANT, most: int | None = None) -> pd.DataFrame:
        """The genes of each concept that score above a threshold, best first (equation 3).

        Args:
            threshold: scores must exceed it; Claye takes .05.
            most: genes of a concept; None: all of them.

        Returns:
            A row each: `concept`, `rank` from 1, `gene`, `score`. Equal scores in the genes' order.
        """
        rows = []
        for concept, scores in zip(self.pairs.concepts, self.scores, strict=True):
            order = descending(scores)[: int((scores > threshold).sum())][:most]
            rank = np.arange(1, order.size + 1)
            genes = np.asarray(self.genes, object)[order]
            rows.append(pd.DataFrame(
                {"concept": concept, "rank": rank, "gene": genes, "score": scores[order]}
            ))  # fmt: skip
        return pd.concat(rows, ignore_index=True)


def descending(scores: np.ndarray) -> np.ndarray:
    """Positions of scores, the largest first, equal ones in their order; NaN last."""
    return np.argsort(-scores, kind="stable")


def attribute(
    model: Embedder,
    dictionary: Coder | str,
    adata: anndata.AnnData,
    concepts: int | Sequence[int] | np.ndarray | None = None,
    *,
    prototypes: int = PROTOTYPES,
    counterfactuals: int = COUNTERFACTUALS,
    quantile: float | None = None,
    pairs: Pairs | None = None,
    embedding: np.ndarray | None = None,
    options: Mapping[str, Any] | None = None,
    exchange: Mapping[str, Any] | None = None,
    samples: bool = False,
    folder: str | Path | None = None,
    block: int | None = None,
    progress: bool = True,
) -> Attribution:
    """Scores of every gene for one concept, for many, or for a whole dictionary.

    Args:
        model: any object with `embed`; readers of extract are faster, see `perturbed`.
        dictionary: of the model's embedding: anything with `encode`; or "neurons", the embedding's
            dimensions themselves, which need a `quantile`.
        adata: cells among which prototypes and counterfactuals are found. In a file or of dask
            arrays only these are read, and all cells, some thousands at a time, where no
            `embedding` is given: what is held is the embedding and the codes of all cells.
        concepts: latents, each once; None: all of them.
        prototypes, counterfactuals, quantile: as of `counterfactuals.choose`.
        pairs: the pairs themselves, instead of the five above.
        embedding: of all cells [cells, d], where it is there already; it must be the model's.
        options: of the model's `embed`: layers, pooling, genes, counts, batch_size, preprocessing.
            Of an object without `swaps` nothing may depend on which cells there are.
        exchange: keywords of the model's `swaps`: {"bins": "rebin"} of scGPT.
        samples: keep the scores of single pairs too: 12 bytes for each exchange asked for.
        folder: where finished blocks of concepts are kept; the same call in it goes on with the
            rest. The inputs must be the same, which is checked.
        block: concepts that are done together; exchanges are shared within a block. None: all, or
            128 with a folder.
        progress: whether to show a bar.

    Raises:
        InputError: whatever of the input does not fit, before anything is perturbed.
    """
    if block is not None and block < 1:
        raise InputError(f"block={block} must be at least 1 concept.")
    expected = None
    if pairs is None:
        pairs, expected = _choose(
            model, dictionary, adata, concepts, embedding, options,
            prototypes=prototypes, counterfactuals=counterfactuals, quantile=quantile,
        )  # fmt: skip
    elif concepts is not None or embedding is not None:
        raise InputError("pairs name concepts and cells: leave concepts and embedding out.")
    pairs.check(adata.n_obs)
    found = perturbed.perturbed(model, dictionary, adata, pairs.cells, options, exchange)
    local = pairs.local()
    if embedding is not None:
        _check(found, local, expected)
    if bare := int((pairs.count == 0).sum()):
        some = counted(int(bare), "concept")
        logging.warning("%s without prototypes or without counterfactuals: NaN", some)
    n = len(pairs.concepts)
    block = block or (n if folder is None else BLOCK)
    blocks = [local.of(np.arange(start, min(start + block, n))) for start in range(0, n, block)]
    store = None
    if folder is not None:
        settings = {"samples": samples, "block": block}
        settings |= {"options": options or {}, "exchange": exchange or {}}
        store = Store(folder, identity(model, dictionary, found, local, settings))
    total = Forwards()
    prototypes = sum(len(np.unique(some.prototype)) for some in blocks)
    with tqdm(total=prototypes, desc="attribution", unit=" prototype", disable=not progress) as bar:

        def note(more: Forwards, prototypes: int = 1) -> None:
            nonlocal total
            total += more
            bar.set_postfix_str(f"{total.done} forwards, {total.saved:.1%} saved", refresh=False)
            bar.update(prototypes)

        parts = []
        for number, some in enumerate(blocks):
            part = None if store is None else store.load(number)
            if part is not None:
                note(part.forwards, len(np.unique(some.prototype)))
            else:
                part = _block(found, some, samples, note)
                if store is not None:
                    store.save(number, part)
            parts.append(part)
    scores = np.concatenate([part.scores for part in parts])
    together = sparse.vstack([part.samples for part in parts], "csr") if samples else None
    return Attribution(scores, list(found.genes), pairs, together, total)


def find_pairs(
    model: Embedder,
    dictionary: Coder | str,
    adata: anndata.AnnData,
    concepts: int | Sequence[int] | np.ndarray | None = None,
    *,
    embedding: np.ndarray | None = None,
    options: Mapping[str, Any] | None = None,
    **rule: Any,
) -> Pairs:
    """The pairs that `attribute` would take; arguments as there, `rule` those of `choose`.

    Raises:
        InputError: as `attribute`.
    """
    return _choose(model, dictionary, adata, concepts, embedding, options, **rule)[0]


def _choose(
    model: Embedder,
    dictionary: Coder | str,
    adata: anndata.AnnData,
    concepts: int | Sequence[int] | np.ndarray | None,
    embedding: np.ndarray | None,
    options: Mapping[str, Any] | None,
    **rule: Any,
) -> tuple[Pairs, np.ndarray]:
    """The pairs, and the code of each pair's prototype [pairs]."""
    given = embedding is not None
    x = np.asarray(embedding) if given else perturbed.embed(model, adata, options)
    if len(x) != adata.n_obs:
        raise InputError(f"the embedding has {len(x)} rows for {adata.n_obs} cells.")
    codes = Score(dictionary).encode(x)
    pairs = choose(codes, x, concepts, **rule)
    at = (pairs.prototype, pairs.concepts[pairs.concept])
    return pairs, np.asarray(codes[at]).ravel()


def _check(found: Perturbed, pairs: Pairs, expected: np.ndarray) -> None:
    """Refuse an embedding that the model does not give.

    Raises:
        InputError: codes of prototypes that differ from the expected ones [pairs].
    """
    concepts, column = np.unique(pairs.concepts[pairs.concept], return_inverse=True)
    cells, row = np.unique(pairs.prototype, return_inverse=True)
    some = cells[:SWAPS]
    nothing = np.zeros(0, np.int64)
    codes = found.codes(some, np.zeros(len(some) + 1, np.int64), nothing, np.zeros(0), concepts)
    among = row < len(some)
    own = codes[row[among], column[among]]
    off = np.abs(own - expected[among]).sum() / np.abs(expected[among]).sum()
    if not off <= MISFIT:
        raise InputError(
            f"the embedding given is not what the model gives of these cells: the codes of "
            f"prototypes differ by {off:.0%}. Is it of another layer, pooling or order of cells?"
        )


def _block(found: Perturbed, pairs: Pairs, samples: bool, note: Callable[[Forwards], None]) -> Part:
    """Scores of concepts, one prototype after another; `note` is told what each has cost."""
    count = pairs.count
    scores = np.zeros((len(count), len(found.genes)))
    scores[count == 0] = np.nan
    kept: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, int), np.zeros(0))] * int(count.sum())
    forwards = Forwards()
    order = np.argsort(pairs.prototype, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(pairs.prototype[order])) + 1):
        if not rows.size:
            continue
        prototype = pairs.prototype[rows[0]]
        own, column = np.unique(pairs.concept[rows], return_inverse=True)
        others, other = np.unique(pairs.counterfactual[rows], return_inverse=True)
        swaps = distinct(found.values, found.seen, prototype, others)
        # What a counterfactual's exchanges weigh in the mean of a concept [counterfactuals, own].
        shape = (len(others), len(own))
        weight = sparse.csr_array((1 / count[own][column], (other, column)), shape=shape)
        drops = []
        for part, drop in _drops(found, prototype, swaps.genes, swaps.values, pairs.concepts[own]):
            weighted = drop * (swaps.uses[part] @ weight).toarray()
            genes, first = np.unique(swaps.genes[part], return_index=True)
            scores[np.ix_(own, genes)] += np.add.reduceat(weighted, first, axis=0).T
            if samples:
                drops.append(drop)
        if samples and drops:
            drop = np.concatenate(drops)
            uses = swaps.uses.tocsc()
            for row, j, k in zip(rows, other, column, strict=True):
                some = uses.indices[uses.indptr[j] : uses.indptr[j + 1]]
                kept[row] = swaps.genes[some], drop[some, k]
        asked = np.bincount(swaps.uses.indices, minlength=len(others))
        brute = len(rows) * len(found.genes)
        cost = Forwards(brute, int(asked[other].sum()), len(swaps.genes) + 1)
        forwards += cost
        note(cost)
    together = None
    if samples:
        starts = np.concatenate([[0], np.cumsum([len(genes) for genes, _ in kept])])
        genes, values = (np.concatenate(part) for part in zip(*kept, strict=True))
        together = sparse.csr_array((values, genes, starts), shape=(len(kept), len(found.genes)))
    return Part(scores, together, forwards)


def _drops(
    found: Perturbed, cell: int, genes: np.ndarray, values: np.ndarray, concepts: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """By how much codes fall by each exchange, float64 [some of them, concepts], bit by bit.

    The cell as it is comes first, as an exchange of a gene for itself: by the same path, so that
    what makes no difference makes none.
    """
    before = None
    itself = found.values[[cell], [0]]
    for start in range(0, len(genes), SWAPS - 1):
        part = slice(start, min(start + SWAPS - 1, len(genes)))
        some, new = genes[part], values[part]
        if before is None:
            some, new = np.append(0, some), np.append(np.asarray(itself).ravel(), new)
        rows = np.full(len(some), cell)
        codes = found.codes(rows, np.arange(len(some) + 1), some, new, concepts).astype(np.float64)
        if before is None:
            before, codes = codes[0], codes[1:]
        yield part, before - codes

"""Which features come back: in other seeds, on other data, with the same genes.

Claye 4.4 matches the dictionaries of two data sets and reports the cosines. Here a feature is
replicated in another dictionary if its counterpart is more alike than counterparts in a null are,
by direction and, where activations on the same cells are given, by correlation; its replication
score is the share of the other dictionaries in which it is. Seeds that train together make that
free.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse, stats

from analysis import matching, nulls
from analysis.baselines import Coder, reconstruction
from analysis.features import Matrix, as_columns
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError

NULLS = ("isotropic", "decoders")
MEASURES = {"direction": "cosine", "activation": "correlation"}


@dataclass(frozen=True, eq=False)
class Replication:
    """What of several dictionaries comes back in the others.

    features: a row per feature of each dictionary: `dictionary` (position), `feature`, `live`;
        `replicated_by_direction`, the share in [0, 1] of the other dictionaries in which its
        counterpart's cosine lies above the null; `best_cosine`, the largest of them;
        `cosine_threshold`, the highest it had to pass; with activations also
        `replicated_by_activation`, `best_correlation`, `correlation_threshold`. NaN if not live.
    pairs: a row per measure and ordered pair of dictionaries: `measure`, `a`, `b`, `n_a`, `n_b`
        (features that took part), `mean` of the counterparts' similarities, `threshold`, and
        `replicated`, the share of a's features above it.
    matches: a row per measure, dictionary a, feature of it and other dictionary b: `measure`, `a`,
        `feature_a`, `b`, `feature_b`, `similarity`, `replicated`.
    """

    features: pd.DataFrame
    pairs: pd.DataFrame
    matches: pd.DataFrame

    def of(self, dictionary: int = 0) -> pd.DataFrame:
        """`features` of one dictionary, by its own numbers: columns to set beside its names."""
        own = self.features[self.features["dictionary"] == dictionary]
        return own.drop(columns="dictionary").set_index("feature")


def replication(
    dictionaries: Sequence[Dictionary | ArrayLike | Any],
    activations: Sequence[Matrix] | None = None,
    live: Sequence[ArrayLike] | None = None,
    *,
    embedding: np.ndarray | None = None,
    one_to_one: bool = False,
    null: str = "decoders",
    quantile: float = 0.99,
    seed: int = 0,
) -> Replication:
    """Every feature's replication score over dictionaries of one embedding.

    The threshold of a pair of dictionaries is the `quantile` of its null, which is matched as they
    are: features that have nothing in common but what the null keeps pass it at a rate of
    1 - quantile. For directions the null is as many random ones (`matching.random_cosines`).

    Args:
        dictionaries: two at least; anything that `common_directions` takes. Cosines are signed.
        activations: of each, [cells, features], on the same cells in the same order.
        live: of each, bool [features]: which take part. None: those active in some cell of
            `activations`; without these, all.
        embedding: rows of the same cells [cells, d]. The null of activations is then random
            directions of it, as sparse as the features (`nulls.random_directions`). Without it,
            each feature's cells are permuted on their own, and this null is weak: features of one
            embedding are correlated whatever they are, those of untrained dictionaries too.
        one_to_one: a feature's counterpart is its most similar one; or, if True, that of the
            optimal assignment (Claye). The assignment has the greatest sum, for which it parts a
            close pair if that spares two features without a counterpart an unlikely one, and it
            costs the cube of the features.
        null: of directions: "decoders", directions as uneven as those of the two decoders
            (`matching.shape`); or "isotropic", random unit vectors, which untrained dictionaries of
            an embedding that varies in few of its dimensions pass too.
        quantile: of the null, in (0, 1).
        seed: of the nulls.

    Raises:
        InputError: if shapes disagree, or a dictionary has no live feature.
    """
    decoders = common_directions(dictionaries)
    if len(decoders) < 2:
        raise InputError(f"{len(decoders)} dictionary replicates nothing: give two at least.")
    if null not in NULLS:
        raise InputError(f"null={null!r}: give one of {', '.join(NULLS)}.")
    if not 0 < quantile < 1:
        raise InputError(f"quantile={quantile}: give a number between 0 and 1.")
    codes = None if activations is None else [as_columns(z, signed=True) for z in activations]
    alive = _live(decoders, codes, live)
    tables = [_by_direction(decoders, alive, one_to_one, null, quantile, seed)]
    if codes is not None:
        tables.append(_by_activation(codes, alive, embedding, one_to_one, quantile, seed))
    matches = pd.concat([table for table, _ in tables], ignore_index=True)
    pairs = pd.concat([table for _, table in tables], ignore_index=True)
    return Replication(
        _scores(matches, pairs, alive, [len(each) for each in decoders]), pairs, matches
    )


def directions(of: Dictionary | ArrayLike | Any) -> np.ndarray:
    """What a feature of 1 adds to the embedding [features, d], in the embedding's own units.

    Args:
        of: a `sae_jax.Dictionary`, whose normalisation is undone; whatever has a `decoder`, such as
            a baseline; or the array itself.
    """
    if isinstance(of, Dictionary):
        return np.asarray(of.fold().params.decoder)
    return np.asarray(getattr(of, "decoder", of))


def common_directions(dictionaries: Sequence[Dictionary | ArrayLike | Any]) -> list[np.ndarray]:
    """Decoders [features, d] of several dictionaries in the space that their cosines are taken in.

    That is the space they were trained in where it is the same one, since there all dimensions
    count as training let them count; dictionaries with different normalisations, and whatever is no
    `sae_jax.Dictionary`, meet in the embedding's own units (`directions`).
    """
    if all(isinstance(each, Dictionary) for each in dictionaries):
        scales = [None if d.normalizer is None else d.normalizer.scale for d in dictionaries]
        if all(s is not None and np.array_equal(s, scales[0]) for s in scales):
            return [np.asarray(each.params.decoder) for each in dictionaries]
    return [directions(each) for each in dictionaries]


def shared_top_genes(
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    pairs: pd.DataFrame,
    genes_a: Sequence[str],
    genes_b: Sequence[str] | None = None,
    n: int = 10,
) -> pd.DataFrame:
    """The top genes that matched features have in common (Claye 4.4), against chance.

    Of the genes that both sides have, a feature's top ones are the n with the highest scores, and
    fewer if fewer are above 0; ties go to the gene that comes first.

    Args:
        scores_a, scores_b: attributions, or any scores, [features, genes] and [other features,
            other genes]; finite.
        pairs: `a` and `b`, features of the two, such as `Matching.pairs`.
        genes_a, genes_b: names; genes_b None: the same as genes_a.

    Returns:
        `pairs` with `shared` (how many), `genes` (their names, a's best first), `expected` (of sets
        of these sizes at random), `p` (of as many or more, hypergeometric; 1 for none), and
        `others`, the mean shared with the other b of `pairs` (NaN for a single pair): genes that
        are on top of every feature say nothing of a pair.

    Raises:
        InputError: if shapes and names disagree, or no gene is on both sides.
    """
    genes_b = genes_a if genes_b is None else genes_b
    sides = []
    for name, scores, genes in (("a", scores_a, genes_a), ("b", scores_b, genes_b)):
        scores = np.asarray(scores, np.float64)
        if scores.ndim != 2 or scores.shape[1] != len(genes) or not np.isfinite(scores).all():
            raise InputError(
                f"scores_{name} have shape {scores.shape} for {len(genes)} genes: give finite "
                "scores of features by these genes."
            )
        if len(set(genes)) < len(genes):
            raise InputError(f"genes_{name} holds a name more than once.")
        sides.append((scores, {gene: place for place, gene in enumerate(genes)}))
    both = [gene for gene in genes_a if gene in sides[1][1]]
    if n < 1 or not both:
        raise InputError(f"n={n} and {len(both)} genes on both sides: there is nothing to share.")
    top = [
        _top(scores[pairs[side].to_numpy()][:, [place[gene] for gene in both]], n)
        for side, (scores, place) in zip("ab", sides, strict=True)
    ]
    marks = [
        sparse.csr_array(
            (np.ones(sum(map(len, lists))), np.concatenate(lists).astype(np.int64),
             np.cumsum([0, *map(len, lists)])),
            shape=(len(lists), len(both)),
        )
        for lists in top
    ]  # fmt: skip
    shared = np.asarray((marks[0] * marks[1]).sum(axis=1)).astype(np.int64)
    with_all = marks[0] @ np.asarray(marks[1].sum(axis=0))
    sizes = [np.array(list(map(len, lists))) for lists in top]
    names = [
        [both[gene] for gene in one if gene in set(other)] for one, other in zip(*top, strict=True)
    ]
    return pairs.assign(
        shared=shared,
        genes=names,
        expected=sizes[0] * sizes[1] / len(both),
        p=stats.hypergeom.sf(shared - 1, len(both), *sizes),
        others=(with_all - shared) / (len(pairs) - 1) if len(pairs) > 1 else np.nan,
    )


def transfer(
    dictionaries: Mapping[str, Coder], embeddings: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """How well each dictionary reconstructs each embedding (Claye, Figure 4.A).

    Args:
        dictionaries: by the name of the data they were trained on.
        embeddings: rows [cells, d], by the name of the data; of the training data give cells that
            were held out, or the comparison flatters.

    Returns:
        A row per pair: `trained_on`, `tested_on`, and what `baselines.reconstruction` gives; r2 is
        against the tested data's own mean of each dimension.
    """
    return pd.DataFrame(
        [
            {"trained_on": one, "tested_on": other, **reconstruction(dictionaries[one], x)}
            for one, (other, x) in itertools.product(dictionaries, embeddings.items())
        ]
    )


Compared = tuple[tuple[int, int], tuple[np.ndarray, np.ndarray], np.ndarray, tuple[float, float]]


def _live(
    decoders: list[np.ndarray],
    codes: list[sparse.csc_array] | None,
    live: Sequence[ArrayLike] | None,
) -> list[np.ndarray]:
    """Features of each dictionary that take part, by number; everything checked."""
    if len({decoder.shape[1] for decoder in decoders}) > 1:
        shapes = ", ".join(str(decoder.shape) for decoder in decoders)
        raise InputError(f"decoders have shapes {shapes}: cosines need one embedding.")
    sizes = [len(decoder) for decoder in decoders]
    if codes is not None:
        found = [z.shape[1] for z in codes]
        if found != sizes or len({z.shape[0] for z in codes}) > 1:
            raise InputError(
                f"activations have shapes {[z.shape for z in codes]}, the dictionaries {sizes} "
                "features: give each one's activations on the same cells."
            )
        live = [np.diff(z.indptr) > 0 for z in codes] if live is None else live
    masks = [np.ones(n, bool) for n in sizes] if live is None else [np.asarray(m) for m in live]
    if [(m.shape, m.dtype) for m in masks] != [((n,), np.dtype(bool)) for n in sizes]:
        raise InputError(f"live must hold, of each dictionary, booleans of its {sizes} features.")
    alive = [np.flatnonzero(mask) for mask in masks]
    if empty := [i for i, features in enumerate(alive) if not features.size]:
        raise InputError(f"dictionary {empty[0]} has no live feature.")
    return alive


def _by_direction(
    decoders: list[np.ndarray],
    alive: list[np.ndarray],
    one_to_one: bool,
    null: str,
    quantile: float,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    @functools.cache
    def shape(a: int) -> np.ndarray:
        return matching.shape(live[a])

    @functools.cache
    def isotropic(n_a: int, n_b: int) -> float:
        return threshold(n_a, n_b, None)

    def threshold(n_a: int, n_b: int, like: tuple[np.ndarray, np.ndarray] | None) -> float:
        drawn = matching.random_cosines(
            n_a, n_b, decoders[0].shape[1], one_to_one=one_to_one, like=like, seed=seed
        )
        return float(np.quantile(drawn, quantile))

    def of(a: int, b: int) -> float:
        if null == "isotropic":
            return isotropic(len(live[a]), len(live[b]))
        return threshold(len(live[a]), len(live[b]), (shape(a), shape(b)))

    def compared() -> Iterator[Compared]:
        for a, b in itertools.combinations(range(len(live)), 2):
            cosines = matching.cosines(live[a], live[b])
            yield (a, b), (alive[a], alive[b]), cosines, (of(a, b), of(b, a))

    live = [decoder[features] for decoder, features in zip(decoders, alive, strict=True)]
    return _tables("direction", compared(), one_to_one)


def _by_activation(
    codes: list[sparse.csc_array],
    alive: list[np.ndarray],
    embedding: np.ndarray | None,
    one_to_one: bool,
    quantile: float,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    def of_nothing(z: sparse.csc_array, position: int) -> Matrix:
        """What stands for a dictionary's activations in the null."""
        if embedding is not None:
            density = np.diff(z.indptr) / z.shape[0]
            density = np.maximum(density, 1 / z.shape[0])  # of those that `live` insists on
            return nulls.random_directions(embedding, density, seed + position)
        return nulls.permuted_cells(z, np.random.default_rng([seed, position]))

    def compared() -> Iterator[Compared]:
        for a, b in itertools.combinations(range(len(codes)), 2):
            correlation = matching.correlations(own[a], own[b])
            rows, columns = matching.varying(correlation)
            by_chance = matching.correlations(null[a], null[b])
            by_chance = by_chance[np.ix_(*matching.varying(by_chance))]
            thresholds = tuple(
                float(np.quantile(found[partner >= 0], quantile))
                for partner, found in _both_ways(by_chance, one_to_one)
            )
            features = alive[a][rows], alive[b][columns]
            yield (a, b), features, correlation[np.ix_(rows, columns)], thresholds

    if embedding is not None and np.shape(embedding)[:1] != codes[0].shape[:1]:
        raise InputError(
            f"embedding has shape {np.shape(embedding)} for activations of {codes[0].shape[0]} "
            "cells: give the same cells."
        )
    own = [z[:, features] for z, features in zip(codes, alive, strict=True)]
    null = [of_nothing(z, position) for position, z in enumerate(own)]
    return _tables("activation", compared(), one_to_one)


def _both_ways(similarity: np.ndarray, one_to_one: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """`matching.counterparts` of the rows, and of the columns; an assignment is made once."""
    rows = matching.counterparts(similarity, one_to_one)
    if not one_to_one:
        return [rows, matching.counterparts(similarity.T, one_to_one)]
    partner, found = np.full(similarity.shape[1], -1), np.full(similarity.shape[1], -np.inf)
    matched = np.flatnonzero(rows[0] >= 0)
    partner[rows[0][matched]], found[rows[0][matched]] = matched, rows[1][matched]
    return [rows, (partner, found)]


def _tables(
    measure: str, compared: Iterable[Compared], one_to_one: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`matches` and `pairs` of a `Replication`, by one measure."""
    matches, pairs = [], []
    for dictionaries, features, similarity, thresholds in compared:
        for side, (partner, found) in enumerate(_both_ways(similarity, one_to_one)):
            a, b = dictionaries[side], dictionaries[1 - side]
            matched = partner >= 0
            replicated = found[matched] > thresholds[side]
            matches.append(
                pd.DataFrame(
                    {
                        "measure": measure,
                        "a": a,
                        "feature_a": features[side][matched],
                        "b": b,
                        "feature_b": features[1 - side][partner[matched]],
                        "similarity": found[matched],
                        "replicated": replicated,
                    }
                )
            )
            pairs.append(
                {
                    "measure": measure,
                    "a": a,
                    "b": b,
                    "n_a": len(features[side]),
                    "n_b": len(features[1 - side]),
                    "mean": found[matched].mean(),
                    "threshold": thresholds[side],
                    "replicated": replicated.sum() / len(features[side]),
                }
            )
    return pd.concat(matches, ignore_index=True), pd.DataFrame(pairs)


def _scores(
    matches: pd.DataFrame, pairs: pd.DataFrame, alive: list[np.ndarray], sizes: list[int]
) -> pd.DataFrame:
    """`features` of a `Replication`."""
    keys = [(i, j) for i, n in enumerate(sizes) for j in range(n)]
    table = pd.DataFrame(keys, columns=["dictionary", "feature"])
    table["live"] = np.concatenate(
        [np.isin(np.arange(n), own) for n, own in zip(sizes, alive, strict=True)]
    )
    index = pd.MultiIndex.from_frame(table[["dictionary", "feature"]])
    for measure, called in MEASURES.items():
        own = matches[matches["measure"] == measure]
        if own.empty:
            continue
        by_feature = own.groupby(["a", "feature_a"])
        replicated = by_feature["replicated"].sum().reindex(index, fill_value=0).to_numpy()
        share = replicated / (len(sizes) - 1)
        table[f"replicated_by_{measure}"] = np.where(table["live"], share, np.nan)
        table[f"best_{called}"] = by_feature["similarity"].max().reindex(index).to_numpy()
        highest = pairs[pairs["measure"] == measure].groupby("a")["threshold"].max()
        threshold = table["dictionary"].map(highest)
        table[f"{called}_threshold"] = threshold.where(table["live"])
    return table


def _top(scores: np.ndarray, n: int) -> list[np.ndarray]:
    """The n best genes of each feature, of those above 0, best first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    return [genes[row[genes] > 0] for row, genes in zip(scores, order, strict=True)]

"""Which features of two dictionaries are counterparts: by their terms, or by their directions.

Schuster A.3.8: the Hungarian algorithm on Jaccard similarities (the text says distances, but its
scale and its 0.16 are similarities). Claye: on the cosines of decoder rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import optimize, sparse, stats

from analysis.feature_space import FeatureTerms
from sae_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Matching:
    """The assignment with the greatest sum of similarities; every feature is in one pair at most.

    pairs: `a`, `b` (features) and `similarity`, the most similar first.
    mean: of the pairs' similarities. Features left over on the longer side are not in it.
    n_a, n_b: features that took part.
    """

    pairs: pd.DataFrame
    mean: float
    n_a: int
    n_b: int


@dataclass(frozen=True, eq=False)
class AnnotationMatching(Matching):
    """Matching by terms, and how alike the two dictionaries use their terms.

    terms: one row per term found on either side (index, by name): features that have it, `a`, `b`.
    n_shared, n_only_a, n_only_b: terms on both sides, or on one.
    pearson, spearman: of the two counts, over the shared terms; NaN if undefined.
    """

    terms: pd.DataFrame
    n_shared: int
    n_only_a: int
    n_only_b: int
    pearson: float
    spearman: float


def match_annotations(a: FeatureTerms, b: FeatureTerms) -> AnnotationMatching:
    """Optimal pairs of annotated features (Schuster A.3.8, Figures S29 and S32).

    Terms are brought together by name, and one that only one side has still counts in the union of
    a Jaccard similarity. Features without terms take no part. Memory is some 30 bytes for a pair of
    features; 4,374 by 5,290, as in the paper, take seconds, and the worst case grows with the cube.

    Raises:
        InputError: if no feature of one side has a term.
    """
    rows_a, rows_b = a.annotated(), b.annotated()
    if rows_a.size == 0 or rows_b.size == 0:
        raise InputError(
            f"{rows_a.size} features of the one and {rows_b.size} of the other dictionary have "
            "terms: there is nothing to match."
        )
    counts = pd.concat([_counts(a).rename("a"), _counts(b).rename("b")], axis=1)
    counts = counts.fillna(0).astype(np.int64).query("a > 0 or b > 0").rename_axis("term")
    column = {term: number for number, term in enumerate(counts.index)}
    left, right = _over(a, rows_a, column), _over(b, rows_b, column)
    both = (left @ right.T).toarray()
    similarity = both / (left.sum(axis=1)[:, None] + right.sum(axis=1) - both)

    shared = counts[(counts["a"] > 0) & (counts["b"] > 0)]
    varied = len(shared) > 1 and (shared.nunique() > 1).all()
    return AnnotationMatching(
        *_assigned(similarity, rows_a, rows_b),
        terms=counts,
        n_shared=len(shared),
        n_only_a=int((counts["b"] == 0).sum()),
        n_only_b=int((counts["a"] == 0).sum()),
        pearson=float(stats.pearsonr(shared["a"], shared["b"])[0]) if varied else np.nan,
        spearman=float(stats.spearmanr(shared["a"], shared["b"])[0]) if varied else np.nan,
    )


def match_decoders(a: ArrayLike, b: ArrayLike) -> Matching:
    """Optimal pairs of features by the cosine of their decoder rows.

    Give live features only: the rows of dead ones stay where training began, at random. The
    embedding must be the same one.

    Args:
        a, b: decoders [features, d] and [other features, d]; norms do not matter.

    Raises:
        InputError: if shapes do not fit, or a row is zero or not finite, and so has no direction.
    """
    left, right = _unit(a, "a"), _unit(b, "b")
    if left.shape[1] != right.shape[1]:
        raise InputError(
            f"decoders have shapes {left.shape} and {right.shape}: cosines need one embedding."
        )
    return Matching(*_assigned(left @ right.T, np.arange(len(left)), np.arange(len(right))))


def _counts(annotated: FeatureTerms) -> pd.Series:
    return pd.Series(annotated.matrix.sum(axis=0), index=annotated.terms, dtype=np.int64)


def _over(annotated: FeatureTerms, rows: np.ndarray, column: dict[str, int]) -> sparse.csr_array:
    """The rows [features, terms of both] of one side as float64, its columns put where they go."""
    entries = annotated.matrix[rows].tocoo()
    place = np.array([column.get(term, -1) for term in annotated.terms], dtype=np.int64)
    ones = np.ones(entries.nnz)
    return sparse.csr_array(
        (ones, (entries.row, place[entries.col])), shape=(rows.size, len(column))
    )


def _assigned(
    similarity: np.ndarray, a: np.ndarray, b: np.ndarray
) -> tuple[pd.DataFrame, float, int, int]:
    """The first fields of `Matching`, from similarities [a, b]."""
    rows, columns = optimize.linear_sum_assignment(similarity, maximize=True)
    found = similarity[rows, columns]
    pairs = pd.DataFrame({"a": a[rows], "b": b[columns], "similarity": found})
    pairs = pairs.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)
    return pairs, float(found.mean()), len(a), len(b)


def _unit(decoder: ArrayLike, name: str) -> np.ndarray:
    decoder = np.asarray(decoder, dtype=np.float64)
    if decoder.ndim != 2 or 0 in decoder.shape:
        raise InputError(f"decoder {name} has shape {decoder.shape}: give features by d.")
    norm = np.linalg.norm(decoder, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norm) | (norm == 0))
    if bad.size:
        raise InputError(
            f"{bad.size} rows of decoder {name} have no direction (zero, NaN or infinite), the "
            f"first is {bad[0]}: leave them out."
        )
    return decoder / norm

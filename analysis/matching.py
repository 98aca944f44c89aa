"""Which features of two dictionaries are counterparts: by terms, by directions, by activations.

Schuster A.3.8: the Hungarian algorithm on Jaccard similarities (the text says distances, but its
scale and its 0.16 are similarities). Claye 4.4: on the cosines of decoder rows. Dictionaries of
different models have no direction in common; their activations on the same cells correlate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import optimize, sparse, stats

from analysis.blocks import slices
from analysis.feature_space import FeatureTerms
from analysis.features import Matrix, as_columns
from sae_jax.errors import InputError
from sae_jax.redundancy import CONSTANT

ENTRIES = 2**24  # of a dense block of activations: 128 MiB in float64
TYLER_STEPS, TYLER_TOLERANCE = 200, 1e-4  # of a matrix whose mean diagonal is 1


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


def match_directions(a: ArrayLike, b: ArrayLike, *, absolute: bool = False) -> Matching:
    """Optimal pairs of features by the cosine of their decoder rows (Claye 4.4).

    Give live features only: the rows of dead ones stay where training began, at random. The
    embedding must be the same one.

    Args:
        a, b: decoders [features, d] and [other features, d]; norms do not matter.
        absolute: |cosine|, for components, whose sign is arbitrary. Latents are never below 0, so
            for them opposite directions mean opposite things and the sign counts.

    Raises:
        InputError: if shapes do not fit, or a row is zero or not finite, and so has no direction.
    """
    similarity = cosines(a, b)
    similarity = np.abs(similarity) if absolute else similarity
    return Matching(*_assigned(similarity, *map(np.arange, similarity.shape)))


def match_activations(z_a: Matrix, z_b: Matrix, *, absolute: bool = False) -> Matching:
    """Optimal pairs of features by the Pearson correlation of their activations.

    The embeddings may be of different models. Features that do not vary have no correlation and
    take no part.

    Args:
        z_a, z_b: activations [cells, features] and [cells, other features], the same cells in the
            same order, dense or sparse; negative values are allowed.
        absolute: |correlation|, for components and neurons, whose sign is arbitrary.

    Raises:
        InputError: as `correlations`; or if no feature of one side varies.
    """
    similarity = correlations(z_a, z_b)
    rows, columns = varying(similarity)
    similarity = similarity[np.ix_(rows, columns)]
    similarity = np.abs(similarity) if absolute else similarity
    return Matching(*_assigned(similarity, rows, columns))


def cosines(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Cosines of the rows of two decoders, float64 [features, other features]; see
    `match_directions`."""
    left, right = unit(a, "a"), unit(b, "b")
    if left.shape[1] != right.shape[1]:
        raise InputError(
            f"decoders have shapes {left.shape} and {right.shape}: cosines need one embedding."
        )
    return left @ right.T


def correlations(z_a: Matrix, z_b: Matrix) -> np.ndarray:
    """Pearson correlations of activations over cells, float64 [features, other features].

    Products run over non-zero entries. A feature that is active in more than half of the cells is
    centred first and the others are not: their second moment is at most twice their variance, so no
    difference of large sums loses digits. Beyond the result it holds blocks of cells.

    Args:
        z_a, z_b: as in `match_activations`.

    Returns:
        The correlations; NaN where a feature does not vary (its sd is below 1e-6 of its mean).

    Raises:
        InputError: if a matrix is not finite, or the cells are not the same number, two at least.
    """
    a, b = _Features.of(z_a), _Features.of(z_b)
    if a.n_cells != b.n_cells or a.n_cells < 2:
        raise InputError(
            f"activations of {a.n_cells} and {b.n_cells} cells: give the same cells, two at least."
        )
    products = np.zeros((a.mean.size, b.mean.size))
    for cells in slices(a.n_cells, max(1, ENTRIES // max(1, a.often.size, b.often.size))):
        for rows, left in a.parts(cells):
            for columns, right in b.parts(cells):
                part = left.T @ right
                part = part.toarray() if sparse.issparse(part) else part
                products[np.ix_(rows, columns)] += part
    products /= a.n_cells
    products -= np.outer(a.mean, b.mean)
    products /= a.sd[:, None]
    products /= b.sd
    return np.clip(products, -1, 1, out=products)


def varying(correlation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of `correlations` that are not NaN throughout, by number.

    Raises:
        InputError: if there are none.
    """
    defined = np.isfinite(correlation)
    rows, columns = (np.flatnonzero(defined.any(axis=axis)) for axis in (1, 0))
    if rows.size == 0:
        raise InputError("no feature of one of the dictionaries varies over these cells.")
    return rows, columns


def counterparts(similarity: np.ndarray, one_to_one: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The counterpart of every row among the columns, and their similarity; both [rows].

    Args:
        similarity: [rows, columns], finite.
        one_to_one: by the optimal assignment, in which rows beyond the columns have none (-1, and a
            similarity of -inf); or each row's most similar column, which others may have too.
    """
    if not one_to_one:
        best = similarity.argmax(axis=1)
        return best, similarity[np.arange(len(best)), best]
    partner, found = np.full(len(similarity), -1), np.full(len(similarity), -np.inf)
    rows, columns = optimize.linear_sum_assignment(similarity, maximize=True)
    partner[rows], found[rows] = columns, similarity[rows, columns]
    return partner, found


def random_cosines(
    n_a: int,
    n_b: int,
    d: int,
    *,
    one_to_one: bool = True,
    like: tuple[np.ndarray, np.ndarray] | None = None,
    values: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Cosines of counterparts among random directions: what matching finds in nothing.

    Both sides are drawn and matched as the real ones are, so that a quantile q of these is exceeded
    by a share 1 - q of the features of dictionaries that have nothing to do with each other.

    Args:
        n_a, n_b: features of the two dictionaries.
        d: dimensions of the embedding.
        one_to_one: as in `counterparts`.
        like: None for random unit vectors. Two matrices of `shape`, for directions as uneven as
            those of the two decoders: those that merely crowd in the few dimensions in which an
            embedding varies are then no match.
        values: cosines to draw, at least; a draw gives min(n_a, n_b) of them, or n_a.
        seed: of the draws.

    Returns:
        The cosines, rising.
    """
    rng = np.random.default_rng(seed)
    roots = [np.eye(d)] * 2 if like is None else [np.linalg.cholesky(matrix) for matrix in like]
    found: list[np.ndarray] = []
    while sum(map(len, found)) < values:
        drawn = (
            rng.normal(size=(n, d)) @ root.T for n, root in zip((n_a, n_b), roots, strict=True)
        )
        partner, cosine = counterparts(cosines(*drawn), one_to_one)
        found.append(cosine[partner >= 0])
    return np.sort(np.concatenate(found))


def shape(decoder: ArrayLike) -> np.ndarray:
    """How uneven directions are: normal vectors of this covariance point as they do [d, d].

    Tyler's estimator (1987), the maximum likelihood of the angular central Gaussian distribution;
    norms of rows do not enter. It needs more features than dimensions; with fewer, the second
    moments of unit rows stand in, mixed with a thousandth of the identity.

    Args:
        decoder: rows [features, d].

    Returns:
        The matrix, of trace d.
    """
    rows = unit(decoder, "of the null")
    n, d = rows.shape
    found = d * (rows.T @ rows) / n
    if n <= d:
        return 0.999 * found + 0.001 * np.eye(d)
    for _ in range(TYLER_STEPS):
        before = found
        distance = np.einsum("nd,nd->n", rows, np.linalg.solve(before, rows.T).T)
        found = rows.T @ (rows / distance[:, None])
        found *= d / np.trace(found)
        if np.abs(found - before).max() < TYLER_TOLERANCE:
            break
    return found


def unit(decoder: ArrayLike, name: str) -> np.ndarray:
    """Rows [features, d] scaled to norm 1, float64.

    Raises:
        InputError: if it is no matrix, or a row has no direction; `name` is what the error says.
    """
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


@dataclass(frozen=True, eq=False)
class _Features:
    """Activations with those of frequent features centred.

    seldom, often: numbers of the features. rare [cells, seldom], frequent [cells, often]: as given;
    `parts` takes shift [often] from the latter. mean, sd [features]: after that; sd NaN for
    features that do not vary.
    """

    n_cells: int
    seldom: np.ndarray
    often: np.ndarray
    rare: sparse.csr_array
    frequent: sparse.csr_array
    shift: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    @classmethod
    def of(cls, z: Matrix) -> _Features:
        columns = as_columns(z, signed=True)
        n_cells, n_features = columns.shape
        frequent = np.diff(columns.indptr) > n_cells / 2
        seldom, often = np.flatnonzero(~frequent), np.flatnonzero(frequent)
        whole = columns.sum(axis=0) / max(1, n_cells)
        shift, mean, square = whole[often], whole.copy(), np.zeros(n_features)
        square[seldom] = columns[:, seldom].power(2).sum(axis=0) / max(1, n_cells)
        for place, feature in enumerate(often):
            centred = columns[:, [feature]].toarray()[:, 0] - shift[place]
            mean[feature], square[feature] = centred.mean(), (centred**2).mean()
        sd = np.sqrt(np.maximum(square - mean**2, 0))
        sd[sd <= CONSTANT * np.abs(whole)] = np.nan
        rows = sparse.csr_array(columns)
        return cls(n_cells, seldom, often, rows[:, seldom], rows[:, often], shift, mean, sd)

    def parts(self, cells: slice) -> Iterator[tuple[np.ndarray, Matrix]]:
        """Features and their values in some cells: the rare ones sparse, the frequent dense."""
        if self.seldom.size:
            yield self.seldom, self.rare[cells]
        if self.often.size:
            yield self.often, self.frequent[cells].toarray() - self.shift


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

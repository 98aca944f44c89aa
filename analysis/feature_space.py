"""The map of all features by what they are named for (Schuster, Figures 3, S22 to S25, S30, S31).

A binary matrix of features by terms, its UMAP, and what colours it: the top level of a hierarchy of
terms, kinds and activity of features, or words that their terms hold.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy import sparse

from analysis.features import Matrix
from analysis.ontology import Ontology
from analysis.plots import GREY, plain
from sae_jax.errors import InputError

MOST_COLOURS = 20  # that can be told apart; the rarer values of a category share a grey


@dataclass(frozen=True, eq=False)
class FeatureTerms:
    """Which terms name which feature.

    matrix: boolean CSR [features, terms], only true values stored.
    terms: their names [terms], each once.
    """

    matrix: sparse.csr_array
    terms: list[str]

    def annotated(self) -> np.ndarray:
        """The features that have a term, ascending."""
        return np.flatnonzero(np.diff(self.matrix.indptr))


def feature_terms(named: Matrix, terms: Sequence[str]) -> FeatureTerms:
    """From booleans [features, terms], such as `Lens.named()`."""
    if np.ndim(named) != 2 or named.dtype != bool or named.shape[1] != len(terms):
        raise InputError(
            f"named is {getattr(named, 'dtype', type(named))} of shape {np.shape(named)} for "
            f"{len(terms)} terms: give booleans [features, terms]."
        )
    if len(set(terms)) < len(terms):
        raise InputError("a term occurs more than once: names must be unique to be matched.")
    matrix = sparse.csr_array(named, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return FeatureTerms(matrix, list(terms))


def from_names(terms_of_features: Sequence[Iterable[str]]) -> FeatureTerms:
    """From the names of the terms of each feature."""
    members = [sorted(set(names)) for names in terms_of_features]
    terms = sorted(set().union(*members))
    column = {term: number for number, term in enumerate(terms)}
    indptr = np.cumsum([0] + [len(names) for names in members])
    indices = np.array([column[term] for names in members for term in names], dtype=np.int64)
    ones = np.ones(indices.size, dtype=bool)
    shape = (len(members), len(terms))
    return FeatureTerms(sparse.csr_array((ones, indices, indptr), shape=shape), terms)


def plane(
    annotated: FeatureTerms,
    n_neighbors: int = 10,
    min_dist: float = 1.0,
    spread: float = 10.0,
    seed: int = 0,
    metric: str = "euclidean",
) -> np.ndarray:
    """UMAP of the features by their terms; the defaults are the paper's.

    The paper names no metric, so it is UMAP's own. Its Figure S26 states a spread of 0, which UMAP
    cannot have (min_dist must not exceed the spread): there, use 1.

    Returns:
        Coordinates [features, 2]; NaN for a feature without terms, which has no place.

    Raises:
        InputError: if umap-learn is not installed, for parameters that UMAP cannot have, or if no
            more than `n_neighbors` features have terms.
    """
    try:
        import umap
    except ImportError as error:
        raise InputError(
            "the feature space needs umap-learn: pip install 'sae-jax[single-cell]'."
        ) from error
    if not 0 <= min_dist <= spread or spread == 0 or n_neighbors < 2:
        raise InputError(
            f"n_neighbors={n_neighbors}, min_dist={min_dist}, spread={spread}: give at least 2 "
            "neighbours, and 0 <= min_dist <= spread with a spread above 0."
        )
    rows = annotated.annotated()
    if rows.size <= n_neighbors:
        raise InputError(
            f"{rows.size} features have terms: a map with {n_neighbors} neighbours needs more."
        )
    model = umap.UMAP(
        n_neighbors=n_neighbors, min_dist=min_dist, spread=spread, metric=metric,
        random_state=seed, n_jobs=1,
    )  # fmt: skip
    coordinates = np.full((annotated.matrix.shape[0], 2), np.nan)
    # UMAP takes a sparse array for a dense one; it knows only the old class.
    known = sparse.csr_matrix(annotated.matrix[rows].astype(np.float32))
    with warnings.catch_warnings():
        # From a = b = 1 its fit of the curve 1 / (1 + a x^2b) to a spread of 10 tries a b below 0,
        # at x = 0 too, and goes back: the curve that it finds is the one for a spread of 1, scaled.
        warnings.filterwarnings("ignore", "divide by zero encountered in power", RuntimeWarning)
        coordinates[rows] = model.fit_transform(known)
    return coordinates


def top_level(terms: Sequence[str], ontology: Ontology, tops: Collection[str]) -> FeatureTerms:
    """The top-level terms of every term: itself or those above it, the most special of them.

    Of two top-level terms of which one lies above the other only the lower is taken, as usual for
    slims. A slim's own file holds little but the slim: finer terms need the whole ontology's file.

    Args:
        terms: as `Ontology.identify` knows them. One that is unknown has no top level.
        ontology: with `tops` among its ids, from `first_level()` or `slim()`.
        tops: ids.

    Returns:
        Terms in the place of features, and the names of the top-level terms.
    """
    tops = set(tops)
    found = []
    for term in terms:
        identifier = ontology.identify(term)
        above = set() if identifier is None else {identifier, *ontology.ancestors(identifier)}
        hits = above & tops
        covered = set().union(*(ontology.ancestors(hit) for hit in hits))
        found.append([ontology.names[hit] for hit in hits - covered])
    return from_names(found)


def top_level_by_genes(
    membership: Matrix, top_membership: Matrix, tops: Sequence[str], share: float = 0.9
) -> FeatureTerms:
    """The same by genes, for terms whose place in a hierarchy is not at hand.

    A gene of a term is annotated to all terms above, so a top-level term holds the genes of those
    below it. Taken is the smallest that holds at least `share` of the term's genes (the first of
    equals), if any does: a guess, since an unrelated large set can hold them too.

    Args:
        membership: 0 or 1 [terms, genes]. top_membership: the same of the tops [tops, genes].
        tops: names of the tops.
    """
    inside, outside = (sparse.csr_array(m, dtype=np.float64) for m in (membership, top_membership))
    if inside.shape[1] != outside.shape[1] or outside.shape[0] != len(tops):
        raise InputError(
            f"membership {inside.shape} and {outside.shape} for {len(tops)} tops: give terms by "
            "genes and tops by the same genes."
        )
    n_genes = inside.sum(axis=1)
    held = (inside @ outside.T).toarray()
    enough = (held >= share * n_genes[:, None]) & (n_genes > 0)[:, None]
    size = np.where(enough, outside.sum(axis=1), np.inf)
    best = size.argmin(axis=1) if len(tops) else np.zeros(len(size), np.int64)
    return from_names(
        [[tops[top]] if any_top else [] for top, any_top in zip(best, enough.any(1), strict=True)]
    )


def dominant(annotated: FeatureTerms, top: FeatureTerms) -> pd.Categorical:
    """The most common top-level term among each feature's terms (Figure 3A).

    Args:
        annotated: features by terms.
        top: the same terms by top-level terms. A term with several counts for each of them.

    Returns:
        One per feature, categories from the most to the least frequent; of equally common terms
        that with fewer terms below it, since the larger is expected by chance. NaN for none.
    """
    if top.matrix.shape[0] != len(annotated.terms):
        raise InputError(
            f"top levels of {top.matrix.shape[0]} terms, but there are {len(annotated.terms)}."
        )
    below = top.matrix.sum(axis=0)
    order = np.argsort(below, kind="stable")
    counts = (annotated.matrix.astype(np.int64) @ top.matrix.astype(np.int64)).toarray()[:, order]
    if counts.shape[1] == 0:
        return pd.Categorical([None] * len(counts))
    names = pd.Series(np.array(top.terms, dtype=object)[order][counts.argmax(axis=1)])
    names = names.where(counts.max(axis=1) > 0)
    return pd.Categorical(names, categories=names.value_counts().index)


def probe(annotated: FeatureTerms, words: Sequence[str]) -> pd.DataFrame:
    """Features whose terms hold a word or a piece of text (Figures 3B, S25 and S31).

    Case does not matter. The text must begin where a word of the term's name begins, so "B cell"
    is not found in "Rb cells" but "apopto" is in "Apoptotic process".

    Returns:
        One row per word, feature and term that fits: `word`, `feature`, `term`, in this order.
    """
    by_term = annotated.matrix.tocsc()
    parts = []
    for word in words:
        if not word.strip():
            raise InputError("an empty word is in every term: give some letters.")
        begins = re.compile(r"(?<!\w)" + re.escape(word.strip()), re.IGNORECASE)
        fits = [number for number, term in enumerate(annotated.terms) if begins.search(term)]
        entries = by_term[:, fits].tocoo()
        names = np.array([annotated.terms[number] for number in fits], dtype=object)
        found = {"word": word, "feature": entries.row, "term": names[entries.col]}
        parts.append(pd.DataFrame(found).sort_values(["feature", "term"]))
    empty = pd.DataFrame({"word": [], "feature": np.zeros(0, np.int64), "term": []})
    return pd.concat(parts, ignore_index=True) if parts else empty


def term_frequencies(annotated: FeatureTerms, kind: ArrayLike | None = None) -> pd.DataFrame:
    """How many features each term names, the most frequent first (Table S7, Figures S23, S29).

    Args:
        kind: of each feature, "local" or "global"; then also counted by it.

    Returns:
        One row per term that names any (index): `n_features`, `share` of the annotated features,
        and a column ("n_<kind>") for each kind. Equal counts stand in the order of their names.
    """
    n_features = annotated.matrix.sum(axis=0)
    found = {
        "n_features": n_features,
        "share": n_features / max(annotated.annotated().size, 1),
    }
    if kind is not None:
        kind = pd.Categorical(kind)
        if len(kind) != annotated.matrix.shape[0]:
            raise InputError(f"{len(kind)} kinds for {annotated.matrix.shape[0]} features.")
        for name in kind.categories:
            found[f"n_{name}"] = annotated.matrix[kind == name].sum(axis=0)
    table = pd.DataFrame(found, index=pd.Index(annotated.terms, name="term", dtype=object))
    table = table[table["n_features"] > 0].sort_index(kind="stable")
    return table.sort_values("n_features", ascending=False, kind="stable")


def collapse(p: ArrayLike, membership: Matrix, threshold: float = 0.5) -> np.ndarray:
    """Redundant terms and the one that stands for each of them.

    Terms are gone through from the most significant on. One that shares its genes with a
    representative, by a Jaccard similarity of at least `threshold`, is represented by the most
    similar such (the more significant of equals); any other becomes a representative. A term
    without genes stands for itself.

    Args:
        p: [terms]; of a feature, or the smallest over all features. Ties: the earlier term.
        membership: 0 or 1 [terms, genes].
        threshold: above 0, up to 1; 0.5 by default.

    Returns:
        The position of the representative of each term [terms]; its own for a representative.
    """
    p = np.asarray(p, dtype=np.float64)
    membership = sparse.csr_array(membership, dtype=np.float64)
    if p.shape != (membership.shape[0],) or np.isnan(p).any() or not 0 < threshold <= 1:
        raise InputError(
            f"p has shape {p.shape}, membership {membership.shape}, threshold={threshold}: give "
            "one p (no NaN) per term, and a threshold above 0 and at most 1."
        )
    size = membership.sum(axis=1)
    shared = sparse.csr_array(membership @ membership.T)
    row = np.repeat(np.arange(p.size), np.diff(shared.indptr))
    similarity = shared.data / (size[row] + size[shared.indices] - shared.data)
    kept = similarity >= threshold
    alike = sparse.csr_array((similarity[kept], (row[kept], shared.indices[kept])), shared.shape)

    representative = np.full(p.size, -1)
    rank = np.empty(p.size, dtype=np.int64)
    order = np.argsort(p, kind="stable")
    rank[order] = np.arange(p.size)
    for term in order:
        entries = slice(*alike.indptr[term : term + 2])
        others, how = alike.indices[entries], alike.data[entries]
        stands = representative[others] == others
        others, how = others[stands], how[stands]
        representative[term] = others[np.lexsort((rank[others], -how))[0]] if len(others) else term
    return representative


def merge(annotated: FeatureTerms, representative: np.ndarray) -> FeatureTerms:
    """The features by representatives only: one has the feature if any of its terms has."""
    kept, place = np.unique(representative, return_inverse=True)
    entries = annotated.matrix.tocoo()
    ones = np.ones(entries.nnz, dtype=bool)
    shape = (annotated.matrix.shape[0], kept.size)
    matrix = sparse.coo_array((ones, (entries.row, place[entries.col])), shape=shape).tocsr()
    return FeatureTerms(matrix, [annotated.terms[term] for term in kept])


def figure(coordinates: np.ndarray, keys: Mapping[str, ArrayLike | pd.Series]) -> Figure:
    """The map of features, a panel a colour key: categories with a legend, numbers with a bar.

    Args:
        coordinates: [features, 2], from `plane`; a feature at NaN is not drawn.
        keys: of each panel its title and one value per feature. A feature without a value (NaN,
            None) is grey, below the others. Booleans are drawn as true on grey (`probe`).
    """
    if not keys:
        raise InputError("no keys: give at least one colour key.")
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    result = Figure(figsize=(4.0 * columns, 4.1 * rows), layout="constrained")
    axes = list(result.subplots(rows, columns, squeeze=False).flat)
    drawn = np.isfinite(coordinates).all(axis=1)
    xy = coordinates[drawn]
    size = float(np.clip(12000 / max(len(xy), 1), 1.5, 16.0))
    for spare in axes:
        spare.set_axis_off()
    for panel, (title, values) in zip(axes, keys.items(), strict=False):
        if len(values) != len(coordinates):
            raise InputError(f"key {title!r} has {len(values)} values: one per feature is needed.")
        key = pd.Series(values).reset_index(drop=True)[drawn].reset_index(drop=True)
        panel.scatter(*xy.T, s=size, c=GREY, linewidths=0, rasterized=True)
        panel.set_title(plain(title), fontsize=9)
        if pd.api.types.is_bool_dtype(key):
            panel.scatter(*xy[key].T, s=2 * size, c="#08519c", linewidths=0, rasterized=True)
        elif pd.api.types.is_numeric_dtype(key):
            order = np.argsort(key.to_numpy(), kind="stable")[: int(key.notna().sum())]
            dots = panel.scatter(*xy[order].T, s=size, c=key.to_numpy()[order], cmap="YlGnBu",
                                 linewidths=0, rasterized=True)  # fmt: skip
            result.colorbar(dots, ax=panel, shrink=0.55, pad=0.01).ax.tick_params(labelsize=6)
        else:
            _categories(panel, xy, key.astype("category"), size)
    return result


def _categories(axes: Axes, xy: np.ndarray, key: pd.Series, size: float) -> None:
    """Features by category, with a legend below; the rarer of too many stay grey."""
    palette = mpl.colormaps["tab20"].colors
    common = key.value_counts().loc[lambda counts: counts > 0].index[:MOST_COLOURS]
    for code, name in enumerate(key.cat.categories[key.cat.categories.isin(common)]):
        axes.scatter(
            *xy[(key == name).to_numpy()].T, s=size, color=palette[2 * code % 20 + code // 10],
            linewidths=0, rasterized=True, label=plain(name, 40),
        )  # fmt: skip
    axes.legend(
        fontsize=5.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0.0),
        markerscale=max(1.0, 4 / size**0.5), handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip

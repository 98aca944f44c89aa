"""What features are good for: logistic regression on concepts and on neurons (Claye 4.5, G).

Classes are balanced, the regression is scikit-learn's with its defaults, and what counts is whether
concepts keep the signal of the embedding and whether the features that decide are readable. The
rivals that read genes directly, an L1 logistic regression and a ranking of markers, are judged by
the same `Probe`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.preprocessing import StandardScaler

from analysis import chunked, differential
from analysis.cells import survey
from analysis.chunked import Chunked
from analysis.features import Matrix
from sae_jax.errors import InputError

PENALTIES = ("l2", "l1")
PHASES = ("G1", "S", "G2M")


@dataclass(frozen=True, eq=False)
class Split:
    """Balanced training and test cells; every class has the same number in each.

    classes: their names, sorted. train, test: positions of cells, rising; they share none.
    n_train, n_test: cells per class. factor: 1, or what the numbers asked for were scaled down by
        because the smallest class has too few cells. left_out: cells of labels that are no class,
        by label.
    """

    classes: np.ndarray
    train: np.ndarray
    test: np.ndarray
    n_train: int
    n_test: int
    factor: float
    left_out: pd.Series


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of cells, and how well it does on cells that it has not seen.

    classes: their names. accuracy: share of the test cells that are right. confusion: test cells
        by their class (rows) and by what they are taken for (columns).
    coefficients: [classes, features], of standardised features if `standardized`; of two classes
        the second's are the first's with the other sign. intercept: [classes].
    converged: whether the solver finished in its `max_iter` iterations. n_train, n_test: cells.
    """

    classes: np.ndarray
    accuracy: float
    confusion: pd.DataFrame
    coefficients: np.ndarray
    intercept: np.ndarray
    converged: bool
    standardized: bool
    n_train: int
    n_test: int

    @property
    def per_class(self) -> pd.Series:
        """Share of each class's test cells that are right (recall); NaN for a class without any."""
        counts = self.confusion.to_numpy(np.float64)
        with np.errstate(invalid="ignore"):
            return pd.Series(np.diag(counts) / counts.sum(axis=1), index=self.confusion.index)


def split(
    labels: ArrayLike | pd.Series,
    train: int = 6000,
    test: int = 2000,
    classes: Sequence[str] | None = None,
    *,
    min_cells: int = 20,
    among: ArrayLike | None = None,
    seed: int = 0,
) -> Split:
    """Cells to learn from and cells to be tested on, the same number of every class.

    The paper takes 6000 and 2000 per class for cell types, 10000 and 1000 for phases of the cell
    cycle. If the smallest class has fewer cells than both together, both are scaled down by the
    same factor, and the result says so.

    Args:
        labels: one per cell; cells without one (None, NaN) are left out.
        train, test: cells per class.
        classes: which; None: all labels of at least `min_cells` cells.
        min_cells: of a class that is not named.
        among: bool [cells]: the cells that may be taken; None: all. To test a dictionary on cells
            that it was not trained on, give these.
        seed: of the choice of cells.

    Raises:
        InputError: if there are fewer than two classes, or one named has fewer than two cells.
    """
    labels = pd.Series(np.asarray(labels, dtype=object))
    if min(train, test) < 1:
        raise InputError(f"train={train} and test={test}: give at least one cell per class.")
    allowed = labels.notna()
    if among is not None:
        among = np.asarray(among)
        if among.shape != labels.shape or among.dtype != bool:
            raise InputError(f"among must be booleans of the {len(labels)} cells.")
        allowed &= among
    counts = labels[allowed].value_counts()
    if classes is None:
        classes = counts.index[counts >= max(2, min_cells)]
    if few := [name for name in classes if counts.get(name, 0) < 2]:
        raise InputError(f"class {few[0]!r} has fewer than 2 cells: name others.")
    names = np.array(sorted(set(classes), key=str), dtype=object)
    if len(names) < 2:
        raise InputError(
            f"{len(names)} classes with at least {min_cells} cells: a probe needs two to tell "
            "apart."
        )
    factor = min(1.0, counts[names].min() / (train + test))
    n_test = max(1, int(test * factor))
    n_train = max(1, int(train * factor))
    rng = np.random.default_rng(seed)
    learnt, tested = [], []
    for name in names:
        cells = rng.permutation(np.flatnonzero(allowed & (labels == name)))
        tested.append(cells[:n_test])
        learnt.append(cells[n_test : n_test + n_train])
    return Split(
        names,
        np.sort(np.concatenate(learnt)),
        np.sort(np.concatenate(tested)),
        n_train,
        n_test,
        factor,
        counts.drop(names),
    )


def fit(
    z_train: Matrix,
    labels_train: ArrayLike,
    z_test: Matrix,
    labels_test: ArrayLike,
    *,
    penalty: str = "l2",
    strength: float = 1.0,
    max_iter: int = 50,
    standardize: bool = False,
    seed: int = 0,
) -> Probe:
    """Multinomial logistic regression of labels on features; scikit-learn's defaults but max_iter.

    The paper does not standardise, and has max_iter 50 for cell types and the default, 100, for the
    cell cycle; whether that was enough is in the result.

    Args:
        z_train, z_test: features [cells, features], dense or sparse; concepts, neurons, genes.
        labels_train, labels_test: one per cell.
        penalty: "l2"; or "l1" (solved by SAGA), whose coefficients are mostly 0: features are then
            scaled, as it would otherwise choose by units.
        strength: scikit-learn's C, the inverse of the penalty.
        max_iter: iterations at most.
        standardize: divide every feature by its sd over the training cells (no mean is taken off,
            so sparse stays sparse: the intercept does that).
        seed: of SAGA's order of cells.

    Raises:
        InputError: if shapes disagree, values are not finite, or the training cells have fewer than
            two classes.
    """
    if penalty not in PENALTIES:
        raise InputError(f"penalty={penalty!r}: give one of {', '.join(PENALTIES)}.")
    x_train, x_test, y_train, y_test = _checked(z_train, labels_train, z_test, labels_test)
    standardize = standardize or penalty == "l1"
    if standardize:
        scaler = StandardScaler(with_mean=False).fit(x_train)
        x_train, x_test = scaler.transform(x_train), scaler.transform(x_test)
    model = LogisticRegression(C=strength, max_iter=max_iter, random_state=seed, **_of(penalty))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x_train, y_train)
    converged = True
    for each in caught:
        if issubclass(each.category, ConvergenceWarning):
            converged = False
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    coefficients, intercept = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps the second class's alone
        coefficients, intercept = (np.concatenate([-v, v]) for v in (coefficients, intercept))
    return _judged(
        model.classes_, model.predict(x_test), y_train, y_test, coefficients, intercept,
        converged=converged, standardized=standardize,
    )  # fmt: skip


def marker_ranking(
    expression_train: Matrix,
    labels_train: ArrayLike,
    expression_test: Matrix,
    labels_test: ArrayLike,
    n_markers: int = 10,
) -> Probe:
    """The supervised rival that needs no model: a cell is of the class whose markers it expresses.

    A class's markers are the genes with the largest Welch t of its training cells against the
    others (`differential.welch`), above 0; its score is their mean, each gene standardised over the
    training cells.

    Args:
        expression_train, expression_test: ln(1 + normalised counts) [cells, genes], dense or CSR.
        labels_train, labels_test: one per cell.
        n_markers: per class, at most.

    Raises:
        InputError: as `fit` and `differential.welch`; or if a class has no gene above the others.
    """
    x_train, x_test, y_train, y_test = _checked(
        expression_train, labels_train, expression_test, labels_test
    )
    classes = np.unique(y_train)
    groups = classes[:, None] == y_train
    t = differential.welch(x_train, groups, ~groups).scores()
    mean, sd = _moments(x_train)
    coefficients = np.zeros_like(t)
    for row, score in zip(coefficients, t, strict=True):
        best = np.argsort(-score, kind="stable")[:n_markers]
        best = best[(score[best] > 0) & (sd[best] > 0)]
        if not best.size:
            raise InputError("a class has no gene above the others: there are no markers.")
        row[best] = 1 / (sd[best] * best.size)
    intercept = -(coefficients @ mean)
    predicted = classes[np.argmax(x_test @ coefficients.T + intercept, axis=1)]
    return _judged(
        classes, predicted, y_train, y_test, coefficients, intercept,
        converged=True, standardized=False,
    )  # fmt: skip


def top_features(
    probe: Probe,
    n: int = 5,
    *,
    scores: np.ndarray | None = None,
    genes: Sequence[str] | None = None,
    markers: Mapping[str, Sequence[str]] | None = None,
    n_genes: int = 10,
) -> pd.DataFrame:
    """The features that speak most for each class, with their genes (Claye, Figure 5).

    Args:
        n: per class, at most; those with a coefficient above 0, the largest first.
        scores: of the features' genes, attributions or test statistics [features, genes]; adds
            `genes`.
        genes: their names.
        markers: known ones, by class; adds `markers`, those among `genes`, and `n_markers`, how
            many of the class's known ones are among the names at all.
        n_genes: per feature, at most; those with a score above 0.

    Returns:
        A row per class and feature: `class`, `rank` from 1, `feature`, `coefficient`, ...

    Raises:
        InputError: if scores and names are not of the probe's features, or markers come without.
    """
    n_features = probe.coefficients.shape[1]
    if (scores is None) != (genes is None) or (markers is not None and genes is None):
        raise InputError("give scores and genes together, and markers only with them.")
    if scores is not None and np.shape(scores) != (n_features, len(genes)):
        raise InputError(
            f"scores have shape {np.shape(scores)}: give {n_features} features by {len(genes)} "
            "genes."
        )
    rows: list[dict[str, Any]] = []
    for name, coefficients in zip(probe.classes, probe.coefficients, strict=True):
        best = np.argsort(-coefficients, kind="stable")[:n]
        for rank, feature in enumerate(best[coefficients[best] > 0], start=1):
            row = {
                "class": name, "rank": rank, "feature": int(feature),
                "coefficient": coefficients[feature],
            }  # fmt: skip
            if scores is not None:
                order = np.argsort(-scores[feature], kind="stable")[:n_genes]
                row["genes"] = [genes[gene] for gene in order if scores[feature, gene] > 0]
            if markers is not None:
                known = set(markers.get(name, ()))
                row["markers"] = [gene for gene in row["genes"] if gene in known]
                row["n_markers"] = len(known.intersection(genes))
            rows.append(row)
    return pd.DataFrame(rows)


def cell_cycle_genes(names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The genes of S and of G2M of Tirosh et al. 2016, 43 and 54; keys "S" and "G2M".

    Args:
        names: of measured genes: only these are given, by today's symbol where the published one is
            not among them. None: all, as published.
    """
    packaged = resources.files("analysis") / "data" / "cell_cycle.tsv"
    with resources.as_file(packaged) as path:
        table = pd.read_csv(path, sep="\t", comment="#")
    if names is not None:
        there = set(names)
        table["published"] = table["published"].where(
            table["published"].isin(there), table["symbol"]
        )
        table = table[table["published"].isin(there)]
    return {phase: own["published"].tolist() for phase, own in table.groupby("phase")}


def cell_cycle(
    x: Matrix | Chunked, genes: Sequence[str], seed: int = 0
) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Phases of the cell cycle as `scanpy.tl.score_genes_cell_cycle` has them (Claye G).

    A score is linear in a cell's expression, with weights that hang on the genes' means over all
    cells alone. So scanpy scores cells of one gene each, of the same means, and x is read in
    blocks. What differs is rounding: scanpy adds single precision up in it.

    Args:
        x: ln(1 + normalised counts) [cells, genes], dense, CSR or in blocks.
        genes: their symbols; of those that share one the first counts.
        seed: of scanpy's control genes.

    Returns:
        Per cell `S_score`, `G2M_score` and `phase`, one of `PHASES`; and the genes found, as
        `cell_cycle_genes`: the paper's model knew 8 of the 97, so look.

    Raises:
        InputError: if scanpy is not installed, x holds counts, or a phase has no gene among the
            symbols.
    """
    try:
        import scanpy
    except ImportError:
        raise InputError(
            "phases of the cell cycle need scanpy: pip install 'sae-jax[single-cell]'."
        ) from None
    names = pd.Index(genes).astype(str)
    found = cell_cycle_genes(names)
    if len(found) < 2:
        raise InputError(
            f"{names[:3].tolist()}, ...: no genes of {' or '.join(set(PHASES[1:]) - set(found))} "
            "among them; give human gene symbols."
        )
    blocks = x if isinstance(x, Chunked) else chunked.chunked(x, "expression")
    totals, fractional = survey(blocks)
    if not np.isfinite(totals).all() or not fractional:
        raise InputError("x holds counts or NaN: give ln(1 + normalised counts) (scanpy: log1p).")
    first = np.flatnonzero(~names.duplicated())
    totals = totals[first]
    each = sparse.csr_matrix(sparse.diags_array(totals))
    single = anndata.AnnData(each, var=pd.DataFrame(index=names[first]))
    scanpy.tl.score_genes_cell_cycle(
        single, s_genes=found["S"], g2m_genes=found["G2M"], random_state=seed
    )
    scores = ["S_score", "G2M_score"]
    weights = np.zeros((len(names), 2))
    weights[first] = single.obs[scores] / np.where(totals > 0, totals, 1)[:, None]
    table = pd.DataFrame(np.concatenate([block @ weights for block in blocks]), columns=scores)
    higher = np.where(table["G2M_score"] > table["S_score"], "G2M", "S")
    table["phase"] = np.where((table[scores] < 0).all(axis=1), "G1", higher)
    return table, found


def _of(penalty: str) -> dict[str, Any]:
    """Keywords of LogisticRegression, which since version 1.8 has l1_ratio for a penalty's name."""
    if penalty == "l2":
        return {}
    named = inspect.signature(LogisticRegression).parameters["penalty"].default != "deprecated"
    return {"solver": "saga", **({"penalty": "l1"} if named else {"l1_ratio": 1.0})}


def _checked(
    x_train: Matrix, y_train: ArrayLike, x_test: Matrix, y_test: ArrayLike
) -> tuple[Matrix, Matrix, np.ndarray, np.ndarray]:
    """Features in one format and float64, labels as strings."""
    found: list[Any] = []
    for name, x in (("train", x_train), ("test", x_test)):
        if np.ndim(x) != 2 or x.shape[0] == 0:
            raise InputError(f"{name} features have shape {np.shape(x)}: give cells by features.")
        x = sparse.csr_matrix(x, dtype=np.float64) if sparse.issparse(x) else np.asarray(x, float)
        if not np.isfinite(x.data if sparse.issparse(x) else x).all():
            raise InputError(f"{name} features hold NaN or infinite values.")
        found.append(x)
    if found[0].shape[1] != found[1].shape[1]:
        raise InputError(
            f"{found[0].shape[1]} features to learn from and {found[1].shape[1]} to be tested on."
        )
    for (name, y), x in zip((("train", y_train), ("test", y_test)), tuple(found), strict=True):
        y = np.asarray(y)
        if y.shape != (x.shape[0],) or pd.isna(y).any():
            raise InputError(
                f"{name} labels have shape {y.shape}: give one for each of {x.shape[0]} cells, "
                "none missing."
            )
        found.append(y.astype(str))
    if len(np.unique(found[2])) < 2:
        raise InputError("the training cells are of one class: there is nothing to tell apart.")
    return tuple(found)


def _moments(x: Matrix) -> tuple[np.ndarray, np.ndarray]:
    scaler = StandardScaler(with_mean=False).fit(x)
    mean = np.asarray(x.mean(axis=0)).ravel()
    return mean, np.sqrt(scaler.var_)


def _judged(
    classes: np.ndarray,
    predicted: np.ndarray,
    y_train: np.ndarray,
    y_test: np.ndarray,
    coefficients: np.ndarray,
    intercept: np.ndarray,
    *,
    converged: bool,
    standardized: bool,
) -> Probe:
    every = np.union1d(classes, y_test)
    counts = confusion_matrix(y_test, predicted, labels=every)
    table = pd.DataFrame(
        counts, index=pd.Index(every, name="class"), columns=pd.Index(every, name="taken for")
    )
    return Probe(
        classes, float((predicted == y_test).mean()), table, coefficients, intercept, converged,
        standardized, len(y_train), len(y_test),
    )  # fmt: skip

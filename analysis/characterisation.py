"""Which cells a feature is for: types, lineages, technical columns, other modalities.

Schuster A.3.2 and A.3.6, the metadata specificity of Claye, and rank associations. Activations come
as in `features`; all features are treated at once and nothing is made dense but results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse, special, stats

from analysis import features
from analysis.enrichment import benjamini_hochberg
from analysis.features import Matrix, as_columns, feature_of_entry
from sae_jax.errors import InputError

Z_95 = 1.96
RULES = ("text", "code")
MOST_LEVELS = 1000  # a categorical column with more of them names cells, not groups


def significance(mean_j: ArrayLike, sd_j: ArrayLike, n_j: ArrayLike, mean_i: ArrayLike,
                 sd_i: ArrayLike, n_i: ArrayLike) -> np.ndarray:  # fmt: skip
    """Alpha of Schuster's eq. 8, from arrays that broadcast against each other.

        alpha = |mean_j - mean_i| - 1.96 (sd_j / sqrt(n_j) + sd_i / sqrt(n_i))

    The paper takes alpha >= 0.05, a number in the units of the values, as significant. NaN for a
    group of fewer than two cells: a single cell has no spread, and would pass as certain.
    """
    n_j, n_i = np.asarray(n_j, np.float64), np.asarray(n_i, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = Z_95 * (sd_j / np.sqrt(n_j) + sd_i / np.sqrt(n_i))
        return np.where((n_j > 1) & (n_i > 1), np.abs(np.subtract(mean_j, mean_i)) - margin, np.nan)


@dataclass(frozen=True, eq=False)
class Specificity:
    """Activations of every feature by cell type; [features, labels] unless said otherwise.

    labels, n_cells: names, and cells, of the types [labels].
    n_active: active cells. mean, sd: over all cells of the type, sd as in eq. 8 (divided by n).
    alpha: eq. 8 of the type's cells against all other labelled cells.
    higher: whether the feature is significantly higher in the type, by the rule.
    kind: "local" (higher in exactly one type), "global" (every other live one), "dead" [features].
    n_live: active cells, those without a label included [features].
    """

    labels: np.ndarray
    n_cells: np.ndarray
    n_active: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    alpha: np.ndarray
    higher: np.ndarray
    kind: np.ndarray
    n_live: np.ndarray

    def table(self) -> pd.DataFrame:
        """One row per feature: `kind`, `label` (None unless local), `n_higher`, `n_active`."""
        label = np.where(self.kind == "local", self.labels[self.higher.argmax(axis=1)], None)
        return pd.DataFrame(
            {
                "kind": pd.Categorical(self.kind, ["local", "global", "dead"]),
                "label": label,
                "n_higher": self.higher.sum(axis=1),
                "n_active": self.n_live,
            },
            index=pd.RangeIndex(len(self.kind), name="feature"),
        )


def specificity(z: Matrix, labels: ArrayLike | pd.Series, rule: str = "text") -> Specificity:
    """Local and global features (Schuster A.3.6): types in which activations are higher, by eq. 8.

    Args:
        z: non-negative activations [cells, features].
        labels: one per cell; cells without one (None, NaN) only tell a live feature from a dead.
        rule: "text": alpha >= 0.05 and a higher mean. "code": a higher mean and alpha > 0, which
            does not depend on the activations' units.

    Raises:
        InputError: for another rule, activations that `features.as_columns` refuses, labels that
            are not one per cell, or fewer than two different ones.
    """
    if rule not in RULES:
        raise InputError(f'rule={rule!r}: give "text" or "code".')
    columns = as_columns(z)
    names, codes = _coded(labels, columns.shape[0])
    n_labels = len(names)
    n_cells = np.bincount(codes[codes >= 0], minlength=n_labels)
    n_active = _by_label(columns, codes, n_labels, np.ones(columns.nnz))
    total = _by_label(columns, codes, n_labels, columns.data)
    mean = total / n_cells
    # Squares about the mean of the entry's own type: a difference of large sums would lose digits.
    # Entries of cells without a label get some type's mean here, and are left out by _by_label.
    own_mean = mean[feature_of_entry(columns), codes[columns.indices]]
    squares = _by_label(columns, codes, n_labels, (columns.data - own_mean) ** 2)
    squares += (n_cells - n_active) * mean**2

    others = 1.0 - np.eye(n_labels)
    n_rest = n_cells @ others
    mean_rest = total @ others / n_rest
    squares_rest = squares @ others
    for label in range(n_labels):  # spread between the other types
        apart = (mean - mean_rest[:, [label]]) ** 2
        squares_rest[:, label] += (apart * n_cells) @ others[label]
    sd = np.sqrt(squares / n_cells)
    alpha = significance(mean, sd, n_cells, mean_rest, np.sqrt(squares_rest / n_rest), n_rest)
    higher = (mean > mean_rest) & (alpha >= 0.05 if rule == "text" else alpha > 0)
    n_live = np.diff(columns.indptr)
    kind = np.where(higher.sum(axis=1) == 1, "local", np.where(n_live > 0, "global", "dead"))
    return Specificity(
        labels=names, n_cells=n_cells, n_active=n_active.astype(np.int64), mean=mean, sd=sd,
        alpha=alpha, higher=higher, kind=kind, n_live=n_live,
    )  # fmt: skip


def metadata_specificity(
    z: Matrix, labels: ArrayLike | pd.Series, share: float = 0.7, min_cells: int = 100
) -> pd.DataFrame:
    """Claye's rule: a feature is specific to the label that has most of its active cells.

    Args:
        z: non-negative activations [cells, features].
        labels: one per cell; cells without one are left out.
        share: of the active cells; at least this is specific. Above a half, or two could be.
        min_cells: with fewer active cells there is not enough data.

    Returns:
        One row per feature: `n_active`, `label` (with the largest share; the first of ties; None
        for a dead feature), `share`, and `verdict`: "specific", "unspecific", "not enough data".
    """
    if not 0.5 < share <= 1:
        raise InputError(f"share={share}: give a share above 0.5 and at most 1.")
    columns = as_columns(z)
    names, codes = _coded(labels, columns.shape[0])
    counts = _by_label(columns, codes, len(names), np.ones(columns.nnz))
    n_active, most = counts.sum(axis=1), counts.max(axis=1)
    largest = np.divide(most, n_active, out=np.full(len(most), np.nan), where=n_active > 0)
    verdict = np.where(largest >= share, "specific", "unspecific")
    return pd.DataFrame(
        {
            "n_active": n_active.astype(np.int64),
            "label": np.where(n_active > 0, names[counts.argmax(axis=1)], None),
            "share": largest,
            "verdict": np.where(n_active >= max(min_cells, 1), verdict, "not enough data"),
        },
        index=pd.RangeIndex(len(most), name="feature"),
    )


def differentiation(
    z: Matrix,
    labels: ArrayLike | pd.Series,
    stages: Sequence[object],
    lineage: Sequence[object] | None = None,
) -> pd.DataFrame:
    """Schuster A.3.2: features that rise along a lineage and are higher in it than elsewhere.

    Args:
        z: non-negative activations [cells, features].
        labels: one per cell; cells without one are left out.
        stages: labels, earliest first; the mean activation must rise at every step.
        lineage: labels whose cells are compared with all others; the stages if None. (The paper
            does not say whether its stem cells, which every lineage shares, are among them.)

    Returns:
        One row per feature: `passes`, `lineage` and `elsewhere` (mean activations over cells),
        `rise` (last stage less first), and a column ("mean <stage>") for each.
    """
    columns = as_columns(z)
    names, codes = _coded(labels, columns.shape[0])
    lineage = stages if lineage is None else lineage
    at = pd.Index(names).get_indexer(pd.Index([*stages, *lineage]))
    if (at < 0).any():
        unknown = [label for label, i in zip([*stages, *lineage], at, strict=True) if i < 0]
        raise InputError(f"no cell is labelled {unknown[0]!r}; the labels are {list(names)}.")
    steps, inside = at[: len(stages)], np.unique(at[len(stages) :])
    if len(steps) < 2 or len(set(steps)) < len(steps) or not 0 < len(inside) < len(names):
        raise InputError(
            f"stages={list(stages)}, lineage={list(lineage)}: give at least two stages, each once, "
            "and a lineage that leaves other labels to compare it with."
        )
    n_cells = np.bincount(codes[codes >= 0], minlength=len(names))
    total = _by_label(columns, codes, len(names), columns.data)
    outside = np.setdiff1d(np.arange(len(names)), inside)
    within = total[:, inside].sum(axis=1) / n_cells[inside].sum()
    elsewhere = total[:, outside].sum(axis=1) / n_cells[outside].sum()
    means = total[:, steps] / n_cells[steps]
    found = {
        "passes": (within > elsewhere) & (np.diff(means, axis=1) > 0).all(axis=1),
        "lineage": within,
        "elsewhere": elsewhere,
        "rise": means[:, -1] - means[:, 0],
    } | {f"mean {stage}": mean for stage, mean in zip(stages, means.T, strict=True)}
    return pd.DataFrame(found, index=pd.RangeIndex(len(means), name="feature"))


def summary(
    z: Matrix, labels: pd.Series | None = None, technical_columns: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What is known of each feature without genes, in one table.

    Args:
        z: non-negative activations [cells, features].
        labels: one per cell, categories; None: nothing is said of labels.
        technical_columns: of obs, which count as technical; see `technical`.

    Returns:
        One row per feature: the columns of `features.activity`; with labels `kind_<rule>` and
        `local_label_<rule>` by eq. 8 (rules "text" and "code"), `best_label` and its
        `best_label_auroc`; with technical columns `technical`, `technical_column`,
        `technical_explained`. Text columns are categories.
    """
    table = features.activity(z)
    if labels is not None:
        for rule in RULES:
            kinds = specificity(z, labels, rule).table()
            table[f"kind_{rule}"] = kinds["kind"]
            table[f"local_label_{rule}"] = pd.Categorical(kinds["label"])
        names, areas = features.auroc(z, labels)
        table["best_label"] = pd.Categorical(names[areas.argmax(axis=1)], names)
        table["best_label_auroc"] = areas.max(axis=1)
    if technical_columns is not None and technical_columns.shape[1]:
        found = technical(confounders(z, technical_columns))
        table["technical"] = found["technical"]
        table["technical_column"] = pd.Categorical(found["column"])
        table["technical_explained"] = found["explained"]
    return table


def seed_robustness(tables: Sequence[pd.DataFrame], ddof: int = 1) -> pd.DataFrame:
    """Mean and standard error of the kinds' counts over dictionaries (Schuster's Table S6).

    Args:
        tables: `Specificity.table()` of each dictionary.
        ddof: 1 for the standard error; 0 for the paper's, whose 914.00 ± 2.45 local features over
            three seeds (908 in one of them) leave no other reading.

    Returns:
        Rows `live`, `local`, `global`, `dead`; columns `mean`, `sem` (NaN of a single table), `n`.
    """
    if not tables:
        raise InputError("no tables: give one per dictionary.")
    kinds = pd.DataFrame([table["kind"].value_counts() for table in tables])
    counts = kinds.reindex(columns=["local", "global", "dead"], fill_value=0)
    counts.insert(0, "live", counts["local"] + counts["global"])
    sd = counts.std(ddof=ddof) if len(tables) > 1 else np.nan
    return pd.DataFrame(
        {"mean": counts.mean(), "sem": sd / np.sqrt(len(tables)), "n": len(tables)}
    ).rename_axis("kind")


def spearman(z: Matrix, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Spearman correlation of every feature with numeric columns, and its p-value.

    Ranks are taken over the cells that have a value, ties average; the p-value is SciPy's, by
    Student's t. Subtracting the rank that zeros have keeps the ranks sparse, and changes no
    product with a column whose mean is 0.

    Args:
        z: activations [cells, features]; negative values are allowed.
        values: [cells] or [cells, columns]; NaN for a cell without a value.

    Returns:
        rho and p, both [features] or [features, columns]; NaN where a feature or a column is
        constant, or where fewer than three cells have a value.
    """
    columns = as_columns(z, signed=True)
    values = np.asarray(values, dtype=np.float64)
    table = values[:, None] if values.ndim == 1 else values
    if table.ndim != 2 or len(table) != columns.shape[0]:
        raise InputError(
            f"values have shape {values.shape} for {columns.shape[0]} cells: give one row per cell."
        )
    shape = (columns.shape[1], table.shape[1])
    rho, p = np.full(shape, np.nan), np.full(shape, np.nan)
    patterns, which = np.unique(~np.isnan(table), axis=1, return_inverse=True)
    for number, known in enumerate(patterns.T):  # one ranking for columns of the same cells
        n = int(known.sum())
        if n < 3:
            continue
        of = np.flatnonzero(which.ravel() == number)
        shifted, _, squares = _centred_ranks(columns[known])
        y = stats.rankdata(table[known][:, of], axis=0) - (n + 1) / 2
        scale = np.sqrt(squares[:, None] * (y**2).sum(axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.clip((shifted.T @ y) / scale, -1, 1)
            t = r * np.sqrt((n - 2) / ((1 - r) * (1 + r)))
        rho[:, of], p[:, of] = r, 2 * special.stdtr(n - 2, -np.abs(t))
    return (rho[:, 0], p[:, 0]) if values.ndim == 1 else (rho, p)


def trend(z: Matrix, values: ArrayLike) -> pd.DataFrame:
    """Trend of every feature along a numeric column [cells] such as pseudotime: rho, p, q.

    Spearman's rho over the cells that have a value (not NaN), q over the features (a feature that
    could not be tested stays NaN). A pseudotime made from the same embedding has no fair p-value.
    """
    rho, p = spearman(z, np.ravel(values))
    index = pd.RangeIndex(len(rho), name="feature")
    return pd.DataFrame({"rho": rho, "p": p, "q": benjamini_hochberg(p)}, index=index)


def confounders(z: Matrix, obs: pd.DataFrame) -> pd.DataFrame:
    """Association of every feature with columns that describe the cells: depth, batch, donor, sex.

    Everything by ranks. Numeric columns: Spearman. Others (strings, categories, booleans): the
    Kruskal-Wallis test, whose eta² = H / (n - 1) is the share of the ranks' variance that lies
    between levels, as rho² is for a line; k levels explain (k - 1) / (n - 1) of it by chance. Make
    a batch that is coded by numbers categorical before. Cells without a value are left out.

    Args:
        z: activations [cells, features]; negative values are allowed.
        obs: one row per cell, in the order of z.

    Returns:
        One row per column and feature: `column`, `feature`, `explained` (rho² or eta²), `p`, `q`
        (over the features), `rho` (numeric), `level` and `auroc` (of the level with the AUROC
        farthest from 0.5, against all other cells). NaN where either is constant.

    Raises:
        InputError: if the rows do not fit, no column is given, or a column's levels are too many.
    """
    columns = as_columns(z, signed=True)
    if len(obs) != columns.shape[0] or obs.shape[1] == 0 or not obs.columns.is_unique:
        raise InputError(
            f"obs has shape {obs.shape} for {columns.shape[0]} cells: give a row per cell and at "
            "least one column, no two of one name."
        )
    numeric = [
        name for name, values in obs.items()
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    ]  # fmt: skip
    rho, p = spearman(columns, obs[numeric].to_numpy(np.float64, na_value=np.nan))
    parts = []
    for name, values in obs.items():
        if name in numeric:
            r = rho[:, numeric.index(name)]
            found = {"explained": r**2, "p": p[:, numeric.index(name)], "rho": r}
            found |= {"level": None, "auroc": np.nan}
        else:
            found = _kruskal_wallis(columns, values) | {"rho": np.nan}
        part = pd.DataFrame({"column": name, "feature": np.arange(columns.shape[1])} | found)
        parts.append(part.assign(q=benjamini_hochberg(part["p"])))
    order = ["column", "feature", "explained", "p", "q", "rho", "level", "auroc"]
    return pd.concat([part[order].astype({"level": object}) for part in parts], ignore_index=True)


def technical(associations: pd.DataFrame, explained: float = 0.25, q: float = 0.01) -> pd.DataFrame:
    """Features that a technical column explains: at least `explained` of the ranks' variance, at q.

    A quarter is |rho| = 0.5. Where a batch holds other cell types than the rest, a feature of the
    types is flagged too: association does not tell which of the two is the cause.

    Args:
        associations: the rows of `confounders` for the columns that count as technical.

    Returns:
        One row per feature: `technical`, and `column` and `explained` of the strongest association
        (None and NaN where nothing could be tested).
    """
    strength = associations.pivot(index="feature", columns="column", values="explained")
    found = associations.pivot(index="feature", columns="column", values="q") < q
    largest = strength.max(axis=1)
    best = strength.fillna(-1.0).to_numpy().argmax(axis=1)
    return pd.DataFrame(
        {
            "technical": ((strength >= explained) & found).any(axis=1),
            "column": np.where(largest.notna(), strength.columns.to_numpy()[best], None),
            "explained": largest,
        }
    )


@dataclass(frozen=True, eq=False)
class Comparison:
    """Values in the high and the low cells of every feature; all [features, columns].

    n_high, n_low: cells that have a value. mean, sd: of these (NaN for none; sd divided by n).
    alpha: eq. 8. significant: alpha at or above the threshold.
    """

    n_high: np.ndarray
    n_low: np.ndarray
    mean_high: np.ndarray
    mean_low: np.ndarray
    sd_high: np.ndarray
    sd_low: np.ndarray
    alpha: np.ndarray
    significant: np.ndarray


def compare(
    values: ArrayLike | Matrix,
    high: Matrix,
    low: Matrix | None = None,
    *,
    active: Matrix | None = None,
    threshold: float = 0.05,
) -> Comparison:
    """Any numbers of cells (openness, dose, proteins) between high and low cells, by eq. 8.

    Args:
        values: [cells] or [cells, columns], dense (NaN for a cell without a value) or sparse.
        high: boolean mask [features, cells], dense or sparse.
        low: likewise. Or give `active`, and low is every cell that is not active (`groups.
            top_cells` gives both masks): all less the active ones, with no dense mask.
        threshold: of alpha, in the units of the values; the paper's 0.05 would call nothing in
            shares of a few per cent significant, so choose it for the values.

    Raises:
        InputError: if not exactly one of `low` and `active` is given, or if shapes do not fit.
    """
    if (low is None) == (active is None):
        raise InputError("give either low or active.")
    if sparse.issparse(values):
        known = np.ones((values.shape[0], 1))
        shifted, centre = sparse.csr_array(values, dtype=np.float64), 0.0
        if not np.isfinite(shifted.data).all():
            raise InputError("sparse values hold NaN or infinity: drop such cells, or make them 0.")
        squared = shifted.power(2)
    else:
        table = np.asarray(values, dtype=np.float64)
        table = table[:, None] if table.ndim == 1 else table
        missing = np.isnan(table)
        known = (~missing).astype(np.float64)
        filled = np.where(missing, 0.0, table)
        centre = filled.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        shifted = np.where(missing, 0.0, table - centre)  # or squares would lose digits
        squared = shifted**2

    def moments(mask: Matrix) -> list[np.ndarray]:
        fits = np.ndim(mask) == 2 and mask.shape == (high.shape[0], known.shape[0])
        if not fits or mask.dtype != bool:
            raise InputError(
                f"a mask is {mask.dtype} of shape {mask.shape} for {known.shape[0]} cells: give "
                "booleans [features, cells], the same features in both."
            )
        mask = sparse.csr_array(mask, dtype=np.float64)
        found = [mask @ known, mask @ shifted, mask @ squared]
        return [part.toarray() if sparse.issparse(part) else part for part in found]

    above, below = moments(high), moments(active if low is None else low)
    if low is None:
        every_cell = [part.sum(axis=0) for part in (known, shifted, squared)]
        below = [total - part for total, part in zip(every_cell, below, strict=True)]
    n_high, mean_high, sd_high = _described(*above)
    n_low, mean_low, sd_low = _described(*below)
    alpha = significance(mean_high, sd_high, n_high, mean_low, sd_low, n_low)
    return Comparison(
        n_high=n_high, n_low=n_low, mean_high=mean_high + centre, mean_low=mean_low + centre,
        sd_high=sd_high, sd_low=sd_low, alpha=alpha, significant=alpha >= threshold,
    )  # fmt: skip


def _described(
    n: np.ndarray, total: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number, mean and standard deviation, [features, columns]."""
    n = np.broadcast_to(n, total.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(n > 0, total / n, np.nan)
        return n.astype(np.int64), mean, np.sqrt(np.maximum(squares / n - mean**2, 0))


def _coded(labels: ArrayLike | pd.Series, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Names of the labels that occur, and each cell's position among them (-1 for no label)."""
    if np.ndim(labels) != 1 or len(labels) != n_cells:
        raise InputError(
            f"labels have shape {np.shape(labels)} for {n_cells} cells: give one per cell."
        )
    label = pd.Categorical(labels).remove_unused_categories()
    if len(label.categories) < 2:
        raise InputError(
            f"labels hold only {list(label.categories)}: two different labels are needed."
        )
    return np.asarray(label.categories), np.asarray(label.codes, dtype=np.int64)


def _by_label(
    columns: sparse.csc_array, codes: np.ndarray, n_labels: int, weights: np.ndarray
) -> np.ndarray:
    """Sums [features, labels] of `weights`, one per stored entry; unlabelled cells left out."""
    code = codes[columns.indices]
    slot = feature_of_entry(columns) * n_labels + code
    shape = (columns.shape[1], n_labels)
    kept = code >= 0
    if not kept.all():
        slot, weights = slot[kept], weights[kept]
    sums = np.bincount(slot, weights, minlength=shape[0] * shape[1]).reshape(shape)
    return sums.astype(np.float64)  # of no entries at all they are integers


def _centred_ranks(columns: sparse.csc_array) -> tuple[sparse.csc_array, np.ndarray, np.ndarray]:
    """Ranks within each column, less the rank of its zeros; that rank, less the mean rank; squares.

    Returns:
        Differences [cells, features], zero's rank [features], and the sum of squares of all cells'
        ranks about their mean [features].
    """
    shifted, zero_rank = features.ranks(columns)
    n_cells = columns.shape[0]
    zero_rank = zero_rank - (n_cells + 1) / 2
    n_entries = np.diff(columns.indptr)
    of_entries = (shifted.data + np.repeat(zero_rank, n_entries)) ** 2
    squares = np.bincount(feature_of_entry(columns), of_entries, minlength=columns.shape[1])
    return shifted, zero_rank, squares + (n_cells - n_entries) * zero_rank**2


def _kruskal_wallis(columns: sparse.csc_array, values: pd.Series) -> dict[str, np.ndarray | float]:
    """The columns of `confounders` for one categorical column."""
    level = pd.Categorical(values).remove_unused_categories()
    if len(level.categories) > MOST_LEVELS:
        raise InputError(
            f"{values.name!r} has {len(level.categories)} levels: leave it out, or make it numeric."
        )
    if len(level.categories) < 2:
        return {"explained": np.nan, "p": np.nan, "level": None, "auroc": np.nan}
    codes = level.codes[level.codes >= 0]
    shifted, zero_rank, squares = _centred_ranks(columns[np.asarray(level.codes >= 0)])
    n, size = len(codes), np.bincount(codes)
    one_hot = sparse.csr_array((np.ones(n), codes, np.arange(n + 1)), shape=(n, len(size)))
    rank_sum = (shifted.T @ one_hot).toarray() + zero_rank[:, None] * size
    constant = np.full(len(squares), np.nan)
    between = (rank_sum**2 / size).sum(axis=1)
    explained = np.divide(between, squares, out=constant, where=squares > 0)
    auroc = 0.5 + rank_sum / (size * (n - size))
    best = np.abs(auroc - 0.5).argmax(axis=1)
    return {
        "explained": explained,
        "p": special.chdtrc(len(size) - 1, (n - 1) * explained),
        "level": np.where(squares > 0, np.asarray(level.categories, dtype=object)[best], None),
        "auroc": np.where(squares > 0, auroc[np.arange(len(best)), best], np.nan),
    }

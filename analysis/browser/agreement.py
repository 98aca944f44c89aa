"""What a study's answers say: agreement within and between raters, and the interpretable share.

A rating is one rater's answer to one item; the first showing of a feature counts for agreement
between raters and for shares, its repeat only for agreement within a rater. Claye 4.3 found "signal
but unclear" unstable, so every number on that question is given three ways: as its own step between
no and yes, counted as no, and counted as yes.

A feature is **interpretable** to a rater who says yes to any question (a specific cell type, tissue
or process), **unclear** if none is yes and a signal is seen, else **not interpretable**. A feature
without a yes and with a question left open counts nowhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from analysis.browser.study import KINDS
from sae_jax import InputError

UNCLEAR, NO, YES = "unclear", "no", "yes"
MERGES = {"as its own step": {}, "counted as no": {UNCLEAR: NO}, "counted as yes": {UNCLEAR: YES}}
VERDICTS = ("not interpretable", "signal but unclear", "interpretable")
MAJORITY = "majority"
COUNTED = {"yes": VERDICTS[2:], "yes or unclear": VERDICTS[1:]}
_COLOURS = dict(zip(VERDICTS, ("#d5d5d5", "#fdae61", "#2c7bb6"), strict=True))
_RESAMPLES = 2000

Question = Mapping[str, Any]  # `id`, `options` in rising order


def scales(questions: Sequence[Question]) -> list[tuple[str, str, list[str], Mapping[str, str]]]:
    """Every question as often as "unclear" can be read: id, reading, options in order, merge."""
    found = []
    for question in questions:
        readings = MERGES if UNCLEAR in question["options"] else {"": {}}
        for reading, merge in readings.items():
            options = [each for each in question["options"] if each not in merge]
            found.append((question["id"], reading, options, merge))
    return found


def kappa(a: Sequence[str], b: Sequence[str], options: Sequence[str]) -> dict[str, float]:
    """Cohen's kappa of two lists of answers to the same things, with linear weights.

        kappa = 1 - (observed disagreement) / (that of independent raters with the same margins)

    A disagreement by two steps counts twice one by one step; with two options this is the plain
    kappa. The interval is that of Fleiss, Cohen and Everitt (1969), for many things: of few it is
    approximate, and what leaves [-1, 1] is cut off.

    Args:
        a, b: the answers.
        options: all that may be given, in order.

    Returns:
        `n`, `same` (share of equal answers), `kappa`, `low` and `high` (95 %). NaN where undefined:
        kappa if both gave one and the same answer throughout, the interval also where its formula
        has no width, whatever n: if they never differed, or one of them gave one answer only.
    """
    found = {"n": len(a)} | dict.fromkeys(("same", "kappa", "low", "high"), np.nan)
    if not len(a):
        return found
    table = np.zeros((len(options), len(options)))
    place = {option: i for i, option in enumerate(options)}
    np.add.at(table, ([place[x] for x in a], [place[x] for x in b]), 1)
    found["same"] = float(np.trace(table) / table.sum())
    if np.count_nonzero(table.sum(axis=0) + table.sum(axis=1)) < 2:
        return found
    with np.errstate(divide="ignore", invalid="ignore"):  # its kappa_max, which we do not read
        result = cohens_kappa(table, wt="linear")
    found["kappa"] = float(result.kappa)
    if result.var_kappa > 1e-12:
        low, high = np.clip([result.kappa_low, result.kappa_upp], -1, 1).tolist()
        found |= {"low": low, "high": high}
    return found


def alpha(counts: ArrayLike, level: str = "nominal") -> float:
    """Krippendorff's alpha: agreement of any number of raters, gaps allowed.

        alpha = 1 - D_o / D_e, over the pairs of answers to the same thing, and over all pairs

    with the coincidences o_ck = sum_u n_uc (n_uk - [c = k]) / (m_u - 1) of the things with m_u >= 2
    answers, n_c their margins, and a distance of 1 (nominal) or of the square of the answers that
    lie between, half of the ends included (ordinal). Krippendorff, Computing Krippendorff's
    Alpha-Reliability (2011).

    Args:
        counts: how often each option was given to each thing [things, options], options in order.
        level: "nominal" or "ordinal".

    Returns:
        Alpha; NaN if nothing has two answers, or if all answers are the same.
    """
    return float(_alphas(_coincidences(counts)[None].sum(axis=1), level)[0])


def alpha_interval(counts: ArrayLike, level: str, seed: int = 0) -> tuple[float, float]:
    """95 % of alpha when things are drawn again with replacement (percentile bootstrap).

    Resamples in which alpha is undefined are left out.
    """
    parts = _coincidences(counts)
    parts = parts[parts.any(axis=(1, 2))]
    if len(parts) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), _RESAMPLES)
    found = _alphas(np.einsum("ru,uck->rck", weights, parts), level)
    found = found[np.isfinite(found)]
    if not found.size:
        return np.nan, np.nan
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def within(ratings: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """Agreement of each rater with themselves, over the features that they met twice.

    Args:
        ratings: a row a rating: `rater`, `feature`, `kind`, `repeat` (the second showing), and each
            question's option, None where it was not answered.
        questions: those of the study.

    Returns:
        A row a rater and scale: `rater`, `question`, `unclear` (its reading), and `kappa`'s fields.
    """
    rows = []
    for rater, mine in ratings.groupby("rater", sort=False):
        first, again = (mine[mine["repeat"] == r].set_index("feature") for r in (False, True))
        for question, *scale in scales(questions):
            rows.append(
                {"rater": rater, "question": question}
                | _pair(first[question], again[question], *scale)
            )
    return pd.DataFrame(rows)


def changes(ratings: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """How often each answer to a first showing met each to its repeat: `question`, `first`,
    `again`, `n` (over all raters; answers that did not change are in it too)."""
    columns = [q["id"] for q in questions]
    long = ratings.melt(["rater", "feature", "repeat"], columns, "question", "answer").dropna()
    first, again = (long[long["repeat"] == r] for r in (False, True))
    both = first.merge(again, on=["rater", "feature", "question"], suffixes=("_first", "_again"))
    both = both.rename(columns={"answer_first": "first", "answer_again": "again"})
    return both.groupby(["question", "first", "again"]).size().rename("n").reset_index()


def between(ratings: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """Agreement of every two raters, over first showings that both answered.

    Returns:
        A row a pair and scale: `rater`, `other`, and as `within`.
    """
    answers = _first(ratings)
    rows = []
    for a, b in itertools.combinations(dict.fromkeys(ratings["rater"]), 2):
        one, other = (answers[answers["rater"] == r].set_index("feature") for r in (a, b))
        for question, *scale in scales(questions):
            rows.append(
                {"rater": a, "other": b, "question": question}
                | _pair(one[question], other[question], *scale)
            )
    return pd.DataFrame(rows)


def alphas(ratings: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """Krippendorff's alpha of all raters together, over first showings.

    Returns:
        A row a scale (and level, where a scale has three steps): `question`, `unclear`, `level`,
        `n` (features with two answers at least), `alpha`, `low`, `high` (95 %, bootstrap).
    """
    answers = _first(ratings)
    rows = []
    for question, unclear, options, merge in scales(questions):
        given = answers[["feature", question]].dropna().replace({question: dict(merge)})
        counts = pd.crosstab(given["feature"], given[question]).reindex(
            columns=options, fill_value=0
        )
        for level in ("nominal", "ordinal")[: len(options) - 1]:
            low, high = alpha_interval(counts, level)
            rows.append(
                {"question": question, "unclear": unclear, "level": level,
                 "n": int((counts.sum(axis=1) > 1).sum()), "alpha": alpha(counts, level),
                 "low": low, "high": high}
            )  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(ratings: pd.DataFrame, questions: Sequence[Question]) -> pd.DataFrame:
    """`VERDICTS` of every first showing (see the head of this file), and of the majority of raters.

    The majority finds a feature interpretable if more than half of those who rated it do, unclear
    if more than half see a signal at least. Its rows are there if there are several raters.

    Returns:
        `rater`, `feature`, `kind`, `verdict`; features that count nowhere are left out.
    """
    answers = _first(ratings)
    given = answers[[q["id"] for q in questions]]
    yes, signal = (given == YES).any(axis=1), (given == UNCLEAR).any(axis=1)
    answers["verdict"] = np.select([yes, signal], VERDICTS[:0:-1], VERDICTS[0])
    found = answers.loc[yes | given.notna().all(axis=1), ["rater", "feature", "kind", "verdict"]]
    if found["rater"].nunique() < 2:
        return found.reset_index(drop=True)
    level = found["verdict"].map(VERDICTS.index)
    # More than half are at this level or above it: the median of them, the lower one of two.
    middle = level.groupby([found["feature"], found["kind"]]).quantile(0.5, interpolation="lower")
    together = middle.astype(int).map(dict(enumerate(VERDICTS))).rename("verdict").reset_index()
    return pd.concat([found, together.assign(rater=MAJORITY)], ignore_index=True)


def shares(found: pd.DataFrame) -> pd.DataFrame:
    """The interpretable share of each kind, with Wilson's 95 % interval; the unit is the feature.

    Args:
        found: of `verdicts`.

    Returns:
        A row a rater (and the majority), kind, and what `counted` ("yes", "yes or unclear"):
        `interpretable`, `n`, `share`, `low`, `high`. Concepts come before neurons.
    """
    rows = []
    groups = dict(list(found.groupby(["rater", "kind"])["verdict"]))
    for rater, kind in itertools.product(dict.fromkeys(found["rater"]), KINDS):
        if (these := groups.get((rater, kind))) is None:
            continue
        for counted, among in COUNTED.items():
            n, k = len(these), int(these.isin(among).sum())
            low, high = proportion_confint(k, n, method="wilson")
            rows.append(
                {"rater": rater, "kind": kind, "counted": counted, "interpretable": k, "n": n,
                 "share": k / n, "low": low, "high": high}
            )  # fmt: skip
    return pd.DataFrame(rows)


def compare(found: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Whether concepts are interpretable more often than neurons, or less.

    The unit is the feature. One rater's, and the majority's, 2 × 2 table is tested by Fisher's
    exact test. Several raters of a feature do not make several features: together they give it one
    score, the share of its raters who find it interpretable, and a permutation of the kinds among
    the features tests the difference of mean scores (all permutations if they are at most 9,999,
    else as many at random, counted as (b + 1) / (m + 1)).

    Args:
        found: of `verdicts`, with both kinds.
        seed: of the permutations.

    Returns:
        A row a rater, the majority and "all raters", and what is `counted`: `difference` (concepts
        less neurons), `p` (two-sided), `test`.
    """
    rows = []
    for counted, among in COUNTED.items():
        scored = found.assign(score=found["verdict"].isin(among).astype(float))
        for rater, these in scored.groupby("rater", sort=False):
            of = _by_kind(these)
            if of is None:
                continue
            table = [[x.sum(), x.size - x.sum()] for x in of]
            rows.append(
                {"rater": rater, "counted": counted, "difference": of[0].mean() - of[1].mean(),
                 "p": stats.fisher_exact(table).pvalue, "test": "Fisher's exact"}
            )  # fmt: skip
        single = scored[scored["rater"] != MAJORITY]
        of = _by_kind(single.groupby(["feature", "kind"], as_index=False)["score"].mean())
        if single["rater"].nunique() > 1 and of is not None and min(map(len, of)) > 1:
            result = stats.permutation_test(
                of, _difference, vectorized=True, n_resamples=9999,
                rng=np.random.default_rng(seed),
            )  # fmt: skip
            rows.append(
                {"rater": "all raters", "counted": counted, "difference": result.statistic,
                 "p": result.pvalue, "test": "permutation of kinds among features"}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["rater", "counted", "difference", "p", "test"])


def figure(found: pd.DataFrame) -> Figure:
    """Figure 3A of the paper: the shares of the verdicts on concepts and on neurons.

    A panel a rater and one for the majority; whiskers: Wilson's 95 % of "interpretable".

    Raises:
        InputError: if nothing is rated yet.
    """
    if found.empty:
        raise InputError("no item has been rated yet: there is nothing to draw.")
    raters = list(dict.fromkeys(found["rater"]))
    picture = Figure(figsize=(2.9 + 2.1 * len(raters), 3.6), layout="constrained")
    panels = picture.subplots(1, len(raters), sharey=True, squeeze=False)[0]
    table = shares(found).query("counted == 'yes'").set_index(["rater", "kind"])
    for axes, rater in zip(panels, raters, strict=True):
        kinds = [kind for kind in KINDS if (rater, kind) in table.index]
        mine = found[found["rater"] == rater]
        bottom = np.zeros(len(kinds))
        for verdict in reversed(VERDICTS):
            share = [
                (mine.loc[mine["kind"] == kind, "verdict"] == verdict).mean() for kind in kinds
            ]
            axes.bar(kinds, share, 0.65, bottom, color=_COLOURS[verdict], label=verdict)
            bottom += share
        rows = table.loc[[(rater, kind) for kind in kinds]]
        spread = [rows["share"] - rows["low"], rows["high"] - rows["share"]]
        axes.errorbar(kinds, rows["share"], np.clip(spread, 0, 1), fmt="none", ecolor="black",
                      capsize=4)  # fmt: skip
        labels = [f"{kind}s\n(n = {n})" for kind, n in zip(kinds, rows["n"], strict=True)]
        axes.set_xticks(range(len(kinds)), labels)
        axes.set(title=rater.replace("$", r"\$"), ylim=(0, 1), xlim=(-0.6, len(kinds) - 0.4))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of features")
    handles, names = panels[0].get_legend_handles_labels()
    picture.legend(handles, names, loc="outside right upper", frameon=False)
    return picture


def _pair(
    a: pd.Series, b: pd.Series, unclear: str, options: list[str], merge: Mapping[str, str]
) -> dict[str, Any]:
    """`kappa` of two raters' answers by feature, where both are there."""
    both = pd.concat([a.rename("a"), b.rename("b")], axis=1, join="inner").dropna()
    both = both.replace(dict(merge))
    return {"unclear": unclear} | kappa(both["a"].tolist(), both["b"].tolist(), options)


def _first(ratings: pd.DataFrame) -> pd.DataFrame:
    return ratings[~ratings["repeat"].astype(bool)].copy()


def _by_kind(scored: pd.DataFrame) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of concepts and of neurons; None if a kind is missing."""
    concepts, neurons = (scored.loc[scored["kind"] == kind, "score"].to_numpy() for kind in KINDS)
    return (concepts, neurons) if len(concepts) and len(neurons) else None


def _difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis=axis) - y.mean(axis=axis)


def _coincidences(counts: ArrayLike) -> np.ndarray:
    """Of each thing [things, options, options]; zero where it has fewer than two answers."""
    n = np.asarray(counts, np.float64)
    pairs = n[:, :, None] * (n[:, None, :] - np.eye(n.shape[1]))
    return pairs / np.maximum(n.sum(axis=1) - 1, 1)[:, None, None]


def _alphas(coincidences: np.ndarray, level: str) -> np.ndarray:
    """Alpha of each matrix of coincidences [matrices, options, options]."""
    margins = coincidences.sum(axis=2)
    total = margins.sum(axis=1)
    if level == "ordinal":
        middle = margins.cumsum(axis=1) - margins / 2
        distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    else:
        distance = np.broadcast_to(1 - np.eye(margins.shape[1]), coincidences.shape)
    observed = (coincidences * distance).sum(axis=(1, 2)) * (total - 1)
    expected = (margins[:, :, None] * margins[:, None, :] * distance).sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)

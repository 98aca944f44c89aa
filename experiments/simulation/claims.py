"""The claims of section 4.2, each computed from the results of the small sweep.

A claim is what the paper says, what ours says, and whether that is the same by a rule that is
written beside it. The rules are ours: the paper draws its claims from figures.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from experiments.simulation.figures import Rule, at_rate, penalty_of

if TYPE_CHECKING:
    import pandas as pd

L1_TYPES, TYPES = ("Vanilla", "ReLU"), ("Vanilla", "ReLU", "TopK")
BOX = 0.95, (1, 5)  # highest correlation at least; latents per variable
STRONG = 0.2  # of the share of active latents
PER_TYPE = dict[str, float]
VERDICTS = {True: "holds", False: "does not hold", None: "not tested"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper says and where, ours, the rule by which it holds, and whether it does; None
    where the results lack what it is about."""

    paper: str
    ours: str
    rule: str
    holds: bool | None


def check(results: "pd.DataFrame", rule: Rule) -> list[Claim]:
    """Every claim; `results` is the table of `sweep.measure`."""
    trained = results[results["status"] == "trained"]
    found = []
    for claim in CLAIMS:
        try:
            found.append(claim(trained, rule))
        except LookupError as missing:  # a subset (--quick) without the settings that it names
            said = (claim.__doc__ or "").split("\n")[0]
            found.append(Claim(said, f"not in these results: {missing.args[0]}", "", None))
    return found


def steadier(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Reconstruction of Vanilla and ReLU is more robust than of TopK (S4A-B, S5)."""
    spread = {
        kind: float(np.log10(_of(results, kind)["train_mse"].clip(lower=1e-12)).std())
        for kind in TYPES
    }
    holds = max(spread["Vanilla"], spread["ReLU"]) < spread["TopK"]
    return _claim(steadier, f"standard deviation of log10 MSE: {_text(spread)}",
                  "TopK's is the largest, over all widths, rates and penalties", holds)  # fmt: skip


def small_is_bad(results: "pd.DataFrame", rule: Rule) -> Claim:
    """A small hidden size can be detrimental to TopK (S4)."""
    chosen = at_rate(results)
    column = f"{rule.highest}:X'"
    lost = {}
    for kind in TYPES:
        by_width = _of(chosen, kind).groupby("scaling")[column].mean()
        lost[kind] = float(by_width.iloc[1:].mean() - by_width.iloc[0])
    holds = lost["TopK"] > max(lost["Vanilla"], lost["ReLU"], 0)
    return _claim(small_is_bad, f"correlation with X' lost at the smallest width: {_text(lost)}",
                  "TopK loses more than both others, at rate 1e-4", holds)  # fmt: skip


def sparse_above(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Sparsity increases strongly for L1 weights above 1e-3 (S12; S5C)."""
    shares = {}
    holds = True
    for kind in L1_TYPES:
        share = _of(results, kind).groupby("l1_weight")["fraction_active"].mean()
        _need(share.index, 1e-3, "L1 weight 1e-3")
        below, above = share[share.index < 2e-3], share[share.index > 5e-4]
        if len(below) < 2 or len(above) < 2:
            raise LookupError("L1 weights on both sides of 1e-3")
        fall = _fall(above.iloc[::-1])
        holds &= fall > max(STRONG, 2 * abs(_fall(below.iloc[::-1])))
        shares[kind] = _series(share)
    told = "active share by L1 weight: " + _lines(shares)
    text = f"from 1e-3 up it falls by more than {STRONG}, and twice as much as below"
    return _claim(sparse_above, told, text, holds)


def sparse_below(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Sparsity increases strongly for k below 50 % (S12; S5C)."""
    share = _of(results, "TopK").groupby("k_percent")["fraction_active"].mean()
    _need(share.index, 50, "k of 50 %")
    low, high = share[share.index <= 50], share[share.index >= 50]
    if len(low) < 2 or len(high) < 2:
        raise LookupError("k on both sides of 50 %")
    holds = _fall(low) > max(STRONG, 2 * abs(_fall(high)))
    told = "active share by k: " + _series(share)
    text = f"below 50 % it falls by more than {STRONG}, and twice as much as above"
    return _claim(sparse_below, told, text, holds)


def rate_matters(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Sparsity depends strongly on the learning rate (S6)."""
    ranges = {}
    for kind in TYPES:
        chosen = _of(results, kind)
        if chosen["learning_rate"].nunique() < 2:
            raise LookupError("several learning rates")
        share = chosen.groupby(["n_latents", penalty_of(kind)])["fraction_active"]
        ranges[kind] = float((share.max() - share.min()).mean())
    holds = float(np.mean(list(ranges.values()))) >= STRONG
    return _claim(rate_matters, f"mean range of the active share over rates: {_text(ranges)}",
                  f"{STRONG} or more in the mean of the types", holds)  # fmt: skip


def best_rate_for_loss(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Learning rate 1e-4 performs best overall (here: by MSE)."""
    loss = results.groupby("learning_rate")["train_mse"].median()
    _need(loss.index, 1e-4, "learning rate 1e-4")
    return _claim(best_rate_for_loss, "median MSE by rate: " + _series(loss, ".1e"),
                  "the lowest is that of 1e-4", bool(np.isclose(loss.idxmin(), 1e-4)))  # fmt: skip


def best_rate_for_recovery(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Learning rate 1e-4 performs best overall (here: by recovery with little redundancy)."""
    share = _in_box(results, "X'", rule).groupby(results["learning_rate"]).mean()
    _need(share.index, 1e-4, "learning rate 1e-4")
    return _claim(best_rate_for_recovery, f"share {BOX_TEXT}, by rate: " + _series(share),
                  "the highest is that of 1e-4",
                  bool(np.isclose(share.idxmax(), 1e-4)) and share.max() > 0)  # fmt: skip


def best_type(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Good recovery with little redundancy of X' and Y: Vanilla best, TopK worst (S9, S10)."""
    chosen = at_rate(results)
    both = (_in_box(chosen, "X'", rule) + _in_box(chosen, "Y", rule)) / 2
    share = {kind: float(both[chosen["type"] == kind].mean()) for kind in TYPES}
    holds = share["Vanilla"] >= share["ReLU"] >= share["TopK"] and share["Vanilla"] > share["TopK"]
    return _claim(best_type, f"share {BOX_TEXT}, mean of X' and Y: {_text(share)}",
                  "in the order Vanilla, ReLU, TopK, at rate 1e-4", holds)  # fmt: skip


def best_weight(results: "pd.DataFrame", rule: Rule) -> Claim:
    """The best Vanilla has L1 weight 1e-3, the best ReLU 1e-4, at widths of 5 to 50 times."""
    chosen = at_rate(results)
    chosen = chosen[chosen["scaling"].between(5, 50)]
    wanted = {"Vanilla": 1e-3, "ReLU": 1e-4}
    told, holds = {}, True
    for kind, weight in wanted.items():
        part = _of(chosen, kind)
        score = _in_box(part, "X'", rule).groupby(part["l1_weight"]).mean()
        _need(score.index, weight, f"L1 weight {weight:g}")
        highest = part.groupby("l1_weight")[f"{rule.highest}:X'"].mean()
        # By the box, and among equals by correlation.
        best = max(score.index, key=lambda value: (score[value], highest[value]))
        told[kind] = f"best {best:g} ({_series(score)})"
        holds &= bool(np.isclose(best, weight)) and score[best] > 0
    return _claim(best_weight, f"share {BOX_TEXT}, by weight: " + _lines(told),
                  "the best weights are those, at rate 1e-4", holds)  # fmt: skip


def few_latents(results: "pd.DataFrame", rule: Rule) -> Claim:
    """There, 1 to 5 latents a variable: Vanilla at 1e-3, ReLU at 1e-4, widths of 5 to 50 times."""
    chosen = at_rate(results)
    chosen = chosen[chosen["scaling"].between(5, 50)]
    told, holds = {}, True
    for kind, weight in (("Vanilla", 1e-3), ("ReLU", 1e-4)):
        part = _of(chosen, kind)
        _need(part["l1_weight"], weight, f"L1 weight {weight:g}")
        part = part[np.isclose(part["l1_weight"], weight)].sort_values("scaling")
        counts, highest = part[f"{rule.count}:X'"], part[f"{rule.highest}:X'"]
        told[kind] = (
            f"{', '.join(f'{value:.2g}' for value in counts)} latents, "
            f"correlation {highest.mean():.3f}"
        )
        holds &= bool(counts.between(*BOX[1]).mean() > 0.5)
    return _claim(few_latents, "per X' by rising width: " + _lines(told),
                  "1 to 5 at more than half of the widths, for both", holds)  # fmt: skip


def topk_grows(results: "pd.DataFrame", rule: Rule) -> Claim:
    """Latents per variable grow roughly exponentially with width for TopK whatever k (S12)."""
    slopes, straight = _growth(results, "TopK", rule)
    holds = min(straight.values()) >= 0.9 and min(slopes.values()) > 0.1 and _range(slopes) <= 0.5
    told = f"log-log slope by k: {_text(slopes)}; least R² of a line {min(straight.values()):.2f}"
    return _claim(topk_grows, told, "on S12's axes (both logarithmic, so a power law) straight, R² "
                  "≥ .9, and rising, with slopes that differ by at most .5", holds)  # fmt: skip


def weight_sets_growth(results: "pd.DataFrame", rule: Rule) -> Claim:
    """For Vanilla and ReLU there is no such scaling; the L1 weight sets the rate of growth."""
    of_topk = _range(_growth(results, "TopK", rule)[0])
    slopes = {kind: _growth(results, kind, rule)[0] for kind in L1_TYPES}
    holds = min(map(_range, slopes.values())) > of_topk
    told = _lines({kind: _text(each) for kind, each in slopes.items()})
    return _claim(weight_sets_growth, f"log-log slope by L1 weight: {told}",
                  f"slopes differ more than TopK's, by {of_topk:.2f}", holds)  # fmt: skip


CLAIMS: tuple[Callable[["pd.DataFrame", Rule], Claim], ...] = (
    steadier, small_is_bad, sparse_above, sparse_below, rate_matters, best_rate_for_loss,
    best_rate_for_recovery, best_type, best_weight, few_latents, topk_grows, weight_sets_growth,
)  # fmt: skip
BOX_TEXT = f"with correlation ≥ {BOX[0]} and {BOX[1][0]} to {BOX[1][1]} latents a variable"


def _claim(function: Callable, ours: str, rule: str, holds: bool) -> Claim:
    """Its docstring's first line is what the paper says."""
    return Claim((function.__doc__ or "").split("\n")[0], ours, rule, bool(holds))


def _of(results: "pd.DataFrame", kind: str) -> "pd.DataFrame":
    chosen = results[(results["type"] == kind) & (results["k_percent"] != 1)]
    if chosen.empty:
        raise LookupError(f"no {kind} that trained")
    return chosen


def _need(values: "pd.Series | pd.Index", wanted: float, what: str) -> None:
    if not np.isclose(np.asarray(values, float), wanted).any():
        raise LookupError(what)


def _in_box(results: "pd.DataFrame", group: str, rule: Rule) -> "pd.Series":
    """Whether the mean variable of a group is recovered well, and by few."""
    high = results[f"{rule.highest}:{group}"] >= BOX[0]
    return (high & results[f"{rule.count}:{group}"].between(*BOX[1])).astype(float)


def _growth(results: "pd.DataFrame", kind: str, rule: Rule) -> tuple[PER_TYPE, PER_TYPE]:
    """By penalty: the slope of log10 latents per X' on log10 width, and the line's R²."""
    chosen = _of(at_rate(results), kind)
    slopes, straight = {}, {}
    for penalty, part in chosen.groupby(penalty_of(kind)):
        part = part[part[f"{rule.count}:X'"] > 0]
        if len(part) < 3:
            continue
        x, y = np.log10(part["n_latents"]), np.log10(part[f"{rule.count}:X'"])
        slopes[f"{penalty:g}"] = float(np.polyfit(x, y, 1)[0])
        varies = y.std() > 0
        straight[f"{penalty:g}"] = float(np.corrcoef(x, y)[0, 1] ** 2) if varies else 1.0
    if len(slopes) < 2:
        raise LookupError(f"{kind} with latents for X' at three widths, for two penalties")
    return slopes, straight


def _fall(rising: "pd.Series") -> float:
    """How much lower the first is than the last."""
    return float(rising.iloc[-1] - rising.iloc[0])


def _range(values: PER_TYPE) -> float:
    return max(values.values()) - min(values.values())


def _text(values: PER_TYPE) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _series(values: "pd.Series", form: str = ".2f") -> str:
    return ", ".join(f"{key:g}: {value:{form}}" for key, value in values.items())


def _lines(values: dict[str, str]) -> str:
    return "; ".join(f"{name} {text}" for name, text in values.items())

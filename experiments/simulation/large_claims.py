"""The claims of sections 4.1, 4.3 and 6, each computed from the tables of `large`.

As in `claims`: what the paper says, ours, the rule, which is ours, and whether it holds by it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from scipy import stats

from experiments.simulation import large_saes
from experiments.simulation.claims import VERDICTS, Claim

if TYPE_CHECKING:
    import pandas as pd

HIDDEN = ("X''", "A", "B", "X'", "X")  # in the paper's order
DISTANT = ("A", "B", "X'", "X")
PERFECT, NEARLY, NOT = 0.99, 0.9, 0.5  # R²; r; r
PAPER_COVERAGE = {20: 0.95, 70: 0.75}
NEAR, BEYOND = 0.05, 0.1  # of a coverage


@dataclasses.dataclass(frozen=True)
class Tables:
    """superposition: a row per autoencoder and seed. recovered: `large_saes.recovered`. s5:
    `large_saes.table_s5`. covered: `large_saes.structures`."""

    superposition: "pd.DataFrame"
    recovered: "pd.DataFrame"
    s5: "pd.DataFrame"
    covered: "pd.DataFrame"


def check(
    superposition: "pd.DataFrame",
    recovered: "pd.DataFrame",
    s5: "pd.DataFrame",
    covered: "pd.DataFrame",
) -> list[Claim]:
    """Every claim; see `Tables`."""
    tables = Tables(superposition, recovered, s5, covered)
    found = []
    for claim in CLAIMS:
        said = (claim.__doc__ or "").split("\n")[0]
        try:
            ours, rule, holds = claim(tables)
            found.append(Claim(said, ours, rule, bool(holds)))
        except LookupError as missing:
            found.append(Claim(said, f"not in these results: {missing.args[0]}", "", None))
    return found


def tell(claims: Sequence[Claim]) -> None:
    """Print each, the paper's words and ours."""
    for each in claims:
        print(f"  {VERDICTS[each.holds]:<14} {each.paper}\n{'':17}{each.ours}")


Told = tuple[str, str, bool]


def observables_are_learned(tables: Tables) -> Told:
    """Observables are perfectly learned when validation loss is sufficiently low (1C)."""
    best = tables.superposition.sort_values("validation_loss").iloc[0]
    r = _spearman(tables.superposition, "validation_loss", "Y")
    ours = f"R² of Y {best['Y']:.3f} at the lowest loss, {best['name']}; rank correlation {r:.2f}"
    rule = f"R² ≥ {PERFECT} there, and a negative correlation with the loss"
    return ours, rule, bool(best["Y"] >= PERFECT and r < 0)


def pattern(tables: Tables) -> Told:
    """Recovery follows a pattern: X'' best, then A, B and X', X worst (1C)."""
    mean = tables.superposition[list(HIDDEN)].mean()
    holds = mean["X''"] > mean[["A", "B", "X'"]].max() and mean[["A", "B", "X'"]].min() > mean["X"]
    return _means(mean), "mean R² over autoencoders in that order", bool(holds)


def whole_order(tables: Tables) -> Told:
    """X'' is followed by A, B, X' and X, in this order (4.1)."""
    mean = tables.superposition[list(HIDDEN)].mean()
    return _means(mean), "mean R² falls in that order", bool((mean.diff().iloc[1:] < 0).all())


def follows_loss(tables: Tables) -> Told:
    """Variables are recovered better at lower validation loss (1C)."""
    r = {group: _spearman(tables.superposition, "validation_loss", group) for group in HIDDEN}
    rule = "rank correlation of R² of X'' with the validation loss below -.5"
    return f"rank correlations: {_text(r)}", rule, r["X''"] < -0.5


def falls_with_size(tables: Tables) -> Told:
    """Recovery of distant variables falls in deep and wide models despite lower loss (4.1, S2)."""
    table = _by_size(tables.superposition)
    _several(table, "depth", "wide")
    deep, wide = (_spearman(table, by, "distant") for by in ("depth", "wide"))
    loss = {by: _spearman(table, by, "validation_loss") for by in ("depth", "wide")}
    ours = (
        f"rank correlation of mean R² of A, B, X', X with depth {deep:.2f}, with being wide "
        f"{wide:.2f}; of the loss {loss['depth']:.2f}, {loss['wide']:.2f}"
    )
    return ours, "all four below 0", max(deep, wide, *loss.values()) < 0


def rises_with_width(tables: Tables) -> Told:
    """Recovery improves with model width (6)."""
    table = _by_size(tables.superposition)
    _several(table, "wide")
    pairs = table.groupby(["latents", "depth", "wide"])[["X''", "distant"]].mean().unstack("wide")
    gain = {name: (pairs[name][1] - pairs[name][0]).dropna() for name in ("X''", "distant")}
    if gain["X''"].empty:
        raise LookupError("a narrow and a wide autoencoder of the same latents and depth")
    named = {"X''": "X''", "distant": "A, B, X', X"}
    ours = "; ".join(
        f"R² of {named[name]} {each.mean():+.3f}, higher in {(each > 0).sum()} of {len(each)} pairs"
        for name, each in gain.items()
    )
    rule = "wide above narrow of the same latents and depth in the mean, for X'' and for the others"
    return ours, rule, all(each.mean() > 0 for each in gain.values())


def nearly_perfect(tables: Tables) -> Told:
    """Y and X'' are recovered nearly perfectly by single SAE features (4.3, S13)."""
    found = large_saes.chosen(tables.recovered)
    best = {group: found[f"highest:{group}"].max() for group in ("Y", "X''")}
    return f"at best r = {_text(best)}", f"r ≥ {NEARLY} for both", min(best.values()) >= NEARLY


def wider_is_better(tables: Tables) -> Told:
    """The larger the hidden dimensionality of the SAE, the better (4.3, 6)."""
    found = large_saes.chosen(tables.recovered)
    _several(found, "scaling")
    means = found.groupby("scaling")[["highest:Y", "highest:X''"]].mean()
    r = {name[8:]: float(stats.spearmanr(means.index, means[name])[0]) for name in means}
    told = "; ".join(
        f"{name[8:]} " + ", ".join(f"{k:g}: {v:.3f}" for k, v in means[name].items())
        for name in means
    )
    return f"r by scaling: {told}", "rises with it (rank correlation ≥ .8)", min(r.values()) >= 0.8


def x_is_not_there(tables: Tables) -> Told:
    """X are not directly represented by individual SAE features (4.3, Table S5)."""
    row = _row(tables.s5, "SAE", "highest_absolute")
    return f"|r| {row['X']:.2f}", f"below {NOT}", row["X"] < NOT


def no_better_than_baselines(tables: Tables) -> Told:
    """No significant increase over PCA, ICA and SVD (4.3, Table S5)."""
    rows = {method: _row(tables.s5, method, "highest_absolute") for method in large_saes.TABLE_S5}
    sae, excess, higher = rows.pop("SAE"), {}, []
    if tables.recovered["scaling"].nunique() < 2:
        raise LookupError("several scaling factors")
    for group in large_saes.S5_GROUPS:
        excess[group] = sae[group] - max(row[group] for row in rows.values())
        if excess[group] > 1.96 * sae[f"sem:{group}"]:
            higher.append(group)
    ours = f"|r| of the SAEs minus the best baseline's: {_text(excess, '+.2f')}"
    rule = "no group above by more than 1.96 standard errors over scaling factors"
    return ours, rule, not higher


def covered_as_reported(tables: Tables) -> Told:
    """95 % and 75 % of M's entries are recovered at the 20th and 70th percentile (4.3, S13)."""
    mean = _coverage(tables, "SAE")
    ours = f"mean coverage {_text({str(p): mean[p] for p in PAPER_COVERAGE})}"
    off = max(abs(mean[p] - wanted) for p, wanted in PAPER_COVERAGE.items())
    return ours, f"within {NEAR} of both", bool(off <= NEAR)


def covered_beyond_chance(tables: Tables) -> Told:
    """The connectivity of features and observables tells of the generating structure (4.3, 6)."""
    own = _coverage(tables, "SAE")
    others = sorted(set(tables.covered["latents_of"]) - {"SAE"})
    told, least = {}, {}
    for percent in PAPER_COVERAGE:
        chance = {kind: float(_coverage(tables, kind)[percent]) for kind in others}
        least[percent] = own[percent] - max(chance.values())
        told[f"{percent}th"] = f"{own[percent]:.2f}, nulls: {_text(chance)}"
    ours = "; ".join(f"{name} {text}" for name, text in told.items())
    rule = f"mean coverage above that of every null by more than {BEYOND} at both percentiles"
    return ours, rule, min(least.values()) > BEYOND


CLAIMS: tuple[Callable[[Tables], Told], ...] = (
    observables_are_learned, pattern, whole_order, follows_loss, falls_with_size, rises_with_width,
    nearly_perfect, wider_is_better, x_is_not_there, no_better_than_baselines, covered_as_reported,
    covered_beyond_chance,
)  # fmt: skip


def _by_size(table: "pd.DataFrame") -> "pd.DataFrame":
    """With `distant`, the mean R² of what is not next to Y, and `wide`, 0 or 1."""
    distant = table[list(DISTANT)].mean(axis=1)
    return table.assign(distant=distant, wide=(table["width"] == "wide").astype(int))


def _several(table: "pd.DataFrame", *columns: str) -> None:
    for column in columns:
        if table[column].nunique() < 2:
            raise LookupError(f"several values of {column}")


def _spearman(table: "pd.DataFrame", a: str, b: str) -> float:
    _several(table, a, b)
    if len(table) < 4:  # of two any correlation is 1 or -1
        raise LookupError("four autoencoders")
    return float(stats.spearmanr(table[a], table[b])[0])


def _row(s5: "pd.DataFrame", method: str, rule: str) -> "pd.Series":
    return s5[(s5["method"] == method) & (s5["rule"] == rule)].iloc[0]


def _coverage(tables: Tables, kind: str) -> "pd.Series":
    rows = tables.covered[tables.covered["latents_of"] == kind]
    return rows.groupby("percentile")["coverage"].mean()


def _means(values: "pd.Series") -> str:
    order = values.sort_values(ascending=False)
    return "mean R² " + " > ".join(f"{name} ({value:.2f})" for name, value in order.items())


def _text(values: dict[str, float], form: str = ".2f") -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())

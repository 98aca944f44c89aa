"""One feature raised in one group of cells: latents, predicted genes, terms, and random features.

Schuster 5.2, A.3.2 and A.3.4. A decoder predicts expected counts, which have no sampling noise: a
test of them is no evidence that a change is real (the model says so, always), but tells how large
it is beside the noise of counting. `paired` tests expected counts, at each cell's own library, with
the model's dispersion: p is what a sequencing of these cells before and after would give on
average, and falls with their number. What a feature does that a step of the same length along any
other does not is told by the controls: live features drawn at random.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from analysis import characterisation, enrichment, lens, paired, steering
from analysis.gene_sets import GeneSets
from extract.errors import InputError as ExtractionError
from sae_jax import Dictionary, InputError

SPECIFIC = 400  # genes at most of a term of Table S8
TERM_Q = 0.05
PSEUDOCOUNT = (
    0.01  # counts per ten thousand; predictions have no noise that a larger one would damp
)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is steered, and what tells the consequences.

    Attributes:
      x: latents [cells, d], in the decoder's space.
      labels: one per cell; NaN for none.
      names: of the cells [cells].
      library: total counts of each cell over the decoder's genes [cells].
      genes: the decoder's, each name once [genes].
      sets: over `genes`.
      batch, covariates: what the decoder wants of each cell [cells, ...], or None.
    """

    dictionary: Dictionary
    model: steering.Decoder
    x: np.ndarray
    labels: pd.Series
    names: np.ndarray
    library: np.ndarray
    genes: Sequence[str]
    sets: GeneSets
    batch: np.ndarray | None = None
    covariates: np.ndarray | None = None

    def rows(self, label: str) -> np.ndarray:
        """Positions of the cells of a label."""
        return np.flatnonzero((self.labels == label).to_numpy())

    def decode(self, latents: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Shares of counts [cells, genes] of latents that belong to the cells `rows`."""
        return self.model.decode(latents, **self.of(rows))

    def of(self, rows: np.ndarray) -> dict[str, Any]:
        """What the decoder wants of these cells beside latents."""
        given = {"batch": self.batch, "covariates": self.covariates}
        return {name: None if all_ is None else all_[rows] for name, all_ in given.items()}


@dataclasses.dataclass(frozen=True)
class Design:
    """Which features are steered, where and how.

    Attributes:
      stages: labels in order, earliest first; the last is the target.
      lineage: labels that the rule compares with all others; None: the stages.
      cells: labels of the cells steered, each an experiment.
      features: latents; None: the `top` candidates that move cells[0] farthest to the target.
      raise_to, factor, keep_error: as in `steering.raise_to`.
      most_cells: of a label that has more, so many are drawn.
      controls: random features beside each experiment.
      direction: of the changed genes whose terms are sought.
    """

    stages: tuple[str, ...]
    cells: tuple[str, ...]
    lineage: tuple[str, ...] | None = None
    features: tuple[int, ...] | None = None
    top: int = 3
    raise_to: str = "maximum"
    factor: float = 1.0
    keep_error: bool = True
    most_cells: int = 2000
    controls: int = 100
    direction: str = "both"
    seed: int = 0


class Result(NamedTuple):
    """Of one experiment; every table has the columns `cells` and `feature`.

    before, after: latents [cells, d].
    shift: one row per cell. expression: one row per gene. terms: one row per term.
    controls: log2 fold changes [controls, genes] of features drawn at random, by their number.
    """

    before: np.ndarray
    after: np.ndarray
    shift: pd.DataFrame
    expression: pd.DataFrame
    terms: pd.DataFrame
    controls: pd.DataFrame


def candidates(subject: Subject, z: sparse.csr_matrix, design: Design) -> pd.DataFrame:
    """The features of the differentiation rule, and those asked for, best first.

    Args:
      z: codes [cells, features].

    Returns:
      One row per feature, by the shift of cells[0] towards the target (A.3.2): `steered`, `passes`,
      the ranking's columns (`steering.rank_candidates`), the rule's (`differentiation`).

    Raises:
      InputError: labels that no cell has, features that are dead or not there, or no candidate.
    """
    for label in design.cells:
        if not len(subject.rows(label)):
            some = ", ".join(subject.labels.cat.categories[:20])
            raise InputError(f"--cells: no cell is labelled {label!r}; the labels are {some}")
    rule = characterisation.differentiation(z, subject.labels, design.stages, design.lineage)
    asked = np.asarray(design.features or (), np.int64)
    if (unknown := asked[(asked < 0) | (asked >= z.shape[1])]).size:
        raise InputError(f"--features: there is no {unknown[0]}; there are 0 to {z.shape[1] - 1}")
    if (dead := asked[np.isin(asked, z.indices, invert=True)]).size:
        raise InputError(f"--features: {dead[0]} is dead on these cells; it cannot be raised")
    chosen = np.union1d(np.flatnonzero(rule["passes"]), asked)
    if not chosen.size:
        raise InputError(
            f"no feature rises along {' -> '.join(design.stages)} at every step and is higher in "
            "the lineage than elsewhere: name --features, or fewer --stages"
        )
    target = subject.rows(design.stages[-1])
    level = steering.levels(
        z if design.raise_to == "maximum" else z[target], design.raise_to, design.factor
    )
    start = next((label for label in design.cells if label != design.stages[-1]), design.stages[0])
    ranked = steering.rank_candidates(
        subject.dictionary, subject.x[subject.rows(start)], subject.x[target], chosen,
        level[chosen], design.keep_error,
    )  # fmt: skip
    best = asked if design.features else ranked["feature"][: design.top]
    ranked.insert(1, "steered", ranked["feature"].isin(best))
    return ranked.join(rule, on="feature")


def perturb(
    subject: Subject, design: Design, live: np.ndarray, feature: int, level: float, label: str
) -> Result:
    """Raise one feature to a level in the cells of one label, and see what follows.

    Args:
      live: features from which the controls are drawn.
    """
    # The same draws for every feature: experiments differ by what is asked of them alone.
    rng = np.random.default_rng([design.seed, design.cells.index(label)])
    rows = subject.rows(label)
    if len(rows) > design.most_cells:
        rows = np.sort(rng.choice(rows, design.most_cells, replace=False))
    about = {"cells": label, "feature": feature}
    before = subject.x[rows]
    after = subject.dictionary.steer(before, feature, set=level, keep_error=design.keep_error)
    target = None if label == design.stages[-1] else subject.x[subject.rows(design.stages[-1])]
    shift = steering.latent_shift(before, after, target)
    predicted = steering.predict(subject.model, before, after, **subject.of(rows))
    change = steering.expression_shift(predicted, subject.genes, PSEUDOCOUNT).reset_index()
    if not np.isfinite(predicted.after).all():
        raise InputError(
            f"feature {feature} at {level:g}: predictions are not finite; lower --factor"
        )
    test = paired_test(subject, rows, predicted)
    if np.isinf(test.effect).any():
        raise InputError(
            f"feature {feature} at {level:g} leaves genes without a predicted count: lower --factor"
        )
    for name in ("effect", "standard_error", "z", "minus_log10_p", "q"):
        change[name] = getattr(test, name)
    others = controls(subject, design, np.setdiff1d(live, [feature]), shift["norm"].to_numpy(),
                      predicted.before, rows, rng)  # fmt: skip
    if len(others):
        change["control_median"] = np.median(others, axis=0)
        ours, theirs = change["log2_fold_change"].to_numpy(), others.to_numpy()
        beyond = np.where(ours > 0, theirs >= ours, theirs <= ours).sum(axis=0)
        change["control_p"] = (1 + beyond) / (1 + len(others))
    terms = enriched(test, subject.sets, design.direction)
    shift.insert(0, "cell", subject.names[rows])
    named = [table.assign(**about) for table in (shift, change, terms)]
    ordered = [table[[*about, *table.columns.drop(list(about))]] for table in named]
    return Result(before, after, *ordered, others)


def paired_test(subject: Subject, rows: np.ndarray, predicted: steering.Predicted) -> paired.Paired:
    """Negative-binomial regression of expected counts on the perturbation of the same cells.

    With the model's dispersion where it has one for each gene; else Poisson, with standard errors
    from how far the cells disagree.
    """
    library = subject.library[rows]
    try:
        inverse = np.asarray(getattr(subject.model, "dispersion", None), np.float64)
    except (ExtractionError, TypeError):
        inverse = np.empty(0)
    known = inverse.shape == (len(subject.genes),) and np.isfinite(inverse).all()
    return paired.negative_binomial(
        predicted.before * library[:, None], predicted.after * library[:, None], library,
        dispersion=1 / inverse if known else 0, robust=not known,
    )  # fmt: skip


def enriched(test: paired.Paired, sets: GeneSets, direction: str) -> pd.DataFrame:
    """Terms of the changed genes (A.3.7's two stages), and of all genes ranked by z.

    Returns:
      One row per term: term, size (its genes measured), hits, expected, fold, auc (Mann-Whitney);
      -log10 of p, and of q over the terms, of each test; `found`: Fisher's q below .05; `specific`:
      found, and of at most 400 genes (Table S8); n_changed.
    """

    class Tested(NamedTuple):  # what lens.relevant reads of a test, as [1 feature, genes]
        t: np.ndarray
        p: np.ndarray
        log2_fold_change: np.ndarray

    rule = lens.Rule(direction=direction)
    seen = Tested(test.z[None], test.p[None], test.effect[None])
    changed = lens.relevant(seen, test.q[None], rule)
    fisher = enrichment.hypergeometric(changed, sets.membership)
    binomial = enrichment.binomial(changed, sets.membership)
    scores = np.nan_to_num(np.round(test.z, 9), nan=0.0)[None]  # else rounding would break ties
    ranked = enrichment.mann_whitney(scores, sets.membership)
    size = np.asarray(sets.membership.sum(axis=1), int).ravel()
    table = pd.DataFrame(
        {
            "term": sets.names, "size": size, "n_changed": int(changed.sum()),
            "hits": fisher.hits[0], "expected": fisher.expected[0], "fold": fisher.effect[0],
            "auc": ranked.effect[0],
        }
    )  # fmt: skip
    log_p = {
        "fisher": -np.log10(np.maximum(fisher.p[0], 1e-320)),
        "binomial": -np.log10(np.maximum(binomial.p[0], 1e-320)),
        "mann_whitney": lens.two_sided(ranked.z[0]),
    }
    for name, values in log_p.items():
        table[f"log10_p_{name}"] = values
        table[f"log10_q_{name}"] = enrichment.benjamini_hochberg_log(values)
    table["found"] = table["log10_q_fisher"] > -np.log10(TERM_Q)
    table["specific"] = table["found"] & (size <= SPECIFIC)
    return table.sort_values("log10_p_fisher", ascending=False, kind="stable", ignore_index=True)


def controls(
    subject: Subject, design: Design, live: np.ndarray, norm: np.ndarray, before: np.ndarray,
    rows: np.ndarray, rng: np.random.Generator,
) -> pd.DataFrame:  # fmt: skip
    """log2 fold changes of random features, each cell moved as far as the feature moved it.

    Args:
      live: features to draw from; where there are fewer than asked for, all are taken.
      norm: how far each cell was moved [cells].
      before: predicted shares [cells, genes].

    Returns:
      [controls, genes], by the feature's number.
    """
    drawn = rng.permutation(live)[: design.controls]
    if not len(drawn):
        return pd.DataFrame(columns=subject.genes, dtype=np.float64).rename_axis("control")
    n_features = subject.dictionary.config.n_latents
    one_hot = sparse.csr_matrix(
        (np.ones(len(drawn), np.float32), (np.arange(len(drawn)), drawn)),
        shape=(len(drawn), n_features),
    )
    origin = subject.dictionary.decode(sparse.csr_matrix((1, n_features), dtype=np.float32))
    directions = subject.dictionary.decode(one_hot) - origin  # the decoder is linear
    changes = np.empty((len(drawn), len(subject.genes)))
    for change, direction in zip(changes, directions, strict=True):
        unit = direction / np.linalg.norm(direction)
        moved = subject.x[rows] + norm[:, None].astype(np.float32) * unit
        predicted = steering.Predicted(before, subject.decode(moved, rows))
        shift = steering.expression_shift(predicted, subject.genes, PSEUDOCOUNT)
        change[:] = shift["log2_fold_change"]
    return pd.DataFrame(changes, index=pd.Index(drawn, name="control"), columns=subject.genes)

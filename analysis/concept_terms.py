"""What enrichment says of concepts, and whether two ways to rank genes say the same.

Claye 3.4, 4.3 and appendix C: a concept has a strong annotation if its best term has p <= 5e-5, a
weak one if p <= 5e-3. Table 6 compares the terms found from attribution with those found from
differential expression (DGE); only concepts in which both found something count there. The printed
table has the attribution column's first two rows exchanged: 2.362 and 2.570 are fold changes, .211
and .323 attributions, as the text says.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from analysis.features import Matrix
from sae_jax.errors import InputError

STRONG, WEAK = 5e-5, 5e-3
STRENGTHS = ("strong", "weak", "none")
PAPER = {  # appendix C, Table 6, the exchanged cells put right
    ("scvi", "attribution"): {"max_fold_change": 2.362, "max_attribution": 0.211, "enriched": 72},
    ("scvi", "dge"): {"max_fold_change": 4.688, "max_attribution": 0.135, "enriched": 89},
    ("scgpt", "attribution"): {"max_fold_change": 2.570, "max_attribution": 0.323, "enriched": 32},
    ("scgpt", "dge"): {"max_fold_change": 4.040, "max_attribution": 0.172, "enriched": 62},
}


def strengths(p: ArrayLike) -> np.ndarray:
    """ "strong", "weak" or "none" for each list of p [lists, terms], by its smallest p.

    NaN is a term that could not be tested; a list of these alone is "none".
    """
    p = np.asarray(p, np.float64)
    best = np.min(np.where(np.isnan(p), np.inf, p), axis=1, initial=np.inf)
    return np.select([best <= STRONG, best <= WEAK], STRENGTHS[:2], STRENGTHS[2])


def shares(kinds: Mapping[str, ArrayLike]) -> pd.DataFrame:
    """Share of each strength, a row for each kind of list ("concepts", "neurons") and its size."""
    rows = {}
    for name, found in kinds.items():
        found = np.asarray(found)
        if not found.size:
            raise InputError(f"there is no list of {name}: shares of nothing are undefined.")
        rows[name] = {s: float((found == s).mean()) for s in STRENGTHS} | {"n": len(found)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("kind")


def compare(
    found: Mapping[str, ArrayLike],
    membership: Matrix,
    log2_fold_change: ArrayLike,
    attribution: ArrayLike,
) -> pd.DataFrame:
    """Table 6's quantities for every concept.

    Args:
      found: of two methods, "attribution" and "dge", which terms are enriched, bool [concepts,
        terms] (the paper: p <= 5e-3).
      membership: [terms, genes].
      log2_fold_change, attribution: of the genes [concepts, genes]; NaN fold changes are left out.

    Returns:
      One row a concept: `n:attribution`, `n:dge` terms found; `max_fold_change:...` (absolute) and
      `max_attribution:...` over the genes of each method's terms; `iou_terms` and `iou_genes`,
      intersection over union of the terms, and of the genes in any of them. Maxima are NaN for a
      method that found nothing, the IoUs unless both found something.

    Raises:
      InputError: other methods, or shapes that do not fit.
    """
    if set(found) != {"attribution", "dge"}:
        raise InputError(f"found has {sorted(found)}: give attribution and dge.")
    membership = sparse.csr_array(membership, dtype=np.float64)
    fold, scores = np.abs(np.asarray(log2_fold_change)), np.asarray(attribution)
    terms = {name: np.asarray(some, bool) for name, some in found.items()}
    wanted = (fold.shape[0], membership.shape[0])
    fits = scores.shape == fold.shape and fold.shape[1] == membership.shape[1]
    if not fits or any(some.shape != wanted for some in terms.values()):
        raise InputError(
            f"found has shapes {[some.shape for some in terms.values()]}, membership "
            f"{membership.shape}, fold changes {fold.shape} and attribution {scores.shape}: give "
            "concepts by terms, terms by genes, and concepts by genes."
        )
    genes = {name: (membership.T @ some.T).T > 0 for name, some in terms.items()}
    columns: dict[str, np.ndarray] = {}
    for name, some in terms.items():
        columns[f"n:{name}"] = some.sum(axis=1)
        for what, values in {"max_fold_change": fold, "max_attribution": scores}.items():
            columns[f"{what}:{name}"] = _largest(values, genes[name])
    both = terms["attribution"].any(axis=1) & terms["dge"].any(axis=1)
    for what, sides in {"iou_terms": terms, "iou_genes": genes}.items():
        a, b = sides["attribution"], sides["dge"]
        union = np.maximum((a | b).sum(axis=1), 1)
        columns[what] = np.where(both, (a & b).sum(axis=1) / union, np.nan)
    return pd.DataFrame(columns)


def table_6(compared: pd.DataFrame) -> pd.DataFrame:
    """Mean and sd over the concepts in which both methods found a term, as the paper's Table 6.

    Columns "attribution" and "dge"; rows the paper's. IoUs stand in both columns.
    """
    both = compared[(compared["n:attribution"] > 0) & (compared["n:dge"] > 0)]
    rows: dict[str, dict[str, float]] = {}
    for method in ("attribution", "dge"):
        for what in ("max_fold_change", "max_attribution", "iou_genes", "iou_terms"):
            values = both[what if what.startswith("iou") else f"{what}:{method}"]
            rows.setdefault(what, {})[method] = float(values.mean())
            rows.setdefault(f"{what} sd", {})[method] = float(values.std())
        rows.setdefault("enriched", {})[method] = int((compared[f"n:{method}"] > 0).sum())
    rows["compared"] = dict.fromkeys(("attribution", "dge"), len(both))
    return pd.DataFrame.from_dict(rows, orient="index")


def share_in_no_term(important: ArrayLike, membership: Matrix) -> np.ndarray:
    """Share of each concept's important genes that are in no term [concepts]; NaN if it has none.

    Args:
      important: bool [concepts, genes]. membership: [terms, genes].
    """
    important = np.asarray(important, bool)
    known = np.asarray(sparse.csr_array(membership).sum(axis=0)).ravel() > 0
    n = important.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(n, (important & ~known).sum(axis=1) / np.maximum(n, 1), np.nan)


def _largest(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Largest of each row over the genes chosen; NaN for none."""
    some = np.where(of & ~np.isnan(values), values, -np.inf).max(axis=1, initial=-np.inf)
    return np.where(np.isinf(some), np.nan, some)

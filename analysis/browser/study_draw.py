"""Draws a study: which features, shown how, which of them twice, in which order to whom."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from analysis.browser import study_panels
from analysis.browser.absent import CONCEPTS, MORE
from analysis.browser.study import KINDS, NAME, QUESTIONS, Item, Rater, Study, digest, hashed
from analysis.browser.study_panels import Documents
from sae_jax import InputError


def make(
    documents: Documents,
    *,
    name: str,
    title: str | None = None,
    concepts: int = 20,
    neurons: int = 20,
    repeats: int = 0,
    raters: Sequence[str] = ("rater",),
    seed: int = 0,
    panels: Sequence[str] | None = None,
    metadata: Sequence[str] | None = None,
    n_genes: int = 25,
) -> tuple[Study, dict[str, Any], list[tuple[str, str]]]:
    """Draws a study; nothing is written.

    Features are drawn uniformly among those of their kind that can fill the panels as full as every
    other item: a shorter list would tell what it is of. How many were passed over is kept. Repeats
    are drawn in the proportion of the kinds, and come after at least a third of the items.

    Args:
        documents: key -> document of the run's explorer, as `documents.document` with its run.
        name: of the folder: letters, digits, _ and -.
        title: what raters read; it must not betray what is studied. None for the name.
        concepts, neurons: features of each kind.
        repeats: how many of them are shown a second time.
        raters: their names, each once.
        seed: of the draw and of the orders. Tokens are random whatever it is.
        panels: of `study_panels.PANELS`; None for all that this run can fill.
        metadata: columns of the top cells; None for every column of categories that is not an
            identifier (at most one value for every second cell).
        n_genes: genes of an attribution that are shown.

    Returns:
        The design, what is shown by an item's number, and each rater's token.

    Raises:
        InputError: if the run lacks what a panel needs, or has too few features, or if an argument
            makes no sense.
    """
    raters = _check(name, raters, {"concepts": concepts, "neurons": neurons}, repeats)
    about = documents("about")
    panels = study_panels.available(documents, panels)
    metadata = study_panels.columns(about, metadata) if "cells" in panels else ()
    rng = np.random.default_rng(seed)
    kinds = _kinds(documents)
    links = functools.cache(lambda gene: documents(f"gene/{gene}")["links"])
    drawn: list[tuple[int, str, str]] = []
    shown: dict[int, Any] = {}
    passed_over = {}
    for kind, n in zip(KINDS, (concepts, neurons), strict=True):
        candidates = [feature for feature, (_, k) in kinds.items() if k == kind] if n else []
        found: list[int] = []
        reasons: list[str] = []
        for feature in rng.permutation(candidates).tolist():
            if len(found) == n:
                break
            try:
                shown[feature] = study_panels.project(
                    documents, feature, panels, metadata, n_genes=n_genes, links=links
                )
                found.append(feature)
            except study_panels.CannotShowError as error:
                reasons.append(str(error))
        if n and not candidates:
            raise InputError(
                f"the run has no {kind}s: give --{kind}s=0, or, for a study of both, {CONCEPTS}."
            )
        if len(found) < n:
            why = f" ({reasons[0]})" if reasons else ""
            raise InputError(
                f"{n} {kind}s are asked for, and {len(found)} of the run's {len(candidates)} can "
                f"fill the panels {', '.join(panels)}{why}. Ask for fewer or for other panels, or "
                f"attribute more: {MORE}."
            )
        passed_over[kind] = len(reasons)
        drawn += [(feature, kinds[feature][0], kind) for feature in found]
    n_samples = study_panels.level(shown.values())

    numbers = _numbers(len(drawn) + repeats, rng)
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    first = [Item(number, *each) for number, each in zip(numbers, drawn, strict=False)]
    again = [
        Item(number, each.feature, each.name, each.kind, each.number)
        for number, each in zip(numbers[len(first) :], _to_repeat(first, repeats, rng), strict=True)
    ]
    items = (*first, *again)
    content = {each.number: shown[each.feature] for each in first}
    tokens = [(rater, secrets.token_urlsafe(24)) for rater in raters]
    study = Study(
        name=name,
        title=title or name,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        run=str(about.get("fingerprint", "")),
        seed=seed,
        panels=panels,
        metadata=metadata,
        n_genes=n_genes,
        n_samples=n_samples,
        passed_over=passed_over,
        items=items,
        raters=tuple(Rater(r, hashed(token), order(items, rng)) for r, token in tokens),
        questions=QUESTIONS,
        panels_sha256=digest(content),
    )
    return study, content, tokens


def order(items: Sequence[Item], rng: np.random.Generator) -> tuple[str, ...]:
    """A random order in which a repeat comes a third of the items or more after the first showing.

    Positions of the repeated are drawn until those in the earlier half pair with those in the later
    half at that distance (half the items lie between, on average); then partners are exchanged at
    random as far as the distance allows, so that repeats do not follow the order of the first.
    """
    n, again = len(items), [each for each in items if each.repeat_of]
    r, least = len(again), n // 3
    while True:
        places = np.sort(rng.choice(n, 2 * r, replace=False))
        early, late = places[:r], places[r:]
        if np.all(late - early >= least):
            break
    for _ in range(20 * r):
        i, j = rng.integers(r, size=2)
        if min(late[j] - early[i], late[i] - early[j]) >= least:
            late[[i, j]] = late[[j, i]]
    placed: dict[int, str] = {}
    for pair, k in zip(again, rng.permutation(r), strict=True):
        placed |= {int(early[k]): str(pair.repeat_of), int(late[k]): pair.number}
    taken = set(placed.values())
    others = iter(rng.permutation([each.number for each in items if each.number not in taken]))
    return tuple(placed.get(place) or str(next(others)) for place in range(n))


def _check(
    name: str, raters: Sequence[str], counts: Mapping[str, int], repeats: int
) -> tuple[str, ...]:
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a study: use letters, digits, _ and -, 64 at most, the first a "
            "letter or a digit."
        )
    raters = tuple(each.strip() for each in raters)
    if not raters or len(set(raters)) < len(raters):
        raise InputError(f"raters={','.join(raters)!r}: give at least one, and each name once.")
    for rater in raters:
        if not 0 < len(rater) <= 40 or not rater.isprintable():
            raise InputError(f"{rater!r} cannot name a rater: give 1 to 40 printable characters.")
    for what, n in (counts | {"repeats": repeats}).items():
        if n < 0:
            raise InputError(f"{what}={n}: give 0 or more.")
    total = sum(counts.values())
    if not 0 < total <= 100_000:
        raise InputError(f"{total} features: give concepts, neurons or both, 100,000 at most.")
    if repeats > total or (repeats and total + repeats < 6):
        raise InputError(
            f"{repeats} repeats of {total} features: at most one of each, and in a study of six or "
            "more items, or a repeat would follow what it repeats."
        )
    return raters


def _kinds(documents: Documents) -> dict[int, tuple[str, str]]:
    """Name and kind of every feature; without a kind it is a concept, as in the run's file."""
    table = documents("features")
    names, kind = table["names"], table["columns"].get("kind")
    if kind is None:
        return {i: (str(name), "concept") for i, name in enumerate(names)}
    if isinstance(kind, Mapping):
        named = dict(enumerate(kind["categories"])) | {kind["missing"]: None}
        kind = [named[code] for code in np.asarray(kind["codes"]).tolist()]
    pairs = zip(map(str, names), (each or "concept" for each in kind), strict=True)
    return dict(enumerate(pairs))


def _numbers(n: int, rng: np.random.Generator) -> list[str]:
    """Different numbers of six digits, in no order."""
    return [str(100_000 + i) for i in rng.choice(900_000, n, replace=False).tolist()]


def _to_repeat(first: Sequence[Item], repeats: int, rng: np.random.Generator) -> list[Item]:
    """Items to show again: of each kind its share, rounded; which are drawn at random."""
    of = {kind: [each for each in first if each.kind == kind] for kind in KINDS}
    n_concepts = round(repeats * len(of["concept"]) / len(first))
    wanted = {"concept": n_concepts, "neuron": repeats - n_concepts}
    return [of[kind][i] for kind in KINDS for i in rng.permutation(len(of[kind]))[: wanted[kind]]]

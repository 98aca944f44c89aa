"""The table of features, sorted, filtered and paged on the server."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.browser.columns import FLAG, NUMBER
from analysis.browser.run import Run
from analysis.browser.search import terms_with
from sae_jax import InputError

SEARCHED = ("label", "term", "term_down", "top_genes", "attributed_genes")
SIZE = 50
MOST_TYPED, MOST_WORDS, MOST_CORNERS = 200, 20, 2000  # characters of q and of words, words, corners


def query(run: Run, parameters: Mapping[str, str]) -> dict[str, Any]:
    """A page of the features that pass all filters.

    Args:
      parameters: empty ones count as not given.
        sort, desc ("1"): a column; ties by the features' numbers, missing values last either way.
        page (from 0), size. values: "none" for the numbers of all rows alone. q: a text that name,
        label, term or top genes hold. words: texts, separated by commas, one of which a term of
        the feature holds. lasso: corners "x,y;x,y;..." of a polygon on the feature map, in its
        coordinates; what lies within by the even-odd rule.
        <column>: the value it must have. <column>_min, <column>_max: bounds, both included.

    Returns:
      total: features that pass. rows: numbers of those on the page. values: of every column, of
      these rows; missing ones are None, flags 0 or 1.

    Raises:
      InputError: an unknown parameter, or a value that is none, or too long.
    """
    given = {name: value for name, value in parameters.items() if value != ""}
    page, size = (_whole(given, name, default) for name, default in (("page", 0), ("size", SIZE)))
    sort, desc = given.pop("sort", None), given.pop("desc", "0") not in ("0", "false")
    bare = given.pop("values", "all") == "none"
    keep = np.ones(run.n_features, bool)
    for name, value in given.items():
        keep &= _passing(run, name, value)
    rows = np.flatnonzero(keep)
    if sort is not None:
        place = _ranks(run, sort)[rows].astype(np.int64)
        place = np.where(place < 0, len(run.names), -place if desc else place)
        rows = rows[np.argsort(place, kind="stable")]
    if bare:
        return {"total": len(rows), "rows": rows.tolist(), "values": {}}
    shown = rows[page * size : (page + 1) * size]
    values = {column.name: _values(run, column.name, shown) for column in run.columns}
    return {"total": len(rows), "rows": shown.tolist(), "values": values}


def within(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Which points lie in a polygon, by the even-odd rule; NaN lies nowhere.

    Args:
      points: [points, 2]. corners: [corners, 2], the last is joined to the first.
    """
    x, y = points.T
    inside = np.zeros(len(points), bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        for (xi, yi), (xj, yj) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
            crossed = (yi > y) != (yj > y)
            inside ^= crossed & (x < (xj - xi) * (y - yi) / (yj - yi) + xi)
    return inside


def _whole(given: dict[str, str], name: str, default: int) -> int:
    text = given.pop(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or (name == "size" and int(text) == 0):
        raise InputError(f"{name}={text[:50]!r} must be a whole number")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise InputError(f"{name}={text[:50]!r} must be a number")
    return number


def _passing(run: Run, name: str, value: str) -> np.ndarray:
    """Which features pass a filter."""
    if name in ("q", "words") and len(value) > MOST_TYPED:
        raise InputError(f"{name} has {len(value)} characters: give {MOST_TYPED} at most")
    if name == "q":
        return _holding(run, value.casefold())
    if name == "words":
        words = dict.fromkeys(word.strip().casefold() for word in value.split(","))
        if len(words) > MOST_WORDS:
            raise InputError(f"words has {len(words)} different ones: give {MOST_WORDS} at most")
        terms = [terms_with(run, [word]) for word in words if word]
        some = np.unique(np.concatenate([np.empty(0, int), *terms]))
        return np.diff(run.feature_terms[:, some].indptr) > 0
    if name == "lasso":
        return _in_lasso(run, value)
    kinds = {column.name: column.kind for column in run.columns}
    if name in kinds:
        return _equal(run, name, kinds[name], value)
    column, _, side = name.rpartition("_")
    if side in ("min", "max") and kinds.get(column) == NUMBER:
        values = run.features[column].to_numpy(np.float64, na_value=np.nan)
        bound = _number(name, value)
        return values >= bound if side == "min" else values <= bound
    raise InputError(f"there is no filter {name[:50]!r} of this table")


def _equal(run: Run, name: str, kind: str, value: str) -> np.ndarray:
    if name == "name":
        return np.asarray([own == value for own in run.names])
    values = run.features[name]
    if kind == NUMBER:
        return values.to_numpy(np.float64, na_value=np.nan) == _number(name, value)
    if kind == FLAG:
        if value.lower() not in ("0", "1", "false", "true", "no", "yes"):
            raise InputError(f"{name}={value[:50]!r} must be 1 or 0")
        wanted = value.lower() in ("1", "true", "yes")
        return values.astype("boolean").eq(wanted).fillna(False).to_numpy(bool)
    return values.to_numpy(object) == value


def _holding(run: Run, text: str) -> np.ndarray:
    """Features whose name, or one of `SEARCHED`, holds a text in small letters."""
    if "table texts" not in run.memo:
        columns = [run.names, *(run.features[name] for name in SEARCHED if name in run.features)]
        run.memo["table texts"] = [
            ["" if value is None else str(value).casefold() for value in column]
            for column in columns
        ]
    found = np.zeros(run.n_features, bool)
    for column in run.memo["table texts"]:
        found |= np.fromiter((text in value for value in column), bool, run.n_features)
    return found


def _in_lasso(run: Run, text: str) -> np.ndarray:
    if run.feature_map is None:
        raise InputError("there is no feature map to draw a lasso on")
    corners = [pair.split(",") for pair in text.split(";") if pair]
    if len(corners) < 3 or any(len(pair) != 2 for pair in corners):
        raise InputError("a lasso is three corners or more: x,y;x,y;x,y")
    if len(corners) > MOST_CORNERS:
        raise InputError(f"a lasso has {len(corners)} corners: give {MOST_CORNERS} at most")
    numbers = [[_number("lasso", part) for part in pair] for pair in corners]
    return within(run.feature_map, np.asarray(numbers))


def _ranks(run: Run, name: str) -> np.ndarray:
    """Of each feature the place of its value among all; equal ones share it; -1: it is missing."""
    ranks = run.memo.setdefault("ranks", {})
    if name not in ranks:
        kinds = {column.name: column.kind for column in run.columns}
        if name not in kinds:
            raise InputError(f"there is no column {name[:50]!r} to sort by")
        if name == "name":
            values = pd.Series(run.names)
        else:
            values = run.features[name].reset_index(drop=True)
        if kinds[name] in (NUMBER, FLAG):
            codes = pd.factorize(values.to_numpy(np.float64, na_value=np.nan), sort=True)[0]
        else:
            texts, distinct = pd.factorize(values.to_numpy(object))
            forms = [natural(str(text)) for text in distinct]
            place = {form: i for i, form in enumerate(sorted(set(forms)))}
            codes = np.asarray([*(place[form] for form in forms), -1])[texts]
        ranks[name] = codes
    return ranks[name]


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A text to sort by: whatever its case, and feature_2 before feature_10."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", text.casefold())
    return tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)


def _values(run: Run, name: str, rows: np.ndarray) -> list[Any]:
    if name == "name":
        return [run.names[i] for i in rows]
    column = run.features[name].iloc[rows]
    if pd.api.types.is_bool_dtype(column):
        return [None if value is pd.NA else int(value) for value in column]
    if pd.api.types.is_numeric_dtype(column):
        return [value if math.isfinite(value) else None for value in column.tolist()]
    return column.tolist()

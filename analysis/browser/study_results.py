"""A study's answers as tables: what was typed, every change, and the ratings that are compared."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.browser import agreement
from analysis.browser.answers import Answers
from analysis.browser.study import Study

RUNS = tuple("=+-@\t\r\n")  # a spreadsheet may run a cell that begins so


def answers_csv(study: Study, answers: Answers, raw: bool = False) -> str:
    """What holds now: a row a rater and item, in the rater's order.

    Items without an answer are there too, so that gaps show. `position` counts from 1. `raw`: text
    exactly as typed, for programs; else `safe` for spreadsheets.
    """
    held = {(row["rater"], row["item"]): row for row in answers.current()}
    rows = []
    for rater in study.raters:
        for position, number in enumerate(rater.order, 1):
            item, row = study.item[number], held.get((rater.name, number), {})
            answer = row.get("answer", {})
            rows.append(
                {"study": study.name, "rater": rater.name, "position": position, "item": number,
                 "feature": item.name, "kind": item.kind, "repeat_of": item.repeat_of}
                | _fields(study, answer)
                | {"complete": study.is_complete(answer), "version": row.get("version", 0),
                   "saved_at": row.get("at")}
            )  # fmt: skip
    return _csv(list(rows[0]), rows, raw)


def history_csv(study: Study, answers: Answers, raw: bool = False) -> str:
    """Every change, the oldest first; `change` is "undo" where an earlier answer was brought back,
    and `base` the version that the page had shown. `raw` as of `answers_csv`."""
    names = ("id", "at", "rater", "item", "version", "base")
    rows = [
        {name: row[name] for name in names}
        | {"change": "save" if row["source"] == row["version"] else "undo"}
        | _fields(study, row["answer"])
        for row in answers.history()
    ]
    return _csv([*names, "change", *_fields(study, {})], rows, raw)


def ratings(study: Study, answers: Answers) -> pd.DataFrame:
    """The answers as `agreement` reads them: a row an answered item of a rater."""
    rows = [
        {"rater": row["rater"], "feature": item.name, "kind": item.kind,
         "repeat": item.repeat_of is not None}
        | {q["id"]: row["answer"].get(q["id"]) for q in study.questions}
        for row in answers.current()
        if (item := study.item[row["item"]])
    ]  # fmt: skip
    columns = ["rater", "feature", "kind", "repeat", *(q["id"] for q in study.questions)]
    return pd.DataFrame(rows, columns=columns).astype({"repeat": bool})


def report(study: Study, answers: Answers) -> dict[str, pd.DataFrame]:
    """The tables of the agreement report, by name; rows of nothing, and empty tables, left out."""
    rated = ratings(study, answers)
    found = agreement.verdicts(rated, study.questions)
    tables = {
        "shares": agreement.shares(found),
        "comparison": agreement.compare(found),
        "within": agreement.within(rated, study.questions),
        "changes": agreement.changes(rated, study.questions),
        "between": agreement.between(rated, study.questions),
        "alphas": agreement.alphas(rated, study.questions),
    }
    tables = {k: table[table["n"] > 0] if "n" in table else table for k, table in tables.items()}
    return {name: table for name, table in tables.items() if len(table)}


def report_csv(study: Study, answers: Answers, raw: bool = False) -> str:
    """The tables of `report` under each other, with `table` as the first column; `raw` as of
    `answers_csv`, of raters' names."""
    tables = report(study, answers)
    if not tables:
        return "table\n"
    table = pd.concat(tables, names=["table"]).reset_index("table")
    return (table if raw else table.map(safe)).to_csv(index=False)


def safe(value: Any) -> Any:
    """Text that a spreadsheet would run, after an apostrophe; anything else as it is."""
    return f"'{value}" if isinstance(value, str) and value.startswith(RUNS) else value


def figure_png(study: Study, answers: Answers) -> bytes:
    """Figure 3A of the answers so far.

    Raises:
        InputError: if nothing is rated yet.
    """
    picture = agreement.figure(agreement.verdicts(ratings(study, answers), study.questions))
    written = io.BytesIO()
    picture.savefig(written, format="png", dpi=150)
    return written.getvalue()


def _fields(study: Study, answer: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for q in study.questions for name in (q["id"], f"{q['id']}_words")]
    return {name: answer.get(name) for name in names}


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], raw: bool) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, columns)
    writer.writeheader()
    writer.writerows(rows if raw else ({k: safe(v) for k, v in row.items()} for row in rows))
    return written.getvalue()

"""One self-contained HTML page: text, tables and pictures, with nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from sae_jax import files

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #e3e3e3;
         vertical-align: top; }
th { border-bottom: 2px solid #999; } img { max-width: 100%; }
code, pre { background: #f5f5f3; border-radius: 3px; font-size: 13px; } code { padding: 0 .25rem; }
pre { padding: .6rem; overflow-x: auto; } .caption { color: #555; font-size: 13px; }
"""


def paragraph(text: str) -> str:
    """Escaped text."""
    return f"<p>{escape(text)}</p>"


def items(lines: Sequence[str]) -> str:
    """Escaped lines as a list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def code(text: str) -> str:
    """An escaped block of code."""
    return f"<pre>{escape(text)}</pre>"


def picture(path: Path, caption: str, width: str = "100%") -> str:
    """A PNG, embedded, with its caption; `width` as in CSS."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption, quote=True)}" '
        f'style="width: {width}">'
        f'<figcaption class="caption">{escape(caption)}</figcaption></figure>'
    )


def table(frame: pd.DataFrame) -> str:
    """A table, escaped; numbers to three significant digits, missing values empty."""
    rendered = frame.to_html(index=False, border=0, na_rep="", float_format=_number, escape=True)
    rendered = rendered.replace("&lt;NA&gt;", "")
    return f'<div class="wide">{rendered}</div>'


def _number(value: float) -> str:
    """Three digits, and a minus at which no browser breaks the line."""
    return f"{value:.3g}".replace("-", "\N{NON-BREAKING HYPHEN}")


def write(path: Path, title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Write the page: sections are headings, each with its pieces of HTML made above."""
    body = "\n".join(
        f"<h2>{escape(heading)}</h2>\n" + "\n".join(pieces) for heading, pieces in sections
    )
    with files.write_aside(path) as fresh:
        fresh.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
            f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
        )

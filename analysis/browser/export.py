"""The explorer as files: the same pages, and every document as a script that opens from the disk.

A browser reads no data from file:// but scripts, so a document is `SAE.put(key, base64)`, and those
of one feature lie in one file. Nothing that people wrote in a study is in it.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis.browser import assets, documents, wire
from analysis.browser.run import Run
from sae_jax import files
from sae_jax.errors import counted

# Page -> its template. What only a server can do (search.html, study) has none.
PAGES = {
    "overview": "overview.html", "feature": "feature.html", "gene": "entity.html",
    "term": "entity.html", "label": "entity.html", "cell": "entity.html",
}  # fmt: skip
MOST_CELLS = 20_000  # beyond it cells have no pages: they would be most of the export
TOGETHER = 50  # genes, terms or cells in a file
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def write(run: Run, out: Path) -> None:
    """Pages, scripts and documents into a new folder, whole or not at all.

    run: as it is opened: the columns of obs that it hides are not published.
    """
    about = documents.document(run, "about")
    env = assets.environment(
        mode="export", base=".", home="index.html", page="", subject="", title=about["title"],
        name="", asset=lambda name: f"static/{name}",
    )  # fmt: skip
    with files.write_aside(out) as fresh:
        (fresh / "static").mkdir(parents=True)
        for name, content in assets.static_files().items():
            (fresh / "static" / name).write_bytes(content)
        for page, template in PAGES.items():
            told = env.get_template(template).render(page=page, subject="")
            (fresh / f"{'index' if page == 'overview' else page}.html").write_text(told)
        with_cells = about["n_cells"] <= MOST_CELLS
        total = sum(1 for _ in documents.keys(run, cells=with_cells))
        with tqdm(total=total, desc="documents", bar_format=BAR) as bar:
            for shard, keys in itertools.groupby(documents.keys(run, cells=with_cells), shard_of):
                path = fresh / "data" / f"{shard}.js"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    for key in keys:
                        file.write(put(key, documents.document(run, key)))
                        bar.update()
        (fresh / "README.txt").write_text("\n".join(readme(about, with_cells)) + "\n")


def put(key: str, document: dict[str, Any]) -> str:
    """A document as a line of a script."""
    packed = base64.b64encode(wire.pack(document)).decode()
    return f'SAE.put({json.dumps(key)}, "{packed}");\n'


def shard_of(key: str) -> str:
    """The file, below data/ and without .js, that holds a document; core.js has the same rule."""
    kind, *numbers = key.split("/")
    if kind == "feature":
        return f"feature/{numbers[0]}"
    if kind in ("gene", "term", "cell"):
        return f"{kind}/{int(numbers[0]) // TOGETHER}"
    if kind == "label":
        return f"label/{numbers[0]}"
    return key


def readme(about: dict[str, Any], with_cells: bool) -> Iterator[str]:
    """What the folder is, how it is opened, and what of the cells it tells."""
    some = counted(about["n_features"], "feature")
    yield f"{about['title']}: {some} of {counted(about['n_cells'], 'cell')}."
    yield ""
    yield "Open index.html. Where a browser refuses scripts of the disk, serve the folder:"
    yield "    python -m http.server --directory ."
    yield ""
    names = [column["name"] for column in about["columns"]]
    yield f"Of the cells these columns are published: {', '.join(names) or 'none'};"
    yield "beside them the cells' names, their coordinates and the features' activations."
    if not with_cells:
        yield f"More than {MOST_CELLS} cells: they have no pages of their own here."

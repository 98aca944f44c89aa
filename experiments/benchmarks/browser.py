r"""The concept browser on a run of any size: what each page costs the server, the wire, the reader.

    python -m experiments.benchmarks.browser                    (10,000 features, 50,000 cells)
    python -m experiments.benchmarks.browser --cells=500000 --features=2000

A synthetic run is written (kept in --folder), served by a process of its own and looked at by a
Chromium without a GPU, whose drawing counts. Aims: a document within 200 ms and 1 MB, a page
that can be used within a second, the server within 500 MB.
"""

import gzip
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from analysis.browser import synthetic
from experiments import cli
from sae_jax import InputError

FLAGS = flags.FLAGS

REPEATS = 3
WARM = 1  # the first answer reads files that later ones find in memory; it is told apart
PAGES = {
    "overview": ("/", '#table[data-state="there"]', ["/data/about", "/data/features", "/data/map",
                 "/table?sort=auroc&desc=1&page=0&size=50", "/table?q=feature_99&words=process 7"]),
    "feature": ("/feature/feature_7", "canvas.cloud-points", [
                f"/data/feature/7/{part}" for part in
                ("page", "activation", "attribution", "dge", "terms", "gsea/attribution",
                 "deletion")] + ["/data/cells/coordinates/0", "/data/cells/column/0"]),
    "gene": ("/gene/GENE5", "#main table", ["/data/gene/5", "/search?q=GENE5"]),
    "term": ("/term/3", "#main table", ["/data/term/3"]),
    "label": ("/label/0/0", "#main table", ["/data/label/0/0"]),
    "cell": ("/cell/11", "#main table", ["/data/cell/11"]),
}  # fmt: skip
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader",
             "--enable-unsafe-swiftshader"]  # fmt: skip


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_integer("features", 10_000, "Of the run.", 50)
    flags.DEFINE_integer("cells", 50_000, "Of the run.", 100)
    flags.DEFINE_integer("active", 64, "Features active in a cell.", 2)
    flags.DEFINE_string("folder", None, "Where the run is kept; default: nowhere.")


def main() -> None:
    """Runs the program by its flags."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(FLAGS.folder or scratch) / f"run-{FLAGS.features}-{FLAGS.cells}"
        if not folder.exists():
            print(f"writing {folder.name}", flush=True)
            synthetic.write(folder, FLAGS.features, FLAGS.cells, k=FLAGS.active)
        state = folder.with_name(f"{folder.name}-state")
        began = time.perf_counter()
        process, address = served(folder, state)
        print(f"first start, with the index: {time.perf_counter() - began:.1f} s")
        process.terminate()
        process.wait()
        began = time.perf_counter()
        process, address = served(folder, state)
        print(f"later starts: {time.perf_counter() - began:.1f} s\n")
        try:
            measure(process, address)
        finally:
            process.terminate()
            process.wait()


def served(folder: Path, state: Path) -> tuple[subprocess.Popen, str]:
    """A server of the run, and its address."""
    command = [sys.executable, "-m", "experiments.browse", str(folder), "--port=0"]
    process = subprocess.Popen([*command, f"--state={state}"], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not (found := re.match(r"(http://localhost:\d+)/", line)):
        raise InputError(f"the server did not start: {line}{process.stdout.read()}")
    return process, found.group(1)


def measure(process: subprocess.Popen, address: str) -> None:
    """Prints the table."""
    print(f"{'page':<10}{'document':<52}{'first ms':>9}{'later ms':>9}{'kB':>8}{'gzip kB':>9}")
    for page, (_, _, documents) in PAGES.items():
        for path in documents:
            spent, size, zipped = fetched(address + path.replace(" ", "%20"))
            print(f"{page:<10}{path:<52}{spent[0]:>9.0f}{statistics.median(spent[WARM:]):>9.0f}"
                  f"{size / 1e3:>8.0f}{zipped / 1e3:>9.0f}")  # fmt: skip
    print(f"\nserver: {resident(process.pid):.0f} MB resident\n")
    if not shutil.which("chromium"):
        print("no Chromium: the reader's side is not measured")
        return
    print(f"{'page':<10}{'usable after, s':>16}{'again, s':>10}   (software GL)")
    for page, first, later in usable(address):
        print(f"{page:<10}{first:>16.2f}{later:>10.2f}")


def fetched(url: str) -> tuple[list[float], int, int]:
    """Milliseconds of each of some requests, and bytes as they are and zipped."""
    spent, body = [], b""
    for _ in range(WARM + REPEATS):
        began = time.perf_counter()
        with urllib.request.urlopen(url) as answer:
            body = answer.read()
        spent.append(1e3 * (time.perf_counter() - began))
    return spent, len(body), len(gzip.compress(body, 5))


def resident(pid: int) -> float:
    """MB of a process, with what it has read of mapped files."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(fields["VmRSS"].split()[0]) / 1e3


def usable(address: str) -> Iterator[tuple[str, float, float]]:
    """Seconds until a page shows what it is for, with an empty cache and with a filled one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=ARGUMENTS
        )
        for name, (path, selector, _) in PAGES.items():
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            spent = [shown(context, address + path, selector) for _ in range(1 + REPEATS)]
            context.close()
            yield name, spent[0], statistics.median(spent[1:])
        browser.close()


def shown(context: Any, url: str, selector: str) -> float:
    """Seconds from asking for a page to an element of it."""
    page = context.new_page()
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector(selector)
    spent = time.perf_counter() - began
    page.close()
    return spent


if __name__ == "__main__":
    cli.launch(main, define_flags)

"""The pages in a real Chromium: a walk through the explorer, a study, the export."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anndata
import numpy as np
import pandas as pd
import pytest
from matplotlib.path import Path as Polygon

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("starlette", reason="the extra `browser` is not installed")
pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium")

ROOT = Path(__file__).parents[3]
# Software GL, asked for by name: without the last two there is none in a machine without screen.
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader",
             "--enable-unsafe-swiftshader"]  # fmt: skip
N_FEATURES = 40
START: dict[str, str] = {}  # what follows a server's address: enter#token, or nothing
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 features and 300 cells, one gene of which is called like an attack."""
    from analysis.browser import synthetic

    out = tmp_path_factory.mktemp("run") / "run"
    synthetic.write(
        out, N_FEATURES, 300, k=5, n_labels=4, n_genes=120, n_terms=12, attributed=N_FEATURES, d=6
    )
    for path in out.glob("*.parquet"):
        table = pd.read_parquet(path)
        if path.stem == "deletion":  # of concepts alone
            table[table["concept"] < N_FEATURES - 8].to_parquet(path, index=False)
        if "gene" in table:
            table["gene"] = table["gene"].astype(str).replace("GENE0", HOSTILE)
            table.to_parquet(path, index=False)
    adata = anndata.read_h5ad(out / "features.h5ad")
    adata.var["kind"] = np.where(np.arange(N_FEATURES) < N_FEATURES - 8, "concept", "neuron")
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type 1": HOSTILE})
    adata.write_h5ad(out / "features.h5ad")
    angle = np.arange(N_FEATURES) / N_FEATURES * 2 * np.pi
    space = {"feature": adata.var_names, "umap_1": np.cos(angle), "umap_2": np.sin(angle)}
    pd.DataFrame(space).to_parquet(out / "feature_space.parquet", index=False)
    return out


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """A server of the run, and its address."""
    command = [sys.executable, "-m", "experiments.browse", str(folder), "--port=0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"JAX_PLATFORMS": "cpu"})  # fmt: skip
    line = process.stdout.readline()
    found = re.match(r"(http://localhost:\d+)/(\S*)", line)
    assert found, line + process.stdout.read()
    START[found.group(1)] = found.group(2)
    return process, found.group(1)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    process, address = start(folder)
    yield address
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=ARGUMENTS
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; at the end none has complained, and none has asked anybody else for anything."""
    complaints, asked, contexts = [], [], []

    def open_page(address: str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: complaints.append(f"{m.text} {m.location['url']}")
                if m.type == "error" else None)  # fmt: skip
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints
    outside = [url for url in asked if not re.match(r"(http://localhost:|file:|data:|blob:)", url)]
    assert not outside


def until(page: Any, condition: str, arg: Any = None) -> None:
    """Waits; Playwright's own way evaluates text in the page, which its policy forbids."""
    for _ in range(200):
        if page.evaluate(condition, arg):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never: {condition}")


def shown(page: Any) -> list[list[str]]:
    """The texts of the overview's table."""
    page.wait_for_selector('#table[data-state="there"]')
    rows = page.locator("#table tbody tr").all()
    return [[cell.inner_text() for cell in row.locator("th, td").all()] for row in rows]


def test_from_the_overview_to_a_feature_to_a_gene_and_back(
    opened: Callable[..., Any], address: str
) -> None:
    page = opened(address)
    rows = shown(page)
    assert len(rows) == N_FEATURES - 8, "neurons come when they are asked for"
    aurocs = [float(row[2]) for row in rows]
    assert aurocs == sorted(aurocs, reverse=True)
    page.fill("#search", "feature_7")
    page.wait_for_selector('#found a:has-text("feature_7")')
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**/feature/feature_7")
    page.wait_for_selector("canvas.cloud-points")
    gene = page.locator('#main a[href*="/gene/"]:visible').first
    gene.wait_for()
    name = gene.inner_text()
    gene.click()
    page.wait_for_url("**/gene/**")
    until(page, "(n) => document.querySelector('h1').textContent.startsWith(n)", name)
    page.wait_for_selector('a[href$="/feature/feature_7"]')
    page.go_back()
    page.wait_for_url("**/feature/feature_7")
    page.go_back()
    assert shown(page) == rows


def test_software_gl_draws_the_cells(opened: Callable[..., Any], address: str) -> None:
    page = opened(f"{address}/feature/feature_3")
    page.wait_for_selector("canvas.cloud-points")
    name = page.evaluate(
        """() => { const gl = document.createElement("canvas").getContext("webgl");
        const told = gl.getExtension("WEBGL_debug_renderer_info");
        return gl.getParameter(told ? told.UNMASKED_RENDERER_WEBGL : gl.RENDERER); }"""
    )
    assert "SwiftShader" in name
    until(
        page,
        """() => { const canvas = document.querySelector("canvas.cloud-points");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const seen = new Set(); for (let i = 0; i < data.length; i += 4)
            seen.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
        return seen.size > 20; }""",
    )


def test_the_state_is_in_the_address(opened: Callable[..., Any], address: str) -> None:
    page = opened(address)
    shown(page)
    page.fill('#filters input[name="q"]', "feature_1")
    until(page, "() => location.hash.includes('q=feature_1')")
    until(page, "() => document.querySelectorAll('#table tbody tr').length === 11")
    page.locator("#table thead button", has_text="Active cells").click()
    until(page, "() => location.hash.includes('sort=n_active')")
    before = shown(page)
    again = opened(page.url)
    assert shown(again) == before
    assert again.input_value('#filters input[name="q"]') == "feature_1"
    again.click('#filters button[type="reset"]')
    until(again, "(n) => document.querySelectorAll('#table tbody tr').length === n",
                            arg=N_FEATURES - 8)  # fmt: skip
    again.go_back()
    until(again, "() => document.querySelectorAll('#table tbody tr').length === 11")


def test_the_lasso_filters_the_table(
    opened: Callable[..., Any], address: str, folder: Path
) -> None:
    page = opened(address + "/#kind=any")
    assert len(shown(page)) == N_FEATURES
    canvas = page.locator("#map canvas.cloud-points")
    canvas.wait_for()
    page.locator("#map button", has_text="Lasso").click()
    box = canvas.bounding_box()
    left, right = box["x"] + box["width"] / 2, box["x"] + box["width"] - 2
    top, bottom = box["y"] + 2, box["y"] + box["height"] - 2
    page.mouse.move(left, top)
    page.mouse.down()
    for corner in ((left, bottom), (right, bottom), (right, top), (left, top)):
        page.mouse.move(*corner, steps=8)
    page.mouse.up()
    until(page, "() => location.hash.includes('lasso=')")
    until(page, "() => document.querySelector('#count').textContent[0] !== '4'")
    page.wait_for_selector('#table[data-state="there"]')
    names = {row[0] for row in shown(page)}
    corners = [pair.split(",") for pair in
               page.evaluate("SAE.state.get('lasso')").split(";")]  # fmt: skip
    polygon = Polygon(np.asarray(corners, float))
    space = pd.read_parquet(folder / "feature_space.parquet")
    inside = polygon.contains_points(space[["umap_1", "umap_2"]])
    assert 5 < len(names) < N_FEATURES - 5
    assert names == set(space["feature"][inside])
    selected = "() => document.querySelector('#map').textContent.match(/\\d+ selected/)"
    until(page, selected)
    page.go_back()  # the map shows what the address says
    until(page, f"() => !({selected})()")
    page.go_forward()
    until(page, selected)
    page.click('#filters button[type="reset"]')
    until(page, f"() => !({selected})()")


def test_keys_keep_their_place_as_the_table_is_drawn_anew(
    opened: Callable[..., Any], address: str
) -> None:
    page = opened(address + "/#kind=any")
    shown(page)
    focused = "() => document.activeElement.textContent"
    head = page.locator("#table thead button").nth(3)
    head.focus()
    for _ in range(2):
        before = page.evaluate("() => location.hash")
        page.keyboard.press("Enter")
        until(page, "(before) => location.hash !== before", before)
        page.wait_for_selector('#table[data-state="there"]')
        title = head.inner_text()
        until(page, f"(title) => ({focused})() === title", title)
    page.locator("[role=combobox]").fill("GENE1")
    page.wait_for_selector("[role=option]")
    page.keyboard.press("ArrowDown")
    held = page.locator("[role=combobox]").get_attribute("aria-activedescendant")
    assert page.locator(f"#{held}").get_attribute("aria-selected") == "true"


def test_names_are_text_whatever_they_say(opened: Callable[..., Any], address: str) -> None:
    page = opened(f"{address}/gene/{quote(HOSTILE, safe='')}")
    page.wait_for_selector("text=onerror")
    until(page, "(n) => document.querySelector('h1').textContent.startsWith(n)", HOSTILE)
    page.goto(f"{address}/#kind=any")
    shown(page)
    page.goto(f"{address}/search?q={quote(HOSTILE, safe='')}")
    page.wait_for_selector("#results a")
    assert page.title() != "1"
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "path", ["/", "/feature/feature_3", "/gene/GENE5", "/term/2", "/label/0/0", "/cell/4", "/study"]
)
def test_nothing_sticks_out(
    opened: Callable[..., Any], address: str, path: str, width: int
) -> None:
    page = opened(address + path, viewport={"width": width, "height": 800})
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unlabelled = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, canvas[tabindex]")]
        .filter((each) => each.type !== "hidden" && !each.labels?.length && !each.textContent.trim()
            && !each.getAttribute("aria-label")).map((each) => each.outerHTML)"""
    )
    assert unlabelled == []


def test_what_is_absent_says_which_command_makes_it(
    opened: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for name in ("attribution", "samples", "gsea_attribution", "deletion", "dge"):
        (bare / f"{name}.parquet").unlink(missing_ok=True)
    process, address = start(bare)
    try:
        page = opened(f"{address}/feature/feature_3")
        page.wait_for_selector(".absent code")
        assert any("sae-jax concepts" in text for text in page.locator(".absent").all_inner_texts())
    finally:
        process.terminate()
        process.wait()


def test_a_study_of_six_items_closed_in_the_middle(
    opened: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    state = f"--state={tmp_path / 'state'}"

    def link(*flags: str) -> str:
        command = [sys.executable, "-m", "experiments.browse", str(folder), state, "--raters=ann"]
        made = subprocess.run(
            [*command, *flags], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return re.search(r"#(\S+)", made.stdout).group(1)

    token = link("--new_study=six", "--concepts=3", "--neurons=2", "--repeats=1")
    process, address = start(folder, state)
    typed = {}
    try:
        page = opened(f"{address}/study/enter#{token}")
        page.click('a[href*="/study/item/"]')
        typed |= answer(page, 3)
        page.context.close()  # in the middle
        process.kill()
        process.wait()
        assert link("--new_links=six") != token  # lost again: the next one opens it
        token = link("--new_links=six")
        process, address = start(folder, state)
        page = opened(f"{address}/study/enter#{token}")
        page.wait_for_selector("text=3")
        page.locator(
            'a[href*="/study/item/"]', has_text=re.compile("on|next|ontinue")
        ).first.click()
        typed |= answer(page, 3)
        bare = opened(address)
        bare.wait_for_url("**/enter")
        assert bare.request.get(f"{address}/data/about").status == 401
        owner = opened(f"{address}/{START[address]}")
        owner.wait_for_selector("#table tbody tr")
        rows = owner.request.get(f"{address}/study/owner/six/answers.csv").text()
    finally:
        process.terminate()
        process.wait()
    exported = {row["item"]: row for row in csv.DictReader(io.StringIO(rows))}
    assert len(typed) == len(exported) == 6
    for item, text in typed.items():
        assert text in exported[item].values()


def answer(page: Any, count: int) -> dict[str, str]:
    """Answers so many items, by pointer and keys; what was typed, by item."""
    typed = {}
    for _ in range(count):
        page.wait_for_selector('#main input[type="radio"]')
        item = page.url.rsplit("/", 1)[1]
        for name in sorted(
            {each.get_attribute("name") for each in page.locator('input[type="radio"]').all()}
        ):
            page.locator(f'input[type="radio"][name="{name}"]').last.check()
        typed[item] = f"told of {item}, <b>\u00fc</b>"
        page.locator("textarea:visible, input[type=text]:visible").last.fill(typed[item])
        page.wait_for_selector("text=/saved at/")
        page.get_by_text("Save and next").click()
        until(page, "(item) => !location.pathname.endsWith(item)", arg=item)
    return typed


def test_the_export_shows_the_same_numbers(
    opened: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pages"
    flags = [f"--state={tmp_path / 's'}", "--columns=cell_type"]
    subprocess.run(
        [sys.executable, "-m", "experiments.browse", str(folder), *flags, f"--export={out}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    process, address = start(folder, *flags)
    try:
        compare(opened, address, out)
    finally:
        process.terminate()
        process.wait()
    published = (out / "README.txt").read_text()
    assert "cell_type" in published
    assert "donor" not in published
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for hidden in (b"donor 1", b"studies", b"sae_owner"):
        assert hidden not in everything


def compare(opened: Callable[..., Any], address: str, out: Path) -> None:
    """The overview in several states, and all tables of a feature."""
    for state in ("", "#sort=density&desc=0&q=feature_2", "#n_active_min=20&kind=any&sort=label"):
        live, copy = opened(f"{address}/{state}"), opened(f"file://{out}/index.html{state}")
        assert shown(copy) == shown(live)
    live, copy = opened(f"{address}/feature/feature_5"), opened(f"file://{out}/feature.html?i=5")
    tables = []
    for page in (live, copy):
        page.wait_for_selector("canvas.cloud-points")
        for _ in range(12):
            page.mouse.wheel(0, 700)
            page.wait_for_timeout(60)
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(500)
        tables.append([table.inner_text() for table in page.locator("#main table").all()])
    assert len(tables[0]) > 5
    assert tables[0] == tables[1]

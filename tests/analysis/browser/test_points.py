"""The browser's point clouds, plots and tables in real Chromium, with software GL asked for."""

import base64
import functools
import http.server
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

import analysis.browser

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
plotly = pytest.importorskip("plotly", reason="plotly is not installed")

STATIC = Path(analysis.browser.__file__).parent / "static"
SCRIPTS = ["core", "tables", "colours", "pictures", "renderers", "points", "plots"]
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'; form-action 'self'"
)
SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PAGE = """<!doctype html><html><head><meta charset="utf-8"><link rel="icon" href="data:,">
<link rel="stylesheet" href="static/style.css"><link rel="stylesheet" href="static/components.css">
</head><body data-mode="live" data-base="" data-plotly="static/plotly.min.js"><main>
<div id="place"></div></main>SCRIPTS<script src="page.js"></script></body></html>"""
EVIL = '<img src=x onerror="window.evil = 1">'
PAGE_JS = """
try { eval("window.evaluated = 1"); } catch { window.refused = 1; }
window.make = (data, more) => {
  window.told = [];
  const array = (Kind, values) => Kind.from(values);
  const colour = { ...more.colour };
  const kinds = { values: Float32Array, rows: Uint32Array, codes: Uint8Array };
  for (const name in kinds) if (colour[name]) colour[name] = array(kinds[name], colour[name]);
  window.cloud = SAE.points(document.querySelector("#place"), {
    x: array(Uint16Array, data.x), x_range: [0, 10],
    y: array(Uint16Array, data.y), y_range: [-5, 5],
    label: "Cells", name: "cells", height: 400, ...more, colour,
    tooltip: (row) => [more.text || "a cell", ["row", row]],
    csv: () => [["row", "x"], data.x.map((value, row) => [row, value])],
    on: {
      lasso: (rows, polygon) => window.told.push({ rows: rows && [...rows], polygon }),
      pick: (row) => window.told.push({ pick: row }),
      change: (state) => { window.changed = state; },
    },
  });
};
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("site")
    tags = "".join(f'<script src="static/{name}.js"></script>' for name in SCRIPTS)
    (root / "index.html").write_text(PAGE.replace("SCRIPTS", tags), encoding="utf-8")
    (root / "page.js").write_text(PAGE_JS, encoding="utf-8")
    shutil.copytree(STATIC, root / "static")
    shutil.copy(Path(plotly.__file__).parent / "package_data/plotly.min.js", root / "static")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("Content-Security-Policy", POLICY)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator["sync_api.Browser"]:
    found = shutil.which("chromium")
    if not found:
        pytest.skip("there is no chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", *SOFTWARE_GL]
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: "sync_api.Browser", site: str) -> Iterator["sync_api.Page"]:
    """A page whose every request and complaint is checked when the test is over."""
    page = chromium.new_page(viewport={"width": 900, "height": 700}, color_scheme="light")
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(site)
    yield page
    assert [url for url in asked if not url.startswith((site, f"blob:{site}", "data:"))] == []
    assert [text for text in complaints if "unsafe-eval" not in text] == []
    # The page itself tried: the policy is in force, and what works here works under it.
    assert page.evaluate("[window.refused, window.evaluated, window.evil]") == [1, None, None]
    page.close()


def cells(n: int = 500) -> dict:
    rng = np.random.default_rng(0)
    return {axis: rng.integers(0, 65536, n).tolist() for axis in "xy"}


def draw(page: "sync_api.Page", data: dict, **more: object) -> None:
    page.evaluate("([data, more]) => window.make(data, more)", [data, more])
    page.wait_for_selector(".cloud[data-drawn]")


def pixels(page: "sync_api.Page") -> np.ndarray:
    """What the canvas of the points holds, as bytes [height, width, RGB]."""
    url = page.evaluate("cloud.canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def corner(page: "sync_api.Page") -> np.ndarray:
    box = page.locator("canvas.cloud-points").bounding_box()
    return np.array([box["x"], box["y"]])


def places(page: "sync_api.Page", n: int) -> np.ndarray:
    """Where the points are: CSS pixels of the canvas [n, 2], of the page's own arithmetic."""
    return np.array(page.evaluate("n => Array.from({length: n}, (_, i) => cloud.where(i))", n))


def wait_still(page: "sync_api.Page") -> None:
    """Until what has been asked for is drawn: clouds draw themselves once a frame."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def until(page: "sync_api.Page", condition: str) -> None:
    """Until a condition holds; Playwright's own waiting needs eval, which the policy forbids."""
    for _ in range(1500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never: {condition}")


def test_webgl_draws_each_point_where_it_is_in_its_colour(page: "sync_api.Page") -> None:
    # Corners of the range, a pair in one place, and a cell that is not active.
    data = {"x": [0, 65535, 0, 32768, 32768, 50000], "y": [0, 0, 65535, 32768, 32768, 20000]}
    colour = {"kind": "number", "rows": [0, 1, 3, 4], "values": [1, 2, 4, 3], "low": 1, "high": 4}
    draw(page, data, colour=colour)
    assert page.evaluate("cloud.element.dataset.renderer") == "webgl"
    assert "SwiftShader" in page.evaluate("SAE.renderer().device")
    image = pixels(page)
    expected = page.evaluate("[0, 1/3, 1, 2/3].map(t => SAE.colours.sequential(t, false))")
    grey = page.evaluate("SAE.colours.parsed(SAE.colours.variable('--line'))")
    at = places(page, 6)
    shown = np.array([image[int(y), int(x)] for x, y in at], int)
    # The pair shows the higher of the two, though it comes first.
    wanted = np.array([expected[0], expected[1], grey, expected[2], expected[2], grey])
    np.testing.assert_allclose(shown, wanted, atol=3)
    assert (image[5, 5] == 255).all()
    # Both directions keep one scale, and the range is centred with room around it.
    width, height = image.shape[1], image.shape[0]
    side = height / 1.06
    np.testing.assert_allclose(at[0], [(width - side) / 2, (height + side) / 2], atol=1)
    np.testing.assert_allclose(at[1] - at[0], [side, 0], atol=1)


COLOURS = {
    "flat": {"kind": "flat"},
    "log": {"kind": "number", "values": [-1.0, 0.0, *np.geomspace(0.01, 9, 498)], "log": True},
    "category": {
        "kind": "category", "codes": (np.arange(500) % 4).tolist(),
        "categories": ["T cell", "B cell", "NK"], "missing": 3, "hidden": ["NK"],
    },
}  # fmt: skip


def test_the_canvas_draws_the_same_picture_where_webgl_is_missing(
    page: "sync_api.Page", site: str
) -> None:
    drawn = {}
    for name, colour in COLOURS.items():
        draw(page, cells(), colour=colour)
        drawn[name] = pixels(page)
    page.add_init_script(
        """const first = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
          return kind.startsWith("webgl") ? null : first.call(this, kind, ...rest);
        };"""
    )
    page.goto(site)
    for name, colour in COLOURS.items():
        draw(page, cells(), colour=colour)
        assert page.evaluate("cloud.element.dataset.renderer") == "canvas"
        apart = np.abs(pixels(page).astype(int) - drawn[name]).max(axis=2)
        assert len(np.unique(drawn[name].reshape(-1, 3), axis=0)) > 5
        # Edges are rounded apart by a few levels, and nothing else.
        assert np.quantile(apart, 0.999) <= 16
        assert (apart > 64).sum() <= 5


def test_a_hidden_category_is_neither_drawn_nor_found(page: "sync_api.Page") -> None:
    data = {"x": [20000, 40000, 60000], "y": [30000, 30000, 30000]}
    colour = {"kind": "category", "codes": [0, 1, 2], "categories": ["a", "b"], "missing": 2}
    draw(page, data, colour=colour)
    square = [[0, -5], [10, -5], [10, 5], [0, 5]]
    assert page.evaluate("p => [...cloud.select(p)]", square) == [0, 1, 2]
    page.get_by_role("button", name="b 1").click()
    wait_still(page)
    image, at = pixels(page), places(page, 3).astype(int)
    assert [tuple(image[y, x]) == (255, 255, 255) for x, y in at] == [False, True, False]
    assert page.evaluate("p => [...cloud.select(p)]", square) == [0, 2]
    assert page.evaluate("([x, y]) => cloud.pick(x, y)", at[1].tolist()) is None
    assert page.evaluate("([x, y]) => cloud.pick(x, y)", at[2].tolist()) == 2
    assert page.evaluate("cloud.state().hidden") == ["b"]


def test_lasso_returns_the_points_inside(page: "sync_api.Page") -> None:
    data = cells()
    draw(page, data)
    polygon = [[1, -4], [8, -3], [4, 0], [9, 4], [2, 3], [5, 1]]  # neither convex nor simple
    xy = np.column_stack([np.array(data["x"]) / 6553.5, np.array(data["y"]) / 6553.5 - 5])
    expected = np.flatnonzero(Outline([*polygon, polygon[0]]).contains_points(xy))
    assert 50 < len(expected) < 450
    np.testing.assert_array_equal(page.evaluate("p => [...cloud.select(p)]", polygon), expected)

    at = places(page, 500)
    corners = np.array([[300, 100], [600, 120], [560, 330], [320, 300]])
    button = page.get_by_role("button", name="Lasso: draw around points to select them")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    for i, place in enumerate([*corners, corners[0]]):
        page.mouse.move(*(corner(page) + place), steps=3)
        if i == 0:
            page.mouse.down()
    page.mouse.up()
    told = page.evaluate("told.at(-1)")
    clear = Outline(corners).contains_points(at, radius=-1)
    loose = Outline(corners).contains_points(at, radius=1)
    # Which way the radius counts is the orientation's; either way the answer lies between.
    sure, maybe = (set(np.flatnonzero(part)) for part in sorted([clear, loose], key=np.sum))
    assert sure <= set(told["rows"]) <= maybe
    assert len(sure) > 20
    assert button.get_attribute("aria-pressed") == "false"
    page.get_by_role("button", name="Clear the selection").click()
    assert page.evaluate("told.at(-1)") == {"rows": None, "polygon": None}


def test_hover_finds_the_nearest_point_and_shows_text_as_text(page: "sync_api.Page") -> None:
    draw(page, cells(), text=EVIL)
    at = places(page, 500)
    rng = np.random.default_rng(1)
    for spot in rng.uniform([260, 40], [620, 360], (40, 2)):
        found = page.evaluate("([x, y]) => cloud.pick(x, y)", spot.tolist())
        distance = np.hypot(*(at - spot).T)
        if found is None:
            assert distance.min() > 8
        else:
            assert distance[found] == pytest.approx(distance.min(), abs=1e-6)
            assert distance.min() < 12
    row = int(np.argmin(np.hypot(*(at - [400, 200]).T)))
    page.mouse.move(*(corner(page) + at[row]))
    page.wait_for_selector(f'.cloud[data-hovered="{row}"]')
    assert page.locator(".cloud-tip").inner_text().split("\n") == [EVIL, f"row {row}"]
    page.mouse.click(*(corner(page) + at[row]))
    assert page.evaluate("told.at(-1)") == {"pick": row}


def test_moving_by_keys_wheel_and_drag(page: "sync_api.Page") -> None:
    draw(page, cells())
    page.locator("canvas.cloud-points").focus()
    first = places(page, 500)
    page.keyboard.press("+")
    wait_still(page)
    size = np.array(page.evaluate("[cloud.canvas.clientWidth, cloud.canvas.clientHeight]"))
    middle = size / 2
    np.testing.assert_allclose(places(page, 500), middle + 1.5 * (first - middle), atol=1e-6)
    page.keyboard.press("ArrowRight")
    moved = places(page, 500)
    np.testing.assert_allclose(moved, middle + 1.5 * (first - middle) - [60, 0], atol=1e-6)
    page.mouse.move(*(corner(page) + np.array([500, 200])))
    page.mouse.down()
    page.mouse.move(*(corner(page) + np.array([470, 180])))
    page.mouse.up()
    np.testing.assert_allclose(places(page, 500), moved - [30, 20], atol=1e-6)
    page.keyboard.press("0")
    np.testing.assert_allclose(places(page, 500), first, atol=1e-6)
    page.mouse.wheel(0, -30)  # the pointer rests where the drag ended
    until(page, "changed.view && changed.view.split(',')[2] > 1.05")
    spot = np.array([470, 180])
    np.testing.assert_allclose(places(page, 500) - spot, (first - spot) * np.exp(0.1), atol=0.1)
    view = page.evaluate("cloud.state().view")
    before = places(page, 500)
    page.evaluate("cloud.restore(null)")
    page.evaluate("view => cloud.restore(view)", view)
    np.testing.assert_allclose(places(page, 500), before, atol=0.05)


def test_downloads(page: "sync_api.Page") -> None:
    draw(page, cells(), colour=COLOURS["category"], axes={"x": "fold <change>", "y": "p & q"})

    def download(kind: str) -> bytes:
        with page.expect_download() as waiting:
            page.get_by_role("button", name=f"Download as {kind}").click()
        assert waiting.value.suggested_filename == f"cells.{kind.lower()}"
        return Path(waiting.value.path()).read_bytes()

    image = Image.open(io.BytesIO(download("PNG"))).convert("RGB")
    blue = np.array(page.evaluate("SAE.colours.category(0)"))
    assert (np.asarray(image).reshape(-1, 3) == blue).all(axis=1).sum() > 500
    root = ElementTree.fromstring(download("SVG"))
    text = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"fold <change>", "p & q", "T cell", "missing"} <= set(text)
    assert "NK" not in text  # hidden
    raster = next(root.iter("{http://www.w3.org/2000/svg}image")).get("href")
    assert raster.startswith("data:image/png;base64,")
    table = pd.read_csv(io.BytesIO(download("CSV")))
    np.testing.assert_array_equal(table["x"], cells()["x"])


def test_the_range_and_scale_are_the_users(page: "sync_api.Page") -> None:
    values = [0.0, 1.0, 10.0, 100.0]
    data = {"x": [0, 20000, 40000, 60000], "y": [0, 20000, 40000, 60000]}
    draw(page, data, colour={"kind": "number", "values": values, "title": "activation"})

    def shown() -> list:
        image, at = pixels(page), places(page, 4).astype(int)
        return [image[y, x].tolist() for x, y in at]

    def expected(places_: list[float]) -> list:
        return page.evaluate("p => p.map(t => SAE.colours.sequential(t, false))", places_)

    np.testing.assert_allclose(shown(), expected([0, 0.01, 0.1, 1]), atol=3)
    page.get_by_text("Colour range and scale").click()
    page.get_by_label("logarithmic").check()
    wait_still(page)
    np.testing.assert_allclose(shown(), expected([0, 0, 0.5, 1]), atol=3)
    page.get_by_label("to", exact=True).fill("10")
    page.get_by_label("to", exact=True).press("Enter")
    wait_still(page)
    np.testing.assert_allclose(shown(), expected([0, 0, 1, 1]), atol=3)
    assert page.evaluate("changed.range") == [1, 10]
    page.get_by_label("from", exact=True).fill("20")
    page.get_by_label("from", exact=True).press("Enter")
    assert page.get_by_label("from", exact=True).get_attribute("aria-invalid") == "true"
    assert page.evaluate("cloud.state().range") == [1, 10]


def test_one_context_serves_all_and_may_be_lost(page: "sync_api.Page", site: str) -> None:
    page.add_init_script(
        """const first = HTMLCanvasElement.prototype.getContext; window.contexts = [];
        HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
          const made = first.call(this, kind, ...rest);
          if (kind.startsWith("webgl")) window.contexts.push(made);
          return made;
        };"""
    )
    page.goto(site)
    draw(page, cells(), colour=COLOURS["flat"])
    # A small cloud after a large one: it is copied from its own corner of the shared canvas.
    data = {"x": [0, 65535], "y": [0, 65535]}
    two = {"kind": "category", "codes": [0, 1], "categories": ["a", "b"]}
    draw(page, data, colour=two, height=150)
    expected = page.evaluate("[0, 1].map(SAE.colours.category)")
    shown = [pixels(page)[int(y), int(x)].tolist() for x, y in places(page, 2)]
    assert shown == expected
    draw(page, cells(), colour=COLOURS["category"])
    assert page.evaluate("contexts.length") == 1
    before = pixels(page)
    page.evaluate("contexts[0].getExtension('WEBGL_lose_context').loseContext()")
    page.evaluate("cloud.redraw()")
    page.wait_for_selector('.cloud[data-renderer="canvas"]')
    apart = np.abs(pixels(page).astype(int) - before).max(axis=2)
    assert (apart > 64).mean() < 1e-4


def test_ticks_and_many_categories(page: "sync_api.Page") -> None:
    ticks = functools.partial(page.evaluate, "a => SAE.colours.ticks(...a)")
    assert ticks([-0.3, 1.02, 5]) == [0, 0.5, 1]
    assert ticks([0, 250, 5]) == [0, 50, 100, 150, 200, 250]
    assert ticks([0.02, 300, 5, True]) == pytest.approx([0.1, 1, 10, 100])
    found = page.evaluate(
        """() => { const codes = [];
        for (let i = 0; i < 40; i++) for (let j = 0; j <= i; j++) codes.push(i);
        codes.push(40); const made = SAE.colours.legend({codes, missing: 40,
        categories: Array.from({length: 40}, (_, i) => `type ${i}`)});
        return [made.entries.map(e => [e.name, e.n]), Array.from(made.slots), codes]; }"""
    )
    entries, slots, codes = found
    assert entries[:24] == [[f"type {i}", i + 1] for i in range(16, 40)]
    assert entries[24:] == [["16 others", sum(range(1, 17))], ["missing", 1]]
    expected = [25 if code == 40 else code - 16 if code >= 16 else 24 for code in codes]
    assert slots == expected


def test_tables_sort_page_and_download(page: "sync_api.Page") -> None:
    rows = [{"name": f"gene {i}", "q": 10.0**-i} for i in range(30)]
    rows += [{"name": EVIL, "q": None}, {"name": "=1+1", "q": 0.5}]
    page.evaluate(
        """rows => SAE.table(document.querySelector("#place"), [
        { name: "name", title: "Gene" },
        { name: "q", title: "q", kind: "number", first: "low", text: SAE.small }],
        rows, { page: 10, file: "genes" })""",
        rows,
    )
    head = page.get_by_role("columnheader", name="q")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator("tbody td.number").all_inner_texts()[:2] == ["1e-29", "1e-28"]
    head.get_by_role("button").click()
    assert page.locator("tbody td.number").all_inner_texts()[:3] == ["1", "0.5", "0.1"]
    page.get_by_role("button", name="Next rows").click()
    page.get_by_role("button", name="Next rows").click()
    page.get_by_role("button", name="Next rows").click()
    assert page.get_by_role("status").inner_text() == "31 to 32 of 32"
    # What is missing comes last whichever way, and what looks like a tag is text.
    assert page.locator("tbody tr").last.locator("td").all_inner_texts() == [EVIL, "–"]
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download as CSV").click()
    table = pd.read_csv(waiting.value.path())
    assert table["name"][1] == "'=1+1"  # no spreadsheet runs it
    assert table["q"].tolist()[:2] == [1, 0.5]
    assert table["q"].isna().tolist() == [False] * 31 + [True]


def test_plots_draw_under_the_policy(page: "sync_api.Page") -> None:
    rows = [
        {"name": EVIL, "value": 2, "told": ["<b>a</b> description"]},
        {"name": "LYZ", "value": -1},
    ]
    page.evaluate(
        """rows => SAE.plots.bars(document.querySelector("#place"), rows, {
        label: "Attribution", name: "attribution", x: "attribution",
        onpick: row => { window.picked = row.name; } })""",
        rows,
    )
    page.wait_for_selector(".plot .bars .point")
    ticks = page.locator(".plot .ytick text").all_text_contents()
    assert sorted(ticks) == sorted([EVIL, "LYZ"])
    box = page.locator(".plot .bars .point path").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    # What a file says is shown as it is written: plotly would make tags of it.
    assert page.locator(".hoverlayer text").text_content() == f"{EVIL}2<b>a</b> description"
    page.mouse.down()
    page.mouse.up()
    until(page, "window.picked")
    assert page.evaluate("picked") == EVIL
    for kind in ("PNG", "SVG", "CSV"):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=f"Download as {kind}").click()
        made = Path(waiting.value.path()).read_bytes()
        if kind == "PNG":
            assert Image.open(io.BytesIO(made)).size[0] > 800
        elif kind == "SVG":
            assert ElementTree.fromstring(made).tag.endswith("svg")
        else:
            assert pd.read_csv(io.BytesIO(made))["value"].tolist() == [2, -1]
    edges, counts = np.arange(5.0), [3, 1, 0, 2]
    page.evaluate(
        """([edges, counts]) => SAE.plots.histogram(document.querySelector("#place"), edges, counts,
        { label: "h", name: "h", x: "activation", y: "cells" })""",
        [edges.tolist(), counts],
    )
    bars = page.locator(".plot").last.locator(".bars .point path")
    bars.first.wait_for(state="attached")
    heights = [bars.nth(i).evaluate("bar => bar.getBBox().height") for i in range(4)]
    np.testing.assert_allclose(np.array(heights) / heights[1], counts, rtol=0.01)

/* A cloud of points in the plane: cells, features, the genes of a volcano.

   SAE.points(element, options) fills `element` and returns the cloud. Coordinates are uint16 over
   their ranges and go to the GPU as they are (renderers.js). What a user chooses (range, scale, hidden
   categories, lasso, view) is told through options.on and may be handed in again. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});
  const C = () => SAE.colours;
  const UNIT = 65535;
  const NEAR = 8; // CSS pixels from the pointer at which a point is still meant
  const MARGIN = { left: 54, right: 10, top: 8, bottom: 42 };
  const NONE = { left: 0, right: 0, top: 0, bottom: 0 };
  let number = 0;

  /** Numbers as uint16 over their range: {codes, range}; not-a-number is refused. */
  function quantise(values) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (!Number.isFinite(value)) throw new Error("a coordinate is not a finite number");
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (!(low <= high)) [low, high] = [0, 1];
    const span = high - low || 1;
    return { codes: Uint16Array.from(values, (value) => Math.round(((value - low) / span) * UNIT)), range: [low, low + span] };
  }

  /** Rows by the 256 x 256 squares that they lie in: {starts [65537], rows}, by a counting sort. */
  function gridOf(x, y) {
    const starts = new Uint32Array(UNIT + 2);
    for (let i = 0; i < x.length; i++) starts[((y[i] >> 8) << 8 | (x[i] >> 8)) + 1]++;
    for (let i = 1; i < starts.length; i++) starts[i] += starts[i - 1];
    const next = starts.slice();
    const rows = new Uint32Array(x.length);
    for (let i = 0; i < x.length; i++) rows[next[(y[i] >> 8) << 8 | (x[i] >> 8)]++] = i;
    return { starts, rows };
  }

  /** Rows inside a polygon [[x, y], ...] in units of uint16, ascending, by the even-odd rule. */
  function inside(x, y, polygon) {
    const xs = polygon.map((point) => point[0]);
    const ys = polygon.map((point) => point[1]);
    const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    const [y0, y1] = [Math.min(...ys), Math.max(...ys)];
    const found = [];
    for (let row = 0; row < x.length; row++) {
      const [px, py] = [x[row], y[row]];
      if (px < x0 || px > x1 || py < y0 || py > y1) continue;
      let within = false;
      for (let i = 0, j = xs.length - 1; i < xs.length; j = i++) {
        if (ys[i] > py !== ys[j] > py && px < ((xs[j] - xs[i]) * (py - ys[i])) / (ys[j] - ys[i]) + xs[i]) {
          within = !within;
        }
      }
      if (within) found.push(row);
    }
    return Uint32Array.from(found);
  }

  const gather = (array, rows) => {
    const made = new array.constructor(rows.length);
    for (let i = 0; i < rows.length; i++) made[i] = array[rows[i]];
    return made;
  };

  /** A cloud of points.

      options: x, y (Uint16Array), x_range, y_range; label (what it is, for those who do not see it),
      describe() -> text alternative; name (of downloaded files); height (CSS pixels, or a CSS length);
      axes: {x: title, y: title} or nothing (then both directions keep one scale); labels: [{text, row} or {text, at: [x, y] in data
      coordinates}], drawn where they fit, the first first; colour (see `colour`); highlight (rows, see `highlight`); tooltip(row) -> [text or [name, value]]; csv() ->
      [columns, rows]; view: text of an earlier view; lasso: polygon of an earlier lasso; on: {lasso(rows
      or null, polygon), pick(row), change({range, log, hidden, view})}: a lasso is offered where
      on.lasso is; what is null in change is as at first. */
  function points(element, options) {
    const on = options.on || {};
    const id = `cloud-${(number += 1)}`;
    const axes = options.axes || null;
    const margin = axes ? MARGIN : NONE;
    let { x, y, x_range: xRange, y_range: yRange } = options;
    let spec, legend, shown, top, isTop, layers, held;
    let grid = null;
    let highlighted = null;
    let labels = options.labels || [];
    let emphasised = null;
    let hovered = null;
    let lassoing = false;
    let polygon = null; // [[x, y], ...] in data coordinates
    let size = [0, 0];
    let frame = 0;
    let pause = 0;
    let moving = false;
    let view = { cx: 0.5, cy: 0.5, zoom: 1 };

    /* The parts on the page */

    const canvas = SAE.element("canvas", {
      class: "cloud-points", tabindex: "0", role: "img", "aria-label": options.label, "aria-describedby": `${id}-text`,
    });
    const overlay = SAE.element("canvas", { class: "cloud-overlay", "aria-hidden": "true" });
    const tip = SAE.element("div", { class: "cloud-tip", hidden: true });
    const stage = SAE.element("div", { class: "cloud-stage" }, [canvas, overlay, tip]);
    const alternative = SAE.element("p", { class: "hidden", id: `${id}-text` });
    const key = SAE.element("div", { class: "cloud-legend" });
    const told = SAE.element("span", { class: "note", role: "status" });
    const tool = (text, label, act) =>
      SAE.element("button", { type: "button", title: label, "aria-label": label, onclick: act }, text);
    const lassoButton = tool("Lasso", "Lasso: draw around points to select them", () => setLassoing(!lassoing));
    lassoButton.setAttribute("aria-pressed", "false");
    const clearButton = tool("Clear", "Clear the selection", () => select(null));
    const tools = SAE.element("div", { class: "cloud-tools", role: "group", "aria-label": `${options.label}: view` }, [
      tool("+", "Zoom in", () => zoom(1.5)),
      tool("−", "Zoom out", () => zoom(1 / 1.5)),
      tool("Fit", "Show all points", home),
      on.lasso ? lassoButton : null,
      on.lasso ? clearButton : null,
      told,
      SAE.downloads(options.name || "points", {
        png: () => png(),
        svg: () => svg(),
        ...(options.csv ? { csv: options.csv } : {}),
      }),
    ]);
    clearButton.hidden = true;
    stage.style.height = typeof options.height === "string" ? options.height : `${options.height || 420}px`;
    const whole = SAE.element("div", { class: axes ? "cloud with-axes" : "cloud" }, [tools, stage, key, alternative]);
    element.replaceChildren(whole);

    /* Where things lie: data, units (0 to 1 over the range), CSS pixels of the inner canvas */

    const inner = () => [
      Math.max(1, size[0] - margin.left - margin.right),
      Math.max(1, size[1] - margin.top - margin.bottom),
    ];
    function sight() {
      const [width, height] = inner();
      let [halfX, halfY] = [0.53 / view.zoom, 0.53 / view.zoom];
      if (!axes) {
        const [spanX, spanY] = [xRange[1] - xRange[0] || 1, yRange[1] - yRange[0] || 1];
        const k = Math.min(width / spanX, height / spanY);
        [halfX, halfY] = [(halfX * width) / (k * spanX), (halfY * height) / (k * spanY)];
      }
      return [view.cx - halfX, view.cx + halfX, view.cy - halfY, view.cy + halfY];
    }
    function toPixels(ux, uy, [x0, x1, y0, y1] = sight()) {
      const [width, height] = inner();
      return [((ux - x0) / (x1 - x0)) * width, (1 - (uy - y0) / (y1 - y0)) * height];
    }
    function toUnits(px, py, [x0, x1, y0, y1] = sight()) {
      const [width, height] = inner();
      return [x0 + (px / width) * (x1 - x0), y0 + (1 - py / height) * (y1 - y0)];
    }
    const toData = ([ux, uy]) => [xRange[0] + ux * (xRange[1] - xRange[0]), yRange[0] + uy * (yRange[1] - yRange[0])];
    const fromData = ([dx, dy]) => [(dx - xRange[0]) / (xRange[1] - xRange[0]), (dy - yRange[0]) / (yRange[1] - yRange[0])];

    function radius() {
      const [width, height] = inner();
      const least = axes && x.length < 50000 ? 1.7 : 0.9; // a volcano's few outliers must be seen
      const base = Math.min(3, Math.max(least, 0.3 * Math.sqrt((width * height) / Math.max(1, x.length))));
      return Math.min(7, base * view.zoom ** 0.35);
    }
    const topRadius = () => (top ? 1.3 * radius() + 0.5 : radius());

    /* Colours */

    /** Colours the points: {kind: "flat"}, {kind: "number", title, values (per point, or per row of
        `rows`), rows, low, high, log, positive (start at 0)} or {kind: "category", title, codes,
        categories, missing, colours (CSS, by code), hidden: names}; low, high, log and hidden are
        what was chosen earlier. */
    function colour(next) {
      spec = { kind: "flat", ...next };
      legend = spec.kind === "category" ? C().legend(spec) : null;
      if (legend) {
        const hidden = new Set(spec.hidden || []);
        legend.entries.forEach((each) => (each.hidden = hidden.has(each.name)));
      }
      if (spec.kind === "number") limits();
      arrange();
      drawLegend();
      redraw();
    }

    function limits() {
      let [low, high, least] = [Infinity, -Infinity, Infinity];
      for (const value of spec.values) {
        if (Number.isNaN(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
        if (value > 0 && value < least) least = value;
      }
      if (!(low <= high)) [low, high] = [0, 1];
      if (spec.positive) low = Math.min(0, low);
      if (low === high) high = low + (Math.abs(low) || 1);
      spec.least = least;
      shown = { low, high };
      spec.log = Boolean(spec.log) && least < Infinity;
      if (!(spec.low < spec.high)) [spec.low, spec.high] = wholeRange();
      if (spec.log && spec.low <= 0) spec.low = spec.least;
    }
    const wholeRange = () => [spec.log ? spec.least : shown.low, shown.high];

    /** Rows to draw on top and larger, the others grey; null: none. */
    function highlight(rows) {
      highlighted = rows;
      arrange();
      redraw();
    }

    // What lies on top: rows that have a value and are highlighted. Null: every point.
    function arrange() {
      let rows = null;
      let values = null;
      if (spec.kind === "number") {
        rows = spec.rows || null;
        values = spec.values instanceof Float32Array ? spec.values : Float32Array.from(spec.values);
        const keep = [];
        for (let i = 0; i < values.length; i++) if (!Number.isNaN(values[i])) keep.push(i);
        if (keep.length < values.length) {
          rows = rows ? gather(rows, keep) : Uint32Array.from(keep);
          values = gather(values, keep);
        }
      } else if (spec.kind === "category") {
        values = legend.slots;
      }
      if (highlighted) {
        const wanted = new Uint8Array(x.length);
        for (const row of highlighted) wanted[row] = 1;
        const keep = [];
        const n = rows ? rows.length : x.length;
        for (let i = 0; i < n; i++) if (wanted[rows ? rows[i] : i]) keep.push(i);
        if (values) values = gather(values, keep);
        rows = rows ? gather(rows, keep) : Uint32Array.from(keep);
      }
      if (rows && spec.kind === "number") {
        const order = Uint32Array.from(rows.keys()).sort((a, b) => values[a] - values[b]); // the highest on top
        rows = gather(rows, order);
        values = gather(values, order);
      }
      top = rows;
      isTop = null;
      if (top) {
        isTop = new Uint8Array(x.length);
        for (const row of top) isTop[row] = 1;
      }
      layers = { x: top ? gather(x, top) : x, y: top ? gather(y, top) : y, values };
      const kept = new Set([x, y, layers.x, layers.y, values]);
      SAE.renderer().forget((held || []).filter((array) => !kept.has(array)));
      held = [...kept];
    }

    const grey = () => C().parsed(C().variable("--line"));
    function palette() {
      if (spec.kind === "number") return C().sequentialPalette(C().dark());
      if (spec.kind === "flat") return Uint8Array.from([...C().parsed(C().variable("--accent")), 255]);
      const made = new Uint8Array(4 * legend.entries.length);
      legend.entries.forEach((each, i) => {
        const away = emphasised !== null && emphasised !== i;
        made.set([...(away ? grey() : each.colour || C().parsed(C().variable("--muted"))), each.hidden ? 0 : 255], 4 * i);
      });
      return made;
    }

    function scene(width, height, ratio) {
      const flat = { low: 0, high: 1, log: false, values: null, palette: Uint8Array.from([...grey(), 255]) };
      const list = top ? [{ ...flat, x, y, radius: radius() * ratio }] : [];
      const slots = legend ? legend.entries.length - 1 : 1;
      const range = spec.kind === "number" ? spec : { low: 0, high: slots, log: false };
      list.push({
        ...layers, low: range.low, high: range.high, log: range.log, palette: palette(), radius: topRadius() * ratio,
      });
      const { quick } = SAE.renderer(x.length);
      for (const layer of list) layer.step = moving ? Math.min(63, Math.ceil(layer.x.length / quick) || 1) : 1;
      return { width, height, paper: C().parsed(C().variable("--card")), view: sight(), layers: list };
    }

    /* Drawing */

    function redraw() {
      if (!frame) frame = requestAnimationFrame(draw);
    }
    function draw() {
      frame = 0;
      const [width, height] = inner();
      if (!size[0] || !layers) return;
      const ratio = Math.min(2, window.devicePixelRatio || 1);
      const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (canvas.width !== w) canvas.width = w;
      if (canvas.height !== h) canvas.height = h;
      const renderer = SAE.renderer(x.length);
      whole.dataset.renderer = renderer.name;
      renderer.draw(scene(w, h, ratio), canvas.getContext("2d"));
      drawOverlay();
      whole.dataset.drawn = String(Number(whole.dataset.drawn || 0) + 1);
    }

    function drawOverlay() {
      const ratio = window.devicePixelRatio || 1;
      [overlay.width, overlay.height] = [size[0] * ratio, size[1] * ratio];
      const context = overlay.getContext("2d");
      context.scale(ratio, ratio);
      SAE.picture.paint(context, [...axisMarks(), ...labelMarks(), ...lassoMarks(), ...hoverMarks()]);
    }

    function axisMarks() {
      if (!axes) return [];
      const [x0, x1, y0, y1] = sight();
      const [low, high] = [toData([x0, y0]), toData([x1, y1])];
      return SAE.picture.axes([margin.left, margin.top, ...inner()], [low[0], high[0]], [low[1], high[1]], axes);
    }
    function labelMarks() {
      const placed = labels.map(({ text, row, at }) => {
        const [px, py] = toPixels(...(at ? fromData(at) : [x[row] / UNIT, y[row] / UNIT]));
        return { text, x: px, y: py, beside: !at };
      });
      return SAE.picture.labels([margin.left, margin.top, ...inner()], placed);
    }
    function lassoMarks() {
      if (!polygon || polygon.length < 2) return [];
      const line = polygon.map((point) => {
        const [px, py] = toPixels(...fromData(point));
        return [px + margin.left, py + margin.top];
      });
      const accent = C().variable("--accent");
      return [{ line, closed: true, colour: accent, fill: `${accent}22`, width: 1.5 }];
    }

    function hoverMarks() {
      if (hovered === null) return [];
      const [px, py] = toPixels(x[hovered] / UNIT, y[hovered] / UNIT);
      const reach = topRadius() + 3;
      const line = Array.from({ length: 24 }, (_, i) => [
        margin.left + px + reach * Math.cos((i * Math.PI) / 12),
        margin.top + py + reach * Math.sin((i * Math.PI) / 12),
      ]);
      return [{ line, closed: true, colour: C().variable("--ink"), width: 2 }];
    }

    /* The legend: a colour bar whose range and scale are chosen, or categories that are toggled */

    const changed = () => on.change && on.change(state());
    /** What a user chose: {range: [low, high], log, hidden: names, view: text}; null as at first. */
    function state() {
      const whole = spec.kind !== "number" || wholeRange().every((end, i) => end === [spec.low, spec.high][i]);
      const hidden = legend ? legend.entries.filter((each) => each.hidden).map((each) => each.name) : [];
      const still = view.zoom === 1 && view.cx === 0.5 && view.cy === 0.5;
      return {
        range: whole ? null : [spec.low, spec.high].map((end) => Number(end.toPrecision(6))),
        log: spec.kind === "number" && spec.log ? true : null,
        hidden: hidden.length ? hidden : null,
        view: still ? null : [view.cx, view.cy, view.zoom].map((part) => Number(part.toPrecision(5))).join(","),
      };
    }

    function drawLegend() {
      if (spec.kind === "number") key.replaceChildren(...barLegend());
      else if (spec.kind === "category") key.replaceChildren(...listLegend());
      else key.replaceChildren();
    }

    function barLegend() {
      const onDark = C().dark();
      const stops = Array.from({ length: 13 }, (_, i) => `rgb(${C().sequential(i / 12, onDark).join(",")})`);
      const bar = SAE.element("div", { class: "cloud-bar", "aria-hidden": "true" });
      bar.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
      const apply = (low, high, log) => {
        [spec.low, spec.high, spec.log] = [low, high, log];
        drawLegend();
        redraw();
        changed();
      };
      const box = (name, value, part) => {
        const input = SAE.element("input", { type: "number", step: "any", value: Number(value.toPrecision(4)) });
        input.addEventListener("change", () => {
          const asked = input.valueAsNumber;
          const [low, high] = part ? [spec.low, asked] : [asked, spec.high];
          const wrong = !(low < high) || (spec.log && low <= 0);
          input.setAttribute("aria-invalid", String(wrong));
          input.title = wrong ? "The range needs low < high, and low > 0 on a log scale." : "";
          if (!wrong) apply(low, high, spec.log);
        });
        return SAE.element("label", {}, [name, input]);
      };
      const log = SAE.element("input", { type: "checkbox", disabled: spec.least === Infinity });
      log.checked = spec.log;
      log.addEventListener("change", () => {
        const [low, high] = [spec.low, spec.high];
        const first = [shown.low, spec.least].includes(low);
        const next = log.checked ? (low <= 0 || first ? spec.least : low) : first ? shown.low : low;
        apply(next < high ? next : spec.least, high, log.checked);
      });
      const [low, high] = wholeRange();
      const entire = tool("Whole range", "Colour the whole range", () => apply(low, high, spec.log));
      entire.disabled = spec.low === low && spec.high === high;
      return [
        SAE.element("div", { class: "cloud-scale" }, [
          SAE.element("span", {}, SAE.number(spec.low)),
          bar,
          SAE.element("span", {}, SAE.number(spec.high)),
          SAE.element("span", { class: "note" }, spec.title || ""),
        ]),
        SAE.element("details", { open: key.querySelector("details")?.open || state().range !== null || spec.log }, [
          SAE.element("summary", {}, "Colour range and scale"),
          SAE.element("div", { class: "tools" }, [
            box("from", spec.low, 0),
            box("to", spec.high, 1),
            SAE.element("label", {}, [log, "logarithmic"]),
            entire,
          ]),
        ]),
      ];
    }

    function listLegend() {
      const every = (hidden) => () => {
        legend.entries.forEach((each) => (each.hidden = hidden));
        drawLegend();
        redraw();
        changed();
      };
      const look = (i) => () => {
        emphasised = i;
        redraw();
      };
      const items = legend.entries.map((each, i) => {
        const dot = SAE.element("span", { class: "cloud-dot", "aria-hidden": "true" });
        dot.style.background = each.colour ? `rgb(${each.colour.join(",")})` : "var(--muted)";
        const button = SAE.element("button", {
          type: "button", "aria-pressed": String(!each.hidden), title: each.hidden ? "Show" : "Hide",
          onmouseenter: look(i), onmouseleave: look(null), onfocus: look(i), onblur: look(null),
        }, [dot, each.name, SAE.element("small", {}, ` ${SAE.number(each.n)}`)]);
        button.addEventListener("click", () => {
          each.hidden = !each.hidden;
          button.setAttribute("aria-pressed", String(!each.hidden));
          redraw();
          changed();
        });
        return button;
      });
      return [
        SAE.element("div", { class: "cloud-list", role: "group", "aria-label": `${spec.title || "Categories"}: shown` }, [
          SAE.element("span", { class: "note" }, spec.title || ""),
          ...items,
          legend.entries.length > 3 ? tool("all", "Show every category", every(false)) : null,
          legend.entries.length > 3 ? tool("none", "Hide every category", every(true)) : null,
        ].filter(Boolean)),
      ];
    }

    /* Moving about */

    function settle() {
      view.zoom = Math.min(300, Math.max(1, view.zoom));
      const reach = 0.5 - 0.5 / view.zoom; // at the whole view there is nowhere to go
      const clamp = (value) => Math.min(0.5 + reach, Math.max(0.5 - reach, value));
      [view.cx, view.cy] = [clamp(view.cx), clamp(view.cy)];
      // One finger scrolls the page as long as everything is in sight; then it moves the points.
      canvas.style.touchAction = view.zoom > 1 || lassoing ? "none" : "pan-x pan-y";
      leave();
      redraw();
      clearTimeout(pause);
      moving = true; // big clouds are thinned until the hand rests
      pause = setTimeout(() => {
        moving = false;
        redraw();
        changed();
      }, 250);
    }
    function home() {
      view = { cx: 0.5, cy: 0.5, zoom: 1 };
      settle();
    }
    function zoom(factor, px = inner()[0] / 2, py = inner()[1] / 2) {
      const before = toUnits(px, py);
      view.zoom = Math.min(300, Math.max(1, view.zoom * factor));
      const after = toUnits(px, py);
      view.cx += before[0] - after[0];
      view.cy += before[1] - after[1];
      settle();
    }
    function pan(dx, dy) {
      const [width, height] = inner();
      const [x0, x1, y0, y1] = sight();
      view.cx -= (dx / width) * (x1 - x0);
      view.cy += (dy / height) * (y1 - y0);
      settle();
    }

    /* Which point is meant */

    const visible = (row) => !legend || !legend.entries[legend.slots[row]].hidden;

    /** The row of the nearest visible point within some pixels of (px, py), or null. */
    function pick(px, py) {
      grid = grid || gridOf(x, y);
      const seen = sight();
      const reach = NEAR + topRadius();
      const square = (value) => Math.min(255, Math.max(0, Math.floor((value * UNIT) / 256)));
      const [lowX, highY] = toUnits(px - reach, py - reach, seen).map(square);
      const [highX, lowY] = toUnits(px + reach, py + reach, seen).map(square);
      let [best, least] = [null, NEAR];
      for (let row = lowY; row <= highY; row++) {
        for (let at = grid.starts[(row << 8) | lowX]; at < grid.starts[((row << 8) | highX) + 1]; at++) {
          const point = grid.rows[at];
          const [qx, qy] = toPixels(x[point] / UNIT, y[point] / UNIT, seen);
          // Measured from its edge: what lies on top is larger and is meant first.
          const distance = Math.hypot(qx - px, qy - py) - (isTop && isTop[point] ? topRadius() : radius());
          if (distance < least && visible(point)) [best, least] = [point, distance];
        }
      }
      return best;
    }

    /** Selects the visible points inside a polygon of data coordinates; null: nothing. */
    function select(next, silent = false) {
      polygon = next;
      let rows = null;
      if (polygon) {
        const units = polygon.map((point) => fromData(point).map((value) => value * UNIT));
        rows = inside(x, y, units).filter(visible);
      }
      clearButton.hidden = !polygon;
      told.textContent = rows ? `${SAE.number(rows.length)} selected` : "";
      redraw();
      if (!silent && on.lasso) on.lasso(rows, polygon);
      return rows;
    }
    function setLassoing(next) {
      lassoing = next;
      lassoButton.setAttribute("aria-pressed", String(lassoing));
      whole.classList.toggle("lassoing", lassoing);
      canvas.style.touchAction = view.zoom > 1 || lassoing ? "none" : "pan-x pan-y";
      told.textContent = lassoing ? "Draw around points; Escape ends." : told.textContent;
    }

    /* Pointers: drag moves, two fingers or the wheel zoom, a lasso is drawn, a click picks */

    const pointers = new Map();
    let gesture = null;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      pointers.set(event.pointerId, place(event));
      const drawing = on.lasso && (lassoing || event.shiftKey) && pointers.size === 1;
      gesture = { kind: drawing ? "lasso" : "pan", start: place(event), moved: false, line: [place(event)] };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const here = place(event);
      if (!pointers.has(event.pointerId)) return hover(...here);
      const before = pointers.get(event.pointerId);
      if (pointers.size === 2) {
        const [other] = [...pointers].filter(([id_]) => id_ !== event.pointerId).map(([, at]) => at);
        const apart = (a) => Math.max(10, Math.hypot(a[0] - other[0], a[1] - other[1]));
        pan((here[0] - before[0]) / 2, (here[1] - before[1]) / 2);
        zoom(apart(here) / apart(before), (here[0] + other[0]) / 2, (here[1] + other[1]) / 2);
        gesture.moved = true;
      } else if (Math.hypot(here[0] - gesture.start[0], here[1] - gesture.start[1]) > 4 || gesture.moved) {
        gesture.moved = true;
        if (gesture.kind === "pan") pan(here[0] - before[0], here[1] - before[1]);
        else trace(here);
      }
      pointers.set(event.pointerId, here);
    });
    function trace(here) {
      const last = gesture.line[gesture.line.length - 1];
      if (Math.hypot(here[0] - last[0], here[1] - last[1]) < 4) return;
      gesture.line.push(here);
      polygon = gesture.line.map((point) => toData(toUnits(...point)));
      redraw();
    }
    canvas.addEventListener("pointerup", (event) => {
      if (!pointers.delete(event.pointerId) || pointers.size) return;
      const here = place(event);
      if (gesture.kind === "lasso") {
        if (gesture.line.length > 2) select(polygon.map((point) => point.map((value) => Number(value.toPrecision(5)))));
        else select(null);
        setLassoing(false);
      } else if (!gesture.moved) {
        const row = pick(...here);
        const again = event.pointerType === "mouse" || row === hovered; // the first touch only shows
        hover(...here);
        if (row !== null && on.pick && again) on.pick(row);
      }
    });
    canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("dblclick", (event) => zoom(2, ...place(event)));
    canvas.addEventListener("wheel", (event) => {
      // A page that is scrolled must not stop here: the wheel zooms once the cloud has the focus.
      if (document.activeElement !== canvas && !event.ctrlKey) {
        say([["Click first", "then the wheel zooms"]], ...place(event));
        return;
      }
      event.preventDefault();
      zoom(Math.exp(-Math.min(100, Math.max(-100, event.deltaY)) / 300), ...place(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const steps = {
        ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
        "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: home,
        Escape: () => (lassoing ? setLassoing(false) : polygon && select(null)),
        Enter: () => on.lasso && select(frameOfView()),
      };
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in steps)) return;
      event.preventDefault();
      event.stopPropagation();
      steps[event.key]();
    });
    // For those who cannot draw: what is in sight is selected.
    function frameOfView() {
      const [x0, x1, y0, y1] = sight();
      return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]].map(toData);
    }

    function hover(px, py) {
      const row = pick(px, py);
      if (row !== null) say(options.tooltip ? options.tooltip(row) : [], px, py);
      else tip.hidden = true;
      if (row === hovered) return;
      hovered = row;
      canvas.style.cursor = row !== null && on.pick ? "pointer" : "";
      whole.dataset.hovered = row === null ? "" : String(row);
      drawOverlay();
    }
    function leave() {
      tip.hidden = true;
      if (hovered === null) return;
      hovered = null;
      whole.dataset.hovered = "";
      drawOverlay();
    }
    function say(lines, px, py) {
      tip.hidden = !lines.length;
      tip.replaceChildren(...lines.map((line) =>
        SAE.element("div", {}, Array.isArray(line)
          ? [SAE.element("span", { class: "note" }, `${line[0]} `), SAE.number(line[1])]
          : line)));
      const [width, height] = [tip.offsetWidth, tip.offsetHeight];
      const left = px + margin.left + 14;
      tip.style.left = `${Math.max(0, left + width > size[0] ? left - width - 28 : left)}px`;
      tip.style.top = `${Math.max(0, Math.min(size[1] - height, py + margin.top + 10))}px`;
    }

    /* Pictures to keep */

    function marks(ratio) {
      const [width, height] = inner();
      const image = document.createElement("canvas");
      [image.width, image.height] = [Math.round(width * ratio), Math.round(height * ratio)];
      SAE.renderer(x.length).draw(scene(image.width, image.height, ratio), image.getContext("2d"));
      const all = [{ image, x: margin.left, y: margin.top, width, height }, ...axisMarks(), ...labelMarks(), ...lassoMarks()];
      const listed = legend ? legend.entries.filter((each) => !each.hidden) : [];
      const [more, bottom] = spec.kind === "number"
        ? SAE.picture.scale(spec, size[1] + 16) : SAE.picture.list(listed, size[0], size[1] + 16);
      all.push(...more);
      return [all, size[0], bottom];
    }
    const png = () => {
      const [all, width, height] = marks(2);
      return SAE.picture.png(all, width, height, C().variable("--card"));
    };
    const svg = () => {
      const [all, width, height] = marks(2);
      return SAE.picture.svg(all, width, height, C().variable("--card"));
    };

    /* Life */

    function move(next) {
      if (next.x.length !== next.y.length) throw new Error("x and y of points differ in length");
      ({ x, y, x_range: xRange, y_range: yRange } = next);
      grid = null;
      polygon = null;
      clearButton.hidden = true;
      told.textContent = "";
      view = { cx: 0.5, cy: 0.5, zoom: 1 };
      if (spec) arrange();
      settle();
    }

    function restore(text) {
      const parts = String(text || "").split(",").map(Number);
      if (parts.length === 3 && parts.every(Number.isFinite)) [view.cx, view.cy, view.zoom] = parts;
      else view = { cx: 0.5, cy: 0.5, zoom: 1 };
      settle();
    }

    const observer = new ResizeObserver(() => {
      size = [stage.clientWidth, stage.clientHeight];
      redraw();
    });
    const themed = () => {
      drawLegend();
      redraw();
    };
    document.addEventListener("theme", themed);

    move(options);
    highlighted = options.highlight || null;
    colour(options.colour || {});
    restore(options.view);
    if (options.lasso) select(options.lasso, true);
    const describe = () => {
      const keys = "Arrows move, plus and minus zoom, 0 shows all" + (on.lasso ? ", Enter selects what is in sight." : ".");
      alternative.textContent = `${options.describe ? options.describe() : `${x.length} points.`} ${keys}`;
    };
    describe();
    observer.observe(stage);

    return {
      element: whole, canvas, colour, describe, highlight, pick, png, redraw, restore, select, state, svg,
      /** Other coordinates of the same points: {x, y, x_range, y_range}. */
      move,
      /** Other labels. */
      label(next) {
        labels = next;
        redraw();
      },
      /** CSS pixels, from the inner canvas's corner, of a point. */
      where: (row) => toPixels(x[row] / UNIT, y[row] / UNIT),
      destroy() {
        observer.disconnect();
        document.removeEventListener("theme", themed);
        cancelAnimationFrame(frame);
        clearTimeout(pause);
        SAE.renderer().forget(held);
        element.replaceChildren();
      },
    };
  }

  SAE.points = Object.assign(points, { gridOf, inside, quantise });
})();

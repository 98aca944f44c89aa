/* Bars, histograms and lines: thin wrappers over plotly's SVG traces.

   plotly is loaded when the first plot is asked for, from the address that the page's body names. Only
   `bar` and `scatter` are used: they run without eval and ask nothing of the network. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});
  const CONFIG = {
    displayModeBar: false, displaylogo: false, plotlyServerURL: "", topojsonURL: "", showSendToCloud: false,
    showEditInChartStudio: false, linkText: "", scrollZoom: false, doubleClick: false,
  };
  let loading = null;
  let before = Promise.resolve();

  /** Plots wait for a promise, so that plotly (5 MB) does not hold up what is more urgent; not for long. */
  const after = (promise) => {
    before = Promise.race([promise, new Promise((resolve) => setTimeout(resolve, 2000))]).catch(() => null);
  };

  /** A promise of plotly. */
  function plotly() {
    loading = loading || before.then(() => new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = document.body.dataset.plotly;
      script.onload = () => resolve(window.Plotly);
      script.onerror = () => {
        loading = null;
        reject(new Error("The plots' program did not load: reload the page."));
      };
      document.head.append(script);
    }));
    return loading;
  }

  // plotly reads <b> and <a> in texts: what a file says is shown as it is written.
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const lines = (parts) => parts.filter((part) => part !== null && part !== undefined && part !== "").map(plain).join("<br>");
  const wrapped = (text, width = 60) => String(text).match(new RegExp(`.{1,${width}}(\\s|$)|\\S+`, "g")) || [];
  const colour = (name) => SAE.colours.variable(name);

  function axis(more) {
    return {
      color: colour("--muted"), gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--muted"),
      automargin: true, fixedrange: true, ...more, title: more.title ? { text: plain(more.title), standoff: 8 } : undefined,
    };
  }

  /** A plot in `element`: a promise of when it is drawn, or of what is said in its place.

      options: {label (for those who do not see it), name (of files), height, csv() -> [columns, rows],
      traces() and layout() (asked again when light turns to dark), onclick(point)}. */
  async function plot(element, options) {
    const holder = SAE.element("div", { class: "plot", role: "img", "aria-label": options.label });
    holder.style.height = `${options.height || 280}px`;
    element.append(holder);
    const waiting = setTimeout(() => {
      holder.append(SAE.element("p", { class: "waiting", role: "status" }, "Loading …"));
    }, 1000);
    let Plotly;
    try {
      Plotly = await plotly();
    } catch (error) {
      return element.replaceChildren(SAE.element("p", { class: "failed", role: "alert" }, error.message));
    } finally {
      clearTimeout(waiting);
      holder.replaceChildren();
    }
    const shape = () => ({
      margin: { l: 8, r: 8, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, Helvetica, Arial, sans-serif", size: 12, color: colour("--ink") },
      dragmode: false, hovermode: "closest", showlegend: false,
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
      ...options.layout(),
    });
    const draw = () => Plotly.react(holder, options.traces(), shape(), CONFIG);
    // Files get the paper that the page gives on the screen.
    const picture = (format) => Plotly.toImage(
      { data: options.traces(), layout: { ...shape(), paper_bgcolor: colour("--card") }, config: CONFIG },
      { format, width: holder.clientWidth, height: holder.clientHeight, scale: format === "png" ? 2 : 1, imageDataOnly: true },
    );
    const downloads = SAE.downloads(options.name, {
      png: async () => new Blob([Uint8Array.from(atob(await picture("png")), (letter) => letter.charCodeAt(0))]),
      svg: () => picture("svg"),
      csv: options.csv,
    });
    holder.before(SAE.element("div", { class: "plot-tools" }, downloads));
    await draw();
    if (options.onclick) holder.on("plotly_click", (event) => options.onclick(event.points[0]));
    const themed = () => (holder.isConnected ? draw() : document.removeEventListener("theme", themed));
    document.addEventListener("theme", themed);
    new ResizeObserver(() => holder.isConnected && holder.clientWidth && Plotly.Plots.resize(holder)).observe(holder);
  }

  /** Horizontal bars, the first on top.

      rows: [{name, value, told: [lines of hover text]}]; options as of `plot` with x (title of the
      axis) and onpick(row). */
  function bars(element, rows, options) {
    const upward = [...rows].reverse(); // plotly counts from below
    const place = upward.map((_, i) => i);
    return plot(element, {
      height: 20 * rows.length + 70,
      csv: () => [["name", "value"], rows.map((row) => [row.name, row.value])],
      ...options,
      traces: () => [{
        type: "bar", orientation: "h", y: place, x: upward.map((row) => row.value),
        marker: { color: upward.map((row) => colour(row.value < 0 ? "--muted" : "--accent")) },
        hovertext: upward.map((row) => lines([row.name, SAE.number(row.value), ...(row.told || []).flatMap((line) => wrapped(line || ""))])),
        hoverinfo: "text",
      }],
      layout: () => ({
        bargap: 0.25,
        xaxis: axis({ title: options.x, zeroline: true }),
        yaxis: axis({ tickvals: place, ticktext: upward.map((row) => plain(row.name)), showgrid: false, zeroline: false }),
      }),
      onclick: options.onpick ? (point) => options.onpick(upward[point.pointIndex]) : null,
    });
  }

  /** A histogram that is counted already: edges [n + 1], counts [n]; options as of `plot`, x, y. */
  function histogram(element, edges, counts, options) {
    const middles = Array.from(counts, (_, i) => (edges[i] + edges[i + 1]) / 2);
    const range = (i) => `${SAE.number(edges[i])} to ${SAE.number(edges[i + 1])}`;
    return plot(element, {
      height: 220,
      csv: () => [["from", "to", "count"], Array.from(counts, (n, i) => [edges[i], edges[i + 1], n])],
      ...options,
      traces: () => [{
        type: "bar", x: middles, y: Array.from(counts), width: middles.map((_, i) => edges[i + 1] - edges[i]),
        marker: { color: colour("--accent"), line: { color: colour("--card"), width: 1 } },
        hovertext: Array.from(counts, (n, i) => lines([range(i), `${SAE.number(n)} ${options.y}`])), hoverinfo: "text",
      }],
      layout: () => ({ bargap: 0, xaxis: axis({ title: options.x }), yaxis: axis({ title: options.y, rangemode: "tozero" }) }),
    });
  }

  const DASHES = ["solid", "dash", "dot", "dashdot"]; // told apart without colour, too
  /** Lines: series [{name, x, y, told: text per point}]; options as of `plot`, x, y, ticks (x of short
      marks along the bottom). */
  function curves(element, series, options) {
    const ink = (i) => `rgb(${SAE.colours.category(i).join(",")})`;
    return plot(element, {
      csv: () => [
        ["series", options.x || "x", options.y || "y"],
        series.flatMap((each) => Array.from(each.x, (value, i) => [each.name, value, each.y[i]])),
      ],
      ...options,
      traces: () => [
        ...series.map((each, i) => ({
          type: "scatter", mode: "lines", name: plain(each.name), x: Array.from(each.x), y: Array.from(each.y),
          line: { color: series.length > 1 ? ink(i) : colour("--accent"), dash: DASHES[i % DASHES.length], width: 2 },
          hovertext: Array.from(each.x, (value, j) => lines([each.name, each.told ? each.told[j] : `${SAE.number(value)}: ${SAE.number(each.y[j])}`])),
          hoverinfo: "text",
        })),
        ...(options.ticks ? [{
          type: "scatter", mode: "markers", x: Array.from(options.ticks), y: Array.from(options.ticks, () => options.floor || 0),
          marker: { symbol: "line-ns-open", size: 10, color: colour("--muted"), line: { width: 1 } }, hoverinfo: "skip",
        }] : []),
      ],
      layout: () => ({
        showlegend: series.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
        xaxis: axis({ title: options.x, zeroline: false }), yaxis: axis({ title: options.y, zeroline: true }),
      }),
    });
  }

  SAE.plots = { after, bars, curves, histogram, plot, plotly, plain };
})();

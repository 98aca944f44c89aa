/* The map of the cells: coloured by a feature's activation or by a column of their metadata. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});
  const { element, state } = SAE;
  const MOST_BYTES = 400000; // of metadata that a tooltip fetches
  const MOST_NAMES = 40; // categories whose names still fit on a map

  /** The value of a column of metadata in a row; null where it is missing. */
  function valueOf(column, row) {
    if (column.kind !== "category") return Number.isNaN(column.values[row]) ? null : column.values[row];
    return column.codes[row] === column.missing ? null : column.categories[column.codes[row]];
  }

  /** Where the names of categories go: the median of each one's cells. */
  function names(column, coordinates) {
    const places = column.categories.map(() => [[], []]);
    for (let row = 0; row < column.codes.length; row++) {
      const code = column.codes[row];
      if (code === column.missing) continue;
      places[code][0].push(coordinates.x[row]);
      places[code][1].push(coordinates.y[row]);
    }
    const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    const data = (value, [low, high]) => low + (value / 65535) * (high - low);
    return places
      .map(([xs, ys], code) => ({ n: xs.length, text: String(column.categories[code]), xs, ys }))
      .filter((each) => each.n)
      .sort((a, b) => b.n - a.n)
      .map(({ text, xs, ys }) => ({
        text, at: [data(median(xs), coordinates.x_range), data(median(ys), coordinates.y_range)],
      }));
  }

  /** The map in `content`; the feature's activation comes from its document. State: map, colour, names,
      low, high, log, hidden, view. */
  SAE.cells = async function (content, feature, name) {
    const about = await SAE.load("about");
    if (!about.maps.length) {
      content.append(SAE.absent(about.panels?.cells || "This run holds no coordinates of the cells: they come as `obsm[\"X_umap\"]` of features.h5ad."));
      return;
    }
    const column = (i) => SAE.load(`cells/column/${i}`);
    const categories = about.columns.map((each, i) => ({ ...each, i })).filter((each) => each.kind === "category" && each.n_categories <= MOST_NAMES);
    const within = (value, n) => (Number(value) < n ? Number(value) : 0);
    const options = (pairs, chosen) =>
      pairs.map(([value, text]) => element("option", { value, selected: String(value) === String(chosen) }, text));
    const choose = (label, pairs, chosen, act) => {
      const select = element("select", {}, options(pairs, chosen));
      select.addEventListener("change", () => act(select.value));
      return element("label", {}, [label, select]);
    };

    let activation = null;
    let coordinates = await SAE.load(`cells/coordinates/${within(state.get("map"), about.maps.length)}`);
    const tips = []; // columns that tooltips show
    let value = new Map(); // activation of the active cells

    const chosen = () => {
      const asked = state.get("colour", "activation");
      return asked !== "activation" && about.columns[Number(asked)] ? Number(asked) : "activation";
    };
    const limits = () => ({
      low: state.get("low") === null ? undefined : Number(state.get("low")),
      high: state.get("high") === null ? undefined : Number(state.get("high")),
      log: state.get("log") === "1",
    });
    async function colour() {
      if (chosen() === "activation") {
        if (!activation) {
          const found = await SAE.load(`feature/${feature}/activation`);
          const values = Float32Array.from(found.values, (code) => (code / 65535) * found.max);
          activation = { rows: found.rows, values };
          value = new Map(Array.from(found.rows, (row, i) => [row, values[i]]));
        }
        return { kind: "number", title: `activation of ${name}; grey: not active`, ...activation, positive: true, ...limits() };
      }
      const found = await column(chosen());
      if (found.kind !== "category") return { kind: "number", title: found.name, values: found.values, ...limits() };
      let hidden = [];
      try {
        hidden = JSON.parse(state.get("hidden", "[]"));
      } catch { /* an address that someone cut short */ }
      return { kind: "category", title: found.name, codes: found.codes, categories: found.categories, missing: found.missing, hidden };
    }
    async function labels() {
      const asked = state.get("names", categories.length ? String(categories[0].i) : "none");
      const found = categories.find((each) => String(each.i) === asked);
      return found ? names(await column(found.i), coordinates) : [];
    }

    const holder = element("div");
    const tools = element("div", { class: "tools" }, [
      choose("Colour", [["activation", "activation"], ...about.columns.map((each, i) => [i, each.name])], chosen(), async (next) => {
        state.set({ colour: next === "activation" ? null : next, low: null, high: null, log: null, hidden: null });
        cloud.colour(await colour());
      }),
      about.maps.length > 1 ? choose("Map", about.maps.map((each, i) => [i, each]), state.get("map", "0"), async (next) => {
        state.set({ map: next === "0" ? null : next, view: null });
        coordinates = await SAE.load(`cells/coordinates/${next}`);
        cloud.move(coordinates);
        cloud.label(await labels());
      }) : null,
      categories.length ? choose("Names", [...categories.map((each) => [each.i, each.name]), ["none", "none"]], state.get("names", String(categories[0].i)), async (next) => {
        state.set({ names: next });
        cloud.label(await labels());
      }) : null,
    ]);
    content.append(tools, holder);

    // What a tooltip tells of a cell is fetched when the first cell is pointed at.
    let asked = false;
    function metadata() {
      if (asked) return;
      asked = true;
      const n = Math.max(2, Math.floor(MOST_BYTES / coordinates.x.length));
      about.columns.slice(0, n).forEach(async (_, i) => (tips[i] = await column(i)));
    }
    function told(row) {
      metadata();
      const lines = [["cell", String(row)]];
      if (activation) lines.push(["activation", value.get(row) ?? "none"]);
      for (const each of tips) if (each) lines.push([each.name, valueOf(each, row) ?? "missing"]);
      return lines;
    }

    const [first, texts] = await Promise.all([colour(), labels()]);
    const cloud = SAE.points(holder, {
      ...coordinates, label: `Map of the cells, ${name}`, name: `${name}_cells`, height: "min(70vh, 30rem)",
      colour: first, labels: texts, view: state.get("view"), tooltip: told,
      describe: () => `${SAE.number(coordinates.x.length)} cells; ${activation ? `${name} is active in ${SAE.number(activation.rows.length)} of them, listed below.` : ""}`,
      csv: async () => {
        const data = (code, [low, high]) => low + (code / 65535) * (high - low);
        const all = await Promise.all(about.columns.map((_, i) => column(i)));
        const { x, y, x_range: xRange, y_range: yRange } = coordinates;
        return [
          ["cell", "x", "y", "activation", ...all.map((each) => each.name)],
          Array.from(x, (_, row) => [row, data(x[row], xRange), data(y[row], yRange), value.get(row) ?? 0, ...all.map((each) => valueOf(each, row))]),
        ];
      },
      on: {
        pick: (row) => location.assign(SAE.link.cell(row)),
        change: ({ range, log, hidden, view }) => state.set({
          low: range?.[0], high: range?.[1], log: log ? "1" : null, hidden: hidden ? JSON.stringify(hidden) : null, view,
        }),
      },
    });
    state.onchange(async (why) => {
      if (why !== "back") return;
      cloud.colour(await colour());
      cloud.restore(state.get("view"));
    });
    return cloud;
  };
})();

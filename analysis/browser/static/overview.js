/* The overview: what the run is, the table of all features, their map. */
"use strict";

(function () {
  const SAE = window.SAE;
  const { element, state, number } = SAE;
  const SIZE = 50;
  const FIRST = ["name", "label", "auroc", "n_active", "replication", "term", "term_q", "top_genes", "attributed_genes", "scope", "technical"];
  const form = document.querySelector("#filters");
  const fields = [...form.elements].filter((field) => field.name);
  const table = document.querySelector("#table");
  let about = null;
  let titles = new Map();

  /* What the run is ------------------------------------------------------------------------- */

  SAE.fill(document.querySelector("#about"), () => SAE.load("about"), (found, content) => {
    about = found;
    titles = new Map(found.table_columns.map((each) => [each.name, each]));
    const facts = {
      Model: found.model, Layer: found.layer, Cells: found.n_cells, "Embedding dimensions": found.d_in,
      Latents: found.n_latents, "Live features": found.kinds?.concept ?? found.n_features,
      "Neurons beside them": found.kinds?.neuron || null,
      "Active per cell (L0)": found.l0, "R² of the embedding": found.r2,
      "Named by a term": found.n_named === null || found.n_named === undefined ? null : `${number(found.n_named)} (${percent(found.share_named)})`,
    };
    content.append(
      element("dl", { class: "facts" }, Object.entries(facts)
        .filter(([, value]) => value !== null && value !== undefined)
        .map(([name, value]) => element("div", {}, [element("dt", {}, name), element("dd", {}, typeof value === "number" ? number(value) : value)]))),
    );
    if (found.nulls?.length) {
      const told = found.nulls.map((each) => `${each.features} ${percent(each.named)}`).join(", ");
      content.append(element("p", { class: "note" }, `Share named where there is less or nothing to find: ${told}. ${found.named_told || ""}`));
    }
    prepare();
  });

  const percent = (share) => (share === null || share === undefined ? "–" : `${number(100 * share, 3)} %`);

  function prepare() {
    for (const field of form.querySelectorAll("[data-needs]")) field.hidden = !titles.has(field.dataset.needs);
    if (Object.keys(about.kinds || {}).length < 2) form.querySelector('[data-needs="kind"]').hidden = true;
    SAE.load("features").then((features) => {
      for (const name of ["label", "kind", "scope"]) {
        const column = features.columns[name];
        const values = column?.categories || [...new Set(SAE.values(features, name) || [])].filter(Boolean);
        form.elements[name].append(...[...values].sort().map((value) => element("option", { value }, value)));
      }
      shown();
      drawMap(features);
    }).catch((error) => table.replaceChildren(element("p", { class: "failed", role: "alert" }, error.message)));
    const picked = chosen();
    document.querySelector("#choose .content").append(...about.table_columns.filter((each) => each.name !== "name").map((each) =>
      element("label", { title: each.description }, [
        element("input", { type: "checkbox", checked: picked.includes(each.name), onchange: (event) => pick(each.name, event.target.checked) }),
        each.title,
      ])));
    refresh();
  }

  const chosen = () => state.get("columns")?.split(",") || FIRST.filter((name) => titles.has(name) || name === "name");
  function pick(name, on) {
    const now = chosen().filter((each) => each !== name);
    state.set({ columns: (on ? [...now, name] : now).join(",") });
  }

  /* Filters, in the address ------------------------------------------------------------------- */

  const value = (field) => (field.type === "checkbox" ? (field.checked ? field.value : "") : field.value.trim());
  function shown() {
    for (const field of fields) {
      const given = state.get(field.name, field.name === "kind" ? kind() : "");
      if (field.type === "checkbox") field.checked = given !== "";
      else if (document.activeElement !== field) field.value = given;
    }
  }
  let timer = 0;
  const changed = (push) => state.set({ ...Object.fromEntries(fields.map((field) => [field.name, value(field)])), page: null }, { push });
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => changed(false), 250);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    changed(true);
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    state.set({ ...Object.fromEntries(fields.map((field) => [field.name, null])), lasso: null, page: null }, { push: true });
    shown();
  });

  /** Concepts are shown first: "any" is asked for, where there are neurons as well. */
  const kind = () => (about?.kinds?.concept && about.kinds.neuron ? "concept" : "");

  /** The parameters of a query, of what the address says. */
  function parameters() {
    const asked = { sort: state.get("sort", "auroc"), desc: state.get("desc", "1"), page: state.get("page", "0"), size: String(SIZE) };
    const shownKind = state.get("kind", kind());
    if (shownKind && shownKind !== "any") asked.kind = shownKind;
    for (const name of ["q", "words", "label", "scope", "lasso", "replication_min", "n_active_min", "technical"]) {
      const given = state.get(name);
      if (given) asked[name] = given;
    }
    if (state.get("named")) asked.n_terms_min = "1";
    if (!titles.has(asked.sort) && asked.sort !== "name") delete asked.sort;
    return asked;
  }

  /* The table --------------------------------------------------------------------------------- */

  let asked = 0;
  async function refresh() {
    if (!about) return;
    const mine = ++asked;
    const waiting = setTimeout(() => table.setAttribute("aria-busy", "true"), 1000);
    table.dataset.state = "asked";
    try {
      const found = await SAE.query(parameters());
      if (mine === asked) drawTable(found);
    } catch (error) {
      if (mine === asked) {
        table.replaceChildren(element("p", { class: "failed", role: "alert" }, error.message), element("button", { onclick: refresh }, "Try again"));
      }
    } finally {
      clearTimeout(waiting);
      table.removeAttribute("aria-busy");
    }
  }
  state.onchange((why) => {
    if (why === "back") shown();
    if (cloud && (state.get("lasso") || "") !== outlined) {
      outlined = state.get("lasso") || "";
      cloud.select(lasso(), true);
    }
    refresh();
    light();
  });

  function drawTable(found) {
    const columns = chosen();
    const { sort, desc, page } = parameters();
    document.querySelector("#count").textContent = `${number(found.total)} of ${number(about.n_features)} features`;
    const head = columns.map((name) => {
      const column = titles.get(name) || { title: "Feature", kind: "text" };
      const now = sort === name ? (desc === "1" ? "descending" : "ascending") : "none";
      const arrow = { descending: " ↓", ascending: " ↑", none: "" }[now];
      const turn = () => state.set({ sort: name, desc: now === "none" ? (column.kind === "number" ? "1" : "0") : desc === "1" ? "0" : "1", page: null });
      return element("th", { scope: "col", class: column.kind === "number" ? "number" : null, "aria-sort": now, title: column.description }, element("button", { type: "button", onclick: turn }, column.title + arrow));
    });
    const body = found.rows.map((feature, i) => {
      const name = found.values.name[i];
      return element("tr", { dataset: { feature } }, columns.map((column) => {
        if (column === "name") return element("th", { scope: "row" }, element("a", { href: SAE.link.feature(feature, name) }, name));
        return cell(titles.get(column), found.values[column]?.[i]);
      }));
    });
    const pages = document.querySelector("#pages");
    const held = document.activeElement;
    const headed = [...table.querySelectorAll("thead button")].indexOf(held);
    const paged = [...pages.querySelectorAll("button")].indexOf(held);
    table.replaceChildren(
      found.total
        ? element("table", { class: "features" }, [element("thead", {}, element("tr", {}, head)), element("tbody", {}, body)])
        : element("p", { class: "absent" }, "No feature passes all filters: clear some."),
    );
    table.dataset.state = "there";
    const last = Math.max(0, Math.ceil(found.total / SIZE) - 1);
    const now = Number(page);
    const go = (to, text) => element("button", { type: "button", disabled: to < 0 || to > last || to === now, onclick: () => state.set({ page: to || null }, { push: true }) }, text);
    pages.replaceChildren(go(0, "First"), go(now - 1, "Previous"), element("span", {}, `page ${now + 1} of ${last + 1}`), go(now + 1, "Next"), go(last, "Last"));
    // What had the focus has been replaced: its successor takes it, for who works by keys.
    if (headed >= 0) table.querySelectorAll("thead button")[headed]?.focus();
    if (paged >= 0) [...pages.querySelectorAll("button")].slice(paged).concat([...pages.querySelectorAll("button")].reverse()).find((each) => !each.disabled)?.focus();
  }

  function cell(column, given) {
    if (given === null || given === undefined) return element("td", { class: column?.kind === "number" ? "number" : null }, "–");
    if (column?.kind === "flag") return element("td", {}, given ? "yes" : "");
    if (column?.kind === "number") return element("td", { class: "number" }, number(given));
    const text = String(given);
    return element("td", { title: text.length > 30 ? text : null }, text);
  }

  document.querySelector("#csv").addEventListener("click", async () => {
    const all = await SAE.query({ ...parameters(), page: "0", size: "100000" });
    const columns = chosen();
    const rows = all.rows.map((_, i) => columns.map((name) => all.values[name]?.[i] ?? null));
    SAE.download("features.csv", SAE.csv(columns, rows), "text/csv");
  });

  /* The map ----------------------------------------------------------------------------------- */

  const COLOURS = ["label", "scope", "kind", "auroc", "term_q", "n_terms", "density", "n_active", "replication", "technical"];
  let cloud = null;
  let outlined = ""; // as the address has it, what is drawn on the map
  let map = null;
  let features = null;
  function drawMap(all) {
    features = all;
    const panel = document.querySelector("#map");
    const select = panel.querySelector("select");
    const offered = COLOURS.filter((name) => titles.has(name));
    select.append(...offered.map((name) => element("option", { value: name }, titles.get(name).title)));
    select.addEventListener("change", () => {
      state.set({ colour: select.value, low: null, high: null, log: null });
      cloud.colour(colour());
    });
    SAE.fill(panel, () => SAE.load("map"), (found, content) => {
      map = found;
      outlined = state.get("lasso") || "";
      const holder = element("div");
      content.append(holder);
      cloud = SAE.points(holder, {
        ...found, label: "Map of the features", name: "feature_map", height: "min(70vh, 34rem)", colour: colour(),
        describe: () => `${found.feature.length} features; those with like terms lie near each other.`,
        tooltip: (row) => told(found.feature[row]), csv: points, view: state.get("view"),
        lasso: lasso(),
        on: {
          lasso: (_, drawn) => {
            outlined = (drawn || []).map((corner) => corner.map((each) => Number(each.toPrecision(5))).join(",")).join(";");
            state.set({ lasso: outlined || null, page: null }, { push: true });
          },
          pick: (row) => location.assign(SAE.link.feature(found.feature[row], features.names[found.feature[row]])),
          change: ({ view, range, log }) => state.set({ view, low: range?.[0], high: range?.[1], log: log ? "1" : null }),
        },
      });
      light();
    });
  }

  /** The corners that the address holds of what is selected on the map, or null. */
  function lasso() {
    const corners = (state.get("lasso") || "").split(";").filter(Boolean).map((pair) => pair.split(",").map(Number));
    return corners.length > 2 ? corners : null;
  }

  /** The column that colours the map, of the features that are on it. */
  function colour() {
    const select = document.querySelector("#map select");
    const name = titles.has(state.get("colour")) ? state.get("colour") : select.options[0]?.value;
    if (!name) return {};
    select.value = name;
    const column = features.columns[name];
    const on = (values) => Array.from(map.feature, (feature) => values[feature]);
    const title = titles.get(name).title;
    if (column.categories) return { kind: "category", title, codes: on(column.codes), categories: column.categories, missing: column.missing };
    if (titles.get(name).kind !== "number") {
      const categories = [...new Set(column.filter((value) => value !== null))].map(String).sort();
      const codes = on(column).map((value) => (value === null ? categories.length : categories.indexOf(String(value))));
      return { kind: "category", title, codes, categories, missing: categories.length };
    }
    const limit = (end) => (state.get(end) === null ? undefined : Number(state.get(end)));
    return { kind: "number", title, values: Float32Array.from(on(column), (value) => value ?? NaN), low: limit("low"), high: limit("high"), log: state.get("log") === "1" };
  }

  function told(feature) {
    const shown = ["label", "auroc", "term", "top_genes", "attributed_genes"].filter((name) => titles.has(name));
    return [features.names[feature], ...shown.map((name) => {
      const given = SAE.values(features, name)[feature];
      return [titles.get(name).title, typeof given === "number" ? number(given) : given ?? "–"];
    })];
  }

  function points() {
    const scale = (code, [low, high]) => low + (code / 65535) * (high - low);
    const rows = Array.from(map.feature, (feature, i) => [features.names[feature], scale(map.x[i], map.x_range), scale(map.y[i], map.y_range)]);
    return [["feature", "x", "y"], rows];
  }

  /** What passes the filters stands out; without filters everything does. */
  let lit = 0;
  async function light() {
    if (!cloud) return;
    const { sort, desc, page, size, lasso, ...filters } = parameters();
    const mine = ++lit;
    if (!Object.keys(filters).some((name) => name !== "kind")) return cloud.highlight(null);
    const found = await SAE.query({ ...filters, page: "0", size: "1000000", values: "none" });
    if (mine !== lit) return;
    const passing = new Set(found.rows);
    cloud.highlight(Uint32Array.from([...map.feature.keys()].filter((row) => passing.has(map.feature[row]))));
  }
})();

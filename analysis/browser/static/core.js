/* What every page of the explorer shares: documents, addresses, state, keys, panels.

   A document is loaded by its key, from the server or from the shards of a static export, and is a
   plain object whose arrays are typed. All text goes through textContent. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});
  const root = document.documentElement;
  const body = document.body;
  const live = body.dataset.mode === "live";
  const base = body.dataset.base;
  SAE.live = live;

  /* Documents ------------------------------------------------------------------------------- */

  const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
  const promises = new Map();

  /** The object that a packed document holds; its arrays are views of the buffer. */
  SAE.unpack = function (buffer) {
    const view = new DataView(buffer);
    if (new TextDecoder().decode(new Uint8Array(buffer, 0, 4)) !== "SAE1") {
      throw new Error("what came back is not a document of this browser");
    }
    const length = view.getUint32(4, true);
    const start = 8 * Math.ceil((8 + length) / 8);
    const header = new TextDecoder().decode(new Uint8Array(buffer, 8, length));
    return JSON.parse(header, function (_, value) {
      if (value === null || typeof value !== "object" || !Array.isArray(value.$)) return value;
      const [dtype, offset, count] = value.$;
      return new ARRAYS[dtype](buffer, start + offset, count);
    });
  };

  /** A promise of the document of a key; what failed is asked for again the next time. */
  SAE.load = function (key) {
    if (!promises.has(key)) {
      const made = live ? fetched(`${base}/data/${key}`) : sharded(key);
      promises.set(key, made.then(SAE.unpack));
      promises.get(key).catch(() => promises.delete(key));
      while (promises.size > 200) promises.delete(promises.keys().next().value);
    }
    return promises.get(key);
  };

  async function answer(address, options) {
    let response;
    try {
      response = await fetch(address, options);
    } catch {
      throw new Error("The browser's server does not answer: is `sae-jax browse` still running?");
    }
    if (!response.ok) {
      const told = (await response.text()).slice(0, 300);
      throw new Error(told || `The server answered ${response.status}.`);
    }
    return response;
  }
  const fetched = async (address) => (await answer(address)).arrayBuffer();

  /** JSON of an address of the server, below its base. */
  SAE.json = async (address, options) => (await answer(base + address, options)).json();

  /** The file of the export that holds a document; export.py has the same rule. */
  function shard(key) {
    const [kind, first] = key.split("/");
    if (kind === "feature" || kind === "label") return `${kind}/${first}`;
    if (["gene", "term", "cell"].includes(kind)) return `${kind}/${Math.floor(Number(first) / 50)}`;
    return key;
  }

  const arrived = new Map();
  const scripts = new Map();
  async function sharded(key) {
    const file = `data/${shard(key)}.js`;
    if (!scripts.has(file)) scripts.set(file, script(`${base}/${file}`));
    if (!(await scripts.get(file)) && !arrived.has(key)) throw new Error(`${file} is not in this export.`);
    if (!arrived.has(key)) throw new Error(`${key} is not in this export.`);
    return arrived.get(key);
  }
  function script(address) {
    return new Promise((resolve) => {
      const made = SAE.element("script", { src: address, onload: () => resolve(true), onerror: () => resolve(false) });
      document.head.append(made);
    });
  }

  /** What a shard of the export calls. */
  SAE.put = function (key, base64) {
    arrived.set(key, Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer);
  };

  /* Addresses ------------------------------------------------------------------------------- */

  const page = (kind, name, number) =>
    live ? `${base}/${kind}/${encodeURIComponent(name)}` : `${base}/${kind}.html?i=${number}`;
  SAE.link = {
    overview: (state) => (live ? `${base}/` : `${base}/index.html`) + (state ? `#${query(state)}` : ""),
    feature: (number, name) => page("feature", name, number),
    gene: (number, name) => page("gene", name, number),
    term: (number) => page("term", number, number),
    label: (column, value) =>
      live ? `${base}/label/${column}/${value}` : `${base}/label.html?c=${column}&v=${value}`,
    cell: (number) => page("cell", number, number),
  };

  /** Which document this page is of: feature/12, label/0/3. */
  SAE.subject = function () {
    const kind = body.dataset.page;
    if (live) return body.dataset.subject || kind;
    const asked = new URLSearchParams(location.search);
    const numbers = kind === "label" ? [asked.get("c"), asked.get("v")] : [asked.get("i") || "0"];
    return [kind, ...numbers.map((text) => String(parseInt(text, 10) || 0))].join("/");
  };

  /* State: the part of the address behind #, so that a link holds all of it ------------------- */

  const query = (values) => new URLSearchParams(values).toString();
  const stated = () => new URLSearchParams(location.hash.slice(1));
  SAE.state = {
    get(name, fallback = null) {
      const value = stated().get(name);
      return value === null ? fallback : value;
    },
    /** Changes some values, null removes one; {push: true} makes a step that Back undoes. */
    set(values, options = {}) {
      const next = stated();
      for (const [name, value] of Object.entries(values)) {
        if (value === null || value === undefined || value === "") next.delete(name);
        else next.set(name, String(value));
      }
      if (next.toString() === stated().toString()) return;
      const address = `#${next.toString()}`;
      if (options.push) history.pushState(null, "", address);
      else history.replaceState(null, "", address);
      for (const each of listeners) each("set");
    },
    /** Calls back when the state changes: "set" by this page, "back" by the browser. */
    onchange(callback) {
      listeners.push(callback);
    },
  };
  const listeners = [];
  const back = () => listeners.forEach((each) => each("back"));
  window.addEventListener("popstate", back);
  window.addEventListener("hashchange", back);

  /* Elements -------------------------------------------------------------------------------- */

  /** An element with attributes (on...: listeners, dataset: an object) and children (text, elements). */
  SAE.element = function (tag, attributes = {}, children = []) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (name === "dataset") Object.assign(made.dataset, value);
      else if (name === "text") made.textContent = value;
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...[children].flat().filter((child) => child !== null && child !== undefined));
    return made;
  };

  /** A number as people read it: three digits, thousands apart. */
  SAE.number = function (value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en-US");
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
    return Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  };

  /** Fills a panel when a promise (or what a function returns) is there.

      After a second it says that it waits; an absent analysis shows what would make it; an error
      what went wrong, with a button that tries again. */
  SAE.fill = function (panel, make, render) {
    const content = panel.querySelector(".content") || panel;
    const spinner = setTimeout(() => {
      content.replaceChildren(SAE.element("p", { class: "waiting", role: "status" }, "Loading …"));
    }, 1000);
    return Promise.resolve()
      .then(make)
      .then((found) => {
        clearTimeout(spinner);
        content.replaceChildren();
        if (found && found.absent) content.append(SAE.absent(found.absent));
        else render(found, content);
        panel.dataset.state = "there";
      })
      .catch((error) => {
        clearTimeout(spinner);
        panel.dataset.state = "failed";
        const again = SAE.element("button", { onclick: () => SAE.fill(panel, make, render) }, "Try again");
        const told = SAE.element("p", { class: "failed", role: "alert" }, error.message);
        content.replaceChildren(told, again);
      });
  };

  /** What is said where an analysis is absent: commands between backticks are set as code. */
  SAE.absent = function (sentence) {
    const parts = String(sentence).split("`");
    return SAE.element(
      "p",
      { class: "absent" },
      parts.map((part, i) => (i % 2 ? SAE.element("code", {}, part) : part)),
    );
  };

  /** Hands a file to the user. */
  SAE.download = function (name, content, type) {
    const blob = content instanceof Blob ? content : new Blob([content], { type });
    const address = URL.createObjectURL(blob);
    SAE.element("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  };

  /** Rows as CSV: quoted where needed, and no cell that a spreadsheet would run as a formula. */
  SAE.csv = function (columns, rows) {
    const cell = (value) => {
      if (value === null || value === undefined || Number.isNaN(value)) return "";
      let text = String(value);
      if (typeof value !== "number" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
  };

  /* Keys ------------------------------------------------------------------------------------ */

  const keys = new Map();
  /** Adds keys: {n: [callback, "next feature"]}. */
  SAE.keys = function (more) {
    for (const [key, value] of Object.entries(more)) keys.set(key, value);
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const where = event.target;
    const typing = where.matches?.("input, textarea, select, [contenteditable]");
    if (typing) {
      if (event.key === "Escape") where.blur();
      return;
    }
    const found = keys.get(event.key);
    if (found) {
      event.preventDefault();
      found[0](event);
    }
  });
  SAE.keys({
    "/": [() => document.querySelector("#search")?.focus(), "search"],
    "?": [help, "these keys"],
    r: [() => SAE.random(), "a random named feature"],
    o: [() => location.assign(SAE.link.overview()), "overview"],
    t: [turn, "light or dark"],
  });
  function help() {
    const rows = [...keys].map(([key, [, what]]) =>
      SAE.element("tr", {}, [SAE.element("th", { scope: "row" }, SAE.element("kbd", {}, key)), SAE.element("td", {}, what)]),
    );
    const dialog = SAE.element("dialog", { class: "keys", "aria-label": "Keys" }, [
      SAE.element("table", {}, rows),
      SAE.element("button", { onclick: () => dialog.close() }, "Close"),
    ]);
    dialog.addEventListener("close", () => dialog.remove());
    body.append(dialog);
    dialog.showModal();
  }

  // Without its address: what is behind # is the page's state.
  document.querySelector(".skip")?.addEventListener("click", (event) => {
    event.preventDefault();
    document.querySelector("#main").focus();
  });

  /** A feature that has a name: one that a term names, where any is. */
  SAE.random = async function () {
    if (live) return location.assign(`${base}/random`);
    const { names, columns } = await SAE.load("features");
    const all = names.map((_, i) => i);
    const named = columns.n_terms ? all.filter((i) => columns.n_terms[i] > 0) : all;
    const chosen = named[Math.floor(Math.random() * named.length)] ?? 0;
    location.assign(SAE.link.feature(chosen, names[chosen]));
  };

  /* Light and dark -------------------------------------------------------------------------- */

  function stored(name, value) {
    try {
      if (value !== undefined) localStorage.setItem(name, value);
      return localStorage.getItem(name);
    } catch {
      return null; // a page of file:// may have no storage
    }
  }
  if (stored("theme")) root.dataset.theme = stored("theme");
  function turn() {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    stored("theme", root.dataset.theme);
    document.dispatchEvent(new CustomEvent("theme"));
  }
  document.querySelector("#theme")?.addEventListener("click", turn);
  document.querySelector("#help")?.addEventListener("click", help);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    document.dispatchEvent(new CustomEvent("theme")),
  );
})();

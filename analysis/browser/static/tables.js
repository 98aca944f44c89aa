/* Tables that sort by any column, page when they are long, and download as CSV. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});
  const empty = (value) => value === null || value === undefined || Number.isNaN(value) || value === "";

  /** How a p or q value is read: 0.031, 3e-5, and < 1e-300 where it underflows. */
  SAE.small = function (value) {
    if (empty(value)) return "–";
    if (value === 0) return "< 1e-300";
    return value < 1e-3 ? value.toExponential(0) : SAE.number(value, 2);
  };

  /** The same from -log10, which does not underflow. */
  SAE.smallOf = function (log10) {
    if (empty(log10)) return "–";
    if (log10 < 300) return SAE.small(10 ** -log10);
    return log10 >= 319.9 ? "< 1e-300" : `1e-${Math.round(log10)}`;
  };

  /** Which of two values comes first; what is missing always comes last. */
  SAE.order = function (a, b, descending) {
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    const sign = descending ? -1 : 1;
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true, sensitivity: "base" });
  };

  /** A table in `element`.

      columns: [{name, title, kind ("number" or "text"), first ("low": is sorted upward first),
      description, value(row), text(value, row), render(value, row) -> element or text, mark(row) ->
      bool, csv (false: not in it), long (true: texts of many words)}]: value is row[name] unless given; it is what sorts and goes into
      the CSV, text or render is what is shown. options: {sort: name,
      descending, page: rows a page, file: name of the CSV (null: none), caption, empty: what is said
      of no rows, onsort(name, descending), mark(row)}. Returns {rows(new rows), sort(name, descending)}. */
  SAE.table = function (element, columns, rows, options = {}) {
    const page = options.page || 25;
    let { sort = null, descending = false } = options;
    let at = 0;
    let sorted = [];
    const value = (column, row) => (column.value ? column.value(row) : row[column.name]);
    const number = (column) => column.kind === "number";

    const buttons = new Map();
    const heads = columns.map((column) => {
      const button = SAE.element(
        "button",
        { type: "button", title: column.description, onclick: () => turn(column) },
        [column.title, SAE.element("span", { class: "arrow", "aria-hidden": "true" })],
      );
      buttons.set(column, button);
      return SAE.element("th", { scope: "col", class: number(column) ? "number" : null }, button);
    });
    const body = SAE.element("tbody");
    const table = SAE.element("table", {}, [
      options.caption ? SAE.element("caption", { class: "hidden" }, options.caption) : null,
      SAE.element("thead", {}, SAE.element("tr", {}, heads)),
      body,
    ]);
    const told = SAE.element("span", { class: "note", role: "status" });
    const step = (label, by) =>
      SAE.element("button", { type: "button", "aria-label": label, onclick: () => show(at + by) }, by < 0 ? "‹" : "›");
    const [before, after] = [step("Previous rows", -page), step("Next rows", page)];
    const foot = SAE.element("div", { class: "table-foot" }, [before, after, told]);
    if (options.file) {
      foot.append(SAE.downloads(options.file, {
        csv: () => {
          const kept = columns.filter((column) => column.csv !== false);
          return [kept.map((column) => column.name), sorted.map((row) => kept.map((column) => value(column, row)))];
        },
      }));
    }
    const scroll = SAE.element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": options.caption || "Table" }, table);
    element.replaceChildren(scroll, foot);

    function turn(column) {
      const name = column.name;
      // Numbers are wanted highest first, texts from A.
      descending = sort === name ? !descending : number(column) && column.first !== "low";
      sort = name;
      order();
      if (options.onsort) options.onsort(sort, descending);
    }

    function order() {
      const column = columns.find((each) => each.name === sort);
      sorted = column
        ? [...rows].sort((a, b) => SAE.order(value(column, a), value(column, b), descending))
        : rows;
      for (const [each, button] of buttons) {
        const here = each === column;
        const head = button.parentElement;
        if (here) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
        button.querySelector(".arrow").textContent = here ? (descending ? " ▾" : " ▴") : "";
      }
      show(0);
    }

    function cell(column, row) {
      const found = value(column, row);
      let shown = column.render ? column.render(found, row) : null;
      if (shown === null) {
        shown = column.text ? column.text(found, row) : SAE.number(number(column) ? found : found ?? null);
      }
      const marked = column.mark && column.mark(row);
      const names = [number(column) && "number", column.long && "long", marked && "marked"].filter(Boolean).join(" ");
      return SAE.element("td", { class: names || null }, shown);
    }

    function show(from) {
      at = Math.max(0, Math.min(from, page * Math.floor(Math.max(0, sorted.length - 1) / page)));
      const part = sorted.slice(at, at + page);
      body.replaceChildren(...part.map((row) =>
        SAE.element("tr", { class: options.mark && options.mark(row) ? "marked" : null },
          columns.map((column) => cell(column, row)))));
      if (!part.length) {
        const none = SAE.element("td", { colspan: columns.length, class: "note" }, options.empty || "No rows.");
        body.append(SAE.element("tr", {}, none));
      }
      const long = sorted.length > page;
      before.hidden = after.hidden = !long;
      before.disabled = at === 0;
      after.disabled = at + page >= sorted.length;
      told.textContent = long
        ? `${SAE.number(at + 1)} to ${SAE.number(at + part.length)} of ${SAE.number(sorted.length)}`
        : "";
    }

    order();
    return {
      rows(more) {
        rows = more;
        order();
      },
      sort(name, down) {
        [sort, descending] = [name, down];
        order();
      },
    };
  };
})();

/* One page of the table of features: of the server, or of all rows in an export.

   The parameters are those of the address: sort, desc, page, size, q, words, lasso (x,y;x,y;... in
   map coordinates), <column>=value, <column>_min, <column>_max. */
"use strict";

(function () {
  const SAE = window.SAE;

  SAE.query = async function (parameters) {
    if (SAE.live) return SAE.json(`/table?${new URLSearchParams(parameters)}`);
    const [features, map] = await Promise.all([SAE.load("features"), parameters.lasso ? SAE.load("map") : null]);
    return SAE.queried(features, parameters, map);
  };

  /** Values of a column as numbers or texts; missing ones are null. */
  SAE.values = function (features, name) {
    if (name === "name") return features.names;
    const column = features.columns[name];
    if (!column) return null;
    if (!column.categories) return column;
    return Array.from(column.codes, (code) => (code === column.missing ? null : column.categories[code]));
  };

  SAE.queried = function (features, parameters, map) {
    let rows = features.names.map((_, i) => i);
    const keep = (holds) => {
      rows = rows.filter(holds);
    };
    const column = (name) => SAE.values(features, name) || [];
    const texts = ["name", "label", "term", "term_down", "top_genes", "attributed_genes"].map(column);
    const holds = (word) => (i) => texts.some((text) => text[i] && String(text[i]).toLowerCase().includes(word));
    for (const [name, value] of Object.entries(parameters)) {
      if (value === "" || ["sort", "desc", "page", "size", "values"].includes(name)) continue;
      const lower = String(value).toLowerCase();
      const bound = /^(.*)_(min|max)$/.exec(name);
      if (name === "q") keep(holds(lower));
      else if (name === "words") {
        const words = lower.split(",").map((word) => word.trim()).filter(Boolean);
        const named = [column("term"), column("term_down")];
        keep((i) => words.some((word) => named.some((term) => term[i] && term[i].toLowerCase().includes(word))));
      } else if (name === "lasso") {
        const inside = map ? SAE.inside(map, value) : new Set();
        keep((i) => inside.has(i));
      } else if (bound) {
        const values = column(bound[1]);
        const side = bound[2] === "min" ? 1 : -1;
        keep((i) => values[i] !== null && !Number.isNaN(values[i]) && side * values[i] >= side * Number(value));
      } else {
        const values = column(name);
        keep((i) => values[i] !== null && String(values[i]) === String(value));
      }
    }
    if (parameters.sort) {
      const values = column(parameters.sort);
      const descending = parameters.desc === "1";
      rows.sort((a, b) => SAE.order(values[a], values[b], descending) || a - b);
    }
    const size = Number(parameters.size || 50);
    const first = size * Number(parameters.page || 0);
    const shown = rows.slice(first, first + size);
    const values = { name: shown.map((i) => features.names[i]) };
    for (const name of parameters.values === "none" ? [] : Object.keys(features.columns)) {
      const all = column(name);
      values[name] = shown.map((i) => (Number.isNaN(all[i]) ? null : all[i]));
    }
    return { total: rows.length, rows: shown, values };
  };

  /** The features whose points lie in a polygon: even-odd rule, in map coordinates. */
  SAE.inside = function (map, text) {
    const corners = text.split(";").map((pair) => pair.split(",").map(Number));
    const scale = (code, [low, high]) => low + (code / 65535) * (high - low);
    const found = new Set();
    for (let k = 0; k < map.feature.length; k++) {
      const x = scale(map.x[k], map.x_range);
      const y = scale(map.y[k], map.y_range);
      let inside = false;
      for (let i = 0, j = corners.length - 1; i < corners.length; j = i++) {
        const [xi, yi] = corners[i];
        const [xj, yj] = corners[j];
        if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
      }
      if (inside) found.add(map.feature[k]);
    }
    return found;
  };
})();

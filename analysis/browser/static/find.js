/* The search box: what is found appears as one types; arrows and Enter choose. */
"use strict";

(function () {
  const SAE = window.SAE;
  const input = document.querySelector("#search");
  const list = document.querySelector("#found");
  if (!input) return;

  const addresses = {
    features: (hit) => SAE.link.feature(hit.index, hit.text),
    genes: (hit) => SAE.link.gene(hit.index, hit.text),
    terms: (hit) => SAE.link.term(hit.index),
    labels: (hit) => SAE.link.label(...hit.index),
    cells: (hit) => SAE.link.cell(hit.index),
  };
  const titles = { labels: "Labels", features: "Features", genes: "Genes", terms: "Terms", cells: "Cells" };

  /** Hits by kind: of the server, or of the names in an export. */
  SAE.find = async function (text) {
    if (SAE.live) return SAE.json(`/search?q=${encodeURIComponent(text)}`, { headers: { Accept: "application/json" } });
    const [names, features] = await Promise.all([SAE.load("names"), SAE.load("features")]);
    const wanted = text.toLowerCase();
    const hits = (texts, index = (i) => i) => {
      const found = [];
      for (let i = 0; i < texts.length; i++) {
        const at = String(texts[i]).toLowerCase().indexOf(wanted);
        if (at >= 0) found.push({ index: index(i), text: texts[i], at: at * 1000 + texts[i].length });
      }
      return found.sort((a, b) => a.at - b.at).slice(0, 8);
    };
    const labels = names.labels || [];
    return {
      features: hits(features.names), genes: hits(names.genes || []), terms: hits(names.terms || []),
      labels: hits(labels.map((each) => each.text), (i) => labels[i].index), cells: [],
    };
  };

  function lines(found) {
    const parts = [];
    for (const [kind, title] of Object.entries(titles)) {
      const hits = found[kind] || [];
      if (!hits.length) continue;
      parts.push(SAE.element("h3", { role: "presentation" }, title));
      for (const hit of hits) {
        const why = hit.why ? [" ", SAE.element("small", {}, hit.why)] : [];
        parts.push(SAE.element("a", { href: addresses[kind](hit), role: "option", "aria-selected": "false" }, [hit.text, ...why]));
      }
    }
    return parts;
  }

  let asked = 0;
  let timer = 0;
  async function ask() {
    const text = input.value.trim();
    const mine = ++asked;
    if (!text) return show([]);
    let parts;
    try {
      parts = lines(await SAE.find(text));
      if (!parts.length) {
        parts = [SAE.element("p", { class: "note" }, `Nothing is called “${text}”. Try a gene symbol, an Ensembl id, a label or a word of a term.`)];
      }
    } catch (error) {
      parts = [SAE.element("p", { class: "failed", role: "alert" }, error.message)];
    }
    if (mine === asked) show(parts);
  }
  function show(parts) {
    list.replaceChildren(...parts);
    list.hidden = !parts.length;
    input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-expanded", String(!list.hidden));
  }
  const options = () => [...list.querySelectorAll("a")];
  function select(step) {
    const all = options();
    if (!all.length) return;
    const now = all.findIndex((each) => each.getAttribute("aria-selected") === "true");
    const next = now < 0 ? (step > 0 ? 0 : all.length - 1) : (now + step + all.length) % all.length;
    all.forEach((each, i) => {
      each.id = `found-${i}`;
      each.setAttribute("aria-selected", String(i === next));
    });
    input.setAttribute("aria-activedescendant", all[next].id);
    all[next].scrollIntoView({ block: "nearest" });
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, 120);
  });
  input.addEventListener("focus", () => list.childElementCount && show([...list.children]));
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") select(1);
    else if (event.key === "ArrowUp") select(-1);
    else if (event.key === "Escape") show([]);
    else return;
    event.preventDefault();
  });
  input.form.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearTimeout(timer);
    let chosen = options().find((each) => each.getAttribute("aria-selected") === "true");
    if (!chosen) {
      await ask();
      const called = (each) => each.firstChild.textContent.toLowerCase() === input.value.trim().toLowerCase();
      chosen = options().find(called) || options()[0];
    }
    if (chosen) location.assign(chosen.href);
  });
  document.addEventListener("click", (event) => {
    if (!input.form.contains(event.target)) show([]);
  });

  const results = document.querySelector("#results");
  if (results) {
    input.value = results.dataset.text;
    SAE.fill(results, () => SAE.find(results.dataset.text), (found, content) => {
      const parts = lines(found);
      content.append(...(parts.length ? parts : ["Nothing is called so."]));
      content.querySelectorAll("a").forEach((each) => each.after(SAE.element("br")));
    });
  }
})();

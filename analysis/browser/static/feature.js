/* The page of one feature. Panels ask for their documents when they come into sight. */
"use strict";

(function () {
  const SAE = window.SAE;
  const { element, state, number } = SAE;
  const { columns } = SAE;
  const subject = SAE.subject();
  const feature = Number(subject.split("/")[1]);
  const panel = (id) => document.querySelector(`#${id}`);
  const document_ = (part) => () => SAE.load(`${subject}/${part}`);
  let name = document.querySelector("#head h1").textContent;

  const seen = new Map();
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        observer.unobserve(entry.target);
        seen.get(entry.target)();
      }
    },
    { rootMargin: "300px" },
  );
  /** Fills a panel when it comes near the screen: a promise of when that is done. */
  function lazily(id, make, render) {
    return new Promise((resolve) => {
      seen.set(panel(id), () => resolve(SAE.fill(panel(id), make, render)));
      observer.observe(panel(id));
    });
  }

  /** A labelled select whose choice is part of the address. */
  function choice(label, stateName, pairs, act) {
    const now = state.get(stateName, String(pairs[0][0]));
    const select = element("select", {}, pairs.map(([value, text]) => element("option", { value, selected: String(value) === now }, text)));
    select.addEventListener("change", () => {
      state.set({ [stateName]: select.value === String(pairs[0][0]) ? null : select.value });
      act(select.value);
    });
    return element("label", {}, [label, select]);
  }

  /* The head: what it is in one line, and the way to other features --------------------------- */

  const KEPT = ["map", "colour", "names"]; // of the address, from one feature to the next
  function address(other) {
    const kept = KEPT.filter((each) => state.get(each) !== null).map((each) => [each, state.get(each)]);
    return SAE.link.feature(other.feature, other.name) + (kept.length ? `#${new URLSearchParams(kept)}` : "");
  }

  SAE.fill(panel("head"), () => Promise.all([SAE.load(`${subject}/page`), SAE.load("about")]), ([page, about], content) => {
    name = page.name;
    document.title = `${name} · ${about.title}`;
    panel("head").querySelector("h1").replaceChildren(name, " ", element("span", { class: "chip" }, page.kind));
    const { summary } = page;
    const known = (key) => summary[key] !== null && summary[key] !== undefined && summary[key] !== "";
    const parts = [
      known("label") ? ["Best label", element("strong", {}, labelled(page)), known("auroc") ? `AUROC ${number(summary.auroc)}` : ""] : [],
      known("term") ? ["Best term", element("strong", {}, summary.term), known("term_q") ? `q ${SAE.small(summary.term_q)}` : ""] : ["Best term", "none names it", ""],
      page.top_genes.length ? ["Highest genes", element("strong", {}, linked(page.top_genes.slice(0, 8))), "most raised in its cells"] : [],
      page.attributed_genes.length ? ["Driving genes", element("strong", {}, linked(page.attributed_genes.slice(0, 8))), "by attribution"] : [],
    ].filter((part) => part.length);
    const named = new Set(["label", "auroc", "term", "term_q", "top_genes", "attributed_genes", "name", "kind"]);
    const shown = about.table_columns.filter((each) => known(each.name) && !named.has(each.name));
    const first = ["n_active", "density", "scope", "replication", "replicated", "technical"];
    const fact = (column) => {
      const value = summary[column.name];
      const told = typeof value === "boolean" || column.kind === "flag" ? (value ? "yes" : "no")
        : column.name.endsWith("_q") || column.name.endsWith("_p") ? SAE.small(value) : number(value);
      return element("div", { title: column.description }, [element("dt", {}, column.title), element("dd", {}, told)]);
    };
    const main = shown.filter((each) => first.includes(each.name));
    const rest = shown.filter((each) => !first.includes(each.name));
    content.append(
      element("dl", { class: "lead" }, parts.flatMap(([what, value, told]) => [
        element("dt", {}, what), element("dd", {}, [value, " ", element("span", { class: "note" }, told)]),
      ])),
      element("dl", { class: "facts" }, main.map(fact)),
      rest.length ? element("details", {}, [element("summary", {}, "More numbers"), element("dl", { class: "facts" }, rest.map(fact))]) : "",
    );
    steps(page);
  });

  const linked = (genes) => genes.flatMap(({ gene, name }, i) => [i ? ", " : "", element("a", { href: SAE.link.gene(gene, name) }, name)]);

  /** The best label, as a link to its page where the page's own tables have it. */
  function labelled({ summary, labels }) {
    for (const group of labels) {
      const row = group.rows.find((each) => each.value === summary.label);
      if (row && (!summary.label_column || summary.label_column === group.column)) {
        return element("a", { href: SAE.link.label(group.column_index, row.value_index) }, summary.label);
      }
    }
    return summary.label;
  }

  function steps(page) {
    const { previous, next } = page;
    const step = (other, text, key) => other
      ? element("a", { href: address(other), title: `${other.name} (key ${key})`, rel: key === "n" ? "next" : "prev" }, text)
      : null;
    panel("head").querySelector(".steps").replaceChildren(...[
      step(previous, "← Previous", "p"),
      step(next, "Next →", "n"),
      element("button", { type: "button", title: "a random annotated feature (key r)", onclick: () => SAE.random() }, "Random"),
    ].filter(Boolean));
    const go = (other) => () => other && location.assign(address(other));
    SAE.keys({ n: [go(next), "next feature"], p: [go(previous), "previous feature"] });
  }

  /* Cells ----------------------------------------------------------------------------------- */

  SAE.plots.after(lazily("cells", async () => {
    const [made, page] = [element("div"), await SAE.load(`${subject}/page`)];
    await SAE.cells(made, feature, page.name);
    return made;
  }, (made, content) => content.append(made)).then(() => new Promise(requestAnimationFrame)));

  /** What the page says of its cells, or why it has none. */
  const ofCells = async () => {
    const page = await SAE.load(`${subject}/page`);
    return page.missing?.cells ? { absent: page.missing.cells } : page;
  };

  lazily("labels", ofCells, (page, content) => {
    if (!page.labels.length) {
      content.append(SAE.absent("The cells have no labels: columns of text in `obs` of features.h5ad are shown here."));
      return;
    }
    page.labels.forEach((group, i) => {
      const place = element("div");
      const few = group.enough ? "" : ` – only ${number(group.n_active)} active cells have a label: shares of fewer than 100 are unsure`;
      content.append(element("details", { open: i < 2 }, [
        element("summary", {}, [element("strong", {}, group.column), element("span", { class: "note" }, few)]), place,
      ]));
      SAE.table(place, [
        { name: "value", title: "Label", render: (value, row) => element("a", { href: SAE.link.label(group.column_index, row.value_index) }, value) },
        columns.share("share", "Of the active cells", "of the cells in which the feature is active, and that have a label, the share with this one"),
        columns.share("of_label", "Of the label's cells", "of the cells with this label, the share in which the feature is active"),
        { ...columns.number("n_active", "Cells", "cells with this label in which the feature is active, of all with it"), text: (n, row) => `${number(n)} / ${number(row.n_cells)}` },
      ], group.rows, {
        sort: "share", descending: true, page: 8, file: `${name}_${group.column}`, caption: `${group.column}: shares`,
        mark: (row) => row.marked, empty: "No cell is active.",
      });
    });
  });

  lazily("histogram", ofCells, ({ histogram }, content) => {
    const { edges, counts, n_silent: silent } = histogram;
    content.append(element("p", { class: "note" }, `${number(silent)} cells in which it is silent are left out.`));
    SAE.plots.histogram(content.appendChild(element("div")), edges, counts, {
      label: `Histogram of ${name}'s activation`, name: `${name}_histogram`, x: "activation", y: "cells",
    });
  });

  lazily("bands", ofCells, ({ bands }, content) => {
    const place = element("div");
    const titles = bands.map((band, i) => [i, band.n > band.rows.length ? `${band.title}: ${number(band.rows.length)} of ${number(band.n)}` : `${band.title} (${number(band.rows.length)})`]);
    const show = (i) => {
      const band = bands[i] || bands[0];
      const keys = [...new Set(band.rows.flatMap((row) => Object.keys(row.metadata)))];
      SAE.table(place, [
        columns.cell,
        columns.number("activation", "Activation"),
        ...keys.map((key) => ({
          name: `metadata:${key}`, title: key, kind: band.rows.some((row) => typeof row.metadata[key] === "number") ? "number" : "text",
          value: (row) => row.metadata[key],
        })),
      ], band.rows, { sort: "activation", descending: true, page: 10, file: `${name}_cells`, caption: band.title });
    };
    if (!bands.length) return content.append(element("p", { class: "absent" }, "It is active in no cell."));
    content.append(element("div", { class: "tools" }, choice("Cells", "band", titles, (i) => show(Number(i)))), place);
    show(Number(state.get("band", "0")));
  });

  /* Genes ----------------------------------------------------------------------------------- */

  lazily("genes", document_("attribution"), (found, content) => {
    const { names, descriptions, genes, values, samples } = found;
    const pairs = samples ? samples.of.map(([p, c], i) => [
      i, `${samples.prototypes[p].name} against ${samples.counterfactuals[c].name}`,
    ]) : [];
    const plot = element("div");
    const list = element("div");
    const show = () => {
      const sample = state.get("sample", "average");
      const which = samples && samples.of[Number(sample)] ? Number(sample) : null;
      const value = (i) => (which === null ? values[i] : samples.values[which * genes.length + i]);
      const rows = Array.from(genes, (gene, i) => ({ gene, name: names[i], description: descriptions[i], value: value(i) }))
        .filter((row) => row.value !== 0 && !Number.isNaN(row.value))
        .sort((a, b) => b.value - a.value);
      const lowest = state.get("end") === "low";
      const bars = lowest ? rows.slice(-20).reverse() : rows.slice(0, 20);
      plot.replaceChildren();
      SAE.plots.bars(plot, bars.map((row) => ({ ...row, told: [row.description] })), {
        label: `Attribution of ${name}: ${bars.slice(0, 5).map((row) => row.name).join(", ")}, listed below`,
        name: `${name}_attribution`, x: `attribution${which === null ? ", average" : ""}`,
        onpick: (row) => location.assign(SAE.link.gene(row.gene, row.name)),
        csv: () => [["gene", "attribution", "description"], rows.map((row) => [row.name, row.value, row.description])],
      });
      SAE.table(list, [
        columns.gene, columns.number("value", "Attribution"),
        { name: "description", title: "What it is", long: true, render: (text, row) => element("div", {}, [text ? element("div", {}, text) : null, SAE.abroad(row.name)]) },
      ], rows, { sort: "value", descending: true, page: 10, caption: "Genes by attribution", empty: "No gene contributes." });
    };
    content.append(
      element("div", { class: "tools" }, [
        samples ? choice("Show", "sample", [["average", `the average of ${number(pairs.length)} samples`], ...pairs], show)
          : element("span", { class: "note" }, "The average; single samples were not kept."),
        choice("Genes", "end", [["high", "raise it most"], ["low", "lower it most"]], show),
      ]),
      plot,
      element("details", { open: state.get("list") !== null, ontoggle: (event) => state.set({ list: event.target.open ? "1" : null }) }, [
        element("summary", {}, `What the genes are: ${number(genes.length)} of ${number(found.n_genes)}, with links`), list,
      ]),
    );
    show();
  });

  lazily("dge", async () => {
    const found = await SAE.load(`${subject}/dge`);
    if (found.absent || found.names) return found;
    const { genes } = await SAE.load("names");
    return { ...found, names: Array.from(found.genes, (gene) => genes[gene]) };
  }, (found, content) => {
    const { genes, names, log2_fold_change: change, log10_p: p } = found;
    const rows = Array.from(genes, (gene, i) => ({ gene, name: names[i], change: change[i], log10_p: p[i], significant: found.significant[i] }));
    const drawn = rows.filter((row) => Number.isFinite(row.change) && Number.isFinite(row.log10_p));
    const side = (row) => (!row.significant ? 2 : row.change > 0 ? 0 : 1);
    content.append(element("p", { class: "note" }, [
      found.told ? `${found.told} ` : "", found.complete ? "" : `Only the ${number(rows.length)} genes with the largest |t| were kept. `,
      found.n_untested ? `${number(found.n_untested)} genes that never vary are not tested.` : "",
    ]));
    const volcano = element("div");
    const list = element("div");
    content.append(element("div", { class: "halves" }, [volcano, list]));
    if (drawn.length) {
      const x = SAE.points.quantise(drawn.map((row) => row.change));
      const y = SAE.points.quantise(drawn.map((row) => row.log10_p));
      // The names of the genes that stand out, as many of those that rise as of those that fall.
      const outstanding = (which) => [...drawn.keys()].filter((i) => side(drawn[i]) === which)
        .sort((a, b) => drawn[b].log10_p * Math.abs(drawn[b].change) - drawn[a].log10_p * Math.abs(drawn[a].change)).slice(0, 10);
      SAE.points(volcano, {
        x: x.codes, y: y.codes, x_range: x.range, y_range: y.range, label: `Volcano plot of ${name}`, name: `${name}_volcano`,
        height: 380, axes: { x: "log2 fold change", y: "−log10 p" },
        labels: [...outstanding(0), ...outstanding(1)].map((row) => ({ row, text: drawn[row].name })),
        colour: {
          kind: "category", title: `${found.rule}:`, codes: drawn.map(side), missing: null,
          categories: ["higher when active", "lower when active", "not significant"], colours: ["#d55e00", "#0072b2", "#8a979d"],
        },
        describe: () => `${number(drawn.length)} genes; the table lists them.`,
        tooltip: (row) => [drawn[row].name, ["log2 fold change", drawn[row].change], ["p", SAE.smallOf(drawn[row].log10_p)]],
        csv: () => [["gene", "log2_fold_change", "-log10_p"], rows.map((row) => [row.name, row.change, row.log10_p])],
        on: { pick: (row) => location.assign(SAE.link.gene(drawn[row].gene, drawn[row].name)) },
      });
    }
    SAE.table(list, [
      columns.gene, columns.number("change", "log2 fold change"), columns.log10("log10_p", "p"), columns.abroad,
    ], rows, {
      sort: state.get("dge", "change"), descending: state.get("dge_up") === null, page: 12, caption: "Differential expression",
      file: `${name}_dge`, onsort: (sort, descending) => state.set({ dge: sort, dge_up: descending ? null : "1" }),
    });
  });

  /* Terms ----------------------------------------------------------------------------------- */

  lazily("terms", document_("terms"), (found, content) => {
    if (found.tests) content.append(element("p", { class: "note" }, `${found.tests} Marked rows name the feature. Relevant genes differ, up or down, between its cells and the others.`));
    const place = element("div");
    content.append(place);
    SAE.table(place, [
      columns.term,
      columns.log10("log10_q", "q", "calibrated false discovery rate"),
      columns.log10("log10_p", "p"),
      columns.number("auc", "AUC", "how well the term's genes rank above the others"),
      columns.number("change", "Change", "mean change of the term's genes"),
      { name: "direction", title: "Direction" },
      columns.number("hits", "Hits", "of the term's genes, those among the relevant ones"),
      columns.number("size", "Genes"),
      { name: "genes", title: "Relevant genes", description: "the term's genes that differ most, up or down", value: (row) => (row.genes || []).join(", ") },
    ], found.rows, {
      sort: state.get("term_sort", "log10_q"), descending: state.get("term_up") === null, page: 10, file: `${name}_terms`,
      caption: "Terms", mark: (row) => row.named, empty: "No term was tested here.",
      onsort: (sort, descending) => state.set({ term_sort: sort, term_up: descending ? null : "1" }),
    });
  });

  lazily("gsea", async () => {
    const made = await Promise.all(["attribution", "dge"].map((by) => SAE.load(`${subject}/gsea/${by}`)));
    return made.every((each) => each.absent) ? made[0] : { attribution: made[0], dge: made[1] };
  }, (found, content) => {
    const place = element("div");
    const show = () => {
      place.replaceChildren();
      const by = state.get("gsea", found.attribution.absent ? "dge" : "attribution");
      const now = found[by] || found.attribution;
      if (now.absent) return place.append(SAE.absent(now.absent));
      const least = Math.min(1, ...now.rows.map((row) => row.q ?? 1));
      if (least > 0.05) place.append(element("p", { class: "note" }, `No term is significant at q ≤ 0.05: the least q is ${SAE.small(least)}.`));
      const curve = element("div", { class: "curve" });
      const list = element("div");
      place.append(element("div", { class: "halves" }, [list, curve]));
      const drawn = Object.keys(now.curves);
      const draw = (term) => {
        const row = now.rows.find((each) => String(each.term) === String(term));
        const { hits, at, sum } = now.curves[term];
        const drawing = element("div");
        curve.replaceChildren(
          element("h3", {}, row.name),
          element("p", { class: "note" }, `ES ${number(row.es)}, NES ${number(row.nes)}, q ${SAE.small(row.q)}`),
          drawing,
        );
        SAE.plots.curves(drawing, [{ name: row.name, x: at, y: sum }], {
          label: `Running sum of ${row.name}`, name: `${name}_gsea_${row.term}`, height: 280, x: "rank of the gene", y: "running sum",
          ticks: hits, floor: Math.min(0, ...sum) - 0.06,
        });
        if (row.lead?.length) curve.append(element("p", { class: "note" }, `Leading edge: ${row.lead.slice(0, 30).join(", ")}${row.lead.length > 30 ? " …" : ""}`));
      };
      const curveColumn = {
        name: "curve", title: "Curve", csv: false, value: (row) => (String(row.term) in now.curves ? "curve" : ""),
        render: (value, row) => (value ? element("button", {
          type: "button", class: "small", onclick: () => {
            state.set({ curve: row.term });
            draw(row.term);
          },
        }, "show") : ""),
      };
      SAE.table(list, [
        columns.term, columns.number("nes", "NES", "normalised enrichment score"), columns.number("es", "ES"),
        columns.small("p", "p"), columns.small("q", "q"), columns.number("size", "Genes"),
        ...(drawn.length ? [curveColumn] : []),
      ], now.rows, {
        sort: state.get("gsea_sort", "q"), descending: state.get("gsea_down") !== null, page: 10, file: `${name}_gsea_${by}`,
        caption: `GSEA by ${by}`, onsort: (sort, descending) => state.set({ gsea_sort: sort, gsea_down: descending ? "1" : null }),
      });
      const asked = state.get("curve");
      const best = now.rows.find((row) => String(row.term) in now.curves);
      if (now.missing?.curves) curve.append(SAE.absent(now.missing.curves));
      if (drawn.includes(asked)) draw(asked);
      else if (best) draw(best.term);
    };
    content.append(element("div", { class: "tools" }, choice("Genes ranked by", "gsea",
      found.attribution.absent ? [["dge", "differential expression"], ["attribution", "attribution"]] : [["attribution", "attribution"], ["dge", "differential expression"]],
      () => {
        state.set({ curve: null });
        show();
      })), place);
    show();
  });

  lazily("deletion", document_("deletion"), (found, content) => {
    const place = element("div");
    const show = () => {
      const { curves, areas, insertion_areas: inserted } = state.get("curve_of") === "held" && found.held_out ? found.held_out : found;
      const kind = state.get("deletion", "deletion");
      const shown = curves.filter((each) => each.kind === kind);
      const told = Object.entries((kind === "deletion" ? areas : inserted) || {}).map(([order, area]) => `${order} ${number(area)}`).join(", ");
      const drawing = element("div");
      place.replaceChildren(drawing, told ? element("p", { class: "note" }, `Area under the curve (${kind === "deletion" ? "less" : "more"}: the first genes matter more): ${told}.`) : "");
      SAE.plots.curves(drawing, shown.map((each) => ({ name: each.order, x: each.n_genes, y: each.activation })), {
        label: `Curves of ${kind}, ${name}`, name: `${name}_${kind}`, height: 300, x: "genes exchanged", y: "share of the activation",
      });
    };
    content.append(
      element("div", { class: "tools" }, [
        choice("Curve of", "deletion", [...new Set(found.curves.map((each) => each.kind))].map((kind) => [kind, kind]), show),
        found.held_out ? choice("on", "curve_of", [["own", "the attributed cells"], ["held", "other cells"]], show) : null,
      ]),
      place,
    );
    show();
  });

  lazily("nearest", () => Promise.all([SAE.load(`${subject}/page`), SAE.load("about")]), ([page, about], content) => {
    const halves = element("div", { class: "halves" });
    content.append(halves);
    const list = (title, rows, needs, value, description) => {
      const place = element("div");
      halves.append(element("div", {}, [element("h3", {}, title), place]));
      if (!rows.length && about.panels[needs]) return place.append(SAE.absent(about.panels[needs]));
      return SAE.table(place, [columns.feature, columns.number("value", value, description), columns.label], rows, {
        sort: "value", descending: true, page: 10, caption: title, file: `${name}_nearest`, empty: "No other feature is like it.",
      });
    };
    list("By decoder", page.nearest_decoder, "decoder", "Cosine", "cosine similarity of the decoder's directions");
    list("By activation", page.nearest_activation, "cells", "Correlation", "Pearson correlation of the activations over all cells");
  });
})();

/* The pages of a gene, a term, a label and a cell: facts, and tables of the features they have. */
"use strict";

(function () {
  const SAE = window.SAE;
  const { element, number } = SAE;
  const { columns } = SAE;
  const kind = document.body.dataset.page;
  const lists = document.querySelector("#lists");
  const head = document.querySelector("#entity");

  function facts(pairs) {
    const known = Object.entries(pairs).filter(([, value]) => value !== null && value !== undefined && value !== "" && String(value) !== "");
    return element("dl", { class: "facts" }, known.map(([name, value]) =>
      element("div", {}, [element("dt", {}, name), element("dd", {}, value instanceof Node ? value : number(value))])));
  }

  function entitle(title, what) {
    head.querySelector("h1").replaceChildren(String(title), " ", element("span", { class: "chip" }, what));
    document.title = `${title} · ${document.title}`;
  }

  /** A panel with a table; an absent analysis says what makes it. */
  function list(title, note, shown, rows, options) {
    const place = element("div", { class: "content" });
    lists.append(element("section", { class: `panel ${options.wide ? "wide" : ""}`, "aria-label": title }, [
      element("h2", {}, title), note ? element("p", { class: "note" }, note) : null, place,
    ]));
    if (options.missing) place.append(SAE.absent(options.missing));
    else if (kinds && shown.includes(columns.feature)) place.append(...byKind(shown, rows, { ...LIST, caption: title, ...options }));
    else SAE.table(place, shown, rows, { ...LIST, caption: title, ...options });
    if (options.of > rows.length) place.append(element("p", { class: "note" }, `Of ${number(options.of)} the first ${number(options.most)}${kinds ? " of each kind" : ""} are listed.`));
  }

  // Neurons, which concepts are compared with, are dense and fill every list: they are asked for.
  const LIST = { descending: true, page: 20 };
  let kinds = null;
  function byKind(shown, rows, options) {
    const place = element("div");
    const select = element("select", {}, [["concept", "concepts"], ["neuron", "neurons"], ["", "both"]].map(
      ([value, text]) => element("option", { value, selected: value === SAE.state.get("kind", "concept") }, text),
    ));
    const show = () => {
      const some = rows.filter((row) => !select.value || kinds[row.feature] === select.value);
      const empty = rows.length ? `None, but ${rows.length} of the other kind.` : options.empty;
      SAE.table(place, shown, some, { ...options, empty });
    };
    select.addEventListener("change", () => {
      SAE.state.set({ kind: select.value });
      show();
    });
    show();
    return [element("div", { class: "tools" }, element("label", {}, ["Show", select])), place];
  }

  /** The kind of every feature; null where there is but one. */
  async function kindsOf() {
    const about = await SAE.load("about");
    if (Object.keys(about.kinds).length < 2) return null;
    return SAE.values(await SAE.load("features"), "kind");
  }

  const drawn = {
    gene(found, content) {
      entitle(found.name, "gene");
      content.append(
        found.description ? element("p", { class: "lead" }, found.description) : "",
        facts({ "Also called": (found.aliases || []).join(", "), Ensembl: [found.ensembl || []].flat().join(", ") }),
        element("p", { class: "outs" }, (found.links || []).map((each) => SAE.out(each.title, each.href))),
      );
      list("Features that it drives", `By attribution: how much its expression raises the feature. ${found.told.driven}`, [
        columns.feature, columns.number("value", "Attribution"), columns.number("rank", "Rank", "of the gene among the feature's genes"), columns.label,
      ], found.driven, { missing: found.missing.driven, of: found.n_driven, most: found.most, sort: "value", file: `${found.name}_driven`, empty: "It drives no feature that was attributed." });
      list("Features in whose cells it differs", `By differential expression between cells in which the feature is active and others. ${found.told.differing}`, [
        columns.feature, columns.number("log2_fold_change", "log2 fold change"), columns.number("t", "t"), columns.number("rank", "Rank"), columns.label,
      ], found.differing, { missing: found.missing.differing, of: found.n_differing, most: found.most, sort: "t", file: `${found.name}_differing`, empty: "It is among the top genes of no feature." });
      list("Terms", "", [columns.term, columns.number("size", "Genes")], found.terms, {
        missing: found.missing.terms,
        sort: "size", descending: false, file: `${found.name}_terms`, empty: "No term of this run holds it.",
      });
    },
    term(found, content) {
      entitle(found.name, "term");
      content.append(facts({ Id: found.id, Genes: found.size }));
      list("Features that it names", "By the lens' tests or, as the table says, by GSEA of attributions or of differential expression.", [
        columns.feature, columns.log10("log10_q", "q"), columns.number("auc", "AUC"), columns.number("nes", "NES"), { name: "direction", title: "Direction" },
        { name: "by", title: "By" }, columns.label,
      ], found.features, { of: found.n_features, most: found.most, sort: "log10_q", file: "term_features", empty: "It names no feature." });
      list("Genes", "", [columns.gene, columns.abroad], found.genes, { missing: found.missing.genes, sort: "name", descending: false, file: "term_genes" });
    },
    label(found, content) {
      entitle(found.value, found.column);
      content.append(facts({ Cells: found.n_cells }));
      list("Features that mark it", "The first tell its cells best from all others (AUROC 0.5: not at all, 1: perfectly). Marked: at least 70 % of at least 100 active cells have this label.", [
        columns.feature, columns.number("auroc", "AUROC"),
        columns.share("share", "Of the active cells", "of the cells in which the feature is active, and that have a label, the share with this one"),
        columns.share("of_label", "Of the label's cells", "of the cells with this label, the share in which the feature is active"),
        columns.number("n_active", "Active of them", "cells with this label in which the feature is active"),
      ], found.features, {
        of: found.n_features, most: found.most, sort: "auroc", wide: true, file: "label_features", mark: (row) => row.share >= 0.7 && row.n_active / row.share >= 100,
      });
    },
    cell(found, content) {
      entitle(found.name, "cell");
      content.append(facts(found.metadata));
      list("Its strongest features", "", [
        columns.feature, columns.number("activation", "Activation"),
        columns.share("of_max", "Of the highest", "of the feature's highest activation in any cell"), columns.label,
      ], found.features, { of: found.n_features, most: found.most, sort: "activation", wide: true, file: "cell_features", empty: "No feature is active in it." });
    },
  };

  SAE.fill(head, () => Promise.all([SAE.load(SAE.subject()), kindsOf()]), ([found, known], content) => {
    kinds = known;
    lists.replaceChildren();
    drawn[kind](found, content);
  });
})();

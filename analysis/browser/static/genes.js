/* How genes, terms, cells and features are named in tables: links within the browser and out of it. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});
  const link = (href, text, more = {}) => SAE.element("a", { href, ...more }, String(text));

  /** A link to another site: it learns nothing of where the reader came from. */
  SAE.out = function (title, href) {
    if (!/^https:\/\//.test(href)) return null;
    return link(href, title, { target: "_blank", rel: "noopener noreferrer", class: "out" });
  };

  /** Where a gene is described: NCBI Gene, the Human Protein Atlas, PubMed. */
  SAE.abroad = function (symbol) {
    const name = encodeURIComponent(symbol);
    return SAE.element("span", { class: "outs" }, [
      SAE.out("NCBI", `https://www.ncbi.nlm.nih.gov/gene/?term=${name}`),
      SAE.out("Atlas", `https://www.proteinatlas.org/search/${name}`),
      SAE.out("PubMed", `https://pubmed.ncbi.nlm.nih.gov/?term=${name}`),
    ]);
  };

  /** Columns for SAE.table. */
  SAE.columns = {
    feature: { name: "name", title: "Feature", render: (name, row) => link(SAE.link.feature(row.feature, name), name) },
    gene: { name: "name", title: "Gene", render: (name, row) => link(SAE.link.gene(row.gene, name), name, { title: row.description || null }) },
    term: { name: "name", title: "Term", long: true, render: (name, row) => link(SAE.link.term(row.term), name) },
    cell: { name: "name", title: "Cell", render: (name, row) => link(SAE.link.cell(row.cell), name) },
    label: { name: "label", title: "Best label" },
    abroad: { name: "links", title: "Elsewhere", csv: false, value: () => null, render: (_, row) => SAE.abroad(row.name) },
    /** A number. */
    number: (name, title, description) => ({ name, title, description, kind: "number" }),
    /** A p or q value. */
    small: (name, title, description) => ({ name, title, description, kind: "number", first: "low", text: SAE.small }),
    /** A p or q value that is kept as -log10. */
    log10: (name, title, description) => ({
      name, title, description: `${description || title}; sorted by -log10`, kind: "number", text: SAE.smallOf,
    }),
    /** A share in [0, 1], with a bar. */
    share: (name, title, description) => ({
      name, title, description, kind: "number",
      render: (value) => {
        if (value === null || Number.isNaN(value)) return "–";
        const bar = SAE.element("span", { class: "share-bar", "aria-hidden": "true" }, SAE.element("span"));
        bar.firstChild.style.width = `${100 * Math.min(1, Math.max(0, value))}%`;
        return SAE.element("span", { class: "share" }, [bar, SAE.element("span", { class: "percent" }, `${(100 * value).toFixed(1)} %`)]);
      },
    }),
  };
})();

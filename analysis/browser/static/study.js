/* An item of a study: its panels, its form, and saving at every change.

   One request is under way at a time. One that fails is sent again as it was, under the same name
   (the server adds it once), until it is acknowledged; only then goes what was typed meanwhile. So
   nothing is called saved that is not, and a lost reply does not look like another window's change. */
"use strict";

(function () {
  const SAE = window.SAE;
  const page = document.querySelector("#item");
  SAE.keys({ o: [() => location.assign("/study"), "all items"] });
  if (!page) return;
  const form = document.querySelector("#form");
  const state = document.querySelector("#state");
  const other = document.querySelector("#other");
  const [retry, undo, save] = ["#retry", "#undo", "#save"].map((id) => document.querySelector(id));
  const address = `/study/item/${page.dataset.number}`;

  /* Saving ---------------------------------------------------------------------------------- */

  const TYPING = 500; // milliseconds without a key before words are sent
  let version = Number(page.dataset.version);
  let held = text(typed()); // what the server has acknowledged
  const blank = Object.fromEntries(Object.keys(typed()).map((key) => [key, key.endsWith("_words") ? "" : null]));
  let sent = null; // the request that is not acknowledged yet
  let failures = 0;
  let timer = 0;
  let running = null;

  function typed() {
    const answer = {};
    for (const field of form.elements) {
      if (field.type === "radio") {
        if (!(field.name in answer)) answer[field.name] = null;
        if (field.checked) answer[field.name] = field.value;
      } else if (field.name) answer[field.name] = field.value;
    }
    return answer;
  }
  function text(answer) {
    return JSON.stringify(Object.keys(answer).sort().map((key) => [key, answer[key]]));
  }
  const clock = (at) => new Date(at).toLocaleTimeString("en-GB", { hour12: false });
  const dirty = () => sent !== null || text(typed()) !== held;
  function tell(kind, text) {
    state.dataset.kind = kind;
    state.textContent = text;
    retry.hidden = kind !== "failed";
  }

  async function post(what) {
    let response;
    try {
      response = await fetch(`${address}/${what.to}`, {
        method: "POST", body: JSON.stringify(what.body), keepalive: true,
        headers: { "Content-Type": "application/json", "X-CSRF-Token": page.dataset.csrf },
      });
    } catch {
      throw new Error("the server does not answer");
    }
    if (response.ok) return response.json();
    const error = new Error((await response.text()).slice(0, 300) || `status ${response.status}`);
    error.refused = response.status >= 400 && response.status < 500; // as it is, it never will be taken
    throw error;
  }
  const request = (to, more) => ({ to, body: { base: version, save: name(), ...more } });
  const name = () =>
    Array.from(crypto.getRandomValues(new Uint8Array(16)), (each) => each.toString(16).padStart(2, "0")).join("");

  /** Sends until nothing is left to send; the promise says whether all is saved. */
  function flush() {
    clearTimeout(timer);
    if (!running) running = drain().finally(() => (running = null));
    return running;
  }
  async function drain() {
    while (dirty()) {
      if (!sent) sent = request("answer", { answer: typed() });
      tell("saving", "saving …");
      try {
        acknowledge(await post(sent));
      } catch (error) {
        if (error.refused) {
          sent = null;
          tell("failed", `failed: ${error.message}`);
        } else {
          failures += 1;
          tell("failed", `failed (${error.message}), retrying`);
          timer = setTimeout(flush, 1000 * Math.min(30, 2 ** failures));
        }
        return false;
      }
    }
    return true;
  }
  function acknowledge(saved) {
    // What was typed while an undo was under way is newer than it, and stays.
    if (sent.to === "undo" && text(typed()) === held) write(saved.answer);
    held = text({ ...blank, ...saved.answer });
    [sent, failures, version] = [null, 0, saved.version];
    undo.disabled = !saved.can_undo;
    count();
    if (dirty()) tell("unsaved", "unsaved");
    else tell("saved", saved.at ? `saved at ${clock(saved.at)}` : "nothing to save yet");
    other.hidden = !saved.other;
    if (saved.other) {
      other.textContent =
        `Another window had saved something else here at ${clock(saved.other.at)}: ${summary(saved.other.answer)}. ` +
        "This is saved over it; Undo brings it back.";
    }
  }
  const summary = (answer) =>
    Object.entries(answer).filter(([, value]) => value).map(([key, value]) => `${key.replace("_words", "")}: ${value}`)
      .join("; ") || "nothing";
  function write(answer) {
    for (const field of form.elements) {
      if (field.type === "radio") field.checked = answer[field.name] === field.value;
      else if (field.name) field.value = answer[field.name] || "";
    }
    words();
  }

  form.addEventListener("input", (event) => {
    clearTimeout(timer);
    tell("unsaved", "unsaved");
    words();
    if (event.target.type === "radio") flush();
    else timer = setTimeout(flush, TYPING);
  });
  form.addEventListener("change", flush);
  retry.addEventListener("click", flush);
  undo.addEventListener("click", takeBack);
  async function takeBack() {
    if (undo.disabled || !(await flush())) return;
    sent = request("undo", {});
    await flush();
  }
  async function go(link) {
    if (await flush()) location.assign(link.href);
    else if (!retry.hidden) retry.focus();
  }
  const next = document.querySelector("#next");
  const previous = document.querySelector("#previous");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(next);
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='/study']");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button || !dirty()) return;
    event.preventDefault();
    go(link);
  });
  window.addEventListener("beforeunload", (event) => {
    if (!dirty()) return;
    flush();
    event.preventDefault();
  });
  window.addEventListener("pageshow", (event) => event.persisted && location.reload());
  window.addEventListener("online", () => dirty() && flush());

  /** Words are asked for where there is something to say, and stay where something was said. */
  function words() {
    const answer = typed();
    for (const field of form.querySelectorAll("[name$='_words']")) {
      const choice = answer[field.name.replace("_words", "")];
      const shown = Boolean(field.value) || choice === "yes" || choice === "unclear";
      field.hidden = form.querySelector(`label[for='${field.id}']`).hidden = !shown;
    }
  }
  const answered = document.querySelector("#answered");
  const complete = () => Object.entries(typed()).every(([key, value]) => key.endsWith("_words") || value);
  let wasComplete = complete();
  function count() {
    if (complete() === wasComplete) return;
    wasComplete = !wasComplete;
    answered.textContent = Number(answered.textContent) + (wasComplete ? 1 : -1);
    answered.parentElement.querySelector("progress").value = Number(answered.textContent);
  }

  words();
  undo.disabled = page.dataset.canUndo !== "1";
  if (page.dataset.at) tell("saved", `saved at ${clock(page.dataset.at)}`);

  /* Keys ------------------------------------------------------------------------------------ */

  document.addEventListener("keydown", (event) => {
    const where = event.target;
    if (event.isComposing || event.altKey) return;
    if (event.key === "Enter") {
      const goes = where.matches("textarea") ? event.ctrlKey || event.metaKey : !where.matches("a, button, select, summary");
      if (!goes || where.closest("dialog")) return;
      event.preventDefault();
      if (!event.repeat) go(next);
    }
  });
  /* A chosen radio button keeps the focus; it takes no letters, so keys work there too. */
  form.addEventListener("keydown", (event) => {
    if (event.target.type !== "radio" || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act[0]();
  });
  const keys = {
    n: [() => go(next), "next item"],
    p: [() => previous && go(previous), "previous item"],
    u: [takeBack, "undo"],
    "[": [() => step(-1), "previous sample"],
    "]": [() => step(1), "next sample"],
  };
  SAE.keys(keys);

  /* Panels ---------------------------------------------------------------------------------- */

  const bars = document.querySelector("#bars");
  const choice = document.querySelector("#sample");
  let shown = null;

  function draw() {
    const k = choice ? Number(choice.value) : -1;
    const rows = k < 0 ? shown.average : shown.samples[k].bars;
    const all = [shown.average, ...(shown.samples || []).map((each) => each.bars)].flat();
    const low = Math.min(0, ...all.map((row) => row[1]));
    const place = (value) => `${(100 * (value - low)) / (1 - low)}%`;
    bars.replaceChildren(...rows.map(([gene, value]) => {
      const bar = SAE.element("span", { class: value < 0 ? "bar below" : "bar" });
      bar.style.left = place(Math.min(0, value));
      bar.style.width = `${(100 * Math.abs(value)) / (1 - low)}%`;
      const told = shown.genes[gene];
      const label = SAE.element("button", { type: "button", class: "name", onclick: () => describe(told, true) }, told.name);
      label.addEventListener("focus", () => describe(told, true));
      return SAE.element("li", { title: told.description, onmouseenter: () => describe(told, false) }, [
        label, SAE.element("span", { class: "track" }, bar),
        SAE.element("span", { class: "value" }, value.toFixed(2)),
      ]);
    }));
  }
  /** A gene that was chosen stays: on the way to its links the pointer crosses others. */
  let chosen = false;
  function describe(gene, choose) {
    if (chosen && !choose) return;
    chosen = choose;
    const links = (gene.links || []).map((each) =>
      SAE.element("a", { href: each.href, target: "_blank", rel: "noreferrer noopener" }, each.title));
    document.querySelector("#gene").replaceChildren(
      SAE.element("p", {}, [SAE.element("strong", {}, gene.name), gene.description ? ` ${gene.description}` : ""]),
      SAE.element("p", { class: "tools" }, links),
    );
  }
  function step(by) {
    if (!choice) return;
    const n = choice.options.length;
    choice.selectedIndex = (choice.selectedIndex + by + n) % n;
    draw();
  }
  function table(columns, cells) {
    const row = (tag, values) => SAE.element("tr", {}, values.map((each, i) =>
      SAE.element(i && tag === "td" ? "td" : "th", { scope: tag === "th" ? "col" : i ? null : "row" }, each)));
    document.querySelector("#cells thead").append(row("th", ["", ...columns]));
    document.querySelector("#cells tbody").append(...cells.map((each, i) => row("td", [String(i + 1), ...each])));
  }
  async function panels() {
    const absent = document.querySelector("#absent");
    try {
      shown = await SAE.json(`${address}/data`);
    } catch (error) {
      absent.textContent = `What this item shows did not come: ${error.message} Reload the page.`;
      absent.hidden = false;
      return;
    }
    if (shown.cells) table(shown.columns, shown.cells);
    (shown.samples || []).forEach((each, i) => choice.append(SAE.element("option", { value: i }, each.title)));
    if (choice) choice.addEventListener("change", draw);
    document.querySelector("#sample-back")?.addEventListener("click", () => step(-1));
    document.querySelector("#sample-on")?.addEventListener("click", () => step(1));
    if (bars) draw();
    page.dataset.state = "there";
  }
  panels();
})();

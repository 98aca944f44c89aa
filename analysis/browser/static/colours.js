/* Colours of data: one sequential scale, one list of categories, both told apart by all eyes.

   A palette is a Uint8Array of RGBA, four bytes a slot; alpha 0 hides what falls into the slot. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});

  // viridis (van der Walt and Smith), every sixteenth colour; between them it is linear.
  const VIRIDIS = (
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c " +
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
  ).split(" ");
  // Okabe and Ito's seven (black would vanish on a dark page), then those that lie furthest from
  // all before them, from the greys and from both papers, in OKLab, for normal, deutan and protan eyes.
  const CATEGORIES = (
    "0072b2 e69f00 009e73 d55e00 56b4e9 cc79a7 f0e442 4b3cff 9678ff 78c387 b42d87 c31e00 " +
    "d20fc3 a5e187 f05a69 87d2ff ff78d2 965a5a e1c33c 6969e1 c369d2 d2872d ff9669 a56996"
  ).split(" ");

  const bytes = (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));

  /** The value of a CSS variable of the page. */
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** A CSS colour #rgb or #rrggbb as three bytes. */
  function parsed(colour) {
    const hex = colour.replace("#", "");
    return bytes(hex.length === 3 ? hex.replace(/./g, "$&$&") : hex);
  }

  /** Whether the page is dark now. */
  const dark = () => {
    const [red, green, blue] = parsed(variable("--card"));
    return red + green + blue < 384;
  };

  /** The sequential scale at t in [0, 1], as three bytes: what is high stands out from the paper.

      High is dark on a light page and light on a dark one; the end next to the paper is cut off. */
  function sequential(t, onDark) {
    const at = 16 * (onDark ? 0.25 + 0.75 * t : 0.92 * (1 - t));
    const low = Math.min(15, Math.floor(at));
    const [a, b] = [bytes(VIRIDIS[low]), bytes(VIRIDIS[low + 1])];
    return a.map((value, i) => Math.round(value + (at - low) * (b[i] - value)));
  }

  /** The sequential scale as a palette of 256. */
  function sequentialPalette(onDark) {
    const palette = new Uint8Array(4 * 256);
    for (let i = 0; i < 256; i++) palette.set([...sequential(i / 255, onDark), 255], 4 * i);
    return palette;
  }

  /** The colour of a category by its place in the legend; after the last it starts again. */
  const category = (place) => bytes(CATEGORIES[place % CATEGORIES.length]);

  /** Codes as places in the legend: the most frequent categories first, the others together.

      {slots (uint8 per point), entries: [{name, code (null: several), n, colour: RGB or null (grey)}]}. */
  function legend({ codes, categories, missing, colours }) {
    const counts = new Uint32Array(Math.max(categories.length, (missing ?? -1) + 1));
    for (let i = 0; i < codes.length; i++) counts[codes[i]]++;
    const present = Array.from(counts.keys()).filter((code) => counts[code] && code !== missing);
    const listed = present.length <= CATEGORIES.length ? present
      : [...present].sort((a, b) => counts[b] - counts[a]).slice(0, CATEGORIES.length).sort((a, b) => a - b);
    const entries = listed.map((code, place) => ({
      name: String(categories[code]), code, n: counts[code],
      colour: colours ? parsed(colours[code]) : category(place),
    }));
    const place = new Uint8Array(counts.length).fill(entries.length);
    listed.forEach((code, i) => (place[code] = i));
    const others = present.length - listed.length;
    if (others) {
      const n = present.reduce((sum, code) => sum + counts[code], 0) - entries.reduce((sum, each) => sum + each.n, 0);
      entries.push({ name: `${others} others`, code: null, n, colour: null });
    }
    if (missing !== null && missing !== undefined && counts[missing]) {
      place[missing] = entries.length;
      entries.push({ name: "missing", code: missing, n: counts[missing], colour: null });
    }
    return { slots: Uint8Array.from(codes, (code) => place[code]), entries };
  }

  /** Where values lie in a range, in [0, 1], clipped; by their logarithm if asked. */
  function scale([low, high], log) {
    const turn = log ? Math.log : (value) => value;
    const [a, b] = [turn(low), turn(high)];
    return (value) => {
      const t = b > a ? (turn(Math.max(value, log ? low : -Infinity)) - a) / (b - a) : 1;
      return Math.min(1, Math.max(0, t));
    };
  }

  /** About n round numbers over [low, high], ascending; powers of ten (and 2, 5) on a log scale. */
  function ticks(low, high, n = 5, log = false) {
    if (!(high > low)) return [low];
    if (log) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
        for (const m of Math.log10(high / low) < 2 ? [1, 2, 5] : [1]) found.push(m * 10 ** e);
      }
      return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    }
    const rough = (high - low) / n;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
      found.push(Number((i * step).toPrecision(12)));
    }
    return found;
  }

  SAE.colours = {
    n: CATEGORIES.length,
    category, dark, legend, parsed, scale, sequential, sequentialPalette, ticks, variable,
  };
})();

/* Pictures that leave the page: what is drawn around points, as vectors or pixels, and downloads.

   A mark is one of {image, x, y, width, height}, {line: [[x, y], ...], colour, closed, fill},
   {text, x, y, anchor, turned, colour, size, halo}, {rect: [x, y, width, height], fill} or
   {disc: [x, y, radius], fill}; lengths are CSS pixels. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});
  const FONT = "system-ui, Helvetica, Arial, sans-serif";
  const escaped = (text) =>
    String(text).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`)
      .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "");

  /** Marks onto a 2-D context that is scaled to CSS pixels. */
  function paint(context, marks) {
    context.lineWidth = 1;
    for (const mark of marks) {
      if (mark.image) context.drawImage(mark.image, mark.x, mark.y, mark.width, mark.height);
      if (mark.line) {
        context.beginPath();
        mark.line.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
        if (mark.closed) context.closePath();
        if (mark.fill) {
          context.fillStyle = mark.fill;
          context.fill();
        }
        context.strokeStyle = mark.colour;
        context.lineWidth = mark.width || 1;
        context.stroke();
      }
      if (mark.rect) {
        context.fillStyle = mark.fill;
        context.fillRect(...mark.rect);
      }
      if (mark.disc) {
        context.beginPath();
        context.arc(...mark.disc, 0, 2 * Math.PI);
        context.fillStyle = mark.fill;
        context.fill();
      }
      if (mark.text !== undefined) {
        context.save();
        context.translate(mark.x, mark.y);
        if (mark.turned) context.rotate(-Math.PI / 2);
        context.font = `${mark.size || 11}px ${FONT}`;
        context.fillStyle = mark.colour;
        context.textAlign = { middle: "center", end: "right" }[mark.anchor] || "left";
        if (mark.halo) {
          [context.strokeStyle, context.lineWidth, context.lineJoin] = [mark.halo, 3, "round"];
          context.strokeText(mark.text, 0, 0);
        }
        context.fillText(mark.text, 0, 0);
        context.restore();
      }
    }
  }

  /** Marks as the text of an SVG file; images are embedded as PNG. */
  function svg(marks, width, height, paper) {
    const parts = marks.map((mark) => {
      if (mark.image) {
        const { x, y } = mark;
        const size = `width="${mark.width}" height="${mark.height}"`;
        return `<image x="${x}" y="${y}" ${size} href="${mark.image.toDataURL("image/png")}"/>`;
      }
      if (mark.line) {
        const points = mark.line.map((point) => point.map((value) => value.toFixed(1)).join(",")).join(" ");
        const stroke = `stroke="${mark.colour}" stroke-width="${mark.width || 1}"`;
        return `<poly${mark.closed ? "gon" : "line"} points="${points}" fill="${mark.fill || "none"}" ${stroke}/>`;
      }
      if (mark.rect) {
        const [x, y, w, h] = mark.rect;
        return `<rect x="${x}" y="${y}" width="${w}" height="${h}" fill="${mark.fill}"/>`;
      }
      if (mark.disc) {
        const [x, y, radius] = mark.disc;
        return `<circle cx="${x}" cy="${y}" r="${radius}" fill="${mark.fill}"/>`;
      }
      const place = mark.turned
        ? `transform="translate(${mark.x} ${mark.y}) rotate(-90)"`
        : `x="${mark.x}" y="${mark.y}"`;
      const style = `font-size="${mark.size || 11}" fill="${mark.colour}" text-anchor="${mark.anchor || "start"}"`;
      const halo = mark.halo ? ` stroke="${mark.halo}" stroke-width="3" paint-order="stroke" stroke-linejoin="round"` : "";
      return `<text ${place} ${style}${halo}>${escaped(mark.text)}</text>`;
    });
    return (
      `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" ` +
      `viewBox="0 0 ${width} ${height}" font-family="${FONT}">\n` +
      `<rect width="100%" height="100%" fill="${paper}"/>\n${parts.join("\n")}\n</svg>\n`
    );
  }

  /** Marks as a PNG at `scale` pixels a CSS pixel: a promise of a Blob. */
  function png(marks, width, height, paper, scale = 2) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width * scale, height * scale];
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = paper;
    context.fillRect(0, 0, width, height);
    paint(context, marks);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  /* Marks around points */

  const ink = (name) => SAE.colours.variable(name);

  /** Axes of a box [left, top, width, height] over two ranges, with titles {x, y}. */
  function axes([left, top, width, height], [lowX, highX], [lowY, highY], titles) {
    const muted = ink("--muted");
    const bottom = top + height;
    const marks = [{ line: [[left, top], [left, bottom], [left + width, bottom]], colour: ink("--line") }];
    for (const value of SAE.colours.ticks(lowX, highX, Math.max(2, Math.round(width / 80)))) {
      const x = left + (width * (value - lowX)) / (highX - lowX);
      marks.push({ line: [[x, bottom], [x, bottom + 4]], colour: muted });
      marks.push({ text: SAE.number(value), x, y: bottom + 16, anchor: "middle", colour: muted });
    }
    for (const value of SAE.colours.ticks(lowY, highY, Math.max(2, Math.round(height / 60)))) {
      const y = bottom - (height * (value - lowY)) / (highY - lowY);
      marks.push({ line: [[left - 4, y], [left, y]], colour: muted });
      marks.push({ text: SAE.number(value), x: left - 7, y: y + 4, anchor: "end", colour: muted });
    }
    marks.push({ text: titles.x, x: left + width / 2, y: bottom + 34, anchor: "middle", colour: muted, size: 12 });
    marks.push({ text: titles.y, x: 13, y: top + height / 2, anchor: "middle", turned: true, colour: muted, size: 12 });
    return marks;
  }

  /** Texts {text, x, y, beside (a point, else centred)} within a box, those that fit; the first first. */
  function labels([left, top, width, height], texts) {
    const taken = [];
    const marks = [];
    for (const { text, x, y, beside } of texts) {
      const half = 3.5 * text.length + 4; // of its width, of letters 12 pixels high
      const at = beside ? x + (x > width / 2 ? -half - 6 : half + 6) : x;
      const middle = Math.min(width - half, Math.max(half, at));
      const box = [middle - half, y - 8, middle + half, y + 6];
      const free = taken.every((b) => box[0] > b[2] || box[2] < b[0] || box[1] > b[3] || box[3] < b[1]);
      if (!free || x < 0 || x > width || y < 8 || y > height) continue;
      taken.push(box);
      marks.push({
        text, x: left + middle, y: top + y + 4, anchor: "middle", size: 12, colour: ink("--ink"), halo: ink("--card"),
      });
    }
    return marks;
  }

  /** A colour bar on a line, {low, high, log, title}: its marks and where they end. */
  function scale({ low, high, log, title }, y) {
    const dark = SAE.colours.dark();
    const marks = Array.from({ length: 64 }, (_, i) => (
      { rect: [60 + 2.5 * i, y - 9, 3, 10], fill: `rgb(${SAE.colours.sequential(i / 63, dark).join(",")})` }
    ));
    marks.push({ text: SAE.number(low), x: 54, y, anchor: "end", colour: ink("--ink") });
    marks.push({ text: `${SAE.number(high)}  ${title || ""}${log ? " (log)" : ""}`, x: 228, y, colour: ink("--ink") });
    return [marks, y + 10];
  }

  /** Categories {name, colour} in columns: their marks and where they end. */
  function list(entries, width, y) {
    const columns = Math.max(1, Math.floor(width / 180));
    const marks = entries.flatMap((each, i) => {
      const [left, base] = [8 + 180 * (i % columns), y + 16 * Math.floor(i / columns)];
      const fill = each.colour ? `rgb(${each.colour.join(",")})` : ink("--muted");
      const text = each.name.length > 26 ? `${each.name.slice(0, 25)}…` : each.name;
      return [{ disc: [left + 4, base - 4, 4], fill }, { text, x: left + 13, y: base, colour: ink("--ink") }];
    });
    return [marks, entries.length ? y + 16 * Math.ceil(entries.length / columns) - 6 : y - 16];
  }

  const TYPES = { png: "image/png", svg: "image/svg+xml", csv: "text/csv" };
  /** Buttons that download: {png: () => Blob, svg: () => text, csv: () => [columns, rows]}.

      Each may return a promise; name() or name is the file's name without its ending. */
  SAE.downloads = function (name, makers) {
    const buttons = Object.entries(makers).map(([kind, make]) =>
      SAE.element(
        "button",
        {
          type: "button",
          title: `Download ${{ png: "the picture", svg: "the picture as vectors", csv: "the numbers" }[kind]}`,
          "aria-label": `Download as ${kind.toUpperCase()}`,
          onclick: async () => {
            const made = await make();
            const stem = (typeof name === "function" ? name() : name).replace(/[^\w.+-]+/g, "_");
            SAE.download(`${stem}.${kind}`, kind === "csv" ? SAE.csv(...made) : made, TYPES[kind]);
          },
        },
        kind.toUpperCase(),
      ),
    );
    return SAE.element("div", { class: "downloads", role: "group", "aria-label": "Download" }, buttons);
  };

  SAE.picture = { axes, labels, list, paint, png, scale, svg };
})();

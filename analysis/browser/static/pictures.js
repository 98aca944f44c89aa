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

  SAE.picture = { paint, png, svg };
})();

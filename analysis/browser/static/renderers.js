/* Two ways to draw the same picture of points: WebGL, and a raster of our own where it is missing.

   A scene is {width, height (device pixels), paper: RGB bytes, view: [x0, x1, y0, y1] in units of the
   whole range (0 to 1), layers}. A layer is {x, y: Uint16Array, values: typed array or null, low,
   high, log, palette, radius (device pixels)}: points are drawn in order, so later ones lie on top,
   and a value falls into the slot of the palette that its place in [low, high] names. Values of
   integer slots take low = 0 and high = slots - 1. A layer's `step` draws every step-th point only
   (at most 63). `draw(scene, context)` fills a 2-D context; `quick` is how many points it draws
   without a pause that a moving hand would feel.

   One WebGL context serves every cloud of a page (browsers allow about sixteen): each is drawn into
   its hidden canvas and copied from there to the cloud's own. Buffers are kept by typed array. */
"use strict";

(function () {
  const SAE = (window.SAE = window.SAE || {});

  // The colour is looked up once a point, not once a pixel.
  const VERTEX = `
    attribute float x; attribute float y; attribute float value;
    uniform vec4 view; uniform vec2 range; uniform float logarithmic; uniform float side;
    uniform sampler2D palette; uniform float slots;
    varying vec3 colour;
    void main() {
      float v = logarithmic > 0.5 ? log(max(value, 1e-30)) : value;
      float place = range.y > range.x ? clamp((v - range.x) / (range.y - range.x), 0.0, 1.0) : 1.0;
      vec4 found = texture2D(palette, vec2((floor(place * (slots - 1.0) + 0.5) + 0.5) / slots, 0.5));
      colour = found.rgb;
      gl_Position = vec4((x - view.x) * view.z * 2.0 - 1.0, (y - view.y) * view.w * 2.0 - 1.0, 0.0, 1.0);
      if (found.a == 0.0) gl_Position.x = 9.0;
      gl_PointSize = side;
    }`;
  const FRAGMENT = `
    precision highp float;
    uniform float side; uniform float radius;
    varying vec3 colour;
    void main() {
      float cover = clamp(radius + 0.5 - side * length(gl_PointCoord - 0.5), 0.0, 1.0);
      gl_FragColor = vec4(colour, cover);
    }`;

  /** A WebGL renderer, or null where the browser has none. */
  function webgl() {
    const canvas = document.createElement("canvas");
    const gl = canvas.getContext("webgl", { alpha: false, antialias: false, depth: false });
    if (!gl || !gl.getParameter(gl.MAX_VERTEX_TEXTURE_IMAGE_UNITS)) return null;
    let program, at, buffers, palette, constant;

    function prepare() {
      program = gl.createProgram();
      for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
        const shader = gl.createShader(kind);
        gl.shaderSource(shader, source);
        gl.compileShader(shader);
        gl.attachShader(program, shader);
      }
      ["x", "y", "value"].forEach((name, i) => gl.bindAttribLocation(program, i, name));
      gl.linkProgram(program);
      if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) {
        throw new Error(gl.getProgramInfoLog(program));
      }
      gl.useProgram(program);
      at = {};
      for (const name of ["view", "range", "logarithmic", "side", "radius", "slots"]) {
        at[name] = gl.getUniformLocation(program, name);
      }
      buffers = new Map();
      palette = gl.createTexture();
      gl.bindTexture(gl.TEXTURE_2D, palette);
      for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) {
        gl.texParameteri(gl.TEXTURE_2D, name, gl.NEAREST);
      }
      for (const name of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) {
        gl.texParameteri(gl.TEXTURE_2D, name, gl.CLAMP_TO_EDGE);
      }
      gl.enable(gl.BLEND);
      gl.blendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA);
      gl.enable(gl.SCISSOR_TEST);
    }

    // The attribute reads the typed array as it came: two bytes a coordinate, no copy as floats.
    function attribute(index, array, step, normalised) {
      if (!array) {
        gl.disableVertexAttribArray(index);
        gl.vertexAttrib1f(index, 0);
        return;
      }
      if (!buffers.has(array)) {
        buffers.set(array, gl.createBuffer());
        gl.bindBuffer(gl.ARRAY_BUFFER, buffers.get(array));
        gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
      } else {
        gl.bindBuffer(gl.ARRAY_BUFFER, buffers.get(array));
      }
      const kind = { 1: gl.UNSIGNED_BYTE, 2: gl.UNSIGNED_SHORT, 4: gl.FLOAT }[array.BYTES_PER_ELEMENT];
      gl.enableVertexAttribArray(index);
      gl.vertexAttribPointer(index, 1, kind, normalised, step * array.BYTES_PER_ELEMENT, 0);
    }

    function draw(scene, context) {
      const { width, height, view } = scene;
      if (canvas.width < width) canvas.width = width;
      if (canvas.height < height) canvas.height = height;
      gl.viewport(0, 0, width, height);
      gl.scissor(0, 0, width, height);
      gl.clearColor(...scene.paper.map((value) => value / 255), 1);
      gl.clear(gl.COLOR_BUFFER_BIT);
      gl.uniform4f(at.view, view[0], view[2], 1 / (view[1] - view[0]), 1 / (view[3] - view[2]));
      for (const layer of scene.layers) {
        if (!layer.x.length) continue;
        const step = layer.step || 1;
        attribute(0, layer.x, step, true);
        attribute(1, layer.y, step, true);
        attribute(2, layer.values, step, false);
        const turn = layer.log ? Math.log : (value) => value;
        gl.uniform2f(at.range, turn(layer.low), turn(layer.high));
        gl.uniform1f(at.logarithmic, layer.log ? 1 : 0);
        gl.uniform1f(at.side, Math.ceil(2 * layer.radius + 1));
        gl.uniform1f(at.radius, layer.radius);
        gl.uniform1f(at.slots, layer.palette.length / 4);
        gl.texImage2D(
          gl.TEXTURE_2D, 0, gl.RGBA, layer.palette.length / 4, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, layer.palette,
        );
        gl.drawArrays(gl.POINTS, 0, Math.ceil(layer.x.length / step));
      }
      context.drawImage(canvas, 0, canvas.height - height, width, height, 0, 0, width, height);
    }

    /** Gives back the memory of arrays that are drawn no more. */
    function forget(arrays) {
      for (const array of arrays) {
        if (!buffers.has(array)) continue;
        gl.deleteBuffer(buffers.get(array));
        buffers.delete(array);
      }
    }

    const details = gl.getExtension("WEBGL_debug_renderer_info");
    const device = gl.getParameter(details ? details.UNMASKED_RENDERER_WEBGL : gl.RENDERER);
    prepare();
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => {
      prepare();
      document.dispatchEvent(new CustomEvent("theme")); // every cloud draws itself again
    });
    const software = /SwiftShader|llvmpipe|softpipe|Basic Render/i.test(device);
    return { name: "webgl", device, quick: software ? 60000 : 3000000, most: software ? 200000 : Infinity, draw, forget, lost: () => gl.isContextLost() };
  }

  /** The same picture from plain arrays. */
  function raster() {
    function draw(scene, context) {
      const { width, height, view, paper } = scene;
      const image = context.createImageData(width, height);
      const pixels = new Uint32Array(image.data.buffer); // ABGR: every browser's machine is little-endian
      const packed = ([red, green, blue]) => 0xff000000 | (blue << 16) | (green << 8) | red;
      pixels.fill(packed(paper));
      for (const { x, y, values, low, high, log, palette, radius, step = 1 } of scene.layers) {
        const slots = palette.length / 4;
        const colours = Array.from({ length: slots }, (_, i) => packed(palette.subarray(4 * i, 4 * i + 3)));
        const scaled = SAE.colours.scale([low, high], log);
        const [kx, ky] = [width / (view[1] - view[0]) / 65535, height / (view[3] - view[2]) / 65535];
        const [x0, y0] = [view[0] * 65535, view[2] * 65535];
        const reach = radius + 0.5;
        for (let i = 0; i < x.length; i += step) {
          const px = (x[i] - x0) * kx;
          const py = height - (y[i] - y0) * ky;
          if (px < 0 || py < 0 || px > width || py > height) continue;
          const slot = values ? Math.floor(scaled(values[i]) * (slots - 1) + 0.5) : 0;
          if (!palette[4 * slot + 3]) continue;
          const colour = colours[slot];
          const right = Math.min(width - 1, Math.floor(px + reach));
          const bottom = Math.min(height - 1, Math.floor(py + reach));
          for (let row = Math.max(0, Math.floor(py - reach)); row <= bottom; row++) {
            for (let column = Math.max(0, Math.floor(px - reach)); column <= right; column++) {
              const dx = column + 0.5 - px;
              const dy = row + 0.5 - py;
              const cover = reach - Math.sqrt(dx * dx + dy * dy);
              if (cover <= 0) continue;
              const place = row * width + column;
              pixels[place] = cover >= 1 ? colour : mixed(pixels[place], colour, cover);
            }
          }
        }
      }
      context.putImageData(image, 0, 0);
    }
    const channel = (under, over, shift, cover) => {
      const low = (under >>> shift) & 255;
      return Math.round(low + cover * (((over >>> shift) & 255) - low)) << shift;
    };
    const mixed = (under, over, cover) =>
      0xff000000 | channel(under, over, 16, cover) | channel(under, over, 8, cover) | channel(under, over, 0, cover);
    return { name: "canvas", device: "canvas 2D", quick: 60000, draw, forget() {}, lost: () => false };
  }

  let shared, fallback;
  /** The page's renderer of n points: WebGL, and the raster where that is missing or has been lost, or
      is software and slower than the raster (a microsecond a point, against a quarter of it). */
  SAE.renderer = function (n = 0) {
    if (shared === undefined) shared = webgl();
    if (shared && !shared.lost() && n <= shared.most) return shared;
    return (fallback = fallback || raster());
  };
})();

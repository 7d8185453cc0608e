// Small charts on canvas: the map of pages, bars per step, lines over time. Colours come from the style sheet.

const FONT = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

const probe = document.createElement("i");
probe.hidden = true;
let known = {};
document.addEventListener("themechange", () => { known = {}; });

/** The colour of a custom property as rgb(), whatever the theme. */
function color(name) {
  if (!known[name]) {
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `var(--${name})`;
    known[name] = getComputedStyle(probe).color;
  }
  return known[name];
}

const channels = (name) => color(name).match(/[\d.]+/g).slice(0, 3).map(Number);

/** A context in CSS pixels, sharp on every screen, cleared. */
function context(canvas, height) {
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const tall = height ?? canvas.clientHeight;
  if (height !== undefined) canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(tall * ratio)) canvas.height = Math.round(tall * ratio);
  const draw = canvas.getContext("2d");
  draw.setTransform(ratio, 0, 0, ratio, 0, 0);
  draw.clearRect(0, 0, width, tall);
  draw.font = FONT;
  return { draw, width, height: tall };
}

export const bytesOf = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));

/** Pixels of a square of the map with its gap, and squares in a row. */
export function layoutOf(width, count) {
  let size = Math.min(16, Math.max(3, Math.floor(Math.sqrt((width * 190) / count))));
  while (size > 3 && Math.ceil(count / Math.floor(width / size)) * size > 210) size -= 1;
  return { size, columns: Math.min(count, Math.floor(width / size)) };
}

/**
 * `cells` maps a state's name to a byte per cell: the share of the cell's pages in that state. The rest is free. `own`: the set of cells
 * that are marked.
 */
export function drawMap(canvas, count, cells, own) {
  if (!canvas.clientWidth || !count) return;
  const { size, columns } = layoutOf(canvas.clientWidth, count);
  const { draw } = context(canvas, Math.ceil(count / columns) * size);
  const gap = size > 4 ? 1 : size > 3 ? 0.5 : 0;
  const free = channels("free");
  const states = Object.entries(cells).map(([name, bytes]) => [channels(name), bytes]);
  for (let cell = 0; cell < count; cell += 1) {
    const mixed = [...free];
    for (const [rgb, bytes] of states) {
      const share = bytes[cell] / 255;
      if (share) for (let i = 0; i < 3; i += 1) mixed[i] += (rgb[i] - free[i]) * share;
    }
    draw.fillStyle = `rgb(${mixed.map(Math.round).join(" ")})`;
    const [x, y] = [(cell % columns) * size, Math.floor(cell / columns) * size];
    draw.fillRect(x, y, size - gap, size - gap);
    if (own.has(cell)) {
      const [edge, side] = [size > 8 ? 2 : 1, size - gap];
      draw.fillStyle = color("own");
      draw.fillRect(x, y, side, edge);
      draw.fillRect(x, y + side - edge, side, edge);
      draw.fillRect(x, y, edge, side);
      draw.fillRect(x + side - edge, y, edge, side);
    }
  }
}

/** A round number at or above `value`. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.9999);
}

/**
 * One bar a step, as many of the last ones as there is room for: `up` from the middle line upwards, `down` downwards, each with a scale
 * of its own. Returns which step lies at `share` of the width, null if none.
 */
export function drawSteps(canvas, up, down, share) {
  const { draw, width, height } = context(canvas);
  const step = Math.max(4, Math.floor(width / 160)); // whole pixels, or the gaps would differ
  const slots = Math.floor(width / step);
  const first = Math.max(0, up.length - slots);
  [up, down] = [up.slice(first), down.slice(first)];
  const at = share === null || !up.length ? null : Math.max(0, Math.round(share * (slots - 1)) - (slots - up.length));
  const middle = Math.round(height / 2);
  const reach = middle - 14;
  const [top, bottom] = [ceiling(Math.max(0, ...up)), ceiling(Math.max(0, ...down))];
  for (let i = 0; i < up.length; i += 1) {
    const x = width - (up.length - i) * step;
    if (i === at) {
      draw.fillStyle = color("line");
      draw.fillRect(x - 1, 0, step + 1, height);
    }
    const above = up[i] && Math.max(1, (up[i] / top) * reach);
    const below = down[i] && Math.max(1, (down[i] / bottom) * reach);
    draw.fillStyle = color("prefill");
    draw.fillRect(x, middle - above, step - 1, above);
    draw.fillStyle = color("used");
    draw.fillRect(x, middle + 1, step - 1, below);
  }
  draw.fillStyle = color("line");
  draw.fillRect(0, middle, width, 1);
  label(draw, up.some(Boolean) ? short(top) : "", 0, 10);
  label(draw, down.some(Boolean) ? short(bottom) : "", 0, height - 3);
  return at === null ? null : first + at;
}

/** Values from the oldest to the newest, null where there is none. `fill`: as an area; otherwise points, joined. */
export function drawLine(canvas, values, { name, format, span, fill, cursor }) {
  const { draw, width, height } = context(canvas);
  if (!width) return;
  const [top, base] = [14, height - 15];
  const most = ceiling(Math.max(0, ...values.filter((one) => one !== null)));
  const x = (i) => (i / Math.max(1, values.length - 1)) * (width - 4) + 2;
  const y = (value) => base - (value / most) * (base - top);
  draw.fillStyle = color("line");
  draw.fillRect(0, base, width, 1);
  draw.globalAlpha = 0.6;
  draw.fillRect(0, top, width, 1);
  draw.fillRect(0, Math.round((top + base) / 2), width, 1);
  draw.globalAlpha = 1;
  const points = values.map((value, i) => [x(i), value]).filter(([, value]) => value !== null);
  if (points.some(([, value]) => value > 0)) {
    draw.strokeStyle = draw.fillStyle = color(name);
    draw.lineWidth = 1.4;
    draw.lineJoin = "round";
    draw.beginPath();
    for (const [at, value] of points) draw.lineTo(at, y(value));
    draw.globalAlpha = fill ? 1 : 0.55;
    draw.stroke();
    draw.globalAlpha = 1;
    if (fill) {
      draw.lineTo(points.at(-1)[0], base);
      draw.lineTo(points[0][0], base);
      draw.globalAlpha = 0.13;
      draw.fill();
      draw.globalAlpha = 1;
    } else {
      for (const [at, value] of points) {
        draw.beginPath();
        draw.arc(at, y(value), 1.7, 0, 7);
        draw.fill();
      }
    }
    label(draw, format(most), 0, top - 3);
  }
  label(draw, span, 0, height - 3);
  label(draw, "now", width, height - 3, "right");
  if (cursor !== null && values[cursor] !== undefined) {
    draw.fillStyle = color("muted");
    draw.fillRect(Math.round(x(cursor)), top, 1, base - top);
    if (values[cursor] !== null) {
      draw.beginPath();
      draw.arc(x(cursor), y(values[cursor]), 3, 0, 7);
      draw.fill();
    }
  }
}

function label(draw, text, x, y, align = "left") {
  draw.fillStyle = color("muted");
  draw.textAlign = align;
  draw.fillText(text, x, y);
}

/** A place to look at, by pointer or arrow keys: calls `moved(share of the width from the left, or null)`. */
export function follow(canvas, stepOf, moved) {
  let at = null;
  const go = (share) => {
    at = share;
    moved(share);
  };
  canvas.addEventListener("pointermove", (event) => go(Math.min(1, Math.max(0, event.offsetX / canvas.clientWidth))));
  for (const away of ["pointerleave", "blur"]) canvas.addEventListener(away, () => go(null));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    go(Math.min(1, Math.max(0, (at ?? 1) + move * stepOf())));
  });
}

/** 1234567 as 1.23M, 12345 as 12.3k, 1234 as 1,234. */
export function short(value) {
  if (value >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (value >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return value >= 100 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
}

/** Seconds as ms or s. */
export function duration(seconds) {
  if (seconds < 0.00995) return `${+(seconds * 1e3).toPrecision(2)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1e3)} ms`;
  if (seconds < 60) return `${+seconds.toPrecision(3)} s`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${(seconds / 3600).toFixed(1)} h`;
}

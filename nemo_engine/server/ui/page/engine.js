// The view of the engine: takes a picture a second from monitor/stream while the page is visible, and draws it.

import { bytesOf, drawLine, drawMap, drawSteps, duration, follow, short } from "./charts.js";

const RETRY = 2000; // milliseconds

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const percent = (share) => (share > 0 && share < 0.0995 ? `${(share * 100).toFixed(1)} %` : `${Math.round(share * 100)} %`);

let source = null;
let retry = null;
let last = null; // the last picture
let stepCursor = null; // shares of the width

const LINES = [
  { id: "new", column: "new_tokens", name: "used", fill: true, format: short, unit: "tokens/s" },
  { id: "prefill", column: "prefill_tokens", name: "prefill", fill: true, format: short, unit: "tokens/s" },
  { id: "ttft", column: "ttft", name: "shared", fill: false, format: duration, unit: "median" },
  { id: "itl", column: "itl", name: "used", fill: false, format: duration, unit: "mean" },
];

export function startEngine() {
  for (const line of LINES) {
    line.cursor = null;
    follow(byId(line.id), () => 1 / Math.max(1, spanOf(last) - 1), (share) => { line.cursor = share; drawOne(line); });
  }
  follow(byId("steps"), () => 4 / byId("steps").clientWidth, (share) => { stepCursor = share; drawBatch(); });
  document.addEventListener("themechange", draw);
  new ResizeObserver(draw).observe(byId("panels"));
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  if (!document.hidden) connect();
}

function connect() {
  disconnect();
  source = new EventSource("monitor/stream");
  source.onmessage = ({ data }) => {
    if (data === "[DONE]") return;
    const picture = JSON.parse(data);
    if (picture.error) say("bad", picture.error.message);
    else show(picture);
  };
  source.onerror = () => {
    say("bad", "no connection");
    disconnect();
    retry = setTimeout(connect, RETRY);
  };
}

function disconnect() {
  clearTimeout(retry);
  source?.close();
  source = null;
}

function say(state, text) {
  const status = byId("status");
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

function put(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

/** A number with a smaller remark behind it. */
function putTile(id, text, remark = "") {
  const element = byId(id);
  element.textContent = text;
  if (remark) {
    const small = document.createElement("small");
    small.textContent = ` ${remark}`;
    element.append(small);
  }
}

function show(picture) {
  last = picture;
  const { stats, engine } = picture;
  say(picture.status === "ready" ? "ready" : "wait", picture.status);
  put("model", engine.model);
  document.title = `${engine.model} – nemo_engine`;
  put("limits", `context ${number(engine.max_model_len)}, ${number(engine.max_num_batched_tokens)} tokens a step, up ${duration(picture.uptime)}`);
  putTile("running", number(stats.num_running), `of ${number(engine.max_num_seqs)}`);
  putTile("waiting", number(stats.num_waiting));
  putTile("rate", short(recentRate(picture.history)));
  const used = stats.num_pages - stats.num_free_pages;
  putTile("kv-share", percent(used / stats.num_pages));
  const asked = stats.total_prefix_queried_tokens;
  putTile("hits", asked ? percent(stats.total_prefix_hit_tokens / asked) : "–");
  putTile("preemptions", number(stats.total_preemptions));
  showRequests(picture);
  draw();
}

/** Generated tokens per second, over the last three whole seconds. */
function recentRate(history) {
  let tokens = 0;
  (history.age ?? []).forEach((age, i) => { if (age >= 1 && age <= 3) tokens += history.new_tokens[i]; });
  return tokens / 3;
}

function showRequests({ requests, stats }) {
  const total = stats.num_running + stats.num_waiting;
  put("requests-text", total > requests.length ? `the first ${requests.length} of ${number(total)}` : "");
  const body = byId("requests");
  if (!requests.length) {
    if (!body.querySelector(".none")) {
      const cell = document.createElement("td");
      cell.className = "none";
      cell.colSpan = 8;
      cell.textContent = "No requests.";
      body.replaceChildren(document.createElement("tr"));
      body.firstChild.append(cell);
    }
    return;
  }
  const swatches = { decode: "used", prefill: "prefill", waiting: "waiting" };
  body.replaceChildren(...requests.map((one) => {
    const row = document.createElement("tr");
    row.dataset.state = one.state;
    const prompt = one.state === "prefill" ? `${number(Math.min(one.computed_tokens, one.prompt_tokens))} / ${number(one.prompt_tokens)}` : number(one.prompt_tokens);
    const cells = [one.id, one.state, prompt, number(one.cached_tokens), number(one.output_tokens), number(one.pages), number(one.preemptions), duration(one.age)];
    cells.forEach((text, i) => {
      const cell = document.createElement("td");
      if (i === 1) {
        const swatch = document.createElement("i");
        swatch.className = `swatch ${swatches[one.state]}`;
        cell.append(swatch);
      }
      if (i === 0) cell.title = text;
      if (i > 1) cell.className = "n";
      cell.append(text);
      row.append(cell);
    });
    return row;
  }));
}

function draw() {
  if (!last || !byId("panels").clientWidth) return;
  drawPages();
  drawBatch();
  LINES.forEach(drawOne);
}

function drawPages() {
  const { pages, engine, stats } = last;
  const cells = Object.fromEntries(Object.entries(pages.cells).map(([name, text]) => [name, bytesOf(text)]));
  drawMap(byId("map"), pages.num_cells, cells);
  for (const [name, count] of Object.entries(pages.counts)) put(`n-${name}`, number(count));
  const { free, cached, used, shared } = pages.counts;
  const total = free + cached + used + shared;
  const each = pages.pages_per_cell > 1 ? `, ${pages.pages_per_cell} a square` : "";
  put("map-text", `${number(total)} pages of ${engine.page_size} tokens${each}, at most ${percent(stats.peak_used_pages / total)} in use so far`);
  byId("map").setAttribute("aria-label", `Map of ${number(total)} KV pages: ${number(used)} in use by one request, ${number(shared)} shared by several, ${number(cached)} cached, ${number(free)} free`);
}

function drawBatch() {
  if (!last) return;
  const { id, decodes, prefills, prefill_tokens: prefillTokens, milliseconds } = last.steps;
  const at = drawSteps(byId("steps"), prefillTokens, decodes, stepCursor);
  const shown = at ?? id.length - 1;
  let text = "no step yet";
  if (id.length) {
    const parts = [];
    if (prefills[shown]) parts.push(`${number(prefillTokens[shown])} prefill in ${prefills[shown]} ${prefills[shown] === 1 ? "row" : "rows"}`);
    if (decodes[shown]) parts.push(`${number(decodes[shown])} decode`);
    text = `step ${number(id[shown])}: ${parts.join(" + ")}, after ${duration(milliseconds[shown] / 1000)}`;
  }
  put("steps-text", text);
  byId("steps").setAttribute("aria-label", `Tokens of the last ${id.length} steps; ${text}`);
}

/** Seconds shown: a minute until there is more. */
function spanOf(picture) {
  return Math.max(0, ...(picture?.history.age ?? [])) > 60 ? 300 : 60;
}

function drawOne(line) {
  if (!last) return;
  const { history } = last;
  const span = spanOf(last);
  const values = new Array(span).fill(line.fill ? 0 : null);
  (history.age ?? []).forEach((age, i) => { if (age >= 1 && age <= span) values[span - age] = history[line.column][i]; });
  const cursor = line.cursor === null ? null : Math.round(line.cursor * (span - 1));
  const canvas = byId(line.id);
  const label = span === 60 ? "1 min ago" : "5 min ago";
  drawLine(canvas, values, { name: line.name, format: line.format, span: label, fill: line.fill, cursor });
  const at = cursor ?? (line.fill ? span - 1 : values.findLastIndex((one) => one !== null));
  let text = "–";
  if (at >= 0 && values[at] !== null) text = line.format(values[at]);
  if (cursor !== null) text += `, ${span - at} s ago`;
  put(`${line.id}-text`, text);
  const found = values.filter((one) => one !== null);
  const most = found.length ? line.format(Math.max(...found)) : "none";
  canvas.setAttribute("aria-label", `${canvas.parentElement.querySelector("h3").textContent}, ${line.unit}, over the last ${span} s: last ${text}, highest ${most}`);
}

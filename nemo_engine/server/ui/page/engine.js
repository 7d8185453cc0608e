// The view of the engine: takes a picture a second from monitor/stream while the page is visible, and draws it.

import { byId, make, number } from "./dom.js";
import { bytesOf, drawLine, drawMap, drawSteps, duration, follow, short } from "./charts.js";

const RETRY = 2000; // milliseconds
const PATIENCE = 3000; // milliseconds without a picture, of which there is one a second

const percent = (share) => (share > 0 && share < 0.0005 ? "<0.1 %" : share > 0 && share < 0.0995 ? `${(share * 100).toFixed(1)} %` : `${Math.round(share * 100)} %`);

let source = null;
let retry = null;
let silence = null;
let own = { runs: [] }; // the pages that hold this tab's conversation
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
  document.addEventListener("ownpages", ({ detail }) => { own = detail; draw(); });
  new ResizeObserver(draw).observe(byId("panels"));
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  if (!document.hidden) connect();
}

function connect() {
  disconnect();
  source = new EventSource("monitor/stream");
  awaitNews();
  source.onmessage = ({ data }) => {
    awaitNews();
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

/** Say so if no picture comes in time. */
function awaitNews() {
  clearTimeout(silence);
  silence = setTimeout(() => say("wait", "no news for 3 s"), PATIENCE);
}

function disconnect() {
  clearTimeout(retry);
  clearTimeout(silence);
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
  if (remark) element.append(make("small", { textContent: ` ${remark}` }));
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
  document.dispatchEvent(new CustomEvent("picture", { detail: picture }));
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
    if (!body.querySelector(".none")) body.replaceChildren(make("tr", {}, make("td", { className: "none", colSpan: 8, textContent: "No requests." })));
    return;
  }
  const swatches = { decode: "used", prefill: "prefill", waiting: "waiting" };
  body.replaceChildren(...requests.map((one) => {
    const prompt = one.state === "prefill" ? `${number(Math.min(one.computed_tokens, one.prompt_tokens))} / ${number(one.prompt_tokens)}` : number(one.prompt_tokens);
    const numbers = [prompt, number(one.cached_tokens), number(one.output_tokens), number(one.pages), number(one.preemptions), duration(one.age)];
    const row = make("tr", {},
      make("td", { textContent: one.id, title: one.id }),
      make("td", {}, make("i", { className: `swatch ${swatches[one.state]}` }), one.state),
      ...numbers.map((text) => make("td", { className: "n", textContent: text })));
    row.dataset.state = one.state;
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
  drawMap(byId("map"), pages.num_cells, cells, ownCells(pages));
  for (const [name, count] of Object.entries(pages.counts)) put(`n-${name}`, number(count));
  const { free, cached, used, shared } = pages.counts;
  const total = free + cached + used + shared;
  const shown = pages.num_shown < total ? `the first ${number(pages.num_shown)} of ` : "";
  const each = pages.pages_per_cell > 1 ? `, ${pages.pages_per_cell} a square` : "";
  put("map-text", `${shown}${number(total)} pages of ${engine.page_size} tokens${each}, at most ${percent(stats.peak_used_pages / total)} in use so far`);
  const count = own.runs.reduce((sum, [, length]) => sum + length, 0);
  byId("own").hidden = !count;
  put("n-own", number(count));
  put("own-text", own.num_reused ? `, of which the last answer reused ${number(own.num_reused)}` : "");
  const yours = count ? `; this conversation lies in ${number(count)}` : "";
  byId("map").setAttribute("aria-label", `Map of ${number(total)} KV pages: ${number(used)} in use by one request, ${number(shared)} shared by several, ${number(cached)} cached, ${number(free)} free${yours}`);
}

/** The squares in which pages of this conversation lie. */
function ownCells({ pages_per_cell: each }) {
  const cells = new Set();
  for (const [first, count] of own.runs) {
    for (let cell = Math.floor(first / each); cell * each < first + count; cell += 1) cells.add(cell);
  }
  return cells;
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

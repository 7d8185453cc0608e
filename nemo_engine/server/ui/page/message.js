// How a message looks: its text, calls, actions and how it went.

import { duration, short } from "./charts.js";
import { button, copy, make } from "./dom.js";
import { Lens } from "./lens.js";
import { Markdown } from "./markdown.js";

export const ROLES = { user: "You", assistant: "Assistant", tool: "Tool result" };

/** The view of `message`. `actions`: (name, function) of the buttons. */
export class MessageView {
  #text = null; // what shows the text: takes (message, isEnd)
  #frame = null;

  constructor(message, actions, follow) {
    this.message = message;
    this.follow = follow;
    const name = ROLES[message.role];
    this.body = make("div", { className: "body" });
    this.calls = make("form", { className: "calls" });
    this.meta = make("div", { className: "meta" });
    this.actions = make("div", { className: "actions" });
    for (const [text, act] of actions) {
      this.actions.append(button(text, act, { className: "link", ariaLabel: `${text}: ${name}` }));
    }
    const head = make("div", { className: "head" }, make("span", { className: "role", textContent: name }), this.actions);
    this.root = make("article", { className: "message", ariaLabel: name }, head, this.body, this.calls, this.meta);
    this.root.dataset.role = message.role;
  }

  action(name) {
    return [...this.actions.children].find((one) => one.textContent === name);
  }

  /** Show the text from the beginning: as tokens if `hasLens` and they are known. */
  begin(hasLens, isEnd = true) {
    const { role, tokens } = this.message;
    this.body.replaceChildren();
    if (role !== "assistant") this.#text = plain(this.body);
    else this.#text = hasLens && tokens ? asTokens(this.body) : asMarkdown(this.body);
    this.update(isEnd);
  }

  /** Show what has come since. */
  update(isEnd) {
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    this.follow(() => {
      this.#text(this.message, isEnd);
      showCalls(this.calls, this.message.tool_calls ?? []);
      showMeta(this.meta, this.message.stats);
    });
  }

  /** The same, once a frame. */
  later() {
    this.#frame ??= requestAnimationFrame(() => this.update(false));
  }

  /** A field in place of the text; `changed` gets what was saved. */
  edit(changed) {
    if (this.root.querySelector(".edit")) return;
    const content = this.message.content ?? "";
    const text = make("textarea", { value: content, rows: Math.min(12, content.split("\n").length + 1), ariaLabel: "Edited message" });
    const save = make("button", { type: "submit", className: "main", textContent: "Save" });
    const form = make("form", { className: "edit" });
    const close = () => { form.replaceWith(this.body); this.action("Edit").focus(); };
    form.append(text, make("div", {}, save, button("Cancel", close)));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      close();
      changed(text.value);
    });
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
    });
    this.body.replaceWith(form);
    text.focus();
  }

  copy() {
    copy(this.message.content ?? "", this.action("Copy"));
  }
}

const plain = (body) => ({ content }) => { body.textContent = content ?? ""; };

function asTokens(body) {
  const lens = new Lens(body);
  return ({ tokens }) => lens.show(tokens);
}

/** Blocks that have ended as Markdown, and the rest as it came. */
function asMarkdown(body) {
  const done = body.appendChild(make("div", { className: "markdown" }));
  const tail = body.appendChild(make("div", { className: "tail" })).appendChild(document.createTextNode(""));
  const blocks = new Markdown(done);
  let start = 0;
  return ({ content }, isEnd) => {
    const rest = blocks.feed(content ?? "", isEnd);
    if (rest > start) tail.data = content.slice(rest);
    else if (content) tail.appendData(content.slice(start + tail.length));
    start = rest;
  };
}

function showCalls(element, calls) {
  calls.forEach((call, i) => {
    const card = element.children[i] ?? element.appendChild(
      make("div", { className: "call" }, make("div", { className: "name" }, make("span", { textContent: "calls" }), make("b"), make("span", { className: "id" })), make("pre")),
    );
    const [, name, id] = card.firstChild.children;
    name.textContent = call.function.name;
    id.textContent = call.id;
    let shown = call.function.arguments;
    try {
      shown = JSON.stringify(JSON.parse(shown), null, 2);
    } catch { /* not complete yet */ }
    card.lastChild.textContent = shown;
  });
}

/** How it went: by the clock here while the answer comes, by the server's when it has come. */
function showMeta(element, stats) {
  if (!stats) return;
  const { sent, first, usage, explain, finish, wait } = stats;
  const parts = [];
  if (wait) parts.push(["", wait, "wait"]);
  if (first !== null) parts.push([duration((first - sent) / 1000), "TTFT", "ttft"]);
  if (usage) {
    const { prompt_tokens: prompt, completion_tokens: tokens } = usage;
    const rate = rateOf(stats);
    if (rate) parts.push([rate.toFixed(1), "tokens/s", "rate"]);
    parts.push([String(tokens), tokens === 1 ? "token" : "tokens", "tokens"]);
    parts.push([String(prompt), `prompt, ${usage.prompt_tokens_details?.cached_tokens ?? 0} cached`, "prompt"]);
  }
  if (explain?.queue_seconds > 0.1) parts.push([duration(explain.queue_seconds), "in the queue", "queue"]);
  if (explain?.preemptions) parts.push([String(explain.preemptions), "preempted", "preemptions"]);
  if (finish) parts.push(["", finish.replace("_", " "), "finish"]);
  element.replaceChildren(...parts.map(([value, name, key]) => {
    const part = make("span", {}, make("b", { textContent: value }), value ? ` ${name}` : name);
    part.dataset.key = key;
    return part;
  }));
}

/** Tokens per second after the first; null while too little has come to tell, as when all came at once. */
function rateOf({ first, last, firstTokens, usage, explain }) {
  const { completion_tokens: tokens } = usage;
  if (explain?.decode_seconds) return tokens > 1 ? (tokens - 1) / explain.decode_seconds : null;
  const seconds = (last - first) / 1000;
  return tokens > firstTokens && seconds >= 0.25 ? (tokens - firstTokens) / seconds : null;
}

const PLACES = { 1: "1st", 2: "2nd", 3: "3rd" };
const ordinal = (n) => (n % 100 > 10 && n % 100 < 14 ? null : PLACES[n % 10] && `${Math.floor(n / 10) || ""}${PLACES[n % 10]}`) || `${n}th`;

/** What a request waits for, in words. */
export function waitOf({ state, queue_place: place, computed_tokens: done, prompt_tokens: all, output_tokens: output }) {
  if (state === "waiting") return `${output ? "made room for others, " : ""}${ordinal(place)} in the queue`;
  if (state === "prefill" && !output) return `prefilling ${short(Math.min(done, all))} of ${short(all)} tokens`;
  return "";
}

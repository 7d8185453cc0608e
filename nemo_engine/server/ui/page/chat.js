// The conversation: what is sent, how answers come in, what can be done with a message.

import { chunks, pagesOf } from "./api.js";
import { byId, button, make } from "./dom.js";
import { keep, kept } from "./keep.js";
import { tokensOf } from "./lens.js";
import { MessageView, waitOf } from "./message.js";
import { requestFor, restoreSettings, settingsNow, startSettings, useExampleTools } from "./settings.js";
import { startCopy } from "./snippets.js";

let messages = []; // { role, content, tool_calls, tool_call_id } as the API has them; view, stats and tokens of this page
let running = null; // the answer under way: { message, id, abort }
let hasLens = false;
let model = "";
const pages = { at: 0, step: null, isAsked: false, isRefused: false }; // of the last question where the conversation lies

export function startChat() {
  const message = byId("message");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  message.addEventListener("input", fitMessage);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  byId("stop").addEventListener("click", stop);
  byId("lens").addEventListener("click", turnLens);
  startClear();
  startCopy({ messages: () => messages.map(bare), request: lastRequest, failed: tell });
  startSettings(save);
  for (const example of document.querySelectorAll(".example")) example.addEventListener("click", () => sendExample(example));
  document.addEventListener("picture", ({ detail }) => look(detail));
  addEventListener("pagehide", save);
  restore();
}

function sendExample(example) {
  if ("tools" in example.dataset) {
    useExampleTools();
    byId("message").value = "What's the weather like in Paris today, in celsius?";
  } else byId("message").value = example.textContent;
  send();
}

function fitMessage() {
  const message = byId("message");
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function startClear() {
  const dialog = byId("clear-dialog");
  byId("clear").addEventListener("click", () => {
    if (!messages.length) return;
    byId("clear-text").textContent = messages.length === 1 ? "The message is deleted for good." : `${messages.length} messages are deleted for good.`;
    dialog.showModal();
  });
  byId("clear-no").addEventListener("click", () => dialog.close());
  byId("clear-yes").addEventListener("click", () => {
    dialog.close();
    clear();
  });
}

function clear() {
  stop();
  for (const { view } of messages) view.root.remove();
  messages = [];
  changed();
  byId("message").focus();
}

/** What was asked last, or would be asked first. */
function lastRequest() {
  const asked = messages.slice(0, messages.findLastIndex(({ role }) => role !== "assistant") + 1).map(bare);
  if (!asked.length) asked.push({ role: "user", content: byId("message").value.trim() || "Hello" });
  return { model, ...requestFor(asked) };
}

const bare = ({ view, stats, tokens, ...message }) => message;

function send() {
  const message = byId("message");
  if (running || !message.value.trim()) return;
  add({ role: "user", content: message.value });
  message.value = "";
  fitMessage();
  if (matchMedia("(max-width: 560px)").matches) byId("settings").open = false;
  answer();
}

// ---- what is shown

function add(message) {
  const actions = [["Copy", () => message.view.copy()], ["Edit", () => edit(message)], ["Delete", () => remove(message)],
    ["Again", () => again(message)], ["Continue", () => goOn(message)]];
  message.view = new MessageView(message, actions, follow);
  messages.push(message);
  message.view.begin(hasLens, message !== running?.message);
  follow(() => byId("log").append(message.view.root), message.role === "user");
  changed();
  return message;
}

/** Something of the conversation is new: show what can be done, and keep it. */
function changed() {
  Object.assign(pages, { step: null, isRefused: false });
  dropErrors();
  byId("empty").hidden = messages.length > 0;
  messages.forEach((message, i) => {
    const { actions, calls } = message.view;
    const isLast = i === messages.length - 1;
    actions.hidden = Boolean(running);
    if (!isLast) calls.querySelectorAll("label, button").forEach((one) => one.remove());
    message.view.action("Again").hidden = !isLast || message.role === "tool";
    message.view.action("Continue").hidden = !isLast || !canGoOn(message);
  });
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
  if (!running) save();
}

/** Change the log, and stay at its end if that is where it was. */
function follow(change, always = false) {
  const log = byId("log");
  const isAtEnd = always || log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function dropErrors() {
  for (const one of byId("log").querySelectorAll(".error")) one.remove();
}

function fail(text, ...buttons) {
  dropErrors();
  const error = make("div", { className: "error", role: "alert" }, make("span", { textContent: text }), ...buttons);
  follow(() => byId("log").append(error), true);
}

/** Say what is wrong with the settings, and go there. */
function tell({ message, field }) {
  byId("settings").open = true;
  field?.focus();
  fail(message);
}

function turnLens() {
  hasLens = !hasLens;
  byId("lens").setAttribute("aria-pressed", String(hasLens));
  byId("lens-note").hidden = !hasLens;
  for (const message of messages) if (message.tokens) message.view.begin(hasLens, message !== running?.message);
}

// ---- what can be done with a message

function edit(message) {
  message.view.edit((text) => {
    message.content = text;
    delete message.tokens;
    message.view.begin(hasLens);
    changed();
  });
}

/** Take a message away, and with a call its results. */
function remove(message) {
  const at = messages.indexOf(message);
  let end = at + 1;
  while (message.tool_calls && messages[end]?.role === "tool") end += 1;
  for (const one of messages.splice(at, end - at)) one.view.root.remove();
  changed();
  byId("message").focus();
}

function again(message) {
  if (message.role === "assistant") remove(message);
  byId("message").focus();
  answer();
}

/** An answer that was cut off: by its length, by whoever reads it, or by a lost connection. */
const canGoOn = ({ role, content, tool_calls: calls, stats }) => role === "assistant" && Boolean(content) && !calls && [undefined, "length", "stopped", "broke off"].includes(stats?.finish);

function goOn(message) {
  byId("message").focus();
  answer(message);
}

function stop() {
  running?.abort.abort();
}

// ---- an answer

/** Ask for the next answer, or for the rest of `continued`. */
async function answer(continued = null) {
  let body;
  try {
    body = requestFor(messages.map(bare));
  } catch (error) {
    tell(error);
    return;
  }
  const id = `page-${Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("")}`;
  Object.assign(body, { request_id: id, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, explain: true });
  if (hasLens) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (continued) {
    Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
    delete body.tool_choice;
  }
  const message = continued ?? { role: "assistant", content: "" };
  message.stats = { sent: performance.now(), first: null, last: null, firstTokens: 0, usage: null, explain: null, finish: null, wait: "" };
  if (hasLens && !message.tokens) message.tokens = message.content ? [{ text: message.content, logprob: null }] : [];
  running = { message, id: `chatcmpl-${id}`, abort: new AbortController(), bytes: new TextDecoder() };
  if (continued) {
    message.view.begin(hasLens, false);
    changed();
  } else add(message);
  message.view.root.setAttribute("aria-busy", "true");
  const failure = await receive(message, body);
  running = null;
  message.stats.wait = "";
  if (failure) message.stats.finish = "broke off";
  message.view.update(true);
  message.view.root.removeAttribute("aria-busy");
  settle(message, failure);
}

/** Returns what went wrong. */
async function receive(message, body) {
  const { signal } = running.abort;
  try {
    for await (const chunk of chunks(body, signal)) {
      if (chunk.error) return chunk.error.message;
      take(message, chunk);
      message.view.later();
    }
    return message.stats.finish ? null : "The answer broke off.";
  } catch (error) {
    if (!signal.aborted) return error.message;
    message.stats.finish = "stopped";
    return null;
  }
}

/** Take in one event. */
function take(message, { choices, usage, explain }) {
  const { stats } = message;
  if (usage) stats.usage = usage;
  if (explain) stats.explain = explain.requests[0];
  const choice = choices?.[0];
  if (!choice) return;
  const { content, tool_calls: calls } = choice.delta ?? {};
  stats.last = performance.now();
  if (stats.first === null) { // the event with the role is sent with the first token
    stats.first = stats.last;
    stats.firstTokens = Math.max(1, usage?.completion_tokens ?? 0);
    stats.wait = "";
  }
  if (content) message.content += content;
  if (choice.logprobs) message.tokens?.push(...tokensOf(choice.logprobs, running.bytes));
  else if (content) message.tokens?.push({ text: content, logprob: null });
  for (const { index, id, function: part } of calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += part?.name ?? "";
    call.function.arguments += part?.arguments ?? "";
  }
  if (choice.finish_reason) stats.finish = choice.finish_reason;
}

/** The answer has ended: keep what can be sent back, and ask for the results of calls. */
function settle(message, failure) {
  if (!messages.includes(message)) { // cleared meanwhile
    changed();
    return;
  }
  const { root, calls } = message.view;
  const whole = (message.tool_calls ?? []).map((call, i) => ({ call, card: calls.children[i] })).filter(({ call }) => isObject(call.function.arguments));
  delete message.tool_calls;
  if (whole.length) message.tool_calls = whole.map(({ call }) => call);
  const isEmpty = !message.content && !whole.length;
  if (isEmpty && (failure || message.stats.finish === "stopped")) {
    root.remove();
    messages.splice(messages.indexOf(message), 1);
    failure ??= "Stopped before the first token.";
  }
  changed();
  if (whole.length && !failure) askResults(message, whole);
  if (failure) fail(failure, ...(canGoOn(message) ? [button("Continue", () => goOn(message))] : []), button("Try again", () => again(messages.at(-1))));
}

function isObject(text) {
  try {
    return typeof JSON.parse(text) === "object";
  } catch {
    return false;
  }
}

/** A field for each call that is whole; sending them goes on with the conversation. */
function askResults(message, whole) {
  const form = message.view.calls;
  const fields = whole.map(({ call, card }) => {
    const field = make("textarea", { className: "code", rows: 1, required: true });
    follow(() => card.append(make("label", {}, `Result of ${call.function.name}`, field)));
    return field;
  });
  follow(() => form.append(make("button", { type: "submit", textContent: whole.length > 1 ? "Send results" : "Send result" })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    whole.forEach(({ call }, i) => add({ role: "tool", tool_call_id: call.id, content: fields[i].value }));
    byId("message").focus();
    answer();
  }, { once: true });
}

// ---- what is kept, and where it lies in the engine

function save() {
  const plain = messages.map(({ view, tokens, ...message }) => message);
  const last = plain.at(-1);
  if (running && last?.role === "assistant") { // the page is left while it comes
    if (last.content) plain.splice(-1, 1, { role: "assistant", content: last.content, stats: { ...last.stats, finish: "stopped", wait: "" } });
    else plain.pop();
  }
  byId("not-kept").hidden = keep({ messages: plain, settings: settingsNow() });
}

function restore() {
  const stored = kept();
  if (!stored) return;
  restoreSettings(stored.settings);
  for (const message of stored.messages) add(message);
}

/** A picture of the engine has come. */
function look(picture) {
  model = picture.engine.model;
  if (running) {
    const { message, id } = running;
    const own = picture.requests.find((one) => one.id === id);
    const wait = own ? waitOf(own) : "";
    if (wait !== message.stats.wait) {
      message.stats.wait = wait;
      message.view.later();
    }
  }
  const step = picture.steps.id.at(-1);
  if (step === pages.step || pages.isAsked || pages.isRefused || performance.now() - pages.at < (running ? 1500 : 4000)) return;
  pages.step = step;
  findPages();
}

/** Ask which pages hold the conversation, and tell the map. */
async function findPages() {
  const asked = messages.map(bare).filter(({ content, tool_calls: calls }) => content || calls);
  if (asked.at(-1)?.tool_calls) asked.pop(); // its results are to come, and without them it is no conversation
  let found = null;
  pages.isAsked = true;
  if (asked.length) {
    const isOpen = asked.at(-1).role === "assistant";
    const isComing = isOpen && running;
    try {
      const { messages: all, tools } = requestFor(asked);
      found = await pagesOf({ messages: all, tools, add_generation_prompt: !isOpen, continue_final_message: Boolean(isComing) });
    } catch { /* the settings are being changed */ }
  }
  // What is refused, a conversation longer than the context say, is so until it changes.
  Object.assign(pages, { at: performance.now(), isAsked: false, isRefused: asked.length > 0 && found === null });
  const cache = messages.findLast(({ stats }) => stats?.explain)?.stats.explain.cache;
  document.dispatchEvent(new CustomEvent("ownpages", { detail: { runs: [], ...found, num_reused: cache?.cached_pages } }));
}

// The chat: keeps the conversation, streams answers from v1/chat/completions, and shows them as text, never as HTML.

import { duration } from "./charts.js";

const ROLES = { user: "You", assistant: "Assistant", tool: "Tool result" };
const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_current_weather",
      description: "Get the current weather",
      parameters: {
        type: "object",
        properties: { location: { type: "string" }, format: { type: "string", enum: ["celsius", "fahrenheit"] } },
        required: ["location", "format"],
      },
    },
  },
];

const byId = (id) => document.getElementById(id);

/** An element with properties and children; text children stay text. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

let messages = []; // as the API has them, with `view` for what is shown and `stats` for how it went
let running = null; // the AbortController of the answer under way

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
  byId("clear").addEventListener("click", clear);
  byId("settings").addEventListener("input", summarize);
  for (const example of document.querySelectorAll(".example")) {
    example.addEventListener("click", () => {
      if (example.dataset.example === "tools") {
        byId("tools").value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
        byId("tool-choice").value = "required";
        byId("parallel").value = "no";
        summarize();
        message.value = "What's the weather like in Paris today, in celsius?";
      } else message.value = example.textContent;
      send();
    });
  }
  summarize();
}

function fitMessage() {
  const message = byId("message");
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function clear() {
  stop();
  messages = [];
  for (const one of byId("log").querySelectorAll(".message, .error")) one.remove();
  byId("empty").hidden = false;
  byId("message").focus();
}

function stop() {
  running?.abort();
}

function summarize() {
  const parts = [];
  if (byId("system").value.trim()) parts.push("system prompt");
  for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "at most"], ["seed", "seed"]]) {
    if (byId(id).value) parts.push(`${name} ${byId(id).value}${id === "max-tokens" ? " tokens" : ""}`);
  }
  if (byId("tools").value.trim()) parts.push(`tools ${byId("tool-choice").value || "auto"}`);
  byId("settings-summary").textContent = parts.join(", ");
}

/** The body of a request, or null after telling what is wrong with the settings. */
function request() {
  const body = { messages: [], stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, explain: true };
  if (byId("system").value.trim()) body.messages.push({ role: "system", content: byId("system").value });
  for (const { view, stats, ...message } of messages) body.messages.push(message);
  for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "max_tokens"], ["seed", "seed"]]) {
    const field = byId(id);
    if (!field.validity.valid) {
      byId("settings").open = true;
      field.focus();
      fail(`${name}: ${field.validationMessage}`);
      return null;
    }
    if (field.value) body[name] = Number(field.value);
  }
  const tools = byId("tools").value.trim();
  if (tools) {
    try {
      body.tools = JSON.parse(tools);
    } catch (error) {
      byId("settings").open = true;
      byId("tools").focus();
      fail(`The tools are not valid JSON: ${error.message}`);
      return null;
    }
    if (byId("parallel").value) body.parallel_tool_calls = false;
    if (byId("tool-choice").value && messages.at(-1)?.role !== "tool") body.tool_choice = byId("tool-choice").value;
  }
  return body;
}

function send() {
  const message = byId("message");
  if (running || !message.value.trim()) return;
  add({ role: "user", content: message.value });
  message.value = "";
  fitMessage();
  answer();
}

// ---- what is shown

function add(message) {
  byId("empty").hidden = true;
  dropErrors();
  const body = make("div", { className: "body", textContent: message.content ?? "" });
  const actions = make("div", { className: "actions" });
  const role = make("span", { className: "role", textContent: ROLES[message.role] });
  const calls = make("form", { className: "calls" });
  const meta = make("div", { className: "meta" });
  const root = make("article", { className: "message" }, make("div", { className: "head" }, role, actions), body, calls, meta);
  root.dataset.role = message.role;
  root.setAttribute("aria-label", ROLES[message.role]);
  message.view = { root, body, calls, meta, actions };
  messages.push(message);
  for (const [text, act] of [["Edit", edit], ["Delete", remove], ["Again", again]]) {
    const button = make("button", { type: "button", className: "link", textContent: text });
    button.setAttribute("aria-label", `${text}: ${ROLES[message.role]}`);
    button.addEventListener("click", () => act(message));
    actions.append(button);
  }
  follow(() => byId("log").append(root), message.role === "user");
  refresh();
  return message;
}

/** Only the last message can be done again; nothing can be changed while an answer comes. */
function refresh() {
  messages.forEach((message, i) => {
    message.view.actions.hidden = Boolean(running);
    if (i !== messages.length - 1) message.view.calls.querySelectorAll("label, button").forEach((one) => one.remove());
    message.view.actions.lastChild.hidden = i !== messages.length - 1 || message.role === "tool";
  });
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
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

function fail(text, canRetry = false) {
  dropErrors();
  const error = make("div", { className: "error" }, make("span", { textContent: text }));
  error.setAttribute("role", "alert");
  if (canRetry) {
    const retry = make("button", { type: "button", textContent: "Try again" });
    retry.addEventListener("click", () => { dropErrors(); answer(); byId("message").focus(); });
    error.append(retry);
  }
  follow(() => byId("log").append(error), true);
}

function edit(message) {
  const { body, root } = message.view;
  if (root.querySelector(".edit")) return;
  const text = make("textarea", { value: message.content ?? "", rows: Math.min(12, (message.content ?? "").split("\n").length + 1) });
  text.setAttribute("aria-label", "Edited message");
  const save = make("button", { type: "submit", className: "main", textContent: "Save" });
  const cancel = make("button", { type: "button", textContent: "Cancel" });
  const form = make("form", { className: "edit" }, text, make("div", {}, save, cancel));
  const close = () => { form.replaceWith(body); message.view.actions.firstChild.focus(); };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    message.content = text.value;
    body.textContent = text.value;
    close();
  });
  cancel.addEventListener("click", close);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  });
  body.replaceWith(form);
  text.focus();
}

/** Take a message away, and with a call its results. */
function remove(message) {
  const at = messages.indexOf(message);
  let end = at + 1;
  while (message.tool_calls && messages[end]?.role === "tool") end += 1;
  for (const one of messages.splice(at, end - at)) one.view.root.remove();
  dropErrors();
  byId("empty").hidden = messages.length > 0;
  refresh();
  byId("message").focus();
}

function again(message) {
  if (message.role === "assistant") remove(message);
  byId("message").focus();
  answer();
}

// ---- an answer

async function answer() {
  const body = request();
  if (!body) return;
  running = new AbortController();
  const stats = { sent: performance.now(), first: null, last: null, usage: null, explain: null, finish: null };
  const message = add({ role: "assistant", content: "", stats });
  const { root } = message.view;
  root.setAttribute("aria-busy", "true");
  byId("stop").disabled = false;
  const painter = paint(message);
  let failure = null;
  try {
    for await (const chunk of chunks(body, running.signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      take(message, chunk);
      painter.later();
    }
    if (!stats.finish) failure = "The answer broke off.";
  } catch (error) {
    if (running.signal.aborted) stats.finish = "stopped";
    else failure = error.message;
  }
  running = null;
  painter.now();
  root.removeAttribute("aria-busy");
  settle(message, failure);
  refresh();
}

/** The JSON of each event of a streamed answer. Throws what the server says is wrong. */
async function* chunks(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) {
    const text = await response.text();
    let told = "";
    try {
      told = JSON.parse(text).error.message;
    } catch { /* not from this server */ }
    throw new Error(told || `The server answered ${response.status}.`);
  }
  const decoder = new TextDecoder();
  let buffer = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += decoder.decode(value, { stream: true });
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const one of events) {
      if (one === "data: [DONE]") return;
      if (one.startsWith("data: ")) yield JSON.parse(one.slice(6));
    }
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
  stats.first ??= stats.last; // the event with the role is sent with the first token
  if (content) message.content += content;
  for (const { index, id, function: part } of calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += part?.name ?? "";
    call.function.arguments += part?.arguments ?? "";
  }
  if (choice.finish_reason) stats.finish = choice.finish_reason;
}

/** Shows an answer as it grows, once a frame. */
function paint(message) {
  const { body, calls, meta } = message.view;
  const text = body.appendChild(document.createTextNode(""));
  let frame = null;
  const now = () => {
    cancelAnimationFrame(frame);
    frame = null;
    follow(() => {
      const added = message.content.slice(text.length);
      if (added) text.appendData(added);
      showCalls(calls, message.tool_calls ?? []);
      showMeta(meta, message.stats);
    });
  };
  return { now, later: () => { frame ??= requestAnimationFrame(now); } };
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
function showMeta(element, { sent, first, last, usage, explain, finish }) {
  const parts = [];
  if (first !== null) parts.push([duration((first - sent) / 1000), "TTFT", "ttft"]);
  if (usage) {
    const { prompt_tokens: prompt, completion_tokens: tokens } = usage;
    const seconds = explain?.decode_seconds ?? (last - first) / 1000;
    if (tokens > 1 && seconds > 0) parts.push([((tokens - 1) / seconds).toFixed(1), "tokens/s", "rate"]);
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

/** The answer has ended: keep what can be sent back, and ask for the results of calls. */
function settle(message, failure) {
  if (!messages.includes(message)) return; // cleared meanwhile
  const { root, calls } = message.view;
  const whole = (message.tool_calls ?? []).map((call, i) => ({ call, card: calls.children[i] })).filter(({ call }) => isObject(call.function.arguments));
  delete message.tool_calls;
  if (whole.length) {
    message.tool_calls = whole.map(({ call }) => call);
    if (!failure) askResults(message, whole);
  }
  if (!message.content && !whole.length && (failure || message.stats.finish === "stopped")) {
    root.remove();
    messages.splice(messages.indexOf(message), 1);
    failure ??= "Stopped before the first token.";
  }
  if (failure) fail(failure, true);
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
  });
}

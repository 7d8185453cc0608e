// The settings of the chat: their fields, a summary of them, and what they add to a request.

import { byId } from "./dom.js";

const NUMBERS = [["temperature", "temperature"], ["max-tokens", "max_tokens"], ["seed", "seed"]];
const FIELDS = ["system", "temperature", "max-tokens", "seed", "tool-choice", "parallel", "tools"];
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

/** `changed` is called when somebody has changed a setting. */
export function startSettings(changed) {
  byId("settings").addEventListener("input", () => {
    summarize();
    changed();
  });
  summarize();
}

export function useExampleTools() {
  byId("tools").value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
  byId("tool-choice").value = "required";
  byId("parallel").value = "no";
  summarize();
}

export const settingsNow = () => Object.fromEntries(FIELDS.map((id) => [id, byId(id).value]));

export function restoreSettings(values) {
  for (const id of FIELDS) if (typeof values?.[id] === "string") byId(id).value = values[id];
  summarize();
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

/** A request for an answer to `messages`. Throws what is wrong with the settings, with the field in `field`. */
export function requestFor(messages) {
  const body = { messages: [...messages] };
  if (byId("system").value.trim()) body.messages.unshift({ role: "system", content: byId("system").value });
  for (const [id, name] of NUMBERS) {
    const field = byId(id);
    if (!field.validity.valid) throw Object.assign(new Error(`${name}: ${field.validationMessage}`), { field });
    if (field.value) body[name] = Number(field.value);
  }
  const tools = byId("tools").value.trim();
  if (tools) {
    try {
      body.tools = JSON.parse(tools);
    } catch (error) {
      throw Object.assign(new Error(`The tools are not valid JSON: ${error.message}`), { field: byId("tools") });
    }
    if (byId("parallel").value) body.parallel_tool_calls = false;
    if (byId("tool-choice").value && messages.at(-1)?.role !== "tool") body.tool_choice = byId("tool-choice").value;
  }
  return body;
}

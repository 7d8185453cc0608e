// Copies of the conversation: as text, and as a request of other clients, curl and OpenAI's Python library.

import { BASE } from "./api.js";
import { byId, copy } from "./dom.js";
import { ROLES } from "./message.js";

/** The menu of copies. `now`: gives the messages and the request, and is told what is wrong with that. */
export function startCopy(now) {
  const menu = byId("copy-menu");
  const ways = {
    "copy-all": () => now.messages().map(({ role, content, tool_calls: calls }) => `**${ROLES[role]}**\n\n${content ?? ""}${calls ? JSON.stringify(calls, null, 2) : ""}\n`).join("\n"),
    "copy-curl": () => curlOf(now.request()),
    "copy-python": () => pythonOf(now.request()),
  };
  for (const [id, textOf] of Object.entries(ways)) {
    byId(id).addEventListener("click", ({ currentTarget }) => {
      try {
        copy(textOf(), currentTarget);
      } catch (error) {
        menu.open = false;
        now.failed(error);
      }
    });
  }
  menu.addEventListener("focusout", ({ relatedTarget }) => { if (relatedTarget && !menu.contains(relatedTarget)) menu.open = false; });
  document.addEventListener("pointerdown", ({ target }) => { if (!menu.contains(target)) menu.open = false; });
  menu.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape" || !menu.open) return;
    menu.open = false;
    menu.firstElementChild.focus();
  });
}

function curlOf(body) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return [
    `curl ${BASE}/chat/completions`,
    "  -H 'Content-Type: application/json'",
    "  -H \"Authorization: Bearer ${OPENAI_API_KEY:-none}\"",
    `  -d '${data}'`,
  ].join(" \\\n") + "\n";
}

function pythonOf(body) {
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value, 1)},\n`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(BASE)}, api_key=os.environ.get("OPENAI_API_KEY", "none"))`,
    "answer = client.chat.completions.create(",
    `${fields.join("")})`,
    body.tools ? "print(answer.choices[0].message)" : "print(answer.choices[0].message.content)",
    "",
  ].join("\n");
}

/** JSON as Python writes it. Strings are the same in both. */
function literal(value, depth = 0) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList ? value.map((one) => literal(one, depth + 1)) : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, depth + 1)}`);
  const [start, end] = isList ? "[]" : "{}";
  if (items.join(", ").length < 80) return `${start}${items.join(", ")}${end}`;
  const inner = "    ".repeat(depth + 1);
  return `${start}\n${items.map((one) => `${inner}${one},\n`).join("")}${"    ".repeat(depth)}${end}`;
}

// The same request for other clients: curl and OpenAI's Python library.

import { BASE } from "./api.js";

export function curlOf(body) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return [
    `curl ${BASE}/chat/completions`,
    "  -H 'Content-Type: application/json'",
    "  -H \"Authorization: Bearer ${OPENAI_API_KEY:-none}\"",
    `  -d '${data}'`,
  ].join(" \\\n") + "\n";
}

export function pythonOf(body) {
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

// What an empty conversation shows: the model, what fits it, and where other clients find it.

import { BASE } from "./api.js";
import { byId, copy, number } from "./dom.js";

// nemo-tiny has learnt Python's documentation and nothing else.
const TINY = ["What does os.path.join do?", "How do I sort a list?", "def read_lines(path):"];

export function startAbout() {
  byId("about-url").textContent = BASE;
  byId("copy-url").addEventListener("click", ({ currentTarget }) => copy(BASE, currentTarget));
  document.addEventListener("picture", ({ detail }) => show(detail), { once: true });
}

function show({ engine }) {
  const isTiny = engine.root.endsWith("nemo-tiny");
  byId("about-model").textContent = engine.model;
  byId("about-context").textContent = `${number(engine.max_model_len)} tokens`;
  byId("about-text").textContent = isTiny ? "A toy of 7.7 million parameters: it writes what looks like Python's documentation, and most of it is wrong." : "";
  if (isTiny) [...document.querySelectorAll(".example:not([data-tools])")].forEach((one, i) => { one.textContent = TINY[i]; });
}

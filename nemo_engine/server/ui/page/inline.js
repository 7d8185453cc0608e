// Markdown inside a block, as DOM nodes: emphasis, code, links. Text stays text; the time goes with its length.

import { make } from "./dom.js";

const TAGS = { "***": "strong", "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };
const ESCAPE = String.raw`\\([!-\/:-@[-${"`"}{-~])`;
const LINK = String.raw`!?\[([^[\]\n]{1,300})\]\(<?((?:[^\s()<>]|\([^\s()<>]{0,100}\)){1,1000})>?(?: +"[^"\n]{0,300}")?\)`;
const ADDRESS = String.raw`\bhttps?:\/\/[^\s<>"${"`"}]{1,1000}`;
const TOKEN = `${ESCAPE}|(\`+)|(\\*{2,3}|__|~~|\\*|_)|(${LINK})|(${ADDRESS})`;

const isSpace = (text) => /^\s?$/.test(text);
const isWord = (text) => /^[\p{L}\p{N}]$/u.test(text);

/** Append `text` to `parent`. `links`: whether addresses are looked for. */
export function inline(parent, text, links = true) {
  const parts = []; // text, nodes and marks
  const open = new Map(); // mark -> its index in parts
  const runs = backticks(text);
  const token = new RegExp(TOKEN, "gu");
  let at = 0;
  for (let match = token.exec(text); match; match = token.exec(text)) {
    const [whole, escaped, ticks, mark, link, label, target, address] = match;
    let end = token.lastIndex;
    let part = null;
    if (escaped) part = escaped;
    else if (ticks) {
      const close = closing(runs.get(ticks.length), match.index);
      if (close === undefined) continue;
      part = make("code", { textContent: text.slice(end, close).replace(/^ (.+) $/s, "$1") });
      end = close + ticks.length;
    } else if (mark) part = markAt(match.index, open, mark, text.charAt(match.index - 1), text.charAt(end));
    else if (!links) continue;
    else if (link) part = linkTo(label, target);
    else if (address) {
      end -= trailing(address);
      part = linkTo(text.slice(match.index, end), text.slice(match.index, end));
    }
    parts.push(text.slice(at, match.index), part);
    at = token.lastIndex = end;
  }
  parts.push(text.slice(at));
  build(parent, parts);
}

/** Where runs of backticks begin, by their length. */
function backticks(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { starts: [], next: 0 });
    runs.get(run.length).starts.push(index);
  }
  return runs;
}

function closing(runs, after) {
  while (runs && runs.starts[runs.next] <= after) runs.next += 1;
  return runs?.starts[runs.next];
}

/** A mark that may begin or end emphasis. At most one of a kind is open, so nesting is bounded. */
function markAt(index, open, mark, before, after) {
  const isIntraword = mark.startsWith("_") && isWord(before) && isWord(after);
  const part = { mark, opens: false, closes: false };
  const start = open.get(mark);
  if (!isSpace(before) && !isIntraword && start) {
    for (const [other, one] of open) if (one.index >= start.index) open.delete(other);
    start.part.opens = part.closes = true;
  } else if (!isSpace(after) && !isIntraword && !(mark.startsWith("_") && isWord(before))) {
    open.set(mark, { part, index });
  }
  return part;
}

function build(parent, parts) {
  let here = parent;
  for (const part of parts) {
    if (part.closes) here = here.parentNode;
    else if (part.opens) here = here.appendChild(make(TAGS[part.mark], { className: part.mark.length === 3 ? "em" : "" }));
    else here.append(part.mark ?? part);
  }
}

/** How many characters at the end of an address belong to the sentence. */
function trailing(address) {
  let end = address.length;
  while (end && ".,;:!?'*_~|]".includes(address[end - 1])) end -= 1;
  if (address[end - 1] === ")" && !address.includes("(")) end -= 1;
  return address.length - end;
}

/** The text of a link, with "open" behind it where that leads to the web. */
function linkTo(label, address) {
  const element = make("span");
  inline(element, label, false);
  let url = null;
  try {
    url = new URL(address);
  } catch { /* relative, or nothing at all */ }
  if (url?.protocol === "http:" || url?.protocol === "https:") {
    const open = make("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href, textContent: "open" });
    open.setAttribute("aria-label", `open ${url.host}`);
    element.append(" ", open);
  } else if (label !== address) element.append(` (${address})`);
  return element;
}

// Markdown as DOM nodes, block by block while it comes: each line is looked at once, and what a block holds when it ends.

import { button, copy, make } from "./dom.js";
import { inline } from "./inline.js";

const DEPTH = 12; // of blocks in blocks; what is deeper is plain text
const COLUMNS = 100;
const FENCE = /^ *(`{3,}|~{3,}) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: |$)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +(?=\S)|$)/;
const QUOTE = /^ {0,3}> ?/;

const indentOf = (line) => line.search(/\S|$/);
const isRule = (line) => line.length < 200 && /^(?:-{3,}|\*{3,}|_{3,})$/.test(line.replaceAll(" ", ""));

export class Markdown {
  #parent;
  #depth;
  #open = null; // the block that has not ended: { kind, start, lines, ... }
  #at = 0; // where the line that is looked at begins
  #scanned = 0; // up to where no end of a line has been seen

  constructor(parent, depth = 0) {
    this.#parent = parent;
    this.#depth = depth;
  }

  /** Take what is new of `text`, all that has come so far. Returns where the unfinished block begins. */
  feed(text, isEnd) {
    for (let end = text.indexOf("\n", this.#scanned); end >= 0; end = text.indexOf("\n", this.#at)) {
      this.#line(text.slice(this.#at, end).replace(/\r$/, ""));
      this.#at = this.#scanned = end + 1;
    }
    this.#scanned = text.length;
    if (isEnd) {
      if (this.#at < text.length) this.#line(text.slice(this.#at));
      this.#close();
      this.#at = text.length;
    }
    return this.#open?.start ?? this.#at;
  }

  #begin(kind, more = {}) {
    this.#close();
    this.#open = { kind, start: this.#at, lines: [], ...more };
  }

  #line(raw) {
    const line = raw.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));
    if (this.#goesOn(line)) return;
    if (!line.trim()) {
      this.#close();
      return;
    }
    const kind = this.#open?.kind;
    let match;
    if ((match = FENCE.exec(line))) this.#begin("code", { fence: match[1], language: match[2].trim(), indent: indentOf(line) });
    else if ((match = HEADING.exec(line))) this.#heading(match[1].length, line.slice(match[0].length).trim());
    else if (isRule(line)) this.#put(make("hr"));
    else if ((match = ITEM.exec(line)) && (kind !== "text" || match[3]) && (kind !== "text" || /^(?:\D|1\D)/.test(match[2]))) this.#item(match, line);
    else if (QUOTE.test(line)) this.#begin("quote", { lines: [line.replace(QUOTE, "")] });
    else if (kind === "text" && this.#open.lines.length === 1 && isTable(this.#open.lines[0], line)) Object.assign(this.#open, { kind: "table", rule: line });
    else {
      if (kind !== "text") this.#begin("text");
      this.#open.lines.push(line);
    }
  }

  /** Whether `line` belongs to the block that is open, whatever it says. */
  #goesOn(line) {
    const open = this.#open;
    if (open?.kind === "code") {
      const mark = line.trim();
      if (mark.length >= open.fence.length && mark === open.fence[0].repeat(mark.length)) this.#close();
      else open.lines.push(line.slice(Math.min(open.indent, indentOf(line))));
      return true;
    }
    if (open?.kind === "table" && line.includes("|")) {
      open.lines.push(line);
      return true;
    }
    if (open?.kind === "quote" && QUOTE.test(line)) {
      open.lines.push(line.replace(QUOTE, ""));
      return true;
    }
    if (open?.kind !== "item") return false;
    const indent = indentOf(line);
    const isBlank = !line.trim();
    const isLazy = open.lines.at(-1)?.trim() && !FENCE.test(line) && !HEADING.test(line) && !ITEM.test(line) && !QUOTE.test(line) && !isRule(line);
    if (!isBlank && indent < open.inside && !isLazy) return false;
    open.lines.push(line.slice(Math.min(indent, open.text)));
    return true;
  }

  #item([whole, indent, mark], line) {
    const number = Number.parseInt(mark, 10);
    const text = Math.min(whole.length, indent.length + mark.length + 4);
    this.#begin("item", { number, text, inside: indent.length + 2, lines: [line.slice(text).replace(/^\[( |x)\] /i, (box) => (box[1] === " " ? "☐ " : "☑ "))] });
  }

  #heading(level, text) {
    let end = text.length;
    while (text[end - 1] === "#") end -= 1;
    const element = make(`h${Math.min(6, level + 2)}`); // the page has h1 and h2
    inline(element, text.slice(0, end).trimEnd());
    this.#put(element);
  }

  #put(element) {
    this.#close();
    this.#parent.append(element);
  }

  #close() {
    const block = this.#open;
    this.#open = null;
    if (!block) return;
    const { kind, lines } = block;
    if (kind === "code") this.#parent.append(codeBlock(lines.join("\n"), block.language));
    else if (kind === "table") this.#parent.append(tableOf(lines, block.rule));
    else if (kind === "quote") this.#within(this.#parent.appendChild(make("blockquote")), lines);
    else if (kind === "item") this.#within(this.#listFor(block.number).appendChild(make("li")), lines);
    else {
      const element = this.#parent.appendChild(make("p"));
      inline(element, lines.join("\n").trimEnd());
    }
  }

  #listFor(number) {
    const tag = Number.isNaN(number) ? "UL" : "OL";
    const last = this.#parent.lastElementChild;
    if (last?.tagName === tag) return last;
    return this.#parent.appendChild(make(tag.toLowerCase(), tag === "OL" ? { start: number } : {}));
  }

  #within(element, lines) {
    const text = lines.join("\n");
    if (this.#depth < DEPTH) new Markdown(element, this.#depth + 1).feed(text, true);
    else element.append(text);
  }
}

function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (cells.length > 1 && !cells.at(-1).trim()) cells.pop();
  return cells.slice(0, COLUMNS).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function isTable(head, rule) {
  if (!head.includes("|") || !/^[-:| ]{3,2000}$/.test(rule)) return false;
  const cells = cellsOf(rule);
  return cells.length === cellsOf(head).length && cells.every((cell) => /^:?-+:?$/.test(cell));
}

function tableOf([head, ...rows], rule) {
  const sides = cellsOf(rule).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, tag) => {
    const cells = cellsOf(line).slice(0, sides.length); // short rows stay short, or a few signs would make many cells
    return make("tr", {}, ...cells.map((text, i) => {
      const cell = make(tag, { className: sides[i] });
      inline(cell, text);
      return cell;
    }));
  };
  const body = make("tbody");
  for (const line of rows) body.append(row(line, "td")); // one by one: a call takes only so many arguments
  const table = make("table", {}, make("thead", {}, row(head, "th")), body);
  return make("div", { className: "wide", tabIndex: 0 }, table);
}

function codeBlock(text, language) {
  const name = language.split(/\s/, 1)[0].slice(0, 40);
  const act = (event) => copy(text, event.currentTarget);
  const head = make("div", { className: "name" }, make("span", { textContent: name || "code" }), button("Copy", act, { className: "link", ariaLabel: "Copy code" }));
  return make("div", { className: "block" }, head, make("pre", { tabIndex: 0 }, make("code", { textContent: text })));
}

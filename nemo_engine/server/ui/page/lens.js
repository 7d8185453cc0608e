// The token lens: an answer as its tokens, tinted by how surprising each was, with the likeliest five on hover or by arrow keys.

import { byId, make } from "./dom.js";

const STEPS = [0.1, 0.7, 2, 4]; // surprise in nats, from which a tint is deeper

const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  return share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

/** What `choice`'s log-probabilities say of its tokens; `reader` joins bytes of characters that several tokens make. */
export function tokensOf(logprobs, reader) {
  return (logprobs?.content ?? []).map(({ token, bytes, logprob, top_logprobs: top }) => ({
    text: reader.decode(Uint8Array.from(bytes ?? []), { stream: true }), token, logprob, top,
  }));
}

/** Shows tokens as they come. */
export class Lens {
  #shown = 0;
  #at = -1;

  constructor(parent) {
    this.element = parent.appendChild(make("div", { className: "tokens", tabIndex: 0, role: "group", ariaLabel: "Tokens; arrow keys go through them" }));
    this.element.addEventListener("pointerover", ({ target }) => this.#look(this.#indexOf(target)));
    this.element.addEventListener("pointerleave", () => this.#look(-1));
    this.element.addEventListener("blur", () => this.#look(-1));
    this.element.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      this.#look(Math.min(this.#shown - 1, Math.max(0, this.#at + move)));
    });
  }

  show(tokens) {
    this.tokens = tokens;
    for (; this.#shown < tokens.length; this.#shown += 1) {
      const { text, logprob } = tokens[this.#shown];
      const element = this.element.appendChild(make("span", { textContent: text }));
      if (logprob !== null) element.dataset.surprise = STEPS.filter((step) => -logprob >= step).length;
    }
  }

  #indexOf(element) {
    return element.parentNode === this.element ? Array.prototype.indexOf.call(this.element.children, element) : -1;
  }

  #look(index) {
    this.element.children[this.#at]?.classList.remove("at");
    this.#at = index;
    const card = byId("lens-card");
    const one = this.tokens?.[index];
    card.hidden = !one || one.logprob === null;
    if (card.hidden) return;
    const element = this.element.children[index];
    element.classList.add("at");
    const rows = one.top.some(({ token }) => token === one.token) ? one.top : [...one.top, one];
    card.replaceChildren(...rows.map(({ token, logprob }) => {
      const row = make("div", { className: token === one.token ? "chosen" : "" }, make("code", { textContent: JSON.stringify(token) }), make("span", { textContent: percent(logprob) }));
      row.style.setProperty("--share", `${Math.exp(logprob) * 100}%`);
      return row;
    }));
    const box = element.getBoundingClientRect();
    const below = box.bottom + card.offsetHeight + 6 < innerHeight;
    card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8))}px`;
    card.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - card.offsetHeight - 6)}px`;
  }
}

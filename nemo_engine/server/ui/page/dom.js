// Small helpers for all of the page.

export const byId = (id) => document.getElementById(id);

export const number = (value) => value.toLocaleString("en");

/** An element with properties and children; text children stay text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A button that is no submit button. */
export function button(text, act, properties = {}) {
  const element = make("button", { type: "button", textContent: text, ...properties });
  element.addEventListener("click", act);
  return element;
}

/** Put `text` on the clipboard, and say so on the button for a moment. */
export async function copy(text, from) {
  if (from.textContent.endsWith("opied")) return;
  const [name, label] = [from.textContent, from.ariaLabel];
  let isDone = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    isDone = copyBySelection(text); // the clipboard is for https and localhost alone
    from.focus();
  }
  Object.assign(from, { textContent: isDone ? "Copied" : "Not copied", ariaLabel: null });
  setTimeout(() => Object.assign(from, { textContent: name, ariaLabel: label }), 1500);
}

function copyBySelection(text) {
  const field = make("textarea", { value: text, className: "hidden" });
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  return isDone;
}

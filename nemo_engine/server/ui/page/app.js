// Starts the page: the theme, the two views, the chat and the view of the engine.

import { startAbout } from "./about.js";
import { startChat } from "./chat.js";
import { startEngine } from "./engine.js";

const THEMES = ["auto", "light", "dark"];

function startTheme() {
  const button = document.getElementById("theme");
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.lastChild.textContent = theme;
    document.dispatchEvent(new Event("themechange"));
  };
  let theme = "auto";
  try {
    theme = THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto";
  } catch { /* storage is turned off */ }
  show(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem("theme", theme);
    } catch { /* kept until the page is left */ }
    show(theme);
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
}

function startViews() {
  for (const view of ["chat", "engine"]) {
    document.getElementById(`show-${view}`).addEventListener("click", () => {
      document.body.dataset.view = view;
      for (const other of ["chat", "engine"]) {
        document.getElementById(`show-${other}`).setAttribute("aria-pressed", String(other === view));
      }
    });
  }
}

startViews();
startAbout();
startChat();
startEngine();
startTheme();

// Keeps the conversation of this tab over a reload. It goes with the tab, and is sent nowhere.

const NAME = "conversation";

/** Returns whether it could be kept: browsers keep some megabytes. */
export function keep(value) {
  try {
    sessionStorage.setItem(NAME, JSON.stringify(value));
    return true;
  } catch {
    try {
      sessionStorage.removeItem(NAME); // an old one would be taken for this one
    } catch { /* storage is turned off */ }
    return false;
  }
}

export function kept() {
  try {
    const value = JSON.parse(sessionStorage.getItem(NAME));
    return Array.isArray(value?.messages) ? value : null;
  } catch {
    return null;
  }
}

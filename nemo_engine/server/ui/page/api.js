// Asks the server for answers, and says in words what went wrong.

export const BASE = new URL("v1", location.href).href;

/** The JSON of each event of a streamed answer. Throws what is wrong, in words for whoever reads the page. */
export async function* chunks(body, signal) {
  const response = await asked(fetch(`${BASE}/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  }), `The server at ${location.host} cannot be reached. It may have stopped, or the network is down.`);
  if (!response.ok) throw new Error(await toldBy(response));
  const decoder = new TextDecoder();
  let buffer = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await asked(reader.read(), `The connection to ${location.host} was lost in the middle of the answer.`);
    if (done) return;
    buffer += decoder.decode(value, { stream: true });
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const one of events) {
      if (one === "data: [DONE]") return;
      if (one.startsWith("data: ")) yield JSON.parse(one.slice(6));
    }
  }
}

/** What `promise` brings. Browsers call a lost connection a TypeError, each in words of its own. */
async function asked(promise, words) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(words);
  }
}

async function toldBy(response) {
  const text = await response.text().catch(() => "");
  try {
    const { message } = JSON.parse(text).error;
    if (message) return message;
  } catch { /* not from this server */ }
  return `The server answered ${response.status}.`;
}

/** Which pages hold a conversation: { num_tokens, num_pages, runs }, null where that cannot be told. */
export async function pagesOf(body) {
  try {
    const response = await fetch("monitor/pages", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

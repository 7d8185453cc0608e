"""The page in headless Chromium: answers as Markdown and as tokens, what is done with a conversation, and axe-core."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import httpx
import pytest

from tests.helpers.patience import check_growth
from tests.server.browser import (
    CHAT,
    PATIENCE,
    answer_with,
    change_request,
    kept,
    needs_chromium,
    playwright,
    send,
    until_answered,
)
from tests.server.live import LiveServer

expect = playwright.expect
pytestmark = needs_chromium

MARKDOWN = """\
# A title

Some **bold**, *slanted* and `code <b>`; see [the page](https://example.com/a_(b)) and https://example.org/x.

- first
  1. inner
- second

```python
print("<i>")

# not a title
```

| a | b |
|---|--:|
| 1 | `2` |

> quoted

## The end"""

# Markdown into the HTML of what is shown, given in pieces of `step` characters; 0: all at once.
RENDER = """async ([text, step]) => {
    const { Markdown } = await import("/page/markdown.js");
    const shown = document.createElement("div");
    const blocks = new Markdown(shown);
    const rests = [];
    for (let end = step; step && end < text.length; end += step) rests.push(blocks.feed(text.slice(0, end), false));
    blocks.feed(text, true);
    const links = [...shown.querySelectorAll("[href]")].map((link) => link.href);
    const tags = [...new Set([...shown.querySelectorAll("*")].map((one) => one.tagName.toLowerCase()))];
    const names = [...new Set([...shown.querySelectorAll("*")].flatMap((one) => one.getAttributeNames()))];
    return { html: shown.innerHTML, text: shown.textContent, links, tags, names, rests };
}"""
TAGS = {
    *("h3", "h4", "h5", "h6", "p", "ul", "ol", "li", "blockquote", "hr", "div", "span", "pre", "code", "button", "a"),
    *("strong", "em", "del", "table", "thead", "tbody", "tr", "th", "td"),
}
NAMES = {"class", "type", "tabindex", "href", "target", "rel", "title", "aria-label", "start"}
HOSTILE = {
    "elements": '<img src=x onerror="window.bad = 1"><script>window.bad = 1</script>\n\n<svg/onload=window.bad=1>',
    "links": "[a](javascript:window.bad=1) [b](JaVaScRiPt:1) [c](data:text/html,<script>1</script>) "
    "[d](//evil.example) [e](java\tscript:1) ![f](vbscript:1) [g](https://ok.example) [h](file:///etc/passwd)",
    "names": '```"><img src=x onerror=window.bad=1>\nx\n```\n[x](https://ok.example/"onmouseover="window.bad=1)',
    "quotes": ">" * 100_000,
    "items": "- " * 50_000,
    "steps": "\n".join("  " * depth + "- a" for depth in range(440)),
    "fence": "````\n" + "```\n<b>\n" * 10_000,
    "table": "|a" * 100 + "\n" + "|-" * 100 + "\n" + "|\n" * 90_000,
    "marks": "**a*_~~" * 14_000,
    "ticks": " ".join("`" * count for count in range(1, 440)),
    "code": "`a`" * 60_000,
    "brackets": "[a](x[" * 16_000,
    "half links": "[a](x)[a](x" * 9_000,
    "addresses": "https://a." * 10_000,
    "one line": "x" * 400_000,
    "spaces": "a" + " " * 50_000 + "\n" + " " * 50_000 + "b",
    "blocks": "\n\n#" * 33_000,
}


def test_markdown_is_shown_block_by_block(page: Any) -> None:
    whole = page.evaluate(RENDER, [MARKDOWN, 0])
    for step in (1, 7):
        parts = page.evaluate(RENDER, [MARKDOWN, step])
        assert parts["html"] == whole["html"]
    fence = MARKDOWN.index("```")
    rests = page.evaluate(RENDER, [MARKDOWN, 1])["rests"]  # what is not shown as Markdown yet, by characters that came
    assert rests == sorted(rests) and all(rest <= at + 1 for at, rest in enumerate(rests))
    assert rests[fence + 20] == fence and rests[MARKDOWN.index("| a") - 1] > fence  # a block, once it has ended
    answer_with(page, {"content": MARKDOWN})
    send(page, "# not mine")
    body = until_answered(page).locator(".body")
    expect(body.locator("h3")).to_have_text("A title")
    expect(body.locator("h4")).to_have_text("The end")
    expect(body.locator("p strong")).to_have_text("bold")
    expect(body.locator("ul > li")).to_have_count(2)
    expect(body.locator("ul ol > li")).to_have_text("inner")
    expect(body.locator("pre")).to_have_text('print("<i>")\n\n# not a title')
    expect(body.locator("tbody td.right code")).to_have_text("2")
    expect(body.locator("blockquote")).to_have_text("quoted")
    links = body.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.com/a_(b)",
        "https://example.org/x",
    ]
    assert all(link.text_content() == "open" for link in links.all())
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    expect(page.locator(".message[data-role=user] .body")).to_have_text("# not mine")
    expect(page.locator("[data-key=rate]")).to_have_count(0)  # all came at once, which tells nothing


def test_hostile_markdown_stays_text(open_page: Callable[..., Any], live: LiveServer) -> None:
    page = open_page(live, allow="a status of 400")  # the conversation is longer than the context: it has no pages
    for name, text in HOSTILE.items():
        shown = page.evaluate(RENDER, [text, 0])
        assert set(shown["tags"]) <= TAGS and set(shown["names"]) <= NAMES, name
        assert all(re.match("https?://", link) for link in shown["links"]), name
        letters = re.sub(r"[\W_]", "", text)
        if name not in (
            "addresses",
            "links",
            "names",
            "half links",
            "brackets",
            "fence",
        ):  # to which "open", "Copy" are added
            assert re.sub(r"[\W_]", "", shown["text"]) == letters, name
    assert page.evaluate(RENDER, [HOSTILE["links"], 0])["links"] == ["https://ok.example/"]
    answer_with(page, *({"content": text} for text in HOSTILE.values()))
    send(page, "Go")
    until_answered(page)
    assert page.locator("main img, main script, main svg").count() == 0
    assert page.evaluate("() => window.bad === undefined")


# Markdown by four characters at a time; the page keeps the texts and a reader for each, so that a measurement moves none.
READ = """async (texts) => {
    const { Markdown } = await import("/page/markdown.js");
    window.read = (name, share) => {
        const text = texts[name].slice(0, texts[name].length * share);
        const blocks = new Markdown(document.createElement("div"));
        for (let end = 4; end < text.length; end += 4) blocks.feed(text.slice(0, end), false);
        blocks.feed(text, true);
    };
}"""


def test_the_time_goes_with_the_length(page: Any) -> None:
    """What counts is time that the page's thread computed: neither a pause nor other processes are in it."""
    page.evaluate(READ, HOSTILE)
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds(name: str, share: float) -> float:
        def computed() -> float:
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            return next(float(one["value"]) for one in metrics if one["name"] == "ThreadTime")

        before = computed()
        page.evaluate("([name, share]) => window.read(name, share)", [name, share])
        return computed() - before

    for name in HOSTILE:
        check_growth(lambda share, name=name: seconds(name, share), name)  # type: ignore[misc]


def test_an_answer_that_was_cut_off_goes_on(page: Any, live: LiveServer) -> None:
    asked = change_request(page, max_tokens=6, temperature=0, ignore_eos=True)
    send(page, "What does os.path.join do?")
    message = until_answered(page)
    expect(message.locator("[data-key=finish]")).to_have_text("length")
    first = kept(page)[-1]["content"]
    page.get_by_role("button", name="Continue: Assistant").click()
    until_answered(page)
    assert asked[1]["messages"][-1] == {"role": "assistant", "content": first}
    assert asked[1]["continue_final_message"] is True and asked[1]["add_generation_prompt"] is False
    whole = kept(page)[-1]["content"]
    body = {name: value for name, value in asked[1].items() if name not in ("request_id", "stream", "stream_options")}
    body |= {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    rest = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=600).json()["choices"][0]["message"][
        "content"
    ]
    assert whole == first + rest and rest
    expect(page.locator(".message")).to_have_count(2)
    answer_with(page, {"content": " and half"}, ends="")  # the connection breaks
    page.get_by_role("button", name="Continue: Assistant").click()
    expect(page.get_by_role("alert")).to_contain_text("broke off")
    assert kept(page)[-1]["content"] == whole + " and half"
    page.unroute(CHAT)
    asked = change_request(page, max_tokens=6)
    page.get_by_role("alert").get_by_role("button", name="Try again").click()
    until_answered(page)
    assert [one["role"] for one in asked[0]["messages"]] == ["user"] and "continue_final_message" not in asked[0]


def test_a_reload_keeps_the_conversation(page: Any) -> None:
    page.locator("#settings summary").click()
    page.locator("#seed").fill("7")
    change_request(page, max_tokens=6, ignore_eos=True)
    send(page, "A list is")
    before = until_answered(page).text_content()
    change_request(page, max_tokens=900, ignore_eos=True)
    send(page, "And a queue?")
    expect(page.locator(".message").last.locator(".body")).to_have_text(re.compile("...", re.S))
    page.reload()
    expect(page.locator(".message")).to_have_count(4)
    assert page.locator(".message").nth(1).text_content() == before
    expect(page.locator(".message").last.locator("[data-key=finish]")).to_have_text(re.compile("stopped|broke off"))
    expect(page.get_by_role("button", name="Continue: Assistant").last).to_be_visible()
    assert page.locator("#seed").input_value() == "7"
    page.locator("#clear").click()
    page.locator("#clear-yes").click()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#about-context")).to_have_text("1,024 tokens")
    expect(page.locator("#about-url")).to_have_text(page.url + "v1")
    expect(page.locator(".example").first).to_have_text("What does os.path.join do?")


def test_copies_are_requests_of_other_clients(open_page: Callable[..., Any], live: LiveServer) -> None:
    page = open_page(live, permissions=["clipboard-read", "clipboard-write"])

    def copied(name: str) -> str:
        page.get_by_role("button", name=name).first.click()
        expect(page.get_by_role("button", name="Copied").first).to_be_visible()
        text: str = page.evaluate("() => navigator.clipboard.readText()")
        page.get_by_role("button", name=name).first.wait_for()
        return text

    answer_with(page, {"content": "It's\n```sh\nls '$x'\n```"})
    question = "it's \"\\n\" $(date) `id` \u00fc\u2028'''"
    page.locator("#settings summary").click()
    page.locator("#temperature").fill("0")
    page.locator("#max-tokens").fill("3")
    page.locator("#tools").fill(
        json.dumps([{"type": "function", "function": {"name": "f", "strict": False, "parameters": {}}}])
    )
    send(page, question)
    until_answered(page)
    assert copied("Copy code") == "ls '$x'"
    assert copied("Copy: Assistant") == "It's\n```sh\nls '$x'\n```" and copied("Copy: You") == question
    page.locator("#copy-menu summary").click()
    assert question in copied("Conversation")
    curl, python = copied("As curl"), copied("As Python")
    assert (
        json.loads(curl[curl.index("{\n") : curl.rindex("'")].replace("'\\''", "'"))["messages"][0]["content"]
        == question
    )
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(python, "copied", "exec"), {})
    assert "ChatCompletionMessage" in shown.getvalue()
    if shutil.which("curl"):
        answer = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, timeout=600, check=True).stdout)
        assert answer["usage"]["completion_tokens"] == 3


def test_the_lens_shows_the_likeliest_tokens(page: Any) -> None:
    page.locator("#lens").click()
    asked = change_request(page, max_tokens=12, temperature=0, ignore_eos=True)
    send(page, "A list \u00fc is")
    tokens = until_answered(page).locator(".tokens > span")
    assert asked[0]["logprobs"] is True and asked[0]["top_logprobs"] == 5
    expect(tokens).to_have_count(12)
    assert "".join(tokens.all_text_contents()).startswith(kept(page)[-1]["content"])
    page.locator(".body .tokens").focus()
    page.keyboard.press("ArrowRight")
    rows = page.locator("#lens-card > div")
    expect(rows).to_have_count(5)
    shares = [float(re.sub("[^0-9.]", "", row.locator("span").text_content())) for row in rows.all()]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    expect(page.locator("#lens-card .chosen")).to_have_count(1)
    assert (
        json.loads(rows.first.locator("code").text_content()) == tokens.first.text_content()
    )  # the likeliest was taken
    tokens.nth(3).hover()
    expect(tokens.nth(3)).to_have_class("at")
    page.locator("#lens").click()
    expect(page.locator(".body .tokens")).to_have_count(0)
    expect(page.locator("#lens-card")).to_be_hidden()


LENS = """
async () => {
    const { Lens } = await import("/page/lens.js");
    const parent = document.body.appendChild(document.createElement("div"));
    const log = (share) => Math.log(share);
    const top = [{ token: "a", logprob: log(0.5) }, { token: "b", logprob: log(0.25) }];
    const of = (token, share, logprob = log(share)) => ({ text: token, token, logprob, top });
    const lens = new Lens(parent);
    lens.show([of("a", 0.95), of("a", 0.5), of("b", 0.25), of("c", 0.1), of("d", 0.0005), of("e", null, null)]);
    const seen = [];
    const look = (key) => {
        lens.element.dispatchEvent(new KeyboardEvent("keydown", { key }));
        const card = document.querySelector("#lens-card");
        const rows = [...card.children].map((row) => [row.textContent, row.className, row.style.getPropertyValue("--share")]);
        seen.push([[...lens.element.children].findIndex((one) => one.className === "at"), card.hidden ? [] : rows]);
    };
    for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"]) look(key);
    look("ArrowRight"); look("ArrowRight");
    const surprise = [...lens.element.children].map((one) => one.dataset.surprise ?? null);
    parent.remove();
    return { surprise, seen };
}
"""


def test_the_lens_says_how_likely_each_token_was(page: Any) -> None:
    found = page.evaluate(LENS)
    assert found["surprise"] == ["0", "1", "2", "3", "4", None]
    a, b = ['"a"50.0 %', "", "50%"], ['"b"25.0 %', "", "25%"]
    chosen = [a[0], "chosen", a[2]], [b[0], "chosen", b[2]]
    places = [at for at, _ in found["seen"]]
    assert places == [0, 1, 2, 3, 4, 3, 4, -1]  # nothing is known of the last token
    rows = [shown for _, shown in found["seen"]]
    assert rows[0] == rows[1] == [chosen[0], b] and rows[2] == [a, chosen[1]]
    assert [row[:2] for row in rows[3]] == [a[:2], b[:2], ['"c"10.0 %', "chosen"]]  # it was not among the likeliest
    assert rows[4][2][0] == '"d"< 0.1 %' and rows[7] == []


def test_the_pages_of_the_conversation_are_marked(open_page: Callable[..., Any], live: LiveServer) -> None:
    page = open_page(live, allow="willReadFrequently")  # the test reads the map, the page does not
    change_request(page, max_tokens=30, temperature=0, ignore_eos=True)
    send(page, "Tell me of lists. " * 12)
    until_answered(page)
    messages = [{"role": one["role"], "content": one["content"]} for one in kept(page)]
    ask = {"messages": messages, "add_generation_prompt": False}
    found = httpx.post(f"{live.url}/monitor/pages", json=ask).json()
    assert found["num_pages"] >= 3
    expect(page.locator("#n-own")).to_have_text(str(found["num_pages"]))
    expect(page.locator("#map")).to_have_attribute(
        "aria-label", re.compile(f"this conversation lies in {found['num_pages']}")
    )
    check_map(page, live, found["runs"])
    page.get_by_role("button", name="Again: Assistant").click()
    until_answered(page)
    expect(page.locator("#own-text")).to_have_text(re.compile("the last answer reused [1-9]"))
    page.locator("#clear").click()
    page.locator("#clear-yes").click()
    expect(page.locator("#own")).to_be_hidden(timeout=PATIENCE)
    check_map(page, live, [])


# The colours of each square's corner and middle, and of the states, as CSS has them.
COLOURS = """
async (count) => {
    const { layoutOf } = await import("/page/charts.js");
    const canvas = document.querySelector("#map");
    const { size, columns } = layoutOf(canvas.clientWidth, count);
    const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);  // once: more is warned of
    const at = (x, y) => {
        const first = 4 * (Math.floor(y * devicePixelRatio) * canvas.width + Math.floor(x * devicePixelRatio));
        return [...image.data.slice(first, first + 3)];
    };
    const squares = [...Array(count).keys()].map((i) => [(i % columns) * size, Math.floor(i / columns) * size]);
    const probe = document.body.appendChild(document.createElement("i"));
    const named = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color.match(/\\d+/g).map(Number); };
    const names = Object.fromEntries(["own", "free", "cached"].map((name) => [name, named(name)]));
    probe.remove();
    return { names, corners: squares.map(([x, y]) => at(x, y)), middles: squares.map(([x, y]) => at(x + size / 2 - 1, y + size / 2 - 1)) };
}
"""


def check_map(page: Any, live: LiveServer, runs: list[list[int]]) -> None:
    """Every page that the engine holds in its cache is drawn so at its place, and those of ``runs`` have a frame."""
    map_ = httpx.get(f"{live.url}/monitor").json()["pages"]
    assert map_["pages_per_cell"] == 1 and map_["counts"]["used"] == map_["counts"]["shared"] == 0
    cached = base64.b64decode(map_["cells"]["cached"])
    own = {page_ for first, count in runs for page_ in range(first, first + count)}
    expected = [255 * (cell in own) for cell in range(len(cached))]
    deadline = time.monotonic() + PATIENCE / 1000
    while True:  # a picture comes once a second
        seen = page.evaluate(COLOURS, map_["num_cells"])
        framed = [255 * (corner == seen["names"]["own"]) for corner in seen["corners"]]
        filled = [255 * (middle == seen["names"]["cached"]) for middle in seen["middles"]]
        if (framed, bytes(filled)) == (expected, cached):
            return
        assert time.monotonic() < deadline, (framed, filled, seen["names"])
        page.wait_for_timeout(200)


def test_what_a_request_waits_for_is_told(page: Any, live: LiveServer) -> None:
    asked: list[dict[str, Any]] = []
    page.route(CHAT, lambda route: asked.append(json.loads(route.request.post_data)))  # and never answered
    send(page, "Is it my turn?")
    expect(page.locator("#stop")).to_be_visible()
    mine = {"state": "waiting", "queue_place": 2, "age": 1, "prompt_tokens": 9, "cached_tokens": 0, "computed_tokens": 0,
            "output_tokens": 0, "pages": 0, "preemptions": 0}  # fmt: skip
    other = mine | {"id": "chatcmpl-other", "queue_place": 1}

    def show(route: Any) -> None:
        picture = httpx.get(f"{live.url}/monitor").json()
        picture["requests"] = [other, mine | {"id": f"chatcmpl-{asked[0]['request_id']}"}]
        route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(picture)}\n\n")

    page.route("**/monitor/stream", show)
    page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")  # takes a new connection
    expect(page.locator("[data-key=wait]")).to_have_text("2nd in the queue")
    expect(page.locator("#requests td:first-child")).to_have_text([other["id"], f"chatcmpl-{asked[0]['request_id']}"])
    page.unroute("**/monitor/stream")
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("Stopped before the first token")
    told = page.evaluate(
        """async () => {
            const { waitOf } = await import("/page/message.js");
            const places = [1, 2, 3, 4, 11, 12, 13, 21, 22, 101, 111];
            const waiting = places.map((queue_place) => waitOf({ state: "waiting", queue_place, output_tokens: 0 }));
            const prefill = { state: "prefill", computed_tokens: 12000, prompt_tokens: 60000, output_tokens: 0 };
            const decode = { ...prefill, state: "decode", output_tokens: 1 };
            return [waiting.map((text) => text.split(" ")[0]).join(" "), waitOf(prefill), waitOf(decode),
                waitOf({ state: "waiting", queue_place: 2, output_tokens: 9 })];
        }"""
    )
    assert told == [
        "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 101st 111th",
        "prefilling 12k of 60k tokens",
        "",
        "made room for others, 2nd in the queue",
    ]


# ---- axe-core


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page: Callable[..., Any], live: LiveServer, scheme: str) -> None:
    page = open_page(live, color_scheme=scheme, reduced_motion="reduce")
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text())
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

    def violations() -> list[Any]:
        found: list[Any] = page.evaluate(
            """async (runOnly) => {
                const { violations } = await axe.run(document, { runOnly });
                return violations.map(({ id, nodes }) => [id, nodes.map(({ target }) => String(target))]);
            }""",
            rules,
        )
        return found

    assert violations() == []  # nothing has been said yet
    page.locator("#lens").click()
    change_request(page, max_tokens=20, temperature=1, seed=3)
    send(page, "What does os.path.join do?")
    until_answered(page)
    page.locator(".body .tokens").press("ArrowRight")
    call = {"index": 0, "id": "abcdefghi", "function": {"name": "f", "arguments": "{}"}}
    answer_with(page, {"content": MARKDOWN}, {"tool_calls": [call]}, finish="tool_calls")
    send(page, "Now in Markdown")
    until_answered(page)
    page.get_by_label("Result of f").fill("1")
    answer_with(page, {"content": "half"}, ends="")
    page.get_by_role("button", name="Send result").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.locator("#settings summary").click()
    for width, height in ((1280, 800), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        assert violations() == []
        cut = page.evaluate(
            """() => [...document.querySelectorAll("button, dt, dd, h1, h2, h3, summary, #status, .muted, .legend li")]
                .filter((one) => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== "inline"
                    && getComputedStyle(one).overflowX !== "visible").map((one) => one.id || one.textContent)"""
        )
        assert cut == [] and page.evaluate("() => document.scrollingElement.scrollWidth") <= width
    page.locator("#show-engine").click()
    assert violations() == []
    page.locator("#show-chat").click()
    page.locator("#clear").click()
    assert violations() == []

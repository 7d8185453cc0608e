"""The page in headless Chromium: a chat by keyboard, answers, calls and mistakes shown, and the view of the engine
under load.

Skipped where there is no Chromium; ``.ci/setup`` installs it where it may.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from nemo_engine import AsyncEngine
from tests.server.browser import (
    CHAT,
    PATIENCE,
    answer_with,
    change_request,
    focused,
    kept,
    needs_chromium,
    playwright,
    send,
    until_answered,
)
from tests.server.live import LiveServer

expect = playwright.expect
pytestmark = needs_chromium


def squeezed(text: str) -> str:
    """Letters and digits alone, which Markdown shows as they are, but for the numbers of lists."""
    return re.sub(r"[\W_]", "", re.sub(r"(?m)^ *\d+[.)] ", "", text))


# ---- the chat


def test_a_message_by_keyboard_is_streamed_to_its_end(page: Any, live: LiveServer) -> None:
    asked = change_request(page)
    expect(page.locator("#message")).to_be_focused()  # a browser does what autofocus says when it first paints
    page.keyboard.press("Shift+Tab")  # to the settings
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("Be brief.")
    page.keyboard.press("Tab")
    page.keyboard.type("0")
    page.keyboard.press("Tab")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("48")
    page.locator("#message").focus()
    page.keyboard.type("def read(path):")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("what next? <b>&amp;")
    page.keyboard.press("Enter")
    message = until_answered(page)
    expect(page.locator("#message")).to_be_focused()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "def read(path):\nwhat next? <b>&amp;"},
    ]
    assert asked[0]["messages"] == messages and asked[0]["temperature"] == 0 and asked[0]["max_tokens"] == 48
    expected = httpx.post(
        f"{live.url}/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 48}, timeout=600
    ).json()
    choice, usage = expected["choices"][0], expected["usage"]
    assert kept(page)[-1]["content"] == choice["message"]["content"] != ""
    assert squeezed(message.locator(".markdown").text_content()) == squeezed(choice["message"]["content"])
    assert page.locator(".message").first.locator(".body").text_content() == messages[1]["content"]
    shown = {part.get_attribute("data-key"): part.text_content() for part in message.locator(".meta span").all()}
    assert re.fullmatch(r"\d+(\.\d+)? m?s TTFT", shown["ttft"]) and float(shown["rate"].split()[0]) > 0
    assert shown["tokens"] == f"{usage['completion_tokens']} tokens" and shown["finish"] == choice["finish_reason"]
    assert shown["prompt"].startswith(f"{usage['prompt_tokens']} prompt, ")

    send(page, "And then?")
    until_answered(page)
    assert asked[1]["messages"][1:] == [
        messages[1],
        {"role": "assistant", "content": choice["message"]["content"]},
        {"role": "user", "content": "And then?"},
    ]
    page.get_by_role("button", name="Again: Assistant").click()  # whose prompt is cached by now
    again = until_answered(page).locator("[data-key=prompt]").text_content()
    assert asked[2] | {"request_id": ""} == asked[1] | {"request_id": ""} and int(again.split(", ")[1].split()[0]) > 0


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_ends_the_request(page: Any, live: LiveServer, way: str) -> None:
    change_request(page, ignore_eos=True, max_tokens=900)
    send(page, "Tell me everything about lists.")
    message = page.locator(".message").last
    expect(message).to_have_attribute("aria-busy", "true")
    expect(message.locator(".body")).to_have_text(re.compile("...", re.S))
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.locator("#stop").click()
    expect(message.locator("[data-key=finish]")).to_have_text("stopped")
    text = message.locator(".body").text_content()
    deadline = time.monotonic() + 120
    while live.service.engine.num_unfinished:
        assert time.monotonic() < deadline, "the request went on"
        time.sleep(0.02)
    assert message.locator(".body").text_content() == text
    page.unroute(CHAT)
    send(page, "Go on.")
    expect(until_answered(page).locator("[data-key=finish]")).to_have_text(re.compile("stop|length"))


def test_a_tool_call_and_its_result(page: Any) -> None:
    asked = change_request(page, seed=1)
    page.get_by_role("button", name="Try a tool call").click()
    message = until_answered(page)
    card = message.locator(".call")
    expect(card).to_have_count(1)
    expect(card.locator(".name b")).to_have_text("get_current_weather")
    arguments = json.loads(card.locator("pre").text_content())
    assert {"location", "format"} <= set(arguments)
    call_id = card.locator(".id").text_content()
    assert re.fullmatch("[0-9A-Za-z]{9}", call_id)
    expect(message.locator("[data-key=finish]")).to_have_text("tool calls")
    page.get_by_label("Result of get_current_weather").fill('{"temperature": 21}')
    page.get_by_role("button", name="Send result").press("Enter")
    until_answered(page)
    call, result = asked[1]["messages"][-2:]
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == arguments
    assert result == {"role": "tool", "tool_call_id": call_id, "content": '{"temperature": 21}'}
    assert "tool_choice" not in asked[1]  # it would call for ever
    expect(page.locator(".message")).to_have_count(4)
    page.get_by_role("button", name="Delete: Assistant").first.click()  # a call goes with its result
    expect(page.locator(".message")).to_have_count(2)


def test_what_a_model_writes_is_never_markup(open_page: Callable[..., Any], live: LiveServer) -> None:
    page = open_page(
        live, allow="status of 400"
    )  # no template takes the id of that call, if the page asks for its pages
    evil = '<img src="/x" onerror="window.bad = 1"><script>window.bad = 1</script>\u202e'
    call = {"index": 0, "id": evil, "function": {"name": evil, "arguments": json.dumps({"a": evil})}}
    answer_with(page, {"content": evil[:9]}, {"content": evil[9:]}, {"tool_calls": [call]}, finish="tool_calls")
    send(page, evil)
    message = until_answered(page)
    expect(message.locator(".body")).to_have_text(evil)
    expect(message.locator(".call b")).to_have_text(evil)
    assert json.loads(message.locator("pre").text_content()) == {"a": evil}
    answer_with(page, ends=f"data: {json.dumps({'error': {'message': evil}})}\n\n")
    send(page, "x")
    expect(page.get_by_role("alert")).to_contain_text(evil)
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("() => window.bad === undefined")


def test_mistakes_and_failures_are_told(open_page: Callable[..., Any], live: LiveServer) -> None:
    page = open_page(live, allow="the server responded with a status of 400|net::ERR_FAILED")
    alert = page.get_by_role("alert")
    page.locator("#settings summary").click()
    page.locator("#tools").fill("[{]")
    send(page, "Hello")
    expect(alert).to_contain_text("not valid JSON")
    expect(page.locator("#tools")).to_be_focused()
    page.locator("#tools").fill('[{"type": "function"}]')
    page.get_by_role("button", name="Again: You").click()
    expect(alert).to_contain_text("tools[0]")  # by the server, with status 400
    page.locator("#tools").fill("")
    answer_with(page, {"content": "half an "}, ends="")  # the connection is closed
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("broke off")
    expect(page.locator(".message").last.locator(".body")).to_have_text("half an ")
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()  # in place of the half
    expect(alert).to_contain_text("cannot be reached")
    expect(page.locator(".message")).to_have_count(1)
    page.unroute(CHAT)
    page.locator("#temperature").fill("3")
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("temperature")
    page.locator("#temperature").fill("0")
    page.get_by_role("button", name="Again: You").click()
    expect(until_answered(page).locator("[data-key=finish]")).to_be_visible()
    expect(alert).to_have_count(0)


def test_the_history_can_be_changed(page: Any) -> None:
    asked = change_request(page, max_tokens=4, temperature=0)
    send(page, "A list is")
    until_answered(page)
    page.get_by_role("button", name="Edit: You").press("Enter")
    editor = page.get_by_label("Edited message")
    expect(editor).to_be_focused()
    editor.fill("A queue is")
    editor.press("ControlOrMeta+Enter")
    expect(page.get_by_role("button", name="Edit: You")).to_be_focused()
    page.get_by_role("button", name="Edit: Assistant").click()
    page.get_by_label("Edited message").fill("nothing")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Again: Assistant").click()
    until_answered(page)
    assert [body["messages"] for body in asked] == [
        [{"role": "user", "content": text}] for text in ("A list is", "A queue is")
    ]
    page.locator("#clear").click()
    page.get_by_role("button", name="Keep").click()
    expect(page.locator(".message")).to_have_count(2)
    page.locator("#clear").click()
    expect(page.locator("#clear-text")).to_have_text("2 messages are deleted for good.")
    page.locator("#clear-yes").press("Enter")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#message")).to_be_focused()


# ---- the view of the engine


def test_the_engine_moves_under_load(page: Any, live: LiveServer) -> None:
    is_over = threading.Event()

    def load(seed: int) -> None:
        body = {"prompt": "A list is " * 20, "max_tokens": 200, "seed": seed, "ignore_eos": True}
        while not is_over.is_set():
            httpx.post(f"{live.url}/v1/completions", json=body, timeout=120).raise_for_status()

    before = {name: page.locator(name).screenshot() for name in ("#map", "#steps", "#new", "#itl", "#ttft", "#prefill")}
    threads = [threading.Thread(target=load, args=(seed,)) for seed in range(40)]  # 32 have slots
    for thread in threads:
        thread.start()
    try:
        expect(page.locator("#running")).to_have_text("32 of 32", timeout=PATIENCE)
        expect(page.locator("#waiting")).to_have_text(re.compile("[1-9]"), timeout=PATIENCE)
        expect(page.locator("#n-shared")).to_have_text(re.compile("[1-9]"))
        expect(page.locator("#requests tr[data-state=decode]").first).to_be_visible()
        expect(page.locator("#requests tr[data-state=waiting]").first).to_be_attached()
        expect(page.locator("#steps-text")).to_have_text(re.compile(r"step \d.* decode"))
        expect(page.locator("#rate")).to_have_text(re.compile("[1-9]"))
        expect(page.locator("#ttft-text")).to_have_text(re.compile("s$"), timeout=PATIENCE)
        expect(page.locator("#map")).to_have_attribute("aria-label", re.compile("400 KV pages: [1-9]"))
        changed = [name for name, picture in before.items() if page.locator(name).screenshot() != picture]
        assert changed == list(before)
        page.locator("#new").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#new-text")).to_have_text(re.compile("s ago$"))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    expect(page.locator("#running")).to_have_text("0 of 32", timeout=PATIENCE)
    expect(page.locator("#n-used")).to_have_text("0")
    expect(page.locator("#n-cached")).to_have_text(re.compile("[1-9]"))
    expect(page.locator("#requests")).to_have_text("No requests.")


def test_it_comes_back_when_the_server_does(open_page: Callable[..., Any], engine: AsyncEngine) -> None:
    with LiveServer(engine) as server:
        page = open_page(server, allow="net::ERR_FAILED")
        page.route("**/monitor/stream", lambda route: route.abort())
        page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")  # takes a new connection
        expect(page.locator("#status")).to_have_text("no connection")
        page.unroute("**/monitor/stream")
        expect(page.locator("#status")).to_have_text("ready", timeout=PATIENCE)
        page.route("**/monitor/stream", lambda route: None)  # never answered
        page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        expect(page.locator("#status")).to_have_text("no news for 3 s")
        expect(page.locator("#status")).to_have_attribute("data-state", "wait")
        page.context.close()


# ---- how it looks, and who gets in


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(open_page: Callable[..., Any], live: LiveServer, scheme: str) -> None:
    page = open_page(live, color_scheme=scheme)

    def back() -> int:
        color: str = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return int(color.split("(")[1].split(",")[0])

    assert back() > 200 if scheme == "light" else back() < 60
    map_before = page.locator("#map").screenshot()
    for _ in range(1 if scheme == "dark" else 2):  # auto, light, dark
        page.locator("#theme").press("Enter")
    assert back() < 60 if scheme == "light" else back() > 200
    assert page.locator("#map").screenshot() != map_before
    page.reload()
    expect(page.locator("#theme")).to_have_text("Theme: " + ("dark" if scheme == "light" else "light"))
    assert back() < 60 if scheme == "light" else back() > 200


def test_everything_is_reached_by_tab_and_shows_it(page: Any) -> None:
    page.locator("#settings summary").click()
    page.locator(".skip").focus()  # the first of all
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    reached: list[str] = []
    while not page.evaluate("() => document.activeElement === document.body") and len(reached) < 60:
        reached.append(focused(page))
        assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid", reached[-1]
        name = page.evaluate(
            "() => { const e = document.activeElement; return e.getAttribute('aria-label') || "
            "e.labels?.[0]?.textContent || e.textContent }"
        )
        assert name.strip(), reached[-1]
        page.keyboard.press("Tab")
    for name in ("Skip to the message", "theme", "lens", "clear", "log", "copy-url", "system", "temperature", "max-tokens", "seed", "tool-choice", "parallel", "tools",
                 "message", "send", "steps", "new", "prefill", "ttft", "itl"):  # fmt: skip
        assert name in reached
    assert reached.index("message") < reached.index("steps")
    page.locator(".skip").press("Enter")
    expect(page.locator("#message")).to_be_focused()


def test_it_fits_a_phone_and_keeps_still(open_page: Callable[..., Any], live: LiveServer) -> None:
    page = open_page(live, reduced_motion="reduce", has_touch=True)
    page.set_viewport_size({"width": 360, "height": 740})
    change_request(page, ignore_eos=True, max_tokens=900)
    send(page, "os.path.join" * 20)
    expect(page.locator(".message[aria-busy=true] .body")).to_have_text(re.compile("..", re.S))
    still = "(e) => getComputedStyle(e, '::after').animationName"
    assert page.locator(".message[aria-busy=true] .tail").evaluate(still) == "none"
    page.locator("#stop").tap()
    for view, other in (("engine", "chat"), ("chat", "engine")):
        page.locator(f"#show-{view}").tap()
        expect(page.locator(f"#{view}")).to_be_visible()
        expect(page.locator(f"#{other}")).to_be_hidden()
        assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 360
    expect(page.locator("#send")).to_be_in_viewport()
    page.locator("#settings summary").tap()
    expect(page.locator("#send")).to_be_in_viewport()
    assert page.locator("#log").evaluate("(e) => e.clientHeight") > 180


def test_a_browser_asks_for_the_key(open_page: Callable[..., Any], engine: AsyncEngine) -> None:
    with LiveServer(engine, api_key=["secret"]) as server:
        page = open_page(server, http_credentials={"username": "anyone", "password": "secret"})
        send(page, "Hello")
        expect(until_answered(page).locator("[data-key=finish]")).to_be_visible()
        page.context.close()

"""The page in headless Chromium: what its tests share. One browser a module."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 120_000  # milliseconds: of whatever is expected, as a machine may be busy
expect.set_options(timeout=PATIENCE)
CHAT = "**/v1/chat/completions"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian, Ubuntu: apt install chromium)")


def focused(page: Any) -> str:
    return str(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))


def send(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def until_answered(page: Any) -> Any:
    """The last message, which is complete."""
    expect(page.locator("#send")).to_be_visible(timeout=PATIENCE)
    return page.locator(".message").last


def change_request(page: Any, **fields: Any) -> list[dict[str, Any]]:
    """Add ``fields`` to what the page asks of the server; returns the list of what it asks."""
    asked: list[dict[str, Any]] = []

    def handle(route: Any) -> None:
        body = json.loads(route.request.post_data)
        asked.append(body)
        route.continue_(post_data=json.dumps(body | fields))

    page.route(CHAT, handle)
    return asked


def answer_with(page: Any, *deltas: dict[str, Any], finish: str = "stop", ends: str = "data: [DONE]\n\n") -> None:
    """Let the page's next answers be these deltas."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in ({"role": "assistant"}, *deltas)]
    choices += [{"index": 0, "delta": {}, "finish_reason": finish}] if ends.startswith("data: [DONE]") else []
    events = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body="".join(events) + ends))


def kept(page: Any) -> list[dict[str, Any]]:
    """The messages as the page keeps them."""
    messages: list[dict[str, Any]] = page.evaluate("() => JSON.parse(sessionStorage.getItem('conversation')).messages")
    return messages

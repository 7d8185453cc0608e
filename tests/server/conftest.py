"""One engine and one server with default options for all tests of the server, and a browser for those of the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nemo_engine import AsyncEngine
from tests.server.live import ENGINE_OPTIONS, MODEL, LiveServer


@pytest.fixture(scope="session")
def engine() -> Iterator[AsyncEngine]:
    with AsyncEngine(MODEL, **ENGINE_OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="session")
def live(engine: AsyncEngine) -> Iterator[LiveServer]:
    with LiveServer(engine) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.server.browser import CHROMIUM, FLAGS, playwright

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a server's page. At the end nothing may have gone wrong in any of them, nor any other origin been asked.

    ``allow``: what the console may say nevertheless, since a browser notes there every request that fails.
    """
    from tests.server.browser import PATIENCE, expect

    contexts, wrong = [], []

    def open_page(server: LiveServer, allow: str = "(?!)", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: re.search(allow, message.text) or wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(server.url + "/") or wrong.append(request.url))
        page.goto(server.url + "/")
        expect(page.locator("#status")).to_have_text("ready", timeout=PATIENCE)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(open_page: Callable[..., Any], live: LiveServer) -> Any:
    return open_page(live)

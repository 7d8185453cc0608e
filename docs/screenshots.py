"""Take the pictures of the page in docs/screenshots: ``python docs/screenshots.py URL``.

URL is that of ``nemo-engine serve nemo-tiny --page-size 16``. Needs Chromium and playwright (the extra ``test``).
What nemo-tiny writes holds no Markdown, so the picture that shows some has it written into the answer by "Edit".
"""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).parent / "screenshots"
WIDE, PHONE = (1280, 800), (390, 844)
MAX_BYTES = 150_000
QUESTION = "What does os.path.join do?"
MARKDOWN = """\
`os.path.join` puts **parts of a path** together; see [the documentation](https://docs.python.org/3/library/os.path.html).

```python
import os.path

print(os.path.join("home", "user", "notes.txt"))
```

1. An absolute part throws away what stood before it.
2. An empty last part leaves a separator at the end.

| Parts | Result |
|:--|:--|
| `"a", "b"` | `a/b` |
| `"a", "/b"` | `/b` |
"""


def open_page(browser: Browser, url: str, size: tuple[int, int], scheme: Any) -> Page:
    """The page, which has had its first picture of the engine."""
    page = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
    ).new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    page.wait_for_selector("#status[data-state=ready]")
    page.locator("#about-context", has_text="tokens").wait_for()
    return page


def ask(page: Page, text: str) -> None:
    """Send a message, and wait for the whole answer."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.locator("#send").wait_for()


def save(page: Page, name: str) -> None:
    """Store what the page shows."""
    path = FOLDER / f"{name}.png"
    page.screenshot(path=path)
    size = path.stat().st_size
    assert size <= MAX_BYTES, f"{path} has {size} bytes"
    print(f"{path.name}: {size} bytes")


def show_markdown(page: Page) -> None:
    """Put Markdown in place of the answer."""
    page.get_by_role("button", name="Edit: Assistant").click()
    page.get_by_label("Edited message").fill(MARKDOWN)
    page.get_by_role("button", name="Save").click()


def show_lens(page: Page) -> None:
    """Have an answer come with log-probabilities, and look at a token that was a surprise."""
    page.locator("#lens").click()
    ask(page, QUESTION)
    page.locator("#log").evaluate("(log) => { log.scrollTop = 0; }")
    tokens = page.locator(".body .tokens span")
    tokens.locator("xpath=self::*[@data-surprise >= 2]").first.hover()


def load(url: str, seed: int, is_over: threading.Event) -> None:
    """Send completions, one after the other."""
    body = {"prompt": f"The module number {seed} " * 40, "max_tokens": 120, "seed": seed, "ignore_eos": True}
    while not is_over.is_set():
        httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()


def main(url: str) -> None:
    """Take all of them."""
    url = url.rstrip("/")
    FOLDER.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = open_page(browser, url, WIDE, "light")
        save(page, "empty")
        show_lens(page)
        save(page, "token-lens")
        page.locator("#lens").click()
        show_markdown(page)
        save(page, "markdown")
        page.context.close()

        page = open_page(browser, url, PHONE, "light")
        ask(page, QUESTION)
        save(page, "phone")
        page.context.close()

        is_over = threading.Event()
        threads = [threading.Thread(target=load, args=(url, seed, is_over)) for seed in range(12)]
        for thread in threads:
            thread.start()
        try:
            page = open_page(browser, url, WIDE, "dark")
            ask(page, QUESTION + " And what does os.path.split do, and how do the two belong together?")
            page.locator("#own").wait_for()
            save(page, "load-dark")
            page.context.close()
            page = open_page(browser, url, PHONE, "dark")
            page.locator("#show-engine").click()
            page.locator("#requests tr[data-state]").first.wait_for()
            save(page, "phone-engine-dark")
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

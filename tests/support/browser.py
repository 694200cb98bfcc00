"""Pages in a real Chromium, for tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def start_browser() -> Iterator[Any]:
    """Yield a browser; skip the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright (pip install playwright)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with its requests and console messages."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.complaints, self.requests = list[str](), list[str]()
        self.page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}} | options)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.address = file.as_uri()

    def shown(self) -> list[str]:
        return self.page.locator(".pair:visible h3").all_inner_texts()

    def overflow(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def close(self) -> None:
        """Close the page, which may have no console messages and no requests other than for itself."""
        assert self.complaints == []
        assert [url for url in self.requests if url != self.address and not url.startswith("data:")] == []
        self.page.close()

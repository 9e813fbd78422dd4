"""A real browser, Debian's chromium driven by playwright: one for the tests of a module, which share its loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

CHROMIUM = "/usr/bin/chromium"
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 60_000


@dataclass
class Tab:
    """A page, with what it said in its console and whom it asked."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def hosts(self) -> set[str]:
        return {urlsplit(url).netloc for url in self.asked if not url.startswith("data:")}


OpenTab = Callable[..., Awaitable[Tab]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(SWITCHES))
        yield launched
        await launched.close()


@pytest_asyncio.fixture(loop_scope="module")
async def open_tab(browser: Browser) -> AsyncIterator[OpenTab]:
    """Opens pages in contexts of their own, and closes them."""
    opened = []

    async def make(url: str, **context: Any) -> Tab:
        opened.append(await browser.new_context(locale="en-GB", timezone_id="UTC", **context))
        page = await opened[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        tab = Tab(page)
        page.on("console", lambda message: tab.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: tab.complaints.append(f"error: {error}"))
        page.on("request", lambda request: tab.asked.append(request.url))
        await page.goto(url)
        return tab

    yield make
    for each in opened:
        await each.close()

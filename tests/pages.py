"""Pages in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import pytest

__all__ = ["chromium", "complaints_of", "opened", "requests_of"]

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("Chromium is not installed: make browser", allow_module_level=True)


@contextmanager
def chromium() -> Iterator[sync_api.Browser]:
    """A browser, for one module: while Playwright runs, its thread can run no other event loop."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(
    browser: sync_api.Browser,
    address: str,
    *,
    width: int = 1280,
    dark: bool = False,
) -> sync_api.Page:
    """A page of its own after its scripts ran."""
    page = browser.new_page(
        viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light"
    )
    requests = _requests[page] = []
    complaints = _complaints[page] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.goto(address)
    return page


_requests: WeakKeyDictionary[sync_api.Page, list[str]] = WeakKeyDictionary()
_complaints: WeakKeyDictionary[sync_api.Page, list[str]] = WeakKeyDictionary()


def requests_of(page: sync_api.Page) -> list[str]:
    """Every address that a page has asked for, its own included."""
    return _requests[page]


def complaints_of(page: sync_api.Page) -> list[str]:
    """Errors of a page's scripts, of its console, and of its content security policy."""
    return _complaints[page]

"""Pages in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["chromium", "opened"]

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
    requests: list[str] | None = None,
    complaints: list[str] | None = None,
) -> sync_api.Page:
    """A page of its own after its scripts ran.

    Args:
        requests: gets every address that the page asks for, its own included.
        complaints: gets errors of scripts, of the console, and of the content security policy.
    """
    page = browser.new_page(
        viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light"
    )
    if requests is not None:
        page.on("request", lambda request: requests.append(request.url))
    if complaints is not None:
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.goto(address)
    return page

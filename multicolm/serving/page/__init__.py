"""A page to try an ensemble on: one file that loads nothing and speaks to its own server alone.

What models wrote is never trusted: the script puts it on the page as text nodes only, and a
Content-Security-Policy allows the one style and the one script by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from starlette.responses import HTMLResponse

__all__ = ["page"]


def page() -> HTMLResponse:
    """The page."""
    text, policy = _built()
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


@cache
def _built() -> tuple[str, str]:
    """The page's text, and what it is allowed to do."""
    css, js = _file("page.css"), _file("page.js")
    text = _file("page.html").replace("{{css}}", css).replace("{{js}}", js)
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(js)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

"""What a request may be at the most, and what comes before every route."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multicolm.errors import shorten
from multicolm.numbers import check_number, check_whole
from multicolm.serving.metrics import Metrics
from multicolm.serving.replies import failure

__all__ = ["ROUTES", "Gate", "Limits"]

ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
_OPEN = ("/", "/health")  # without a key


@dataclass(frozen=True)
class Limits:
    """What a request may be at the most.

    Attributes:
        max_body: bytes of its body.
        max_new_tokens: tokens of a text.
        head_seconds: until its head is here, from its first byte or the connection on.
        body_seconds: until its body is here, from then on.
        send_seconds: after which a client that reads nothing of its reply is given up.
    """

    max_body: int = 1_000_000
    max_new_tokens: int = 1024
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body", "max_new_tokens"):
            check_whole(name, getattr(self, name), least=1)
        for name in ("head_seconds", "body_seconds", "send_seconds"):
            check_number(name, getattr(self, name), above=0)


class Gate:
    """What comes before every route: who may ask, under which name, how much and until when.

    A request is answered when all of it is here, be it wrong or not: so no connection is left in
    the middle of one. Starlette's ``TrustedHostMiddleware`` would refuse other names in plain text,
    and with status 400; clients of OpenAI expect a JSON error, and 421 says that it is the name.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        hosts: Sequence[str] | None,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = None if hosts is None else tuple(hosts)
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the routes answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status, start = 500, time.perf_counter()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            await self._pass(scope, receive, sent)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        denied = self._denied(headers, scope["path"])
        try:
            body = await self._body(headers, receive, keep=denied is None)
        except ClientDisconnect:
            return
        if isinstance(body, Response):
            await body(scope, receive, send)
            return

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            content, body = body, None
            return {"type": "http.request", "body": content, "more_body": False}

        await (denied or self._app)(scope, replay, send)

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, *, keep: bool
    ) -> bytes | Response | None:
        """The body of a request, or what is answered if it is too long or too long in coming.

        Raises:
            ClientDisconnect: if the client went away.
        """
        most, seconds = self._limits.max_body, self._limits.body_seconds
        too_long = f"the body is longer than the {most} bytes that this server takes."
        if int(headers.get(b"content-length", b"0")) > most:  # h11 has seen that it is a number
            return _closing(413, too_long)
        body, n = bytearray(), 0
        try:
            with anyio.fail_after(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part, more = message.get("body", b""), message.get("more_body", False)
                    n += len(part)
                    if n > most:
                        return _closing(413, too_long)
                    if keep:
                        body += part
        except TimeoutError:
            return _closing(408, f"the body was not here after {seconds:g} seconds.")
        return bytes(body)

    def _denied(self, headers: dict[bytes, bytes], path: str) -> Response | None:
        """What is answered to those who may not ask."""
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._hosts is not None and name.lower() not in self._hosts:
            message = f"Host not allowed: '{shorten(name)}'; ask it as {', '.join(self._hosts)}."
            return JSONResponse(failure(message, "invalid_request_error"), status_code=421)
        if self._key is None or path in _OPEN:
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key):
            return None
        message = "missing or invalid API key; send it as 'Authorization: Bearer KEY'."
        return JSONResponse(
            failure(message, "invalid_request_error", code="invalid_api_key"),
            status_code=401,
            headers={"WWW-Authenticate": "Bearer"},
        )


def _closing(status: int, message: str) -> Response:
    """An answer to a request that is not read to its end; nothing more is read after it."""
    content = failure(message, "invalid_request_error")
    return JSONResponse(content, status_code=status, headers={"Connection": "close"})

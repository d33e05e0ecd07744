"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import anyio
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multicolm.ensemble import Ensemble
from multicolm.errors import (
    BusyError,
    ClosedError,
    ConfigError,
    ModelError,
    MulticolmError,
    PolicyError,
    ServerError,
)
from multicolm.numbers import check_number, check_whole
from multicolm.policy.base import Policy
from multicolm.serving.asked import (
    MOST_ALTERNATIVES,
    ChatAsked,
    CompletionAsked,
    Refusal,
    read,
    schema_of,
)
from multicolm.serving.engine import Begun, Ended, Engine, Event, Failed, Grown, Order, Ticket
from multicolm.serving.menu import DEFAULT, Choice, Menu, NotServedError
from multicolm.serving.metrics import Metrics
from multicolm.serving.page import page
from multicolm.serving.replies import Replies, Written, as_event, failure

__all__ = ["Limits", "create_app"]

_LOG = logging.getLogger("multicolm.serving")
_ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
_GONE = 499  # the client has closed the connection; nobody reads this

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a request may be at the most.

    Attributes:
        max_body: bytes of its body.
        max_new_tokens: tokens of a text.
        head_seconds: until its head is here, from its first byte or the connection on.
        body_seconds: until its body is here, from then on.
    """

    max_body: int = 1_000_000
    max_new_tokens: int = 1024
    head_seconds: float = 10.0
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body", "max_new_tokens"):
            check_whole(name, getattr(self, name), least=1)
        for name in ("head_seconds", "body_seconds"):
            check_number(name, getattr(self, name), above=0)


class _Denied(Exception):
    """A request that is answered with a status of HTTP's own."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def create_app(
    engine: Engine,
    menu: Menu,
    *,
    api_key: str | None = None,
    limits: Limits | None = None,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The server as an ASGI application; whoever makes it starts and closes the engine.

    Args:
        engine: writes the texts.
        menu: which policies clients may choose.
        api_key: that clients must show, as ``Authorization: Bearer KEY``, for everything but the
            page and ``/health``; anybody may ask if not given.
        limits: what a request may be at the most.
        hosts: the names by which the server may be addressed, any if not given. A server on
            loopback without a key gives its own, so that no web page can speak to it under
            another name (DNS rebinding).
    """
    metrics = Metrics(engine)
    desk = _Desk(engine, menu, limits or Limits(), metrics)
    app = FastAPI(title="multicolm", docs_url=None, redoc_url=None)
    app.add_middleware(_Gate, api_key=api_key, hosts=hosts, metrics=metrics)

    async def explain(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=_GONE)
        status, content, headers = _explained(error, engine)
        return JSONResponse(content, status_code=status, headers=headers)

    for kind in (Exception, MulticolmError, _Denied, ClientDisconnect):
        app.add_exception_handler(kind, explain)
    app.add_exception_handler(404, _no_such_page)
    app.add_exception_handler(405, _no_such_page)
    created = int(time.time())

    @app.get("/")
    async def show_page() -> Response:
        return page()

    @app.get("/health")
    async def health() -> Response:
        if engine.is_open:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, status_code=503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        data = [_model(menu, engine, name, created) for name in menu.dishes]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        choice = menu.choose(name)
        return JSONResponse(_model(menu, engine, choice.name, created) | {"id": name})

    @app.post("/v1/completions", **_documented(CompletionAsked))
    async def completions(request: Request) -> Response:
        asked = read(await desk.body(request), CompletionAsked)
        return await desk.answer(request, asked, "completion")

    @app.post("/v1/chat/completions", **_documented(ChatAsked))
    async def chat(request: Request) -> Response:
        asked = read(await desk.body(request), ChatAsked)
        return await desk.answer(request, asked, "chat")

    return app


def _documented(asked: type[CompletionAsked] | type[ChatAsked]) -> dict[str, Any]:
    """What the OpenAPI document says of a route, whose body FastAPI does not read itself."""
    content = {"application/json": {"schema": schema_of(asked)}}
    errors = {
        400: "something in the request cannot be served; the message names the field",
        401: "the key is missing or wrong",
        404: "there is no such model",
        408: "the body was too long in coming",
        413: "the body is too long",
        415: "the body is no JSON",
        421: "the server has another name",
        429: "there is no place; see Retry-After",
        500: "a model or a policy has failed",
        502: "a server that runs a model has failed",
        503: "the server is shutting down",
    }
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {status: {"description": words} for status, words in errors.items()},
    }


def _model(menu: Menu, engine: Engine, name: str, created: int) -> dict[str, Any]:
    dish, ensemble = menu.dishes[name], engine.ensemble
    in_tokens = _writes_tokens(ensemble, dish.policy)
    return {
        "id": menu.served if name == DEFAULT else f"{menu.served}:{name}",
        "object": "model",
        "created": created,
        "owned_by": "multicolm",
        "multicolm": {
            "policy": name,
            "kind": dish.policy.name,
            "summary": dish.summary,
            "models": list(ensemble.models),
            "threshold": dish.policy.params_at(0.5) is not None,
            "top_logprobs": MOST_ALTERNATIVES if in_tokens else 0,
        },
    }


def _writes_tokens(ensemble: Ensemble, policy: Policy) -> bool:
    """Whether a policy writes in tokens, so that there are alternatives to them."""
    return ensemble.written_in(policy) is ensemble.vocabulary


class _Gate:
    """What comes before every route: who may ask, under which name; and counts of what comes."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, hosts: Sequence[str] | None, metrics: Metrics
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = None if hosts is None else tuple(hosts)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in _ROUTES else "other"
        status, start = 500, time.perf_counter()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            denied = self._denied(scope)
            await (denied or self._app)(scope, receive, sent)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _denied(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._hosts is not None and name.lower() not in self._hosts:
            message = f"this server is not called '{name}'; ask it as {', '.join(self._hosts)}."
            return JSONResponse(failure(message, "invalid_request_error"), status_code=421)
        if self._key is None or scope["path"] in ("/", "/health"):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key):
            return None
        what = "missing" if scheme.lower() != b"bearer" or not key.strip() else "invalid"
        message = f"{what} API key; send it as 'Authorization: Bearer KEY'."
        return JSONResponse(
            failure(message, "invalid_request_error", code="invalid_api_key"),
            status_code=401,
            headers={"WWW-Authenticate": "Bearer"},
        )


class _Desk:
    """Takes requests to the engine and brings back what becomes of them."""

    def __init__(self, engine: Engine, menu: Menu, limits: Limits, metrics: Metrics) -> None:
        self._engine = engine
        self._menu = menu
        self._limits = limits
        self._metrics = metrics

    async def body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            _Denied: if it is no JSON by its own account, too long, or too long in coming.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _Denied(415, "the body must be JSON; send 'Content-Type: application/json'.")
        too_long = _Denied(
            413,
            f"the body is longer than the {self._limits.max_body} bytes that this server takes.",
            Connection="close",
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_body:
            raise too_long
        body = bytearray()
        try:
            with anyio.fail_after(self._limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.max_body:
                        raise too_long
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise _Denied(
                408, f"the body was not here after {seconds:g} seconds.", Connection="close"
            ) from None
        return bytes(body)

    async def answer(
        self,
        request: Request,
        asked: CompletionAsked | ChatAsked,
        kind: Literal["completion", "chat"],
    ) -> Response:
        """The reply to a request, or the beginning of it.

        Raises:
            MulticolmError: if it cannot be answered.
        """
        since = time.perf_counter()
        extension = asked.multicolm
        choice = self._menu.choose(asked.model, extension.policy, extension.params)
        texts = _Texts(self._engine, self._orders(asked, choice), asked.n)
        mark = "chatcmpl" if kind == "chat" else "cmpl"
        replies = Replies(
            kind,
            f"{mark}-{secrets.token_hex(12)}",
            asked.model,
            {"policy": choice.name, "kind": choice.policy.name, "params": dict(choice.params)},
            int(time.time()),
            self._engine.ensemble.vocabulary.token_bytes,
            asked.wants_logprobs,
            asked.alternatives[1],
        )

        def first_token() -> None:
            self._metrics.first_token.observe(time.perf_counter() - since)

        try:
            await _unless_gone(request.receive, texts.begin())
            if asked.stream:
                options = asked.stream_options
                with_usage = options is not None and options.include_usage
                return _EventStream(texts, texts.chunks(replies, with_usage, first_token))
            await _unless_gone(request.receive, texts.finish(first_token))
            return JSONResponse(replies.whole(texts.written))
        except BaseException:
            texts.cancel()
            raise

    def _orders(self, asked: CompletionAsked | ChatAsked, choice: Choice) -> list[Order]:
        own = self._engine.ensemble.generation
        settings = asked.settings(own, self._limits.max_new_tokens)
        prompts = asked.prompts()
        n_texts = len(prompts) * asked.n
        if n_texts > self._engine.capacity:
            raise Refusal(
                f"{n_texts} texts in one request are more than the {self._engine.capacity} that "
                "this server has places for; ask for fewer.",
                "n" if asked.n > 1 else "prompt",
            )
        field, n_alternatives = asked.alternatives
        if n_alternatives and not _writes_tokens(self._engine.ensemble, choice.policy):
            raise Refusal(
                f"policy '{choice.name}' writes in {choice.policy.support}, and has no "
                f"alternatives to tokens; '{field}' must be 0, got {n_alternatives}.",
                field,
            )
        seed = asked.seed if asked.seed is not None else own.seed
        return [
            # Without a seed every text has its own, those of equal prompts too.
            Order(
                prompt,
                choice,
                settings,
                secrets.randbits(32) if seed is None else seed + i,
                number,
            )
            for number, prompt in enumerate(prompts)
            for i in range(asked.n)
        ]


class _Texts:
    """The texts of one request, on their way from the engine's thread to the event loop.

    Args:
        engine: writes them.
        orders: what is wanted.
        n: how many of them answer the same prompt.

    Raises:
        BusyError: if there is no place for them.
        ClosedError: if the server is shutting down.
    """

    def __init__(self, engine: Engine, orders: Sequence[Order], n: int) -> None:
        self._engine = engine
        self._n = n
        self._loop = asyncio.get_running_loop()
        # What a slow reader has not fetched waits here: as much as its texts may hold, no more.
        self._news: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.written = [Written() for _ in orders]
        self._tickets: list[Ticket] = engine.submit(
            orders, [self._deliverer(index) for index in range(len(orders))]
        )

    def _deliverer(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            # A loop that has ended has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._news.put_nowait, (index, event))

        return deliver

    def cancel(self) -> None:
        """Give up the places of what is not finished."""
        for ticket, written in zip(self._tickets, self.written, strict=True):
            if written.answer is None:
                self._engine.cancel(ticket)

    async def begin(self) -> None:
        """Wait until all prompts have been read by the tokenizers.

        Raises:
            Exception: if one cannot be answered.
        """
        for _ in self._tickets:
            index, event = await self._next()
            assert isinstance(event, Begun)
            # A prompt that is answered several times counts once.
            if index % self._n == 0:
                self.written[index].n_prompt_tokens = event.n_prompt_tokens

    async def _next(self) -> tuple[int, Begun | Grown | Ended]:
        """The next news of any of the texts.

        Raises:
            Exception: if one has failed.
        """
        index, event = await self._news.get()
        if isinstance(event, Failed):
            raise event.error
        return index, event

    async def _events(
        self, first_token: Callable[[], None]
    ) -> AsyncIterator[tuple[int, Grown | Ended]]:
        """What becomes of the texts, until all are finished.

        Raises:
            Exception: if one has failed.
        """
        n_open, told = len(self._tickets), False
        while n_open:
            index, event = await self._next()
            assert not isinstance(event, Begun)
            if not told:
                first_token()
                told = True
            if isinstance(event, Ended):
                self.written[index].answer = event.answer
                n_open -= 1
            yield index, event

    async def finish(self, first_token: Callable[[], None]) -> None:
        """Wait for the ends of all texts.

        Raises:
            Exception: if one has failed.
        """
        async for index, event in self._events(first_token):
            if isinstance(event, Grown):
                self.written[index].pieces += event.pieces
                self.written[index].tokens += event.tokens

    async def chunks(
        self, replies: Replies, with_usage: bool, first_token: Callable[[], None]
    ) -> AsyncIterator[bytes]:
        """The events of a stream, errors included."""
        try:
            if replies.kind == "chat":
                for index in range(len(self._tickets)):
                    yield as_event(replies.opening(index))
            async for index, event in self._events(first_token):
                if isinstance(event, Grown):
                    written = self.written[index]
                    yield as_event(replies.more(index, written, event.pieces, event.tokens))
                else:
                    yield as_event(replies.end(index, event.answer))
            if with_usage:
                yield as_event(replies.usage(self.written))
        except Exception as error:
            # The reply has begun: whoever reads it is told there. What failed in the engine has
            # been logged there.
            if not isinstance(error, MulticolmError):
                _LOG.error("a stream broke off", exc_info=error)
            _, content, _ = _explained(error, self._engine)
            yield as_event(content)
            return
        yield as_event("[DONE]")


class _EventStream(Response):
    """Server-sent events; a client that goes away ends them at once."""

    media_type = "text/event-stream"

    def __init__(self, texts: _Texts, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._texts = texts
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await _unless_gone(receive, self._send(send))
        finally:
            self._texts.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Do something as long as the client is there.

    Raises:
        ClientDisconnect: if it went away.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _explained(error: Exception, engine: Engine) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of the reply to a request that went wrong."""
    message = str(error)
    # Where the models' own servers are is the operator's business.
    addresses = {model.server for model in engine.ensemble.backends} - {""}
    for address in sorted(addresses, key=len, reverse=True):
        message = message.replace(f" {address}", "").replace(address, "its server")
    if isinstance(error, _Denied):
        return error.status, failure(message, "invalid_request_error"), error.headers
    if isinstance(error, BusyError):
        headers = {"Retry-After": str(error.retry_after)}
        return 429, failure(message, "rate_limit_error", code="server_busy"), headers
    if isinstance(error, ClosedError):
        return 503, failure(message, "server_error", code="shutting_down"), {"Retry-After": "5"}
    if isinstance(error, NotServedError):
        body = failure(message, "invalid_request_error", error.param, "model_not_found")
        return 404, body, {}
    if isinstance(error, ServerError):
        message = "a server that runs one of the models has failed; this server's log says how."
        return 502, failure(message, "server_error"), {}
    if isinstance(error, PolicyError | ModelError):
        return 500, failure(message, "server_error"), {}
    if isinstance(error, MulticolmError):
        param = error.param if isinstance(error, Refusal) else None
        if isinstance(error, ConfigError):
            param = "multicolm.params"
        return 400, failure(message, "invalid_request_error", param), {}
    return 500, failure("something broke; the server's log says what.", "server_error"), {}


async def _no_such_page(request: Request, _: Exception) -> Response:
    message = (
        f"there is no {request.method} {request.url.path} here; known are GET /, /health, "
        "/metrics, /v1/models, and POST /v1/completions, /v1/chat/completions."
    )
    return JSONResponse(failure(message, "invalid_request_error"), status_code=404)

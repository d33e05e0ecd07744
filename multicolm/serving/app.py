"""The routes."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.types import Receive

from multicolm.config import GenerationConfig
from multicolm.ensemble import Ensemble
from multicolm.errors import (
    BusyError,
    ClosedError,
    ConfigError,
    ModelError,
    MulticolmError,
    PolicyError,
    ServerError,
    shorten,
)
from multicolm.policy.base import Policy
from multicolm.serving.catalog import DEFAULT, Catalog, Choice, NotServedError
from multicolm.serving.engine import Engine
from multicolm.serving.events import GenerationRequest
from multicolm.serving.limits import Gate, Limits
from multicolm.serving.metrics import Metrics
from multicolm.serving.page import page
from multicolm.serving.prompts import PromptReader
from multicolm.serving.protocol import (
    MOST_ALTERNATIVES,
    ChatCompletionRequest,
    CompletionRequest,
    Refusal,
    read,
    schema_of,
)
from multicolm.serving.replies import Replies, failure
from multicolm.serving.texts import Places, Texts
from multicolm.types import Prompt

__all__ = ["create_app"]

_MOST_NUMBERS = 1 << 18  # tokens and alternatives of a reply that is no stream; some 64 MB
_GONE = 499  # the client has closed the connection; nobody reads this

T = TypeVar("T")


def create_app(
    engine: Engine,
    catalog: Catalog,
    *,
    api_key: str | None = None,
    limits: Limits | None = None,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The server as an ASGI application; whoever makes it starts and closes the engine.

    Args:
        engine: writes the texts.
        catalog: which policies clients may choose.
        api_key: that clients must show, as ``Authorization: Bearer KEY``, for everything but the
            page and ``/health``; anybody may ask if not given.
        limits: what a request may be at the most.
        hosts: the names by which the server may be addressed, any if not given. A server on
            loopback without a key gives its own, so that no web page can speak to it under
            another name (DNS rebinding).
    """
    metrics = Metrics(engine)
    limits = limits or Limits()
    handler = _RequestHandler(engine, catalog, limits, metrics)
    app = FastAPI(title="multicolm", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_key=api_key, hosts=hosts, limits=limits, metrics=metrics)

    async def explain(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=_GONE)
        status, content, headers = _explained(error, engine)
        return JSONResponse(content, status_code=status, headers=headers)

    for kind in (Exception, MulticolmError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, explain)
    app.add_exception_handler(404, _no_such_page)
    app.add_exception_handler(405, _no_such_page)
    created = int(time.time())

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> Response:
        return page()

    @app.get("/health", responses=_described(503))
    async def health() -> Response:
        if engine.is_open:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, status_code=503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=_described(401))
    async def models() -> Response:
        data = [_model(catalog, engine, name, created) for name in catalog.models]
        return JSONResponse({"object": "list", "data": data})

    @app.get(
        "/v1/models/{name:path}",
        responses=_described(400, 401, 404),
        openapi_extra={"parameters": [_NAME]},
    )
    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        choice = catalog.choose(name)
        return JSONResponse(_model(catalog, engine, choice.name, created) | {"id": name})

    @app.post("/v1/completions", **_documented(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await handler.answer(request, CompletionRequest)

    @app.post("/v1/chat/completions", **_documented(ChatCompletionRequest))
    async def chat(request: Request) -> Response:
        return await handler.answer(request, ChatCompletionRequest)

    return app


def _documented(body: type[CompletionRequest] | type[ChatCompletionRequest]) -> dict[str, Any]:
    """What the OpenAPI document says of a route, whose body FastAPI does not read itself."""
    content = {"application/json": {"schema": schema_of(body)}}
    streamed: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: {"description": "the texts", "content": streamed}}
        | _described(*_ERRORS),
    }


# FastAPI's own account of a parameter says that the reply may be 422, which it never is.
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_ERRORS = {
    400: "something in the request cannot be served; the message names the field",
    401: "missing or invalid API key",
    404: "there is no such model",
    408: "the body was too long in coming",
    413: "the body is too long",
    415: "the body is no JSON",
    421: "Host not allowed",
    429: "there is no place; see Retry-After",
    500: "a model or a policy has failed",
    502: "a server that runs a model has failed",
    503: "the server is shutting down",
}


def _described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of errors."""
    return {status: {"description": _ERRORS[status]} for status in statuses}


def _model(catalog: Catalog, engine: Engine, name: str, created: int) -> dict[str, Any]:
    model, ensemble = catalog.models[name], engine.ensemble
    in_tokens = _writes_tokens(ensemble, model.policy)
    return {
        "id": catalog.served if name == DEFAULT else f"{catalog.served}:{name}",
        "object": "model",
        "created": created,
        "owned_by": "multicolm",
        "multicolm": {
            "policy": name,
            "kind": model.policy.name,
            "summary": model.summary,
            "models": list(ensemble.models),
            "chat": bool(ensemble.backends[0].tokenizer.chat_template),
            "threshold": model.policy.params_at(0.5) is not None,
            "top_logprobs": MOST_ALTERNATIVES if in_tokens else 0,
        },
    }


def _writes_tokens(ensemble: Ensemble, policy: Policy) -> bool:
    """Whether a policy writes in tokens, so that there are alternatives to them."""
    return ensemble.written_in(policy) is ensemble.vocabulary


class _RequestHandler:
    """Takes requests to the engine and brings back what becomes of them."""

    def __init__(self, engine: Engine, catalog: Catalog, limits: Limits, metrics: Metrics) -> None:
        self._engine = engine
        self._catalog = catalog
        self._limits = limits
        self._metrics = metrics
        self._places = Places(engine)
        self._prompts = PromptReader(engine.ensemble)
        self._one_at_a_time = anyio.CapacityLimiter(1)

    async def answer(
        self,
        request: Request,
        schema: type[CompletionRequest] | type[ChatCompletionRequest],
    ) -> Response:
        """The reply to a request, or the beginning of it.

        Raises:
            MulticolmError: if it cannot be answered.
            HTTPException: if the body is no JSON by its own account.
            ClientDisconnect: if the client went away.
        """
        since = time.perf_counter()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(
                415, "the body must be JSON; send 'Content-Type: application/json'."
            )
        # In a thread, so that a long body does not hold up who is being answered.
        wanted = await anyio.to_thread.run_sync(
            self._wanted, await request.body(), schema, limiter=self._one_at_a_time
        )

        def first_token() -> None:
            self._metrics.first_token.observe(time.perf_counter() - since)

        texts = Texts(self._engine, self._places, len(wanted.seeds))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(texts.close)
            await _unless_gone(request.receive, self._begin(texts, wanted))
            replies, body = self._replies(wanted), wanted.body
            if body.stream:
                with_usage = body.stream_options is not None and body.stream_options.include_usage
                content = texts.chunks(replies, with_usage, first_token, self.explained)
                media_type = "text/event-stream"
            else:
                await _unless_gone(request.receive, texts.finish(first_token))
                content = texts.whole(replies)
                media_type = "application/json"
            stack.push_async_callback(content.aclose)
            return StreamingResponse(
                content,
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                media_type=media_type,
                # When it has been read, or nobody is there.
                background=BackgroundTask(stack.pop_all().aclose),
            )

    def _wanted(
        self, content: bytes, schema: type[CompletionRequest] | type[ChatCompletionRequest]
    ) -> _Wanted:
        """What a body asks for.

        Raises:
            MulticolmError: if that is not served.
        """
        body = read(content, schema)
        extension = body.multicolm
        choice = self._catalog.choose(body.model, extension.policy, extension.params)
        own = self._engine.ensemble.generation
        settings = body.settings(own, self._limits.max_new_tokens)
        prompts = body.prompts()
        n_texts = len(prompts) * body.n
        if n_texts > self._engine.capacity:
            raise Refusal(
                f"{n_texts} texts in one request are more than the {self._engine.capacity} that "
                "this server has places for; ask for fewer.",
                "n" if body.n > 1 else "prompt",
            )
        field, n_alternatives = body.alternatives
        if n_alternatives and not _writes_tokens(self._engine.ensemble, choice.policy):
            raise Refusal(
                f"policy '{choice.name}' writes in {choice.policy.support}, and has no "
                f"alternatives to tokens; '{field}' must be 0, got {n_alternatives}.",
                field,
            )
        n_numbers = n_texts * settings.max_new_tokens * (1 + n_alternatives)
        if not body.stream and n_numbers > _MOST_NUMBERS:
            raise Refusal(
                f"{n_texts} texts of up to {settings.max_new_tokens} tokens with {n_alternatives} "
                "alternatives each are more than this server sends in one piece; ask for fewer, or "
                "stream them.",
                field if n_alternatives else "n",
            )
        seed = body.seed if body.seed is not None else own.seed
        # Without a seed every text has its own, those of equal prompts too.
        seeds = [
            secrets.randbits(32) if seed is None else seed + i
            for _ in prompts
            for i in range(body.n)
        ]
        return _Wanted(body, choice, settings, prompts, seeds)

    async def _begin(self, texts: Texts, wanted: _Wanted) -> None:
        """Have the prompts read by the tokenizers, and the texts begun.

        Raises:
            Exception: if one cannot be answered.
        """
        prompts = await self._prompts.read(wanted.prompts, wanted.choice.policy)
        n = wanted.body.n
        await texts.begin(
            [
                GenerationRequest(prompts[i // n], wanted.choice, wanted.settings, seed, i // n)
                for i, seed in enumerate(wanted.seeds)
            ]
        )

    def _replies(self, wanted: _Wanted) -> Replies:
        body, choice = wanted.body, wanted.choice
        is_chat = isinstance(body, ChatCompletionRequest)
        return Replies(
            "chat" if is_chat else "completion",
            f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            body.model,
            {"policy": choice.name, "kind": choice.policy.name, "params": dict(choice.params)},
            int(time.time()),
            self._engine.ensemble.vocabulary.token_bytes,
            body.wants_logprobs,
            body.alternatives[1],
            not isinstance(body, ChatCompletionRequest) or body.include_reasoning,
        )

    def explained(self, error: Exception) -> dict[str, Any]:
        """The body of the reply to a request that went wrong."""
        return _explained(error, self._engine)[1]


@dataclass(frozen=True)
class _Wanted:
    """What a request asks for.

    Attributes:
        body: the request.
        choice: who decides who writes.
        settings: how the texts are written.
        prompts: what they answer.
        seeds: per text; those of one prompt are side by side.
    """

    body: CompletionRequest | ChatCompletionRequest
    choice: Choice
    settings: GenerationConfig
    prompts: list[Prompt]
    seeds: list[int]


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
    if isinstance(error, HTTPException):
        return error.status_code, failure(error.detail, "invalid_request_error"), {}
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
    return 500, failure("internal error; the server's log says more.", "server_error"), {}


async def _no_such_page(request: Request, _: Exception) -> Response:
    message = (
        f"there is no {request.method} {shorten(request.url.path)} here; known are GET /, /health, "
        "/metrics, /v1/models, and POST /v1/completions, /v1/chat/completions."
    )
    return JSONResponse(failure(message, "invalid_request_error"), status_code=404)

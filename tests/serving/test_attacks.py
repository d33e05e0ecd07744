"""Clients that mean harm, over real sockets: nobody else notices them."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving_worlds import CHAT, COMPLETIONS, HOSTILE, SECONDS, Gate, ask, running

import multicolm.decoding.prompts
from multicolm.serving.limits import Limits
from multicolm.serving.server import Server

PATIENCE = 2.0  # seconds without a token; on a busy machine, and a fraction of what it was


def connect(server: Server) -> socket.socket:
    place = urlsplit(server.address)
    return socket.create_connection((place.hostname or "", place.port), timeout=SECONDS)


def post(path: str, body: bytes, **headers: str) -> bytes:
    given = {"Host": "localhost", "Content-Type": "application/json", **headers}
    given.setdefault("Content-Length", str(len(body)))
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def being_written(server: Server) -> Iterator[list[float]]:
    """Texts that somebody reads meanwhile, and the seconds between what comes of them."""
    place, gaps, ended = urlsplit(server.address), [0.0], threading.Event()
    text = {"prompt": "What is 2 * x?", "max_tokens": 200, "temperature": 1, "stream": True}
    body = json.dumps({"model": "tiny", **text})

    def read() -> None:
        while not ended.is_set():
            connection = http.client.HTTPConnection(place.hostname or "", place.port)
            connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            last = time.monotonic()
            while reply.readline():
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
            connection.close()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while len(gaps) < 20:
            time.sleep(0.01)
        yield gaps
    finally:
        ended.set()
        reader.join(SECONDS)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_briefly_and_nobody_waits_for_it(
    server: Server, name: str
) -> None:
    path, body = HOSTILE[name]
    assert len(body) < Limits().max_body
    with being_written(server) as gaps:
        reply = ask(server, path, raw=body, method="POST")
    assert (reply.status, len(reply.body) < 1000) == (400, True), reply.body[:2000]
    assert max(gaps) < PATIENCE


LONG = "x" * 300_000


@pytest.mark.parametrize(
    "fields",
    [
        {"model": LONG},
        {"model": f"tiny:{LONG}"},
        {"model": f"tiny:confidence@0.{'3' * 300_000}"},
        {LONG: 1},
        {"role": LONG},
        {"stop": [LONG]},
        {"temperature": LONG},
        {"multicolm": {"policy": LONG}},
        {"multicolm": {LONG: 1}},
        {"multicolm": {"params": {LONG: 1}}},
        {"multicolm": {"policy": "confidence", "params": {"threshold": "x" * 16_000}}},
        {"multicolm": {"policy": "single", "params": {"model": "x" * 16_000}}},
        {"multicolm": {"policy": "single", "params": {"x" * 200: 1}}},
    ],
)
def test_what_a_client_sends_is_not_sent_back_at_length(
    server: Server, fields: dict[str, Any]
) -> None:
    reply = ask(server, COMPLETIONS, {"model": "tiny", "prompt": "a", **fields})
    assert reply.status in (400, 404) and len(reply.body) < 3000, (reply.status, len(reply.body))
    assert len(ask(server, f"/v1/{'x' * 10_000}").body) < 1000
    assert len(ask(server, f"/v1/models/{'x' * 10_000}").body) < 3000


@pytest.mark.parametrize("bounded", [True, False])
def test_long_prompts_do_not_hold_up_the_texts_that_are_written(
    server: Server, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bounded:  # as of a tokenizer of which nothing is known: all of it is read
        monkeypatch.setattr(multicolm.decoding.prompts, "least_tokens", lambda *_: 0)
    text = "hello world " * (75_000 if bounded else 20_000)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": text}]}
    long = [(COMPLETIONS, {"model": "tiny", "prompt": text}), (CHAT, chat)] * (8 if bounded else 1)
    replies: list[int] = []
    with being_written(server) as gaps:
        clients = [
            threading.Thread(target=lambda to: replies.append(ask(server, *to).status), args=(to,))
            for to in long
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(SECONDS)
    assert replies == [400] * len(long)
    assert max(gaps) < PATIENCE


def test_a_short_prompt_does_not_wait_for_a_long_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = multicolm.decoding.prompts.encode_prompt
    began, go_on = threading.Event(), threading.Event()

    def slowly(prompt: Any, *rest: Any) -> list[int]:
        if isinstance(prompt, str) and len(prompt) > 100:
            began.set()
            assert go_on.wait(SECONDS)
        return read(prompt, *rest)

    monkeypatch.setattr(multicolm.decoding.prompts, "encode_prompt", slowly)
    body = {"model": "tiny", "max_tokens": 1}
    replies: list[int] = []
    long = threading.Thread(
        target=lambda: replies.append(
            ask(server, COMPLETIONS, {**body, "prompt": "a " * 8_250}).status
        )
    )
    long.start()
    assert began.wait(SECONDS)
    assert ask(server, COMPLETIONS, {**body, "prompt": "a"}).status == 200
    go_on.set()
    long.join(SECONDS)
    assert replies == [400]


# Clients that do not read, and clients that do not write.

WIDE = ("a" * 4000, "b" * 4000, ".")
BODY = {"model": "duo", "prompt": WIDE[0], "max_tokens": 150, "logprobs": 1, "n": 2}
"""Megabytes of reply for few tokens: more than sockets hold."""


@pytest.fixture
def strict() -> Iterator[Server]:
    """A server that waits for nobody, and models that never end a text."""
    gate = Gate(tokens=WIDE)
    gate.open.set()
    limits = Limits(body_seconds=0.5, send_seconds=0.5)
    with running(
        gate.ensemble(), "duo", limits=limits, max_concurrent=2, max_waiting=0, grace=0.0
    ) as server:
        yield server


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "that does not come true"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_given_up_and_keeps_its_places_until_then(
    strict: Server, stream: bool
) -> None:
    with connect(strict) as connection:
        connection.sendall(post(COMPLETIONS, json.dumps({**BODY, "stream": stream}).encode()))
        if stream:
            until(lambda: strict.engine.stats().active == 2)
        else:
            until(lambda: strict.engine.stats().outcomes["finished"] == 2)
        short = {**BODY, "n": 1, "max_tokens": 1}
        assert ask(strict, COMPLETIONS, short).status == 429
        until(lambda: ask(strict, COMPLETIONS, short).status == 200)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                assert b"[DONE]" not in part


def test_a_text_whose_client_does_not_read_pauses_in_its_place_and_others_grow() -> None:
    gate = Gate(tokens=(*(chr(97 + i) * 40 for i in range(24)), "."))
    gate.open.set()
    body = {"model": "duo", "prompt": "a" * 40, "logprobs": 20}
    unread = json.dumps({**body, "max_tokens": 1000, "stream": True}).encode()
    limits = Limits(max_new_tokens=1000, send_seconds=SECONDS)
    with running(gate.ensemble(), "duo", limits=limits, max_concurrent=2, grace=0.0) as server:
        assert ask(server, COMPLETIONS, {**body, "max_tokens": 1}).status == 200  # all is loaded

        def has_stopped(seen: list[int]) -> bool:
            [worker] = server.engine._workers.values()
            for handle in worker.active.values():
                if handle.backlog.is_full and handle.row is not None:
                    seen.append(len(handle.row.written))
            return len(seen) > 20 and seen[-20] == seen[-1]

        with connect(server) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            tracemalloc.start()
            connection.sendall(post(COMPLETIONS, unread, Connection="close"))
            paused: list[int] = []
            until(lambda: has_stopped(paused))
            memory, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert memory < 4e6  # all of it takes 8 MB
            for _ in range(3):
                reply = ask(server, COMPLETIONS, {**body, "max_tokens": 100})
                assert reply.json["usage"]["completion_tokens"] == 100
            assert has_stopped(paused) and paused[-1] < 600 and server.engine.stats().active == 1
            got = b""
            while part := connection.recv(1 << 20):
                got += part
        assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert got.count(b'"offset"') == 1000


def test_a_client_that_reads_slowly_and_steadily_gets_all_of_its_text(strict: Server) -> None:
    with connect(strict) as connection:
        body = json.dumps({**BODY, "stream": True}).encode()
        connection.sendall(post(COMPLETIONS, body, Connection="close"))
        start, got = time.monotonic(), b""
        while part := connection.recv(1 << 16):
            got += part
            if time.monotonic() - start < 1.2:  # twice as long as one that reads nothing has
                time.sleep(0.05)
    assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and time.monotonic() - start > 1.2


EARLY = {
    "another host": post(COMPLETIONS, b"", Host="evil.example", **{"Content-Length": "900"}),
    "another path": post("/v1/embeddings", b"", **{"Content-Length": "900"}),
    "another type": post(COMPLETIONS, b"", **{"Content-Type": "x/y", "Content-Length": "900"}),
    "chunks": post("/nothing", b"", **{"Content-Length": "", "Transfer-Encoding": "chunked"}),
    "a body of a GET": post("/health", b"", **{"Content-Length": "900"}).replace(b"POST", b"GET"),
    "a body of the page": post("/", b"", **{"Content-Length": "900"}).replace(b"POST", b"GET"),
}
EARLY["chunks"] = EARLY["chunks"].replace(b"Content-Length: \r\n", b"")


@pytest.mark.parametrize("name", EARLY)
def test_who_is_refused_cannot_hold_a_connection_by_a_byte_at_a_time(
    strict: Server, name: str
) -> None:
    with connect(strict) as connection:
        connection.sendall(EARLY[name])
        start, got = time.monotonic(), b""
        connection.settimeout(0.05)
        while time.monotonic() - start < 10:
            try:
                part = connection.recv(4096)
                got += part
                if not part:
                    break
            except TimeoutError:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"1\r\nx\r\n" if name == "chunks" else b"x")
            except ConnectionError:
                break
        assert time.monotonic() - start < 5
        assert b" 408 " in got and b"connection: close" in got.lower()


def test_who_sends_all_of_a_wrong_request_gets_its_answer_and_may_ask_on(strict: Server) -> None:
    body = b"x" * 900_000
    with connect(strict) as connection:
        for path, host in ((COMPLETIONS, "evil.example"), ("/nothing", "localhost")):
            connection.sendall(post(path, body, Host=host))
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            assert reply.status in (404, 421) and json.loads(reply.read())["error"]["message"]
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert reply.status == 200


def test_an_upgrade_of_the_connection_is_not_served(strict: Server) -> None:
    with connect(strict) as connection:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + upgrade + key + b"\r\n")
        assert b" 200 " in connection.recv(100)

"""Who may ask for what, how much and how often; everything else is refused, and says why."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving_worlds import SECONDS, Gate, Reply, ask, running

from multicolm import Ensemble
from multicolm.config import GenerationConfig
from multicolm.errors import (
    CapabilityError,
    ConfigError,
    InputError,
    ServerError,
    UnknownNameError,
)
from multicolm.serving.catalog import Catalog
from multicolm.serving.limits import Limits
from multicolm.serving.protocol import ChatCompletionRequest, CompletionRequest, Refusal, read
from multicolm.serving.server import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def complain(server: Server, path: str = COMPLETIONS, **fields: Any) -> tuple[int, str, Any]:
    """Status, message and field of what a request gets."""
    body = {"model": "tiny"}
    body |= {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
    reply = ask(server, path, {**body, **fields})
    error = reply.json["error"]
    return reply.status, error["message"], error["param"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (path, {name: value}, f"'{name}' is not supported")
        for path in (COMPLETIONS, CHAT)
        for name, value in {
            "tools": [{"type": "function"}],
            "tool_choice": "auto",
            "functions": [{}],
            "logit_bias": {"5": 1},
            "best_of": 2,
            "echo": True,
            "suffix": "b",
            "presence_penalty": 0.5,
            "frequency_penalty": -1,
            "response_format": {"type": "json_object"},
            "modalities": ["text", "audio"],
            "store": True,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 3,
            "stop_token_ids": [1],
            "ignore_eos": True,
            "num_beams": True,
            "reasoning_effort": "high",
        }.items()
    ),
    (COMPLETIONS, {"logprobs": 21}, "at most 20"),
    (COMPLETIONS, {"logprobs": -1}, "0 or more"),
    (COMPLETIONS, {"model": "tiny:byte-mixture", "logprobs": 2}, "'logprobs' must be 0, got 2"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "at most 20"),
    (CHAT, {"top_logprobs": 2}, "goes with"),
    (COMPLETIONS, {"nonsense": 1}, "unknown field 'nonsense'. Allowed: logprobs,"),
    (COMPLETIONS, {"temprature": 1}, "Did you mean 'temperature'?"),
    (COMPLETIONS, {"temperature": -0.1}, "must be 0 or more"),
    (COMPLETIONS, {"temperature": "hot"}, "must be a number"),
    (COMPLETIONS, {"top_p": 0}, "more than 0"),
    (COMPLETIONS, {"top_k": -2}, "-1 or more"),
    (COMPLETIONS, {"n": 0}, "1 or more"),
    (COMPLETIONS, {"n": 129}, "at most 128"),
    (COMPLETIONS, {"n": 100}, "more than the 80 that this server has places for"),
    (COMPLETIONS, {"seed": 1.5}, "whole number"),
    (COMPLETIONS, {"stop": [""]}, "must not be empty"),
    (COMPLETIONS, {"max_tokens": 0}, "must be 1 to 1024 on this server"),
    (COMPLETIONS, {"max_tokens": 5000}, "must be 1 to 1024 on this server"),
    (CHAT, {"max_completion_tokens": 5000}, "max_completion_tokens must be 1 to 1024"),
    (CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, "say different things"),
    (COMPLETIONS, {"prompt": ""}, "'prompt' is empty"),
    (COMPLETIONS, {"prompt": []}, "'prompt' is empty"),
    (COMPLETIONS, {"prompt": ["a", 3]}, "must be a text, a list of token ids"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt 2 is empty"),
    (COMPLETIONS, {"prompt": [10**6]}, "token id 1000000; the vocabulary has"),
    (COMPLETIONS, {"prompt": "a " * 3000}, "the context of model"),
    (COMPLETIONS, {"prompt": "\ud800"}, "not valid Unicode"),
    (COMPLETIONS, {"model": "tiny\ud800"}, "not valid Unicode"),
    (COMPLETIONS, {"multicolm": {"params": {"\ud800": 1}}}, "not valid Unicode"),
    (COMPLETIONS, {"stop": ["a"] * 17}, "at most 16 texts"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "goes with"),
    (CHAT, {"messages": []}, "must hold 1 or more"),
    (CHAT, {"messages": "hello"}, "must be a list"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "unknown field"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "refusal": "no"}]}, "unknown field"),
    (CHAT, {"messages": [{"role": "user"}]}, "'messages.0.content' is missing"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "images, audio and files are not served",
    ),
    (COMPLETIONS, {"model": "tiny:cosd-rule@0.3"}, "no threshold of deferral"),
    *(
        (COMPLETIONS, {"model": f"tiny:confidence@{number}"}, "expected a number after '@'")
        for number in ("nan", "inf", "1_000", "٣", " 0.3 ", "0x1", "1e", "", "1e999", "+-1")
    ),
    (
        COMPLETIONS,
        {"multicolm": {"policy": "confidence", "params": {"threshold": 7}}},
        "threshold: must be at most 2, got 7",
    ),
    (COMPLETIONS, {"multicolm": {"polcy": "x"}}, "Did you mean 'policy'?"),
    (
        COMPLETIONS,
        {"model": "tiny:confidence", "multicolm": {"policy": "margin"}},
        "names policy 'confidence' and multicolm.policy names 'margin'",
    ),
    (
        COMPLETIONS,
        {"multicolm": {"policy": "confidence", "params": {"thresold": 1}}},
        "Did you mean 'threshold'?",
    ),
    (
        COMPLETIONS,
        {"multicolm": {"policy": "single", "params": {"model": "nobody"}}},
        "unknown model 'nobody'",
    ),
]


@pytest.mark.parametrize(("path", "fields", "said"), REFUSED)
def test_what_is_not_served_is_refused_and_named(
    server: Server, path: str, fields: dict[str, Any], said: str
) -> None:
    status, message, param = complain(server, path, **fields)
    assert (status, said in message) == (400, True), message
    first = next(iter(fields))
    if first not in ("prompt", "model", "multicolm"):
        assert str(param).startswith(tuple(fields))


NOTHING: dict[str, list[Any]] = {
    "metadata": [{"run": "1"}],
    "service_tier": ["auto", "priority"],
    "prompt_cache_key": ["k"],
    "safety_identifier": ["u"],
    "user": ["u"],
    "top_k": [-1, 0],
    "min_p": [0, 0.0],
    "repetition_penalty": [1, 1.0],
    "length_penalty": [1.0],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0],
    "logit_bias": [{}, {"5": 0}],
    "best_of": [1],
    "n": [1],
    "tools": [[]],
    "tool_choice": ["none"],
    "functions": [[]],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "stop": [[]],
    "stop_token_ids": [[]],
    "ignore_eos": [False],
    "min_tokens": [0],
    "echo": [False],
    "store": [False],
    "use_beam_search": [False],
    "reasoning_effort": ["none"],
    "seed": [None],
}
"""Values that ask for nothing."""


@pytest.mark.parametrize("schema", [CompletionRequest, ChatCompletionRequest])
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in NOTHING.items() for v in vs])
def test_what_asks_for_nothing_changes_nothing(name: str, value: Any, schema: Any) -> None:
    turn = {"role": "user", "content": "a"}
    plain = {"model": "tiny", "prompt": "a"} if schema is CompletionRequest else {
        "model": "tiny",
        "messages": [turn],
    }  # fmt: skip
    own = GenerationConfig()
    asked = read(json.dumps({**plain, name: value}).encode(), schema)
    assert asked.settings(own, 64) == read(json.dumps(plain).encode(), schema).settings(own, 64)
    assert (asked.prompts(), asked.n) == (["a"] if schema is CompletionRequest else [[turn]], 1)


def test_a_number_after_the_at_sign_is_written_as_in_json(server: Server) -> None:
    for number in ("0.3", ".3", "3e-1", "+0.30", "1", "1."):
        choice = server.catalog.choose(f"tiny:confidence@{number}")
        assert choice.params["threshold"] == float(number)


def test_weights_whose_sum_is_infinite_are_served(server: Server) -> None:
    extension = {"policy": "average", "params": {"weights": [1e308] * 3}}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "multicolm": extension}
    assert ask(server, COMPLETIONS, body).status == 200


EXTREMES: list[Any] = [5e-324, 1e-320, 1e308, -1e308, 10**400, -(2**63)]
EXTREMES += [[1e308] * 3, [5e-324] * 3, [1e-320, 0, 0], [10**400] * 3]


def test_no_number_that_a_client_can_send_breaks_a_policy(server: Server) -> None:
    policies = [
        "average",
        "proxy-tuning",
        "contrastive",
        "byte-contrastive",
        "gedi",
        "safe",
        "bild",
    ]
    for name in policies:
        for param in server.catalog.models[name].policy.as_config()["params"]:
            for value in EXTREMES:
                extension = {"policy": name, "params": {param: value}}
                body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "multicolm": extension}
                reply = ask(server, COMPLETIONS, body)
                assert reply.status in (200, 400), (name, param, value, reply.body)


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_the_openapi_document_describes_the_bodies_that_are_taken(
    server: Server, route: str
) -> None:
    document = ask(server, "/openapi.json").json
    described = document["paths"][route]["post"]
    assert {"200", "400", "401", "429", "500", "503"} <= set(described["responses"])
    assert described["requestBody"]["required"]
    body = described["requestBody"]["content"]["application/json"]["schema"]
    assert "$ref" not in json.dumps(body) and body["additionalProperties"] is False
    asked: Any = ChatCompletionRequest if route == CHAT else CompletionRequest
    plain: dict[str, Any] = {"model": "tiny"}
    plain |= (
        {"messages": [{"role": "user", "content": "a"}]}
        if asked is ChatCompletionRequest
        else {"prompt": "a"}
    )
    assert set(plain) == set(body["required"])
    for name, schema in body["properties"].items():
        for value in schema.get("enum", [{"any": 1}] if not schema else []):
            assert read(json.dumps(plain | {name: value}).encode(), asked).model == "tiny"
    assert set(asked.model_fields) <= set(body["properties"])


def test_top_k_that_is_off_is_off_where_the_ensemble_has_one() -> None:
    own = GenerationConfig(top_k=5)
    for value, wanted in ((None, 5), (-1, None), (0, None), (3, 3)):
        body = json.dumps({"model": "tiny", "prompt": "a", "top_k": value}).encode()
        assert read(body, CompletionRequest).settings(own, 64).top_k == wanted


def test_as_many_texts_as_are_chosen_from_are_all_of_them() -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "n": 3, "best_of": 3}
    assert read(json.dumps(body).encode(), CompletionRequest).n == 3
    with pytest.raises(Refusal, match="'best_of' is not supported: ask for n texts, and choose"):
        read(json.dumps(body | {"best_of": 4}).encode(), CompletionRequest)


def test_a_message_may_say_who_speaks_and_that_no_tools_were_called() -> None:
    said: dict[str, Any] = {"role": "assistant", "content": "a", "name": "bob", "tool_calls": []}
    said |= {"annotations": [], "refusal": None, "audio": None, "function_call": None}
    body = json.dumps({"model": "tiny", "messages": [said]}).encode()
    assert read(body, ChatCompletionRequest).prompts() == [[{"role": "assistant", "content": "a"}]]


@pytest.mark.parametrize(
    "model",
    ["tinny", "tiny:nope", "tiny:co-llm", "tiny:../../etc/passwd", "tiny:policy.py:Class", ""],
)
def test_a_client_names_what_is_served_and_nothing_else(server: Server, model: str) -> None:
    status, message, param = complain(server, model=model)
    assert (status, param) == (404, "model")
    assert message.startswith("unknown ")
    name = model.partition(":")[2] or "../x.yaml"
    status, _, param = complain(server, multicolm={"policy": name})
    assert (status, param) == (404, "multicolm.policy")


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    nothing = {
        **{"tools": [], "logit_bias": {}, "best_of": 1, "echo": False, "suffix": None, "n": 1},
        **{"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}},
        **{"user": "me", "stream_options": None, "store": False, "tool_choice": "none"},
    }
    reply = ask(server, COMPLETIONS, {"model": "tiny", "prompt": "a", "max_tokens": 1, **nothing})
    assert reply.status == 200, reply.body


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(server: Server, raw: bytes) -> None:
    reply = ask(server, COMPLETIONS, raw=raw, method="POST")
    assert reply.status == 400 and "the body" in reply.json["error"]["message"]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "Infinity", "NaN", f"1{'0' * 400}"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_number_that_no_reply_can_repeat_is_refused_before_a_text_is_written(
    server: Server, number: str, stream: bool
) -> None:
    asked = {"model": "tiny:confidence", "prompt": "a", "max_tokens": 1, "stream": stream}
    raw = json.dumps({**asked, "multicolm": {"params": {"threshold": "?"}}})
    raw = raw.replace('"?"', number)
    finished = server.engine.stats().outcomes["finished"]
    reply = ask(server, COMPLETIONS, raw=raw.encode())
    assert reply.status == 400, reply.body
    assert server.engine.stats().outcomes["finished"] == finished


def test_a_reply_that_is_no_stream_has_a_bound_of_tokens_and_alternatives(server: Server) -> None:
    wide = {"model": "tiny", "prompt": "a", "n": 40, "max_tokens": 512, "logprobs": 20}
    reply = ask(server, COMPLETIONS, wide)
    assert reply.status == 400 and reply.json["error"]["param"] == "logprobs"
    assert "stream them" in reply.json["error"]["message"]


def test_another_type_of_body_is_refused_so_that_no_web_page_can_send_one(server: Server) -> None:
    reply = ask(server, COMPLETIONS, raw=b"{}", headers={"Content-Type": "text/plain"})
    assert reply.status == 415 and "application/json" in reply.json["error"]["message"]
    reply = ask(server, COMPLETIONS, method="OPTIONS", headers={"Origin": "http://evil.example"})
    assert reply.status == 404 and "access-control-allow-origin" not in reply.headers


def test_without_a_key_a_server_on_loopback_answers_to_its_own_names_only(server: Server) -> None:
    assert ask(server, "/health", headers={"Host": "evil.example:80"}).status == 421
    port = urlsplit(server.address).port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert ask(server, "/health", headers={"Host": host}).status == 200


def test_an_address_that_is_not_there_says_which_are(server: Server) -> None:
    for path, method in (("/v1/embeddings", "POST"), ("/docs", "GET"), (COMPLETIONS, "GET")):
        reply = ask(server, path, {} if method == "POST" else None)
        assert reply.status == 404
        assert "known are GET /" in reply.json["error"]["message"]


def test_metrics_count_requests_texts_and_tokens(server: Server) -> None:
    def counted() -> dict[str, float]:
        reply = ask(server, "/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in reply.body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = counted()
    reply = ask(server, COMPLETIONS, {"model": "tiny", "prompt": "What", "max_tokens": 5})
    complain(server, tools=[1])
    usage = reply.json["multicolm"]["usage"]
    after = counted()
    new = {name: value - before.get(name, 0) for name, value in after.items()}
    for model, used in usage.items():
        assert new[f'multicolm_tokens_written_total{{model="{model}"}}'] == used["tokens_written"]
        assert new[f'multicolm_tokens_read_total{{model="{model}"}}'] == used["tokens_read"]
        assert new[f'multicolm_forwards_total{{model="{model}"}}'] == used["forwards"]
    assert new['multicolm_texts_total{outcome="finished"}'] == 1
    assert new[f'multicolm_requests_total{{route="{COMPLETIONS}",status="200"}}'] == 1
    assert new[f'multicolm_requests_total{{route="{COMPLETIONS}",status="400"}}'] == 1
    assert new[f'multicolm_request_seconds_count{{route="{COMPLETIONS}"}}'] == 2
    assert new["multicolm_first_token_seconds_count"] == 1
    assert after["multicolm_active"] == after["multicolm_queue"] == 0
    assert after["multicolm_slots"] == 16


# A server with a key, few places and small limits, whose models run while the gate is open.


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def small(gate: Gate) -> Iterator[Server]:
    limits = Limits(max_body=500, max_new_tokens=10_000, head_seconds=0.5, body_seconds=0.5)
    with running(
        gate.ensemble(), "duo", api_key="secret", limits=limits, max_concurrent=1, max_waiting=1,
        allowed=["default"], grace=0.0,
    ) as server:  # fmt: skip
        yield server
        gate.open.set()


KEY = {"Authorization": "Bearer secret"}


def test_a_server_with_a_key_wants_it(small: Server) -> None:
    for path in ("/v1/models", "/metrics", COMPLETIONS, "/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            reply = ask(small, path, headers=headers)
            assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert reply.json["error"]["code"] == "invalid_api_key"
    assert ask(small, "/v1/models", headers=KEY).status == 200
    assert ask(small, "/health").status == 200
    assert ask(small, "/health", headers={"Host": "my.example"}).status == 200
    assert ask(small, "/").status == 200


def test_a_body_that_is_too_long_is_not_read(small: Server) -> None:
    body = json.dumps({"model": "duo", "prompt": "a" * 600}).encode()
    assert ask(small, COMPLETIONS, raw=body, headers=KEY).status == 413
    place = urlsplit(small.address)
    with socket.create_connection((place.hostname, place.port), timeout=SECONDS) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode() + b"64\r\n" + b"a" * 100 + b"\r\n")
        connection.sendall((b"64\r\n" + b"a" * 100 + b"\r\n") * 5)
        assert b" 413 " in connection.recv(200)


def test_a_body_that_does_not_come_is_not_waited_for(small: Server) -> None:
    place = urlsplit(small.address)
    with socket.create_connection((place.hostname, place.port), timeout=SECONDS) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(200)


@pytest.mark.parametrize("kept_alive", [False, True])
@pytest.mark.parametrize("bit_by_bit", [False, True])
def test_a_head_that_does_not_come_is_not_waited_for(
    small: Server, kept_alive: bool, bit_by_bit: bool
) -> None:
    place = urlsplit(small.address)
    with socket.create_connection((place.hostname, place.port), timeout=SECONDS) as connection:
        if kept_alive:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            while not connection.recv(2000).endswith(b"}"):
                pass
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        start = time.monotonic()
        connection.settimeout(0.05 if bit_by_bit else SECONDS)
        while True:
            try:
                assert connection.recv(100) == b""
                break
            except TimeoutError:
                assert time.monotonic() - start < SECONDS
                connection.sendall(b"x")
            except ConnectionError:
                break
        assert time.monotonic() - start >= 0.4
    assert ask(small, "/health").status == 200


def test_a_connection_that_is_kept_alive_outlives_the_time_for_a_head(small: Server) -> None:
    place = urlsplit(small.address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)
    for _ in range(2):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        held = connection.sock
        time.sleep(0.7)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200 and connection.sock is held
    connection.close()


def test_who_finds_no_place_is_told_when_to_come_again(small: Server, gate: Gate) -> None:
    body = {"model": "duo", "prompt": "a", "max_tokens": 3}
    replies: list[Reply] = []
    threads = [
        threading.Thread(target=lambda: replies.append(ask(small, COMPLETIONS, body, headers=KEY)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: small.engine.stats().active + small.engine.stats().waiting == 2)
    refused = ask(small, COMPLETIONS, body, headers=KEY)
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json["error"]["type"] == "rate_limit_error"
    gate.open.set()
    for thread in threads:
        thread.join(SECONDS)
    assert [reply.status for reply in replies] == [200, 200]
    assert ask(small, COMPLETIONS, body, headers=KEY).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place_at_once(
    small: Server, gate: Gate, stream: bool
) -> None:
    body = json.dumps({"model": "duo", "prompt": "a", "max_tokens": 10_000, "stream": stream})
    place = urlsplit(small.address)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    connections = []
    for _ in range(2):  # one is written, the other one waits
        connections.append(socket.create_connection((place.hostname, place.port)))
        connections[-1].sendall(head.encode())
    wait_for(lambda: small.engine.stats().active + small.engine.stats().waiting == 2)
    connections[1].close()
    wait_for(lambda: small.engine._coming or small.engine._leaving)
    gate.open.set()
    wait_for(lambda: small.engine.stats().outcomes["cancelled"] == 1)
    connections[0].close()
    wait_for(lambda: small.engine.stats().outcomes["cancelled"] == 2)
    assert small.engine.stats().active == small.engine.stats().waiting == 0


def test_an_error_in_the_middle_of_a_stream_is_told(small: Server, gate: Gate) -> None:
    gate.errors.append(RuntimeError("/a/path/that/is/nobody's/business"))
    gate.open.set()
    body = {"model": "duo", "prompt": "a", "stream": True}
    reply = ask(small, COMPLETIONS, body, headers=KEY)
    assert reply.status == 200
    assert "internal error" in reply.body.decode()
    assert "business" not in reply.body.decode() and "[DONE]" not in reply.body.decode()
    gate.errors.append(RuntimeError("once more"))
    reply = ask(small, COMPLETIONS, {"model": "duo", "prompt": "a"}, headers=KEY)
    assert reply.status == 500 and reply.json["error"]["type"] == "server_error"
    assert ask(small, COMPLETIONS, {**body, "max_tokens": 2}, headers=KEY).events


def test_a_server_that_is_shutting_down_says_so(small: Server, gate: Gate) -> None:
    gate.open.set()
    small.engine.close()
    health = ask(small, "/health")
    assert (health.status, health.json) == (503, {"status": "shutting down"})
    reply = ask(small, COMPLETIONS, {"model": "duo", "prompt": "a"}, headers=KEY)
    assert reply.status == 503 and reply.headers["retry-after"] == "5"
    assert reply.json["error"]["code"] == "shutting_down"


def test_a_failure_of_a_models_own_server_is_told_without_its_address(
    small: Server, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.errors.append(ServerError("http://10.0.0.7:8000 is gone", server="http://10.0.0.7:8000"))
    gate.open.set()
    reply = ask(small, COMPLETIONS, {"model": "duo", "prompt": "a"}, headers=KEY)
    assert reply.status == 502 and "has failed" in reply.json["error"]["message"]
    assert "10.0.0.7" not in reply.body.decode()
    assert "http://10.0.0.7:8000 is gone" in caplog.text


def test_what_a_models_server_cannot_do_is_told_without_its_address(
    small: Server, gate: Gate
) -> None:
    for model in small.engine.ensemble.backends:
        model.server = "http://10.0.0.7:8000"
    for said in ("its server http://10.0.0.7:8000 returns none", "http://10.0.0.7:8000: is slow"):
        gate.errors.append(CapabilityError(said))
        gate.open.set()
        reply = ask(small, COMPLETIONS, {"model": "duo", "prompt": "a"}, headers=KEY)
        assert reply.status == 400 and "its server" in reply.json["error"]["message"]
        assert "10.0.0.7" not in reply.body.decode()
    for model in small.engine.ensemble.backends:
        model.server = ""


def test_the_operator_says_what_is_served(small: Server, alone: Ensemble) -> None:
    listed = ask(small, "/v1/models", headers=KEY).json["data"]
    assert [entry["id"] for entry in listed] == ["duo"]
    catalog = Catalog(alone, "tiny", ["confidence", "mine=margin"])
    assert catalog.ids() == ["tiny", "tiny:confidence", "tiny:mine"]
    assert catalog.choose("tiny:mine@0.25").policy.as_config() == {
        "kind": "margin",
        "params": {"threshold": 0.25},
    }
    with pytest.raises(InputError, match="no threshold of deferral"):
        Catalog(Ensemble(alone.backends, policy="average"), "tiny", []).choose("tiny@0.25")
    assert Catalog(Ensemble(alone.backends, policy="entropy"), "tiny", []).choose(
        "tiny@0.25"
    ).params == {"threshold": 0.25}
    for allowed, said, kind in (
        ("nope", "unknown policy 'nope'", UnknownNameError),
        ("./folder", "clients need a name for it; write NAME=./folder", ConfigError),
        ("a:b=confidence", "a name has no ':'", ConfigError),
        ("cosd-tree", "train", CapabilityError),
    ):
        with pytest.raises(kind, match=said):
            Catalog(alone, "tiny", [allowed])
    with pytest.raises(ConfigError, match="names two policies"):
        Catalog(alone, "tiny", ["margin", "margin=confidence"])


def test_a_param_that_is_a_file_is_the_operators_to_set(alone: Ensemble) -> None:
    from multicolm.plugins import policies

    catalog = Catalog(alone, "tiny", ["confidence"])
    for kind, param in (("co-llm", "head"), ("cosd-tree", "tree"), ("mlp-router", "network")):
        model = catalog.models["confidence"]
        catalog.models[kind] = type(model)(kind, policies.get(kind)())
        for name in (param, "made_for"):
            with pytest.raises(InputError, match=f"{name} of policy '{kind}' is the operator's"):
                catalog.choose("tiny", kind, {name: "/etc/passwd"})


@pytest.mark.parametrize("limits", [{"max_body": 0}, {"max_new_tokens": 0}])
def test_limits_are_counted_from_one(limits: dict[str, int]) -> None:
    with pytest.raises(InputError, match="1 or more"):
        Limits(**limits)


def wait_for(true: Any) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "that does not come true"
        time.sleep(0.005)

"""Many clients at once, of every manner: the answers are those of `generate`, and all goes free."""

from __future__ import annotations

import gc
import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving_worlds import HOSTILE, SECONDS, ask, running

import multicolm
from multicolm import Ensemble
from multicolm.decoding.row import Row
from multicolm.serving.server import Server
from multicolm.serving.workers import Handle

N_CLIENTS = 64
N_TURNS = 3
PATH = "/v1/completions"
PROMPTS = ["What is Dulerex made from?\nResponse:", "What is 2 * x + 15 if x = 7?\nResponse:", "A"]
BODIES: list[dict[str, Any]] = [
    {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 20},
    {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 30, "temperature": 0.8, "seed": 3},
    {"model": "tiny:max-confidence", "prompt": PROMPTS[0], "max_tokens": 12, "stop": "made"},
    {"model": "tiny:max-confidence", "prompt": PROMPTS[2], "max_tokens": 40, "top_k": 5,
     "temperature": 1.2, "seed": 4},
    {"model": "tiny:average", "prompt": PROMPTS[1], "max_tokens": 16},
]  # fmt: skip


def expected(alone: Ensemble, body: dict[str, Any]) -> str:
    settings = {name: body.get(name) for name in ("temperature", "top_k", "stop", "seed")}
    policy = body["model"].partition(":")[2] or None
    [answer] = alone.generate(
        [body["prompt"]], policy, max_new_tokens=body["max_tokens"], **settings
    )
    return answer.text


class Client(threading.Thread):
    """Somebody with habits."""

    def __init__(self, number: int, server: Server, texts: list[str]) -> None:
        super().__init__(name=f"client {number}")
        self.chance = random.Random(number)
        self.server = server
        self.texts = texts
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        habits = (
            self.wait,
            self.stream,
            self.read_slowly,
            self.leave,
            self.leave_early,
            self.babble,
            self.attack,
            self.send_slowly,
            self.read_nothing,
        )
        for turn in range(N_TURNS):
            # Everybody waits for an answer at least once.
            habit = self.wait if turn == 0 else self.chance.choice(habits)
            try:
                habit(self.chance.randrange(len(BODIES)))
                self.done[habit.__name__] += 1
            except Exception as error:
                self.wrong.append(f"{habit.__name__}: {error!r}")

    def check(self, which: int, text: str) -> None:
        if text != self.texts[which]:
            self.wrong.append(f"{BODIES[which]}: {text!r}")

    def wait(self, which: int) -> None:
        reply = ask(self.server, PATH, BODIES[which])
        assert reply.status == 200, reply.body
        self.check(which, reply.json["choices"][0]["text"])

    def open(self, which: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        place = urlsplit(self.server.address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)
        body = json.dumps({**BODIES[which], "stream": True})
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        return connection, reply

    def stream(self, which: int, pause: float = 0.0) -> None:
        connection, reply = self.open(which)
        content = b""
        while part := reply.read1(300 if pause else 65536):
            content += part
            time.sleep(pause)
        connection.close()
        *parts, last, rest = content.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
        self.check(which, "".join(chunk["choices"][0]["text"] for chunk in chunks))

    def read_slowly(self, which: int) -> None:
        self.stream(which, pause=0.01)

    def leave(self, which: int) -> None:
        connection, reply = self.open(which)
        reply.read1(1)
        reply.close()
        connection.close()

    def leave_early(self, which: int) -> None:
        place = urlsplit(self.server.address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)
        body = json.dumps(BODIES[which])
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        time.sleep(0.05 * self.chance.random())
        connection.close()

    def attack(self, which: int) -> None:
        path, body = self.chance.choice(list(HOSTILE.values()))
        assert ask(self.server, path, raw=body, method="POST").status == 400

    def send_slowly(self, which: int) -> None:
        body = json.dumps(BODIES[which]).encode()
        place = urlsplit(self.server.address)
        with socket.create_connection((place.hostname or "", place.port), timeout=SECONDS) as bare:
            head = "Host: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            length = f"Content-Length: {len(body)}\r\n\r\n"
            bare.sendall(f"POST {PATH} HTTP/1.1\r\n{head}{length}".encode())
            for start in range(0, len(body), 20):
                bare.sendall(body[start : start + 20])
                time.sleep(0.01)
            reply = http.client.HTTPResponse(bare)
            reply.begin()
            self.check(which, json.loads(reply.read())["choices"][0]["text"])

    def read_nothing(self, which: int) -> None:
        connection, _ = self.open(which)
        time.sleep(self.chance.random())
        connection.close()

    def babble(self, which: int) -> None:
        raw = json.dumps(BODIES[which]).encode()[: self.chance.randrange(1, 20)]
        assert ask(self.server, PATH, raw=raw).status == 400
        noise = bytes(self.chance.randrange(256) for _ in range(200))
        assert ask(self.server, PATH, raw=noise).status == 400


@pytest.fixture
def fresh() -> Iterator[Server]:
    with running(multicolm.load("tiny"), max_concurrent=12, max_waiting=2 * N_CLIENTS) as server:
        yield server


def wave(server: Server, texts: list[str], first: int) -> Counter[str]:
    clients = [Client(first + i, server, texts) for i in range(N_CLIENTS)]
    for client in clients:
        client.start()
    end = time.monotonic() + 2 * SECONDS
    for client in clients:
        client.join(max(0.0, end - time.monotonic()))
        assert not client.is_alive(), "a client is still waiting"
    assert [wrong for client in clients for wrong in client.wrong] == []
    return sum((client.done for client in clients), Counter())


def left_over(server: Server) -> int:
    """Texts and handles that are still there once all clients are gone."""
    end = time.monotonic() + SECONDS
    while server.engine.stats().active or server.engine.stats().waiting:
        assert time.monotonic() < end, "places are not freed"
        time.sleep(0.02)
    # What the loop has touched last is let go with its next turn.
    assert ask(server, PATH, {"model": "tiny", "prompt": "A", "max_tokens": 1}).status == 200
    gc.collect()
    return sum(type(thing) in (Row, Handle) for thing in gc.get_objects())


@pytest.mark.slow
def test_answers_are_those_of_generate_whoever_else_asks_leaves_or_babbles(
    fresh: Server, alone: Ensemble
) -> None:
    texts = [expected(alone, body) for body in BODIES]
    assert len(set(texts)) == len(texts)
    done: Counter[str] = Counter()
    kept = []
    for number in range(2):
        done += wave(fresh, texts, N_CLIENTS * number)
        kept.append(left_over(fresh))
    assert done["wait"] >= 2 * N_CLIENTS
    assert all(
        done[habit] >= 10 for habit in ("stream", "leave", "babble", "attack", "read_nothing")
    ), done
    assert max(kept) <= 4, kept
    outcomes = fresh.engine.stats().outcomes
    assert outcomes["failed"] == 0
    answered = ("wait", "stream", "read_slowly", "send_slowly")
    assert outcomes["finished"] >= sum(done[habit] for habit in answered)

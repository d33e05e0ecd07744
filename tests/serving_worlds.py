"""Servers for tests: real sockets on loopback, and models that can be made to wait."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from multicolm import Ensemble
from multicolm.backend.base import ModelOutput, Session
from multicolm.backend.table import TableModel
from multicolm.serving.server import Server, Settings

TOKENS = ("a", "b", " c", ".")
SECONDS = 60.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Of a stream, without the last word."""
        parts = self.body.decode().split("\n\n")
        assert parts[-1] == "" and parts[-2] == "data: [DONE]", parts[-2:]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@contextmanager
def running(ensemble: Ensemble, name: str = "tiny", **settings: Any) -> Iterator[Server]:
    """A server on a port of its own."""
    with Server(ensemble, name, Settings(port=0, **settings)) as server:
        yield server
    assert not server.engine.is_open


def ask(
    server: Server,
    path: str,
    data: Any = None,
    *,
    raw: bytes | None = None,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Ask a server for something, in the most ordinary way."""
    place = urlsplit(server.address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)
    body = json.dumps(data).encode() if raw is None and data is not None else raw
    given = {"Content-Type": "application/json"} if body is not None else {}
    try:
        connection.request(
            method or ("GET" if body is None else "POST"), path, body, {**given, **(headers or {})}
        )
        reply = connection.getresponse()
        names = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, names, reply.read())
    finally:
        connection.close()


class _Waiting(Session):
    """Feeds when it may."""

    def __init__(self, inner: Session, gate: threading.Event, fail: list[Exception]) -> None:
        self._inner = inner
        self._gate = gate
        self._fail = fail

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        return self._inner.lengths

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        assert self._gate.wait(SECONDS), "the gate stays closed"
        if self._fail:
            raise self._fail.pop()
        return self._inner.feed(rows, tokens, n_last, hidden=hidden)

    def truncate(self, row: int, length: int) -> None:
        self._inner.truncate(row, length)


@dataclass
class Gate:
    """Two models that never end a text, and run only while the gate is open."""

    open: threading.Event = field(default_factory=threading.Event)
    errors: list[Exception] = field(default_factory=list)
    n_opened: int = 0
    tokens: tuple[str, ...] = TOKENS

    def ensemble(self) -> Ensemble:
        gate = self

        class Gated(TableModel):
            def open(self, n_rows: int) -> Session:
                gate.n_opened += 1
                return _Waiting(super().open(n_rows), gate.open, gate.errors)

        even = dict.fromkeys(self.tokens[:-1], 1 / (len(self.tokens) - 1))
        models = [Gated(name, self.tokens, {"": even}, ends=["."]) for name in ("base", "other")]
        return Ensemble(models, policy="max-confidence")


def _hostile() -> dict[str, tuple[str, bytes]]:
    turn = {"role": "user", "content": "a"}
    many = {f"k{i}": 1 for i in range(60_000)}

    def encoded(**fields: Any) -> bytes:
        return json.dumps({"model": "tiny", **fields}, separators=(",", ":")).encode()

    return {
        "messages": (CHAT, encoded(messages=[{}] * 320_000)),
        "lists": (COMPLETIONS, encoded(prompt=[[]] * 320_000)),
        "prompts": (COMPLETIONS, encoded(prompt=["a"] * 200_000)),
        "ids": (COMPLETIONS, encoded(prompt=[1] * 400_000)),
        "mixed": (COMPLETIONS, encoded(prompt=[1, *["a"] * 200_000])),
        "parts": (CHAT, encoded(messages=[{"role": "user", "content": [{}] * 320_000}])),
        "turns": (CHAT, encoded(messages=[turn] * 3000)),
        "stops": (COMPLETIONS, encoded(prompt="a", stop=["a"] * 200_000)),
        "long stop": (COMPLETIONS, encoded(prompt="a", stop="a" * 900_000)),
        "fields": (COMPLETIONS, encoded(prompt="a", **many)),
        "fields of a message": (CHAT, encoded(messages=[{**turn, **many}])),
        "extension": (COMPLETIONS, encoded(prompt="a", multicolm=many)),
        "params": (COMPLETIONS, encoded(prompt="a", multicolm={"params": many})),
        "param": (COMPLETIONS, encoded(prompt="a", multicolm={"params": {"w": [1] * 400_000}})),
        "options": (COMPLETIONS, encoded(prompt="a", stream=True, stream_options=many)),
        "brackets": (COMPLETIONS, b"[" * 900_000),
        "digits": (COMPLETIONS, b'{"model":"tiny","prompt":"a","seed":' + b"9" * 900_000 + b"}"),
        "spaces": (COMPLETIONS, b" " * 900_000),
    }


HOSTILE = _hostile()
"""Bodies that are refused: what each holds much of, and its path and content."""

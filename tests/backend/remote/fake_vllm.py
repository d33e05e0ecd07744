"""A server that answers as vLLM does, from a real small model; and misbehaves on demand.

It speaks HTTP over a real socket. What it can do is said by :class:`Manners`, so that it serves as
other servers too; what goes wrong by :meth:`FakeVllm.go_wrong`. The forms of requests, answers and
errors are those that vLLM 0.32.0 was seen to have.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch

from multicolm.backend.base import Model

__all__ = ["FakeVllm", "Manners", "Refused"]

Fault = Literal[
    "429", "500", "503", "cut", "garbage", "stall", "drip", "hang up", "no choices", "no logprobs"
]


@dataclass(frozen=True)
class Manners:
    """What a server can do.

    Attributes:
        takes_ids: prompts may be token ids; else the status is ``refusal``.
        takes_several: a request may hold several prompts.
        returns_ids: tokens may be named ``token_id:7``; else they are named by their text.
        max_logprobs: how many log-probabilities it returns at most, -1 for all; 0 ignores the wish.
        returns_named: whether ``logprob_token_ids`` works; else it is ignored.
        clamps: gives ``max_logprobs`` where more are wanted, instead of refusing.
        prompt_logprobs: whether that parameter works; else it is ignored.
        echo: likewise.
        avoids: avoids what it wrote before, unless ``repeat_penalty`` says not to.
        max_tokens_0: what it makes of that.
        lists: whether there is ``/v1/models``.
        keeps_alive: whether it keeps connections open.
        refusal: the HTTP status with which it refuses.
    """

    takes_ids: bool = True
    takes_several: bool = True
    returns_ids: bool = True
    max_logprobs: int = -1
    returns_named: bool = True
    clamps: bool = False
    prompt_logprobs: bool = True
    echo: bool = True
    avoids: bool = False
    max_tokens_0: Literal["refused", "nothing", "unlimited"] = "refused"
    lists: bool = True
    keeps_alive: bool = True
    refusal: int = 400
    max_model_len: int = 512


TEXT_ONLY = Manners(takes_ids=False, max_logprobs=0, echo=False, prompt_logprobs=False, avoids=True)


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeVllm:
    """A server on the loopback; use it in a ``with`` statement.

    Attributes:
        requests: bodies of the requests for completions, in order.
        together: the most of them that were answered at one time.
    """

    def __init__(
        self,
        model: Model,
        name: str = "facts",
        manners: Manners | None = None,
        *,
        api_key: str | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.capabilities = manners or Manners()
        self.api_key = api_key
        self.requests: list[dict[str, Any]] = []
        self.together = 0
        self.before_answer: Callable[[], None] = lambda: None
        self.faults: deque[Fault] = deque()
        self._busy = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._start(0)

    def _start(self, port: int) -> None:
        self._ended.clear()
        handler = type("Handler", (_Handler,), {"fake": self})
        while True:
            with contextlib.suppress(OSError):  # who asks may have the port for a moment
                self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
                break
            time.sleep(0.01)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeVllm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Die: whoever is connected is cut off."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._open:
                _shut(connection)
            self._open.clear()
        self._thread.join()

    def restart(self, model: Model | None = None, manners: Manners | None = None) -> None:
        """Die and come back on the same port, perhaps as another one."""
        self.stop()
        self.model = model or self.model
        self.capabilities = manners or self.capabilities
        self._start(self.port)

    def go_wrong(self, *faults: Fault) -> None:
        """The next requests for completions go wrong, one for each fault."""
        self.faults.extend(faults)

    def wait_until_end(self, seconds: float) -> None:
        self._ended.wait(seconds)

    def card(self) -> dict[str, Any]:
        """The model as it is listed."""
        root = f"/models/{self.model.name}"
        return {"id": self.name, "max_model_len": self.capabilities.max_model_len, "root": root}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for completions."""
        self.requests.append(body)
        if body.get("model") != self.name:
            raise Refused(404, f"The model `{body.get('model')}` does not exist.")
        prompts = body["prompt"]
        several = isinstance(prompts, list) and prompts and isinstance(prompts[0], list | str)
        if several and len(prompts) > 1 and not self.capabilities.takes_several:
            raise Refused(self.capabilities.refusal, "one prompt at a time")
        texts = [self._ids(prompt) for prompt in (prompts if several else [prompts])]
        with self._lock:
            choices = [self._choice(n, ids, body) for n, ids in enumerate(texts)]
        n_read = sum(map(len, texts))
        usage = {"prompt_tokens": n_read, "completion_tokens": 0, "total_tokens": n_read}
        # The order of choices is not promised.
        return {"model": self.name, "choices": choices[::-1], "usage": usage}

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.model.tokenizer.encode(prompt)
        if not self.capabilities.takes_ids:
            raise Refused(self.capabilities.refusal, "prompt must be a string.")
        if any(i >= self.model.tokenizer.n_tokens for i in prompt):
            raise Refused(400, f"Token id {max(prompt)} is out of vocabulary")
        return list(prompt)

    def _choice(self, number: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        manners = self.capabilities
        n_tokens, room = body["max_tokens"], manners.max_model_len - len(ids)
        if n_tokens == 0 and not (body.get("echo") and manners.echo):
            if manners.max_tokens_0 == "refused":
                raise Refused(400, "max_tokens must be at least 1, got 0.")
            n_tokens = room if manners.max_tokens_0 == "unlimited" else 0
        if room < 1:
            raise Refused(400, f"max_tokens must be at least 1, got {room}.")
        k = self._n_logprobs(body.get("logprobs"))
        written, rows, ended = self._write(ids, min(n_tokens, room), body)
        named = bool(body.get("return_tokens_as_token_ids")) and manners.returns_ids
        listed = list(zip(written, rows, strict=True))
        prompt_rows = self._prompt_rows(ids)
        if body.get("echo") and manners.echo:
            listed = [*zip(ids, prompt_rows, strict=True), *listed]
        logprobs = None
        also = body.get("logprob_token_ids", []) if manners.returns_named else []
        if rows and any(i >= len(rows[0]) for i in also):
            raise Refused(400, f"Token id {max(also)} is out of vocabulary")
        if k is not None:
            logprobs = {
                "tokens": [self._token(i, named) for i, _ in listed],
                "token_logprobs": [None if r is None else _number(r[i]) for i, r in listed],
                "top_logprobs": [
                    None
                    if r is None
                    else {self._token(j, named): p for j, p in _top(r, k, i, also)}
                    for i, r in listed
                ],
            }
        scored = None
        if body.get("prompt_logprobs") is not None and manners.prompt_logprobs:
            n = body["prompt_logprobs"]
            scored = [
                None if r is None else {str(j): {"logprob": p, "rank": 1} for j, p in _top(r, n, i)}
                for i, r in zip(ids, prompt_rows, strict=True)
            ]
        text = self._text(ids if body.get("echo") and manners.echo else []) + self._text(written)
        for stop in body.get("stop", []):
            text = text.split(stop)[0]
        return {
            "index": number,
            "text": text,
            "finish_reason": "stop" if ended else "length",
            "logprobs": logprobs,
            "prompt_logprobs": scored,
        }

    def _n_logprobs(self, wanted: int | None) -> int | None:
        most = self.capabilities.max_logprobs
        if wanted is None or most == 0:
            return None
        if most >= 0 and (wanted > most or wanted == -1):
            if not self.capabilities.clamps:
                raise Refused(400, f"Requested sample logprobs of {wanted}, greater than {most}")
            return most
        return wanted

    def _write(
        self, ids: list[int], n_tokens: int, body: dict[str, Any]
    ) -> tuple[list[int], list[torch.Tensor], bool]:
        """Greedy tokens, what each could have been, and whether the text ended."""
        session, new = self.model.open(1), ids
        manners_avoid = self.capabilities.avoids and body.get("repeat_penalty") != 1.0
        written: list[int] = []
        rows: list[torch.Tensor] = []
        for _ in range(n_tokens):
            rows.append(session.feed([0], [new], [1]).logits[0].float().log_softmax(-1))
            avoided = written if manners_avoid else []
            token = int(rows[-1].index_fill(0, torch.tensor(avoided).long(), -1e9).argmax())
            written.append(token)
            new = [token]
            if token in self.model.tokenizer.end_ids:
                return written, rows, True
            if any(stop in self._text(written) for stop in body.get("stop", [])):
                return written, rows, True
        return written, rows, False

    def _prompt_rows(self, ids: list[int]) -> list[torch.Tensor | None]:
        if len(ids) < 2:
            return [None] * len(ids)
        logits = self.model.open(1).feed([0], [ids], [len(ids)]).logits
        return [None, *logits[:-1].float().log_softmax(-1)]

    def _token(self, token_id: int, named: bool) -> str:
        return f"token_id:{token_id}" if named else self._text([token_id])

    def _text(self, ids: Sequence[int]) -> str:
        return self.model.tokenizer.decode(ids).decode("utf-8", "replace")


def _number(logprob: torch.Tensor) -> float:
    return max(float(logprob), -9999.0)  # JSON cannot hold -inf


def _top(
    row: torch.Tensor, k: int, given: int, also: Sequence[int] = ()
) -> list[tuple[int, float]]:
    """The k likeliest tokens, all for -1, or ``also``; and the given one in any case."""
    if also:
        return [(i, _number(row[i])) for i in dict.fromkeys([*also, given])]
    if k == -1:
        chosen = list(range(len(row)))
    else:
        chosen = row.topk(min(k, len(row))).indices.tolist()
        chosen += [given] if given not in chosen else []
    return [(i, _number(row[i])) for i in chosen]


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # whoever was there may be gone
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVllm
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for an acknowledgement of its head

    def setup(self) -> None:
        super().setup()
        with self.fake._lock:
            if self.server is not self.fake._server or self.fake._ended.is_set():
                _shut(self.request)  # it was accepted by one that has died
            self.fake._open.add(self.request)

    def finish(self) -> None:
        with self.fake._lock:
            self.fake._open.discard(self.request)
        with contextlib.suppress(OSError):  # the client may be gone
            super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the client is gone, or we are

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path != "/v1/models" or not self.fake.capabilities.lists:
            return self._send(404, {"detail": "Not Found"})
        self._send(200, {"data": [{**self.fake.card(), "created": id(self)}]})

    def do_POST(self) -> None:
        fake = self.fake
        content = self.rfile.read(int(self.headers["content-length"]))
        if self.fake._ended.is_set():
            raise ConnectionResetError("dead")
        body = json.loads(content)
        if fake.api_key and self.headers.get("authorization") != f"Bearer {fake.api_key}":
            return self._send(401, {"error": "Unauthorized"})
        fault = fake.faults.popleft() if fake.faults else None
        if fault is not None and self._misbehave(fault):
            return
        fake._busy += 1
        fake.together = max(fake.together, fake._busy)
        try:
            fake.before_answer()
            answer = fake.complete(body)
        except Refused as refused:
            message = {"message": str(refused), "code": refused.status}
            return self._send(refused.status, {"error": message})
        finally:
            fake._busy -= 1
        if fault == "no choices":
            answer["choices"] = 3
        if fault == "no logprobs":
            for choice in answer["choices"]:
                choice["logprobs"] = None
        self._send(200, answer, fault)

    def _misbehave(self, fault: Fault) -> bool:
        """Do what goes wrong before there is an answer; whether that was all."""
        if fault == "stall":
            self.fake.wait_until_end(20)
        elif fault == "429":
            self._send(429, {"error": {"message": "Slow down."}}, retry_after="1")
        elif fault in ("500", "503"):
            self._send(int(fault), {"error": {"message": "EngineCore encountered an issue."}})
        elif fault == "garbage":
            self._write(200, b"<html>It works!</html>", 22)
        elif fault != "hang up":
            return False
        if fault in ("stall", "hang up"):
            self.close_connection = True
        return True

    def _send(
        self, status: int, value: Any, fault: Fault | None = None, retry_after: str | None = None
    ) -> None:
        content = json.dumps(value).encode()
        if fault == "cut":
            self._write(status, content[: len(content) // 2], len(content))
            self.close_connection = True
        elif fault == "drip":
            self._write(status, b"", len(content))
            for i in range(len(content)):
                if self.fake._ended.wait(0.05):
                    break
                self.wfile.write(content[i : i + 1])
                self.wfile.flush()
        else:
            self._write(status, content, len(content), retry_after)

    def _write(
        self, status: int, content: bytes, length: int, retry_after: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length))
        if retry_after is not None:
            self.send_header("retry-after", retry_after)
        if not self.fake.capabilities.keeps_alive:
            self.send_header("connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

"""One server over HTTP: keep-alive, time-outs, retries, and errors in one sentence.

Every request asks for something that is computed anew and changes nothing, so each may be sent
again. After a failure, or on a connection that had to be opened anew, the server may be another
one. A connection does not outlive the process behind it: so an answer is used if it came on a
connection that :attr:`Server.check` has passed on, or after the opening of which it has passed.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic_core import from_json

try:
    import httpcore
    import tenacity
except ImportError as error:
    from multicolm.errors import ModelError

    raise ModelError(
        "models in a server need httpcore and tenacity: pip install 'multicolm[remote]'."
    ) from error

from multicolm.backend.remote.connections import (
    KEPT,
    Deadline,
    Events,
    TooLong,
    WronglyEncoded,
    ascii_url,
    connections,
    read_body,
)
from multicolm.backend.remote.service import Service
from multicolm.errors import ConfigError
from multicolm.keys import check_key

__all__ = ["Server"]

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_COMPLAINT = 1 << 16  # bytes
# Of an answer as it is written, per value of it: an empty list takes three bytes there, and a
# hundred in memory.
_BYTES_PER_VALUE = 8


class _Failed(Exception):
    """One attempt failed in a way that another one may not.

    Args:
        reason: what happened.
        status: of the answer, if there was one.
        pause: how long the server asks to wait, in seconds.
        retries: how many more attempts it is worth.
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        pause: float | None = None,
        *,
        retries: float = math.inf,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.pause = pause
        self.retries = retries


@dataclass(frozen=True, slots=True)
class _Request:
    """One request, and what it may take.

    Attributes:
        method: of HTTP.
        path: such as ``/v1/models``.
        content: its body.
        what: it is, for messages.
        limit: seconds that an attempt may take.
        slow_retries: how often it is sent again after an attempt that took all of them.
        most: bytes that an answer may have.
        final_500: whether HTTP status 500 counts as an answer.
    """

    method: str
    path: str
    content: bytes | None
    what: str
    limit: float
    slow_retries: int
    most: int
    final_500: bool


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back.

    Attributes:
        status: of HTTP.
        headers: by names in small letters.
        content: its body.
        opened: the event that its connection was opened, if that gives reason to doubt; else 0.
        keeps_alive: whether the connection is kept.
        read: the JSON object that the body is, once it was read.
    """

    status: int
    headers: dict[str, str]
    content: bytes
    opened: int
    keeps_alive: bool
    read: dict[str, Any] = field(default_factory=dict)


class Server(Service):
    """A server that runs a model.

    Args:
        url: its address; a ``/v1`` at the end makes no difference.
        model: name of the model in the ensemble, for messages.
        api_key: sent as a bearer token.
        timeout: seconds that a request may take in all.
        connect_timeout: seconds that connecting may take.
        retries: how often a request that failed is sent again; once if it ran out of time.
        sleep: waits some seconds between attempts.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        retries: int = 2,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(url.rstrip("/").removesuffix("/v1").rstrip("/"), model)
        if api_key is not None:
            check_key(api_key, f"model '{model}': api_key", "give None if it asks for none")
        self._timeout = timeout
        self._retries = retries
        self._sleep = sleep
        self._keeps_alive = False
        self._asked_at = time.monotonic()
        # What any thread saw happen, in order: openings of connections, and failures; the last
        # failure, and the last event before a check that passed.
        self._events = Events()
        self._failed = 0
        self._checked = 0
        self._checking = threading.Lock()
        self._own = _OfThread()
        self._connect_timeout = connect_timeout
        self._headers: dict[bytes | str, bytes | str] = {
            "Accept": "application/json",
            "Accept-Encoding": "gzip",
            "Content-Type": "application/json",
            "User-Agent": "multicolm",
        }
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._deadline = Deadline()
        try:
            self._base = ascii_url(self.url)
        except UnicodeError as error:
            raise ConfigError(f"model '{model}': url: no server is called {self.url}.") from error
        self._connections = connections(self._base, self._deadline, self._events)
        weakref.finalize(self, self._connections.close)

    @property
    def n_calls(self) -> int:
        """How many requests this thread has sent, attempts included."""
        return self._own.n_calls

    def get(self, path: str, what: str, *, most: int) -> dict[str, Any]:
        """See :meth:`multicolm.backend.remote.service.Service.get`."""
        return self._ask("GET", path, None, what, most=most, final_500=True)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        what: str,
        *,
        most: int,
        timeout: float | None = None,
        final_500: bool = False,
    ) -> dict[str, Any]:
        """See :meth:`multicolm.backend.remote.service.Service.post`."""
        content = json.dumps(body).encode()
        return self._ask(
            "POST", path, content, what, most=most, timeout=timeout, final_500=final_500
        )

    def _ask(
        self,
        method: str,
        path: str,
        content: bytes | None,
        what: str,
        *,
        most: int,
        timeout: float | None = None,
        final_500: bool,
    ) -> dict[str, Any]:
        request = _Request(
            method,
            path,
            content,
            f"{method} {path} ({what})",
            limit=max(self._timeout, timeout or 0.0),
            # What may take longer than usual has had its time.
            slow_retries=min(1, self._retries) if timeout is None else 0,
            most=most,
            final_500=final_500,
        )
        if not self._own.is_checking:
            self._own.end = time.monotonic() + request.limit * (1 + self._retries)
        for n_checks in itertools.count():
            checked = self._checked
            answer = self._try(request)
            # Where no connection is kept, a check and the answer after it cannot share one.
            opened = answer.opened if answer.keeps_alive or not n_checks else 0
            doubt = max(opened, self._failed)
            if self._own.is_checking or checked >= doubt:
                break
            # On another connection, it may have been another one that answered.
            self._own.opened = -1
            self._see_that_it_is_the_same(doubt)
            if self.check is None or self._own.opened == answer.opened:
                break
        return answer.read

    def _try(self, request: _Request) -> _Answer:
        """Send a request until it is answered, or is not worth it."""
        n_failed = 0

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal n_failed
            n_failed += 1
            self._failed = max(self._failed, self._events.new())

        attempts = tenacity.Retrying(
            stop=self._gives_up,
            wait=_pause,
            retry=tenacity.retry_if_exception_type(_Failed),
            after=count,
            sleep=self._wait,
            reraise=True,
        )
        try:
            return attempts(self._attempt, request)
        except _Failed as failed:
            times = "" if n_failed == 1 else f" (tried {n_failed} times)"
            advice = f"{times}. See that it runs, then call again."
            raise self.error(request.what, f"{failed}{advice}", failed.status) from failed

    def _wait(self, seconds: float) -> None:
        """Pause between two attempts, at no cost to their own time."""
        begin = time.monotonic()
        self._sleep(seconds)
        self._own.end += time.monotonic() - begin

    def _see_that_it_is_the_same(self, doubt: int) -> None:
        """Ask who answers, if nobody has since an event; a check that fails will be made again."""
        # Another thread may be at it; its time is not this one's.
        if not self._checking.acquire(timeout=max(0.0, self._own.end - time.monotonic())):
            raise self.error("check after a new connection", "no whole answer in time.")
        try:
            if self._checked < doubt:
                last = self._events.last
                if self.check is not None:
                    self._own.is_checking = True
                    self.check()
                self._checked = last
        finally:
            self._own.is_checking = False
            self._checking.release()

    def _gives_up(self, state: tenacity.RetryCallState) -> bool:
        """After the last attempt, and where more of them would take too long."""
        failed = state.outcome.exception() if state.outcome else None
        if not isinstance(failed, _Failed):
            return False
        if failed.pause is not None and failed.pause > self._timeout:
            return True
        return state.attempt_number > min(self._retries, failed.retries)

    def _attempt(self, request: _Request) -> _Answer:
        self._own.n_calls += 1
        answer = self._exchange(request)
        status, content = answer.status, answer.content
        if status != 200:
            reason = f"HTTP {status}: {_message(content)}"
            if status in _BUSY and not (request.final_500 and status == 500):
                pause = _retry_after(answer.headers)
                asks = "" if pause is None else f" (it asks to wait {pause:g} s)"
                raise _Failed(f"{reason}{asks}", status, pause)
            raise self.error(request.what, reason, status)
        n_values = sum(map(content.count, (b",", b"[", b"{")))
        if n_values > request.most // _BYTES_PER_VALUE:
            raise self.error(
                request.what,
                f"the answer has some {n_values} values, and what was asked for has "
                f"{request.most // _BYTES_PER_VALUE} at the most",
            )
        try:
            # It has a limit of depth, and takes no text that is none.
            read = from_json(content)
        except ValueError as error:
            raise _Failed(f"the answer is no JSON ({_shorten(content)})") from error
        if not isinstance(read, dict):
            raise self.error(request.what, f"the answer is no JSON object ({_shorten(content)})")
        return replace(answer, read=read)

    def _exchange(self, request: _Request) -> _Answer:
        """Send a request once, and read the answer as long as the time lasts."""
        limit = request.limit
        try:
            return self._send(request)
        except httpcore.TimeoutException as error:
            what = (
                "no connection" if isinstance(error, httpcore.ConnectTimeout) else "no whole answer"
            )
            raise _Failed(
                f"{what} in time (the limit is {limit:g} s)", retries=request.slow_retries
            ) from error
        except httpcore.ConnectError as error:
            raise _Failed(f"it cannot be reached ({error})") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
            raise _Failed(f"the connection broke ({error})") from error
        except WronglyEncoded as error:
            raise _Failed(f"the answer is compressed wrongly ({error})") from error
        except TooLong as error:
            raise self.error(
                request.what,
                f"the answer does not end: what was asked for has {request.most} bytes at the most",
            ) from error

    def _send(self, request: _Request) -> _Answer:
        self._deadline.end = min(time.monotonic() + request.limit, self._own.end)
        with self._connections.stream(
            request.method,
            f"{self._base}{request.path}",
            headers=self._headers,
            content=request.content,
            extensions={"timeout": {"connect": self._connect_timeout, "pool": request.limit}},
        ) as response:
            opened = response.extensions["network_stream"].get_extra_info("opened")
            headers = {
                name.decode("ascii", "replace").lower(): value.decode("latin-1")
                for name, value in response.headers
            }
            encoding = headers.get("content-encoding", "").strip().lower()
            parts = response.iter_stream()
            if response.status == 200:
                content = read_body(parts, encoding, request.most)
            else:
                content = _beginning(parts, encoding)
        closes = "close" in headers.get("connection", "").lower()
        keeps_alive = response.extensions["http_version"] != b"HTTP/1.0" and not closes
        # Of a server that keeps connections, a new one is a sign. Of one that keeps none, time in
        # which nobody asked is: no model is loaded in less without a request that fails.
        was_away = time.monotonic() - self._asked_at > KEPT
        opened = opened if self._keeps_alive or was_away else 0
        self._asked_at = time.monotonic()
        self._keeps_alive |= keeps_alive
        self._own.opened = opened
        return _Answer(response.status, headers, content, opened, keeps_alive)


class _OfThread(threading.local):
    """What a thread knows of its own requests: several texts may be written at once.

    Attributes:
        n_calls: that it sent.
        is_checking: whether it is about to find out who answers.
        end: when its request has to be over, further attempts and checks included, in seconds of
            the monotonic clock.
        opened: the event that the connection of its last answer was opened.
    """

    n_calls = 0
    is_checking = False
    end = math.inf
    opened = 0


def _pause(state: tenacity.RetryCallState) -> float:
    """Half a second, then twice as long each time, or what the server asks for."""
    failed = state.outcome.exception() if state.outcome else None
    if isinstance(failed, _Failed) and failed.pause is not None:
        return failed.pause
    # Clients that failed together do not all come back together.
    return min(8.0, 0.5 * 2.0 ** (state.attempt_number - 1)) + random.uniform(0.0, 0.25)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from a header that holds them or a date."""
    given = headers.get("retry-after")
    if given is None:
        return None
    if given.strip().isascii() and given.strip().isdecimal():
        return float(given)
    try:
        then = parsedate_to_datetime(given)
        if then.tzinfo is None:
            then = then.replace(tzinfo=timezone.utc)
        return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())
    except (ArithmeticError, TypeError, ValueError):  # no date, or one that is beyond all others
        return None


def _beginning(parts: Iterator[bytes], encoding: str) -> bytes:
    """As much of what a server says is wrong as a message may need."""
    try:
        return read_body(parts, encoding, _LONGEST_COMPLAINT)
    except TooLong as long:
        return long.beginning


def _message(content: bytes) -> str:
    """What a server says is wrong, as the usual forms of its body have it."""
    try:
        body = from_json(content)
    except ValueError:
        return _shorten(content)
    if isinstance(body, dict):
        said = body.get("error", body.get("detail", body.get("message")))
        said = said.get("message") if isinstance(said, dict) else said
        if isinstance(said, str):
            return _cut(said, 300)
    return _shorten(content)


def _shorten(content: bytes) -> str:
    return _cut(content[:400].decode("utf-8", "replace"), 120) or "an empty body"


def _cut(text: str, length: int) -> str:
    """A text on one line, of so many characters at the most."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 4]} ..."

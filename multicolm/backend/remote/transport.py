"""One server over HTTP: keep-alive, time-outs, retries, and errors in one sentence.

Every request asks for something that is computed anew and changes nothing, so each may be sent
again. After a failure, or on a connection that had to be opened anew, the server may be another
one: no answer is used from then on until :attr:`Server.check` has found that it is not.
"""

from __future__ import annotations

import json
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

try:
    import httpx
    import tenacity
except ImportError as error:
    from multicolm.errors import ModelError

    raise ModelError(
        "models in a server need httpx and tenacity: pip install 'multicolm[remote]'."
    ) from error

from multicolm.backend.remote.service import Service
from multicolm.keys import check_key

__all__ = ["Server"]

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_BODY = 1 << 30  # bytes
_CONNECTED = "connection.connect_tcp.complete"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Failed(Exception):
    """One attempt failed in a way that another one may not.

    Args:
        reason: what happened.
        status: of the answer, if there was one.
        pause: how long the server asks to wait, in seconds.
        slow: whether it cost all the time that it may take.
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        pause: float | None = None,
        *,
        slow: bool = False,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.pause = pause
        self.slow = slow


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
        # Reasons to doubt that it is the same model, found by any thread; and how many of them a
        # check has done away with.
        self._n_doubts = 0
        self._n_settled = 0
        self._doubting, self._checking = threading.Lock(), threading.Lock()
        self._own = _OfThread()
        self._client = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout, connect=connect_timeout),
            # A proxy cannot reach this machine's own servers.
            trust_env=httpx.URL(self.url).host not in _LOOPBACK,
        )
        weakref.finalize(self, self._client.close)

    @property
    def n_calls(self) -> int:
        """How many requests this thread has sent, attempts included."""
        return self._own.n_calls

    def get(self, path: str, what: str) -> dict[str, Any]:
        """See :meth:`multicolm.backend.remote.service.Service.get`."""
        return self._ask("GET", path, None, what, None, final_500=True)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        what: str,
        *,
        timeout: float | None = None,
        final_500: bool = False,
    ) -> dict[str, Any]:
        """See :meth:`multicolm.backend.remote.service.Service.post`."""
        return self._ask("POST", path, body, what, timeout, final_500)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        what: str,
        timeout: float | None,
        final_500: bool,
    ) -> dict[str, Any]:
        request = f"{method} {path} ({what})"
        n_failed = 0

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal n_failed
            n_failed += 1
            self._doubt()

        attempts = tenacity.Retrying(
            stop=self._gives_up,
            wait=_pause,
            retry=tenacity.retry_if_exception_type(_Failed),
            after=count,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            answer = attempts(self._attempt, method, path, body, timeout, request, final_500)
        except _Failed as failed:
            times = "" if n_failed == 1 else f" (tried {n_failed} times)"
            advice = f"{times}. See that it runs, then call again."
            raise self.error(request, f"{failed}{advice}", failed.status) from failed
        if self._n_settled < self._n_doubts and not self._own.is_checking:
            self._see_that_it_is_the_same()
        return answer

    def _doubt(self) -> None:
        with self._doubting:
            self._n_doubts += 1

    def _see_that_it_is_the_same(self) -> None:
        """Ask who answers; a check that fails settles nothing, and will be made again."""
        with self._checking:
            n_doubts = self._n_doubts
            if self.check is not None and self._n_settled < n_doubts:
                self._own.is_checking = True
                try:
                    self.check()
                finally:
                    self._own.is_checking = False
            self._n_settled = n_doubts

    def _gives_up(self, state: tenacity.RetryCallState) -> bool:
        """After the last attempt, and where more of them would take too long."""
        failed = state.outcome.exception() if state.outcome else None
        if not isinstance(failed, _Failed):
            return False
        if failed.pause is not None and failed.pause > self._timeout:
            return True
        return state.attempt_number > (min(1, self._retries) if failed.slow else self._retries)

    def _attempt(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout: float | None,
        request: str,
        final_500: bool,
    ) -> dict[str, Any]:
        self._own.n_calls += 1
        limit = max(self._timeout, timeout or 0.0)
        try:
            status, headers, content = self._exchange(method, path, body, limit)
        except httpx.TimeoutException as error:
            what = "no connection" if isinstance(error, httpx.ConnectTimeout) else "no whole answer"
            raise _Failed(f"{what} in time (the limit is {limit:g} s)", slow=True) from error
        except httpx.ConnectError as error:
            raise _Failed(f"it cannot be reached ({error})") from error
        except httpx.TransportError as error:
            raise _Failed(f"the connection broke ({error})") from error
        except httpx.DecodingError as error:
            raise _Failed(f"the answer is compressed wrongly ({error})") from error
        if status != 200:
            reason = f"HTTP {status}: {_message(content)}"
            if status in _BUSY and not (final_500 and status == 500):
                pause = _retry_after(headers)
                asks = "" if pause is None else f" (it asks to wait {pause:g} s)"
                raise _Failed(f"{reason}{asks}", status, pause)
            raise self.error(request, reason, status)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _Failed(f"the answer is no JSON ({_shorten(content)})") from error
        if not isinstance(answer, dict):
            raise self.error(request, f"the answer is no JSON object ({_shorten(content)})")
        return answer

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, limit: float
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request, and read the answer as long as the time lasts."""
        end = time.monotonic() + limit
        content = bytearray()
        events: set[str] = set()
        with self._client.stream(
            method,
            f"{self.url}{path}",
            json=body,
            timeout=httpx.Timeout(limit, connect=self._client.timeout.connect),
            extensions={"trace": lambda event, _: events.add(event)},
        ) as response:
            for chunk in response.iter_bytes():
                content += chunk
                # A server that sends byte after byte never runs into the time-out of reading.
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the answer comes too slowly")
                if len(content) > _LONGEST_BODY:
                    raise httpx.ReadError("the answer does not end")
        # A server that keeps no connection says so; of another, a new one is a sign.
        if self._keeps_alive and _CONNECTED in events:
            self._doubt()
        closes = "close" in response.headers.get("connection", "").lower()
        self._keeps_alive = response.http_version != "HTTP/1.0" and not closes
        return response.status_code, dict(response.headers), bytes(content)


class _OfThread(threading.local):
    """What a thread knows of its own requests: several texts may be written at once.

    Attributes:
        n_calls: that it sent.
        is_checking: whether it is about to find out who answers.
    """

    n_calls = 0
    is_checking = False


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


def _message(content: bytes) -> str:
    """What a server says is wrong, as the usual forms of its body have it."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return _shorten(content)
    if isinstance(body, dict):
        told = body.get("error", body.get("detail", body.get("message")))
        told = told.get("message") if isinstance(told, dict) else told
        if isinstance(told, str):
            return _cut(told, 300)
    return _shorten(content)


def _shorten(content: bytes) -> str:
    return _cut(content[:400].decode("utf-8", "replace"), 120) or "an empty body"


def _cut(text: str, length: int) -> str:
    """A text on one line, of so many characters at the most."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 4]} ..."

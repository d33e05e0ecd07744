"""HTTP connections on which no request outlasts its deadline, whatever the server does.

The time-out of a socket begins anew with every byte, and an HTTP client sees an answer only when a
part of it is whole: a head that comes byte by byte, or interim answers without end, never become
one. So the deadline is kept where the bytes are: each connect, handshake, read and write has what
is left of it. Names are resolved within it too.
"""

from __future__ import annotations

import math
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore

__all__ = [
    "KEPT",
    "Deadline",
    "Events",
    "TooLong",
    "WronglyEncoded",
    "ascii_url",
    "connections",
    "read_body",
]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEPT = 5.0
"""Seconds that a connection without a request stays open."""

# So little is sent in one go, or not at all: a peer that takes byte after byte gains no time.
_PIECE = 1 << 14
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32


class TooLong(Exception):
    """A body has more bytes than it may have.

    Attributes:
        beginning: as many of them.
    """

    def __init__(self, beginning: bytes) -> None:
        super().__init__("too long")
        self.beginning = beginning


class WronglyEncoded(Exception):
    """A body is not compressed as its head says; the message says in what."""


class Deadline(threading.local):
    """When this thread's request has to be over.

    Attributes:
        end: in seconds of the monotonic clock.
    """

    end = math.inf

    def left(self, most: float | None = None) -> float:
        """Seconds until then, and ``most`` at the most.

        Raises:
            httpcore.ReadTimeout: if there are none.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return left if most is None else min(left, most)


class Events:
    """Numbers what happens to connections, in order.

    Attributes:
        last: the number of the last event.
    """

    def __init__(self) -> None:
        self.last = 0
        self._lock = threading.Lock()

    def new(self) -> int:
        """The number of one that happens now."""
        with self._lock:
            self.last += 1
            return self.last


class _Stream(httpcore.NetworkStream):
    """A connection that is closed to a request whose deadline has passed.

    ``get_extra_info("opened")`` is the number of the event that it was opened.
    """

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline, opened: int) -> None:
        self._stream = stream
        self._deadline = deadline
        self._opened = opened

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE):
            self._stream.write(buffer[start : start + _PIECE], self._deadline.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(timeout)
        stream = self._stream.start_tls(ssl_context, server_hostname, left)
        return _Stream(stream, self._deadline, self._opened)

    def get_extra_info(self, info: str) -> Any:
        return self._opened if info == "opened" else self._stream.get_extra_info(info)


class _Backend(httpcore.SyncBackend):
    """Connects within the deadline."""

    def __init__(self, deadline: Deadline, events: Events) -> None:
        self._deadline = deadline
        self._events = events

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        # A name may have several addresses, and the time is that of all of them.
        until = math.inf if timeout is None else time.monotonic() + timeout
        found = _addresses(host, port, self._deadline.left(timeout))
        failed: Exception = httpcore.ConnectError("the name has no address")
        for *_, address in found:
            left = self._deadline.left(max(1e-3, until - time.monotonic()))
            try:
                stream = super().connect_tcp(
                    str(address[0]), port, left, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
            else:
                return _Stream(stream, self._deadline, self._events.new())
        raise failed


def _addresses(host: str, port: int, seconds: float) -> list[Any]:
    """The addresses of a name, as :func:`socket.getaddrinfo` gives them.

    That function has no time-out, so it runs in a thread that is left alone when the time is over.

    Raises:
        httpcore.ConnectTimeout: if they are not found in time.
        httpcore.ConnectError: if there are none.
    """
    found: SimpleQueue[list[Any] | Exception] = SimpleQueue()

    def resolve() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=resolve, name="multicolm-resolver", daemon=True).start()
    try:
        addresses = found.get(timeout=seconds)
    except Empty as error:
        raise httpcore.ConnectTimeout(f"the name {host} is not resolved in time") from error
    if isinstance(addresses, Exception):
        raise httpcore.ConnectError(str(addresses)) from addresses
    return addresses


def ascii_url(url: str) -> str:
    """A URL as it is sent: a host and a path of other characters are encoded.

    Raises:
        UnicodeError: if there can be no such host.
    """
    parts = urlsplit(url)
    host = parts.netloc.encode("idna").decode()
    return parts._replace(netloc=host, path=quote(parts.path, safe="/%:@!$&'()*+,;=~")).geturl()


def connections(url: str, deadline: Deadline, events: Events) -> httpcore.ConnectionPool:
    """Connections to the server of a URL, through the proxy that the environment names."""
    return httpcore.ConnectionPool(
        ssl_context=httpcore.default_ssl_context() if url.startswith("https:") else None,
        proxy=_proxy(url),
        max_connections=None,
        keepalive_expiry=KEPT,
        network_backend=_Backend(deadline, events),
    )


def _proxy(url: str) -> httpcore.Proxy | None:
    """The proxy of ``HTTP_PROXY`` and its like; this machine's own servers are not behind one."""
    parts = urlsplit(url)
    host, proxies = parts.hostname or "", getproxies()
    proxy = proxies.get(parts.scheme, proxies.get("all"))
    if not proxy or host in _LOOPBACK or proxy_bypass(host):
        return None
    given = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    auth = (unquote(given.username), unquote(given.password or "")) if given.username else None
    return httpcore.Proxy(given._replace(netloc=given.netloc.rpartition("@")[2]).geturl(), auth)


def read_body(parts: Iterator[bytes], encoding: str, most: int) -> bytes:
    """The body of an answer, as it was before it was compressed.

    Args:
        parts: of it, as they come.
        encoding: what its head says of that.
        most: bytes that it may have.

    Raises:
        TooLong: if it has more, found out before it takes more memory than that.
        WronglyEncoded: if it is not encoded as ``encoding`` says, or in a way nobody asked for.
    """
    content = bytearray()
    if encoding in ("", "identity"):
        for part in parts:
            content += part
            if len(content) > most:
                raise TooLong(bytes(content[:most]))
        return bytes(content)
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise WronglyEncoded(f"'{encoding[:40]}' was not asked for")
    decoder = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        for part in parts:
            while part:
                content += decoder.decompress(part, most + 1 - len(content))
                if len(content) > most:
                    raise TooLong(bytes(content[:most]))
                part = decoder.unconsumed_tail
            if decoder.unused_data:
                raise WronglyEncoded("it continues after its end")
    except zlib.error as error:
        raise WronglyEncoded(str(error)) from error
    if not decoder.eof:
        raise WronglyEncoded("it ends too early")
    return bytes(content)

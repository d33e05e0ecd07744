"""Servers that mean harm, on real sockets of the loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from multicolm.backend.remote.transport import Server

__all__ = ["asking", "drip", "flood", "speaking"]

Talk = Callable[[socket.socket, threading.Event], None]
"""Has its way with a connection until it is closed, or the event is set."""


@contextmanager
def speaking(*talks: Talk) -> Iterator[str]:
    """The address of a server that does one of these with each connection, in turn."""
    ended = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def run(talk: Talk, connection: socket.socket) -> None:
        # Whoever asks goes away in the middle: that is what these tests are for.
        with contextlib.suppress(OSError), connection:
            connection.settimeout(5)
            talk(connection, ended)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the test is over
            while True:
                connection, _ = listening.accept()
                talk = talks[len(threads) % len(talks)]
                threads.append(threading.Thread(target=run, args=(talk, connection)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)  # wakes up who waits for a connection
        listening.close()
        for thread in (accepting, *threads):
            thread.join()


def drip(head: bytes, drop: bytes, seconds: float = 0.02) -> Talk:
    """Says ``head``, and then ``drop`` again and again, with pauses."""

    def talk(connection: socket.socket, ended: threading.Event) -> None:
        connection.recv(1 << 16)
        connection.sendall(head)
        while not ended.wait(seconds):
            connection.sendall(drop)

    return talk


def flood(head: bytes, drop: bytes) -> Talk:
    """Says ``head``, and then ``drop`` as often as goes through."""

    def talk(connection: socket.socket, ended: threading.Event) -> None:
        connection.recv(1 << 16)
        connection.sendall(head)
        while not ended.is_set():
            connection.sendall(drop * (1 + (1 << 14) // len(drop)))

    return talk


def asking(
    url: str, *, timeout: float = 0.2, retries: int = 1, connect_timeout: float = 1.0
) -> Server:
    """Who asks, in vain; pauses cost no time."""
    return Server(
        url,
        "facts",
        timeout=timeout,
        connect_timeout=connect_timeout,
        retries=retries,
        sleep=lambda _: None,
    )

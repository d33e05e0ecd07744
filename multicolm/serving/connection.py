"""One connection of a client, which has to say in time what it wants, and to read what it gets."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["connections"]

_LEAST_PER_SECOND = 1024  # bytes that a client has to read of what is written to it


class _Connection(H11Protocol):
    """Closed if the head of a request takes too long, or the client does not read its reply.

    uvicorn waits for both for ever, so that clients who send bit by bit, or read nothing, could use
    up all file handles, and keep in memory what was written for them. Nothing waits to be sent
    here but the last piece of a reply: whoever writes one waits until the client has read so far.
    """

    head_seconds: ClassVar[float]
    send_seconds: ClassVar[float]
    _too_late: asyncio.TimerHandle | None = None
    _too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect()  # of a connection that is kept alive, the next head has begun
        else:
            self._expect_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._expect_no_more()
        self._watch_no_more()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """See :class:`asyncio.Protocol`."""
        self._watch_no_more()
        super().resume_writing()

    def _expect(self) -> None:
        if self._too_late is None:
            self._too_late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _expect_no_more(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None

    def _watch(self) -> None:
        """See to it that less and less waits to be read."""
        most = self.transport.get_write_buffer_size() - self.send_seconds * _LEAST_PER_SECOND
        self._too_slow = self.loop.call_later(self.send_seconds, self._check, most)

    def _watch_no_more(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None

    def _check(self, most: float) -> None:
        if self.transport.get_write_buffer_size() > most:
            self.transport.abort()  # to close it would wait until all is read
        else:
            self._watch()


def connections(head_seconds: float, send_seconds: float) -> type[asyncio.Protocol]:
    """What uvicorn makes connections with.

    Args:
        head_seconds: until the head of a request is here.
        send_seconds: after which a client that reads nothing, or next to nothing, is given up.
    """
    return type(
        "Connection", (_Connection,), {"head_seconds": head_seconds, "send_seconds": send_seconds}
    )

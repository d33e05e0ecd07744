"""One connection of a client, which has to say in time what it wants."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["connections"]


class _Connection(H11Protocol):
    """Closed if the head of a request takes too long.

    uvicorn waits for it for ever, so that clients who send it bit by bit, or not at all, could use
    up all file handles.
    """

    head_seconds: ClassVar[float]
    _too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
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
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._too_late is None:
            self._too_late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _expect_no_more(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None


def connections(head_seconds: float) -> type[asyncio.Protocol]:
    """What uvicorn makes connections with.

    Args:
        head_seconds: until the head of a request is here.
    """
    return type("Connection", (_Connection,), {"head_seconds": head_seconds})

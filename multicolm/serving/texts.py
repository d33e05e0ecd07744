"""The texts of one request, on their way from the engine's thread to the client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio.to_thread

from multicolm.errors import BusyError, MulticolmError
from multicolm.serving.engine import Engine
from multicolm.serving.events import Begun, Ended, Event, Failed, GenerationRequest, Grown
from multicolm.serving.replies import Replies, Written, as_event
from multicolm.serving.workers import Handle
from multicolm.types import Trace

__all__ = ["Places", "Texts"]

_LOG = logging.getLogger("multicolm.serving")


class Places:
    """The places of an engine: taken before prompts are read, and until the client has the texts.

    So prompts that wait for a tokenizer, and what is written and not read yet, are never more than
    there are places; the engine's own are free as soon as it has written a text.

    Args:
        engine: writes the texts.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._n_taken = 0

    def take(self, n: int) -> None:
        """Take so many.

        Raises:
            BusyError: if so many are not free.
        """
        most = self._engine.capacity
        if self._n_taken + n > most:
            raise BusyError(
                f"{self._n_taken} of {most} places are taken; ask again later.",
                retry_after=self._engine.time_to_wait(),
            )
        self._n_taken += n

    def give_back(self, n: int) -> None:
        """Let others take them."""
        self._n_taken -= n


class Texts:
    """The texts of one request.

    Args:
        engine: writes them.
        places: for them; they are taken until :meth:`close`.
        n: how many there are.

    Raises:
        BusyError: if there is no place for them.
    """

    def __init__(self, engine: Engine, places: Places, n: int) -> None:
        self._engine = engine
        self._places = places
        self._n = n
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.written = [Written() for _ in range(n)]
        self._handles: list[Handle] = []
        self._is_closed = False
        places.take(n)

    async def close(self) -> None:
        """Give up the places, and what is not finished."""
        if self._is_closed:
            return
        self._is_closed = True
        self._places.give_back(self._n)
        for handle, written in zip(self._handles, self.written, strict=False):
            if written.answer is None:
                self._engine.cancel(handle)

    async def begin(self, requests: Sequence[GenerationRequest]) -> None:
        """Ask for the texts, and wait until all have begun.

        Args:
            requests: what is wanted; those of one prompt are side by side and have its number.

        Raises:
            ClosedError: if the server is shutting down.
            Exception: if one cannot be answered.
        """
        listeners = [self._listener(index) for index in range(len(requests))]
        self._handles = self._engine.submit(requests, listeners)
        counted: set[int] = set()
        for _ in requests:
            index, event = await self._next()
            assert isinstance(event, Begun)
            # A prompt that is answered several times counts once.
            if requests[index].number not in counted:
                counted.add(requests[index].number)
                self.written[index].n_prompt_tokens = event.n_prompt_tokens

    def _listener(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._news.put_nowait, (index, event))

        return deliver

    async def _next(self) -> tuple[int, Begun | Grown | Ended]:
        """The next news of any of the texts.

        Raises:
            Exception: if one has failed.
        """
        index, event = await self._news.get()
        if isinstance(event, Failed):
            raise event.error
        return index, event

    async def _events(
        self, first_token: Callable[[], None]
    ) -> AsyncIterator[tuple[int, Grown | Ended]]:
        """What becomes of the texts, until all are finished; each event is read when it is done.

        Raises:
            Exception: if one has failed.
        """
        n_open, is_first = self._n, True
        while n_open:
            index, event = await self._next()
            assert not isinstance(event, Begun)
            if is_first:
                first_token()
                is_first = False
            if isinstance(event, Ended):
                self.written[index].answer = event.answer
                self.written[index].n_tokens = len(event.answer.trace)
                n_open -= 1
            yield index, event
            if isinstance(event, Grown):
                self._engine.read(self._handles[index], event)

    async def finish(self, first_token: Callable[[], None]) -> None:
        """Wait until all texts are finished.

        Raises:
            Exception: if one has failed.
        """
        async for index, event in self._events(first_token):
            if isinstance(event, Grown):
                self.written[index].pieces += event.pieces
                self.written[index].tokens += event.tokens

    async def whole(self, replies: Replies) -> AsyncGenerator[bytes, None]:
        """The reply with all texts, part by part; they are finished."""
        yield replies.beginning(self.written)
        for index, written in enumerate(self.written):
            # Megabytes of JSON, in a thread: others are served meanwhile.
            choice = await anyio.to_thread.run_sync(replies.choice, index, written)
            yield b", " * (index > 0) + choice
        yield b"]}"

    async def chunks(
        self,
        replies: Replies,
        with_usage: bool,
        first_token: Callable[[], None],
        explained: Callable[[Exception], Mapping[str, Any]],
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream; an error is the last one, as ``explained`` words it."""
        try:
            if replies.kind == "chat":
                for index in range(self._n):
                    yield as_event(replies.opening(index))
            async for index, event in self._events(first_token):
                written = self.written[index]
                if isinstance(event, Grown):
                    yield as_event(replies.more(index, written, event.pieces, event.tokens))
                else:
                    yield as_event(replies.end(index, event.answer))
                    written.answer = replace(event.answer, trace=Trace(()))
                await asyncio.sleep(0)  # others are served meanwhile, however much there is to read
            if with_usage:
                yield as_event(replies.usage(self.written))
        except Exception as error:
            # A text fails with whatever a policy or a model raised. The reply has begun, so the
            # error is an event of it. The engine has logged what failed there.
            if not isinstance(error, MulticolmError):
                _LOG.error("a stream broke off", exc_info=error)
            yield as_event(explained(error))
            return
        yield as_event("[DONE]")

"""Sockets, signals, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import uvicorn

from multicolm.ensemble import Ensemble
from multicolm.errors import InputError
from multicolm.keys import check_key
from multicolm.numbers import check_number, check_whole
from multicolm.serving.app import create_app
from multicolm.serving.catalog import Catalog
from multicolm.serving.connection import connections
from multicolm.serving.engine import Closing, Engine
from multicolm.serving.limits import Limits

__all__ = ["Server", "Settings"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_SENDING = 1 << 17  # bytes on their way to a client
_SWITCH = 5e-4  # seconds that a thread keeps Python's lock while others wait for it
_LAST_WORDS = 5  # seconds for clients to read the end of what they asked for


@dataclass(frozen=True)
class Settings:
    """How an ensemble is served.

    Attributes:
        host: the address to listen at; only this machine can reach the one that is the default.
        port: 0 takes any that is free.
        api_key: that clients must show; anybody may ask if ``None``.
        allowed: see :class:`multicolm.serving.catalog.Catalog`.
        limits: what a request may be at the most.
        max_concurrent: how many texts are written at a time.
        max_waiting: how many more may wait.
        grace: seconds in which what runs may be finished when the server ends.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed: Sequence[str] | None = None
    limits: Limits = field(default_factory=Limits)
    max_concurrent: int = 16
    max_waiting: int = 64
    grace: float = 10.0

    def __post_init__(self) -> None:
        if self.api_key is not None:
            check_key(self.api_key, "api_key", "give None to let anybody ask")
        check_whole("port", self.port, least=0, below=65536)
        check_whole("max_concurrent", self.max_concurrent, least=1, below=1 << 16)
        check_whole("max_waiting", self.max_waiting, least=0, below=1 << 24)
        check_number("grace", self.grace, least=0, most=86_400)


class Server:
    """An ensemble behind a socket: :meth:`run` it, or use it as a context, in which it runs aside.

    Args:
        ensemble: whose models write; nobody else may use it meanwhile.
        name: by which clients ask for it.
        settings: how it is served.

    Attributes:
        address: where it can be reached while it runs.
        engine: writes the texts.
        catalog: which policies clients may choose.

    Raises:
        InputError: if a setting is out of range, or the address cannot be listened at.
        MulticolmError: if a policy that is allowed is not known or does not fit.
    """

    def __init__(self, ensemble: Ensemble, name: str, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self.catalog = Catalog(ensemble, name, settings.allowed)
        self.engine = Engine(
            ensemble, max_concurrent=settings.max_concurrent, max_waiting=settings.max_waiting
        )
        local = settings.host in _LOOPBACK
        app = create_app(
            self.engine,
            self.catalog,
            api_key=settings.api_key,
            limits=settings.limits,
            hosts=_LOOPBACK if local and settings.api_key is None else None,
        )
        config = uvicorn.Config(
            app,
            http=connections(settings.limits.head_seconds, settings.limits.send_seconds),
            ws="none",
            log_config=None,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.grace) + _LAST_WORDS,
        )
        self._socket = _listening(settings.host, settings.port)
        self.address = _address(settings.host, self._socket.getsockname()[1])
        self._server = _Server(config, self.engine, settings.grace)
        self._thread = threading.Thread(target=self.run, name="multicolm-server")

    def __enter__(self) -> Server:
        # It listens already: whoever asks too early waits a moment.
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._thread.join()

    def run(self, ready: Callable[[], None] = lambda: None) -> Closing:
        """Serve until it is stopped, or SIGINT or SIGTERM comes; a second one is in a hurry.

        Args:
            ready: called when it can be reached.

        Returns:
            How many texts were finished after that, and how many were broken off.
        """
        self._server.ready = ready
        with self._socket, _short_pauses(), self.engine:
            self._server.run(sockets=[self._socket])
        return self._server.closing

    def stop(self) -> None:
        """End it, from any thread."""
        self._server.should_exit = True


@contextlib.contextmanager
def _short_pauses() -> Iterator[None]:
    """Keep threads from waiting long for Python: texts grow while requests are read.

    A forward pass lets go of Python's lock in every operation, and with the usual interval waits 5
    milliseconds for each while another thread computes. A full garbage collection stops all
    threads for as long as it takes to visit every object; those of models and libraries stay.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: if there can be none.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it: what a client has not read is not kept in megabytes of the kernel.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENDING)
        return listening
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen at {_address(host, port)}: {reason}; choose another --host or --port."
        ) from error


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Ends with its engine: what runs may be finished, the rest gets an error."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._grace = grace
        self.ready: Callable[[], None] = lambda: None
        self.closing = Closing(0, 0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server and nothing else; uvicorn would raise them once more."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let nobody in, let what runs be finished, break off the rest."""
        closing = asyncio.create_task(asyncio.to_thread(self._engine.close, self._grace))
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self._engine.close)
        self.closing = await closing

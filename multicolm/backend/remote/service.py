"""What answers requests for one model: a server, or an engine in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from multicolm.errors import ServerError

__all__ = ["Service"]


class Service(ABC):
    """Answers requests in the form of an OpenAI-style API.

    Args:
        url: its address, for messages too.
        model: name of the model in the ensemble, for messages.

    Attributes:
        url: the address.
        check: called before an answer is used that another model may have given; raises
            :class:`ServerError` if it is another one.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.check: Callable[[], None] | None = None
        self._model = model

    @property
    @abstractmethod
    def n_calls(self) -> int:
        """How many requests this thread has sent, attempts included."""

    @abstractmethod
    def get(self, path: str, what: str, *, most: int) -> dict[str, Any]:
        """The JSON object at a path.

        Args:
            path: such as ``/v1/models``.
            what: it asks for, for messages.
            most: bytes that it may have.

        Raises:
            ServerError: if there is none.
        """

    @abstractmethod
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
        """The JSON object that answers a request.

        Args:
            path: such as ``/v1/completions``.
            body: the request.
            what: it asks for, for messages.
            most: bytes that the answer may have.
            timeout: seconds that it may take, if more than usual.
            final_500: whether HTTP status 500 counts as an answer: some servers give it to
                whatever they do not understand.

        Raises:
            ServerError: if the server does not answer it.
        """

    def error(self, request: str, reason: str, status: int | None = None) -> ServerError:
        """The error for a request that has no right answer."""
        return ServerError(
            f"server {self.url} of model '{self._model}': {request}: {reason}",
            server=self.url,
            status=status,
        )

"""Models in a server with an OpenAI-style API."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import ClassVar

from multicolm.backend.base import Model
from multicolm.backend.remote.probe import (
    RequestedModel,
    find_served_model,
    fingerprint,
    is_same,
    probe,
)
from multicolm.backend.remote.service import Service
from multicolm.backend.remote.session import RemoteSession
from multicolm.backend.remote.written import PromptFormat
from multicolm.config import ModelConfig
from multicolm.errors import ConfigError
from multicolm.keys import check_key
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Signal

__all__ = ["LlamaCppServerModel", "OpenAIModel", "RemoteModel", "SglangModel", "VllmModel"]


class RemoteModel(Model):
    """A model in a server; what it shows is what the server was found to return.

    Args:
        name: its name in the ensemble.
        server: the server.
        tokenizer: of the model.
        requested: what is asked of the server.
        look_ahead: maximum number of tokens to ask for at a time.
        context_length: maximum number of tokens of a text, where the server does not say.

    Raises:
        ServerError: if the server does not answer, or does not serve the model.
        VocabularyError: if it reads texts in other tokens than ``tokenizer``.
    """

    signals: ClassVar[frozenset[Signal]] = frozenset(
        {"text", "top1", "topk", "token_logprobs", "logprobs"}
    )
    backend: ClassVar[str]

    def __init__(
        self,
        name: str,
        server: Service,
        tokenizer: TokenizerAdapter,
        requested: RequestedModel | None = None,
        *,
        look_ahead: int = 16,
        context_length: int | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.server = server.url
        self._server = server
        self._look_ahead = look_ahead
        self._ids = tokenizer.encode("What is 2 + 2?")
        found = probe(server, tokenizer, requested or RequestedModel(), name)
        self._abilities = found
        self.max_top_logprobs = found.max_top_logprobs
        self.context_length = found.context_length or context_length
        # The type is the server's own affair; what is kept of one model is not taken for another's.
        self.precision = found.as_served
        self._known_by = fingerprint(server, found, self._ids)
        server.check = self._check

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> RemoteModel:
        """Load the tokenizer, and find out what the server can do.

        Raises:
            ConfigError: if the environment variable of the key is not set, or holds none.
            ModelError: if there is no tokenizer where ``model`` says.
            ServerError: if the server does not answer, or does not serve the model.
            VocabularyError: if it reads texts in other tokens than that tokenizer.
        """
        from multicolm.backend.remote.tokenizing import load
        from multicolm.backend.remote.transport import Server

        assert config.url is not None, "the configuration of a model in a server has a url"
        key = _api_key(name, config.api_key_env)
        tokenizer, context_length = load(name, config)
        server = Server(
            config.url,
            name,
            api_key=key,
            timeout=config.timeout,
            connect_timeout=config.connect_timeout,
            retries=config.retries,
            sleep=cls.sleep,
        )
        return cls(
            name,
            server,
            tokenizer,
            RequestedModel(config.served_model, config.logprobs),
            look_ahead=config.look_ahead,
            context_length=context_length,
        )

    sleep: ClassVar[Callable[[float], None]] = staticmethod(time.sleep)
    """Waits some seconds between two attempts."""

    @property
    def shows(self) -> frozenset[Signal]:
        """What the server was found to return."""
        return self._abilities.signals

    @property
    def abilities(self) -> list[str]:
        """What the server was found to do, one sentence each."""
        return [f"server {self.server}", *self._abilities.sentences()]

    def open(self, n_rows: int) -> RemoteSession:
        """A session of ``n_rows`` empty rows."""
        prompt_format = PromptFormat(
            self.tokenizer,
            takes_ids=self._abilities.takes_ids,
            returns_ids=self._abilities.max_top_logprobs != 0,
            name=self.name,
            server=self.server,
        )
        width = max(self.tokenizer.n_tokens, self._abilities.width)
        return RemoteSession(
            self._server, self._abilities, prompt_format, self.name, width, n_rows, self._look_ahead
        )

    def _check(self) -> None:
        """See that it is still the same model that answers.

        Raises:
            ServerError: if it is another one.
        """
        listed = find_served_model(self._server, self._abilities.served_model)
        now = fingerprint(self._server, self._abilities, self._ids)
        if listed.root != self._abilities.root or not is_same(self._known_by, now):
            raise self._server.error(
                "check after a new connection",
                f"'{self._abilities.served_model}' is another model now than when the ensemble "
                "was loaded, and no text is written with two; start the server with the model of "
                "before, or load the ensemble again.",
            )


class VllmModel(RemoteModel):
    """A model in a vLLM server."""

    backend = "vllm"


class SglangModel(RemoteModel):
    """A model in an SGLang server, as far as its OpenAI-style API goes."""

    backend = "sglang"


class LlamaCppServerModel(RemoteModel):
    """A model in llama.cpp's ``llama-server``, or in llama-cpp-python's own."""

    backend = "llama-cpp-server"


class OpenAIModel(RemoteModel):
    """A model in any server with ``/v1/completions``."""

    backend = "openai"


def _api_key(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    where = f"models.{name}.api_key_env: the environment variable {variable}"
    key = os.environ.get(variable)
    if key is None:
        raise ConfigError(f"{where} is not set; set it to the server's key.")
    # Whoever complains about a header shows it: it must not come to that.
    return check_key(key, where, "leave `api_key_env` out if the server asks for none")

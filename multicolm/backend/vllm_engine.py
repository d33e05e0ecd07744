"""vLLM in this process, where it is installed: the engine of a vLLM server, without the server.

It is asked in the words of ``/v1/completions``, so that probing, look-ahead and scoring are those
of :mod:`multicolm.backend.remote`.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping
from typing import Any

from multicolm.backend.identity import identity_of
from multicolm.backend.remote.model import RemoteModel
from multicolm.backend.remote.probe import RequestedModel
from multicolm.backend.remote.service import Service
from multicolm.config import ModelConfig
from multicolm.errors import ModelError

__all__ = ["Engine", "VllmEngineModel"]

_FAILURES = (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError)
# A request that vLLM does not serve; its own exceptions come on top.
_REFUSALS = (NotImplementedError, TypeError, ValueError)
# vLLM keeps in globals what it is at, so that engines of one process cannot be asked at once.
_ONE_AT_A_TIME = threading.Lock()


class Engine(Service):
    """vLLM's engine, asked as its server would be.

    Args:
        model: name of the model in the ensemble.
        location: folder or Hub id.
        options: keyword arguments of ``vllm.LLM``.

    Raises:
        ModelError: if vLLM is not installed, or cannot load the model.
    """

    def __init__(self, model: str, location: str, options: Mapping[str, Any]) -> None:
        super().__init__(f"vllm-engine:{location}", model)
        # An engine in a child process starts slowly, and on Macs and Windows runs the caller's
        # script again.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise ModelError(
                f"model '{model}': backend 'vllm-engine' needs vllm, which cannot be imported "
                f"({error}); install it here, or run a vLLM server and use backend 'vllm'."
            ) from error
        own = importlib.import_module("vllm.exceptions").VLLMError
        self._refusals: tuple[type[Exception], ...] = (*_REFUSALS, own)
        try:
            self._engine: Any = self._vllm.LLM(model=location, **options)
        except (*_FAILURES, own) as error:
            reason = " ".join(str(error).split())[:400]
            raise ModelError(f"model '{model}': vLLM cannot load {location}: {reason}") from error
        self._of_thread = threading.local()

    @property
    def n_calls(self) -> int:
        """How often this thread has asked the engine."""
        return int(getattr(self._of_thread, "n_calls", 0))

    def get(self, path: str, what: str, *, most: int) -> dict[str, Any]:
        """The list of models: this one."""
        length = self._engine.llm_engine.model_config.max_model_len
        return {"data": [{"id": self._model, "max_model_len": length, "root": self.url}]}

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
        """What the engine writes after some prompts, in the form of ``/v1/completions``.

        Raises:
            ServerError: if it does not serve such a request, or fails.
        """
        self._of_thread.n_calls = self.n_calls + 1
        if body.get("echo"):
            raise self.error(what, "an engine has no parameter `echo`", 400)
        try:
            parameters = self._vllm.SamplingParams(
                max_tokens=body["max_tokens"],
                temperature=body["temperature"],
                logprobs=body.get("logprobs"),
                prompt_logprobs=body.get("prompt_logprobs"),
                stop=body.get("stop"),
            )
            prompts = _prompts(body["prompt"])
            with _ONE_AT_A_TIME:
                outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        except self._refusals as error:
            raise self.error(what, " ".join(str(error).split())[:300], 400) from error
        except RuntimeError as error:
            raise self.error(what, f"the engine failed: {error}") from error
        choices = [_choice(i, output) for i, output in enumerate(outputs)]
        return {"model": self._model, "choices": choices}


class VllmEngineModel(RemoteModel):
    """A model that vLLM runs in this process."""

    backend = "vllm-engine"

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> VllmEngineModel:
        """Load weights and tokenizer, and find out what the engine can do.

        Raises:
            ModelError: if vLLM is not installed, or cannot load the model.
            VocabularyError: if its tokens cannot be turned into bytes.
        """
        from multicolm.backend.remote.tokenizing import load

        tokenizer, length = load(name, config)
        options: dict[str, Any] = {
            "dtype": config.dtype,
            "revision": config.resolved_revision,
            "trust_remote_code": config.trust_remote_code,
            "max_logprobs": -1,  # how many are asked for is this package's business
            "disable_log_stats": True,
            **(config.engine_options or {}),
        }
        if config.context_length is not None:
            # One place more: after a text of full length, a token is asked for.
            options["max_model_len"] = min(config.context_length + 1, length or 1 << 62)
        model = cls(
            name,
            Engine(name, config.location, options),
            tokenizer,
            RequestedModel(name, config.logprobs),
            look_ahead=config.look_ahead,
            context_length=length,
        )
        model.identity = identity_of(config, None)
        model.precision = f"{options['dtype']}, {model.precision}"
        return model


def _prompts(given: Any) -> list[Any]:
    """Prompts as vLLM takes them: of one text or several, each of ids or of characters."""
    several = isinstance(given, list) and not (given and isinstance(given[0], int))
    prompts = given if several else [given]
    return [p if isinstance(p, str) else {"prompt_token_ids": list(p)} for p in prompts]


def _choice(index: int, output: Any) -> dict[str, Any]:
    """One prompt's output as a server writes it."""
    [written] = output.outputs
    choice: dict[str, Any] = {
        "index": index,
        "text": written.text,
        "finish_reason": written.finish_reason,
    }
    if written.logprobs is not None:
        rows = [
            {f"token_id:{i}": told.logprob for i, told in row.items()} for row in written.logprobs
        ]
        tokens = [f"token_id:{token}" for token in written.token_ids]
        choice["logprobs"] = {"tokens": tokens, "top_logprobs": rows}
    if output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [
            None if row is None else {str(i): {"logprob": told.logprob} for i, told in row.items()}
            for row in output.prompt_logprobs
        ]
    return choice

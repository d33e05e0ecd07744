"""The embedded models, in this process and behind servers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from fake_vllm import FakeVllm

from multicolm import Ensemble
from multicolm.backend.base import Model
from multicolm.backend.remote.model import RemoteModel, VllmModel
from multicolm.backend.remote.probe import RequestedModel
from multicolm.backend.remote.transport import Server
from multicolm.backend.transformers import TransformersModel
from multicolm.config import ModelConfig

__all__ = ["PROMPTS", "config", "ensemble", "local", "remote"]

PROMPTS = [
    "Question: What does Dulerex treat?\nResponse:",
    "Question: Which illness does Loxid help with?\nResponse:",
    "Question: What is 12 + 7?\nResponse:",
]


@cache
def local(name: str) -> TransformersModel:
    """An embedded model in this process."""
    return TransformersModel.from_config(name, ModelConfig(model=f"tiny-{name}", dtype="float32"))


def config(fake: FakeVllm, **settings: Any) -> ModelConfig:
    """Settings of a model behind a fake server; what goes wrong costs little time."""
    given = {"timeout": 10.0, "connect_timeout": 2.0, **settings}
    tokenizer = given.pop("model", f"tiny-{fake.name}")
    return ModelConfig(backend="vllm", model=tokenizer, url=fake.url, **given)


class Impatient(VllmModel):
    """A model that notes how long it would wait between attempts instead of waiting."""

    pauses: list[float]

    def __init_subclass__(cls) -> None:
        cls.pauses = []


def impatient() -> type[Impatient]:
    """A class with a list of pauses of its own."""

    class Noting(Impatient):
        sleep: Callable[[float], None] = staticmethod(lambda s: Noting.pauses.append(s))

    return Noting


def remote(fake: FakeVllm, **settings: Any) -> RemoteModel:
    """The model behind a fake server, with a tokenizer that is loaded once."""
    given = config(fake, **settings)
    cls = impatient()
    server = Server(
        fake.url,
        fake.name,
        timeout=given.timeout,
        connect_timeout=given.connect_timeout,
        retries=given.retries,
        sleep=cls.sleep,
    )
    tokenizer = local(given.model.removeprefix("tiny-")).tokenizer
    wish = RequestedModel(given.served_model, given.logprobs)
    return cls(fake.name, server, tokenizer, wish, look_ahead=given.look_ahead, context_length=512)


def ensemble(*experts: Model, **settings: Any) -> Ensemble:
    """The embedded generalist, and experts."""
    return Ensemble([local("generalist"), *experts], **settings)

"""How texts are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from multicolm.config.wording import Strict, problems_of, unknown_key
from multicolm.errors import InputError
from multicolm.numbers import as_python

__all__ = ["GenerationConfig"]


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class GenerationConfig(Strict):
    """How texts are written, unless a call says otherwise.

    Attributes:
        max_new_tokens: maximum number of tokens to write.
        temperature: 0 is greedy.
        top_k: draw from this many most likely tokens.
        top_p: draw from the fewest most likely tokens whose probabilities sum to this.
        seed: of everything random; a fresh one for each call if ``None``.
        stop: texts that end an answer and are not part of it; they may name special tokens.
        think_end_token: text, or the name of a special token, after which models that think answer,
            such as ``</think>``; lm-evaluation-harness has the same word. Stop strings hold after
            it, tasks judge what comes after it, and the server separates ``reasoning_content`` from
            ``content``. ``None``: all of the text is the answer.
        think_start_token: with which thoughts begin, in the text or at the end of the prompt.
        thinking_token_budget: maximum number of tokens to think, as vLLM calls it; after them
            ``think_end_token`` is written.
        schedule: ``None`` takes the one that suits the policy and its models.
        block_size: tokens that the base model drafts at a time under ``block``.
        threads: torch threads; ``None`` is one for small models on a CPU.
        top_logprobs: how many of the likeliest tokens are returned with each written one.
    """

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)
    ] = ()
    think_end_token: str | None = Field(default=None, min_length=1)
    think_start_token: str = Field(default="<think>", min_length=1)
    thinking_token_budget: int | None = Field(default=None, ge=0)
    schedule: Literal["stepwise", "block"] | None = None
    block_size: int = Field(default=8, ge=1)
    threads: int | None = Field(default=None, ge=1, le=1024)
    top_logprobs: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _budget_has_an_end(self) -> GenerationConfig:
        if self.thinking_token_budget is not None and self.think_end_token is None:
            raise ValueError(
                "`thinking_token_budget` needs a `think_end_token`, which is written when it is "
                "used up."
            )
        return self

    def updated(self, settings: Mapping[str, Any]) -> GenerationConfig:
        """These settings with others in their place; ``None`` leaves one as it is.

        Raises:
            InputError: if a setting is unknown or out of range.
        """
        given = {key: as_python(value) for key, value in settings.items() if value is not None}
        for key in given:
            if key not in type(self).model_fields:
                text = unknown_key(key, type(self).model_fields).replace("key", "setting", 1)
                raise InputError(text)
        try:
            return GenerationConfig.model_validate({**self.model_dump(), **given})
        except ValidationError as error:
            problems = problems_of(error, GenerationConfig, given)
            lines = [f"{'.'.join(map(str, p.place))}: {p.text}" for p in problems]
            raise InputError("\n".join(lines)) from error

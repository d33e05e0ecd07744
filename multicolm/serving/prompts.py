"""Prompts on their way from text to tokens, outside of the thread that writes.

A prompt of a megabyte takes a tokenizer a second, in which nobody else's text would grow. So they
are read in two threads of their own, one after another: short ones do not wait for long ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import anyio.to_thread

from multicolm.decoding.prompts import prompt_ids
from multicolm.ensemble import Ensemble
from multicolm.policy.base import Policy
from multicolm.types import OwnTokens, Prompt
from multicolm.views import ModelNames

__all__ = ["PromptReader"]

_SHORT = 16_384  # characters or tokens of all prompts of a request


class PromptReader:
    """Makes prompts into the tokens of each model.

    Args:
        ensemble: whose models read them.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        self._names = ModelNames(model.name for model in ensemble.backends)
        self._short = anyio.CapacityLimiter(1)
        self._long = anyio.CapacityLimiter(1)

    async def read(self, prompts: Sequence[Prompt], policy: Policy) -> list[OwnTokens]:
        """What each model reads for each prompt; who is cancelled waits for the one being read.

        Args:
            prompts: of one request.
            policy: decides who writes: only models that it uses read anything.

        Raises:
            InputError: if one is empty, longer than a model's context, or holds no tokens.
        """
        used = sorted(policy.uses(self._names))
        lane = self._short if sum(map(_size, prompts)) <= _SHORT else self._long
        return [
            await anyio.to_thread.run_sync(self._read, prompt, number, used, limiter=lane)
            for number, prompt in enumerate(prompts)
        ]

    def _read(self, prompt: Prompt, number: int, used: Sequence[int]) -> OwnTokens:
        ensemble = self._ensemble
        ids = prompt_ids(prompt, number, ensemble.backends, ensemble.vocabulary, used)
        return OwnTokens(tuple(map(tuple, ids)))


def _size(prompt: Prompt) -> int:
    """How much there is to read, about."""
    if isinstance(prompt, str | OwnTokens):
        return len(prompt if isinstance(prompt, str) else prompt.ids[0])
    return sum(
        1 if isinstance(part, int) else len(part["role"]) + len(part["content"]) for part in prompt
    )

"""What an engine is asked for, and what it says of each text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from multicolm.config import GenerationConfig
from multicolm.serving.catalog import Choice
from multicolm.types import Answer, Piece, Prompt, TracedToken

__all__ = ["Begun", "Ended", "Event", "Failed", "GenerationRequest", "Grown"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A text that somebody wants.

    Attributes:
        prompt: text, a chat, or token ids of the shared vocabulary.
        choice: who decides who writes.
        settings: how it is written.
        seed: random seed.
        number: which prompt of its request it is, from 0, for messages.
    """

    prompt: Prompt
    choice: Choice
    settings: GenerationConfig
    seed: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Begun:
    """The prompt has been read by the tokenizers and will be answered.

    Attributes:
        n_prompt_tokens: of the base model, or of the first model in use.
    """

    n_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Grown:
    """More of the text is certain.

    Attributes:
        pieces: what is new of the text, with its writers.
        tokens: what is new of the trace; it may be ahead of the text, or lag.
    """

    pieces: tuple[Piece, ...]
    tokens: tuple[TracedToken, ...]

    @property
    def size(self) -> int:
        """How much there is to read: tokens, or pieces where these are more."""
        return max(len(self.pieces), len(self.tokens))


@dataclass(frozen=True, slots=True)
class Ended:
    """The text is finished; all of it was delivered before."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Failed:
    """The text will not be finished."""

    error: Exception


Event: TypeAlias = Begun | Grown | Ended | Failed

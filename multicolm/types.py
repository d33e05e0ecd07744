"""What flows along the arrows, and the words and axis names used in every signature.

Axis names
    rows        the texts of one batch
    positions   places in those texts, flattened: one entry per (row, place)
    time        consecutive tokens of one forward pass
    vocab       entries of the shared vocabulary
    hidden      width of a model's last hidden state
    models      the base model (0) and the assistants (1..M)

Units: log-probabilities and entropies are in nats, durations in seconds, lengths in tokens.

This module imports no torch, so that configuration can be checked without it.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from torch import Tensor
else:
    # jaxtyping checks shapes and dtypes of whatever has them; naming the class would import torch.
    Tensor = Any

__all__ = [
    "MIXTURE",
    "Alternative",
    "Answer",
    "Chat",
    "FinishReason",
    "GenerationSettings",
    "Message",
    "OwnTokens",
    "Piece",
    "PieceKind",
    "Pooling",
    "Prompt",
    "Signal",
    "Tensor",
    "Trace",
    "TracedToken",
    "Usage",
    "finite",
    "prompt_digest",
]

Signal: TypeAlias = Literal[
    "text", "top1", "topk", "token_logprobs", "logprobs", "hidden", "embedding"
]
"""What a policy may ask of a model. ``logprobs`` (the whole vocabulary) includes those before it.

``text``      the most likely token
``top1``      the most likely token and its log-probability
``topk``      a few of the most likely tokens and their log-probabilities
``token_logprobs``  the log-probabilities of tokens that the policy names
``logprobs``  the log-probability of every token
``hidden``    the last hidden state, after the final norm
``embedding`` the input embedding of the most likely token
"""

Pooling: TypeAlias = Literal["last", "mean"]
"""How the hidden states of a prompt become one: that of its ``last`` token, or their ``mean``."""

FinishReason: TypeAlias = Literal["eos", "stop", "length", "context"]
"""Why a text ended: the writer's end-of-text token, a stop string, ``max_new_tokens``, or a model
whose context is full."""

PieceKind: TypeAlias = Literal["answer", "reasoning", "marker"]
"""What a piece of text is: of the ``answer``, of the ``reasoning`` before it, or of a ``marker``
around that, such as ``<think>``."""

MIXTURE = "mixture"
"""The writer's name in a trace where several models wrote a token together."""


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class Chat(tuple[Message, ...]):
    """The turns of a chat, and what this chat asks of the models' templates.

    Wherever a chat may stand, this may; a plain list of messages asks for nothing.

    Attributes:
        template_args: variables of chat templates, such as ``{"enable_thinking": False}``; they go
            before those that the ensemble file gives a model. Names of special tokens in their
            texts are text.
    """

    template_args: Mapping[str, Any]

    def __new__(
        cls, messages: Iterable[Message], template_args: Mapping[str, Any] | None = None
    ) -> Chat:
        """A chat of these messages; see the class."""
        chat = super().__new__(cls, messages)
        chat.template_args = dict(template_args or {})
        return chat


class GenerationSettings(TypedDict, total=False):
    """How texts are written; ``None`` or absent means the ensemble's own setting.

    ``max_new_tokens`` tokens at most. ``temperature`` 0 is greedy; ``top_k`` and ``top_p`` cut the
    distribution after it. ``stop`` strings end a text and are not part of it; they may name special
    tokens. ``schedule`` and ``block_size`` say how models are run and never what is written.
    ``think_end_token`` and ``think_start_token`` mark what models think off from what they answer,
    and ``thinking_token_budget`` limits it. ``threads`` is torch's count. ``top_logprobs`` of the
    likeliest tokens are returned with each written one.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    stop: str | Sequence[str] | None
    think_end_token: str | None
    think_start_token: str | None
    thinking_token_budget: int | None
    schedule: Literal["stepwise", "block"] | None
    block_size: int | None
    threads: int | None
    top_logprobs: int | None


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """A prompt that was made into tokens before, for each model in its own way.

    Attributes:
        ids: per model, what it reads, in its own tokens; nothing for models that are not in use.
    """

    ids: tuple[tuple[int, ...], ...]


Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | OwnTokens
"""Text, a chat, token ids of the shared vocabulary, or every model's own."""


def finite(value: float | None, otherwise: float | None = None) -> float | None:
    """A number that JSON can hold: the number itself, or what stands for one that it cannot."""
    return value if value is not None and math.isfinite(value) else otherwise


def _plain(prompt: Prompt) -> object:
    """A prompt as JSON has it."""
    if isinstance(prompt, Chat) and prompt.template_args:
        return {"messages": list(prompt), "chat_template_args": dict(prompt.template_args)}
    return prompt.ids if isinstance(prompt, OwnTokens) else prompt


def prompt_digest(prompt: Prompt) -> str:
    """Sixteen hexadecimal digits that identify a prompt.

    Checkpoints keep those of the prompts they were made from, so that nobody judges a policy on
    questions it has seen.
    """
    text = prompt if isinstance(prompt, str) else json.dumps(_plain(prompt), sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that the writer might have written.

    Attributes:
        id: the token in the shared vocabulary.
        text: see :attr:`TracedToken.text`.
        logprob: in nats, under the distribution that :attr:`TracedToken.logprob` is of.
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TracedToken:
    r"""One written token: who wrote it, with what probability, and why.

    Attributes:
        id: the token in the shared vocabulary.
        text: its bytes as text; bytes that are no text by themselves show as ``\xNN``.
        model: name of the model that wrote it, or ``"mixture"``.
        logprob: its log-probability in nats under the distribution it was drawn from, before
            temperature, top-k and top-p; NaN from a server that gives text only.
        score: the number the policy decided on, if it gives one; its meaning is the policy's.
        alternatives: the likeliest tokens in its place, itself among them if it is one, the
            likeliest first; as many as ``top_logprobs`` asked for, fewer where fewer are possible
            or a server returns fewer.
    """

    id: int
    text: str
    model: str
    logprob: float
    score: float | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """The written tokens of one text, in order."""

    tokens: tuple[TracedToken, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[TracedToken]:
        return iter(self.tokens)

    def __repr__(self) -> str:
        return f"<Trace: {len(self)} tokens, {self.handovers} handovers>"

    @property
    def handovers(self) -> int:
        """How often the writer changed."""
        return sum(a.model != b.model for a, b in zip(self.tokens, self.tokens[1:], strict=False))

    def share(self, model: str) -> float:
        """The part of the tokens that ``model`` wrote, 0 to 1 (0 for an empty trace)."""
        return sum(t.model == model for t in self.tokens) / len(self.tokens) if self.tokens else 0.0

    def spans(self) -> list[tuple[str, str]]:
        """Runs of one writer as ``(model, text)``, in order."""
        runs: list[tuple[str, str]] = []
        for token in self.tokens:
            if runs and runs[-1][0] == token.model:
                runs[-1] = (token.model, runs[-1][1] + token.text)
            else:
                runs.append((token.model, token.text))
        return runs


@dataclass(frozen=True, slots=True)
class Usage:
    """What one model did.

    For a single answer of a batch, ``forwards`` counts the passes that this row took part in and
    ``seconds`` is its share of their time, by tokens read; summed over a batch, seconds are exact
    and forwards count a pass once per row.

    Attributes:
        forwards: forward passes; one for several models that share their weights counts for the
            first of them.
        tokens_read: tokens fed to the model, the prompt included.
        tokens_written: tokens that it wrote.
        seconds: wall-clock time inside its forward passes.
        calls: HTTP requests to its server; 0 for a model in this process.
    """

    forwards: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    seconds: float = 0.0
    calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.forwards + other.forwards,
            self.tokens_read + other.tokens_read,
            self.tokens_written + other.tokens_written,
            self.seconds + other.seconds,
            self.calls + other.calls,
        )

    def __repr__(self) -> str:
        calls = f", calls={self.calls}" if self.calls else ""
        return (
            f"Usage(forwards={self.forwards}, tokens_read={self.tokens_read}, "
            f"tokens_written={self.tokens_written}, seconds={self.seconds:.3g}{calls})"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of streamed text that one model wrote.

    Never part of a stop string that was found, never half a UTF-8 character. Joined in order, the
    pieces of a row are the answer's text.

    Attributes:
        row: which prompt of the batch it continues.
        text: the new text, never empty.
        model: name of its writer, or ``"mixture"``; of the last byte's writer where a character
            was written by two.
        kind: ``answer``, but of models that think (``think_end_token``).
    """

    row: int
    text: str
    model: str
    kind: PieceKind = "answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished text, with an account of how it came about.

    Attributes:
        prompt: what was asked, as given.
        text: what was written, without the prompt and without the stop string.
        trace: every written token. The end-of-text token, and tokens of a stop string, are in the
            trace though not in the text.
        usage: per model name, what it did for this answer.
        finish_reason: why it ended.
        policy: the policy's name, as it was asked for.
        seed: what the random draws of this answer were seeded with; ``None`` when nothing was
            random.
        reasoning_content: what it thought before it answered, without markers; ``None`` if it did
            not, or no ``think_end_token`` says where thoughts end.
        content_start: how many characters of ``text`` come before the answer proper.
    """

    prompt: Prompt
    text: str
    trace: Trace
    usage: Mapping[str, Usage]
    finish_reason: FinishReason
    policy: str
    seed: int | None = None
    reasoning_content: str | None = None
    content_start: int = 0

    @property
    def content(self) -> str:
        """The answer proper: the text after what was thought; all of it if nothing was."""
        return self.text[self.content_start :]

    def as_json(self) -> dict[str, Any]:
        """A dictionary of plain values; numbers that JSON cannot hold become ``None``."""
        thought = {}
        if self.reasoning_content is not None:
            thought = {"reasoning_content": self.reasoning_content, "content": self.content}
        tokens = [asdict(token) for token in self.trace.tokens]
        for token in tokens:
            token |= {key: finite(token[key]) for key in ("logprob", "score")}
            token["alternatives"] = list(token["alternatives"])
        return {
            "prompt": _plain(self.prompt),
            "text": self.text,
            **thought,
            "finish_reason": self.finish_reason,
            "policy": self.policy,
            "seed": self.seed,
            "usage": {name: asdict(usage) for name, usage in self.usage.items()},
            "trace": tokens,
        }

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return f"<Answer {text!r}: {len(self.trace)} tokens by {self.policy}, {self.finish_reason}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: every token in its writer's colour, with its numbers on hover."""
        return _as_html(self)


_HUES = (195, 300, 45, 120, 225, 0)


def _as_html(answer: Answer) -> str:
    """The trace as HTML that needs nothing else. What models wrote is escaped."""
    writers = dict.fromkeys([*answer.usage, *(token.model for token in answer.trace)])
    assistants = [name for name in list(writers)[1:] if name != MIXTURE]
    styles = {
        name: f"background:hsla({_HUES[i % len(_HUES)]},80%,50%,.25)"
        for i, name in enumerate(assistants)
    }
    styles[MIXTURE] = "background:hsla(0,0%,50%,.25)"
    text = "".join(
        f'<span title="{_shown(_facts(token))}" style="{styles.get(token.model, "")}">'
        f"{_shown(token.text)}</span>"
        for token in answer.trace
    )
    shares = ((name, answer.trace.share(name)) for name in writers)
    legend = " ".join(
        f'<span style="{styles.get(name, "")}">{_shown(name)} {100 * share:.0f} %</span>'
        for name, share in shares
        if share
    )
    return (
        f'<div style="white-space:pre-wrap;font-family:monospace">{text}</div>'
        f'<div style="font-size:85%">{_shown(answer.policy)}, {len(answer.trace)} tokens, '
        f"{answer.finish_reason}: {legend}</div>"
    )


def _facts(token: TracedToken) -> str:
    """Who wrote a token, how likely it was, and what else might have stood there."""
    score = "" if token.score is None else f", score {token.score:.3g}"
    others = "".join(f"\n{other.text!r} {other.logprob:.2f}" for other in token.alternatives)
    return f"{token.model}, log-probability {token.logprob:.2f}{score}{others}"


def _shown(text: str) -> str:
    r"""Text for HTML; control characters, and marks that turn its direction, as ``\xNN``."""
    unsafe = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    plain = re.sub(unsafe, lambda found: ascii(found[0])[1:-1], text)
    return html.escape(plain)

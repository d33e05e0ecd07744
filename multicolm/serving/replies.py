"""What clients get, in the shapes that those of OpenAI know; our own field is ``multicolm``."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from multicolm.errors import shorten
from multicolm.types import Answer, FinishReason, Piece, TracedToken, Usage, finite

__all__ = ["Replies", "Written", "as_event", "failure"]

_REASONS: dict[FinishReason, str] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
}
_LONGEST_MESSAGE = 2000  # characters
_IMPOSSIBLE = -9999.0  # what OpenAI gives for a log-probability that JSON cannot hold


@dataclass
class Written:
    """One text as it has come so far.

    Attributes:
        pieces: its text, with writers.
        tokens: its trace.
        n_prompt_tokens: of its prompt; 0 where another text counts the same prompt.
        answer: when it is finished; its trace is empty where that was streamed.
        n_tokens: of the answer.
    """

    pieces: list[Piece] = field(default_factory=list)
    tokens: list[TracedToken] = field(default_factory=list)
    n_prompt_tokens: int = 0
    answer: Answer | None = None
    n_tokens: int = 0
    _n_characters: int = 0
    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def pass_over(self, content: bytes) -> int:
        """Where in the text a token begins, in characters; the next one begins after it."""
        offset = self._n_characters
        self._n_characters += len(self._decoder.decode(content))
        return offset


@dataclass(frozen=True)
class Replies:
    """The replies to one request.

    Attributes:
        kind: which of the two interfaces.
        id: of the reply.
        model: as the client has named it.
        chosen: the policy, and the params that were given.
        created: when, in seconds since 1970.
        content: the bytes of a token.
        logprobs: whether log-probabilities are wanted.
        top_logprobs: how many of the likeliest tokens are wanted with each.
        reasoning: whether a chat's client wants what models thought.
    """

    kind: Literal["completion", "chat"]
    id: str
    model: str
    chosen: Mapping[str, Any]
    created: int
    content: Callable[[int], bytes]
    logprobs: bool
    top_logprobs: int = 0
    reasoning: bool = True

    def beginning(self, texts: Sequence[Written]) -> bytes:
        """A reply with all texts, up to the first of its choices."""
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return _as_bytes({**self._head(kind), **self._usage(texts)})[:-1] + b', "choices": ['

    def choice(self, index: int, written: Written) -> bytes:
        """One text, all of it."""
        answer = written.answer
        assert answer is not None
        offsets = self._offsets(written, written.tokens)
        return _as_bytes(
            {
                "index": index,
                **self._said(answer),
                "logprobs": self._logprobs(written.tokens, offsets),
                "finish_reason": _REASONS[answer.finish_reason],
                "multicolm": {
                    **_provenance(written.pieces, written.tokens, offsets),
                    **_end(answer),
                },
            }
        )

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat: who speaks."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head(self._chunk), "choices": [choice]}

    def more(
        self, index: int, written: Written, pieces: Sequence[Piece], tokens: Sequence[TracedToken]
    ) -> dict[str, Any]:
        """A chunk with what is new of a text."""
        offsets = self._offsets(written, tokens)
        choice = {
            "index": index,
            **self._new(pieces),
            "logprobs": self._logprobs(tokens, offsets),
            "finish_reason": None,
            "multicolm": _provenance(pieces, tokens, offsets),
        }
        return {**self._head(self._chunk), "choices": [choice]}

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """The last chunk of a text."""
        choice = {
            "index": index,
            **(self._new(()) if self.kind == "completion" else {"delta": {}}),
            "logprobs": None,
            "finish_reason": _REASONS[answer.finish_reason],
            "multicolm": {**_provenance((), (), ()), **_end(answer)},
        }
        return {**self._head(self._chunk), "choices": [choice]}

    def usage(self, texts: Sequence[Written]) -> dict[str, Any]:
        """The chunk after all others, without choices."""
        return {**self._head(self._chunk), "choices": [], **self._usage(texts)}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _said(self, answer: Answer) -> dict[str, Any]:
        if self.kind == "completion":
            return {"text": answer.text}
        message = {"role": "assistant", "content": answer.content, "refusal": None}
        if self.reasoning and answer.reasoning_content is not None:
            message["reasoning_content"] = answer.reasoning_content
        return {"message": message}

    def _new(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if self.kind == "completion":
            return {"text": "".join(piece.text for piece in pieces)}
        answer = "".join(piece.text for piece in pieces if piece.kind == "answer")
        thoughts = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        if not thoughts or not self.reasoning:
            return {"delta": {"content": answer}}
        delta = {"reasoning_content": thoughts, "content": answer}
        return {"delta": {name: text for name, text in delta.items() if text}}

    def _usage(self, texts: Sequence[Written]) -> dict[str, Any]:
        answers = [written.answer for written in texts if written.answer is not None]
        n_written = sum(written.n_tokens for written in texts)
        n_prompt = sum(written.n_prompt_tokens for written in texts)
        models: dict[str, Usage] = {}
        for answer in answers:
            for name, used in answer.usage.items():
                models[name] = models.get(name, Usage()) + used
        return {
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_written,
                "total_tokens": n_prompt + n_written,
            },
            "multicolm": {**self.chosen, "usage": _as_json(models)},
        }

    def _offsets(self, written: Written, tokens: Sequence[TracedToken]) -> list[int]:
        return [written.pass_over(self.content(token.id)) for token in tokens]

    def _logprobs(
        self, tokens: Sequence[TracedToken], offsets: Sequence[int]
    ) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        # Where a server returns no probability of a token, clients of chats still want a number.
        unknown = _IMPOSSIBLE if self.kind == "chat" else None
        numbers = [
            unknown if math.isnan(token.logprob) else finite(token.logprob, _IMPOSSIBLE)
            for token in tokens
        ]
        if self.kind == "chat":
            content = [
                {
                    "token": token.text,
                    "logprob": number,
                    "bytes": list(self.content(token.id)),
                    "top_logprobs": [
                        {
                            "token": other.text,
                            "logprob": other.logprob,
                            "bytes": list(self.content(other.id)),
                        }
                        for other in token.alternatives
                    ],
                }
                for token, number in zip(tokens, numbers, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": numbers,
            "top_logprobs": [_by_text(token) for token in tokens] if self.top_logprobs else None,
            "text_offset": list(offsets),
        }


def as_event(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % (data.encode() if isinstance(data, str) else _as_bytes(data))


def _as_bytes(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, allow_nan=False).encode()


def failure(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in the form of OpenAI's; it repeats little of what the client sent."""
    return {
        "error": {
            "message": shorten(message, _LONGEST_MESSAGE),
            "type": kind,
            "param": param,
            "code": code,
        }
    }


def _by_text(token: TracedToken) -> dict[str, float]:
    """A token's alternatives, and itself if its probability is known, as completions name them."""
    others = [(other.text, other.logprob) for other in token.alternatives]
    own = [(token.text, token.logprob)] if math.isfinite(token.logprob) else []
    named: dict[str, float] = {}
    for text, logprob in [*others, *own]:
        named.setdefault(text, logprob)  # of several tokens with one text the likeliest
    return named


def _provenance(
    pieces: Sequence[Piece], tokens: Sequence[TracedToken], offsets: Sequence[int]
) -> dict[str, Any]:
    """Who wrote what: runs of one writer, and the tokens with their probabilities."""
    runs: list[dict[str, str]] = []
    for piece in pieces:
        if runs and runs[-1]["model"] == piece.model:
            runs[-1]["text"] += piece.text
        else:
            runs.append({"text": piece.text, "model": piece.model})
    traced = [
        {
            "id": token.id,
            "text": token.text,
            "model": token.model,
            "logprob": finite(token.logprob),
            "score": finite(token.score),
            "offset": offset,
            "alternatives": [asdict(other) for other in token.alternatives],
        }
        for token, offset in zip(tokens, offsets, strict=True)
    ]
    return {"pieces": runs, "tokens": traced}


def _end(answer: Answer) -> dict[str, Any]:
    return {
        "finish_reason": answer.finish_reason,
        "seed": answer.seed,
        "usage": _as_json(answer.usage),
    }


def _as_json(usage: Mapping[str, Usage]) -> dict[str, Any]:
    return {name: asdict(used) for name, used in usage.items()}

"""How a request for next tokens is put to a server, and how its answer is read.

What is sent is ``POST /v1/completions``. A token's text does not say which one it is, so ids have
to come back: as ``token_id:7``, as vLLM writes them when it is asked to
(``return_tokens_as_token_ids``), or beside the text, as llama.cpp's server does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from multicolm.backend.remote.service import Service

__all__ = ["Completion", "Likeliest", "Scoring", "Unreadable", "completions", "top_rows"]

Scoring = Literal["prompt_logprobs", "echo"]
"""By which parameter a server tells the probabilities of a prompt's own tokens."""

_PREFIX = "token_id:"
_DIGITS = re.compile(r"[0-9]{1,10}")
_LEAST = -9999.0  # what a server writes for -inf, which JSON cannot hold
_MOST_TOKENS = 1 << 22  # of any vocabulary, by far
_ROUNDING = 0.05  # nats above 0, of servers that compute in half precision
_MOST_MASS = 1.05


class Unreadable(Exception):
    """An answer that is not as it was asked for; the message says in what."""


@dataclass(frozen=True, slots=True)
class Likeliest:
    """Some tokens that may come next, and their log-probabilities in nats.

    Attributes:
        ids: the tokens.
        logprobs: of these tokens; +inf where one comes, how likely is not known.
    """

    ids: list[int]
    logprobs: list[float]

    def first(self, n: int) -> Likeliest:
        """The ``n`` likeliest of them, the lowest ids of equally likely ones."""
        order = sorted(
            zip(self.logprobs, self.ids, strict=True), key=lambda pair: (-pair[0], pair[1])
        )
        return Likeliest([i for _, i in order[:n]], [p for p, _ in order[:n]])

    def spread(self, width: int) -> Float[Tensor, "vocab"]:
        """Over a vocabulary; -inf for the other tokens, and without those beyond it."""
        row = torch.full((width,), float("-inf"))
        known = [(i, p) for i, p in zip(self.ids, self.logprobs, strict=True) if i < width]
        row[torch.tensor([i for i, _ in known], dtype=torch.long)] = torch.tensor(
            [p for _, p in known]
        )
        return row


@dataclass(frozen=True, slots=True)
class Completion:
    """How a server goes on behind one prompt.

    Attributes:
        text: what it writes.
        ended: whether it ended the text.
        tokens: the ids of what it writes; empty if it tells no ids.
        rows: for each of these, what it could have been; empty if it tells no ids.
        prompt_rows: for each token of the prompt, what it could have been, ``None`` for the first;
            empty if that was not asked for.
    """

    text: str
    ended: bool
    tokens: list[int]
    rows: list[Likeliest]
    prompt_rows: list[Likeliest | None]


def completions(
    server: Service,
    served_model: str,
    prompts: Sequence[Sequence[int] | str],
    n_tokens: int,
    *,
    logprobs: int | None = None,
    scoring: Scoring | None = None,
    timeout: float | None = None,
    final_500: bool = False,
    **more: Any,
) -> tuple[list[Completion], dict[str, Any]]:
    """Ask how some texts go on, in one request.

    Args:
        server: whom to ask.
        served_model: what it calls the model.
        prompts: texts, or token ids.
        n_tokens: the most tokens to write.
        logprobs: of how many likeliest tokens to tell the log-probability, -1 for all; not given,
            none is asked for.
        scoring: how to ask for the prompts' own tokens too, if they are wanted.
        timeout: seconds that it may take, if more than usual.
        final_500: whether HTTP status 500 counts as an answer; it is asked again otherwise.
        **more: further parameters.

    Returns:
        One completion per prompt, and the answer as it was.

    Raises:
        ServerError: if the server does not answer.
        Unreadable: if it answers something else.
    """
    body: dict[str, Any] = {
        "model": served_model,
        "prompt": [p if isinstance(p, str) else list(p) for p in prompts],
        "max_tokens": n_tokens,
        "temperature": 0,
        **more,
    }
    if len(prompts) == 1:
        body["prompt"] = body["prompt"][0]
    if logprobs is not None:
        body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
    if scoring == "echo":
        body["echo"] = True
    elif scoring is not None:
        body["prompt_logprobs"] = logprobs
    n_texts = "1 text" if len(prompts) == 1 else f"{len(prompts)} texts"
    longest = max(map(len, prompts))
    unit = "characters" if isinstance(prompts[0], str) else "tokens"
    what = f"{n_tokens} more tokens behind {n_texts} of up to {longest} {unit}"
    answer = server.post("/v1/completions", body, what, timeout=timeout, final_500=final_500)
    choices = _choices(answer, len(prompts))
    lengths = [len(prompt) if scoring == "echo" else 0 for prompt in prompts]
    read = [_read(choice, n) for choice, n in zip(choices, lengths, strict=True)]
    return read, answer


def _choices(answer: Mapping[str, Any], n_prompts: int) -> list[Mapping[str, Any]]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != n_prompts:
        n_got = len(choices) if isinstance(choices, list) else "no"
        raise Unreadable(f"the answer holds {n_got} choices for {n_prompts} prompts")
    if not all(isinstance(choice, dict) for choice in choices):
        raise Unreadable("a choice is no JSON object")
    if n_prompts == 1:
        return choices
    numbers = [choice.get("index") for choice in choices]
    whole = all(type(number) is int for number in numbers)
    if not whole or sorted(numbers) != list(range(n_prompts)):
        raise Unreadable(f"the choices are not numbered from 0 to {n_prompts - 1}")
    return sorted(choices, key=lambda choice: int(choice["index"]))


def _read(choice: Mapping[str, Any], n_echoed: int) -> Completion:
    text = choice.get("text")
    if not isinstance(text, str):
        raise Unreadable("a choice has no text")
    tokens, rows = top_rows(choice.get("logprobs"))
    prompt_rows: list[Likeliest | None] = list(rows[:n_echoed])
    if scored := choice.get("prompt_logprobs"):
        if not isinstance(scored, list):
            raise Unreadable("`prompt_logprobs` is no list")
        prompt_rows = [_scored(entry) for entry in scored]
    written = [row for row in rows[n_echoed:] if row is not None]
    ended = choice.get("finish_reason") == "stop"
    return Completion(text, ended, tokens[n_echoed:], written, prompt_rows)


def top_rows(given: Any) -> tuple[list[int], list[Likeliest | None]]:
    """Tokens, and what they could have been; both empty if there are no token ids.

    Args:
        given: ``logprobs`` of a choice.

    Raises:
        Unreadable: if it is of another form.
    """
    if isinstance(given, dict) and isinstance(given.get("content"), list):
        return _entries(given["content"])
    if not isinstance(given, dict) or not given.get("tokens"):
        return [], []
    names, tops = given["tokens"], given.get("top_logprobs")
    if not isinstance(names, list) or not isinstance(tops, list) or len(tops) != len(names):
        raise Unreadable("`logprobs` has not one entry of `top_logprobs` for each token")
    if not all(isinstance(name, str) and name.startswith(_PREFIX) for name in names):
        return [], []
    return [_id(name) for name in names], [_top(top) for top in tops]


def _entries(entries: list[Any]) -> tuple[list[int], list[Likeliest | None]]:
    """Tokens and what they could have been, where each is an object that may have an ``id``."""
    try:
        ids = [entry["id"] for entry in entries]
        others = [[(other["id"], other) for other in entry["top_logprobs"]] for entry in entries]
    except (KeyError, TypeError):
        return [], []
    named = [token for top in others for token, _ in top]
    if not all(type(token) is int for token in (*ids, *named)):
        return [], []
    tokens = [_id(token) for token in ids]
    tops = [{_id(token): other for token, other in top} for top in others]
    if not all(isinstance(o.get("logprob"), int | float) for top in tops for o in top.values()):
        raise Unreadable("an entry of `top_logprobs` has no number")
    rows = [_row(top, (other["logprob"] for other in top.values())) for top in tops]
    # A token with more bytes than its own comes behind others that were left out.
    whole = [
        entry.get("bytes") == top.get(token, entry).get("bytes")
        for entry, token, top in zip(entries, tokens, tops, strict=True)
    ]
    n = whole.index(False) if False in whole else len(whole)
    return tokens[:n], list(rows[:n])


def _id(given: Any) -> int:
    """A token's id: a number, or a text of digits, with or without what vLLM puts in front.

    Raises:
        Unreadable: if it is none, or beyond every vocabulary: rows are as long as ids are large.
    """
    token_id = given
    if isinstance(given, str):
        digits = given.removeprefix(_PREFIX)
        # As a text of any length: Python reads no number of more than some thousand digits.
        token_id = int(digits) if _DIGITS.fullmatch(digits) else None
    if type(token_id) is not int or not 0 <= token_id < _MOST_TOKENS:
        raise Unreadable(f"{str(given)[:40]!r} is no token id")
    return token_id


def _row(ids: Iterable[Any], logprobs: Iterable[Any]) -> Likeliest:
    """Tokens and their log-probabilities, as a distribution can have them.

    Raises:
        Unreadable: if an id or a number is impossible, or they sum to more than 1.
    """
    row = Likeliest([_id(token) for token in ids], [_log(number) for number in logprobs])
    if sum(map(math.exp, row.logprobs)) > _MOST_MASS:
        raise Unreadable("log-probabilities whose probabilities sum to more than 1")
    return row


def _top(top: Any) -> Likeliest | None:
    if top is None:
        return None
    if not isinstance(top, dict):
        raise Unreadable("an entry of `top_logprobs` is no mapping from tokens to numbers")
    return _row(top, top.values())


def _scored(entry: Any) -> Likeliest | None:
    """An entry of ``prompt_logprobs``: from an id to what is known of it."""
    if entry is None:
        return None
    if not isinstance(entry, dict) or not all(isinstance(k, dict) for k in entry.values()):
        raise Unreadable("an entry of `prompt_logprobs` is of another form")
    return _row(entry, (known.get("logprob") for known in entry.values()))


def _log(given: Any) -> float:
    """A log-probability in nats.

    Raises:
        Unreadable: if it is none: no number, NaN, or above 0 by more than rounding.
    """
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise Unreadable(f"{str(given)[:40]!r} is no log-probability")
    if isinstance(given, float) and math.isnan(given):
        raise Unreadable("a log-probability is NaN")
    if given > _ROUNDING:
        raise Unreadable(f"{str(given)[:40]} is no log-probability: it is above 0")
    return float("-inf") if given <= _LEAST else float(given)

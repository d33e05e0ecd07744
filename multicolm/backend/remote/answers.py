"""How the answer to a request for next tokens is read.

A token's text does not say which one it is, so ids have to come back: as ``token_id:7``, as vLLM
writes them when it is asked to, or beside the text, as llama.cpp's server does. Nothing that no
model can say is taken: ids, log-probabilities and what they have to do with each other are checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["LONGEST_TOKEN", "Completion", "Likeliest", "Unreadable", "read_all", "top_rows"]

_PREFIX = "token_id:"
_DIGITS = re.compile(r"[0-9]{1,10}")
_LEAST = -9999.0  # what a server writes for -inf, which JSON cannot hold
_MOST_TOKENS = 1 << 22  # of any vocabulary, by far
_ROUNDING = 0.05  # nats, of servers that compute in half precision
_MOST_MASS = 1.05
_NAMES: dict[type[Any], str] = {str: "text", list: "list", dict: "JSON object"}
LONGEST_TOKEN = 1024  # characters; those of many blanks have some hundred


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
    """How a server continues one prompt.

    Attributes:
        text: what it writes.
        ended: whether it ended the text.
        tokens: the ids of what it writes; empty if it returns no ids.
        rows: for each of these, what it could have been; empty if it returns no ids.
        prompt_rows: for each token of the prompt, what it could have been, ``None`` for the first;
            empty if that was not asked for.
    """

    text: str
    ended: bool
    tokens: list[int]
    rows: list[Likeliest]
    prompt_rows: list[Likeliest | None]


def read_all(
    answer: Mapping[str, Any],
    prompts: Sequence[Sequence[int] | str],
    n_tokens: int,
    *,
    echoed: bool,
    named: Collection[int],
) -> list[Completion]:
    """The completions of an answer, one per prompt.

    Args:
        answer: to a request for completions.
        prompts: of that request.
        n_tokens: maximum number of tokens that were asked for.
        echoed: whether the prompts should come back, too.
        named: the tokens that were asked about by name, if any.

    Raises:
        Unreadable: if it is not an answer to that, or one that no model can give.
    """
    if answer.get("model") is not None:
        _of(str, answer["model"], "model")
    choices = _choices(answer, len(prompts))
    return [
        _read(choice, prompt, n_tokens, echoed=echoed, named=named)
        for choice, prompt in zip(choices, prompts, strict=True)
    ]


def _choices(answer: Mapping[str, Any], n_prompts: int) -> list[Mapping[str, Any]]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != n_prompts:
        n_got = len(choices) if isinstance(choices, list) else "no"
        raise Unreadable(f"the answer holds {n_got} choices for {n_prompts} prompts")
    if not all(isinstance(choice, dict) for choice in choices):
        raise Unreadable("a choice is no JSON object")
    numbers = [choice.get("index") for choice in choices]
    if numbers == [None]:
        return choices
    whole = all(type(number) is int for number in numbers)
    if not whole or sorted(numbers) != list(range(n_prompts)):
        raise Unreadable(f"the choices are not numbered from 0 to {n_prompts - 1}")
    return sorted(choices, key=lambda choice: int(choice["index"]))


def _read(
    choice: Mapping[str, Any],
    prompt: Sequence[int] | str,
    n_tokens: int,
    *,
    echoed: bool = False,
    named: Collection[int] = (),
) -> Completion:
    """One completion; see :func:`read_all`."""
    text = _of(str, choice.get("text"), "text")
    reason = choice.get("finish_reason")
    ended = reason is not None and _of(str, reason, "finish_reason") == "stop"
    tokens, rows = top_rows(choice.get("logprobs"), named=named)
    n_echoed = len(prompt) if echoed else 0
    prompt_rows: list[Likeliest | None] = list(rows[:n_echoed])
    scored = choice.get("prompt_logprobs")
    if scored is not None:
        prompt_rows = [_scored(entry) for entry in _of(list, scored, "prompt_logprobs")]
    if echoed and tokens and tokens[:n_echoed] != list(prompt):
        raise Unreadable("`tokens` does not begin with the prompt, which should come back first")
    if prompt_rows and not isinstance(prompt, str):
        _check_prompt_rows(prompt_rows, prompt, "top_logprobs" if echoed else "prompt_logprobs")
    n_most = max(1, n_tokens)
    if len(tokens) - n_echoed > n_most:
        raise Unreadable(
            f"`tokens` holds {len(tokens) - n_echoed} new ones, and {n_tokens} were asked for"
        )
    if len(text) > LONGEST_TOKEN * (n_most + (len(prompt) if echoed else 0)):
        raise Unreadable(f"`text` has {len(text)} characters for {n_tokens} tokens")
    written = [row for row in rows[n_echoed:] if row is not None]
    return Completion(text, ended, tokens[n_echoed:], written, prompt_rows)


def _check_prompt_rows(rows: Sequence[Likeliest | None], prompt: Sequence[int], field: str) -> None:
    if len(rows) != len(prompt):
        raise Unreadable(f"`{field}` has {len(rows)} entries for {len(prompt)} tokens of a prompt")
    for n, (token, row) in enumerate(zip(prompt, rows, strict=True)):
        if (row is None) != (n == 0):
            raise Unreadable(f"`{field}` leaves out another token of a prompt than the first")
        if row is not None and token not in row.ids:
            raise Unreadable(f"`{field}` leaves out token {token}, which is the prompt's own")


def top_rows(
    given: Any, *, named: Collection[int] = ()
) -> tuple[list[int], list[Likeliest | None]]:
    """Tokens, and what they could have been; both empty if there are no token ids.

    Args:
        given: ``logprobs`` of a choice.
        named: the tokens that were asked about by name, in the place of the likeliest.

    Raises:
        Unreadable: if it is of another form, or contradicts itself.
    """
    if given is None:
        return [], []
    logprobs = _of(dict, given, "logprobs")
    if logprobs.get("content") is not None:
        return _entries(_of(list, logprobs["content"], "content"))
    if not logprobs.get("tokens"):
        return [], []
    names, tops = logprobs["tokens"], logprobs.get("top_logprobs")
    if not isinstance(names, list) or not isinstance(tops, list) or len(tops) != len(names):
        raise Unreadable("`logprobs` has not one entry of `top_logprobs` for each token")
    own = logprobs.get("token_logprobs") or [None] * len(names)
    if not isinstance(own, list) or len(own) != len(names):
        raise Unreadable("`logprobs` has not one entry of `token_logprobs` for each token")
    if not all(isinstance(name, str) and name.startswith(_PREFIX) for name in names):
        return [], []
    tokens, rows = _ids(names, "tokens"), [_top(top) for top in tops]
    for token, number, row in zip(tokens, own, rows, strict=True):
        if row is not None:
            _check_own(token, number, row, is_among_likeliest=not named)
    return tokens, rows


def _entries(entries: list[Any]) -> tuple[list[int], list[Likeliest | None]]:
    """Tokens and what they could have been, where each is an object that may have an ``id``."""
    tokens: list[int] = []
    rows: list[Likeliest | None] = []
    for entry in entries:
        others = entry.get("top_logprobs") if isinstance(entry, dict) else None
        if not isinstance(others, list) or not all(isinstance(other, dict) for other in others):
            return [], []
        if any(each.get("id") is None for each in (entry, *others)):
            return [], []
        [token] = _ids([entry["id"]], "content")
        ids, numbers = [o["id"] for o in others], [o.get("logprob") for o in others]
        row = _row(ids, numbers, "top_logprobs")
        alike = dict(zip(row.ids, others, strict=True)).get(token, entry)
        # A token with more bytes than its own comes after others that were left out.
        if entry.get("bytes") != alike.get("bytes"):
            break
        _check_own(token, entry.get("logprob"), row)
        tokens.append(token)
        rows.append(row)
    return tokens, rows


def _check_own(token: int, given: Any, row: Likeliest, *, is_among_likeliest: bool = True) -> None:
    """See that what is said of the token that comes is what is said of what could have come.

    Raises:
        Unreadable: if one contradicts the other.
    """
    own = None if given is None else _logprobs([given], "token_logprobs")[0]
    if token in row.ids:
        known = row.logprobs[row.ids.index(token)]
        if own is not None and own != known and not abs(own - known) <= _ROUNDING:
            raise Unreadable(f"token {token} has two log-probabilities, {own:g} and {known:g}")
        return
    # One that is not among the likeliest may come if the likeliest may not.
    least = min(row.logprobs, default=0.0)
    if own is None or (is_among_likeliest and own > least + _ROUNDING):
        raise Unreadable(f"`tokens` holds token {token}, which `top_logprobs` leaves out")


def _top(top: Any) -> Likeliest | None:
    if top is None:
        return None
    if not isinstance(top, dict):
        raise Unreadable("an entry of `top_logprobs` is no mapping from tokens to numbers")
    return _row(top, top.values(), "top_logprobs")


def _scored(entry: Any) -> Likeliest | None:
    """An entry of ``prompt_logprobs``: from an id to what is known of it."""
    if entry is None:
        return None
    if not isinstance(entry, dict) or not all(isinstance(k, dict) for k in entry.values()):
        raise Unreadable("an entry of `prompt_logprobs` is of another form")
    numbers = [known.get("logprob") for known in entry.values()]
    return _row(entry, numbers, "prompt_logprobs")


def _row(ids: Iterable[Any], logprobs: Iterable[Any], field: str) -> Likeliest:
    """Tokens and their log-probabilities, as a distribution can have them.

    Raises:
        Unreadable: if an id or a number is impossible, an id comes twice, or the probabilities sum
            to more than 1.
    """
    row = Likeliest(_ids(ids, field), _logprobs(logprobs, field))
    if len(set(row.ids)) < len(row.ids):
        raise Unreadable(f"an entry of `{field}` names a token twice")
    mass = float(np.exp(row.logprobs).sum())
    if mass > _MOST_MASS:
        raise Unreadable(f"the probabilities of an entry of `{field}` sum to {mass:.4g}")
    return row


def _ids(given: Iterable[Any], field: str) -> list[int]:
    """Token ids: numbers, or texts of digits, with or without what vLLM puts in front.

    Raises:
        Unreadable: if one is none, or beyond every vocabulary: rows are as long as ids are large.
    """
    found = []
    for each in given:
        token = each
        if isinstance(each, str):
            digits = each.removeprefix(_PREFIX)
            # As a text of any length: Python reads no number of more than some thousand digits.
            token = int(digits) if _DIGITS.fullmatch(digits) else None
        if type(token) is not int or not 0 <= token < _MOST_TOKENS:
            raise Unreadable(f"`{field}` holds {_quoted(each)}, which is no token id")
        found.append(token)
    return found


def _logprobs(given: Iterable[Any], field: str) -> list[float]:
    """Log-probabilities in nats.

    Raises:
        Unreadable: if one is none: no number, NaN, or above 0 by more than rounding.
    """
    found = list(given)
    for each in found:
        # NaN is not below anything.
        if type(each) not in (int, float) or not each <= _ROUNDING:
            raise Unreadable(f"`{field}` holds {_quoted(each)}, which is no log-probability")
    return [-math.inf if each <= _LEAST else float(each) for each in found]


def _of(kind: type[Any], given: Any, field: str) -> Any:
    if not isinstance(given, kind):
        raise Unreadable(f"`{field}` is {_quoted(given)}, which is no {_NAMES[kind]}")
    return given


def _quoted(given: Any) -> str:
    """A value in so few characters that a message can hold it."""
    if isinstance(given, int) and abs(given) >= 1 << 70:
        return "a number of many digits"
    shown = repr(given[:40] if isinstance(given, str | list) else given)
    return shown if len(shown) <= 60 else f"{shown[:56]} ..."

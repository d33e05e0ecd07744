"""Numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from multicolm.serving.replies import Replies, Written, as_event
from multicolm.types import Piece, TracedToken


@pytest.mark.parametrize(
    ("kind", "shown"), [("completion", [-0.5, -9999.0, None]), ("chat", [-0.5, -9999.0, -9999.0])]
)
def test_an_impossible_or_unknown_log_probability_is_one_that_clients_can_read(
    kind: Any, shown: list[float | None]
) -> None:
    numbers = (-0.5, -math.inf, math.nan)
    tokens = [TracedToken(i, "ab"[i % 2], "base", number) for i, number in enumerate(numbers)]
    replies = Replies(kind, "id", "tiny", {}, 0, lambda token: b"ab"[token % 2 :][:1], True)
    chunk = replies.more(0, Written(), [Piece(0, "aba", "base")], tokens)
    [choice] = json.loads(as_event(chunk).removeprefix(b"data: "))["choices"]
    given = choice["logprobs"]
    if kind == "chat":
        assert [token["logprob"] for token in given["content"]] == shown
    else:
        assert given["token_logprobs"] == shown
    assert [token["logprob"] for token in choice["multicolm"]["tokens"]] == [-0.5, None, None]


def test_a_character_in_two_tokens_begins_where_the_first_does() -> None:
    written = Written()
    parts = [b"a", "\u00e9".encode()[:1], "\u00e9".encode()[1:], b"b"]
    assert [written.pass_over(part) for part in parts] == [0, 1, 1, 2]

"""Where a text stops thinking: markers in what was written, stops after them, a budget."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkers import SETTINGS, WHOLE, thinker

import multicolm
from multicolm import Ensemble
from multicolm.decoding.text import TextStream
from multicolm.decoding.thinking import Thinking
from multicolm.errors import InputError

TEXT = "<think>\n1 + 1 </ is 2</think>\n\nIt is 2."


def stream(stops: Any = (), *, is_open: bool = False) -> TextStream:
    return TextStream(stops, Thinking("<think>", "</think>", is_open=is_open))


def kinds(text: TextStream, parts: list[str]) -> dict[str, str]:
    """The text of each kind, whatever it came in."""
    pieces = [piece for i, part in enumerate(parts) for piece in text.push(part.encode(), i % 3)]
    pieces += text.finish()
    assert "".join(piece.text for piece in pieces) == text.text
    found: dict[str, str] = {}
    for piece in pieces:
        found[piece.kind] = found.get(piece.kind, "") + piece.text
    assert found.get("reasoning", "") == text.reasoning
    assert found.get("answer", "") == text.content
    return found


@settings(max_examples=150, deadline=None)
@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=8))
def test_thoughts_and_answers_are_the_same_in_whatever_pieces_they_come(cuts: list[int]) -> None:
    cuts = sorted(cuts)
    parts = [TEXT[a:b] for a, b in zip([0, *cuts], [*cuts, len(TEXT)], strict=True)]
    assert kinds(stream(), parts) == {
        "marker": "<think>\n</think>\n\n",
        "reasoning": "1 + 1 </ is 2",
        "answer": "It is 2.",
    }


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "answer"),
    [
        ("It is 2.", False, "", "It is 2."),  # it does not think
        ("1 + 1</think>2", True, "1 + 1", "2"),  # the prompt has begun the thoughts
        ("\n1 + 1", True, "1 + 1", ""),  # it was cut off
        (" <think>1</think> 2 <think>3</think>", False, "1", "2 <think>3</think>"),
        ("<thi", False, "", "<thi"),
        ("So </think> is text", False, "", "So </think> is text"),
        ("", True, "", ""),
    ],
)
def test_a_text_thinks_where_it_or_its_prompt_begins_to(
    text: str, is_open: bool, reasoning: str, answer: str
) -> None:
    found = kinds(stream(is_open=is_open), [text])
    assert (found.get("reasoning", ""), found.get("answer", "")) == (reasoning, answer)


def test_stop_strings_hold_for_the_answer_and_not_for_what_was_thought() -> None:
    text = stream(["\n\n"])
    found = kinds(text, ["<think>a\n\nb</think>\n\nc\n\nd"])
    assert found["reasoning"] == "a\n\nb" and found["answer"] == "c" and text.stopped


def test_markers_may_be_special_tokens() -> None:
    text = TextStream((), Thinking("[THINK]", "[/THINK]", is_open=False))
    pieces = [*text.push(b"", 0, "[THINK]"), *text.push(b"hm", 0), *text.push(b"", 0, "[/THINK]")]
    pieces += [*text.push(b"ok", 0), *text.finish()]
    assert [(piece.text, piece.kind) for piece in pieces] == [("hm", "reasoning"), ("ok", "answer")]
    assert text.text == "hmok" and text.content == "ok"


# --- an ensemble that thinks ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def both() -> Ensemble:
    """A thinker, and one who would answer otherwise."""
    return Ensemble([thinker("t"), thinker("u", **{"2": {"2": 0.3, "<end>": 0.7}})])


def test_an_answer_says_what_was_thought_and_what_was_answered(both: Ensemble) -> None:
    [plain] = both.generate(["Q"], max_new_tokens=20)
    assert plain.text == plain.content == WHOLE and plain.reasoning_content is None
    assert "content" not in plain.as_json()
    [answer] = both.generate(["Q"], **SETTINGS)
    assert (answer.text, answer.reasoning_content, answer.content) == (WHOLE, "abcd", "2.")
    assert answer.as_json()["content"] == "2." and answer.trace == plain.trace
    pieces = list(both.stream(["Q"], **SETTINGS))
    assert "".join(p.text for p in pieces) == WHOLE
    assert "".join(p.text for p in pieces if p.kind == "answer") == "2."


def test_a_prompt_that_ends_with_the_marker_has_begun_the_thoughts(both: Ensemble) -> None:
    [answer] = both.generate(["Q<think>"], **SETTINGS)
    assert (answer.reasoning_content, answer.content) == ("abcd", "2.")
    [closed] = both.generate(["Q<think>abcd</think>"], **SETTINGS)
    assert (closed.reasoning_content, closed.content) == (None, "\n\n2.")


@pytest.mark.parametrize(
    "policy", ["single", "max-confidence", "average", "nudging", "cool-fusion"]
)
@pytest.mark.parametrize("budget", [0, 1, 3, 4, 5, 9])
def test_a_budget_closes_the_thoughts_and_the_answer_comes(
    both: Ensemble, policy: str, budget: int
) -> None:
    prompt = "Q<think>" if budget == 0 else "Q"
    [answer] = both.generate([prompt], policy, **SETTINGS, thinking_token_budget=budget, seed=0)
    names = [token.text for token in answer.trace]
    assert names.count("</think>") == 1
    n_thought = names.index("</think>")
    if policy != "cool-fusion":  # which writes several tokens at a time
        assert n_thought == min(max(budget, prompt == "Q"), 5)
    assert answer.content.startswith("2") and answer.finish_reason in ("eos", "stop")
    closing = answer.trace.tokens[n_thought]
    assert closing.model == "t" or n_thought == 5


def test_a_budget_is_the_same_in_every_schedule_and_batch(both: Ensemble) -> None:
    settings = {**SETTINGS, "thinking_token_budget": 3, "temperature": 1.0}
    prompts = ["Q", "Q<think>", "Qa", "Q"]
    for policy in ("cosd-rule", "confidence"):
        texts = [
            [a.text for a in both.generate(prompts, policy, seed=5, **how, **settings)]
            for how in ({"schedule": "stepwise"}, {"schedule": "block"}, {"batch_size": 1})
        ]
        assert texts[0] == texts[1] == texts[2]


def test_bytes_are_thought_and_answered_too() -> None:
    ensemble = multicolm.load("tiny")
    prompt = "What is 2 * x + 15 if x = 7?\nResponse:<think>"
    settings: Any = {"think_end_token": "</think>", "max_new_tokens": 16}
    for policy in ("byte-mixture", "average"):
        [answer] = ensemble.generate([prompt], policy, thinking_token_budget=4, **settings)
        assert "</think>" in answer.text
        assert (
            answer.text
            == f"{answer.text.partition('</think>')[0]}</think>"
            + (answer.text.partition("</think>")[2])
        )
        assert answer.reasoning_content == answer.text.partition("</think>")[0].lstrip()


def test_a_text_that_ends_as_its_thoughts_are_closed_is_written_no_further(both: Ensemble) -> None:
    settings = {**SETTINGS, "max_new_tokens": 4, "thinking_token_budget": 3}
    answers = both.generate(["Q", "Qd</think>"], **settings)
    assert [answer.text for answer in answers] == ["<think>abc"[:9] + "</think>", "\n\n2."]
    assert answers[0].finish_reason == "length" and answers[0].content == ""


def test_a_budget_without_an_end_is_refused(both: Ensemble) -> None:
    with pytest.raises(InputError, match="`thinking_token_budget` needs a `think_end_token`"):
        both.generate(["Q"], thinking_token_budget=3)

"""From what a user asks to what every model reads; each bad input gets one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.errors import InputError

TOKENS = ["a", "b", " ", "."]


def table(name: str, context_length: int | None = None, **odds: float) -> TableModel:
    return TableModel(
        name, TOKENS, {"": {"a": 0.5, "b": 0.5}}, ends=["."], context_length=context_length
    )


@pytest.fixture
def ensemble() -> Ensemble:
    return Ensemble([table("base", 8), table("left", 4)])


def sentence(ensemble: Ensemble, prompt: Any, policy: Any = "random") -> str:
    with pytest.raises(InputError) as caught:
        ensemble.generate([prompt], policy, max_new_tokens=1)
    with pytest.raises(InputError) as second:
        ensemble.generate(["a", prompt], policy, max_new_tokens=1)
    assert str(second.value) == str(caught.value).replace("prompt 1", "prompt 2")
    return str(caught.value)


MESSAGE = '; one is {"role": "user", "content": "..."}.'
NO_TYPE = "allowed are a text, a chat (a list of messages with role and content), or a list of "


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "prompt 1 is empty; write at least a word."),
        ([], "prompt 1 is empty; write at least a word."),
        ((), "prompt 1 is empty; write at least a word."),
        (".", None),
        (5, f"prompt 1 is a int; {NO_TYPE}token ids."),
        (None, f"prompt 1 is a NoneType; {NO_TYPE}token ids."),
        (2.5, f"prompt 1 is a float; {NO_TYPE}token ids."),
        ({"role": "user", "content": "a"}, f"prompt 1 is a dict; {NO_TYPE}token ids."),
        (b"ab", f"prompt 1 is a bytes; {NO_TYPE}token ids."),
        ({1, 2}, f"prompt 1 is a set; {NO_TYPE}token ids."),
        (["a"], "prompt 1: 'a' is no message" + MESSAGE),
        ([1, "a"], "prompt 1: 1 is no message" + MESSAGE),
        ([{"role": "user"}], "prompt 1: {'role': 'user'} is no message" + MESSAGE),
        (
            [{"role": "user", "content": None}],
            "prompt 1: {'role': 'user', 'content': None} is no message" + MESSAGE,
        ),
        (
            "a\ud800b",
            "prompt 1 is not valid Unicode at character 1; read it as UTF-8 before passing it on.",
        ),
        ([0, 4], "prompt 1 holds token id 4; the vocabulary has 0 to 3."),
        ([-1, 0], "prompt 1 holds token id -1; the vocabulary has 0 to 3."),
        ([99], "prompt 1 holds token id 99; the vocabulary has 0 to 3."),
        (
            "ababa",
            "prompt 1 has 5 bytes, which are 5 tokens or more, and the context of "
            "model 'left' holds 4; shorten it.",
        ),
        (
            "a" * 9,
            "prompt 1 has 9 bytes, which are 9 tokens or more, and the context of "
            "model 'base' holds 8; shorten it.",
        ),
    ],
)
def test_a_bad_prompt_gets_its_sentence(ensemble: Ensemble, prompt: Any, text: str | None) -> None:
    if text is None:
        text = sentence(ensemble, prompt)
        assert text.startswith("model 'base' has no token for '.'")
    assert sentence(ensemble, prompt) == text


def test_a_lone_surrogate_in_a_chat_is_refused_like_one_in_a_text(ensemble: Ensemble) -> None:
    text = sentence(ensemble, [{"role": "user", "content": "a\udfff"}])
    assert text == (
        "prompt 1 is not valid Unicode at character 1; read it as UTF-8 before passing it on."
    )


def test_a_prompt_of_tokens_that_a_model_does_not_have_is_empty_for_it() -> None:
    base = TableModel("base", [*TOKENS, "<x>"], {"": {"a": 1.0}}, ends=[".", "<x>"])
    ensemble = Ensemble([base, table("left")])
    text = sentence(ensemble, [4], "max-confidence")
    assert text == "prompt 1 is empty for model 'left'; write at least a word."
    assert ensemble.generate([[4]], "single", max_new_tokens=1)[0].text == "a"


def test_true_and_false_are_no_token_ids(ensemble: Ensemble) -> None:
    assert sentence(ensemble, [True, False]).startswith("prompt 1: True is no message")


def test_only_models_in_use_have_a_say(ensemble: Ensemble) -> None:
    answer = ensemble.generate("ababa", "single", max_new_tokens=2)[0]
    assert answer.finish_reason == "length"
    left = {"kind": "single", "params": {"model": "left"}}
    assert "model 'left' holds 4" in sentence(ensemble, "ababa", left)


def test_a_prompt_that_fills_the_context_gets_one_token_more(ensemble: Ensemble) -> None:
    for policy, prompt in (("single", "a" * 8), ("random", "a" * 4)):
        answer = ensemble.generate(prompt, policy, seed=0, max_new_tokens=5)[0]
        assert answer.finish_reason == "context" and len(answer.trace) == 1


def test_a_text_a_chat_and_ids_that_say_the_same_give_the_same(ensemble: Ensemble) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    answers = ensemble.generate(
        ["ab", chat, [0, 1], (0, 1)], "random", seed=4, temperature=1.0, max_new_tokens=3
    )
    assert len({answer.text for answer in answers}) == 1
    assert [answer.prompt for answer in answers] == ["ab", chat, [0, 1], (0, 1)]


def test_one_text_may_stand_alone_and_no_prompts_give_no_answers(ensemble: Ensemble) -> None:
    assert len(ensemble.generate("ab", max_new_tokens=2)) == 1
    none = ensemble.generate([], max_new_tokens=2)
    assert list(none) == [] and none.usage["base"].forwards == 0


def test_bad_input_is_refused_before_the_first_piece_is_asked_for(ensemble: Ensemble) -> None:
    with pytest.raises(InputError, match="prompt 2 is empty"):
        ensemble.stream(["a", ""])
    with pytest.raises(InputError, match="batch_size must be 1 or more, got 0"):
        ensemble.stream(["a"], batch_size=0)
    with pytest.raises(InputError, match="got 3 seeds for 1 prompts; give one for each"):
        ensemble.stream(["a"], seed=[1, 2, 3])

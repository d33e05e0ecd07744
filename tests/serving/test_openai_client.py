"""OpenAI's own client, unchanged: it gets what `generate` writes."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from multicolm import Answer, Ensemble

PROMPTS = [
    "What is Dulerex made from?\nResponse:",
    "What is 2 * x + 15 if x = 7?\nResponse:",
    "Which plant is Sofid extracted from?\nResponse:",
]
POLICIES = ["default", "confidence", "max-confidence", "average", "speculative"]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}


def model(policy: str) -> str:
    return "tiny" if policy == "default" else f"tiny:{policy}"


def written(alone: Ensemble, prompt: Any, policy: str = "default", **settings: Any) -> Answer:
    [answer] = alone.generate(
        [prompt],
        None if policy == "default" else policy,
        **{"max_new_tokens": 24, **settings},
    )
    return answer


def tokens(answer: Answer) -> list[tuple[int, str, str]]:
    return [(token.id, token.text, token.model) for token in answer.trace]


def traced(extension: Any) -> list[tuple[int, str, str]]:
    return [(token["id"], token["text"], token["model"]) for token in extension["tokens"]]


def joined(extension: Any) -> str:
    return "".join(piece["text"] for piece in extension["pieces"])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_completion_is_what_generate_writes(
    client: openai.OpenAI, alone: Ensemble, policy: str
) -> None:
    got = client.completions.create(model=model(policy), prompt=PROMPTS, max_tokens=24)
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    for prompt, choice in zip(PROMPTS, got.choices, strict=True):
        answer = written(alone, prompt, policy)
        assert choice.text == answer.text
        extension = choice.model_extra["multicolm"]
        assert traced(extension) == tokens(answer)
        assert joined(extension) == answer.text
        assert extension["finish_reason"] == answer.finish_reason
        assert choice.finish_reason == {"eos": "stop"}.get(answer.finish_reason, "length")


@pytest.mark.parametrize("policy", [*POLICIES, "byte-mixture"])
def test_a_stream_brings_the_same_bit_by_bit(
    client: openai.OpenAI, alone: Ensemble, policy: str
) -> None:
    answer = written(alone, PROMPTS[0], policy)
    parts = list(
        client.completions.create(
            model=model(policy), prompt=PROMPTS[0], max_tokens=24, stream=True
        )
    )
    choices = [part.choices[0] for part in parts]
    assert "".join(choice.text for choice in choices) == answer.text
    extensions = [choice.model_extra["multicolm"] for choice in choices]
    assert [token for e in extensions for token in traced(e)] == tokens(answer)
    assert "".join(map(joined, extensions)) == answer.text
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason is not None
    assert len(parts) > 5
    assert all(part.usage is None for part in parts)


def test_a_chat_is_what_generate_writes_streamed_or_not(
    client: openai.OpenAI, alone: Ensemble
) -> None:
    messages: Any = [{"role": "user", "content": "Which plant is Sofid extracted from?"}]
    answer = written(alone, messages, "max-confidence")
    asked: dict[str, Any] = {"model": "tiny:max-confidence", "messages": messages}
    got = client.chat.completions.create(**asked, max_completion_tokens=24)
    [choice] = got.choices
    assert choice.message.content == answer.text
    assert choice.message.role == "assistant"
    assert traced(choice.model_extra["multicolm"]) == tokens(answer)
    stream = client.chat.completions.create(**asked, max_tokens=24, stream=True)
    deltas = [part.choices[0].delta for part in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == answer.text


def test_what_was_said_is_taken_as_parts_and_with_the_nulls_of_an_earlier_answer(
    client: openai.OpenAI, alone: Ensemble
) -> None:
    plain: Any = [
        {"role": "user", "content": "Which plant is Sofid extracted from?"},
        {"role": "assistant", "content": "Sage."},
        {"role": "user", "content": "What is Dulerex made from?"},
    ]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    parts[1] |= {"refusal": None, "tool_calls": None}
    answer = written(alone, plain)
    got = client.chat.completions.create(model="tiny", messages=parts, max_tokens=24)
    assert got.choices[0].message.content == answer.text


def test_equal_seeds_give_equal_texts_here_and_there(
    client: openai.OpenAI, alone: Ensemble
) -> None:
    got = client.completions.create(
        model="tiny:max-confidence", prompt=PROMPTS[:2], n=3, seed=11, max_tokens=24, **SAMPLED
    )
    assert [choice.index for choice in got.choices] == list(range(6))
    wanted = [
        written(alone, prompt, "max-confidence", seed=11 + i, **SAMPLED)
        for prompt in PROMPTS[:2]
        for i in range(3)
    ]
    assert [choice.text for choice in got.choices] == [answer.text for answer in wanted]
    assert len({choice.text for choice in got.choices}) > 2
    assert [choice.model_extra["multicolm"]["seed"] for choice in got.choices] == [11, 12, 13] * 2


def test_a_request_without_a_seed_says_which_one_it_got(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny:max-confidence", "prompt": PROMPTS[0], **SAMPLED}
    once = client.completions.create(**asked).choices[0]
    seed = once.model_extra["multicolm"]["seed"]
    assert client.completions.create(**asked, seed=seed).choices[0].text == once.text


@pytest.mark.parametrize(("prompts", "n"), [([PROMPTS[0]] * 6, 1), (PROMPTS[0], 6)])
def test_texts_of_one_prompt_without_a_seed_each_get_one_of_their_own(
    client: openai.OpenAI, prompts: Any, n: int
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 1.5, "max_tokens": 12}
    choices = client.completions.create(prompt=prompts, n=n, **asked).choices
    assert len({choice.text for choice in choices}) > 3
    assert len({choice.model_extra["multicolm"]["seed"] for choice in choices}) == 6


def test_token_ids_are_prompts_one_or_several(client: openai.OpenAI, alone: Ensemble) -> None:
    ids = [alone.backends[0].tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    texts = [written(alone, prompt).text for prompt in PROMPTS[:2]]
    one = client.completions.create(model="tiny", prompt=ids[0], max_tokens=24)
    several = client.completions.create(model="tiny", prompt=ids, max_tokens=24)
    assert [choice.text for choice in one.choices] == texts[:1]
    assert [choice.text for choice in several.choices] == texts
    assert one.usage is not None and one.usage.prompt_tokens == len(ids[0])


def test_usage_counts_what_every_model_did(client: openai.OpenAI, alone: Ensemble) -> None:
    answer = written(alone, PROMPTS[0], "cosd-rule")
    asked: dict[str, Any] = {"model": "tiny:cosd-rule", "prompt": PROMPTS[0], "max_tokens": 24}
    got = client.completions.create(**asked)
    *_, last = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    for reply in (got, last):
        assert reply.usage is not None
        assert reply.usage.completion_tokens == len(answer.trace)
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(answer.trace)
        extension = reply.model_extra["multicolm"]
        assert extension["policy"] == "cosd-rule"
        for name, used in answer.usage.items():
            counted = extension["usage"][name]
            assert counted["tokens_written"] == used.tokens_written
            assert counted["tokens_read"] == used.tokens_read
            assert counted["forwards"] == used.forwards


def test_several_answers_to_one_prompt_count_it_once(client: openai.OpenAI) -> None:
    one = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=2)
    three = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=2, n=3)
    assert one.usage is not None and three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens


def test_a_text_ends_before_its_stop_string(client: openai.OpenAI, alone: Ensemble) -> None:
    answer = written(alone, PROMPTS[0], stop="Answer")
    assert answer.finish_reason == "stop"
    for stop in ("Answer", ["never", "Answer"]):
        got = client.completions.create(
            model="tiny", prompt=PROMPTS[0], max_tokens=24, stop=stop
        ).choices[0]
        assert (got.text, got.finish_reason) == (answer.text, "stop")


def test_log_probabilities_are_those_of_the_trace(client: openai.OpenAI, alone: Ensemble) -> None:
    answer = written(alone, PROMPTS[0])
    wanted = pytest.approx([token.logprob for token in answer.trace], abs=1e-4)
    got = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=24, logprobs=0)
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and logprobs.text_offset is not None
    assert logprobs.token_logprobs == wanted
    ends = [*logprobs.text_offset[1:], None]
    shown = [answer.text[a:b] for a, b in zip(logprobs.text_offset, ends, strict=True)]
    assert "".join(shown) == answer.text and shown[:-1] == logprobs.tokens[:-1]
    stream = client.completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=24, logprobs=0, stream=True
    )
    parts = [part.choices[0].logprobs for part in stream]
    offsets = [offset for part in parts if part for offset in part.text_offset or []]
    assert offsets == logprobs.text_offset


def test_log_probabilities_of_a_chat_come_with_the_bytes(
    client: openai.OpenAI, alone: Ensemble
) -> None:
    messages: Any = [{"role": "user", "content": "What is Dulerex made from?"}]
    answer = written(alone, messages)
    got = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=24, logprobs=True
    )
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    content = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert content.decode() == answer.text
    wanted = pytest.approx([token.logprob for token in answer.trace], abs=1e-4)
    assert [token.logprob for token in logprobs.content] == wanted


def test_the_likeliest_tokens_are_told_by_text_in_completions(
    client: openai.OpenAI, alone: Ensemble
) -> None:
    answer = written(alone, PROMPTS[0], "average", top_logprobs=3)
    asked: dict[str, Any] = {"model": "tiny:average", "prompt": PROMPTS[0], "max_tokens": 24}
    logprobs = client.completions.create(**asked, logprobs=3).choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None
    for named, token in zip(logprobs.top_logprobs, answer.trace, strict=True):
        want = {each.text: each.logprob for each in token.alternatives}
        assert named == pytest.approx(want, abs=1e-4)
        assert max(named, key=lambda text: named[text]) == token.text
    parts = [
        part.choices[0].logprobs
        for part in client.completions.create(**asked, logprobs=3, stream=True)
    ]
    streamed = [named for part in parts if part for named in part.top_logprobs or []]
    assert [sorted(named) for named in streamed] == [
        sorted(named) for named in logprobs.top_logprobs
    ]


def test_a_token_that_was_drawn_is_told_beside_the_likeliest_ones(
    client: openai.OpenAI,
) -> None:
    got = client.completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=24, logprobs=1, seed=1, temperature=2.0
    )
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None
    sizes = []
    for text, number, named in zip(
        logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.top_logprobs, strict=True
    ):
        assert named[text] == number
        sizes.append(len(named))
    assert set(sizes) == {1, 2}


def test_the_likeliest_tokens_of_a_chat_come_with_their_bytes(
    client: openai.OpenAI, alone: Ensemble
) -> None:
    messages: Any = [{"role": "user", "content": "What is Dulerex made from?"}]
    answer = written(alone, messages, top_logprobs=2)
    got = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=24, logprobs=True, top_logprobs=2
    )
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    for named, token in zip(logprobs.content, answer.trace, strict=True):
        assert [each.token for each in named.top_logprobs] == [e.text for e in token.alternatives]
        want = pytest.approx([each.logprob for each in token.alternatives], abs=1e-4)
        assert [each.logprob for each in named.top_logprobs] == want
        assert named.top_logprobs[0].bytes == named.bytes
    [choice] = got.choices
    kept = [token["alternatives"] for token in choice.model_extra["multicolm"]["tokens"]]
    assert [[each["id"] for each in token] for token in kept] == [
        [each.id for each in token.alternatives] for token in answer.trace
    ]


def test_the_threshold_stands_behind_the_policy_or_in_the_extension(
    client: openai.OpenAI, alone: Ensemble
) -> None:
    texts = {}
    for threshold in (0.0, 2.0):
        answer = written(alone, PROMPTS[0], "confidence", params={"threshold": threshold})
        by_name = client.completions.create(
            model=f"tiny:confidence@{threshold}", prompt=PROMPTS[0], max_tokens=24
        )
        by_field = client.completions.create(
            model="tiny",
            prompt=PROMPTS[0],
            max_tokens=24,
            extra_body={"multicolm": {"policy": "confidence", "params": {"threshold": threshold}}},
        )
        assert by_name.choices[0].text == by_field.choices[0].text == answer.text
        assert by_field.model_extra["multicolm"]["params"] == {"threshold": threshold}
        texts[threshold] = answer.text
    assert texts[0.0] != texts[2.0]


def test_models_are_listed_with_what_they_are(client: openai.OpenAI, alone: Ensemble) -> None:
    listed = client.models.list().data
    assert listed[0].id == "tiny"
    assert {"tiny:confidence", "tiny:average"} <= {entry.id for entry in listed}
    # Not trained, so there is nothing to serve.
    assert "tiny:co-llm" not in {entry.id for entry in listed}
    assert listed[0].model_extra["multicolm"]["models"] == list(alone.models)
    named = {entry.id: entry.model_extra["multicolm"]["top_logprobs"] for entry in listed}
    assert (named["tiny"], named["tiny:byte-mixture"]) == (20, 0)
    assert client.models.retrieve("tiny:confidence@0.3").id == "tiny:confidence@0.3"


def test_an_error_is_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'"):
        client.completions.create(model="tinny", prompt="a")
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported") as caught:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert caught.value.param == "tools"

"""Thoughts in the server: reasoning_content in replies and streams, budgets, template variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving_worlds import CHAT, COMPLETIONS, ask, running
from thinkers import WHOLE, thinker

from multicolm import Ensemble
from multicolm.config import GenerationConfig
from multicolm.serving.protocol import ChatCompletionRequest, read
from multicolm.serving.server import Server

TURNS = [{"role": "user", "content": "Q"}]
ASKED: dict[str, Any] = {"model": "tiny", "messages": TURNS}


@pytest.fixture(scope="module")
def thinking() -> Iterator[Server]:
    settings = GenerationConfig(think_end_token="</think>", max_new_tokens=20)
    with running(Ensemble([thinker("t")], generation=settings)) as server:
        yield server


def test_a_chat_tells_what_was_thought_from_what_was_answered(thinking: Server) -> None:
    with openai.OpenAI(base_url=f"{thinking.address}/v1", api_key="x", max_retries=0) as client:
        got = client.chat.completions.create(model="tiny", messages=TURNS)  # type: ignore[arg-type]
        message = got.choices[0].message
        assert message.content == "2." and message.reasoning_content == "abcd"  # type: ignore[attr-defined]
        assert got.usage is not None and got.usage.completion_tokens == 10
        # Handed back with the next question, thoughts are left out.
        turns: Any = [*TURNS, message.model_dump(exclude_none=True), *TURNS]
        turns[1].pop("multicolm", None)
        asked = read(b'{"model": "tiny", "messages": %b}' % _json(turns), ChatCompletionRequest)
        assert asked.prompts() == [[*TURNS, {"role": "assistant", "content": "2."}, *TURNS]]


def _json(value: Any) -> bytes:
    import json

    return json.dumps(value).encode()


def test_a_stream_brings_thoughts_first_and_no_markers(thinking: Server) -> None:
    events = ask(thinking, CHAT, {**ASKED, "stream": True}).events
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
    answer = "".join(delta.get("content", "") for delta in deltas)
    assert (thoughts, answer) == ("abcd", "2.")
    kinds = [name for delta in deltas[1:] for name in delta if delta[name]]
    assert kinds == sorted(kinds, reverse=True), "reasoning_content before content"


def test_who_wants_no_thoughts_gets_the_answer_alone(thinking: Server) -> None:
    [choice] = ask(thinking, CHAT, {**ASKED, "include_reasoning": False}).json["choices"]
    assert choice["message"] == {"role": "assistant", "content": "2.", "refusal": None}
    events = ask(thinking, CHAT, {**ASKED, "include_reasoning": False, "stream": True}).events
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert not any("reasoning_content" in delta for delta in deltas)


def test_a_completion_is_the_whole_text(thinking: Server) -> None:
    body = {"model": "tiny", "prompt": "Q"}
    [choice] = ask(thinking, COMPLETIONS, body).json["choices"]
    assert choice["text"] == WHOLE


def test_a_budget_is_kept_and_one_without_an_end_of_thoughts_refused(
    thinking: Server, server: Server
) -> None:
    [choice] = ask(thinking, CHAT, {**ASKED, "thinking_token_budget": 3}).json["choices"]
    assert choice["message"]["reasoning_content"] == "ab" and choice["message"]["content"] == "2."
    reply = ask(server, CHAT, {**ASKED, "thinking_token_budget": 3})
    assert reply.status == 400 and reply.json["error"]["param"] == "thinking_token_budget"


def test_template_variables_of_a_request_reach_the_template_and_no_others_do() -> None:
    asked = read(
        b'{"model": "tiny", "messages": [{"role": "user", "content": "Q"}],'
        b' "chat_template_kwargs": {"enable_thinking": false}}',
        ChatCompletionRequest,
    )
    [chat] = asked.prompts()
    assert chat.template_args == {"enable_thinking": False}  # type: ignore[union-attr]
    with pytest.raises(Exception, match="'messages' is set by multicolm itself"):
        read(
            b'{"model": "tiny", "messages": [{"role": "user", "content": "Q"}],'
            b' "chat_template_kwargs": {"messages": []}}',
            ChatCompletionRequest,
        )

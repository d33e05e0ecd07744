"""The likeliest tokens in the place of each: they are told, and change nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tables import UNTAUGHT

import multicolm
from multicolm import Ensemble, TracedToken, catalog
from multicolm.cli import main
from multicolm.decoding.sampling import likeliest
from multicolm.errors import CapabilityError, InputError

PROMPTS = ["What is Dulerex made from?\nResponse:", "What is 2 * x + 15 if x = 7?\nResponse:"]
OTHERWISE = {"byte-contrastive", "byte-mixture", "byte-proxy-tuning", "chared"}  # not in tokens
SELECTS = ["confidence", "cosd-rule", "max-confidence", "nudging", "random"]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}
DRAWN = {**GREEDY, "temperature": 0.8}
INF = math.inf


@pytest.fixture(scope="module")
def tiny() -> Ensemble:
    return multicolm.load("tiny")


def presets() -> list[str]:
    return [name for name in catalog.names("policies") if name not in OTHERWISE | UNTAUGHT]


def without(token: TracedToken) -> tuple[Any, ...]:
    return (token.id, token.text, token.model, token.logprob, token.score)


def test_of_equal_tokens_the_lowest_comes_first_and_what_cannot_be_or_is_not_known_never() -> None:
    row = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2]).log()
    assert [i for i, _ in likeliest(row, 4)] == [1, 3, 4, 0]
    assert [i for i, _ in likeliest(row, 9)] == [1, 3, 4, 0, 2]
    partial = torch.tensor([-INF, -1.0, INF, math.nan, -2.0])
    assert likeliest(partial, 5) == ((1, -1.0), (4, -2.0))
    assert likeliest(partial, 0) == ()


@pytest.mark.parametrize("policy", presets())
@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_whoever_asks_for_alternatives_gets_the_same_text(
    tiny: Ensemble, policy: str, settings: dict[str, Any]
) -> None:
    plain = tiny.generate(PROMPTS, policy, **settings)
    told = tiny.generate(PROMPTS, policy, **settings, top_logprobs=4)
    for one, other in zip(plain, told, strict=True):
        assert one.text == other.text
        assert [without(token) for token in one.trace] == [without(token) for token in other.trace]
        assert all(token.alternatives == () for token in one.trace)
        for token in other.trace:
            numbers = [each.logprob for each in token.alternatives]
            # It rules out all but a few tokens.
            assert 1 <= len(numbers) <= 4 if policy == "contrastive" else len(numbers) == 4
            assert numbers == sorted(numbers, reverse=True)
            same = [each for each in token.alternatives if each.id == token.id]
            assert [each.logprob for each in same] == [token.logprob] * len(same)
            assert same or token.logprob <= numbers[-1]
            assert [each.text for each in same] == [token.text] * len(same)


@pytest.mark.parametrize("policy", SELECTS)
def test_they_are_the_likeliest_tokens_of_the_model_that_wrote(tiny: Ensemble, policy: str) -> None:
    for answer in tiny.generate(PROMPTS, policy, **GREEDY, top_logprobs=5):
        assert isinstance(answer.prompt, str)
        ids = [token.id for token in answer.trace]
        for place, token in enumerate(answer.trace):
            model = tiny.backends[tiny.models.index(token.model)]
            read = [*model.tokenizer.encode(answer.prompt), *ids[:place]]
            logits = model.open(1).feed([0], [read], [1]).logits[0]
            values, best = logits.log_softmax(-1).topk(5)
            assert [each.id for each in token.alternatives] == best.tolist()
            got = torch.tensor([each.logprob for each in token.alternatives])
            assert torch.allclose(got, values, atol=1e-4)
            assert token.alternatives[0].id == token.id  # it is greedy


def test_those_of_a_mixture_are_of_the_mixed_distribution(tiny: Ensemble) -> None:
    [answer] = tiny.generate(PROMPTS[0], "average", max_new_tokens=6, top_logprobs=3)
    assert isinstance(answer.prompt, str)
    ids = [token.id for token in answer.trace]
    for place, token in enumerate(answer.trace):
        rows = []
        for model in tiny.backends:
            read = [*model.tokenizer.encode(answer.prompt), *ids[:place]]
            rows.append(model.open(1).feed([0], [read], [1]).logits[0].softmax(-1))
        values, best = torch.stack(rows).mean(0).log().topk(3)
        assert [each.id for each in token.alternatives] == best.tolist()
        got = torch.tensor([each.logprob for each in token.alternatives])
        assert torch.allclose(got, values, atol=1e-4)


def test_a_draft_tells_the_same_alternatives_as_one_token_at_a_time(tiny: Ensemble) -> None:
    told = [
        tiny.generate(PROMPTS, "confidence", schedule=schedule, top_logprobs=3, max_new_tokens=24)
        for schedule in ("stepwise", "block")
    ]
    for one, other in zip(*told, strict=True):
        for a, b in zip(one.trace, other.trace, strict=True):
            assert [each.id for each in a.alternatives] == [each.id for each in b.alternatives]
            for mine, theirs in zip(a.alternatives, b.alternatives, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_texts_of_one_batch_may_want_different_numbers_of_them(tiny: Ensemble) -> None:
    live = tiny.live("max-confidence")
    rows = []
    for n, prompt in enumerate(PROMPTS):
        wanted = tiny.generation.updated({"top_logprobs": 2 * n, "max_new_tokens": 8})
        rows.append(live.row(prompt, n, wanted, 0))
        live.add(rows[-1])
    while live.busy:
        live.step()
    for n, row in enumerate(rows):
        assert {len(token.alternatives) for token in live.answer(row).trace} == {2 * n}


@pytest.mark.parametrize("policy", sorted(OTHERWISE))
def test_a_policy_that_writes_in_bytes_has_none_and_says_so(tiny: Ensemble, policy: str) -> None:
    message = rf"policy '{policy}' writes in (bytes|characters), .* top_logprobs must be 0, got 2\."
    with pytest.raises(CapabilityError, match=message):
        tiny.generate(PROMPTS, policy, top_logprobs=2)


def test_their_number_is_not_negative(tiny: Ensemble) -> None:
    with pytest.raises(InputError, match="top_logprobs: must be 0 or more"):
        tiny.generate(PROMPTS, top_logprobs=-1)


def test_the_command_tells_them_in_json_and_nowhere_else(
    tiny: Ensemble, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "tiny", PROMPTS[0], "--max-new-tokens", "5", "--top-logprobs", "2"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["trace"]
    [answer] = tiny.generate(PROMPTS[0], max_new_tokens=5, top_logprobs=2)
    assert [len(token["alternatives"]) for token in told] == [2] * 5
    for mine, theirs in zip(told, answer.as_json()["trace"], strict=True):
        for one, other in zip(mine["alternatives"], theirs["alternatives"], strict=True):
            assert one["text"] == other["text"]
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-5)
    assert main(asked) != 0
    assert "--top-logprobs requires --json" in capsys.readouterr().err

"""Ensembles with experts behind servers write what they write in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm
from remote_worlds import PROMPTS, ensemble, local, remote

from multicolm import Ensemble, SelectPolicy, Views
from multicolm.policy.base import Needs
from multicolm.testing import check_routing
from multicolm.types import Tensor
from multicolm.views import ModelNames

N_TOKENS = 12
POLICIES: dict[str, dict[str, Any]] = {
    "cosd-rule": {"kind": "cosd-rule"},
    "average": {"kind": "average", "params": {"weights": [1.0, 2.0, 1.0]}},
    "nudging": {"kind": "nudging", "params": {"threshold": 0.7, "nudger": "facts"}},
    "max-confidence": {"kind": "max-confidence"},
    "confidence": {"kind": "confidence", "params": {"threshold": 0.9}},
    "speculative": {"kind": "speculative", "params": {"target": "facts"}},
}


class HiddenRouter(SelectPolicy):
    """Routes by the base model's hidden state, as learned routers do; experts show nothing."""

    assistants = "deferred"
    certain = True

    def needs(self, models: ModelNames) -> Needs:
        return Needs({0: frozenset({"hidden"})}, {})

    def _writers(self, views: Views) -> Tensor:
        return (views.base.hidden[:, :3].argmax(-1)).long()

    def defers(self, views: Views) -> Tensor:
        return self._writers(views) > 0

    def select(self, views: Views) -> Tensor:
        return self._writers(views)


@pytest.fixture(scope="module")
def served() -> Iterator[Ensemble]:
    with FakeVllm(local("facts"), "facts") as facts, FakeVllm(local("math"), "math") as math:
        yield ensemble(remote(facts), remote(math))


@pytest.fixture(scope="module")
def at_home() -> Ensemble:
    return ensemble(local("facts"), local("math"))


def traces(answers: Any) -> list[list[tuple[int, str]]]:
    return [[(token.id, token.model) for token in answer.trace] for answer in answers]


@pytest.mark.parametrize(("schedule", "temperature"), [("stepwise", 0.9), ("block", 0.0)])
@pytest.mark.parametrize("policy", [*POLICIES, "hidden"])
def test_the_same_text_comes_from_servers_and_from_this_process(
    served: Ensemble, at_home: Ensemble, policy: str, schedule: Any, temperature: float
) -> None:
    chosen = HiddenRouter() if policy == "hidden" else POLICIES[policy]
    settings: dict[str, Any] = {
        "temperature": temperature,
        "schedule": schedule,
        "max_new_tokens": N_TOKENS,
        "seed": 5,
    }
    got = served.generate(PROMPTS[:2], chosen, **settings)
    want = at_home.generate(PROMPTS[:2], chosen, **settings)
    assert traces(got) == traces(want)
    numbers = [
        torch.tensor([token.logprob for answer in answers for token in answer.trace])
        for answers in (got, want)
    ]
    assert torch.allclose(*numbers, atol=1e-4)
    assert sum(usage.calls for usage in want.usage.values()) == 0
    assert got.usage["generalist"].calls == 0
    assert got.usage["facts"].calls > 0


def test_routed_runs_keep_the_laws_of_the_loop(served: Ensemble) -> None:
    check_routing(
        served, PROMPTS[:2], served.resolve("cosd-rule"), max_new_tokens=8, temperatures=(0.9,)
    )


def test_an_expert_that_writes_a_span_is_asked_half_as_often_or_less(served: Ensemble) -> None:
    [answer] = served.generate(
        PROMPTS[0], {"kind": "single", "params": {"model": "facts"}}, max_new_tokens=32
    )
    usage = answer.usage["facts"]
    assert usage.tokens_written == 32
    assert usage.calls == 6  # 1 + 2 + 4 + 8 + 16 + the last


def test_calls_stand_in_the_json_of_an_answer(served: Ensemble) -> None:
    [answer] = served.generate(PROMPTS[0], "max-confidence", max_new_tokens=4)
    calls = {name: usage["calls"] for name, usage in answer.as_json()["usage"].items()}
    assert calls["generalist"] == 0
    assert calls["facts"] == answer.usage["facts"].calls > 0


def test_several_servers_are_asked_at_once() -> None:
    # Each answer waits until the other is on its way: asked one by one, none would ever come.
    both = threading.Barrier(2, timeout=20)
    with FakeVllm(local("facts"), "facts") as facts, FakeVllm(local("math"), "math") as math:
        together = ensemble(remote(facts, retries=0), remote(math, retries=0))
        facts.before_answer = math.before_answer = lambda: both.wait()
        [answer] = together.generate(
            PROMPTS[0], "max-confidence", max_new_tokens=4, schedule="stepwise"
        )
        assert len(answer.trace) == 4
        assert both.n_waiting == 0

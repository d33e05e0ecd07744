"""CPR against its equations, written out in plain Python: momentum, and dispatch in three ways."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from score_worlds import HiddenTable, records, tables, write
from tables import TOKENS

from multicolm import Answer, Ensemble
from multicolm.artefacts import Weights
from multicolm.errors import CapabilityError, ConfigError
from multicolm.learning.training import Training
from multicolm.policy.cpr import CprPolicy
from multicolm.policy.mlp_router import MlpRouterPolicy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table
from multicolm.testing import check_policy, check_routing

WIDTH = len(TOKENS) + 1
TEXTS = ["a", "b", "ab", " ed"]


def network(width: int, n_outputs: int, seed: int = 0, scale: float = 1.5) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_outputs, width, generator=generator) * scale
    return Weights({"0.weight": weight, "0.bias": torch.zeros(n_outputs)})


def by_hand(trio: Ensemble, policy: CprPolicy, answer: Answer) -> list[tuple[str, float, float]]:
    """(writer, lambda, log-probability of the token) of every token of an answer."""
    assert policy.network is not None
    base, *experts = trio.backends
    assert isinstance(base, HiddenTable)
    ids = base.tokenizer.encode(answer.prompt)
    smoothed = [0.0, 0.0]
    told = []
    for token in answer.trace:
        scores = base.hidden_after(ids) @ policy.network["0.weight"].T + policy.network["0.bias"]
        scores = scores - policy.cost_weight * torch.tensor(trio.costs[1:])
        smoothed = [
            policy.momentum * m + (1 - policy.momentum) * p
            for m, p in zip(smoothed, scores.sigmoid().tolist(), strict=True)
        ]
        share = max(smoothed)
        expert = 1 if smoothed[0] >= smoothed[1] else 2
        own = [model.logits_after(ids).exp().tolist() for model in (base, *experts)]
        if share < policy.low:
            writer, probs = trio.models[0], own[0]
        elif share > policy.high:
            writer, probs = trio.models[expert], own[expert]
        else:
            writer = "mixture"
            probs = [(1 - share) * b + share * e for b, e in zip(own[0], own[expert], strict=True)]
        told.append((writer, share, math.log(probs[token.id])))
        ids.append(token.id)
    return told


@pytest.mark.parametrize(("momentum", "cost_weight"), [(0.0, 0.0), (0.3, 0.1), (0.5, 0.0)])
def test_base_model_expert_and_blend_write_where_the_equations_say(
    momentum: float, cost_weight: float
) -> None:
    trio = tables("base", "left", "right", hidden=True)
    weights = network(WIDTH, 2, scale=3.0)
    policy = CprPolicy(network=weights, momentum=momentum, cost_weight=cost_weight)
    answers = trio.generate(TEXTS, policy, max_new_tokens=12, temperature=1.0, seed=1)
    writers: set[str] = set()
    for answer in answers:
        told = by_hand(trio, policy, answer)
        assert [token.model for token in answer.trace] == [writer for writer, *_ in told]
        for token, (_, share, logprob) in zip(answer.trace, told, strict=True):
            assert token.score == pytest.approx(share, abs=1e-5)
            assert token.logprob == pytest.approx(logprob, abs=1e-4)
        writers |= {token.model for token in answer.trace}
        # An expert runs where it is blended in or writes, and nowhere else.
        n_asked = sum(writer != "base" for writer, *_ in told)
        assert answer.usage["left"].forwards + answer.usage["right"].forwards == n_asked
    assert {"base", "mixture"} <= writers and writers & {"left", "right"}


def test_momentum_changes_who_writes_less_often() -> None:
    trio = tables("base", "left", "right", hidden=True)

    def n_changes(momentum: float) -> int:
        policy = CprPolicy(network=network(WIDTH, 2, scale=3.0), momentum=momentum)
        answers = trio.generate(TEXTS, policy, max_new_tokens=12, temperature=1.0, seed=1)
        writers = [[token.model for token in answer.trace] for answer in answers]
        return sum(a != b for text in writers for a, b in pairwise(text))

    assert n_changes(0.9) < n_changes(0.0)


def test_without_momentum_and_blend_it_is_the_router_with_that_threshold() -> None:
    trio = tables("base", "left", "right", hidden=True)
    weights = network(WIDTH, 2)
    cpr = CprPolicy(network=weights, momentum=0.0, low=0.6, high=0.6)
    router = MlpRouterPolicy(network=weights, threshold=0.6)
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}):
        one, other = (
            trio.generate(TEXTS, policy, max_new_tokens=12, seed=2, **settings)
            for policy in (cpr, router)
        )
        told = [[[(t.id, t.model) for t in a.trace] for a in answers] for answers in (one, other)]
        assert told[0] == told[1]


def test_at_the_ends_it_is_the_base_model_and_the_experts() -> None:
    trio = tables("base", "left", "right", hidden=True)
    weights = network(WIDTH, 2)
    never = trio.generate(TEXTS, CprPolicy(network=weights, low=1.0, high=1.0), max_new_tokens=8)
    alone = trio.generate(TEXTS, "single", max_new_tokens=8)
    assert [a.text for a in never] == [a.text for a in alone]
    assert all(token.model == "base" for answer in never for token in answer.trace)
    always = trio.generate(TEXTS, CprPolicy(network=weights, low=0.0, high=0.0), max_new_tokens=8)
    assert not any(token.model == "base" for answer in always for token in answer.trace)


def test_with_a_price_on_cost_that_nothing_is_worth_the_base_model_writes_alone() -> None:
    trio = tables("base", "left", "right", hidden=True)
    policy = CprPolicy(network=network(WIDTH, 2), low=0.1, high=0.1, cost_weight=1e9)
    answers = trio.generate(TEXTS, policy, max_new_tokens=8)
    alone = trio.generate(TEXTS, "single", max_new_tokens=8)
    assert [a.text for a in answers] == [a.text for a in alone]
    assert all(a.usage["left"].forwards + a.usage["right"].forwards == 0 for a in answers)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_keeps_the_laws(momentum: float) -> None:
    for n_outputs in (1, 2):
        check_policy(CprPolicy(network=network(6, n_outputs), momentum=momentum))


def test_schedules_and_batches_change_no_token() -> None:
    policy = CprPolicy(network=network(WIDTH, 2))
    check_routing(tables("base", "l", "r", hidden=True), TEXTS[:2], policy, max_new_tokens=5)


def test_it_learns_who_is_right_where_the_base_model_is_not(tmp_path) -> None:
    pair = tables("base", "left", hidden=True)
    score(pair, open_corpus(write(tmp_path / "d.jsonl", records(30))), tmp_path / "out",
          features=["hidden"])  # fmt: skip
    table = load_table(tmp_path / "out")
    training = {"network": "linear", "epochs": 2}
    policy = CprPolicy(momentum=0.2).fit(table, Training(dict(training)))
    router = MlpRouterPolicy().fit(table, Training(dict(training)))
    assert policy.network is not None and router.network is not None
    assert torch.equal(policy.network["0.weight"], router.network["0.weight"])
    assert policy.momentum == 0.2 and list(policy.made_for or {}) == ["base", "left"]
    answers = pair.generate(TEXTS, policy, max_new_tokens=6)
    assert all(answer.text for answer in answers)
    with pytest.raises(CapabilityError, match="was made for"):
        tables("base", "right", seeds=(0, 3), hidden=True).generate(TEXTS, policy)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cpr: low: must be at most high \(0.3\), got 0.5\."):
        CprPolicy(low=0.5, high=0.3)
    trio = tables("base", "left", "right", hidden=True)
    with pytest.raises(CapabilityError, match="was made for 2 models, and this ensemble has 3"):
        trio.generate(TEXTS, CprPolicy(network=network(WIDTH, 1)))

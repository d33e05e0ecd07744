"""What policies declare about their thresholds holds: of all that are registered."""

from __future__ import annotations

import pytest
import torch
from score_worlds import records, tables
from tables import TOKENS

import multicolm
from multicolm.artefacts import Weights
from multicolm.errors import ConfigError
from multicolm.plugins import policies
from multicolm.policy.base import Policy
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.mlp_router import MlpRouterPolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.views import ModelNames, View, Views

N = 64
WIDTH = len(TOKENS) + 1


def learned(scale: float = 2.0) -> Weights:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(2, WIDTH, generator=generator) * scale
    return Weights({"0.weight": weight, "0.bias": torch.zeros(2)})


def ready(kind: str) -> Policy:
    """A policy of this kind that can be asked, in the form that has a threshold if one has."""
    if kind == "co-llm":
        return CoLlmPolicy(head=learned(), decode="threshold")
    if kind == "mlp-router":
        return MlpRouterPolicy(network=learned())
    return policies.get(kind)()


WITH_THRESHOLD = [kind for kind in policies if ready(kind).deferral is not None]
TUNABLE = [kind for kind in policies if ready(kind).tunable]


def views(policy: Policy, seed: int) -> Views:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(3, N, 1, generator=generator) * 6
    logits = torch.randn(3, N, len(TOKENS), generator=generator) * scale
    hidden = torch.randn(N, WIDTH, generator=generator)
    shown = {k: View(logits[k], hidden if k == 0 else None) for k in range(3)}
    # The base wrote before, so that no policy has a word to finish.
    context = {"previous": lambda: torch.zeros(N, dtype=torch.long)}
    starts_word = torch.ones(len(TOKENS), dtype=torch.bool)
    names = ModelNames(["base_", "one", "two"])
    return Views(names, shown, n_positions=N, context=context, starts_word=starts_word)


def test_the_kinds_with_one_threshold_are_these() -> None:
    known = {"co-llm", "confidence", "entropy", "margin", "mlp-router", "nudging"}
    assert set(WITH_THRESHOLD) == known


@pytest.mark.parametrize("decode", ["argmax", "sample", "mixture"])
def test_co_llm_has_a_threshold_only_where_it_decodes_by_one(decode: str) -> None:
    policy = CoLlmPolicy(head=learned(), decode=decode)
    assert policy.deferral is None
    assert not policy.tunable


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", WITH_THRESHOLD)
def test_it_hands_over_exactly_where_the_score_is_strictly_beyond_the_threshold(
    kind: str, seed: int
) -> None:
    policy = ready(kind)
    deferral = policy.deferral
    assert deferral is not None
    seen = views(policy, seed)
    scores = policy.score(seen)
    n_seen = set()
    # Thresholds that are scores themselves: there a score that is equal is not handed over.
    for threshold in [deferral.never, deferral.always, *scores[::4].tolist()]:
        at = resolve_policy(policy, {deferral.param: threshold})
        beyond = scores > threshold if deferral.above else scores < threshold
        assert at.defers(seen).tolist() == beyond.tolist()
        wrote = at.defers(seen) & (at.select(seen) != 0)
        assert wrote.tolist() == beyond.tolist()
        torch.testing.assert_close(at.score(seen), scores, rtol=0, atol=0)
        n_seen.add(int(beyond.sum()))
    assert {0, N} <= n_seen and len(n_seen) > 10


@pytest.mark.parametrize("kind", WITH_THRESHOLD)
def test_scores_at_their_limits_are_on_the_right_side_of_never_and_always(kind: str) -> None:
    policy = ready(kind)
    deferral = policy.deferral
    assert deferral is not None
    certain = torch.full((N, len(TOKENS)), float("-inf"))
    certain[:, 0] = 0.0
    flat = torch.zeros(N, len(TOKENS))
    for logits, size in ((certain, 1e4), (certain, -1e4), (flat, 1e4), (flat, -1e4)):
        shown = {k: View(logits, torch.full((N, WIDTH), size)) for k in range(3)}
        context = {"previous": lambda: torch.zeros(N, dtype=torch.long)}
        names = ModelNames(["base_", "one", "two"])
        seen = Views(names, shown, n_positions=N, context=context)
        never = resolve_policy(policy, {deferral.param: deferral.never})
        assert not never.defers(seen).any()
        always = resolve_policy(policy, {deferral.param: deferral.always})
        assert always.defers(seen).all()


@pytest.mark.parametrize("kind", WITH_THRESHOLD)
def test_never_is_the_base_model_alone_and_always_is_without_it(kind: str) -> None:
    ensemble = tables("base_", "one", "two", hidden=True)
    policy = ready(kind)
    deferral = policy.deferral
    assert deferral is not None
    prompts = [record["prompt"] for record in records(6)]

    def written(asked: Policy | str) -> multicolm.Answers:
        return ensemble.generate(prompts, asked, max_new_tokens=8, seed=0)

    never = written(resolve_policy(policy, {deferral.param: deferral.never}))
    assert [a.text for a in never] == [a.text for a in written("single")]
    assert {token.model for answer in never for token in answer.trace} == {"base_"}
    # There thresholds are found, so there a score has to be at every token.
    assert all(token.score is not None for answer in never for token in answer.trace)
    always = written(resolve_policy(policy, {deferral.param: deferral.always}))
    assert "base_" not in {token.model for answer in always for token in answer.trace}


@pytest.mark.parametrize("kind", TUNABLE)
def test_every_value_that_is_called_worth_trying_is_accepted_and_makes_a_difference(
    kind: str,
) -> None:
    policy = ready(kind)
    for param, values in policy.tunable.items():
        made = [resolve_policy(policy, {param: value}) for value in values]
        assert [each.as_config()["params"][param] for each in made] == list(values)
        assert len(values) >= 2
        assert list(values) == sorted(set(values))
    deferral = policy.deferral
    if deferral is not None:
        assert list(policy.tunable) == [deferral.param]


def test_thresholds_that_lead_nowhere_are_refused() -> None:
    for kind in WITH_THRESHOLD:
        policy = ready(kind)
        assert policy.deferral is not None
        with pytest.raises(ConfigError, match=policy.deferral.param):
            resolve_policy(policy, {policy.deferral.param: float("nan")})

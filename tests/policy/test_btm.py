"""Branch-Train-Merge: the posterior over models that the prompt and the text so far give."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tables import random_table

from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.policy.btm import BtmPolicy
from multicolm.scoring.likelihood import LikelihoodReader
from multicolm.testing import check_policy, check_routing

TOKENS = ("a", "b", "c", "d")
BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>")
PROMPTS = ["a", "ab", " cfa", "dd", "abba"]
TRIO = [random_table(name, seed) for seed, name in enumerate(["base", "left", "right"])]


def nll(model: TableModel, ids: list[int], first: int) -> float:
    return -sum(
        float(model.logits_after(ids[:i]).log_softmax(-1)[ids[i]]) for i in range(first, len(ids))
    )


def mixed(models: list[TableModel], prior: list[float], ids: list[int], first: int) -> Any:
    """The stated distribution after ``ids``, whose tokens from ``first`` on count."""
    logits = torch.tensor([math.log(p) if p else -math.inf for p in prior])
    weights = (logits - torch.tensor([nll(model, ids, first) for model in models])).softmax(0)
    each = torch.stack([model.logits_after(ids).softmax(-1) for model in models])
    return (each * weights[:, None]).sum(0)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_weights_are_the_posterior_that_prompt_and_text_give(prompt: bool, schedule: Any) -> None:
    prior = [0.5, 0.2, 0.3]
    policy = BtmPolicy(weights=prior, prompt=prompt)
    answers = Ensemble(TRIO).generate(PROMPTS, policy, schedule=schedule, max_new_tokens=6)
    for answer in answers:
        ids = TRIO[0].tokenizer.encode(answer.prompt)
        first = 1 if prompt else len(ids)
        for token in answer.trace:
            probs = mixed(TRIO, prior, ids, first)
            assert token.id == int(probs.argmax())
            assert token.logprob == pytest.approx(float(probs.max().log()), abs=1e-4)
            ids = [*ids, token.id]


def test_sampled_text_follows_the_posterior_mixture() -> None:
    own = [
        TableModel(
            "one",
            TOKENS,
            {
                "": {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1},
                "a": {"a": 0.1, "b": 0.6, "c": 0.1, "d": 0.2},
            },
        ),
        TableModel(
            "two",
            TOKENS,
            {
                "": {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4},
                "a": {"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1},
            },
        ),
    ]
    n, prompt = 900, "da"
    answers = Ensemble(own).generate(
        [prompt] * n,
        "btm",
        max_new_tokens=2,
        temperature=1.0,
        seed=range(n),
        batch_size=500,
        schedule="block",
    )
    ids = own[0].tokenizer.encode(prompt)
    pairs = list(product(range(4), repeat=2))
    drawn = [tuple(token.id for token in answer.trace) for answer in answers]

    def p_value(step: Any) -> float:
        one = step(ids)
        wanted = torch.tensor([float(one[i]) * float(step([*ids, i])[j]) for i, j in pairs])
        counts = [drawn.count(pair) for pair in pairs]
        return float(chisquare(counts, (wanted.double() / wanted.double().sum() * n)).pvalue)

    assert p_value(lambda after: mixed(own, [0.5, 0.5], after, 1)) > 1e-3
    # The test would see it if the two weighed the same everywhere.
    each = lambda after: torch.stack([m.logits_after(after).softmax(-1) for m in own])  # noqa: E731
    assert p_value(lambda after: each(after).mean(0)) < 1e-3


def texts(policy: Any, models: list[TableModel], prompts: list[str] = PROMPTS) -> list[str]:
    return [a.text for a in Ensemble(models).generate(prompts, policy, max_new_tokens=8)]


def test_a_prior_on_one_model_is_that_model_alone_and_runs_no_other() -> None:
    ensemble = Ensemble(TRIO)
    answers = ensemble.generate(PROMPTS, BtmPolicy(weights={"left": 1.0}), max_new_tokens=8)
    alone = texts({"kind": "single", "params": {"model": "left"}}, TRIO)
    assert [a.text for a in answers] == alone
    assert all(a.usage["base"].forwards == a.usage["right"].forwards == 0 for a in answers)


def test_identical_models_are_one_of_them() -> None:
    twins = [random_table(name, 4) for name in ("base", "left", "right")]
    assert texts("btm", twins) == texts("single", twins)


def test_a_model_that_rules_the_text_out_weighs_nothing_and_all_of_them_the_prior() -> None:
    sure = {"a": 0.5, "b": 0.5}
    own = [
        TableModel("base", ["a", "b"], {"": sure, "b": {"a": 1.0}}),
        TableModel("left", ["a", "b"], {"": {"a": 1.0}, "b": {"b": 1.0}}),
    ]
    # After "ab", which the second rules out, the first writes alone.
    assert texts("btm", own, ["ab"]) == ["a" + "a" * 7]
    never = [
        TableModel(name, ["a", "b"], {"": {"a": 1.0}, "b": {"b": p, "a": 1 - p}})
        for name, p in (("base", 0.9), ("left", 0.2))
    ]
    # Both rule "b" out after "a": by the prior .5 and .5, the mean of .9 and .2 is "b".
    [answer] = Ensemble(never).generate(["ab"], "btm", max_new_tokens=1)
    assert answer.text == "b"
    assert answer.trace.tokens[0].logprob == pytest.approx(math.log(0.55), abs=1e-5)


def test_of_the_top_k_models_the_others_read_the_prompt_and_no_more() -> None:
    ensemble = Ensemble(TRIO)
    chosen = set()
    answers = ensemble.generate(PROMPTS, BtmPolicy(top_k=1), max_new_tokens=8)
    for answer in answers:
        ids = TRIO[0].tokenizer.encode(answer.prompt)
        best = min(TRIO, key=lambda model: nll(model, ids, 1))
        chosen.add(best.name)
        single = {"kind": "single", "params": {"model": best.name}}
        assert answer.text == texts(single, TRIO, [answer.prompt])[0]
        for name, usage in answer.usage.items():
            if name != best.name:
                assert usage.tokens_read <= len(ids)
    assert len(chosen) > 1
    every = texts(BtmPolicy(top_k=3), TRIO)
    assert every == texts("btm", TRIO)


@pytest.mark.parametrize("params", [{}, {"top_k": 1}, {"top_k": 2, "prompt": False}])
def test_it_keeps_the_laws(params: Any) -> None:
    check_policy(BtmPolicy(**params))
    if params:
        check_routing(Ensemble(TRIO), PROMPTS[:3], BtmPolicy(**params), max_new_tokens=6)


def test_models_of_two_vocabularies_are_weighed_by_their_own_tokens() -> None:
    own = [random_table("base", 1, BASE), random_table("left", 2, LEFT)]
    check_routing(Ensemble(own), ["ab", "c"], BtmPolicy(), max_new_tokens=6)
    [answer] = Ensemble(own).generate(["abc"], BtmPolicy(weights=[0.0, 1.0]), max_new_tokens=6)
    [alone] = Ensemble([own[1]]).generate(["abc"], "single", max_new_tokens=1)
    assert answer.text.startswith(alone.text)


@pytest.mark.parametrize("params", [{}, {"top_k": 2}])
def test_a_given_text_is_as_likely_as_it_was_when_it_was_written(params: Any) -> None:
    policy = BtmPolicy(**params)
    answers = Ensemble(TRIO).generate(PROMPTS, policy, max_new_tokens=8)
    whole = [a for a in answers if a.finish_reason == "length"]
    reader = LikelihoodReader(Ensemble(TRIO), policy)
    found = reader.likelihoods([reader.passage(a.prompt, a.text) for a in whole])
    for answer, likelihood in zip(whole, found, strict=True):
        written = sum(token.logprob for token in answer.trace)
        assert likelihood.logprob == pytest.approx(written, abs=1e-3)

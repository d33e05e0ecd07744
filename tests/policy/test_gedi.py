"""Steering by what the text becomes: the classifier's answers, and texts that cannot be."""

from __future__ import annotations

import math

import pytest
import torch
from tables import random_table

from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.testing import check_routing

TRIO = Ensemble([random_table(name, seed) for seed, name in enumerate(("base", "kind", "rude"))])


def one(name: str, **first: float) -> TableModel:
    return TableModel(name, ["p", "x", "y", "z", "."], {"": first, "x": {"y": 1.0}}, ["."])


@pytest.mark.parametrize(("alpha", "normalise"), [(1.0, False), (5.0, True)])
def test_a_token_has_the_probability_of_the_product(alpha: float, normalise: bool) -> None:
    params = {"alpha": alpha, "normalise": normalise, "attribute": "kind", "opposite": "rude"}
    policy = {"kind": "gedi", "params": params}
    answers = TRIO.generate(["a"] * 4, policy, max_new_tokens=6, temperature=1.0, seed=range(4))
    answer = max(answers, key=lambda a: len(a.trace.tokens))
    base, kind, rude = TRIO.backends
    assert isinstance(base, TableModel) and isinstance(kind, TableModel)
    assert isinstance(rude, TableModel)
    ids, odds = kind.tokenizer.encode("a"), 0.0
    for place, token in enumerate(answer.trace):
        before = odds / max(place, 1) if normalise else odds
        assert token.score == pytest.approx(1 / (1 + math.exp(-before)), abs=1e-5)
        step = kind.logits_after(ids) - rude.logits_after(ids)
        after = (odds + step) / (place + 1 if normalise else 1)
        weighed = (base.logits_after(ids).exp() * after.sigmoid() ** alpha).log().log_softmax(-1)
        assert token.logprob == pytest.approx(float(weighed[token.id]), abs=1e-4)
        odds += float(step[token.id])
        ids.append(token.id)
    assert len(ids) > 3


def test_what_was_written_before_counts() -> None:
    """With the text undecided the attribute decides; once it is clear, the base model does."""
    base = one("base", x=0.2, y=0.5, z=0.3)
    plus, minus = one("plus", x=0.9, y=0.05, z=0.05), one("minus", x=0.05, y=0.9, z=0.05)
    [answer] = Ensemble([base, plus, minus]).generate(["p"], "gedi", max_new_tokens=1)
    assert answer.text == "x"
    # 0.2 * 0.947 against 0.5 * 0.053 and 0.3 * 0.5
    assert math.exp(answer.trace.tokens[0].logprob) == pytest.approx(0.5187, abs=1e-3)


def test_a_token_that_only_the_opposite_can_write_does_not_come() -> None:
    base = one("base", x=0.1, y=0.9)
    plus, minus = one("plus", x=0.5, z=0.5), one("minus", y=0.5, z=0.5)
    ensemble = Ensemble([base, plus, minus])
    for seed in range(20):
        [answer] = ensemble.generate(["p"], "gedi", max_new_tokens=1, temperature=1.0, seed=seed)
        assert answer.text == "x"


def test_a_text_that_both_rule_out_is_written_on_by_the_base_model() -> None:
    base = one("base", y=1.0)
    plus, minus = one("plus", x=1.0), one("minus", z=1.0)
    [answer] = Ensemble([base, plus, minus]).generate(["p"], "gedi", max_new_tokens=3)
    assert answer.text == "yyy"
    assert all(math.isfinite(token.logprob) for token in answer.trace)


@pytest.mark.parametrize("normalise", [False, True])
def test_it_keeps_the_laws_of_the_loop(normalise: bool) -> None:
    policy = {"kind": "gedi", "params": {"alpha": 2.0, "normalise": normalise}}
    check_routing(TRIO, ["a", "b c"], TRIO.resolve(policy), max_new_tokens=4)


def test_a_strong_steering_writes_what_the_attributes_model_prefers() -> None:
    policy = {"kind": "gedi", "params": {"alpha": 8.0}}
    prompts = ["a", "b c", "dd", "f", " e"]
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    steered = TRIO.generate(prompts, policy, **settings)
    plain = TRIO.generate(prompts, "single", **settings)

    def odds(answer: object) -> float:
        ids = TRIO.backends[0].tokenizer.encode(answer.prompt)  # type: ignore[attr-defined]
        total = torch.zeros(())
        for token in answer.trace:  # type: ignore[attr-defined]
            kind, rude = (TRIO.backends[k].logits_after(ids) for k in (1, 2))  # type: ignore[attr-defined]
            total += kind[token.id] - rude[token.id]
            ids.append(token.id)
        return float(total)

    assert sum(map(odds, steered)) > 10 + sum(map(odds, plain))
